"""The curves of a run, drawn once and redrawn while it trains."""

import json
import threading
import time

import matplotlib.pyplot as plt

from cli import run_command
from runtime import plots, rundir

ROWS = [{"step": s, "tokens": 10 * s, "loss": 3 - s / 9, "val_loss": 3.0, "induction_max": s / 9, "copy_exact_full": s / 9}
        for s in range(1, 9)]  # fmt: skip


def run_folder(path, rows):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_watched_run_is_redrawn_when_it_has_measured_something_and_until_it_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "POLL", 0.01)
    steps, draw = [], plots.draw_run
    monkeypatch.setattr(plots, "draw_run", lambda *args: (step := draw(*args), steps.append(step))[0])
    run = run_folder(tmp_path / "run", ROWS[:2])
    watcher = threading.Thread(target=plots.main, args=([str(run), "--watch"],))

    def wait(step):
        end = time.monotonic() + 60
        while step not in steps and time.monotonic() < end:
            time.sleep(0.01)
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    with rundir.locked(run):  # as a run does
        watcher.start()
        wait(2)
        run_folder(run, ROWS[:5])
        wait(5)
        time.sleep(0.1)
        assert watcher.is_alive() and steps == [2, 5]  # not drawn again while nothing changes
        run_folder(run, ROWS)
    watcher.join(60)
    assert not watcher.is_alive() and steps[-1] == 8
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}/curves.png: step 8"


def test_a_run_that_does_not_train_is_drawn_once(tmp_path, capsys):
    run = run_folder(tmp_path / "run", ROWS)
    assert plots.main([str(run), "--watch", f"--plot={tmp_path}/x.pdf"]) == 0
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF") and not (run / "run.lock").exists()
    for name, why in {
        "x.foo": "expected a name that ends in .png, .pdf, .svg",
        "x": "expected a name that ends in .png, .pdf, .svg",
        "none/x.png": "cannot be written; name a file in a folder that exists and is writable",
    }.items():
        assert run_command(plots.main, [str(run), f"--plot={tmp_path / name}"]) == 2
        assert capsys.readouterr().err == f"--plot={tmp_path / name}: {why}\n"
    assert run_command(plots.main, [str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err == f"{tmp_path}/none/metrics.jsonl: not found; name the directory of a run, such as runs/tiny\n"
    )


def test_the_loss_panel_shows_all_training_losses_of_a_run_without_validation():
    rows = [{"step": s, "tokens": 10 * s, "loss": 9 - s} for s in range(1, 9)]
    figure, axes = plots.panels(3)
    plots.run_curves(axes, rows)
    assert axes[0].get_ylim()[0] == 0 and axes[0].get_ylim()[1] >= 8 and axes[1].get_ylim() == (-0.03, 1.05)
    plt.close(figure)


def test_the_legend_explains_the_band_of_several_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    for seeds, labels in (([ROWS, ROWS], ["loss", "range over seeds"]), ([ROWS], ["loss"])):
        figure, (ax,) = plots.panels(1)
        plots.lines(ax, {"loss": seeds}, "loss")
        plots.save(figure, tmp_path / "x.png")
        assert [text.get_text() for text in ax.get_legend().get_texts()] == labels
