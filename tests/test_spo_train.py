"""The training loop: what a step computes, what a run leaves, what it refuses."""

import copy
import dataclasses
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    assert_same_runs,
    gradients_of,
    log_of,
    numpy_logits,
    perturbed,
    random_groups,
    same_weights,
    size_for,
    tiny,
    write,
)

import export
import spo_train
import tinystories_data as data
from judge import OfflineJudge
from losses import LOSSES, REGULARIZERS, Objective, sequence_logps, settings_of, token_kl
from spo import checkpoint, head, offline_judge, plan
from spo import generate as generation
from spo.checkpoint import load, save_pt
from spo.config import main_program
from spo.evaluation import Evaluation
from spo.generate import generate
from spo.groups import EncodedGroup, make_batch
from spo.order import batch_indices
from spo.reference import with_reference_logps
from spo.run import RunFolder
from spo.win_rate import win_rate
from spo_train import (
    PolicySamples,
    TrainConfig,
    draw_samples,
    kl_gradient,
    learning_rate,
    preference_gradient,
)


def gradients(objective, policy, reference, groups, size) -> list[torch.Tensor]:
    policy.zero_grad()
    if reference is not None:
        groups = with_reference_logps(groups, reference)
    preference_gradient(objective, policy, reference, groups, size)
    return gradients_of(policy)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_number_of_micro_batches_never_changes_the_gradient(loss):
    reference = tiny().double()
    policy, groups = perturbed(reference), random_groups(8, size_for(loss))
    number = {"gamma": 0.05} if "gamma" in settings_of(LOSSES[loss]) else {}
    objective = Objective(loss, **number)
    whole = gradients(objective, policy, reference, groups, 8)
    for size in (1, 3):
        parts = gradients(objective, policy, reference, groups, size)
        for a, b in zip(whole, parts, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_step_is_that_of_the_loss_written_out():
    """spo_rank over the whole batch by hand, against three micro-batches of the loop."""
    policy, groups = tiny().double(), random_groups(6, 3)
    objective = Objective("spo_rank", gamma=0.05)
    ours = gradients(objective, policy, None, groups, 2)
    policy.zero_grad()
    batch = make_batch(groups)
    logps = sequence_logps(policy(batch.tokens), batch.tokens, batch.mask).view(6, 3)
    t = torch.stack([logps.logsumexp(1), logps[:, 1:].logsumexp(1)], 1).detach().mul(0.05).exp()
    mu = 2 * torch.sigmoid(t - t.mean(0))
    a = 0.001
    loss = mu[:, 0] * -(torch.log_softmax(a * logps, 1)[:, 0]) / a
    loss = loss + mu[:, 1] * -(torch.log_softmax(a * logps[:, 1:], 1)[:, 0]) / a
    loss.mean().backward()
    for p, grad in zip(policy.parameters(), ours, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def draw(policy, reference, step: int = 0, prompts=((1,),), **flags) -> PolicySamples:
    config = TrainConfig(**{"max_new_tokens": 12, "kl_batch_size": 4} | flags)
    return spo_train.draw_samples(config, policy, reference, [list(p) for p in prompts], step)


def test_kl_is_zero_at_step_0_and_its_micro_batches_add_up():
    reference = tiny().double()
    prompts = [[1], [1, 5]]
    samples = draw(
        copy.deepcopy(reference),
        reference,
        0,
        prompts,
        kl_batch_size=6,
        max_new_tokens=20,
        micro_batch_size=2,
    )
    assert len(samples.mine) == 3
    assert kl_gradient(1.0, copy.deepcopy(reference), samples)["kl"] == 0.0

    policy = perturbed(reference)
    metrics = kl_gradient(1.0, policy, samples)
    ours = gradients_of(policy)
    policy.zero_grad()
    kl, entropy, tokens = [], 0.0, 0
    for batch, _ in samples.mine:
        logits = policy(batch.tokens)
        kl.append(token_kl(logits, reference(batch.tokens), batch.mask))
        logps = logits[:, :-1].log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)[batch.mask[:, 1:]]
        entropy += float(entropies.detach().sum())
        tokens += len(entropies)
    mean = torch.cat(kl).mean()
    mean.backward()
    assert metrics["kl"] == pytest.approx(float(mean.detach())) and metrics["kl"] > 0
    assert (
        metrics["entropy"] == pytest.approx(entropy / tokens) and 0 < metrics["entropy"] < 4.16
    )  # log 64
    for p, grad in zip(policy.parameters(), ours, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def test_a_step_descends_the_mean_loss_plus_beta_times_the_mean_kl():
    """spo_basic and its KL written out from all logits, with beta 0.3, against the loop's two
    passes.
    """
    reference = tiny().double()
    policy = perturbed(reference)
    groups, samples = random_groups(6, 2), random_groups(5, 1, seed=1)
    objective = Objective("spo_basic", alpha=0.5, beta=0.3)
    preference_gradient(objective, policy, reference, groups, 4)
    kl_gradient(objective.beta, policy, PolicySamples.of(samples, reference, 2))
    ours = gradients_of(policy)
    policy.zero_grad()
    batch, online = make_batch(groups), make_batch(samples)
    logps = sequence_logps(policy(batch.tokens), batch.tokens, batch.mask).view(6, 2)
    loss = -(torch.log_softmax(0.5 * logps, 1)[:, 0]) / 0.5
    kl = token_kl(policy(online.tokens), reference(online.tokens), online.mask)
    (loss.mean() + 0.3 * kl.mean()).backward()
    for p, grad in zip(policy.parameters(), ours, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-11)


def test_every_refresh_draws_other_samples_and_the_same_seed_the_same():
    policy, reference = tiny(), tiny()

    def responses(step: int, **flags) -> list:
        return [group.responses for group in draw(policy, reference, step, **flags).groups]

    assert responses(0) == responses(0) != responses(8)
    assert responses(0, seed=1) != responses(0)


def test_samples_begin_with_all_of_the_datasets_prompts():
    prompts = [[1, i] for i in range(4)]
    samples = draw(tiny(), tiny(), 0, prompts, kl_batch_size=64)
    counts = [sum(group.prompt == prompt for group in samples.groups) for prompt in prompts]
    assert sum(counts) == 64 and min(counts) > 4


def test_online_samples_are_untruncated_draws_of_the_policy_in_eval_mode(monkeypatch):
    calls = []

    def spy(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **rest):
        calls.append((temperature, top_k, top_p, model.training))
        return generate(model, prompts, max_new_tokens, temperature, top_k, top_p, **rest)

    monkeypatch.setattr(generation, "generate", spy)
    samples = draw(tiny().train(), tiny(), kl_batch_size=32)
    assert calls == [(1.0, None, None, False)]
    assert sum(len(b.tokens) for b, _ in samples.mine) == 32
    for batch, _ in samples.mine:
        assert not batch.mask[:, 0].any() and batch.mask[:, 1].all()  # BOS is context
        # and the terminator, where there is one, is scored
        ended = batch.tokens.masked_fill(~batch.mask, 0) == 1
        assert (ended.sum(1) <= 1).all()


def test_the_warm_up_is_linear_and_the_decay_ends_at_zero():
    config = TrainConfig(learning_rate=1.0, warmup_iters=4, max_iters=12)
    assert [learning_rate(config, i) for i in (0, 3, 4, 8)] == pytest.approx([0.25, 1.0, 1.0, 0.5])
    assert learning_rate(config, 12) == pytest.approx(0.0)
    assert learning_rate(dataclasses.replace(config, decay_lr=False), 12) == 1.0


def test_an_epoch_uses_every_group_once_in_an_order_of_its_own():
    epochs = []
    for epoch in range(2):
        steps = [batch_indices(10, 5, 2 * epoch + step, seed=3) for step in range(2)]
        epochs.append(sum(steps, []))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    across = batch_indices(
        10, 15, 0, seed=3
    )  # a batch larger than the data continues with the next epoch
    assert across == epochs[0] + epochs[1][:5]


def test_the_optimizer_is_the_one_that_the_flags_describe():
    config = TrainConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7, learning_rate=0.01)
    optimizer = spo_train.make_optimizer(config, tiny())
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.3 and {p.dim() for p in matrices["params"]} == {2}
    assert vectors["weight_decay"] == 0.0 and {p.dim() for p in vectors["params"]} == {1}
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
    spo_train.optimizer_step(optimizer, 0.25)
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)


def test_the_gradient_is_clipped_at_the_norm_of_the_flag():
    policy = tiny()
    policy(torch.tensor([[1, 2, 3]])).square().sum().backward()
    before = [p.grad.clone() for p in policy.parameters()]
    norm = torch.cat([grad.flatten() for grad in before]).norm()
    assert spo_train.parallel.clip_gradient(policy, 0) == pytest.approx(float(norm), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(policy), before, strict=True))
    assert spo_train.parallel.clip_gradient(policy, 2.0) == pytest.approx(float(norm), rel=1e-5)
    clipped = torch.cat([grad.flatten() for grad in gradients_of(policy)]).norm()
    assert norm > 2 and float(clipped) == pytest.approx(2.0, rel=1e-4)


def test_the_logged_metrics_are_those_of_the_definition():
    """Two groups of three, by hand: margins and log-probs of column 0 against the others; accuracy
    counts gaps above 0.
    """
    logps = torch.tensor([[-10.0, -12.0, -9.0], [-20.0, -20.0, -26.0]])
    plain = spo_train.preference_metrics(logps, None)
    assert plain["logps/chosen"].tolist() == [-10, -20] and plain["logps/rejected"].tolist() == [
        -10.5,
        -23,
    ]
    assert plain["margin"].tolist() == [0.5, 3.0] and plain["accuracy"].tolist() == [0.5, 0.5]
    reference = torch.tensor([[-11.0, -12.0, -9.0], [-20.0, -19.0, -26.0]])
    compared = spo_train.preference_metrics(logps, reference)  # log-ratios [1, 0, 0] and [0, -1, 0]
    assert compared["margin"].tolist() == [1.0, 0.5] and compared["accuracy"].tolist() == [1.0, 0.5]
    assert compared["logps/rejected"].tolist() == [-10.5, -23]
    assert set(spo_train.preference_metrics(logps[:, :1], None)) == {"logps/chosen"}


def test_the_margin_of_unpaired_responses_is_for_the_desirable_and_against_the_others():
    """Log-ratios +2 and -3: of a desirable response +2 is right, of an undesirable one -3 is."""
    logps, reference = torch.tensor([[-8.0], [-8.0], [-13.0]]), torch.tensor([[-10.0]] * 3)
    desirable = torch.tensor([[True], [False], [False]])
    metrics = spo_train.preference_metrics(logps, reference, desirable)
    assert metrics["margin"].tolist() == [2, -2, 3] and metrics["accuracy"].tolist() == [1, 0, 1]
    assert metrics["logps"].tolist() == [-8, -8, -13]


# --- whole runs ----------------------------------------------------------------------------------


def test_samples_of_the_policy_are_drawn_anew_every_kl_interval(workshop, monkeypatch):
    drawn, original = [], spo_train.draw_samples

    def spy(config, policy, reference, prompts, step):
        drawn.append(step)
        return original(config, policy, reference, prompts, step)

    monkeypatch.setattr(spo_train, "draw_samples", spy)
    workshop("spo_rank", "--kl_interval=3", "--kl_batch_size=4", "--eval_stories=0")
    assert drawn == [0, 3, 6]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_trains_from_its_known_start(workshop, loss):
    folder = workshop(
        loss, "--batch_size=12", "--learning_rate=2e-3"
    )  # the same 12 groups in every step
    steps = [entry for entry in log_of(folder) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(8))
    start = Objective(loss).start(size_for(loss))
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


def test_each_epoch_is_a_permutation_and_each_seed_another():
    def epoch(number: int, seed: int) -> list[int]:
        steps = range(4 * number, 4 * (number + 1))
        return [i for step in steps for i in batch_indices(20, 5, step, seed)]

    orders = [epoch(0, 3), epoch(1, 3), epoch(0, 40), epoch(0, 3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == orders[3] and len(set(map(tuple, orders))) == 3
    across = batch_indices(20, 8, 2, 3)  # the last 4 of one epoch, and 4 of the next
    assert across == orders[0][16:] + orders[1][:4]


def test_every_refresh_draws_its_samples_from_other_prompts():
    policy, config = tiny(), TrainConfig(seed=3, kl_batch_size=8, max_new_tokens=4)
    prompts = [[1, i] for i in range(2, 60)]
    drawn = []
    for step, seed in ((0, 3), (8, 3), (0, 3), (0, 90)):
        config = dataclasses.replace(config, seed=seed)
        samples = draw_samples(config, policy, policy, prompts, step)
        drawn.append(tuple(tuple(group.prompt) for group in samples.groups))
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3


@pytest.mark.parametrize("name", ["logp", "tokenwise", "importance"])
def test_micro_batches_add_up_for_regularizers_on_the_dataset(name):
    reference = tiny().double()
    policy, groups = perturbed(reference), random_groups(8, 2)
    objective = Objective("spo_basic", regularizer=name, beta=0.5)
    whole = gradients(objective, policy, reference, groups, 8)
    plain = gradients(Objective("spo_basic", "none"), policy, reference, groups, 8)
    once = gradients(Objective("spo_basic", name, beta=1.0), policy, reference, groups, 8)
    for half, none, full in zip(whole, plain, once, strict=True):  # beta weighs it
        assert torch.allclose(2 * (half - none), full - none, rtol=1e-6, atol=1e-9)
    assert not all(torch.allclose(a, b) for a, b in zip(whole, plain, strict=True))
    for a, b in zip(whole, gradients(objective, policy, reference, groups, 3), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_responses_beyond_the_importance_limit_are_counted():
    reference, policy = tiny(), perturbed(tiny())
    with torch.no_grad():
        # sure of itself, and wrong: the policy gives the responses more
        reference.tok_embeddings.weight *= 3
    groups = with_reference_logps(random_groups(6, 2), reference)
    batch = make_batch(groups)
    with torch.no_grad():
        logratios = head.sequence_logps(policy, batch) - batch.reference_logps
    expected = int((logratios > 20).sum())
    objective = Objective("spo_basic", regularizer="importance")
    metrics = preference_gradient(objective, policy, reference, groups, 2)
    assert expected and metrics["clamped"] == expected


def test_a_run_leaves_its_files_and_they_agree(workshop, capsys):
    folder = workshop("spo_rank", "--curves")
    out = capsys.readouterr().out
    names = {
        "run.json",
        "ckpt.pt",
        "best.pt",
        "model.bin",
        "model.bin.sha256",
        "log.jsonl",
        "curves.png",
        "config.json",
        "stories",
        "state",
        "tokenizer.model",
        "tokenizer.model.sha256",
        "tokenizer.bin",
    }
    assert {name for name in os.listdir(folder) if name[:5] != "pool-"} == names
    assert sorted(os.listdir(f"{folder}/stories")) == [
        f"step_{step:06d}.jsonl" for step in (0, 4, 8)
    ]
    best, exported = load(f"{folder}/best.pt"), load(f"{folder}/model.bin")
    assert same_weights(best, exported)
    greedy, ids = generate(best, [[1]], 12, temperature=0)[0], [1]
    for _ in range(12):  # a reader of model.bin that is not ours tells the same story
        ids.append(int(numpy_logits(f"{folder}/model.bin", ids).argmax()))
    assert ids[1:] == greedy
    file = checkpoint.open_weights(f"{folder}/ckpt.pt")
    assert file.step == 8 and file.config["loss"] == "spo_rank"
    evaluations = [entry for entry in log_of(folder) if "eval/kl" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    assert evaluations[0]["eval/kl"] == 0.0 < evaluations[1]["eval/kl"] < evaluations[2]["eval/kl"]
    kinds = [key for entry in log_of(folder) for key in entry if key.endswith("/score")]
    assert kinds == ["eval/score"] * 3 + ["before/score", "best/score", "last/score"]
    assert "before (step 0)" in out and "after" in out and "last (step 8)" in out


def test_no_two_sets_of_stories_share_their_random_numbers(tokenizer):
    """The report's stories had no part in the choice of the best, and nobody wins against its own
    draws.
    """
    model = tiny(vocab_size=512)
    evaluation = Evaluation(
        model, tokenizer, [""], 4, judge=OfflineJudge(), seed=1, max_new_tokens=12
    )
    texts = []
    for which in ("select", "report"):
        texts += [story["text"] for story in evaluation.evaluate(model, 0, which).stories]
        texts += evaluation.sets[which].baseline
    # All are by one model: only the streams keep them apart.
    assert len(set(texts)) == len(texts) == 4 + 4 + 8 + 8


def test_an_evaluation_says_kl_entropy_and_score_of_its_own_stories(tokenizer):
    """Against all logits of the stories that it returns, prompts included."""
    policy, reference = tiny(vocab_size=512), perturbed(tiny(vocab_size=512))
    evaluation = Evaluation(
        reference, tokenizer, ["the owl"], 3, judge=OfflineJudge(), seed=1, max_new_tokens=12
    )
    verdict = evaluation.evaluate(policy, 7, "select")
    kl, entropy, tokens = 0.0, 0.0, 0
    encoded = [tokenizer.encode("the owl", bos=True)] * 3
    for group in generation.sample(policy, encoded, (1, generation.PURPOSE_SELECT, 1), 12):
        batch = make_batch([group])
        with torch.no_grad():
            logits, others = policy(batch.tokens), reference(batch.tokens)
        kl += float(token_kl(logits, others, batch.mask))
        logps = logits[:, :-1].log_softmax(-1)
        entropy -= float((logps.exp() * logps).sum(-1)[batch.mask[:, 1:]].sum())
        tokens += int(batch.mask.sum())
    assert verdict.kl == pytest.approx(kl / 3, rel=1e-4)
    assert verdict.entropy == pytest.approx(entropy / tokens, rel=1e-4)
    texts = [story["prompt"] + story["text"] for story in verdict.stories]
    assert all(text.startswith("the owl") for text in texts)
    assert verdict.score == pytest.approx(sum(map(offline_judge.score, texts)) / 3)
    assert verdict.logged("eval")["eval/entropy"] == verdict.entropy
    controlled = verdict.win_rate.length_controlled
    assert f", {controlled:.1%} length-controlled" in str(verdict)
    assert f"entropy {verdict.entropy:.2f} nats a token" in str(verdict)
    assert {story["checkpoint"] for story in verdict.stories} == {"step 7"}


def test_the_same_seed_gives_the_same_run_and_micro_batches_do_not_show(workshop):
    weights = []
    for flags in ([], [], ["--micro_batch_size=1"]):
        weights.append(load(workshop("spo_rank", *flags) + "/ckpt.pt").state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
        assert torch.allclose(weight, weights[2][name], atol=2e-4)


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


@pytest.mark.parametrize(
    "name", ["log.jsonl", "config.json", "stories/mine.jsonl", "state/mine", "run.json", "best.pt"]
)
def test_a_run_replaces_nothing_that_is_not_of_a_run(workshop, name):
    os.makedirs(os.path.dirname(f"out/{name}"))
    with open(f"out/{name}", "w") as f:
        f.write('{"loss": "mine"}\n')
    with pytest.raises(ValueError, match="--out_dir=out: holds out/.* is no folder of a run"):
        workshop("dpo_rank", "--max_iters=1")
    with open(f"out/{name}") as f:
        assert f.read() == '{"loss": "mine"}\n'
    assert [path for path in glob.glob("out/**", recursive=True) if os.path.isfile(path)] == [
        f"out/{name}"
    ]


def test_a_run_that_is_replaced_is_named_and_other_files_stay(workshop, capsys):
    os.makedirs("out")
    with open("out/notes.txt", "w") as f:
        f.write("mine")
    workshop("dpo_rank", "--max_iters=2", "--eval_interval=2")
    assert "replacing" not in capsys.readouterr().out
    os.remove("out/run.json")  # as an earlier version left it
    workshop("dpo_rank", "--max_iters=1")
    printed = capsys.readouterr().out
    assert re.search(r"out: replacing the run of \d{4}-\d\d-\d\d \d\d:\d\d, 2 steps", printed)
    assert os.path.isfile("out/notes.txt")


@pytest.mark.parametrize("out_dir", ["", "model", "model/run", "./model/../model"])
def test_the_folder_of_the_model_is_not_the_folder_of_the_run(workshop, out_dir):
    export.main(["model", "--checkpoint=start.pt", "--version=-1"])
    before = sorted(os.listdir("model"))
    with pytest.raises(ValueError, match="--out_dir=.*(is empty|lies in --init_from)"):
        workshop("dpo_rank", "--init_from=model", f"--out_dir={out_dir}")
    assert sorted(os.listdir("model")) == before


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
        steps = [checkpoint.open_weights(f"{folder}/{name}.pt").step for name in ("best", "ckpt")]
        assert steps[0] == 0 < steps[1]
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
    group = EncodedGroup([1], [[5] * 9, [6] * 19], 1)  # 10 and 20 tokens, in rows of 32
    metrics = preference_gradient(Objective("simpo"), tiny(), None, [group], None)
    assert metrics["padding"] == 1 - 30 / 64


def test_the_last_step_is_logged_whatever_the_interval(workshop):
    folder = workshop("dpo_rank", "--max_iters=6", "--log_interval=4", "--eval_stories=0")
    assert [entry["step"] for entry in log_of(folder)] == [0, 4, 5]


def rate_of(share: float):
    wins = round(100 * share)
    return win_rate([1.0] * wins + [0.0] * (100 - wins))


def test_best_is_the_first_of_equals_and_the_exported_model_is_the_best(workshop, monkeypatch):
    """Win-rates of 50%, 75%, 75%, 60% at steps 0, 2, 4, 6: best.pt and model.bin are of step 2."""
    rates = iter([0.5, 0.75, 0.75, 0.6])

    def compare(self, policy, baseline, label=None):
        return rate_of(next(rates))

    monkeypatch.setattr(OfflineJudge, "compare", compare)
    flags = ["--max_iters=6", "--eval_interval=2", "--report=false", "--keep_checkpoints"]
    flags.append("--eval_pool=0")
    folder = workshop("dpo_rank", *flags, "--learning_rate=1e-2")
    assert checkpoint.open_weights(f"{folder}/best.pt").step == 2
    best = load(f"{folder}/step_000002.pt")
    assert same_weights(load(f"{folder}/best.pt"), best)
    assert same_weights(load(f"{folder}/model.bin"), best)
    assert not same_weights(load(f"{folder}/ckpt.pt"), best)


def test_a_resumed_run_remembers_how_good_the_best_was(workshop, monkeypatch):
    """Win-rates of 50%, 90%, 60% at steps 0, 2, 4; resumed there, 70% at 6: best.pt is of 2."""
    rates = [0.5, 0.9, 0.6, 0.55, 0.7]

    def compare(self, policy, baseline, label=None):
        return rate_of(rates.pop(0))

    monkeypatch.setattr(OfflineJudge, "compare", compare)
    flags = ["--max_iters=6", "--eval_interval=2", "--report=false", "--learning_rate=1e-2"]
    flags.append("--eval_pool=0")
    folder = workshop("dpo_rank", *flags)
    workshop("dpo_rank", *flags, "--resume=out/state/step_00000004")
    assert rates == []  # step 4 was not evaluated again
    assert checkpoint.open_weights(f"{folder}/best.pt").step == 2
    assert same_weights(load(f"{folder}/best.pt"), load(f"{folder}/model.bin"))


def check_compiled(workshop, losses, *more):
    for loss in losses:
        flags = ["--max_iters=2", "--eval_interval=2", *more]
        plain = log_of(workshop(loss, *flags))
        compiled = log_of(workshop(loss, *flags, "--compile"))
        # operations of the layers
        assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50
        for expected, found in zip(plain, compiled, strict=True):
            for name in expected.keys() - {"accuracy"}:  # whether a rounding error is positive
                close = pytest.approx(expected[name], rel=2e-3, abs=1e-3)
                assert found[name] == close, (loss, name)


def test_mu_is_the_same_whether_graphs_are_kept_or_there_is_a_pass_more(workshop, monkeypatch):
    """To the last bit: one forward pass, with and without a graph."""
    flags = ["--micro_batch_size=2", "--eval_stories=0", "--max_iters=3"]
    asked = []
    real = plan.can_keep
    for bytes_kept in (2**31, 0):
        monkeypatch.setattr(plan, "MOST_KEPT", bytes_kept)
        monkeypatch.setattr(plan, "can_keep", lambda *a: asked.append(real(*a)) or asked[-1])
        workshop("spo_rank", *flags, f"--out_dir={bytes_kept}")
    assert asked == [True] * 3 + [False] * 3
    assert_same_runs("2147483648", "0")


@pytest.mark.slow
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
    nan = torch.full((4, 4), float("nan"), requires_grad=True)
    monkeypatch.setattr(head, "sequence_logps", lambda *_: nan)
    with pytest.raises(ValueError, match=r"step 0: loss is nan.*--learning_rate=.*lines \[\d+"):
        workshop("spo_rank", "--micro_batch_size=4", "--eval_stories=0")
    assert same_weights(load("start.pt"), load("out/ckpt.pt"))


def test_a_model_is_trained_from_scratch_on_text(workshop):
    folder = workshop("sft", "--init_from=scratch", "--dim=32", "--n_layers=1", "--n_heads=2")
    losses = [entry["loss"] for entry in log_of(folder)]
    assert losses[0] == pytest.approx(6.2, abs=0.8)  # log 512 = 6.24 nats per token
    assert losses[-1] < losses[0]
    assert load(f"{folder}/model.bin").args.dim == 32


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
        ("spo_rank", ["--alpha=-1"], "--alpha=-1.0: must be finite, 0 or more"),
        ("spo_rank", ["--alpha=nan"], "--alpha=nan: must be finite"),
        ("ipo", ["--tau=0"], "--tau=0.0: must be finite, above 0"),
        ("dpo", ["--regularizer=global_kl"], "--regularizer=global_kl: the beta of dpo is its own"),
        ("cpo", ["--nll=median"], "invalid choice: 'median'"),
        (
            "spo_rank",
            ["--baseline=ranked.jsonl", "--eval_stories=0"],
            "--baseline: nothing is judged, nor evaluated, with",
        ),
        ("spo_rank", ["--batch_size=0"], "--batch_size=0: must be 1 or more"),
        ("spo_rank", ["--seed=-1"], "--seed=-1: must be 0 or more"),
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
    save_pt("other.pt", tiny())
    monkeypatch.setattr(sys, "argv", ["spo_train.py"])
    with pytest.raises(SystemExit) as stop:
        main_program(lambda _: workshop(loss, *flags))
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


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """The demo in small, in an empty folder; returns the losses of the runs that were begun."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("DEMO_STORIES", 200), ("DEMO_VOCAB", 512), ("DEMO_GROUPS", 6)):
        monkeypatch.setattr(data, name, value)
    trained, original = [], spo_train.train

    def small(config):
        trained.append(config.loss)
        changes = {"max_iters": 60, "batch_size": 8, "eval_interval": 60, "n_layers": 1, "dim": 48}
        return original(dataclasses.replace(config, **changes) if config.loss == "sft" else config)

    monkeypatch.setattr(spo_train, "train", small)
    return trained


SMALL_DEMO = [
    "--loss=spo_rank",
    "--max_iters=2",
    "--batch_size=2",
    "--eval_stories=2",
    "--max_new_tokens=24",
    "--kl_batch_size=2",
]


def test_sigterm_while_the_demo_trains_its_reference_loses_and_fakes_nothing(
    small_demo, monkeypatch, capsys
):
    """The half-trained model is not taken for the reference, and the next run continues it."""
    spo_train.main(SMALL_DEMO)
    unbroken = load("data/demo/reference/ckpt.pt")
    shutil.rmtree("data")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        steps = RunFolder.steps

        def terminated(run):
            for step in steps(run):
                if step == 7:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

        patched.setattr(RunFolder, "steps", terminated)
        capsys.readouterr()
        spo_train.main(SMALL_DEMO)
    assert signal.getsignal(signal.SIGTERM) is before  # the handler went when its loop did
    assert "stopped by SIGTERM before step 7" in capsys.readouterr().out
    assert not os.path.exists("data/demo/reference") and not os.path.exists(
        "data/demo/ranked.jsonl"
    )
    spo_train.main(SMALL_DEMO)
    assert "step_00000007, step 7" in capsys.readouterr().out  # resumed there
    assert same_weights(load("data/demo/reference/ckpt.pt"), unbroken)
    assert small_demo == ["sft", "spo_rank", "sft", "sft", "spo_rank"]


def test_the_demo_builds_itself_goes_on_after_a_kill_and_is_then_reused(
    small_demo, tmp_path, monkeypatch
):
    """In small: the same stages, stopped between reference and groups."""
    with monkeypatch.context() as killed:
        killed.setattr(
            data.sampling, "sample", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            spo_train.main(SMALL_DEMO)
    assert sorted(os.listdir("data/demo")) == [
        "recipe.json",
        "reference",
        "stories.jsonl",
        "tokenizer.model",
    ]
    spo_train.main(SMALL_DEMO)
    ranked = (tmp_path / "data/demo/ranked.jsonl").read_bytes()
    spo_train.main([*SMALL_DEMO, "--loss=spo_bon"])
    assert small_demo == ["sft", "spo_rank", "spo_bon"]  # the reference was trained once
    assert (tmp_path / "data/demo/ranked.jsonl").read_bytes() == ranked
