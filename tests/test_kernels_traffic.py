"""The count of bytes that a training step moves, against sums by hand."""

import dataclasses

import pytest

from config import Config
from tests.triton_interpreter import INTERPRETED  # noqa: F401  before anything imports Triton

pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to count")

from benchmarks.traffic import step_bytes  # isort: skip
from kernels import eager, fused  # isort: skip
from kernels.attention import padded  # isort: skip

L, B, T, D, H, HKV, F, V = 2, 4, 128, 64, 2, 1, 96, 48
CONFIG = Config(n_layers=L, batch_size=B, seq_len=T, dim=D, n_heads=H, n_kv_heads=HKV, hidden_dim=F, vocab_size=V)
X = 2 * B * T * D  # bytes of an activation in bf16
KV = X * HKV // H
STATS = 4 * B * H * padded(T)
TABLES = 2 * 4 * T * D // H // 2  # cos and sin


def test_each_kernel_moves_what_its_docstring_says():
    moved = step_bytes(CONFIG)
    assert moved["rotary_kernel"] == L * (2 * X + 2 * KV + TABLES)
    assert moved["attention_forward_kernel"] == L * (2 * X + 2 * KV + STATS)
    assert moved["attention_dq_kernel"] == L * (4 * X + 2 * KV + 3 * STATS + TABLES)
    assert moved["attention_dkdv_kernel"] == L * (2 * X + 4 * KV + 2 * STATS + TABLES)
    assert moved["swiglu_forward_kernel"] == L * 6 * B * T * F and moved["swiglu_backward_kernel"] == L * 10 * B * T * F
    assert moved["cross_entropy_kernel"] == 4 * B * T * V + 12 * B * T
    norms = 2 * X + 2 * L * 4 * X + (2 * L + 1) * 4 * D  # the first norm, and two with an addition in each layer
    assert moved["rms_norm_forward_kernel"] == norms
    assert "aten.cat" not in moved and "aten.split_with_sizes" not in moved


def test_a_concatenation_of_gradients_is_found(monkeypatch):
    """Rotary and attention as ops of their own: autograd concatenates the gradients of q, k and v."""

    def separate(qkv, cos, sin, n_kv_heads, dropout_p, seed):
        q, k, v = eager.split_heads(qkv, n_kv_heads)
        return fused.causal_attention(*fused.rotary(q, k, cos, sin), v, dropout_p, seed)

    packed = step_bytes(CONFIG)
    monkeypatch.setattr(fused, "rotary_attention", separate)
    moved = step_bytes(dataclasses.replace(CONFIG))
    assert moved["aten.cat"] == L * 2 * (X + 2 * KV)
    assert moved["rotary_kernel"] == 2 * packed["rotary_kernel"]
