"""The Llama 2 model, with llama2.c's argument and state-dict names, and sampling from it.

Knows no loss, no data and no process group. `model(tokens)` gives logits for every position;
`generate` samples in batches with a key-value cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    """llama2.c's fields, in its order, and rope_theta.

    hidden_dim   None: 2/3 of 4 * dim, rounded up to a multiple of multiple_of
    dropout      read and kept because llama2.c's checkpoints carry it, but never applied: the policy has
                 to equal the reference at step 0, and itself between the two passes of a weighted loss
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = 32000
    hidden_dim: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0
    rope_theta: float = 10000.0

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "multiple_of",
            "max_seq_len",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, must be a whole number from 1"
                )
        if self.hidden_dim is None:
            hidden = 2 * (4 * self.dim) // 3
            self.hidden_dim = self.multiple_of * (
                (hidden + self.multiple_of - 1) // self.multiple_of
            )
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"dim {self.dim} does not split into {self.n_heads} heads of even size"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rope_tables(args: ModelArgs) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), each (max_seq_len, head_dim / 2), float32."""
    exponents = torch.arange(0, args.head_dim, 2).float() / args.head_dim
    angles = torch.outer(torch.arange(args.max_seq_len).float(), 1.0 / args.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, interleaved as Meta and llama2.c lay it out: pairs are (0, 1), (2, 3), ...

    x (N, T, heads, head_dim); cos, sin (T, head_dim / 2)
    """
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)  # (T, 1, head_dim / 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for a whole generation."""

    def __init__(self, args: ModelArgs, batch: int, length: int, device, dtype):
        shape = (args.n_layers, batch, args.n_kv_heads, length, args.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        if (
            torch.device(device).type == "cpu"
        ):  # head_dim rows of all keys' numbers: faster there, for one query
            self.keys = self.keys.view(*shape[:3], args.head_dim, length).transpose(3, 4)
        self.position = 0  # tokens held; the next one goes here

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (N, KV, T, head_dim) behind what is there; returns all keys and values of this layer."""
        end = self.position + keys.shape[2]
        self.keys[layer, :, :, self.position : end] = keys
        self.values[layer, :, :, self.position : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, in the layout that they have."""
        keys = (
            self.keys.transpose(3, 4)[:, rows].transpose(3, 4)
            if self.keys.is_cpu
            else self.keys[:, rows]
        )
        self.keys, self.values = keys, self.values[:, rows]


QUERIES, SHORT = (
    96,
    512,
)  # attention on a CPU: queries in a block, tokens of texts that are worth it


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(head_dim)) v: all T queries, or the last one alone.

    q (N, heads, T or 1, head_dim); k, v (N, KV, T, head_dim), shared by the heads of a group without a copy. Returns as q.
    """
    groups, T = (k.shape[1], -1), k.shape[2]
    if (
        q.shape[2] == 1
    ):  # it sees every key: the heads of a group can stand in the place of queries, and there is no mask
        return (
            F.scaled_dot_product_attention(q.squeeze(2).unflatten(1, groups), k, v)
            .flatten(1, 2)
            .unsqueeze(2)
        )
    assert q.shape[2] == T, "several tokens at once only from position 0: the mask is square"
    if q.device.type != "cpu" or T > SHORT:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    # Two products take half of the fused kernel's time on a CPU, and short texts have the memory for it. A block of queries
    # meets only the keys up to its last.
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (
        q.to(wide).unflatten(1, groups).flatten(0, 1) * q.shape[-1] ** -0.5
    )  # (N KV, heads per KV, T, head_dim)
    k, v = k.to(wide).flatten(0, 1), v.to(wide).flatten(0, 1)
    future = torch.full((T, T), -torch.inf, dtype=wide).triu(1)
    blocks = []
    for first in range(0, T, QUERIES):
        last = min(first + QUERIES, T)
        scores = q[:, :, first:last].flatten(1, 2) @ k[:, :last].transpose(1, 2)
        scores = scores.unflatten(1, (-1, last - first)).add_(future[first:last, :last])
        blocks.append(
            (scores.softmax(-1).flatten(1, 2) @ v[:, :last]).unflatten(1, (-1, last - first))
        )
    return torch.cat(blocks, 2).unflatten(0, (-1, groups[0])).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, layer: int, args: ModelArgs):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, args.n_heads, args.n_kv_heads
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        N, T, _ = x.shape
        q = rotate(self.wq(x).view(N, T, self.n_heads, -1), cos, sin).transpose(
            1, 2
        )  # (N, heads, T, head_dim)
        k = rotate(self.wk(x).view(N, T, self.n_kv_heads, -1), cos, sin).transpose(1, 2)
        v = self.wv(x).view(N, T, self.n_kv_heads, -1).transpose(1, 2)
        keys, values = (k, v) if cache is None else cache.extend(self.layer, k, v)
        y = attend(q.to(keys.dtype), keys, values).to(x.dtype)
        return self.wo(y.transpose(1, 2).reshape(N, T, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # SwiGLU


class TransformerBlock(nn.Module):
    def __init__(self, layer: int, args: ModelArgs):
        super().__init__()
        self.attention = Attention(layer, args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Llama 2. tied: the classifier is the embedding matrix (all TinyStories models; not Llama 2 itself)."""

    def __init__(self, args: ModelArgs, tied: bool = True):
        super().__init__()
        self.args, self.tied = args, tied
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_tables(args)
        self.register_buffer("freqs_cos", cos, persistent=False)
        self.register_buffer("freqs_sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 1/sqrt(fan in)); the matrices that write into the residual stream: divided by sqrt(2 n_layers).

        The usual fixed 0.02 is right for widths of a thousand. At a width of 96 it leaves attention flat, and
        a model does not learn to repeat a name within the first thousand steps.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                std = weight.shape[1] ** -0.5 / ((2 * self.args.n_layers) ** 0.5 if residual else 1)
                nn.init.normal_(weight, std=std, generator=generator)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (N, T) -> final hidden states (N, T, D), behind the last norm."""
        start = cache.position if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.args.max_seq_len:
            raise ValueError(
                f"{end} tokens are more than the model's context of {self.args.max_seq_len}"
            )
        cos, sin = self.freqs_cos[start:end], self.freqs_sin[start:end]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.position = end
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (N, T) -> logits (N, T, V); logits[:, t] predicts token t + 1.

        cache  holds what went before: tokens then continue it (one at a time, once it is not empty)
        """
        return self.output(self.hidden(tokens, cache))

    def with_head(self, tokens: Tensor, head: Callable[[Tensor, Tensor], Any]) -> Any:
        """head(hidden states (N, T, D), classifier (V, D)), for who needs no logits at every position."""
        return head(self.hidden(tokens), self.output.weight)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Token ids (N, T) -> logits (N, V) of the token behind the last."""
        return self.output(self.hidden(tokens, cache)[:, -1])


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products not by oneDNN, whatever was chosen for this process."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Decoder:
    """`model.next_logits` for one token a row, on a CPU, where calls and layouts decide.

    Matrices that meet the same input are one, transposed for few rows, and the scores' scale is in the queries' own. That is a
    copy of the weights, made for one generation of at most `rows`.
    """

    def __init__(self, model: Transformer, rows: int, dtype: torch.dtype):
        self.args, self.embedding = model.args, model.tok_embeddings.weight
        self.layers, scale = [], model.args.head_dim**-0.5
        for layer in model.layers:
            attention, ffn = layer.attention, layer.feed_forward
            wqkv = (
                torch.cat((attention.wq.weight * scale, attention.wk.weight, attention.wv.weight))
                .t()
                .contiguous()
            )
            w13 = torch.cat((ffn.w1.weight, ffn.w3.weight)).t().contiguous()
            wo, w2 = attention.wo.weight.t().contiguous(), ffn.w2.weight.t().contiguous()
            self.layers.append((layer.attention_norm, wqkv, wo, layer.ffn_norm, w13, w2))
        self.norm, self.output = model.norm, model.output.weight.t().contiguous()
        self.logits = torch.empty(rows, len(model.output.weight), dtype=dtype)
        self.rotation = torch.complex(
            model.freqs_cos.float(), model.freqs_sin.float()
        )  # (max_seq_len, head_dim / 2)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Token ids (N, 1) -> logits (N, V), whose memory the next call uses again."""
        with (
            exact_products() if self.args.dim < 256 else contextlib.nullcontext()
        ):  # oneDNN is slow at small ones
            x = self.embedding[tokens.squeeze(1)]  # (N, D)
            rotation = self.rotation[cache.position]
            for i, layer in enumerate(self.layers):
                x = self.layer(i, *layer, x, rotation, cache)
            cache.position += 1
            logits, x = self.logits[: len(x)], self.norm(x)
            return (
                torch.mm(x, self.output, out=logits)
                if x.dtype == logits.dtype
                else logits.copy_(x @ self.output)
            )

    def layer(
        self,
        i,
        attention_norm,
        wqkv,
        wo,
        ffn_norm,
        w13,
        w2,
        x: Tensor,
        rotation: Tensor,
        cache: KVCache,
    ) -> Tensor:
        N, KV, groups = len(x), self.args.n_kv_heads, self.args.n_heads // self.args.n_kv_heads
        qkv = (
            (attention_norm(x) @ wqkv).to(cache.keys.dtype).view(N, -1, self.args.head_dim // 2, 2)
        )
        qk = torch.view_as_real(torch.view_as_complex(qkv[:, :-KV]) * rotation).flatten(2)
        q, k = qk.split((groups * KV, KV), 1)
        keys, values = cache.extend(i, k.unsqueeze(2), qkv[:, -KV:].flatten(2).unsqueeze(2))
        with exact_products():  # oneDNN would make a program for every length
            scores = torch.bmm(q.reshape(N * KV, groups, -1), keys.flatten(0, 1).transpose(1, 2))
            y = torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(N, -1).to(x.dtype)
        x = torch.addmm(x, y, wo)
        gate, up = (ffn_norm(x) @ w13).chunk(2, 1)
        return torch.addmm(x, F.silu(gate).mul_(up), w2)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (N, V) with all but the top_k likeliest, and all beyond probability mass top_p, set to -inf."""
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
    """One id per row of logits (N, V), by inverting the cumulative distribution at uniforms (N,) in [0, 1).

    Unlike torch.multinomial it spends one number per row, known beforehand: a row's draw is its own. The logits are used up:
    their probabilities are written over them.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits.div_(temperature)
    p = torch.softmax(filter_logits(logits, top_k, top_p), -1, out=logits)
    # First the block of 128 words, then the word in it: a sum over all is cheap, a running one is not.
    N, V = p.shape
    blocks = (F.pad(p, (0, -V % 128)) if V % 128 else p).view(N, -1, 128)
    block, rest = invert(blocks.sum(-1), uniforms)
    inside, _ = invert(blocks[torch.arange(N, device=p.device), block], rest)
    return (128 * block + inside).clamp_(max=V - 1)


def invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where u (N,) in [0, 1) falls in the distribution of weights (N, K): (index, where in [0, 1) of that weight)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    u = u.unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.shape[1] - 1)
    weight = weights.gather(1, index)
    rest = ((u - cdf.gather(1, index) + weight) / weight).clamp_(0, 1 - 2**-53)
    return index.squeeze(1), rest.squeeze(1)


LOOK = 8  # tokens between two looks at which rows have ended


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
    max_new_tokens  at most so many per row; also ends where the model's context does
    temperature     0: the likeliest token, always
    top_k, top_p    truncation; None: off, as sampling from the policy itself requires
    stop_ids        a row ends with the first of these that it draws; the id is kept
    seed            one number or several (say, run and step), none negative
    first_row       row i draws from a stream of its own, that of (seed, first_row + i): its text does not depend
                    on its neighbours, and two calls of 16 rows give what one call of 32 does
    returns         N lists of new ids, prompt excluded
    """
    prompt_tokens = [[int(token) for token in prompt] for prompt in prompt_tokens]
    if not prompt_tokens:
        return []
    lengths = [len(p) for p in prompt_tokens]
    context = model.args.max_seq_len
    if min(lengths) == 0:
        raise ValueError("an empty prompt: a row needs at least BOS")
    if max(lengths) >= context:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens leaves no room in a context of {context}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be 1 or more")
    if (
        not temperature >= 0
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise ValueError(
            f"need temperature >= 0, top_k >= 1, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}"
        )
    device, N, max_new_tokens = model.device, len(lengths), min(max_new_tokens, context)
    end = min(context, max(lengths) + max_new_tokens)
    tokens, uniforms = np.zeros((N, end), dtype=np.int64), np.zeros((N, end))
    for row, prompt in enumerate(prompt_tokens):
        tokens[row, : lengths[row]] = prompt
        stream = np.random.default_rng((*np.atleast_1d(seed).tolist(), first_row + row))
        uniforms[row, lengths[row] :] = stream.random(end)[: end - lengths[row]]
    written = torch.from_numpy(tokens).to(device)
    ends = (
        torch.tensor(lengths, device=device) + max_new_tokens
    )  # each row's first position not to fill any more
    ends = ends.clamp(max=end)
    stop = torch.tensor(list(stop_ids), device=device, dtype=torch.long)

    rows = torch.arange(
        N, device=device
    )  # the rows still being written: what belongs to them lies side by side
    tokens, uniforms, last = written.clone(), torch.from_numpy(uniforms).to(device), ends.clone()
    first = torch.tensor(lengths, device=device)
    dtype = model.tok_embeddings.weight.dtype
    if device.type == "cpu":
        dtype = torch.promote_types(
            dtype, torch.float32
        )  # its small products are no faster in bfloat16
    cache = KVCache(model.args, N, end, device, dtype)
    position = min(lengths)
    logits = model.next_logits(tokens[:, :position], cache)  # (N, V)
    decoder = Decoder(model, N, dtype) if device.type == "cpu" else model
    while True:
        drawn = sample_token(logits, uniforms[:, position], temperature, top_k, top_p)
        stopped = (drawn.unsqueeze(1) == stop).any(1)
        if position < max(lengths):  # some prompts go on: their token is given, not drawn
            prompted = first > position
            drawn, stopped = torch.where(prompted, tokens[:, position], drawn), stopped & ~prompted
        tokens[:, position] = drawn
        position += 1
        last = torch.where(stopped, last.clamp(max=position), last)
        if (
            position % LOOK == 0 or position == end
        ):  # not at every token: a GPU would have to wait for the answer
            alive = last > position
            count = int(alive.sum())
            if count <= 0.75 * len(
                rows
            ):  # leave the finished behind; rarely, since it copies the cache
                written[rows], ends[rows] = tokens, last
                rows, tokens, uniforms, first, last = (
                    x[alive] for x in (rows, tokens, uniforms, first, last)
                )
                cache.keep(alive)
            if count == 0:
                break
        logits = decoder.next_logits(tokens[:, position - 1 : position], cache)
    written, ends = written.tolist(), ends.tolist()
    return [written[i][lengths[i] : ends[i]] for i in range(N)]
