"""A run survives what happens to it: killed, its files damaged, its disk full, its data changed. `make soak` tries more."""

import copy
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import ROOT, from_dict
from data import bins
from data.meta import TOKEN
from errors import UserError
from runtime import checkpoint, distributed, metrics, rundir
from runtime.resume import newest
from tests import faults
from tests.conftest import children, write_dataset
from tests.faults import fault

TIMES = ("ms", "tokens_per_s", "eta_s")


@pytest.fixture
def long(settings):
    """A run of about a second that saves often."""
    return settings | dict(max_steps=120, ckpt_interval=3, eval_interval=20, attn_dropout=0.1)


def result(settings):
    """What a run leaves: all that its checkpoint holds, and its rows without the times."""
    state = checkpoint.load(settings["out_dir"])
    rows = metrics.read(Path(settings["out_dir"]) / "metrics.jsonl")
    return state, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """What a run with these settings leaves when nothing happens to it; each is made once."""
    made = {}

    def of(settings):
        key = str({name: value for name, value in settings.items() if name != "out_dir"})
        if key not in made:
            whole = settings | {"out_dir": str(tmp_path_factory.mktemp("whole") / "run")}
            assert faults.run(whole) == 0
            made[key] = result(whole)
        return made[key]

    return of


def equals(settings, expected):
    """Whether the run, now finished, has the parameters, moments and rows of the one that was never disturbed."""
    (state, rows), (whole, whole_rows) = result(settings), expected
    return all(same(state[k], whole[k]) for k in ("model", "optimizer", "step")) and rows == whole_rows


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_run(long, tmp_path, uninterrupted, kills):
    expected = uninterrupted(long)
    rng, n = random.Random(0), 0
    while n < kills:
        out = long | {"out_dir": str(tmp_path / f"killed{n}")}
        process = faults.start(out)
        while n < kills:
            process.join(rng.uniform(0.05, 1.0))
            if process.exitcode is not None:
                break
            with fault("SIGKILL at a random moment"):
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL
                n += 1
                process = faults.start(out)
        process.join(60)
        assert process.exitcode == 0 and equals(out, expected)


@pytest.mark.parametrize("call", ["fsync", "replace", "link", "unlink"])
@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 3, 8))])
def test_a_run_killed_while_it_writes_and_resumed_equals_an_uninterrupted_run(long, uninterrupted, call, count):
    short = long | {"max_steps": 30}
    expected = uninterrupted(short)
    with fault("SIGKILL within a checkpoint's write"):
        assert faults.run(short, functools.partial(faults.kill_at, call, count)) == -signal.SIGKILL
        assert faults.run(short) == 0 and equals(short, expected)
        assert not list(Path(short["out_dir"]).glob("*.tmp"))


@pytest.mark.parametrize("number, passes", [(signal.SIGTERM, 8), (signal.SIGINT, 1)])
@pytest.mark.parametrize("most", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_stopped_by_signals_and_resumed_equals_an_uninterrupted_run(long, uninterrupted, number, passes, most):
    long = long | {"micro_batch_size": 8 // passes}
    expected, rng, stops = uninterrupted(long), random.Random(passes), 0
    process = faults.start(long)
    while process.exitcode is None:
        process.join(rng.uniform(0.1, 0.6))
        log = faults.log_of(long)
        if stops < most and process.exitcode is None and log.exists() and "step" in log.read_text():
            with fault("stopped by a signal"):
                os.kill(process.pid, number)
                process.join(20)
                assert process.exitcode in (3, 0)  # 0: it was leaving anyway
                stops += process.exitcode == 3
                log.unlink()
                process = faults.start(long)
    assert process.exitcode == 0 and stops > 0 and equals(long, expected)


@pytest.mark.parametrize("max_steps", [6, 3], ids=["on the way", "at the last step"])
def test_a_signal_cuts_the_copy_test_short_and_resume_makes_up_for_it(settings, uninterrupted, max_steps):
    settings = settings | {"copy_eval_interval": 3, "seq_len": 63, "max_steps": max_steps, "ckpt_keep": 9}
    settings |= {"ckpt_milestones": True, "milestone_interval": 3}
    expected = uninterrupted(settings)
    process = faults.start(settings, faults.slow_copy_test)
    rows = Path(settings["out_dir"]) / "metrics.jsonl"
    wait_for(lambda: rows.exists() and len(metrics.read(rows)) == 3)  # steps 0, 1 and 2: step 3 is being measured
    time.sleep(0.3)
    with fault("signal within an evaluation"):
        started = time.monotonic()
        process.terminate()
        process.join(30)
        assert process.exitcode == 3 and time.monotonic() - started < 10
        assert checkpoint.load(settings["out_dir"])["step"] == 3 and not metrics.is_evaluated(metrics.read(rows)[3])
        assert faults.run(settings) == 0 and equals(settings, expected)
        assert checkpoint.load(rows.with_name("ckpt_3.pt"))["step"] == 3
        assert checkpoint.load(rows.with_name("milestone_3.pt"))["step"] == 3


def strike(processes, settings, said: str, number=signal.SIGTERM) -> list[int]:
    """Sends a signal to all ranks once the log says so; the exit statuses."""
    log = faults.log_of(settings)
    wait_for(lambda: log.exists() and said in log.read_text())
    time.sleep(0.1)
    for process in processes:
        os.kill(process.pid, number)
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# Where a run is struck before its first update has been made: what makes it slow there, and what its log says by then.
EARLY = {
    "validation of step 0": (faults.slow_validation, "validating"),
    "micro-batches of step 1": (faults.slow_micro_batches, "micro-batch"),
}


@pytest.mark.parametrize(
    "number, ranks",
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2), pytest.param(signal.SIGINT, 2, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("name", EARLY)
def test_a_run_stopped_before_the_first_update_and_started_again_equals_an_uninterrupted_run(
    settings, uninterrupted, name, number, ranks
):
    settings = settings | {"micro_batch_size": 2}
    slow, said = EARLY[name]
    if ranks == 1:
        expected = uninterrupted(settings)
    else:
        whole = settings | {"out_dir": settings["out_dir"] + "-whole"}
        assert join(faults.start_ranks(whole, 2)) == [0, 0]
        expected = result(whole)
    with fault(f"stopped before step 1, {ranks} ranks"):
        started = faults.start_ranks(settings, 2, slow) if ranks == 2 else [faults.start(settings, slow)]
        assert strike(started, settings, said, number) == [3] * ranks
        assert "stopped before the first update" in faults.log_of(settings).read_text()
        assert not list(Path(settings["out_dir"]).glob("*.pt"))
        assert join(faults.start_ranks(settings, 2) if ranks == 2 else [faults.start(settings)]) == [0] * ranks
        assert equals(settings, expected)


def join(processes) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("delays", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_after_sigterm_at_any_time_during_startup_the_same_command_runs(settings, uninterrupted, delays, ranks):
    """While it starts, SIGTERM ends it by itself: nothing is there yet. Later it stops as asked. If one of two ranks was ended
    by itself, the other fails for want of its peer.
    """
    start = (lambda: faults.start_ranks(settings, 2)) if ranks == 2 else (lambda: [faults.start(settings)])
    for i in range(delays):
        processes = start()
        time.sleep(0.3 * ranks * i / delays)
        with fault(f"SIGTERM at once after launch, {ranks} ranks"):
            for process in processes:
                process.terminate()
            assert {*join(processes)} <= {0, 3, -signal.SIGTERM, *([1] if ranks == 2 else [])}
    assert join(start()) == [0] * ranks
    if ranks == 1:
        assert equals(settings, uninterrupted(settings))
    assert checkpoint.load(settings["out_dir"])["step"] == settings["max_steps"]


def test_a_checkpoint_of_step_0_without_moments_is_resumed(settings, uninterrupted):
    """Versions before this one saved one where a signal came before the first update."""
    expected = uninterrupted(settings)
    assert faults.run(settings | {"max_steps": 1}) == 0
    path = Path(settings["out_dir"]) / "ckpt.pt"
    run = train.Run(from_dict(settings | {"resume": "none"}), distributed.World(0, 1, torch.device("cpu")))
    checkpoint.save(path, checkpoint.load(path) | {"model": run.model.state_dict(), "optimizer": {}, "step": 0})
    assert faults.run(settings) == 0 and equals(settings, expected)


@pytest.mark.parametrize("seconds", [3, pytest.param(40, marks=pytest.mark.soak)])
def test_all_ranks_wait_until_the_checkpoint_of_a_stopped_run_is_saved(long, seconds):
    long = long | {"max_steps": 10**6, "ckpt_interval": 10**6, "log_interval": 1}
    with fault("SIGTERM to two ranks, slow save"):
        ranks = faults.start_ranks(long, 2, functools.partial(faults.slow_save, seconds))
        log = faults.log_of(long)
        wait_for(lambda: log.exists() and "step  " in log.read_text())
        for process in ranks:
            process.terminate()
        wait_for(lambda: "saving" in log.read_text())
        time.sleep(seconds / 2)
        assert [process.exitcode for process in ranks] == [None, None]
        assert join(ranks) == [3, 3] and checkpoint.load(long["out_dir"])["step"] > 0


def test_an_error_of_one_rank_is_reported_while_its_peers_are_inside_a_collective(settings):
    with fault("one of two ranks fails"):
        started = time.monotonic()
        ranks = faults.start_ranks(settings, 2, of_rank_0=faults.no_save)
        status = join(ranks)
        assert status[0] == 2 and status[1] != 0 and time.monotonic() - started < 60
        lines = faults.log_of(settings).read_text().splitlines()
        assert f"rank 0: {settings['out_dir']}/ckpt.pt: Input/output error" in lines
        assert not any(line.startswith("Traceback") for line in lines)


def test_an_id_beyond_the_vocabulary_that_one_rank_alone_reads_is_reported_by_it(settings, tmp_path):
    data = write_dataset(tmp_path / "set")
    tokens = np.fromfile(data / "train.bin", TOKEN)
    tokens[bins.order(0, 0, (len(tokens) - 1) // 31)[4 + 1] * 31 + 5] = 60000  # in rank 1's share of the first batch
    tokens.tofile(data / "train.bin")
    settings = settings | {"data": str(data), "eval_interval": 0}
    with fault("unknown id in one rank's share"):
        assert join(faults.start_ranks(settings, 2))[1] == 2
        lines = faults.log_of(settings).read_text().splitlines()
        assert [line.split(";")[0] for line in lines if "token id" in line] == [
            f"rank 1: {data}/train.bin: token id 60000, but vocab_size=17"
        ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc, which Linux has")
def test_a_run_that_a_signal_stopped_is_not_restarted_by_torchrun(long):
    long = long | {"max_steps": 10**6}
    launcher = launch(long, "--nproc_per_node=2", "--standalone", "--max-restarts=1")
    wait_for((Path(long["out_dir"]) / "ckpt.pt").exists)
    with fault("ranks stopped under torchrun"):
        for pid in children(launcher.pid):
            os.kill(pid, signal.SIGTERM)
        output = launcher.communicate(timeout=120)[0]
        assert launcher.returncode != 0 and "exitcode  : 3" in output and "resuming" not in output
        assert "a signal stopped this run; it is not restarted" in output


def test_two_runs_do_not_write_to_one_folder(long):
    first = faults.start(long | {"max_steps": 10**6})
    rows = Path(long["out_dir"]) / "metrics.jsonl"
    wait_for(lambda: rows.exists() and len(rows.read_text()) > 1000)
    with fault("two runs into one folder"):
        assert faults.run(long) == 2
        last = faults.log_of(long).read_text().split("process ")[1]
        assert last.startswith(f"{first.pid} is training there")
        first.terminate()
        first.join(30)
        assert first.exitcode == 3
    steps = [row["step"] for row in metrics.read(rows)]
    assert steps == list(range(len(steps)))


def test_a_new_run_never_mixes_with_an_older_one(settings, capsys):
    assert faults.run(settings | {"ckpt_milestones": True}) == 0
    out = Path(settings["out_dir"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("run.")}
    with fault("new run into an older one's folder"):
        assert faults.run(settings | {"resume": "none", "max_steps": 4, "ckpt_interval": 2, "seed": 1}) == 0
        moved = {path.name: path.read_bytes() for path in (out / "previous-1").iterdir()}
        assert moved == before and str(out / "previous-1") in faults.log_of(settings).read_text()
        assert sorted(path.name for path in out.glob("*.pt")) == ["ckpt.pt", "ckpt_2.pt", "ckpt_4.pt"]
        assert [row["step"] for row in metrics.read(out / "metrics.jsonl")] == list(range(5))


def test_going_back_to_an_older_checkpoint_keeps_what_came_after_it(settings):
    assert faults.run(settings | {"ckpt_interval": 2}) == 0
    out = Path(settings["out_dir"])
    names = ("ckpt.pt", "ckpt_6.pt", "config.json", "metrics.jsonl")
    before = {name: (out / name).read_bytes() for name in names}
    with fault("older checkpoint resumed"):
        back = settings | {"resume": str(out / "ckpt_4.pt"), "ckpt_interval": 2, "max_steps": 5}
        assert faults.run(back) == 0
        assert {path.name: path.read_bytes() for path in (out / "previous-1").iterdir()} == before
        assert sorted(path.name for path in out.glob("*.pt")) == ["ckpt.pt", "ckpt_4.pt", "ckpt_5.pt"]
        assert [row["step"] for row in metrics.read(out / "metrics.jsonl")] == list(range(6))
        # the newest checkpoint by its other name, and an ordinary resume with rows after its checkpoint: nothing is moved
        (out / "metrics.jsonl").open("a").write('{"step": 6, "tokens": 0}\n')
        assert faults.run(back | {"resume": str(out / "ckpt_5.pt"), "max_steps": 6}) == 0
        (out / "metrics.jsonl").open("a").write('{"step": 7, "tokens": 0}\n')
        assert faults.run(settings | {"max_steps": 7}) == 0
        assert [path.name for path in out.glob("previous-*")] == ["previous-1"]


def test_a_run_that_resumes_from_another_folder_moves_aside_what_lies_in_its_own(settings, tmp_path, uninterrupted):
    source = settings | {"out_dir": str(tmp_path / "source"), "max_steps": 3}
    assert faults.run(source) == faults.run(settings | {"seed": 1, "max_steps": 4}) == 0
    out = Path(settings["out_dir"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("run.")}
    with fault("run resumed into an older one's folder"):
        assert faults.run(settings | {"resume": source["out_dir"]}) == 0  # a run directory stands for its ckpt.pt
        assert {path.name: path.read_bytes() for path in (out / "previous-1").iterdir()} == before
    (state, rows), (whole, whole_rows) = result(settings), uninterrupted(settings)
    assert same(state["model"], whole["model"]) and rows[1:] == whole_rows[4:]
    assert rows[0]["step"] == 3 and rows[0]["val_loss"] == whole_rows[3]["val_loss"]


def test_a_restart_resumes_its_own_checkpoint_and_before_there_is_one_what_was_asked_for(settings, tmp_path, monkeypatch):
    source, out = tmp_path / "source", Path(settings["out_dir"])
    for folder in (source, out):
        assert faults.run(settings | {"out_dir": str(folder), "max_steps": 3}) == 0
    world, fingerprint = distributed.World(0, 1, torch.device("cpu")), bins.fingerprint(settings["data"])

    def resumed(resume):
        return newest(from_dict(settings | {"resume": str(resume)}), fingerprint, world)[0]

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    asked = {"auto": out / "ckpt.pt", "none": None, source: source / "ckpt.pt"}
    for count, state in (("0", "begun"), ("1", "starting"), ("1", "begun")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        rundir.record(out, state)
        for resume, path in asked.items():
            assert resumed(resume) == (out / "ckpt.pt" if (count, state) == ("1", "begun") else path)
    for path in out.glob("*.pt"):
        path.unlink()
    assert resumed("none") is None and resumed(source) == source / "ckpt.pt"


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_stopped_run_says_which_command_resumes_it(long, resume):
    long = long | {"max_steps": 10**6, "resume": resume}
    process = faults.start(long)
    assert strike([process], long, "step  ") == [3]
    command = "the same command resumes there" if resume == "auto" else "the same command without --resume resumes there"
    assert faults.log_of(long).read_text().endswith(f": {command}\n")


def test_several_non_finite_updates_in_a_row_end_the_run_and_the_next_start_gets_past_them(settings, tmp_path):
    data = write_dataset(tmp_path / "set")
    settings = settings | dict(data=str(data), vocab_size=18, max_steps=16, eval_interval=0, log_interval=4)
    poison(settings, data, *range(3 * 8, 14 * 8, 8))  # a window in each batch of the steps 4 to 14
    with fault("non-finite loss in ten batches"):
        assert faults.run(settings) == 4
        log = faults.log_of(settings).read_text()
        assert log.count("update skipped") == 11 and "step 15: 11 updates in a row" in log.splitlines()[-1]
        assert faults.run(settings) == 0
        state, rows = result(settings)
        assert state["step"] == 16 and state["skipped"] == rows[-1]["skipped"] == 11


def test_a_second_sigint_ends_the_run_at_once(settings):
    """In the middle of a step that takes a minute, which the first one would wait for."""
    process = faults.start(settings, faults.slow_update)
    log = faults.log_of(settings)
    wait_for(lambda: log.exists() and "updating" in log.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == -signal.SIGINT


def poison(settings, data, *positions):
    """A checkpoint at step 1, with NaN for the embedding of a token that only the windows at these positions have."""
    assert faults.run(settings | {"max_steps": 1}) == 0
    path = Path(settings["out_dir"]) / "ckpt.pt"
    state = checkpoint.load(path)
    state["model"]["embed.weight"][17] = float("nan")
    checkpoint.save(path, state)
    tokens = np.fromfile(data / "train.bin", TOKEN)
    windows = bins.order(0, 0, (len(tokens) - 1) // 31)[list(positions)]
    tokens[windows * 31 + 5] = 17
    tokens.tofile(data / "train.bin")


def test_a_non_finite_loss_never_reaches_the_parameters_and_is_reported_with_its_batch(settings, tmp_path):
    """On two ranks, at step 3, in the second rank's share. The run goes on, also when it is resumed before that step."""
    settings = settings | dict(data=str(write_dataset(tmp_path / "set")), vocab_size=18, log_interval=100, eval_interval=0)
    settings |= {"out_dir": str(tmp_path / "a run")}
    poison(settings, tmp_path / "set", 2 * 8 + 4 + 1)
    with fault("non-finite loss"):
        output = run_launcher(settings, "--nproc_per_node=2", "--standalone")
        line = next(line for line in output.splitlines() if line.startswith("warning: step 3: loss nan"))
        assert "on rank 1, its batch" in line and "rank 0" not in line
        assert line.endswith(f"python -m data.bins '{settings['out_dir']}' --step 3")
        state, rows = result(settings)
        assert state["step"] == rows[-1]["step"] == 6 and state["skipped"] == rows[-1]["skipped"] == 1
        assert all(p.isfinite().all() for name, p in state["model"].items() if name != "embed.weight")
        assert all(m.isfinite().all() for moments in state["optimizer"].values() for m in moments.values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_that_is_left_out_changes_neither_parameters_nor_moments(settings, tmp_path, optimizer):
    settings = settings | dict(data=str(write_dataset(tmp_path / "set")), vocab_size=18, optimizer=optimizer)
    poison(settings, tmp_path / "set", 2 * 8 + 4 + 1)
    config, world = from_dict(settings), distributed.World(0, 1, torch.device("cpu"))
    run = train.Run(config, world)
    checkpoint.restore("", checkpoint.load(settings["out_dir"]), run.model, run.optimizer)
    for step, is_finite in ((2, True), (3, False)):
        before = [p.clone() for p in run.model.parameters()], copy.deepcopy(run.optimizer.state_dict()["state"])
        stats = train.update(step, run.model, run.optimizer, run.loss_scale, run.train_bin, config, world, run.stop)
        assert stats.isfinite().all() == is_finite
        after = list(run.model.parameters()), run.optimizer.state_dict()["state"]
        assert same([torch.nan_to_num(p) for p in after[0]], [torch.nan_to_num(p) for p in before[0]]) != is_finite
        assert same(after[1], before[1]) != is_finite


def places(path, each):
    """Byte positions of every kind that a checkpoint has, `each` of them: headers, pickles, tensors, directory, end."""
    size, rng, kinds = path.stat().st_size, random.Random(0), {}
    with zipfile.ZipFile(path) as file:
        directory = file.start_dir
        for entry in file.infolist():
            data = entry.header_offset + 30 + len(entry.filename.encode())
            kinds.setdefault("header", []).extend(range(entry.header_offset, data))
            kind = "pickle" if entry.filename.endswith(".pkl") else "tensor" if "/data/" in entry.filename else "small entry"
            kinds.setdefault(kind, []).extend(range(data, data + entry.file_size))
    kinds |= {"directory": range(directory, size - 22), "end": range(size - 22, size)}
    return {kind: rng.sample(range_, min(each, len(range_))) for kind, range_ in kinds.items()}


@pytest.mark.parametrize("each", [8, pytest.param(400, marks=pytest.mark.soak)])
def test_a_checkpoint_with_one_byte_changed_or_its_end_cut_off_is_refused_or_whole(settings, tmp_path, each):
    assert faults.run(settings | dict(dim=8, hidden_dim=8, max_steps=1)) == 0
    path, copy = Path(settings["out_dir"]) / "ckpt.pt", tmp_path / "copy.pt"
    whole, bytes_ = checkpoint.load(path), path.read_bytes()
    for kind, positions in places(path, each).items():
        refused = 0
        for i, position in enumerate(positions):
            with fault(f"checkpoint damaged: {kind}"):
                flipped = bytes_[:position] + bytes([bytes_[position] ^ 1 << i % 8]) + bytes_[position + 1 :]
                copy.write_bytes(flipped if i % 4 else bytes_[:position])
                try:
                    assert same(checkpoint.load(copy), whole), f"{kind}, byte {position}"  # a time stamp, padding
                except UserError as e:
                    refused += 1
                    assert len(str(e).splitlines()) == 1 and str(copy) in str(e)
        assert refused >= len(positions) // 4, kind


def test_a_damaged_newest_checkpoint_is_replaced_by_the_previous_one(settings, uninterrupted):
    expected = uninterrupted(settings)
    assert faults.run(settings | {"max_steps": 3}) == faults.run(settings | {"max_steps": 6}) == 0
    out = Path(settings["out_dir"])
    assert sorted(p.name for p in out.glob("*.pt")) == ["ckpt.pt", "ckpt_3.pt", "ckpt_6.pt"]
    data = bytearray((out / "ckpt.pt").read_bytes())
    data[places(out / "ckpt.pt", 1)["tensor"][0]] ^= 1
    (out / "ckpt.pt").write_bytes(data)  # and with it ckpt_6.pt: one file by two names
    with fault("newest checkpoint damaged"):
        assert faults.run(settings) == 0
        log = faults.log_of(settings).read_text()
        assert f"warning: {out / 'ckpt.pt'}: damaged" in log and f"taking {out / 'ckpt_3.pt'}" in log
        assert equals(settings, expected)
    for path in out.glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    assert faults.run(settings) == 2
    last = faults.log_of(settings).read_text().splitlines()[-1]
    assert last.startswith(f"{out / 'ckpt_3.pt'}: not a checkpoint of this trainer, or damaged or cut short")
    assert last.endswith("; start anew with --resume=none")


CHANGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "written to": lambda path: path.open("r+b").write(b"\0\0"),
    "replaced": lambda path: os.replace(path.with_name("val.bin"), path),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bin_that_changes_under_a_run_ends_it_with_status_4(long, tmp_path, name):
    data = write_dataset(tmp_path / "set")
    endless = long | dict(data=str(data), max_steps=10**6)
    process = faults.start(endless)
    rows, ckpt = Path(long["out_dir"]) / "metrics.jsonl", Path(long["out_dir"]) / "ckpt.pt"
    wait_for(ckpt.exists)
    with fault(f"bin {name} while training"):
        CHANGES[name](data / "train.bin")
        process.join(60)
        assert process.exitcode in (4, -signal.SIGBUS)  # cut between the look and the read, which no program can prevent
        if process.exitcode == 4:
            assert f"{data / 'train.bin'}: changed since" in faults.log_of(long).read_text().splitlines()[-1]
        assert checkpoint.load(ckpt)["step"] > 0 and metrics.read(rows)


def test_a_run_whose_output_is_closed_continues_and_is_saved(settings):
    command = [sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    with fault("closed output"):
        assert process.stderr.read() == "" and process.wait(60) == 0
        assert [row["step"] for row in result(settings)[1]] == list(range(settings["max_steps"] + 1))


def test_a_full_disk_ends_the_run_with_status_4_and_leaves_the_previous_checkpoint_intact(settings, uninterrupted):
    expected = uninterrupted(settings)
    assert faults.run(settings | {"max_steps": 3}) == 0
    path = Path(settings["out_dir"]) / "ckpt.pt"
    before = path.read_bytes()
    with fault("disk full"):
        assert faults.run(settings, functools.partial(faults.no_file_beyond, len(before) // 2)) == 4
        assert path.read_bytes() == before and not list(path.parent.glob("*.tmp"))
        last = faults.log_of(settings).read_text().splitlines()[-1]
        assert last == f"{path}: File too large; make room, then run the same command again"
        assert faults.run(settings) == 0 and equals(settings, expected)


def launch(settings, *options, **kwargs):
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]
    args = [f"--{k}={v}" for k, v in settings.items()]
    return subprocess.Popen([*launcher, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def run_launcher(settings, *options) -> str:
    """Returns the output of a run of several ranks that ends well."""
    launcher = launch(settings, *options)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, output[-3000:]
    return output


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc, which Linux has")
@pytest.mark.parametrize("resume", [pytest.param("auto", marks=pytest.mark.soak), "none"])  # none is the harder one
def test_a_run_whose_killed_rank_torchrun_restarts_equals_an_uninterrupted_run(long, tmp_path, resume):
    long = long | {"max_steps": 150, "resume": resume}
    two = ("--nproc_per_node=2", "--standalone", "--max-restarts=1")
    whole = long | {"out_dir": str(tmp_path / "whole")}
    run_launcher(whole, *two)
    launcher = launch(long, *two)
    wait_for((Path(long["out_dir"]) / "ckpt.pt").exists)
    with fault("rank killed under torchrun"):
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        output = launcher.communicate(timeout=120)[0]
        assert launcher.returncode == 0 and "resuming" in output and "moved" not in output, output[-3000:]
        assert equals(long, result(whole))


def test_two_launchers_are_one_run(settings, tmp_path):
    """As on two machines, here both on the loopback address: the losses of two ranks of one launcher, bit for bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1")
    machines = [launch(settings, *meet) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    one = settings | {"out_dir": str(tmp_path / "one")}
    run_launcher(one, "--nproc_per_node=2", "--standalone")
    assert equals(settings, result(one))


@pytest.mark.soak
def test_memory_does_not_grow_over_5000_steps(settings):
    """Peak resident memory, from the kernel, in the 500 steps after the first 500 and at the end."""
    process = faults.start(settings | dict(max_steps=5000, log_interval=100, eval_interval=500, ckpt_interval=500))
    rows, peaks = Path(settings["out_dir"]) / "metrics.jsonl", {}
    while process.is_alive():
        if rows.exists() and (read := metrics.read(rows)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "VmHWM:" in status:  # gone once it has exited
                peaks[read[-1]["step"]] = int(status.split("VmHWM:")[1].split()[0])
        time.sleep(0.05)
    early, late = max(peaks[s] for s in peaks if s <= 1000), peaks[max(peaks)]
    assert max(peaks) > 4000 and late <= 1.01 * early, (early, late)


def test_data_bins_shows_the_batch_that_the_run_trained_on(settings, capsys):
    assert faults.run(settings) == 0
    seen = [bins.batch(Path(settings["out_dir"]), step) for step in (1, 2)]
    data = bins.Bin(Path(settings["data"]) / "train.bin", 31, 17)
    for step, (windows, ids, _) in enumerate(seen):
        assert windows.tolist() == bins.order(0, 0, data.n_windows)[8 * step : 8 * step + 8].tolist()
        assert np.array_equal(ids, data.windows(windows))
    assert bins.show([settings["out_dir"], "--step=2"]) == 0
    text = capsys.readouterr().out
    assert f"sequence 7, window {seen[1][0][7]}" in text and " ".join(map(str, seen[1][1][7])) in text
    path = Path(settings["out_dir"]) / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"data": "elsewhere", "mask_repeated": False}))  # as older runs have it
    with pytest.raises(UserError, match="elsewhere/train.bin: not found from this folder; pass --data=FOLDER"):
        bins.show([settings["out_dir"], "--step=2"])
    assert bins.show([settings["out_dir"], "--step=2", f"--data={settings['data']}"]) == 0
    assert capsys.readouterr().out == text
    path.write_text(json.dumps(values | {"data_fingerprint": bins.fingerprint_of_ends(settings["data"])}))
    assert bins.show([settings["out_dir"], "--step=2"]) == 0  # trained before the bins got their meta.json
    path.write_text(json.dumps(values | {"data_fingerprint": "00"}))
    with pytest.raises(UserError, match="not the data that .* was trained on"):
        bins.show([settings["out_dir"], "--step=2"])
    with pytest.raises(UserError, match="--step=0: steps are counted from 1"):
        bins.show([settings["out_dir"], "--step=0"])
    with pytest.raises(UserError, match="not a run directory, as it has no config.json"):
        bins.show([settings["data"], "--step=1"])
