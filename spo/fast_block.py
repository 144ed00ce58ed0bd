"""A TransformerBlock on a CPU in few, large calls, with its backward pass written out.

`forward` computes what TransformerBlock.forward does, to rounding. Where the time of a narrow model
goes is not the products but everything around them: so wq, wk, wv are one matrix and w1, w3
another, the norms' gains and 1/sqrt(head_dim) are folded into them, the residual sums into the
products, and attention reads and writes its heads without a copy more than it needs.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import KVCache, TransformerBlock

QUERIES_PER_BLOCK = 96
MOST_TOKENS = 512  # longer texts have no memory for their scores


def forward(
    layer: TransformerBlock, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None
) -> Tensor:
    """x (N, T, D) -> (N, T, D); the rest as in TransformerBlock.forward."""
    N, T, D = x.shape
    wide = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    if cache is not None or T > MOST_TOKENS or not wide:
        return TransformerBlock.forward(layer, x, cos, sin, cache)
    attention, ffn = layer.attention, layer.feed_forward
    scale = (D // attention.n_heads) ** -0.5
    wqkv = torch.cat((attention.wq.weight * scale, attention.wk.weight, attention.wv.weight))
    w13 = torch.cat((ffn.w1.weight, ffn.w3.weight))
    rotation = torch.complex(cos.to(x.dtype), sin.to(x.dtype))  # (T, head_dim / 2)
    rows = x.reshape(N * T, D)
    qkv = Normed.apply(rows, layer.attention_norm.eps) @ (wqkv * layer.attention_norm.weight).t()
    y = Attend.apply(qkv.view(N, T, -1), rotation, attention.n_heads, attention.n_kv_heads)
    rows = torch.addmm(rows, y, attention.wo.weight.t())
    both = Normed.apply(rows, layer.ffn_norm.eps) @ (w13 * layer.ffn_norm.weight).t()
    rows = torch.addmm(rows, SwiGlu.apply(both), ffn.w2.weight.t())
    return rows.view(N, T, D)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """x (R, D) -> (R, 1)"""
    return torch.linalg.vecdot(x, x).div_(x.shape[1]).add_(eps).rsqrt_().unsqueeze(1)


class Normed(torch.autograd.Function):
    """x (R, D) -> x / rms(x): an RMSNorm without its gain."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        normed, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, normed).div_(grad.shape[1]).unsqueeze(1)
        return torch.addcmul(grad, normed, along, value=-1).mul_(inverse), None


class SwiGlu(torch.autograd.Function):
    """Gate and up side by side, (R, 2 H) -> silu(gate) * up, (R, H)."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, 1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, 1)
        to_both = torch.empty_like(both)
        to_gate, to_up = to_both.chunk(2, 1)
        torch.mul(grad, F.silu(gate), out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return to_both


class Attend(torch.autograd.Function):
    """Rotary position embedding and causal attention: q, k, v side by side -> (N T, D).

    qkv       (N, T, (heads + 2 KV) head_dim); q is divided by sqrt(head_dim) already
    rotation  (T, head_dim / 2), complex
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, rotation: Tensor, heads: int, n_kv_heads: int) -> Tensor:
        N, T, _ = qkv.shape
        hd = 2 * rotation.shape[1]
        q, k, v = qkv.view(N, T, -1, hd).split((heads, n_kv_heads, n_kv_heads), 2)
        q, k = turned(q, rotation), turned(k, rotation)  # (N, heads, T, hd), (N, KV, T, hd)
        v = v.transpose(1, 2).contiguous()
        grouped = (N * n_kv_heads, heads // n_kv_heads, T, hd)
        q, k, v = q.view(grouped), k.view(-1, T, hd), v.view(-1, T, hd)
        y = torch.empty(grouped, dtype=qkv.dtype)
        probabilities = []
        for first in range(0, T, QUERIES_PER_BLOCK):
            last = min(first + QUERIES_PER_BLOCK, T)
            scores = q[:, :, first:last].flatten(1, 2) @ k[:, :last].transpose(1, 2)
            by_query = scores.unflatten(1, (-1, last - first))
            by_query[..., first:].add_(future(last - first, scores.dtype))
            p = torch.softmax(scores, -1, out=scores)
            y[:, :, first:last] = (p @ v[:, :last]).unflatten(1, (-1, last - first))
            if ctx.needs_input_grad[0]:
                probabilities.append(p)
        ctx.save_for_backward(q, k, v, rotation, *probabilities)
        ctx.shape = N, T, heads, n_kv_heads, hd
        return y.view(N, heads, T, hd).transpose(1, 2).reshape(N * T, heads * hd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, rotation, *probabilities = ctx.saved_tensors
        N, T, heads, n_kv_heads, hd = ctx.shape
        grad = grad.view(N, T, heads, hd).transpose(1, 2).reshape(q.shape)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p in enumerate(probabilities):
            first = i * QUERIES_PER_BLOCK
            last = min(first + QUERIES_PER_BLOCK, T)
            upstream = grad[:, :, first:last].flatten(1, 2)
            to_v[:, :last].baddbmm_(p.transpose(1, 2), upstream)
            to_p = upstream @ v[:, :last].transpose(1, 2)
            # The softmax's own backward: p (dp - sum p dp).
            to_scores = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype)
            to_q[:, :, first:last] = (to_scores @ k[:, :last]).view_as(to_q[:, :, first:last])
            to_k[:, :last].baddbmm_(to_scores.transpose(1, 2), q[:, :, first:last].flatten(1, 2))
        to_qkv = torch.empty(N, T, heads + 2 * n_kv_heads, hd, dtype=q.dtype)
        into = to_qkv.split((heads, n_kv_heads, n_kv_heads), 2)
        turn_back(to_q.view(N, heads, T, hd), rotation, into[0])
        turn_back(to_k.view(N, n_kv_heads, T, hd), rotation, into[1])
        into[2].copy_(to_v.view(N, n_kv_heads, T, hd).transpose(1, 2))
        return to_qkv.view(N, T, -1), None, None, None


@functools.cache
def future(size: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block of queries on itself: -inf for the keys after each."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu(1)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """x (N, T, heads, hd) -> (N, heads, T, hd), each pair rotated by the angle of its position."""
    N, T, heads, hd = x.shape
    out = torch.empty(N, heads, T, hd, dtype=x.dtype)
    torch.mul(as_complex(x).transpose(1, 2), rotation, out=as_complex(out))
    return out


def turn_back(x: Tensor, rotation: Tensor, out: Tensor) -> None:
    """x (N, heads, T, hd), rotated back -> out (N, T, heads, hd)."""
    torch.mul(as_complex(x), rotation.conj(), out=as_complex(out).transpose(1, 2))
