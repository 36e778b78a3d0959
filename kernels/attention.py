"""Causal attention, forward and backward, on Triton. Dao 2023 (FlashAttention-2), Rabe & Staats 2021.

    S = c q k^T    P = softmax(S) over the keys up to the query's position    o = (M P) v        c = 1 / sqrt(Dh)
    delta = rowsum(do o)    dS = P (M (do v^T) - delta)    dq = c dS k    dk = c dS^T q    dv = (M P)^T do

No (Tq, Tk) matrix exists in memory. Forward keeps a block of queries and walks over the keys with a running maximum and
sum; it saves log2(sum exp), from which backward recomputes P. M is dropout's mask, 0 or 1 / (share kept): never stored, a
function of (sequence seed, head, position, key), drawn again wherever it is needed; eager.dropout_mask defines it.

Counting the causal half, forward is 4 B H T^2 Dh / 2 FLOPs, backward 2.5 times that. At Dh = 64 the exponentials cost as
many cycles as the matmuls, so what counts is that two or three programs share a multiprocessor and overlap the two:
registers and shared memory decide the tiles, which `tiles` lists. Full blocks run without a mask, and only those that the
diagonal crosses with one. The scale joins log2(e) in the exponent, after the dot: scaling q or k first would round them twice.

Backward is two kernels of which each recomputes S: one owns a block of keys (dk, dv), one a block of queries (dq). That is 7
matmuls where 5 would do, but needs no atomics: the same bits every run, and each kernel has the tile that suits it. With
grouped queries the dk, dv program loops over the query heads of its key head, so K and V are never repeated.

Program ids become int64 before they are multiplied; offsets inside a tile are int32.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def keep_mask(seed, head, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPPED: tl.constexpr):
    """Which probabilities of a tile dropout keeps, (QUERIES, KEYS): a Philox call gives 16 bytes, one for each of 16 keys."""
    query = (first_query + tl.arange(0, QUERIES)[:, None]).to(tl.uint32)  # (QUERIES, 1)
    group = (first_key // 16 + tl.arange(0, KEYS // 16)[None, :]).to(tl.uint32)  # (1, KEYS/16)
    query, group = tl.broadcast(query, group)  # (QUERIES, KEYS/16)
    zero = query * 0
    w0, w1, w2, w3 = tl.philox(seed, query, zero + tl.cast(head, tl.uint32), group, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(QUERIES, KEYS // 16, 4, 1)  # in the order w0 w1 w2 w3
    byte = (words >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]) & 0xFF  # (QUERIES, KEYS/16, 4, 4)
    return (byte >= DROPPED).reshape(QUERIES, KEYS)


@triton.jit
def forward_step(
    acc,  # (QUERIES, D) fp32: sum of P v so far, to the base of `top`
    total,  # (QUERIES,): sum of P
    top,  # (QUERIES,): maximum of S log2(e)
    q,  # (QUERIES, D)
    k_ptr,  # row 0 of this head
    v_ptr,  # likewise
    k_stride_t,
    v_stride_t,
    first_query,  # position
    first_key,
    Tk,
    seed,
    head,
    scale,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One block of keys for a block of queries."""
    n, d = tl.arange(0, KEYS), tl.arange(0, D)
    key = first_key + n
    k_ptrs = k_ptr + tl.cast(first_key, tl.int64) * k_stride_t + (n[None, :] * k_stride_t + d[:, None])  # (D, KEYS)
    v_ptrs = v_ptr + tl.cast(first_key, tl.int64) * v_stride_t + (n[:, None] * v_stride_t + d[None, :])  # (KEYS, D)
    if MASKED:
        k = tl.load(k_ptrs, mask=key[None, :] < Tk, other=0.0)  # (D, KEYS)
        v = tl.load(v_ptrs, mask=key[:, None] < Tk, other=0.0)  # (KEYS, D)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    s = tl.dot(q, k, input_precision="ieee") * (scale * LOG2E)  # (QUERIES, KEYS)
    if MASKED:
        query = first_query + tl.arange(0, QUERIES)
        s = tl.where(query[:, None] >= key[None, :], s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    p = tl.exp2(s - new_top[:, None])  # (QUERIES, KEYS)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    if DROPPED:
        p = tl.where(keep_mask(seed, head, first_query, first_key, QUERIES, KEYS, DROPPED), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def forward_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32: log2 of the sum of exp(S)
    seed_ptr,  # (B,) int64, or None
    q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    DROPPED: tl.constexpr,  # of 256
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, QUERIES)
    program = tl.program_id(0).to(tl.int64)
    head, b = program // blocks % H, program // blocks // H
    start = (blocks - 1 - program % blocks) * QUERIES  # the longest rows first, so that short ones fill the tail
    first_query = (start + Tk - Tq).to(tl.int32)  # position: the queries are the last Tq of Tk
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    i, d = tl.arange(0, QUERIES), tl.arange(0, D)
    q_ptr += b * q_stride_b + start * q_stride_t + head * q_stride_h
    k_ptr += b * k_stride_b + head // GROUP * k_stride_h
    v_ptr += b * v_stride_b + head // GROUP * v_stride_h
    inside = start + i < Tq
    q = tl.load(q_ptr + i[:, None] * q_stride_t + d[None, :], mask=inside[:, None], other=0.0)  # (QUERIES, D)

    acc = tl.zeros((QUERIES, D), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    full = (first_query + 1) // KEYS * KEYS  # keys before this are seen by every query of the block
    end = tl.minimum(first_query + QUERIES, Tk)
    for key in range(0, full, KEYS):
        acc, total, top = forward_step(
            acc,
            total,
            top,
            q,
            k_ptr,
            v_ptr,
            k_stride_t,
            v_stride_t,
            first_query,
            key,
            Tk,
            seed,
            head,
            scale,
            False,
            DROPPED,
            D,
            QUERIES,
            KEYS,
        )
    for key in tl.range(full, end, KEYS, num_stages=1):
        acc, total, top = forward_step(
            acc,
            total,
            top,
            q,
            k_ptr,
            v_ptr,
            k_stride_t,
            v_stride_t,
            first_query,
            key,
            Tk,
            seed,
            head,
            scale,
            True,
            DROPPED,
            D,
            QUERIES,
            KEYS,
        )

    out = acc / total[:, None] * (256 / (256 - DROPPED))
    out_ptr += ((b * Tq + start) * H + head) * D
    tl.store(out_ptr + i[:, None] * (H * D) + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_ptr + (b * H + head) * Tq + start + i, top + tl.log2(total), mask=inside)


@triton.jit
def dq_step(
    dq,  # (QUERIES, D) fp32
    q,  # (QUERIES, D)
    do,  # (QUERIES, D)
    lse,  # (QUERIES,)
    delta,  # (QUERIES,)
    k_ptr,  # row 0 of this head
    v_ptr,  # likewise
    k_stride_t,
    v_stride_t,
    first_query,
    first_key,
    Tk,
    seed,
    head,
    scale,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One block of keys for a block of queries."""
    n, d = tl.arange(0, KEYS), tl.arange(0, D)
    key = first_key + n
    k_ptrs = k_ptr + tl.cast(first_key, tl.int64) * k_stride_t + (n[:, None] * k_stride_t + d[None, :])  # (KEYS, D)
    v_ptrs = v_ptr + tl.cast(first_key, tl.int64) * v_stride_t + (n[:, None] * v_stride_t + d[None, :])  # (KEYS, D)
    if MASKED:
        k = tl.load(k_ptrs, mask=key[:, None] < Tk, other=0.0)  # (KEYS, D)
        v = tl.load(v_ptrs, mask=key[:, None] < Tk, other=0.0)  # (KEYS, D)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # (QUERIES, KEYS)
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        query = first_query + tl.arange(0, QUERIES)
        p = tl.where(query[:, None] >= key[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # (QUERIES, KEYS)
    if DROPPED:
        keep = keep_mask(seed, head, first_query, first_key, QUERIES, KEYS, DROPPED)
        dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    out_ptr,  # (B, Tq, H, D)
    do_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32
    seed_ptr,  # (B,) int64, or None
    dq_ptr,  # (B, Tq, H, D)
    delta_ptr,  # (B, H, Tq) fp32: written here, for the other kernel
    q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DROPPED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, QUERIES)
    program = tl.program_id(0).to(tl.int64)
    head, b = program // blocks % H, program // blocks // H
    start = (blocks - 1 - program % blocks) * QUERIES
    first_query = (start + Tk - Tq).to(tl.int32)
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    i, d = tl.arange(0, QUERIES), tl.arange(0, D)
    q_ptr += b * q_stride_b + start * q_stride_t + head * q_stride_h
    k_ptr += b * k_stride_b + head // GROUP * k_stride_h
    v_ptr += b * v_stride_b + head // GROUP * v_stride_h
    inside = start + i < Tq
    rows = ((b * Tq + start) * H + head) * D + i[:, None] * (H * D) + d[None, :]  # (QUERIES, D) of out, do and dq
    stats = (b * H + head) * Tq + start + i  # (QUERIES,) of lse and delta

    q = tl.load(q_ptr + i[:, None] * q_stride_t + d[None, :], mask=inside[:, None], other=0.0)
    do = tl.load(do_ptr + rows, mask=inside[:, None], other=0.0)
    out = tl.load(out_ptr + rows, mask=inside[:, None], other=0.0)
    lse = tl.load(lse_ptr + stats, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + stats, delta, mask=inside)

    dq = tl.zeros((QUERIES, D), tl.float32)
    full = (first_query + 1) // KEYS * KEYS
    end = tl.minimum(first_query + QUERIES, Tk)
    for key in range(0, full, KEYS):
        dq = dq_step(
            dq,
            q,
            do,
            lse,
            delta,
            k_ptr,
            v_ptr,
            k_stride_t,
            v_stride_t,
            first_query,
            key,
            Tk,
            seed,
            head,
            scale,
            False,
            DROPPED,
            D,
            QUERIES,
            KEYS,
        )
    for key in tl.range(full, end, KEYS, num_stages=1):
        dq = dq_step(
            dq,
            q,
            do,
            lse,
            delta,
            k_ptr,
            v_ptr,
            k_stride_t,
            v_stride_t,
            first_query,
            key,
            Tk,
            seed,
            head,
            scale,
            True,
            DROPPED,
            D,
            QUERIES,
            KEYS,
        )
    tl.store(dq_ptr + rows, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def dkdv_step(
    dk,  # (KEYS, D) fp32
    dv,  # (KEYS, D) fp32
    k,  # (KEYS, D)
    v,  # (KEYS, D)
    q_ptr,  # row 0 of this head
    do_ptr,  # likewise
    lse_ptr,  # likewise
    delta_ptr,  # likewise
    q_stride_t,
    do_stride_t,
    start,  # row of the first query
    past,  # Tk - Tq: the position of row 0
    first_key,
    Tq,
    seed,
    head,
    scale,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One block of queries for a block of keys. Tiles stand transposed, keys by queries, so that P and dS feed the matmuls
    from registers. Rows beyond Tq load as zeros, and add zeros.
    """
    i, d = tl.arange(0, QUERIES), tl.arange(0, D)
    row = start + i
    inside = row < Tq
    q_ptrs = q_ptr + tl.cast(start, tl.int64) * q_stride_t + (i[:, None] * q_stride_t + d[None, :])  # (QUERIES, D)
    do_ptrs = do_ptr + tl.cast(start, tl.int64) * do_stride_t + (i[:, None] * do_stride_t + d[None, :])  # (QUERIES, D)
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    do = tl.load(do_ptrs, mask=inside[:, None], other=0.0)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)  # (QUERIES,)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # (KEYS, QUERIES)
    p = tl.exp2(s - lse[None, :])
    if MASKED:
        key = first_key + tl.arange(0, KEYS)
        p = tl.where(row[None, :] + past >= key[:, None], p, 0.0)
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # (KEYS, QUERIES)
    kept = p
    if DROPPED:
        keep = tl.trans(keep_mask(seed, head, start + past, first_key, QUERIES, KEYS, DROPPED))
        kept = tl.where(keep, p * (256 / (256 - DROPPED)), 0.0)
        dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)
    dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr,  # (B, Tq, H, D), any strides but a contiguous last dim
    k_ptr,  # (B, Tk, Hkv, D), likewise
    v_ptr,  # (B, Tk, Hkv, D), likewise
    do_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32
    delta_ptr,  # (B, H, Tq) fp32
    seed_ptr,  # (B,) int64, or None
    dk_ptr,  # (B, Tk, Hkv, D)
    dv_ptr,  # (B, Tk, Hkv, D)
    q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    Tq, Tk, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DROPPED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    HKV: tl.constexpr = H // GROUP
    blocks = tl.cdiv(Tk, KEYS)
    program = tl.program_id(0).to(tl.int64)
    kv_head, b = program // blocks % HKV, program // blocks // HKV
    start = program % blocks * KEYS  # the first keys are seen by the most queries: longest first here too
    first_key = start.to(tl.int32)
    seed = tl.load(seed_ptr + b) if DROPPED else 0

    n, d = tl.arange(0, KEYS), tl.arange(0, D)
    inside = (start + n < Tk)[:, None]
    k_ptr += b * k_stride_b + start * k_stride_t + kv_head * k_stride_h
    v_ptr += b * v_stride_b + start * v_stride_t + kv_head * v_stride_h
    k = tl.load(k_ptr + n[:, None] * k_stride_t + d[None, :], mask=inside, other=0.0)  # (KEYS, D)
    v = tl.load(v_ptr + n[:, None] * v_stride_t + d[None, :], mask=inside, other=0.0)  # (KEYS, D)

    dk = tl.zeros((KEYS, D), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)
    past = Tk - Tq
    begin = tl.maximum(first_key - past, 0) // QUERIES * QUERIES  # rows before this see none of these keys
    full = tl.maximum(first_key + KEYS - 1 - past, 0)  # rows from here on see all of them
    full = tl.minimum(tl.cdiv(full, QUERIES) * QUERIES, tl.cdiv(Tq, QUERIES) * QUERIES)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_row = q_ptr + b * q_stride_b + head * q_stride_h
        do_row = do_ptr + (b * Tq * H + head) * D
        stats = (b * H + head) * Tq
        for row in tl.range(begin, full, QUERIES, num_stages=1):
            dk, dv = dkdv_step(
                dk, dv, k, v, q_row, do_row, lse_ptr + stats, delta_ptr + stats, q_stride_t, H * D, row, past, first_key, Tq,
                seed, head, scale, True, DROPPED, D, QUERIES, KEYS,
            )  # fmt: skip
        for row in range(full, Tq, QUERIES):
            dk, dv = dkdv_step(
                dk, dv, k, v, q_row, do_row, lse_ptr + stats, delta_ptr + stats, q_stride_t, H * D, row, past, first_key, Tq,
                seed, head, scale, False, DROPPED, D, QUERIES, KEYS,
            )  # fmt: skip
    rows = ((b * Tk + start) * HKV + kv_head) * D + n[:, None] * (HKV * D) + d[None, :]  # (KEYS, D)
    tl.store(dk_ptr + rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + rows, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def tiles(kernel, dtype, D, dropout):
    """Queries, keys, warps and stages of a kernel: without spills on sm_80, sm_90 and sm_100 (LOG.md has the figures)."""
    if dtype == torch.float32:  # on the plain arithmetic units, exactly
        return dict(QUERIES=32, KEYS=32, num_warps=4, num_stages=1)
    return dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2)


def check(q, k, v, dropout_p, seed):
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    assert k.shape == v.shape == (B, Tk, Hkv, D), f"k {tuple(k.shape)}, v {tuple(v.shape)}: expected {(B, Tk, Hkv, D)}"
    assert q.dtype == k.dtype == v.dtype, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype"
    assert H % Hkv == 0, f"{H} query heads: expected a multiple of the {Hkv} key heads"
    assert 1 <= Tq <= Tk, f"{Tq} queries for {Tk} keys: expected 1 to {Tk}, the last positions"
    assert D in (32, 64, 128), f"head dim {D}: the fused attention takes 32, 64 or 128; use --kernels=eager"
    assert 0 <= dropout_p < 1 and (dropout_p == 0 or seed.shape == (B,)), f"dropout {dropout_p}: expected 0 <= p < 1, seed (B,)"


def rows(x):
    """x itself where its last dim is contiguous, else a copy that is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel, programs, q, k, v, tensors, dropout_p, options):
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    dropped = round(dropout_p * 256)
    kernel[(programs,)](
        q, k, v, *tensors, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Tq, Tk, D**-0.5, H=H, GROUP=H // Hkv, D=D, DROPPED=dropped, **options,
    )  # fmt: skip


@torch.library.custom_op("copyllama::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (B, Tq, H, D) and, for backward, lse (B, H, Tq) in fp32."""
    check(q, k, v, dropout_p, seed)
    (B, Tq, H, D), q, k, v = q.shape, rows(q), rows(k), rows(v)
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)
    options = tiles("forward", q.dtype, D, dropout_p)
    launch(forward_kernel, B * H * triton.cdiv(Tq, options["QUERIES"]), q, k, v, (out, lse, seed), dropout_p, options)
    return out, lse


@torch.library.custom_op("copyllama::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    q, k, v, do = rows(q), rows(k), rows(v), do.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    options = tiles("dq", q.dtype, D, dropout_p)
    programs = B * H * triton.cdiv(Tq, options["QUERIES"])
    launch(dq_kernel, programs, q, k, v, (out, do, lse, seed, dq, delta), dropout_p, options)
    options = tiles("dkdv", q.dtype, D, dropout_p)
    programs = B * Hkv * triton.cdiv(Tk, options["KEYS"])
    launch(dkdv_kernel, programs, q, k, v, (do, lse, delta, seed, dk, dv), dropout_p, options)
    return dq, dk, dv


@attention.register_fake
def _(q, k, v, dropout_p, seed):
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


@attention_backward.register_fake
def _(q, k, v, out, lse, do, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save(ctx, inputs, output):
    q, k, v, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.set_materialize_grads(False)  # lse has none


def gradient(ctx, do, _):
    *tensors, seed = ctx.saved_tensors
    return *attention_backward(*tensors, do, ctx.dropout_p, seed), None, None


attention.register_autograd(gradient, setup_context=save)


def causal_attention(q, k, v, dropout_p=0.0, seed=None):
    """softmax(q k^T / sqrt(Dh)) v, each query seeing the keys up to its own position.

    q (B, Tq, H, Dh); k, v (B, Tk, Hkv, Dh) with Tq <= Tk: the queries are the last Tq positions (Tq < Tk with a KV
    cache). Query head h reads key head h // (H / Hkv). Dropout takes seed (B,) int64, a key for each sequence.
    -> (B, Tq, H, Dh).
    """
    return attention(q, k, v, dropout_p, seed)[0]
