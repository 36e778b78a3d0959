"""Trains a Llama on token bins and evaluates in-context copying during training.

    python train.py configs/tiny.py                              a demo for two CPU cores
    python train.py configs/llama162m.py --micro_batch_size=32   one device
    torchrun --nproc_per_node=8 train.py                         eight GPUs of one machine (llama162m)
    python train.py --help                                       every setting, its type and default

The same command resumes a run that was interrupted. Exit status: 0 done; 2 a usage error, reported in one line;
3 stopped by SIGTERM or SIGINT after saving; 4 the run failed.
"""

import sys

import config as settings
from cli import exit_on_interrupt, run_command
from errors import RunFailed, UserError, about, is_out_of_memory

if __name__ == "__main__":
    CONFIG = settings.from_command_line(sys.argv[1:])  # before torch is imported, so that --help and errors are immediate
    exit_on_interrupt()  # importing torch takes seconds

import contextlib
import dataclasses
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import nn

import eval_copy
import kernels
from config import Config
from data import bins
from data.meta import load_meta
from data.tokenizer import load_tokenizer
from hf import folder as huggingface
from model import Llama
from runtime import checkpoint, checks, distributed, loggers, metrics, resume, rundir
from runtime.compiling import compile_blocks, graphed
from runtime.optim import LossScale, apply_gradients, learning_rate, make_optimizer
from runtime.schedule import due_after
from runtime.validation import bits_per_byte, reweighted, validate


def main(config: Config) -> int:
    if rundir.was_stopped(Path(config.out_dir)):
        return 3
    world = distributed.start(config)
    try:
        status = train(config, world)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise distributed.out_of_memory(config, world) from None
    distributed.leave()
    return status


def train(config: Config, world: distributed.World) -> int:
    """Trains, and returns the exit status: 0, or 3 if a signal stopped the run.

    Raises UserError for settings or data that cannot be trained, and leaves the run directory as it was.
    """
    with contextlib.ExitStack() as stack:
        world.on_rank_0(lambda: stack.enter_context(rundir.locked(Path(config.out_dir))))
        run = Run(config, world)
        if run.is_done():
            world.say(f"{run.out} is at step {run.step} of {config.max_steps}: nothing left to do")
            return 0
        facts = {"op_set": run.kernels, "data_fingerprint": run.fingerprint}
        begin = rundir.begin(run.out, run.config, run.resumed, run.step, facts)
        run.rows = world.on_rank_0(lambda: stack.enter_context(begin))
        return run.loop()


class Run:
    """Data, model and optimizer of a run after `step` updates. All ranks make the same calls in the same order."""

    def __init__(self, config: Config, world: distributed.World):
        # Settings
        self.world = world
        self.out = Path(config.out_dir)
        self.stop = distributed.StopSignal(world)
        loggers.check(config)
        distributed.split_batch(config, world)

        # Data
        folder = Path(config.data)
        if not bins.files(folder / "train.bin"):
            advice = "prepare data first: python -m data.prepare --help, or try the demo: make demo"
            if config.prepare:  # shell text, as it is typed
                advice = f"make it with: python -m data.prepare {config.prepare} --out={shlex.quote(str(folder))}"
            raise UserError(f"{folder}/train.bin: not found; {advice}")
        self.train_bin = bins.Bin(folder / "train.bin", config.seq_len, config.vocab_size)
        self.val_bin = bins.Bin(folder / "val.bin", config.seq_len, config.vocab_size)
        self.meta = load_meta(folder)
        self.tokenizer = load_tokenizer(folder, config.vocab_size)
        self.fingerprint = bins.fingerprint(folder)
        self.copy_tests = {}
        if config.copy_eval_interval:  # fewer samples than eval_copy.py takes, the same at every step
            with about(f"seq_len={config.seq_len}"):
                self.copy_tests = eval_copy.make_tests(self.tokenizer, config.seq_len, samples=50)
        checks.check_data(config, self.train_bin, self.tokenizer)

        # Model
        path, state = resume.newest(config, self.fingerprint, world)
        checks.check_memory(config, world.device)
        torch.manual_seed(config.seed)
        of_checkpoint = state.get("config", {}).get("dtype", "auto")
        dtype = distributed.dtype_name(of_checkpoint if config.dtype == "auto" else config.dtype, world.device)
        ops = kernels.choose(config.kernels, world.device, config.head_dim, distributed.DTYPES[dtype], world.say)
        self.config = config = dataclasses.replace(config, dtype=dtype, kernels=ops.__name__.removeprefix("kernels."))
        self.kernels = kernels.describe(ops, world.device)
        self.model = Llama(config.model(), ops, distributed.DTYPES[dtype]).to(world.device)

        # Optimizer
        self.optimizer = make_optimizer(self.model, config)
        self.loss_scale = LossScale(self.model.dtype, world.device)
        self.stats = metrics.Stats(world, self.out, state)
        self.step = state.get("step", 0)
        self.resumed = path
        self.row = {}  # what was measured after `step` updates; metrics.jsonl gets it once it is complete
        if state:
            checkpoint.restore(path, state, self.model, self.optimizer, self.loss_scale)
            if rundir.holds(self.out, path):
                self.row = world.on_rank_0(lambda: metrics.row_of(self.out / "metrics.jsonl", self.step)) or {}
            if changed := resume.changes(path, state, config, self.kernels, self.row.pop("changed", {}), world):
                self.row["changed"] = changed
        elif config.init_from:
            source = huggingface.load(config.init_from)
            resume.start_from(config.init_from, source, config, self.model, self.tokenizer, world)

    def is_done(self) -> bool:
        """Returns whether all updates and the last evaluation are done."""
        due = due_after(self.step, self.config) if rundir.holds(self.out, self.resumed) else set()
        last = self.config.max_steps
        return self.step > last or self.step == last and not self.needs_evaluation(due)

    def loop(self) -> int:
        """Trains until max_steps; returns the exit status."""
        config, world, first = self.config, self.world, self.step
        world.say(metrics.announcement(config, world, *distributed.split_batch(config, world), self.train_bin))
        compile_blocks(self.model, config, world)
        model = distributed.data_parallel(self.model.train(), world)
        micro_step = graphed(forward_backward, config, world)
        timer = metrics.Timer(config, world)
        try:
            while True:
                due = due_after(self.step, config)
                if "log" in due and self.stats.unread:
                    self.row = self.read_stats() | timer.lap(self.step)
                    world.say(metrics.log_line(self.step, config.max_steps, self.row))
                with timer.paused():
                    if due or self.step == first:
                        if self.needs_evaluation(due):
                            self.evaluate(due)
                        self.write_row()
                    if self.step > first:
                        self.save_due(due)
                if self.step == first + 1:
                    timer.start(self.step)  # only now: the first update compiles
                if self.step == config.max_steps:
                    break
                stats = update(
                    self.step + 1, model, self.optimizer, self.loss_scale, self.train_bin, config, world, self.stop, micro_step
                )
                self.stats.unread.append(stats)
                self.step += 1
        except distributed.Stopped:
            return self.save_and_exit()
        world.say(f"saved {self.out / 'ckpt.pt'}; next: python eval_copy.py {shlex.quote(str(self.out / 'ckpt.pt'))}")
        return 0

    def read_stats(self) -> dict:
        """Reads the statistics from the device, and returns the row of the last update. Saves before it raises RunFailed."""
        try:
            row = self.stats.read(self.step)
        except RunFailed:
            self.save_due(due_after(self.step, self.config), stopping=True)
            raise
        return row | {"lr": learning_rate(self.step, self.config)}

    def needs_evaluation(self, due: set[str]) -> bool:
        """Returns whether validation or the copy test is due and was not completed before an interruption."""
        return bool(due & {"validate", "copy"}) and self.world.any(self.world.rank == 0 and not metrics.is_evaluated(self.row))

    def evaluate(self, due: set[str]):
        """Adds validation and the copy test to the row."""
        row = {}
        if "validate" in due:
            _, micro = distributed.split_batch(self.config, self.world)
            windows = bins.order(0, 0, self.val_bin.n_windows)[: self.config.eval_batches * self.config.batch_size]
            row |= validate(self.model, self.val_bin, windows, micro, self.world, self.stop)
            row |= bits_per_byte(row["val_loss"], self.meta)
        if "copy" in due:
            args = (self.model, self.tokenizer, self.copy_tests)
            row |= self.stop.interruptible(lambda: eval_copy.training_row(*args) if self.world.rank == 0 else {})
        self.row |= row
        self.world.say(metrics.evaluation_line(row))

    def write_row(self):
        tokens = self.step * self.config.batch_size * self.config.seq_len
        row = {"step": self.step, "tokens": tokens} | self.row
        self.world.on_rank_0(lambda: self.rows.write(row) if self.row else None)
        self.row = {}

    def save_due(self, due: set[str], stopping=False):
        """Saves the milestone and the checkpoint if they are due; a run that is stopping always saves its checkpoint."""
        if "milestone" in due:
            self.save(f"milestone_{self.step}.pt", weights_only=True)
        if "save" in due or stopping:
            self.save("ckpt.pt")
        if "save" in due:
            self.world.on_rank_0(lambda: checkpoint.keep(self.out, self.step, self.config.ckpt_keep))

    def save(self, name: str, weights_only=False):
        """Saves a checkpoint from rank 0; the other ranks wait until it is written."""

        def write():
            state = {"model": self.model.state_dict(), "step": self.step, "kernels": self.kernels}
            state |= {"skipped": self.stats.skipped, "overflows": self.stats.overflows, "loss_scale": self.loss_scale.state()}
            state |= {"config": dataclasses.asdict(self.config), "tokenizer": self.tokenizer.state()}
            if not weights_only:
                state |= {"optimizer": self.optimizer.state_dict()["state"], "data_fingerprint": self.fingerprint}
            checkpoint.save(self.out / name, state)

        self.world.on_rank_0(write)

    def save_and_exit(self) -> int:
        """Ends a run that was asked to stop; returns the exit status."""
        self.world.on_rank_0(lambda: rundir.record(self.out, "stopped"))
        if self.stats.unread:
            self.read_stats()
        self.write_row()
        if self.step == 0:
            self.world.say("stopped before the first update: there is nothing to save; the same command starts over")
            return 3
        self.save_due(due_after(self.step, self.config), stopping=True)
        same = "the same command" if self.config.resume == "auto" else "the same command without --resume"
        self.world.say(f"stopped; saved {self.out / 'ckpt.pt'} at step {self.step}: {same} resumes there")
        return 3


def forward_backward(model, x, y, seed, weight) -> torch.Tensor:
    """Adds the gradients of weight * loss to the parameters' gradients; returns the loss.

    x, y (B, T) ids; seed (B,), the keys of attention dropout, or None; weight is a scalar on the device.
    """
    loss = model(x, y, seed=seed)
    (loss * weight).backward()
    return loss.detach()


def update(
    step, model, optimizer, loss_scale, train_bin, config: Config, world, stop, micro_step=forward_backward
) -> torch.Tensor:
    """Performs update number `step`, counted from 1; model may be wrapped for several ranks, micro_step may be a CUDA graph.

    Returns (4,) on the device: loss and gradient norm of the whole batch, the loss of this rank's share, and the loss scale.
    If the loss or the norm is not finite, parameters and moments stay unchanged. Raises Stopped, before changing anything, if a
    stop signal has arrived.
    """
    per_rank, micro = distributed.split_batch(config, world)
    first = (step - 1) * config.batch_size + world.rank * per_rank  # in the run's order
    last = first + per_rank - micro
    scale = loss_scale.scale
    own = torch.zeros((), device=world.device)
    kept = 0.0  # share of this rank's targets that are not left out
    optimizer.zero_grad()
    for position in range(first, last + 1, micro):  # gradient accumulation
        stop.check()
        ids = train_bin.windows(bins.window_indices(config.seed, position, micro, train_bin.n_windows))  # (micro, T+1)
        x, y = distributed.on_device(ids, world.device)  # (micro, T) each
        share = micro / per_rank
        if config.repeated_weight != 1:
            chance = of_batch(config, position, micro, 2, lambda rng, size: rng.random((size, config.seq_len)))
            y, of_these = reweighted(ids, y, config.repeated_weight, chance)
            share *= of_these  # a target left out counts as a loss of 0: the gradients are the same for any split of the batch
        # The ranks' gradients are averaged in the last backward pass.
        no_sync = model.no_sync() if world.size > 1 and position != last else contextlib.nullcontext()
        with no_sync:
            loss = micro_step(model, x, y, dropout_seeds(config, position, micro, world.device), scale * share)
        own += loss * share
        kept += share
    if config.repeated_weight == 1:
        loss = world.sum(own) / world.size
    else:  # logged per target that counts
        total, targets = world.sum(torch.stack((own, torch.full_like(own, kept))))
        loss = total / targets
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]) / scale
    clip = (norm / config.grad_clip).clamp(min=1) if config.grad_clip else 1.0
    found_inf = (~(loss + norm).isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    apply_gradients(optimizer, scale * clip, found_inf)
    loss_scale.update(found_inf)
    return torch.stack((loss, norm, own, scale))


def dropout_seeds(config: Config, start: int, count: int, device):
    """Returns a key per sequence, (count,) int64, which depends only on its position in the run; None without dropout."""
    if not config.attn_dropout:
        return None
    return torch.from_numpy(of_batch(config, start, count, 1, lambda rng, size: rng.integers(2**62, size=size))).to(device)


def of_batch(config: Config, start: int, count: int, stream: int, draw) -> np.ndarray:
    """Returns the random rows at positions start .. start + count - 1 of the run; draw(generator, batch_size) makes those of a
    whole batch.

    A row depends only on the seed, the stream and its position in the run, not on how the batch is split; `stream` separates
    independent uses.
    """
    rows = draw(np.random.default_rng([config.seed, start // config.batch_size, stream]), config.batch_size)
    return rows[start % config.batch_size :][:count]


if __name__ == "__main__":
    distributed.exit_with(lambda: run_command(main, CONFIG))
