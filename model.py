"""The Llama 2 model, with llama2.c's argument and state-dict names, as a textbook would write it.

`model(tokens)` gives logits for every position. What makes it fast on a machine acts on it from
outside (spo/fast.py), and so does what shards it (spo/parallel.py): nothing in here knows a device,
a precision or a loss.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    """llama2.c's fields, in its order, then two of Llama 3's.

    hidden_dim   None: 2/3 of 4 * dim, rounded up to a multiple of multiple_of
    dropout      read and kept because llama2.c's checkpoints carry it, but never applied: the
                 policy has to equal the reference at step 0, and itself between the two passes of a
                 weighted loss
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # fewer than n_heads: several query heads share keys and values
    vocab_size: int = 32000
    hidden_dim: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, the arguments of scale_frequencies

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        whole = (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "multiple_of",
            "max_seq_len",
        )
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, must be a whole number from 1")
        if self.hidden_dim is None:
            # SwiGLU has three matrices and not two, so it takes 2/3 of the usual width.
            hidden = 2 * (4 * self.dim) // 3
            blocks = (hidden + self.multiple_of - 1) // self.multiple_of
            self.hidden_dim = self.multiple_of * blocks
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"dim {self.dim} does not split into {self.n_heads} heads of even size"
            )
        if self.n_heads % self.n_kv_heads:
            heads = f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}"
            raise ValueError(heads)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# --- rotary position embedding -------------------------------------------------------------------


def rope_tables(args: ModelArgs) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta^(-2i/head_dim): (max_seq_len, head_dim / 2) each."""
    # The first pair of a head turns fast and the last one slowly, like the hands of a clock.
    exponents = torch.arange(0, args.head_dim, 2).float() / args.head_dim  # (head_dim / 2,)
    frequencies = 1.0 / args.rope_theta**exponents  # radians per token
    if args.rope_scaling:
        frequencies = scale_frequencies(frequencies, **args.rope_scaling)
    positions = torch.arange(args.max_seq_len).float()
    angles = torch.outer(positions, frequencies)  # (max_seq_len, head_dim / 2)
    return angles.cos(), angles.sin()


def scale_frequencies(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Slow the pairs that turn less than once in the original context down, as Llama 3.1 does.

    Pairs that turn more than high_freq_factor times in it stay as they are, those that turn less
    than low_freq_factor times are divided by the factor, and between the two it is blended.
    """
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of every head by the angle of their position.

    Meta and llama2.c interleave the pairs like this; Hugging Face puts the halves of a head side by
    side.

    x (N, T, heads, head_dim); cos, sin (T, head_dim / 2)
    """
    cos = cos.unsqueeze(1).to(x.dtype)  # (T, 1, head_dim / 2)
    sin = sin.unsqueeze(1).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    # A rotation of the plane, so that q . k depends only on how far apart the two tokens are.
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(turned, dim=-1).flatten(-2)  # (N, T, heads, head_dim)


# --- the layers ----------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for a whole generation."""

    def __init__(self, args: ModelArgs, batch: int, length: int, device, dtype):
        shape = (args.n_layers, batch, args.n_kv_heads, length, args.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.position = 0  # tokens held; the next one goes here

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (N, KV, T, head_dim) after what is there; return all of this layer."""
        end = self.position + keys.shape[2]
        self.keys[layer, :, :, self.position : end] = keys
        self.values[layer, :, :, self.position : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]


class Attention(nn.Module):
    def __init__(self, layer: int, args: ModelArgs):
        super().__init__()
        self.layer = layer
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        N, T, _ = x.shape
        q = self.wq(x).view(N, T, self.n_heads, -1)  # (N, T, heads, head_dim)
        k = self.wk(x).view(N, T, self.n_kv_heads, -1)  # (N, T, kv_heads, head_dim)
        v = self.wv(x).view(N, T, self.n_kv_heads, -1)
        q = rotate(q, cos, sin).transpose(1, 2)  # (N, heads, T, head_dim)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # those of the earlier tokens, too
        y = self.attend(q, k, v)  # (N, heads, T, head_dim)
        return self.wo(y.transpose(1, 2).reshape(N, T, -1))  # heads side by side: (N, T, D)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v. A query sees keys up to its own, a single one all."""
        # Written as a literal, since torch.compile would hand a symbolic comparison to attention.
        causal = True if q.shape[2] > 1 else False
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


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
        # The norms stand before the layers, so the residual stream itself is never rescaled.
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.feed_forward(self.ffn_norm(x))


# --- the model -----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Llama 2.

    tied    the classifier is the embedding matrix, as in all TinyStories models; not so in Llama 2
            itself
    eos_ids  the ids that end a response, the first one in training data; set by whoever loads the
             weights, or makes them
    pieces   how many ids its tokenizer has, if that is fewer than there are embeddings
    """

    def __init__(self, args: ModelArgs, tied: bool = True):
        super().__init__()
        self.args = args
        self.tied = tied
        self.eos_ids: tuple[int, ...] = ()
        self.pieces: int | None = None
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        # Not persistent: llama2.c's checkpoints do not have the tables, and they cost nothing.
        cos, sin = rope_tables(args)
        self.register_buffer("freqs_cos", cos, persistent=False)
        self.register_buffer("freqs_sin", sin, persistent=False)

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @eos_id.setter
    def eos_id(self, value: int) -> None:
        self.eos_ids = (value,)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from a normal distribution of standard deviation 1/sqrt(fan in).

        Those that write into the residual stream are divided by sqrt(2 n_layers).

        The usual fixed 0.02 is right for widths of a thousand. At a width of 96 it leaves attention
        flat, and a model does not learn to repeat a name within the first thousand steps.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # the norms stay 1
                std = weight.shape[1] ** -0.5
                if name.endswith(("wo.weight", "w2.weight")):
                    std /= (2 * self.args.n_layers) ** 0.5
                nn.init.normal_(weight, std=std, generator=generator)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (N, T) -> final hidden states (N, T, D), after the last norm."""
        start = 0 if cache is None else cache.position
        end = start + tokens.shape[1]
        if end > self.args.max_seq_len:
            context = self.args.max_seq_len
            raise ValueError(f"{end} tokens are more than the model's context of {context}")
        cos = self.freqs_cos[start:end]
        sin = self.freqs_sin[start:end]
        x = self.tok_embeddings(tokens)  # (N, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.position = end
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (N, T) -> logits (N, T, V); logits[:, t] predicts token t + 1.

        cache  holds what went before: tokens then continue it, one at a time once it is not empty
        """
        return self.output(self.hidden(tokens, cache))
