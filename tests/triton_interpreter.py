"""Runs the Triton kernels on a CPU: import this before Triton and before any kernel file.

Where there is no CUDA device it turns on Triton's interpreter, which runs each program in numpy, one after the other. The
interpreter keeps bf16 as uint16 bit patterns, multiplies those patterns in tl.dot and truncates casts to bf16; the patch
gives it exact operands and rounding to nearest, ties to even, as on a GPU.
"""

import importlib.util
import os
import sys

import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    # @triton.jit reads it, in Triton's own files too, and torch.compile imports those.
    assert "triton" not in sys.modules or "TRITON_INTERPRET" in os.environ, "Triton was imported first"
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def patch():
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot, fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp

    def widen(h):
        if h.dtype.scalar != tl.bfloat16:
            return h
        return TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, ty):
        if ty.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast(self, widen(src), ty)
        x = np.ascontiguousarray(src.data, np.float32)
        bits = x.view(np.uint32)
        rounded = np.where(np.isnan(x), (bits >> 16) | 0x40, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def create_fp_to_fp(self, src, ty, rounding):
        bf16 = tl.bfloat16 in (src.dtype.scalar, ty.scalar)
        return cast_impl(self, src, ty) if bf16 else fp_to_fp(self, src, ty, rounding)

    def create_dot(self, a, b, acc, *rest):
        return dot(self, widen(a), widen(b), acc, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


if INTERPRETED and importlib.util.find_spec("triton"):
    patch()
