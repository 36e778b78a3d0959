"""What the kernel tests share: the tolerance rule, gradient layouts, and outputs that start as NaN.

A kernel's error against the eager definition in fp64 may be at most that of torch's own functions in the same dtype, times
a factor, plus one rounding of the result; and in fp32 at most 1e-6. Errors are in the norm, |a - b| / |b|: there one
rounding, of up to half a unit in the last place for each value, is at most a quarter of finfo's eps.
"""

import os
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import error, errors, run  # noqa: F401
from tests.triton_interpreter import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to check")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def outputs_start_as_nan():
    """torch fills memory that it hands out uninitialised, so an element that no program writes fails its test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return torch.randn(shape, device=DEVICE).mul(scale).to(dtype).requires_grad_()


def check(fused, eager, torchs, inputs, grads, factor, floor=0.0):
    """The tolerance rule, for every output and every gradient of op(*inputs); norms below `floor` count as `floor`."""
    before = [x.detach().clone() for x in inputs]
    dtype = inputs[0].dtype
    for i, (got, own) in enumerate(zip(*errors([fused, torchs], eager, inputs, grads, floor), strict=True)):
        bound = 1e-6 if dtype == torch.float32 else factor * own + torch.finfo(dtype).eps / 4
        assert got <= bound, f"result {i}: error {got:.2e}, allowed {bound:.2e}"
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y), "an input was changed"


def layouts(shape, dtype):
    """Gradients as autograd hands them over: dense, expanded from one number as .sum() does, and transposed."""
    dense = torch.randn(shape, device=DEVICE).to(dtype)
    ones = torch.ones((), device=DEVICE, dtype=dtype).expand(shape)
    transposed = torch.randn(shape[::-1], device=DEVICE).to(dtype).permute(*range(len(shape))[::-1])
    return {"dense": dense, "sum": ones, "transposed": transposed}


def check_registration(op, inputs, grads):
    """What being a custom op must give: compiled without a break, checkpointed and plain, the same bits.

    Inductor takes part where it can work: on a GPU, or with a C++ compiler for what stands around the op.
    """
    plain = run(op, inputs, grads)
    runs = {"checkpoint": run(lambda *xs: checkpoint(op, *xs, use_reentrant=False), inputs, grads)}
    inductor = not INTERPRETED or shutil.which(os.environ.get("CXX", "g++"))
    for backend in ("aot_eager", "inductor") if inductor else ("aot_eager",):
        runs[backend] = run(torch.compile(op, backend=backend, fullgraph=True), inputs, grads)
        torch.compiler.reset()
    for name, results in runs.items():
        for i, (a, b) in enumerate(zip(plain, results, strict=True)):
            assert torch.equal(a, b), f"result {i} differs under {name}"


def check_repeats(op, inputs, grads, runs=20):
    first = run(op, inputs, grads)
    for _ in range(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, run(op, inputs, grads), strict=True))


needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one after the other: nothing to race")
