"""The model's ops: `eager` defines each in plain torch, `fused` has the same functions on Triton."""

import importlib.util
import os
import sys

from errors import UserError

HEAD_DIMS = (16, 32, 64, 128)  # those that the fused attention takes


class KernelError(UserError):
    """An op set that cannot run here. The message is one line."""


def choose(name: str, device, head_dim: int):
    """The op set (a module) for --kernels=name on a torch.device.

    auto: fused on an NVIDIA GPU of compute capability 8.0 or newer with Triton installed, for a head dim it takes; else
    eager. fused on a CPU runs in Triton's interpreter: exact, and some thousand times slower. Raises KernelError.
    """
    from kernels import eager

    if name == "eager" or (name == "auto" and not _fits(device, head_dim)):
        return eager
    if head_dim not in HEAD_DIMS:
        raise KernelError(
            f"kernels=fused: head dim {head_dim}, but they take {', '.join(map(str, HEAD_DIMS))}; use --kernels=eager"
        )
    if importlib.util.find_spec("triton") is None:
        raise KernelError("kernels=fused: Triton is not installed; use --kernels=eager, or: pip install triton (Linux)")
    if device.type not in ("cuda", "cpu"):
        raise KernelError(f"kernels=fused: Triton does not run on {device.type}; use --kernels=eager")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise KernelError("kernels=fused: on a CPU, set TRITON_INTERPRET=1 before Triton is imported")
        os.environ["TRITON_INTERPRET"] = "1"
    from kernels import fused

    return fused


def _fits(device, head_dim: int) -> bool:
    import torch

    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return head_dim in HEAD_DIMS and importlib.util.find_spec("triton") is not None
