"""Where a run runs: its ranks, its device, its memory."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from config import Config
from errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all: its rank of size, and its device."""

    rank: int
    size: int
    device: torch.device
    cpu_group: object = None

    def say(self, *words):
        """Prints from rank 0 alone."""
        if self.rank == 0:
            print(*words, flush=True)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all ranks."""
        if self.size == 1:
            return x
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. The ranks meet on their CPUs: no GPU waits for it."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags.item())

    def wait(self):
        """Until all ranks are here."""
        self.any(False)


def start(config: Config) -> World:
    """Joins the ranks that torchrun started: NCCL on GPUs, gloo on CPUs. One process alone is a world of one."""
    rank, size, local = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, device)
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun hands a run that it starts again the store of the one that failed, with the addresses of dead processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, dist.new_group(backend="gloo") if backend == "nccl" else None)


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def exit(status: int):
    """Ends this process. A rank of several leaves without the interpreter's clean-up, in which gloo's threads may abort."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop looks at before each pass; a SIGINT after that ends it at once."""

    class Interrupt(BaseException):
        """Leaves `interruptible`; nothing else catches it."""

    def __init__(self):
        self.asked = self.inside = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.inside:
            self.inside = False
            raise self.Interrupt

    def interruptible(self, f):
        """f(), or None where a signal came before its end. For what changes nothing and meets no other rank, as evaluations."""
        try:
            self.inside = True
            if self.asked:
                raise self.Interrupt
            return f()
        except self.Interrupt:
            return None
        finally:
            self.inside = False


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: expected auto, cuda, mps or cpu") from None
    here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not here.get(device.type, lambda: False)():
        raise UserError(f"device={name}: this machine or this build of torch has none; use --device=cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def on_device(windows: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T+1) ids -> inputs and targets (B, T) on the device."""
    tokens = torch.from_numpy(windows)
    tokens = tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
    return tokens[:, :-1], tokens[:, 1:]


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error says that a tensor does not fit into memory, or that its size fits no number."""
    said = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(text in str(e) for text in said)


def keep_freed_memory():
    """Lets glibc reuse a step's big tensors in the next step.

    By default it hands blocks above 32 MB back to the system when they are freed, and the page faults of taking them
    again each step cost a tenth to a third of a small model's training time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
