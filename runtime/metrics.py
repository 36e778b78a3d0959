"""What a run tells: metrics.jsonl, the log line, the progress bar, and the arithmetic behind them."""

import json
import math
import os
import sys
from pathlib import Path

from config import ModelConfig

# Dense bf16 TFLOP/s by the makers' data sheets, by the part of the name that tells cards apart.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148, "GH200": 989, "B200": 2250, "A100": 312,
    "A800": 312, "A10G": 70, "A30": 165, "A40": 150, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(card: str) -> float | None:
    """Peak bf16 FLOP/s of a card by its name; None where the table has no entry, and the MFU is left out."""
    found = [name for name in PEAK_TFLOPS if name in card]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def flops_per_token(c: ModelConfig) -> float:
    """FLOPs of forward and backward per token: 6 per parameter in a matrix product, and 6 T D a layer of causal attention.

    The embedding is a look-up and counts nothing; attention counts the causal half.
    """
    attention = c.dim * (2 * c.dim + 2 * c.n_kv_heads * c.head_dim)
    matrices = c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.vocab_size * c.dim
    return 6 * matrices + 6 * c.n_layers * c.seq_len * c.dim


class Metrics:
    """The rows of runs/<name>/metrics.jsonl: one per step at which something was measured."""

    def __init__(self, path: Path, step: int):
        """Goes on after `step`: rows beyond it are of a future that did not happen, and are cut. So is the row of `step`
        itself, which stands in `last` to be completed and written again; {} where there is none.
        """
        self.path = path
        rows = [row for row in read(path) if row["step"] <= step] if step and path.exists() else []
        self.last = rows.pop() if rows and rows[-1]["step"] == step else {}
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(aside, path)

    def write(self, row: dict):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def is_measured(row: dict) -> bool:
    """Whether the row has what validation and the copy test found."""
    return any(name.startswith(("val_", "copy_")) for name in row)


def read(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. A last line cut by a kill is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def log_line(row: dict, max_steps: int) -> str:
    """One dense line of a row: step, %, loss, lr, ms, tokens/s, MFU where known, time to go."""
    parts = [f"step {row['step']:>{len(str(max_steps))}}/{max_steps} {row['step'] / max(max_steps, 1):4.0%}"]
    form = {
        "loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "norm {:.2f}", "ms": "{:.1f} ms",
        "tokens_per_s": "{:,.0f} tok/s", "mfu": "MFU {:.1%}",
    }  # fmt: skip
    parts += [text.format(row[name]) for name, text in form.items() if name in row]
    if "eta_s" in row:
        parts.append(f"ETA {duration(row['eta_s'])}")
    return " | ".join(parts)


def measured_line(row: dict) -> str:
    """What validation and the copy test found, on a line of its own."""
    known = ("val_loss", "val_loss_new", "val_loss_repeated", "val_bpb", "induction_max")
    parts = [f"{name} {row[name]:.4f}" for name in row if name in known or name.startswith("copy_")]
    return "  " + "  ".join(parts)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


class Progress:
    """Log lines; on a terminal with a bar, rewritten in place."""

    def __init__(self, world, max_steps: int):
        self.world, self.max_steps, self.bar = world, max_steps, sys.stdout.isatty()

    def show(self, row: dict):
        line = log_line(row, self.max_steps)
        if self.bar and self.world.rank == 0:
            done = round(20 * row["step"] / max(self.max_steps, 1))
            print(f"\r[{'#' * done}{'.' * (20 - done)}] {line}\033[K", end="", flush=True)
        else:
            self.world.say(line)

    def say(self, text: str):
        self.world.say(("\r\033[K" if self.bar else "") + text)
