"""Rotary position embedding of q and k in one launch, in Triton. Su et al. 2021, half-split layout.

    y1 = x1 cos - x2 sin    y2 = x2 cos + x1 sin        x1, x2: the first and second half of a head's channels

The gradient of a rotation is the inverse rotation: backward is the same kernel with the angle negated, and saves only the
tables. Training does not use it: attention's backward rotates back as it stores (kernels.attention).

It reads and writes q and k once, 4 bytes an element in bf16: 0.40 GB at 65,536 tokens of 12 + 12 heads of 64. Rotating inside
attention's loads would save a write and a read, but each key block would be rotated again by every query block that loads it
(4.5 times on average at T = 1024 and 128 rows), forward and in both backward kernels, in loops that are bound by exponentials
and registers rather than memory; and the KV cache wants rotated keys. q and k are read from the packed projection by their
strides, and v is not touched.

A program holds the cos and sin of BLOCK_T positions in registers and loops over the heads of q, or of k.
"""

import torch
import triton
import triton.language as tl

BLOCK_T = 32


@triton.jit
def rotate_heads(
    x_ptr,  # (BLOCK_T, HALF) pointers to the first half of head 0
    y_ptr,  # likewise, with the heads one after the other
    stride_h,
    cos,  # (BLOCK_T, HALF)
    sin,  # (BLOCK_T, HALF)
    inside,  # (BLOCK_T, 1)
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    for _ in range(HEADS):
        x1 = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_T, HALF)
        x2 = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + HALF, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=inside)
        x_ptr += stride_h
        y_ptr += 2 * HALF


@triton.jit
def rotary_kernel(
    q_ptr,  # (B, T, H, Dh), any strides but a contiguous last dim
    k_ptr,  # (B, T, Hkv, Dh), likewise
    cos_ptr,  # (T, Dh/2) fp32
    sin_ptr,  # (T, Dh/2) fp32
    q_out_ptr,  # (B, T, H, Dh)
    k_out_ptr,  # (B, T, Hkv, Dh)
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    T,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,  # Dh / 2
    BLOCK_T: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0).to(tl.int64)
    b, start = program // blocks, program % blocks * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)[:, None]  # (BLOCK_T, 1)
    i = tl.arange(0, HALF)[None, :]  # (1, HALF)
    inside = t < T
    cos = tl.load(cos_ptr + t * HALF + i, mask=inside)  # (BLOCK_T, HALF)
    sin = tl.load(sin_ptr + t * HALF + i, mask=inside)
    if tl.program_id(1) == 0:
        q, y = q_ptr + b * stride_qb + t * stride_qt + i, q_out_ptr + (b * T + t) * (H * 2 * HALF) + i
        rotate_heads(q, y, stride_qh, cos, sin, inside, H, HALF)
    else:
        k, y = k_ptr + b * stride_kb + t * stride_kt + i, k_out_ptr + (b * T + t) * (HKV * 2 * HALF) + i
        rotate_heads(k, y, stride_kh, cos, sin, inside, HKV, HALF)


def rows(x):
    """Returns x if its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(q, k, cos, sin):
    """Returns q (B, T, H, Dh) and k (B, T, Hkv, Dh) rotated, contiguous."""
    (B, T, H, Dh), Hkv = q.shape, k.shape[2]
    assert k.shape == (B, T, Hkv, Dh), f"k is {tuple(k.shape)}, q {tuple(q.shape)}: expected (B, T, Hkv, Dh)"
    assert cos.shape == sin.shape == (T, Dh // 2), f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected {(T, Dh // 2)}"
    assert Dh & (Dh - 1) == 0, f"head dim {Dh}: the fused ops take powers of two; use --kernels=sdpa"
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    q, k = rows(q), rows(k)
    rotary_kernel[(B * triton.cdiv(T, BLOCK_T), 2)](
        q, k, cos.contiguous(), sin.contiguous(), *out, *q.stride()[:3], *k.stride()[:3],
        T, H, Hkv, HALF=Dh // 2, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("copyllama::rotate_heads", mutates_args=())
def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates channel pairs (i, i + Dh/2) by the angle of their position.

    q (B, T, H, Dh), k (B, T, Hkv, Dh); cos, sin (T, Dh/2) fp32, the rows of these T positions -> (q, k) rotated.
    """
    return rotate(q, k, cos, sin)


@rotary.register_fake
def _(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def gradient(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    return *rotary(dq, dk, cos, -sin), None, None


rotary.register_autograd(gradient, setup_context=save)
