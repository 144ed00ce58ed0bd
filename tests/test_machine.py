"""Which device and precision."""

import pytest
import torch

from spo import machine


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")


def test_float32_products_are_as_exact_after_the_choice_as_before():
    said = machine.fast_products("cpu")
    a, b = torch.randn(64, 500), torch.randn(500, 64)
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() <= 1e-6 * exact.norm()
    assert said.startswith("float32 products: ") and "e-07" in said


def test_what_rounds_is_not_chosen(monkeypatch):
    errors = {"highest": 2e-7, "medium": 3e-3}

    def error(precision, device):
        torch.set_float32_matmul_precision(precision)
        return errors[precision]

    monkeypatch.setattr(machine, "error_of_products", error)
    assert (
        machine.fast_products("cpu")
        == "float32 products: relative error 2.0e-07; oneDNN's 3.0e-03 was too much"
    )
    assert torch.get_float32_matmul_precision() == "highest"
    errors["medium"] = 3e-7
    assert "oneDNN" in machine.fast_products("cpu")
    assert torch.get_float32_matmul_precision() == "medium"


def test_a_cpu_computes_in_float32_unless_asked():
    assert machine.pick_dtype("", "cpu") == "float32"
    assert machine.pick_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_gpu_computes_in_bfloat16_if_it_can(monkeypatch):
    for can, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: can)
        assert machine.pick_dtype("", "cuda:1") == dtype
        assert machine.pick_dtype("float32", "cuda") == "float32"
