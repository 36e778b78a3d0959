"""What several figures share: their runs, the onset in them, and curves of measures.

The functions that name the runs of a figure take the scale and return {name of a variant: its settings, beside those of the
scale}.
"""

import math
import re

import numpy as np

from paper.report import above_zero, law_text, signed
from paper.statistics import exponents, rounding_of_a_difference, summary
from runtime.curves import at_the_end, onset
from runtime.plots import lines, panels, points, save

CORPUS = ("frequency", "reliability", "predictable")  # the measures of paper.repetition
LOSSES = {"val_loss": "validation loss", "val_loss_new": "loss on new tokens", "val_loss_repeated": "loss on repeated tokens"}
NAMES = LOSSES | {"induction_max": "best induction head"} | {name: name for name in CORPUS}


def base(scale):
    return {"base": {}}


def sized(scale, batch: int, context: int, steps: int) -> dict:
    """Returns the settings of a run of another batch size or context.

    It is validated on as much text as the base, and evaluated more often if its updates see more tokens, by the square root of
    their ratio: halfway between equal steps and equal tokens.
    """
    b = scale.base
    ratio = b.batch_size * b.seq_len / (batch * context)
    return {
        "batch_size": batch, "seq_len": context, "max_steps": steps, "eval_batches": max(round(b.eval_batches * ratio), 1),
        "eval_interval": max(round(b.eval_interval * min(math.sqrt(ratio), 1)), 1),
    }  # fmt: skip


def batches(scale):
    return {f"batch{batch}": sized(scale, batch, scale.base.seq_len, steps) for batch, steps in scale.batches.items()}


def rates(scale, most=None):
    return {f"rate{rate:g}": {"learning_rate": rate} for rate in scale.rates[-most if most else 0 :]}


def depths(scale):
    return {f"layers{n}": {"n_layers": n} for n in scale.layers}


def warmups(scale):
    return {f"warmup{n}": {"warmup_steps": n} for n in scale.warmups}


def repeats(scale):
    """Returns the base with more and more inserted copies."""
    b, found = scale.base, {}
    for share in scale.repeats:
        other = {"data": f"{b.data}-repeat{share:g}", "prepare": f"{b.prepare} --repeat={share:g}"}
        found[f"repeat{share:g}"] = other if share or "--repeat" in b.prepare else {}
    return found


def weights(scale):
    return {f"weight{weight:g}": {"repeated_weight": float(weight)} for weight in scale.weights}


def grid(scale):
    found = {}
    for context, batches in scale.grid.items():
        for batch, steps in batches.items():
            settings = sized(scale, batch, context, steps)
            if scale.data and context != scale.base.seq_len:
                settings |= {"data": f"{scale.base.data}{context}", "prepare": scale.data.format(context=context)}
            found[f"batch{batch}-context{context}"] = settings
    return found


def onsets(seeds, scale) -> list[float | None]:
    """Returns the onset of copying in each seed, in steps."""
    return [onset(rows, scale.threshold, scale.copying) for rows in seeds]


def every(rows) -> float:
    """Returns the distance of the first two evaluations of a run, in steps; that of the last two may be shorter."""
    return rows[1]["step"] - rows[0]["step"] if len(rows) > 1 else 0.0


def laws(data, scale, variants, names: dict[str, str]) -> list[tuple[str, dict | None, str]]:
    """Fits the onset in the variants of `data` as a power law of what they vary, names: {its name: the setting}.

    Returns (suffix of its claims, the law, its wording) for each definition of onset.
    """
    found = []
    configs = {variant: scale.load(variants[variant]) for variant in data}
    cells = {variant: tuple(getattr(c, name) for name in names.values()) for variant, c in configs.items()}
    for by, column, threshold in scale.each_onset():
        starts = {cells[variant]: [onset(rows, threshold, column) for rows in seeds] for variant, seeds in data.items()}
        law = exponents(starts, {cells[variant]: every(seeds[0]) for variant, seeds in data.items()})
        found.append((by, law, law_text(law, names)))
    return found


def law_claims(found, claim: str, judge, tail="") -> list[list[str]]:
    return [[claim + by, judge(law), text + (tail if law else "")] for by, law, text in found]


def apart(seeds, scale):
    """Returns the claim on how far the onsets by copying and by attention lie apart, where the scale has both."""
    if scale.attention is None:
        return []
    starts = [[onset(rows, level, column) for _, column, level in scale.each_onset()] for rows in seeds]
    waits = [copying - attention for copying, attention in starts if None not in (copying, attention)]
    wait = summary(waits, rounding_of_a_difference(every(seeds[0]))) if waits else None
    text = f"onset by copying minus onset by attention, in steps: {signed(wait, 0)}" if wait else "no seed has both"
    return [["an induction head forms before copying comes", above_zero(wait and wait["interval"]), text]]


def describe_runs(name: str, seeds, planned: int, config, scale, columns) -> dict:
    """Returns a row of REPORT.md on a variant: how many runs there are, their onsets, and the columns' values at the end."""
    kinds = (scale.copying.replace("exact", "token"), scale.copying.replace("token", "exact"), "val_loss", *columns)
    return {
        "runs": label(name), "seeds": len(seeds), "planned": planned, "steps": config.max_steps,
        "tokens a step": config.batch_size * config.seq_len,
        "onset": {f"onset{by}": [onset(rows, level, column) for rows in seeds] for by, column, level in scale.each_onset()},
        "end": {measure_name(kind): end_of(kind, seeds) for kind in kinds},
    }  # fmt: skip


def end_of(kind: str, seeds) -> dict | None:
    """Returns the mean of a measure at the end, with its interval; None if the runs do not have it."""
    if not seeds or any(kind not in rows[-1] for rows in seeds):
        return None
    found = summary(at_the_end(rows, kind) for rows in seeds)
    if kind in CORPUS:
        found["interval"] = None  # of the data: the same in every run
    elif found["interval"]:
        found["interval"] = np.clip(found["interval"], 0, None if kind in LOSSES else 1).tolist()  # all others are shares
    return found


def label(variant: str) -> str:
    """batch16-context128 -> batch 16, context 128"""
    return re.sub(r"([a-z])(\d)", r"\1 \2", variant.replace("-", ", "))


def measure_name(name: str) -> str:
    """copy_exact_full -> full, all six tokens"""
    if name in NAMES:
        return NAMES[name]
    _, kind, alphabet = name.split("_")
    return f"{alphabet}, {'all six tokens' if kind == 'exact' else 'each token'}"


def describe(ax, name: str, axis: str):
    copying = name.startswith("copy_")
    units = dict(ylabel="nats per token")
    if name != "val_loss":
        units = dict(ylabel="share right" if copying else "attention", ylim=(-0.03, 1.03))
    xlabel = "update steps" if axis == "step" else "training tokens"
    ax.set(title="copying: " * copying + measure_name(name), xlabel=xlabel, **units)


def draw_curves(axes, data, columns: list[tuple[str, str]]):
    """Draws each (measure, axis) into a panel, with a line for each variant."""
    for ax, (name, axis) in zip(axes, columns, strict=True):
        lines(ax, {f"{label(variant)} (n = {len(seeds)})": seeds for variant, seeds in data.items()}, name, axis)
        describe(ax, name, axis)


def draw_copying_and_loss(file, data, scale):
    picture, axes = panels(2)
    draw_curves(axes, data, [(scale.copying, "step"), ("val_loss", "step")])
    save(picture, file)


def draw_onsets(ax, data, scale, variants, names: dict[str, str], found, others: dict[str, float]):
    """Draws the onset of copying in each seed over the setting in `names`, with the exponent `found` by laws and others."""
    ((name, setting),) = names.items()
    law = found[0][1]
    xs = {variant: getattr(scale.load(variants[variant]), setting) for variant in data}
    starts = [(xs[variant], start) for variant, seeds in data.items() for start in onsets(seeds, scale) if start is not None]
    points(ax, starts, ({f"{name}^{law['exponents'][0]:.2f}": law["exponents"][0]} if law else {}) | others)
    ax.set(title="onset of copying, each seed", xlabel=name, ylabel="update steps")
