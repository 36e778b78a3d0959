"""Checks the kernels on a card, and measures the speeds that the documentation quotes.

    python bench.py check                   whether this card computes every op correctly, and which settings suit it
    python bench.py train [CONFIG.py ...] [--name=value ...]   training steps, against other models of the same shape
    python bench.py copy [CONFIG.py ...] [--name=value ...]    seconds, steps and tokens until a model copies
    python bench.py kernels                 each Triton op on a GPU, against eager, torch.compile and SDPA
    python bench.py tiles                   each Triton op on a GPU, under other tile sizes, warps and stages
    python bench.py bytes [CONFIG.py] [--name=value ...]       bytes that a training step moves outside of matmuls, per kernel
    python bench.py data                    data.prepare on this Python's standard library, against encode() in a bare loop

Default configs: on a GPU, `train` uses llama162m at a batch of 64 and `copy` uses copyrun; on a CPU, `train` uses tiny and
text, and `copy` uses tiny. --name=value changes a setting. The modules in benchmarks/ say what is measured and how.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from cli import Parser, run_command
from config import ROOT, load
from files import atomic_write, check_output

CONFIGS = {
    ("train", "cuda"): ["configs/llama162m.py"],
    ("train", "cpu"): ["configs/tiny.py", "configs/text.py"],
    ("copy", "cuda"): ["configs/copyrun.py"],
    ("copy", "cpu"): ["configs/tiny.py"],
}

# The arguments that each command reads; settings are --name=value. `check` takes only --device of these.
READS = {
    "check": (),
    "train": ("configs", "settings", "rounds", "nanogpt", "json"),
    "copy": ("configs", "settings", "rounds", "until", "alphabet", "json"),
    "kernels": ("json",),
    "tiles": ("json",),
    "bytes": ("configs", "settings"),
    "data": ("rounds", "json"),
}


def unread(args, settings: list[str]) -> list[str]:
    """Returns the arguments that the command does not read."""
    reads = READS[args.what]
    options = [name for name in ("rounds", "until", "alphabet", "nanogpt", "json") if getattr(args, name) is not None]
    found = [f"--{name}" for name in options if name not in reads]
    if "configs" not in reads:
        found += args.configs
    if "settings" not in reads:
        found += [word for word in settings if word.startswith("-")]
    return [word for word in found if args.what != "check" or word.partition("=")[0] != "--device"]


def each_config(args, settings: list[str]) -> Iterator[dict]:
    """Prints the results of `train` or `copy`, and yields them, {config name: result}, as they grow."""
    from benchmarks import copying, training
    from runtime import distributed

    kind = "cuda" if distributed.pick_device(load(settings).device).type == "cuda" else "cpu"
    ours = ["--optimizer=adamw"] if args.what == "train" else []  # as all baselines have
    if ours and kind == "cuda":
        ours.append("--batch_size=64")
    settings = [*ours, *settings, f"--device={kind}"]
    configs = args.configs or [str(ROOT / name) for name in CONFIGS[args.what, kind]]
    for config in configs:
        load([config, *settings])  # a mistake is reported before anything is timed
    result = {}
    for config in configs:
        argv, name = [config, *settings], Path(config).stem
        print(" ".join([name, *settings]), flush=True)
        if args.what == "copy":
            parts = copying.copy(argv, args.until or 0.9, args.rounds or 3, args.alphabet or "full")
        else:
            parts = training.compare(argv, args.rounds or 10, args.nanogpt)
        for part in parts:
            result[name] = {"settings": settings} | part
            yield result


def write(path: str | None, machine: dict, what: str, result):
    if path:
        atomic_write(path, json.dumps({"machine": machine, what: result}, indent=1) + "\n")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("check", "train", "copy", "kernels", "tiles", "bytes", "data"))
    parser.add_argument("configs", nargs="*", metavar="CONFIG.py", help="for train, copy and bytes (default: by the device)")
    parser.add_argument("--rounds", type=int, help="for train (10) and data (5); for copy, the number of seeds (3)")
    parser.add_argument("--until", type=float, choices=(0.5, 0.9), help="for copy: the exact match to reach (0.9)")
    parser.add_argument("--alphabet", metavar="NAME", help="for copy: score copy_exact_NAME, such as top128 (default: full)")
    parser.add_argument("--nanogpt", metavar="PATH", help="for train: a checkout of nanoGPT, one more baseline")
    parser.add_argument("--json", metavar="FILE", help="write the result to this file too; not for check and bytes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args(argv)
    if words := unread(args, settings):
        parser.error(f"{args.what} takes no {', '.join(words)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    if args.json:
        check_output("--json", args.json, ".json", begins=b'{\n "machine"')
    from benchmarks import baselines, checking, machine, ops, preparing, training  # here: Ctrl-C before torch is one line too
    from runtime import distributed

    if args.nanogpt:
        baselines.nanogpt(args.nanogpt)  # a mistake is reported before anything is timed
    if args.what == "check":
        return checking.main(distributed.pick_device(load(settings).device))
    if args.what == "bytes":
        from benchmarks import traffic  # which needs Triton

        print(traffic.table(load([*(args.configs or [str(ROOT / "configs/llama162m.py")]), "--batch_size=64", *settings])))
        return 0
    if args.one:
        training.take_turns(load([*args.configs, *settings]), args.one, args.nanogpt)
        return 0
    about = machine.machine()  # before anything is timed: the commit may change while it runs
    if args.what == "data":
        result = preparing.prepare_rates(args.rounds or 5)
        print(preparing.summary(result))
        write(args.json, about, args.what, result)
        return 0
    for result in ops.sweep(args.what) if args.what in ("kernels", "tiles") else each_config(args, settings):
        write(args.json, about, args.what, result)  # as it grows: a long measurement may be cut off
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C, the processes that it started are ended
    sys.exit(run_command(main, sys.argv[1:]))
