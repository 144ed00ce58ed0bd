"""The paper's theorems on the real losses: what experiments/theorems.py prints and draws."""

import pytest
import theorems
import torch


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", theorems.CASES, ids=lambda case: f"{case[1]}-{case[3]}")
def test_gradient_descent_ends_at_softmax_of_the_rewards_over_alpha(case, alpha):
    _, loss, n, settings = case
    data = theorems.preference_data(n, loss == "spo_rank", seed=35)
    assert float(data.probability.sum()) == pytest.approx(1.0)
    policy = theorems.descend(
        lambda p: theorems.expected_loss(p, data, loss, alpha=alpha, **settings), 4 / alpha
    )
    assert torch.allclose(policy.exp(), torch.softmax(theorems.REWARDS / alpha, 0), atol=1e-6)


def test_as_the_reference_weakens_dpo_hardens_and_spo_stays_at_its_alpha(capsys):
    results = theorems.softness(seed=35)
    (_, dpo_strong, _), (_, dpo_weak, spo_weak) = results[0], results[-1]
    assert dpo_strong > 1.5 and dpo_weak < 1e-3
    assert spo_weak == pytest.approx(
        theorems.entropy(torch.log_softmax(theorems.REWARDS, 0)), abs=0.1
    )


def test_at_alpha_0_uneven_sampling_ends_on_the_response_that_wins_most_and_not_on_the_best(capsys):
    theorems.without_softness(seed=35)
    even, uneven = [line for line in capsys.readouterr().out.splitlines() if "sampling:" in line]
    assert "mass on response 0" in even and "mass on response 1" in uneven
    assert "best by r: 0; alpha 0.02 ends on 0" in uneven


def test_a_weight_that_is_not_symmetric_moves_the_fixed_point():
    """So the agreement above is the theorem's, and not that of any weight."""
    data = theorems.preference_data(2, True, seed=35)

    def loss(log_policy):
        by_winner = 2 * torch.sigmoid(4 * log_policy[data.rows[:, 0]].exp().detach())
        return (
            data.probability
            * by_winner
            * theorems.LOSSES["spo_basic"](log_policy[data.rows], alpha=0.5)
        ).sum()

    assert (
        theorems.descend(loss, 8.0).exp() - torch.softmax(theorems.REWARDS / 0.5, 0)
    ).abs().max() > 0.02


def test_dpo_ends_at_the_reference_times_exp_of_the_rewards_over_beta():
    data = theorems.preference_data(2, True, seed=35)
    policy = theorems.descend(lambda p: theorems.expected_loss(p, data, "dpo", beta=0.5), 16.0)
    assert torch.allclose(
        policy.exp(), torch.softmax(theorems.REFERENCE + theorems.REWARDS / 0.5, 0), atol=1e-6
    )


def test_the_script_prints_its_tables_and_draws_its_figure(tmp_path, capsys, monkeypatch):
    descend = theorems.descend  # a short descent: the figures are not looked at here
    monkeypatch.setattr(
        theorems, "descend", lambda objective, rate, steps=0: descend(objective, rate, steps=20)
    )
    theorems.main([f"--out={tmp_path / 'figure.png'}"])
    out = capsys.readouterr().out
    assert (
        "alpha = 0" in out
        and "spo_rank" in out
        and (tmp_path / "figure.png").stat().st_size > 10_000
    )
