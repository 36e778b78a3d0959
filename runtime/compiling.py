"""torch.compile, block by block, and a CUDA graph of the forward and backward pass of a micro-batch."""

import torch

from config import Config
from errors import UserError, first_line


def compile_blocks(model, config: Config, world):
    """Compiles block by block on CUDA and CPUs. If torch.compile does not work, `auto` continues without it."""
    if config.compile == "off" or (config.compile == "auto" and world.device.type not in ("cuda", "cpu")):
        return
    world.say("compiling block by block: the first step can take a minute (--compile=off avoids it)")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=world.device))
    except Exception as e:  # a missing compiler or missing Python headers raise many kinds of error
        reason = f"torch.compile does not work on this machine ({first_line(e)})"
        if config.compile == "on":
            raise UserError(f"compile=on: {reason}; pass --compile=off") from None
        world.say(f"warning: {reason}; continuing without it, more slowly")
        return
    for block in model.blocks:
        block.compile(fullgraph=True)


class Graph:
    """Forward and backward of a micro-batch, captured as a CUDA graph at the first call and replayed with a single launch
    afterwards.

    micro_step(model, *inputs) computes the gradients of the parameters and returns the loss; inputs are tensors or None. Small
    batches need this: at 16 sequences of 512 tokens, an H200's host takes 36 ms to launch llama162m's kernels one by one, while
    the GPU computes them in 17 ms. A graph reads and writes the same memory each time: all calls must have the same shapes, and
    the gradients are replaced.
    """

    def __init__(self, micro_step):
        self.micro_step = micro_step
        self.graph = None

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
            for _ in range(2):  # compiles, and makes the allocations that capture does not allow
                self.micro_step(model, *self.inputs)
                model.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.micro_step(model, *self.inputs)
        self.grads = [p.grad for p in model.parameters()]


def graphed(micro_step, config: Config, world):
    """Returns `micro_step` as a Graph on one GPU without gradient accumulation, else as it is."""
    alone = world.device.type == "cuda" and world.size == 1 and config.micro_batch_size >= config.batch_size
    return Graph(micro_step) if alone and config.compile != "off" else micro_step
