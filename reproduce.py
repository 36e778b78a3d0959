"""The paper's figures, and what it left open, by one command.

    python reproduce.py all --scale=tiny        on 2 CPU cores, within 90 minutes
    python reproduce.py b --scale=tiny          one figure: its runs, their measures, the picture and its part of REPORT.md
    python reproduce.py a --scale=gpu           llama162m on one GPU; 10 minutes of it: add --minutes=10, and give it again
    python reproduce.py all --scale=paper       the paper's 40 billion tokens a run, under torchrun on all GPUs of the machine

Each run is train.py with settings of its own, in runs/figures/<scale>/<variant>/seed<n>; one that is done is not run again, and
one that was stopped goes on. Each of its checkpoints is measured once, with the same questions for all, into measures.jsonl
beside it. Figures and REPORT.md are made from those rows alone, in results/<scale>/.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from config import ROOT, Config, Parser, load
from data import prepare
from errors import UserError
from paper import figures
from runtime import metrics


@dataclass(frozen=True)
class Scale:
    """What is run at one scale. settings: of every run, beside the config's own; all others: what the variants change."""

    config: str
    settings: dict
    batches: tuple[int, ...]  # of figure b
    rates: tuple[float, ...]  # learning rates, of figures c and g
    layers: int  # of the model of figure d
    grid: tuple[tuple[int, ...], tuple[int, ...]]  # batch sizes and contexts, of figure f
    grid_steps: tuple[int, ...]  # at each of its batches
    threshold: float  # exact match, full alphabet, that counts as onset
    samples: int  # of the copy test, at each checkpoint
    keep_weights: bool = False  # after they are measured
    data: str = ""  # the arguments that prepare data for a context other than the config's, where it needs its own
    seeds: int = 3


SCALES = {
    "tiny": Scale(
        config="configs/tiny.py",
        settings=dict(schedule="constant", max_steps=2000, compile="off"),  # the same with a C++ compiler or without
        batches=(8, 16, 32),
        rates=(1.25e-3, 2.5e-3, 5e-3, 1e-2),
        layers=4,
        grid=((16, 32, 64), (128, 256)),
        grid_steps=(1200, 1200, 600),
        threshold=0.3,
        samples=100,
        keep_weights=True,
        data="repeats --length={context}",
    ),
    "gpu": Scale(
        config="configs/paper/gpu.py",
        settings={},
        batches=(16, 32, 64),
        rates=(2.5e-4, 5e-4, 1e-3, 2e-3),
        layers=12,
        grid=((16, 32, 64), (256, 512, 1024)),
        grid_steps=(8000, 8000, 8000),
        threshold=0.5,
        samples=100,
    ),
    "paper": Scale(
        config="configs/llama162m.py",
        settings={},
        batches=(256, 512, 1024),
        rates=(1e-4, 2e-4, 4e-4),
        layers=12,
        grid=((256, 512, 1024), (512, 1024, 2048)),
        grid_steps=(76294, 76294, 76294),
        threshold=0.2,
        samples=500,
    ),
}


def variants(scale: Scale) -> dict[str, dict]:
    """The settings of each variant, by name. base is the config itself."""
    base = base_config(scale)
    found = {"base": {}} | {f"batch{batch}": {"batch_size": batch} for batch in scale.batches}
    # As many tokens as base sees, and as many steps: both are compared.
    for batch in scale.batches:
        found[f"batch{batch}"]["max_steps"] = max(base.max_steps, base.max_steps * base.batch_size // batch)
    found |= {f"rate{rate:g}": {"learning_rate": rate} for rate in scale.rates}
    found[f"layers{scale.layers}"] = {"n_layers": scale.layers}
    found |= {"dropout0.1": {"attn_dropout": 26 / 256}, "decay0.01": {"weight_decay": 0.01}, "decay0.1": {"weight_decay": 0.1}}
    for batch, steps in zip(scale.grid[0], scale.grid_steps, strict=True):
        for context in scale.grid[1]:
            settings = {"batch_size": batch, "seq_len": context, "max_steps": steps}
            if scale.data and context != base.seq_len:
                settings |= {"data": f"{base.data}{context}", "prepare": scale.data.format(context=context)}
            found[f"batch{batch}-context{context}"] = settings
    for settings in found.values():
        settings["micro_batch_size"] = min(settings.get("batch_size", base.batch_size), base.micro_batch_size)
    return found


def base_config(scale: Scale) -> Config:
    return load([str(ROOT / scale.config), *(f"--{k}={v}" for k, v in scale.settings.items())])


def standing_for(scale: Scale, name: str) -> str:
    """The variant whose runs serve for `name`, at constant rate and up to its steps: the one with the same settings."""
    base, wanted = base_config(scale), variants(scale)[name]
    for other, settings in variants(scale).items():
        ours, theirs = ({k: v for k, v in s.items() if k != "max_steps" and v != getattr(base, k)} for s in (wanted, settings))
        if ours == theirs:
            return other
    return name


FIGURES = {
    "a": lambda s: ["base"],
    "b": lambda s: [f"batch{batch}" for batch in s.batches],
    "c": lambda s: [f"rate{rate:g}" for rate in s.rates[-3:]],
    "d": lambda s: [f"layers{s.layers}"],
    "e": lambda s: ["base", "dropout0.1", "decay0.1"],
    "f": lambda s: [f"batch{batch}-context{context}" for batch in s.grid[0] for context in s.grid[1]],
    "g": lambda s: [f"rate{rate:g}" for rate in s.rates],
    "h": lambda s: ["base", "dropout0.1", "decay0.01", "decay0.1"],
    "i": lambda s: ["base"],
    "j": lambda s: ["base"],
}


@dataclass
class Runs:
    """The runs of one scale on this machine: where they are, making them, measuring them."""

    scale: Scale
    name: str
    minutes: float | None  # for which training may go on in this call
    started: float
    out: Path  # of the figures

    def folder(self, variant: str, seed: int) -> Path:
        return ROOT / "runs/figures" / self.name / variant / f"seed{seed}"

    def steps(self, variant: str) -> int:
        return (self.scale.settings | variants(self.scale)[variant]).get("max_steps", base_config(self.scale).max_steps)

    def reached(self, file: str, variant: str, seed: int) -> bool:
        """Whether the last row of metrics.jsonl or measures.jsonl is that of the variant's last step."""
        path = self.folder(variant, seed) / file
        rows = metrics.read(path) if path.exists() else []
        return bool(rows) and rows[-1]["step"] >= self.steps(variant)

    def train(self, variant: str, seed: int) -> bool:
        """Runs train.py, until the minutes are over; whether to its end. Raises RuntimeError with its last line if it fails."""
        settings, out = self.scale.settings | variants(self.scale)[variant], self.folder(variant, seed)
        if (out / "ckpt.pt").exists() and self.reached("metrics.jsonl", variant, seed):
            return True
        left = None if self.minutes is None else self.minutes * 60 - (time.monotonic() - self.started)
        if left is not None and left <= 0:
            return False
        argv = [self.scale.config, *(f"--{k}={v}" for k, v in settings.items() if k not in ("prepare",)), f"--seed={seed}"]
        every = settings.get("eval_interval", base_config(self.scale).eval_interval)
        argv += [f"--out_dir={out}", "--copy_eval_interval=0", "--ckpt_milestones=true", f"--milestone_interval={every}"]
        gpus = torch.cuda.device_count()
        many = self.name == "paper" and gpus > 1
        command = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "train.py"] if many else ["train.py"]
        )
        out.mkdir(parents=True, exist_ok=True)
        print(f"{variant} seed {seed}: python {' '.join([*command, *argv])}", flush=True)
        threads = {} if gpus else {"OMP_NUM_THREADS": "1"}  # a run a core: two runs of one thread beat one of two
        with open(out / "log.txt", "a") as log:
            child = subprocess.Popen(
                [sys.executable, *command, *argv], cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads
            )
            try:
                child.wait(left)
            except subprocess.TimeoutExpired:
                child.terminate()  # it saves, and the next call goes on
                child.wait()
        if child.returncode not in (0, 3, -15) and not (many and child.returncode == 1):
            raise RuntimeError(f"{out}: {(out / 'log.txt').read_text().strip().splitlines()[-1]}")
        return self.reached("metrics.jsonl", variant, seed)

    def measure(self, variant: str, seed: int):
        """Measures each checkpoint of a run that has not been measured yet."""
        if self.reached("measures.jsonl", variant, seed):
            return
        command = [
            sys.executable,
            "eval_copy.py",
            str(self.folder(variant, seed)),
            "--over_steps",
            f"--samples={self.scale.samples}",
        ]
        command += [f"--context={min(self.scale.grid[1][0], base_config(self.scale).seq_len)}"]
        threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            raise RuntimeError(f"{self.folder(variant, seed)}: {done.stderr.strip().splitlines()[-1]}")
        if not self.scale.keep_weights:
            for path in self.folder(variant, seed).glob("milestone_*.pt"):
                path.unlink()

    def rows(self, variant: str) -> list[list[dict]]:
        """For each seed the rows of its measured steps, up to the variant's last, with the losses that training logged."""
        steps, found = self.steps(variant), []
        for seed in range(self.scale.seeds):
            folder = self.folder(standing_for(self.scale, variant), seed)
            logged = {row["step"]: row for row in metrics.read(folder / "metrics.jsonl")}
            measured = {row["step"]: row for row in metrics.read(folder / "measures.jsonl")}
            found.append([logged[s] | row for s, row in measured.items() if s <= steps and "val_loss" in logged.get(s, ())])
        return found


def make(letters: list[str], runs: Runs, jobs: int) -> bool:
    """Trains and measures what the figures need, then draws them; False where the minutes ended before the runs."""
    names = dict.fromkeys(standing_for(runs.scale, name) for letter in letters for name in FIGURES[letter](runs.scale))
    configs = {}
    for name in names:
        settings = runs.scale.settings | variants(runs.scale)[name]
        configs[name] = config = load([str(ROOT / runs.scale.config), *(f"--{k}={v}" for k, v in settings.items())])
        if config.prepare and not (ROOT / config.data / "train.bin").exists():
            prepare.prepare([*config.prepare.split(), f"--out={ROOT / config.data}"])

    def tokens(pair):
        c = configs[pair[0]]
        return c.max_steps * c.batch_size * c.seq_len

    def one(pair):
        whole = runs.train(*pair)
        if whole:
            runs.measure(*pair)
        return whole

    pairs = [(name, seed) for name in names for seed in range(runs.scale.seeds)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        whole = list(pool.map(one, sorted(pairs, key=tokens, reverse=True)))  # the longest first: no core waits at the end
    if not all(whole):
        return False
    out = runs.out
    out.mkdir(parents=True, exist_ok=True)
    for letter in letters:
        data = {name: runs.rows(name) for name in FIGURES[letter](runs.scale)}
        draw, _ = figures.DRAW[letter]
        (out / f"{letter}.json").write_text(json.dumps(draw(data, runs.scale, out / f"{letter}.png"), indent=1) + "\n")
    figures.report(out, runs.name, runs.scale)
    return True


def main(argv: list[str]) -> int:
    """Exit status 0: done; 2: the user's mistake; 3: the minutes ended, the same command goes on; 4: a run failed."""
    parser = Parser(prog="python reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "figure", choices=[*FIGURES, "all"], help="; ".join(f"{k}: {title.lower()}" for k, (_, title) in figures.DRAW.items())
    )
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="(default: tiny)")
    parser.add_argument("--minutes", type=float, help="stop training after so many; the same command goes on")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time (default: one a core, or one on GPUs)")
    args = parser.parse_args(argv)
    jobs = args.jobs or (1 if torch.cuda.is_available() else prepare.cores())
    runs = Runs(SCALES[args.scale], args.scale, args.minutes, time.monotonic(), ROOT / "results" / args.scale)
    try:
        if not make(list(FIGURES) if args.figure == "all" else [args.figure], runs, jobs):
            print("the minutes are over; the same command goes on")
            return 3
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(e, file=sys.stderr)
        return 4
    print(f"results/{args.scale}/REPORT.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
