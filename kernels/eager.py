"""Defines every op of the model in plain PyTorch. The other op sets are tested against this one.

Each op computes in fp32 (in fp64 if its input is fp64, which the tests use) and rounds once, at its output.
B, T, H, Dh, D, F, V: batch, time, heads, head dim, model dim, feed-forward dim, vocabulary.
"""

import torch
import torch.nn.functional as F


def _up(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim. x (..., D), weight (D,) -> (..., D). Zhang & Sennrich 2019."""
    h = _up(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight).to(x.dtype)


def add_rms_norm(x, residual, weight, eps):
    """Residual addition and the norm that follows it. x, residual (..., D) -> (rms_norm(x + residual), x + residual)."""
    h = x + residual
    return rms_norm(h, weight, eps), h


def rotary(q, k, cos, sin):
    """Rotates channel pairs (i, i + Dh/2) by the angle of their position. Su et al. 2021, half-split layout.

    q (B, T, H, Dh), k (B, T, Hkv, Dh); cos, sin (T, Dh/2) fp32, the rows of these T positions -> (q, k) rotated.
    """
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, Dh/2)

    def rotate(x):
        a, b = _up(x).chunk(2, dim=-1)  # (B, T, H, Dh/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def causal_attention(q, k, v, dropout_p=0.0, seed=None):
    """softmax(q k^T / sqrt(Dh)) v, where each query sees the keys up to its own position.

    q (B, Tq, H, Dh); k, v (B, Tk, Hkv, Dh) with Tq <= Tk: the queries are the last Tq positions (Tq < Tk with a KV
    cache). Query head h reads key head h // (H / Hkv). Dropout takes seed (B,) int64, a key for each sequence: the
    same key gives the same mask, whatever batch or rank the sequence is in. -> (B, Tq, H, Dh).
    """
    probs = attention_probs(q, k)  # (B, H, Tq, Tk)
    if dropout_p > 0:
        probs = probs * dropout_mask(seed, probs.shape, dropout_p)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).transpose(1, 2)  # (B, H, Tk, Dh)
    return (probs @ _up(v)).transpose(1, 2).to(q.dtype)


def rotary_attention(qkv, cos, sin, n_kv_heads, dropout_p=0.0, seed=None):
    """causal_attention of the packed projection qkv (B, T, H + 2 Hkv, Dh), with q and k rotated first -> (B, T, H, Dh)."""
    q, k, v = split_heads(qkv, n_kv_heads)
    return causal_attention(*rotary(q, k, cos, sin), v, dropout_p, seed)


def split_heads(qkv, n_kv_heads):
    """Returns the views q (B, T, H, Dh), k and v (B, T, Hkv, Dh) of qkv (B, T, H + 2 Hkv, Dh)."""
    return qkv.split((qkv.shape[2] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), dim=2)


def attention_probs(q, k):
    """The probabilities of causal_attention, (B, H, Tq, Tk) in fp32. The evaluation of heads reads them."""
    (Tq, H, Dh), Tk = q.shape[1:], k.shape[1]
    k = k.repeat_interleave(H // k.shape[2], dim=2)  # (B, Tk, H, Dh)
    scores = _up(q).transpose(1, 2) @ _up(k).permute(0, 2, 3, 1) * Dh**-0.5  # (B, H, Tq, Tk)
    future = scores.new_ones((Tq, Tk), dtype=torch.bool).triu(Tk - Tq + 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def swiglu(gate_up):
    """silu(gate) * up of the two halves of the last dim. gate_up (..., 2F) -> (..., F). Shazeer 2020."""
    gate, up = _up(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def linear_cross_entropy(x, weight, targets):
    """Mean of -log softmax(x weight^T)[target] over the targets that are not -100, in nats; NaN if all are -100.

    x (N, D), weight (V, D), targets (N,) int64 -> scalar. The logits are rounded to the dtype of x, as a matrix
    product's are; everything after them is fp32.
    """
    return F.cross_entropy(_up(F.linear(x, weight)), targets)


def dropout_mask(seed, shape, p):
    """The factors that dropout multiplies probabilities by: 0, or 1 / (share kept). seed (B,), shape (B, H, Tq, Tk) -> fp32.

    Each group of 16 keys is one call of the counter-based generator Philox4x32-7 (Salmon et al. 2011) with the
    sequence's seed as key and (query position, head, group) as counter; each of its 16 bytes decides one key. So p is
    rounded to 1/256, and a kernel can regenerate any block of the mask without storing it.
    """
    B, H, Tq, Tk = shape
    dropped = round(p * 256)
    rows = torch.arange(Tk - Tq, Tk, device=seed.device)[:, None]  # (Tq, 1)
    heads = torch.arange(H, device=seed.device)[:, None, None]  # (H, 1, 1)
    groups = torch.arange(-(-Tk // 16), device=seed.device)  # (Tk/16,)
    words = philox(seed[:, None, None, None], rows, heads, groups)  # 4 of (B, H, Tq, Tk/16)
    bytes = torch.stack([(w >> shift) & 0xFF for w in words for shift in (0, 8, 16, 24)], dim=-1)
    return (bytes.flatten(-2)[..., :Tk] >= dropped) * (256 / (256 - dropped))


def philox(key, c0, c1, c2, rounds=7):
    """Philox4x32: four words of 32 random bits for a 64-bit key and the counter (c0, c1, c2, 0), as int64 tensors."""
    low = 0xFFFFFFFF
    k0, k1 = key & low, (key >> 32) & low
    zero = key & 0  # makes the counters depend on data: Inductor computes index arithmetic in int32, which the constants exceed
    c0, c1, c2, c3 = torch.broadcast_tensors(c0 | zero, c1, c2 | zero, zero)
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; int64 wraps, but the 64 bits are right
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
