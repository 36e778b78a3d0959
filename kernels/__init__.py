"""Op sets: modules that offer the same functions, of which a model is given one.

eager  defines each op in plain PyTorch
sdpa   PyTorch's own fused kernels
fused  Triton kernels
"""

import functools
import importlib.util
import os
import sys
import warnings

HEAD_DIMS = (16, 32, 64, 128)  # that the Triton attention supports


def choose(name: str, device, head_dim: int, dtype=None, say=None):
    """Returns the op set (a module) for --kernels=name, a torch.device, a head dim and the dtype of the activations.

    auto: fused where `why_not_fused` finds no reason against it, else sdpa; `say`, if given, is called with one line that
    names the choice. fused on a CPU runs in Triton's interpreter, which is exact and some thousand times slower.
    Raises errors.UserError if the named set cannot run here.
    """
    from errors import UserError
    from kernels import eager, sdpa

    if name == "eager":
        return eager
    if name == "sdpa":
        return sdpa
    reason = why_not_fused(device, head_dim)
    if name == "auto":
        reason = reason or _why_not_fast(device, dtype)
        if say:
            say(f"kernels: sdpa, because {reason}" if reason else "kernels: fused")
        if reason:
            return sdpa
    elif reason:
        raise UserError(f"kernels=fused: {reason}; use --kernels=auto")
    elif device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
        warnings.warn("kernels=fused on a CPU runs in Triton's interpreter, a thousand times slower: for tests", stacklevel=2)
    from kernels import fused

    return fused


def why_not_fused(device, head_dim: int) -> str | None:
    """Returns in a few words why the Triton kernels cannot run on a device, or None."""
    import torch

    if head_dim not in HEAD_DIMS:
        return f"the Triton kernels take head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (Linux: pip install triton)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
            return "on a CPU, TRITON_INTERPRET=1 must be set before Triton is imported"
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"the Triton kernels run on NVIDIA GPUs, not on {'AMD' if device.type == 'cuda' else device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the Triton kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return _probe(device)


def _why_not_fast(device, dtype) -> str | None:
    """Returns why PyTorch's kernels are the better choice where the Triton kernels can run, or None."""
    import torch

    if device.type == "cpu":
        return "this is a CPU"
    if dtype == torch.float32:
        return "the Triton attention is made for 16-bit activations"
    return None


@functools.cache
def _probe(device) -> str | None:
    """Builds and runs one small kernel: without a C compiler or Python's headers, Triton fails only at the first launch."""
    import torch

    try:
        from kernels.swiglu import swiglu

        swiglu(torch.ones(1, 2, device=device))
        return None
    except Exception as e:  # each missing part raises an exception of its own class
        return f"Triton does not work on this machine ({(str(e).strip() or type(e).__name__).splitlines()[0]})"
