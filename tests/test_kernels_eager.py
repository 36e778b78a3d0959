"""Each op against its formula written out in float64, against torch's own, and in bf16 against what it must not exceed.

The references are loops and formulas that share nothing with kernels/eager.py; the gradients are checked through them too.
"""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import eager
from tests.test_kernels_dropout import philox_mask_numpy

ROOT = Path(__file__).resolve().parent.parent
F64, BF16 = torch.float64, torch.bfloat16


def randn(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_()


def same_function(op, reference, inputs, tol=1e-12):
    """Outputs and the gradients of a random projection of them agree, in float64."""
    results = []
    for f in (op, reference):
        out = f(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        scalar = sum((o * randn(*o.shape, seed=7).detach()).sum() for o in out)
        results.append([*out, *torch.autograd.grad(scalar, inputs)])
    torch.testing.assert_close(*results, rtol=tol, atol=tol)


def rounds_once(op, inputs, naive):
    """bf16 in, bf16 out: off by half an ulp of the exact result, and no worse than `naive`, computed in bf16 throughout."""
    exact = op(*(x.detach().double() for x in inputs))
    out, naive = op(*(x.detach() for x in inputs)), naive(*(x.detach() for x in inputs))
    for o, n, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, naive, exact)), strict=True):
        assert o.dtype == n.dtype == BF16
        error = (o.double() - e).abs()
        assert (error <= 2.0**-8 * e.abs() * 1.001 + 1e-6).all()  # half an ulp is 2^-9 to 2^-8 of the value
        assert error.mean() <= (n.double() - e).abs().mean()


# The norm


def rms_norm_formula(x, weight, eps):
    rows = [row / (sum(c * c for c in row) / len(row) + eps).sqrt() * weight for row in x.flatten(0, -2)]
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 7), (1, 1)])
def test_rms_norm_equals_its_formula_and_torchs(shape):
    x, weight = randn(*shape), randn(shape[-1], seed=1)
    same_function(lambda x, w: eager.rms_norm(x, w, 1e-2), lambda x, w: rms_norm_formula(x, w, 1e-2), (x, weight))
    same_function(lambda x, w: eager.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), (x, weight))


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(2, 4, requires_grad=True)
    out = eager.rms_norm(x, torch.ones(4), 1e-6)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum():
    x, residual, weight = randn(3, 4, 8), randn(3, 4, 8, seed=1), randn(8)
    same_function(
        lambda x, r, w: eager.add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: (rms_norm_formula(x + r, w, 1e-6), x + r),
        (x, residual, weight),
    )


def test_rms_norm_of_bf16_rounds_once():
    def naive(x, weight):
        return x / x.square().mean(-1, keepdim=True).sqrt() * weight

    x, weight = randn(50, 96, dtype=BF16), randn(96, dtype=BF16)
    rounds_once(lambda x, w: eager.rms_norm(x, w, 1e-6), (x, weight), naive)


# Rotary


def rotary_formula(q, k, cos, sin):
    """Pair (i, i + Dh/2) as a complex number, times e^(i angle), one channel at a time."""

    def rotate(x):
        half = x.shape[-1] // 2
        real = [x[..., i] * cos[:, i, None] - x[..., i + half] * sin[:, i, None] for i in range(half)]
        imaginary = [x[..., i] * sin[:, i, None] + x[..., i + half] * cos[:, i, None] for i in range(half)]
        return torch.stack(real + imaginary, -1)

    return rotate(q), rotate(k)


def angles(T, half):
    return torch.arange(T, dtype=F64)[:, None] * 10 ** -torch.arange(half, dtype=F64)


@pytest.mark.parametrize("H, Hkv, Dh", [(4, 4, 8), (4, 2, 2), (3, 1, 6)])
def test_rotary_equals_a_complex_product(H, Hkv, Dh):
    cos, sin = angles(5, Dh // 2).cos(), angles(5, Dh // 2).sin()
    q, k = randn(2, 5, H, Dh), randn(2, 5, Hkv, Dh, seed=1)
    same_function(lambda q, k: eager.rotary(q, k, cos, sin), lambda q, k: rotary_formula(q, k, cos, sin), (q, k))


def test_rotary_keeps_lengths_and_leaves_position_0_alone():
    cos, sin = angles(5, 4).cos(), angles(5, 4).sin()
    q, k = randn(2, 5, 3, 8), randn(2, 5, 1, 8)
    for before, after in zip((q, k), eager.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(after[:, 0], before[:, 0])
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


def test_rotary_of_bf16_rounds_once_with_an_fp32_table():
    cos, sin = angles(40, 8).cos(), angles(40, 8).sin()

    def op(q, k):
        table = (cos, sin) if q.dtype == F64 else (cos.float(), sin.float())
        return eager.rotary(q, k, *table)

    q, k = randn(2, 40, 4, 16, dtype=BF16), randn(2, 40, 2, 16, dtype=BF16)
    rounds_once(op, (q, k), lambda q, k: rotary_formula(q, k, cos.to(BF16), sin.to(BF16)))


# Attention

SHAPES = [(2, 7, 7, 4, 4, 6), (1, 9, 9, 6, 2, 4), (2, 3, 8, 4, 1, 2), (1, 1, 5, 2, 2, 8), (1, 1, 1, 1, 1, 2)]
each_shape = pytest.mark.parametrize("B, Tq, Tk, H, Hkv, Dh", SHAPES)


def attention_loops(q, k, v, mask=None):
    """One query of one head at a time; mask (B, H, Tq, Tk) multiplies the probabilities."""
    (B, Tq, H, Dh), Tk, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out = []
    for b in range(B):
        for i in range(Tq):
            for h in range(H):
                seen = Tk - Tq + i + 1
                scores = [(q[b, i, h] * k[b, j, h // group]).sum() / math.sqrt(Dh) for j in range(seen)]
                top = max(s.item() for s in scores)
                weights = [(s - top).exp() for s in scores]
                kept = weights if mask is None else [w * mask[b, h, i, j] for j, w in enumerate(weights)]
                out.append(sum(w * v[b, j, h // group] for j, w in enumerate(kept)) / sum(weights))
    return torch.stack(out).view(B, Tq, H, Dh)


def sdpa(q, k, v):
    bias = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)


@each_shape
def test_attention_equals_loops_and_torchs(B, Tq, Tk, H, Hkv, Dh):
    inputs = randn(B, Tq, H, Dh), randn(B, Tk, Hkv, Dh, seed=1), randn(B, Tk, Hkv, Dh, seed=2)
    same_function(eager.causal_attention, attention_loops, inputs)
    same_function(eager.causal_attention, sdpa, inputs)


@each_shape
def test_attention_with_dropout_is_loops_over_the_masked_probabilities(B, Tq, Tk, H, Hkv, Dh):
    inputs = randn(B, Tq, H, Dh), randn(B, Tk, Hkv, Dh, seed=1), randn(B, Tk, Hkv, Dh, seed=2)
    seed = torch.arange(B) + 5
    mask = philox_mask_numpy(seed.tolist(), (B, H, Tq, Tk), dropped=64)
    same_function(
        lambda q, k, v: eager.causal_attention(q, k, v, 0.25, seed),
        lambda q, k, v: attention_loops(q, k, v, torch.from_numpy(mask)),
        inputs,
        tol=1e-7,  # the mask's 4/3 is fp32
    )


def test_attention_probs_are_those_of_the_attention():
    q, k = randn(2, 5, 4, 6), randn(2, 9, 2, 6, seed=1)
    probs = eager.attention_probs(q, k)
    names = torch.eye(9, dtype=F64)[:, None].expand(2, 9, 2, 9)  # each value names its position
    torch.testing.assert_close(eager.causal_attention(q, k, names).transpose(1, 2), probs)


def test_attention_of_huge_scores_is_finite():
    q = torch.full((1, 4, 1, 2), 1e4, requires_grad=True)
    out = eager.causal_attention(q, q, q)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


@pytest.mark.parametrize("T", [30, 150])
def test_attention_of_bf16_rounds_once(T):
    def naive(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(1, 2)

    inputs = randn(2, T, 4, 16, dtype=BF16), randn(2, T, 2, 16, dtype=BF16, seed=1), randn(2, T, 2, 16, dtype=BF16, seed=2)
    rounds_once(eager.causal_attention, inputs, naive)
    assert eager.attention_probs(*inputs[:2]).dtype == torch.float32


# SwiGLU


def test_swiglu_equals_its_formula_and_torchs():
    def formula(x):
        gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return gate / (1 + torch.exp(-gate)) * up

    x = randn(3, 4, 10)
    same_function(eager.swiglu, formula, (x,))
    same_function(eager.swiglu, lambda x: F.silu(x[..., :5]) * x[..., 5:], (x,))


def test_swiglu_of_large_gates_is_finite():
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], requires_grad=True)
    out = eager.swiglu(x)
    out.sum().backward()
    assert out.tolist() == [[0.0, 1e4]] and x.grad.isfinite().all()


def test_swiglu_of_bf16_rounds_once():
    rounds_once(eager.swiglu, (randn(50, 96, dtype=BF16),), lambda x: F.silu(x[..., :48]) * x[..., 48:])


# Cross-entropy


def cross_entropy_loop(x, weight, targets):
    losses = []
    for row, target in zip(x, targets.tolist(), strict=True):
        if target != -100:
            logits = weight @ row
            losses.append((logits - logits[target]).exp().sum().log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("targets", [[3, 0, 10, 5], [3, -100, 10, -100], [-100, -100, -100, 0]])
def test_linear_cross_entropy_equals_its_formula_and_torchs(targets):
    x, weight, targets = randn(4, 6), randn(11, 6), torch.tensor(targets)
    ours = lambda x, w: eager.linear_cross_entropy(x, w, targets)  # noqa: E731
    same_function(ours, lambda x, w: cross_entropy_loop(x, w, targets), (x, weight))
    same_function(ours, lambda x, w: F.cross_entropy(x @ w.T, targets, ignore_index=-100), (x, weight))


def test_linear_cross_entropy_of_huge_logits_is_finite():
    x = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = eager.linear_cross_entropy(x, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and x.grad.isfinite().all()


def test_linear_cross_entropy_of_bf16_is_no_worse_than_in_bf16():
    x, weight, targets = randn(64, 48, dtype=BF16), randn(200, 48, dtype=BF16), torch.arange(64)
    exact = cross_entropy_loop(x.double(), weight.double(), targets)
    ours = eager.linear_cross_entropy(x, weight, targets)
    naive = F.cross_entropy(x @ weight.T, targets)
    assert ours.dtype == torch.float32
    assert abs(ours.double() - exact) <= abs(naive.double() - exact)
    gradients = (
        torch.autograd.grad(ours, (x, weight)),
        torch.autograd.grad(naive, (x, weight)),
        torch.autograd.grad(exact, (x, weight)),
    )
    for g, n, e in zip(*gradients, strict=True):
        assert g.dtype == BF16
        assert (g.double() - e.double()).norm() <= (n.double() - e.double()).norm()


# What it may import


def test_eager_imports_torch_alone():
    tree = ast.parse((ROOT / "kernels/eager.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"torch"}


def test_importing_eager_loads_no_triton_and_of_ours_only_the_errors():
    code = """
import sys, torch
before = set(sys.modules)
import kernels.eager
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["errors", "kernels", "kernels.eager"], done.stderr
