"""What the ranks of a run send each other, through a process group that delivers nothing: each rank runs here in its turn."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from config import from_dict
from data import bins
from kernels import eager
from model import Llama
from runtime import distributed
from runtime.optim import LossScale, make_optimizer


class Done(dist._Work):
    """A collective that is over at once."""

    def __init__(self, result):
        super().__init__()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout=None):
        return True

    def get_future(self):
        return self.future


class Recorder(dist.ProcessGroup):
    """Records the name and the bytes of each collective, which leaves every tensor as it is."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.sent = []

    def allreduce(self, tensors, options=None):
        self.sent.append(("allreduce", sum(t.nbytes for t in tensors)))
        return Done(tensors)

    def broadcast(self, tensors, options=None):
        self.sent.append(("broadcast", sum(t.nbytes for t in tensors)))
        return Done(tensors)

    def allgather(self, outputs, tensors, options=None):
        self.sent.append(("allgather", sum(t.nbytes for t in tensors)))
        for output, tensor in zip(outputs, tensors, strict=True):
            for copy in output:
                copy.copy_(tensor)
        return Done(outputs)


dist.Backend.register_backend("recorder", Recorder, devices=["cpu"])


def one_update(config, rank, size):
    """The gradients of a rank's share of the first batch, as it sends them, and the collectives of that update."""
    if size > 1:
        dist.init_process_group("recorder", store=dist.HashStore(), rank=rank, world_size=size)
    try:
        sent = dist.group.WORLD.sent if size > 1 else []
        world = distributed.World(rank, size, torch.device("cpu"))
        torch.manual_seed(0)
        model = Llama(config.model(), eager)
        ranks = distributed.data_parallel(model, world)
        train_bin = bins.Bin(Path(config.data) / "train.bin", config.seq_len, config.vocab_size)
        optimizer, scale = make_optimizer(model, config), LossScale(torch.float32, "cpu")
        stop = distributed.StopSignal(world)
        begun = len(sent)  # DDP compares shapes and hands out the parameters of rank 0 when it is made
        train.update(1, ranks, optimizer, scale, train_bin, config, world, stop)
        return [p.grad.clone() for p in model.parameters()], sent[begun:]
    finally:
        distributed.leave()


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("passes, weight", [(1, 1.0), (2, 1.0), (2, 4.0)])
def test_each_rank_sends_its_gradient_once_per_update_and_the_loss_and_nothing_else(settings, size, passes, weight):
    """4 bytes of each parameter, whatever the gradient accumulation; 4 of the loss, and with repeated_weight 4 of the targets
    that count; before each pass a flag of 8, on the CPUs, which says whether a signal arrived. The gradients that the
    ranks send add up to that of the whole batch: 1e-6 is rounding at gradients of up to 0.5.
    """
    shares = dict(batch_size=16, micro_batch_size=16 // size // passes)
    config = from_dict(settings | shares | dict(grad_clip=0.0, repeated_weight=weight))
    whole, calls = one_update(dataclasses.replace(config, micro_batch_size=16), 0, 1)
    assert calls == []
    total = [torch.zeros_like(g) for g in whole]
    for rank in range(size):
        gradients, calls = one_update(config, rank, size)
        assert {name for name, _ in calls} == {"allreduce"}
        assert sorted(n for _, n in calls) == sorted([8] * passes + [4 if weight == 1 else 8, 4 * config.n_parameters])
        total = [t + g for t, g in zip(total, gradients, strict=True)]
    assert all(torch.allclose(t, g, rtol=0, atol=1e-6) for t, g in zip(total, whole, strict=True))
