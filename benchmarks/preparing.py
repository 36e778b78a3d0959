"""`bench.py data`: how fast data.prepare is on this Python's standard library, against encode() in a bare loop.

The tokenizer: sentencepiece bpe, 32,000 ids, trained on that text. The command is timed from start to end.
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
from data.tokenizer import SentencePiece


def prepare_rates(rounds: int) -> dict:
    """Tokens per second of data.prepare from start to end, with one process and with two, and of a bare loop of encode() over
    the same text; peak memory; rounds side by side. The tokenizer: sentencepiece bpe, 32,000 ids, trained on that text.
    """
    rows, peak = [], 0
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/bpe/tokenizer.model"
        made = [sys.executable, "-m", "data.prepare", "python-stdlib"]
        subprocess.run([*made, "--tokenizer=bpe", "--vocab_size=32000", f"--out={folder}/bpe"], cwd=ROOT, check=True)
        encode = SentencePiece(Path(model).read_bytes()).sp.encode
        texts = [document.text for part in sources.python_stdlib() for document in part.read() if document.text]
        for i in range(rounds):
            start = time.perf_counter()
            row = {"bare": sum(len(encode(text)) for text in texts) / (time.perf_counter() - start)}
            for processes in (1, 2):
                out = f"{folder}/{i}.{processes}"
                command = [*made, f"--tokenizer={model}", f"--processes={processes}", f"--out={out}"]
                start = time.perf_counter()
                child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                while child.poll() is None:
                    peak = max(peak, peak_memory(child.pid))
                    time.sleep(0.05)
                seconds = time.perf_counter() - start
                assert child.returncode == 0, command
                tokens = sum(split["tokens"] for split in load_meta(out)["splits"].values())
                row |= {f"processes_{processes}": tokens / seconds}
            rows.append(row)
            print(", ".join(f"{name} {rate:,.0f} tok/s" for name, rate in row.items()), flush=True)
    result = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return result | {
        "of_bare": statistics.median(row["processes_1"] / row["bare"] for row in rows),
        "scaling": statistics.median(row["processes_2"] / row["processes_1"] / 2 for row in rows),
        "peak_MiB": peak,
        "rounds": rows,
    }


def peak_memory(pid: int) -> int:
    """MiB, of a process and its children on Linux: the sum of what each held at most; 0 elsewhere, and once it has ended."""
    with contextlib.suppress(OSError, IndexError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])
        return own // 1024 + sum(map(peak_memory, map(int, children)))
    return 0


def said(r: dict) -> str:
    return (
        f"one process: {r['processes_1']:,.0f} tok/s, {r['of_bare']:.2f} of the bare loop; two: {r['processes_2']:,.0f}, "
        f"scaling {r['scaling']:.0%}; at most {r['peak_MiB']} MiB in all"
    )
