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

        stack = {"driver": smi("driver_version"), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        stack |= {"triton": triton.__version__} | clocks()
        return {"card": torch.cuda.get_device_name()} | stack | about
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {"cpu": (names or [platform.processor() or platform.machine()])[0], "threads": torch.get_num_threads()} | about


def clocks() -> dict[str, str]:
    """Returns the clocks of the GPU while it multiplies matrices, and its limits."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    for _ in range(1000):  # over a second: the host does not wait for it
        x @ x
    found = {name: smi(name) for name in ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")}
    torch.cuda.synchronize()
    return found


def smi(name: str) -> str:
    return output("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader").partition("\n")[0]


def output(*command) -> str:
    """Returns what a command prints; an empty string if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
