import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import reproduce
from cli import run_command
from config import ROOT, load
from errors import RunFailed
from paper import figures
from paper.report import FAILS, HOLDS, OPEN, at_exponents
from paper.scales import SCALES, Scale
from tests.conftest import heed_interrupts

TEXT = SCALES["text"]
TINY = SCALES["tiny"]


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_each_figure_has_its_variants_and_each_variant_is_a_config(scale):
    named = reproduce.variants(scale)
    for letter, figure in figures.FIGURES.items():
        assert set(figure.variants(scale)) <= set(named), letter
    for settings in named.values():
        config = load([str(ROOT / scale.config), *(f"--{k}={v}" for k, v in (scale.settings | settings).items())])
        assert config.micro_batch_size <= config.batch_size and config.schedule == "constant"


def test_runs_that_would_be_the_same_are_run_once():
    named = reproduce.variants(TINY)
    stands = {name: reproduce.standing_for(TINY, name) for name in named}
    assert stands["batch16"] == stands["rate0.005"] == stands["batch16-context128"] == "base"
    assert stands["batch32-context128"] == "batch32" and stands["batch64-context128"] == "batch64-context128"
    assert all(stands[stand] == stand for stand in stands.values())
    most = {name: settings.get("max_steps", 2000) for name, settings in named.items()}
    assert all(most[stand] >= most[name] for name, stand in stands.items())


def test_a_batch_sees_as_many_tokens_and_as_many_steps_as_base():
    named = reproduce.variants(TINY)
    assert (named["batch8"]["max_steps"], named["batch32"]["max_steps"]) == (4000, 2000)


def test_the_base_may_have_more_seeds_than_the_treatments(tmp_path):
    runs = reproduce.Runs(TEXT, "text", tmp_path)
    assert len(runs.seeds("base")) == 5 and len(runs.seeds("rate0.001")) == 3


@pytest.fixture
def runs(tmp_path, monkeypatch, dataset):
    shape = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=17, seq_len=96, batch_size=4, micro_batch_size=4)
    settings = shape | dict(
        compile="off", data=str(dataset), prepare="", max_steps=7, eval_interval=2, ckpt_interval=2, schedule="constant"
    )
    scale = Scale("configs/tiny.py", settings, (2, 4), (1e-3, 2e-3, 5e-3), 2, ((2, 4), (96, 128)), (4, 4), 0.3, 4, seeds=1)
    monkeypatch.setattr(reproduce.Runs, "folder", lambda self, variant, seed: tmp_path / variant / f"seed{seed}")
    return reproduce.Runs(scale, "mini", tmp_path / "results")


def test_a_figure_is_trained_measured_and_drawn_and_what_is_done_is_not_done_again(tmp_path, runs):
    over = dataclasses.replace(runs, deadline=0.0)
    assert not reproduce.train_all(["a"], over, jobs=1) and not (tmp_path / "base").exists()  # no minutes: nothing is begun
    assert reproduce.train_all(["a", "i"], runs, jobs=1)
    reproduce.draw(["a", "i"], runs)
    assert sorted(p.name for p in runs.out.iterdir()) == ["REPORT.md", "a.json", "a.png", "i.json", "i.png", "rows"]
    rows = [json.loads(line) for line in (tmp_path / "base/seed0/measures.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 7] and len({row["questions_full"] for row in rows}) == 1
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "results" not in p.parts}
    assert reproduce.train_all(["a"], runs, jobs=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    report = (runs.out / "REPORT.md").read_text()
    assert "| a | copying stays absent long after the loss has flattened |" in report
    assert "![Loss and copying over tokens](a.png)" in report

    # The rows that the figures show are kept, and the figures can be drawn from them when the runs are gone.
    kept = json.loads(gzip.decompress((runs.out / "rows/base.json.gz").read_bytes()))
    assert [row["step"] for row in kept[0]] == [2, 4, 6]  # those with a validation loss
    (tmp_path / "base").rename(tmp_path / "gone")
    (runs.out / "a.json").unlink()
    (runs.out / "REPORT.md").unlink()
    reproduce.draw(["a"], runs)
    assert (runs.out / "REPORT.md").read_text() == report
    with pytest.raises(ValueError, match="rate0.001.json.gz: not found, and there are no runs of rate0.001 to draw from"):
        reproduce.draw(["c"], runs)


def test_a_failed_run_ends_the_others_and_names_its_last_line(tmp_path, runs):
    runs.scale.settings["data"] = str(tmp_path / "missing")
    with pytest.raises(RunFailed, match=r"seed0: .*missing/train.bin: not found"):
        reproduce.train_all(["a", "c"], runs, jobs=1)
    assert len(list(tmp_path.rglob("log.txt"))) == 1


def test_an_interrupt_saves_the_runs_and_is_one_line_and_status_130(tmp_path, dataset):
    program = f"""
import sys, reproduce
from cli import run_command
from pathlib import Path
from tests.test_reproduce import Scale
settings = dict(data={str(dataset)!r}, prepare="", vocab_size=17, seq_len=31, compile="off", max_steps=10**6, log_interval=1)
reproduce.SCALES["tiny"] = Scale("configs/tiny.py", settings, (2,), (1e-3,), 2, ((2,), (31,)), (4,), 0.3, 4, seeds=2)
reproduce.Runs.folder = lambda self, variant, seed: Path({str(tmp_path)!r}) / variant / f"seed{{seed}}"
sys.exit(run_command(reproduce.main, ["a", "--jobs=1"]))
"""
    command = [sys.executable, "-c", program]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_interrupts, **pipes)
    log = tmp_path / "base/seed0/metrics.jsonl"
    while child.poll() is None and not (log.exists() and '"step": 2,' in log.read_text()):  # an update that can be saved
        time.sleep(0.2)
    os.kill(child.pid, signal.SIGINT)
    assert child.communicate(timeout=120)[1] == "interrupted\n" and child.returncode == 130
    assert (tmp_path / "base/seed0/ckpt.pt").exists() and not (tmp_path / "base/seed1").exists()


def test_each_mistake_is_one_line_and_status_2(capsys):
    for argv in (
        ["a", "--scales=tiny"],
        ["z"],
        ["a", "--jobs=-3"],
        ["a", "--jobs=0"],
        ["a", "--minutes=-1"],
        ["a", "--minutes=nan"],
        ["k"],
    ):
        assert run_command(reproduce.main, argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def run(start, steps=2500, batch=16, level=0.9, seed=0, attention=-200):
    """Rows of a run whose copying comes at step `start`, or never, and its induction head so many steps later."""
    found = []
    for step in range(100, steps + 1, 100):
        has = start is not None and step >= start
        rng = np.random.default_rng([seed, step])
        found.append({
            "step": step, "tokens": step * batch * 128, "val_loss": 4 - 2 * has, "val_loss_new": 4.1,
            "val_loss_repeated": 3.9 - 3 * has, "induction_max": 0.6 * (start is not None and step >= start + attention),
            "copy_exact_full": level * has, "copy_exact_hex16": 0.5 * level * has, "recall": 1.0 * has, "pairs": 0.4 * has,
            "copy_token_top128": level * has,
            "uses_hex16": [0.95 * has, 0.9 * (has and step >= start + 300), None, 0.0], "ceiling_hex16": [0.0, 0.3, 0.9, 0.99],
            "score_mended": [[0.1, 0.0], [0.8 * has, 0.01 * rng.random()], [0.7 * (has and step >= start + 200), 0.0]],
        })  # fmt: skip
    return found


def result(letter, data, tmp_path, scale=TINY):
    found = figures.FIGURES[letter].draw(data, scale, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(found)
    return found


def claims(letter, data, tmp_path, scale=TINY):
    return [verdict for _, verdict, _ in result(letter, data, tmp_path, scale)["claims"]]


def seeds(*starts, **options):
    return [run(start, seed=i, **options) for i, start in enumerate(starts)]


def test_figures_draw_and_judge(tmp_path):
    three = seeds(800, 900, 700)
    assert claims("a", {"base": three}, tmp_path) == [FAILS, HOLDS]
    assert claims("a", {"base": seeds(None, None, None)}, tmp_path) == [OPEN, OPEN]
    same = {f"batch{b}": seeds(800, 900, 1000, batch=b) for b in (8, 16, 32)}
    halves = {f"batch{b}": seeds(*(s * 16 // b for s in (800, 900, 1000)), batch=b, steps=5000) for b in (8, 16, 32)}
    assert claims("b", same, tmp_path) == [HOLDS] and claims("b", halves, tmp_path) == [FAILS]
    assert claims("b", {f"batch{b}": seeds(None, None, None) for b in (8, 16, 32)}, tmp_path) == [OPEN]
    late = halves | {"batch8": seeds(1600, None, None, batch=8, steps=5000), "batch32": seeds(400, None, 500, batch=32)}
    assert claims("b", late, tmp_path) == [OPEN]  # of nine runs three are missing from the law
    faster = {f"rate{r}": seeds(s, s, s + 100, level=v) for r, s, v in ((1, 2000, 0.5), (2, 1000, 0.6), (4, 500, 0.8))}
    assert claims("c", faster, tmp_path) == [HOLDS, HOLDS]
    assert claims("c", dict(zip(faster, reversed(faster.values()), strict=True)), tmp_path) == [FAILS, FAILS]
    assert claims("d", {"layers4": three}, tmp_path) == [HOLDS]
    worse = {"base": three, "dropout0.1": seeds(1500, 1600, None), "decay0.1": seeds(500, 600, 400, level=0.95)}
    assert claims("e", worse, tmp_path) == [FAILS, OPEN, HOLDS, HOLDS]
    grid = {f"batch{b}-context{c}": seeds(800, 900, 1000, steps=1500) for b in TINY.grid[0] for c in TINY.grid[1]}
    assert claims("f", grid, tmp_path) == [HOLDS, FAILS]
    rates = {f"rate{r:g}": seeds(*(k * round(1e-2 / r) * 100 for k in (1, 1, 2))) for r in TINY.rates}
    assert claims("g", rates, tmp_path) == [HOLDS]
    assert claims("h", worse | {"decay0.01": three}, tmp_path) == ["measured"]
    assert claims("i", {"base": three}, tmp_path) == [HOLDS]
    assert claims("j", {"base": three}, tmp_path) == ["measured"]


def test_a_new_figure_takes_one_function(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.setattr(figures, "FIGURES", dict(figures.FIGURES))
    monkeypatch.setattr(reproduce, "FIGURES", figures.FIGURES)

    @figures.figure("z", "Width", lambda scale: {"wide": {"dim": 32}})
    def figure_z(data, scale, file):
        """How wide."""
        figures.draw_curves(file, data, [("val_loss", "step")])
        return {"claims": [["wider is better", "measured", str([rows[-1]["step"] for rows in data["wide"]])]]}

    assert reproduce.train_all(["z"], runs, jobs=1)
    reproduce.draw(["z"], runs)
    report = (runs.out / "REPORT.md").read_text()
    assert "| z | wider is better | **measured** | [6] |" in report and "## z. Width\n\n![Width](z.png)\n\nHow wide." in report
    assert json.loads((tmp_path / "wide/seed0/config.json").read_text())["dim"] == 32


def test_the_onset_is_told_twice_where_the_scale_asks_for_it(tmp_path):
    data = {f"rate{r}": [run(s, attention=-400) for s in (900, 1000, 1100)] for r in TEXT.rates[-3:]}
    found = result("c", data, tmp_path, TEXT)
    assert [claim for claim, *_ in found["claims"]][:2] == [
        "a higher learning rate makes copying come earlier (by copying)",
        "a higher learning rate makes copying come earlier (by attention)",
    ]
    assert found["onset"][f"rate{TEXT.rates[-1]} (by copying)"] == [900, 1000, 1100]
    assert found["onset"][f"rate{TEXT.rates[-1]} (by attention)"] == [500, 600, 700]
    more = {"base": seeds(800, 900, 700, 800, 800)} | {name: seeds(500, 600, 400) for name in ("dropout0.1", "decay0.1")}
    assert claims("e", more, tmp_path, TEXT) == [HOLDS, HOLDS, OPEN] * 2  # five seeds of the base, three of each treatment
    for letter in "abdfghijk":
        variants = figures.FIGURES[letter].variants(TEXT)
        assert "| measured" not in claims(letter, {name: seeds(800, 900, 700) for name in variants}, tmp_path, TEXT)


def test_an_interval_too_wide_to_exclude_another_law_tells_nothing():
    law = {"never": 0, "runs": 9}
    assert at_exponents(law | {"intervals": [[-0.2, 0.3]]}, (0,)) == HOLDS
    assert at_exponents(law | {"intervals": [[-0.6, 0.3]]}, (0,)) == OPEN
    assert at_exponents(law | {"intervals": [[0.1, 0.3]]}, (0,)) == FAILS
    assert at_exponents(law | {"intervals": None}, (0,)) == OPEN and at_exponents(None, (0,)) == OPEN
