"""torch.compile, block by block."""

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
