"""The plots. Colours are Okabe and Ito's, which colour-blind readers tell apart; line styles survive greyscale."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from runtime import metrics

BLACK, ORANGE, BLUE, GREEN = "#000000", "#D55E00", "#0072B2", "#009E73"
LINES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (BLACK, ":"), ("#CC79A7", (0, (5, 1, 1, 1))), ("#E69F00", (0, (1, 1)))]


def draw(file: str, results: list[dict]):
    """One row of panels per evaluated checkpoint: its heads, and before them the curves of a run directory."""
    runs = [metrics.read(path) if (path := Path(r["path"]) / "metrics.jsonl").exists() else [] for r in results]
    columns = 4 if any(runs) else 2
    widths = [3, 3, 1.5, 1.5][-columns:]
    figure, axes = plt.subplots(
        len(results), columns, figsize=(1.55 * sum(widths), 3.6 * len(results)), squeeze=False, width_ratios=widths,
        layout="constrained",
    )  # fmt: skip
    for panels, result, rows in zip(axes, results, runs, strict=True):
        if rows:
            copy_curves(panels[0], rows, result)
            loss_curves(panels[1], rows)
        elif columns == 4:
            panels[0].axis("off")
            panels[1].axis("off")
        heat_map(panels[-2], result["heads"]["induction"], "induction")
        heat_map(panels[-1], result["heads"]["previous"], "previous token")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def copy_curves(ax, rows: list[dict], result: dict):
    """Copy accuracy over steps, with what k-gram matchers score on the same kind of samples as level lines."""
    full = result["copy"].get("full") or next(iter(result["copy"].values()))
    labels = {}  # height of the text -> the k of all levels too near to be told apart
    for k, level in full["kgram"]["ceiling"].items():
        ax.axhline(level, color="0.6", lw=0.8, ls=":")
        near = next((y for y in labels if abs(y - level) < 0.03), level)
        labels.setdefault(near, []).append(k)
    for y, ks in labels.items():
        text = ", ".join(map(str, ks)) + "-gram"
        ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), fontsize=6.5, color="0.35", va="center")
    for name, label, colour, style in (
        ("copy_exact_full", "all six tokens", BLUE, "-"),
        ("copy_token_full", "each token", GREEN, "--"),
        ("copy_exact_hex16", "all six, hex16", ORANGE, "-."),
    ):
        plot(ax, rows, name, label, colour, style)
    ax.set(title="copying from context", xlabel="update steps", ylabel="accuracy", ylim=(-0.03, 1.05))
    ax.legend(fontsize=7, loc=(0.5, 0.15))


def loss_curves(ax, rows: list[dict]):
    plot(ax, rows, "val_loss_new", "new tokens", BLACK, "-")
    plot(ax, rows, "val_loss_repeated", "repeated tokens", ORANGE, "--")
    plot(ax, rows, "val_loss", "all tokens", BLUE, ":")
    ax.set(title="validation loss", xlabel="update steps", ylabel="nats per token", ylim=(0, None))
    ax.legend(fontsize=7)


def plot(ax, rows, name, label, colour, style):
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        ax.plot(*zip(*points, strict=True), color=colour, ls=style, lw=1.6, label=label)


def heat_map(ax, scores, title: str):
    """scores (n_layers, n_heads), mean attention in 0..1."""
    scores = np.array(scores)
    ax.imshow(scores, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
    ax.set(title=title, xlabel="head", ylabel="layer", xticks=range(scores.shape[1]), yticks=range(scores.shape[0]))
    ax.title.set_fontsize(10)
    if scores.size <= 64:
        for (i, j), v in np.ndenumerate(scores):
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="black" if v > 0.5 else "white")


def panels(n: int):
    """A figure of n panels in a row, and its axes."""
    figure, axes = plt.subplots(1, n, figsize=(4.2 * n, 3.2), squeeze=False, layout="constrained")
    return figure, axes[0]


def save(figure, file: Path):
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def bands(ax, data: dict[str, list[list[dict]]], name: str, axis: str = "step"):
    """Of each label a line, the mean of `name` over its seeds, and a band from the least to the greatest of them."""
    for label, seeds in data.items():
        values = {}
        for row in (row for rows in seeds for row in rows if row.get(name) is not None):
            values.setdefault(row[axis], []).append(row[name])
        found = sorted((x, min(ys), sum(ys) / len(ys), max(ys)) for x, ys in values.items() if len(ys) == len(seeds))
        if found:
            (colour, style), (xs, low, mean, high) = LINES[len(ax.lines) % len(LINES)], zip(*found, strict=True)
            ax.plot(xs, mean, color=colour, ls=style, lw=1.6, label=label)
            ax.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)


def bars(ax, changes: dict[str, dict]):
    """A bar for each mean and a whisker for its interval."""
    for i, change in enumerate(changes.values()):
        low, high = change["interval"]
        ax.bar(i, change["mean"], color=BLUE, width=0.55)
        ax.plot([i, i], [low, high], color=BLACK, lw=1.4, marker="_", ms=9)
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xticks(range(len(changes)), changes, fontsize=8)


def heat(ax, values, rows, columns, scale=(None, None), text=None):
    """values (rows, columns), and with `text` each of them in its cell, `never` for one that is not a number. Without it there
    may be many columns, of which some are labelled; scale: the values at the ends of the colours, which a bar then shows.
    """
    values, columns = np.asarray(values, dtype=float), list(columns)
    image = ax.imshow(values, vmin=scale[0], vmax=scale[1], cmap="cividis", aspect="auto", origin="lower")
    shown = range(len(columns)) if text else range(len(columns) - 1, -1, -max(len(columns) // 5, 1))
    ax.set_xticks(list(shown), [f"{columns[i]:,}" for i in shown])
    ax.set_yticks(range(len(rows)), rows)
    if text:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0
        for (i, j), v in np.ndenumerate(values):
            word, colour = ("never", "black") if np.isnan(v) else (text.format(v), "black" if v > middle else "white")
            ax.text(j, i, word, ha="center", va="center", fontsize=9, color=colour)
    else:
        ax.figure.colorbar(image, ax=ax)


def points(ax, found: list[tuple[float, float]], exponent: float | None, name: str):
    """Points on logarithmic axes, and the power law of that exponent through their middle."""
    if found:
        xs, ys = np.array(found).T
        ax.plot(xs, ys, "o", color=BLUE, ms=5, mfc="none", label="a seed")
        if exponent is not None:
            line = np.array([xs.min(), xs.max()])
            level = np.exp(np.mean(np.log(ys) - exponent * np.log(xs)))
            ax.plot(line, level * line**exponent, color=ORANGE, ls="--", label=f"{name}^{exponent:.2f}")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(sorted({x for x, _ in found}), [f"{x:g}" for x in sorted({x for x, _ in found})])
    ax.set_xticks([], minor=True)
    for formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        formatter("{x:,.0f}")
