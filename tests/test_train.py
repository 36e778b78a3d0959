import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import train
from cli import run_command
from config import ROOT, Config, from_dict, load
from data import bins
from data.meta import SPLITS
from errors import RunFailed, UserError
from kernels import eager
from model import Llama
from runtime import checkpoint, distributed, metrics
from runtime.optim import LossScale, learning_rate
from tests.conftest import write_dataset

WORLD = distributed.World(0, 1, torch.device("cpu"))


def run(settings, **changes) -> list[dict]:
    """Trains in this process; the rows of metrics.jsonl."""
    config = from_dict(settings | changes)
    assert train.train(config, WORLD) == 0
    return metrics.read(Path(config.out_dir) / "metrics.jsonl")


def weights(settings, **changes):
    return checkpoint.load((settings | changes)["out_dir"])["model"]


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def cli(*args, cwd=ROOT, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, capture_output=True, text=True, **kwargs)


def flags(settings, **changes):
    return [f"--{k}={v}" for k, v in (settings | changes).items()]


def test_a_run_leaves_its_directory_as_documented(settings):
    rows = run(settings, ckpt_keep=2, ckpt_milestones=True, ckpt_interval=2, copy_eval_interval=3, seq_len=127)
    out = Path(settings["out_dir"])
    assert sorted(p.name for p in out.iterdir()) == [
        "ckpt.pt", "ckpt_4.pt", "ckpt_6.pt", "config.json", "metrics.jsonl",
        "milestone_1.pt", "milestone_2.pt", "milestone_4.pt", "run.lock", "run.pid",
    ]  # fmt: skip
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[3].keys() >= {"tokens", "loss", "lr", "grad_norm", "tokens_per_s", "eta_s", "val_loss", "induction_max"}
    assert rows[3].keys() >= {"copy_exact_full", "copy_token_full", "copy_exact_hex16", "copy_token_hex16"}
    assert "ms" not in rows[1] and "mfu" not in rows[3] and rows[3]["tokens"] == 3 * 8 * 127
    state = checkpoint.load(out)
    assert state["step"] == 6 and state["data_fingerprint"] == bins.fingerprint(settings["data"])
    assert json.loads((out / "config.json").read_text()) == state["config"] | {
        "op_set": state["kernels"], "data_fingerprint": state["data_fingerprint"]
    }  # fmt: skip
    assert "optimizer" not in checkpoint.load(out / "milestone_2.pt")


def test_exactly_max_steps_updates_are_made_and_the_last_is_saved(settings, monkeypatch):
    calls, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (calls.append(1), step(self, *a)))
    run(settings, max_steps=5)
    assert len(calls) == 5 and checkpoint.load(settings["out_dir"])["step"] == 5


def test_one_batch_is_memorized(tmp_path, settings):
    data = write_dataset(tmp_path / "one", rows=32, length=32)
    n = bins.Bin(data / "train.bin", 31, 17).n_windows
    rows = run(settings, data=str(data), dim=64, batch_size=n, micro_batch_size=n, max_steps=150,
               schedule="cosine", log_interval=50)  # fmt: skip
    assert losses(rows)[0] > 2.5 and losses(rows)[-1] < 0.03


def test_accumulation_gives_the_gradient_and_loss_of_the_whole_batch(settings, tmp_path):
    one = run(settings, max_steps=3, grad_clip=0.1)
    four = run(settings, max_steps=3, grad_clip=0.1, micro_batch_size=2, out_dir=str(tmp_path / "b"))
    for a, b in zip(one[1:], four[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_the_logged_loss_and_norm_are_those_of_the_full_batch_before_the_update(settings):
    rows = run(settings, max_steps=1, micro_batch_size=2)
    config = from_dict(settings | {"max_steps": 1})
    torch.manual_seed(config.seed)
    model = Llama(config.model(), eager)
    train_bin = bins.Bin(Path(config.data) / "train.bin", config.seq_len, config.vocab_size)
    window = torch.from_numpy(train_bin.windows(bins.order(config.seed, 0, train_bin.n_windows)[:8]))
    loss = model(window[:, :-1], window[:, 1:])
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert rows[1]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert rows[1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0, 0.5, 4])
def test_targets_left_out_count_as_zero_in_the_gradients_and_not_at_all_in_the_logged_loss(settings, tmp_path, weight):
    one, four = (
        run(settings, max_steps=1, repeated_weight=float(weight), micro_batch_size=n, out_dir=str(tmp_path / str(n)))[1]
        for n in (8, 2)
    )
    config = from_dict(settings)
    torch.manual_seed(config.seed)
    model = Llama(config.model(), eager)
    train_bin = bins.Bin(Path(config.data) / "train.bin", config.seq_len, config.vocab_size)
    ids = train_bin.windows(bins.order(config.seed, 0, train_bin.n_windows)[:8]).tolist()
    seen = [[pair in pairs[:t] for t, pair in enumerate(pairs)] for pairs in (list(itertools.pairwise(row)) for row in ids)]
    chance = np.random.default_rng([config.seed, 0, 2]).random((8, config.seq_len))
    left_out = torch.from_numpy(
        np.where(seen, chance >= weight, (chance >= 1 / max(weight, 1)) & (np.arange(config.seq_len) > 0))
    )
    x, y = torch.tensor(ids)[:, :-1], torch.tensor(ids)[:, 1:]
    losses = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    loss = losses.masked_fill(left_out, 0).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert 0.1 < left_out.float().mean() < 0.9
    logged = losses[~left_out].mean().item()
    for row in (one, four):  # however the batch is split; sums in another order, in fp32
        assert row["loss"] == pytest.approx(logged, abs=1e-6) and row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_measuring_does_not_change_training(settings, tmp_path):
    run(settings, eval_interval=1, copy_eval_interval=2, seq_len=127)
    quiet = dict(eval_interval=0, copy_eval_interval=0, seq_len=127, out_dir=str(tmp_path / "quiet"))
    run(settings, **quiet)
    assert equal(weights(settings), weights(settings, **quiet))


@pytest.mark.parametrize(
    "extra",
    [{}, {"attn_dropout": 0.2, "schedule": "cosine", "repeated_weight": 4.0}, {"optimizer": "muon"}],
    ids=["plain", "dropout", "muon"],
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(settings, tmp_path, extra):
    whole = dict(out_dir=str(tmp_path / "whole"), max_steps=10, ckpt_interval=4) | extra
    rows = run(settings, **whole)
    (tmp_path / "run").mkdir()
    run(settings, **whole | {"out_dir": settings["out_dir"], "ckpt_keep": 9})
    cut = Path(settings["out_dir"])
    (cut / "ckpt_4.pt").replace(cut / "ckpt.pt")  # as after a kill past step 4
    again = run(settings, **whole | {"out_dir": settings["out_dir"]})
    assert equal(weights(settings), weights(settings, **whole))
    strip = lambda rows: [{k: r[k] for k in r if k not in ("ms", "tokens_per_s", "eta_s")} for r in rows]  # noqa: E731
    assert strip(again) == strip(rows)


def test_a_finished_run_is_left_as_it_is(settings):
    run(settings)
    before = (Path(settings["out_dir"]) / "ckpt.pt").stat().st_mtime_ns
    run(settings)
    assert (Path(settings["out_dir"]) / "ckpt.pt").stat().st_mtime_ns == before


def test_resume_refuses_other_settings_and_other_data_by_name(settings, tmp_path):
    run(settings)
    before = (Path(settings["out_dir"]) / "ckpt.pt").read_bytes()
    with pytest.raises(UserError, match="seed 0 -> 1, .*learning_rate 0.01 -> 0.1"):
        run(settings, seed=1, learning_rate=0.1)
    with pytest.raises(UserError, match="the data in"):
        run(settings, data=str(write_dataset(tmp_path / "other", seed=5)))
    assert (Path(settings["out_dir"]) / "ckpt.pt").read_bytes() == before
    assert len(run(settings, max_steps=8, log_interval=2)) == 8  # rows 0..6 were there
    assert losses(run(settings, resume="none", seed=1, max_steps=2))[0] != losses(run(settings, resume="none", max_steps=2))[0]


def test_the_seed_decides_the_run_and_nothing_else_does(settings, tmp_path):
    runs = [run(settings, seed=s, out_dir=str(tmp_path / f"{i}")) for i, s in enumerate((0, 0, 1))]
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_a_loss_that_stays_non_finite_ends_the_run_and_never_reaches_the_parameters(settings, capsys):
    with pytest.raises(RunFailed, match="1[0-9] updates in a row .*--allow_changes=true"):
        run(settings, learning_rate=1e30, grad_clip=0.0, warmup_steps=0, max_steps=50, ckpt_interval=7)
    assert capsys.readouterr().out.count("update skipped") >= 10
    assert all(p.isfinite().all() for p in weights(settings).values())


def test_a_batch_that_does_not_fit_memory_is_refused_with_a_smaller_micro_batch(settings, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(train, "update", full)
    for micro, advice in {6: "--micro_batch_size=3, or a smaller model", 1: "a smaller model, or a smaller --seq_len"}.items():
        assert status(flags(settings, batch_size=6, micro_batch_size=micro)) == 2
        assert capsys.readouterr().err == f"out of memory; try {advice}\n"


def test_sigterm_saves_and_exits_with_3_and_the_run_goes_on(settings):
    endless = flags(settings, max_steps=100000, ckpt_interval=100000)
    process = subprocess.Popen([sys.executable, "train.py", *endless], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 3 and "the same command resumes there" in rest
    step = checkpoint.load(settings["out_dir"])["step"]
    assert 0 < step < 100000
    assert len(run(settings, max_steps=step + 2, ckpt_interval=100000)) == step + 3


def test_learning_rate_at_its_edges():
    c = Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, schedule="cosine")
    at = lambda step, c=c: learning_rate(step, c)  # noqa: E731
    assert (at(1), at(5), at(10)) == (0.1, 0.5, 1.0)
    assert at(60) == pytest.approx(0.55) and at(110) == pytest.approx(0.1) and at(111) == pytest.approx(0.1)
    none = Config(learning_rate=1.0, warmup_steps=0, max_steps=10, schedule="cosine")
    assert at(1, none) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    only = Config(learning_rate=1.0, warmup_steps=10, max_steps=10, schedule="cosine")
    assert at(10, only) == 1.0 and at(11, only) == 0.0
    short = Config(learning_rate=1.0, warmup_steps=2000, max_steps=2, schedule="wsd")
    assert (at(1, short), at(2, short)) == (1 / 2000, 2 / 2000)
    flat = Config(learning_rate=1.0, warmup_steps=2, max_steps=10)
    assert {at(s, flat) for s in range(2, 11)} == {1.0}
    wsd = Config(learning_rate=1.0, warmup_steps=2, max_steps=10, schedule="wsd")
    assert [at(s, wsd) for s in (2, 8, 9, 10)] == [1.0, 1.0, 0.5, 0.0]


def test_dropout_seeds_depend_on_the_position_in_the_run_alone():
    config = Config(attn_dropout=0.1, batch_size=8)
    cpu = torch.device("cpu")
    whole = train.dropout_seeds(config, 16, 8, cpu)
    parts = torch.cat([train.dropout_seeds(config, i, 2, cpu) for i in range(16, 24, 2)])
    assert torch.equal(whole, parts) and len(set(whole.tolist())) == 8
    assert not torch.equal(whole, train.dropout_seeds(config, 24, 8, cpu))
    assert train.dropout_seeds(Config(), 0, 8, cpu) is None


def test_bins_without_a_meta_train(settings, tmp_path):
    for split in SPLITS:
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{split}.bin").write_bytes((Path(settings["data"]) / f"{split}.bin").read_bytes())
    rows = run(settings, data=str(tmp_path / "plain"))
    assert "val_loss" in rows[3] and "val_bpb" not in rows[3]


def test_compiled_blocks_give_the_same_losses(settings, tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, with no code generated: that would need a C++ compiler and a minute."""
    calls, compile = [], torch.compile  # Module.compile calls it too
    monkeypatch.setattr(torch, "compile", lambda f, **kw: (calls.append(f), compile(f, backend="aot_eager", **kw))[1])
    plain = run(settings, max_steps=3)
    assert not calls
    compiled = run(settings, max_steps=3, compile="auto", out_dir=str(tmp_path / "compiled"))
    assert len(calls) == 1 + settings["n_layers"]  # whether it works, and each block
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert weights(settings).keys() == weights(settings, out_dir=str(tmp_path / "compiled")).keys()


def test_a_resume_that_ends_before_its_first_row_leaves_the_row_of_its_checkpoint(settings, monkeypatch):
    before = run(settings)

    def fail(*_):
        raise UserError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_blocks", fail)
        with pytest.raises(UserError, match="no compiler"):
            run(settings, max_steps=8)
    assert metrics.read(Path(settings["out_dir"]) / "metrics.jsonl") == before
    assert run(settings, max_steps=8)[: len(before)] == before


@pytest.mark.parametrize("compile", ["auto", "on"])
def test_without_a_working_compiler_auto_goes_on_and_on_is_refused_in_one_line(settings, tmp_path, compile):
    env = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = cli(*flags(settings, compile=compile), env=env)
    said = done.stderr if compile == "on" else next(line for line in done.stdout.splitlines() if "warning" in line)
    assert "torch.compile does not work" in said and "/no/such/compiler" in said
    if compile == "on":
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--compile=off" in done.stderr
    else:
        assert done.returncode == 0 and checkpoint.load(settings["out_dir"])["step"] == settings["max_steps"]


def test_bf16_activations_train_fp32_weights(settings):
    rows = run(settings, dtype="bf16", max_steps=3)
    assert all(p.dtype == torch.float32 for p in weights(settings).values()) and losses(rows)[-1] < losses(rows)[0]


MISTAKES = {
    "no data": (lambda s, t: flags(s, data=t / "none"), ["train.bin", "not found", "python -m data.prepare"]),
    "typo": (lambda s, t: flags(s) + ["--lerning_rate=1"], ["lerning_rate", "learning_rate"]),
    "vocabulary": (lambda s, t: flags(s, vocab_size=16), ["vocab_size=16", "--vocab_size=17"]),
    "heads": (lambda s, t: flags(s, n_heads=3), ["dim=16", "n_heads=3"]),
    "short context": (lambda s, t: flags(s, copy_eval_interval=1), ["seq_len=31", "too short", "54"]),
    "micro batch": (
        lambda s, t: flags(s, micro_batch_size=3),
        ["micro_batch_size=3", "8 sequences", "pass --micro_batch_size=2"],
    ),
    "no checkpoint": (lambda s, t: flags(s, resume=t / "x.pt"), ["x.pt", "no such file or folder"]),
    "empty resume": (lambda s, t: flags(s, resume=""), ["resume=: expected auto, none or a checkpoint file"]),
    "device": (lambda s, t: flags(s, device="cudda"), ["device=cudda", "auto, cuda, mps or cpu"]),
    "memory": (lambda s, t: flags(s, dim=2**21, n_heads=2), ["dim=2097152", "out of memory", "a smaller model"]),
    "batch": (lambda s, t: flags(s, batch_size=1e8), ["batch_size=100000000", "only 361 sequences"]),
    "out_dir": (
        lambda s, t: flags(s, out_dir=f"{s['data']}/train.bin/run"),
        ["train.bin/run: Not a directory; name another --out_dir"],
    ),
    "data file": (lambda s, t: flags(s, data=f"{s['data']}/train.bin"), ["is a file", "--data="]),
    "long window": (lambda s, t: flags(s, seq_len=10**6), ["tokens", "--seq_len="]),
}


def status(argv):
    """Returns the exit status of train.py, in this process."""
    return run_command(lambda argv: train.main(load(argv)), argv)


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_ends_with_status_2_and_one_line_and_writes_nothing(settings, tmp_path, capsys, name):
    make, words = MISTAKES[name]
    assert status(make(settings, tmp_path)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not Path(settings["out_dir"]).exists()


def test_missing_data_is_refused_with_the_command_that_makes_it(settings, tmp_path, capsys):
    folder = tmp_path / "no data"
    for prepare, advice in {
        "files it's.txt --repeat=0.1": f"make it with: python -m data.prepare files it's.txt --repeat=0.1 --out='{folder}'",
        "": "prepare data first: python -m data.prepare --help, or try the demo: make demo",
    }.items():
        assert status(flags(settings, data=folder, prepare=prepare)) == 2
        assert capsys.readouterr().err == f"{folder}/train.bin: not found; {advice}\n"


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_refused_run_leaves_an_empty_folder_that_was_there(settings, tmp_path, capsys, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert status(flags(settings, out_dir=tmp_path / kind, vocab_size=16)) == 2
    assert "pass --vocab_size=17" in capsys.readouterr().err
    assert (tmp_path / kind).is_dir() and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", ["0 bytes"]), (b"abc", ["3 bytes"]), (b"\xff\xff" * 400, ["65535", "--vocab_size=65536"])],
    ids=["empty", "odd", "ids"],
)
def test_a_bad_bin_ends_with_status_2_and_one_line(settings, tmp_path, capsys, data, words):
    (tmp_path / "bad").mkdir()
    for split in SPLITS:
        (tmp_path / "bad" / f"{split}.bin").write_bytes(data)
    assert status(flags(settings, data=tmp_path / "bad")) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and not (Path(settings["out_dir"]) / "ckpt.pt").exists()
    for word in words:
        assert word in error


@pytest.mark.parametrize("name", ["out_dir", "data", "batch_size", "micro_batch_size"])
def test_what_cannot_work_is_refused_before_the_model_is_built(settings, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    wrong = {"out_dir": tmp_path / "file", "data": tmp_path / "file", "batch_size": 10**8, "micro_batch_size": 3}
    monkeypatch.setattr(train, "Llama", None)
    assert status(flags(settings, **{name: wrong[name]})) == 2


def test_a_run_works_from_another_folder(settings, tmp_path):
    assert cli(*flags(settings, max_steps=1, eval_interval=0), cwd=tmp_path).returncode == 0
    started = time.perf_counter()
    done = cli("configs/tiny.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("configs/tiny.py: no such config file")
    assert len(done.stderr.splitlines()) == 1
    assert time.perf_counter() - started < 2  # refused before torch is imported


@pytest.mark.parametrize(
    "command", [["train.py"], ["eval_copy.py", "nowhere"], ["reproduce.py", "a"], ["-m", "runtime.plots", "x"]]
)
def test_ctrl_c_during_the_imports_ends_with_130_and_one_line(settings, command):
    argv = [*command, *(flags(settings) if command == ["train.py"] else [])]
    process = subprocess.Popen([sys.executable, "-X", "importtime", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # of the modules imported
        if any(module in line for module in ("torch._C", "torch.version", "matplotlib._api")):
            break
    process.send_signal(signal.SIGINT)
    rest = [line for line in process.communicate(timeout=60)[1].splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130 and rest == ["interrupted"]


def test_other_files_in_the_run_folder_do_not_disturb_it(settings):
    run(settings, max_steps=3)
    out = Path(settings["out_dir"])
    (out / "ckpt_best.pt").write_bytes(b"mine")
    (out / "milestone_x.pt").write_bytes(b"mine too")
    assert len(losses(run(settings))) == 6 and (out / "ckpt_best.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("line", ['{"step": 2, "lo\x00', "[1]", "{}", "\xff"])
def test_a_damaged_row_of_measurements_is_named_on_resume(settings, capsys, line):
    run(settings, max_steps=3)
    path = Path(settings["out_dir"]) / "metrics.jsonl"
    rows = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([rows[0], line.encode("latin-1"), *rows[2:]]) + b"\n")
    assert status(flags(settings)) == 2
    assert capsys.readouterr().err == f"{path}:2: not a row of measurements; remove this line\n"
    path.write_bytes(b"\n".join([rows[0], *rows[2:]]) + b"\n")
    assert status(flags(settings)) == 0


def test_settings_of_the_optimizer_change_on_request_and_the_change_is_recorded(settings, tmp_path, capsys):
    """A run at a constant rate is cooled down from one of its checkpoints."""
    run(settings, max_steps=4, ckpt_interval=2)
    cool = dict(schedule="cosine", learning_rate=2e-2, attn_dropout=0.5, weight_decay=0.1, grad_clip=0.5, warmup_steps=0)
    assert status(flags(settings, max_steps=8, **cool)) == 2
    error = capsys.readouterr().err
    assert "schedule constant -> cosine" in error
    assert "; pass --allow_changes=true to change them from here on, set them back, name another --out_dir, or" in error
    assert status(flags(settings, max_steps=8, seed=1, **cool)) == 2
    assert "; set them back, name another --out_dir, or" in capsys.readouterr().err
    assert status(flags(settings, max_steps=8, allow_changes="true", seed=1, **cool)) == 2  # not what decides the data
    assert "seed 0 -> 1" in capsys.readouterr().err
    rows = run(settings, max_steps=8, allow_changes=True, **cool)
    changed = next(row["changed"] for row in rows if "changed" in row)
    assert changed.keys() == cool.keys() | {"max_steps"} and changed["schedule"] == ["constant", "cosine"]
    assert rows[-1]["lr"] == 0 and [row["step"] for row in rows] == list(range(9))
    saved = json.loads((Path(settings["out_dir"]) / "config.json").read_text())
    assert saved["allow_changes"] is True and saved["schedule"] == "cosine"
    assert "schedule constant -> cosine" in capsys.readouterr().out
    assert len(run(settings, max_steps=9, **cool)) == 10  # once changed, it is the run's own setting


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_more_steps_are_reported_and_recorded_where_the_learning_rate_depends_on_them(settings, capsys, schedule):
    run(settings, schedule=schedule, max_steps=3)
    rows = run(settings, schedule=schedule, max_steps=9)
    said = "changed from here on: max_steps 3 -> 9" in capsys.readouterr().out
    assert said == (rows[3].get("changed") == {"max_steps": [3, 9]}) == (schedule != "constant")


def test_a_change_that_never_took_effect_is_not_recorded(settings, monkeypatch):
    """A resume with other settings is killed before its first checkpoint, and the next resume has the old settings again."""
    run(settings, max_steps=3)
    path = Path(settings["out_dir"]) / "ckpt.pt"
    before = path.read_bytes()
    assert "grad_clip" in run(settings, max_steps=4, grad_clip=0.5, allow_changes=True)[3]["changed"]
    path.write_bytes(before)
    rows = run(settings, max_steps=4)
    assert rows[-1]["step"] == 4 and not any("changed" in row for row in rows)


def test_a_resume_does_not_remove_checkpoints_that_the_run_asked_to_keep(settings, tmp_path, capsys):
    run(settings, ckpt_interval=1, ckpt_keep=1000)
    out = Path(settings["out_dir"])
    assert status(flags(settings, max_steps=8)) == 2
    assert capsys.readouterr().err == (
        f"ckpt_keep=2: {out} holds 6 checkpoints, kept with ckpt_keep=1000; pass --ckpt_keep=1000, or remove them\n"
    )
    assert status(flags(settings)) == 0  # nothing is left to do, and nothing would be removed
    assert len(list(out.glob("ckpt_*.pt"))) == 6
    run(settings, max_steps=8, ckpt_keep=7)
    assert status(flags(settings, max_steps=8, resume=out, out_dir=tmp_path / "other")) == 0
    for step in range(1, 6):
        (out / f"ckpt_{step}.pt").unlink()
    run(settings, max_steps=9)


def test_the_op_set_is_recorded_and_a_resume_that_changes_it_says_so(settings, monkeypatch, capsys):
    run(settings, max_steps=2, kernels="eager")
    assert checkpoint.load(settings["out_dir"])["config"]["kernels"] == "eager"
    other = type(sys)("kernels.fused")
    other.__dict__.update({name: f for name, f in vars(eager).items() if not name.startswith("__")})
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: other)
    run(settings, max_steps=3)
    assert capsys.readouterr().out.count("eager kernels made this checkpoint; the run continues with fused") == 1


def test_the_table_of_tiles_is_recorded_and_a_resume_that_changes_it_says_so(settings, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "describe", lambda ops, device: "fused, tiles of sm_80")
    run(settings, max_steps=2)
    assert checkpoint.load(settings["out_dir"])["kernels"] == "fused, tiles of sm_80"
    assert json.loads((Path(settings["out_dir"]) / "config.json").read_text())["op_set"] == "fused, tiles of sm_80"
    monkeypatch.setattr(kernels, "describe", lambda ops, device: "fused, tiles of sm_90")
    run(settings, max_steps=3)
    changed = "fused, tiles of sm_80 kernels made this checkpoint; the run continues with fused, tiles of sm_90"
    assert capsys.readouterr().out.count(changed) == 1
    run(settings, max_steps=4)
    assert "made this checkpoint" not in capsys.readouterr().out


def test_fp16_with_a_loss_scale_trains_as_fp32_does(settings, tmp_path):
    """One batch over and over. AdamW's first updates have the size of the learning rate in each parameter, also where fp16
    decides the sign of a small gradient, so the curves may part by less than an update gains; where they flatten they meet
    again.
    """
    data = write_dataset(tmp_path / "one", rows=12, length=32)
    n = bins.Bin(data / "train.bin", 31, 17).n_windows
    same = dict(data=str(data), batch_size=n, micro_batch_size=n, max_steps=30, eval_interval=0)
    fp32 = losses(run(settings, **same))
    rows = run(settings, **same, dtype="fp16", out_dir=str(tmp_path / "fp16"))
    gain = max(a - b for a, b in itertools.pairwise(fp32))
    assert losses(rows) == pytest.approx(fp32, abs=gain) and fp32[-1] < fp32[0] - 1 and gain < 0.15
    assert rows[-1]["loss_scale"] == 2**16 and rows[-1]["overflows"] == 0
    assert all(p.dtype == torch.float32 for p in weights(settings, out_dir=str(tmp_path / "fp16")).values())


def without_times(rows):
    return [{k: row[k] for k in row if k not in ("ms", "tokens_per_s", "eta_s")} for row in rows]


def test_an_fp16_overflow_is_counted_without_a_warning_and_a_resume_keeps_scale_and_count(
    settings, monkeypatch, capsys, tmp_path
):
    """A scale of 2^30 overflows fp16's 65,504; halved after each update, it fits when it is near 2^16."""
    init = LossScale.__init__
    monkeypatch.setattr(LossScale, "__init__", lambda self, *args: (init(self, *args), self.scale.fill_(2.0**30))[0])
    monkeypatch.setattr(LossScale, "GROWTH", 3)
    whole = dict(dtype="fp16", max_steps=24, ckpt_interval=8, attn_dropout=0.1)
    rows = run(settings, **whole)
    assert rows[1]["overflows"] == 1 and "grad_norm" not in rows[1] and rows[2]["loss_scale"] == 2**29
    assert 8 < rows[-1]["overflows"] < 24 and "skipped" not in rows[-1] and "warning" not in capsys.readouterr().out
    out = Path(settings["out_dir"])
    expected = weights(settings)
    (out / "ckpt_16.pt").replace(out / "ckpt.pt")
    monkeypatch.setattr(LossScale, "__init__", init)
    assert without_times(run(settings, **whole)) == without_times(rows) and equal(weights(settings), expected)


def test_dtype_auto_resumes_in_the_dtype_of_the_checkpoint(settings, capsys):
    run(settings, max_steps=2, dtype="fp16", ckpt_interval=2)
    run(settings, max_steps=3)
    assert "parameters, in fp16 on 1 x cpu" in capsys.readouterr().out.split("resuming")[1]
    assert checkpoint.load(settings["out_dir"])["config"]["dtype"] == "fp16"
    with pytest.raises(UserError, match="dtype fp16 -> fp32"):
        run(settings, max_steps=4, dtype="fp32")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gradients_that_stay_non_finite_end_the_run_once_no_smaller_scale_helps(settings, monkeypatch, dtype):
    """The loss is finite. 16 updates halve the scale of fp16 from 2^16 to 1, and ten more count."""
    backward = torch.Tensor.backward
    embed = lambda run: run.model.embed.weight.grad.fill_(math.inf)  # noqa: E731
    made = []
    init = train.Run.__init__
    monkeypatch.setattr(train.Run, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (backward(self), embed(made[-1]))[0])
    with pytest.raises(RunFailed, match=f"step {26 if dtype == 'fp16' else 10}: 10 updates in a row"):
        run(settings, dtype=dtype, max_steps=50, eval_interval=0)
    state = checkpoint.load(settings["out_dir"])
    assert state["skipped"] == 10 and state["overflows"] == (16 if dtype == "fp16" else 0)


def test_fused_kernels_give_the_losses_of_eager(settings, tmp_path):
    """At the demo's head dim; on a CPU in Triton's interpreter, which takes seconds a step: one short row a batch."""
    same = settings | dict(dim=64, n_layers=1, n_heads=4, batch_size=1, micro_batch_size=1, max_steps=3, eval_interval=0)
    eager_losses = losses(run(same))
    fused_losses = losses(run(same, kernels="fused", out_dir=str(tmp_path / "fused")))
    assert len(fused_losses) == 3 and fused_losses == pytest.approx(eager_losses, abs=1e-4)
    assert fused_losses != eager_losses  # or the same ops ran twice
