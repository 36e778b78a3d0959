import importlib

import pytest
import torch
import torch.nn.functional as F

from tests.kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_registration,
    check_repeats,
    error,
    needs_gpu,
    outputs_start_as_nan,
    randn,
)

from kernels import cross_entropy, eager  # isort: skip  after the interpreter is set up
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_sum, loss_and_dlogits  # isort: skip


def torch_linear_cross_entropy(x, weight, targets):
    """F.cross_entropy in the activations' dtype, its loss handed out in fp32 as the op does."""
    return F.cross_entropy(F.linear(x, weight), targets).float()


def check_op(inputs):
    ops = linear_cross_entropy, eager.linear_cross_entropy, torch_linear_cross_entropy
    check(*ops, inputs, [torch.rand((), device=DEVICE) + 0.5], 1.0)


def some_targets(N, V):
    t = torch.randint(0, V, (N,), device=DEVICE)
    t[torch.rand(N, device=DEVICE) < 0.2] = -100
    t[0], t[-1] = V - 1, 0
    return t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, D, V", [(1, 32, 65), (63, 64, 2048), (77, 32, 8193), (5, 32, 32000)])
def test_loss_and_gradients_are_as_near_to_fp64_as_torchs(N, D, V, dtype):
    x, w = randn(N, D, dtype=dtype), randn(V, D, dtype=dtype, scale=0.3)
    inputs = [x, w, some_targets(N, V)]
    check(
        linear_cross_entropy, eager.linear_cross_entropy, torch_linear_cross_entropy, inputs, [torch.rand((), device=DEVICE)], 1
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(1, 300), (7, 3), (2, 32000), (4, 8192), (3, 50257), (2, 65536)])
def test_the_pass_over_the_logits_alone(N, V, dtype):
    logits, targets = randn(N, V, dtype=dtype, scale=5).detach(), some_targets(N, V)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (dlogits,) = torch.autograd.grad(losses.sum(), exact)
    before = logits.clone()
    assert error(loss_and_dlogits(logits, targets, gradient=False), losses) < 1e-6
    assert torch.equal(logits, before)
    assert error(loss_and_dlogits(logits, targets), losses) < 1e-6
    assert error(logits, dlogits) < max(1e-6, torch.finfo(dtype).eps / 4)


def test_ignored_rows_get_no_loss_and_no_gradient():
    logits, targets = randn(4, 100).detach(), torch.tensor([-100, 3, -100, 99], device=DEVICE)
    losses = loss_and_dlogits(logits, targets)
    assert (losses == 0).tolist() == (logits == 0).all(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("ops", ["eager", "sdpa", "fused"])
@pytest.mark.parametrize("N", [0, 9])
def test_without_a_target_the_loss_is_nan_and_the_gradients_are_zero(ops, N):
    op = importlib.import_module(f"kernels.{ops}").linear_cross_entropy
    x, w, targets = randn(N, 32), randn(50, 32), torch.full((N,), -100, device=DEVICE)
    loss = op(x, w, targets)
    assert loss.isnan()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_between_rows_counts_for_nothing(dtype):
    logits, targets = randn(5, 99, dtype=dtype, scale=5).detach(), some_targets(5, 99)
    padded = torch.full((5, 112), float("nan"), dtype=dtype, device=DEVICE)
    padded[:, :99] = logits
    losses = loss_and_dlogits(padded[:, :99], targets)
    assert torch.equal(losses, loss_and_dlogits(logits, targets)) and torch.equal(padded[:, :99], logits)


def test_large_logits_neither_overflow_nor_become_nan():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0], [-1e4, -1e4, -1e4, -1e4]], device=DEVICE)
    exact = F.cross_entropy(logits.double(), torch.tensor([1, 2], device=DEVICE), reduction="none")
    losses = loss_and_dlogits(logits, torch.tensor([1, 2], device=DEVICE))
    assert error(losses, exact) < 1e-6 and logits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 10, 36, 37])
def test_rows_in_chunks_give_what_all_at_once_gives(rows, dtype, N=37, D=32, V=500):
    x, w, targets = randn(N, D, dtype=dtype).detach(), randn(V, D, dtype=dtype).detach(), some_targets(N, V)
    whole = linear_cross_entropy_sum(x, w, targets, N, True)
    parts = linear_cross_entropy_sum(x, w, targets, rows, True)
    for a, b in zip(parts, whole, strict=True):
        assert a.dtype == b.dtype and error(a, b.double()) < max(2e-6, torch.finfo(dtype).eps / 2)


def test_chunks_add_up_in_fp32():
    """4,096 chunks of one row, each adding 2^-9 to a weight's gradient of about 1: bf16 sums would stop at 1."""
    N = 4096
    x = torch.full((N, 1), 2.0**-8, device=DEVICE, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, device=DEVICE, dtype=torch.bfloat16)
    _, _, dw = linear_cross_entropy_sum(x[:512], w, torch.zeros(512, dtype=torch.int64, device=DEVICE), 1, True)
    assert dw[1].item() == 1.0  # 512 * 2^-8 / 2
    sums = torch.zeros((), dtype=torch.bfloat16, device=DEVICE)
    for _ in range(512):
        sums += 2.0**-9
    assert sums.item() < 1.0


@pytest.mark.parametrize("rows", [100, 256])
def test_in_fp16_the_weights_gradient_is_finite_where_its_sum_over_the_rows_is_not(rows, monkeypatch, N=256, V=64):
    """The sum is 300 N (V - 1) / V = 75,600 before the division by N, and fp16 ends at 65,504."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda x, weight: rows)
    x = randn(N, 32, dtype=torch.float16).detach()
    x[:, 0] = 300
    w, targets = randn(V, 32, dtype=torch.float16, scale=1e-3), torch.zeros(N, dtype=torch.int64, device=DEVICE)
    check_op([x.requires_grad_(), w, targets])


def test_without_gradients_none_are_made(monkeypatch):
    x, w, targets = randn(9, 32), randn(50, 32), some_targets(9, 50)
    asked = []
    spy = lambda *args: (asked.append(args[-1]), linear_cross_entropy_sum(*args))[1]  # noqa: E731
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy_sum", spy)
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, targets)
    assert torch.equal(loss, linear_cross_entropy(x, w, targets).detach())
    assert torch.equal(loss, linear_cross_entropy(x.detach(), w.detach(), targets))
    assert asked == [False, True, False]
    assert [t.numel() for t in linear_cross_entropy_sum(x, w, targets, 9, False)[1:]] == [0, 0]


def test_backward_may_run_twice_and_add_up():
    x, w, targets = randn(9, 32), randn(50, 32), some_targets(9, 50)
    loss = linear_cross_entropy(x, w, targets)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (x, w))
    assert all(torch.equal(2 * a, b) for a, b in zip(once, again, strict=True))


def test_a_second_derivative_is_refused():
    x, w, targets = randn(9, 32), randn(50, 32), some_targets(9, 50)
    loss = linear_cross_entropy(x, w, targets)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    for differentiated in (dx.square().sum(), loss + dx.square().sum()):
        with pytest.raises(RuntimeError, match="linear_cross_entropy_gradient.* no autograd formula was registered"):
            torch.autograd.grad(differentiated, x, retain_graph=True)


def test_inputs_may_be_slices_or_transposed():
    x = torch.randn(9, 100, device=DEVICE)[:, 3:35].requires_grad_()
    w = torch.randn(32, 50, device=DEVICE).T.requires_grad_()
    inputs = [x, w, some_targets(18, 50)[::2]]
    check(
        linear_cross_entropy, eager.linear_cross_entropy, torch_linear_cross_entropy, inputs, [torch.rand((), device=DEVICE)], 1
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration_holds(dtype):
    x, w, targets = randn(9, 32, dtype=dtype), randn(50, 32, dtype=dtype), some_targets(9, 50)
    torch.library.opcheck(linear_cross_entropy_sum, (x, w, targets, 4, True))
    check_registration(linear_cross_entropy, [x, w, targets], [torch.ones((), device=DEVICE)])


@needs_gpu
def test_two_runs_have_the_same_bits():
    x, w = randn(4096, 768, dtype=torch.bfloat16), randn(32000, 768, dtype=torch.bfloat16, scale=0.02)
    check_repeats(linear_cross_entropy, [x, w, some_targets(4096, 32000)], [torch.ones((), device=DEVICE)])
