"""Model folders as people have them: what a file says is read, or refused in words."""

import json
import math
import os
import shutil

import pytest
import torch
from helpers import numpy_logits, plain_tiny, same_weights
from safetensors.torch import load_file, save_file
from test_checkpoint import hf_folder, meta_folder

import export
import sample
from model import ModelArgs, rope_tables
from spo import checkpoint, generate
from spo.tokenizer import Tokenizer, load_tokenizer, tokenizer_path

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_index(folder, places: dict[str, str], stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))


# --- which files are the model -------------------------------------------------------------------


def test_only_what_the_index_names_is_read(tmp_path):
    """A third of an older save lies beside the two parts that the index names."""
    model = plain_tiny(tied=False)
    folder = tmp_path / "m"
    hf_folder(folder, model, files=2)
    places = {}
    for part in sorted(folder.glob("*.safetensors")):
        places |= dict.fromkeys(load_file(part), part.name)
    write_index(folder, places)
    old = {name: torch.zeros(tensor.shape) for name, tensor in load_file(part).items()}
    save_file(old, folder / "model-00003-of-00003.safetensors")
    assert same_weights(checkpoint.load(str(folder)), model)


def test_model_safetensors_is_the_model_whatever_lies_beside_it(tmp_path):
    model = plain_tiny(tied=False)
    folder = tmp_path / "m"
    hf_folder(folder, model)
    (part,) = folder.glob("*.safetensors")
    wrong = {name: torch.zeros(tensor.shape) for name, tensor in load_file(part).items()}
    part.rename(folder / "model.safetensors")
    save_file(wrong, folder / "zz.safetensors")
    torch.save(wrong, folder / "pytorch_model.bin")
    assert same_weights(checkpoint.load(str(folder)), model)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_part_that_has_not_arrived_is_named(tmp_path, kind):
    folder = tmp_path / "m"
    hf_folder(folder, plain_tiny(), files=2, kind=kind)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    first, second = f"{stem}-00001-of-00002.{kind}", f"{stem}-00002-of-00002.{kind}"
    os.remove(folder / second)
    with pytest.raises(ValueError, match="has 1 of 2 parts and no index"):
        checkpoint.load(str(folder))
    write_index(folder, {"a": first, "b": second}, f"{stem}.{kind}")
    with pytest.raises(ValueError, match=f"names {second}, which is not there"):
        checkpoint.load(str(folder))
    write_index(folder, {"a": "../../elsewhere"}, f"{stem}.{kind}")
    with pytest.raises(ValueError, match="is no file of this folder"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize("extra", ["layers.0.self_attn.q_proj.weight.SCB", "lora_A", "q_proj.bias"])
def test_scales_adapters_and_biases_are_refused(tmp_path, extra):
    folder = tmp_path / "m"
    hf_folder(folder, plain_tiny())
    (part,) = folder.glob("*.safetensors")
    save_file(load_file(part) | {extra: torch.ones(3)}, part)
    with pytest.raises(ValueError, match=f"{extra} is no part of a Llama in floats"):
        checkpoint.load(str(folder))


def test_old_rotary_tables_in_the_files_are_passed_over(tmp_path):
    folder = tmp_path / "m"
    model = plain_tiny()
    hf_folder(folder, model)
    (part,) = folder.glob("*.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(part) | table, part)
    assert same_weights(checkpoint.load(str(folder)), model)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = tmp_path / "m"
    hf_folder(folder, plain_tiny())
    (part,) = folder.glob("*.safetensors")
    tensors = load_file(part)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, part)
    with pytest.raises(ValueError, match=f"{name} is of I8; floats of 16 to 64 bits"):
        checkpoint.load(str(folder))


def test_a_file_of_torch_before_1_6_is_read(tmp_path):
    folder, model = tmp_path / "m", plain_tiny(tied=False)
    hf_folder(folder, model, kind="bin")
    (part,) = folder.glob("*.bin")
    tensors = torch.load(part, weights_only=True)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    os.remove(part)
    assert same_weights(checkpoint.load(str(folder)), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_so(tmp_path, name):
    folder = tmp_path / "m"
    hf_folder(folder, plain_tiny())
    for part in folder.glob("*.safetensors"):
        os.remove(part)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (folder / name).write_text(pointer * 2)
    with pytest.raises(ValueError, match=f"{name}: is a Git LFS pointer"):
        checkpoint.load(str(folder))


def test_a_terminator_that_a_file_names_comes_before_the_default(tmp_path):
    """config.json, generation_config.json, tokenizer_config.json; then 2, as in transformers."""
    folder = tmp_path / "m"
    hf_folder(folder, plain_tiny())
    config = json.loads((folder / "config.json").read_text())
    named = dict(config, eos_token_id=9)
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint.load(str(folder)).eos_ids == (2,)
    first = {"eos_token": "<end>", "added_tokens_decoder": {"0": {"content": "<end>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(first))
    assert checkpoint.load(str(folder)).eos_ids == (0,)
    by_name = {"eos_token": {"content": "<end>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(by_name))
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 7, "content": "<end>"}]}')
    assert checkpoint.load(str(folder)).eos_ids == (7,)
    (folder / "tokenizer.json").unlink()
    here = by_name | {"added_tokens_decoder": {"6": {"content": "<end>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(here))
    assert checkpoint.load(str(folder)).eos_ids == (6,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert checkpoint.load(str(folder)).eos_ids == (1, 5)
    (folder / "config.json").write_text(json.dumps(named))
    assert checkpoint.load(str(folder)).eos_ids == (9, 1, 5)


def test_the_terminator_of_metas_folders_is_llama_2s_or_3s(tmp_path):
    """Their files name none: </s> is 2, <|end_of_text|> is 128001."""
    for size, eos_ids in ((512, (2,)), (128_256, (128_001,))):
        model = plain_tiny(
            tied=False, dim=8, n_heads=1, n_kv_heads=1, hidden_dim=8, vocab_size=size
        )
        path = meta_folder(tmp_path / str(size), model)
        assert checkpoint.open_weights(path).eos_ids == eos_ids


def test_a_mark_before_config_json_and_nulls_in_it_are_read(tmp_path):
    folder, model = tmp_path / "m", plain_tiny()
    nulls = {"head_dim": None, "rope_scaling": None, "sliding_window": None, "eos_token_id": None}
    hf_folder(folder, model, **nulls)
    with pytest.raises(ValueError, match="config.json has no eos_token_id"):
        checkpoint.load(str(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    assert checkpoint.load(str(folder)).eos_ids == (5,)


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": False}])
def test_a_classifier_that_is_nowhere_is_named(tmp_path, said):
    """Untied, as config.json says or leaves open, and no lm_head: transformers draws one."""
    folder, model = tmp_path / "m", plain_tiny(tied=True)
    hf_folder(folder, model)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(ValueError, match="has no lm_head.weight"):
        checkpoint.load(str(folder))


def test_tied_with_the_classifier_in_the_file_as_well(tmp_path):
    folder, model = tmp_path / "m", plain_tiny(tied=True)
    hf_folder(folder, model)
    (part,) = folder.glob("*.safetensors")
    tensors = load_file(part)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, part)
    assert same_weights(checkpoint.load(str(folder)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(tmp_path, dtype):
    folder, model = tmp_path / "m", plain_tiny(tied=False)
    hf_folder(folder, model)
    (part,) = folder.glob("*.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(part).items()}, part)
    loaded = checkpoint.load(str(folder)).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight.to(dtype).float()), name


def test_a_folder_of_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="neither Meta's folder .* nor Hugging Face's"):
        checkpoint.load(str(tmp_path))


# --- rotary embeddings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_what_scales_nothing_is_read(tmp_path, config):
    model = plain_tiny()
    path = hf_folder(tmp_path / "m", model, **config)
    assert checkpoint.load(path).args.rope_scaling is None
    assert same_weights(checkpoint.load(path), model)


def test_the_theta_of_transformers_5_is_read(tmp_path):
    """It writes rope_parameters in place of rope_theta and rope_scaling."""
    model = plain_tiny(rope_theta=500000.0)
    parameters = {"rope_type": "default", "rope_theta": 500000.0}
    path = hf_folder(tmp_path / "m", model, rope_parameters=parameters)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config.pop("rope_theta", None)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    loaded, tokens = checkpoint.load(path), torch.tensor([[1, 5, 9, 2, 8]])
    assert loaded.args.rope_theta == 500000.0
    assert torch.allclose(loaded(tokens), model(tokens), atol=1e-5)


def test_llama_3_1s_scaling_by_hand():
    """Pair i turns theta^(-2i/d) radians a token; in 64 tokens 10.2, 3.2, 1.02 and 0.32 times."""
    args = ModelArgs(dim=8, n_heads=1, max_seq_len=3, vocab_size=4, rope_scaling=LLAMA3)
    cos, _ = rope_tables(args)
    expected = []
    for i in range(4):
        frequency = 10000.0 ** (-i / 4)
        wavelength = 2 * math.pi / frequency
        if wavelength > 64 / 1.0:
            frequency /= 8
        elif wavelength >= 64 / 4.0:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    for position in range(3):
        turned = [math.cos(position * frequency) for frequency in expected]
        assert cos[position].tolist() == pytest.approx(turned, rel=1e-5)
    assert expected[0] == 1.0 and expected[3] == pytest.approx(10000 ** (-3 / 4) / 8)


def test_a_scaled_model_comes_back_from_every_format_that_can_hold_it(tmp_path):
    model = plain_tiny(rope_theta=500000.0, rope_scaling=LLAMA3)
    tokens = torch.randint(2, 64, (2, 60))
    path = hf_folder(tmp_path / "m", model, rope_scaling={"rope_type": "llama3"} | LLAMA3)
    loaded = checkpoint.load(path)
    assert loaded.args.rope_scaling == LLAMA3
    with torch.no_grad():
        assert torch.allclose(loaded(tokens), model(tokens), atol=1e-4)
    checkpoint.save_pt(str(tmp_path / "m.pt"), loaded)
    export.main([str(tmp_path / "hf"), f"--checkpoint={tmp_path / 'm.pt'}", "--version=-1"])
    assert checkpoint.load(str(tmp_path / "hf")).args == loaded.args
    for version in (0, 1, 2):
        with pytest.raises(ValueError, match="run.c knows theta 10000 only"):
            export.save_llama2c(str(tmp_path / "m.bin"), loaded, version)
    assert not (tmp_path / "m.bin").exists()


@pytest.mark.slow
def test_transformers_scales_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = plain_tiny(rope_theta=500000.0, rope_scaling=LLAMA3)
    path = hf_folder(tmp_path / "m", model, rope_scaling={"rope_type": "llama3"} | LLAMA3)
    (tmp_path / "m/model-00001-of-00001.safetensors").rename(tmp_path / "m/model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.randint(2, 64, (2, 60))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, model(tokens), atol=1e-4)


def test_another_norm_eps_is_warned_of_and_read_as_run_c_computes(tmp_path, capsys):
    model = plain_tiny(norm_eps=1e-3)
    checkpoint.save_pt(str(tmp_path / "m.pt"), model)
    export.main([str(tmp_path / "m.bin"), f"--checkpoint={tmp_path / 'm.pt'}"])
    assert "run.c computes with a norm_eps of 1e-5, this model has 0.001" in capsys.readouterr().out
    path = str(tmp_path / "m.bin")
    with torch.no_grad():
        ours = checkpoint.load(path)(torch.tensor([[1, 5, 9]]))[0, -1].double().numpy()
    assert ours == pytest.approx(numpy_logits(path, [1, 5, 9]), abs=1e-4)


def test_a_run_of_a_model_that_run_c_lacks_says_so_and_leaves_model_bin_out(workshop, capsys):
    model = plain_tiny(vocab_size=512, rope_theta=500.0)
    checkpoint.save_pt("theta.pt", model)
    workshop("dpo_rank", "--init_from=theta.pt", "--max_iters=4")
    printed = capsys.readouterr().out
    assert printed.count("left out: out/model.bin: run.c knows theta 10000 only") == 1
    assert os.path.isfile("out/best.pt") and not os.path.exists("out/model.bin")


def test_llama2cs_python_finds_no_argument_that_it_does_not_know(tmp_path):
    for theta, known in ((10000.0, True), (500.0, False)):
        checkpoint.save_pt(str(tmp_path / "m.pt"), plain_tiny(rope_theta=theta))
        args = torch.load(tmp_path / "m.pt", weights_only=True)["model_args"]
        assert ("rope_theta" not in args) == known and "rope_scaling" not in args


def test_metas_folders_of_llama_3_1_need_a_factor(tmp_path):
    model = plain_tiny(tied=False, rope_theta=500000.0)
    path = meta_folder(tmp_path / "m", model)
    params = json.loads((tmp_path / "m/params.json").read_text())
    del params["max_seq_len"]
    for scaled, flags, message in (
        (True, {}, "use_scaled_rope true; give --rope_factor: 8 for Llama 3.1, 32 for 3.2"),
        (False, {"rope_factor": 8.0}, "use_scaled_rope false; leave it out"),
    ):
        (tmp_path / "m/params.json").write_text(json.dumps(params | {"use_scaled_rope": scaled}))
        with pytest.raises(ValueError, match=message):
            checkpoint.open_weights(path, checkpoint.WeightsFlags(**flags))
    (tmp_path / "m/params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    flags = checkpoint.WeightsFlags(rope_factor=32.0, max_seq_len=64)
    loaded = checkpoint.load(path, flags=flags)
    scaling = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    assert loaded.args.rope_scaling == scaling and loaded.args.max_seq_len == 64
    export.main([str(tmp_path / "m.pt"), f"--meta-llama={path}", "--rope_factor=32"])
    assert checkpoint.open_weights(str(tmp_path / "m.pt")).args.rope_scaling == scaling


def test_metas_folders_have_metas_context_or_what_the_flag_says(tmp_path):
    for theta, context in ((10000.0, 4096), (500000.0, 8192)):
        path = meta_folder(tmp_path / f"{theta:g}", plain_tiny(tied=False, rope_theta=theta))
        params = json.loads((tmp_path / f"{theta:g}/params.json").read_text())
        del params["max_seq_len"]
        (tmp_path / f"{theta:g}/params.json").write_text(json.dumps(params))
        assert checkpoint.open_weights(path).args.max_seq_len == context
        shorter = checkpoint.WeightsFlags(max_seq_len=128)
        assert checkpoint.open_weights(path, shorter).args.max_seq_len == 128


@pytest.mark.parametrize("init_from", ["start.pt", "scratch"])
def test_a_factor_for_what_is_no_folder_of_metas_is_refused(workshop, init_from):
    with pytest.raises(ValueError, match="--rope_factor: "):
        workshop("sft", f"--init_from={init_from}", "--rope_factor=8", "--eval_stories=0")


# --- tokenizers and vocabularies -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A Hugging Face folder with its tokenizer."""
    (tmp_path / "up").mkdir()
    hf_folder(tmp_path / "up" / "m", plain_tiny(vocab_size=512))
    shutil.copy(tokenizer.path, tmp_path / "up" / "m" / "tokenizer.model")
    return tmp_path / "up" / "m"


def test_a_folders_tokenizer_is_in_it_or_in_original_and_never_above(folder, tokenizer):
    shutil.copy(tokenizer.path, folder.parent / "tokenizer.model")  # of another model
    assert tokenizer_path(f"{folder}/") == str(folder / "tokenizer.model")
    (folder / "original").mkdir()
    (folder / "tokenizer.model").rename(folder / "original" / "tokenizer.model")
    assert tokenizer_path(str(folder)) == str(folder / "original" / "tokenizer.model")
    os.remove(folder / "original" / "tokenizer.model")
    with pytest.raises(ValueError, match="has no tokenizer.model or tokenizer.json; give one"):
        tokenizer_path(str(folder))


def test_metas_folders_have_theirs_one_level_up(tmp_path, tokenizer):
    meta_folder(tmp_path / "7B", plain_tiny(vocab_size=512))
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
    assert tokenizer_path(str(tmp_path / "7B")) == str(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("extra", [1, 64])
def test_more_embeddings_than_pieces_are_kept_and_never_drawn(tmp_path, tokenizer, extra, capsys):
    """[PAD], or a vocabulary padded to a multiple of 64: the padding gets the largest logits."""
    model = plain_tiny(vocab_size=512 + extra, tied=False)
    with torch.no_grad():
        model.output.weight[512:] = model.output.weight[:512].mean(0)
        model.output.weight[512:] += 5 * model.output.weight[1]
    path = hf_folder(tmp_path / "m", model)
    loaded = checkpoint.load(path)
    free = generate.generate(loaded, [[1]] * 40, 20, stop_ids=(), seed=1)
    if extra == 64:
        with pytest.raises(ValueError, match="has 512 pieces, .* was trained on 576"):
            load_tokenizer(tokenizer.path, path, loaded)
        return
    assert any(i >= 512 for ids in free for i in ids)
    load_tokenizer(tokenizer.path, path, loaded)
    printed = capsys.readouterr().err
    assert f"{path} has 1 more embeddings than {tokenizer.path} has pieces" in printed
    drawn = generate.generate(loaded, [[1]] * 40, 20, stop_ids=(), seed=1)
    assert max(i for ids in drawn for i in ids) < 512
    greedy = generate.generate(loaded, [[1]], 20, temperature=0, stop_ids=())
    assert max(greedy[0]) < 512
    flags = [f"--checkpoint={path}", f"--tokenizer={tokenizer.path}", "--max_new_tokens=12"]
    sample.main(flags)
    export.main([str(tmp_path / "out"), f"--hf={path}", "--version=-1"])
    assert checkpoint.load(str(tmp_path / "out")).args.vocab_size == 513


def test_a_vocabulary_padded_to_a_multiple_of_64(tokenizer):
    """Of 500 pieces 512 embeddings; of 300, which would be another tokenizer's, none."""

    class Model:
        args = ModelArgs(dim=8, n_heads=1, vocab_size=512)
        pieces = None

    class Small(Tokenizer):
        def __init__(self, path):
            super().__init__(path)
            self.vocab_size = size

    import spo.tokenizer as module

    original = module.Tokenizer
    module.Tokenizer = Small
    try:
        for size, read in ((505, True), (460, True), (300, False), (513, False)):
            model = Model()
            if read:
                load_tokenizer(tokenizer.path, "m.pt", model)
                assert model.pieces == size
            else:
                with pytest.raises(ValueError, match="give the tokenizer that belongs to it"):
                    load_tokenizer(tokenizer.path, "m.pt", model)
    finally:
        module.Tokenizer = original


def test_every_terminator_ends_a_story(workshop, tokenizer):
    model = plain_tiny(vocab_size=512)
    model.eos_ids = (1, *range(100, 300))
    checkpoint.save_pt("many.pt", model)
    samples = generate.sample(checkpoint.load("many.pt"), [[1]] * 32, 3, 60)
    records = generate.story_records(samples, [""] * 32, tokenizer, model.eos_ids)
    assert all(record["finished"] for record in records)
    for group in samples:
        ids = group.responses[0]
        assert ids[-1] in model.eos_ids and not set(ids[:-1]) & set(model.eos_ids)
    workshop("spo_rank", "--init_from=many.pt", "--max_iters=2")
