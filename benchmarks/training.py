"""`bench.py train`: training steps of this trainer against those of other models of the same shape, on random tokens.

Each model has a process of its own, which waits while another has its turn. In each round all take one, so that whatever
slows the machine down slows all of them. A step is an update of batch_size sequences: data to the device, forward, backward,
clipping, AdamW. All use the config's micro_batch_size, except that on a CPU the baselines take the whole batch; a model that
does not fit says so in its row. On a CPU ours runs a second time with one rank per core. A turn takes `SECONDS` or more; its
result is the median step, and the mean CPU time of a step over all threads and ranks.
"""

import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

import kernels
import train
from benchmarks.baselines import BASELINES, ON, NanoGPT
from config import ROOT, Config, load
from data import bins
from errors import UserError, first_line
from model import Llama
from runtime import distributed, metrics

SECONDS = 2
OURS, RANKS, NANOGPT = "ours", "ours, a rank a core", "nanoGPT"

# The parts of a step by substrings of the names of GPU kernels or, on a CPU, of torch's ops; the first match counts.
PARTS = {
    "optimizer": ("multi_tensor_apply", "adamw", "vector_norm", "lpnorm", "_foreach", "optimizer"),
    "cross-entropy": ("cross_entropy", "log_softmax", "nll_loss"),
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax", "bmm"),
    "GEMMs": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm"),
    "data": ("memcpy htod",),
}
MEMORY_BOUND = "memory-bound"  # all else: norms, rotary, SwiGLU, residual additions, casts, the embedding
IDLE = "idle"


def part_of(name: str) -> str:
    return next((part for part, words in PARTS.items() if any(w in name.lower() for w in words)), MEMORY_BOUND)


class Steps:
    """A model and its optimizer, ours or a baseline's, and training steps of them: ours are the trainer's own updates."""

    def __init__(self, c: Config, who: str, world: distributed.World, nanogpt: str | None = None):
        self.config, self.who, self.world = c, who, world
        self.cuda = world.device.type == "cuda"
        self.batch = c.batch_size // world.size
        self.micro = min(c.micro_batch_size if who == OURS or self.cuda else self.batch, self.batch)
        windows = np.random.default_rng(0).integers(c.vocab_size, size=(8 * self.batch, c.seq_len + 1))
        torch.manual_seed(0)
        if who == OURS:
            dtype = distributed.pick_dtype(c.dtype, world.device)
            ops = kernels.choose(c.kernels, world.device, c.head_dim, dtype)
            self.model = Llama(c.model(), ops, dtype).to(world.device)
            train.compile_blocks(self.model, c, world)
            self.optimizer = train.make_optimizer(self.model, c)
            self.loss_scale = train.LossScale(dtype, world.device)
            self.ranks = distributed.data_parallel(self.model, world)
            self.stop = distributed.StopSignal(world)
            self.step, self.micro_step = 0, None
            self.folder = tempfile.TemporaryDirectory()
            windows.astype("<u2").tofile(f"{self.folder.name}/train.bin")
            self.bin = bins.Bin(f"{self.folder.name}/train.bin", c.seq_len, c.vocab_size)
            return
        self.windows = windows[: self.batch]
        self.model = (NanoGPT(c, nanogpt) if who == NANOGPT else BASELINES[who](c)).to(world.device)
        if who == NANOGPT:
            self.optimizer = self.model.optimizer(world.device.type)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=self.cuda)

    def update(self):
        if self.who == OURS:
            self.step += 1
            c = dataclasses.replace(self.config, micro_batch_size=self.micro)
            self.micro_step = self.micro_step or train.graphed(train.forward_backward, c, self.world)
            own = self.ranks, self.optimizer, self.loss_scale, self.bin, c, self.world, self.stop
            train.update(self.step, *own, self.micro_step)
            return
        self.optimizer.zero_grad()
        for i in range(0, self.batch, self.micro):
            x, y = distributed.on_device(self.windows[i : i + self.micro], self.world.device)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.cuda):
                loss = self.model(x, y)
            (loss * (self.micro / self.batch)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()

    def seconds(self) -> tuple[float, float]:
        """Takes a turn, after two steps that are not counted. Returns the median step and the mean CPU time of a step."""
        for _ in range(2):
            self.update()
        times, started, cpu = [], time.perf_counter(), time.process_time()
        at_once, least = (5, 2) if self.cuda else (1, 5)  # as in training, the host runs ahead of a GPU
        while self.world.any(time.perf_counter() - started < SECONDS or len(times) < least):  # the ranks have to agree
            self.wait()
            before = time.perf_counter()
            for _ in range(at_once):
                self.update()
            self.wait()
            times.append((time.perf_counter() - before) / at_once)
        cpu = (time.process_time() - cpu) / (len(times) * at_once)
        return statistics.median(times), self.world.sum(torch.tensor(cpu)).item()

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def free(self):
        """Frees GPU memory for the turns of the others. Our CUDA graph, whose private pool holds as much as a step, is captured
        again by the first update of the next turn, which is not counted.
        """
        self.micro_step = None
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()

    def parts(self, updates: int = 5) -> dict[str, float]:
        """Returns the ms of a step spent in each part, and those in which the device (on a CPU: torch) was idle."""
        self.wait()
        with profile() as p:
            before = time.perf_counter()
            for _ in range(updates):
                self.update()
            self.wait()
            wall = time.perf_counter() - before
        found = dict.fromkeys([*PARTS, MEMORY_BOUND], 0.0)
        for event in p.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            if not self.cuda or on_device:
                microseconds = event.self_device_time_total if self.cuda else event.self_cpu_time_total
                found[part_of(event.key)] += microseconds / 1000 / updates
        return found | {IDLE: max(0.0, 1000 * wall / updates - sum(found.values()))}

    def peak_gb(self) -> float:
        """Returns the peak of a step, summed over the ranks: on a GPU what PyTorch reserves, as a CUDA graph's memory is not
        allocated anew; on a CPU that of the processes.
        """
        if not self.cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            return self.world.sum(torch.tensor(peak)).item()
        self.update()  # captures the graph anew after a turn
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.update()
        return torch.cuda.max_memory_reserved() / 1e9


def take_turns(c: Config, who: str, nanogpt: str | None = None):
    """Runs in a process of its own: prints what `seconds` returns for each line on stdin and, at its end, the rest of the row.

    A baseline that is not installed or does not fit prints why.
    """
    try:
        # The baselines do without what the trainer sets up for a process.
        world = distributed.start(c) if who == OURS else distributed.World(0, 1, torch.device(c.device))
        steps = Steps(c, who, world, nanogpt)
        while world.any(world.rank == 0 and bool(sys.stdin.readline())):
            world.say(json.dumps(steps.seconds()))
            if steps.cuda:
                steps.free()
        parameters = sum(p.numel() for p in steps.model.parameters())
        row = {"parameters": parameters, "micro_batch_size": steps.micro, "peak_GB": steps.peak_gb()}
        world.say(json.dumps(row | ({"parts_ms": steps.parts()} if who == OURS and world.size == 1 else {})))
        distributed.leave()
    except (UserError, torch.OutOfMemoryError, ValueError, RuntimeError) as e:
        print(json.dumps({"failed": first_line(e)}), flush=True)


class Worker:
    """A process that takes turns: what it has reported of them, and its row, which says why if it failed."""

    def __init__(self, argv: list[str], who: str):
        launch = [sys.executable]
        if who == RANKS:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.get_num_threads()}"]
        command = [*launch, str(ROOT / "bench.py"), "train", *argv, f"--one={OURS if who == RANKS else who}"]
        self.who, self.turns, self.row = who, [], {}
        self.log = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)

    def turn(self):
        if not self.row:
            with contextlib.suppress(BrokenPipeError):  # `read` finds out why
                self.process.stdin.write("\n")
                self.process.stdin.flush()
            self.read()

    def end(self):
        if not self.row:
            self.process.stdin.close()
            self.read()
        self.process.wait()

    def read(self):
        """Takes the next report: that of a turn, or the row."""
        for line in self.process.stdout:
            try:
                report = json.loads(line)
            except json.JSONDecodeError:
                print(f"{self.who}: {line}", end="", flush=True)  # the trainer's own output
                continue
            if isinstance(report, dict):
                self.row = report
            else:
                self.turns.append(report)
            return
        self.log.seek(0)
        self.row = {"failed": (self.log.read().strip().splitlines() or ["it ended without a message"])[-1]}


def compare(argv: list[str], rounds: int, nanogpt: str | None = None) -> Iterator[dict]:
    """Prints and yields the results of one config as they grow; `of` maps each model to its row, see `summary`."""
    c = load(argv)
    names = [*ON[c.device], *[NANOGPT] * bool(nanogpt), OURS, *[RANKS] * (c.device == "cpu" and torch.get_num_threads() > 1)]
    argv = argv + [f"--nanogpt={nanogpt}"] * bool(nanogpt)
    workers = []
    flops = metrics.flops_per_token(c)
    peak = metrics.peak_flops(torch.cuda.get_device_name()) if c.device == "cuda" else None

    def result(rounds: int) -> dict:
        found = summary({one.who: one.row | {"turns": one.turns} for one in workers}, c.batch_size * c.seq_len)
        for row in found.values():
            if peak and "failed" not in row:
                row["mfu"] = row["tokens_per_s"] * flops / peak
        return {"flops_per_token": flops, "rounds": rounds, "of": found}

    try:
        for who in names:
            workers.append(Worker(argv, who))
        for one in workers:
            one.turn()  # it compiles: not counted
            one.turns.clear()
        for i in range(rounds):
            for one in workers:
                one.turn()
            times = (f"{one.who} {1000 * one.turns[-1][0]:.1f}" for one in workers if not one.row)
            print(f"round {i + 1}, ms: {', '.join(times)}", flush=True)
            yield result(i + 1)
        for one in workers:
            one.end()
        print(table(found := result(rounds)), flush=True)
        yield found
    finally:
        for one in workers:
            one.process.terminate()


def summary(rows: dict[str, dict], tokens: int) -> dict:
    """Replaces the `turns` by tokens_per_s and ms, of the median step, and tokens_per_cpu_s, and adds ours_over and
    ours_over_cpu: the median and the quartiles, over the rounds, of our tokens per second divided by the row's.
    """
    result = {}
    for who, row in rows.items():
        result[who] = {name: value for name, value in row.items() if name != "turns"}
        if "failed" in row:
            continue
        seconds, cpu = (statistics.median(column) for column in zip(*row["turns"], strict=True))
        result[who] |= {"tokens_per_s": tokens / seconds, "ms": 1000 * seconds, "tokens_per_cpu_s": tokens / cpu}
        if who != OURS and "failed" not in rows[OURS]:
            for i, name in enumerate(("ours_over", "ours_over_cpu")):
                ratios = [theirs[i] / ours[i] for theirs, ours in zip(row["turns"], rows[OURS]["turns"], strict=True)]
                result[who][name] = [statistics.median(ratios), *np.quantile(ratios, (0.25, 0.75)).tolist()]
    return result


def table(result: dict) -> str:
    columns = f"{'':<30}{'tokens/s':>10}{'ms':>9}{'/CPU s':>9}{'micro':>7}{'GB':>7}{'MFU':>7}"
    lines = [f"{columns}   ours over it (quartiles); by CPU time"]
    for who, row in result["of"].items():
        if "failed" in row:
            lines.append(f"{who:<30}{row['failed']}")
            continue
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        ratios = "; ".join("{:.2f} ({:.2f} to {:.2f})".format(*row[k]) for k in ("ours_over", "ours_over_cpu") if k in row)
        figures = f"{row['tokens_per_s']:>10,.0f}{row['ms']:>9.1f}{row['tokens_per_cpu_s']:>9,.0f}{row['micro_batch_size']:>7}"
        lines.append(f"{who:<30}{figures}{row['peak_GB']:>7.2f}{mfu:>7}   {ratios}".rstrip())
    if parts := result["of"][OURS].get("parts_ms"):
        lines.append("of ours, ms: " + ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items()))
    return "\n".join(lines)
