"""Sampling from a model: in batches, with a cache, each response from its own random stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelArgs, Transformer
from spo import fast, parallel
from spo.checkpoint import WeightsFlags
from spo.config import flag
from spo.groups import EncodedGroup
from spo.progress import progress
from spo.records import NO_SPACE
from spo.templates import unmark
from spo.tokenizer import Tokenizer

FEWEST_AT_A_TIME, MOST_AT_A_TIME = 128, 1024  # stories
CACHE_AT_A_TIME = 2**28  # bytes of keys and values on a CPU, if that is more stories
MOST_NAMED = 10  # prompts that are left out
STEPS_BETWEEN_LOOKS = 8  # at which rows have ended: a GPU has to wait for the answer
WORDS_PER_BLOCK = 128  # of the vocabulary, when a word is drawn

# What stories are drawn for: the second number of their seed, so that no two uses share a stream.
(
    PURPOSE_KL,
    PURPOSE_SELECT,
    PURPOSE_SELECT_BASELINE,
    PURPOSE_REPORT,
    PURPOSE_REPORT_BASELINE,
    PURPOSE_POOL,
) = range(6)


@dataclass
class SamplingFlags(WeightsFlags):
    """The flags that sample.py and `tinystories_data.py generate` share."""

    tokenizer: str = flag("", "sentencepiece model; default: tokenizer.model beside the checkpoint")
    prompts: str = flag("", "a JSONL file with a prompt in each line")
    batch_size: int | None = flag(
        None, "stories sampled at once; default: 128, more of a small model", least=1
    )
    max_new_tokens: int = flag(256, "longest story, in tokens", least=1)
    temperature: float = flag(1.0, "softmax temperature; 0 takes the likeliest token", least=0)
    top_k: int | None = flag(None, "sample among the k likeliest tokens only", least=1)
    top_p: float | None = flag(
        None, "sample among the likeliest tokens of this total probability only", above=0, most=1
    )
    seed: int = flag(0, "story i draws from the stream of (seed, i)", least=0)
    device: str = flag("", "cpu, cuda, cuda:1, mps; default: cuda if there is one, else cpu")


# --- from logits to a token ----------------------------------------------------------------------


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set logits (N, V) beyond the top_k likeliest, or beyond the mass top_p, to -inf."""
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the token that crosses top_p is kept
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def sample_token(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one id per row of logits (N, V), by inverting the CDF at uniforms (N,) in [0, 1).

    Unlike torch.multinomial it spends one number per row, which is known beforehand, so a row's
    draw does not depend on the others. The probabilities are written over the logits.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits.div_(temperature)
    p = torch.softmax(filter_logits(logits, top_k, top_p), -1, out=logits)
    # First the block of words, then the word in it: a sum over all words is cheap, a running sum is
    # not.
    N, V = p.shape
    padded = F.pad(p, (0, -V % WORDS_PER_BLOCK)) if V % WORDS_PER_BLOCK else p
    blocks = padded.view(N, -1, WORDS_PER_BLOCK)
    block, rest = inverse_cdf(blocks.sum(-1), uniforms)
    rows = torch.arange(N, device=p.device)
    inside, _ = inverse_cdf(blocks[rows, block], rest)
    return (WORDS_PER_BLOCK * block + inside).clamp_(max=V - 1)


def inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Find where u (N,) in [0, 1) falls in the distribution of weights (N, K).

    Returns the index, and where in [0, 1) of that weight.

    weights=[[1, 2, 1]], u=[0.5] -> index 1, and 0.5 of it
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    u = u.unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.shape[1] - 1)
    weight = weights.gather(1, index)
    rest = ((u - cdf.gather(1, index) + weight) / weight).clamp_(0, 1 - 2**-53)
    return index.squeeze(1), rest.squeeze(1)


# --- whole batches -------------------------------------------------------------------------------


@dataclass
class Rows:
    """The rows that are still being written, side by side.

    index     (R,) each row's place in the whole batch
    tokens    (R, T) prompt and what is written so far
    uniforms  (R, T) the random number for each position
    first     (R,) the first position after the prompt
    last      (R,) the position at which the row ends; it shrinks when a terminator is drawn
    """

    index: Tensor
    tokens: Tensor
    uniforms: Tensor
    first: Tensor
    last: Tensor

    def keep(self, alive: Tensor) -> "Rows":
        return Rows(*(value[alive] for value in vars(self).values()))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt_tokens: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | tuple[int, ...] = 0,
    first_row: int = 0,
) -> list[list[int]]:
    """Sample a continuation of every prompt, in one batch with a key-value cache.

    prompt_tokens   N lists of ids, each non-empty (BOS first) and of any length; or a tensor (N, T)
    max_new_tokens  the most for each row; a row also ends where the model's context does
    temperature     0: the likeliest token, always
    top_k, top_p    truncation; None: off, as sampling from the policy itself requires
    stop_ids        a row ends with the first of these that it draws; the id is kept
    seed            one number or several (say, run and step), none negative
    first_row       row i draws from the stream of (seed, first_row + i): its text does not depend
                    on its neighbours, and two calls of 16 rows give what one call of 32 does
    returns         N lists of new ids, prompt excluded
    """
    prompts = [[int(token) for token in prompt] for prompt in prompt_tokens]
    if not prompts:
        return []
    check_request(prompts, max_new_tokens, temperature, top_k, top_p, model.args.max_seq_len)
    rows = make_rows(prompts, max_new_tokens, model, seed, first_row)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    end = rows.tokens.shape[1]
    written, ends = rows.tokens.clone(), rows.last.clone()
    stop = torch.tensor(list(stop_ids), device=model.device, dtype=torch.long)

    decoder = fast.Generation(model, len(prompts), end)
    logits = decoder.prefill(rows.tokens[:, :shortest])  # (N, V)
    position = shortest
    while True:
        if model.pieces is not None and model.pieces < logits.shape[1]:
            logits = logits[:, : model.pieces].contiguous()  # the rest is padding, never drawn
        drawn = sample_token(logits, rows.uniforms[:, position], temperature, top_k, top_p)
        stopped = (drawn.unsqueeze(1) == stop).any(1)
        if position < longest:  # some prompts are longer: their token is given, not drawn
            prompted = rows.first > position
            drawn = torch.where(prompted, rows.tokens[:, position], drawn)
            stopped = stopped & ~prompted
        rows.tokens[:, position] = drawn
        position += 1
        rows.last = torch.where(stopped, rows.last.clamp(max=position), rows.last)
        if position % STEPS_BETWEEN_LOOKS == 0 or position == end:
            alive = rows.last > position
            count = int(alive.sum())
            if count <= 0.75 * len(
                rows.index
            ):  # drop the finished; rarely, since it copies the cache
                written[rows.index] = rows.tokens
                ends[rows.index] = rows.last
                rows = rows.keep(alive)
                decoder.keep(alive)
            if count == 0:
                break
        logits = decoder.next_logits(rows.tokens[:, position - 1 : position])
    texts = zip(written.tolist(), prompts, ends.tolist(), strict=True)
    return [ids[len(prompt) : last] for ids, prompt, last in texts]


def check_request(
    prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k, top_p, context: int
) -> None:
    """ValueError for what no model can be asked."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        needs = "an empty prompt, and the model's tokenizer puts no BOS before it"
        raise ValueError(f"{needs}: there is nothing to continue; give a prompt")
    if max(lengths) >= context:
        room = f"a prompt of {max(lengths)} tokens leaves no room in a context of {context}"
        raise ValueError(room)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be 1 or more")
    good_top_k = top_k is None or top_k >= 1
    good_top_p = top_p is None or 0 < top_p <= 1
    if not temperature >= 0 or not good_top_k or not good_top_p:
        needed = "need temperature >= 0, top_k >= 1, 0 < top_p <= 1"
        raise ValueError(f"{needed}; got {temperature}, {top_k}, {top_p}")


def make_rows(
    prompts: list[list[int]],
    max_new_tokens: int,
    model: Transformer,
    seed: int | tuple[int, ...],
    first_row: int,
) -> Rows:
    """Lay out prompts, and the random numbers of each row's own stream, on the model's device."""
    context = model.args.max_seq_len
    max_new_tokens = min(max_new_tokens, context)
    end = min(context, max(map(len, prompts)) + max_new_tokens)
    tokens = np.zeros((len(prompts), end), dtype=np.int64)
    uniforms = np.zeros((len(prompts), end))
    seeds = np.atleast_1d(seed).tolist()
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        stream = np.random.default_rng((*seeds, first_row + row))
        uniforms[row, len(prompt) :] = stream.random(end)[: end - len(prompt)]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    return Rows(
        index=torch.arange(len(prompts), device=model.device),
        tokens=torch.from_numpy(tokens).to(model.device),
        uniforms=torch.from_numpy(uniforms).to(model.device),
        first=lengths,
        last=(lengths + max_new_tokens).clamp(max=end),
    )


# --- stories of a model --------------------------------------------------------------------------


def stories_at_a_time(args: ModelArgs, device_type: str) -> int:
    """Return how many stories of 256 tokens are sampled at once: many of a small model."""
    if device_type != "cpu":
        return FEWEST_AT_A_TIME
    bytes_a_story = 256 * 2 * 4 * args.n_layers * args.n_kv_heads * args.head_dim
    return max(FEWEST_AT_A_TIME, min(MOST_AT_A_TIME, CACHE_AT_A_TIME // bytes_a_story))


def sample_batches(
    model: Transformer,
    prompts: list[list[int]],
    seed: int | tuple[int, ...],
    max_new_tokens: int = 256,
    *,
    flags: SamplingFlags | None = None,
    first: int = 0,
    label: str | None = None,
) -> Iterator[list[EncodedGroup]]:
    """Yield batches of one response to each prompt from `first` on, as groups of one.

    Response i draws from the stream of (seed, i), whatever the batch size and whatever was sampled
    before.

    flags     batch size, temperature and truncation; default: temperature 1, no truncation
    label     of a progress bar; None: no bar
    """
    flags = flags or SamplingFlags()
    hidden = label is None
    bar = progress(len(prompts), label or "", "stories", initial=first, disable=hidden, leave=False)
    with bar:
        size = flags.batch_size or stories_at_a_time(model.args, model.device.type)
        for start in range(first, len(prompts), size):
            batch = prompts[start : start + size]
            responses = generate(
                model,
                batch,
                max_new_tokens,
                flags.temperature,
                flags.top_k,
                flags.top_p,
                stop_ids=model.eos_ids,
                seed=seed,
                first_row=start,
            )
            yield [
                EncodedGroup(prompt, [response], start + i)
                for i, (prompt, response) in enumerate(zip(batch, responses, strict=True))
            ]
            bar.update(len(batch))


def sample(
    model: Transformer,
    prompts: list[list[int]],
    seed: int | tuple[int, ...],
    max_new_tokens: int = 256,
    label: str | None = None,
) -> list[EncodedGroup]:
    """Sample a response to each prompt, shared out over the processes; all get all responses.

    Complete, untruncated samples of the model as it is: temperature 1, and every process has all of
    its weights.
    """
    part = parallel.share(len(prompts))
    label = label if parallel.rank() == 0 else None
    model.eval()
    batches = sample_batches(
        model, prompts[: part.stop], seed, max_new_tokens, first=part.start, label=label
    )
    mine = [group for batch in batches for group in batch]
    return [group for part in parallel.all_gather(mine) for group in part]


def prompts_that_fit(
    prompts: Sequence[str], places: Sequence[str], tokenizer: Tokenizer, model: Transformer
) -> list[int]:
    """Return the numbers of the prompts that leave room for an answer; name the others on stderr.

    places  where each prompt stands. ValueError if none fits
    """
    context, fitting, long = model.args.max_seq_len, [], []
    for i, (prompt, where) in enumerate(zip(prompts, places, strict=True)):
        length = len(tokenizer.encode(prompt, bos=True))
        if length < context:
            fitting.append(i)
        else:
            room = f"a prompt of {length} tokens leaves no room in a context of {context}"
            long.append(f"{where}: {room}")
    if not fitting:
        raise ValueError(long[0])
    for line in long[:MOST_NAMED]:
        parallel.note0(f"{line}; it is left out")
    if len(long) > MOST_NAMED:
        parallel.note0(f"{len(long)} prompts are left out in all")
    spaced = [where for prompt, where in zip(prompts, places, strict=True) if prompt.endswith(" ")]
    if spaced:
        parallel.note0(f"{spaced[0]}: the prompt ends in a space; {NO_SPACE}")
    return fitting


def tile_evenly(things: list, count: int) -> list:
    """Repeat things to `count`, each in one block of (nearly) equal length.

    things=["x", "y"], count=5 -> ["x", "x", "x", "y", "y"]
    """
    return [things[i * len(things) // count] for i in range(count)]


def story_records(
    samples: list[EncodedGroup],
    prompts: list[str],
    tokenizer: Tokenizer,
    eos_id: int | Sequence[int],
    **extra,
) -> list[dict]:
    """Turn samples into records {"prompt", "text", "finished", "index"} and `extra`.

    "text" is what the model wrote after the prompt, its leading space included; "finished" is False
    where it was cut at the length limit.
    """
    eos_ids = (eos_id,) if isinstance(eos_id, int) else eos_id
    records = []
    for prompt, group in zip(prompts, samples, strict=False):
        ids = group.responses[0]
        finished = ids[-1] in eos_ids
        text = tokenizer.decode_after(group.prompt, ids[:-1] if finished else ids)
        if not finished:  # a limit may cut a character in two: its first bytes are no text
            text = text.rstrip("\ufffd")
        record = {"prompt": unmark(prompt), "text": text, "finished": finished, "index": group.line}
        records.append(record | extra)
    return records
