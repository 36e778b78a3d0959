"""torch.compile, block by block, and a CUDA graph of the passes of a small batch."""

import torch

from config import Config
from errors import UserError


def compile_blocks(model, config: Config, world):
    """Compiles block by block on CUDA and CPUs. If torch.compile does not work, `auto` goes on without it."""
    if config.compile == "off" or (config.compile == "auto" and world.device.type not in ("cuda", "cpu")):
        return
    world.say("compiling block by block: the first step can take a minute (--compile=off avoids it)")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=world.device))
    except Exception as e:  # what is missing (a compiler, Python's headers) shows as many kinds of error
        reason = f"torch.compile does not work on this machine ({str(e).strip().splitlines()[0]})"
        if config.compile == "on":
            raise UserError(f"compile=on: {reason}; pass --compile=off") from None
        world.say(f"warning: {reason}; going on without it, slower")
        return
    for block in model.blocks:
        block.compile(fullgraph=True)


def gradients(model, x, y, seed, weight):
    """Adds the gradients of weight * loss to those of the parameters. Returns the loss.

    x, y (B, T) ids; seed (B,) keys attention dropout, or None; weight is a scalar on the device.
    """
    loss = model(x, y, seed=seed)
    (loss * weight).backward()
    return loss.detach()


class GraphedGradients:
    """`gradients`, recorded at the first call as a CUDA graph, which the host launches whole instead of kernel by kernel.

    Small batches need it: launching llama162m's kernels took the host of an H200 36 ms, computing 16 sequences of 512 tokens
    takes 17. A graph reads and writes the same memory each time: all calls must have the same shapes, and the gradients are
    replaced.
    """

    graph = None

    def __call__(self, model, *inputs):
        if self.graph is None:
            self.record(model, inputs)
        for own, new in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(new)
        self.graph.replay()
        for p, grad in zip(model.parameters(), self.grads, strict=True):
            p.grad = grad
        return self.loss

    def record(self, model, inputs):
        self.inputs = [None if x is None else x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and allocates what cannot be allocated while recording
                gradients(model, *self.inputs)
                model.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = gradients(model, *self.inputs)
        self.grads = [p.grad for p in model.parameters()]


def pick_gradients(config: Config, world):
    """Returns what computes the gradients of a micro-batch: on one GPU without gradient accumulation, a CUDA graph."""
    alone = world.device.type == "cuda" and world.size == 1 and config.micro_batch_size >= config.batch_size
    return GraphedGradients() if alone and config.compile != "off" else gradients
