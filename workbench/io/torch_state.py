"""Torch's ambient state, kept out of computations whose results are promised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from workbench.io.errors import RequestError, first_line

if TYPE_CHECKING:
    import torch

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Computes as in a fresh process inside the block, or in a function that this decorates.

    Autocast is off, new tensors are float32 on the CPU unless the code says otherwise, gradients can be computed. State
    that differs is put back afterwards. The default dtype, alone of these, is torch's for all threads.
    """
    import torch  # takes seconds

    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        default = torch.get_default_dtype()
        if default != torch.float32:
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        yield


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the device of that name; None stands for the GPU if there is one (CUDA or ROCm), else the CPU.

    Raises:
        RequestError: The device is unknown or cannot be used on this machine.
    """
    import torch  # takes seconds

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        raise RequestError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error


def device_for_float64(device: torch.device) -> torch.device:
    """Returns `device`, or the CPU in place of a device that has no float64 (Apple's MPS)."""
    import torch  # takes seconds

    return torch.device("cpu") if device.type == "mps" else device


def fast_bfloat16(device: torch.device) -> bool:
    """Returns True if the device multiplies bfloat16 faster than float32.

    On a CPU whose vector instructions the user limits (ATEN_CPU_CAPABILITY), it does not.
    """
    import torch  # takes seconds

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ["bf16", "sve_bf16"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        names += ["amx_bf16", "avx512_bf16"]
    return device.type == "cpu" and any(features.get(name) for name in names)
