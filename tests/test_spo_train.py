"""The training loop: what a step computes, what a run leaves, what it refuses."""

import copy
import dataclasses
import glob
import json
import os
import subprocess
import sys

import pytest
import torch
from test_model import numpy_logits, tiny
from test_tinystories_data import tokenizer, write  # noqa: F401 (a fixture)

import spo_train
import step as steps
import tinystories_data as data
import train_config
from judge import OfflineJudge
from losses import LOSSES, REGULARIZERS, sequence_logps, token_kl
from model import generate
from spo import checkpoint as checkpoints
from spo import sampling
from spo.checkpoint import Checkpoint
from spo.evaluation import Evaluation
from spo.groups import EncodedGroup, make_batch, micro_batches
from spo.parallel import World
from spo.reference import with_reference_logps
from train_config import TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random_groups(count: int, n: int, seed: int = 0) -> list[EncodedGroup]:
    """Groups of unlike lengths, so that their log-probs lie tens of nats apart."""
    generator = torch.Generator().manual_seed(seed)

    def response():
        length = int(torch.randint(2, 40, (1,), generator=generator))
        return torch.randint(2, 64, (length,), generator=generator).tolist() + [1]

    return [
        EncodedGroup([1, 7], [response() for _ in range(n)], line) for line in range(1, count + 1)
    ]


def size_for(loss: str) -> int:
    return 2 if LOSSES[loss].data == "pair" else 4


def perturbed(model):
    """A policy that is not its reference."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return policy


def objective_of(loss: str, **flags):
    return train_config.objective_of(TrainConfig(loss=loss, **flags))


def batches_of(groups, size, reference):
    return micro_batches(with_reference_logps(groups, reference), size, tiny().args, "cpu")


def gradients(objective, policy, reference, batches) -> list[torch.Tensor]:
    policy.zero_grad()
    steps.preference_backward(objective, policy, reference, batches)
    return [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_number_of_micro_batches_never_changes_the_gradient(loss):
    reference = tiny().double()
    policy, groups = perturbed(reference), random_groups(8, size_for(loss))
    number = {"gamma": 0.05} if "gamma" in train_config.settings_of(LOSSES[loss]) else {}
    objective = objective_of(loss, **number)
    whole = gradients(objective, policy, reference, batches_of(groups, 8, reference))
    for size in (1, 3):
        parts = gradients(objective, policy, reference, batches_of(groups, size, reference))
        for a, b in zip(whole, parts):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_step_is_that_of_the_loss_written_out():
    """spo_rank over the whole batch by hand, against three micro-batches of the loop."""
    policy, groups = tiny().double(), random_groups(6, 3)
    objective = objective_of("spo_rank", gamma=0.05)
    ours = gradients(objective, policy, None, micro_batches(groups, 2, tiny().args, "cpu"))
    policy.zero_grad()
    batch = make_batch(groups)
    logps = sequence_logps(policy(batch.tokens), batch.tokens, batch.mask).view(6, 3)
    t = torch.stack([logps.logsumexp(1), logps[:, 1:].logsumexp(1)], 1).detach().mul(0.05).exp()
    mu = 2 * torch.sigmoid(t - t.mean(0))
    a = 0.001
    loss = mu[:, 0] * -(torch.log_softmax(a * logps, 1)[:, 0]) / a
    loss = loss + mu[:, 1] * -(torch.log_softmax(a * logps[:, 1:], 1)[:, 0]) / a
    loss.mean().backward()
    for p, grad in zip(policy.parameters(), ours):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def test_kl_is_zero_at_step_0_and_its_micro_batches_add_up():
    reference = tiny().double()
    start = Checkpoint(copy.deepcopy(reference), {"eos_id": 1})
    config = TrainConfig(kl_batch_size=6, max_new_tokens=20, micro_batch_size=2)
    objective = objective_of("spo_rank", beta=1.0)
    online = spo_train.draw_online(config, start, reference, [[1], [1, 5]], 0)
    assert float(steps.regularizer_backward(objective, start.model, reference, online)["kl"]) == 0.0

    policy = perturbed(reference)
    policy.zero_grad()
    kl = steps.regularizer_backward(objective, policy, reference, online)["kl"]
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    rows = [
        (len(b.tokens), token_kl(policy(b.tokens), reference(b.tokens), b.mask))
        for b in online.batches
    ]
    mean = sum(values.sum() for _, values in rows) / sum(count for count, _ in rows)
    mean.backward()
    assert torch.allclose(kl, mean) and float(kl) > 0
    for p, grad in zip(policy.parameters(), ours):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def test_a_step_descends_the_mean_loss_plus_beta_times_the_mean_kl():
    """spo_basic and its KL written out from all logits, with beta 0.3, against the loop's two passes."""
    reference = tiny().double()
    policy, groups, samples = perturbed(reference), random_groups(6, 2), random_groups(5, 1, seed=1)
    objective = objective_of("spo_basic", alpha=0.5, beta=0.3)
    steps.preference_backward(
        objective, policy, reference, micro_batches(groups, 4, policy.args, "cpu")
    )
    steps.regularizer_backward(
        objective,
        policy,
        reference,
        steps.online_of(TrainConfig(micro_batch_size=2), samples, reference, World()),
    )
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    batch, online = make_batch(groups), make_batch(samples)
    logps = sequence_logps(policy(batch.tokens), batch.tokens, batch.mask).view(6, 2)
    loss = -(torch.log_softmax(0.5 * logps, 1)[:, 0]) / 0.5
    kl = token_kl(policy(online.tokens), reference(online.tokens), online.mask)
    (loss.mean() + 0.3 * kl.mean()).backward()
    for p, grad in zip(policy.parameters(), ours):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def test_every_refresh_draws_other_samples_and_the_same_seed_the_same():
    policy, reference, config = (
        Checkpoint(tiny(), {"eos_id": 1}),
        tiny(),
        TrainConfig(max_new_tokens=12, kl_batch_size=4),
    )
    draws = [
        [g.responses for g in spo_train.draw_online(config, policy, reference, [[1]], step).samples]
        for step in (0, 8, 0)
    ]
    assert draws[0] == draws[2] != draws[1]
    other = dataclasses.replace(config, seed=1)
    assert [
        g.responses for g in spo_train.draw_online(other, policy, reference, [[1]], 0).samples
    ] != draws[0]


def test_online_samples_are_untruncated_draws_of_the_policy_in_eval_mode(monkeypatch):
    calls = []

    def spy(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **rest):
        calls.append((temperature, top_k, top_p, model.training))
        return generate(model, prompts, max_new_tokens, temperature, top_k, top_p, **rest)

    monkeypatch.setattr(sampling, "generate", spy)
    policy = Checkpoint(tiny().train(), {"eos_id": 1})
    online = spo_train.draw_online(TrainConfig(max_new_tokens=12), policy, tiny(), [[1]], 0)
    assert calls == [(1.0, None, None, False)]
    assert sum(len(b.tokens) for b in online.batches) == 32
    for batch in online.batches:
        assert not batch.mask[:, 0].any() and batch.mask[:, 1].all()  # BOS is context
        ended = (
            batch.tokens.masked_fill(~batch.mask, 0) == 1
        )  # and the terminator, where there is one, is scored
        assert (ended.sum(1) <= 1).all()


def test_the_warm_up_is_linear_and_the_decay_ends_at_zero():
    config = TrainConfig(learning_rate=1.0, warmup_iters=4, max_iters=12)
    assert [steps.learning_rate(config, i) for i in (0, 3, 4, 8)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.5]
    )
    assert steps.learning_rate(config, 12) == pytest.approx(0.0)
    assert steps.learning_rate(dataclasses.replace(config, decay_lr=False), 12) == 1.0


def test_an_epoch_uses_every_group_once_in_an_order_of_its_own():
    groups = random_groups(10, 2)
    lines = [
        [g.line for step in range(2) for g in steps.groups_of_step(groups, 5, 2 * e + step, 3)]
        for e in range(2)
    ]
    assert sorted(lines[0]) == sorted(lines[1]) == list(range(1, 11)) and lines[0] != lines[1]
    across = steps.groups_of_step(
        groups, 15, 0, 3
    )  # a batch larger than the data goes on with the next epoch
    assert [g.line for g in across] == lines[0] + lines[1][:5]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """A folder with a small model, its tokenizer and 12 ranked groups of 4, as working directory."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save_pt("start.pt", Checkpoint(tiny(vocab_size=512), {"eos_id": 1}))
    words = "the owl found a golden key under an old bridge and sang".split()
    texts = [
        [" ".join(words[(i + j * k) % len(words)] for k in range(4 + j)) + "." for j in range(4)]
        for i in range(12)
    ]
    write(tmp_path / "ranked.jsonl", *({"responses": t, "ranking": [3, 0, 2, 1]} for t in texts))
    data.main(["best_of_n", "--data=ranked.jsonl", "--out=best.jsonl"])
    data.main(["pairs", "--data=ranked.jsonl", "--out=pair.jsonl"])
    data.main(["best_of_n", "--data=ranked.jsonl", "--out=text.jsonl"])

    def run(loss: str, *flags: str) -> str:
        files = {"ranking": "ranked", "best": "best", "pair": "pair", "text": "text"}
        file = files[LOSSES[loss].data] if loss in LOSSES else "ranked"
        arguments = [
            "--init_from=start.pt",
            f"--tokenizer={tokenizer.path}",
            f"--data={file}.jsonl",
            "--max_iters=8",
            "--batch_size=4",
            "--eval_interval=4",
            "--eval_stories=4",
            "--max_new_tokens=16",
            "--log_interval=1",
            "--learning_rate=3e-4",
            "--warmup_iters=1",
            "--out_dir=out",
        ]
        spo_train.main(
            [f"--loss={loss}", *(a for a in arguments if a.split("=")[0] not in str(flags)), *flags]
        )
        return "out"

    return run


def log_of(folder: str) -> list[dict]:
    with open(f"{folder}/log.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_samples_of_the_policy_are_drawn_anew_every_kl_interval(workshop, monkeypatch):
    drawn, original = [], spo_train.draw_online

    def spy(config, policy, reference, prompts, step, world):
        drawn.append(step)
        return original(config, policy, reference, prompts, step, world)

    monkeypatch.setattr(spo_train, "draw_online", spy)
    workshop("spo_rank", "--kl_interval=3", "--kl_batch_size=4", "--eval_stories=0")
    assert drawn == [0, 3, 6]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_trains_from_its_known_start(workshop, loss):
    folder = workshop(
        loss, "--batch_size=12", "--learning_rate=2e-3"
    )  # the same 12 groups in every step
    steps = [entry for entry in log_of(folder) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(8))
    start = objective_of(loss).start(size_for(loss))
    assert start is None or steps[0]["loss"] == pytest.approx(start, rel=1e-4)
    measure = "logps/chosen" if loss in ("sft", "best_sft") else "margin"
    assert steps[-1][measure] > steps[0][measure]


@pytest.mark.parametrize("name", list(REGULARIZERS))
def test_every_regularizer_trains(workshop, name):
    folder = workshop(
        "spo_basic", f"--regularizer={name}", "--batch_size=12", "--learning_rate=2e-3"
    )
    steps = [entry for entry in log_of(folder) if "loss" in entry]
    assert steps[-1]["margin"] > steps[0]["margin"]
    assert ("kl" in steps[0]) == (name == "global_kl") and ("clamped" in steps[0]) == (
        name == "importance"
    )


@pytest.mark.parametrize("name", ["logp", "tokenwise", "importance"])
def test_micro_batches_add_up_for_regularizers_on_the_dataset(name):
    reference = tiny().double()
    policy, groups = perturbed(reference), random_groups(8, 2)
    objective = objective_of("spo_basic", regularizer=name, beta=0.5)
    whole = gradients(objective, policy, reference, batches_of(groups, 8, reference))
    plain = gradients(
        objective_of("spo_basic", regularizer="none"),
        policy,
        reference,
        batches_of(groups, 8, reference),
    )
    assert not all(torch.allclose(a, b) for a, b in zip(whole, plain))
    for a, b in zip(
        whole, gradients(objective, policy, reference, batches_of(groups, 3, reference))
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_responses_beyond_the_importance_limit_are_counted():
    reference, policy = tiny(), perturbed(tiny())
    with torch.no_grad():
        reference.tok_embeddings.weight *= (
            3  # sure of itself, and wrong: the policy gives the responses more
        )
    batches = batches_of(random_groups(6, 2), 2, reference)
    with torch.no_grad():
        tensors = [steps.tensors_of(b, {"reference_logps"}, policy, reference) for b in batches]
        expected = sum(int((t["policy_logps"] - t["reference_logps"] > 20).sum()) for t in tensors)
    objective = objective_of("spo_basic", regularizer="importance")
    assert (
        expected
        and float(steps.preference_backward(objective, policy, reference, batches)["clamped"])
        == expected
    )


def test_a_run_leaves_its_files_and_they_agree(workshop, capsys):
    folder = workshop("spo_rank")
    out = capsys.readouterr().out
    names = {
        "ckpt.pt",
        "best.pt",
        "model.bin",
        "log.jsonl",
        "config.json",
        "stories",
        "state",
        "tokenizer.model",
        "tokenizer.bin",
    }
    assert set(os.listdir(folder)) == names
    assert sorted(os.listdir(f"{folder}/stories")) == [
        f"step_{step:06d}.jsonl" for step in (0, 4, 8)
    ]
    best, exported = checkpoints.load(f"{folder}/best.pt"), checkpoints.load(f"{folder}/model.bin")
    assert all(
        torch.equal(a, b)
        for a, b in zip(best.model.state_dict().values(), exported.model.state_dict().values())
    )
    greedy, ids = generate(best.model, [[1]], 12, temperature=0)[0], [1]
    for _ in range(12):  # a reader of model.bin that is not ours tells the same story
        ids.append(int(numpy_logits(f"{folder}/model.bin", ids).argmax()))
    assert ids[1:] == greedy
    assert checkpoints.load(f"{folder}/ckpt.pt").step == 8 and best.config["loss"] == "spo_rank"
    evaluations = [entry for entry in log_of(folder) if "eval/kl" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    assert evaluations[0]["eval/kl"] == 0.0 < evaluations[1]["eval/kl"] < evaluations[2]["eval/kl"]
    kinds = [key for entry in log_of(folder) for key in entry if key.endswith("/score")]
    assert kinds == ["eval/score"] * 3 + ["before/score", "best/score", "last/score"]
    assert "before (step 0)" in out and "after" in out and "last (step 8)" in out


def test_no_two_sets_of_stories_share_their_random_numbers(tokenizer):  # noqa: F811
    """The report's stories had no part in the choice of the best, and nobody wins against its own draws."""
    model = Checkpoint(tiny(vocab_size=512), {"eos_id": 1})
    evaluation = Evaluation(
        model, tokenizer, [""], 4, judge=OfflineJudge(), seed=1, max_new_tokens=12
    )
    select, report = (evaluation.evaluate(model, which).stories for which in ("select", "report"))
    texts = (
        [story["text"] for story in select + report]
        + evaluation.baselines["select"]
        + evaluation.baselines["report"]
    )
    assert (
        len(set(texts)) == len(texts) == 4 + 8 + 4 + 8
    )  # all by one model: only the streams keep them apart


def test_the_same_seed_gives_the_same_run_and_micro_batches_do_not_show(workshop):
    weights = []
    for flags in ([], [], ["--micro_batch_size=1"]):
        weights.append(
            checkpoints.load(workshop("spo_rank", *flags) + "/ckpt.pt").model.state_dict()
        )
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))
    assert all(
        torch.allclose(a, b, atol=2e-4) for a, b in zip(weights[0].values(), weights[2].values())
    )


def test_a_new_run_replaces_the_old_one_but_never_what_it_reads(workshop):
    workshop("spo_rank", "--keep_checkpoints")
    assert os.path.isfile("out/step_000008.pt")
    for flag in ("--init_from=out/best.pt", "--baseline=out/stories/step_000008.jsonl"):
        with pytest.raises(
            ValueError, match="--out_dir=out: this run reads .*out/.* choose another --out_dir"
        ):
            workshop("spo_rank", flag, "--eval_stories=1")
    assert os.path.isfile("out/step_000008.pt") and os.path.isfile("out/best.pt")
    workshop("spo_rank", "--eval_stories=0")
    assert (
        not os.path.exists("out/best.pt")
        and not os.path.exists("out/step_000008.pt")
        and not os.listdir("out/stories")
    )


def test_prompts_of_groups_that_were_dropped_are_not_sampled_from(workshop, tmp_path):
    good = [
        {"prompt": "the", "responses": [f"owl {i}", "key"], "ranking": [0, 1]} for i in range(4)
    ]
    bad = {"prompt": "a long way " * 40, "responses": ["a", "b"], "ranking": [0, 1]}
    write(tmp_path / "ranked.jsonl", bad, *good)
    workshop("spo_rank", "--max_iters=2")
    with open("out/stories/step_000000.jsonl", encoding="utf-8") as f:
        assert {json.loads(line)["prompt"] for line in f} == {"the"}


def test_the_baseline_can_be_any_stories(workshop, tmp_path, capsys):
    write(tmp_path / "others.jsonl", *({"text": f"A treasure {i}."} for i in range(12)))
    workshop("best_sft", "--baseline=others.jsonl")
    assert "win-rate over others.jsonl" in capsys.readouterr().out
    with pytest.raises(ValueError, match="12 stories, selecting and reporting need 15"):
        workshop("best_sft", "--baseline=others.jsonl", "--eval_stories=5")


def test_the_api_judge_evaluates_within_a_budget_and_training_outlives_it(
    workshop, monkeypatch, capsys
):
    """$0.12 is enough for 2 comparisons in both orders, and too little for another one."""
    from fake_api import FakeApi

    monkeypatch.setenv("OPENAI_API_KEY", "sk-sentinel-4711-abcdefgh")
    prices = [
        "--usd_per_million_in=10",
        "--usd_per_million_out=100",
        "--judge_max_tokens=300",
        "--learning_rate=3e-2",
    ]
    with FakeApi() as api:
        judge = [
            "--judge=fake",
            f"--base_url={api.url}",
            "--journal=j.jsonl",
            "--eval_stories=2",
            *prices,
        ]
        folder = workshop("spo_rank", *judge, "--max_usd=0.12")
        spent = sum(json.loads(line).get("usd", 0) for line in open("j.jsonl") if "reply" in line)
        assert sum(api.asked.values()) == 4 and spent == pytest.approx(
            4 * (200 * 10 + 200 * 100) / 1e6
        )
        printed = capsys.readouterr().out
        assert (
            "--max_usd=0.12: $0.0880 may be spent" in printed
            and "no win-rate: budget spent" in printed
        )
        first, last = [entry for entry in log_of(folder) if "eval/kl" in entry][::2]
        assert "eval/win_rate" in first and "eval/win_rate" not in last and last["eval/kl"] > 0
        assert (
            checkpoints.load(f"{folder}/best.pt").step == 0
            and checkpoints.load(f"{folder}/ckpt.pt").step > 0
        )
        for path in glob.glob(f"{folder}/**", recursive=True):
            assert os.path.isdir(path) or b"sk-sentinel" not in open(path, "rb").read()
        with pytest.raises(ValueError, match="--max_usd=0.001"):  # not even the first evaluation
            workshop(
                "spo_rank",
                *judge[:2],
                "--journal=k.jsonl",
                "--eval_stories=2",
                *prices,
                "--max_usd=0.001",
            )


def test_the_share_of_padding_is_logged():
    policy, config, objective = (
        tiny(),
        TrainConfig(loss="simpo", max_iters=1),
        objective_of("simpo"),
    )
    group = EncodedGroup([1], [[5] * 9, [6] * 19], 1)  # 10 and 20 tokens, in rows of 32
    logged = steps.gradient_step(
        config, objective, policy, None, [group], None, steps.make_optimizer(config, policy), 0
    )
    assert logged["padding"] == 1 - 30 / 64


def check_compiled(workshop, losses, *more):
    for loss in losses:
        logs = [
            log_of(workshop(loss, "--max_iters=2", "--eval_interval=2", *more, *flag))
            for flag in ((), ("--compile",))
        ]
        assert (
            torch._dynamo.utils.counters["stats"]["calls_captured"] > 50
        )  # operations of the layers
        for plain, compiled in zip(*logs):
            for name in plain.keys() - {
                "tokens_per_second",
                "accuracy",
            }:  # accuracy: whether a rounding error is positive
                assert compiled[name] == pytest.approx(plain[name], rel=2e-3, abs=1e-3), (
                    loss,
                    name,
                )


def test_compiled_layers_train_alike(workshop):
    check_compiled(workshop, ["spo_rank"])


@pytest.mark.slow
def test_compiled_layers_train_alike_under_every_loss(workshop):
    check_compiled(workshop, LOSSES)


def test_without_a_compiler_a_run_says_so_and_goes_on(workshop, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no compiler here\nmore of it")

    monkeypatch.setattr(torch, "compile", fail)
    workshop("spo_rank", "--compile", "--max_iters=1", "--eval_stories=0")
    assert "continuing without --compile (slower): no compiler here\n" in capsys.readouterr().out


def test_a_step_that_is_not_finite_stops_and_names_its_lines(workshop, monkeypatch):
    monkeypatch.setattr(
        steps.head, "sequence_logps", lambda *_: torch.full((16,), float("nan"), requires_grad=True)
    )
    with pytest.raises(ValueError, match=r"step 0: loss is nan.*--learning_rate=.*lines \[\d+"):
        workshop("spo_rank", "--micro_batch_size=4", "--eval_stories=0")
    before, after = checkpoints.load("start.pt"), checkpoints.load("out/ckpt.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters())
    )


def test_a_model_is_trained_from_scratch_on_text(workshop):
    folder = workshop("sft", "--init_from=scratch", "--dim=32", "--n_layers=1", "--n_heads=2")
    losses = [entry["loss"] for entry in log_of(folder)]
    assert (
        losses[0] == pytest.approx(6.2, abs=0.8) and losses[-1] < losses[0]
    )  # log 512 = 6.24 nats per token
    assert checkpoints.load(f"{folder}/model.bin").model.args.dim == 32


# --- bad input: one line, exit code 2 ------------------------------------------------------------


@pytest.mark.parametrize(
    "loss,flags,message",
    [
        ("spo_rank", ["--bata=1"], "--bata: no such option; did you mean --beta?"),
        ("spo_rank", ["--beta=x"], "argument --beta: invalid float value: 'x'"),
        ("spo_rnk", [], "invalid choice: 'spo_rnk'"),
        (
            "dpo_rank",
            ["--gamma=1"],
            "--gamma: dpo_rank with regularizer none does not take it; it takes --beta",
        ),
        (
            "dpo_rank",
            ["--kl_interval=2"],
            "--kl_interval: dpo_rank with regularizer none draws no samples",
        ),
        ("spo_rank", ["--alpha=-1"], "--alpha=-1.0: must be finite and not negative"),
        ("spo_rank", ["--alpha=nan"], "--alpha=nan: must be finite"),
        ("ipo", ["--tau=0"], "--tau=0.0: must be finite and above 0"),
        ("dpo", ["--regularizer=global_kl"], "--regularizer=global_kl: the beta of dpo is its own"),
        ("cpo", ["--nll=median"], "invalid choice: 'median'"),
        (
            "spo_rank",
            ["--baseline=ranked.jsonl", "--eval_stories=0"],
            "--baseline: nothing is judged with",
        ),
        ("spo_rank", ["--batch_size=0"], "--batch_size=0: must be 1 or more"),
        ("spo_rank", ["--seed=-1"], "--seed=-1: must be finite and not negative"),
        ("spo_rank", ["--dim=64"], "--dim: the shape comes with --init_from=start.pt"),
        ("spo_rank", ["--data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ("spo_rank", ["--init_from=nowhere.pt"], "nowhere.pt: no such checkpoint"),
        ("spo_rank", ["--init_from=damaged.pt"], "damaged.pt: not loaded"),
        ("spo_rank", ["--tokenizer=ranked.jsonl"], "ranked.jsonl: not a sentencepiece model"),
        ("spo_rank", ["--init_from=other.pt"], "has 512 pieces, other.pt was trained on 64"),
        (
            "spo_rank",
            ["--data=best.jsonl"],
            "best.jsonl line 1: --loss=spo_rank needs a full ranking",
        ),
        (
            "dpo",
            ["--data=ranked.jsonl"],
            "ranked.jsonl line 1: --loss=dpo compares pairs, the group has 4 responses",
        ),
        ("spo_rank", ["--device=cuda"], "--device=cuda: not available on this machine"),
        ("spo_rank", ["--max_iters=ten"], "invalid int value: 'ten'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workshop, monkeypatch, capsys, loss, flags, message):
    if "cuda" in str(flags) and torch.cuda.is_available():
        pytest.skip("this machine has a cuda device")
    with open("damaged.pt", "wb") as f:
        f.write(open("start.pt", "rb").read()[:-500])
    checkpoints.save_pt("other.pt", Checkpoint(tiny()))
    monkeypatch.setattr(sys, "argv", ["spo_train.py"])
    with pytest.raises(SystemExit) as stop:
        spo_train.run(lambda _: workshop(loss, *flags))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert not os.path.exists("out")


def test_a_prompt_longer_than_the_context_is_one_line(workshop, tmp_path):
    write(
        tmp_path / "ranked.jsonl",
        {"prompt": "a long way " * 40, "responses": ["a", "b"], "ranking": [0, 1]},
    )
    with pytest.raises(ValueError, match="none of its 1 groups can be used: longer than 64 tokens"):
        workshop("spo_rank")


@pytest.mark.parametrize(
    "command",
    [
        "spo_train.py --bata=1",
        "sample.py --checkpoint=none.pt",
        "export.py m.bin --checkpoint=none.bin",
        "judge.py a.jsonl b.jsonl",
        "tinystories_data.py rank --stories=none.jsonl",
        "tinystories_data.py rnk",
        "export.py",
        "sample.py --device=nonsense --checkpoint=none.pt",
    ],
)
def test_every_script_says_it_in_one_line(command, tmp_path):
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


# --- the demo ------------------------------------------------------------------------------------


def test_the_demo_builds_itself_goes_on_after_a_kill_and_is_then_reused(tmp_path, monkeypatch):
    """In small: the same stages, stopped between reference and groups."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("DEMO_STORIES", 200), ("DEMO_VOCAB", 512), ("DEMO_GROUPS", 6)):
        monkeypatch.setattr(data, name, value)
    trained, original = [], spo_train.train

    def small(config, world):
        trained.append(config.loss)
        changes = {"max_iters": 60, "batch_size": 8, "eval_interval": 60, "n_layers": 1, "dim": 48}
        original(dataclasses.replace(config, **changes) if config.loss == "sft" else config, world)

    monkeypatch.setattr(spo_train, "train", small)
    flags = [
        "--max_iters=2",
        "--batch_size=2",
        "--eval_stories=2",
        "--max_new_tokens=24",
        "--kl_batch_size=2",
    ]
    with monkeypatch.context() as killed:
        killed.setattr(data, "sample", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            spo_train.main(["--loss=spo_rank", *flags])
    assert sorted(os.listdir("data/demo")) == [
        "recipe.json",
        "reference",
        "stories.jsonl",
        "tokenizer.model",
    ]
    spo_train.main(["--loss=spo_rank", *flags])
    ranked = (tmp_path / "data/demo/ranked.jsonl").read_bytes()
    spo_train.main(["--loss=spo_bon", *flags])
    assert trained == ["spo_rank", "sft", "spo_rank", "spo_bon"]  # the reference was trained once
    assert (tmp_path / "data/demo/ranked.jsonl").read_bytes() == ranked
