"""`bench.py train`: whole training steps, ours against those of other models of the same shape, on random tokens.

Each has a process of its own, which waits while another has its turn: in each round all have one, so that what slows the
machine down slows all. A step is an update of batch_size sequences: data to the device, forward, backward, clipping, AdamW. On
a GPU each takes its fastest micro-batch that fits; on a CPU ours has its config's, the others take the batch whole, and ours
runs a second time as one rank a core. A turn is `SECONDS` at least; what counts of it is the median step. All stay in memory:
weights, moments and gradients, 16 bytes a parameter, are there of each while one has its turn.
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function

import kernels
import train
from benchmarks.baselines import BASELINES, ON
from config import ROOT, Config, load
from errors import UserError
from model import Llama
from runtime import distributed, metrics

SECONDS = 2
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
    """A model, its optimizer, and whole updates of both; `who` is ours or a baseline."""

    def __init__(self, c: Config, who: str, world: distributed.World):
        self.config, self.who, self.world, self.cuda = c, who, world, world.device.type == "cuda"
        torch.manual_seed(0)
        if who == OURS:
            dtype = distributed.pick_dtype(c.dtype, world.device)
            model = Llama(c.model(), kernels.choose(c.kernels, world.device, c.head_dim), dtype).to(world.device)
            train.compile_blocks(model, c, world)
            self.optimizer = train.make_optimizer(model, c)
            self.autocast = torch.autocast(world.device.type, enabled=False)
        else:
            model = BASELINES[who](c).to(world.device)
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
        """The median update of a turn, after two that are not counted."""
        for _ in range(2):
            self.update(micro)
        times, started = [], time.perf_counter()
        at_once = 5 if self.cuda else 1  # as in training, the host runs ahead of a GPU
        while self.world.any(time.perf_counter() - started < SECONDS or len(times) < 5):  # ranks must agree on it
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

    def rest(self, micro: int) -> dict:
        """What a row has besides its time: peak memory, and of ours, in one process, the parts of a step."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.update(micro)
            found = {"peak_GB": torch.cuda.max_memory_allocated() / 1e9}
        else:
            found = {"peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
        return found | ({"parts_ms": self.parts(micro)} if self.who == OURS and self.world.size == 1 else {})


def take_turns(c: Config, who: str):
    """What a process of its own does: of each turn, asked for by a line on stdin, it says the seconds of a step; at the end of
    stdin the rest of its row. A baseline that is not there or does not fit says why.
    """
    try:
        # The others go without what the trainer sets up for a process.
        world = distributed.start(c) if who == OURS else distributed.World(0, 1, torch.device(c.device))
        steps = Steps(c, who, world)
        micro = fastest_micro(steps) if steps.cuda else min(c.micro_batch_size if who == OURS else c.batch_size, steps.batch)
        while world.any(world.rank == 0 and bool(sys.stdin.readline())):
            seconds = steps.seconds(micro)
            if steps.cuda:
                torch.cuda.empty_cache()  # for the next one's turn
            say(world, seconds)
        say(world, {"micro_batch_size": micro} | steps.rest(micro))
        distributed.leave()
    except (UserError, torch.OutOfMemoryError, ValueError, RuntimeError) as e:
        print(json.dumps({"failed": str(e).strip().split("\n")[0]}), flush=True)


def say(world: distributed.World, found):
    if world.rank == 0:
        print(json.dumps(found), flush=True)


def fastest_micro(steps: Steps) -> int:
    times = {}
    for micro in (64, 32, 16, 8, 4):
        if micro <= steps.batch:
            with contextlib.suppress(torch.OutOfMemoryError):
                times[micro] = steps.seconds(micro)
            torch.cuda.empty_cache()
    if not times:
        raise UserError("no micro-batch fits the device's memory")
    return min(times, key=times.get)


class Baseline:
    """A process that takes turns, and what it has said so far."""

    def __init__(self, argv: list[str], who: str):
        launch = [sys.executable]
        if who == RANKS:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.get_num_threads()}"]
        command = [*launch, str(ROOT / "bench.py"), "train", *argv, f"--one={OURS if who == RANKS else who}"]
        self.log = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.who, self.seconds, self.row = who, [], {}

    def turn(self):
        if "failed" in self.row:
            return
        with contextlib.suppress(BrokenPipeError):  # its end is seen by `hear`
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        found = self.hear()
        if isinstance(found, dict):
            self.row = found
        else:
            self.seconds.append(found)

    def end(self):
        if "failed" not in self.row:
            self.process.stdin.close()
            self.row = self.hear()
        self.process.wait()

    def hear(self):
        """The next thing it says: seconds, or a row."""
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                print(f"{self.who}: {line}", end="", flush=True)  # what the trainer says
        self.log.seek(0)
        return {"failed": (self.log.read().strip().splitlines() or ["it ended without a word"])[-1]}


def compare(argv: list[str], rounds: int) -> dict:
    """What was found in the rounds of one config, whose device is cuda or cpu; `of`: {who: its row}, see summary."""
    c = load(argv)
    names = [*ON[c.device], OURS, *([RANKS] if c.device == "cpu" and torch.get_num_threads() > 1 else [])]
    baselines = []
    for who in names:
        baselines.append(Baseline(argv, who))
        baselines[-1].turn()  # in which it compiles: not counted
        baselines[-1].seconds.clear()
    for i in range(rounds):
        for one in baselines:
            one.turn()
        said = [f"{one.who} {1000 * one.seconds[-1]:.1f}" for one in baselines if "failed" not in one.row]
        print(f"round {i + 1}, ms: {', '.join(said)}", flush=True)
    for one in baselines:
        one.end()
    rows = {one.who: one.row | {"seconds": one.seconds} for one in baselines}
    found = summary(rows, c.batch_size * c.seq_len)
    if peak := metrics.peak_flops(torch.cuda.get_device_name()) if c.device == "cuda" else None:
        for row in found.values():
            if "failed" not in row:
                row["mfu"] = row["tokens_per_s"] * metrics.flops_per_token(c) / peak
    return {"flops_per_token": metrics.flops_per_token(c), "rounds": rounds, "of": found}


def summary(rows: dict[str, dict], tokens: int) -> dict:
    """Rows with the `seconds` of each round -> with the median step in their place, as tokens_per_s and ms; and ours_over: the
    median and the quartiles of the ratio of ours to it, in tokens a second, in the same round.
    """
    result = {}
    for who, row in rows.items():
        result[who] = {name: value for name, value in row.items() if name != "seconds"}
        if "failed" in row:
            continue
        seconds = statistics.median(row["seconds"])
        result[who] |= {"tokens_per_s": tokens / seconds, "ms": 1000 * seconds}
        if who != OURS and "failed" not in rows[OURS]:
            ratios = [theirs / ours for theirs, ours in zip(row["seconds"], rows[OURS]["seconds"], strict=True)]
            result[who]["ours_over"] = [statistics.median(ratios), *np.quantile(ratios, (0.25, 0.75)).tolist()]
    return result


def table(result: dict) -> str:
    lines = [f"{'':<22}{'tokens/s':>10}{'ms':>9}{'micro':>7}{'GB':>7}{'MFU':>7}   ours over it (quartiles)"]
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
