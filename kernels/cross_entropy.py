"""The lm_head's matmul and the cross-entropy of its logits, with the gradient computed in the forward pass.

    logits = x weight^T (torch)    loss = logsumexp(logits) - logits[target]    dlogits = softmax(logits) - onehot(target)
    dx = dlogits weight (torch)    dw = dlogits^T x (torch)

At 65,536 tokens and a vocabulary of 32,000 the logits are the largest tensor of a training step, 4.2 GB in bf16. The Triton
kernel reads and writes each of them once, 8.4 GB: it computes the loss of a row and overwrites the row with its gradient, in
a buffer that this op allocated and nobody else sees. dx and dw are computed from it immediately: only they, the size of x and
weight, are kept for backward, which scales them. If the logits would not fit into memory, the rows are processed in chunks,
and dw is summed over these in fp32. Only backward divides dw by the number of targets, and before that its sum over the rows
may exceed fp16's 65,504: for fp16 inputs dw is computed and kept in fp32, and rounded once, in backward.

A program processes one row, block by block, in two passes: one for the running maximum m_i and sum of exponentials l_i
(Milakov & Gimelshein 2018), one for the gradient. The second pass reads from the L2 cache: 132 multiprocessors with 4 rows of
64 KB each are 34 MB. Holding a row in registers instead would leave room for one program per multiprocessor, and fix V.
"""

import torch
import triton
import triton.language as tl

IGNORED = -100  # targets with this value have no loss and no gradient
BLOCK, WARPS = 8192, 8
ALIGNED = 16  # elements that a row of logits is padded to, so that it is read 128 bits at a time whatever V


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (N, V), rows STRIDE apart, overwritten by their gradients if GRADIENT
    targets_ptr,  # (N,) int64
    loss_ptr,  # (N,) fp32
    V: tl.constexpr,
    STRIDE: tl.constexpr,  # of a row of logits, V or more
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * STRIDE
    target = tl.load(targets_ptr + row)
    counts = target != IGNORED

    m_i = -float("inf")
    l_i = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
        z = tl.load(logits_ptr + cols, mask=cols < STRIDE, other=-float("inf")).to(tl.float32)  # (BLOCK,)
        z = tl.where(cols < V, z, -float("inf"))  # a mask that ends at an odd V would split the load into single numbers
        m_new = tl.maximum(m_i, tl.max(z, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(z - m_new), axis=0)
        m_i = m_new
    lse = m_i + tl.log(l_i)

    z_target = tl.load(logits_ptr + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, lse - z_target, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + cols, mask=cols < STRIDE, other=-float("inf")).to(tl.float32)
            z = tl.where(cols < V, z, -float("inf"))
            dz = tl.exp(z - lse) - (cols == target).to(tl.float32)
            dz = tl.where(counts, dz, 0.0)
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < STRIDE)


def loss_and_dlogits(logits, targets, gradient=True):
    """Returns the losses (N,) in fp32 of logits (N, V); with `gradient`, their gradients overwrite the logits.

    The logits' last dim is contiguous; padding between their rows may be overwritten. Targets (N,) int64 lie in 0..V-1, or
    are -100: then loss and gradient are 0.
    """
    N, V = logits.shape
    assert logits.stride(1) == 1 and targets.is_contiguous()
    losses = logits.new_empty(N, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(V))
    cross_entropy_kernel[(N,)](
        logits, targets, losses, V, logits.stride(0), BLOCK=block, GRADIENT=gradient, IGNORED=IGNORED, num_warps=WARPS
    )
    return losses


def chunk_rows(x, weight):
    """Returns how many rows of logits to materialize at once: as many as fill an eighth of the GPU's memory, or 1 GiB on
    a CPU.
    """
    size = torch.cuda.get_device_properties(x.device).total_memory // 8 if x.is_cuda else 2**30
    copies = {x.dtype, sum_dtype(x.dtype)}  # for fp16, dw is computed from a second copy in fp32
    return max(1, size // (weight.shape[0] * sum(dtype.itemsize for dtype in copies)))


def sum_dtype(dtype):
    """Returns the dtype of dw before its division by the number of targets."""
    return torch.float32 if dtype == torch.float16 else dtype


# Inductor's cache on disk knows an op by its name: one whose arguments or results change takes a new name.
@torch.library.custom_op("copyllama::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_sum(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sum of the losses in fp32 and, with `gradient`, dx and dw (else empty), `rows` rows at a time.

    dx has the dtype of x, and dw that of weight, or fp32 if that is fp16.
    """
    N, targets = len(x), targets.contiguous()
    summed = sum_dtype(weight.dtype)
    losses = x.new_empty(N, dtype=torch.float32)
    buffer = x.new_empty(min(N, rows), triton.cdiv(len(weight), ALIGNED) * ALIGNED)
    dx = x.new_empty(x.shape if gradient else 0)
    dw = weight.new_empty(0, dtype=summed)
    for start in range(0, max(N, 1), rows):  # N = 0 still runs one empty chunk, which makes dw zero
        part = slice(start, start + rows)
        logits = torch.mm(x[part], weight.T, out=buffer[: len(x[part]), : len(weight)])  # (rows, V)
        losses[part] = loss_and_dlogits(logits, targets[part], gradient)
        if gradient:
            torch.mm(logits, weight, out=dx[part])
            dw_part = logits.to(summed).T @ x[part].to(summed)
            dw = dw_part if start == 0 else dw.float() + dw_part
    return losses.sum(), dx, dw.to(summed)


@linear_cross_entropy_sum.register_fake
def _(x, weight, targets, rows, gradient):
    dx = x.new_empty(x.shape if gradient else 0)
    dw = weight.new_empty(weight.shape if gradient else 0, dtype=sum_dtype(weight.dtype))
    return x.new_empty((), dtype=torch.float32), dx, dw


@torch.library.custom_op("copyllama::linear_cross_entropy_gradient", mutates_args=())
def linear_cross_entropy_backward(dx: torch.Tensor, dw: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dx g and dw g in the dtype of dx, which is that of x and weight.

    It has no autograd formula, so that double backward raises an error instead of returning a wrong result.
    """
    return dx * g, (dw * g).to(dx.dtype)


@linear_cross_entropy_backward.register_fake
def _(dx, dw, g):
    return dx.new_empty(dx.shape), dx.new_empty(dw.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # no gradient flows into dx and dw


def gradient(ctx, g, *_):
    return *linear_cross_entropy_backward(*ctx.saved_tensors, g), None, None, None


linear_cross_entropy_sum.register_autograd(gradient, setup_context=save)


def linear_cross_entropy(x, weight, targets):
    """Mean of -log softmax(x weight^T)[target] over the targets that are not -100.

    x (N, D), weight (V, D) of one dtype, targets (N,) int64 in 0..V-1 or -100 -> scalar, fp32.
    """
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total, _, _ = linear_cross_entropy_sum(x, weight, targets, chunk_rows(x, weight), needed)
    count = (targets != IGNORED).sum()
    # Without targets the loss is NaN and its gradients are zero.
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))
