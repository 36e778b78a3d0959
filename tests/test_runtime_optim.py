import pytest
import torch

from config import Config
from kernels import eager
from model import Llama
from runtime.optim import LossScale, apply_gradients, make_optimizer, orthogonalize

CONFIG = dict(dim=16, n_heads=2, n_layers=2, hidden_dim=8, vocab_size=9, weight_decay=0.1)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(name, tie):
    config = Config(**CONFIG, tie_embeddings=tie, optimizer=name)
    model = Llama(config.model(), eager)
    groups = make_optimizer(model, config).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    for group in groups:
        assert {p.dim() for p in group["params"]} == {2 if group["weight_decay"] == 0.1 else 1}
        assert group["weight_decay"] in (0.1, 0.0)


def test_muon_updates_the_blocks_matrices_and_adamw_all_else():
    config = Config(**CONFIG, optimizer="muon")
    model = Llama(config.model(), eager)
    muon = {id(p) for p in make_optimizer(model, config).param_groups[0]["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in muon} == {
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attention.wqkv", "attention.wo", "mlp.gate_up", "mlp.down")
    }


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_1(shape):
    """The quintic's fixed interval: 0.68 to 1.13 for values that are not vanishing, Jordan et al. 2024."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ orthogonalize(x[None])[0] @ v.T  # diagonal where the singular vectors are the same
    assert (inner - inner.diag().diag()).abs().max() < 1e-4
    large = s > 0.1 * s.max()
    assert inner.diag()[large].min() > 0.6 and inner.diag().max() < 1.3


def test_muon_updates_each_heads_projections_as_if_they_were_weights_by_themselves():
    """Momentum only rescales the first gradient, which orthogonalizing undoes: the update is that of each matrix's gradient."""
    config = Config(**CONFIG | {"weight_decay": 0.0}, optimizer="muon", learning_rate=1.0)
    model = Llama(config.model(), eager)
    optimizer = make_optimizer(model, config)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    heads = config.n_heads + 2 * config.n_kv_heads
    parts = {
        attention.wqkv.weight: lambda w: w.split(config.head_dim, 0),
        attention.wo.weight: lambda w: w.split(config.head_dim, 1),
        mlp.gate_up.weight: lambda w: w.split(config.hidden_dim, 0),
        mlp.down.weight: lambda w: (w,),
    }
    assert [len(split(w)) for w, split in parts.items()] == [heads, config.n_heads, 2, 1]
    before = {w: w.detach().clone() for w in parts}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    for w, split in parts.items():
        for change, g in zip(split(before[w] - w.detach()), split(w.grad), strict=True):
            expected = orthogonalize(g[None])[0] * (0.2 * max(g.shape) ** 0.5)
            # A weight of about 0.02 is subtracted from values of about 1: a rounding of 1e-7, and sums in another order.
            assert torch.allclose(change, expected, rtol=0, atol=1e-5)


def test_an_update_of_muon_has_the_size_of_adamws():
    """The root mean square of AdamW's first update is the learning rate, and Muon's about 0.2 of it times sqrt(max / min)."""
    config = Config(**CONFIG | {"weight_decay": 0.0}, optimizer="muon", learning_rate=1e-2)
    model = Llama(config.model(), eager)
    optimizer = make_optimizer(model, config)
    weight = model.blocks[0].mlp.gate_up.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    rms = (weight - before).square().mean().sqrt().item()
    assert 0.1e-2 < rms < 0.3e-2


def updated(name, gradients, grad_scale=1.0, found_inf=0.0):
    """The model's parameters and the optimizer's state after updates with these gradients of each parameter."""
    config = Config(**CONFIG, optimizer=name, learning_rate=1e-2)
    torch.manual_seed(0)
    model = Llama(config.model(), eager)
    optimizer = make_optimizer(model, config)
    for factor in gradients:
        for i, p in enumerate(model.parameters()):
            p.grad = factor * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        apply_gradients(optimizer, torch.tensor(grad_scale), torch.tensor(found_inf))
    return [p.detach() for p in model.parameters()] + [t for s in optimizer.state.values() for t in s.values()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_divides_gradients_by_grad_scale_and_leaves_all_as_it_is_where_found_inf_is_1(name):
    """A scale that is a power of two changes no bit."""
    one = updated(name, [1.0, 0.5])
    assert all(map(torch.equal, one, updated(name, [4096.0, 2048.0], grad_scale=4096.0)))
    # Clipping as torch.nn.utils.clip_grad_norm_ does, which multiplies: one rounding of 6e-8 in each gradient and moment.
    clipped = updated(name, [1 / 3.0, 0.5 / 3.0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(clipped, updated(name, [1.0, 0.5], 3.0), strict=True))
    never = updated(name, [])
    left_out = updated(name, [float("nan")], found_inf=1.0)
    assert all(map(torch.equal, never, left_out)) and all((moment == 0).all() for moment in left_out[len(never) :])


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_many_finite_updates():
    scale = LossScale(torch.float16, "cpu")
    history = []
    for found_inf in [1.0, 0.0, 1.0, *[0.0] * 2001]:
        scale.update(torch.tensor(found_inf))
        history.append(scale.scale.item())
    assert history[:4] == [2**15, 2**15, 2**14, 2**14] and history[-3:] == [2**14, 2**15, 2**15]
    other = LossScale(torch.float16, "cpu")
    other.load_state(scale.state())
    assert (other.scale, other.in_a_row) == (2**15, 1)
    for _ in range(20):
        scale.update(torch.tensor(1.0))
    assert scale.scale == 1
    fixed = LossScale(torch.bfloat16, "cpu")
    fixed.update(torch.tensor(1.0))
    assert fixed.scale == 1
