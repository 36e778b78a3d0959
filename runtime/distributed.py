"""Process group setup, device selection and signal handling."""

import ctypes
import inspect
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import say
from config import Config
from errors import OutOfMemory, RunFailed, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run, and its device."""

    rank: int
    size: int
    device: torch.device
    cpu_group: object = None

    def say(self, *words):
        """Prints, on rank 0 only. If stdout is closed, the run continues without printing."""
        if self.rank == 0:
            say(*words)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of x over all ranks."""
        if self.size == 1:
            return x
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank. It is reduced between CPUs, so that no GPU waits for it."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags.item())

    def on_rank_0(self, f):
        """Calls f on rank 0 while the other ranks wait, and returns its result there; if it raises, all ranks raise."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = f()
            except (UserError, OSError) as e:
                error = e
        if self.any(error is not None):
            mistake = self.any(isinstance(error, UserError))
            raise error or (UserError if mistake else RunFailed)("rank 0 failed")
        return result


def start(config: Config) -> World:
    """Joins the ranks that torchrun started: NCCL on GPUs, gloo on CPUs. A single process is a world of size 1."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if size == 1:
        return World(rank, size, device)
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"device={config.device}: each rank takes a GPU of its own; pass --device=cuda")
        local_rank = int(os.environ["LOCAL_RANK"])
        n_gpus = torch.cuda.device_count()
        # All ranks of the machine raise this, as the first of them reports it.
        if int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)) > n_gpus:
            raise UserError(f"--nproc_per_node: this machine has {n_gpus} GPUs; start no more ranks than that")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun hands a run that it restarts the store of the one that failed, with the addresses of dead processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, dist.new_group(backend="gloo") if backend == "nccl" else None)


def largest_divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n that is at most `most`."""
    return next(i for i in range(min(n, most), 0, -1) if n % i == 0)


def out_of_memory(config: Config, world: World) -> OutOfMemory:
    """Returns the error of a run that does not fit into memory; it names a smaller micro-batch where there is one."""
    _, micro = split_batch(config, world)
    if micro == 1:
        return OutOfMemory("out of memory; try a smaller model, or a smaller --seq_len")
    return OutOfMemory(f"out of memory; try --micro_batch_size={largest_divisor(micro, micro // 2)}, or a smaller model")


def split_batch(config: Config, world: World) -> tuple[int, int]:
    """Returns how many sequences of a batch each rank takes, and how many of these a gradient accumulation step takes."""
    if config.batch_size % world.size:
        raise UserError(f"batch_size={config.batch_size}: must be a multiple of the {world.size} ranks")
    per_rank = config.batch_size // world.size
    micro = min(config.micro_batch_size, per_rank)
    if per_rank % micro:
        raise UserError(
            f"micro_batch_size={micro}: must divide the {per_rank} sequences of a rank's share of the batch; pass "
            f"--micro_batch_size={largest_divisor(per_rank, micro)}"
        )
    return per_rank, micro


def data_parallel(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """Returns the model, wrapped so that its gradients are averaged over the ranks if there are several."""
    if world.size == 1:
        return model
    # The only buffers are rotary tables, which never change. torch 2.13 renamed the option that leaves them alone.
    parameters = inspect.signature(DistributedDataParallel).parameters
    keep = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{keep: False})


def leave():
    """Leaves the process group. Not to be called after an error: peers inside a collective would keep this rank waiting."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_with(command):
    """Ends this process with the exit status that command() returns, or with 1 and a traceback if it raises.

    One rank of several skips the interpreter's clean-up, in which gloo's threads may abort or wait for peers.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(command())
    status = 1
    try:
        status = command()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Stopped(Exception):
    """SIGTERM or SIGINT asked the run to stop. All ranks raise it at the same point."""


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the run checks regularly. A SIGINT after that ends the process at once."""

    class Interrupt(BaseException):
        """Leaves `interruptible`; nothing else catches it."""

    def __init__(self, world: World):
        self.world = world
        self.stop_requested = False
        self.interruptible_now = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.interruptible_now:
            self.interruptible_now = False
            raise self.Interrupt

    def check(self):
        """Raises Stopped on all ranks if any of them has been asked to stop."""
        if self.world.any(self.stop_requested):
            raise Stopped

    def interruptible(self, f):
        """Returns f(). A signal cuts it short: all ranks raise Stopped. f must not change the run or wait for other ranks."""
        result = None
        try:
            try:
                self.interruptible_now = True
                if not self.stop_requested:
                    result = f()
            finally:
                self.interruptible_now = False
        except self.Interrupt:
            pass
        self.check()
        return result


def pick_device(name: str) -> torch.device:
    """Returns the torch device of a setting, and makes a GPU that it numbers the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: expected auto, cuda, mps or cpu") from None
    here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not here.get(device.type, lambda: False)():
        raise UserError(f"device={name}: this machine or this build of torch has none; use --device=cpu")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def dtype_name(name: str, device: torch.device) -> str:
    """Returns the dtype of activations for a setting. auto: bf16 on GPUs that have it, fp16 on older ones, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns torch's dtype of dtype_name."""
    return DTYPES[dtype_name(name, device)]


def on_device(windows: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the inputs and targets (B, T) of windows (B, T+1), on the device."""
    tokens = torch.from_numpy(windows)
    tokens = tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
    return tokens[:, :-1], tokens[:, 1:]


def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors for the next step.

    By default it returns blocks above 32 MB to the system, and the page faults of allocating them again in each step cost a
    tenth to a third of a small model's training time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
