"""head.py against losses.py: the same numbers from hidden states, block by block, as from all
logits at once.
"""

import pytest
import torch
from helpers import gradients_of, perturbed, random_groups, tiny

import losses
from spo import head
from spo.groups import make_batch
from spo.head import ReferenceStates

D, V = 16, 300
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(params=[2**23, 64 * V], ids=["one block", "several blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(head, "NUMBERS_PER_BLOCK", {"cpu": request.param})
    monkeypatch.setattr(head, "spare", {})


def problem(dtype, seed=0):
    """Ragged sequences, one without a scored token: hidden states of two models, their classifiers,
    tokens, mask.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    tokens = torch.randint(0, V, (5, 60), generator=generator)
    mask = torch.zeros(5, 60, dtype=torch.bool)
    for row, (start, end) in enumerate([(1, 60), (0, 3), (20, 41), (0, 0), (5, 59)]):
        mask[row, start:end] = True
    return random(5, 60, D), random(V, D), random(5, 60, D), random(V, D), tokens, mask


def test_logits_of_bfloat16_states_are_not_rounded(block):
    """Rounded, they would make a KL of 0.04 nats a story out of none."""
    hidden, classifier, other, other_classifier, tokens, mask = (
        x.detach() for x in problem(torch.bfloat16)
    )
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        reference = ReferenceStates(other.to(dtype), other_classifier.to(dtype))
        policy = hidden.to(dtype), classifier.to(dtype)
        logps = head.logps_from_hidden(*policy, tokens, mask)
        results.append([logps, *head.kl_from_hidden(*policy, reference, mask)])
    for mine, exact in zip(*results, strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine.double(), exact, rtol=1e-5, atol=1e-4)


def both(ours, formula, inputs):
    """[(value, gradients...)] of the two, under the same uneven weights of the sequences."""
    results = []
    for function in (ours, formula):
        value = function()
        gradients = torch.autograd.grad((value * torch.arange(1, 6).to(value)).sum(), inputs)
        results.append((value.detach(), *gradients))
    return results


def assert_equal(results, dtype):
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.allclose(
            mine,
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * float(expected.abs().max()),
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sequence_logps_and_gradients_equal_those_of_the_logits(dtype, block):
    hidden, classifier, _, _, tokens, mask = problem(dtype)
    assert_equal(
        both(
            lambda: head.logps_from_hidden(hidden, classifier, tokens, mask),
            lambda: losses.sequence_logps(hidden @ classifier.t(), tokens, mask),
            [hidden, classifier],
        ),
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_token_kl_and_gradients_equal_those_of_the_logits(dtype, block):
    hidden, classifier, other, other_classifier, _, mask = problem(dtype)
    assert_equal(
        both(
            lambda: head.kl_from_hidden(
                hidden, classifier, ReferenceStates(other, other_classifier), mask
            )[0],
            lambda: losses.token_kl(hidden @ classifier.t(), other @ other_classifier.t(), mask),
            [hidden, classifier],
        ),
        dtype,
    )
    value = head.kl_from_hidden(hidden, classifier, ReferenceStates(other, other_classifier), mask)[
        0
    ]
    assert torch.autograd.grad(value.sum(), [other, other_classifier], allow_unused=True) == (
        None,
        None,
    )


def test_gradients_equal_finite_differences(block):
    hidden, classifier, other, other_classifier, tokens, mask = problem(torch.float64)
    hidden, classifier = (
        hidden[:2, :6].detach().requires_grad_(),
        classifier[:7].detach().requires_grad_(),
    )
    other, other_classifier, tokens, mask = (
        other[:2, :6],
        other_classifier[:7],
        tokens[:2, :6] % 7,
        mask[:2, :6],
    )
    functions = (
        lambda h, c: head.logps_from_hidden(h, c, tokens, mask).sum(),
        lambda h, c: head.kl_from_hidden(h, c, ReferenceStates(other, other_classifier), mask)[
            0
        ].sum(),
    )
    for function in functions:
        for which, gradient in enumerate(
            torch.autograd.grad(function(hidden, classifier), [hidden, classifier])
        ):
            for index in torch.randint(
                0, gradient.numel(), (20,), generator=torch.Generator().manual_seed(1)
            ).tolist():
                values = []
                for step in (1e-6, -1e-6):
                    moved = [hidden.detach().clone(), classifier.detach().clone()]
                    moved[which].view(-1)[index] += step
                    values.append(float(function(*moved)))
                assert gradient.view(-1)[index] == pytest.approx(
                    (values[0] - values[1]) / 2e-6, abs=1e-7
                )


def test_a_second_backward_pass_is_refused(block):
    hidden, classifier, _, _, tokens, mask = problem(torch.float32)
    value = head.logps_from_hidden(hidden, classifier, tokens, mask).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        value.backward()


def test_a_policy_equal_to_its_reference_has_kl_zero(block):
    hidden, classifier, _, _, _, mask = problem(torch.float32)
    assert (
        head.kl_from_hidden(hidden, classifier, ReferenceStates(hidden, classifier), mask)[
            0
        ].tolist()
        == [0.0] * 5
    )


def test_without_gradients_nothing_is_kept_and_blocks_are_used_again(block):
    hidden, classifier, _, _, tokens, mask = problem(torch.float32)
    with torch.no_grad():
        value = head.logps_from_hidden(hidden, classifier, tokens, mask)
        (blocks,) = head.spare.values()
        assert len(blocks) == 1
    again = head.logps_from_hidden(hidden, classifier, tokens, mask)
    other = head.logps_from_hidden(
        hidden.detach() + 1, classifier, tokens, mask
    )  # a second graph before the first is used
    other.sum().backward()
    assert torch.equal(again, value)
    expected = torch.autograd.grad(
        losses.sequence_logps(hidden @ classifier.t(), tokens, mask).sum(), hidden
    )[0]
    assert torch.allclose(torch.autograd.grad(again.sum(), hidden)[0], expected, atol=1e-5)
    scored = int(mask[:, 1:].sum())
    assert sum(len(b) for b in blocks) >= scored  # all are back
    count = len(blocks)
    head.logps_from_hidden(hidden, classifier, tokens, mask).sum().backward()
    assert len(blocks) == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_entropy_is_that_of_the_logits(dtype, block):
    hidden, classifier, other, other_classifier, _, mask = problem(dtype)
    reference = ReferenceStates(other, other_classifier)
    _, entropy = head.kl_from_hidden(hidden, classifier, reference, mask)
    logps = (hidden @ classifier.t()).log_softmax(-1)
    expected = (-(logps.exp() * logps).sum(-1)[:, :-1] * mask[:, 1:]).sum(1)
    assert not entropy.requires_grad
    assert torch.allclose(entropy, expected, rtol=TOLERANCE[dtype])


def test_the_functions_of_a_model_and_a_batch_equal_those_of_losses():
    """sequence_logps, token_kl and logps_and_kl, as (B, n), against all logits of the models."""
    policy, reference = perturbed(tiny().double()), tiny().double()
    batch = make_batch(random_groups(5, 3))
    logits, others = policy(batch.tokens), reference(batch.tokens)
    logps = losses.sequence_logps(logits, batch.tokens, batch.mask).view(5, 3)
    kl = losses.token_kl(logits, others, batch.mask).view(5, 3)
    states = head.reference_states(reference, batch)
    torch.testing.assert_close(head.sequence_logps(policy, batch), logps)
    torch.testing.assert_close(head.token_kl(policy, batch, states)[0], kl)
    torch.testing.assert_close(head.logps_and_kl(policy, batch, states), (logps, kl))
    gradients = []
    for value in (head.logps_and_kl(policy, batch, states), (logps, kl)):
        policy.zero_grad()
        (value[0].sum() + 2 * value[1].sum()).backward()
        gradients.append(gradients_of(policy))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)
