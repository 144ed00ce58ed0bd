"""Ranked groups -> token ids -> micro-batches: what every loss is trained on.

Knows the tokenizer, and of a model its shape and device.
"""

import bisect
import glob
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import Transformer
from spo import parallel
from spo.files import BadRecords, check_sha256
from spo.records import RankedGroup, read_groups, remarks, require
from spo.templates import FIXED_DATE, MARKED, OPEN, Llama2Format
from spo.tokenizer import Tokenizer

# Micro-batches are a multiple of this wide: oneDNN keeps code and memory for every shape that it
# meets.
TOKENS_ROUNDED_TO = 32


@dataclass(frozen=True)
class EncodedGroup:
    """A group in token ids: the prompt from BOS on; each response, with its terminator if it ended.

    line             of the dataset; of a sample, its number
    reference_logps  the reference's log-prob of each response, in nats; None: not computed
    desirable        whether its one response is, in unpaired data
    """

    prompt: list[int]
    responses: list[list[int]]
    line: int
    reference_logps: tuple[float, ...] | None = None
    desirable: bool | None = None

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def scored_tokens(self) -> int:
        return sum(map(len, self.responses))


@dataclass
class Batch:
    """N = B * n sequences, group by group, padded on the right.

    tokens           (N, T) ids, BOS first
    mask             (N, T) bool: True on the tokens that are scored, which are the responses. It
                     goes by length and never by value, since BOS, terminator and padding may share
                     an id
    n                responses per group
    reference_logps  (B, n) float64, or None where the groups have none
    desirable        (B, 1) bool, or None: of unpaired data
    """

    tokens: Tensor
    mask: Tensor
    n: int
    reference_logps: Tensor | None = None
    desirable: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each response, (B, n)."""
        return self.mask.sum(1).view(-1, self.n)


def make_batch(groups: Sequence[EncodedGroup], width: int = 0, device="cpu") -> Batch:
    """Lay groups side by side in as many tokens as the longest has, or `width` if that is more."""
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    width = max(width, *(group.longest for group in groups))
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = True
    reference_logps = None
    if all(group.reference_logps for group in groups):
        logps = [group.reference_logps for group in groups]
        reference_logps = torch.tensor(logps, dtype=torch.float64, device=device)
    desirable = None
    if groups[0].desirable is not None:
        desirable = torch.tensor([[group.desirable] for group in groups], device=device)
    n = len(groups[0].responses)
    return Batch(tokens.to(device), mask.to(device), n, reference_logps, desirable)


# --- from texts to token ids ---------------------------------------------------------------------


def encode_groups(
    groups: list[RankedGroup], tokenizer: Tokenizer, eos_id: int | Sequence[int], max_seq_len: int
) -> tuple[list[EncodedGroup], dict[str, list[int]]]:
    """Encode groups; return them, and those that were dropped as {reason: their lines}.

    Prompt and response are encoded apart, so that the boundary does not depend on the text around
    it. A response is what follows the prompt to the letter: it brings its own leading space, if
    there is one. A group with an empty response, two identical ones, or a sequence longer than
    max_seq_len is dropped: it teaches nothing, or something else than what was judged.

    eos_id  what ends a response; of several, the first is put after one that has none
    """
    eos_ids = (eos_id,) if isinstance(eos_id, int) else eos_id
    encoded: list[EncodedGroup] = []
    drops: dict[str, list[int]] = {}
    for group in groups:
        prompt = tokenizer.encode(group.prompt, bos=True)
        responses = []
        for text, finished in zip(group.responses, group.finished, strict=True):
            ids = tokenizer.encode_after(group.prompt, text)
            whole = not group.prompt and OPEN in text  # a conversation, and not one answer
            if not whole:
                ids = ended(ids, eos_ids)
                ids = ids if finished else ids[:-1]
            elif finished and not is_ended(ids, eos_ids, tokenizer):
                ids = [*ids, eos_ids[0]]
            responses.append(ids)
        if not prompt and len(responses) == 1:  # without BOS nothing predicts the first token
            prompt, responses = responses[0][:1], [responses[0][1:]]
        desirable = {"desirable": True, "undesirable": False}.get(group.order)
        candidate = EncodedGroup(prompt, responses, group.line, desirable=desirable)
        reason = reason_to_drop(group, candidate, max_seq_len)
        if reason:
            drops.setdefault(reason, []).append(group.line)
        else:
            encoded.append(candidate)
    return encoded, drops


def ended(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return a response with one terminator: a chat template may have written it, and more."""
    for place, token in enumerate(ids):
        if token in eos_ids:
            return ids[: place + 1]
    return [*ids, eos_ids[0]]


def is_ended(ids: list[int], eos_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Tell whether nothing but white space is behind the last terminator."""
    last = max((place for place, token in enumerate(ids) if token in eos_ids), default=-1)
    return last >= 0 and not tokenizer.decode(ids[last + 1 :]).strip()


def reason_to_drop(group: RankedGroup, encoded: EncodedGroup, max_seq_len: int) -> str:
    """Say why a group cannot be trained on; "" if it can."""
    if any(not MARKED.sub("", text).strip() for text in group.responses):
        return "an empty response"
    distinct = min(len(set(group.responses)), len(set(map(tuple, encoded.responses))))
    if distinct < len(group.responses):  # texts may differ in spaces that a tokenizer drops
        return "identical responses"
    if not encoded.prompt:
        return "an empty prompt, and the tokenizer puts no BOS before it"
    if encoded.longest > max_seq_len:
        return f"longer than {max_seq_len} tokens"
    return ""


def load_dataset(
    path: str,
    loss: str,
    need: str,
    tokenizer: Tokenizer,
    model: Transformer,
    skip_bad: bool | None = None,
) -> tuple[Sequence[EncodedGroup], list[str], bool]:
    """Read a dataset; return its encoded groups, the different prompts of usable ones, and whether
    it is of stories: texts without prompts that no chat template wrote.

    need      what the loss has to know of a group, as in losses.Loss.data
    skip_bad  leave out and name what is malformed or does not suit the loss
    Prints what is dropped. ValueError if the file does not suit the loss.
    """
    context = model.args.max_seq_len
    if os.path.isdir(path) or path.endswith(".bin"):
        if need != "text":
            kind = "token files are text for --loss=sft"
            raise ValueError(f"--data={path}: {kind}; {loss} needs groups (JSONL)")
        return TokenWindows(path, context, model.args.vocab_size), [""], True
    template = tokenizer.chat_template()
    bad = BadRecords(skip_bad)
    groups = require(read_groups(path, template, bad), need, path, loss, bad)
    for line in [*filter(None, [bad.report]), *remarks(path, groups)]:
        parallel.print0(line)
    are_messages = any(group.is_chat for group in groups)
    if are_messages:
        writer = template or Llama2Format()
        parallel.print0(f"{path}: messages are written by {writer.name}")
    if template is not None and template.asks_for_the_date:
        parallel.print0(f"{tokenizer.path}: its chat template gets a fixed date, {FIXED_DATE}")
    encoded, drops = encode_groups(groups, tokenizer, model.eos_ids, context)
    for reason, lines in drops.items():
        dropped = f"{len(lines)} of {len(groups)} groups dropped, {reason}"
        parallel.print0(f"{path}: {dropped} (first in line {lines[0]})")
    if not encoded:
        reasons = ", ".join(drops)
        raise ValueError(f"{path}: none of its {len(groups)} groups can be used: {reasons}")
    used = {group.line for group in encoded}
    prompts = sorted({group.prompt for group in groups if group.line in used})
    return encoded, prompts, prompts == [""] and not are_messages


# --- micro-batches -------------------------------------------------------------------------------


def micro_batches(
    groups: Sequence[EncodedGroup], size: int | None, model: Transformer
) -> list[Batch]:
    """Cut groups, by length, into batches of at most `size`: neighbours need little padding.

    size  None: whatever is fastest, and no larger than keeps the device busy
    Collective: every process makes the same number of batches, since sharded models need all at
    every pass.
    """
    groups = sorted(groups, key=lambda group: group.longest)
    n = len(groups[0].responses)
    widths = [padded_width(group.longest, model.args.max_seq_len) for group in groups]
    costs = [n * width for width in widths]
    ends = split_groups(costs, size, model.args.dim, model.device.type)
    count = parallel.all_reduce_max(len(ends) - 1)
    while len(ends) <= count:  # other processes make more: halve the largest
        i = max(range(1, len(ends)), key=lambda i: ends[i] - ends[i - 1])
        ends.insert(i, (ends[i - 1] + ends[i]) // 2)
    batches = []
    for start, end in itertools.pairwise(ends):
        batches.append(make_batch(groups[start:end], widths[end - 1], model.device))
    return batches


def own_micro_batches(groups: Sequence[EncodedGroup], model: Transformer) -> list[Batch]:
    """Cut this process's share of the groups, which may be empty. Nothing may be sharded here."""
    mine = groups[parallel.share(len(groups))]
    with parallel.alone():  # the others may make another number of batches
        return micro_batches(mine, None, model) if mine else []


def split_groups(tokens: list[int], size: int | None, dim: int, device_type: str) -> list[int]:
    """Return the boundaries 0 = e0 < e1 < ... of micro-batches of groups sorted by length.

    tokens  of each group, padded
    size    groups in each; None: up to 4,096 tokens on a CPU, fewer for wide models
    """
    if size is not None:
        count = math.ceil(len(tokens) / size)
        return [i * len(tokens) // count for i in range(count + 1)]
    if device_type == "cpu":
        return split_by_cost(tokens, most=min(4096, 300_000 // dim), overhead=128)
    return split_by_cost(tokens, most=2**23 // dim, overhead=4096)  # a guess: not yet run on a GPU


def padded_width(tokens: int, context: int) -> int:
    """tokens=33, context=256 -> 64, the next multiple of TOKENS_ROUNDED_TO"""
    return min(context, math.ceil(tokens / TOKENS_ROUNDED_TO) * TOKENS_ROUNDED_TO)


def split_by_cost(tokens: list[int], most: int, overhead: int) -> list[int]:
    """Split groups, sorted by length, into batches by dynamic programming.

    Returns the boundaries 0 = e0 < e1 < ... = len(tokens).

    tokens    of each group, padded to its own width; in a batch all are padded to the width of the
              last
    most      tokens of a batch, unless one group has more
    overhead  what a batch costs besides its padded tokens, in tokens

    tokens=[1, 1, 9], most=20, overhead=3 -> [0, 2, 3]: 2 + 9 tokens in two batches, instead of 27
    in one
    """
    costs = [0]  # of the best split of the first i groups
    starts = [0]  # where its last batch begins
    for end, width in enumerate(tokens, 1):
        fewest = end - max(1, min(end, most // width))
        start = min(range(fewest, end), key=lambda i: costs[i] + (end - i) * width)
        costs.append(costs[start] + (end - start) * width + overhead)
        starts.append(start)
    ends = [len(tokens)]
    while ends[0] > 0:
        ends.insert(0, starts[ends[0]])
    return ends


def padding_share(groups: Sequence[EncodedGroup], batches: list[Batch]) -> float:
    """Return the share of positions, over all processes, that hold no token."""
    tokens = 0
    for group in groups:
        tokens += group.scored_tokens + len(group.prompt) * len(group.responses)
    positions = torch.tensor(float(sum(batch.tokens.numel() for batch in batches)))
    return 1 - tokens / float(parallel.all_reduce_sum(positions))


# --- token files ---------------------------------------------------------------------------------


def token_files(folder: str) -> list[str]:
    files = sorted(glob.glob(os.path.join(folder, "*.bin")))
    return [file for file in files if os.path.basename(file) != "tokenizer.bin"]


class TokenWindows(Sequence):
    """Token files as groups of one for sft, as llama2.c trains: windows of `length` tokens.

    Window i ends with the token that window i + 1 begins with, so that every token but the first is
    scored once; a BOS in the middle is scored as the terminator of the story before it.
    """

    def __init__(self, path: str, length: int, vocab_size: int):
        """path: a .bin file or a folder of them. ValueError if there is no window in it."""
        self.length = length
        self.vocab_size = vocab_size
        candidates = token_files(path) or [path]
        self.files = [f for f in candidates if os.path.isfile(f) and os.path.getsize(f) > 1]
        for file in self.files:
            check_sha256(file)
        self.streams = [np.memmap(file, np.uint16, "r") for file in self.files]
        windows = [(len(stream) - 1) // (length - 1) for stream in self.streams]
        self.ends = list(itertools.accumulate(windows))
        if not self.ends or self.ends[-1] == 0:
            make = "python tinystories_data.py pretokenize makes them"
            raise ValueError(f"{path}: holds no token file of {length} tokens; {make}")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> EncodedGroup:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self.ends, index)
        windows_before = self.ends[file - 1] if file else 0
        start = (index - windows_before) * (self.length - 1)
        window = self.streams[file][start : start + self.length].tolist()
        if max(window) >= self.vocab_size:
            held = f"holds id {max(window)}, the model has {self.vocab_size}"
            mend = "pretokenize the text with this model's tokenizer"
            raise ValueError(f"{self.files[file]}: {held}; {mend}")
        return EncodedGroup(window[:1], [window[1:]], index)
