"""The loggers show the rows of metrics.jsonl, each step once, also after a resume."""

import math
import os
import sys
from pathlib import Path

import pytest

from runtime import metrics
from tests.test_train import flags, run, status


def resumed(settings, **changes):
    """The rows of a run that was killed after step 6, with a checkpoint at step 3, and went on to step 8."""
    out = Path(settings["out_dir"])
    run(settings, max_steps=6, ckpt_keep=9, **changes)
    (out / "ckpt_3.pt").replace(out / "ckpt.pt")
    (out / "ckpt_6.pt").unlink()
    return run(settings, max_steps=8, ckpt_keep=9, **changes)


def tensorboard_curve(folder, name) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload().Scalars(name)
    assert len({event.step for event in events}) == len(events)  # no step twice
    return {event.step: event.value for event in events}


def test_tensorboard_shows_each_step_once_after_a_resume(settings):
    """It keeps fp32: 6e-8 of the value."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    rows = resumed(settings, log_to="tensorboard")
    for name in ("loss", "val_loss", "lr"):
        expected = {row["step"]: pytest.approx(row[name], rel=1e-7) for row in rows if name in row}
        assert tensorboard_curve(Path(settings["out_dir"]) / "tensorboard", name) == expected


def test_a_logger_that_a_resumed_run_did_not_have_gets_the_earlier_rows_too(settings):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(settings, max_steps=3)
    run(settings, log_to="tensorboard")
    assert list(tensorboard_curve(Path(settings["out_dir"]) / "tensorboard", "loss")) == list(range(1, 7))
    run(settings, resume="none", seed=1, max_steps=2, log_to="tensorboard")  # a new run in the same folder
    assert list(tensorboard_curve(Path(settings["out_dir"]) / "tensorboard", "loss")) == [1, 2]


def wandb_records(file: Path):
    """Yields the records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left of the block for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # after the checksum
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_shows_each_step_once_after_a_resume(settings, monkeypatch):
    """Offline. Values are written as JSON, so they are equal."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    rows = resumed(settings, log_to="wandb")
    wandb.teardown()  # its process writes on after a run has ended
    curve, ids = [], set()
    for file in sorted(Path(settings["out_dir"]).glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        ids.add(file.stem)
        for record in wandb_records(file):
            found = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            if "loss" in found:
                curve.append((found["_step"], found["loss"]))
    assert curve == [(row["step"], row["loss"]) for row in rows if "loss" in row] and len(ids) == 1


def test_a_missing_package_ends_with_status_2_and_one_line_before_anything_is_written(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert status(flags(settings, log_to="wandb")) == 2
    assert capsys.readouterr().err == "log_to=wandb needs wandb, which is not installed: pip install '.[wandb]'\n"
    assert not Path(settings["out_dir"]).exists()


def test_without_a_logger_nothing_but_metrics_is_written(settings):
    rows = run(settings)
    assert metrics.read(Path(settings["out_dir"]) / "metrics.jsonl") == rows and math.isfinite(rows[-1]["loss"])
    assert not {"tensorboard", "wandb"} & {path.name for path in Path(settings["out_dir"]).iterdir()}
