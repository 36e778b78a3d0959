"""The model's ops on PyTorch's own fused kernels, for every device that the Triton kernels do not support, CPUs included.

Attention is F.scaled_dot_product_attention, which holds no (Tq, Tk) matrix; the norms are F.rms_norm. The other ops are
the definitions of kernels.eager, which torch.compile fuses.
"""

import torch
import torch.nn.functional as F

from kernels import eager
from kernels.eager import attention_probs, linear_cross_entropy, rotary, swiglu

__all__ = [
    "add_rms_norm", "attention_probs", "causal_attention", "linear_cross_entropy",
    "rms_norm", "rotary", "rotary_attention", "swiglu",
]  # fmt: skip


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim. x (..., D), weight (D,) -> (..., D)."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def add_rms_norm(x, residual, weight, eps):
    """Residual addition and the norm that follows it. x, residual (..., D) -> (rms_norm(x + residual), x + residual)."""
    h = x + residual
    return rms_norm(h, weight, eps), h


def causal_attention(q, k, v, dropout_p=0.0, seed=None):
    """softmax(q k^T / sqrt(Dh)) v, where each query sees the keys up to its own position.

    q (B, Tq, H, Dh); k, v (B, Tk, Hkv, Dh) with Tq <= Tk: the queries are the last Tq positions. Dropout takes seed
    (B,) int64, a key for each sequence. -> (B, Tq, H, Dh).
    """
    if dropout_p > 0:
        return _attention_in_blocks(q, k, v, dropout_p, seed)
    Tq, Tk = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    if group > 1:  # the memory-efficient kernel, the only fast one on GPUs older than 8.0, does not support grouped queries
        k = k.repeat_interleave(group, dim=2)
        v = v.repeat_interleave(group, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, Dh)
    mask = None
    if 1 < Tq < Tk:  # is_causal would align the first query, not the last one, with the keys
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=Tq == Tk > 1).transpose(1, 2)


def rotary_attention(qkv, cos, sin, n_kv_heads, dropout_p=0.0, seed=None):
    """causal_attention of the packed projection qkv (B, T, H + 2 Hkv, Dh), with q and k rotated first -> (B, T, H, Dh)."""
    q, k, v = eager.split_heads(qkv, n_kv_heads)
    return causal_attention(*rotary(q, k, cos, sin), v, dropout_p, seed)


def _attention_in_blocks(q, k, v, dropout_p, seed):
    """SDPA draws its own dropout mask, so attention with dropout is eager's, in blocks of queries that read no later key."""
    Tq, past = q.shape[1], k.shape[1] - q.shape[1]
    block = max(64, -(-Tq // 4))  # four blocks do a third less work than one, and smaller ones are slower
    parts = []
    for start in range(0, Tq, block):
        end = past + start + block
        parts.append(eager.causal_attention(q[:, start : start + block], k[:, :end], v[:, :end], dropout_p, seed))
    return torch.cat(parts, dim=1)
