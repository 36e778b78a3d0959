import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import eval_copy
import reproduce
import train
from cli import run_command
from config import ROOT, load
from data import prepare
from errors import RunFailed, UserError
from paper import figures, shared
from paper.repetition import of_training_data, repetition
from paper.report import FAILS, HOLDS, INCONCLUSIVE, MEASURED, at_exponents, in_order, verdict
from paper.scales import SCALES, Scale
from paper.treatments import earlier
from runtime import distributed
from tests.conftest import heed_interrupts

TEXT = SCALES["text"]
TINY = SCALES["tiny"]


def leave_pictures_out(monkeypatch):
    """Of what a figure does, writing its picture takes longest."""
    for where in (figures, shared):
        monkeypatch.setattr(where, "save", lambda picture, file: plt.close(picture))


def planned(name):
    return reproduce.Runs(SCALES[name], name, Path("none"))


@pytest.mark.parametrize("name", SCALES)
def test_each_figure_has_its_variants_and_each_variant_is_a_config(name):
    runs = planned(name)
    for letter, figure in figures.FIGURES.items():
        assert set(figure.variants(runs.scale)) <= runs.configs.keys(), letter
    for config in runs.configs.values():
        assert config.schedule == "constant" and config.batch_size % min(config.micro_batch_size, config.batch_size) == 0
        assert config.seq_len >= runs.scale.context


def test_runs_that_would_be_the_same_are_run_once():
    runs = planned("tiny")
    stands = {name: runs.standing_for(name) for name in runs.configs}
    assert stands["batch16"] == stands["rate0.005"] == stands["batch16-context128"] == "base"
    assert stands["batch32-context128"] == "batch32" and stands["batch64-context128"] == "batch64-context128"
    assert all(stands[stand] == stand for stand in stands.values())
    most = {name: config.max_steps for name, config in runs.configs.items()}
    assert all(most[stand] >= most[name] for name, stand in stands.items())


def test_at_every_batch_size_and_context_the_same_text_validates_and_evaluations_are_as_close_in_steps_and_tokens():
    for runs in map(planned, SCALES):
        base = runs.scale.base
        for name, c in runs.configs.items():
            if name.startswith("batch"):
                size, bases = c.batch_size * c.seq_len, base.batch_size * base.seq_len
                assert c.eval_batches * size == base.eval_batches * bases or c.eval_batches == 1
                assert 0.9 < c.eval_interval / base.eval_interval / min((bases / size) ** 0.5, 1) < 1.1


def test_the_base_may_have_more_seeds_than_the_treatments():
    runs = planned("text")
    assert [len(runs.seeds(name)) for name in ("base", "repeat0", "warmup100", "warmup400", "repeat0.02")] == [5, 5, 5, 3, 3]


def test_the_corpora_differ_in_inserted_copies_alone(tmp_path, corpus):
    """The same tokenizer, the same held-out text, and the more copies, the more often an earlier token tells the next one."""
    for i, text in enumerate(corpus * 3):
        (tmp_path / f"{i}.txt").write_text(f"{i} {text}")
    prepared = f"text {tmp_path} --tokenizer=bpe --vocab_size=500 --val_fraction=0.2"
    scale = dataclasses.replace(TEXT, settings={"data": f"{tmp_path}-bins", "prepare": prepared}, repeats=(0, 0.3))
    runs = reproduce.Runs(dataclasses.replace(scale, settings=scale.settings | {"vocab_size": 500}), "mini", tmp_path)
    assert runs.variants["repeat0"] == {} and runs.variants["weight0"] == {"repeated_weight": 0.0}
    configs = [runs.configs[name] for name in ("base", "repeat0.3")]
    for c in configs:
        prepare.prepare([*c.prepare.split(), f"--out={c.data}"])
    plain, copies = ([(Path(c.data) / name).read_bytes() for name in ("val.bin", "tokenizer.model")] for c in configs)
    assert plain == copies
    a, b = map(of_training_data, configs)
    assert all(b[name] > a[name] + 0.02 for name in a)
    assert all(x["frequency"] * x["reliability"] <= x["predictable"] <= x["frequency"] for x in (a, b))
    assert of_training_data(dataclasses.replace(configs[0], data="gone")) == {}


@pytest.fixture
def runs(tmp_path, monkeypatch, dataset):
    shape = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=17, seq_len=96, batch_size=4, micro_batch_size=4)
    settings = shape | dict(
        compile="off", data=str(dataset), prepare="", max_steps=7, eval_interval=2, ckpt_interval=2, schedule="constant"
    )
    grid = dict.fromkeys((96, 128), {2: 4, 4: 4})
    scale = Scale("configs/tiny.py", settings, {2: 4, 4: 4}, (1e-3, 2e-3, 5e-3), (2,), grid, 0.3, 4, seeds=1)
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
    assert "{" not in report and "takes 3 seeds that agree" in report
    assert "| a | copying stays absent until the loss has flattened (90% of its fall) |" in report
    assert "![Loss and copying over tokens](a.png)" in report

    # The rows that the figures show are kept, and the figures can be drawn from them when the runs are gone.
    kept = json.loads(gzip.decompress((runs.out / "rows/base.json.gz").read_bytes()))
    assert [row["step"] for row in kept["seeds"][0]] == [2, 4, 6, 7]  # those with a validation loss
    (tmp_path / "base").rename(tmp_path / "gone")
    (runs.out / "a.json").unlink()
    (runs.out / "REPORT.md").unlink()
    reproduce.draw(["a"], runs)
    assert (runs.out / "REPORT.md").read_text() == report

    # What has not been measured is said to be missing.
    assert reproduce.draw(["c"], runs) and not reproduce.draw(["d"], runs)
    report = (runs.out / "REPORT.md").read_text()
    assert "| rate 0.005 | 1 | 7 | 384 | never | 0." in report
    assert "| rate 0.001 | 0 of 1, the others are missing | 7 | 384 |  |  |  |  |\n" in report
    assert "; 2 of 3 runs are missing |" in report and "| d | Induction heads by layer | | missing: no run" in report

    # A recipe that has changed since is not mixed with them.
    other = dataclasses.replace(runs, scale=dataclasses.replace(runs.scale, settings=runs.scale.settings | {"dim": 32}))
    with pytest.raises(UserError, match="rows/base.json.gz: made with other settings: dim, head_dim; set them back"):
        reproduce.draw(["a"], other)
    (tmp_path / "gone").rename(tmp_path / "base")
    with pytest.raises(UserError, match="base/seed0: made with other settings: dim, head_dim; set them back"):
        reproduce.train_all(["a"], other, jobs=1)


def test_a_scale_with_all_figures_is_interrupted_reported_resumed_and_reported_whole(tmp_path, monkeypatch, corpus):
    """As `all --scale=text`, on a toy. The runs are calls in this process, which spares a start of Python for each."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(corpus):
        (tmp_path / f"text/{i}.txt").write_text(text)
    settings = dict(
        data=f"{tmp_path}/bins", prepare=f"text {tmp_path}/text --val_fraction=0.2", vocab_size=257, dim=16, n_layers=1,
        n_heads=2, hidden_dim=16, seq_len=96, batch_size=2, max_steps=4, eval_interval=2, eval_batches=1, ckpt_interval=2,
        log_interval=1, learning_rate=3e-3, warmup_steps=1, schedule="constant", dtype="fp32",
    )  # fmt: skip
    scale = Scale(
        "configs/tiny.py", settings, {2: 4, 4: 4}, (1e-3, 3e-3), (1, 2), {96: {2: 4}, 128: {2: 4}}, 0.3, samples=2,
        warmups=(1, 2), repeats=(0, 0.3), weights=(1, 4), copying="copy_token_top128", attention=0.3, seeds=1, base_seeds=2,
    )  # fmt: skip
    monkeypatch.setattr(reproduce.Runs, "folder", lambda self, variant, seed: tmp_path / "runs" / variant / f"seed{seed}")
    commands = []

    def call(self, command, folder, seconds=None):
        if len(commands) == 9:
            commands.append("interrupt")
            raise KeyboardInterrupt
        commands.append(command[0])
        if command[0] == "train.py":
            return train.train(load(command[1:]), distributed.World(0, 1, torch.device("cpu")))
        return eval_copy.main(command[1:])

    monkeypatch.setattr(reproduce.Runs, "run", call)
    leave_pictures_out(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # which only the main thread may call
    letters = list(figures.FIGURES)
    with pytest.raises(KeyboardInterrupt):
        reproduce.train_all(letters, reproduce.Runs(scale, "mini", tmp_path / "results"), jobs=1)
    runs = reproduce.Runs(scale, "mini", tmp_path / "results")
    assert reproduce.draw(letters, runs)
    report = (runs.out / "REPORT.md").read_text()
    assert "runs are missing |" in report and ", the others are missing |" in report
    assert reproduce.train_all(letters, runs, jobs=1) and reproduce.draw(letters, runs)
    done = [name for name in runs.configs if runs.standing_for(name) == name for _ in runs.seeds(name)]
    assert commands.count("train.py") == commands.count("eval_copy.py") == len(done)  # nothing was done twice
    report = (runs.out / "REPORT.md").read_text()
    assert "missing" not in report and report.count("| onset (by copying) | onset (by attention) |") == len(letters)
    assert all(f"\n| {letter} | " in report for letter in letters)
    assert "| base | 2 | 4 | 192 | never, never |" in report and "frequency, at the end | reliability, at the end |" in report


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
reproduce.SCALES["tiny"] = Scale("configs/tiny.py", settings, {{2: 4}}, (1e-3,), (2,), {{31: {{2: 4}}}}, 0.3, 4, seeds=2)
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
            "copy_token_top128": level * has, "copy_exact_top128": level * has, "copy_token_full": level * has,
            "uses_hex16": [0.95 * has, 0.9 * (has and step >= start + 300), None, 0.0], "ceiling_hex16": [0.0, 0.3, 0.9, 0.99],
            "score_mended": [[0.1, 0.0], [0.8 * has, 0.01 * rng.random()], [0.7 * (has and step >= start + 200), 0.0]],
        })  # fmt: skip
    return found


def result(letter, data, tmp_path, scale=TINY):
    found = figures.FIGURES[letter].draw(data, scale, tmp_path / "x.png")
    json.dumps(found)
    return found


def claims(letter, data, tmp_path, scale=TINY):
    return [verdict for _, verdict, _ in result(letter, data, tmp_path, scale)["claims"]]


def seeds(*starts, **options):
    return [run(start, seed=i, **options) for i, start in enumerate(starts)]


def test_figures_draw_and_judge(tmp_path, monkeypatch):
    leave_pictures_out(monkeypatch)
    three = seeds(800, 900, 700)
    assert claims("a", {"base": three}, tmp_path) == [FAILS, HOLDS]
    assert claims("a", {"base": seeds(None, None, None)}, tmp_path) == [INCONCLUSIVE, INCONCLUSIVE]
    same = {f"batch{b}": seeds(800, 900, 1000, batch=b) for b in (8, 16, 32)}
    halves = {f"batch{b}": seeds(*(s * 16 // b for s in (800, 900, 1000)), batch=b, steps=5000) for b in (8, 16, 32)}
    assert claims("b", same, tmp_path) == [HOLDS] and claims("b", halves, tmp_path) == [FAILS]
    assert claims("b", {f"batch{b}": seeds(None, None, None) for b in (8, 16, 32)}, tmp_path) == [INCONCLUSIVE]
    late = halves | {"batch8": seeds(1600, 1800, None, batch=8, steps=5000)}
    assert claims("b", late, tmp_path) == [INCONCLUSIVE]  # one of nine runs is missing from the law
    faster = {
        f"rate{r:g}": seeds(s, s, s + 100, level=v)
        for r, s, v in zip(TINY.rates[-3:], (2000, 1000, 500), (0.5, 0.6, 0.8), strict=True)
    }
    assert claims("c", faster, tmp_path) == [HOLDS, HOLDS]
    assert claims("c", dict(zip(faster, reversed(faster.values()), strict=True)), tmp_path) == [FAILS, FAILS]
    assert claims("d", {"layers4": three}, tmp_path) == [HOLDS]
    worse = {"base": three, "dropout0.1": seeds(1500, 1600, None), "decay0.1": seeds(500, 600, 400, level=0.95)}
    assert claims("e", worse, tmp_path) == [FAILS, INCONCLUSIVE, HOLDS, HOLDS]
    grid = {f"batch{b}-context{c}": seeds(800, 900, 1000, steps=1500) for c in TINY.grid for b in TINY.grid[c]}
    assert claims("f", grid, tmp_path) == [HOLDS, FAILS]
    rates = {f"rate{r:g}": seeds(*(k * round(1e-2 / r) * 100 for k in (1, 1, 2))) for r in TINY.rates}
    assert claims("g", rates, tmp_path) == [HOLDS]
    assert claims("h", worse | {"decay0.01": three}, tmp_path) == ["measured"]
    assert claims("i", {"base": three}, tmp_path) == [HOLDS]
    assert [figures.climbs(x) for x in ([1, 2, 3, 4], [1, 2, None, None], [2, 1, None, None])] == [True, True, False]
    assert {figures.climbs(x) for x in ([1, None, 2, None], [None, None, 1, 2], [1, None, None, None], [1, 1, 2, 2])} == {None}
    assert claims("j", {"base": three}, tmp_path) == ["measured"]


def test_a_new_figure_takes_one_function(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.setattr(figures, "FIGURES", dict(figures.FIGURES))
    monkeypatch.setattr(reproduce, "FIGURES", figures.FIGURES)

    @figures.figure("z", "Width", lambda scale: {"wide": {"dim": 32}})
    def figure_z(data, scale, file):
        """How wide."""
        picture, axes = figures.panels(1)
        figures.draw_curves(axes, data, [("val_loss", "step")])
        figures.save(picture, file)
        return {"claims": [["wider is better", "measured", str([rows[-1]["step"] for rows in data["wide"]])]]}

    assert reproduce.train_all(["z"], runs, jobs=1)
    reproduce.draw(["z"], runs)
    report = (runs.out / "REPORT.md").read_text()
    assert "| z | wider is better | **measured** | [7] |" in report and "## z. Width\n\n![Width](z.png)\n\nHow wide." in report
    assert json.loads((tmp_path / "wide/seed0/config.json").read_text())["dim"] == 32


def test_the_onset_is_told_twice_where_the_scale_asks_for_it(tmp_path, monkeypatch):
    leave_pictures_out(monkeypatch)
    data = {f"rate{r}": [run(s, attention=-400) for s in (900, 1000, 1100)] for r in TEXT.rates[-3:]}
    found = result("c", data, tmp_path, TEXT)
    assert [claim for claim, *_ in found["claims"]][:2] == [
        "a higher learning rate makes copying come earlier (by copying)",
        "a higher learning rate makes copying come earlier (by attention)",
    ]
    described = shared.describe_runs("rate0.1", data["rate0.006"], 3, TEXT.base, TEXT, ())
    assert described["onset"] == {"onset (by copying)": [900, 1000, 1100], "onset (by attention)": [500, 600, 700]}
    assert claims("a", {"base": data["rate0.006"]}, tmp_path, TEXT)[2] == HOLDS  # the induction head comes first
    more = {"base": seeds(800, 900, 700, 800, 800)} | {name: seeds(500, 600, 400) for name in ("dropout0.1", "decay0.1")}
    assert (
        claims("e", more, tmp_path, TEXT) == [HOLDS, HOLDS, INCONCLUSIVE] * 2
    )  # five seeds of the base, three of each treatment


@pytest.mark.parametrize("letter", figures.FIGURES)
def test_every_figure_can_be_drawn_from_any_of_its_variants_and_seeds(letter, tmp_path, monkeypatch):
    """Of the scale with all figures: whole, with no onset, with unequal numbers of seeds, and from each variant alone."""
    figure = figures.FIGURES[letter]
    names = list(figure.variants(TEXT))
    whole = {name: seeds(800, 900, 700) for name in names}
    never = {name: seeds(None, None, None) for name in names}
    unequal = {name: found[: 1 + i % 3] for i, (name, found) in enumerate(whole.items())}
    alone = [{name: whole[name][:1]} for name in (names[0], names[-1])]
    assert claims(letter, unequal, tmp_path, TEXT) and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    leave_pictures_out(monkeypatch)
    for data in (whole, never, *alone):
        found = figure.draw(data, TEXT, tmp_path / "x.png")["claims"]
        assert {how for _, how, _ in found} <= {HOLDS, FAILS, INCONCLUSIVE, MEASURED} and (found or data in alone)


@pytest.mark.parametrize(
    ("letter", "named", "base", "low", "high", "treatment"),
    [
        ("l", shared.repeats(TEXT), "repeat 0", "0.02", "0.32", "a share of copies of {}"),
        ("m", shared.weights(TEXT), "weight 1", "40", "10", "a weight of {} for repeated targets"),
    ],
)
def test_a_dose_is_judged_by_what_it_does_to_copying(letter, named, base, low, high, treatment, tmp_path, monkeypatch):
    leave_pictures_out(monkeypatch)
    kind = base.split()[0]
    data = {name: seeds(2000, 2100, 1900, level=0.4) for name in named}
    data |= {kind + high: seeds(300, 400, 200, level=0.9)}
    found = result(letter, data, tmp_path, TEXT)["claims"]
    how = {claim: verdict for claim, verdict, _ in found}
    assert found[0][2].startswith(f"{kind} {high}; at the end ") and f"{base}: 0.40, 0.40, 0.40" in found[0][2]
    for by in ("(by copying)", "(by attention)"):
        assert how[f"{treatment.format(high)} makes copying come earlier {by}"] == HOLDS
        assert how[f"{treatment.format(low)} makes copying come earlier {by}"] == INCONCLUSIVE
    assert how[f"{treatment.format(high)} raises the final accuracy"] == HOLDS


def test_leaving_the_loss_of_repeated_targets_out_hinders_copying(tmp_path, monkeypatch):
    leave_pictures_out(monkeypatch)
    data = {"weight0": seeds(None, None, None), "weight1": seeds(2000, 2100, 1900, level=0.4)}
    how = {claim: verdict for claim, verdict, _ in result("m", data, tmp_path, TEXT)["claims"]}
    assert how["a weight of 0 for repeated targets makes copying come later (by attention)"] == HOLDS
    assert how["a weight of 0 for repeated targets lowers the final accuracy"] == HOLDS


def test_the_interval_of_a_share_ends_at_one_and_that_of_a_loss_does_not():
    three = [[{"step": 1, "tokens": 1, "copy_token_full": share, "val_loss_new": 4 + share}] for share in (0.9, 1.0, 0.7)]
    share, loss = (shared.end_of(name, three)["interval"] for name in ("copy_token_full", "val_loss_new"))
    assert share[1] == 1 and loss[1] > 5 and loss[0] == pytest.approx(4 + share[0])


def test_a_verdict_without_an_interval_takes_three_seeds_that_agree_and_no_tie():
    assert in_order([100, 200, 300]) is True and in_order([100, 300, 200]) is False and in_order([100, 100, 200]) is None
    assert [verdict(cases, in_order) for cases in ([[1, 2]] * 3, [[2, 1]] * 3)] == [HOLDS, FAILS]
    for cases in ([], [[1, 2]] * 2, [[1, 1]] * 3, [[1, 2], [1, 2], [2, 1]], [[1, 2], [1, 2], [1, 1]]):
        assert verdict(cases, in_order) == INCONCLUSIVE
    assert earlier([[900, None]] * 2, None) == earlier([[None, 900]] * 2, None) == INCONCLUSIVE


def test_a_seed_that_ends_without_copying_leaves_when_copying_comes_open(tmp_path, monkeypatch):
    leave_pictures_out(monkeypatch)
    lost = run(800)
    for row in lost[-8:]:
        row["copy_exact_full"] = 0.0
    for data in (seeds(800, 900, None), [*seeds(800, 900), lost]):
        found = result("a", {"base": data}, tmp_path)
        assert len(found["wait_steps"]) == 2 and {how for _, how, _ in found["claims"]} == {INCONCLUSIVE}


def test_runs_without_an_onset_count_as_late():
    gain, loss = {"interval": [-300, -100]}, {"interval": [100, 300]}
    assert earlier([[900, 700]] * 3, gain) == HOLDS and earlier([[700, 900]] * 3, loss) == FAILS
    assert earlier([[900, 700], [900, 700], [900, None]], gain) == INCONCLUSIVE  # that one may be late
    assert earlier([[700, 900], [700, 900], [700, None]], loss) == FAILS
    assert earlier([[None, 900], [700, 900], [700, 900]], loss) == INCONCLUSIVE
    assert earlier([[None, 900]] * 3, None) == HOLDS and earlier([[900, None]] * 3, None) == FAILS
    assert earlier([[None, 900], [None, None]], None) == INCONCLUSIVE and earlier([[None, None]] * 3, None) == INCONCLUSIVE


def test_repetition_is_what_a_search_of_each_window_finds():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (20, 31))
    again = right = seen = 0
    for row in ids.tolist():
        for t in range(30):
            before = [i for i in range(t) if row[i] == row[t]]
            again += bool(before)
            right += bool(before) and row[before[-1] + 1] == row[t + 1]
            seen += any(row[i + 1] == row[t + 1] for i in before)
    found = {"frequency": again / 600, "reliability": right / again, "predictable": seen / 600}
    assert repetition(ids) == pytest.approx(found)
    assert repetition(np.arange(20).reshape(2, 10)) == {"frequency": 0, "reliability": 0, "predictable": 0}


def test_an_interval_too_wide_to_exclude_another_law_tells_nothing():
    law = {"never": 0, "runs": 9, "misfit": None}
    assert at_exponents(law | {"intervals": [[-0.2, 0.3]]}, (0,)) == HOLDS
    assert at_exponents(law | {"intervals": [[-0.6, 0.3]]}, (0,)) == INCONCLUSIVE
    assert at_exponents(law | {"intervals": [[0.1, 0.3]]}, (0,)) == FAILS
    assert at_exponents(law | {"intervals": None}, (0,)) == INCONCLUSIVE and at_exponents(None, (0,)) == INCONCLUSIVE
