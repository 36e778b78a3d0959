"""Logging: metrics.jsonl, console output, step time, MFU."""

import contextlib
import json
import math
import re
import shlex
import time
from pathlib import Path

import torch

from config import Config, ModelConfig
from errors import RunFailed, UserError
from files import atomic_write, naming
from runtime.checkpoint import n_milestones

# Dense bf16 TFLOP/s from the makers' data sheets, by the name of the card without maker, memory and form factor.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H20": 148,
    "A100": 312, "A100 PCIe": 312, "A800": 312, "A800 PCIe": 312, "A40": 150, "A30": 165, "A10G": 70, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
MAX_SKIPPED = 10
NOT_THE_MODEL = r"NVIDIA|GeForce|Tesla|\d+GB|HBM\w*|SXM\d?"


def peak_flops(card: str) -> float | None:
    """Returns the peak bf16 FLOP/s of a card by its whole name; None for an unknown card, whose MFU is left out."""
    words = [word for word in re.split(r"[ -]", card) if not re.fullmatch(NOT_THE_MODEL, word)]
    tflops = PEAK_TFLOPS.get(" ".join(words).replace("PCIE", "PCIe"))
    return tflops and tflops * 1e12


def flops_per_token(c: ModelConfig) -> float:
    """Returns the FLOPs of forward and backward per token: 6 per parameter of a matrix, and 6 T H Dh a layer for attention.

    Only the causal half of attention counts. The embedding is a lookup and does not count.
    """
    attention = 2 * c.dim * (c.n_heads + c.n_kv_heads) * c.head_dim
    matrices = c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.vocab_size * c.dim
    return 6 * matrices + 6 * c.n_layers * c.seq_len * c.n_heads * c.head_dim


class Metrics:
    """The rows of metrics.jsonl: one per step at which something was measured."""

    def __init__(self, path: Path, step: int, log=lambda row: None):
        """Continues after `step`. Removes the later rows, whose updates will be repeated; the row of `step` itself stays until
        the caller writes it again, completed. `before` has all rows that were there, by step. Each row that is written is also
        passed to log(row).
        """
        self.path = path
        self.log = log
        self.step = step
        self.before = {row["step"]: row for row in read(path)} if path.exists() else {}
        self._replace(self.before.get(step) if step else None)

    def _replace(self, row: dict | None):
        """Writes the rows before `step`, and `row`, if any, as that of `step`."""
        rows = [earlier for earlier in self.before.values() if earlier["step"] < self.step] + ([row] if row else [])
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict):
        if row["step"] == self.step:
            self._replace(row)
        else:
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.log(row)


def read(path: Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl, each with its step and tokens, or of a measures.jsonl, each with its step.

    Ignores a last line that a kill has cut off; raises UserError for any other line that is not such a row.
    """
    rows = []
    required = ("step", "tokens") if Path(path).name == "metrics.jsonl" else ("step",)
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            if any(type(rows[-1][name]) is not int for name in required):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a row of measurements; remove this line") from None
    return rows


def row_of(path: Path, step: int) -> dict:
    """Returns the row of a step in a metrics.jsonl, or {} if there is none."""
    return next((row for row in read(path) if row["step"] == step), {}) if path.exists() else {}


def has_updates(path: Path) -> bool:
    """Returns whether a metrics.jsonl has more than the evaluation before the first update."""
    return path.exists() and len(path.read_bytes().splitlines()) > 1


def is_evaluated(row: dict) -> bool:
    """Returns whether the row has results of validation or the copy test."""
    return any(name.startswith(("val_", "copy_")) for name in row)


class Stats:
    """Loss and gradient norm of the updates since the last log line, kept on the device until they are read.

    An update whose loss or norm is not finite changed nothing. It counts as an overflow if only the loss scale of fp16 was too
    high; otherwise it is reported and counted as skipped, and MAX_SKIPPED of these in a row end the run.
    """

    def __init__(self, world, out: Path, state: dict):
        self.world = world
        self.out = out
        self.unread = []
        self.skipped = state.get("skipped", 0)
        self.overflows = state.get("overflows", 0)
        self.in_a_row = 0

    def read(self, step: int) -> dict:
        """Returns the row of update `step`, the last one. Raises RunFailed after MAX_SKIPPED non-finite updates in a row."""
        stats = torch.stack(self.unread).tolist()
        self.unread = []
        most_in_a_row = 0
        for number, (loss, norm, own, scale) in enumerate(stats, step - len(stats) + 1):
            if math.isfinite(loss + norm):
                self.in_a_row = 0
            elif math.isfinite(loss) and scale > 1:
                self.overflows += 1
            else:
                self.skipped += 1
                self.in_a_row += 1
                most_in_a_row = max(most_in_a_row, self.in_a_row)
                flags = torch.eye(self.world.size)[self.world.rank] * (not math.isfinite(own))
                ranks = "".join(f"on rank {rank}, " for rank in self.world.sum(flags).nonzero().flatten().tolist())
                self.world.say(
                    f"warning: step {number}: loss {loss}, gradient norm {norm}; update skipped; {ranks}"
                    f"its batch: python -m data.bins {shlex.quote(str(self.out))} --step {number}"
                )
        if most_in_a_row >= MAX_SKIPPED:
            raise RunFailed(
                f"step {step}: {most_in_a_row} updates in a row had no finite loss or gradient; saved after them: the same "
                "command (without --resume) continues; to lower the rate, add --learning_rate=... --allow_changes=true"
            )
        row = {name: x for name, x in {"loss": loss, "grad_norm": norm}.items() if math.isfinite(x)}
        if self.overflows or scale > 1:
            row |= {"loss_scale": scale, "overflows": self.overflows}
        return row | ({"skipped": self.skipped} if self.skipped else {})


class Timer:
    """Measures the time per step, excluding evaluations and checkpoints, and estimates the remaining time, including them."""

    def __init__(self, config: Config, world):
        self.config = config
        self.peak = None
        if world.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(world.device))
            self.peak = peak and peak * world.size
        self.begun = None

    def start(self, step: int):
        self.begun = self.last = (step, time.perf_counter())
        self.pause = 0.0

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time spent in its block from the step time."""
        started = time.perf_counter()
        yield
        if self.begun:
            self.pause += time.perf_counter() - started

    def lap(self, step: int) -> dict:
        """Returns the mean step time since the last call, and what follows from it; {} if no step has been timed yet."""
        if self.begun is None:
            return {}
        now = time.perf_counter()
        seconds = (now - self.last[1] - self.pause) / (step - self.last[0])
        average = (now - self.begun[1]) / (step - self.begun[0])
        self.last, self.pause = (step, now), 0.0
        speed = self.config.batch_size * self.config.seq_len / seconds
        row = {"ms": 1000 * seconds, "tokens_per_s": speed}
        if self.peak:
            row["mfu"] = speed * flops_per_token(self.config) / self.peak
        return row | {"eta_s": average * (self.config.max_steps - step)}


def announcement(c: Config, world, per_rank: int, micro: int, train_bin) -> str:
    """Returns the lines printed at the start: the model, the batch arithmetic, the size of the data and milestones, and a
    warning if the run ends during warm-up.
    """
    lines = [
        f"model: {c.n_layers} layers, dim {c.dim}, {c.n_parameters:,} parameters, in {c.dtype} on {world.size} x "
        f"{world.device.type} with {c.kernels} kernels",
        f"batch: {micro} sequences x {per_rank // micro} gradient accumulation steps x {world.size} ranks = {c.batch_size} "
        f"sequences of {c.seq_len} = {c.batch_size * c.seq_len:,} tokens per update",
        f"data: {train_bin.n_tokens:,} training tokens; {c.max_steps:,} updates are "
        f"{c.max_steps * c.batch_size / train_bin.n_windows:.2f} epochs",
    ]
    if c.ckpt_milestones:
        count = n_milestones(c.max_steps, c.milestone_interval)
        size = 4 * c.n_parameters
        lines.append(f"milestones: {count:,} files of {size / 1e6:,.1f} MB, {size * count / 1e9:,.2f} GB in all")
    if 0 < c.max_steps < c.warmup_steps:
        lines.append(
            f"warning: warmup_steps={c.warmup_steps} exceeds max_steps={c.max_steps}: the learning rate ends at "
            f"{100 * c.max_steps / c.warmup_steps:.2g}% of its peak"
        )
    return "\n".join(lines)


def log_line(step: int, max_steps: int, row: dict) -> str:
    """Returns a line of step, %, loss, learning rate, gradient norm, ms, tokens/s, MFU where known, and remaining time."""
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps} {step / max(max_steps, 1):4.0%}"]
    ms = "{:.1f} ms" if row.get("ms", 0) < 1000 else "{:,.0f} ms"
    formats = {
        "loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "norm {:.2f}", "ms": ms, "tokens_per_s": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }  # fmt: skip
    parts += [text.format(row[name]) for name, text in formats.items() if name in row]
    if "eta_s" in row:
        parts.append(f"ETA {duration(row['eta_s'])}")
    return " | ".join(parts)


def evaluation_line(row: dict) -> str:
    """Returns a line of the losses of validation, the exact match of each copy test, and the best induction head."""
    kinds = {"val_loss_new": "new {:.4f}", "val_loss_repeated": "repeated {:.4f}", "val_bpb": "{:.4f} bits/byte"}
    details = ", ".join(text.format(row[name]) for name, text in kinds.items() if name in row)
    parts = [f"val loss {row['val_loss']:.4f}" + (f" ({details})" if details else "")] if "val_loss" in row else []
    copied = [f"{name.removeprefix('copy_exact_')} {row[name]:.3f}" for name in row if name.startswith("copy_exact_")]
    parts += [f"copied {', '.join(copied)}"] if copied else []
    parts += [f"induction {row['induction_max']:.3f}"] if "induction_max" in row else []
    return "  " + " | ".join(parts)


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
