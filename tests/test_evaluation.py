"""The ruler: win-rates against a pool, their intervals, the second judge, diversity, KL's error."""

import itertools
import json
import math
import os
import random
import statistics

import numpy as np
import pytest
import torch
from helpers import log_of, perturbed, plain_tiny, tiny, write
from test_offline_judge import FAKES, PLAIN, RICH, TOLD, WORN

import judge
import sample
import spo_train
import tinystories_data as data
from losses import token_kl
from spo import diversity, generate, offline_judge, pool, second_judge
from spo.evaluation import Evaluation, by_prompt, claim, preference, report
from spo.groups import make_batch
from spo.win_rate import WinRate, all_pairs, student

# --- every story against a pool ------------------------------------------------------------------


def test_all_pairs_by_hand():
    """3 beats both of (1, 2), 2 beats one and ties one: (1 + 1 + 1 + 1/2) / 4."""
    rate = all_pairs({"": [3, 2]}, {"": [1, 2]})
    assert (rate.rate, rate.count, rate.ties, rate.pool) == (3.5 / 4, 2, 1, 2)
    # The shares beaten are 1 and 3/4, those lost to are 1 and 3/4 of the pool: DeLong's variance.
    variance = 2 * statistics.variance([1, 0.75]) / 2
    freedom = variance**2 / (2 * (variance / 2) ** 2 / 1)
    half = student(freedom) * math.sqrt(variance) / (0.875 * 0.125)
    middle = math.log(0.875 / 0.125)
    expected = [1 / (1 + math.exp(-(middle + side * half))) for side in (-1, 1)]
    assert [rate.low, rate.high] == pytest.approx(expected)


def test_all_pairs_equals_every_comparison():
    rng = random.Random(0)
    ours = {p: [rng.randrange(6) for _ in range(5)] for p in "ab"}
    theirs = {p: [rng.randrange(6) for _ in range(9)] for p in "ab"}
    wins = [(1 + (a > b) - (a < b)) / 2 for p in "ab" for a in ours[p] for b in theirs[p]]
    rate = all_pairs(ours, theirs)
    assert rate.rate == pytest.approx(sum(wins) / len(wins))
    assert rate.ties == wins.count(0.5)


@pytest.mark.parametrize("scores,rate", [([5, 6], 1.0), ([0, 0], 0.0), ([3, 3], 0.5)])
def test_at_0_at_1_and_of_equals_the_interval_is_wilsons(scores, rate):
    result = all_pairs({"": scores * 8}, {"": [3] * 40 if rate == 0.5 else [1, 2] * 20})
    assert result.rate == rate and 0 <= result.low <= rate <= result.high <= 1
    assert result.high - result.low == pytest.approx(0.194 if rate != 0.5 else 0.440, abs=0.002)


@pytest.mark.parametrize(
    "low,high,begins",
    [
        (0.51, 0.62, "best.pt is better: it wins 55% [51%, 62%] against it"),
        (0.44, 0.64, "no difference shown: best.pt wins 55% [44%, 64%] against it"),
        (0.50, 0.60, "no difference shown"),
        (0.30, 0.49, "best.pt is worse"),
    ],
)
def test_the_last_line_claims_what_its_interval_allows(low, high, begins):
    rate = WinRate(0.55, low, high, count=100, ties=0, invalid=0)
    assert claim(rate, "it").startswith(begins)


def test_students_t():
    for freedom, t in ((3, 3.182), (10, 2.228), (31, 2.040), (1000, 1.962)):
        assert student(freedom) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize("shift,truth", [(0.0, 0.5), (1.0, 0.7602499)])
@pytest.mark.parametrize("count", [32, 128, 256])
@pytest.mark.parametrize("size", [1024, "as many"])
def test_95_of_100_intervals_hold_the_truth(shift, truth, count, size):
    """Normal scores, 2,000 sets of them; P(x > y) = Phi(shift / sqrt(2))."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        ours = rng.normal(shift, 1, count)
        theirs = rng.normal(0, 1, count if size == "as many" else size)
        rate = all_pairs({"": ours}, {"": theirs})
        hits += rate.low <= truth <= rate.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_a_pool_makes_the_interval_a_third_narrower():
    """256 stories: 6 points to either side one to one, 4 against a pool of 1,024."""
    rng = np.random.default_rng(1)
    rate = all_pairs({"": rng.normal(0, 1, 256)}, {"": rng.normal(0, 1, 1024)})
    assert 0.034 < (rate.high - rate.low) / 2 < 0.044


def evaluation(tokenizer, model, prompts=("",), stories=4, size=16, **more) -> Evaluation:
    more = {"judge": judge.OfflineJudge(), "seed": 1, "max_new_tokens": 12} | more
    return Evaluation(model, tokenizer, list(prompts), stories, pool_size=size, **more)


def test_every_story_is_compared_with_the_pool_of_its_prompt(tokenizer):
    model = tiny(vocab_size=512)
    ruler = evaluation(tokenizer, model, ("the owl", "an"), size=20)
    verdict = ruler.evaluate(perturbed(model), 3, "select")
    assert {prompt: len(texts) for prompt, texts in ruler.pool.items()} == {"an": 10, "the owl": 10}
    assert all(text.startswith(prompt) for prompt, texts in ruler.pool.items() for text in texts)
    texts = [story["prompt"] + story["text"] for story in verdict.stories]
    wins = []
    for story, text in zip(verdict.stories, texts, strict=True):
        for other in ruler.pool[story["prompt"]]:
            a, b = offline_judge.score(text), offline_judge.score(other)
            wins.append((1 + (a > b) - (a < b)) / 2)
    assert verdict.win_rate.rate == pytest.approx(sum(wins) / len(wins))
    assert verdict.win_rate.pool == 10 and ruler.how == "each against 10 stories"


def test_no_model_that_is_judged_draws_what_the_tokenizer_lacks(tokenizer):
    """best.pt is loaded without a tokenizer; its 64 embeddings of padding are the likeliest."""
    reference, best = (plain_tiny(vocab_size=576, tied=False) for _ in range(2))
    with torch.no_grad():
        for model in (reference, best):
            model.output.weight[512:] = 9 * model.output.weight[:64]
    ruler = evaluation(tokenizer, reference, stories=8)
    drawn = []
    ruler._records = lambda samples, *more: (
        drawn.extend(samples) or Evaluation._records(ruler, samples, *more)
    )
    ruler.evaluate(best, 2, "report")
    assert len(drawn) == 16 + 16
    assert max(i for group in drawn for i in group.responses[0]) < 512


def test_few_stories_a_prompt_a_baseline_or_an_api_judge_are_one_to_one(tokenizer, tmp_path):
    model = tiny(vocab_size=512)
    baseline = write(tmp_path / "b.jsonl", *({"text": f"Story {i}."} for i in range(12)))

    class Ranks(judge.OfflineJudge):
        score = None

    rulers = [
        evaluation(tokenizer, model, ("the owl", "an", "it"), size=16),
        evaluation(tokenizer, model, baseline=baseline),
        evaluation(tokenizer, model, judge=Ranks()),
        evaluation(tokenizer, model, size=0),
    ]
    for ruler in rulers:
        assert ruler.how == "one to one"
        verdict = ruler.evaluate(model, 0, "select")
        assert verdict.win_rate.pool == 0 and verdict.win_rate.count == 4
        assert verdict.second.count == 4


def test_the_final_table_judges_other_stories_than_those_that_chose(tokenizer):
    """The best of many evaluations looks better than it is on the stories that chose it."""
    seen = []

    class Sees(judge.OfflineJudge):
        def compare(self, policy, baseline, label=None):
            seen.append((policy, baseline))
            return super().compare(policy, baseline, label)

    model = tiny(vocab_size=512)
    ruler = evaluation(tokenizer, model, size=0, judge=Sees())
    ruler.evaluate(perturbed(model), 2, "select")
    policies = {"before": (model, 0), "best": (perturbed(model), 2), "last": (model, 4)}
    report(ruler, policies, lambda *_: None)
    (chose, against), *table = seen
    assert len(table) == 3 and len(chose) == 4
    for texts, others in table:
        assert len(texts) == len(others) == 8
        assert not set(texts) & set(chose) and not set(others) & set(against)


def test_equal_scores_are_half_a_win():
    assert [preference(*both) for both in ((2, 1), (1, 2), (1, 1), (0, 0))] == [1, 0, 0.5, 0.5]


def test_selecting_and_reporting_win_against_other_stories_of_a_file(tokenizer, tmp_path):
    path = write(tmp_path / "b.jsonl", *({"text": f"Story {i}."} for i in range(12)))
    ruler = evaluation(tokenizer, tiny(vocab_size=512), baseline=path)
    select, report = (ruler.sets[which].baseline for which in ("select", "report"))
    assert (len(select), len(report)) == (4, 8) and not set(select) & set(report)


def test_the_pool_is_neither_a_training_story_nor_the_policys(tokenizer):
    """All are of one model: only the random streams keep them apart."""
    model = tiny(vocab_size=512)
    ruler = evaluation(tokenizer, model)
    texts = [s["text"] for which in ruler.sets for s in ruler.evaluate(model, 0, which).stories]
    drawn = ruler.pool[""]
    prompts = [tokenizer.encode("", bos=True)] * 64
    training = generate.sample(model, prompts, ruler.seed, 12)  # as the demo's training stories are
    training = [tokenizer.decode(group.responses[0]) for group in training]
    assert len({*texts, *drawn, *training}) == 4 + 8 + 16 + 64


def test_a_pool_is_drawn_once_and_anew_for_another_key(workshop, capsys, monkeypatch):
    draws = []
    draw = Evaluation._draw
    monkeypatch.setattr(
        Evaluation, "_draw", lambda self, p, *more: draws.append(len(p)) or draw(self, p, *more)
    )
    flags = ["--max_iters=4", "--report=false"]
    workshop("dpo_rank", *flags)
    workshop("dpo_rank", *flags, "--resume")
    assert draws == [16]
    (kept,) = [name for name in os.listdir("out") if name.startswith("pool-")]
    workshop("dpo_rank", *flags, "--max_iters=8", "--resume")
    assert draws == [16]
    with open(f"out/{kept}", "r+", encoding="utf-8") as f:
        content = f.read()
        f.seek(0)
        f.write(content.replace("text", "textt", 3))
    workshop("dpo_rank", "--report=false", "--max_iters=12", "--resume")
    assert draws == [16, 16]  # what is damaged is drawn anew
    lines = open(f"out/{kept}", encoding="utf-8").read().splitlines()
    story = json.loads(lines[3])["text"]
    lines[3] = json.dumps({"text": story + "!"})
    open(f"out/{kept}", "w", encoding="utf-8").write("\n".join(lines) + "\n")
    workshop("dpo_rank", "--report=false", "--max_iters=16", "--resume")
    assert draws == [16, 16, 16]  # and so is a story that somebody has changed
    workshop("dpo_rank", *flags, "--seed=9")
    assert draws == [16, 16, 16, 16]


def test_what_a_pool_depends_on(tokenizer, tmp_path):
    write(tmp_path / "m.bin", "weights")
    config = spo_train.TrainConfig(init_from=str(tmp_path / "m.bin"))
    keys = [pool.key_of(config, tokenizer.path, [""])]
    for name, value in (
        ("seed", 3),
        ("eval_pool", 8),
        ("max_new_tokens", 9),
        ("dtype", "x"),
        ("rope_factor", 8.0),
    ):
        other = spo_train.TrainConfig(**{"init_from": config.init_from, name: value})
        keys.append(pool.key_of(other, tokenizer.path, [""]))
    keys.append(pool.key_of(config, config.init_from, [""]))
    keys.append(pool.key_of(config, tokenizer.path, ["a"]))
    write(tmp_path / "m.bin", "others")
    keys.append(pool.key_of(config, tokenizer.path, [""]))
    assert all(a != b for a, b in itertools.combinations(keys, 2))


def test_the_demos_pool_is_kept_with_the_demo():
    config = spo_train.TrainConfig(init_from=data.demo_checkpoint(), out_dir="o")
    assert data.pool_folder(config) == data.DEMO_DIR
    assert data.pool_folder(spo_train.TrainConfig(out_dir="o")) == "o"


@pytest.mark.parametrize(
    "flags", [["--baseline=pair.jsonl"], ["--judge=fake"], ["--eval_stories=0"]]
)
def test_a_pool_that_is_not_used_is_refused(workshop, flags):
    with pytest.raises(ValueError, match="--eval_pool: .*leave it out"):
        workshop("dpo_rank", "--eval_pool=32", *flags)


# --- diversity -----------------------------------------------------------------------------------


def test_distinct_4_grams_by_hand():
    assert diversity.distinct_share(["a b c d e", "a b c d x"]) == 3 / 4
    assert diversity.distinct_share(["A b c d", "a B c d"]) == 1 / 2
    assert diversity.distinct_share(["too short"]) == 1.0


def test_best_of_k_is_the_mean_over_all_sets():
    scores = [1.0, 2.0, 4.0, 4.0, 7.5]
    for k in range(1, 6):
        sets = list(itertools.combinations(scores, k))
        assert diversity.best_of_k(scores, k) == pytest.approx(sum(map(max, sets)) / len(sets))
    with pytest.raises(ValueError, match="best of 6: there are 5 scores"):
        diversity.best_of_k(scores, 6)


def test_good_stories_are_counted_once():
    found = diversity.Diversity.of(["a", "a", "b", "c"], [7.0, 7.0, 6.5, 6.0])
    assert found.good == 2 and list(found.best_of) == [1, 4]
    assert found.logged().keys() == {"distinct_4grams", "best_of_1", "best_of_4", "good_stories"}


# --- KL ------------------------------------------------------------------------------------------


def test_the_kl_has_its_standard_error(tokenizer):
    policy, reference = tiny(vocab_size=512), perturbed(tiny(vocab_size=512))
    with torch.no_grad():  # far from it, so that the two models' log-probs are not alike
        policy.output.weight.mul_(3)
    ruler = evaluation(tokenizer, reference, stories=6, size=0)
    verdict = ruler.evaluate(policy, 0, "select")
    prompts = [tokenizer.encode("", bos=True)] * 6
    values, logp, own, entropy, tokens = [], 0.0, 0.0, 0.0, 0
    for group in generate.sample(policy, prompts, (1, generate.PURPOSE_SELECT, 1), 12):
        batch = make_batch([group])
        with torch.no_grad():
            logits, others = policy(batch.tokens), reference(batch.tokens)
        values.append(float(token_kl(logits, others, batch.mask)))
        logps = others[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        logp += float(logps[batch.mask[:, 1:]].sum())
        ours = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        own += float(ours[batch.mask[:, 1:]].sum())
        spread = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[:, :-1]
        entropy += float(spread[batch.mask[:, 1:]].sum())
        tokens += int(batch.mask.sum())
    assert verdict.kl == pytest.approx(statistics.mean(values), rel=1e-4)
    assert verdict.kl_error == pytest.approx(statistics.stdev(values) / math.sqrt(6), rel=1e-3)
    assert verdict.coherence == pytest.approx(logp / tokens, rel=1e-4)
    assert verdict.coherence != pytest.approx(own / tokens, rel=0.01)  # it is not the policy's
    assert verdict.entropy == pytest.approx(entropy / tokens, rel=1e-4)
    logged = verdict.logged("eval")
    assert logged["eval/kl_error"] == verdict.kl_error
    assert logged["eval/reference_logp"] == verdict.coherence


def test_the_token_wise_kl_has_the_mean_of_plain_monte_carlo_and_less_variance():
    """Eq. 15 on fresh samples is the Rao-Blackwellised estimator of Amini, Vieira and Cotterell
    (2025, arXiv 2504.10637): an expectation over the next token in the place of the one drawn.
    """
    policy, reference = tiny(), perturbed(tiny())
    with torch.no_grad():
        policy.output.weight.mul_(1.3)
    samples = generate.sample(policy, [[1]] * 4000, 5, 10)
    batch = make_batch(samples)
    with torch.no_grad():
        ours, others = policy(batch.tokens), reference(batch.tokens)
        blackwell = token_kl(ours, others, batch.mask).double()
        ratio = ours.log_softmax(-1) - others.log_softmax(-1)
        drawn = ratio[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
        plain = (drawn * batch.mask[:, 1:]).sum(1).double()
    error = math.sqrt((blackwell - plain).var() / len(plain))
    assert abs(float(blackwell.mean() - plain.mean())) < 4 * error
    assert blackwell.mean() > 10 * error  # it is a measurement, and not nothing
    assert blackwell.var() < 0.7 * plain.var()


# --- a second judge ------------------------------------------------------------------------------


def test_the_second_judge_rewards_no_word_that_the_first_does():
    rewarded = {word for word in second_judge.MIND_AND_TIME if offline_judge.stem(word)}
    assert rewarded == set()


def test_the_second_judge_is_bounded_and_not_fooled_by_what_is_no_story():
    for name, text in FAKES.items():
        assert 0 <= second_judge.score(text) < 3.5, name
        assert all(0 <= value <= 1 for value in second_judge.features(text).values())
    assert second_judge.score(TOLD) > second_judge.score(RICH) > 2
    assert second_judge.score(TOLD) > second_judge.score(PLAIN)
    assert offline_judge.score(RICH) > offline_judge.score(TOLD)


@pytest.mark.parametrize(
    "text,parts,score",
    [
        (PLAIN, (0.368605, 0.214286, 0.975018, 0.0, 0.575), 2.171123),
        (RICH, (0.0, 1.0, 0.260147, 0.0, 0.8875), 2.680511),
        (TOLD, (1.0, 0.425926, 1.0, 1.0, 0.825), 7.065972),
        (WORN, (0.625399, 0.611111, 1.0, 0.952381, 1.0), 7.621436),
    ],
)
def test_the_second_judge_s_scores_of_four_texts_are_what_they_were(text, parts, score):
    """mind, cohesion, rhythm, speech and length; the two other factors are 1."""
    found = second_judge.features(text)
    assert list(found.values()) == pytest.approx([*parts, 1.0, 1.0], abs=1e-6)
    assert second_judge.score(text) == pytest.approx(score, abs=1e-6)
    mind, cohesion, rhythm, speech, length = parts
    by_hand = 10 * (0.35 * mind + 0.25 * cohesion + 0.2 * rhythm + 0.2 * speech) * length
    assert score == pytest.approx(by_hand, abs=1e-4)


def test_the_second_judge_s_factors_fall_for_repetition_and_for_what_is_no_prose():
    said = "Mia said so. "
    assert second_judge.features(said * 40)["no repetition"] == 0.0
    assert second_judge.features("Mia had 1234567 of 89 and 10.")["prose"] < 0.01


def test_the_two_judges_see_different_things(spo_data):
    """On real stories their scores hang together little."""
    with open(f"{spo_data}/tinystories_valid.jsonl", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f]
    first, second = (list(map(j.score, texts)) for j in (offline_judge, second_judge))
    assert abs(statistics.correlation(first, second)) < 0.3


# --- in a run ------------------------------------------------------------------------------------


def test_a_run_logs_and_prints_all_of_it(workshop, capsys):
    workshop("dpo_rank", "--max_iters=4")
    printed = capsys.readouterr().out
    entries = [entry for entry in log_of("out") if "eval/kl" in entry or "last/kl" in entry]
    names = {"win_rate", "low", "high", "length_controlled", "score", "kl", "kl_error", "entropy"}
    names |= {"reference_logp", "distinct_4grams", "best_of_1", "best_of_4", "good_stories"}
    names |= {"second_win_rate", "second_low", "second_high", "second_score", "ties", "invalid"}
    for entry, prefix in ((entries[0], "eval"), (entries[-1], "last")):
        assert names <= {key.removeprefix(f"{prefix}/") for key in entry}
    assert (
        "on 8 fresh stories, each against 16 stories; the offline judge [95% interval]" in printed
    )
    assert "what that judge does not see" in printed and "under the reference, distinct" in printed


def test_stop_kl_ends_a_run_with_its_table(workshop, capsys):
    flags = ["--max_iters=40", "--eval_interval=2", "--learning_rate=3e-3", "--stop_kl=0.05"]
    workshop("dpo_rank", *flags)
    printed = capsys.readouterr().out
    kls = {e["step"]: e["eval/kl"] for e in log_of("out") if "eval/kl" in e}
    last = max(kls)
    assert last < 40 and kls[last] > 0.05 and all(kls[step] <= 0.05 for step in kls if step < last)
    assert f"step {last}: KL {kls[last]:.2f} nats is past --stop_kl=0.05; the run ends" in printed
    assert f"last (step {last})" in printed
    workshop("dpo_rank", *flags, "--resume")  # it ends where it was, and goes on if it may
    assert f"last (step {last})" in capsys.readouterr().out
    workshop("dpo_rank", *flags[:-1], "--stop_kl=1000", "--max_iters=40", "--resume")
    assert "last (step 40)" in capsys.readouterr().out


def test_stop_kl_needs_evaluations(workshop):
    with pytest.raises(
        ValueError, match="--stop_kl: nothing is judged, nor evaluated, with --eval_stories=0"
    ):
        workshop("dpo_rank", "--stop_kl=1", "--eval_stories=0")


def test_judge_prints_diversity(tmp_path, capsys):
    stories = [RICH, RICH, PLAIN, "The owl sang a song to the moon and slept."]
    path = write(tmp_path / "a.jsonl", *({"text": text} for text in stories))
    found = diversity.Diversity.of(stories, list(map(offline_judge.score, stories)))
    judge.main([path, path])
    printed = capsys.readouterr().out
    assert printed.count("a.jsonl: 4 stories, ") == 2 and printed.count(str(found)) == 2


def test_sample_compares_two_models_side_by_side(workshop, tokenizer, capsys):
    from spo.checkpoint import save_pt

    save_pt("other.pt", perturbed(tiny(vocab_size=512)))
    words = ["--checkpoint=start.pt", f"--tokenizer={tokenizer.path}", "--max_new_tokens=12"]
    capsys.readouterr()
    sample.main([*words, "--compare=other.pt", "--num_samples=2"])
    printed = capsys.readouterr().out
    titles = [line.split() for line in printed.splitlines() if "start.pt" in line]
    assert titles == [["start.pt", "other.pt"]] * 2
    config = sample.SampleConfig(tokenizer=tokenizer.path, max_new_tokens=12)
    loaded = sample.load(config, "other.pt", "cpu")
    alone = sample.stories_of(config, "other.pt", *loaded, [""])
    first = alone[0]["text"].split()[0]
    assert first in printed
    for flag in ("--out=x.jsonl", "--prompts=x.jsonl"):
        with pytest.raises(ValueError, match="--compare: prints two models' stories"):
            sample.main([*words, "--compare=other.pt", "--out=x.jsonl", flag])


def test_values_by_prompt():
    assert by_prompt(["a", "b", "a"], [1, 2, 3]) == {"a": [1, 3], "b": [2]}
