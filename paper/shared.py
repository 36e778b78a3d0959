"""What several figures share: their variants, the onset in their runs, and curves of measures.

Variants are functions of the scale and return {name of a variant: its settings, beside those of the scale}.
"""

import re

import numpy as np

from paper.report import law_text, steps_text
from paper.statistics import exponents
from runtime.curves import at_the_end, onset
from runtime.plots import lines, panels, save


def base(scale):
    return {"base": {}}


def batches(scale):
    """As many tokens as the base sees, and as many steps: both are compared."""
    b = scale.base
    steps = {batch: max(b.max_steps, b.max_steps * b.batch_size // batch) for batch in scale.batches}
    return {f"batch{batch}": {"batch_size": batch, "max_steps": steps[batch]} for batch in scale.batches}


def rates(scale, most=None):
    return {f"rate{rate:g}": {"learning_rate": rate} for rate in scale.rates[-most if most else 0 :]}


def treatments(scale):
    return base(scale) | {"dropout0.1": {"attn_dropout": 26 / 256}, "decay0.1": {"weight_decay": 0.1}}


def grid(scale):
    found = {}
    for batch, steps in zip(scale.grid[0], scale.grid_steps, strict=True):
        for context in scale.grid[1]:
            settings = {"batch_size": batch, "seq_len": context, "max_steps": steps}
            if scale.data and context != scale.base.seq_len:
                settings |= {"data": f"{scale.base.data}{context}", "prepare": scale.data.format(context=context)}
            found[f"batch{batch}-context{context}"] = settings
    return found


def onsets(seeds, scale) -> list[float | None]:
    return [onset(rows, scale.threshold, scale.copying) for rows in seeds]


def onset_text(starts, seeds) -> str:
    return steps_text(starts, seeds[0][-1]["step"])


def every(data) -> float:
    """The distance of the last two evaluations of the runs, in steps."""
    rows = next(iter(data.values()))[0]
    return rows[-1]["step"] - rows[-2]["step"] if len(rows) > 1 else 0.0


def laws(data, scale, cells, names) -> tuple[list[tuple[str, dict | None, str]], dict]:
    """Fits the onset in the variants of `data` as a power law of their `cells`.

    Returns (suffix of its claims, the law, its wording) for each definition of onset, and what of it is kept as JSON.
    """
    found, kept = [], {"onset": {}, "fit": []}
    for by, column, threshold in scale.each_onset():
        starts = {variant: [onset(rows, threshold, column) for rows in seeds] for variant, seeds in data.items()}
        each = [f"{label(variant)}: {onset_text(starts[variant], seeds)}" for variant, seeds in data.items()]
        law = exponents(dict(zip(cells, starts.values(), strict=True)), every(data))
        found.append((by, law, f"onset at {'; '.join(each)}; {law_text(law, names)}"))
        kept["onset"] |= {f"{variant}{by}": x for variant, x in starts.items()}
        kept["fit"].append(law)
    return found, kept


def law_claims(found, claim: str, judge, tail="") -> list[list[str]]:
    return [[claim + by, judge(law), text + tail] for by, law, text in found]


def mean_end(seeds, name: str) -> float:
    return float(np.mean([at_the_end(rows, name) for rows in seeds]))


def label(variant: str) -> str:
    """batch16-context128 -> batch 16, context 128"""
    return re.sub(r"([a-z])(\d)", r"\1 \2", variant.replace("-", ", "))


def measure_name(name: str) -> str:
    """copy_exact_full -> full, all six tokens"""
    if name == "val_loss":
        return "validation loss"
    _, kind, alphabet = name.split("_")
    return f"{alphabet}, {'all six tokens' if kind == 'exact' else 'each token'}"


def describe(ax, name: str, axis: str):
    copying = name.startswith("copy_")
    units = dict(ylabel="share right", ylim=(-0.03, 1.03)) if copying else dict(ylabel="nats per token")
    xlabel = "update steps" if axis == "step" else "training tokens"
    ax.set(title="copying: " * copying + measure_name(name), xlabel=xlabel, **units)


def draw_curves(file, data, columns: list[tuple[str, str]]):
    """One panel for each (measure, axis), with a line for each variant."""
    picture, axes = panels(len(columns))
    for ax, (name, axis) in zip(axes, columns, strict=True):
        lines(ax, {label(variant): seeds for variant, seeds in data.items()}, name, axis)
        describe(ax, name, axis)
    save(picture, file)
