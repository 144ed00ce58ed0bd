"""What makes a model fast equals what it replaces; devices and precisions."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import ROOT, plain_tiny, tiny

from model import KVCache, TransformerBlock
from spo import fast, fast_block, parallel, state
from spo.failure import one_reason
from spo.fast import attend_on_cpu
from spo.fast_block import QUERIES_PER_BLOCK
from spo.generate import generate
from spo_train import TrainConfig, make_optimizer


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")


def test_float32_products_are_as_exact_after_the_choice_as_before():
    exact = fast.matmul_error("highest", "cpu")
    fast.enable_fast_matmul("cpu")
    assert fast.matmul_error(torch.get_float32_matmul_precision(), "cpu") <= 2 * exact


@pytest.mark.parametrize("error,chosen", [(3e-3, "highest"), (3e-7, "medium")])
def test_what_rounds_is_not_chosen(monkeypatch, error, chosen):
    """3e-3 is what oneDNN has where a processor has AMX."""
    errors = {"highest": 2e-7, "medium": error}
    monkeypatch.setattr(fast, "matmul_error", lambda precision, device: errors[precision])
    fast.enable_fast_matmul("cpu")
    assert torch.get_float32_matmul_precision() == chosen


def test_the_first_line_says_what_runs_where_and_nothing_of_errors(monkeypatch):
    lines = []
    for error in (3e-3, 3e-7):
        monkeypatch.setattr(fast, "matmul_error", lambda precision, device: error)
        lines.append(fast.enable_fast_matmul("cpu"))
    assert lines == [f"running on cpu with {torch.get_num_threads()} threads in float32"] * 2


def test_a_cpu_computes_in_float32_unless_asked():
    assert parallel.pick_dtype("", "cpu") == "float32"
    assert parallel.pick_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_gpu_computes_in_bfloat16_if_it_can(monkeypatch):
    for can, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: can)
        assert parallel.pick_dtype("", "cuda:1") == dtype
        assert parallel.pick_dtype("float32", "cuda") == "float32"


# --- a GPU's first lines, on a CUDA that is pretended --------------------------------------------


@pytest.fixture
def pretended_cuda(monkeypatch):
    """What torch.cuda answers on a machine with four GPUs, and its own check of set_device's index.

    Returns the numbers that set_device was called with.
    """
    from torch.cuda._utils import _get_device_index

    set_to, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: set_to.append(_get_device_index(d)))
    monkeypatch.setattr(torch, "empty", lambda *shape, device: empty(*shape))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return set_to


@pytest.mark.parametrize("dtype", ["", "float32"])
@pytest.mark.parametrize(
    "processes,rank,given,number",
    [
        (1, "", "", 0),
        (1, "", "cuda", 0),
        (1, "", "cuda:1", 1),
        (4, "3", "", 3),
        (4, "0", "cuda", 0),
    ],
)
def test_every_process_starts_on_a_gpu_of_its_own(
    pretended_cuda, monkeypatch, processes, rank, given, number, dtype
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", False)
    assert parallel.start(given, dtype) == (f"cuda:{number}", dtype or "bfloat16")
    assert pretended_cuda == [number]


def test_several_processes_do_not_share_one_gpu(pretended_cuda, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="^--device=cuda:1: torchrun gives each process"):
        parallel.start("cuda:1", "")
    assert not pretended_cuda


def test_on_a_gpu_the_optimizer_is_fused_and_its_state_is_saved_and_read(tmp_path):
    """A fused AdamW needs no copy of the weights, and counts its steps where the weights are."""
    for device, fused in (("cuda:0", True), ("cpu", None)):
        model = plain_tiny()
        config = TrainConfig(device=device)
        optimizer = make_optimizer(config, model)
        assert optimizer.defaults["fused"] is fused
        state.tensors_of(model, optimizer)  # as at step 0
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
        expected = {name: t.clone() for name, t in state.tensors_of(model, optimizer).items()}
        assert expected["optimizer.norm.weight.step"] == 1
        state.save_state(str(tmp_path), 1, expected, {})
        optimizer.step()
        tensors = state.tensors_of(model, optimizer)
        state.load_state(str(tmp_path / "step_00000001"), tensors)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_model_is_sharded_over_the_processes_devices_whatever_the_machine_has(monkeypatch):
    """FSDP2's own default is the GPU, if there is one, also of a run with --device=cpu."""
    meshes = []
    with monkeypatch.context() as seen:
        seen.setattr(
            "torch.distributed.fsdp.fully_shard", lambda module, mesh, **_: meshes.append(mesh)
        )
        seen.setattr("torch.distributed.fsdp.register_fsdp_forward_method", lambda *_: None)
        parallel.start("cpu", "bfloat16")
        try:
            parallel.shard(plain_tiny(), "bfloat16")
        finally:
            parallel.end()
    assert [mesh.device_type for mesh in meshes] == ["cpu"] * 3


@pytest.mark.parametrize(
    "error,what",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
    ],
)
def test_too_little_memory_is_one_line_with_the_flags_that_help(monkeypatch, error, what):
    monkeypatch.setattr(parallel, "place", "step 12")
    line = f"^out of {what} at step 12: --micro_batch_size=1, --activation_checkpointing and a "
    with pytest.raises(ValueError, match=line), one_reason():
        raise error
    with pytest.raises(RuntimeError, match="something else"), one_reason():
        raise RuntimeError("something else")


def test_compiled_layers_are_one_graph_each_whatever_the_length(monkeypatch):
    """A graph break inside a layer costs more than compiling gains, and nothing says so."""
    graphs, ran = [], 0
    compiler = torch.compile

    def counting(graph, inputs):
        graphs.append(graph)

        def run(*inputs):
            nonlocal ran
            ran += 1
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counting, **how))
    torch._dynamo.reset()
    model = plain_tiny(max_seq_len=64)
    parallel.compile_layers(model)
    new_graphs = []
    for rows, length in ((8, 64), (8, 48), (5, 32), (16, 24), (2, 64)):
        before, ran = len(graphs), 0
        model.hidden(torch.randint(0, 64, (rows, length))).sum().backward()
        new_graphs.append(len(graphs) - before)
        assert ran == len(model.layers), (rows, length)
    assert new_graphs[2:] == [0, 0, 0]
    torch._dynamo.reset()


# --- attention and generation on a CPU ---------------------------------------------------------


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-14), (torch.float32, 3e-6)])
@pytest.mark.parametrize(
    "length", [1, QUERIES_PER_BLOCK // 2, QUERIES_PER_BLOCK, 2 * QUERIES_PER_BLOCK + 5]
)
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_a_block_equals_the_models_and_so_does_its_gradient(kv, length, dtype, tolerance):
    model = plain_tiny(n_kv_heads=kv, max_seq_len=256).to(dtype)
    layer, generator = model.layers[0], torch.Generator().manual_seed(0)
    for norm in (layer.attention_norm, layer.ffn_norm):
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x, upstream = (torch.randn(3, length, 32, dtype=dtype, generator=generator) for _ in "xy")
    x.requires_grad_()
    results = []
    for forward in (TransformerBlock.forward, fast_block.forward):
        y = forward(layer, x, model.freqs_cos[:length], model.freqs_sin[:length], None)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        results.append([y, *gradients])
    largest = max(float(expected.detach().norm()) for expected in results[0])
    for expected, found in zip(*results, strict=True):
        # Some gradients are 0 at length 1. What is there instead is rounding of the others' size.
        size = max(float(expected.detach().norm()), 0.01 * largest)
        assert (found - expected).norm() <= tolerance * size


def test_the_blocks_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 32, dtype=torch.double, generator=generator, requires_grad=True)
    rows = torch.randn(4, 6, dtype=torch.double, generator=generator, requires_grad=True)
    rotation = torch.polar(torch.ones(5, 2), torch.randn(5, 2, generator=generator)).cdouble()
    check = torch.autograd.gradcheck
    assert check(lambda x: fast_block.Attend.apply(x, rotation, 4, 2), qkv)
    assert check(lambda x: fast_block.Normed.apply(x, 1e-5), rows)
    assert check(fast_block.SwiGlu.apply, rows)


def test_a_single_query_attends_to_all_keys():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, 6, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(3, 2, 9, 6, generator=generator, dtype=torch.float64) for _ in "kv")
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = (q @ keys.transpose(2, 3) / 6**0.5).softmax(-1) @ values
    torch.testing.assert_close(attend_on_cpu(q, k, v), expected)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tied,n_kv_heads", [(True, 4), (True, 2), (False, 1)])
def test_the_decoder_equals_the_model(tied, n_kv_heads, dtype, tolerance):
    model = tiny(tied, n_kv_heads).to(dtype)
    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = fast.Generation(model, 3, 12)
        decoder.prefill(tokens[:, :5])
        for t in range(5, 12):
            expected = model(tokens[:, : t + 1])[:, -1].float()
            gap = decoder.next_logits(tokens[:, t : t + 1]).float() - expected
            assert gap.norm() <= tolerance * expected.norm()
            if t == 8:  # one row leaves
                tokens = tokens[[0, 2]]
                decoder.keep(torch.tensor([True, False, True]))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_the_static_step_equals_the_model(n_kv_heads, monkeypatch):
    """Across the ends of blocks, and with a row that leaves: what a GPU captures, run on a CPU."""
    monkeypatch.setattr(fast, "LENGTHS_PER_GRAPH", 4)
    model = plain_tiny(n_kv_heads=n_kv_heads)
    tokens = torch.randint(64, (3, 14), generator=torch.Generator().manual_seed(0))
    cache, decoder = KVCache(model.args, 3, 14, "cpu", torch.float32), fast.StaticDecoder(model)
    cache.keys.fill_(9.0)  # what is not written yet is masked
    cache.values.fill_(9.0)
    lengths = set()
    with torch.inference_mode():
        fast.next_logits(model, tokens[:, :3], cache)
        for t in range(3, 14):
            expected = model(tokens[:, : t + 1])[:, -1]
            logits = decoder.next_logits(tokens[:, t : t + 1], cache)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            lengths.add(decoder.shape)
            if t == 8:
                tokens = tokens[[0, 2]]
                cache.keep(torch.tensor([True, False, True]))
    assert lengths == {(3, 4), (3, 8), (3, 12), (2, 12), (2, 14)}


def test_a_decoder_gives_its_memory_back_without_the_garbage_collector():
    gc.disable()
    try:
        model = plain_tiny()
        cache = KVCache(model.args, 1, 14, "cpu", torch.float32)
        decoder = fast.StaticDecoder(model)
        with torch.inference_mode():
            decoder.next_logits(torch.tensor([[1]]), cache)
        left = [weakref.ref(cache), weakref.ref(decoder)]
        del cache, decoder
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


def test_generation_by_static_steps_is_generation(monkeypatch):
    """The whole of generate, as a GPU runs it but for the capture: the same texts."""
    model, prompts = plain_tiny().double(), [[1], [1, 5, 9], [1, 7]] * 4
    expected = generate(tiny().double(), prompts, 40, stop_ids=[3], seed=5)

    class Static(fast.Generation):
        def __init__(self, model, rows, length):
            self.model, self.on_cpu, self.decoder = model, False, fast.StaticDecoder(model)
            self.cache = KVCache(model.args, rows, length, "cpu", torch.float64)
            self.cache.keys.zero_()
            self.cache.values.zero_()

    monkeypatch.setattr(fast, "Generation", Static)
    monkeypatch.setattr(fast, "LENGTHS_PER_GRAPH", 16)
    assert generate(model, prompts, 40, stop_ids=[3], seed=5) == expected


@pytest.mark.parametrize("script", ["spo_train", "sample", "export", "tinystories_data"])
def test_openmp_is_told_to_wait_quietly_before_torch_is_imported(script):
    code = (
        f"import os, sys, {script}; names = list(sys.modules); "
        "print(names.index('spo') < names.index('torch'), os.environ['OMP_WAIT_POLICY'])"
    )
    for before, after in ((None, "passive"), ("active", "active")):  # a user's own setting wins
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        if before:
            environment["OMP_WAIT_POLICY"] = before
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.stdout.split() == ["True", after], done.stderr
