"""How good a policy is: its stories against a baseline's, its KL to the reference, its entropy."""

import math
import os
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model import Transformer
from spo import head, offline_judge, parallel, pool, second_judge
from spo.chat import BudgetSpent, Stopped
from spo.diversity import Diversity
from spo.files import place
from spo.generate import (
    PURPOSE_POOL,
    PURPOSE_REPORT,
    PURPOSE_REPORT_BASELINE,
    PURPOSE_SELECT,
    PURPOSE_SELECT_BASELINE,
    prompts_that_fit,
    sample,
    story_records,
    tile_evenly,
)
from spo.groups import EncodedGroup, own_micro_batches
from spo.parallel import print0
from spo.records import read_groups
from spo.reference import kl_of_rounding
from spo.tokenizer import Tokenizer
from spo.win_rate import WinRate, all_pairs, length_controlled_rate, win_rate

PAIRS_FOR_LENGTH = 8  # stories of the pool that each is compared with at equal length


@dataclass
class Verdict:
    """An evaluation: win-rates and scores, how far the policy is from the reference, the stories.

    win_rate     None where the judge could not be asked any more: `reason` says why
    score        the offline judge's mean score;  second, second_score: spo/second_judge.py's
    kl           to the reference, in nats per story;  kl_error: its standard error
    kl_rounding  the KL that bfloat16 alone shows (reference.kl_of_rounding); None in float32
    entropy      of the policy on its own stories, in nats per token
    coherence    their mean log-prob a token under the reference
    """

    win_rate: WinRate | None
    score: float
    second: WinRate
    second_score: float
    kl: float
    kl_error: float
    entropy: float
    coherence: float
    diversity: Diversity
    stories: list[dict]
    kl_rounding: float | None = None
    reason: str = ""

    @property
    def rate(self) -> float:
        """The number to select the best by: the win-rate, or -1 where none can be trusted."""
        return self.win_rate.rate if self.win_rate and self.win_rate.trusted else -1.0

    def logged(self, prefix: str) -> dict[str, float]:
        """Return what goes into the log, as {"prefix/win_rate": ...}."""
        rate, second = self.win_rate, self.second
        values: dict[str, float] = {}
        if rate is not None and rate.trusted:
            values |= {"win_rate": rate.rate, "low": rate.low, "high": rate.high}
            values |= {"length_controlled": rate.length_controlled}
        values |= {"score": self.score, "kl": self.kl, "kl_error": self.kl_error}
        if self.kl_rounding is not None:
            values["kl_rounding"] = self.kl_rounding
        values |= {"entropy": self.entropy, "reference_logp": self.coherence}
        values |= self.diversity.logged()
        values |= {"second_win_rate": second.rate, "second_low": second.low}
        values |= {"second_high": second.high, "second_score": self.second_score}
        if rate is not None:
            values |= {"ties": rate.ties, "invalid": rate.invalid}
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        rate = self.reason or str(self.win_rate)
        if self.win_rate and self.win_rate.trusted:
            rate += f", {self.win_rate.length_controlled:.1%} length-controlled"
        kl = f"KL {self.kl:.2f} \u00b1 {self.kl_error:.2f} nats"
        if self.kl_rounding is not None:
            kl += f" (bfloat16 alone shows {self.kl_rounding:.2f})"
        return f"{rate:<57} score {self.score:.2f}, {kl}, entropy {self.entropy:.2f} nats a token"

    @property
    def sample(self) -> str:
        """The beginning of the first story, in a line."""
        return textwrap.shorten(printable(self.stories[0]["text"]), 300)

    @property
    def besides(self) -> str:
        """What the judge does not see: another judge, coherence, diversity."""
        second = f"second judge {self.second.rate:.1%}"
        second += f" [{self.second.low:.1%}, {self.second.high:.1%}]"
        coherence = f"log-prob {self.coherence:.2f} a token under the reference"
        return f"{second}, {coherence}, {self.diversity}"


@dataclass
class StorySet:
    """What one kind of evaluation is made of: prompts, streams, and the baseline's stories."""

    prompts: list[str]
    purpose: int
    baseline_purpose: int
    baseline: list[str] | None = None  # drawn of the reference when they are first needed


class Evaluation:
    """Stories of the policy against the baseline's: one set to select by, a fresh one to report.

    The best of many noisy evaluations looks better than it is; the report's seeds had no part in
    the choice. A judge that scores, with a pool large enough, compares every story with all of the
    pool's to the same prompt; else stories are compared one to one.
    """

    def __init__(
        self,
        reference: Transformer,
        tokenizer: Tokenizer,
        prompts: list[str],
        eval_stories: int,
        *,
        judge,
        seed: int,
        max_new_tokens: int = 256,
        baseline: str = "",
        pool_size: int = 0,
        keep_pool: Callable | None = None,
    ):
        """
        reference     what the KL is measured to, and whose stories are the baseline
        prompts       of the dataset: each is used equally often
        eval_stories  of the selecting set; the reporting one has twice as many
        judge         has a name, a note for the end, compare(policy, baseline, label) -> WinRate,
                      and score, a function of a text, or None
        baseline      a file of stories to win against instead, with their prompts. ValueError if it
                      has too few
        pool_size     stories of the reference that each is judged against; 0: one to one
        keep_pool     of (prompts, draw), returns the pool's texts: read, or drawn and kept
        """
        self.reference = reference
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.judge = judge
        self.has_judged = False
        self.kl_rounding: float | None = None  # measured once, on the first samples
        self.name = "the reference"
        self.whose = "the stories of the model that you started from"
        counts = {"select": eval_stories, "report": 2 * eval_stories}
        select = StorySet(
            tile_evenly(prompts, counts["select"]), PURPOSE_SELECT, PURPOSE_SELECT_BASELINE
        )
        report = StorySet(
            tile_evenly(prompts, counts["report"]), PURPOSE_REPORT, PURPOSE_REPORT_BASELINE
        )
        self.sets = {"select": select, "report": report}
        if baseline:
            self._read_baseline(baseline)
        distinct = sorted({*select.prompts, *report.prompts})
        has_pool = not baseline and judge.score and pool_size >= pool.FEWEST * len(distinct)
        self.pool_prompts = tile_evenly(distinct, pool_size) if has_pool else []
        self.keep_pool = keep_pool or (lambda _, draw: draw())
        self.pool: dict[str, list[str]] = {}  # prompt -> texts; drawn when they are first needed

    def _read_baseline(self, path: str) -> None:
        self.name = self.whose = os.path.basename(path)
        select, report = self.sets["select"], self.sets["report"]
        stories = read_groups(path)
        places = [place(path, story.line) for story in stories]
        prompts = [story.prompt for story in stories]
        fitting = prompts_that_fit(prompts, places, self.tokenizer, self.reference)
        stories = [stories[i] for i in fitting]
        needed = len(select.prompts) + len(report.prompts)
        if len(stories) < needed:
            has = f"{len(stories)} stories, selecting and reporting need {needed}"
            mend = f"make more or give --eval_stories={len(stories) // 3}"
            raise ValueError(f"--baseline={path}: {has}; {mend}")
        start = 0
        for story_set in (select, report):
            chosen = stories[start : start + len(story_set.prompts)]
            start += len(chosen)
            story_set.prompts = [story.prompt for story in chosen]
            story_set.baseline = [story.prompt + story.responses[0] for story in chosen]

    @property
    def how(self) -> str:
        """How stories are compared, for the table."""
        if not self.pool_prompts:
            return "one to one"
        each = len(self.pool_prompts) // len(set(self.pool_prompts))
        return f"each against {each:,} stories"

    @torch.no_grad()
    def evaluate(self, policy: Transformer, step: int, which: str) -> Verdict:
        """Judge a policy on the set "select" or "report". Collective."""
        story_set = self.sets[which]
        prompts, purpose = story_set.prompts, story_set.purpose
        with parallel.unsharded(policy, self.reference):
            if self.pool_prompts and not self.pool:
                texts = self.keep_pool(self.pool_prompts, self._draw_pool)
                for prompt, text in zip(self.pool_prompts, texts, strict=True):
                    self.pool.setdefault(prompt, []).append(text)
            if not self.pool_prompts and story_set.baseline is None:
                label = "stories of the reference"
                story_set.baseline = self._draw(prompts, story_set.baseline_purpose, label)
            samples = self._sample(policy, prompts, purpose, "stories")
            kl, kl_error, entropy, coherence = self._against_reference(policy, samples)
        if not math.isfinite(kl):
            kept = "ckpt.pt holds the last evaluation, a lower --learning_rate may help"
            raise ValueError(f"step {step}: the KL is {kl}, the weights are not finite; {kept}")
        if self.kl_rounding is None:
            self.kl_rounding = kl_of_rounding(self.reference, samples, self.seed)
        records = self._records(samples, prompts, step, purpose)
        texts = self._texts(records)
        scores = list(map(offline_judge.score, texts))
        if step == 0 and self.judge.score and (remark := offline_judge.remark(texts)):
            print0(remark)
        judged, reason = parallel.on_rank_0(lambda: self._compare(texts, story_set))
        return Verdict(
            judged,
            sum(scores) / len(texts),
            self._compare_scores(second_judge.score, texts, story_set),
            sum(map(second_judge.score, texts)) / len(texts),
            kl,
            kl_error,
            entropy,
            coherence,
            Diversity.of([record["text"] for record in records], scores),
            records,
            self.kl_rounding,
            reason,
        )

    def _draw_pool(self) -> list[str]:
        return self._draw(self.pool_prompts, PURPOSE_POOL, "stories of the reference")

    def _draw(self, prompts: list[str], purpose: int, label: str) -> list[str]:
        """Return stories of the reference, prompt and text."""
        samples = self._sample(self.reference, prompts, purpose, label)
        return self._texts(self._records(samples, prompts, 0, purpose))

    def _sample(
        self, model: Transformer, prompts: list[str], purpose: int, label: str
    ) -> list[EncodedGroup]:
        encoded = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        model.pieces = self.tokenizer.vocab_size  # best.pt comes without its tokenizer
        # The 1 keeps row 0 apart: to numpy the streams (7, 2) and (7, 2, 0) are one.
        seed = (self.seed, purpose, 1)
        return sample(model, encoded, seed, self.max_new_tokens, label)

    def _records(
        self, samples: list[EncodedGroup], prompts: list[str], step: int, purpose: int
    ) -> list[dict]:
        more = {"seed": (self.seed, purpose, 1), "checkpoint": f"step {step}"}
        return story_records(samples, prompts, self.tokenizer, self.reference.eos_ids, **more)

    def _texts(self, records: list[dict]) -> list[str]:
        return [record["prompt"] + record["text"] for record in records]

    def _against_reference(
        self, policy: Transformer, samples: list[EncodedGroup]
    ) -> tuple[float, float, float, float]:
        """Return, over the stories of all processes, the KL per story and its standard error, the
        entropy per token, and the log-prob per token under the reference.
        """
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in own_micro_batches(samples, policy):
            reference = head.reference_states(self.reference, batch)
            kl, entropy = (x.double() for x in head.token_kl(policy, batch, reference))
            logps = head.logps_of_states(reference, batch).double()
            sums = [kl.sum(), kl.square().sum(), entropy.sum(), logps.sum()]
            totals += torch.stack(sums).cpu()
        kl, squares, entropy, logps = parallel.all_reduce_sum(totals).tolist()
        n, tokens = len(samples), sum(group.scored_tokens for group in samples)
        spread = max(0.0, squares - kl * kl / n) / max(1, n - 1)
        return kl / n, math.sqrt(spread / n), entropy / tokens, logps / tokens

    def _compare_scores(
        self, score: Callable[[str], float], texts: list[str], story_set: StorySet
    ) -> WinRate:
        """Return the win-rate by a formula: against all of the pool, or one to one."""
        if not self.pool:
            both = zip(map(score, texts), map(score, story_set.baseline), strict=True)
            return win_rate([preference(a, b) for a, b in both])
        ours = by_prompt(story_set.prompts, list(map(score, texts)))
        theirs = {prompt: list(map(score, stories)) for prompt, stories in self.pool.items()}
        return all_pairs(ours, theirs)

    def _length_controlled(self, texts: list[str], prompts: list[str]) -> float:
        """Return the rate at equal length, of pairs with a few stories of the pool each."""
        preferences, differences = [], []
        rng = random.Random(self.seed)
        for text, prompt in zip(texts, prompts, strict=True):
            for other in rng.sample(self.pool[prompt], PAIRS_FOR_LENGTH):
                preferences.append(preference(self.judge.score(text), self.judge.score(other)))
                differences.append(len(text) - len(other))
        return length_controlled_rate(preferences, differences)

    def _compare(self, texts: list[str], story_set: StorySet) -> tuple[WinRate | None, str]:
        """Return the win-rate; or None and why, if the judge could be asked before and cannot now.

        A run should not end because its judge's budget has, or its network. If it never could be
        asked, that is raised.
        """
        if self.pool:
            rate = self._compare_scores(self.judge.score, texts, story_set)
            rate.length_controlled = self._length_controlled(texts, story_set.prompts)
            return rate, ""
        try:
            rate = self.judge.compare(texts, story_set.baseline, "judging")
        except (Stopped, ConnectionError) as error:
            if not self.has_judged:
                raise
            print(error, flush=True)
            spent = isinstance(error, BudgetSpent)
            return None, f"no win-rate: {'budget spent' if spent else 'judge out of reach'}"
        self.has_judged = True
        return rate, ""


def preference(ours: float, theirs: float) -> float:
    """Return 1 for the higher score, 0 for the lower, 0.5 for equal ones."""
    return (1 + (ours > theirs) - (ours < theirs)) / 2


def by_prompt(prompts: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    """prompts=["a", "b", "a"], values=[1, 2, 3] -> {"a": [1, 3], "b": [2]}"""
    grouped: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        grouped.setdefault(prompt, []).append(value)
    return grouped


def printable(text: str) -> str:
    """Replace what could steer a terminal: "a\x1b[2Jb" -> "a\ufffd[2Jb"."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 48) -> str:
    """Set two texts in columns under their titles."""
    columns = []
    for title, text in zip(titles, (left, right), strict=True):
        columns.append([title, "-" * width, *textwrap.wrap(printable(text), width)])
    height = max(map(len, columns))
    for column in columns:
        column += [""] * (height - len(column))
    rows = zip(*columns, strict=True)
    return "\n".join(f"{a:<{width}}   {b}".rstrip() for a, b in rows)


def claim(rate: WinRate, whose: str) -> str:
    """Return what the interval of best.pt's win-rate allows to say."""
    interval = f"{rate.rate:.0%} [{rate.low:.0%}, {rate.high:.0%}] against {whose}"
    if rate.low > 0.5:
        return f"best.pt is better: it wins {interval}"
    if rate.high < 0.5:
        return f"best.pt is worse: it wins {interval}"
    return f"no difference shown: best.pt wins {interval}"


def report(
    evaluation: Evaluation, policies: dict[str, tuple[Transformer, int]], record: Callable
) -> None:
    """Print a table of policies, {name: (policy, step)}, and a story of the first two.

    policies  "before", "best" and "last"
    record    called with (step, values) of each, for the log; the values are called "name/win_rate"
              and so on
    """
    judge = evaluation.judge
    count = len(evaluation.sets["report"].prompts)
    against = f"win-rate over {evaluation.name} on {count} fresh stories, {evaluation.how}"
    print0(f"\n{against}; {judge.name} [95% interval]")
    verdicts = {}
    by_step: dict[int, Verdict] = {}  # the best may be the last
    for name, (policy, step) in policies.items():
        verdict = by_step.get(step) or evaluation.evaluate(policy, step, "report")
        by_step[step] = verdicts[name] = verdict
        record(step, verdict.logged(name))
        print0(f"  {f'{name} (step {step})':<18} {verdict}")
    print0("what that judge does not see")
    for name, verdict in verdicts.items():
        print0(f"  {name:<8} {verdict.besides}")
    if verdicts["best"].rate >= 0 and policies["best"][1] > 0:  # at step 0 it is the baseline
        print0(claim(verdicts["best"].win_rate, evaluation.whose))
    if judge.note:
        print0(judge.note)
    stories = [verdict.stories[0]["text"] for verdict in verdicts.values()]
    print0("\n" + side_by_side(stories[0], stories[1], ("before", "after")))
