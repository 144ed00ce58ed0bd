"""Ranked groups: files -> groups -> token ids -> batches. What every dataset is read as, and every loss trained on.

A dataset is JSON Lines, one group a line, in any of these forms (unknown keys are kept):

    {"prompt": "", "responses": ["...", "...", "..."], "ranking": [2, 0, 1]}     indices, best first
    {"prompt": "", "responses": ["...", "..."], "best": 0}                       best-of-n: the rest is unordered
    {"prompt": "...", "chosen": "...", "rejected": "..."}                        a pair, also with messages, as TRL has them
    {"prompt": "...", "responses": ["..."]}  or  {"text": "..."}                 text for sft

"finished": [true, ...] beside "responses" (true or false beside "text") marks those that ended by themselves (default:
all): the others were cut at a length limit and get no terminator. Knows the tokenizer, and of a model its shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import ModelArgs
from spo.files import is_unicode, read_jsonl
from spo.tokenizer import Tokenizer

# --- groups --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankedGroup:
    """n responses to one prompt, best first as far as that is known.

    order  "ranking": all of it is known; "best": responses[0] is the best, the rest unordered; "text": nothing is
    """

    prompt: str
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    order: str
    line: int


def parse_group(record, where: str, line: int) -> RankedGroup:
    """One line's record -> a group. ValueError, beginning with `where`, for anything but the forms above."""

    def need(condition, message: str):
        if not condition:
            raise ValueError(f"{where}: {message}")

    need(isinstance(record, dict), "not a JSON object")
    if any(isinstance(record.get(name), list) for name in ("prompt", "chosen", "rejected")):
        record = record | plain_texts(record, need)
    prompt, finished = record.get("prompt", ""), record.get("finished")
    if "chosen" in record or "rejected" in record:
        responses, ranking = [record.get("chosen"), record.get("rejected")], [0, 1]
    elif "text" in record and "responses" not in record:
        responses, ranking = [record["text"]], None
        finished = [finished] if isinstance(finished, bool) else finished
    else:
        responses, ranking = record.get("responses"), record.get("ranking")
    need(isinstance(prompt, str) and is_unicode(prompt), "prompt is not a text")
    need(
        isinstance(responses, list) and responses,
        'needs "responses", "chosen" and "rejected", or "text"',
    )
    need(
        all(isinstance(r, str) and is_unicode(r) for r in responses),
        "a response is missing or not a text",
    )
    n, best = len(responses), record.get("best")
    finished = [True] * n if finished is None else finished
    need(
        isinstance(finished, list)
        and len(finished) == n
        and all(isinstance(f, bool) for f in finished),
        f'"finished" is not a list of {n} true or false',
    )
    order = "text"
    if ranking is not None:
        whole = isinstance(ranking, list) and all(type(i) is int for i in ranking)
        need(
            whole and sorted(ranking) == list(range(n)),
            f'"ranking" {ranking} is no permutation of 0..{n - 1}',
        )
        order = "ranking"
    elif best is not None:
        need(type(best) is int and 0 <= best < n, f'"best" {best} is not an index below {n}')
        ranking = [best] + [i for i in range(n) if i != best]
        order = "ranking" if n == 2 else "best"
    ranking = ranking or list(range(n))
    ordered, ended = tuple(responses[i] for i in ranking), tuple(finished[i] for i in ranking)
    return RankedGroup(prompt, ordered, ended, order, line)


def plain_texts(record: dict, need: Callable) -> dict[str, str]:
    """Chat messages -> texts, in Llama 2's chat format. The prompt is apart, or begins both conversations.

    One turn: a system message perhaps, a user's, and the assistant's that is chosen or rejected.
    """
    sides = [record.get("chosen"), record.get("rejected")]
    prompt = record.get("prompt")
    for messages in [*sides, prompt] if prompt is not None else sides:
        need(
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages),
            'messages and texts are mixed, or a message has no "content"',
        )
    if prompt is None:
        prompt = sides[0][:-1]
        need(
            sides[1][:-1] == prompt,
            "chosen and rejected are different before their last message, and there is no prompt",
        )
        sides = [side[-1:] for side in sides]
    roles = [m.get("role") for m in prompt]
    need(
        roles in (["user"], ["system", "user"])
        and all([m.get("role") for m in side] == ["assistant"] for side in sides),
        f"a conversation of {roles}: only one turn is read, (system,) user, assistant",
    )
    system = f"<<SYS>>\n{prompt[0]['content']}\n<</SYS>>\n\n" if len(prompt) == 2 else ""
    texts = [f" {side[0]['content'].strip()}" for side in sides]
    return {
        "prompt": f"[INST] {system}{prompt[-1]['content'].strip()} [/INST]",
        "chosen": texts[0],
        "rejected": texts[1],
    }


def parse_prompt(record, where: str) -> str:
    """The "prompt" of a line that is to be continued. ValueError, beginning with `where`."""
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not is_unicode(prompt):
        raise ValueError(f'{where}: no "prompt", or none in Unicode')
    return prompt


def read_groups(path: str) -> list[RankedGroup]:
    """A dataset file -> its groups. ValueError naming file and line for the first malformed one."""
    groups = [
        parse_group(record, f"{path} line {number}", number) for number, record in read_jsonl(path)
    ]
    if not groups:
        raise ValueError(f"{path}: holds no groups")
    return groups


def require(groups: list[RankedGroup], need: str, path: str, loss: str) -> None:
    """ValueError, naming the line, where a group does not tell what the loss has to know.

    need  as in losses.objective: "text", "best", "pair" or "ranking"
    """
    size = len(groups[0].responses)
    convert = f"python tinystories_data.py pairs --data={path} --out=pairs.jsonl"
    for group in groups:
        where, n = f"{path} line {group.line}", len(group.responses)
        if n != size:
            raise ValueError(
                f"{where}: group has {n} responses, expected {size} as in line {groups[0].line}"
            )
        if need == "pair" and n != 2:
            raise ValueError(
                f"{where}: --loss={loss} compares pairs, the group has {n} responses; "
                f"make some: {convert}"
            )
        if need in ("pair", "ranking") and group.order != "ranking":
            raise ValueError(
                f"{where}: --loss={loss} needs a full ranking, the group tells only "
                f"{'its best' if group.order == 'best' else 'texts'}"
            )
        if need == "best" and group.order == "text" and n > 1:
            raise ValueError(
                f'{where}: --loss={loss} needs the best response named ("best" or "ranking")'
            )


# --- tokens and batches --------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedGroup:
    """A group in token ids: the prompt from BOS on; each response with the terminator, if it has ended.

    reference_logps  what the reference says of each response, in nats; None: nobody has asked
    """

    prompt: list[int]
    responses: list[list[int]]
    line: int
    reference_logps: tuple[float, ...] | None = None


@dataclass
class Batch:
    """N = B * n sequences, group by group, padded on the right.

    tokens  (N, T) ids, BOS first
    mask    (N, T) bool: the tokens that are scored, i.e. the responses; by length, never by token value,
            since BOS, terminator and padding may share an id
    n       responses per group
    reference_logps  (B, n) float64, or None where the groups have none
    """

    tokens: Tensor
    mask: Tensor
    n: int = 1
    reference_logps: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each response, (B, n)."""
        return self.mask.sum(1).view(-1, self.n)

    def to(self, device) -> "Batch":
        logps = None if self.reference_logps is None else self.reference_logps.to(device)
        return Batch(self.tokens.to(device), self.mask.to(device), self.n, logps)


def collate(sequences: list[tuple[list[int], list[int]]], n: int = 1, width: int = 0) -> Batch:
    """(prompt ids, response ids) pairs -> a Batch of as many tokens as the longest has, or `width` if that is more."""
    width = max(width, *(len(prompt) + len(response) for prompt, response in sequences))
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = True
    return Batch(tokens, mask, n)


def make_batch(groups: list[EncodedGroup], width: int = 0) -> Batch:
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    batch = collate(sequences, n=len(groups[0].responses), width=width)
    if all(group.reference_logps for group in groups):
        batch.reference_logps = torch.tensor(
            [group.reference_logps for group in groups], dtype=torch.float64
        )
    return batch


def encode_groups(
    groups: list[RankedGroup], tokenizer: Tokenizer, eos_id: int, max_seq_len: int
) -> tuple[list[EncodedGroup], dict[str, list[int]]]:
    """Groups -> token ids; and those dropped, as {reason: their lines}.

    Prompt and response are encoded apart, so that the boundary does not depend on the text around it. A response is
    what follows the prompt to the letter: it brings its own leading space, if there is one. A group with an empty
    response, two identical ones, or a sequence longer than max_seq_len is dropped: it teaches nothing, or something
    else than what was judged.
    """
    encoded, drops = [], {}
    for group in groups:
        prompt = tokenizer.encode(group.prompt, bos=True)
        responses = [
            tokenizer.encode_after(group.prompt, text) + [eos_id] * ended
            for text, ended in zip(group.responses, group.finished)
        ]
        if any(not text.strip() for text in group.responses):
            reason = "an empty response"
        elif len(set(group.responses)) < len(group.responses):
            reason = "identical responses"
        elif len(prompt) + max(map(len, responses)) > max_seq_len:
            reason = f"longer than {max_seq_len} tokens"
        else:
            encoded.append(EncodedGroup(prompt, responses, group.line))
            continue
        drops.setdefault(reason, []).append(group.line)
    return encoded, drops


def longest_sequence(group: EncodedGroup) -> int:
    """Tokens of the prompt and the longest response."""
    return len(group.prompt) + max(map(len, group.responses))


WIDTH = 32  # micro-batches are a multiple of this wide: oneDNN keeps code and memory for every shape that it meets


def micro_batches(
    groups: list[EncodedGroup],
    size: int | None,
    args: ModelArgs,
    device: str,
    agree: Callable[[int], int] = int,
) -> list[Batch]:
    """The groups, by length, in batches of at most `size`, so that neighbours need little padding.

    size   None: whatever is fastest, of up to 4,096 tokens on a CPU, fewer for wide models: no larger than keeps it busy
    args   the model's
    agree  from the number of batches that this process would make to the one that all make
    """
    groups = sorted(groups, key=longest_sequence)
    n, widths = (
        len(groups[0].responses),
        [min(args.max_seq_len, -(-longest_sequence(g) // WIDTH) * WIDTH) for g in groups],
    )
    if size is not None:
        count = math.ceil(len(groups) / size)
        ends = [i * len(groups) // count for i in range(count + 1)]
    elif str(device) == "cpu":
        ends = cut([n * width for width in widths], min(4096, 300_000 // args.dim), overhead=128)
    else:
        ends = cut(
            [n * width for width in widths], 2**23 // args.dim, overhead=4096
        )  # a guess: measured on CPUs only
    count = agree(len(ends) - 1)
    while len(ends) <= count:  # other processes make more
        i = max(range(1, len(ends)), key=lambda i: ends[i] - ends[i - 1])
        ends.insert(i, (ends[i - 1] + ends[i]) // 2)
    return [make_batch(groups[a:b], widths[b - 1]).to(device) for a, b in zip(ends, ends[1:])]


def cut(tokens: list[int], most: int, overhead: int) -> list[int]:
    """Where to cut groups, the longest last, into batches: 0, ..., len(tokens), at the least cost in tokens.

    tokens    of a group when it is padded to its own width: all of a batch are padded to its last one's
    most      of a batch, unless one group has more
    overhead  what a batch costs besides its tokens
    """
    costs, starts = [0], [0]
    for end, width in enumerate(tokens, 1):
        first = end - max(1, min(end, most // width))
        start = min(range(first, end), key=lambda i: costs[i] + (end - i) * width)
        costs.append(costs[start] + (end - start) * width + overhead)
        starts.append(start)
    ends = [len(tokens)]
    while ends[0] > 0:
        ends.insert(0, starts[ends[0]])
    return ends
