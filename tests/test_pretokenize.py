"""Text -> tokenizer -> token files -> what sft trains on."""

import json
import os
import random

import numpy as np
import pytest

import spo_train
import tinystories_data as data
from spo import demo_stories
from spo.checkpoint import open_weights
from spo.groups import TokenWindows
from spo.tokenizer import Tokenizer

STORIES = [demo_stories.story(random.Random(seed)) for seed in range(120)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the text in three shards, as the TinyStories archive has it."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/TinyStories_all_data")
    for shard in range(3):
        records = [
            {"story": f"  {story}\n", "source": "x"}
            for story in STORIES[40 * shard : 40 * shard + 40]
        ]
        with open(f"data/TinyStories_all_data/data{shard:02d}.json", "w", encoding="utf-8") as f:
            json.dump(records, f)
    return tmp_path


def test_from_text_to_a_model_trained_on_it(folder, capsys):
    """The three commands of llama2.c's custom tokenizers, then --loss=sft on the result."""
    data.main(["train_vocab", "--vocab_size=400"])
    data.main(["pretokenize", "--vocab_size=400", "--workers=2"])
    assert sorted(os.listdir("data/tok400")) == [
        "data00.bin",
        "data00.bin.sha256",
        "data01.bin",
        "data01.bin.sha256",
        "data02.bin",
        "data02.bin.sha256",
        "tokenizer.bin",
        "tokenizer.model",
        "tokenizer.model.sha256",
    ]
    assert sorted(os.listdir("data")) == ["TinyStories_all_data", "tok400", "tok400.model"]
    tokenizer = Tokenizer("data/tok400/tokenizer.model")
    assert tokenizer.vocab_size == 400
    for shard in range(3):  # llama2.c's format: BOS before each story, uint16
        tokens = np.fromfile(f"data/tok400/data{shard:02d}.bin", np.uint16).tolist()
        assert tokens == [
            i for s in STORIES[40 * shard : 40 * shard + 40] for i in tokenizer.encode(s, bos=True)
        ]
    assert (
        "python spo_train.py --loss=sft --data=data/tok400 --init_from=scratch"
        in capsys.readouterr().out
    )
    spo_train.main(
        [
            "--loss=sft",
            "--data=data/tok400",
            "--init_from=scratch",
            "--tokenizer=data/tok400/tokenizer.model",
            "--dim=48",
            "--n_layers=1",
            "--n_heads=3",
            "--max_seq_len=64",
            "--batch_size=8",
            "--max_iters=30",
            "--learning_rate=3e-3",
            "--log_interval=1",
        ]
    )
    with open("out/log.jsonl") as f:
        losses = [json.loads(line)["loss"] for line in f]
    assert losses[0] > 5.5 and losses[-1] < 5.0  # log(400) = 5.99
    assert open_weights("out/ckpt.pt").step == 30
    with pytest.raises(
        ValueError, match="token files are text for --loss=sft; spo_rank needs groups"
    ):
        spo_train.main(
            [
                "--data=data/tok400",
                "--init_from=out/ckpt.pt",
                "--tokenizer=data/tok400/tokenizer.model",
            ]
        )


def test_windows_score_every_token_but_the_first_once(tmp_path):
    np.arange(100, 123, dtype=np.uint16).tofile(
        tmp_path / "a.bin"
    )  # 23 tokens: 5 windows of 5, 2 tokens left
    np.arange(200, 206, dtype=np.uint16).tofile(tmp_path / "b.bin")
    windows = TokenWindows(str(tmp_path), 5, vocab_size=300)
    assert len(windows) == 6
    tokens = [(windows[i].prompt, windows[i].responses[0]) for i in range(6)]
    assert tokens[0] == ([100], [101, 102, 103, 104]) and tokens[1] == ([104], [105, 106, 107, 108])
    assert sum((response for _, response in tokens[:5]), []) == list(range(101, 121))
    assert tokens[5] == ([200], [201, 202, 203, 204])
    assert len(TokenWindows(str(tmp_path / "b.bin"), 5, 300)) == 1
    with pytest.raises(ValueError, match="b.bin: holds id 204, the model has 204"):
        TokenWindows(str(tmp_path / "b.bin"), 5, 204)[0]
    with pytest.raises(ValueError, match="holds no token file of 7 tokens"):
        TokenWindows(str(tmp_path / "b.bin"), 7, 300)
    with pytest.raises(IndexError):
        windows[6]


def test_text_in_our_own_format_is_read_too(folder):
    with open("mine.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": s}) + "\n" for s in STORIES)
    data.main(["train_vocab", "--data=mine.jsonl", "--vocab_size=400"])
    data.main(["pretokenize", "--data=mine.jsonl", "--tokenizer=data/tok400.model", "--workers=1"])
    tokenizer = Tokenizer("data/tok400.model")
    tokens = np.fromfile("data/tok400/mine.bin", np.uint16).tolist()
    assert tokens == [i for s in STORIES for i in tokenizer.encode(s, bos=True)]


@pytest.mark.parametrize(
    "content,message",
    [
        ('[{"story": "a"}, {"tale": "b"}]', 'data01.json record 2: its "story" .* is missing'),
        ('[{"story": "a"}', "data01.json: not JSON"),
        ('[{"story": "\\ud800"}]', 'data01.json record 1: its "story" .* half of a surrogate'),
        ('{"story": "a"}', "data01.json: not a list of records"),
        ("[]", "data01.json: holds no stories"),
    ],
)
def test_an_error_in_a_worker_reaches_the_user_with_the_shards_name(folder, content, message):
    data.main(["train_vocab", "--vocab_size=400", "--num_shards=1"])
    with open("data/TinyStories_all_data/data01.json", "w") as f:
        f.write(content)
    with pytest.raises(ValueError, match=message):
        data.main(["pretokenize", "--vocab_size=400", "--workers=2"])
    assert "data01.bin" not in os.listdir("data/tok400")


def test_shards_that_would_be_mixed_up_are_refused(folder):
    data.main(["train_vocab", "--vocab_size=400", "--num_shards=1"])
    data.main(["pretokenize", "--vocab_size=400", "--workers=1"])
    os.remove("data/TinyStories_all_data/data02.json")
    with pytest.raises(ValueError, match="data02.bin: is of another text, and sft would read both"):
        data.main(["pretokenize", "--vocab_size=400", "--workers=1"])
    with open("data/TinyStories_all_data/data01.jsonl", "w") as f:
        f.write('{"text": "a"}\n')
    with pytest.raises(ValueError, match="data01.jsonl: .*data01.json has the same name"):
        data.main(["pretokenize", "--vocab_size=400", "--workers=1"])


def test_a_worker_that_is_killed_ends_it_with_a_hint(folder, monkeypatch):
    data.main(["train_vocab", "--vocab_size=400", "--num_shards=1"])
    monkeypatch.setattr(
        "spo.pretokenize.stories_of", lambda shard: os.kill(os.getpid(), 9)
    )  # the workers are forks
    with pytest.raises(
        ValueError, match="a worker was killed, for want of memory perhaps; try --workers=1"
    ):
        data.main(["pretokenize", "--vocab_size=400", "--workers=2"])


def test_what_is_missing_or_impossible_is_said_in_a_line(folder):
    with pytest.raises(ValueError, match="tok999.model: no such tokenizer file"):
        data.main(["pretokenize", "--vocab_size=999"])
    with pytest.raises(ValueError, match="--vocab_size=100000: sentencepiece cannot make it"):
        data.main(["train_vocab", "--vocab_size=100000"])
    assert os.listdir("data") == ["TinyStories_all_data"]
    with pytest.raises(ValueError, match="none: no .json or .jsonl file; .* download"):
        data.main(["train_vocab", "--data=none"])
    with pytest.raises(ValueError, match="--workers=0"):
        data.main(["pretokenize", "--workers=0"])
