"""The model, sampling, and the checkpoint files."""

import dataclasses

import numpy as np
import pytest
import torch

import export
import sample
from model import (
    QUERIES,
    Decoder,
    KVCache,
    ModelArgs,
    Transformer,
    attend,
    generate,
    rope_tables,
    rotate,
    sample_token,
)
from spo import checkpoint as checkpoints
from spo.checkpoint import Checkpoint
from spo.tokenizer import Tokenizer

GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def tiny(tied: bool = True, n_kv_heads: int = 2, **changes) -> Transformer:
    shape = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 64,
        "hidden_dim": 48,
        "max_seq_len": 64,
    }
    model = Transformer(ModelArgs(**shape | {"n_kv_heads": n_kv_heads} | changes), tied)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model.eval()


def numpy_logits(path: str, tokens: list[int]) -> np.ndarray:
    """An independent reader of llama2.c's v0 and its forward pass at the last token, as run.c does it."""
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
                out.append(sum(a * v[kv] for a, v in zip(p / p.sum(), values[layer])))
            x += wo[layer] @ np.concatenate(out)
            h = rms(x, ffn_norm[layer])
            gate = w1[layer] @ h
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
    return head @ rms(x, norm)


@pytest.mark.parametrize("tied,n_kv_heads", [(True, 4), (True, 2), (False, 1)])
def test_logits_equal_an_independent_numpy_forward_pass_of_the_exported_file(
    tmp_path, tied, n_kv_heads
):
    model, path = tiny(tied, n_kv_heads), str(tmp_path / "model.bin")
    checkpoints.save_llama2c(path, model)
    tokens = [1, 9, 33, 7, 60, 2]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))
    assert logits.shape == (1, 6, 64)
    np.testing.assert_allclose(logits[0, -1].numpy(), numpy_logits(path, tokens), atol=2e-4)


def test_rope_turns_interleaved_pairs_by_position():
    args = ModelArgs(dim=4, n_heads=1, max_seq_len=3)
    cos, sin = rope_tables(args)
    turned = rotate(torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 3, 1, 4), cos, sin)[0, 2, 0]
    angles = np.array([2.0, 2.0 / 100.0])  # position 2; theta^(-0/4) and 10000^(-2/4)
    assert turned.tolist() == pytest.approx(
        [np.cos(angles[0]), np.sin(angles[0]), np.cos(angles[1]), np.sin(angles[1])]
    )


@pytest.mark.parametrize("length", [1 + QUERIES // 2, QUERIES, 2 * QUERIES + 5])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_by_blocks_equals_the_formula(length, kv):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(
            3, heads, length, 6, generator=generator, dtype=torch.float64, requires_grad=True
        )
        for heads in (4, kv, kv)
    )
    keys, values = (x.repeat_interleave(4 // kv, 1) for x in (k, v))
    scores = (q @ keys.transpose(2, 3) / 6**0.5).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
    )
    expected, weights = (
        scores.softmax(-1) @ values,
        torch.randn(3, 4, length, 6, generator=generator, dtype=torch.float64),
    )
    torch.testing.assert_close(attend(q, k, v), expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (attend(q, k, v), expected))
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(attend(q[:, :, -1:], k, v), expected[:, :, -1:])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tied,n_kv_heads", [(True, 4), (True, 2), (False, 1)])
def test_the_decoder_equals_the_model(tied, n_kv_heads, dtype, tolerance):
    model = tiny(tied, n_kv_heads).to(dtype)
    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache, decoder = (
            KVCache(model.args, 3, 12, "cpu", torch.float32),
            Decoder(model, 3, torch.float32),
        )
        model.next_logits(tokens[:, :5], cache)
        for t in range(5, 12):
            expected = model(tokens[:, : t + 1])[:, -1].float()
            gap = decoder.next_logits(tokens[:, t : t + 1], cache).float() - expected
            assert gap.norm() <= tolerance * expected.norm()
            if t == 8:  # one row leaves
                tokens = tokens[[0, 2]]
                cache.keep(torch.tensor([True, False, True]))


def test_the_cache_changes_nothing():
    model, tokens = tiny(), torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    greedy = generate(model, tokens[:, :4].tolist(), 8, temperature=0)
    with torch.no_grad():
        for row, ids in enumerate(greedy):
            sequence = tokens[row, :4].tolist()
            for token in ids:
                assert model(torch.tensor([sequence]))[0, -1].argmax() == token
                sequence.append(token)


def test_a_rows_text_depends_on_neither_neighbours_nor_batch_size():
    model = tiny()
    prompts = [[1], [1, 5, 9], [1, 7], [1], [1, 2, 3, 4, 5]]
    together = generate(model, prompts, 40, stop_ids=[3], seed=11)
    for row, prompt in enumerate(prompts):
        assert generate(model, [prompt], 40, stop_ids=[3], seed=11, first_row=row) == [
            together[row]
        ]
    assert generate(model, prompts, 40, stop_ids=[3], seed=12) != together
    assert generate(model, torch.tensor([[1], [1]]), 9, seed=5) == generate(
        model, [[1], [1]], 9, seed=5
    )


def test_a_sequence_ends_with_its_terminator_and_never_holds_it_before():
    rows = generate(tiny(), [[1, 3]] * 32, 30, stop_ids=[3, 8], seed=0)
    ended = [row for row in rows if row[-1] in (3, 8)]
    assert ended and all(len(row) == 30 for row in rows if row not in ended)
    assert not any(token in (3, 8) for row in rows for token in row[:-1])


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(sample_token(logits.clone(), uniforms, 1.0), minlength=4) / 20000
    assert torch.allclose(share, logits[0].softmax(0), atol=0.01)
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_p=0.7).tolist()) == {
        0,
        1,
    }  # 0.64 alone is less than 0.7
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_p=0.6).tolist()) == {0}


def test_generate_ends_with_the_context_and_refuses_a_prompt_that_fills_it():
    assert [len(row) for row in generate(tiny(), [[1], [1] * 63], 500)] == [63, 1]
    with pytest.raises(ValueError, match="64 tokens leaves no room in a context of 64"):
        generate(tiny(), [[1] * 64], 5)


# --- files ---------------------------------------------------------------------------------------


def same_weights(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("name", ["model.pt", "model.bin"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back(tmp_path, name, tied):
    model, path = tiny(tied), str(tmp_path / name)
    if name == "model.pt":
        checkpoints.save_pt(path, Checkpoint(model, {"eos_id": 2}, 7))
    else:
        checkpoints.save_llama2c(path, model)
    loaded = checkpoints.load(path)
    assert same_weights(loaded.model, model) and loaded.model.tied == tied
    assert (loaded.eos_id, loaded.step) == ((2, 7) if name == "model.pt" else (1, 0))
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file stays


def test_llama2c_checkpoints_load_with_their_prefix_and_entries(tmp_path):
    model, path = tiny(), str(tmp_path / "stories.pt")
    args = dataclasses.asdict(model.args)
    del args["rope_theta"]
    weights = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save(
        {"model": weights, "model_args": args, "iter_num": 5, "config": {"dataset": "tinystories"}},
        path,
    )
    assert same_weights(checkpoints.load(path).model, model) and checkpoints.load(path).eos_id == 1


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_export_twice_gives_the_same_bytes_and_leaves_the_model_alone(tmp_path, version, tied):
    model = tiny(tied)
    before, args = (
        {k: v.clone() for k, v in model.state_dict().items()},
        dataclasses.asdict(model.args),
    )
    for name in ("a.bin", "b.bin"):
        checkpoints.save_llama2c(str(tmp_path / name), model, version)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert dataclasses.asdict(model.args) == args
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = checkpoints.load(str(tmp_path / "a.bin")).model
    if version < 2:
        assert same_weights(back, model)
    else:
        for a, b in zip(checkpoints.matrices(back), checkpoints.matrices(model)):
            scales = b.detach().reshape(-1, 16).abs().amax(1, keepdim=True) / 127
            assert ((a - b).reshape(-1, 16).abs() <= scales * 0.5001).all()


def test_a_group_size_that_does_not_divide_a_row_is_refused(tmp_path):
    assert checkpoints.largest_group_size(tiny().args) == 16  # dim 32, hidden_dim 48
    with pytest.raises(ValueError, match="--group_size=32 does not divide hidden_dim 48; 16 fits"):
        checkpoints.save_llama2c(str(tmp_path / "m.bin"), tiny(), 2, group_size=32)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_by_name(tmp_path):
    for name in ("model.pt", "model.bin"):
        path = str(tmp_path / name)
        (
            checkpoints.save_pt(path, Checkpoint(tiny()))
            if name == "model.pt"
            else checkpoints.save_llama2c(path, tiny())
        )
        whole = open(path, "rb").read()
        for damaged in (b"", whole[:20], whole[: len(whole) // 2], b"<html>not found</html>" * 99):
            open(path, "wb").write(damaged)
            with pytest.raises(ValueError, match=name):
                checkpoints.load(path)


def test_a_checkpoint_with_wrong_entries_is_refused_by_name(tmp_path):
    model, path = tiny(), str(tmp_path / "model.pt")
    args, weights = dataclasses.asdict(model.args), model.state_dict()
    wrong = [
        {"model": weights, "model_args": None},
        {"model": None, "model_args": args},
        {"model": weights},
        {"model": weights, "model_args": args | {"dim": "32"}},
        {"model": weights, "model_args": args | {"n_heads": 0}},
        {"model": weights | {"norm.weight": 3}, "model_args": args},
        [1, 2],
        {"model": {k: v for k, v in weights.items() if k != "norm.weight"}, "model_args": args},
        {"model": weights, "model_args": args | {"rope_scaling": 2}},
    ]
    for entries in wrong:
        torch.save(entries, path)
        with pytest.raises(ValueError, match="model.pt"):
            checkpoints.load(path)


def test_bit_flips_load_or_are_refused_by_name(tmp_path):
    """A flipped bit of a weight cannot be told from a weight; everything else is refused, in words."""
    model, random = tiny(), np.random.default_rng(0)
    for name in ("model.pt", "model.bin"):
        path = str(tmp_path / name)
        checkpoints.save_pt(
            path, Checkpoint(model)
        ) if name == "model.pt" else checkpoints.save_llama2c(path, model)
        with open(path, "rb") as f:
            whole = f.read()
        for _ in range(150):
            damaged, position = bytearray(whole), int(random.integers(len(whole)))
            position = position % 256 if random.random() < 0.5 else position
            damaged[position] ^= 1 << int(random.integers(8))
            with open(path, "wb") as f:
                f.write(damaged)
            try:
                checkpoints.load(path)
            except ValueError as error:
                assert name in str(error)


def test_a_header_that_asks_for_too_much_is_refused_before_anything_is_built(tmp_path):
    path = str(tmp_path / "model.bin")
    with open(path, "wb") as f:
        f.write(
            np.array([4096, 11008, 2**20, 32, 32, 32000, 2048], dtype=np.int32).tobytes()
            + b"\0" * 1000
        )
    with pytest.raises(ValueError, match="model.bin: damaged: 1028 bytes, its header asks for"):
        checkpoints.load(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = str(tmp_path / "evil.pt")
    torch.save({"model": {}, "model_args": {}, "config": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt: not loaded"):
        checkpoints.load(path)
    assert not (tmp_path / "executed").exists()


# --- the published stories260K -------------------------------------------------------------------


def test_stories260k_tells_its_known_story(spo_data, capsys):
    sample.main(
        [
            f"--checkpoint={spo_data}/stories260K.bin",
            f"--tokenizer={spo_data}/tok512.model",
            "--temperature=0",
        ]
    )
    assert " ".join(capsys.readouterr().out.split()).startswith(GREEDY)


def test_stories260k_is_exported_to_the_identical_file(spo_data, tmp_path, capsys):
    path = str(tmp_path / "model.bin")
    export.main(
        [path, f"--checkpoint={spo_data}/stories260K.bin", f"--tokenizer={spo_data}/tok512.model"]
    )
    assert open(path, "rb").read() == open(f"{spo_data}/stories260K.bin", "rb").read()
    assert (tmp_path / "tokenizer.bin").read_bytes() == open(f"{spo_data}/tok512.bin", "rb").read()


def test_an_independent_reader_of_the_file_tells_the_same_greedy_story(spo_data):
    model, ids = checkpoints.load(f"{spo_data}/stories260K.bin").model, [1]
    ours = generate(model, [[1]], 40, temperature=0)[0]
    for _ in range(40):
        ids.append(int(numpy_logits(f"{spo_data}/stories260K.bin", ids).argmax()))
    assert ids[1:] == ours


def test_llama2_tokenizer_is_exported_to_the_identical_file(spo_data, tmp_path):
    with open(f"{spo_data}/tokenizer.bin", "rb") as f:
        assert Tokenizer(f"{spo_data}/tokenizer.model").to_llama2c() == f.read()
