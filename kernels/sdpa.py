"""The model's ops on PyTorch's own fused kernels, for every device that the Triton kernels do not support, CPUs included.

Attention is F.scaled_dot_product_attention, which holds no (Tq, Tk) matrix; the norms are F.rms_norm; on a CPU the loss is
computed a chunk of logits at a time. The other ops are the definitions of kernels.eager, which torch.compile fuses.
"""

import torch
import torch.nn.functional as F

from kernels import eager
from kernels.eager import attention_probs, rotary, swiglu

__all__ = [
    "add_rms_norm", "attention_probs", "causal_attention", "linear_cross_entropy",
    "rms_norm", "rotary", "rotary_attention", "swiglu",
]  # fmt: skip
CHUNK = 2**19  # logits in a chunk: 2 MB in fp32, which fit a core's L2 cache
LEAST_ROWS = 128  # in a chunk, as each reads all of lm_head's weight


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
    """Attention with dropout is eager's, since SDPA draws its own mask, in blocks of queries that read no later key."""
    Tq, past = q.shape[1], k.shape[1] - q.shape[1]
    block = max(64, -(-Tq // 4))  # four blocks do a third less work than one, and smaller ones are slower
    parts = []
    for start in range(0, Tq, block):
        end = past + start + block
        parts.append(eager.causal_attention(q[:, start : start + block], k[:, :end], v[:, :end], dropout_p, seed))
    return torch.cat(parts, dim=1)


def linear_cross_entropy(x, weight, targets):
    """Mean of -log softmax(x weight^T)[target] over the targets that are not -100, in nats; NaN if all are -100.

    x (N, D), weight (V, D) of one dtype, targets (N,) int64 -> scalar.
    """
    if not x.is_cpu:
        return eager.linear_cross_entropy(x, weight, targets)
    counts = targets != -100
    if not counts.all():
        x, targets = x[counts], targets[counts]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets)
    return eager.linear_cross_entropy(x, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients together, one chunk of rows at a time, so that a chunk's logits stay in the cache.

    Autograd would write and read all logits four more times: log-probabilities, their gradients, a one-hot and dlogits.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        dtype = torch.promote_types(x.dtype, torch.float32)
        losses = x.new_empty(len(x), dtype=dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=dtype)  # summed over the chunks
        rows = max(LEAST_ROWS, CHUNK // len(weight))
        buffer = x.new_empty(min(rows, len(x)), len(weight))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            target = targets[part, None]  # (rows, 1)
            logits = torch.mm(x[part], weight.T, out=buffer[: len(target)]).to(dtype)  # (rows, V)
            log_p = torch.log_softmax(logits, -1, out=logits)
            losses[part] = -log_p.gather(1, target)[:, 0]
            dlogits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=dtype)).to(x.dtype)
            torch.mm(dlogits, weight, out=dx[part])
            dw.addmm_(dlogits.T.to(dtype), x[part].to(dtype))
        ctx.save_for_backward(dx, dw)
        ctx.count = max(len(x), 1)
        return losses.mean()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("linear_cross_entropy has no second derivative: pass ops=kernels.eager")
        dx, dw = ctx.saved_tensors
        g = g / ctx.count
        return dx * g, (dw * g).to(dx.dtype), None
