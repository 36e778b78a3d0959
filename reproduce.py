"""Reproduces the figures of "Language Models 'Grok' to Copy", and adds some on questions that the paper left open.

    python reproduce.py all --scale=tiny        on 2 CPU cores, within 90 minutes
    python reproduce.py b --scale=tiny          one figure: its runs, their scores, the picture and its part of REPORT.md
    python reproduce.py all --scale=text        on real text, days on 2 CPU cores; --redraw draws what has finished
    python reproduce.py a --scale=gpu           llama162m on one GPU; in parts of 10 minutes: add --minutes=10, and repeat
    python reproduce.py all --scale=paper       the paper's 40 billion tokens a run, under torchrun on all GPUs of the machine

Each run is train.py with settings of its own, in runs/figures/<scale>/<variant>/seed<n>. Finished runs are not repeated, and
stopped ones resume. Each checkpoint is measured once, with the same questions, into measures.jsonl beside it. Figures and
REPORT.md are made only from these rows, in results/<scale>/, even if some of the runs are missing.
"""

import sys

from cli import Parser, exit_on_interrupt, run_command, say
from errors import RunFailed, UserError

if __name__ == "__main__":
    exit_on_interrupt()  # importing torch takes seconds

import concurrent.futures
import functools
import gzip
import itertools
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from config import MAY_CHANGE, ROOT, Config, changed
from data import prepare
from files import atomic_write
from paper.figures import FIGURES
from paper.repetition import of_training_data
from paper.report import write_report
from paper.scales import SCALES, Scale
from paper.shared import describe_runs
from runtime import metrics


@dataclass
class Runs:
    """Trains and measures the runs of one scale on this machine."""

    scale: Scale
    name: str
    out: Path  # of the figures
    deadline: float | None = None  # of training, by time.monotonic()
    stopping: bool = False
    children: set = field(default_factory=set)

    def folder(self, variant: str, seed: int) -> Path:
        return ROOT / "runs/figures" / self.name / variant / f"seed{seed}"

    @functools.cached_property
    def variants(self) -> dict[str, dict]:
        """Returns the settings of each variant, by name. base is the config itself."""
        return {name: settings for figure in FIGURES.values() for name, settings in figure.variants(self.scale).items()}

    @functools.cached_property
    def configs(self) -> dict[str, Config]:
        return {name: self.scale.load(settings) for name, settings in self.variants.items()}

    def standing_for(self, name: str) -> str:
        """Returns the variant whose runs `name` shares: the longest one with otherwise identical settings."""

        def but_steps(config):
            return {k: v for k, v in vars(config).items() if k not in ("max_steps", "prepare")}

        same = [other for other, config in self.configs.items() if but_steps(config) == but_steps(self.configs[name])]
        return max(same, key=lambda other: self.configs[other].max_steps)

    def seeds(self, variant: str) -> range:
        """Returns the seeds of the runs that are used for the variant."""
        is_base = self.standing_for(variant) == self.standing_for("base")
        return range(max(self.scale.seeds, self.scale.base_seeds if is_base else 0))

    def reached(self, file: str, variant: str, seed: int) -> bool:
        """Returns whether the last row of metrics.jsonl or measures.jsonl is that of the variant's last step."""
        path = self.folder(variant, seed) / file
        rows = metrics.read(path) if path.exists() else []
        return bool(rows) and rows[-1]["step"] >= self.configs[variant].max_steps

    def check(self, path: Path, settings: dict, variant: str):
        """Raises UserError if the settings of the run or the rows at `path` are not the variant's present ones."""
        other = changed(settings, self.configs[variant]).keys() - MAY_CHANGE - {"dtype", "seed"}
        if other:
            raise UserError(f"{path}: made with other settings: {', '.join(sorted(other))}; set them back, or move it away")

    def run(self, command: list[str], folder: Path, seconds: float | None = None) -> int:
        """Runs python with these arguments for at most `seconds`, its output in log.txt. Returns its exit status."""
        env = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})  # one run per core is fastest
        with open(folder / "log.txt", "a") as log:
            child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=env)
        self.children.add(child)
        try:
            if self.stopping:
                child.terminate()
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.terminate()  # train.py saves, and the next call resumes
            child.wait()
        self.children.discard(child)
        return child.returncode

    def failure(self, folder: Path) -> RunFailed:
        self.stopping = True
        lines = (folder / "log.txt").read_text().strip().splitlines()
        return RunFailed(f"{folder}: {lines[-1] if lines else 'failed without a message'}")

    def train(self, variant: str, seed: int) -> bool:
        """Trains a run to its end or until the deadline. Returns whether it is complete."""
        folder = self.folder(variant, seed)
        if (folder / "ckpt.pt").exists() and self.reached("metrics.jsonl", variant, seed):
            self.check(folder, json.loads((folder / "config.json").read_text()), variant)
            return True
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if self.stopping or (left is not None and left <= 0):
            return False
        settings = self.scale.settings | self.variants[variant]
        argv = [self.scale.config, *(f"--{k}={v}" for k, v in settings.items() if k != "prepare"), f"--seed={seed}"]
        every = self.configs[variant].eval_interval
        argv += [f"--out_dir={folder}", "--copy_eval_interval=0", "--ckpt_milestones=true", f"--milestone_interval={every}"]
        gpus = torch.cuda.device_count()
        many = self.name == "paper" and gpus > 1
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if many else []
        folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"{variant} seed {seed}: python {' '.join([*torchrun, 'train.py', *argv])}")
        status = self.run([*torchrun, "train.py", *argv], folder, left)
        if status not in (0, 3, -15) and not (many and status == 1):
            raise self.failure(folder)
        return self.reached("metrics.jsonl", variant, seed)

    def measure(self, variant: str, seed: int):
        """Measures the checkpoints of a run that have not been measured yet."""
        if self.stopping or self.reached("measures.jsonl", variant, seed):
            return
        folder = self.folder(variant, seed)
        command = ["eval_copy.py", str(folder), "--over_steps", f"--samples={self.scale.samples}"]
        command += [f"--context={self.scale.context}"]
        if self.run(command, folder) and not self.stopping:
            raise self.failure(folder)
        if not self.scale.keep_weights:
            for path in folder.glob("milestone_*.pt"):
                path.unlink()

    def rows_of_seed(self, variant: str, seed: int) -> list[dict]:
        """Returns the rows of a run's measured steps, with the losses that training logged; [] for one that is not complete."""
        if not self.reached("measures.jsonl", variant, seed):
            return []
        folder, config = self.folder(variant, seed), self.configs[variant]
        self.check(folder, json.loads((folder / "config.json").read_text()), variant)
        logged = {row["step"]: row for row in metrics.read(folder / "metrics.jsonl")}
        corpus = of_training_data(config)
        measured = metrics.read(folder / "measures.jsonl")
        return [logged[r["step"]] | r | corpus for r in measured if "val_loss" in logged.get(r["step"], ())]

    def rows(self, variant: str) -> list[list[dict]]:
        """Returns the rows, up to the variant's last step, of seeds 0, 1, ... before the first that is not complete.

        They are kept in results/<scale>/rows, from which figures are drawn once the runs are gone.
        """
        stand, last = self.standing_for(variant), self.configs[variant].max_steps
        found = list(itertools.takewhile(bool, (self.rows_of_seed(stand, seed) for seed in self.seeds(stand))))
        asked = {tuple(v for k, v in row.items() if k.startswith("questions_")) for rows in found for row in rows}
        if len(asked) > 1:
            raise UserError(f"{self.folder(stand, 0).parent}: its measures.jsonl differ in their questions; remove them")
        path = self.out / "rows" / f"{stand}.json.gz"
        kept = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {"seeds": []}
        if len(kept["seeds"]) > len(found):
            self.check(path, kept["config"], stand)
            found = kept["seeds"]
        elif found:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"config": vars(self.configs[stand]), "seeds": found})
            atomic_write(path, gzip.compress(text.encode(), mtime=0))
        return [[row for row in rows if row["step"] <= last] for rows in found]


def train_all(letters: list[str], runs: Runs, jobs: int) -> bool:
    """Trains and measures what the figures need, `jobs` runs at a time. Returns False if the deadline came first."""
    names = dict.fromkeys(runs.standing_for(name) for letter in letters for name in FIGURES[letter].variants(runs.scale))
    for folder, arguments in {c.data: c.prepare for c in map(runs.configs.get, names) if c.prepare}.items():
        prepare.prepare([*arguments.split(), f"--out={ROOT / folder}"])

    def one(pair):
        complete = runs.train(*pair)
        if complete:
            runs.measure(*pair)
        return complete

    def tokens(pair):
        c = runs.configs[pair[0]]
        return c.max_steps * c.batch_size * c.seq_len

    # Every variant gets a first seed before any gets a second. The longest come first, so that no core waits at the end.
    pairs = sorted(((name, seed) for name in names for seed in runs.seeds(name)), key=lambda pair: (pair[1], -tokens(pair)))
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        return all(list(tqdm(pool.map(one, pairs), total=len(pairs), unit="run", disable=None)))
    except BaseException:  # Ctrl-C, or a run failed: the others save, and the same command resumes them
        runs.stopping = True
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(runs.children):
            child.terminate()
        raise
    finally:
        pool.shutdown()


def draw(letters: list[str], runs: Runs) -> bool:
    """Draws the figures from what has been measured, and writes REPORT.md. Returns whether there was anything to draw."""
    runs.out.mkdir(parents=True, exist_ok=True)
    rows = functools.cache(runs.rows)
    drawn = False
    for letter in letters:
        figure = FIGURES[letter]
        names = figure.variants(runs.scale)
        data = {name: seeds for name in names if (seeds := rows(name))}
        if data:
            found = figure.draw(data, runs.scale, runs.out / f"{letter}.png")
            found["runs"] = [
                describe_runs(name, data.get(name, []), len(runs.seeds(name)), runs.configs[name], runs.scale, figure.columns)
                for name in names
            ]
            # Floats are rounded to 10 significant digits, on which machines agree.
            rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.10g}"))
            atomic_write(runs.out / f"{letter}.json", json.dumps(rounded, indent=1) + "\n")
            drawn = True
    if drawn:
        there = {letter: figure for letter, figure in FIGURES.items() if figure.variants(runs.scale)}
        write_report(runs.out, runs.name, runs.scale, there)
    return drawn


def main(argv: list[str]) -> int:
    """Exit status 0: done; 2: a usage error; 3: --minutes is over, and the same command resumes; 4: a run failed."""
    parser = Parser(prog="python reproduce.py", description=__doc__.split("\n")[0])
    titles = "; ".join(f"{letter}: {figure.title}" for letter, figure in FIGURES.items())
    parser.add_argument("figure", choices=[*FIGURES, "all"], help=titles)
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="tiny",
        help="size of the runs: tiny and text on CPUs, gpu on one GPU, paper on all (default: tiny)",
    )
    parser.add_argument("--minutes", type=float, help="stop training after this many minutes; the same command resumes")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per core, or one on GPUs)")
    parser.add_argument("--redraw", action="store_true", help="draw the figures and REPORT.md again, without training")
    args = parser.parse_args(argv)
    os.chdir(ROOT)  # the paths of the runs are relative to it
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: expected 1 or more")
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(f"--minutes={args.minutes:g}: expected 0 or more")
    jobs = args.jobs or (1 if torch.cuda.is_available() else prepare.cores())
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    runs = Runs(SCALES[args.scale], args.scale, ROOT / "results" / args.scale, deadline)
    there = [letter for letter, figure in FIGURES.items() if figure.variants(runs.scale)]
    if args.figure not in (*there, "all"):
        raise UserError(f"figure {args.figure}: the scale {args.scale} has none; expected {', '.join(there)} or all")
    letters = there if args.figure == "all" else [args.figure]
    complete = args.redraw or train_all(letters, runs, jobs)
    if draw(letters, runs):
        say(f"results/{args.scale}/REPORT.md")
    elif args.redraw:
        raise UserError(f"results/{args.scale}/rows: there are no measured runs to draw from; leave --redraw out")
    if not complete:
        say("the time limit of --minutes was reached; run the same command to resume")
    return 0 if complete else 3


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C, the runs save
    sys.exit(run_command(main, sys.argv[1:]))
