"""The exported tokenizer.json has sentencepiece's ids, and transformers tells our story."""

import itertools
import json
import os
import re

import pytest
import torch
from helpers import tiny

import export
from spo import checkpoint, generate
from spo.card import model_card
from spo.hf_tokenizer import tokenizer_json
from spo.tokenizer import Tokenizer

TEXTS = [
    'Lily  saw a dog.\n\nHe said, "Hi!"',
    " leading and trailing ",
    "caf\u00e9 \U0001f600 \u4f60\u597d",
    "a   b\tc",
    "\n\n\n",
    "1234 and 5",
    "",
]


def ids_of(content: dict, text: str) -> list[int]:
    """A slow reader of such a file: normalize, letters, the best merge again and again, bytes."""
    for step in content["normalizer"]["normalizers"]:
        if step["type"] == "Prepend":
            text = step["prepend"] + text if text else text
        elif "Regex" in step["pattern"]:
            text = re.sub(step["pattern"]["Regex"], step["content"], text)
        else:
            text = text.replace(step["pattern"]["String"], step["content"])
    model = content["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    parts = list(text)
    while True:
        found = [(ranks.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(parts))]
        if not found or min(found)[0] == 10**9:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        if part in model["vocab"]:
            ids.append(model["vocab"][part])
        else:
            ids += [model["vocab"][f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def texts_of(folder: str | None) -> list[str]:
    if not folder:
        return TEXTS
    with open(f"{folder}/tinystories_valid.jsonl", encoding="utf-8") as f:
        return TEXTS + [json.loads(line)["text"] for line in f][:60]


def test_the_ids_are_sentencepieces(tokenizer):
    content = tokenizer_json(tokenizer)
    for text in texts_of(os.environ.get("SPO_DATA")):
        assert ids_of(content, text) == tokenizer.encode(text), text


@pytest.mark.parametrize("name", ["tok512.model", "tokenizer.model"])
def test_the_ids_of_published_tokenizers(spo_data, name):
    tokenizer = Tokenizer(f"{spo_data}/{name}")
    content = tokenizer_json(tokenizer)
    for text in texts_of(spo_data)[:20]:
        assert ids_of(content, text[:400]) == tokenizer.encode(text[:400]), text


@pytest.fixture
def exported(tmp_path, tokenizer):
    checkpoint.save_pt(str(tmp_path / "m.pt"), tiny(vocab_size=512))
    words = [f"--checkpoint={tmp_path / 'm.pt'}", f"--tokenizer={tokenizer.path}", "--version=-1"]
    export.main([str(tmp_path / "hf"), *words])
    return tmp_path / "hf"


def test_a_folder_says_what_ends_and_what_begins_a_text(exported):
    config, generation, names = (
        json.loads((exported / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["eos_token_id"] == generation["eos_token_id"] == 1
    assert names["add_bos_token"] and (names["bos_token"], names["eos_token"]) == ("<s>", "<s>")
    modes = {path.name: oct(path.stat().st_mode)[-3:] for path in exported.iterdir()}
    assert set(modes.values()) == {"644"}, modes


def test_a_card_says_what_the_checkpoint_knows_and_no_more(workshop, tmp_path):
    workshop("dpo_rank", "--max_iters=4", "--learning_rate=1e-2")
    export.main(["hf", "--checkpoint=out/best.pt", "--version=-1"])
    card = (tmp_path / "hf/README.md").read_text()
    numbers = checkpoint.open_weights("out/best.pt").evaluation
    assert "- aligned from: start.pt" in card and "- objective: dpo_rank(beta 0.01), " in card
    assert f"{numbers['win_rate']:.1%} [{numbers['low']:.1%}, {numbers['high']:.1%}]" in card
    assert "judge offline" in card and "arXiv 2405.00747" in card
    export.main(["plain", "--checkpoint=start.pt", "--version=-1"])
    plain = (tmp_path / "plain/README.md").read_text()
    assert "win-rate" not in plain and "objective" not in plain and "SHA-256" in plain
    (tmp_path / "hf/README.md").write_text("mine")
    export.main(["hf", "--checkpoint=out/best.pt", "--version=-1"])
    assert (tmp_path / "hf/README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "loss,flags,objective",
    [
        ("cdpo", ["--label_smoothing=0.2"], "cdpo(beta 0.1, label_smoothing 0.2)"),
        ("ipo", ["--norm=mean"], "ipo(tau 0.1, norm mean)"),
        ("cpo", ["--nll=mean", "--alpha=0.5"], "cpo(beta 0.1, alpha 0.5, nll mean)"),
        ("spo", ["--beta=0.3"], "spo(alpha 0.001, gamma 0.01) + 0.3 * global_kl"),
    ],
)
def test_a_card_names_everything_that_the_loss_was_tuned_with(
    workshop, tmp_path, loss, flags, objective
):
    workshop(loss, *flags, "--max_iters=1", "--eval_stories=0")
    export.main(["hf", "--checkpoint=out/ckpt.pt", "--version=-1"])
    card = (tmp_path / "hf/README.md").read_text()
    assert f"- objective: {objective}, 1 steps" in card
    assert card_of({"loss": "hinge", "delta": 1.0}, 3).count("- objective: hinge, 3 steps") == 1


def card_of(config: dict, step: int) -> str:
    return model_card("m", config, step, {}, "0")


def test_a_card_of_step_0_says_that_nothing_was_learned():
    said = "These are the weights that the run began with."
    assert said in card_of({"loss": "dpo"}, 0) and said not in card_of({"loss": "dpo"}, 8)
    assert said not in card_of({}, 0)  # of no run of ours


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.pth"])
def test_names_of_other_formats_are_refused(exported, name):
    with pytest.raises(ValueError, match=f"{name}: is .*--version=-1"):
        export.main([name, f"--hf={exported}"])


@pytest.mark.slow
def test_transformers_tells_the_same_greedy_story(exported, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for text in texts_of(os.environ.get("SPO_DATA")):
        assert their_tokenizer(text).input_ids == tokenizer.encode(text, bos=True), text
    ids = their_tokenizer("the owl", return_tensors="pt").input_ids
    told = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0].tolist()
    model = checkpoint.load(str(exported))
    ours = generate.generate(model, ids, 30, temperature=0, stop_ids=model.eos_ids)
    assert ids[0].tolist() + ours[0] == told
