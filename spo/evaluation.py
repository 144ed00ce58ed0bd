"""How good a policy is: its stories against a baseline's, its KL to the reference, its entropy."""

import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import Transformer
from spo import head, offline_judge, parallel
from spo.chat import BudgetSpent, Stopped
from spo.generate import (
    PURPOSE_REPORT,
    PURPOSE_REPORT_BASELINE,
    PURPOSE_SELECT,
    PURPOSE_SELECT_BASELINE,
    sample,
    story_records,
    tile_evenly,
)
from spo.groups import EncodedGroup, micro_batches
from spo.parallel import print0
from spo.records import read_groups
from spo.tokenizer import Tokenizer
from spo.win_rate import WinRate


@dataclass
class Verdict:
    """An evaluation: the win-rate, the offline judge's mean score, KL and entropy, and the stories.

    win_rate  None where the judge could not be asked any more: `reason` says why
    kl        to the reference, in nats per story
    entropy   of the policy on its own stories, in nats per token
    """

    win_rate: WinRate | None
    score: float
    kl: float
    entropy: float
    stories: list[dict]
    reason: str = ""

    @property
    def rate(self) -> float:
        """The number to select the best by: the win-rate, or -1 where none can be trusted."""
        return self.win_rate.rate if self.win_rate and self.win_rate.trusted else -1.0

    def logged(self, prefix: str) -> dict[str, float]:
        """Return what goes into the log, as {"prefix/win_rate": ...}."""
        rate = self.win_rate
        values: dict[str, float] = {}
        if rate is not None and rate.trusted:
            values |= {"win_rate": rate.rate, "low": rate.low, "high": rate.high}
            values |= {"length_controlled": rate.length_controlled}
        values |= {"score": self.score, "kl": self.kl, "entropy": self.entropy}
        if rate is not None:
            values |= {"ties": rate.ties, "invalid": rate.invalid}
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        rate = self.reason or str(self.win_rate)
        if self.win_rate and self.win_rate.trusted:
            rate += f", {self.win_rate.length_controlled:.1%} length-controlled"
        policy = f"KL {self.kl:.1f} nats, entropy {self.entropy:.2f} nats a token"
        return f"{rate:<57} score {self.score:.2f}, {policy}"


@dataclass
class StorySet:
    """What one kind of evaluation is made of: prompts, streams, and the baseline's stories."""

    prompts: list[str]
    purpose: int
    baseline_purpose: int
    baseline: list[str] | None = (
        None  # stories of the reference are drawn when they are first needed
    )


class Evaluation:
    """Stories of the policy against the baseline's: one set to select by, a fresh one to report.

    The best of many noisy evaluations looks better than it is; the report's seeds had no part in
    the choice.
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
    ):
        """
        reference     what the KL is measured to, and whose stories are the baseline
        prompts       of the dataset: each is used equally often
        eval_stories  of the selecting set; the reporting one has twice as many
        judge         has a name, a note for the end, and compare(policy, baseline, label) ->
                      WinRate
        baseline      a file of stories to win against instead, with their prompts. ValueError if it
                      has too few
        """
        self.reference = reference
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.judge = judge
        self.has_judged = False
        self.name = "the reference"
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

    def _read_baseline(self, path: str) -> None:
        self.name = os.path.basename(path)
        select, report = self.sets["select"], self.sets["report"]
        stories = read_groups(path)
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

    @torch.no_grad()
    def evaluate(self, policy: Transformer, step: int, which: str) -> Verdict:
        """Judge a policy on the set "select" or "report". Collective."""
        story_set = self.sets[which]
        with parallel.unsharded(policy, self.reference):
            if story_set.baseline is None:
                purpose, label = story_set.baseline_purpose, "stories of the reference"
                samples = self._sample(self.reference, story_set.prompts, purpose, label)
                story_set.baseline = self._texts(
                    self._records(samples, story_set.prompts, 0, purpose)
                )
            purpose = story_set.purpose
            samples = self._sample(policy, story_set.prompts, purpose, "stories")
            kl, entropy = self._kl_and_entropy(policy, samples)
        if not math.isfinite(kl):
            kept = "ckpt.pt holds the last evaluation, a lower --learning_rate may help"
            raise ValueError(f"step {step}: the KL is {kl}, the weights are not finite; {kept}")
        records = self._records(samples, story_set.prompts, step, purpose)
        texts = self._texts(records)
        score = sum(map(offline_judge.score, texts)) / len(texts)
        win_rate, reason = parallel.on_rank_0(lambda: self._compare(texts, story_set.baseline))
        return Verdict(win_rate, score, kl, entropy, records, reason)

    def _sample(
        self, model: Transformer, prompts: list[str], purpose: int, label: str
    ) -> list[EncodedGroup]:
        encoded = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        return sample(model, encoded, (self.seed, purpose), self.max_new_tokens, label)

    def _records(
        self, samples: list[EncodedGroup], prompts: list[str], step: int, purpose: int
    ) -> list[dict]:
        more = {"seed": (self.seed, purpose), "checkpoint": f"step {step}"}
        return story_records(samples, prompts, self.tokenizer, self.reference.eos_id, **more)

    def _texts(self, records: list[dict]) -> list[str]:
        return [record["prompt"] + record["text"] for record in records]

    def _kl_and_entropy(
        self, policy: Transformer, samples: list[EncodedGroup]
    ) -> tuple[float, float]:
        """Return the KL per story and the entropy per token, over the stories of all processes."""
        mine = samples[parallel.share(len(samples))]
        totals = torch.zeros(2, dtype=torch.float64)
        with parallel.alone():  # nothing is sharded here, so the others may have other batches
            batches = micro_batches(mine, None, policy) if mine else []
        for batch in batches:
            reference = head.reference_states(self.reference, batch)
            kl, entropy = head.token_kl(policy, batch, reference)
            totals += torch.stack([kl.sum(), entropy.sum()]).double().cpu()
        kl, entropy = parallel.all_reduce_sum(totals).tolist()
        tokens = sum(group.scored_tokens for group in samples)
        return kl / len(samples), entropy / tokens

    def _compare(self, texts: list[str], baseline: list[str]) -> tuple[WinRate | None, str]:
        """Return the win-rate; or None and why, if the judge could be asked before and cannot now.

        A run should not end because its judge's budget has, or its network. If it never could be
        asked, that is raised.
        """
        try:
            win_rate = self.judge.compare(texts, baseline, "judging")
        except (Stopped, ConnectionError) as error:
            if not self.has_judged:
                raise
            print(error, flush=True)
            spent = isinstance(error, BudgetSpent)
            return None, f"no win-rate: {'budget spent' if spent else 'judge out of reach'}"
        self.has_judged = True
        return win_rate, ""


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 48) -> str:
    """Set two texts in columns under their titles."""
    columns = []
    for title, text in zip(titles, (left, right), strict=True):
        columns.append([title, "-" * width, *textwrap.wrap(text, width)])
    height = max(map(len, columns))
    for column in columns:
        column += [""] * (height - len(column))
    rows = zip(*columns, strict=True)
    return "\n".join(f"{a:<{width}}   {b}".rstrip() for a, b in rows)


def report(
    evaluation: Evaluation, policies: dict[str, tuple[Transformer, int]], record: Callable
) -> None:
    """Print a table of policies, {name: (policy, step)}, and a story of the first two.

    record  called with (step, values) of each, for the log; the values are called "name/win_rate"
            and so on
    """
    judge = evaluation.judge
    print0(f"\nwin-rate over {evaluation.name} on fresh stories, {judge.name} [95% interval]")
    stories = []
    for name, (policy, step) in policies.items():
        verdict = evaluation.evaluate(policy, step, "report")
        record(step, verdict.logged(name))
        stories.append(verdict.stories[0]["text"])
        print0(f"  {f'{name} (step {step})':<18} {verdict}")
    if judge.note:
        print0(judge.note)
    print0("\n" + side_by_side(stories[0], stories[1], ("before", "after")))
