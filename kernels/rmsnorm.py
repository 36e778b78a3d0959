"""RMSNorm, and the residual add before it, on Triton. Zhang & Sennrich 2019.

    h = x (+ residual)    r = 1 / sqrt(mean(h^2) + eps)    y = h r w
    g = dy w              dh = r g - h r^3 mean(g h) (+ the gradient of h itself)    dw = sum over rows of dy h r

Memory alone sets the time. Each element is moved once: norm forward 2 (x; y), add + norm forward 4 (x, residual; h, y),
norm backward 3 (x, dy; dx), add + norm backward 4 (h, dy, dh; dx). Nothing is saved for backward but x or h: its rows are
read there anyway, and both row sums, of h^2 and of g h, are taken in the same pass, so r costs no traffic.

A program holds ROWS whole rows in registers. In backward a fixed number of programs walk over all rows; each keeps its own
sum for dw in registers and writes it once, as one row of a small buffer that torch sums: no atomics, the same bits each run.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (N, D)
    residual_ptr,  # (N, D), or None
    weight_ptr,  # (D,)
    h_ptr,  # (N, D), or None: x + residual
    y_ptr,  # (N, D)
    N,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the power of two that holds D
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
        h = rounded.to(tl.float32)  # the norm of what the residual stream holds
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)  # (1, BLOCK_D)
    r = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)  # (ROWS, 1)
    tl.store(y_ptr + offsets, (h * r * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    h_ptr,  # (N, D): what was normed
    weight_ptr,  # (D,)
    dy_ptr,  # (N, D)
    dh_ptr,  # (N, D), or None: the gradient that reaches h past the norm
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


FORWARD, BACKWARD = 4096, 2048  # elements of work for a program at a time


def tile(D, elements):
    """The block that holds a row, and how many rows make up so many elements."""
    block = triton.next_power_of_2(D)
    return block, max(1, elements // block)


def programs(device):
    """How many programs walk over the rows in backward: enough to fill the card, few enough for a small dw buffer."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def run_forward(x, residual, weight, eps):
    """x, residual (..., D) -> y, and h where there is a residual: fresh, contiguous."""
    D = x.shape[-1]
    N, (block, rows) = x.numel() // D, tile(D, FORWARD)
    y, h = x.new_empty(x.shape), None
    x = x.contiguous()
    if residual is not None:
        residual, h = residual.contiguous(), x.new_empty(x.shape)
    rms_norm_forward_kernel[(triton.cdiv(N, rows),)](
        x, residual, weight.contiguous(), h, y, N, eps, D, BLOCK_D=block, ROWS=rows, num_warps=4
    )
    return y, h


def run_backward(h, weight, dy, dh, eps):
    """The gradients of h (..., D) and weight (D,)."""
    D = h.shape[-1]
    N, (block, rows) = h.numel() // D, tile(D, BACKWARD)
    grid = min(programs(h.device), triton.cdiv(N, rows))
    dx, dw = h.new_empty(h.shape), h.new_empty((grid, D), dtype=torch.float32)
    h, dy, dh = h.contiguous(), dy.contiguous(), None if dh is None else dh.contiguous()
    rms_norm_backward_kernel[(grid,)](h, weight.contiguous(), dy, dh, dx, dw, N, eps, D, BLOCK_D=block, ROWS=rows, num_warps=4)
    return dx, dw.sum(0).to(weight.dtype)


@torch.library.custom_op("copyllama::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim. x (..., D), weight (D,) -> (..., D)."""
    return run_forward(x, None, weight, eps)[0]


@torch.library.custom_op("copyllama::rms_norm_backward", mutates_args=())
def rms_norm_backward(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return run_backward(x, weight, dy, None, eps)


@torch.library.custom_op("copyllama::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual (..., D) of one dtype, weight (D,) -> (rms_norm(x + residual), x + residual)."""
    return run_forward(x, residual, weight, eps)


@torch.library.custom_op("copyllama::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward(
    h: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, dh: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return run_backward(h, weight, dy, dh, eps)


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@rms_norm_backward.register_fake
def _(x, weight, dy, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@add_rms_norm_backward.register_fake
def _(h, weight, dy, dh, eps):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def save(ctx, inputs, output):
    *_, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1] if isinstance(output, tuple) else inputs[0], weight)


def rms_norm_gradient(ctx, dy):
    return *rms_norm_backward(*ctx.saved_tensors, dy, ctx.eps), None


def add_rms_norm_gradient(ctx, dy, dh):
    dx, dw = add_rms_norm_backward(*ctx.saved_tensors, dy, dh, ctx.eps)
    return dx, dx, dw, None  # x and residual enter only as their sum


rms_norm.register_autograd(rms_norm_gradient, setup_context=save)
add_rms_norm.register_autograd(add_rms_norm_gradient, setup_context=save)
