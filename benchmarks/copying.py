"""`bench.py copy`: how soon a model copies, from a cold start.

train.py runs in a process of its own until its copy test at the full alphabet has been at or above a level at two evaluations
in a row. The clock starts with the process and its compilers' caches are empty, so imports, compilation and evaluations
count; preparing the data does not. Seconds, steps and tokens are those of the second of the two evaluations; None where the
run ended without.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from config import ROOT
from errors import UserError
from runtime import metrics

LEVELS = (0.5, 0.9)
SCORE = "copy_exact_full"


class RunFailed(RuntimeError):
    """train.py failed on the way: its last line."""


def reached(rows: list[dict], level: float) -> dict | None:
    """The row of the second of two evaluations in a row at or above a level of exact match."""
    tested = [row for row in rows if SCORE in row]
    return next((b for a, b in zip(tested, tested[1:], strict=False) if min(a[SCORE], b[SCORE]) >= level), None)


def time_to_copy(argv: list[str], until: float) -> dict:
    """{level: {seconds, step, tokens} or None, ...} of one run of train.py with these arguments, ended at the level `until`.

    Raises UserError where train.py refuses them.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows, path = [], Path(folder) / "run/metrics.jsonl"
        command = [sys.executable, str(ROOT / "train.py"), *argv, f"--out_dir={folder}/run"]
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        started = time.perf_counter()
        with open(f"{folder}/log.txt", "w") as log:  # a file: a pipe that nobody reads would stop it once full
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": log}
            child = subprocess.Popen(command, **quiet, env=os.environ | caches)
        while reached(rows, until) is None and child.poll() is None:
            time.sleep(0.2)
            rows += watch(path, rows, time.perf_counter() - started)
        child.send_signal(signal.SIGTERM)
        if child.wait() not in (0, 3):
            said = Path(f"{folder}/log.txt").read_text().strip().splitlines()
            raise (UserError if child.returncode == 2 else RunFailed)(said[-1])
        rows += watch(path, rows, time.perf_counter() - started)
    met = {level: reached(rows, level) for level in LEVELS if level <= until}
    return {str(level): row and {name: row[name] for name in ("seconds", "step", "tokens")} for level, row in met.items()}


def watch(path: Path, seen: list[dict], seconds: float) -> list[dict]:
    """The rows that have come since, each with the seconds at which it was first seen."""
    rows = metrics.read(path) if path.exists() else []
    return [row | {"seconds": seconds} for row in rows[len(seen) :]]


def copy(argv: list[str], until: float, seeds: int) -> list[dict]:
    """time_to_copy for each seed, one after the other."""
    found = []
    for seed in range(seeds):
        found.append({"seed": seed} | time_to_copy([*argv, f"--seed={seed}"], until))
        print(f"seed {seed}: {said(found[-1])}", flush=True)
    return found


def said(row: dict) -> str:
    return "; ".join(
        f"{level} after {at['seconds']:.0f} s, {at['step']:,} steps, {at['tokens'] / 1e6:.2f} million tokens"
        if at
        else f"{level} not reached"
        for level, at in row.items()
        if level != "seed"
    )
