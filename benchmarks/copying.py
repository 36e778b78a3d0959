"""`bench.py copy`: the time until a model copies, from a cold start.

train.py runs in a process of its own until its copy test at one alphabet (--alphabet, the full one by default) has reached a
level in two evaluations in a row. The clock starts with the process, and the compilers' caches are empty: imports, compilation
and evaluations count; preparing the data does not. Seconds, steps and tokens are those of the second of the two evaluations.
"""

import contextlib
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
EXACT = "copy_exact_"  # the score of an alphabet is EXACT + its name


def reached(rows: list[dict], level: float, score: str) -> dict | None:
    """Returns the row of the second of two evaluations in a row at or above a level of `score`."""
    return next((b for a, b in zip(rows, rows[1:], strict=False) if min(a[score], b[score]) >= level), None)


def evaluations(argv: list[str], alphabet: str) -> Iterator[dict]:
    """Runs train.py with these arguments and yields the rows of its copy tests as they come, with the `seconds` since its
    start. Closing the generator ends the run.

    Raises UserError if train.py refuses the arguments or does not test this alphabet, and RunFailed if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "run/metrics.jsonl"), Path(folder, "log.txt")
        command = [sys.executable, str(ROOT / "train.py"), *argv, f"--out_dir={folder}/run"]
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        started = time.perf_counter()
        with open(log, "w") as stderr:  # a file, because a pipe that nobody reads would block the run once it is full
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr}
            child = subprocess.Popen(command, **quiet, env=os.environ | caches)
        try:
            seen, running = 0, True
            while running:
                time.sleep(0.2)
                running = child.poll() is None  # asked first, so that the last rows of a run that ends are read
                new = metrics.read(path)[seen:] if path.exists() else []
                seconds = time.perf_counter() - started
                seen += len(new)
                for row in new:
                    tested = [name.removeprefix(EXACT) for name in row if name.startswith(EXACT)]
                    if tested and alphabet not in tested:
                        raise UserError(f"--alphabet={alphabet}: the copy test of this run has {', '.join(tested)}")
                    if tested:
                        yield row | {"seconds": seconds}
        finally:
            child.terminate()
            status = child.wait()
        if status not in (0, 3):
            lines = log.read_text().strip().splitlines() or [f"train.py ended with status {status}"]
            raise (UserError if status == 2 else RunFailed)(lines[-1])


def time_to_copy(argv: list[str], until: float, alphabet: str = "full") -> Iterator[dict]:
    """Runs train.py with these arguments until the level `until`.

    Yields {"curve": [[seconds, step, score], ...]} after each evaluation, and at the end with {level: {seconds, step, tokens}
    or None} added. Raises what `evaluations` raises.
    """
    rows, curve, score = [], [], EXACT + alphabet
    with contextlib.closing(evaluations(argv, alphabet)) as tested:
        for row in tested:
            rows.append(row)
            curve.append([round(row["seconds"], 1), row["step"], row[score]])
            yield {"curve": curve}
            if reached(rows, until, score):
                break
    found = {level: reached(rows, level, score) for level in LEVELS if level <= until}
    levels = {str(level): row and {name: row[name] for name in ("seconds", "step", "tokens")} for level, row in found.items()}
    yield {"curve": curve} | levels


def copy(argv: list[str], until: float, seeds: int, alphabet: str = "full") -> Iterator[dict]:
    """Prints each evaluation and the result of each seed, and yields {"alphabet", "seeds": what `time_to_copy` yields}."""
    rows = []
    for seed in range(seeds):
        rows.append({"seed": seed})
        for found in time_to_copy([*argv, f"--seed={seed}"], until, alphabet):
            rows[-1] |= found
            if len(found) == 1:
                seconds, step, score = found["curve"][-1]
                print(f"seed {seed}: step {step:,}, {seconds:.0f} s, {EXACT}{alphabet} {score:.3f}", flush=True)
            else:
                print(f"seed {seed}: {line(found)}", flush=True)
            yield {"alphabet": alphabet, "seeds": rows}


def line(found: dict) -> str:
    return "; ".join(
        f"{level} after {at['seconds']:.0f} s, {at['step']:,} steps, {at['tokens'] / 1e6:.2f} million tokens"
        if at
        else f"{level} not reached"
        for level, at in found.items()
        if level != "curve"
    )
