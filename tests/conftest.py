import os
import random

# A machine with a GPU would compute in bfloat16, and not to the bit. SPO_TEST_DEVICE asks for it.
if os.environ.get("SPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from helpers import FILES, tiny, write

import spo_train
import tinystories_data as data
from losses import LOSSES
from spo import demo_stories
from spo.checkpoint import save_pt
from spo.pretokenize import train_tokenizer
from spo.tokenizer import Tokenizer

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture
def spo_data():
    """The folder of real inputs: stories260K.bin, its tokenizer, TinyStories text."""
    folder = os.environ.get("SPO_DATA")
    if not folder:
        pytest.skip("SPO_DATA is unset: it names a folder with stories260K.bin, tok512.model ...")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    stories = [demo_stories.story(random.Random(seed)) for seed in range(300)]
    (folder / "lines.txt").write_text("\n".join(stories))
    train_tokenizer(str(folder / "lines.txt"), 512, str(folder / "tokenizer"))
    return Tokenizer(str(folder / "tokenizer.model"))


@pytest.fixture
def workshop(tmp_path, tokenizer, monkeypatch):
    """A working directory with a small model, its tokenizer and 12 ranked groups of 4."""
    monkeypatch.chdir(tmp_path)
    save_pt("start.pt", tiny(vocab_size=512))
    words = "the owl found a golden key under an old bridge and sang".split()

    def text(i: int, j: int) -> str:
        return " ".join(words[(i + j * k) % len(words)] for k in range(4 + j)) + "."

    groups = [
        {"responses": [text(i, j) for j in range(4)], "ranking": [3, 0, 2, 1]} for i in range(12)
    ]
    write(tmp_path / "ranked.jsonl", *groups)
    data.main(["best_of_n", "--data=ranked.jsonl", "--out=best.jsonl"])
    data.main(["pairs", "--data=ranked.jsonl", "--out=pair.jsonl"])
    data.main(["best_of_n", "--data=ranked.jsonl", "--out=text.jsonl"])

    def run(loss: str, *flags: str) -> str:
        file = FILES[LOSSES[loss].data] if loss in LOSSES else "ranked"
        defaults = [
            "--init_from=start.pt",
            f"--tokenizer={tokenizer.path}",
            f"--data={file}.jsonl",
            "--max_iters=8",
            "--batch_size=4",
            "--eval_interval=4",
            "--eval_stories=4",
            "--max_new_tokens=16",
            "--log_interval=1",
            "--learning_rate=3e-4",
            "--warmup_iters=1",
            "--judge=offline",  # of prompts, too
            "--curves=false",  # a second each
            "--out_dir=out",
        ]
        others = {flag.split("=")[0] for flag in flags} & {"--baseline", "--judge"}
        if not others and not {"--eval_stories=0", "--init_from=scratch"} & set(flags):
            defaults.append("--eval_pool=16")
        defaults = [flag for flag in defaults if flag.split("=")[0] not in str(flags)]
        spo_train.main([f"--loss={loss}", *defaults, *flags])
        return "out"

    return run
