"""Weights in every format: the same model whichever way it comes, whole or in any shard; damaged
files; export.
"""

import base64
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ONE_THREAD, ROOT, assert_close_runs, run, same_weights, tiny, write
from safetensors.torch import save_file

import export
from export import halve, largest_group_size, save_llama2c
from model import Transformer
from spo import checkpoint
from spo.checkpoint import load_rows, open_weights, without_weights
from spo.folders import HF_NAMES, interleave
from spo.tokenizer import Tokenizer, copy_tokenizer
from spo.weights import shapes_of

TOKENS = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))


def untied() -> Transformer:
    """GQA, a theta of its own, an untied classifier: everything that a layout could lose."""
    return tiny(tied=False, vocab_size=512, rope_theta=500.0, norm_eps=1e-6)


def meta_folder(path, model: Transformer, parts: int = 1, llama3: bool = False) -> str:
    """As Meta's model parallelism cuts it: wq, wk, wv, w1, w3, output by rows; wo, w2 by columns;
    norms repeated.
    """
    path.mkdir()
    args = model.args
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "vocab_size": -1,
        "max_seq_len": args.max_seq_len,
    }
    (path / "params.json").write_text(json.dumps(params))
    for part in range(parts):
        tensors = {"rope.freqs": torch.zeros(4)}
        for name, weight in model.state_dict().items():
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (
                name == "tok_embeddings.weight" and not llama3
            )
            tensors[name] = (
                weight.clone()
                if weight.dim() == 1
                else weight.chunk(parts, int(by_columns))[part].clone()
            )
        torch.save(tensors, path / f"consolidated.{part:02d}.pth")
    return str(path)


def hf_folder(path, model: Transformer, files: int = 1, kind: str = "safetensors", **config) -> str:
    """Written here by the published names and the published order of rows, not by save_hf."""
    path.mkdir()
    args, tensors = model.args, {}
    for name, weight in model.named_parameters():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        rest = (
            name.removesuffix(".weight")
            if layer is None
            else name.split(".", 2)[2].removesuffix(".weight")
        )
        published = HF_NAMES[rest] if layer is None else f"model.layers.{layer}.{HF_NAMES[rest]}"
        weight = weight.detach().clone()
        if rest in ("attention.wq", "attention.wk"):  # per head: all even rows, then all odd ones
            heads = weight.view(-1, args.head_dim, args.dim)
            weight = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(-1, args.dim)
        tensors[f"{published}.weight"] = weight.contiguous()
    names = sorted(tensors)
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        if kind == "safetensors":
            save_file(part, path / f"model-{i + 1:05d}-of-{files:05d}.safetensors")
        else:
            torch.save(part, path / f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin")
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": args.dim,
                "intermediate_size": args.hidden_dim,
                "num_hidden_layers": args.n_layers,
                "num_attention_heads": args.n_heads,
                "num_key_value_heads": args.n_kv_heads,
                "vocab_size": args.vocab_size,
                "rms_norm_eps": args.norm_eps,
                "rope_theta": args.rope_theta,
                "max_position_embeddings": args.max_seq_len,
                "tie_word_embeddings": model.tied,
                "eos_token_id": 2,
                "hidden_act": "silu",
            }
            | config
        )
    )
    return str(path)


LAYOUTS = {
    "meta": lambda path, model: meta_folder(path, model),
    "meta in 2": lambda path, model: meta_folder(path, model, 2),
    "llama 3 in 2": lambda path, model: meta_folder(path, model, 2, llama3=True),
    "hf": lambda path, model: hf_folder(path, model),
    "hf in 3": lambda path, model: hf_folder(path, model, 3),
    "hf bin": lambda path, model: hf_folder(path, model, 2, "bin"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_folder_is_the_model(tmp_path, layout):
    model = untied()
    loaded = checkpoint.load(LAYOUTS[layout](tmp_path / "model", model))
    assert loaded.args == model.args and loaded.eos_id == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_shard_reads_its_rows_and_all_are_the_whole(tmp_path, layout, size):
    model = untied()
    folder = open_weights(LAYOUTS[layout](tmp_path / "model", model))
    for name, weight in model.named_parameters():
        rows = -(-len(weight) // size)
        cut = [
            folder.rows(name, slice(min(r * rows, len(weight)), min((r + 1) * rows, len(weight))))
            for r in range(size)
        ]
        assert torch.equal(torch.cat(cut), weight), name


def test_a_model_on_meta_is_filled_with_its_tables(tmp_path):
    model = untied()
    folder = open_weights(hf_folder(tmp_path / "model", model))
    empty = without_weights(folder)
    load_rows(empty, folder, "cpu")
    assert torch.equal(empty(TOKENS), model(TOKENS))


def test_the_order_of_rows_is_turned_and_turned_back():
    weight = torch.arange(24.0).view(12, 2)  # 2 heads of 6
    assert halve(weight, 6)[:, 0].tolist() == [0, 4, 8, 2, 6, 10, 12, 16, 20, 14, 18, 22]
    assert torch.equal(interleave(halve(weight, 6), 6), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_is_the_model_again(tmp_path, tied, tokenizer, capsys):
    model = tiny(tied=tied, vocab_size=512)
    checkpoint.save_pt(str(tmp_path / "m.pt"), model)
    export.main(
        [
            str(tmp_path / "hf"),
            f"--checkpoint={tmp_path / 'm.pt'}",
            f"--tokenizer={tokenizer.path}",
            "--version=-1",
        ]
    )
    loaded = checkpoint.load(str(tmp_path / "hf"))
    assert loaded.tied == tied and loaded.eos_id == 1 and torch.equal(loaded(TOKENS), model(TOKENS))
    export.main(
        [str(tmp_path / "again.pt"), f"--hf={tmp_path / 'hf'}"]
    )  # with the tokenizer that lies in it
    assert torch.equal(checkpoint.load(str(tmp_path / "again.pt"))(TOKENS), model(TOKENS))
    export.main(
        [str(tmp_path / "model.bin"), "--meta-llama", meta_folder(tmp_path / "meta", model)]
    )
    theirs = checkpoint.load(str(tmp_path / "model.bin")).output.weight
    assert torch.equal(theirs, model.output.weight)
    with pytest.raises(ValueError, match="one of --checkpoint, --meta-llama and --hf"):
        export.main(["x.bin", "--hf=a", "--checkpoint=b"])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    model = tiny(tied=tied, vocab_size=512, rope_theta=500.0)
    checkpoint.save_pt(str(tmp_path / "m.pt"), model)
    export.main([str(tmp_path / "hf"), f"--checkpoint={tmp_path / 'm.pt'}", "--version=-1"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "hf"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert (theirs(TOKENS).logits - model(TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config,message",
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "only Llama 3.1's scaled"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "only Llama 3.1's scaled"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .gptq."),
        ({"attention_bias": True}, "attention_bias: this model has no biases"),
        ({"model_type": "mistral"}, "only Llama is read"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"hidden_size": 40}, "is of shape"),
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
        ({"tie_word_embeddings": None, "vocab_size": "x"}, "vocab_size is 'x'"),
        ({"hidden_size": 33}, "does not split"),
    ],
)
def test_what_the_model_lacks_is_refused_in_words(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(hf_folder(tmp_path / "model", untied(), **config))


def test_every_terminator_is_kept_and_the_first_is_trained(tmp_path):
    path = hf_folder(tmp_path / "model", untied(), eos_token_id=[7, 9])
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    model = checkpoint.load(path)
    assert model.eos_id == 7 and model.eos_ids == (7, 9, 11)
    checkpoint.save_pt(str(tmp_path / "m.pt"), model)
    assert checkpoint.load(str(tmp_path / "m.pt")).eos_ids == (7, 9, 11)
    export.main([str(tmp_path / "hf"), f"--checkpoint={tmp_path / 'm.pt'}", "--version=-1"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == [7, 9, 11]
    assert checkpoint.load(str(tmp_path / "hf")).eos_ids == (7, 9, 11)


def test_an_exported_folder_has_the_models_own_numbers(tmp_path):
    model = tiny(norm_eps=1e-3, rope_theta=5e5)
    checkpoint.save_pt(str(tmp_path / "m.pt"), model)
    export.main([str(tmp_path / "hf"), f"--checkpoint={tmp_path / 'm.pt'}", "--version=-1"])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-3 and config["rope_theta"] == 5e5
    assert checkpoint.load(str(tmp_path / "hf")).args == model.args


@pytest.mark.parametrize(
    "kind", ["pt", "v0", "v1", "v2", "hf", "meta", "meta of 3", "meta of 3, llama3"]
)
def test_rows_of_a_weight_are_those_of_the_whole(tmp_path, kind):
    """A sharded load reads its rows only: from the middle, to the end, and none."""
    shape = {"n_heads": 6, "n_kv_heads": 3, "dim": 48, "hidden_dim": 96, "vocab_size": 66}
    model = tiny(tied=False, **shape)
    path = str(tmp_path / "m.pt")
    checkpoint.save_pt(path, model)
    if kind.startswith("v"):
        export.main([str(tmp_path / "m.bin"), f"--checkpoint={path}", f"--version={kind[1:]}"])
        path = str(tmp_path / "m.bin")
    elif kind == "hf":
        path = hf_folder(tmp_path / "hf", model, files=2)
    elif kind.startswith("meta"):
        parts = 3 if "3" in kind else 1
        path = meta_folder(tmp_path / "meta", model, parts, "llama3" in kind)
    source = open_weights(path)
    for name, shape in shapes_of(model.args, tied=False):
        whole = source.rows(name, slice(0, shape[0]))
        assert whole.shape == shape
        if kind != "v2":
            assert torch.equal(whole.float(), model.state_dict()[name]), name
        for start, stop in ((0, 5), (7, 20), (shape[0] // 2, shape[0]), (5, 5)):
            rows = source.rows(name, slice(start, stop))
            assert torch.equal(rows, whole[start:stop]), (name, start, stop)


def test_damaged_folders_are_refused_by_name(tmp_path):
    path = meta_folder(tmp_path / "meta", untied())
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match="consolidated.00.pth: damaged"):
        checkpoint.load(path)
    (tmp_path / "meta" / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="params.json|damaged"):
        checkpoint.load(path)
    path = hf_folder(tmp_path / "hf", untied())
    (file,) = [f for f in os.listdir(path) if f.endswith("safetensors")]
    content = (tmp_path / "hf" / file).read_bytes()
    (tmp_path / "hf" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="safetensors: damaged"):
        checkpoint.load(path)
    (tmp_path / "hf" / file).unlink()
    with pytest.raises(ValueError, match="no model.*safetensors"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="neither Meta's folder"):
        checkpoint.load(str(tmp_path))


@pytest.mark.parametrize("what", ["folder", pytest.param("pt", marks=pytest.mark.slow)])
def test_two_processes_train_from_a_folder_as_one_does(what, tmp_path, tokenizer, monkeypatch):
    """Each of the two reads only its rows; the model has an untied classifier, as Llama 2 has."""
    monkeypatch.chdir(tmp_path)
    folder = hf_folder(tmp_path / "model", untied(), 2)
    copy_tokenizer(tokenizer, folder)
    texts = [[f"the owl sang {i} {j} times." for j in range(3)] for i in range(8)]
    write(
        tmp_path / "ranked.jsonl",
        *({"prompt": "One day", "responses": t, "ranking": [2, 0, 1]} for t in texts),
    )
    flags = [
        "--init_from=model",
        "--data=ranked.jsonl",
        "--max_iters=2",
        "--batch_size=4",
        "--eval_interval=2",
        "--judge=offline",
        "--eval_stories=2",
        "--max_new_tokens=12",
        "--log_interval=1",
        "--kl_batch_size=4",
    ]
    run(1, [*flags, "--out_dir=one"])
    printed = run(2, [*flags, "--out_dir=two"])
    assert_close_runs("one", "two", 2e-4)
    assert (
        checkpoint.load("two/ckpt.pt").eos_id == 2 and "best (step" in printed
    )  # best.pt was read shard by shard
    if what == "pt":
        flags[0] = "--init_from=one/ckpt.pt"
        run(1, [*flags, "--out_dir=three", "--report=false"])
        run(2, [*flags, "--out_dir=four", "--report=false"])
        assert_close_runs("three", "four", 2e-4)


@pytest.mark.parametrize("save_dtype", ["", "bfloat16"])
def test_a_bfloat16_run_keeps_checkpoints_in_the_dtype_that_is_asked_for(
    tmp_path, tokenizer, monkeypatch, save_dtype
):
    monkeypatch.chdir(tmp_path)
    model = tiny(tied=False, vocab_size=512)
    folder = hf_folder(tmp_path / "model", model)
    copy_tokenizer(tokenizer, folder)
    texts = [[f"the owl sang {i} {j} times." for j in range(3)] for i in range(8)]
    write(tmp_path / "ranked.jsonl", *({"responses": t, "ranking": [2, 0, 1]} for t in texts))
    run(
        2,
        [
            "--init_from=model",
            "--data=ranked.jsonl",
            "--max_iters=1",
            "--batch_size=4",
            "--eval_stories=2",
            "--max_new_tokens=12",
            "--kl_batch_size=4",
            "--learning_rate=0",
            "--dtype=bfloat16",
            f"--save_dtype={save_dtype}",
            "--out_dir=out",
        ],
    )
    dtype = getattr(torch, save_dtype or "float32")
    weights = torch.load("out/best.pt", weights_only=True)["model"]
    assert {weight.dtype for weight in weights.values()} == {dtype}
    loaded, exported = (
        checkpoint.load("out/best.pt"),
        checkpoint.load("out/model.bin"),
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype).float()), name
        assert torch.equal(exported.state_dict()[name], weight.to(dtype).float()), name


# --- Llama 3's tokenizer -------------------------------------------------------------------------


@pytest.fixture
def llama3(tmp_path) -> str:
    """A tiktoken file of the bytes and a few merges, in the form of Llama 3's tokenizer.model."""
    pieces = [bytes([i]) for i in range(256)] + [
        b"th",
        b"the",
        b" the",
        b"\xc3\xa9",
        b"in",
        b"ing",
        b"\n\n",
    ]
    lines = [base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return str(tmp_path / "tokenizer.model")


def test_llama_3s_tokenizer(llama3, tmp_path):
    llama = Tokenizer(llama3)
    assert (llama.kind, llama.vocab_size, llama.bos_id, llama.eos_id) == (
        "tiktoken",
        263 + 256,
        263,
        264,
    )
    assert llama.encode("the thing", bos=True, eos=True) == [263, 257, 32, 256, 261, 264]
    for text in ("the caf\u00e9\n\nsinging 12345 <|begin_of_text|>", "", " the"):
        assert llama.decode(llama.encode(text, bos=True, eos=True)) == text
        assert max(llama.encode(text), default=0) < 263  # no text can spell a special token
    assert llama.encode_after("a", "\nb") == llama.encode("\nb")
    os.makedirs(tmp_path / "copy")
    copy_tokenizer(llama, str(tmp_path / "copy"))
    copied = sorted(os.listdir(tmp_path / "copy"))  # and no tokenizer.bin: run.c reads no such
    assert copied == ["tokenizer.model", "tokenizer.model.sha256"]


def test_a_llama_3_folder_tells_stories(llama3, tmp_path):
    folder = meta_folder(
        tmp_path / "meta", tiny(tied=False, vocab_size=519, rope_theta=500_000.0), 2, llama3=True
    )
    words = [
        sys.executable,
        os.path.join(ROOT, "sample.py"),
        f"--checkpoint={folder}",
        "--max_new_tokens=20",
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | ONE_THREAD
    )  # its tokenizer is one level up
    assert done.returncode == 0, done.stderr


# --- .pt and .bin ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "model.bin"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back(tmp_path, name, tied):
    model, path = tiny(tied), str(tmp_path / name)
    if name == "model.pt":
        model.eos_ids = (2,)
        checkpoint.save_pt(path, model, 7, {"note": "kept"}, win_rate=0.5)
    else:
        save_llama2c(path, model)
    file, loaded = checkpoint.open_weights(path), checkpoint.load(path)
    assert same_weights(loaded, model) and loaded.tied == file.tied == tied
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert (loaded.eos_id, file.step) == ((2, 7) if name == "model.pt" else (1, 0))
    assert file.config == ({"note": "kept", "eos_id": 2} if name == "model.pt" else {})
    hashes = {"model.bin.sha256"} if name == "model.bin" else set()
    assert {path.name for path in tmp_path.iterdir()} == {name} | hashes  # and nothing temporary


def test_llama2c_checkpoints_load_with_their_prefix_and_entries(tmp_path):
    model, path = tiny(), str(tmp_path / "stories.pt")
    args = dataclasses.asdict(model.args)
    del args["rope_theta"]
    weights = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save(
        {"model": weights, "model_args": args, "iter_num": 5, "config": {"dataset": "tinystories"}},
        path,
    )
    assert same_weights(checkpoint.load(path), model) and checkpoint.load(path).eos_id == 1


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_export_twice_gives_the_same_bytes_and_leaves_the_model_alone(tmp_path, version, tied):
    model = tiny(tied)
    before, args = (
        {k: v.clone() for k, v in model.state_dict().items()},
        dataclasses.asdict(model.args),
    )
    for name in ("a.bin", "b.bin"):
        save_llama2c(str(tmp_path / name), model, version)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert dataclasses.asdict(model.args) == args
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = checkpoint.load(str(tmp_path / "a.bin"))
    if version < 2:
        assert same_weights(back, model)
    else:
        for a, b in zip(back.parameters(), model.parameters(), strict=True):
            if b.dim() == 1:
                assert torch.equal(a, b)
                continue
            scales = b.detach().reshape(-1, 16).abs().amax(1, keepdim=True) / 127
            assert ((a - b).reshape(-1, 16).abs() <= scales * 0.5001).all()


def test_a_group_size_that_does_not_divide_a_row_is_refused(tmp_path):
    assert largest_group_size(tiny().args) == 16  # dim 32, hidden_dim 48
    with pytest.raises(ValueError, match="--group_size=32 does not divide hidden_dim 48; 16 fits"):
        save_llama2c(str(tmp_path / "m.bin"), tiny(), 2, group_size=32)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_by_name(tmp_path):
    for name in ("model.pt", "model.bin"):
        path = str(tmp_path / name)
        (checkpoint.save_pt(path, tiny()) if name == "model.pt" else save_llama2c(path, tiny()))
        whole = open(path, "rb").read()
        for damaged in (b"", whole[:20], whole[: len(whole) // 2], b"<html>not found</html>" * 99):
            open(path, "wb").write(damaged)
            with pytest.raises(ValueError, match=name):
                checkpoint.load(path)


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
            checkpoint.load(path)


def test_bit_flips_load_or_are_refused_by_name(tmp_path):
    """A flipped bit of a weight cannot be told from a weight; all else is refused, in words."""
    model, random = tiny(), np.random.default_rng(0)
    for name in ("model.pt", "model.bin"):
        path = str(tmp_path / name)
        checkpoint.save_pt(path, model) if name == "model.pt" else save_llama2c(path, model)
        with open(path, "rb") as f:
            whole = f.read()
        for _ in range(150):
            damaged, position = bytearray(whole), int(random.integers(len(whole)))
            position = position % 256 if random.random() < 0.5 else position
            damaged[position] ^= 1 << int(random.integers(8))
            with open(path, "wb") as f:
                f.write(damaged)
            try:
                checkpoint.load(path)
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
        checkpoint.load(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = str(tmp_path / "evil.pt")
    torch.save({"model": {}, "model_args": {}, "config": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt: not loaded"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()
