import numpy as np
import pytest
import torch

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
from kernels.rotary import rotary  # isort: skip


def table(T, Dh, start=0):
    angles = torch.outer(torch.arange(start, start + T), 10000.0 ** -(torch.arange(0, Dh, 2) / Dh)).to(DEVICE)
    return angles.cos(), angles.sin()


def torch_rotary(q, k, cos, sin):
    """The usual torch code, in the activations' dtype."""
    cos, sin = (torch.cat((t, t), -1)[:, None].to(q.dtype) for t in (cos, sin))

    def turn(x):
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return turn(q), turn(k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, Hkv, Dh", [(1, 1, 1, 1, 32), (2, 63, 4, 2, 32), (1, 77, 3, 1, 64), (2, 33, 2, 2, 128)])
def test_rotary_and_its_gradients_are_as_near_to_fp64_as_torchs(B, T, H, Hkv, Dh, dtype):
    q, k = randn(B, T, H, Dh, dtype=dtype), randn(B, T, Hkv, Dh, dtype=dtype)
    inputs = [q, k, *table(T, Dh, start=1000)]
    check(rotary, eager.rotary, torch_rotary, inputs, [torch.randn_like(q), torch.randn_like(k)], 1.5)


@pytest.mark.parametrize("layout", ["sum", "transposed"])
def test_gradients_may_have_any_strides(layout):
    q, k = randn(2, 9, 4, 32), randn(2, 9, 2, 32)
    grads = [layouts(x.shape, x.dtype)[layout] for x in (q, k)]
    check(rotary, eager.rotary, torch_rotary, [q, k, *table(9, 32)], grads, 1.5)


def test_inputs_may_be_slices_of_a_packed_qkv_or_transposed():
    q, k, _ = torch.randn(2, 9, 8 * 32 + 3, device=DEVICE)[..., 3:].unflatten(-1, (8, 32)).split((4, 2, 2), 2)
    grads = [torch.randn_like(q), torch.randn_like(k)]
    check(rotary, eager.rotary, torch_rotary, [q.requires_grad_(), k.requires_grad_(), *table(9, 32)], grads, 1.5)
    q, k = (torch.randn(32, h, 9, 2, device=DEVICE).permute(3, 2, 1, 0).requires_grad_() for h in (4, 2))
    check(rotary, eager.rotary, torch_rotary, [q, k, *table(9, 32)], grads, 1.5)


def test_offsets_beyond_int32_reach_the_right_elements():
    """Three sequences 2^30 elements apart: the third lies 2^31 in. The pages between them are never touched."""
    stride, (B, T, H, Dh) = 2**30 + 16, (3, 2, 1, 32)
    far = torch.from_numpy(np.empty(2 * stride + T * H * Dh, np.int16)).view(torch.bfloat16).to(DEVICE)
    far = far.as_strided((B, T, H, Dh), (stride, H * Dh, Dh, 1))
    far.copy_(torch.randn(B, T, H, Dh))
    for a, b in zip(rotary(far, far, *table(T, Dh)), eager.rotary(far, far, *table(T, Dh)), strict=True):
        assert torch.equal(a, b)


def test_registration_holds():
    q, k = randn(2, 5, 4, 32, dtype=torch.bfloat16), randn(2, 5, 2, 32, dtype=torch.bfloat16)
    inputs = (q, k, *table(5, 32))
    torch.library.opcheck(rotary, inputs)
    check_registration(lambda *xs: rotary(*xs), inputs, [torch.randn_like(q), torch.randn_like(k)])


@needs_gpu
def test_two_runs_have_the_same_bits():
    q = randn(8, 1024, 12, 64, dtype=torch.bfloat16)
    check_repeats(rotary, [q, q, *table(1024, 64)], [torch.randn_like(q), torch.randn_like(q)])
