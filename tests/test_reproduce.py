import json

import numpy as np
import pytest

import eval_copy
import reproduce
from config import ROOT, load
from paper import figures
from paper.figures import FAILS, HOLDS, OPEN


@pytest.mark.parametrize("scale", reproduce.SCALES.values(), ids=reproduce.SCALES)
def test_each_figure_has_its_variants_and_each_variant_is_a_config(scale):
    named = reproduce.variants(scale)
    for letter, names in reproduce.FIGURES.items():
        assert set(names(scale)) <= set(named), letter
    for settings in named.values():
        config = load([str(ROOT / scale.config), *(f"--{k}={v}" for k, v in (scale.settings | settings).items())])
        assert config.micro_batch_size <= config.batch_size and config.schedule == "constant"
    assert reproduce.FIGURES.keys() == figures.DRAW.keys()


def test_runs_that_would_be_the_same_are_run_once():
    tiny = reproduce.SCALES["tiny"]
    stands = {name: reproduce.standing_for(tiny, name) for name in reproduce.variants(tiny)}
    assert stands["batch16"] == stands["rate0.005"] == stands["batch16-context128"] == "base"
    assert stands["batch32-context128"] == "batch32" and stands["batch64-context128"] == "batch64-context128"
    assert all(stands[stand] == stand for stand in stands.values())
    named = reproduce.variants(tiny)
    most = {name: named[name].get("max_steps", 2000) for name in named}
    assert all(most[stand] >= most[name] for name, stand in stands.items())


def test_a_batch_sees_as_many_tokens_and_as_many_steps_as_base():
    named = reproduce.variants(reproduce.SCALES["tiny"])
    assert (named["batch8"]["max_steps"], named["batch32"]["max_steps"]) == (4000, 2000)


def test_a_figure_is_trained_measured_and_drawn_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, dataset):
    shape = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=17, seq_len=96, batch_size=4, micro_batch_size=4)
    settings = shape | dict(
        compile="off", data=str(dataset), prepare="", max_steps=7, eval_interval=2, ckpt_interval=2, schedule="constant"
    )
    scale = reproduce.Scale(
        "configs/tiny.py", settings, (2, 4), (1e-3, 2e-3, 5e-3), 2, ((2, 4), (96, 128)), (4, 4), 0.3, 4, seeds=1
    )
    monkeypatch.setattr(reproduce.Runs, "folder", lambda self, variant, seed: tmp_path / variant / f"seed{seed}")
    runs = reproduce.Runs(scale, "mini", None, 0.0, tmp_path / "results")
    over = reproduce.Runs(scale, "mini", 0.0, 0.0, tmp_path / "results")
    assert not reproduce.make(["a"], over, jobs=1) and not (tmp_path / "results").exists()  # no minutes: nothing is begun
    assert reproduce.make(["a", "i"], runs, jobs=1)
    out = tmp_path / "results"
    assert sorted(p.name for p in out.iterdir()) == ["REPORT.md", "a.json", "a.png", "i.json", "i.png"]
    rows = [json.loads(line) for line in (tmp_path / "base/seed0/measures.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 7] and len({row["questions_full"] for row in rows}) == 1
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "results" not in p.parts}
    assert reproduce.make(["a"], runs, jobs=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    report = (out / "REPORT.md").read_text()
    assert (
        "| a | copying stays absent long after the loss has flattened |" in report
        and "![Loss and copying over tokens](a.png)" in report
    )


def run(start, steps=2500, batch=16, level=0.9, seed=0, heads=None):
    """Rows of a run whose copying comes at step `start`, or never."""
    found = []
    for step in range(100, steps + 1, 100):
        has = start is not None and step >= start
        rng = np.random.default_rng([seed, step])
        found.append({
            "step": step, "tokens": step * batch * 128, "val_loss": 4 - 2 * has, "val_loss_new": 4.1,
            "val_loss_repeated": 3.9 - 3 * has,
            "copy_exact_full": level * has, "copy_exact_hex16": 0.5 * level * has, "recall": 1.0 * has, "pairs": 0.4 * has,
            "uses_hex16": [0.95 * has, 0.9 * (has and step >= start + 300), None, 0.0], "ceiling_hex16": [0.0, 0.3, 0.9, 0.99],
            "score_mended": [[0.1, 0.0], [0.8 * has, 0.01 * rng.random()], [0.7 * (has and step >= start + 200), 0.0]],
        })  # fmt: skip
    return found


TINY = reproduce.SCALES["tiny"]


def claims(letter, data, tmp_path):
    result = figures.DRAW[letter][0](data, TINY, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result)
    return [verdict for _, verdict, _ in result["claims"]]


def seeds(*starts, **options):
    return [run(start, seed=i, **options) for i, start in enumerate(starts)]


def test_a_typo_is_one_line_and_status_2(capsys):
    for main in (reproduce.main, eval_copy.main):
        with pytest.raises(SystemExit) as e:
            main(["a", "--scales=tiny"])
        assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


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
    worse = {"base": three, "dropout0.1": seeds(1500, 1600, None), "decay0.1": seeds(600, 700, 500, level=0.95)}
    assert claims("e", worse, tmp_path) == [FAILS, OPEN, HOLDS, HOLDS]
    grid = {f"batch{b}-context{c}": seeds(800, 900, 1000, steps=1500) for b in TINY.grid[0] for c in TINY.grid[1]}
    assert claims("f", grid, tmp_path) == [HOLDS, FAILS]
    rates = {f"rate{r:g}": seeds(*(k * round(1e-2 / r) * 100 for k in (1, 1, 2))) for r in TINY.rates}
    assert claims("g", rates, tmp_path) == [HOLDS]
    assert claims("h", worse | {"decay0.01": three}, tmp_path) == ["measured"]
    assert claims("i", {"base": three}, tmp_path) == [HOLDS]
    assert claims("j", {"base": three}, tmp_path) == ["measured"]
