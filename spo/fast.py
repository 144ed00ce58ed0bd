"""What makes a model fast on this machine: attention, generation, float32 products.

Everything in here acts on a model that it is handed, and computes what model.py computes, to
rounding.
"""

import contextlib
import functools
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, KVCache, ModelArgs, Transformer, rotate
from spo import fast_block, parallel

LENGTHS_PER_GRAPH = 64  # a CUDA graph reads the cache up to a multiple of this
LEAST_HEAD_DIM_IN_ROWS = 32  # of the keys that a single query reads on a CPU
LEAST_DIM_FOR_ONEDNN = 256  # when decoding: oneDNN is slow at small products


def use(model: Transformer) -> Transformer:
    """Let a model on a CPU compute its layers as spo/fast_block.py does; return the model.

    One on a GPU stays as it is.
    """
    for layer in model.layers:
        on_cpu = model.device.type == "cpu"
        layer.attention.attend = attend_on_cpu if on_cpu else Attention.attend
        if on_cpu and "forward" not in vars(layer):  # one that is compiled keeps its own
            layer.forward = functools.partial(fast_block.forward, layer)
    return model


# --- float32 products ----------------------------------------------------------------------------


def enable_fast_matmul(device: str, dtype: str = "float32") -> str:
    """Choose the fast way to multiply float32 matrices; return a line that says what runs where.

    On a GPU it is TF32, which rounds the factors to three digits, and the line says so. On a CPU it
    is oneDNN, up to twice as fast as the default, if a test product shows that it is as exact on
    this machine: on a processor with AMX, oneDNN rounds the factors to bfloat16.

    dtype  what the layers compute in: where bfloat16 is slower than float32, the line says so, too
    """
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        return (
            f"running on {device} in {dtype}; products of float32 matrices have three digits (TF32)"
        )
    if device != "cpu":
        return f"running on {device} in {dtype}"
    if matmul_error("medium", device) <= 2 * matmul_error("highest", device):
        torch.set_float32_matmul_precision("medium")
    slower = bfloat16_warning() if dtype == "bfloat16" else ""
    return f"running on {device} with {torch.get_num_threads()} threads in {dtype}{slower}"


def bfloat16_warning() -> str:
    """Say how many times as long as in float32 a product takes here in bfloat16; "" if not longer.

    On a CPU without instructions for it that can be 45 times.
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    ratio = seconds[1] / seconds[0]
    return f"; bfloat16 takes {ratio:.0f} times as long as float32 here" if ratio > 1.5 else ""


def matmul_error(precision: str, device: str) -> float:
    """Return the relative error of a float32 product at one of torch's precisions."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=generator)
    b = torch.randn(256, 256, generator=generator)
    exact = a.double() @ b.double()
    with matmul_precision(precision):
        product = (a.to(device) @ b.to(device)).cpu()
    return float((product - exact).norm() / exact.norm())


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices at this precision for a while. "highest": never by oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- attention on a CPU --------------------------------------------------------------------------


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equal `Attention.attend`, faster for a single query: that of a decoding step.

    q (N, heads, T or 1, head_dim); k, v (N, KV, T, head_dim), shared by the heads of a group
    without a copy. Returns as q.
    """
    if q.shape[2] > 1:
        return Attention.attend(q.to(k.dtype), k, v).to(q.dtype)
    # It attends to all keys, so no mask is needed, and the heads that share a key can be batched
    # as queries.
    queries = q.to(k.dtype).squeeze(2).unflatten(1, (k.shape[1], -1))  # (N, KV, heads per KV, hd)
    y = F.scaled_dot_product_attention(queries, k, v)
    return y.flatten(1, 2).unsqueeze(2).to(q.dtype)


# --- generation ----------------------------------------------------------------------------------


def next_logits(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Equal `model(tokens, cache)[:, -1]`: token ids (N, T) -> logits (N, V) of the next token."""
    return model.output(model.hidden(tokens, cache)[:, -1])


class Generation:
    """Model, cache and position of one call of generate, in the fastest way of its device."""

    def __init__(self, model: Transformer, rows: int, length: int):
        """rows, length: the most that there will be, prompts included"""
        self.model = use(model)
        dtype = model.tok_embeddings.weight.dtype
        self.on_cpu = model.device.type == "cpu"
        if self.on_cpu:
            # Small products are no faster in bfloat16.
            dtype = torch.promote_types(dtype, torch.float32)
            self.cache = CpuCache(model.args, rows, length, dtype)
        else:
            self.cache = KVCache(model.args, rows, length, model.device, dtype)
            self.cache.keys.zero_()  # fresh memory may hold NaN, which no mask hides
            self.cache.values.zero_()
        self.decoder = None

    def prefill(self, tokens: Tensor) -> Tensor:
        """Read the first tokens (N, T); return the logits (N, V) of the next."""
        logits = parallel.with_weights(self.model, next_logits, tokens, self.cache)
        if self.on_cpu:
            self.decoder = CpuDecoder(self.model, len(tokens), self.cache.keys.dtype)
        elif self.model.device.type == "cuda":
            self.decoder = StaticDecoder(self.model)
        return logits

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Read one more token (N, 1) of each row; return the logits (N, V) of the next."""
        if self.decoder is not None:
            return self.decoder.next_logits(tokens, self.cache)
        return parallel.with_weights(self.model, next_logits, tokens, self.cache)

    def keep(self, alive: Tensor) -> None:
        """Drop the rows that have ended."""
        self.cache.keep(alive)


class StaticDecoder:
    """Equal `next_logits` for one token a row, with shapes that stay the same for many tokens.

    On a GPU the step is captured once as a CUDA graph and replayed, so the CPU launches one thing a
    token instead of hundreds. Attention reads the cache up to a multiple of LENGTHS_PER_GRAPH and
    masks what is not written yet; another number of rows, or a longer text, is captured anew. The
    capture has not yet run on a GPU; the step itself is tested on a CPU.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.shape = (0, 0)  # rows and length of what was captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Token ids (N, 1) -> logits (N, V), in memory that the next call uses again."""
        blocks = cache.position // LENGTHS_PER_GRAPH + 1
        length = min(blocks * LENGTHS_PER_GRAPH, cache.keys.shape[3])
        if self.shape != (len(tokens), length):
            self.shape = (len(tokens), length)
            self.tokens = tokens.clone()
            self.position = torch.full((1,), cache.position, device=tokens.device)
            self._capture(cache)
        self.tokens.copy_(tokens)
        self.position.fill_(cache.position)
        cache.position += 1
        if self.graph is None:
            return self._step(cache)
        self.graph.replay()
        return self.logits

    def _step(self, cache: KVCache) -> Tensor:
        return static_step(self.model, self.tokens, self.position, cache, self.shape[1])

    def _capture(self, cache: KVCache) -> None:
        """On a GPU, capture the step for these rows and this length."""
        self.graph = self.logits = None  # gives back the memory of the last one
        deterministic = torch.are_deterministic_algorithms_enabled()  # its index_copy_ synchronizes
        if self.tokens.device.type != "cuda" or deterministic:
            return
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the first pass allocates what a capture may not
                self._step(cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Another thread, such as NCCL's watchdog, may call CUDA in the meantime.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._step(cache)
            self.graph = graph
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"generation goes without a CUDA graph (slower): {reason}", flush=True)


def static_step(
    model: Transformer, tokens: Tensor, position: Tensor, cache: KVCache, length: int
) -> Tensor:
    """Read one token (N, 1) of each row at `position` (1,); return the logits (N, V) of the next.

    Nothing in here depends on the value of position, so the step can be captured and replayed.
    Writing the same token twice changes nothing.
    """
    N, args = len(tokens), model.args
    cos = model.freqs_cos[position]  # (1, head_dim / 2)
    sin = model.freqs_sin[position]
    seen = (torch.arange(length, device=tokens.device) <= position).view(1, 1, 1, -1)
    x = model.tok_embeddings(tokens)  # (N, 1, D)
    for i, layer in enumerate(model.layers):
        attention = layer.attention
        h = layer.attention_norm(x)
        q = rotate(attention.wq(h).view(N, 1, args.n_heads, -1), cos, sin).transpose(1, 2)
        k = rotate(attention.wk(h).view(N, 1, args.n_kv_heads, -1), cos, sin).transpose(1, 2)
        v = attention.wv(h).view(N, 1, args.n_kv_heads, -1).transpose(1, 2)
        cache.keys[i].index_copy_(2, position, k)
        cache.values[i].index_copy_(2, position, v)
        keys, values = cache.keys[i][:, :, :length], cache.values[i][:, :, :length]
        # The heads that share a key are batched as queries, as in attend_on_cpu.
        queries = q.squeeze(2).unflatten(1, (args.n_kv_heads, -1))  # (N, KV, heads per KV, hd)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        x = x + attention.wo(y.reshape(N, 1, -1))
        x = x + layer.feed_forward(layer.ffn_norm(x))
    return model.output(model.norm(x[:, -1]))


class CpuCache(KVCache):
    """A KVCache that stores the keys of narrow heads transposed: faster for a single query."""

    def __init__(self, args: ModelArgs, batch: int, length: int, dtype: torch.dtype):
        super().__init__(args, batch, length, "cpu", dtype)
        self.transposed = args.head_dim < LEAST_HEAD_DIM_IN_ROWS
        if self.transposed:
            shape = self.keys.shape
            self.keys = self.keys.view(*shape[:3], args.head_dim, length).transpose(3, 4)

    def keep(self, rows: Tensor) -> None:
        if not self.transposed:
            super().keep(rows)
            return
        self.keys = self.keys.transpose(3, 4)[:, rows].transpose(3, 4)
        self.values = self.values[:, rows]


class CpuDecoder:
    """Equal `next_logits` for one token a row, on a CPU, where calls and layouts decide.

    wq, wk, wv are fused into one matrix, and so are w1 and w3; all are stored transposed, and
    1/sqrt(head_dim) is folded into wq. That is a copy of the weights, so one is built for each call
    of generate.
    """

    def __init__(self, model: Transformer, rows: int, dtype: torch.dtype):
        """rows: the most that one call has. dtype: of keys, values and logits."""
        self.args = model.args
        self.embedding = model.tok_embeddings.weight
        self.layers = [FusedLayer(layer, model.args) for layer in model.layers]
        self.norm = model.norm
        self.output = model.output.weight.t().contiguous()
        self.logits = torch.empty(rows, model.args.vocab_size, dtype=dtype)
        # (max_seq_len, head_dim / 2)
        self.rotation = torch.complex(model.freqs_cos.float(), model.freqs_sin.float())

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Token ids (N, 1) -> logits (N, V), in memory that the next call uses again."""
        small = self.args.dim < LEAST_DIM_FOR_ONEDNN
        with matmul_precision("highest") if small else contextlib.nullcontext():
            x = self.embedding[tokens.squeeze(1)]  # (N, D)
            rotation = self.rotation[cache.position]
            for i, layer in enumerate(self.layers):
                x = layer.forward(i, x, rotation, cache)
            cache.position += 1
            x = self.norm(x)
            logits = self.logits[: len(x)]
            if x.dtype == logits.dtype:
                return torch.mm(x, self.output, out=logits)
            return logits.copy_(x @ self.output)


class FusedLayer:
    """A TransformerBlock for one token a row."""

    def __init__(self, layer, args: ModelArgs):
        self.args = args
        attention, ffn = layer.attention, layer.feed_forward
        scale = args.head_dim**-0.5
        wqkv = torch.cat((attention.wq.weight * scale, attention.wk.weight, attention.wv.weight))
        w13 = torch.cat((ffn.w1.weight, ffn.w3.weight))
        self.fold = wqkv.dtype != torch.bfloat16  # the gains; rounded numbers keep their order
        if self.fold:
            wqkv, w13 = wqkv * layer.attention_norm.weight, w13 * layer.ffn_norm.weight
        self.wqkv, self.w13 = wqkv.t().contiguous(), w13.t().contiguous()
        self.wo = attention.wo.weight.t().contiguous()
        self.w2 = ffn.w2.weight.t().contiguous()
        self.attention_norm = layer.attention_norm
        self.ffn_norm = layer.ffn_norm

    def normed(self, x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return x * fast_block.inverse_rms(x, norm.eps) if self.fold else norm(x)

    def forward(self, index: int, x: Tensor, rotation: Tensor, cache: KVCache) -> Tensor:
        """x (N, D) -> (N, D). rotation (head_dim / 2,) complex: the angle of this position."""
        N, KV = len(x), self.args.n_kv_heads
        heads_per_key = self.args.n_heads // KV
        qkv = (self.normed(x, self.attention_norm) @ self.wqkv).to(cache.keys.dtype)
        qkv = qkv.view(N, -1, self.args.head_dim // 2, 2)
        qk = torch.view_as_real(torch.view_as_complex(qkv[:, :-KV]) * rotation).flatten(2)
        q, k = qk.split((heads_per_key * KV, KV), 1)
        v = qkv[:, -KV:].flatten(2)
        keys, values = cache.extend(index, k.unsqueeze(2), v.unsqueeze(2))
        with matmul_precision("highest"):  # oneDNN would compile a program for every length
            queries = q.reshape(N * KV, heads_per_key, -1)
            scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
            y = torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(N, -1).to(x.dtype)
        x = torch.addmm(x, y, self.wo)
        gate, up = (self.normed(x, self.ffn_norm) @ self.w13).chunk(2, 1)
        return torch.addmm(x, F.silu(gate).mul_(up), self.w2)
