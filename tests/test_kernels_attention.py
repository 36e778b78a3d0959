import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_registration,
    check_repeats,
    error,
    layouts,
    needs_gpu,
    outputs_start_as_nan,
    randn,
    run,
)

from kernels import eager  # isort: skip  after the interpreter is set up
from kernels.attention import STATS_ROWS, TILES, attention, causal_attention, packed_attention, rotary_attention  # isort: skip
from tests.test_kernels_rotary import table, torch_rotary  # isort: skip


def torch_attention(q, k, v):
    """SDPA's math backend."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    with sdpa_kernel(SDPBackend.MATH):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def torch_dropout_attention(q, k, v, p, seed):
    """The usual torch code in the activations' dtype, with the mask that eager draws."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    future = torch.full((q.shape[1], k.shape[2]), float("-inf"), device=q.device).triu(k.shape[2] - q.shape[1] + 1)
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[3] ** -0.5 + future.to(q.dtype)
    probs = scores.softmax(-1)
    return (probs * eager.dropout_mask(seed, probs.shape, p).to(q.dtype) @ v).transpose(1, 2)


def qkv(B, Tq, Tk, H, Hkv, Dh, dtype=torch.float32):
    return randn(B, Tq, H, Dh, dtype=dtype), randn(B, Tk, Hkv, Dh, dtype=dtype), randn(B, Tk, Hkv, Dh, dtype=dtype)


def some_seed(B):
    return torch.randint(-(2**63), 2**63 - 1, (B,), device=DEVICE)


def check_attention(shape, dtype):
    q, k, v = qkv(*shape, dtype)
    do = torch.randn_like(q)
    floor = do.double().norm() if shape[2] == 1 else 0.0  # with one key, dq and dk are exactly zero
    check(causal_attention, eager.causal_attention, torch_attention, [q, k, v], [do], 1.0, floor)


SHAPES = [  # B, Tq, Tk, H, Hkv, Dh
    (2, 1, 1, 2, 1, 32),
    (1, 63, 63, 2, 2, 64),
    (2, 77, 77, 2, 1, 32),
    (1, 130, 130, 2, 1, 128),
    (1, 5, 100, 4, 1, 64),  # the KV cache of a prompt and five tokens
    (2, 1, 129, 2, 2, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_are_as_near_to_fp64_as_torchs(shape, dtype):
    check_attention(shape, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [64, 128, 257, 1000, 1024])
@pytest.mark.parametrize("Dh", [32, 64, 128])
def test_larger_grids_are_as_near_to_fp64_as_torchs(T, Dh, dtype):
    check_attention((1, T, T, 2, 1, Dh), dtype)
    check_attention((2, 3, T, 3, 3, Dh), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 77, 77, 4, 2, 32), (1, 3, 66, 2, 1, 64)])
def test_dropout_is_the_mask_that_eager_draws_forward_and_backward(shape, dtype):
    q, k, v = qkv(*shape, dtype)
    seed = some_seed(shape[0])

    def with_dropout(op):
        return lambda q, k, v: op(q, k, v, 0.25, seed)

    ops = [with_dropout(op) for op in (causal_attention, eager.causal_attention, torch_dropout_attention)]
    check(*ops, [q, k, v], [torch.randn_like(q)], 1.0)


def test_a_sequence_keeps_its_mask_in_any_batch():
    q, k, v = qkv(3, 20, 20, 2, 1, 32)
    seed = some_seed(3)
    together = causal_attention(q, k, v, 0.5, seed)
    for b in range(3):
        assert torch.equal(causal_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], 0.5, seed[b : b + 1])[0], together[b])
    assert not torch.equal(causal_attention(q, k, v, 0.5, seed + 1), together)


@pytest.mark.parametrize("seed", [torch.arange(4)[::2], torch.tensor([7]).expand(2)], ids=["slice", "expanded"])
def test_seeds_may_have_any_strides(seed):
    inputs, seed = qkv(2, 9, 9, 2, 1, 32), seed.to(DEVICE)
    do = torch.randn_like(inputs[0])
    results = [run(lambda q, k, v, s=s: causal_attention(q, k, v, 0.5, s), inputs, [do]) for s in (seed, seed.contiguous())]
    assert seed.stride() != (1,) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def torch_rotary_attention(qkv, cos, sin, n_kv_heads, dropout_p, seed):
    q, k, v = eager.split_heads(qkv, n_kv_heads)
    q, k = torch_rotary(q, k, cos, sin)
    return torch_dropout_attention(q, k, v, dropout_p, seed) if dropout_p else torch_attention(q, k, v)


def check_rotary_attention(shape, dtype, dropout_p, op=rotary_attention, layout="dense"):
    B, T, H, Hkv, Dh = shape
    qkv = torch.randn(B, T, (H + 2 * Hkv) * Dh + 3, device=DEVICE).to(dtype)[..., 3:].unflatten(-1, (-1, Dh)).requires_grad_()
    seed = some_seed(B)

    def packed(op):
        return lambda qkv, cos, sin: op(qkv, cos, sin, Hkv, dropout_p, seed)

    ops = map(packed, (op, eager.rotary_attention, torch_rotary_attention))
    check(*ops, [qkv, *table(T, Dh)], [layouts((B, T, H, Dh), dtype)[layout]], 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dropout_p", [((2, 77, 4, 2, 32), 0.0), ((1, 64, 2, 2, 64), 0.25), ((1, 70, 3, 1, 16), 0.0)])
def test_packed_rotary_attention_and_its_gradient_are_as_near_to_fp64_as_torchs(shape, dropout_p, dtype):
    check_rotary_attention(shape, dtype, dropout_p)


@pytest.mark.parametrize("layout", ["sum", "transposed"])
def test_packed_gradients_may_have_any_strides(layout):
    check_rotary_attention((2, 9, 4, 2, 32), torch.float32, 0.0, layout=layout)


@pytest.mark.parametrize("layout", ["sum", "transposed"])
def test_gradients_may_have_any_strides(layout):
    q, k, v = qkv(2, 9, 9, 4, 2, 32)
    check(causal_attention, eager.causal_attention, torch_attention, [q, k, v], [layouts(q.shape, q.dtype)[layout]], 1.0)


def test_inputs_may_be_slices_of_a_packed_qkv_or_transposed():
    packed = torch.randn(2, 37, 8 * 32 + 3, device=DEVICE)[..., 3:].unflatten(-1, (8, 32)).split((4, 2, 2), 2)
    do = torch.randn(2, 37, 4, 32, device=DEVICE)
    check(causal_attention, eager.causal_attention, torch_attention, [x.requires_grad_() for x in packed], [do], 1.0)
    turned = [torch.randn(32, h, 37, 2, device=DEVICE).permute(3, 2, 1, 0).requires_grad_() for h in (4, 2, 2)]
    check(causal_attention, eager.causal_attention, torch_attention, turned, [do], 1.0)
    heads_first = [torch.randn(2, h, 37, 32, device=DEVICE).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]
    check(causal_attention, eager.causal_attention, torch_attention, heads_first, [do], 1.0)


def test_scores_far_apart_neither_overflow_nor_become_nan():
    q, k, v = (x.detach().mul(100).requires_grad_() for x in qkv(1, 70, 70, 1, 1, 32))
    out = causal_attention(q, k, v)
    assert error(out, eager.causal_attention(q.double(), k.double(), v.double())) < 1e-4
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_position_sees_nothing_of_the_future():
    q, k, v = qkv(1, 70, 70, 1, 1, 32)
    before = causal_attention(q, k, v)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, 40:], v2[:, 40:] = 1e4, float("nan")
    assert torch.equal(causal_attention(q[:, :40], k2[:, :40], v2[:, :40]), before[:, :40])
    dk = torch.autograd.grad(causal_attention(q, k, v)[:, :40].sum(), k)[0]
    assert (dk[:, 40:] == 0).all() and (dk[:, :40] != 0).any()


def test_offsets_beyond_int32_reach_the_right_elements():
    """Three sequences 2^30 elements apart: the third lies 2^31 in. The pages between them are never touched."""
    stride, (B, T, H, Dh) = 2**30 + 16, (3, 5, 1, 32)
    far = torch.from_numpy(np.empty(2 * stride + T * H * Dh, np.int16)).view(torch.bfloat16).to(DEVICE)
    far = far.as_strided((B, T, H, Dh), (stride, H * Dh, Dh, 1))
    near = torch.randn(B, T, H, Dh, device=DEVICE).to(torch.bfloat16).requires_grad_()
    far = far.copy_(near.detach()).requires_grad_()
    results = []
    for x in (far, near):
        out = causal_attention(x, x, x)
        out, lse = attention(x, x, x, 0.0, None)
        results.append((out, torch.ops.copyllama.attention_gradient(x, x, x, None, out, lse, near, *table(T, Dh), 0.0)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(Dh=48), "head dim 48"),
        (dict(Hkv=3), "4 query heads: expected a multiple of the 3"),
        (dict(Tq=9), "9 queries for 8 keys"),
    ],
)
def test_unsupported_shapes_are_refused_with_the_reason(change, said):
    shape = dict(B=1, Tq=8, Tk=8, H=4, Hkv=2, Dh=32) | change
    with pytest.raises(AssertionError, match=said):
        causal_attention(*qkv(*shape.values()))


@pytest.mark.parametrize("p", [-0.1, 0.999, 1.0])
def test_a_dropout_that_is_rounded_to_all_keys_is_refused(p):
    with pytest.raises(AssertionError, match="expected 0 <= p <= 255/256"):
        causal_attention(*qkv(2, 9, 9, 2, 1, 32), p, some_seed(2))


def test_seeds_of_another_shape_or_dtype_are_refused():
    with pytest.raises(AssertionError, match=r"seed \(3,\): expected \(2,\)"):
        causal_attention(*qkv(2, 9, 9, 2, 1, 32), 0.5, some_seed(3))
    with pytest.raises(AssertionError, match="seed is torch.int32: expected int64"):
        causal_attention(*qkv(2, 9, 9, 2, 1, 32), 0.5, some_seed(2).int())


@pytest.mark.parametrize("dtype, Dh", [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float32, 32)])
def test_registration_holds(dtype, Dh):
    q, k, v = qkv(2, 9, 9, 4, 2, Dh, dtype)
    seed = some_seed(2)
    torch.library.opcheck(attention, (q, k, v, 0.25, seed))
    torch.library.opcheck(attention, (q, k, v, 0.0, None))
    check_registration(lambda q, k, v, seed: causal_attention(q, k, v, 0.25, seed), [q, k, v, seed], [torch.randn_like(q)])
    inputs = [torch.cat((q, k, v), dim=2).detach().requires_grad_(), *table(9, Dh)]
    torch.library.opcheck(packed_attention, (*inputs, 2, 0.25, seed))
    check_registration(lambda *xs: rotary_attention(*xs, 2, 0.25, seed), inputs, [torch.randn_like(q)])


def test_rows_that_dk_and_dv_read_are_written_by_the_other_kernels():
    """lse and delta are read unmasked, in blocks of a dk, dv tile's queries."""
    for tiles in TILES.values():
        for way in ("", " dropout", " grouped"):
            for D, (queries, *_) in tiles["dkdv" + way].items():
                for writer in ("forward", "dq"):
                    written = tiles[writer + way.replace(" grouped", "")][D][0]
                    assert written % queries == 0 and STATS_ROWS % written == 0, (writer, way, D)


@needs_gpu
def test_two_runs_have_the_same_bits():
    q, k, v = qkv(8, 1024, 1024, 12, 4, 64, torch.bfloat16)
    seed = some_seed(8)
    check_repeats(lambda q, k, v: causal_attention(q, k, v, 0.1, seed), [q, k, v], [torch.randn_like(q)])
