"""SwiGLU of the merged gate and up projections, in Triton. Shazeer 2020.

    s = sigmoid(gate)    y = gate s up
    dup = dy gate s      dgate = dy up s (1 + gate (1 - s))

Both passes are bound by memory: forward moves 3 elements per output (gate, up; y), backward 5 (dy, gate, up; dgate, dup). The
sigmoid is recomputed in backward, which costs no traffic and saves a tensor. Both gradients are written into one tensor, as
the merged projection's matmul needs it.

A program processes up to BLOCK columns of one row: many small programs, enough of them resident to keep memory busy, and
F = 3072 is three of them with no idle lane.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def place(F: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the row and the columns (BLOCK,) of this program."""
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_forward_kernel(
    gate_up_ptr,  # (N, 2F): gate, then up
    y_ptr,  # (N, F)
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = place(F, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * F + cols, mask=cols < F).to(tl.float32)  # (BLOCK,)
    up = tl.load(gate_up_ptr + row * 2 * F + F + cols, mask=cols < F).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty), mask=cols < F)


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # (N, 2F)
    dy_ptr,  # (N, F)
    dgate_up_ptr,  # (N, 2F)
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = place(F, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * F + cols, mask=cols < F).to(tl.float32)  # (BLOCK,)
    up = tl.load(gate_up_ptr + row * 2 * F + F + cols, mask=cols < F).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + cols, mask=cols < F).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s
    tl.store(dgate_up_ptr + row * 2 * F + cols, dgate.to(dgate_up_ptr.dtype.element_ty), mask=cols < F)
    tl.store(dgate_up_ptr + row * 2 * F + F + cols, dup.to(dgate_up_ptr.dtype.element_ty), mask=cols < F)


def launch(kernel, gate_up, *tensors):
    F = gate_up.shape[-1] // 2
    block = min(BLOCK, triton.next_power_of_2(F))
    programs = gate_up.numel() // (2 * F) * triton.cdiv(F, block)
    kernel[(programs,)](gate_up.contiguous(), *tensors, F=F, BLOCK=block, num_warps=4)


@torch.library.custom_op("copyllama::swiglu", mutates_args=())
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the two halves of the last dim. gate_up (..., 2F) -> (..., F)."""
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    launch(swiglu_forward_kernel, gate_up, y)
    return y


@torch.library.custom_op("copyllama::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    dgate_up = gate_up.new_empty(gate_up.shape)
    launch(swiglu_backward_kernel, gate_up, dy.contiguous(), dgate_up)
    return dgate_up


@swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@swiglu_backward.register_fake
def _(gate_up, dy):
    return gate_up.new_empty(gate_up.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradient(ctx, dy):
    return swiglu_backward(*ctx.saved_tensors, dy)


swiglu.register_autograd(gradient, setup_context=save)
