"""Pictures of runs and models.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles survive greyscale.

python -m runtime.plots runs/tiny            draws the curves of a run
python -m runtime.plots runs/tiny --watch    and redraws them while it trains
"""

import sys

from cli import Parser, exit_on_interrupt, run_command
from errors import UserError

if __name__ == "__main__":
    exit_on_interrupt()  # importing matplotlib takes seconds

import contextlib
import io
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator

from files import atomic_write, check_output
from runtime import curves, metrics, rundir

BLACK, ORANGE, BLUE, GREEN = "#000000", "#D55E00", "#0072B2", "#009E73"
LINES = [
    (BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (BLACK, ":"), ("#CC79A7", (0, (5, 1, 1, 1))), ("#E69F00", (0, (1, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
]  # fmt: skip
LOSSES = {"val_loss": "all tokens", "val_loss_new": "new tokens", "val_loss_repeated": "repeated tokens"}
PANELS = ("loss (nats per token)", "attention of the best heads", "copying accuracy")
POLL = 2.0  # seconds between checks of a watched run


def draw(file: str, results: list[dict], runs: list[list[dict]], maps: dict[str, str]):
    """Draws for each evaluated checkpoint the curves of its run, where runs has rows for it, and below them maps of its heads
    and the attention of two of them.

    results: as eval_copy.evaluate returns them; runs: the rows of metrics.jsonl; maps: score of heads -> title.
    """
    heights = [(3.9 if run else 0, 2.9) for run in runs]
    figure = plt.figure(figsize=(12.6, sum(map(sum, heights))), layout="constrained")
    rows = figure.subfigures(len(results), 1, squeeze=False, height_ratios=[*map(sum, heights)])[:, 0]
    for row, result, run, ratios in zip(rows, results, runs, heights, strict=True):
        parts = row.subfigures(2, 1, height_ratios=ratios) if run else [row]
        if run:
            axes = parts[0].subplots(1, 3)
            run_curves(axes, run)
            name = "top128" if "top128" in result["copy"] else next(iter(result["copy"]))
            baselines(axes[2], name, result["copy"][name]["kgram"]["ceiling"])
        *heat_maps, previous, induction = parts[-1].subplots(1, len(maps) + 2)
        for ax, (name, title) in zip(heat_maps, maps.items(), strict=True):
            heat_map(ax, result["heads"][name], title.split(":")[0])
        stripes((previous, induction), **result["stripes"])
    save(figure, file, dpi=130)


def run_curves(axes, rows: list[dict]):
    """Draws loss, best heads and copying over tokens, with a vertical line where each step on the way to copying has formed."""
    columns = dict.fromkeys(name for row in rows for name in row)
    titles = {names[0]: title for title, (names, _) in curves.FORMED.items()}
    heads = {name: f"best {titles.get(name, name)}" for name in columns if name.endswith("_max")}
    copying = {}
    for name in columns:
        for kind, text in {"copy_exact_": "all six", "copy_token_": "each token"}.items():
            if name.startswith(kind):
                copying[name] = f"{name.removeprefix(kind)}: {text}"
    for ax, title, names in zip(axes, PANELS, (LOSSES, heads, copying), strict=True):
        for name, label in names.items():
            lines(ax, {label: [rows]}, name, "tokens")
        for (what, tokens), style in zip(curves.formed(rows).items(), (":", "--", "-"), strict=False):
            label = f"{what} at {EngFormatter(sep='', places=1)(tokens)}" if ax is axes[1] else None
            ax.axvline(tokens, color="0.45", lw=0.9, ls=style, label=label)
        ax.set(title=title, xlabel="training tokens")
    losses = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    axes[0].plot(*zip(*losses, strict=True), color="0.8", lw=0.8, zorder=1, label="training batches")
    axes[0].set_ylim(bottom=0)  # only now: it ends autoscaling
    for ax in axes[1:]:
        ax.set_ylim(-0.03, 1.05)


def baselines(ax, name: str, levels: dict[int, float]):
    """Draws a horizontal line for the copying accuracy of each k-gram baseline, at the alphabet `name`."""
    labels = {}  # height of a label -> the k of all levels that are too close to be told apart
    for k, level in levels.items():
        ax.axhline(level, color="0.7", lw=0.8, ls=(0, (1, 2)), label=None if labels else f"{name}: k-gram, all six")
        near = next((y for y in labels if abs(y - level) < 0.04), level)
        labels.setdefault(near, []).append(str(k))
    for y, ks in labels.items():
        text = ", ".join(ks) + "-gram"
        ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), fontsize=6.5, color="0.35", va="center")


def heat_map(ax, scores, title: str):
    """Draws scores (n_layers, n_heads) from 0 to 1."""
    scores = np.array(scores)
    heat(ax, scores, range(len(scores)), range(scores.shape[1]), (0, 1), "{:.2f}" if scores.size <= 64 else None)
    ax.set(title=title, xlabel="head", ylabel="layer")


def stripes(axes, s: int, lead: int, heads: dict[str, tuple]):
    """Draws the attention of two heads on s random tokens that occur twice; see measures.attention.stripes.

    An arrow names the stripe: one back for a previous-token head, s - 1 back for an induction head, which looks from a token's
    second occurrence at what followed the first.
    """
    titles = {"previous": ("previous token", 1, "one back"), "induction": ("induction", s - 1, "to what\nfollowed")}
    for ax, (name, (layer, head, value, probs)) in zip(axes, heads.items(), strict=True):
        title, back, label = titles[name]
        ax.imshow(probs, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        for place in (ax.axhline, ax.axvline):
            place(lead + s - 0.5, color="0.6", lw=0.7, ls=":")
        q = lead + s + s // 3
        ax.annotate(
            label, (q - back, q), (0.97, 0.95), textcoords="axes fraction", ha="right", va="top", fontsize=7, color=ORANGE,
            arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 0.9},
        )  # fmt: skip
        middles = [lead + (s - 1) / 2, lead + s + (s - 1) / 2]
        ax.set_xticks(middles, ["tokens", "again"], fontsize=7)
        ax.set_yticks(middles, ["tokens", "again"], fontsize=7, rotation=90, va="center")
        ax.tick_params(length=0)
        ax.set(title=f"{title}: layer {layer} head {head}, {value:.2f}")
        ax.set_ylabel("from", fontsize=8)
        ax.set_xlabel("to", fontsize=8)


def panels(n: int):
    """Returns a figure of n panels in a row, and its axes."""
    figure, axes = plt.subplots(1, n, figsize=(4.2 * n, 3.6), squeeze=False, layout="constrained")
    return figure, axes[0]


def save(figure, file: str | Path, dpi=110):
    """Writes the picture in the format of the file's suffix, a legend below each panel that has labels."""
    for ax in figure.axes:
        ax.title.set_fontsize(10)
        handles, labels = ax.get_legend_handles_labels()
        if any(isinstance(area, PolyCollection) for area in ax.collections):
            handles.append(Patch(color="0.85"))
            labels.append("range over seeds")
        if labels:
            columns = min(len(labels), max(1, 54 // max(map(len, labels))))
            ax.legend(handles, labels, fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    picture = io.BytesIO()
    # The layout of subfigures leaves tick labels at the edge out of account; a tight box does not.
    figure.savefig(picture, format=Path(file).suffix.lstrip(".").lower(), dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    atomic_write(file, picture.getvalue())


def lines(ax, data: dict[str, list[list[dict]]], name: str, axis: str = "step"):
    """Draws for each label the mean of `name` over its seeds, and a band from the lowest to the highest of several seeds."""
    for label, seeds in data.items():
        values = {}
        for row in (row for rows in seeds for row in rows if row.get(name) is not None):
            values.setdefault(row[axis], []).append(row[name])
        found = sorted((x, min(ys), sum(ys) / len(ys), max(ys)) for x, ys in values.items() if len(ys) == len(seeds))
        if found:
            xs, low, mean, high = zip(*found, strict=True)
            colour, style = LINES[len(ax.lines) % len(LINES)]
            ax.plot(xs, mean, color=colour, ls=style, lw=1.6, label=label)
            if len(seeds) > 1:
                ax.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def bars(ax, changes: dict[str, dict]):
    """Draws a bar for each mean, and a whisker for its interval if it has one."""
    for i, change in enumerate(changes.values()):
        ax.bar(i, change["mean"], color=BLUE, width=0.55)
        if change["interval"]:
            ax.plot([i, i], change["interval"], color=BLACK, lw=1.4, marker="_", ms=9)
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xticks(range(len(changes)), changes, fontsize=8)


def heat(ax, values, rows, columns, scale=(None, None), text=None):
    """Draws values (rows, columns) as colours; `text` formats the number in each cell ("never" for NaN). Without it there may
    be many columns, of which some are labelled, and a bar explains the colours. scale: the values at the ends of the colours.
    """
    values, columns = np.asarray(values, dtype=float), list(columns)
    image = ax.imshow(values, vmin=scale[0], vmax=scale[1], cmap="cividis", aspect="auto", origin="lower")
    shown = range(len(columns)) if text else range(len(columns) - 1, -1, -max(len(columns) // 5, 1))
    ax.set_xticks(list(shown), [f"{columns[i]:,}" for i in shown])
    ax.set_yticks(range(len(rows)), rows)
    if not text:
        ax.figure.colorbar(image, ax=ax)
        return
    middle = image.norm.vmin + (image.norm.vmax - image.norm.vmin) / 2 if np.isfinite(values).any() else 0
    for (i, j), v in np.ndenumerate(values):
        word, colour = ("never", "black") if np.isnan(v) else (text.format(v), "black" if v > middle else "white")
        ax.text(j, i, word, ha="center", va="center", fontsize=8, color=colour)


def doses(ax, names: list[str], data: dict[str, list[list[float]]]):
    """Draws for each label its values at each named dose, doses at equal distances, and a line through their means."""
    for (colour, style), (label, values) in zip(LINES, data.items(), strict=False):
        ax.plot(range(len(names)), [np.mean(of) for of in values], color=colour, ls=style, lw=1.6, label=label)
        ax.plot([i for i, of in enumerate(values) for _ in of], np.concatenate(values), "o", color=colour, ms=4, mfc="none")
    ax.set_xticks(range(len(names)), names)


def points(ax, found: list[tuple[float, float]], exponents: dict[str, float]):
    """Draws points on logarithmic axes, and for each label the power law of its exponent through their middle."""
    if found:
        xs, ys = np.array(found).T
        ax.plot(xs, ys, "o", color=BLUE, ms=5, mfc="none", label="one seed")
        line = np.array([xs.min(), xs.max()])
        for (colour, style), (label, exponent) in zip(LINES[1:], exponents.items(), strict=False):
            level = np.exp(np.mean(np.log(ys) - exponent * np.log(xs)))
            ax.plot(line, level * line**exponent, color=colour, ls=style, label=label)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(sorted({x for x, _ in found}), [f"{x:g}" for x in sorted({x for x, _ in found})])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_minor_formatter("")


def draw_run(folder: Path, file: Path) -> int:
    """Draws the curves of a run directory as they are now; returns the step of its last row."""
    rows = metrics.read(folder / "metrics.jsonl")
    picture, axes = panels(3)
    run_curves(axes, rows)
    save(picture, file)
    return rows[-1]["step"] if rows else 0


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m runtime.plots", description="Draws loss, attention heads and copying of a run over its tokens."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the picture (default: curves.png in the run directory)")
    parser.add_argument("--watch", action="store_true", help="redraw until the run ends or Ctrl-C is pressed")
    args = parser.parse_args(argv)
    rows, file = args.run / "metrics.jsonl", args.plot or args.run / "curves.png"
    if not rows.exists():
        raise UserError(f"{rows}: not found; name the directory of a run, such as runs/tiny")
    check_output("--plot", file, ".png", ".pdf", ".svg")
    drawn = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            is_running = args.watch and rundir.is_running(args.run)
            changed = rows.stat().st_mtime_ns
            if changed != drawn:
                print(f"{file}: step {draw_run(args.run, file):,}", flush=True)
                drawn = changed
            if not is_running:
                break
            time.sleep(POLL)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
