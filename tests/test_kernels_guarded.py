"""Every kernel with each of its tensors beside an unmapped page: a load or store outside one is a segmentation fault.

The tensor's memory ends where an unmapped page begins, and then begins where one ends; what a strided tensor skips is NaN,
and must be NaN afterwards. A mask that is removed from a kernel's source must end in a fault, or in a wrong result where it
kept one part of a tensor from another. Faults kill the process that meets them, so that
`python -m tests.test_kernels_guarded` forks one for each.
"""

import argparse
import ast
import ctypes
import importlib
import math
import mmap
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.cases import HEAD_OPS, OPS, case, outputs, run
from config import ROOT
from tests import test_kernels_mutants as mutants
from tests import triton_interpreter

from kernels import eager  # isort: skip  after the interpreter is set up

pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to check")
pytestmark = pytest.mark.skipif(not triton_interpreter.INTERPRETED, reason="on a GPU memory cannot be guarded")
FILES = {
    "rmsnorm": ("rms_norm", "add_rms_norm"),
    "rotary": ("rotary",),
    "swiglu": ("swiglu",),
    "attention": ("causal_attention", "rotary_attention"),
    "cross_entropy": ("linear_cross_entropy",),
}
# Without a mask it would read the other half of its row, into lanes that are not stored.
HARMLESS = ("tl.load(gate_up_ptr + row * 2 * F + cols, mask=cols < F)",)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def guarded(nbytes, at_end):
    """Returns nbytes of memory (a uint8 tensor) that end, or begin, beside an unmapped page; both sides have one."""
    page = mmap.PAGESIZE
    pages = -(-nbytes // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for start in (0, page + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.data_ptr() + start), page, 0) == 0
    start = page + (pages - nbytes if at_end else 0)
    return whole[start : start + nbytes]


class Guarded:
    """A copy of a launch's tensor in guarded memory."""

    def __init__(self, x, at_end):
        self.original = x
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        # The rows of a matrix may be padded; the padding belongs to the op, which says that it may be overwritten.
        self.padded = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) > x.shape[1]
        if self.padded:
            extent = min(len(x) * x.stride(0), x.untyped_storage().nbytes() // x.element_size() - x.storage_offset())
        self.flat = guarded(extent * x.element_size(), at_end).view(x.dtype)
        self.flat.fill_(math.nan if x.is_floating_point() else 2**30)
        self.x = self.flat.as_strided(x.shape, x.stride())
        self.gaps = torch.ones(extent, dtype=torch.bool)
        self.gaps.as_strided(x.shape, x.stride()).fill_(False)
        self.before = self.flat.view(BITS[x.element_size()])[self.gaps].clone()
        self.x.copy_(x)

    def back(self):
        """Copies what has changed into the original: two tensors of a launch may share memory."""
        bits = BITS[self.x.element_size()]
        assert self.padded or torch.equal(self.flat.view(bits)[self.gaps], self.before), "a store between the elements"
        changed = self.x.view(bits) != self.original.view(bits)
        self.original.copy_(torch.where(changed, self.x, self.original))


def guard_launches():
    """Makes Triton's interpreter run each launch twice, with its tensors at either end of guarded memory."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def call(self, *args, **kwargs):
        for at_end in (True, False):
            mapped = [Guarded(x, at_end) if isinstance(x, torch.Tensor) and x.numel() else x for x in args]
            launch(self, *(g.x if isinstance(g, Guarded) else g for g in mapped), **kwargs)
        for g in mapped:
            if isinstance(g, Guarded):
                g.back()

    GridExecutor.__call__ = call


def relaid(x, rng):
    """Returns a copy of x with its dims in another order in memory and gaps between its elements."""
    order = rng.sample(range(x.dim()), x.dim())
    wide = torch.full([x.shape[d] + rng.choice((0, 1, 3)) for d in order], math.nan, dtype=x.dtype)
    view = wide[tuple(slice(wide.shape[i] - x.shape[d], None) for i, d in enumerate(order))]
    y = view.permute([order.index(d) for d in range(x.dim())])
    return y.copy_(x.detach()).requires_grad_(x.requires_grad)


def run_case(name, ops, rng):
    """Forward and backward of an op at a random shape. An element that no program writes is NaN, and so is its result."""
    H, HKV, D = 1, 1, rng.choice((1, 7, 40, 129, 760))
    if name in HEAD_OPS:
        H, HKV = rng.choice(((1, 1), (2, 1), (3, 3)))
        D = H * rng.choice((16, 32, 64))
    T = rng.choice((1, 2, 17, 33, 65, 130)) if rng.random() < 0.7 else rng.randrange(1, 200)
    shape = dict(B=rng.choice((1, 2)), T=T if D < 200 else min(T, 40), D=D, H=H, HKV=HKV)
    shape |= dict(F=rng.choice((1, 5, 48, 1030)), V=rng.choice((2, 33, 100, 8193)))
    dtype, dropout = rng.choice((torch.float32, torch.float16, torch.bfloat16)), rng.choice((0.0, 0.25))
    op, inputs, _, _ = case(name, **shape, device="cpu", dtype=dtype, dropout=dropout)
    if rng.random() < 0.5:
        inputs = [relaid(x, rng) for x in inputs]
    out = outputs(lambda *xs: op(ops, *xs), inputs)
    grads = [torch.randn(o.shape).to(o.dtype) for o in out]
    grads = [relaid(g, rng) if rng.random() < 0.5 else g for g in grads]
    results = (*out, *torch.autograd.grad(out, inputs, grads))
    for i, (a, b) in enumerate(zip(results, run(lambda *xs: op(eager, *xs), inputs, grads), strict=True)):
        a, b = a.float(), b.float()
        right = (a - b).abs().max() <= 0.05 * b.abs().max().clamp(min=1) or (a.isnan() & b.isnan()).all()
        assert right, f"{name} {shape} {dtype}: result {i} is wrong"  # by far: tests of each op have tolerances


def unmasked(file):
    """Yields (line, source) of a kernel file with the mask of one load or store removed, for each of them."""
    source = (mutants.KERNELS / f"{file}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        segment = ast.get_source_segment(source, node) if isinstance(node, ast.Call) else ""
        if segment not in HARMLESS and any(k.arg == "mask" for k in getattr(node, "keywords", ())):
            node.keywords = [k for k in node.keywords if k.arg not in ("mask", "other")]
            lines = source.splitlines(keepends=True)
            start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
            yield node.lineno, source[:start] + ast.unparse(node) + source[start + len(segment) :]


def forked(f) -> int:
    """Runs f in a child process; returns its exit status, or minus the signal that killed it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        f()
        os._exit(0)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, required=True, help="of each op")
    parser.add_argument("--mutants", type=int, required=True, help="of each file; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a forked process has no others
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory handed out uninitialised is NaN
    guard_launches()
    importlib.import_module("torch._dynamo")  # which the first call of a custom op imports, in each child
    from kernels import fused

    failed = 0
    for name in OPS:
        for i in range(args.cases):
            status = forked(lambda: run_case(name, fused, random.Random(f"{name} {args.seed} {i}")))  # noqa: B023
            failed += status != 0
            if status:
                print(f"{name}, case {i} of seed {args.seed}: status {status}", flush=True)
    print(f"{args.cases * len(OPS)} cases, {failed} failed")
    survived = 0
    rng = random.Random(args.seed)
    for file, ops in FILES.items():
        found = list(unmasked(file))
        for line, source in rng.sample(found, args.mutants) if 0 < args.mutants < len(found) else found:

            def attack():
                with tempfile.TemporaryDirectory(prefix="guarded") as folder:
                    original = (mutants.KERNELS / f"{file}.py").read_text()  # noqa: B023
                    module = mutants.load(file, Path(folder), original, source)  # noqa: B023
                    for i in range(40):
                        for name in ops:  # noqa: B023
                            run_case(name, module, random.Random(f"{name} {i}"))

            status = forked(attack)
            survived += status != -11
            print(
                f"{file}.py without the mask of line {line}: {'a fault' if status == -11 else f'status {status}'}", flush=True
            )
    print(f"{survived} survived")
    return failed + survived


def check(*argv):
    done = subprocess.run([sys.executable, "-m", "tests.test_kernels_guarded", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout and done.stdout.count("a fault") >= 3 and "\n0 survived" in done.stdout, done.stdout


def test_no_kernel_touches_memory_beside_its_tensors_and_without_a_mask_it_does():
    check("--cases=2", "--mutants=1")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_random_shapes_and_strides_and_every_mask(seed):
    check("--cases=40", "--mutants=0", f"--seed={seed}")


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
