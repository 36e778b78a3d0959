"""A run on fake `cuda:0` tensors, which have a device, a dtype and a shape but no numbers, for every op set.

torch checks devices and dtypes as on a GPU, except for custom ops, whose fakes only allocate: the mode `Watch` does that.
What asks a tensor for its numbers (item, tolist, numpy) gets ones. A CPU build of torch lacks what autograd asks of CUDA
(streams, a device guard), so that `STUB` is compiled and the runs have a process of their own: python -m tests.test_fake_cuda.
"""

import ctypes
import sys

if __name__ == "__main__" and sys.argv[1:]:
    ctypes.CDLL(sys.argv[1])  # before torch looks for CUDA

import contextlib
import dataclasses
import importlib
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eval_copy
import train
from config import ROOT, Config
from data import bins
from data.tokenizer import Chars
from measures import heads
from model import Llama
from runtime import distributed
from runtime.optim import LossScale, make_optimizer
from runtime.validation import validate

STUB = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
static Guard guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
"""
DEVICE = torch.device("cuda", 0)  # `cuda` alone would ask the driver for the current device
WORLD = distributed.World(0, 1, DEVICE)
SMALL = dict(n_layers=2, dim=64, n_heads=4, n_kv_heads=4, hidden_dim=96, vocab_size=64, seq_len=96)
CONFIG = dataclasses.replace(Config(), **SMALL, batch_size=8, micro_batch_size=2)  # llama162m, scaled down
SETS = ("eager", "sdpa", "fused")
SHAPES = {"plain": {}, "dropout and grouped queries": dict(attn_dropout=0.1, n_kv_heads=2)}
FAULTS = ("the rotary table", "the seeds of dropout", "the targets")


class Watch(TorchDispatchMode):
    """Raises RuntimeError if a custom op gets tensors of two devices; counts the custom ops."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "copyllama":
            self.calls += 1
            if len(found := {x.device for x in args if isinstance(x, torch.Tensor)}) > 1:
                raise RuntimeError(f"{func}: tensors on {found}")
        return func(*args, **(kwargs or {}))


def numbers(x):
    assert x.device.type == "cpu", f"numpy of a tensor on {x.device}"
    return np.ones(x.shape, str(x.dtype).removeprefix("torch."))


@contextlib.contextmanager
def fake_cuda(watched=True):
    """Makes every tensor a fake one; yields the mode that watches the custom ops. torch.compile traces nothing under it."""
    properties = types.SimpleNamespace(total_memory=2**34, multi_processor_count=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "numpy", numbers, raising=False)
        patch.setattr(FakeTensor, "item", lambda x: 1, raising=False)
        patch.setattr(FakeTensor, "tolist", lambda x: np.ones(x.shape).tolist(), raising=False)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        with torch.autograd.set_multithreading_enabled(False), FakeTensorMode():
            with Watch() if watched else contextlib.nullcontext() as watch:
                yield watch


def build(ops, **changes):
    c = dataclasses.replace(CONFIG, **changes)
    with DEVICE:
        return c, Llama(c.model(), importlib.import_module(f"kernels.{ops}"), torch.bfloat16)


@contextlib.contextmanager
def some_bin():
    with tempfile.TemporaryDirectory() as folder:
        np.zeros(97 * 40, "<u2").tofile(f"{folder}/train.bin")
        yield bins.Bin(Path(folder, "train.bin"), CONFIG.seq_len, CONFIG.vocab_size)


def whole_run(ops, shape):
    """Updates with gradient accumulation, clipping and found_inf, validation, copy test, scores of heads, generation."""
    with fake_cuda() as watch, some_bin() as train_bin:
        c, model = build(ops, **SHAPES[shape])
        optimizer, stop = make_optimizer(model, c), distributed.StopSignal(WORLD)
        loss_scale = LossScale(model.dtype, DEVICE)
        for step in (1, 2):
            stats = train.update(step, model.train(), optimizer, loss_scale, train_bin, c, WORLD, stop)
        assert stats.device == loss_scale.scale.device == DEVICE and optimizer.param_groups[0]["fused"]
        for p in model.parameters():
            assert p.device == p.grad.device == optimizer.state[p]["exp_avg"].device == DEVICE and p.grad.dtype == torch.float32
        assert (watch.calls > 0) == (ops == "fused")
        assert "val_loss" in validate(model, train_bin, np.arange(6), 2, WORLD, stop)
        chars = Chars(60)
        assert "copy_exact_full" in eval_copy.training_row(model, chars, eval_copy.make_tests(chars, c.seq_len, samples=4))
        assert heads.scores(model, np.arange(60), chars.bos)["induction"].shape == (2, 4)
        prompt = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
        for temperature in (0.0, 1.0):
            assert [x.device for x in model.generate(prompt, 3, temperature)] == [DEVICE] * 3


def compiled_step(ops, shape):
    """Forward and backward of blocks that torch.compile traces without a graph break, and AOTAutograd after it."""
    with fake_cuda(watched=False):
        c, model = build(ops, **SHAPES[shape])
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        tokens = torch.zeros(2, c.seq_len, dtype=torch.int64, device=DEVICE)
        loss = model.train()(tokens, tokens, seed=tokens[:, 0] if c.attn_dropout else None)
        loss.backward()
        assert loss.device == model.embed.weight.grad.device == DEVICE
    torch.compiler.reset()


def fault(ops, left):
    """A step with one tensor left on the CPU, which must fail."""
    with fake_cuda():
        c, model = build(ops, attn_dropout=0.1)
        tokens = torch.zeros(2, c.seq_len, dtype=torch.int64, device=DEVICE)
        targets = tokens.cpu() if left == "the targets" else tokens
        seed = torch.zeros(2, dtype=torch.int64, device="cpu" if left == "the seeds of dropout" else DEVICE)
        if left == "the rotary table":
            model.cos = model.cos.cpu()
        try:
            model.train()(tokens, targets, seed=seed).backward()
        except (RuntimeError, AssertionError) as e:
            assert "cpu" in str(e), e
            return
    raise AssertionError("it was not noticed")


CASES = [(f, ops, shape) for f in (whole_run, compiled_step) for ops in SETS for shape in SHAPES]
CASES += [(fault, ops, left) for ops in SETS for left in FAULTS]


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """What `python -m tests.test_fake_cuda` prints about each case."""
    pytest.importorskip("triton", reason="Triton is not installed: there is no op set `fused`")
    command = [sys.executable, "-m", "tests.test_fake_cuda"]
    if torch.version.cuda is None:
        if not shutil.which("g++"):
            pytest.skip("no g++, and a CPU build of torch needs a stub for CUDA's device guard")
        stub, home = tmp_path_factory.mktemp("stub"), Path(torch.__file__).parent
        (stub / "stub.cpp").write_text(STUB)
        where = [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
        build = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", "stub.cpp", "-o", "stub.so", *where]
        subprocess.run(build, cwd=stub, check=True)
        command.append(str(stub / "stub.so"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def name(case):
    f, ops, what = case
    return f"{f.__name__} {ops}, {what}"


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_keeps_to_its_device_and_dtypes(ops, shape, report):
    assert report[name((whole_run, ops, shape))] == "ok"


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_on_a_gpu_is_traced_without_a_graph_break(ops, shape, report):
    assert report[name((compiled_step, ops, shape))] == "ok"


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("left", FAULTS)
def test_a_tensor_left_on_the_cpu_is_noticed(ops, left, report):
    assert report[name((fault, ops, left))] == "ok"


if __name__ == "__main__":
    import traceback

    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()  # where there is no GPU
    for f, *rest in CASES:
        try:
            f(*rest)
            print(f"{name((f, *rest))}: ok", flush=True)
        except Exception as e:
            traceback.print_exc()
            print(f"{name((f, *rest))}: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}", flush=True)
