"""tokenizer.json: read as it is written, or refused in words; equal to `tokenizers` where it is
installed.
"""

import json
import os
import random

import pytest
import torch
from helpers import plain_tiny, real_chat_model
from test_checkpoint import hf_folder

import sample
import spo_train
from spo import checkpoint, generate
from spo.bpe import LETTERS, JsonTokenizer
from spo.tokenizer import Tokenizer, load_tokenizer

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "use_regex": True,
    "trim_offsets": True,
}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
SMOLLM = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
LLAMA = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]}


LOOSE = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def write_json(folder, merges: list[str], bos: bool = False, **changes) -> str:
    """A tokenizer of 3 special tokens (ids 0 to 2), 256 bytes and the merges."""
    special = ["<|end|>", "<|start|>", "<|turn|>"]
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {letter: 3 + byte for byte, letter in enumerate(LETTERS)}
    for merge in merges:
        vocab[merge.replace(" ", "", 1)] = len(vocab)
    content = {
        "added_tokens": [
            {"id": i, "content": c, "special": True} | LOOSE for i, c in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": SMOLLM,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": False},
    }
    if bos:
        start = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
        sequences = [{"Sequence": {"id": "AB"[i], "type_id": i}} for i in range(2)]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, sequences[0]],
            "pair": sequences,
            "special_tokens": {
                "<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}
            },
        }
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    config = {"eos_token": "<|end|>", "bos_token": {"content": "<|start|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


MERGES = ["t h", "th e", "Ġ the", "o w", "ow l", "Ġ owl", "1 2"]


def test_merges_by_hand(tmp_path):
    """The pair that was learned first is joined first; digits are apart, a space begins a word."""
    tokenizer = JsonTokenizer(write_json(tmp_path, MERGES))
    names = {number: text for text, number in tokenizer.vocab.items()}

    def pieces(text):
        return [names[i] for i in tokenizer.encode(text)]

    assert pieces("the owl") == ["the", "Ġowl"]
    assert pieces("owl the12") == ["owl", "Ġthe", "1", "2"]  # "1 2" is a merge, and never applies
    assert pieces("tthe") == ["t", "the"]
    assert pieces("é\n") == ["Ã", "©", "Ċ"]
    assert pieces("<|end|>") == list("<|end|>")  # letters: a text cannot spell a special token
    for text in ("the owl sang 12 songs\n\n", "\u00e9\u4f60\u597d \U0001f989", " a  b\t", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, *tokenizer.encode("owl"), 1]) == "owl"
    assert (tokenizer.eos_id(), tokenizer.vocab_size()) == (0, 3 + 256 + len(MERGES))


def test_bos_only_where_the_models_own_tokenizer_puts_it(tmp_path):
    without = Tokenizer(write_json(tmp_path / "a", MERGES))
    with_bos = Tokenizer(write_json(tmp_path / "b", MERGES, bos=True))
    assert with_bos.encode("the", bos=True) == [1, *without.encode("the", bos=True)]
    assert not without.adds_bos and with_bos.adds_bos and without.story_end_id == 0


def test_a_whole_piece_is_not_merged_where_that_is_said(tmp_path):
    """As Llama 3's: "owl" is a piece, though no merge leads to it."""
    path = write_json(tmp_path, ["t h"])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["owl"] = 400
    for ignore, ids in ((True, [400]), (False, [3 + ord(c) for c in "owl"])):
        content["model"]["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert JsonTokenizer(path).encode("owl") == ids


def test_added_tokens_that_are_not_special_are_found_in_a_text(tmp_path):
    path = write_json(tmp_path, MERGES)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 500, "content": "Lily", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = JsonTokenizer(path)
    ids = tokenizer.encode("the Lily owl")
    assert 500 in ids and tokenizer.decode(ids) == "the Lily owl"
    content["added_tokens"][-1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the added token 'Lily' with 'lstrip' is not known"):
        JsonTokenizer(path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer .*NFC.* is not known"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a model of type 'Unigram'"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "a pre-tokenizer 'Metaspace'"),
        ({"pre_tokenizer": SPLIT | {"behavior": "MergedWithNext"}}, "Split's behavior"),
        ({"post_processor": {"type": "BertProcessing"}}, "a post_processor 'BertProcessing'"),
        ({"model": {}}, "no tokenizer.json of a byte-level BPE: KeyError"),
        ({"pre_tokenizer": DIGITS}, "its pre_tokenizer has no stage ByteLevel"),
        ({"pre_tokenizer": None}, "its pre_tokenizer has no stage ByteLevel"),
        ({"model": {"vocab": {}, "merges": [], "unk_token": "?"}}, "unk_token '.' is not known"),
    ],
)
def test_what_is_not_known_is_refused_in_words(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"tokenizer.json: {message}"):
        Tokenizer(write_json(tmp_path, MERGES, **changes))


def test_byte_fallback_and_ends_after_a_text_are_refused(tmp_path):
    path = write_json(tmp_path, MERGES)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="byte_fallback True is not known"):
        Tokenizer(path)
    single = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]
    after = {"type": "TemplateProcessing", "single": single}
    with pytest.raises(ValueError, match="a post_processor that puts after a text"):
        Tokenizer(write_json(tmp_path, MERGES, post_processor=after))


# The bytes that HuggingFaceTB/SmolLM2-135M-Instruct's vocabulary lacks.
LACKING = [4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)]


def lacking_json(folder) -> str:
    path = write_json(folder, MERGES)
    with open(path, encoding="utf-8") as f:
        content = json.load(f)
    for byte in LACKING:
        del content["model"]["vocab"][LETTERS[byte]]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f)
    return path


def test_bytes_that_a_vocabulary_lacks_are_dropped_and_said_once(tmp_path, capsys):
    """The ids are tokenizers 0.23.3's: Tokenizer.from_file(path).encode(text).ids."""
    path = lacking_json(tmp_path)
    texts = {
        "the owl": [260, 264],
        "t\x04he\x06 owl": [119, 107, 104, 264],
        "\U00040000a": [131, 131, 131, 100],
        " \x1d\n\x13": [35, 13],
        "\x04": [],
    }
    tokenizer = Tokenizer(path)
    assert {text: tokenizer.encode(text) for text in texts} == texts
    Tokenizer(path)
    said = "its vocabulary lacks 21 of the 256 bytes; they are left out of texts"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.slow
def test_the_real_smollm2_is_read_as_tokenizers_reads_it():
    """On 1,000 texts of many scripts, control characters and unassigned planes."""
    tokenizers = pytest.importorskip("tokenizers")
    path = os.path.join(real_chat_model(), "tokenizer.json")
    theirs, ours = tokenizers.Tokenizer.from_file(path), JsonTokenizer(path)
    rng = random.Random(5)
    planes = [chr(rng.randrange(0xE000, 0x110000)) for _ in range(200)]
    noise = [*map(chr, range(0x250)), *planes]
    texts = random_texts(500, 4)
    texts += ["".join(rng.choices(noise, k=rng.randrange(1, 120))) for _ in range(500)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.bytes_lacking == len(LACKING)


# --- a model of SmolLM2's shape ------------------------------------------------------------------


@pytest.fixture
def smol(tmp_path, monkeypatch):
    """9 heads on 3, tied, theta 100,000, tokenizer.json without BOS, a vocabulary padded to 320."""
    monkeypatch.chdir(tmp_path)
    shape = {"dim": 36, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 320, "hidden_dim": 48}
    model = plain_tiny(**shape, rope_theta=100000.0, max_seq_len=64)
    hf_folder(tmp_path / "smol", model, eos_token_id=0)
    write_json(tmp_path / "smol", MERGES)
    return tmp_path / "smol"


def test_a_smollm_trains_samples_and_is_exported(smol, capsys):
    texts = [["the owl sang 12 songs.", "the owl", "an owl owl owl", "12 12 12"] for _ in range(8)]
    with open("ranked.jsonl", "w") as f:
        for group in texts:
            f.write(json.dumps({"prompt": "the", "responses": group, "ranking": [0, 1, 2, 3]}))
            f.write("\n")
    flags = ["--init_from=smol", "--data=ranked.jsonl", "--max_iters=2", "--batch_size=4"]
    flags += ["--max_new_tokens=12"]
    spo_train.main(["--loss=spo_rank", *flags])
    captured = capsys.readouterr()
    assert "tokenizer: smol/tokenizer.json" in captured.err
    assert "smol has 54 more embeddings than smol/tokenizer.json has pieces" in captured.err
    printed = captured.out
    assert "left out: out/model.bin: run.c knows theta 10000 only" in printed
    sample.main(["--checkpoint=out/ckpt.pt", "--prompt=the owl", "--max_new_tokens=8"])
    assert capsys.readouterr().out.startswith("the owl")
    with pytest.raises(ValueError, match="an empty prompt, and the model's tokenizer puts no BOS"):
        sample.main(["--checkpoint=out/ckpt.pt"])
    with open("empty.jsonl", "w") as f:
        f.write(json.dumps({"responses": texts[0], "ranking": [0, 1, 2, 3]}) + "\n")
    with pytest.raises(ValueError, match="an empty prompt, and the tokenizer puts no BOS before"):
        spo_train.main(["--loss=spo_rank", *flags, "--data=empty.jsonl"])


def test_text_without_bos_is_trained_from_its_second_token(smol):
    with open("text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": f"the owl sang {i} songs"}) + "\n" for i in range(8))
    flags = ["--init_from=smol", "--data=text.jsonl", "--max_iters=2", "--batch_size=4"]
    spo_train.main(["--loss=sft", *flags, "--eval_stories=0"])
    assert checkpoint.open_weights("out/ckpt.pt").step == 2


# --- against `tokenizers` and transformers -------------------------------------------------------

SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyz \u00e9\u00fc\u00f1'.,!?\"-",
    "cyrillic": "\u0430\u0431\u0432\u0433\u0434\u0435\u0436\u0437\u0438\u043a\u043b\u043c\u043d ,.",
    "arabic": "\u0627\u0628\u062a\u062b\u062c\u062d\u062e\u062f\u0660\u0661\u0662 \u060c",
    "chinese": "\u4f60\u597d\u4e16\u754c\u6545\u4e8b\u3002\uff0c\u72ac",
    "signs": "0123456789 \n\t  \U0001f989\u2028{}<>|_=+/\\'s're \u00b2\u00bd\u0967\u2167",
}


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        letters = list(SCRIPTS.values())[i % len(SCRIPTS)]
        texts.append("".join(rng.choice(letters) for _ in range(rng.randrange(1, 120))))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("pre_tokenizer", [SMOLLM, LLAMA, BYTE_LEVEL | {"add_prefix_space": True}])
def test_the_ids_are_those_of_tokenizers(tmp_path, pre_tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    theirs = tokenizers.Tokenizer(models.BPE())
    described = json.dumps(pre_tokenizer)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    content = json.loads(theirs.to_str()) | {"pre_tokenizer": json.loads(described)}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = random_texts(3000, 1)
    theirs.train_from_iterator(words, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = JsonTokenizer(str(tmp_path / "tokenizer.json"))
    for text in [*random_texts(1000, 2), *words[:200]]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text or pre_tokenizer.get("add_prefix_space")


@pytest.mark.slow
def test_transformers_tells_the_same_story(smol):
    transformers = pytest.importorskip("transformers")
    (smol / "model-00001-of-00001.safetensors").rename(smol / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("smol", dtype=torch.float32)
    their_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file="smol/tokenizer.json")
    model = checkpoint.load("smol")
    tokenizer = load_tokenizer("", "smol", model)
    ids = their_tokenizer("the owl", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("the owl", bos=True)
    with torch.no_grad():
        logits = theirs(ids).logits[..., : tokenizer.vocab_size]
        assert torch.allclose(logits, model(ids)[..., : tokenizer.vocab_size], atol=1e-4)
    greedy = generate.generate(model, ids, 20, temperature=0, stop_ids=())
    told = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    pieces = [i for i in told[0, ids.shape[1] :].tolist()]
    same = min(len(pieces), next((k for k, i in enumerate(pieces) if i >= 266), len(pieces)))
    assert greedy[0][:same] == pieces[:same]
