"""Causal attention, forward and backward, in Triton. FlashAttention-2, Dao 2023; Rabe & Staats 2021.

    S = c q k^T    P = softmax(S) over the keys up to the query's position    o = (M P) v        c = 1 / sqrt(Dh)
    delta = rowsum(do o)    dS = P (M (do v^T) - delta)    dq = c dS k    dk = c dS^T q    dv = (M P)^T do

No (Tq, Tk) matrix is stored. The forward kernel holds a block of queries and loops over the keys with a running maximum m_i
and sum l_i; it saves lse = log2(sum exp), from which the backward kernels recompute P. M is the dropout mask, 0 or
1 / (share kept). It is not stored either: it is a function of (sequence seed, head, query position, key), defined by
eager.dropout_mask, and each kernel computes it again.

FLOPs, of the causal half: forward 4 B H T^2 Dh / 2, backward 2.5 times that. At Dh = 64 the exponentials take as many cycles
as the matmuls, so a multiprocessor needs two or three resident programs to overlap the two: registers and shared memory
decide the tile sizes in `TILES`. Key blocks that every query of the program sees run without a mask; only those on the
diagonal run with one. The scale is applied after the dot product, together with log2(e): scaling q or k would round them
twice.

Backward is two kernels that both recompute S: one owns a block of keys (dk, dv), the other a block of queries (dq). That is
7 matmuls instead of 5, but it needs no atomics, so the bits are the same in every run, and each kernel has the tile size
that suits it. With grouped queries the dk, dv program loops over the query heads of its key head; K and V are never repeated.

Both write into one tensor, the gradient of the packed projection qkv, which its matmul reads as it is. The gradients of q and
k are rotated back (kernels.rotary) in fp32 before they are stored, so the backward pass of the rotation adds no memory traffic.

Program ids are cast to int64 before they are multiplied; offsets inside a tile are int32.
"""

import torch
import triton
import triton.language as tl

from kernels.eager import split_heads
from kernels.rotary import rotate, rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def keep_mask(seed, head, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPPED: tl.constexpr):
    """Returns the dropout keep mask of a tile, (QUERIES, KEYS) bool. One Philox call gives 16 bytes, for 16 keys."""
    query = (first_query + tl.arange(0, QUERIES)[:, None]).to(tl.uint32)  # (QUERIES, 1)
    group = (first_key // 16 + tl.arange(0, KEYS // 16)[None, :]).to(tl.uint32)  # (1, KEYS/16)
    query, group = tl.broadcast(query, group)  # (QUERIES, KEYS/16)
    zero = query * 0
    w0, w1, w2, w3 = tl.philox(seed, query, zero + tl.cast(head, tl.uint32), group, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(QUERIES, KEYS // 16, 4, 1)  # in the order w0 w1 w2 w3
    byte = (words >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]) & 0xFF  # (QUERIES, KEYS/16, 4, 4)
    return (byte >= DROPPED).reshape(QUERIES, KEYS)


@triton.jit
def store_rotated_back(
    ptr,  # the first channel of the first row
    x,  # (ROWS, D) fp32
    inside,  # (ROWS, 1)
    first,  # position of the first row
    cos_ptr,  # (T, D/2) fp32
    sin_ptr,  # (T, D/2) fp32
    STRIDE: tl.constexpr,  # of a row
    D: tl.constexpr,
):
    """Applies the inverse rotation to a tile of gradients and stores it."""
    HALF: tl.constexpr = D // 2
    n, i = tl.arange(0, x.shape[0])[:, None], tl.arange(0, HALF)[None, :]
    x1, x2 = tl.split(tl.permute(x.reshape(x.shape[0], 2, HALF), (0, 2, 1)))  # (ROWS, HALF)
    cos = tl.load(cos_ptr + (first + n) * HALF + i, mask=inside, other=0.0)  # (ROWS, HALF)
    sin = tl.load(sin_ptr + (first + n) * HALF + i, mask=inside, other=0.0)
    tl.store(ptr + (n * STRIDE + i), (x1 * cos + x2 * sin).to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + (n * STRIDE + i + HALF), (x2 * cos - x1 * sin).to(ptr.dtype.element_ty), mask=inside)


# fmt: off
@triton.jit
def attention_forward_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, stats_T) fp32: log2 of the sum of exp(S); stats_T is Tq rounded up to STATS_ROWS
    seed_ptr,  # (B,) int64, or None
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, stats_T, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    DROPPED: tl.constexpr,  # dropout probability in units of 1/256
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(Tq, QUERIES)
    program = tl.program_id(0).to(tl.int64)
    head, b = program // blocks % H, program // blocks // H
    start = (blocks - 1 - program % blocks) * QUERIES  # longest rows first, so that short ones fill the tail
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    i, n, d = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, D)
    q_ptr += b * q_stride_b + start * q_stride_t + head * q_stride_h
    k_ptr += b * k_stride_b + head // GROUP * k_stride_h
    v_ptr += b * v_stride_b + head // GROUP * v_stride_h
    k_tile = n[None, :] * k_stride_t + d[:, None]  # (D, KEYS)
    v_tile = n[:, None] * v_stride_t + d[None, :]  # (KEYS, D)
    inside = start + i < Tq
    q = tl.load(q_ptr + i[:, None] * q_stride_t + d[None, :], mask=inside[:, None], other=0.0)  # (QUERIES, D)

    acc = tl.zeros((QUERIES, D), tl.float32)  # sum of exp2(S log2(e) - m_i) v
    l_i = tl.zeros((QUERIES,), tl.float32)  # sum of exp2(S log2(e) - m_i)
    m_i = tl.full((QUERIES,), -float("inf"), tl.float32)  # maximum of S log2(e)
    first = (start + Tk - Tq).to(tl.int32)  # position of the first query: the queries are the last Tq of Tk
    full = (first + 1) // KEYS * KEYS  # keys before this are seen by every query of the block
    end = tl.minimum(first + QUERIES, Tk)
    for MASKED in tl.static_range(2):
        for key in tl.range(full if MASKED else 0, end if MASKED else full, KEYS, num_stages=1 if MASKED else None):
            row = tl.cast(key, tl.int64)
            present = key + n < Tk if MASKED else tl.full((KEYS,), True, tl.int1)
            k = tl.load(k_ptr + row * k_stride_t + k_tile, mask=present[None, :], other=0.0)  # (D, KEYS)
            v = tl.load(v_ptr + row * v_stride_t + v_tile, mask=present[:, None], other=0.0)  # (KEYS, D)
            s = tl.dot(q, k, input_precision="ieee")  # (QUERIES, KEYS)
            if MASKED:
                s = tl.where(first + i[:, None] >= key + n[None, :], s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, axis=1) * (scale * LOG2E))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])  # (QUERIES, KEYS), one multiply-add each
            l_i = l_i * alpha + tl.sum(p, axis=1)
            if DROPPED:
                p = tl.where(keep_mask(seed, head, first, key, QUERIES, KEYS, DROPPED), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m_i = m_new

    out = acc / l_i[:, None] * (256 / (256 - DROPPED))
    out_ptr += ((b * Tq + start) * H + head) * D
    tl.store(out_ptr + i[:, None] * (H * D) + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_ptr + (b * H + head) * stats_T + start + i, m_i + tl.log2(l_i))  # also of rows beyond Tq, which are padding


@triton.jit
def attention_dq_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    out_ptr,  # (B, Tq, H, D)
    do_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, stats_T) fp32
    seed_ptr,  # (B,) int64, or None
    cos_ptr,  # (Tk, D/2) fp32: the table that q and k were rotated by
    sin_ptr,  # (Tk, D/2) fp32
    dqkv_ptr,  # (B, Tk, H + 2 Hkv, D): dq, then dk and dv, which the other kernel writes
    stats_ptr,  # (B, H, stats_T, 2) fp32: lse and delta, side by side as the other kernel reads them
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, stats_T, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DROPPED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(Tq, QUERIES)
    program = tl.program_id(0).to(tl.int64)
    head, b = program // blocks % H, program // blocks // H
    start = (blocks - 1 - program % blocks) * QUERIES
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    i, n, d = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, D)
    q_ptr += b * q_stride_b + start * q_stride_t + head * q_stride_h
    k_ptr += b * k_stride_b + head // GROUP * k_stride_h
    v_ptr += b * v_stride_b + head // GROUP * v_stride_h
    HEADS: tl.constexpr = H + 2 * (H // GROUP)
    dqkv_ptr += ((b * Tk + Tk - Tq + start) * HEADS + head) * D
    k_tile = n[:, None] * k_stride_t + d[None, :]  # (KEYS, D)
    v_tile = n[:, None] * v_stride_t + d[None, :]  # (KEYS, D)
    rows = ((b * Tq + start) * H + head) * D + i[:, None] * (H * D) + d[None, :]  # (QUERIES, D), of out and do
    stats = (b * H + head) * stats_T + start + i  # (QUERIES,), of lse and delta
    inside = start + i < Tq
    q = tl.load(q_ptr + i[:, None] * q_stride_t + d[None, :], mask=inside[:, None], other=0.0)  # (QUERIES, D)
    do = tl.load(do_ptr + rows, mask=inside[:, None], other=0.0)
    out = tl.load(out_ptr + rows, mask=inside[:, None], other=0.0)
    lse = tl.load(lse_ptr + stats)  # (QUERIES,)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(stats_ptr + 2 * stats[:, None] + tl.arange(0, 2)[None, :], tl.join(lse, delta))

    dq = tl.zeros((QUERIES, D), tl.float32)
    first = (start + Tk - Tq).to(tl.int32)
    full = (first + 1) // KEYS * KEYS
    end = tl.minimum(first + QUERIES, Tk)
    for MASKED in tl.static_range(2):
        for key in tl.range(full if MASKED else 0, end if MASKED else full, KEYS, num_stages=1 if MASKED else None):
            row = tl.cast(key, tl.int64)
            present = key + n < Tk if MASKED else tl.full((KEYS,), True, tl.int1)
            k = tl.load(k_ptr + row * k_stride_t + k_tile, mask=present[:, None], other=0.0)  # (KEYS, D)
            v = tl.load(v_ptr + row * v_stride_t + v_tile, mask=present[:, None], other=0.0)  # (KEYS, D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # (QUERIES, KEYS)
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                p = tl.where(first + i[:, None] >= key + n[None, :], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # (QUERIES, KEYS)
            if DROPPED:
                keep = keep_mask(seed, head, first, key, QUERIES, KEYS, DROPPED)
                dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rotated_back(dqkv_ptr, dq * scale, inside[:, None], first, cos_ptr, sin_ptr, HEADS * D, D)


@triton.jit
def attention_dkdv_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    do_ptr,  # (B, Tq, H, D)
    stats_ptr,  # (B, H, stats_T, 2) fp32
    seed_ptr,  # (B,) int64, or None
    cos_ptr,  # (Tk, D/2) fp32: the table that q and k were rotated by
    sin_ptr,  # (Tk, D/2) fp32
    dqkv_ptr,  # (B, Tk, H + 2 Hkv, D): dk and dv, after dq
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, stats_T, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DROPPED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    RAGGED: tl.constexpr,  # the last block of queries is not full
):
    HKV: tl.constexpr = H // GROUP
    blocks = tl.cdiv(Tk, KEYS)
    program = tl.program_id(0).to(tl.int64)
    kv_head, b = program // blocks % HKV, program // blocks // HKV
    start = program % blocks * KEYS  # the first keys are seen by the most queries: again the longest first
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    i, n, d = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, D)
    inside = (start + n < Tk)[:, None]
    k_ptr += b * k_stride_b + start * k_stride_t + kv_head * k_stride_h
    v_ptr += b * v_stride_b + start * v_stride_t + kv_head * v_stride_h
    k = tl.load(k_ptr + n[:, None] * k_stride_t + d[None, :], mask=inside, other=0.0)  # (KEYS, D)
    v = tl.load(v_ptr + n[:, None] * v_stride_t + d[None, :], mask=inside, other=0.0)  # (KEYS, D)
    q_tile = i[:, None] * q_stride_t + d[None, :]  # (QUERIES, D)
    do_tile = i[:, None] * (H * D) + d[None, :]  # (QUERIES, D)
    stats_tile = 2 * i[:, None] + tl.arange(0, 2)[None, :]  # (QUERIES, 2)

    dk = tl.zeros((KEYS, D), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)
    past = Tk - Tq  # position of query row 0
    first = start.to(tl.int32)
    begin = tl.maximum(first - past, 0) // QUERIES * QUERIES  # query rows before this see none of these keys
    full = tl.cdiv(tl.maximum(first + KEYS - 1 - past, 0), QUERIES) * QUERIES  # query rows from here on see all of them
    full = tl.minimum(full, tl.cdiv(Tq, QUERIES) * QUERIES)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_head = q_ptr + b * q_stride_b + head * q_stride_h
        do_head = do_ptr + (b * Tq * H + head) * D
        stats = stats_ptr + 2 * (b * H + head) * stats_T
        for MASKED in tl.static_range(1, -1, -1):
            for query in tl.range(begin if MASKED else full, full if MASKED else Tq, QUERIES, num_stages=1 if MASKED else None):
                # Rows beyond Tq are loaded as zeros and contribute nothing. The tiles are transposed, keys by queries, so that
                # P and dS enter the next matmuls from registers.
                row = tl.cast(query, tl.int64)
                present = query + i < Tq if MASKED or RAGGED else tl.full((QUERIES,), True, tl.int1)
                q = tl.load(q_head + row * q_stride_t + q_tile, mask=present[:, None], other=0.0)  # (QUERIES, D)
                do = tl.load(do_head + row * (H * D) + do_tile, mask=present[:, None], other=0.0)  # (QUERIES, D)
                lse, delta = tl.split(tl.load(stats + 2 * query + stats_tile))  # (QUERIES,)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # (KEYS, QUERIES)
                p = tl.exp2(s - lse[None, :])
                if MASKED:
                    p = tl.where(past + query + i[None, :] >= first + n[:, None], p, 0.0)
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # (KEYS, QUERIES)
                kept = p
                if DROPPED:
                    keep = tl.trans(keep_mask(seed, head, past + query, first, QUERIES, KEYS, DROPPED))
                    kept = tl.where(keep, p * (256 / (256 - DROPPED)), 0.0)
                    dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    HEADS: tl.constexpr = H + 2 * HKV
    dqkv_ptr += ((b * Tk + start) * HEADS + H + kv_head) * D
    store_rotated_back(dqkv_ptr, dk * scale, inside, first, cos_ptr, sin_ptr, HEADS * D, D)
    dv_tile = HKV * D + n[:, None] * (HEADS * D) + d[None, :]  # (KEYS, D)
    tl.store(dqkv_ptr + dv_tile, dv.to(dqkv_ptr.dtype.element_ty), mask=inside)
# fmt: on


# Tiles for 16-bit types: (queries, keys, warps, stages) by head dim. The matmuls of compute capability 9 and 10 need 64 rows,
# of keys in dk and dv. On 8 and 12 the registers of each warp hold the accumulators and fill up sooner. The queries of a dk,
# dv tile divide those of the other two kernels, which write the padding of lse and stats that it reads.
SMALLEST = (32, 32, 4, 2)
FEW_QUERIES = {16: (32, 64, 4, 2), 32: (32, 64, 4, 2), 64: (32, 64, 4, 2), 128: (32, 64, 8, 2)}
LARGE_TILES = {
    "forward": {16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (64, 128, 4, 2), 128: (64, 64, 8, 2)},
    "forward dropout": {16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (64, 64, 4, 3), 128: (64, 64, 8, 2)},
    "dq": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 128, 4, 2), 128: (64, 32, 4, 2)},
    "dq dropout": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2)},
    "dkdv": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 64, 8, 2)},
    "dkdv dropout": FEW_QUERIES,
    "dkdv grouped": FEW_QUERIES,  # 64 queries spill
}
SMALL_TILES = LARGE_TILES | {
    "forward": LARGE_TILES["forward"] | {64: (64, 64, 4, 2)},
    "forward dropout": LARGE_TILES["forward dropout"] | {128: (128, 32, 8, 2)},
    "dq": LARGE_TILES["dq dropout"],
    "dq dropout": dict.fromkeys((16, 32, 64, 128), (64, 32, 4, 2)),
    "dkdv": FEW_QUERIES | {128: (32, 32, 4, 1)},
    "dkdv dropout": {16: SMALLEST, 32: SMALLEST, 64: (32, 32, 4, 1), 128: (32, 32, 4, 1)},
    "dkdv grouped": FEW_QUERIES | {128: (32, 32, 4, 1)},
}
TILES = {  # keyed by ten times the lowest compute capability that uses them
    80: SMALL_TILES | {"forward": LARGE_TILES["forward"]},
    86: SMALL_TILES,
    90: LARGE_TILES
    | {  # the fastest of those timed on an H200 (bench.py tiles), at a head dim of 64
        "forward": LARGE_TILES["forward"] | {64: (64, 64, 4, 2)},
        "dq": LARGE_TILES["dq"] | {64: (64, 64, 4, 3)},
        "dq dropout": LARGE_TILES["dq dropout"] | {64: (64, 64, 4, 3)},
        "dkdv": LARGE_TILES["dkdv"] | {64: (64, 64, 4, 3)},
        "dkdv dropout": LARGE_TILES["dkdv dropout"] | {64: (64, 64, 4, 3)},
        "dkdv grouped": LARGE_TILES["dkdv grouped"] | {64: (64, 64, 4, 3)},
    },
    100: LARGE_TILES,
    120: SMALL_TILES
    | {
        "forward": LARGE_TILES["forward"],
        "forward dropout": LARGE_TILES["forward dropout"],
        "dq": SMALL_TILES["dq dropout"],
        "dkdv dropout": dict.fromkeys((16, 32, 128), (32, 32, 4, 1)) | {64: SMALLEST},
    },
}
STATS_ROWS = 128  # the largest number of queries in a tile


def family(device) -> int:
    """Returns the key in TILES of a device's GPU generation."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return max(first for first in TILES if first <= 10 * major + minor)


def tiles(device):
    return TILES[family(device)]


def tile(table, kernel, dtype, D, dropout_p, group=1):
    """Returns the block sizes and launch options of a kernel for `group` query heads per key head. fp32 uses the smallest
    tile, since larger accumulators spill.
    """
    way = " dropout" if dropout_p else " grouped" if group > 1 and kernel == "dkdv" else ""
    queries, keys, warps, stages = SMALLEST if dtype == torch.float32 else table[kernel + way][D]
    return dict(QUERIES=queries, KEYS=keys, num_warps=warps, num_stages=stages)


def check(q, k, v, dropout_p, seed):
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    assert k.shape == v.shape == (B, Tk, Hkv, D), f"k {tuple(k.shape)}, v {tuple(v.shape)}: expected {(B, Tk, Hkv, D)}"
    assert q.dtype == k.dtype == v.dtype, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype"
    assert H % Hkv == 0, f"{H} query heads: expected a multiple of the {Hkv} key heads"
    assert 1 <= Tq <= Tk, f"{Tq} queries for {Tk} keys: expected 1 to {Tk}, the last positions"
    assert D in LARGE_TILES["forward"], f"head dim {D}: the fused attention takes 16, 32, 64 or 128; use --kernels=sdpa"
    assert 0 <= round(dropout_p * 256) < 256, f"dropout {dropout_p}: expected 0 <= p <= 255/256"
    assert dropout_p == 0 or seed.shape == (B,), f"seed {tuple(seed.shape)}: expected {(B,)}"
    assert dropout_p == 0 or seed.dtype == torch.int64, f"seed is {seed.dtype}: expected int64"


def padded(Tq):
    """Returns the length of a row of lse and of stats: unmasked, aligned access to them keeps dk, dv from spilling."""
    return triton.cdiv(Tq, STATS_ROWS) * STATS_ROWS


def launch(name, kernel, q, k, v, tensors, dropout_p):
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    options = tile(tiles(q.device), name, q.dtype, D, dropout_p, H // Hkv)
    if name == "dkdv":
        programs = B * Hkv * triton.cdiv(Tk, options["KEYS"])
        options["RAGGED"] = Tq % options["QUERIES"] != 0
    else:
        programs = B * H * triton.cdiv(Tq, options["QUERIES"])
    kernel[(programs,)](
        q, k, v, *tensors, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Tq, Tk, padded(Tq), D**-0.5, H=H, GROUP=H // Hkv, D=D, DROPPED=round(dropout_p * 256), **options,
    )  # fmt: skip


def forward(q, k, v, dropout_p, seed):
    """Returns out (B, Tq, H, D) and, for the backward pass, lse (B, H, stats_T) in fp32."""
    check(q, k, v, dropout_p, seed)
    seed = rows(seed) if dropout_p else None
    out, lse = empty_outputs(q)
    if q.shape[1] % STATS_ROWS:
        lse.zero_()  # a smaller tile does not reach the end of the padding, and an op must not return uninitialized memory
    launch("forward", attention_forward_kernel, rows(q), rows(k), rows(v), (out, lse, seed), dropout_p)
    return out, lse


def empty_outputs(q):
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, padded(Tq)), dtype=torch.float32)


# Inductor's cache on disk knows an op by its name: one whose arguments or results change takes a new name.
@torch.library.custom_op("copyllama::attention_forward", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(q, k, v, dropout_p, seed)


@torch.library.custom_op("copyllama::rotary_attention", mutates_args=())
def packed_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_kv_heads: int, dropout_p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out and, for the backward pass, lse and the rotated q and k."""
    q, k, v = split_heads(qkv, n_kv_heads)
    q, k = rotate(q, k, cos, sin)
    return *forward(q, k, v, dropout_p, seed), q, k


@torch.library.custom_op("copyllama::attention_gradient", mutates_args=())
def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dropout_p: float,
) -> torch.Tensor:
    """Returns the gradients of q and k before their rotation and of v, packed as (B, Tk, H + 2 Hkv, D).

    cos, sin (Tk, D/2) fp32. If Tq < Tk, the dq rows of the first Tk - Tq positions are left uninitialized.
    """
    q, k, v, do, cos, sin = rows(q), rows(k), rows(v), do.contiguous(), cos.contiguous(), sin.contiguous()
    seed = rows(seed) if dropout_p else None
    dqkv = packed_gradient(q, k)
    stats = lse.new_empty(*lse.shape, 2)  # side by side, one load of 64 x 2 numbers gives each of 128 threads one
    launch("dq", attention_dq_kernel, q, k, v, (out, do, lse, seed, cos, sin, dqkv, stats), dropout_p)
    launch("dkdv", attention_dkdv_kernel, q, k, v, (do, stats, seed, cos, sin, dqkv), dropout_p)
    return dqkv


def packed_gradient(q, k):
    (B, Tk, Hkv, D), H = k.shape, q.shape[2]
    return q.new_empty(B, Tk, H + 2 * Hkv, D)


@attention.register_fake
def _(q, k, v, dropout_p, seed):
    return empty_outputs(q)


@packed_attention.register_fake
def _(qkv, cos, sin, n_kv_heads, dropout_p, seed):
    q, k, _ = split_heads(qkv, n_kv_heads)
    return *empty_outputs(q), q.new_empty(q.shape), k.new_empty(k.shape)


@attention_backward.register_fake
def _(q, k, v, seed, out, lse, do, cos, sin, dropout_p):
    return packed_gradient(q, k)


def save(ctx, inputs, output):
    q, k, v, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, seed, *output)
    ctx.set_materialize_grads(False)  # lse has no gradient


def gradient(ctx, do, _):
    q, k, *others = ctx.saved_tensors
    Tq, (_, Tk, Hkv, D) = q.shape[1], k.shape
    cos = q.new_ones(Tk, D // 2, dtype=torch.float32)  # a rotation by 0
    dq, dk, dv = split_heads(attention_backward(q, k, *others, do, cos, torch.zeros_like(cos), ctx.dropout_p), Hkv)
    return dq[:, Tk - Tq :], dk, dv, None, None


def save_packed(ctx, inputs, output):
    qkv, cos, sin, ctx.n_kv_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, cos, sin, seed, *output)
    ctx.set_materialize_grads(False)


def packed_gradient_formula(ctx, do, *_):
    qkv, cos, sin, seed, out, lse, q, k = ctx.saved_tensors
    v = split_heads(qkv, ctx.n_kv_heads)[2]
    return attention_backward(q, k, v, seed, out, lse, do, cos, sin, ctx.dropout_p), None, None, None, None, None


attention.register_autograd(gradient, setup_context=save)
packed_attention.register_autograd(packed_gradient_formula, setup_context=save_packed)


def causal_attention(q, k, v, dropout_p=0.0, seed=None):
    """softmax(q k^T / sqrt(Dh)) v, where each query sees the keys up to its own position.

    q (B, Tq, H, Dh); k, v (B, Tk, Hkv, Dh) with Tq <= Tk: the queries are the last Tq positions (Tq < Tk with a KV
    cache). Query head h reads key head h // (H / Hkv). Dropout takes seed (B,) int64, a key for each sequence.
    -> (B, Tq, H, Dh).
    """
    return attention(q, k, v, dropout_p, seed)[0]


def rotary_attention(qkv, cos, sin, n_kv_heads, dropout_p=0.0, seed=None):
    """causal_attention of the packed projection qkv (B, T, H + 2 Hkv, Dh), with q and k rotated first -> (B, T, H, Dh).

    cos, sin (T, Dh/2) fp32. The gradient of qkv is one tensor that both backward kernels write into.
    """
    return packed_attention(qkv, cos, sin, n_kv_heads, dropout_p, seed)[0]
