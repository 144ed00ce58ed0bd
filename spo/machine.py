"""The machine: its device, and in which precision its matrix products are fast and right enough."""

import torch


def pick_device(name: str) -> str:
    """The device of a --device flag; none: cuda where there is one, else cpu. ValueError if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"--device={name}: not available on this machine; use --device=cpu"
        ) from None
    return name


def pick_dtype(name: str, device: str) -> str:
    """The precision of a --dtype flag; none: bfloat16 on a GPU that computes in it, else float32.

    On a CPU that does it would gain a tenth over `fast_products`, and cost 2 to 3% of the gradient (experiments/RESULTS.md).
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return name or ("bfloat16" if on_gpu else "float32")


def fast_products(device: str) -> str:
    """Chooses the fast way to multiply float32 matrices in this process; returns what to say about it.

    On a GPU: TF32, which rounds the factors to three digits. On a CPU: oneDNN, with up to twice the speed of the default, if it
    is as exact: the setting allows it to round to bfloat16 where the CPU multiplies such matrices faster.
    """
    exact = error_of_products("highest", device)
    if device.startswith("cuda"):
        return f"float32 products: TF32, relative error {error_of_products('high', device):.1e} (without {exact:.1e})"
    if device != "cpu":
        return f"float32 products: relative error {exact:.1e}"
    if (error := error_of_products("medium", device)) <= 2 * exact:
        return f"float32 products: oneDNN, relative error {error:.1e} (without {exact:.1e})"
    torch.set_float32_matmul_precision("highest")
    return f"float32 products: relative error {exact:.1e}; oneDNN's {error:.1e} was too much"


def error_of_products(precision: str, device: str) -> float:
    """Leaves that precision set."""
    torch.set_float32_matmul_precision(precision)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a.to(device) @ b.to(device)).cpu() - exact).norm() / exact.norm())
