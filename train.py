"""Trains a Llama from token bins, measuring on the way how well it copies from its context.

    python train.py configs/tiny.py                              a demo: two CPU cores, two minutes
    python train.py configs/llama162m.py --micro_batch_size=32   one device
    torchrun --nproc_per_node=8 train.py                         eight GPUs of one machine (llama162m)
    python train.py --help                                       every setting, its type and default

A run continues from its own checkpoint when it is started again. Exit status: 0 done; 2 a mistake in what was asked,
said in one line; 3 stopped by SIGTERM or SIGINT after saving; 4 the run failed.
"""

import sys

from runtime import config as settings

if __name__ == "__main__":
    CONFIG = settings.from_command_line(sys.argv[1:])  # before torch is imported: --help and a typo answer at once

import contextlib
import dataclasses
import errno
import json
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import eval_copy
import kernels
from data import bins, prepare, vocab
from model import Llama
from runtime import checkpoint, distributed, metrics
from runtime.config import Config, ConfigError


class RunFailed(RuntimeError):
    """The run cannot go on, through no mistake in what was asked."""


def train(config: Config, world: distributed.World) -> int:
    """The whole run; returns its exit status: 0, or 3 where it was stopped by a signal and saved."""
    out = Path(config.out_dir)
    folder = open_data(config, world)
    train_bin, val_bin = (bins.Bin(folder / f"{s}.bin", config.seq_len, config.vocab_size) for s in bins.SPLITS)
    meta, words = bins.load_meta(folder), vocab.load(folder, config.vocab_size)
    if words.size > config.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: {folder} has {words.size} ids; pass --vocab_size={words.size}")
    tests = copy_tests(config, words)
    per_rank, micro = batch_split(config, world)

    dtype = distributed.pick_dtype(config.dtype, world.device)
    torch.manual_seed(config.seed)
    ops = kernels.choose(config.kernels, world.device, config.head_dim)
    model = Llama(config.model(), ops, dtype).to(world.device)
    optimizer = make_optimizer(model, config, world.device)
    fingerprint = bins.fingerprint(folder)
    step = resume(config, model, optimizer, fingerprint, world)
    announce(config, model, train_bin, val_bin, per_rank, micro, world)
    if step >= config.max_steps:
        world.say(f"{out} is at step {step} of {config.max_steps}: nothing left to do")
        return 0
    compile_blocks(model, config, world)
    ranks = DistributedDataParallel(model) if world.size > 1 else model

    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        rows = metrics.Metrics(out / "metrics.jsonl", step)
    progress = metrics.Progress(world, config.max_steps)
    tokens_per_step = config.batch_size * config.seq_len
    peak = metrics.peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    flops = metrics.flops_per_token(config)

    def update(step: int):
        """Update number `step`, from 1: this rank's mean loss and the whole gradient's norm, on the device."""
        optimizer.zero_grad()
        loss = torch.zeros((), device=world.device)
        first = (step - 1) * config.batch_size + world.rank * per_rank  # this rank's first position in the run's order
        for i in range(first, first + per_rank, micro):
            window = train_bin.windows(bins.window_indices(config.seed, i, micro, train_bin.n_windows))
            x, y = on_device(window, world.device)  # (micro, T) each
            last = i + micro == first + per_rank
            with contextlib.nullcontext() if last or world.size == 1 else ranks.no_sync():
                part = ranks(x, y, seed=dropout_seeds(config, i, micro, world.device)) * (micro / per_rank)
                part.backward()
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        return loss, norm

    def measure(step: int) -> dict:
        """Validation and the copy test, where they are due."""
        row = {}
        if config.eval_interval and step % config.eval_interval == 0:
            row |= validate(model, val_bin, config, micro, world)
            if meta:
                val = meta["splits"]["val"]
                row["val_bpb"] = row["val_loss"] / math.log(2) * val["tokens"] / val["bytes"]
        if config.copy_eval_interval and step > 0 and step % config.copy_eval_interval == 0:
            if world.rank == 0:
                row |= eval_copy.training_row(model, words, tests)
            world.wait()
        return row

    def record(row: dict):
        if world.rank == 0:
            rows.write(row)

    stop = distributed.StopSignal()
    model.train()
    if step == 0 and (row := measure(0)):
        record({"step": 0, "tokens": 0} | row)
        progress.say(metrics.measured_line(row))
    start = since = step
    clock = time.perf_counter()
    for step in range(start + 1, config.max_steps + 1):
        loss, norm = update(step)
        row = {"step": step, "tokens": step * tokens_per_step}
        stopped = world.any(stop.asked)
        save = step % config.ckpt_interval == 0 or step == config.max_steps or stopped
        if save or step % config.log_interval == 0 or step == start + 1:
            mean = world.sum(loss).item() / world.size
            row |= {"loss": mean, "lr": learning_rate(step, config), "grad_norm": norm.item()}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise RunFailed(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; nothing more was saved")
            seconds = (time.perf_counter() - clock) / (step - since)
            row |= {"ms": 1000 * seconds, "tokens_per_s": tokens_per_step / seconds}
            if peak:
                row["mfu"] = row["tokens_per_s"] * flops / (peak * world.size)
            row["eta_s"] = seconds * (config.max_steps - step)
            progress.show(row)
        measured = measure(step)
        if measured:
            progress.say(metrics.measured_line(measured))
        if len(row | measured) > 2:
            record(row | measured)
        if world.rank == 0 and config.ckpt_milestones and checkpoint.is_milestone(step):
            checkpoint.save(out / f"milestone_{step}.pt", weights(model, step, config, words))
        if world.rank == 0 and save:
            state = {"optimizer": optimizer.state_dict(), "data_fingerprint": fingerprint}
            checkpoint.save(out / "ckpt.pt", weights(model, step, config, words) | state)
            checkpoint.keep(out, step, config.ckpt_keep)
        if stopped and step < config.max_steps:
            progress.say(f"stopped; saved {out / 'ckpt.pt'} at step {step}: the same command goes on from there")
            return 3
        if save or measured or step % config.log_interval == 0:
            since, clock = step, time.perf_counter()
    progress.say(f"saved {out / 'ckpt.pt'}; next: python eval_copy.py {out / 'ckpt.pt'}")
    return 0


def open_data(config: Config, world) -> Path:
    """The data folder. Where it is missing and can be made here without a network, offers to make it."""
    folder = Path(config.data)
    if not (folder / "train.bin").exists():
        argv = [*shlex.split(config.prepare), f"--out={folder}"]
        command = shlex.join(["python", "-m", "data.prepare", *(argv if config.prepare else ["--help"])])
        problem = f"{folder / 'train.bin'}: not found; make it with: {command}"
        if not (config.prepare and world.size == 1 and sys.stdin.isatty()):
            raise bins.DataError(problem)
        if input(f"{problem}\nMake it now? [Y/n] ").strip().lower() not in ("", "y", "yes"):
            raise bins.DataError(f"{folder / 'train.bin'}: not found")
        prepare.prepare(argv)
    return folder


def copy_tests(config: Config, words) -> dict:
    """The samples of the copy tests made during training: fewer than eval_copy.py's own, the same at every step."""
    if not config.copy_eval_interval:
        return {}
    return {name: eval_copy.make_test(words, name, config.seq_len, samples=50) for name in eval_copy.ALPHABETS}


def batch_split(config: Config, world) -> tuple[int, int]:
    """Sequences of a batch per rank, and per pass."""
    if config.batch_size % world.size:
        raise ConfigError(f"batch_size={config.batch_size}: must be a multiple of the {world.size} ranks")
    per_rank = config.batch_size // world.size
    micro = min(config.micro_batch_size, per_rank)
    if per_rank % micro:
        raise ConfigError(f"micro_batch_size={micro}: must divide the {per_rank} sequences of a rank's share of the batch")
    return per_rank, micro


def make_optimizer(model: Llama, config: Config, device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on norm weights."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def compile_blocks(model: Llama, config: Config, world):
    """torch.compile, block by block: on CUDA, or where the config says so."""
    if config.compile == "off" or (config.compile == "auto" and world.device.type != "cuda"):
        return
    world.say("compiling block by block: the first step can take a minute")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=world.device))
    except Exception as e:  # what is missing (a compiler, Python's headers) shows as many kinds of error
        reason = str(e).strip().split("\n")[0]
        raise ConfigError(
            f"compile={config.compile}: torch.compile does not work on this machine; pass --compile=off ({reason})"
        ) from None
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


def on_device(windows: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T+1) ids -> inputs and targets (B, T) on the device."""
    tokens = torch.from_numpy(windows)
    tokens = tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def validate(model: Llama, val_bin: bins.Bin, config: Config, micro: int, world) -> dict:
    """Mean loss in nats per token over fixed windows, the same for any number of ranks: of all tokens, and of new and
    repeated ones apart. A token is repeated where it and the two before it occurred in that order earlier in its window.
    """
    n = min(config.eval_batches * config.batch_size, val_bin.n_windows)
    windows = bins.order(0, 0, val_bin.n_windows)[:n]
    windows = windows[world.rank :: world.size]
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (new, repeated) x (loss, tokens)
    model.eval()
    for i in range(0, len(windows), micro):
        ids = val_bin.windows(windows[i : i + micro])
        x, y = on_device(ids, world.device)
        hidden = model.hidden(x)  # (B, T, D)
        again = torch.from_numpy(repeated(ids)).to(world.device)  # (B, T)
        for kind, mask in enumerate((~again, again)):
            count = mask.sum().item()
            if count:
                loss = model.loss(hidden, y.masked_fill(~mask, -100))
                sums[kind] += torch.tensor([loss.item() * count, count])
    model.train()
    (new, n_new), (old, n_old) = world.sum(sums).tolist()
    row = {"val_loss": (new + old) / (n_new + n_old)}
    if n_new and n_old:
        row |= {"val_loss_new": new / n_new, "val_loss_repeated": old / n_old}
    return row


def repeated(ids: np.ndarray) -> np.ndarray:
    """ids (B, T+1) -> (B, T) bool: whether target t ends a trigram that occurred earlier in its window."""
    B, T = ids.shape[0], ids.shape[1] - 1
    trigrams = (ids[:, :-2] * 65536 + ids[:, 1:-1]) * 65536 + ids[:, 2:]  # (B, T-1), 48 bits each
    again = np.zeros((B, T), dtype=bool)
    for row, keys in enumerate(trigrams):
        _, first = np.unique(keys, return_index=True)
        again[row, 1:] = True
        again[row, 1 + first] = False
    return again


def weights(model: Llama, step: int, config: Config, words) -> dict:
    """What a checkpoint needs to be evaluated."""
    return {
        "model": model.state_dict(), "step": step, "config": dataclasses.asdict(config), "tokenizer": words.state()
    }  # fmt: skip


def resume(config: Config, model: Llama, optimizer, fingerprint: str, world) -> int:
    """Loads the run's own checkpoint, or the one asked for, and returns its step; 0 for a new run."""
    path = Path(config.out_dir) / "ckpt.pt" if config.resume == "auto" else Path(config.resume)
    if config.resume == "none" or (config.resume == "auto" and not path.exists()):
        return 0
    state = checkpoint.load(path)
    if "optimizer" not in state:
        raise checkpoint.CheckpointError(f"{path}: a milestone holds weights alone; resume from a ckpt.pt")
    now = dataclasses.asdict(config)
    changed = [
        f"{name} {state['config'].get(name)} -> {value}"
        for name, value in now.items()
        if name not in settings.MAY_CHANGE and state["config"].get(name) != value
    ]
    if state["data_fingerprint"] != fingerprint:
        changed.append(f"the data in {config.data}")
    if changed:
        raise ConfigError(
            f"{path}: made with other settings: {', '.join(changed)}; set them back, name another --out_dir, or start anew "
            "with --resume=none"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    world.say(f"resuming {path} at step {state['step']}")
    return state["step"]


def announce(config: Config, model: Llama, train_bin, val_bin, per_rank: int, micro: int, world):
    c, n = config, sum(p.numel() for p in model.parameters())
    mode = str(model.dtype).removeprefix("torch.")
    world.say(
        f"{c.n_layers} layers, dim {c.dim}, {n:,} parameters; {mode} on {world.size} x {world.device.type}, "
        f"{model.ops.__name__.removeprefix('kernels.')} kernels\n"
        f"batch: {micro} sequences x {per_rank // micro} passes x {world.size} ranks = {c.batch_size} sequences of {c.seq_len} "
        f"= {c.batch_size * c.seq_len:,} tokens per update\n"
        f"data: {train_bin.n_tokens:,} training tokens, {val_bin.n_tokens:,} to validate; {c.max_steps:,} updates are "
        f"{c.max_steps * c.batch_size / train_bin.n_windows:.2f} epochs"
    )


def main(config: Config) -> int:
    world = None
    try:
        world = distributed.start(config)
        return train(config, world)
    except (ConfigError, bins.DataError, checkpoint.CheckpointError, kernels.KernelError) as e:
        problem, status = str(e), 2
    except RunFailed as e:
        problem, status = str(e), 4
    except OSError as e:
        problem, status = f"{e.filename or config.out_dir}: {e.strerror}", 4 if e.errno == errno.ENOSPC else 2
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(e):
            raise
        fewer = max(1, min(config.micro_batch_size, config.batch_size) // 2)
        problem, status = f"out of memory; try --micro_batch_size={fewer}, or a smaller model", 2
    finally:
        distributed.leave()
    if world is None or world.rank == 0:
        print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(CONFIG))
