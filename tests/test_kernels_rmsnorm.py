import pytest
import torch
import torch.nn.functional as F

from tests.kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_registration,
    check_repeats,
    layouts,
    needs_gpu,
    outputs_start_as_nan,
    randn,
)

from kernels import eager, rmsnorm  # isort: skip  after the interpreter is set up

EPS = 1e-5


def torch_norm(x, w):
    return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), EPS)


def torch_add_norm(x, res, w):
    h = x + res
    return torch_norm(h, w), h


def norm(x, w, ops=rmsnorm):
    return ops.rms_norm(x, w, EPS)


def add_norm(x, res, w, ops=rmsnorm):
    return ops.add_rms_norm(x, res, w, EPS)


def eager_norm(x, w):
    return norm(x, w, eager)


def eager_add_norm(x, res, w):
    return add_norm(x, res, w, eager)


def weight(D):
    return torch.rand(D, device=DEVICE).add(0.5).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (77, 760), (3, 5, 768), (63, 1128), (2, 5000)])
def test_norm_and_its_gradients_are_as_near_to_fp64_as_torchs(shape, dtype):
    x, w = randn(*shape, dtype=dtype), weight(shape[-1])
    check(norm, eager_norm, torch_norm, [x, w], [torch.randn_like(x)], 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (77, 760), (3, 5, 768)])
def test_add_norm_and_its_gradients_are_as_near_to_fp64_as_torchs(shape, dtype):
    x, res, w = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), weight(shape[-1])
    check(add_norm, eager_add_norm, torch_add_norm, [x, res, w], [torch.randn_like(x), torch.randn_like(x)], 1.5)


@pytest.mark.parametrize("layout", ["sum", "transposed"])
def test_gradients_may_have_any_strides(layout):
    x, res, w = randn(4, 6, 96), randn(4, 6, 96), weight(96)
    dy = layouts(x.shape, x.dtype)[layout]
    check(norm, eager_norm, torch_norm, [x, w], [dy], 1.5)
    check(add_norm, eager_add_norm, torch_add_norm, [x, res, w], [dy, dy], 1.5)


def test_inputs_may_be_slices_or_transposed():
    wide = torch.randn(5, 7, 3 * 64 + 1, device=DEVICE)
    slice, turned = wide[..., 65:129].requires_grad_(), torch.randn(64, 7, 5, device=DEVICE).permute(2, 1, 0).requires_grad_()
    dy = torch.randn(5, 7, 64, device=DEVICE)
    check(norm, eager_norm, torch_norm, [slice, weight(128)[::2].detach().requires_grad_()], [dy], 1.5)
    check(add_norm, eager_add_norm, torch_add_norm, [slice, turned, weight(64)], [dy, dy], 1.5)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 33])
def test_dw_counts_every_row_whatever_their_number(rows):
    x, w = randn(rows, 1024), weight(1024)
    check(norm, eager_norm, torch_norm, [x, w], [torch.randn_like(x)], 1.5)


def test_either_output_of_add_norm_may_go_unused():
    x, res, w = randn(4, 64), randn(4, 64), weight(64)
    (dx,) = torch.autograd.grad(add_norm(x, res, w)[1].sum(), x)
    assert torch.equal(dx, torch.ones_like(x))
    dx, _ = torch.autograd.grad(add_norm(x, res, w)[0].sum(), (x, w))
    assert torch.allclose(dx, torch.autograd.grad(eager_norm(x + res, w).sum(), x)[0], atol=1e-6)


def test_registration_holds():
    x, res, w = randn(3, 5, 64, dtype=torch.bfloat16), randn(3, 5, 64, dtype=torch.bfloat16), weight(64)
    torch.library.opcheck(rmsnorm.norm, (x, None, w, EPS))
    torch.library.opcheck(rmsnorm.norm, (x, res, w, EPS))
    check_registration(norm, [x, w], [torch.randn_like(x)])
    check_registration(add_norm, [x, res, w], [torch.randn_like(x), torch.randn_like(x)])


@needs_gpu
def test_two_runs_have_the_same_bits():
    x, w = randn(8192, 768, dtype=torch.bfloat16), weight(768)
    check_repeats(norm, [x, w], [torch.randn_like(x)])
