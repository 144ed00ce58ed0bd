"""Each loss against values worked by hand and a slow reference in plain Python; the traps of the paper."""

import itertools
import math

import pytest
import torch

from losses import LOSSES, sequence_logps, token_kl, weight_statistic

DOUBLE = torch.float64


def slow_spo_rank(rows, alpha, gamma, eta):
    """Eq. 17 with the weight of Eq. 13, term by term, in Python floats."""

    def lse(xs):
        return max(xs) + math.log(sum(math.exp(x - max(xs)) for x in xs))

    n = len(rows[0])
    statistic = [[math.exp(gamma * lse(row[k:])) for k in range(n - 1)] for row in rows]
    means = [sum(s[k] for s in statistic) / len(rows) for k in range(n - 1)]
    values = []
    for row, s in zip(rows, statistic):
        total = 0.0
        for k in range(n - 1):
            mu = 2 / (1 + math.exp(-(s[k] - means[k])))
            if alpha == 0:
                term = sum(row[k:]) / (n - k) - row[k]
            else:
                term = (lse([alpha * x for x in row[k:]]) - alpha * row[k]) / alpha
            total += eta ** (k + 1) * mu * term
        values.append(total)
    return values


def slow_dpo_rank(rows, references, beta):
    values = []
    for row, reference in zip(rows, references):
        s = [beta * (x - q) for x, q in zip(row, reference)]
        values.append(sum(math.log(sum(math.exp(b - s[k]) for b in s[k:])) for k in range(len(s) - 1)))
    return values


def story_logps(groups: int, n: int, seed: int = 0) -> torch.Tensor:
    """Log-probs 50 nats and more apart: nearer ones would hide a missing weight."""
    return torch.randn(groups, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 60 - 220


@pytest.mark.parametrize("alpha,gamma,eta", [(0.001, 0.01, 1.0), (0.1, 0.01, 0.5), (1.0, 0.0, 1.0), (0.0, 0.01, 1.0)])
def test_spo_rank_equals_the_slow_reference(alpha, gamma, eta):
    logps = story_logps(6, 4)
    expected = torch.tensor(slow_spo_rank(logps.tolist(), alpha, gamma, eta), dtype=DOUBLE)
    value = LOSSES["spo_rank"](logps, alpha=alpha, gamma=gamma, eta=eta)
    assert value.dtype == DOUBLE and torch.allclose(value, expected, rtol=1e-10, atol=0)


def test_spo_basic_by_hand():
    """logps -1 and -3, alpha 0.5: d = 2, softplus(-1) / 0.5 = 2 log(1 + 1/e) = 0.626523; alpha 0: -1."""
    logps = torch.tensor([[-1.0, -3.0]], dtype=DOUBLE)
    assert LOSSES["spo_basic"](logps, alpha=0.5).item() == pytest.approx(0.6265233750364456, abs=1e-12)
    assert LOSSES["spo_basic"](logps, alpha=0.0).item() == -1.0


def test_weight_by_hand():
    """Groups of log(p0 + p1) = 0 and log 4 with gamma 1/2: t = 1, 2, mean 1.5, mu = 2 sigmoid(-+0.5)."""
    logps = torch.log(torch.tensor([[0.5, 0.5], [2.0, 2.0]], dtype=DOUBLE))
    ratio = LOSSES["spo"](logps, alpha=0.1, gamma=0.5) / LOSSES["spo_basic"](logps, alpha=0.1)
    assert torch.allclose(ratio, 2 * torch.sigmoid(torch.tensor([-0.5, 0.5], dtype=DOUBLE)), rtol=1e-12)


def test_weight_survives_story_log_probs_in_float32():
    """exp(-190) is 0 in float32, and a weight formed from it would be 1 in every row without a word."""
    logps = torch.tensor([[-210.0, -190.0], [-150.0, -160.0], [-305.0, -280.0]])
    assert weight_statistic(logps, 0.01)[:, 0].tolist() == pytest.approx([0.150, 0.223, 0.061], abs=1e-3)
    mu = LOSSES["spo"](logps) / LOSSES["spo_basic"](logps)
    assert mu.tolist() == pytest.approx([1.002, 1.039, 0.958], abs=1e-3)


@pytest.mark.parametrize("name", ["spo", "spo_bon", "spo_rank"])
def test_parts_with_the_global_mean_equal_the_whole(name):
    logps = story_logps(8, 2 if name == "spo" else 4)
    mean = weight_statistic(logps, 0.01).mean(0)
    parts = torch.cat([LOSSES[name](part, weight_mean=mean) for part in logps.split(1)])
    assert torch.allclose(parts, LOSSES[name](logps), rtol=1e-14)
    alone = torch.cat([LOSSES[name](part) for part in logps.split(1)])
    assert (alone - parts).abs().max() > 1e-3  # a micro-batch's own mean is another loss


@pytest.mark.parametrize("name", ["spo", "spo_bon", "spo_rank"])
def test_no_gradient_flows_through_the_weight(name):
    """By finite differences with mu held fixed; a gradient through mu would differ."""
    logps = story_logps(3, 2 if name == "spo" else 4) / 20
    mean = weight_statistic(logps, 0.3).mean(0)
    leaf = logps.clone().requires_grad_(True)
    LOSSES[name](leaf, alpha=0.2, gamma=0.3, weight_mean=mean).sum().backward()
    mu = 2 * torch.sigmoid(weight_statistic(logps, 0.3) - mean)

    def with_fixed_weight(x):
        stages = []
        for k in range(1 if name != "spo_rank" else x.shape[1] - 1):
            stages.append(mu[:, k] * (torch.logsumexp(0.2 * x[:, k:], 1) - 0.2 * x[:, k]) / 0.2)
        return torch.stack(stages).sum()

    for i, j in itertools.product(range(3), range(logps.shape[1])):
        step = torch.zeros_like(logps)
        step[i, j] = 1e-5
        slope = (with_fixed_weight(logps + step) - with_fixed_weight(logps - step)) / 2e-5
        assert leaf.grad[i, j].item() == pytest.approx(slope.item(), abs=1e-8)


def test_pairs_are_the_case_n_2_of_every_generalisation():
    pair, reference = story_logps(5, 2), story_logps(5, 2, seed=1)
    assert torch.equal(LOSSES["spo_bon"](pair), LOSSES["spo"](pair))
    assert torch.allclose(LOSSES["spo_rank"](pair, eta=0.5) / 0.5, LOSSES["spo"](pair), rtol=1e-14)
    assert torch.allclose(LOSSES["spo"](pair, gamma=0.0), LOSSES["spo_basic"](pair), rtol=1e-14)
    assert torch.equal(LOSSES["dpo_rank"](pair, reference, beta=0.1), LOSSES["dpo"](pair, reference, beta=0.1))


def test_dpo_is_spo_basic_on_log_ratios():
    logps, reference = story_logps(5, 2), story_logps(5, 2, seed=1)
    spo = LOSSES["spo_basic"](logps - reference, alpha=0.05)
    assert torch.allclose(LOSSES["dpo"](logps, reference, beta=0.05), 0.05 * spo, rtol=1e-12)


def test_dpo_rank_equals_the_slow_reference_and_starts_at_log_n_factorial():
    logps, reference = story_logps(5, 4), story_logps(5, 4, seed=1)
    expected = torch.tensor(slow_dpo_rank(logps.tolist(), reference.tolist(), 0.01), dtype=DOUBLE)
    assert torch.allclose(LOSSES["dpo_rank"](logps, reference, beta=0.01), expected, rtol=1e-10)
    assert LOSSES["dpo_rank"](logps, logps).tolist() == pytest.approx([math.log(24)] * 5)
    assert LOSSES["dpo"](logps[:, :2], logps[:, :2]).tolist() == pytest.approx([math.log(2)] * 5)


def test_best_of_n_ignores_the_order_of_the_rest():
    logps = story_logps(5, 4)
    assert torch.allclose(LOSSES["spo_bon"](logps), LOSSES["spo_bon"](logps[:, [0, 3, 1, 2]]), rtol=1e-14)


def test_sft_is_total_nll_over_total_tokens():
    logps, lengths = torch.tensor([[-10.0, -20.0], [-30.0, -60.0]]), torch.tensor([[5, 10], [5, 20]])
    assert LOSSES["sft"](logps, lengths).mean().item() == pytest.approx(120 / 40)
    assert LOSSES["best_sft"](logps, lengths).mean().item() == pytest.approx(40 / 10)


def test_centering_changes_the_value_by_a_constant_and_not_the_gradient():
    leaf = story_logps(3, 4).requires_grad_(True)
    plain, = torch.autograd.grad(LOSSES["spo_rank"](leaf).sum(), leaf)
    centered, = torch.autograd.grad(LOSSES["spo_rank"](leaf, centered=True).sum(), leaf)
    assert torch.equal(plain, centered)
    assert LOSSES["spo_rank"](torch.zeros(1, 4), centered=True).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gaps_of_ten_thousand_nats_leave_loss_and_gradient_finite(name):
    for gap in (-1e4, -100.0, 0.0, 100.0, 1e4):
        logps = torch.tensor([[-200.0 + gap, -200.0]], requires_grad=True)
        tensors = {"policy_logps": logps, "reference_logps": torch.full((1, 2), -200.0), "lengths": torch.full((1, 2), 99)}
        names = LOSSES[name].__code__.co_varnames[: LOSSES[name].__code__.co_argcount]
        value = LOSSES[name](**{n: tensors[n] for n in names})
        value.sum().backward()
        assert value.shape == (1,) and torch.isfinite(value).all() and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("name", ["spo_basic", "spo", "dpo"])
def test_a_pairwise_loss_refuses_groups_of_three(name):
    tensors = [story_logps(2, 3)] * (2 if name == "dpo" else 1)
    with pytest.raises(ValueError, match="exactly 2"):
        LOSSES[name](*tensors)


def test_wrong_shapes_are_refused_in_words():
    with pytest.raises(ValueError, match="reference_logps has shape"):
        LOSSES["dpo"](story_logps(3, 2), story_logps(1, 2))
    with pytest.raises(ValueError, match="at least 2"):
        LOSSES["spo_rank"](story_logps(3, 1))
    with pytest.raises(ValueError, match="weight_mean"):
        LOSSES["spo_rank"](story_logps(3, 4), weight_mean=torch.zeros(2))


# --- log-probs and KL ----------------------------------------------------------------------------------------------


def random_batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 7, dtype=DOUBLE, generator=generator)
    tokens = torch.randint(7, (3, 6), generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    return logits, tokens, mask


def test_sequence_logps_equal_a_loop_over_tokens():
    logits, tokens, mask = random_batch()
    for row in range(3):
        expected = 0.0
        for t in range(1, 6):
            if mask[row, t]:
                p = [math.exp(x) for x in logits[row, t - 1].tolist()]
                expected += math.log(p[tokens[row, t]] / sum(p))
        assert sequence_logps(logits, tokens, mask)[row].item() == pytest.approx(expected, abs=1e-12)


def test_constant_logits_give_minus_length_log_vocabulary():
    _, tokens, mask = random_batch()
    logps = sequence_logps(torch.zeros(3, 6, 7), tokens, mask)
    assert logps.tolist() == pytest.approx([-n * math.log(7) for n in (5, 2, 1)])


def test_one_logit_moves_only_its_own_sequence():
    logits, tokens, mask = random_batch()
    before = sequence_logps(logits, tokens, mask)
    logits[1, 2] += torch.arange(7)
    assert (sequence_logps(logits, tokens, mask) != before).tolist() == [False, True, False]


def test_padding_changes_nothing():
    logits, tokens, mask = random_batch()
    padded = [torch.nn.functional.pad(x, pad) for x, pad in
              ((logits, (0, 0, 0, 9)), (tokens, (0, 9)), (mask, (0, 9)))]
    assert torch.allclose(sequence_logps(*padded), sequence_logps(logits, tokens, mask), atol=1e-12)
    kl = token_kl(logits, 0.5 * logits, mask)
    assert torch.allclose(token_kl(padded[0], 0.5 * padded[0], padded[2]), kl, atol=1e-12)


def test_bfloat16_logits_are_summed_in_float32():
    logits, tokens, mask = random_batch()
    low = logits.bfloat16()
    value = sequence_logps(low, tokens, mask)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), sequence_logps(low.double(), tokens, mask), atol=1e-5)


def test_token_kl_sums_the_full_distribution_over_scored_tokens():
    logits, _, mask = random_batch()
    other, _, _ = random_batch(seed=1)
    expected = [0.0, 0.0, 0.0]
    for row, t in itertools.product(range(3), range(1, 6)):
        if mask[row, t]:
            p, q = torch.softmax(logits[row, t - 1], 0).tolist(), torch.softmax(other[row, t - 1], 0).tolist()
            expected[row] += sum(a * math.log(a / b) for a, b in zip(p, q))
    assert token_kl(logits, other, mask).tolist() == pytest.approx(expected, abs=1e-12)
    assert token_kl(logits, logits, mask).tolist() == [0.0, 0.0, 0.0]


def test_token_kl_gradient_is_that_of_the_formula_and_spares_the_reference():
    """d KL / d logit(s) = p(s) [log p(s)/ref(s) - KL_t] at every scored step."""
    logits, _, mask = random_batch()
    other, _, _ = random_batch(seed=1)
    logits.requires_grad_(True), other.requires_grad_(True)
    token_kl(logits, other, mask).sum().backward()
    p, ratio = logits.softmax(-1), logits.log_softmax(-1) - other.log_softmax(-1)
    expected = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    expected = torch.cat([expected[:, :-1] * mask[:, 1:, None], torch.zeros(3, 1, 7, dtype=DOUBLE)], dim=1)
    assert torch.allclose(logits.grad, expected, atol=1e-12) and other.grad is None
