"""`bench.py data`: the speed of data.prepare on this Python's standard library, next to encode() in a bare loop.

The tokenizer is a sentencepiece BPE of 32,000 ids, trained on that text. The command is timed from start to end.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from config import ROOT
from data import sources
from data.meta import load_meta
from data.tokenizer_kinds import SentencePiece


def prepare_rates(rounds: int) -> dict:
    """Returns tokens per second of data.prepare with one process and with two, and of encode() in a bare loop over the same
    text: medians of rounds in which they take turns; and the peak memory in MiB of data.prepare with its processes.
    """
    rows = []
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/bpe/tokenizer.model"
        prepare = [sys.executable, "-m", "data.prepare", "python-stdlib"]
        subprocess.run([*prepare, "--tokenizer=bpe", "--vocab_size=32000", f"--out={folder}/bpe"], cwd=ROOT, check=True)
        encode = SentencePiece(Path(model).read_bytes()).sp.encode
        texts = [document.text for part in sources.python_stdlib() for document, _ in part.read(None) if document.text]
        for i in range(rounds):
            start = time.perf_counter()
            row = {"bare": sum(len(encode(text)) for text in texts) / (time.perf_counter() - start)}
            for processes in (1, 2):
                out = f"{folder}/{i}.{processes}"
                command = [*prepare, f"--tokenizer={model}", f"--processes={processes}", f"--out={out}"]
                start = time.perf_counter()
                child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                try:
                    while child.poll() is None:
                        peak = max(peak, peak_memory(child.pid))
                        time.sleep(0.05)
                finally:
                    child.terminate()
                    child.wait()
                seconds = time.perf_counter() - start
                assert child.returncode == 0, command
                tokens = sum(split["tokens"] for split in load_meta(out)["splits"].values())
                row[f"processes_{processes}"] = tokens / seconds
            rows.append(row)
            print(", ".join(f"{name} {rate:,.0f} tok/s" for name, rate in row.items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return medians | {
        "of_bare": statistics.median(row["processes_1"] / row["bare"] for row in rows),
        "scaling": statistics.median(row["processes_2"] / row["processes_1"] / 2 for row in rows),
        "peak_MiB": peak,
        "rounds": rows,
    }


def peak_memory(pid: int) -> int:
    """Returns the peak memory in MiB of a process and its children on Linux, summed; 0 elsewhere, and once it has ended."""
    with contextlib.suppress(OSError, IndexError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])
        return own // 1024 + sum(map(peak_memory, map(int, children)))
    return 0


def summary(rates: dict) -> str:
    return (
        f"one process: {rates['processes_1']:,.0f} tok/s, {rates['of_bare']:.2f} of the bare loop; "
        f"two: {rates['processes_2']:,.0f}, scaling {rates['scaling']:.0%}; at most {rates['peak_MiB']} MiB in all"
    )
