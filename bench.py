"""The numbers in the README come from here.

    python bench.py train [CONFIG.py ...] [--name=value ...]   training steps, against other models of the same shape
    python bench.py copy [CONFIG.py ...] [--name=value ...]    seconds, steps and tokens until a model copies
    python bench.py kernels                 each fused op on a GPU, against eager, torch.compile, SDPA and Liger
    python bench.py tiles                   each fused op on a GPU, under other block sizes, warps and stages
    python bench.py data                    data.prepare on this Python's standard library, against encode() in a bare loop

On a GPU `train` takes llama162m at a batch of 64 and `copy` copyrun; on a CPU tiny and pycode, and tiny. --name=value changes a
setting. Modules in benchmarks/ say what is measured and how.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import copying, ops, preparing, training
from data.bins import DataError
from runtime.config import ROOT, ConfigError, Parser, load

CONFIGS = {
    ("train", "cuda"): ["configs/llama162m.py"],
    ("train", "cpu"): ["configs/tiny.py", "configs/pycode.py"],
    ("copy", "cuda"): ["configs/copyrun.py"],
    ("copy", "cpu"): ["configs/tiny.py"],
}


def machine() -> dict:
    """What the figures were taken on."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
    if torch.cuda.is_available():
        return {"card": torch.cuda.get_device_name()} | ops.driver() | about
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": name, "threads": torch.get_num_threads()} | about


def each_config(what: str, args, settings: list[str]) -> dict:
    """{config name: result} of `train` or `copy`, said as it comes."""
    kind = "cuda" if torch.cuda.is_available() and "--device=cpu" not in settings else "cpu"
    if what == "train" and kind == "cuda":
        settings = ["--batch_size=64", *settings]
    configs = args.configs or [str(ROOT / name) for name in CONFIGS[what, kind]]
    for config in configs:
        load([config, *settings])  # a mistake shows before anything is timed
    result = {}
    for config in configs:
        argv, name = [config, *settings], Path(config).stem
        print(" ".join([name, *settings]), flush=True)
        if what == "copy":
            result[name] = {"settings": settings, "seeds": copying.copy(argv, args.until, args.rounds or 3)}
        else:
            result[name] = {"settings": settings} | training.compare(argv, args.rounds or (2 if kind == "cuda" else 5))
            print(training.table(result[name]), flush=True)
    return result


def main() -> int:
    parser = Parser(prog="python bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "copy", "kernels", "tiles", "data"))
    parser.add_argument("configs", nargs="*", metavar="CONFIG.py", help="of train and copy (default: by the device)")
    parser.add_argument("--rounds", type=int, help="of train and data; of copy the seeds (default: 5; on a GPU 2; of copy 3)")
    parser.add_argument(
        "--until", type=float, choices=copying.LEVELS, default=max(copying.LEVELS), help="of copy: the level (0.9)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    try:
        if args.what in ("kernels", "tiles"):
            return ops.main(args.what)
        if args.one:
            training.say_one(load([*args.configs, *settings]), args.one)
            return 0
        if args.what == "data":
            result = preparing.prepare_rates(args.rounds or 5)
            print(preparing.said(result))
        else:
            result = each_config(args.what, args, settings)
    except (ConfigError, DataError, copying.RunFailed) as e:
        print(e, file=sys.stderr)
        return 4 if isinstance(e, copying.RunFailed) else 2
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), args.what: result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
