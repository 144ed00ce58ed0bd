import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "experiments")]
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture
def spo_data():
    """The folder of real inputs: stories260K.bin, its tokenizer, TinyStories text."""
    folder = os.environ.get("SPO_DATA")
    if not folder:
        pytest.skip(
            "SPO_DATA is unset: it names a folder with stories260K.bin, tok512.model and others"
        )
    return folder
