"""The op set on PyTorch's own kernels against the definitions, and which set is chosen where."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import kernels
from config import ROOT, ModelConfig
from errors import UserError
from kernels import eager, sdpa
from model import Llama

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def check(op, inputs, floor=0.0):
    """Outputs and gradients against the definition in fp64.

    In fp32 within 1e-6, in the norm; norms below `floor` count as `floor`. In 16 bits three roundings, of at most eps / 4
    each, follow one another in the gradients: of the probabilities, of their gradients and of the result.
    """
    dtype = inputs[0].dtype
    results = []
    for ops, xs in ((sdpa, inputs), (eager, [x.detach().double().requires_grad_() for x in inputs])):
        out = op(ops, *xs)
        out = out if isinstance(out, tuple) else (out,)
        grads = [randn(*o.shape, seed=7).to(o.dtype) for o in out]
        results.append([*out, *torch.autograd.grad(out, xs, grads)])
    for got, exact in zip(*results, strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        error = (got.double() - exact).norm() / exact.norm().clamp(min=floor)
        assert error <= (1e-6 if dtype == torch.float32 else 0.75 * torch.finfo(dtype).eps)


SHAPES = [  # B, Tq, Tk, H, Hkv, Dh
    (2, 7, 7, 4, 2, 8),
    (1, 64, 64, 4, 4, 32),
    (2, 130, 130, 2, 1, 64),
    (1, 200, 200, 2, 2, 256),
    (1, 77, 77, 3, 3, 24),
    (1, 5, 100, 4, 1, 128),  # the KV cache of a prompt and five tokens
    (2, 1, 129, 2, 2, 16),
    (2, 1, 1, 2, 1, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_equal_the_definition(shape, dtype):
    B, Tq, Tk, H, Hkv, Dh = shape
    inputs = [randn(B, Tq, H, Dh, dtype=dtype), *(randn(B, Tk, Hkv, Dh, dtype=dtype, seed=i) for i in (1, 2))]
    floor = inputs[0].numel() ** 0.5 if Tk == 1 else 0.0  # with one key, dq and dk are exactly zero
    check(lambda ops, q, k, v: ops.causal_attention(q, k, v), inputs, floor)


@pytest.mark.parametrize("Dh", [*range(2, 33, 2), 40, 48, 80, 96, 112, 160, 192, 288])
def test_any_head_dim_that_rotary_can_split_equals_the_definition(Dh):
    inputs = [randn(1, 9, 2, Dh), randn(1, 9, 1, Dh, seed=1), randn(1, 9, 1, Dh, seed=2)]
    check(lambda ops, q, k, v: ops.causal_attention(q, k, v), inputs)
    check(lambda ops, q, k, v: ops.causal_attention(q, k, v, 0.25, torch.tensor([3])), inputs)
    angles = torch.rand(9, Dh // 2, generator=torch.Generator().manual_seed(0))
    check(lambda ops, q, k: ops.rotary(q, k, angles.cos(), angles.sin()), inputs[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_dropout_uses_the_mask_of_the_definition(shape, dtype):
    B, Tq, Tk, H, Hkv, Dh = shape
    inputs = [randn(B, Tq, H, Dh, dtype=dtype), *(randn(B, Tk, Hkv, Dh, dtype=dtype, seed=i) for i in (1, 2))]
    seed = torch.arange(B) + 2**40
    check(lambda ops, q, k, v: ops.causal_attention(q, k, v, 0.25, seed), inputs)


@pytest.mark.parametrize("Tq, Tk", [(64, 64), (65, 65), (128, 129), (150, 200), (257, 257)])
def test_dropout_in_blocks_of_queries_is_that_of_the_whole(Tq, Tk):
    q, k, v = randn(2, Tq, 4, 6), randn(2, Tk, 2, 6, seed=1), randn(2, Tk, 2, 6, seed=2)
    check(lambda ops, *qkv: ops.causal_attention(*qkv, 0.25, torch.tensor([3, 4])), [q, k, v])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_equal_the_definition(dtype):
    x, residual, weight = randn(3, 40, 48, dtype=dtype), randn(3, 40, 48, dtype=dtype, seed=1), randn(48)
    weight = weight.detach().to(dtype).requires_grad_()
    check(lambda ops, x, w: ops.rms_norm(x, w, 1e-6), [x, weight])
    check(lambda ops, x, r, w: ops.add_rms_norm(x, r, w, 1e-6), [x, residual, weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_weights_in_fp32_keep_the_dtype_of_the_activations(dtype):
    x, weight = randn(8, 48, dtype=dtype), randn(48)
    y = sdpa.rms_norm(x, weight, 1e-6)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(5, 30), (40, 65), (128, 700), (300, 5000), (1100, 1000)])  # one to nine chunks of rows
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_and_its_gradients_equal_the_definition(N, V, dtype, ignored):
    x, weight = randn(N, 24, dtype=dtype), (0.1 * randn(V, 24)).detach().to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (N,), generator=generator)
    targets[1:][torch.rand(N - 1, generator=generator) < ignored] = -100
    # Times 2^10, which keeps small gradients from underflow in fp16.
    check(lambda ops, x, w: 1024 * ops.linear_cross_entropy(x, w, targets).to(x.dtype), [x, weight])


def test_the_chunks_of_the_loss_add_up_in_fp32():
    """65,536 rows in 512 chunks, each adding 2^-8 to a weight's gradient of up to 2: bf16 sums would stop at 1."""
    x = torch.full((65536, 1), 2.0**-15, dtype=torch.bfloat16)
    weight = torch.zeros(2**12, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = 65536 * sdpa.linear_cross_entropy(x, weight, torch.zeros(65536, dtype=torch.int64))
    (dw,) = torch.autograd.grad(loss, weight)
    exact = -65536 * 2.0**-15 * (1 - 2.0**-12)
    assert abs(dw[0].item() - exact) <= torch.finfo(torch.bfloat16).eps / 2 * abs(exact)


def test_the_loss_is_finite_where_the_target_is_impossible():
    x, weight = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = sdpa.linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.item() == 600.0
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert dx.item() == 2.0 and dw.flatten().tolist() == [300.0, -300.0]


def test_the_loss_is_the_same_with_and_without_gradients_and_has_no_second_derivative():
    x, weight, targets = randn(300, 24), randn(5000, 24), torch.arange(300)
    loss = sdpa.linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        torch.testing.assert_close(sdpa.linear_cross_entropy(x, weight, targets), loss.detach(), rtol=1e-6, atol=0)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (x, weight), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative: pass ops=kernels.eager"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_all_op_sets_offer_the_same_functions():
    for name in sdpa.__all__:
        parameters = [list(inspect.signature(getattr(ops, name)).parameters) for ops in (sdpa, eager)]
        assert parameters[0] == parameters[1], name


# In a model

CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=50, seq_len=80)


def build(ops, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    model = Llama(dataclasses.replace(CONFIG, **changes), ops, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.normal_(1, 0.3)
    return model


def tokens(B=2, T=CONFIG.seq_len, seed=0):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_model_has_the_loss_and_gradients_of_the_definitions(dropout):
    results = []
    for ops in (sdpa, eager):
        model = build(ops, attn_dropout=dropout).train()
        model(tokens(), tokens(seed=1), seed=torch.tensor([5, 6])).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_16_bit_model_is_as_near_to_fp32_as_with_the_definitions(dtype):
    exact, own, got = (build(*args)(tokens()).float() for args in ((eager,), (eager, dtype), (sdpa, dtype)))
    assert (got - exact).norm() <= 2 * (own - exact).norm()


def test_generation_with_the_cache_gives_the_tokens_of_the_definitions():
    streams = [torch.stack(list(build(ops).eval().generate(tokens(T=20), 40)), 1) for ops in (sdpa, eager)]
    assert torch.equal(*streams)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit():
    model, ids = build(sdpa), tokens()
    changed = ids.clone()
    changed[:, 40] = (ids[:, 40] + 1) % CONFIG.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(after[:, :40], before[:, :40]) and (after[:, 40:] != before[:, 40:]).any(-1).all()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_block_compiles_to_one_graph(dropout):
    model = build(sdpa, attn_dropout=dropout).train()
    x = torch.randn(2, 80, 64)
    inputs = (x, x, model.norm, model.rope(0, 80), torch.tensor([5, 6]))
    expected = model.blocks[0](*inputs)
    compiled = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.compiler.reset()


# The choice

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an NVIDIA GPU on which Triton works, as far as the choice can tell."""
    monkeypatch.setattr(kernels, "_probe", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return monkeypatch


def auto(device, head_dim=64, dtype=torch.bfloat16):
    lines = []
    ops = kernels.choose("auto", device, head_dim, dtype, lines.append)
    assert len(lines) == 1 and "\n" not in lines[0] and ops.__name__.removeprefix("kernels.") in lines[0]
    return ops, lines[0]


def test_auto_takes_the_triton_kernels_on_a_gpu_that_they_fit(gpu):
    pytest.importorskip("triton", reason="Triton is not installed: there is no such set")
    assert auto(CUDA)[0].__name__ == "kernels.fused"


def test_auto_takes_sdpa_wherever_the_triton_kernels_do_not_fit(gpu):
    assert auto(CPU) == (sdpa, "kernels: sdpa, because this is a CPU")
    assert auto(torch.device("mps"))[0] is sdpa
    ops, line = auto(CUDA, head_dim=96)
    assert ops is sdpa and "head dims 16, 32, 64, 128, not 96" in line
    assert auto(CUDA, dtype=torch.float32)[0] is sdpa
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ops, line = auto(CUDA)
    assert ops is sdpa and "compute capability 8.0, and Tesla T4 is older" in line
    gpu.setattr(torch.version, "hip", "6.4")
    assert auto(CUDA)[0] is sdpa
    gpu.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in auto(CUDA)[1]


def test_auto_does_without_triton_where_its_first_launch_fails(gpu):
    """As without a C compiler: the probe launches a kernel, which fails here because there is no GPU."""
    gpu.undo()
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if not torch.cuda.is_available():
        ops, line = auto(CUDA)
        assert ops is sdpa and "Triton does not work on this machine (" in line
        with pytest.raises(UserError, match="Triton does not work on this machine .*use --kernels=auto"):
            kernels.choose("fused", CUDA, 64)


def test_a_named_set_is_taken_or_refused():
    assert kernels.choose("eager", CPU, 24) is eager and kernels.choose("sdpa", CPU, 24) is sdpa
    with pytest.raises(UserError, match="head dims 16, 32, 64, 128, not 24; use --kernels=auto"):
        kernels.choose("fused", CPU, 24)
    with pytest.raises(UserError, match="NVIDIA GPUs, not on mps"):
        kernels.choose("fused", torch.device("mps"), 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Triton compiles: the interpreter has to be chosen before")
def test_fused_on_a_cpu_warns_that_it_is_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: there is no interpreter")
    with pytest.warns(UserWarning, match="Triton's interpreter, a thousand times slower"):
        assert kernels.choose("fused", CPU, 16).__name__ == "kernels.fused"


def test_fused_on_a_cpu_refuses_bf16_and_a_triton_that_was_imported_to_compile(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: there is no interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="Triton's interpreter cannot multiply bf16; pass --dtype=fp32, or --kernels=auto"):
        kernels.choose("fused", CPU, 16, torch.bfloat16)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="on a CPU, TRITON_INTERPRET=1 must be set before Triton is imported"):
        kernels.choose("fused", CPU, 16, torch.float32)


def test_sdpa_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch, kernels
print(kernels.choose("auto", torch.device("cpu"), 64).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "kernels.sdpa", done.stderr
