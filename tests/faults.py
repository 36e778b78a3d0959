"""Runs that can be killed: processes forked from one that has torch imported, so that each starts in milliseconds."""

import contextlib
import errno
import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train"])
TALLY = {}  # kind of fault -> [tried, survived], for the table at the end of the session


@contextlib.contextmanager
def fault(kind: str):
    """Counts a fault as tried, and as survived where nothing inside fails."""
    TALLY.setdefault(kind, [0, 0])[0] += 1
    yield
    TALLY[kind][1] += 1


def start(settings: dict, prepare=None):
    """A run of train.py in a process of its own; `prepare`, a function of this module or a partial of one, goes first. What it
    prints goes to <out_dir>.log.
    """
    process = FORK.Process(target=_train, args=(settings, prepare))
    process.start()
    return process


def _train(settings, prepare):
    log = os.open(log_of(settings), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import train
    from cli import run_command
    from config import from_dict

    if prepare:
        prepare()
    status = run_command(train.main, from_dict(settings))
    sys.stdout.flush()
    os._exit(status)


def log_of(settings) -> Path:
    return Path(settings["out_dir"] + ".log")


def run(settings: dict, prepare=None) -> int:
    """The whole run; its exit status, or minus the signal that ended it."""
    process = start(settings, prepare)
    process.join(120)
    return process.exitcode


def start_ranks(settings: dict, size: int, prepare=None, of_rank_0=None) -> list:
    """A run of several ranks on this machine, without torchrun; of_rank_0 takes the place of `prepare` on rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prepares = [of_rank_0 or prepare] + [prepare] * (size - 1)
    return [start(settings, functools.partial(_as_rank, i, size, port, prepares[i])) for i in range(size)]


def _as_rank(rank, size, port, prepare):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if prepare:
        prepare()


def kill_at(name: str, count: int):
    """The process kills itself at call number `count` of os.<name>: in the middle of writing a checkpoint."""
    original, calls = getattr(os, name), []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, name, deadly)


def slow_copy_test():
    """The copy test made during training takes a minute."""
    import eval_copy

    eval_copy.training_row = lambda *_: [time.sleep(0.01) for _ in range(6000)] and {}


def slow_validation():
    """Each batch of a validation takes a minute."""
    import runtime.validation

    runtime.validation.repeated = lambda *_: print("validating", flush=True) or [time.sleep(0.01) for _ in range(6000)]


def slow_save(seconds: float):
    """A checkpoint takes so long to write."""
    from runtime import checkpoint

    save = checkpoint.save
    checkpoint.save = lambda *args: (print("saving", flush=True), time.sleep(seconds), save(*args))


def slow_micro_batches():
    """Each gradient accumulation step takes a quarter of a second more."""
    import train

    seeds = train.dropout_seeds
    train.dropout_seeds = lambda *args: (print("micro-batch", flush=True), time.sleep(0.25), seeds(*args))[2]


def no_save():
    """Checkpoints cannot be written."""
    from runtime import checkpoint

    def save(path, state):
        raise OSError(errno.EIO, "Input/output error", str(path))

    checkpoint.save = save


def high_loss_scale(scale: float):
    """The loss scale of fp16 begins so high that gradients overflow until it has been halved several times."""
    from runtime.optim import LossScale

    init = LossScale.__init__
    LossScale.__init__ = lambda self, *args: (init(self, *args), self.scale.fill_(scale))[0]


def slow_update():
    """The first pass takes a minute."""
    import train

    train.dropout_seeds = lambda *_: print("updating", flush=True) or [time.sleep(0.01) for _ in range(6000)]


def no_file_beyond(size: int):
    """The disk is full for whoever writes more than `size` bytes to one file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
