"""Trains a Llama from token bins, measuring on the way how well it copies from its context.

    python train.py configs/tiny.py                              a demo: two CPU cores, four minutes
    python train.py configs/llama162m.py --micro_batch_size=32   one device
    torchrun --nproc_per_node=8 train.py                         eight GPUs of one machine (llama162m)
    python train.py --help                                       every setting, its type and default

A run continues from its own checkpoint when it is started again. Exit status: 0 done; 2 a mistake in what was asked,
said in one line; 3 stopped by SIGTERM or SIGINT after saving; 4 the run failed.
"""

import sys

import config as settings

if __name__ == "__main__":
    CONFIG = settings.from_command_line(sys.argv[1:])  # before torch is imported: --help and a typo answer at once

import contextlib
import dataclasses
import errno
import json
import math
import os
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import eval_copy
import kernels
from config import Config
from data import bins, prepare
from data.meta import SPLITS, load_meta
from data.tokenizer import load_tokenizer
from errors import UserError
from hf import folder as huggingface
from model import Llama
from runtime import checkpoint, distributed, metrics
from runtime.validation import validate


class RunFailed(RuntimeError):
    """The run cannot go on, through no mistake in what was asked."""


def train(config: Config, world: distributed.World) -> int:
    """The whole run; returns its exit status: 0, or 3 where it was stopped by a signal and saved."""
    run = Run(config, world)
    if run.step >= config.max_steps:
        world.say(f"{run.out} is at step {run.step} of {config.max_steps}: nothing left to do")
        return 0
    if not run.begin():
        return run.leave(run.step)
    first, late = run.step + 1, None
    since, clock = run.step, time.perf_counter()
    for step in range(first, config.max_steps + 1):
        health = run.update(step)
        if late:
            run.look(*late)  # one step late: the device has it by now, and the next update in its queue
        if health is None:
            return run.leave(step - 1)
        late = step, health
        save = step % config.ckpt_interval == 0 or step == config.max_steps
        milestone = config.ckpt_milestones and checkpoint.is_milestone(step, config.milestone_interval)
        log = step == 1 or step % config.log_interval == 0 or save or any(run.due(step))
        if not (log or milestone or step == first):
            continue
        row, late = run.look(*late), None
        if step > first:  # the first compiles, and tells no speed
            row |= run.rates((time.perf_counter() - clock) / (step - since), step)
        run.progress.show(row)
        measured = run.measure(step)
        if log:
            run.record(row | (measured or {}))
        if milestone:
            run.save_milestone(step)
        if measured is None:
            return run.leave(step)
        if save:
            run.save(step)
        since, clock = step, time.perf_counter()
    run.progress.say(f"saved {run.out / 'ckpt.pt'}; next: python eval_copy.py {run.out / 'ckpt.pt'}")
    return 0


class Run:
    """What the loop works on: data, model and optimizer, at `step` updates; and the things a run does with them.

    The constructor refuses what cannot be trained before it writes anything. All ranks make the same calls in the same order.
    """

    def __init__(self, config: Config, world: distributed.World):
        self.config, self.world, self.out = config, world, Path(config.out_dir)
        folder = open_data(config, world)
        self.train_bin, self.val_bin = (bins.Bin(folder / f"{s}.bin", config.seq_len, config.vocab_size) for s in SPLITS)
        self.val_windows = bins.order(0, 0, self.val_bin.n_windows)[: config.eval_batches * config.batch_size]
        self.meta, self.tokenizer = load_meta(folder), load_tokenizer(folder, config.vocab_size)
        if self.tokenizer.size > config.vocab_size:
            needs = self.tokenizer.size
            raise UserError(f"vocab_size={config.vocab_size}: {folder} has {needs} ids; pass --vocab_size={needs}")
        self.tests = copy_tests(config, self.tokenizer)
        self.per_rank, self.micro = batch_split(config, world)

        torch.manual_seed(config.seed)
        ops = kernels.choose(config.kernels, world.device, config.head_dim)
        dtype = distributed.pick_dtype(config.dtype, world.device)
        self.model = Llama(config.model(), ops, dtype).to(world.device)
        self.optimizer = make_optimizer(self.model, config)
        self.fingerprint = bins.fingerprint(folder)
        self.step = resume(config, self.model, self.optimizer, self.fingerprint, world)
        if self.step is None:
            self.step = 0
            if config.init_from:
                start_from(config, self.model, self.tokenizer, world)
        self.saved, self.ckpt = None, {}  # the step that this run saved last; the seconds it took, for the next row
        announce(self)
        self.stop = distributed.StopSignal()
        self.progress = metrics.Progress(world, config.max_steps)

    def begin(self) -> bool:
        """Compiles, opens the run directory, and makes the measurements of step 0, or those that a signal cut short at the
        step resumed from; False where one cuts them short again.
        """
        compile_blocks(self.model, self.config, self.world)
        self.ranks = DistributedDataParallel(self.model) if self.world.size > 1 else self.model
        row = {"step": self.step, "tokens": self.step * self.config.batch_size * self.config.seq_len}
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
            self.rows = metrics.Metrics(self.out / "metrics.jsonl", self.step)
            row |= self.rows.last
        self.model.train()
        measured = {}
        if any(self.due(self.step)) and self.world.any(self.world.rank == 0 and not metrics.is_measured(row)):
            measured = self.measure(self.step)
        if len(row | (measured or {})) > 2:
            self.record(row | (measured or {}))
        return measured is not None

    def update(self, step: int):
        """Update number `step`, from 1. Returns on the device the loss, this rank's own, and the gradient's norm (3,); None
        where the run was asked to stop on the way: nothing was changed.

        Neither does a loss or norm that is not finite change parameters or moments. All ranks see the same two.
        """
        config, world = self.config, self.world
        self.optimizer.zero_grad()
        own = torch.zeros((), device=world.device)
        first = self.position(step, world.rank)
        for i in range(first, first + self.per_rank, self.micro):
            if world.any(self.stop.asked):
                return None
            window = self.train_bin.windows(self.windows(i, self.micro))
            x, y = distributed.on_device(window, world.device)  # (micro, T) each
            last = i + self.micro == first + self.per_rank
            with contextlib.nullcontext() if last or world.size == 1 else self.ranks.no_sync():
                part = self.ranks(x, y, seed=dropout_seeds(config, i, self.micro, world.device)) * (self.micro / self.per_rank)
                part.backward()
            own += part.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        loss = world.sum(own) / world.size
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        self.optimizer.found_inf = (~(loss + norm).isfinite()).float()  # where it is 1, fused AdamW changes nothing
        self.optimizer.step()
        return torch.stack((loss, own, norm))

    def look(self, step: int, health) -> dict:
        """What update `step` gave, read by the host. Raises RunFailed, on all ranks, where it is not finite."""
        loss, own, norm = health.tolist()
        if not math.isfinite(loss + norm):
            bad = self.world.sum(torch.eye(self.world.size)[self.world.rank] * (not math.isfinite(own))).nonzero().flatten()
            where = []
            for rank in bad.tolist():
                windows = ", ".join(map(str, self.windows(self.position(step, rank), self.per_rank)))
                where.append(f"on rank {rank}, windows {windows}")
            raise RunFailed(
                f"step {step}: loss {loss}, gradient norm {norm}; {'; '.join(where) or 'the loss is finite on each rank'}; "
                f"the update was left out and nothing more was saved; its batch: python -m data.bins {self.out} --step {step}"
            )
        tokens = step * self.config.batch_size * self.config.seq_len
        return {"step": step, "tokens": tokens, "loss": loss, "lr": learning_rate(step, self.config), "grad_norm": norm}

    def position(self, step: int, rank: int) -> int:
        """Where in the run's order a rank's share of the batch of update `step` begins."""
        return (step - 1) * self.config.batch_size + rank * self.per_rank

    def windows(self, start: int, count: int):
        return bins.window_indices(self.config.seed, start, count, self.train_bin.n_windows)

    def rates(self, seconds: float, step: int) -> dict:
        """The speed, from the seconds that an update took of late, and what the last checkpoint took."""
        speed = self.config.batch_size * self.config.seq_len / seconds
        row = {"ms": 1000 * seconds, "tokens_per_s": speed} | self.ckpt
        if self.world.device.type == "cuda" and (peak := metrics.peak_flops(torch.cuda.get_device_name(self.world.device))):
            row["mfu"] = speed * metrics.flops_per_token(self.config) / (peak * self.world.size)
        return row | {"eta_s": seconds * (self.config.max_steps - step)}

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether validation and the copy test are."""
        val, copy = (n > 0 and step % n == 0 for n in (self.config.eval_interval, self.config.copy_eval_interval))
        return val, copy and step > 0

    def measure(self, step: int) -> dict | None:
        """Validation and the copy test where they are due; None where the run was asked to stop on the way."""
        (val, copy), row = self.due(step), {}
        if val:
            row |= validate(self.model, self.val_bin, self.val_windows, self.micro, self.world, self.stop)
            split = self.meta["splits"]["val"] if self.meta else {}
            if row and split.get("bytes"):  # unknown of bins made elsewhere
                row["val_bpb"] = row["val_loss"] / math.log(2) * split["tokens"] / split["bytes"]
        if copy and self.world.rank == 0:
            row |= self.stop.interruptible(lambda: eval_copy.training_row(self.model, self.tokenizer, self.tests)) or {}
        if (val or copy) and self.world.any(self.stop.asked):
            return None
        if row:
            self.progress.say(metrics.measured_line(row))
        return row

    def record(self, row: dict):
        if self.world.rank == 0:
            self.rows.write(row)
        self.ckpt = {}

    def save(self, step: int):
        started = time.perf_counter()
        if self.world.rank == 0:
            state = {"optimizer": self.optimizer.state_dict()["state"], "data_fingerprint": self.fingerprint}
            checkpoint.save(self.out / "ckpt.pt", self.weights(step) | state)
            checkpoint.keep(self.out, step, self.config.ckpt_keep)
        self.saved, self.ckpt = step, {"ckpt_s": time.perf_counter() - started}

    def save_milestone(self, step: int):
        if self.world.rank == 0:
            checkpoint.save(self.out / f"milestone_{step}.pt", self.weights(step))

    def weights(self, step: int) -> dict:
        """What a checkpoint needs to be evaluated."""
        config, tokenizer = dataclasses.asdict(self.config), self.tokenizer.state()
        return {"model": self.model.state_dict(), "step": step, "config": config, "tokenizer": tokenizer}

    def leave(self, step: int) -> int:
        """Ends a run that was asked to stop at `step`; -> the exit status."""
        if self.saved != step:
            self.save(step)
        self.progress.say(f"stopped; saved {self.out / 'ckpt.pt'} at step {step}: the same command goes on from there")
        return 3


def open_data(config: Config, world) -> Path:
    """The data folder. Where it is missing and can be made here without a network, offers to make it."""
    folder = Path(config.data)
    if not bins.files(folder / "train.bin"):
        argv = [*shlex.split(config.prepare), f"--out={folder}"]
        command = shlex.join(["python", "-m", "data.prepare", *(argv if config.prepare else ["--help"])])
        problem = f"{folder / 'train.bin'}: not found; make it with: {command}"
        if not (config.prepare and world.size == 1 and sys.stdin.isatty()):
            raise UserError(problem)
        if input(f"{problem}\nMake it now? [Y/n] ").strip().lower() not in ("", "y", "yes"):
            raise UserError(f"{folder / 'train.bin'}: not found")
        prepare.prepare(argv)
    return folder


def copy_tests(config: Config, tokenizer) -> dict:
    """The samples of the copy tests made during training: fewer than eval_copy.py's own, the same at every step."""
    if not config.copy_eval_interval:
        return {}
    return {name: eval_copy.make_test(tokenizer, name, config.seq_len, samples=50) for name in eval_copy.ALPHABETS}


def batch_split(config: Config, world) -> tuple[int, int]:
    """Sequences of a batch per rank, and per pass."""
    if config.batch_size % world.size:
        raise UserError(f"batch_size={config.batch_size}: must be a multiple of the {world.size} ranks")
    per_rank = config.batch_size // world.size
    micro = min(config.micro_batch_size, per_rank)
    if per_rank % micro:
        raise UserError(f"micro_batch_size={micro}: must divide the {per_rank} sequences of a rank's share of the batch")
    return per_rank, micro


def make_optimizer(model: Llama, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on norm weights."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def compile_blocks(model: Llama, config: Config, world):
    """torch.compile, block by block, on CUDA and CPUs; where it does not work, `auto` goes on without."""
    if config.compile == "off" or (config.compile == "auto" and world.device.type not in ("cuda", "cpu")):
        return
    world.say("compiling block by block: the first step can take a minute (--compile=off does without)")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=world.device))
    except Exception as e:  # what is missing (a compiler, Python's headers) shows as many kinds of error
        reason = f"torch.compile does not work on this machine ({str(e).strip().splitlines()[0]})"
        if config.compile == "on":
            raise UserError(f"compile=on: {reason}; pass --compile=off") from None
        world.say(f"warning: {reason}; going on without, slower")
        return
    for block in model.blocks:
        block.compile(fullgraph=True)


def learning_rate(step: int, c: Config) -> float:
    """The learning rate of update number `step`, 1 .. max_steps: linear warm-up, then the schedule."""
    if step <= c.warmup_steps:
        return c.learning_rate * step / c.warmup_steps
    start = {"constant": c.max_steps, "cosine": c.warmup_steps, "wsd": max(c.warmup_steps, round(0.8 * c.max_steps))}
    progress = min(1.0, max(0, step - start[c.schedule]) / max(1, c.max_steps - start[c.schedule]))
    down = (1 - math.cos(math.pi * progress)) / 2 if c.schedule == "cosine" else progress
    return c.learning_rate + (c.min_lr - c.learning_rate) * down


def dropout_seeds(config: Config, start: int, count: int, device):
    """A key for each sequence of the run, from its position in the run's order alone; None without dropout."""
    if not config.attn_dropout:
        return None
    batch = start // config.batch_size
    seeds = np.random.default_rng([config.seed, batch, 1]).integers(2**62, size=config.batch_size)
    return torch.from_numpy(seeds[start % config.batch_size :][:count]).to(device)


def start_from(config: Config, model: Llama, tokenizer, world):
    """Puts the weights of config.init_from into a new run's model.

    They must be of this very model: where its context or dropout differs it is the same function on the same text, where
    rope_theta or norm_eps does it is not. A tokenizer other than the data's is warned of: ids then mean other text.
    """
    path = config.init_from
    state = huggingface.load(path)
    try:
        theirs = settings.from_checkpoint(state["config"]).model()
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    values = {f.name: getattr(theirs, f.name) for f in dataclasses.fields(theirs) if f.name not in ("seq_len", "attn_dropout")}
    if other := {name: value for name, value in values.items() if value != getattr(config, name)}:
        mine = ", ".join(f"{name}={getattr(config, name)}" for name in other)
        wanted = " ".join(f"--{name}={str(value).lower()}" for name, value in other.items())
        raise UserError(f"{mine}, but init_from={path} has {', '.join(map(str, other.values()))}; pass {wanted}")
    checkpoint.restore(path, state, model)
    world.say(f"starting from the weights of {path}, step {state['step']} there")
    if state["tokenizer"] != tokenizer.state() and "ids" not in (tokenizer.kind, state["tokenizer"].get("kind")):
        world.say(f"warning: the tokenizer of {path} is not that of {config.data}: the same ids mean other text")


def resume(config: Config, model: Llama, optimizer, fingerprint: str, world) -> int | None:
    """Loads the run's own newest checkpoint, or the one asked for, and returns its step; None for a new run."""
    if config.resume == "none":
        return None
    paths = checkpoint.newest_first(Path(config.out_dir)) if config.resume == "auto" else [Path(config.resume)]
    while paths:
        path = paths.pop(0)
        try:
            state = checkpoint.load(path)
            break
        except UserError as e:
            if not paths:
                raise
            world.say(f"warning: {e}; taking {paths[0]}")
    else:
        return None
    if "optimizer" not in state:
        raise UserError(f"{path}: a milestone holds weights alone; resume from a ckpt.pt, or pass --init_from")
    began = state["config"].get("init_from") or ""
    if config.init_from and os.path.realpath(config.init_from) != os.path.realpath(str(began)):
        raise UserError(
            f"init_from={config.init_from}: {path} has init_from={began!r}; leave it out to go on from there, name another "
            "--out_dir, or start anew with --resume=none"
        )
    changed = settings.changed(state["config"], config)
    if state.get("data_fingerprint") != fingerprint:
        changed.append(f"the data in {config.data}")
    if changed:
        raise UserError(
            f"{path}: made with other settings: {', '.join(changed)}; set them back, name another --out_dir, or start anew "
            "with --resume=none"
        )
    checkpoint.restore(path, state, model, optimizer)
    world.say(f"resuming {path} at step {state['step']}")
    return state["step"]


def announce(run: Run):
    c, model, world = run.config, run.model, run.world
    n, mode = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
    world.say(
        f"{c.n_layers} layers, dim {c.dim}, {n:,} parameters; {mode} on {world.size} x {world.device.type}, "
        f"{model.ops.__name__.removeprefix('kernels.')} kernels\n"
        f"batch: {run.micro} sequences x {run.per_rank // run.micro} passes x {world.size} ranks = {c.batch_size} sequences of "
        f"{c.seq_len} = {c.batch_size * c.seq_len:,} tokens per update\n"
        f"data: {run.train_bin.n_tokens:,} training tokens, {run.val_bin.n_tokens:,} to validate; {c.max_steps:,} updates are "
        f"{c.max_steps * c.batch_size / run.train_bin.n_windows:.2f} epochs"
    )
    if c.ckpt_milestones:
        count = sum(checkpoint.is_milestone(step, c.milestone_interval) for step in range(c.max_steps + 1))
        world.say(f"milestones: {count} files of {4 * n / 1e6:,.1f} MB, {4 * n * count / 1e9:,.2f} GB in all")


def main(config: Config) -> int:
    """The run, its failures turned into one line and an exit status. What all ranks see, rank 0 says; else whoever sees it."""
    world, alone = None, False
    try:
        world = distributed.start(config)
        return train(config, world)
    except UserError as e:
        problem, status = str(e), 2
    except RunFailed as e:
        problem, status = str(e), 4
    except bins.DataChanged as e:
        problem, status, alone = str(e), 4, True
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        problem, status, alone = f"{e.filename or config.out_dir}: {e.strerror}", 4 if full else 2, True
    except (RuntimeError, MemoryError) as e:
        if not distributed.is_out_of_memory(e):
            raise
        fewer = max(1, min(config.micro_batch_size, config.batch_size) // 2)
        problem, status, alone = f"out of memory; try --micro_batch_size={fewer}, or a smaller model", 2, True
    finally:
        distributed.leave()
    if alone and world and world.size > 1:
        problem = f"rank {world.rank}: {problem}"
    if alone or world is None or world.rank == 0:
        print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    distributed.exit(main(CONFIG))
