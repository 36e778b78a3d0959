import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import ROOT, Config
from errors import UserError
from runtime import distributed, metrics
from tests import faults
from tests.conftest import write_dataset


def rows(settings, ranks=1, **changes):
    args = [f"--{k}={v}" for k, v in (settings | changes).items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "train.py"]
    command = [sys.executable, "train.py"] if ranks == 1 else launcher
    done = subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("tokens per update") == 1  # rank 0 alone prints
    return metrics.read(Path((settings | changes)["out_dir"]) / "metrics.jsonl")


@pytest.mark.parametrize("extra", [{}, {"attn_dropout": 0.1, "repeated_weight": 4.0}], ids=["plain", "dropout"])
def test_two_ranks_give_the_losses_of_one(settings, tmp_path, extra):
    """Over 100 steps in fp32 only the order of the sums differs, which rounding keeps below 1e-5. Two passes a rank: the
    gradients meet on the last one.
    """
    settings = settings | dict(max_steps=100, learning_rate=1e-3, eval_interval=50, ckpt_interval=100) | extra
    one = rows(settings)
    two = rows(settings, ranks=2, micro_batch_size=2, out_dir=str(tmp_path / "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == list(range(101))
    for name in ("loss", "val_loss", "val_loss_repeated"):
        a, b = ([r[name] for r in run if name in r] for run in (one, two))
        assert len(a) == (100 if name == "loss" else 3)
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5, name


def test_validation_with_fewer_windows_than_ranks_and_a_resume_on_another_number_of_ranks(settings, tmp_path):
    data = write_dataset(tmp_path / "small", rows=16, length=32)  # two rows to validate: one window
    settings = settings | dict(data=str(data), max_steps=2, ckpt_interval=2, eval_interval=1)
    two = rows(settings, ranks=2)
    assert len([r for r in two if math.isfinite(r.get("val_loss", math.nan))]) == 3
    on = rows(settings, max_steps=3)
    assert [r["step"] for r in on] == [0, 1, 2, 3]


def test_a_batch_that_the_ranks_cannot_share_is_refused(settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    args = [f"--{k}={v}" for k, v in (settings | {"batch_size": 7, "micro_batch_size": 1}).items()]
    done = subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("batch_size=7: must be a multiple of the 2 ranks") == 1


def test_an_error_before_the_ranks_meet_is_reported_though_rank_0_is_the_last_to_meet_it(tmp_path):
    """torchrun ends all ranks once one has ended."""
    late = "lambda argv: distributed.pick_device('cudda' if time.sleep(3 * (os.environ['RANK'] == '0')) is None else '')"
    script = tmp_path / "late.py"
    script.write_text(f"import os, sys, time\nfrom cli import run_command\nfrom runtime import distributed\n"
                      f"sys.exit(run_command({late}, []))\n")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("device=cudda: expected auto, cuda, mps or cpu\n") == 1


def test_a_numbered_gpu_is_the_one_that_is_used(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.start(Config(device="cuda:1")).device == torch.device("cuda:1") == chosen[-1]
    assert distributed.pick_device("cuda:1") == torch.device("cuda:1") and len(chosen) == 2
    with pytest.raises(UserError, match="device=cuda:2: this machine has 2 GPUs"):
        distributed.pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device=cuda:1: each rank takes a GPU of its own; pass --device=cuda"):
        distributed.start(Config(device="cuda:1"))


@pytest.mark.parametrize("rank", ["0", "3"])
def test_more_ranks_than_gpus_are_refused_by_each_rank(monkeypatch, rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^--nproc_per_node: this machine has 2 GPUs; start no more ranks than that$"):
        distributed.start(Config(device="cuda"))


def test_the_ranks_do_not_exchange_buffers_that_never_change(monkeypatch):
    given = {}

    class Wrapper:
        def __init__(self, model, gradient_as_bucket_view=False, broadcast_buffers=True):
            given.update(view=gradient_as_bucket_view, buffers=broadcast_buffers)

    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapper)
    distributed.data_parallel(torch.nn.Linear(1, 1), distributed.World(0, 2, torch.device("cpu")))
    assert given == {"view": True, "buffers": False}


def test_two_ranks_agree_on_the_overflows_of_fp16(settings, tmp_path):
    """A rank's gradients are twice their share of the batch's, since the ranks' mean is taken. At half the scale they are
    rounded as those of one rank are, and only the sums of rounded gradients differ, in fp32.
    """
    one = settings | dict(dtype="fp16", max_steps=20, eval_interval=0, ckpt_interval=20, micro_batch_size=2)
    two = one | dict(out_dir=str(tmp_path / "two"))
    assert faults.run(one, functools.partial(faults.high_loss_scale, 2.0**31)) == 0
    ranks = faults.start_ranks(two, 2, functools.partial(faults.high_loss_scale, 2.0**30))
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    a, b = (metrics.read(Path(run["out_dir"]) / "metrics.jsonl") for run in (one, two))
    assert [row["overflows"] for row in a] == [row["overflows"] for row in b] and 5 < a[-1]["overflows"] < 20
    assert [row["loss_scale"] for row in a] == [2 * row["loss_scale"] for row in b]
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], abs=1e-3)


def test_dtype_auto_is_bf16_on_gpus_that_have_it_and_fp16_on_older_ones(monkeypatch):
    for capability, dtype in {(9, 0): torch.bfloat16, (8, 0): torch.bfloat16, (7, 5): torch.float16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert distributed.pick_dtype("auto", torch.device("cuda")) == dtype
    assert distributed.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_dtype_that_is_named_is_taken_on_any_device():
    for name in distributed.DTYPES:
        assert distributed.dtype_name(name, torch.device("cpu")) == distributed.dtype_name(name, torch.device("cuda")) == name
