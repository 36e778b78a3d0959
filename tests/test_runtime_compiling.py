"""Forward and backward of a small batch as a CUDA graph: the same numbers as kernel by kernel."""

import dataclasses

import pytest
import torch

import kernels
import train
from config import from_dict
from data import bins
from model import Llama
from runtime import compiling, distributed
from runtime.optim import LossScale, make_optimizer

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def updates(config, micro_step, steps=4):
    """The parameters and what update() returns after some updates."""
    world, dtype = distributed.World(0, 1, GPU), distributed.DTYPES[config.dtype]
    torch.manual_seed(0)
    model = Llama(config.model(), kernels.choose(config.kernels, GPU, config.head_dim), dtype).to(GPU).train()
    compiling.compile_blocks(model, config, world)
    optimizer, scale = make_optimizer(model, config), LossScale(dtype, GPU)
    train_bin = bins.Bin(f"{config.data}/train.bin", config.seq_len, config.vocab_size)
    stop, stats = distributed.StopSignal(world), []
    for step in range(1, steps + 1):
        stats.append(train.update(step, model, optimizer, scale, train_bin, config, world, stop, micro_step))
    return [*model.parameters(), *stats]


@needs_gpu
@pytest.mark.parametrize("change", [{}, {"attn_dropout": 0.1}, {"repeated_weight": 4.0}, {"dtype": "fp16"}], ids=str)
@pytest.mark.parametrize("ops", ["fused", "sdpa"])
def test_a_graph_computes_what_the_kernels_compute_one_by_one(settings, ops, change):
    config = from_dict(settings | dict(dim=64, device="cuda", dtype="bf16", kernels=ops, compile="on") | change)
    results = [updates(config, p) for p in (train.forward_backward, compiling.Graph(train.forward_backward))]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_graph_is_for_one_gpu_without_gradient_accumulation(settings):
    config, cpu = from_dict(settings), distributed.World(0, 1, torch.device("cpu"))
    for world, change in [
        (distributed.World(0, 1, GPU), {"compile": "on"}),
        (distributed.World(0, 1, GPU), {"compile": "off"}),
        (distributed.World(0, 1, GPU), {"compile": "on", "micro_batch_size": 4}),
        (distributed.World(0, 2, GPU), {"compile": "on"}),
        (cpu, {"compile": "on"}),
    ]:
        micro_step = compiling.graphed(train.forward_backward, dataclasses.replace(config, **change), world)
        first = world.size == 1 and world.device == GPU and change == {"compile": "on"}
        assert isinstance(micro_step, compiling.Graph) == first and (first or micro_step is train.forward_backward)


def test_a_compiler_that_fails_without_a_message_is_named_and_done_without(monkeypatch, capsys):
    def fail(f):
        raise AssertionError

    monkeypatch.setattr(torch, "compile", fail)
    compiling.compile_blocks(None, from_dict({"compile": "auto"}), distributed.World(0, 1, torch.device("cpu")))
    assert "torch.compile does not work on this machine (AssertionError)" in capsys.readouterr().out
