"""What bench.py compares, reads off a profile and off a run; its times are of the machine and are not tested."""

import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from benchmarks import baselines, checking, copying, ops, training
from config import ROOT, Config, load
from errors import RunFailed, UserError
from kernels import eager
from model import Llama
from runtime import distributed
from tests.conftest import children, heed_interrupts

SHAPE = dict(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, hidden_dim=48, vocab_size=65, seq_len=16, batch_size=4)
EAGER = ["--device=cpu", "--kernels=eager", "--compile=off"]
ARGV = [str(ROOT / "configs/tiny.py"), *EAGER, *(f"--{k}={v}" for k, v in SHAPE.items())]


@pytest.mark.parametrize("kv", [1, 2])
def test_the_plain_model_is_the_same_function(kv):
    c = Config(**(SHAPE | dict(n_kv_heads=kv)))
    torch.manual_seed(0)
    ours, plain = Llama(c.model(), eager, torch.float64).double(), baselines.PlainLlama(c).double()
    plain.cos, plain.sin = ours.cos.double(), ours.sin.double()
    copy_weights(ours, plain)
    tokens = torch.randint(65, (2, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(plain(x, y), ours(x, y), atol=1e-7, rtol=1e-7)


@torch.no_grad()
def copy_weights(ours, plain):
    plain.embed.weight.copy_(ours.embed.weight)
    plain.lm_head.weight.copy_(ours.lm_head.weight)
    for a, b in zip(ours.blocks, plain.blocks, strict=True):
        rows = [w.weight.shape[0] for w in (b.q, b.k, b.v)]
        for w, part in zip((b.q, b.k, b.v), a.attention.wqkv.weight.split(rows), strict=True):
            w.weight.copy_(part)
        for w, part in zip((b.gate, b.up), a.mlp.gate_up.weight.chunk(2), strict=True):
            w.weight.copy_(part)
        b.o.weight.copy_(a.attention.wo.weight)
        b.down.weight.copy_(a.mlp.down.weight)


def test_hugging_face_has_the_same_shape():
    pytest.importorskip("transformers", reason="transformers is not installed")
    c = Config(**SHAPE)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (Llama(c.model(), eager), baselines.BASELINES["hf"](c))]
    assert sizes[0] == sizes[1]
    assert isinstance(baselines.BASELINES["hf"](c)(torch.zeros(1, 8, dtype=torch.int64), None), torch.Tensor)


def test_each_kernel_of_a_step_has_its_part():
    pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to name")
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    modules = {"attention": attention, "cross-entropy": cross_entropy, "memory-bound": (rmsnorm, rotary, swiglu)}
    for part, owners in modules.items():
        for module in owners if isinstance(owners, tuple) else (owners,):
            names = [name for name in vars(module) if name.endswith("_kernel")]
            assert names and {training.part_of(name) for name in names} == {part}, module
    # As profilers on CUDA have named them.
    for name, part in {
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment": "GEMMs",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN": "GEMMs",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float, NormType::L2>>": "optimizer",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64": "attention",
        "triton_poi_fused__to_copy_add_mul_0": "memory-bound",
        "Memcpy HtoD (Pinned -> Device)": "data",
    }.items():
        assert training.part_of(name) == part, name


@pytest.mark.parametrize("who", ["plain", "hf"])
@pytest.mark.parametrize("device, residual", [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_on_a_gpu_the_baselines_carry_a_bf16_residual_stream(who, device, residual):
    if who == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    c, kinds = Config(**SHAPE, device=device), set()
    model = baselines.BASELINES[who](c)
    for block in model.blocks if who == "plain" else model.model.model.layers:
        block.register_forward_hook(lambda block, args, out: kinds.add((out[0] if isinstance(out, tuple) else out).dtype))
    x = torch.zeros(2, c.seq_len, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, x).dtype == torch.float32
    assert kinds == {residual}


@pytest.mark.parametrize("settings", [[], ["--attn_dropout=0.1"]], ids=["", "dropout"])
@pytest.mark.parametrize("who", [training.OURS, "plain"])
def test_a_model_takes_its_turns_and_ends_with_its_row(who, settings, monkeypatch, capsys):
    monkeypatch.setattr(training, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    training.take_turns(load([*ARGV, *settings]), who)
    *turns, row = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(turns) == 2 and all(0 < s < 10 for turn in turns for s in turn) and row["peak_GB"] > 0.05
    assert ("parts_ms" in row) == (who == training.OURS)
    if who == training.OURS:
        parts = row["parts_ms"]
        assert parts.keys() == {*training.PARTS, training.MEMORY_BOUND, training.IDLE}
        assert all(parts[name] > 0 for name in ("optimizer", "cross-entropy", "attention", "GEMMs", "memory-bound"))


def test_the_peak_memory_is_that_of_all_ranks():
    c, two = load(ARGV), SimpleNamespace(device=torch.device("cpu"), size=1, rank=0, sum=lambda x: 2 * x)
    steps = training.Steps(c, "plain", two)
    assert steps.peak_gb() == pytest.approx(2 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.01)


@pytest.mark.parametrize("who", [training.OURS, "plain"])
def test_on_a_gpu_a_turn_is_12_updates_or_more_and_ends_with_its_memory_freed(who, monkeypatch, capsys):
    """CUDA is pretended."""
    init, updates, freed = training.Steps.__init__, [], []

    def on_a_gpu(self, c, *rest):
        init(self, c, *rest)
        update, free, self.cuda = self.update, self.free, True
        self.update = lambda: (update(), updates.append(1))
        self.free = lambda: (free(), freed.append((self.micro_step, [p.grad for p in self.model.parameters()])))
        self.peak_gb = self.parts = dict

    monkeypatch.setattr(training.Steps, "__init__", on_a_gpu)
    monkeypatch.setattr(training, "SECONDS", 0)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    training.take_turns(load([*ARGV, "--micro_batch_size=2"]), who)
    assert len(json.loads(capsys.readouterr().out.splitlines()[0])) == 2
    assert len(updates) == 2 * (2 + 2 * 5)
    assert [(step, {*grads}) for step, grads in freed] == 2 * [(None, {None})]


@pytest.mark.parametrize("who, micro", [(training.OURS, 2), ("plain", 4)])
def test_on_a_cpu_the_baselines_take_the_whole_batch(who, micro):
    c = load([*ARGV, "--micro_batch_size=2"])
    assert training.Steps(c, who, distributed.World(0, 1, torch.device("cpu"))).micro == micro


def test_a_model_that_fails_says_why_and_the_others_continue(monkeypatch):
    monkeypatch.setattr(training, "ON", {"cpu": ["hf liger"]})
    found = list(training.compare(ARGV, rounds=1))[-1]["of"]
    assert "is not installed" in found["hf liger"]["failed"]
    assert found[training.OURS]["tokens_per_s"] == pytest.approx(4 * 16 / found[training.OURS]["ms"] * 1000)
    assert "is not installed" in training.table({"of": found})


NANOGPT = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.embed(idx.view(-1, idx.size(1))))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def test_nanogpt_takes_its_turns_with_its_own_optimizer(tmp_path, monkeypatch, capsys):
    """A module with the interface of its model.py stands in for nanoGPT."""
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(training, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    training.take_turns(load(ARGV), training.NANOGPT, str(tmp_path))
    turn, row = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert min(turn) > 0 and row["parameters"] == 2 * 65 * 32


def test_a_path_without_nanogpt_is_one_line(tmp_path):
    with pytest.raises(UserError, match="expected a checkout of nanoGPT, whose model.py defines GPT and GPTConfig") as e:
        bench.main(["train", *ARGV, f"--nanogpt={tmp_path}"])
    assert "\n" not in str(e.value)
    (tmp_path / "model.py").write_text("class GPT: ...")
    with pytest.raises(UserError, match="--nanogpt="):
        baselines.nanogpt(str(tmp_path))


# bench.py check


def wrong_swiglu(gate_up):
    return 1.02 * eager.swiglu(gate_up)


@pytest.fixture
def small_check(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to check")
    monkeypatch.setattr(checking, "OPS", ("swiglu", "rotary"))
    small = dict(B=1, T=5, D=32, H=2, F=24, V=8, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(checking, "problems", lambda device: [(name, small) for name in checking.OPS])
    return monkeypatch


def test_check_says_that_right_kernels_are_right(small_check, capsys):
    assert bench.main(["check", "--device=cpu"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "these settings are right for this CPU: --kernels=auto takes sdpa"


@pytest.mark.parametrize("op_set, advice", [("fused", "sdpa"), ("sdpa", "eager")])
def test_check_finds_a_wrong_op_and_says_what_to_pass_instead(op_set, advice, small_check, capsys):
    small_check.setattr(importlib.import_module(f"kernels.{op_set}"), "swiglu", wrong_swiglu)
    assert bench.main(["check", "--device=cpu"]) == 4
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"pass --kernels={advice}: these ops are wrong on this CPU ({op_set}: swiglu)"


def test_check_finds_an_op_that_cannot_be_built(small_check, capsys):
    def fails(*args):
        raise ValueError("out of registers")

    small_check.setattr(importlib.import_module("kernels.fused"), "swiglu", fails)
    assert bench.main(["check", "--device=cpu"]) == 4
    assert "ValueError: out of registers" in capsys.readouterr().out


def test_the_advice_follows_errors_first_and_times_second():
    none = {"fused": [], "sdpa": []}
    right = ("these settings are right for X: --kernels=auto takes fused", 0)
    assert checking.verdict("fused", none, {"fused": 1.0, "sdpa": 3.0, "compile": 2.0}, "X") == right
    slower = checking.verdict("fused", none, {"fused": 2.0, "sdpa": 3.0, "compile": 1.0}, "X")
    assert slower == ("pass --kernels=sdpa: its ops take 1.00 ms where the Triton kernels take 2.00", 0)
    line, status = checking.verdict("fused", {"fused": ["rotary"], "sdpa": []}, {}, "X")
    assert line == "pass --kernels=sdpa: these ops are wrong on X (fused: rotary)" and status == 4


@pytest.mark.parametrize("n", [1000, 4000])
def test_sums_in_fp32_are_as_wrong_as_the_check_allows(n):
    x = np.random.default_rng(0).standard_normal((1000, n), dtype=np.float32)
    exact = x.sum(1, dtype=np.float64)
    found = np.linalg.norm(np.cumsum(x, axis=1)[:, -1] - exact) / np.linalg.norm(exact)
    assert found < max(1e-6, ops.allowed(torch.float32, 0.0, n)) < 2 * found


def test_ratios_are_of_the_same_round():
    rows = {"plain": {"turns": [(8, 16), (4, 4), (2, 2)]}, "ours": {"turns": [(4, 8), (1, 4), (2, 1)]}}
    found = training.summary(rows, tokens=8)
    assert found["plain"] == {
        "tokens_per_s": 2,
        "ms": 4000,
        "tokens_per_cpu_s": 2,
        "ours_over": [2, 1.5, 3],
        "ours_over_cpu": [2, 1.5, 2],
    }
    assert "ours_over" not in found["ours"]


def test_a_level_is_reached_at_the_second_of_two_evaluations():
    rows = [{"step": i, "score": score} for i, score in enumerate((0.6, 0.4, 0.5, 0.55, 0.95, 0.91, 0.9))]
    assert copying.reached(rows, 0.5, "score")["step"] == 3 and copying.reached(rows, 0.9, "score")["step"] == 5
    assert copying.reached(rows, 0.93, "score") is None


def copy_argv(dataset, max_steps=100000) -> list[str]:
    """A run that tests copying after every update, and logs each."""
    shape = SHAPE | dict(vocab_size=17, seq_len=96, micro_batch_size=4, copy_eval_interval=1, log_interval=1, eval_interval=0)
    settings = [f"--{k}={v}" for k, v in (shape | dict(max_steps=max_steps)).items()]
    return [str(ROOT / "configs/tiny.py"), f"--data={dataset}", *EAGER, *settings]


@pytest.mark.parametrize("alphabet", ["full", "hex16"])
def test_a_run_is_timed_until_it_copies(alphabet, dataset, monkeypatch):
    monkeypatch.setattr(copying, "LEVELS", (0.0, 1.1))  # one that any score reaches, and one that none does
    *curves, found = copying.time_to_copy(copy_argv(dataset), 0.0, alphabet)
    assert found.keys() == {"curve", "0.0"} and found["0.0"]["step"] == 2  # stopped, not run to its end
    assert found["0.0"]["tokens"] == 2 * 4 * 96 and 0.5 < found["0.0"]["seconds"] < 120
    assert len(curves) == 2 and [step for _, step, _ in found["curve"]] == [1, 2]
    *_, found = copying.time_to_copy(copy_argv(dataset, max_steps=2), 1.1, alphabet)
    assert found["1.1"] is None and found["0.0"]["step"] == 2


def test_a_run_that_is_refused_or_tests_another_alphabet_is_one_line(dataset):
    with pytest.raises(UserError, match="--lr: no such option"):
        list(copying.time_to_copy([*copy_argv(dataset), "--lr=1"], until=0.9))
    with pytest.raises(UserError, match="^--alphabet=top128: the copy test of this run has full, hex16$"):
        list(copying.time_to_copy(copy_argv(dataset), 0.9, "top128"))


def test_a_run_that_dies_without_a_word_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(copying, "ROOT", tmp_path)
    with pytest.raises(RunFailed, match="^train.py ended with status -9$"):
        list(copying.time_to_copy([], until=0.9))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the run is found through /proc")
def test_sigterm_keeps_the_curve_so_far_and_ends_the_run(dataset, tmp_path):
    path = tmp_path / "copy.json"
    command = [sys.executable, "bench.py", "copy", *copy_argv(dataset), f"--json={path}"]
    bench = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert bench.stdout.readline().startswith("tiny")
    assert bench.stdout.readline().startswith("seed 0: step 1, ")
    assert bench.stdout.readline().startswith("seed 0: step 2, ")
    (run,) = children(bench.pid)
    bench.send_signal(signal.SIGTERM)
    _, stderr = bench.communicate(timeout=60)
    assert (bench.returncode, stderr) == (130, "interrupted\n")
    assert not Path(f"/proc/{run}").exists()
    stored = json.loads(path.read_text())["copy"]["tiny"]
    assert stored["alphabet"] == "full" and [step for _, step, _ in stored["seeds"][0]["curve"]][:1] == [1]


def test_a_mistake_is_one_line(tmp_path):
    (other := tmp_path / "other.json").write_text("{}")
    unwritable = [["data", f"--json={path}"] for path in ("nowhere/x.json", "docs", os.devnull, other)]
    for argv in (["train", "configs/tiny.py", "--lr=1"], ["copy", "nowhere.py"], ["speed"], *unwritable):
        done = subprocess.run([sys.executable, "bench.py", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done


@pytest.mark.parametrize("what", bench.READS)
def test_a_command_refuses_what_it_does_not_read(what):
    arguments = {"configs": "x.py", "settings": "--dim=16", "rounds": "--rounds=2", "until": "--until=0.5"}
    arguments["alphabet"] = "--alphabet=hex16"
    for name, word in (arguments | {"nanogpt": "--nanogpt=x", "json": "--json=x.json"}).items():
        if name not in bench.READS[what]:
            shown = word.partition("=")[0] if name not in ("configs", "settings") else word
            with pytest.raises(UserError, match=f"^{what} takes no {shown}; see python bench.py --help$"):
                bench.main([what, word])


def test_training_steps_are_compared_under_the_baselines_optimizer(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "compare", lambda argv, *_: [seen.append(load(argv).optimizer) or {}])
    for given in ([], ["--optimizer=muon"]):
        assert bench.main(["train", str(ROOT / "configs/text.py"), "--device=cpu", *given]) == 0
    assert seen == ["adamw", "muon"]


def test_results_are_written_as_they_grow(monkeypatch, tmp_path):
    def cut_off(*_):
        yield {"rounds": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "compare", cut_off)
    path = tmp_path / "train.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["train", str(ROOT / "configs/tiny.py"), "--device=cpu", f"--json={path}"])
    assert json.loads(path.read_text())["train"]["tiny"]["rounds"] == 1


def test_a_write_that_is_interrupted_keeps_the_result_before_it(monkeypatch, tmp_path):
    path = tmp_path / "train.json"
    bench.write(path, {}, "train", {"rounds": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.write(path, {}, "train", {"rounds": 2})
    assert json.loads(path.read_text())["train"]["rounds"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_is_one_line_and_leaves_no_process_behind():
    command = [sys.executable, "bench.py", "train", *ARGV, "--rounds=1000"]
    pipe = subprocess.PIPE
    bench = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts)
    assert bench.stdout.readline().startswith("tiny")
    time.sleep(1)
    bench.send_signal(signal.SIGINT)
    _, stderr = bench.communicate(timeout=60)  # ends when the last process that holds its stderr has
    assert (bench.returncode, stderr) == (130, "interrupted\n")


def test_the_tile_sweep_tries_what_the_kernels_use():
    pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to tile")
    for op, _, _, where, key, choices in ops.tiles():
        assert op in ops.OPS and where[key] in choices, (op, key)
