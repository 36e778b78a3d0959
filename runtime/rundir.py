"""The run directory: one run at a time writes to it, and a new run does not mix with an old one.

run.lock   held while a run writes here
run.pid    the process that holds or held it
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import filelock

from config import Config
from errors import UserError
from files import atomic_write
from runtime import metrics

OF_A_RUN = ("ckpt*.pt", "milestone_*.pt", "config.json", "metrics.jsonl", "measures.jsonl", "*.png")


def check(path) -> Path:
    """Returns the path of a run directory that can be made or written to; raises UserError for another one."""
    path = Path(path)
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"out_dir={path}: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"out_dir={path}: {parent} cannot be written to; name another --out_dir")
    return path


@contextlib.contextmanager
def locked(path: Path):
    """Holds the run directory, which is made, until the block ends. Raises UserError if another run holds it."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / "run.lock", timeout=0)
    owner = path / "run.pid"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{path}: process {owner.read_text().strip()} is training there; wait for it, or name another --out_dir"
        ) from None
    except (OSError, NotImplementedError) as e:  # a file system that cannot lock
        print(f"warning: {path}: cannot be locked ({e}); let no other run write to it", flush=True)
    owner.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        lock.release()
        if {p.name for p in path.iterdir()} <= {"run.lock", "run.pid"}:  # nothing came of this run
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def begin(path: Path, config: Config, step: int, is_new: bool) -> metrics.Metrics:
    """Writes config.json and returns the rows of metrics.jsonl up to `step`; what an older run left is moved aside first."""
    if is_new and (folder := set_aside(path)):
        print(f"an older run's files are now in {folder}", flush=True)
    rows = metrics.Metrics(path / "metrics.jsonl", step)
    atomic_write(path / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return rows


def set_aside(path: Path) -> Path | None:
    """Moves what an older run left in the run directory into a folder inside it, previous-1, -2 ..., and returns that folder;
    None if there is nothing worth keeping: no weights, and no measurement of an update.
    """
    old = [file for pattern in OF_A_RUN for file in path.glob(pattern)]
    rows = metrics.read(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    if not any(file.suffix == ".pt" for file in old) and not any(row["step"] for row in rows):
        return None
    number = next(n for n in range(1, 10**6) if not (path / f"previous-{n}").exists())
    folder = path / f"previous-{number}"
    folder.mkdir()
    for file in old:
        file.rename(folder / file.name)
    return folder
