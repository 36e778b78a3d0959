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

from kernels import eager  # isort: skip  after the interpreter is set up
from kernels.swiglu import swiglu  # isort: skip


def torch_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (77, 200), (2, 3, 2 * 1025), (3, 2 * 3072)])
def test_swiglu_and_its_gradient_are_as_near_to_fp64_as_torchs(shape, dtype):
    x = randn(*shape, dtype=dtype, scale=3)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE).to(dtype)
    check(swiglu, eager.swiglu, torch_swiglu, [x], [dy], 1.5)


@pytest.mark.parametrize("layout", ["sum", "transposed"])
def test_gradients_may_have_any_strides(layout):
    check(swiglu, eager.swiglu, torch_swiglu, [randn(4, 6, 96)], [layouts((4, 6, 48), torch.float32)[layout]], 1.5)


def test_inputs_may_be_slices_or_transposed():
    slice = torch.randn(5, 7, 201, device=DEVICE)[..., 1:129].requires_grad_()
    turned = torch.randn(128, 7, 5, device=DEVICE).permute(2, 1, 0).requires_grad_()
    for x in (slice, turned):
        check(swiglu, eager.swiglu, torch_swiglu, [x], [torch.randn(5, 7, 64, device=DEVICE)], 1.5)


def test_large_gates_neither_overflow_nor_become_nan():
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    y = swiglu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and dx.isfinite().all()
    assert torch.equal(y, torch_swiglu(x))


def test_registration_holds():
    x = randn(3, 5, 64, dtype=torch.bfloat16)
    torch.library.opcheck(swiglu, (x,))
    check_registration(lambda x: swiglu(x), [x], [torch.randn(3, 5, 32, device=DEVICE).to(x.dtype)])


@needs_gpu
def test_two_runs_have_the_same_bits():
    x = randn(4096, 6144, dtype=torch.bfloat16)
    check_repeats(swiglu, [x], [torch.randn(4096, 3072, device=DEVICE).to(x.dtype)])
