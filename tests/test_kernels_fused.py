"""The two op sets side by side: the same functions, and models that train to the same losses on either."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from tests.kernel_checks import DEVICE, outputs_start_as_nan  # noqa: F401

from kernels import eager, fused  # isort: skip  after the interpreter is set up
from model import Llama  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=96, vocab_size=65, seq_len=16)


def build(ops, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return Llama(ModelConfig(**(vars(CONFIG) | changes)), ops, dtype).to(DEVICE)


def batch(step=0, B=1):
    rng = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, CONFIG.vocab_size, (B, CONFIG.seq_len + 1), generator=rng).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(B, device=DEVICE) + 1000 * step


def losses(ops, dtype, steps=20):
    """SGD, whose steps are as near as the gradients are: Adam's first ones blow up the rounding of small gradients."""
    model = build(ops, dtype, n_layers=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    values = []
    for step in range(steps):
        loss = model(*batch(step % 2)[:2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


def test_both_op_sets_offer_the_same_functions():
    for name in fused.__all__:
        op, definition = getattr(fused, name), getattr(eager, name)
        op = getattr(op, "_init_fn", op)  # the function under a custom op
        assert list(inspect.signature(op).parameters) == list(inspect.signature(definition).parameters), name
    assert fused.attention_probs is eager.attention_probs


def test_training_in_fp32_gives_the_losses_of_eager():
    a, b = losses(fused, torch.float32), losses(eager, torch.float32)
    assert a[-1] < 1
    assert (a - b).abs().max() < 1e-4


def test_training_in_bf16_strays_from_fp32_no_further_than_eager_does():
    exact, own, got = losses(eager, torch.float32), losses(eager, torch.bfloat16), losses(fused, torch.bfloat16)
    assert got[-1] < 1
    assert (got - exact).norm() <= 3 * (own - exact).norm()


@pytest.mark.parametrize("ops", [eager, fused], ids=["eager", "fused"])
def test_each_block_and_the_whole_model_compile_without_a_break(ops):
    model, inputs = build(ops, attn_dropout=0.1).train(), batch()
    loss = model(*inputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled = whole(*inputs)
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, list(model.parameters())), gradients)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(*inputs), loss)
    torch.testing.assert_close(torch.autograd.grad(model(*inputs), list(model.parameters())), gradients)
    torch.compiler.reset()


@pytest.mark.parametrize("ops", [eager, fused], ids=["eager", "fused"])
def test_a_checkpointed_block_redraws_the_same_dropout(ops):
    """Its forward runs again in backward: another mask there would give other gradients, and no error."""
    model, (_, _, seed) = build(ops, attn_dropout=0.25).train(), batch(B=2)
    block, x = model.blocks[0], torch.randn(2, 16, 64, device=DEVICE, requires_grad=True)
    inputs, weights = (x, x, model.norm, model.rope(0, 16)), [block.attention.wqkv.weight, *block.mlp.parameters()]

    def gradients(seed, **how):
        y, _ = checkpoint(block, *inputs, seed, **how) if how else block(*inputs, seed)
        return torch.autograd.grad(y.square().sum(), [x, *weights])

    plain, again = gradients(seed), gradients(seed, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not torch.equal(plain[0], gradients(seed + 1)[0])  # the mask does reach the gradients


def test_generation_with_the_cache_gives_the_same_tokens():
    prompt = batch()[0][:, :10]
    streams = [torch.stack(list(build(ops).eval().generate(prompt, 8)), 1) for ops in (fused, eager)]
    assert torch.equal(*streams)


def test_eager_and_the_model_work_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch
from kernels import eager
from model import Llama
from config import ModelConfig
model = Llama(ModelConfig(dim=32, n_layers=1, n_heads=1, hidden_dim=32, vocab_size=9, seq_len=8), eager)
model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
try:
    import kernels.fused
except ImportError:
    print("eager alone")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "eager alone", done.stderr


def test_attention_imports_the_rotation_and_the_split_of_heads_and_no_other_triton_file_imports_any():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name not in ("fused.py", "sdpa.py", "__init__.py"):
            imports = [line for line in path.read_text().splitlines() if "from kernels" in line or "import kernels" in line]
            allowed = ["from kernels.eager import split_heads", "from kernels.rotary import rotate, rows"]
            assert imports == (allowed if path.name == "attention.py" else [])
