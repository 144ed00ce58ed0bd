"""Values that other projects' own code gave: ours equal them, whether those are installed or not.

`python tests/test_peers.py` prints the recorded values anew; it needs trl and transformers. With
them installed, `-m slow` compares the recorded values with what they compute today.
"""

import types
from unittest import mock

import pytest
import torch

if __name__ == "__main__":
    import os
    import sys

    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from helpers import plain_tiny
from test_checkpoint import hf_folder

from losses import LOSSES
from spo import checkpoint

POLICY = torch.tensor([[-12.5, -14.25], [-30.0, -21.5], [-7.75, -40.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-13.0, -13.5], [-28.0, -22.0], [-8.25, -37.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[9, 11], [24, 15], [6, 31]])

# --- losses, of TRL 1.16.0 -----------------------------------------------------------------------

TRL = {
    "dpo": (0.6571845691986552, {"beta": 0.1}),
    "ipo": (24.344786057936208, {"tau": 0.1, "norm": "mean"}),
    "dpo_robust": (0.6266290136430995, {"beta": 0.1, "label_smoothing": 0.2}),
    "cdpo": (0.6755179025319885, {"beta": 0.1, "label_smoothing": 0.2}),
    "simpo": (1.268024442004173, {"beta": 2.0, "gamma": 1.0}),
    "kto": (0.4887434546533333, {"beta": 0.1}),
}


def in_one_token(logps: torch.Tensor, most: int) -> torch.Tensor:
    """(N,) -> (N, most): log-probs of tokens whose sums these are."""
    return torch.nn.functional.pad(logps.unsqueeze(1), (0, most - 1))


def trl_stub(**more):
    """Stand for a trainer of TRL: what its loss reads of itself."""
    accelerator = mock.Mock(device="cpu")
    accelerator.gather_for_metrics = accelerator.gather = lambda x: x
    known = {"model": types.SimpleNamespace(training=True), "accelerator": accelerator}
    known |= {"aux_loss_enabled": False, "precompute_ref_logps": True, "_tp_size": 1}
    known |= {"_metrics": {"train": mock.MagicMock()}, "_total_train_tokens": 0}
    return types.SimpleNamespace(**known | more)


def of_dpo_trainer(loss_type: str, beta: float, label_smoothing: float = 0.0) -> float:
    """Return the loss of trl.DPOTrainer: its own function, given these log-probs."""
    from trl import DPOTrainer

    policy, lengths = POLICY.t().flatten(), LENGTHS.t().flatten()  # chosen, then rejected
    most = int(lengths.max())
    log_probs = in_one_token(policy, most)
    more = {"entropy": log_probs, "mean_logits": log_probs, "is_top1": log_probs > 0}
    mask = torch.arange(-1, most).unsqueeze(0) < lengths.unsqueeze(1)
    mask[:, 0] = False  # the prompt
    stub = trl_stub(
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    inputs = {"input_ids": mask.long(), "attention_mask": mask, "completion_mask": mask.long()}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = REFERENCE.t()
    outputs = types.SimpleNamespace(log_probs=log_probs, **more)
    return float(DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False))


def of_cpo_trainer(chosen, rejected, loss_type: str, **more) -> float:
    """Return the mean loss of trl's CPOTrainer, which has SimPO and the conservative sigmoid."""
    from trl.experimental.cpo import CPOTrainer

    stub = trl_stub(alpha=0.0, loss_type=loss_type, **more)
    losses, *_ = CPOTrainer.cpo_loss(stub, chosen, rejected)
    return float(losses.mean())


def of_kto_trainer(beta: float) -> float:
    """Return the loss of trl.KTOTrainer on the six responses, its KL estimate clamped at 0."""
    from trl import KTOTrainer

    labels = [True] * 3 + [False] * 3
    policy, reference = POLICY.t().flatten(), REFERENCE.t().flatten()
    log_probs = in_one_token(policy, 4)
    more = {"entropy": log_probs, "mean_logits": log_probs, "is_top1": log_probs > 0}
    stub = trl_stub(
        loss_type="kto",
        beta=beta,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: torch.tensor([-1.25], dtype=torch.float64),
    )
    mask = torch.ones(6, 5, dtype=torch.long)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": labels}
    inputs |= {"label": torch.tensor(labels), "ref_logps": reference}
    inputs["ref_KL_logps"] = torch.tensor([-2.0], dtype=torch.float64)
    outputs = types.SimpleNamespace(log_probs=log_probs, **more)
    return float(KTOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False))


def of_trl() -> dict[str, float]:
    ratios = (POLICY - REFERENCE).unbind(1)
    per_token = (POLICY / LENGTHS).unbind(1)
    return {
        "dpo": of_dpo_trainer("sigmoid", 0.1),
        "ipo": of_dpo_trainer("ipo", 0.1),
        "dpo_robust": of_dpo_trainer("robust", 0.1, 0.2),
        "cdpo": of_cpo_trainer(*ratios, "sigmoid", beta=0.1, label_smoothing=0.2),
        "simpo": of_cpo_trainer(
            *per_token, "simpo", beta=2.0, label_smoothing=0.0, simpo_gamma=1.0
        ),
        "kto": of_kto_trainer(0.1),
    }


@pytest.mark.parametrize("loss", list(TRL))
def test_losses_are_those_of_trl(loss):
    expected, numbers = TRL[loss]
    tensors = {"policy_logps": POLICY, "reference_logps": REFERENCE, "lengths": LENGTHS}
    if loss == "kto":
        numbers = numbers | {"kl_estimate": torch.tensor(0.75, dtype=torch.float64)}
    if loss in ("dpo", "dpo_robust", "cdpo", "kto"):
        tensors.pop("lengths")
    if loss == "simpo":
        tensors.pop("reference_logps")
    assert float(LOSSES[loss](**tensors, **numbers).mean()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_trl_computes_what_was_recorded():
    pytest.importorskip("trl")
    assert of_trl() == pytest.approx({loss: value for loss, (value, _) in TRL.items()}, rel=1e-6)


# --- logits, of transformers 5.24.0 --------------------------------------------------------------

TOKENS = [[1, 5, 63, 9, 40, 2, 17, 30]]
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "tied, grouped keys": {"n_kv_heads": 2},
    "untied, theta 500": {"tied": False, "rope_theta": 500.0, "n_kv_heads": 1},
    "Llama 3.1's scaling": {"rope_theta": 5e5, "rope_scaling": SCALING},
}
TRANSFORMERS = {  # logits of ids 0 to 5 after the last token
    "tied, grouped keys": [0.59536, 0.34827, -0.14149, -0.1919, -0.11134, -0.23464],
    "untied, theta 500": [0.92876, 0.36769, 0.7022, 0.08061, 0.54908, -0.0919],
    "Llama 3.1's scaling": [0.62032, 0.38665, -0.14387, -0.24139, -0.12861, -0.11293],
}


def folder_of(path, name: str) -> str:
    model = plain_tiny(**SHAPES[name])
    scaled = "rope_scaling" in SHAPES[name]
    more = {"rope_scaling": {"rope_type": "llama3"} | SCALING} if scaled else {}
    hf_folder(path, model, **more)
    (file,) = path.glob("*.safetensors")
    file.rename(path / "model.safetensors")
    return str(path)


def of_transformers(path: str) -> list[float]:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits[0, -1, :6].tolist()


@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_are_those_of_transformers(tmp_path, name):
    model = checkpoint.load(folder_of(tmp_path / "m", name))
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS))[0, -1, :6].tolist()
    assert logits == pytest.approx(TRANSFORMERS[name], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_transformers_computes_what_was_recorded(tmp_path, name):
    pytest.importorskip("transformers")
    found = of_transformers(folder_of(tmp_path / "m", name))
    assert found == pytest.approx(TRANSFORMERS[name], rel=1e-3, abs=1e-3)


if __name__ == "__main__":
    import pathlib
    import tempfile

    print(of_trl())
    for each in SHAPES:
        made = folder_of(pathlib.Path(tempfile.mkdtemp()) / "m", each)
        print(each, [round(x, 5) for x in of_transformers(made)])
