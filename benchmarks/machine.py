"""Describes the machine that figures are measured on; the description is stored beside them."""

import platform
import subprocess
from pathlib import Path

import torch

from config import ROOT


def machine() -> dict:
    """Returns the GPU and its driver, or the processor; and the versions and the commit in use."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "commit": output("git", "rev-parse", "HEAD")}
    if torch.cuda.is_available():
        import triton

        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        cudnn = torch.backends.cudnn.version()
        stack = {"driver": driver, "cuda": torch.version.cuda, "cudnn": cudnn, "triton": triton.__version__}
        return {"card": torch.cuda.get_device_name()} | stack | about
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {"cpu": (names or [platform.processor() or platform.machine()])[0], "threads": torch.get_num_threads()} | about


def output(*command) -> str:
    """Returns what a command prints; an empty string if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
