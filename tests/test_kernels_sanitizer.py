"""triton-viz's sanitizer over the kernels that it can run: it proves with Z3 that no address is outside a tensor.

Of triton-viz 3.0 (pip install triton-viz==3.0, not among the test dependencies): it runs the kernels of SwiGLU, rotary and
cross-entropy, and the norm's forward pass. It fails on a `range` whose bounds are cast to int64 or divided, as in the norm's
backward pass and in attention; tests/test_kernels_guarded.py covers all. A process of its own runs it, because it replaces
Triton's interpreter.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch

from config import ROOT

VERSION = "3.0"
TRACED = {  # file: kernels
    "swiglu": ("swiglu_forward_kernel", "swiglu_backward_kernel"),
    "rotary": ("rotary_kernel",),
    "cross_entropy": ("cross_entropy_kernel",),
    "rmsnorm": ("rms_norm_forward_kernel",),
}


def calls(module, name):
    """Calls an op of a module so that each traced kernel runs, with sizes that no block divides."""
    if name == "swiglu":
        module.swiglu(torch.randn(3, 2 * 1030).requires_grad_()).sum().backward()
    elif name == "rotary":
        q, k = torch.randn(1, 37, 2, 16).requires_grad_(), torch.randn(1, 37, 1, 16).requires_grad_()
        sum(x.sum() for x in module.rotary(q, k, torch.ones(37, 8), torch.ones(37, 8))).backward()
    elif name == "cross_entropy":
        # A row of 48 is not padded: the sanitizer takes the padding after the last row to be outside the tensor.
        module.loss_and_dlogits(torch.randn(5, 48), torch.tensor([1, 2, 47, 3, 0]))
    else:
        module.rms_norm(torch.randn(5, 40), torch.randn(40), 1e-6)
        module.add_rms_norm(torch.randn(5, 40), torch.randn(5, 40), torch.randn(40), 1e-6)


def main():
    """Prints the number of accesses outside a tensor that the sanitizer finds, file by file, then without a mask of SwiGLU."""
    import os
    import tempfile
    from pathlib import Path

    os.environ["TRITON_INTERPRET"] = "1"
    import triton_viz
    from triton_viz.clients import Sanitizer

    def found(module, name):
        clients = [Sanitizer(abort_on_error=False) for _ in TRACED[name]]
        for kernel, client in zip(TRACED[name], clients, strict=True):
            setattr(module, kernel, triton_viz.trace(client)(getattr(module, kernel)))
        calls(module, name)
        return sum(len(client.records) for client in clients)

    for name in TRACED:
        print(f"{name}: {found(importlib.import_module(f'kernels.{name}'), name)}", flush=True)
    source = Path("kernels/swiglu.py").read_text().replace('"copyllama::', '"mutant::')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.py")
        path.write_text(source.replace("tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty), mask=cols < F)",
                                       "tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty))"))  # fmt: skip
        spec = importlib.util.spec_from_file_location("mutant", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(f"mutant: {found(module, 'swiglu')}", flush=True)


def test_the_sanitizer_finds_nothing_but_the_seeded_fault():
    pytest.importorskip("triton_viz", reason=f"triton-viz is not installed: pip install triton-viz=={VERSION}")
    command = [sys.executable, "-m", "tests.test_kernels_sanitizer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = dict(line.split(": ") for line in done.stdout.splitlines() if line.split(": ")[0] in (*TRACED, "mutant"))
    assert counts.keys() == {*TRACED, "mutant"}, done.stderr
    assert all(counts[name] == "0" for name in TRACED) and int(counts["mutant"]) > 0, done.stdout


if __name__ == "__main__":
    main()
