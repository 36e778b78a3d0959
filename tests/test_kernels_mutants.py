"""A test of the tests: kernels with one deliberate mistake each must fail the checks that the kernels pass."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests import test_kernels_attention, test_kernels_cross_entropy, test_kernels_rmsnorm, test_kernels_rotary
from tests.kernel_checks import check, outputs_start_as_nan, randn  # noqa: F401

from kernels import eager  # isort: skip  after the interpreter is set up

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def load(file, folder, old, new):
    """The module kernels/<file>.py with `old` replaced by `new`, its ops under a name of their own."""
    source = (KERNELS / f"{file}.py").read_text()
    assert source.count(old) == 1, f"{file}.py has {source.count(old)} times: {old}"
    name = "mutant_" + folder.name.replace("-", "_")
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new).replace('"copyllama::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_attention(module):
    q, k, v = test_kernels_attention.qkv(1, 70, 70, 2, 1, 32)
    ops = module.causal_attention, eager.causal_attention, test_kernels_attention.torch_attention
    check(*ops, [q, k, v], [torch.randn_like(q)], 1.0)


def check_dropout(module):
    q, k, v = test_kernels_attention.qkv(1, 20, 20, 2, 1, 32)
    seed = test_kernels_attention.some_seed(1)
    ops = module.causal_attention, eager.causal_attention, test_kernels_attention.torch_dropout_attention
    check(*[lambda q, k, v, op=op: op(q, k, v, 0.25, seed) for op in ops], [q, k, v], [torch.randn_like(q)], 1.0)


def check_rotary(module):
    q, k = randn(1, 9, 2, 32), randn(1, 9, 1, 32)
    inputs = [q, k, *test_kernels_rotary.table(9, 32)]
    ops = module.rotary, eager.rotary, test_kernels_rotary.torch_rotary
    check(*ops, inputs, [torch.randn_like(q), torch.randn_like(k)], 1.5)


def check_rotary_attention(module):
    test_kernels_attention.check_rotary_attention((1, 20, 2, 1, 32), torch.float32, 0.0, module.rotary_attention)


def check_add_norm(module):
    t = test_kernels_rmsnorm
    inputs = [randn(20, 768), randn(20, 768), t.weight(768)]
    grads = [torch.randn_like(inputs[0]), torch.randn_like(inputs[0])]
    check(lambda *xs: t.add_norm(*xs, module), t.eager_add_norm, t.torch_add_norm, inputs, grads, 1.5)


def check_cross_entropy(module):
    t = test_kernels_cross_entropy
    targets = t.some_targets(8, 100)
    targets[3] = -100
    ops = module.linear_cross_entropy, eager.linear_cross_entropy, t.torch_linear_cross_entropy
    check(*ops, [randn(8, 32), randn(100, 32), targets], [torch.ones((), device=targets.device)], 1.0)


FORWARD_MASK = 's = tl.where(first + i[:, None] >= key + n[None, :], s, -float("inf"))'
DQ_MASK = "p = tl.where(first + i[:, None] >= key + n[None, :], p, 0.0)"
DKDV_MASK = "p = tl.where(past + query + i[None, :] >= first + n[:, None], p, 0.0)"
DQ_DROPOUT = "dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)\n            ds"
DK_DROPOUT = "dp = tl.where(keep, dp * (256 / (256 - DROPPED)), 0.0)\n                dv"
DV_DROPOUT = "kept = tl.where(keep, p * (256 / (256 - DROPPED)), 0.0)"

MUTANTS = {
    "forward sees one key too many": ("attention", FORWARD_MASK, FORWARD_MASK.replace(">=", "+ 1 >="), check_attention),
    "dq sees one key too many": ("attention", DQ_MASK, DQ_MASK.replace(">=", "+ 1 >="), check_attention),
    "dk and dv see one query too many": ("attention", DKDV_MASK, DKDV_MASK.replace(">=", "+ 1 >="), check_attention),
    "dk lacks the scale": ("attention", "dk * scale", "dk", check_attention),
    "dq lacks the scale": ("attention", "dq * scale", "dq", check_attention),
    "one query head of a group is not summed": (
        "attention",
        "range(kv_head * GROUP, (kv_head + 1) * GROUP)",
        "range(kv_head * GROUP, (kv_head + 1) * GROUP - 1)",
        check_attention,
    ),
    "dq without dropout": ("attention", DQ_DROPOUT, DQ_DROPOUT.replace("dp = tl.where", "tl.where"), check_dropout),
    "dk without dropout": ("attention", DK_DROPOUT, DK_DROPOUT.replace("dp = tl.where", "tl.where"), check_dropout),
    "dv without dropout": ("attention", DV_DROPOUT, "kept = p", check_dropout),
    "rotary's backward turns forward": ("rotary", "cos, -sin)", "cos, sin)", check_rotary),
    "attention's backward turns forward": ("attention", "x2 * cos - x1 * sin", "x2 * cos + x1 * sin", check_rotary_attention),
    "the last queries are not read": ("attention", "if MASKED or RAGGED else", "if MASKED else", check_attention),
    "the residual's gradient is dropped": ("rmsnorm", "if dh_ptr is not None:", "if False:", check_add_norm),
    "dw lacks its last partial row": ("rmsnorm", "dw.sum(0)", "dw[:-1].sum(0)", check_add_norm),
    "ignored targets have a gradient": ("cross_entropy", "dz = tl.where(counts, dz, 0.0)", "", check_cross_entropy),
    "ignored targets have a loss": (
        "cross_entropy",
        "tl.where(counts, lse - z_target, 0.0)",
        "lse - z_target",
        check_cross_entropy,
    ),
    "ignored targets are counted": (
        "cross_entropy",
        "(targets != IGNORED).sum()",
        "(targets == targets).sum()",
        check_cross_entropy,
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_each_mutant_is_caught(mistake, tmp_path):
    file, old, new, checks = MUTANTS[mistake]
    with pytest.raises(AssertionError, match="error .* allowed"):
        checks(load(file, tmp_path, old, new))


@pytest.mark.parametrize("file, checks", dict.fromkeys((file, checks) for file, _, _, checks in MUTANTS.values()))
def test_the_same_checks_pass_without_a_mutation(file, checks, tmp_path):
    checks(load(file, tmp_path, "import triton\n", "import triton\n"))
