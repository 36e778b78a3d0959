"""`bench.py train`: whole training steps, ours against those of other models of the same shape, on random tokens.

In each round each is timed in a process of its own, one after the other, so that what slows the machine down slows all. A
step is an update of batch_size sequences: data to the device, forward, backward, clipping, AdamW. On a GPU each takes its
fastest micro-batch that fits; on a CPU ours has its config's, the others take the batch whole, and ours is run a second time as
one rank a core. What counts is the median step of `SECONDS` at least.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function

import kernels
import train
from benchmarks.contenders import CONTENDERS, ON
from model import Llama
from runtime import distributed, metrics
from runtime.config import ROOT, Config, ConfigError, load

SECONDS = 6
OURS, RANKS = "ours", "ours, a rank a core"

# The parts of a step, by what is in the names of its kernels, or on a CPU of torch's ops: the first that fits. All else is
# memory-bound: norms, rotary, SwiGLU, adds, casts, the embedding, and what inductor fused.
PARTS = {
    "optimiser": ("multi_tensor_apply", "adamw", "vector_norm", "lpnorm", "_foreach", "optimizer"),
    "cross-entropy": ("cross_entropy", "log_softmax", "nll_loss"),
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax", "bmm"),
    "GEMMs": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm"),
    "data": ("memcpy htod", "bench: data"),
}
MEMORY_BOUND, IDLE = "memory-bound", "idle"


def part_of(name: str) -> str:
    return next((part for part, words in PARTS.items() if any(w in name.lower() for w in words)), MEMORY_BOUND)


class Steps:
    """A model, its optimizer, and whole updates of both; `who` is ours or a contender."""

    def __init__(self, c: Config, who: str, world: distributed.World):
        self.config, self.world, self.cuda = c, world, world.device.type == "cuda"
        torch.manual_seed(0)
        if who == OURS:
            dtype = distributed.pick_dtype(c.dtype, world.device)
            model = Llama(c.model(), kernels.choose(c.kernels, world.device, c.head_dim), dtype).to(world.device)
            train.compile_blocks(model, c, world)
            self.optimizer = train.make_optimizer(model, c)
            self.autocast = torch.autocast(world.device.type, enabled=False)
        else:
            model = CONTENDERS[who](c).to(world.device)
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=self.cuda)
            self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=self.cuda)
        self.model = model
        self.ranks = DistributedDataParallel(model) if world.size > 1 else model
        self.batch = c.batch_size // world.size
        self.windows = np.random.default_rng(0).integers(c.vocab_size, size=(self.batch, c.seq_len + 1))

    def update(self, micro: int):
        self.optimizer.zero_grad()
        for i in range(0, self.batch, micro):
            with record_function("bench: data"):
                x, y = distributed.on_device(self.windows[i : i + micro], self.world.device)
            with self.autocast:
                loss = self.ranks(x, y)
            (loss * (micro / self.batch)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()

    def seconds(self, micro: int) -> float:
        """The median update, after three that are not counted."""
        for _ in range(3):
            self.update(micro)
        times, started = [], time.perf_counter()
        at_once = 5 if self.cuda else 1  # as in training, the host runs ahead of a GPU
        while time.perf_counter() - started < SECONDS or len(times) < 5:
            self.wait()
            before = time.perf_counter()
            for _ in range(at_once):
                self.update(micro)
            self.wait()
            times.append((time.perf_counter() - before) / at_once)
        return statistics.median(times)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def parts(self, micro: int, updates: int = 5) -> dict[str, float]:
        """ms of an update in each part, and in which the device (on a CPU: torch) had nothing to do."""
        self.wait()
        with profile() as p:
            before = time.perf_counter()
            for _ in range(updates):
                self.update(micro)
            self.wait()
            wall = time.perf_counter() - before
        found = dict.fromkeys([*PARTS, MEMORY_BOUND], 0.0)
        for event in p.key_averages():
            if not self.cuda or event.device_type == torch.autograd.DeviceType.CUDA:
                took = event.self_device_time_total if self.cuda else event.self_cpu_time_total
                found[part_of(event.key)] += took / 1000 / updates
        return found | {IDLE: max(0.0, 1000 * wall / updates - sum(found.values()))}


def one(c: Config, who: str) -> dict:
    """What is measured in one process: tokens a second, the micro-batch, peak memory, and of ours the parts."""
    # The others go without what the trainer sets up for a process.
    world = distributed.start(c) if who == OURS else distributed.World(0, 1, torch.device(c.device))
    steps, times = Steps(c, who, world), {}
    micros = [min(c.micro_batch_size, steps.batch) if who == OURS else steps.batch]
    for micro in [m for m in (64, 32, 16, 8, 4) if m <= c.batch_size] if steps.cuda else micros:
        try:
            times[micro] = steps.seconds(micro)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if not times:
        raise ConfigError("no micro-batch fits the device's memory")
    micro = min(times, key=times.get)
    speed = c.batch_size * c.seq_len / times[micro]
    row = {"tokens_per_s": speed, "ms": 1000 * times[micro], "micro_batch_size": micro}
    if steps.cuda:
        torch.cuda.reset_peak_memory_stats()
        steps.update(micro)
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := metrics.peak_flops(torch.cuda.get_device_name()):
            row["mfu"] = speed * metrics.flops_per_token(c) / peak
    else:
        row["peak_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if who == OURS and world.size == 1:
        row["parts_ms"] = steps.parts(micro)
    distributed.leave()
    return row if world.rank == 0 else {}


def say_one(c: Config, who: str):
    """`one`, as the last line of a process; a contender that is not there or does not fit says why."""
    try:
        row = one(c, who)
    except (ConfigError, torch.OutOfMemoryError, ValueError, RuntimeError) as e:
        row = {"failed": str(e).strip().split("\n")[0]}
    if row:
        print(json.dumps(row), flush=True)


def in_a_process(argv: list[str], who: str) -> dict:
    launch = [sys.executable]
    if who == RANKS:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.get_num_threads()}"]
    command = [*launch, str(ROOT / "bench.py"), "train", *argv, f"--one={OURS if who == RANKS else who}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(argv: list[str], rounds: int) -> dict:
    """What was found in the rounds of one config, whose device is cuda or cpu; `of`: see summary."""
    c = load(argv)
    names = [*ON[c.device], OURS, *([RANKS] if c.device == "cpu" and torch.get_num_threads() > 1 else [])]
    found = {who: [] for who in names}
    for i in range(rounds):
        for who in names:
            if not any("failed" in row for row in found[who]):
                found[who].append(in_a_process(argv, who))
                row = found[who][-1]
                said = row.get("failed") or f"{row['tokens_per_s']:,.0f} tok/s"
                print(f"round {i + 1}, {who}: {said}", flush=True)
    return {"flops_per_token": metrics.flops_per_token(c), "rounds": rounds, "of": summary(found)}


def summary(found: dict[str, list[dict]]) -> dict:
    """{who: [row of a round, ...]} -> {who: the row of the median round, with ours_over: the median, least and most of the
    ratios of ours to it in the same round}.
    """
    result = {}
    for who, rows in found.items():
        if any("failed" in row for row in rows):
            result[who] = rows[-1]
            continue
        middle = sorted(rows, key=lambda row: row["tokens_per_s"])[len(rows) // 2]
        result[who] = middle
        if who != OURS and not any("failed" in row for row in found[OURS]):
            ratios = [ours["tokens_per_s"] / row["tokens_per_s"] for ours, row in zip(found[OURS], rows, strict=True)]
            result[who] |= {"ours_over": [statistics.median(ratios), min(ratios), max(ratios)]}
    return result


def table(result: dict) -> str:
    lines = [f"{'':<22}{'tokens/s':>10}{'ms':>9}{'micro':>7}{'GB':>7}{'MFU':>7}   ours over it (least to most)"]
    for who, row in result["of"].items():
        if "failed" in row:
            lines.append(f"{who:<22}{row['failed']}")
            continue
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        text = (
            f"{who:<22}{row['tokens_per_s']:>10,.0f}{row['ms']:>9.1f}{row['micro_batch_size']:>7}{row['peak_GB']:>7.2f}{mfu:>7}"
        )
        if "ours_over" in row:
            text += "   {:.2f} ({:.2f} to {:.2f})".format(*row["ours_over"])
        lines.append(text)
    if parts := result["of"][OURS].get("parts_ms"):
        lines.append("of ours, ms: " + ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items()))
    return "\n".join(lines)
