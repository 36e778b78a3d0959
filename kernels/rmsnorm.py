"""RMSNorm, and the residual addition before it, in Triton. Zhang & Sennrich 2019.

    h = x (+ residual)    r = 1 / sqrt(mean(h^2) + eps)    y = h r w
    g = dy w              dh = r g - h r^3 mean(g h) (+ the gradient of h itself)    dw = sum over rows of dy h r

Both passes are memory-bound. Each element is moved once: per element, norm forward moves 2 (x; y), add + norm forward 4 (x,
residual; h, y), norm backward 3 (x, dy; dx), add + norm backward 4 (h, dy, dh; dx). Only x or h is saved for backward: its
rows are read there anyway, and both row sums, of h^2 and of g h, come from the same pass, so recomputing r costs no traffic.

A program holds ROWS whole rows in registers. In backward a fixed number of programs loop over all rows; each sums its part of
dw in registers and writes it once, as one row of a small buffer that torch sums: no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (N, D)
    residual_ptr,  # (N, D), or None
    weight_ptr,  # (D,)
    h_ptr,  # (N, D): x + residual; unused without a residual
    y_ptr,  # (N, D)
    N,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    cols = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    inside = (rows < N) & (cols < D)  # (ROWS, BLOCK_D)
    offsets = rows * D + cols
    h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, rounded, mask=inside)
        h = rounded.to(tl.float32)  # the norm of the rounded value that the residual stream holds
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)  # (1, BLOCK_D)
    r = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)  # (ROWS, 1)
    tl.store(y_ptr + offsets, (h * r * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    h_ptr,  # (N, D), the input of the norm
    weight_ptr,  # (D,)
    dy_ptr,  # (N, D)
    dh_ptr,  # (N, D), or None: the gradient of h from the residual stream
    dx_ptr,  # (N, D)
    dw_ptr,  # (programs, D) fp32
    N,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)  # (1, BLOCK_D)
    dw = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        inside = (rows < N) & (cols < D)  # (ROWS, BLOCK_D)
        offsets = rows * D + cols
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = dy * weight
        r = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)  # (ROWS, 1)
        gh = tl.sum(g * h, axis=1, keep_dims=True) / D  # (ROWS, 1)
        dx = r * (g - h * (r * r * gh))
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * h * r
    tl.store(dw_ptr + program * D + cols, tl.sum(dw, axis=0, keep_dims=True), mask=cols < D)


FORWARD, BACKWARD = 4096, 2048  # elements that a program holds at a time


def tile(D, elements):
    """Returns the block size that holds a row, the number of rows that a program holds, and its number of warps (wide rows
    spill with 4).
    """
    block = triton.next_power_of_2(D)
    return dict(BLOCK_D=block, ROWS=max(1, elements // block), num_warps=min(16, max(4, block // 1024)))


def backward_programs(device):
    """Returns the number of programs in backward: enough to fill the GPU, few enough to keep the dw buffer small."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@torch.library.custom_op("copyllama::rms_norm", mutates_args=())
def norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and h, of the shape of x; h is empty if there is no residual."""
    D = x.shape[-1]
    N, options = x.numel() // D, tile(D, FORWARD)
    y = x.new_empty(x.shape)
    h = x.new_empty(0 if residual is None else x.shape)
    residual = None if residual is None else residual.contiguous()
    programs = triton.cdiv(N, options["ROWS"])
    rms_norm_forward_kernel[(programs,)](x.contiguous(), residual, weight.contiguous(), h, y, N, eps, D, **options)
    return y, h


@torch.library.custom_op("copyllama::rms_norm_backward", mutates_args=())
def norm_backward(
    h: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, dh: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of h (..., D) and weight (D,)."""
    D = h.shape[-1]
    N, options = h.numel() // D, tile(D, BACKWARD)
    programs = min(backward_programs(h.device), triton.cdiv(N, options["ROWS"]))
    dx, dw = h.new_empty(h.shape), h.new_empty((programs, D), dtype=torch.float32)
    h, dy, dh = h.contiguous(), dy.contiguous(), None if dh is None else dh.contiguous()
    rms_norm_backward_kernel[(programs,)](h, weight.contiguous(), dy, dh, dx, dw, N, eps, D, **options)
    return dx, dw.sum(0).to(weight.dtype)


@norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@norm_backward.register_fake
def _(h, weight, dy, dh, eps):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def save(ctx, inputs, output):
    x, residual, weight, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)
    ctx.set_materialize_grads(False)  # without a residual, h has no gradient


def gradient(ctx, dy, dh):
    h, weight = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dw = norm_backward(h, weight, dy, dh if ctx.has_residual else None, ctx.eps)
    return dx, dx if ctx.has_residual else None, dw, None  # x and residual enter only as their sum


norm.register_autograd(gradient, setup_context=save)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim. x (..., D), weight (D,) -> (..., D)."""
    return norm(x, None, weight, eps)[0]


def add_rms_norm(x, residual, weight, eps):
    """x, residual (..., D) of one dtype, weight (D,) -> (rms_norm(x + residual), x + residual)."""
    return norm(x, residual, weight, eps)
