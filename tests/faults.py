"""Runs that can be killed: processes forked from one that has torch imported, so that each starts in milliseconds."""

import contextlib
import multiprocessing
import os
import signal
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
    from config import from_dict
    from errors import run_command

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


def slow_update():
    """The first pass takes a minute."""
    import train

    train.dropout_seeds = lambda *_: print("updating", flush=True) or [time.sleep(0.01) for _ in range(6000)]


def no_file_beyond(size: int):
    """The disk is full for whoever writes more than `size` bytes to one file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
