"""--plan against what is really kept."""

import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT, tiny

from model import KVCache, ModelArgs, Transformer
from spo import fast, plan
from spo.plan import GIB, Load, memory, saved_by_layer

LLAMA2 = ModelArgs(
    dim=4096, n_layers=32, n_heads=32, vocab_size=32000, hidden_dim=11008, max_seq_len=4096
)


def load(**changes) -> Load:
    return Load(
        **{
            "processes": 1,
            "device": "cpu",
            "dtype": "float32",
            "reference": True,
            "online": 32,
            "eval_stories": 128,
            "sequences": 4,
            "longest": 50,
            "new_tokens": 60,
            "activation_checkpointing": False,
        }
        | changes
    )


@pytest.mark.parametrize("length", [50, 250])  # one block of attention, and three
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype, length):
    """Every storage that the backward pass of a stack of layers holds, weights and tables aside."""
    args = ModelArgs(
        dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=64, hidden_dim=320, max_seq_len=256
    )
    model = fast.use(Transformer(args)).to(dtype)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model.hidden(torch.randint(0, 64, (4, length)))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert out.requires_grad
    planned = saved_by_layer(args, 4, length, dtype.itemsize, on_cpu=True) * args.n_layers
    assert planned == pytest.approx(measured, rel=0.25)


def test_what_is_exact_is_exact():
    model = tiny()
    kinds = memory(model.args, True, load())
    numbers = sum(p.numel() for p in model.parameters())
    assert (
        kinds["weights"] == kinds["gradients"] == kinds["reference"] == 4 * numbers
        and kinds["AdamW's moments"] == 8 * numbers
    )
    cache = KVCache(model.args, 128, 64, "cpu", torch.float32)
    assert (
        kinds["key-value cache"] == cache.keys.nbytes + cache.values.nbytes
    )  # 60 + 50 tokens are more than the context
    assert kinds["reference's states of the samples"] == 32 * 60 * model.args.dim * 4


def test_llama_2_7b_on_4_processes():
    """6,738,415,616 parameters: 25.1 GiB of weights, gradients and moments on each of 4, 100.4 on
    one.
    """
    for processes, wanted in ((4, 25.10), (1, 100.41)):
        kinds = memory(LLAMA2, False, load(processes=processes, dtype="bfloat16", longest=1024))
        assert sum(
            kinds[k] for k in ("weights", "gradients", "AdamW's moments")
        ) / GIB == pytest.approx(wanted, abs=0.01)
        assert kinds["whole policy to generate"] / GIB == pytest.approx(12.55, abs=0.01)


def test_the_shards_of_a_7b_are_what_the_plan_says():
    """FSDP2 on the meta device, with a process group that pretends to be 4."""
    code = (
        "import torch, torch.distributed as dist\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from spo import parallel\nfrom model import Transformer\nfrom test_plan import LLAMA2\n"
        "dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)\n"
        "with torch.device('meta'):\n    model = Transformer(LLAMA2, tied=False)\n"
        "parallel.shard(model)\n"
        "print(sum(4 * p.to_local().numel() for p in model.parameters()))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.path.join(ROOT, 'tests')}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == memory(LLAMA2, False, load(processes=4))["weights"]


def test_a_gpu_keeps_the_graphs_of_a_step_that_fit_into_a_quarter_of_it(monkeypatch):
    """110M, 32 groups of 4 stories of 200 tokens, 14.8 GiB in bfloat16: mu takes no pass more."""
    args = ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000, hidden_dim=2048)
    tokens, mask = torch.empty(32, 208, device="meta"), torch.ones(32, 208).bool()
    batches = [types.SimpleNamespace(tokens=tokens, mask=mask)] * 4
    device = types.SimpleNamespace(type="cuda")
    weight = types.SimpleNamespace(itemsize=4)  # the shard's; the layers compute in 2 bytes
    model = types.SimpleNamespace(args=args, device=device, low_precision=True)
    model.tok_embeddings = types.SimpleNamespace(weight=weight)
    answers = {}
    for gib in (141, 80, 40):
        monkeypatch.setattr(plan, "available", lambda *_, gib=gib: (gib * GIB, "a GPU"))
        answers[gib] = plan.can_keep(model, batches)
    assert answers == {141: True, 80: True, 40: False}


def test_the_flag_prints_and_trains_nothing(workshop, tmp_path, capsys):
    workshop("spo_rank", "--plan=4", "--dtype=bfloat16")
    printed = capsys.readouterr().out
    assert (
        "memory of each of 4 processes, bfloat16, 4 sequences of up to" in printed
        and "fits: this machine has" in printed
    )
    assert not (tmp_path / "out").exists()
    workshop("dpo_rank", "--plan", "--eval_stories=0")
    printed = capsys.readouterr().out
    assert (
        "memory of each of 1 processes" in printed
        and "whole policy" not in printed
        and "key-value" not in printed
    )


def test_a_gpu_that_is_not_here_can_be_planned_for(workshop, capsys):
    """In its precision, with its way to sample, and its memory."""
    workshop("spo_rank", "--plan=4", "--gpu_gib=80")
    printed = capsys.readouterr().out
    assert "memory of each of 4 processes, bfloat16, " in printed
    assert "fits: such a GPU has 80.0 GiB for each" in printed
    assert "weights laid out" not in printed and "gathered layers" in printed
    workshop("spo_rank", "--plan=4", "--gpu_gib=0.00001")
    assert "does not fit: such a GPU has" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--gpu_gib: goes with --plan"):
        workshop("spo_rank", "--gpu_gib=80")
