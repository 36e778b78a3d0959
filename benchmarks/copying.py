"""`bench.py copy`: the time until a model copies, from a cold start.

train.py runs in a process of its own until its copy test at the full alphabet has reached a level in two evaluations in a
row. The clock starts with the process, and the compilers' caches are empty: imports, compilation and evaluations count;
preparing the data does not. Seconds, steps and tokens are those of the second of the two evaluations.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from config import ROOT
from errors import RunFailed, UserError
from runtime import metrics

LEVELS = (0.5, 0.9)
SCORE = "copy_exact_full"


def reached(rows: list[dict], level: float) -> dict | None:
    """Returns the row of the second of two evaluations in a row at or above a level of exact match."""
    tested = [row for row in rows if SCORE in row]
    return next((b for a, b in zip(tested, tested[1:], strict=False) if min(a[SCORE], b[SCORE]) >= level), None)


def time_to_copy(argv: list[str], until: float) -> dict:
    """Runs train.py with these arguments until the level `until`; returns {level: {seconds, step, tokens} or None, ...}.

    Raises UserError if train.py refuses the arguments, and RunFailed if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows, path, log = [], Path(folder, "run/metrics.jsonl"), Path(folder, "log.txt")
        command = [sys.executable, str(ROOT / "train.py"), *argv, f"--out_dir={folder}/run"]
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        started = time.perf_counter()

        def read_new():
            new = metrics.read(path)[len(rows) :] if path.exists() else []
            rows.extend(row | {"seconds": time.perf_counter() - started} for row in new)

        with open(log, "w") as stderr:  # a file, because a pipe that nobody reads would block the run once it is full
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr}
            child = subprocess.Popen(command, **quiet, env=os.environ | caches)
        try:
            while reached(rows, until) is None and child.poll() is None:
                time.sleep(0.2)
                read_new()
        finally:
            child.terminate()
            status = child.wait()
        if status not in (0, 3):
            raise (UserError if status == 2 else RunFailed)(log.read_text().strip().splitlines()[-1])
        read_new()
    found = {level: reached(rows, level) for level in LEVELS if level <= until}
    return {str(level): row and {name: row[name] for name in ("seconds", "step", "tokens")} for level, row in found.items()}


def copy(argv: list[str], until: float, seeds: int) -> Iterator[dict]:
    """Prints time_to_copy of each seed, and yields {"seeds": those so far}."""
    rows = []
    for seed in range(seeds):
        rows.append({"seed": seed} | time_to_copy([*argv, f"--seed={seed}"], until))
        print(f"seed {seed}: {line(rows[-1])}", flush=True)
        yield {"seeds": rows}


def line(row: dict) -> str:
    return "; ".join(
        f"{level} after {at['seconds']:.0f} s, {at['step']:,} steps, {at['tokens'] / 1e6:.2f} million tokens"
        if at
        else f"{level} not reached"
        for level, at in row.items()
        if level != "seed"
    )
