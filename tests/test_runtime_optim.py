import pytest
import torch

from config import Config
from kernels import eager
from model import Llama
from runtime.optim import make_optimizer, orthogonalize

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
    inner = u.T @ orthogonalize(x) @ v.T  # diagonal where the singular vectors are the same
    assert (inner - inner.diag().diag()).abs().max() < 1e-4
    large = s > 0.1 * s.max()
    assert inner.diag()[large].min() > 0.6 and inner.diag().max() < 1.3


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
