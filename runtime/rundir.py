"""The run directory: one run at a time writes to it, and a new run does not mix with an old one.

run.lock   held while a run writes here
run.pid    the process that holds or held it; how far it came: starting, begun or stopped; and torchrun's id of the launch
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import filelock

from cli import say, wait_for_report
from config import Config
from errors import UserError
from files import atomic_write
from runtime import checkpoint, loggers, metrics

OF_A_RUN = ("ckpt*.pt", "milestone_*.pt", "config.json", "metrics.jsonl", "measures.jsonl", "*.png", "tensorboard", "wandb")


@contextlib.contextmanager
def locked(path: Path):
    """Creates and locks the run directory until the block ends; removes it again if the run wrote nothing.

    Raises UserError if the directory cannot be made or written to, or if another run holds it.
    """
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"out_dir={path}: {e.strerror}; name another --out_dir") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"out_dir={path}: cannot be written to; name another --out_dir")
    lock = filelock.FileLock(path / "run.lock", timeout=1)  # longer than is_running holds it
    owner = path / "run.pid"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{path}: process {owner.read_text().split()[0]} is training there; wait for it, or name another --out_dir"
        ) from None
    except (OSError, NotImplementedError) as e:  # a file system that cannot lock
        say(f"warning: {path}: cannot be locked ({e}); let no other run write to it")
    record(path, "begun" if is_restarted(path, "begun") else "starting")
    for name in ("*.pt", "config.json", "metrics.jsonl"):
        for unfinished in path.glob(f"{name}.*.tmp"):  # by a run that was killed while it wrote
            unfinished.unlink()
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # which would hide what ended the run
            if {file.name for file in path.iterdir()} <= {"run.lock", "run.pid"}:
                for file in path.iterdir():
                    file.unlink()
                if is_new:
                    path.rmdir()


def holds(path: Path, resumed: Path | None) -> bool:
    """Returns whether a checkpoint lies in the run directory itself."""
    return resumed is not None and path.samefile(resumed.parent)


def is_running(path: Path) -> bool:
    """Returns whether a run holds the run directory."""
    lock = path / "run.lock"
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def record(path: Path, state: str):
    """Records in run.pid how far this process has come, for is_restarted."""
    (path / "run.pid").write_text(f"{os.getpid()}\n{state} {os.environ.get('TORCHELASTIC_RUN_ID')}\n")


def is_restarted(path: Path, state: str) -> bool:
    """Returns whether torchrun is restarting a run of this directory that ended in `state`."""
    owner = path / "run.pid"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not owner.exists():
        return False
    return owner.read_text().endswith(f"\n{state} {os.environ.get('TORCHELASTIC_RUN_ID')}\n")


def was_stopped(path: Path) -> bool:
    """Returns whether torchrun is restarting a run that a signal has stopped: torchrun treats exit status 3 as a failure."""
    if not is_restarted(path, "stopped"):
        return False
    if os.environ.get("RANK") == "0":
        say(f"{path}: a signal stopped this run; it is not restarted")
    else:
        wait_for_report()
    return True


@contextlib.contextmanager
def begin(path: Path, config: Config, resumed: Path | None, step: int, facts: dict[str, str]) -> metrics.Metrics:
    """Writes config.json, the settings with `facts` added; opens metrics.jsonl, with its rows up to `step`, and the logger that
    config.log_to names.

    resumed: the checkpoint that the run resumes at `step`. Files that are not part of the run's history are first moved into
    previous-<n>: all of a run's files if the run is new or its checkpoint lies elsewhere; later checkpoints, with a copy of the
    settings and rows, if it goes back to an older one.
    """
    if not holds(path, resumed):
        step = 0
    if step == 0:
        old = [file for pattern in OF_A_RUN for file in sorted(path.glob(pattern))]
        old = old if any(file.suffix == ".pt" for file in old) or metrics.has_updates(path / "metrics.jsonl") else []
    else:
        later = [checkpoint.by_step(path, kind).items() for kind in ("ckpt", "milestone")]
        old = [file for files in later for number, file in files if number > step]
        newest = path / "ckpt.pt"
        if newest.exists() and not newest.samefile(resumed):
            old.append(newest)
    if old:
        folder = next(f for n in itertools.count(1) if not (f := path / f"previous-{n}").exists())
        folder.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            if step and (path / name).exists():
                shutil.copyfile(path / name, folder / name)
        for file in old:
            file.rename(folder / file.name)
        say(f"moved what earlier updates left in {path} to {folder}: {', '.join(file.name for file in old)}")
    record(path, "begun")
    rows = metrics.Metrics(path / "metrics.jsonl", step)
    atomic_write(path / "config.json", json.dumps(dataclasses.asdict(config) | facts, indent=2) + "\n")
    with loggers.opened(path, config, step, rows.before) as rows.log:
        yield rows
