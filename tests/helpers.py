"""What several test files need: small models, groups, readers of a run's files."""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from losses import LOSSES
from model import ModelArgs, Transformer
from spo import checkpoint, fast
from spo.groups import EncodedGroup

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FILES = {"ranking": "ranked", "best": "best", "pair": "pair", "text": "text"}  # of the workshop


# --- models and groups ---------------------------------------------------------------------------


def tiny(tied: bool = True, n_kv_heads: int = 2, eos_id: int = 1, **changes) -> Transformer:
    """A small model, fast as every model that is loaded."""
    return fast.use(plain_tiny(tied, n_kv_heads, eos_id, **changes))


def plain_tiny(tied: bool = True, n_kv_heads: int = 2, eos_id: int = 1, **changes) -> Transformer:
    shape = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 64,
        "hidden_dim": 48,
        "max_seq_len": 64,
    }
    model = Transformer(ModelArgs(**shape | {"n_kv_heads": n_kv_heads} | changes), tied)
    model.eos_ids = (eos_id,)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model.eval()


def perturbed(model: Transformer) -> Transformer:
    """A policy that is not its reference."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return policy


def random_groups(count: int, n: int, seed: int = 0) -> list[EncodedGroup]:
    """Groups of unlike lengths, so that their log-probs lie tens of nats apart."""
    generator = torch.Generator().manual_seed(seed)

    def response():
        length = int(torch.randint(2, 40, (1,), generator=generator))
        return torch.randint(2, 64, (length,), generator=generator).tolist() + [1]

    return [
        EncodedGroup([1, 7], [response() for _ in range(n)], line) for line in range(1, count + 1)
    ]


def size_for(loss: str) -> int:
    return 2 if LOSSES[loss].data == "pair" else 4


def same_weights(a: Transformer, b: Transformer) -> bool:
    weights = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in weights)


def gradients_of(model: Transformer) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def real_chat_model() -> str:
    """The folder of a published chat model; a test that needs it is skipped where it is not."""
    folder = os.environ.get("SPO_CHAT_MODEL")
    if not folder:
        pytest.skip(
            "SPO_CHAT_MODEL is unset: it names the folder of HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return folder


# --- files ---------------------------------------------------------------------------------------


def write(path, *lines) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return str(path)


def log_of(folder: str) -> list[dict]:
    """The lines of a run's log, without how fast it was."""
    with open(f"{folder}/log.jsonl", encoding="utf-8") as f:
        entries = [json.loads(line) for line in f]
    for entry in entries:
        entry.pop("tokens_per_second", None)
    return entries


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(f"{folder}/ckpt.pt").state_dict()


def assert_same_runs(a: str, b: str) -> None:
    """Every logged number, and every bit of the weights."""
    assert log_of(a) == log_of(b)
    for name, weight in weights_of(a).items():
        assert torch.equal(weight, weights_of(b)[name]), name


def assert_close_runs(a: str, b: str, relative: float) -> None:
    """Every logged number to a relative error, and not the weights: Adam amplifies rounding."""
    first, second = log_of(a), log_of(b)
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
    for x, y in zip(first, second, strict=True):
        for name, value in x.items():
            if name != "padding":  # another layout pads otherwise
                assert y[name] == pytest.approx(value, rel=relative, abs=1e-5), (x["step"], name)


# --- runs in processes of their own --------------------------------------------------------------


def command(processes: int, *flags: str) -> list[str]:
    script = os.path.join(ROOT, "spo_train.py")
    if processes == 1:
        return [sys.executable, script, *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={processes}", script, *flags]


@functools.cache
def forks() -> subprocess.Popen:
    """Start tests/forks.py, once; it ends with this process, whose pipe it reads."""
    script = os.path.join(ROOT, "tests", "forks.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, script], env=os.environ | ONE_THREAD, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def run(processes: int, flags: list[str]) -> str:
    """Run spo_train.py to its end, in processes of its own; return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "printed")
        order = {"flags": flags, "processes": processes, "cwd": os.getcwd(), "out": out}
        order["environment"] = dict(os.environ | ONE_THREAD)
        print(json.dumps(order), file=forks().stdin, flush=True)
        codes = json.loads(forks().stdout.readline())
        with open(f"{out}.errors", encoding="utf-8", errors="replace") as f:
            assert codes == [0] * processes, f.read()[-3000:]
        texts = []
        for rank in range(processes):
            with open(f"{out}.{rank}", encoding="utf-8", errors="replace") as f:
                texts.append(f.read())
        return "".join(texts)


# --- an independent reader of llama2.c's files ---------------------------------------------------


def numpy_logits(path: str, tokens: list[int]) -> np.ndarray:
    """An independent reader of llama2.c's v0 and its forward pass at the last token, as run.c does
    it.
    """
    raw = open(path, "rb").read()
    dim, hidden, L, H, KV, V, S = np.frombuffer(raw, np.int32, 7)
    shared, V, hd = V > 0, abs(V), dim // H
    floats, offset = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        return floats[offset - size : offset].reshape(shape).astype(np.float64)

    emb, att_norm = take(V, dim), take(L, dim)
    wq, wk, wv, wo = (
        take(L, dim, dim),
        take(L, KV * hd, dim),
        take(L, KV * hd, dim),
        take(L, dim, dim),
    )
    ffn_norm, w1, w2, w3 = (
        take(L, dim),
        take(L, hidden, dim),
        take(L, dim, hidden),
        take(L, hidden, dim),
    )
    norm, cos, sin = take(dim), take(S, hd // 2), take(S, hd // 2)
    head = emb if shared else take(V, dim)
    assert offset == len(floats)

    def rms(x, weight):
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def turn(x, t):
        pairs = x.reshape(-1, hd // 2, 2)
        even, odd = pairs[..., 0].copy(), pairs[..., 1].copy()
        return np.stack([even * cos[t] - odd * sin[t], even * sin[t] + odd * cos[t]], -1).reshape(
            -1, hd
        )

    keys, values = [[] for _ in range(L)], [[] for _ in range(L)]
    for t, token in enumerate(tokens):
        x = emb[token].copy()
        for layer in range(L):
            h = rms(x, att_norm[layer])
            q = turn(wq[layer] @ h, t)
            keys[layer].append(turn(wk[layer] @ h, t))
            values[layer].append((wv[layer] @ h).reshape(-1, hd))
            out = []
            for head_index in range(H):
                kv = head_index // (H // KV)
                scores = np.array([k[kv] @ q[head_index] for k in keys[layer]]) / np.sqrt(hd)
                p = np.exp(scores - scores.max())
                out.append(sum(a * v[kv] for a, v in zip(p / p.sum(), values[layer], strict=True)))
            x += wo[layer] @ np.concatenate(out)
            h = rms(x, ffn_norm[layer])
            gate = w1[layer] @ h
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
    return head @ rms(x, norm)
