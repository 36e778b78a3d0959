"""Op sets: modules that define the same functions. A model is constructed with one of them.

eager  defines each op in plain PyTorch
sdpa   PyTorch's own fused kernels
fused  Triton kernels
"""

import functools
import importlib
import importlib.util
import os
import sys
import warnings

import torch

from errors import UserError, first_line

HEAD_DIMS = (16, 32, 64, 128)  # supported by the Triton attention


def choose(name: str, device, head_dim: int, dtype=None, say=None):
    """Returns the op set (a module) for --kernels=name, a torch.device, a head dim and the dtype of the activations.

    auto: fused on an NVIDIA GPU with 16-bit activations where `why_not_fused` returns None, else sdpa; `say`, if given, is
    called with one line that names the choice and the reason. Raises errors.UserError if the named set cannot run here.
    """
    if name in ("auto", "fused"):
        reason = why_not_fused(device, head_dim)
        if name == "fused" and reason:
            raise UserError(f"kernels=fused: {reason}; use --kernels=auto")
        if name == "fused" and device.type == "cpu":
            if dtype == torch.bfloat16:
                raise UserError(
                    "kernels=fused: Triton's interpreter cannot multiply bf16; pass --dtype=fp32, or --kernels=auto"
                )
            os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
            (say or warnings.warn)("warning: kernels=fused on a CPU runs in Triton's interpreter, a thousand times slower")
        if name == "auto":
            if device.type == "cpu":
                reason = "this is a CPU"
            elif dtype == torch.float32:
                reason = reason or "the Triton attention is tuned for 16-bit activations"
            name = "sdpa" if reason else "fused"
            if say:
                say(f"kernels: {name}" + (f", because {reason}" if reason else ""))
    return importlib.import_module(f"kernels.{name}")


def describe(ops, device) -> str:
    """Returns the name of an op set, on a GPU with the table of tiles that its Triton kernels use: "fused, tiles of sm_90"."""
    name = ops.__name__.removeprefix("kernels.")
    if name != "fused" or device.type != "cuda":
        return name
    return f"{name}, tiles of sm_{importlib.import_module('kernels.attention').family(device)}"


def why_not_fused(device, head_dim: int) -> str | None:
    """Returns why the Triton kernels cannot run on a device, or None."""
    if head_dim not in HEAD_DIMS:
        return f"the Triton kernels take head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (Linux: pip install triton)"
    if device.type == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU, TRITON_INTERPRET=1 must be set before Triton is imported"
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"the Triton kernels run on NVIDIA GPUs, not on {'AMD' if device.type == 'cuda' else device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the Triton kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return _probe(device)


@functools.cache
def _probe(device) -> str | None:
    """Builds and runs a small kernel: without a C compiler or Python's headers, Triton fails only at its first launch."""
    try:
        importlib.import_module("kernels.swiglu").swiglu(torch.ones(1, 2, device=device))
    except Exception as e:  # each missing part raises an exception of its own class
        return f"Triton does not work on this machine ({first_line(e)})"
