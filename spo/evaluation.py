"""How good is a policy: its stories against a baseline's, by the judge, and its KL to the reference."""

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from judge import Judge, compare_all
from spo import offline_judge
from spo.chat import BudgetSpent, Stopped
from spo.checkpoint import Checkpoint
from spo.groups import micro_batches, read_groups
from spo.head import token_kl
from spo.parallel import World, whole
from spo.sampling import sample, spread, story_records
from spo.tokenizer import Tokenizer
from spo.win_rate import WinRate

# What stories are drawn for: the second number of their seed, so that no two uses share a stream.
ONLINE, SELECT, SELECT_BASELINE, REPORT, REPORT_BASELINE = range(5)


@dataclass
class Verdict:
    """An evaluation: the win-rate, the offline judge's mean score, the KL to the reference in nats, and the stories.

    win_rate  None where the judge could not be asked any more: `reason` says why
    """

    win_rate: WinRate | None
    score: float
    kl: float
    stories: list[dict]
    reason: str = ""

    @property
    def rate(self) -> float:
        """To select the best by: the win-rate, or -1 where there is none that can be trusted."""
        return self.win_rate.rate if self.win_rate and self.win_rate.trusted else -1.0

    def logged(self, prefix: str) -> dict[str, float]:
        rate, values = self.win_rate, {"score": self.score, "kl": self.kl}
        if rate is not None and rate.trusted:
            values = {
                "win_rate": rate.rate,
                "low": rate.low,
                "high": rate.high,
                "length_controlled": rate.length_controlled,
            } | values
        if rate is not None:
            values |= {"ties": rate.ties, "invalid": rate.invalid}
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        return (
            f"{self.reason or str(self.win_rate):<32} score {self.score:.2f}, KL {self.kl:.1f} nats"
        )


class Evaluation:
    """Stories of the policy against the baseline's, on fixed seeds: one set to select by, a fresh one to report.

    The best of many noisy evaluations looks better than it is; the report's seeds had no part in the choice.
    """

    def __init__(
        self,
        reference: Checkpoint,
        tokenizer: Tokenizer,
        prompts: list[str],
        eval_stories: int,
        *,
        judge: Judge,
        seed: int,
        max_new_tokens: int = 256,
        baseline: str = "",
        world: World = World(),
    ):
        """
        judge         who compares the stories
        reference     what the KL is measured to, and whose stories are to be won against
        prompts       of the dataset: each is used equally often
        eval_stories  of the selecting set; the reporting one has twice as many
        baseline      a file of stories to win against instead, with their prompts. ValueError if it has too few
        """
        self.reference, self.tokenizer, self.seed, self.max_new_tokens = (
            reference,
            tokenizer,
            seed,
            max_new_tokens,
        )
        self.judge, self.has_judged, self.world = judge, False, world
        select, report = eval_stories, 2 * eval_stories
        if baseline:
            stories = read_groups(baseline)
            if len(stories) < select + report:
                raise ValueError(
                    f"--baseline={baseline}: {len(stories)} stories, selecting and reporting need "
                    f"{select + report}; make more or give --eval_stories={len(stories) // 3}"
                )
            parts = {"select": stories[:select], "report": stories[select : select + report]}
            self.name = os.path.basename(baseline)
            self.prompts = {
                which: [story.prompt for story in part] for which, part in parts.items()
            }
            self.baselines = {
                which: [s.prompt + s.responses[0] for s in part] for which, part in parts.items()
            }
        else:
            self.name = "the reference"
            self.prompts = {"select": spread(prompts, select), "report": spread(prompts, report)}
            self.baselines = {}  # the reference's own stories, drawn when they are first needed

    def stories(self, checkpoint: Checkpoint, which: str, purpose: int, progress: str):
        """(records, samples) of a checkpoint: the records are all, the samples those of this process."""
        prompts = [self.tokenizer.encode(prompt, bos=True) for prompt in self.prompts[which]]
        seed, part = (self.seed, purpose), self.world.share(len(prompts))
        samples = sample(
            checkpoint,
            prompts,
            seed,
            self.max_new_tokens,
            progress if self.world.rank == 0 else None,
            part,
        )
        everyones = [group for samples in self.world.gather(samples) for group in samples]
        records = story_records(
            everyones,
            self.prompts[which],
            self.tokenizer,
            checkpoint.eos_id,
            seed=seed,
            checkpoint=f"step {checkpoint.step}",
        )
        return records, samples

    @torch.no_grad()
    def evaluate(self, checkpoint: Checkpoint, which: str) -> Verdict:
        with whole(checkpoint.model, self.reference.model):
            return self.evaluate_whole(checkpoint, which)

    def evaluate_whole(self, checkpoint: Checkpoint, which: str) -> Verdict:
        checkpoint.model.eval()
        if which not in self.baselines:
            purpose = SELECT_BASELINE if which == "select" else REPORT_BASELINE
            records, _ = self.stories(self.reference, which, purpose, "stories of the reference")
            self.baselines[which] = [record["prompt"] + record["text"] for record in records]
        records, samples = self.stories(
            checkpoint, which, SELECT if which == "select" else REPORT, "stories"
        )
        kl, model, reference = 0.0, checkpoint.model, self.reference.model
        for batch in micro_batches(samples, None, model.args, self.world.device):
            hidden, reference_hidden = model.hidden(batch.tokens), reference.hidden(batch.tokens)
            kl += float(
                token_kl(
                    hidden,
                    model.output.weight,
                    reference_hidden,
                    reference.output.weight,
                    batch.mask,
                ).sum()
            )
        kl = float(self.world.total(torch.tensor(kl, dtype=torch.float64)))
        texts = [record["prompt"] + record["text"] for record in records]
        score = sum(map(offline_judge.score, texts)) / len(texts)
        win_rate, reason = self.world.from_first(lambda: self.compare(texts, self.baselines[which]))
        return Verdict(win_rate, score, kl / len(texts), records, reason)

    def compare(self, texts: list[str], baseline: list[str]) -> tuple[WinRate | None, str]:
        """The win-rate; or None and why, if the judge could be asked before and cannot be now.

        A run should not end because its judge's budget has, or its network. If it never could be asked, that is raised.
        """
        try:
            win_rate = compare_all(self.judge, texts, baseline, "judging")
        except (Stopped, ConnectionError) as error:
            if not self.has_judged:
                raise
            print(error, flush=True)
            return None, "no win-rate: " + (
                "budget spent" if isinstance(error, BudgetSpent) else "judge out of reach"
            )
        self.has_judged = True
        return win_rate, ""


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 48) -> str:
    columns = [
        [title, "-" * width, *textwrap.wrap(text, width)]
        for title, text in zip(titles, (left, right))
    ]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns))
    return "\n".join(f"{a:<{width}}   {b}".rstrip() for a, b in rows)


def report(evaluation: Evaluation, checkpoints: dict[str, Checkpoint], record: Callable) -> None:
    """Print a table of named checkpoints on the report's seeds, and one story of the first two side by side.

    record  called with (step, values) of each, for the log; the values are called "name/win_rate" and so on
    """
    say = evaluation.world.say
    say(
        f"\nwin-rate over {evaluation.name} on fresh stories, {evaluation.judge.name} [95% interval]"
    )
    stories = []
    for name, checkpoint in checkpoints.items():
        verdict = evaluation.evaluate(checkpoint, "report")
        record(checkpoint.step, verdict.logged(name))
        stories.append(verdict.stories[0]["text"])
        say(f"  {f'{name} (step {checkpoint.step})':<18} {verdict}")
    if evaluation.judge.note:
        say(evaluation.judge.note)
    say("\n" + side_by_side(stories[0], stories[1], ("before", "after")))
