"""The figures of reproduce.py: from rows of measures to a picture, and to each claim with what was measured and whether it
holds.

A figure is a function of data, {variant: [rows of seed 0, rows of seed 1, ...]}, and of the scale. It returns what is kept as
JSON; its "claims" are [claim, verdict, what was measured].
"""

import json
from pathlib import Path

import numpy as np

from paper.onset import at_the_end, difference, exponents, interval, onset
from runtime.plots import bands, bars, heat, panels, points, save

COPY, HEX = "copy_exact_full", "copy_exact_hex16"
HOLDS, FAILS, OPEN, TOLD = "holds", "fails", "cannot be told", "measured"
STEPS, TOKENS = {"step": "update steps"}, {"tokens": "tokens"}
ACCURACY = dict(ylabel="exact match", ylim=(-0.03, 1.03))
LOSS = dict(ylabel="nats per token")


def figure_a(data, scale, file):
    (seeds,) = data.values()
    figure, (left, right) = panels(2)
    bands(left, {"full alphabet": seeds}, COPY, "tokens")
    bands(left, {"hex16": seeds}, HEX, "tokens")
    for name, label in (("val_loss_new", "new tokens"), ("val_loss_repeated", "repeated tokens"), ("val_loss", "all")):
        bands(right, {label: seeds}, name, "tokens")
    left.set(title="copying", xlabel="tokens", **ACCURACY)
    right.set(title="validation loss", xlabel="tokens", **LOSS)
    save(figure, file)

    starts, waits, rises, fallen = onsets(seeds, scale), [], [], []
    for rows, start in zip(seeds, starts, strict=True):
        if start is not None:
            reached = [next(r["step"] for r in rows if r[COPY] >= share * at_the_end(rows, COPY)) for share in (0.1, 0.9)]
            losses = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
            last = [loss for step, loss in losses if step < reached[0]][-1:] or [losses[0][1]]
            fallen.append((losses[0][1] - last[0]) / (losses[0][1] - min(loss for _, loss in losses)))
            waits.append(reached[0])
            rises.append(reached[1] - reached[0])
    shares, rose, waited = ", ".join(f"{x:.0%}" for x in fallen), ", ".join(map(str, rises)), ", ".join(map(str, waits))
    return {
        "onset": starts, "rise_steps": rises, "loss_fallen_before": fallen,
        "claims": [
            ["copying stays absent long after the loss has flattened", verdict(fallen, lambda x: x >= 0.9),
             f"onset at {said(starts, seeds)}; {shares} of the whole fall of the validation loss came before copying rose"],
            ["when copying comes, it comes abruptly", verdict(list(zip(rises, waits, strict=True)), lambda x: x[0] < x[1]),
             f"from a tenth to nine tenths of its final value in {rose} steps, after {waited}"],
        ],
    }  # fmt: skip


def figure_b(data, scale, file):
    figure, axes = panels(4)
    labels = {f"batch {b}": seeds for b, seeds in zip(scale.batches, data.values(), strict=True)}
    for ax, (name, axis) in zip(
        axes, ((COPY, "step"), (COPY, "tokens"), ("val_loss", "step"), ("val_loss", "tokens")), strict=True
    ):
        bands(ax, labels, name, axis)
        what, units = ("copying", ACCURACY) if name == COPY else ("validation loss", LOSS)
        ax.set(title=f"{what} by {'steps' if axis == 'step' else 'tokens'}", xlabel=(STEPS | TOKENS)[axis], **units)
    save(figure, file)

    cells = {(b,): onsets(seeds, scale) for b, seeds in zip(scale.batches, data.values(), strict=True)}
    law = exponents(cells)
    how = OPEN
    if told := intervals(law, cells):
        low, high = told[0]
        how = FAILS if not low <= 0 <= high else HOLDS if low > -0.5 else OPEN
    each = "; ".join(f"batch {b}: {said(cells[b,], seeds)}" for b, seeds in zip(scale.batches, data.values(), strict=True))
    claim = "when copying comes depends on update steps, not on tokens"
    return {
        "onset": {b: starts for (b,), starts in cells.items()}, "fit": law,
        "claims": [[claim, how, f"onset at {each}; {law_of(law, 'batch')}, where 0 is steps alone and -1 tokens alone"]],
    }  # fmt: skip


def figure_c(data, scale, file):
    rates = scale.rates[-len(data) :]
    figure, (left, right) = panels(2)
    for ax, name, title, units in ((left, COPY, "copying", ACCURACY), (right, "val_loss", "validation loss", LOSS)):
        bands(ax, {f"rate {r:g}": seeds for r, seeds in zip(rates, data.values(), strict=True)}, name)
        ax.set(title=title, xlabel="update steps", **units)
    save(figure, file)

    cells = {(r,): onsets(seeds, scale) for r, seeds in zip(rates, data.values(), strict=True)}
    law, (first, *_, last) = exponents(cells), data.values()
    gain = difference(COPY, list(zip(first, last, strict=True)))
    each = "; ".join(f"{r:g}: {said(cells[r,], seeds)}" for r, seeds in zip(rates, data.values(), strict=True))
    ends = ", ".join(f"{np.mean([at_the_end(rows, COPY) for rows in seeds]):.2f}" for seeds in data.values())
    return {
        "onset": {f"{r:g}": starts for (r,), starts in cells.items()}, "fit": law, "gain": gain,
        "claims": [
            ["a higher learning rate makes copying come earlier", below_zero((intervals(law, cells) or [None])[0]),
             f"onset by rate, at {each}; {law_of(law, 'rate')}"],
            ["... and stronger", above_zero(gain["interval"]),
             f"final exact match {ends} at {', '.join(f'{r:g}' for r in rates)}; last less first {signed(gain)}"],
        ],
    }  # fmt: skip


def figure_d(data, scale, file):
    (seeds,) = data.values()
    figure, axes = panels(len(seeds) + 1)
    firsts, steps = [], [row["step"] for row in seeds[0]]
    for seed, (ax, rows) in enumerate(zip(axes, seeds, strict=False)):
        best = np.array([np.max(row["score_mended"], axis=1) for row in rows]).T  # (layers, steps)
        heat(ax, best, range(len(best)), steps, scale=(0, 1))
        ax.set(title=f"best induction score I, seed {seed}", xlabel="update steps", ylabel="layer")
        firsts.append([onset([{"step": s, "I": i} for s, i in zip(steps, layer, strict=True)], 0.3, "I") for layer in best])
    bands(axes[-1], {"exact match": seeds}, COPY)
    bands(axes[-1], {"best head": [[row | {"I": np.max(row["score_mended"])} for row in rows] for rows in seeds]}, "I")
    axes[-1].set(title="copying and the best head", xlabel="update steps", ylim=(-0.05, 1.05))
    save(figure, file)

    order = [[x for x in first if x is not None] for first in firsts]
    told = [x for x in order if len(set(x)) > 1]
    text = "; ".join(f"seed {seed}: " + by(first, "layer {}", 0) for seed, first in enumerate(firsts))
    claim = "induction heads form from shallow to deep layers"
    return {
        "first_step": firsts,
        "claims": [[claim, verdict(told if len(told) == len(order) else [], lambda x: x == sorted(x)),
                    f"first step of two with a head of I at or above 0.3: {text}"]],
    }  # fmt: skip


def figure_e(data, scale, file):
    figure, (left, right) = panels(2)
    for ax, name, title, units in ((left, COPY, "copying", ACCURACY), (right, "val_loss", "validation loss", LOSS)):
        bands(ax, data, name)
        ax.set(title=title, xlabel="update steps", **units)
    save(figure, file)

    base, claims, found = data["base"], [], {}
    for name, title in (("dropout0.1", "attention dropout of 10%"), ("decay0.1", "weight decay of 0.1")):
        pairs = list(zip(base, data[name], strict=True))
        starts = [onsets(pair, scale) for pair in pairs]
        both = [b - a for a, b in starts if None not in (a, b)]
        change = {"mean": float(np.mean(both)), "interval": interval(both)} if both else None
        final, hex16 = difference(COPY, pairs), difference(HEX, pairs)
        found[name] = {"onset": [b for _, b in starts], "onset_change": change, COPY: final, HEX: hex16}
        lost = any(b is None for _, b in starts) and not any(a is None for a, _ in starts)
        text = f"onset at {said([b for _, b in starts], data[name])}, without at {said([a for a, _ in starts], base)}"
        text += f"; change {signed(change, 0)} steps" if change else ""
        claims.append(
            [f"{title} makes copying come earlier", FAILS if lost else below_zero(change and change["interval"]), text]
        )
        text = f"change of the final exact match {signed(final)}, at hex16 {signed(hex16)}"
        claims.append([f"{title} improves the final accuracy", above_zero(final["interval"]), text])
    return found | {"claims": claims}


def figure_f(data, scale, file):
    batches, contexts = scale.grid
    cells = {(b, c): onsets(data[f"batch{b}-context{c}"], scale) for b in batches for c in contexts}
    figure, (left, right) = panels(2)
    middle = {x: np.median([np.inf if o is None else o for o in starts]) for x, starts in cells.items()}
    for ax, unit, title in ((left, None, "onset, update steps"), (right, 1e6, "onset, millions of tokens")):
        grid = [[middle[b, c] * (b * c / unit if unit else 1) for c in contexts] for b in batches]
        heat(ax, np.where(np.isinf(grid), np.nan, grid), batches, contexts, text="{:.2f}" if unit else "{:.0f}")
        ax.set(title=f"{title}, median of {scale.seeds} seeds", xlabel="context (tokens)", ylabel="batch (sequences)")
    save(figure, file)

    law, claims = exponents(cells), []
    each = "; ".join(f"{b} x {c}: {said(o, data[f'batch{b}-context{c}'])}" for (b, c), o in cells.items())
    for claim, at in (
        ("onset comes at a constant number of steps (the paper: exponents 0 and 0)", 0.0),
        ("onset comes at tokens ~ sqrt(batch x context) (Aoyama: exponents -0.5 and -0.5)", -0.5),
    ):
        inside = [low <= at <= high for low, high in intervals(law, cells)]
        claims.append([claim, verdict([inside] if inside else [], all), law_of(law, "batch", "context")])
    claims[0][2] += f"; onset by batch x context, at {each}"
    return {"onset": {f"{b}x{c}": starts for (b, c), starts in cells.items()}, "fit": law, "claims": claims}


def figure_g(data, scale, file):
    cells = {(r,): onsets(seeds, scale) for r, seeds in zip(scale.rates, data.values(), strict=True)}
    law, steps = exponents(cells), [row["step"] for row in next(iter(data.values()))[0]]
    figure, (left, right) = panels(2)
    grid = [[np.mean([rows[i][COPY] for rows in seeds]) for i in range(len(steps))] for seeds in data.values()]
    heat(left, np.array(grid), [f"{r:g}" for r in scale.rates], steps, scale=(0, 1))
    left.set(title=f"exact match, mean of {scale.seeds} seeds", xlabel="update steps", ylabel="learning rate")
    points(
        right, [(r, o) for (r,), starts in cells.items() for o in starts if o is not None], law and law["exponents"][0], "rate"
    )
    right.set(title="onset of each seed", xlabel="learning rate", ylabel="update steps")
    save(figure, file)

    how = verdict(intervals(law, cells), lambda x: x[0] <= -1 <= x[1])
    each = "; ".join(f"{r:g}: {said(cells[r,], seeds)}" for r, seeds in zip(scale.rates, data.values(), strict=True))
    claim = "open question 2: onset comes at a constant rate x steps (exponent -1)"
    return {
        "onset": {f"{r:g}": starts for (r,), starts in cells.items()}, "fit": law,
        "claims": [[claim, how, f"onset by rate, at {each}; {law_of(law, 'rate')}"]],
    }  # fmt: skip


def figure_h(data, scale, file):
    names = {COPY: "final exact match", "val_loss_repeated": "loss on repeated tokens", "val_loss_new": "loss on new tokens"}
    treated = {name: list(zip(data["base"], seeds, strict=True)) for name, seeds in data.items() if name != "base"}
    found = {treatment: {name: difference(name, pairs) for name in names} for treatment, pairs in treated.items()}
    figure, axes = panels(3)
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        bars(ax, {treatment: changes[name] for treatment, changes in found.items()})
        ax.set(title=title, ylabel="change against base")
    save(figure, file)

    text = "; ".join(
        f"{t}: " + ", ".join(f"{names[n]} {signed(x, 3)}" for n, x in changes.items()) for t, changes in found.items()
    )
    return found | {"claims": [["open question 3: what dropout and decay do to copying and to loss, apart", TOLD, text]]}


def figure_i(data, scale, file):
    (seeds,) = data.values()
    figure, (left, right) = panels(2)
    ladder = [[[{"step": r["step"], "use": r["uses_hex16"][k]} for r in rows] for rows in seeds] for k in range(4)]
    for k, runs in enumerate(ladder, 1):
        bands(left, {f"token {k} back": runs}, "use")
    left.set(title="hex16: the model goes by ...", xlabel="update steps", ylabel="0: by chance, 1: always", ylim=(-0.2, 1.08))
    bands(right, {"exact match": seeds}, HEX)
    for k, level in enumerate(seeds[0][-1]["ceiling_hex16"], 1):
        right.axhline(level, color="0.6", lw=0.8, ls=":")
        right.annotate(f"k = {k}", (1.01, level), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    right.set(title="hex16, and readers of k tokens", xlabel="update steps", **ACCURACY)
    save(figure, file)

    firsts = [[onset(ladder[k][seed], 0.5, "use") for k in range(4)] for seed in range(len(seeds))]
    told = [[x for x in first if x is not None] for first in firsts]
    how = verdict([x for x in told if len(x) > 1] if all(len(x) > 1 for x in told) else [], lambda x: x == sorted(set(x)))
    text = "; ".join(f"seed {seed}: " + by(first, "k = {}", 1) for seed, first in enumerate(firsts))
    claim = "the surge at hex16 climbs k = 1, 2, 3, 4 one after the other"
    return {
        "first_step": firsts,
        "claims": [[claim, how, f"first step of two that go by token k back in half of the cases: {text}"]],
    }


def figure_j(data, scale, file):
    (seeds,) = data.values()
    names = {COPY: "copying, exact match", "recall": "recall, in order", "pairs": "key to value, in any order"}
    figure, (ax,) = panels(1)
    for name, label in names.items():
        bands(ax, {label: seeds}, name)
    ax.set(title="in-context tasks", xlabel="update steps", ylabel="accuracy", ylim=(-0.03, 1.05))
    save(figure, file)

    found = {name: [onset(rows, scale.threshold, name) for rows in seeds] for name in names}
    ends = {name: float(np.mean([at_the_end(rows, name) for rows in seeds])) for name in names}
    text = "; ".join(
        f"{label}: onset at {said(found[name], seeds)}, {ends[name]:.2f} at the end" for name, label in names.items()
    )
    claim = "open question 1: what else comes with copying"
    return {"onset": found, "final": ends, "claims": [[claim, TOLD, text]]}


DRAW = {
    "a": (figure_a, "Loss and copying over tokens"),
    "b": (figure_b, "Batch size: steps or tokens"),
    "c": (figure_c, "Learning rate"),
    "d": (figure_d, "Induction heads by layer"),
    "e": (figure_e, "Attention dropout and weight decay"),
    "f": (figure_f, "Batch x context"),
    "g": (figure_g, "Learning rate x steps"),
    "h": (figure_h, "What dropout and decay do to copying and to loss"),
    "i": (figure_i, "The ladder of k"),
    "j": (figure_j, "Other in-context tasks"),
}


def onsets(seeds, scale) -> list[float | None]:
    return [onset(rows, scale.threshold) for rows in seeds]


def verdict(cases: list, law) -> str:
    """Whether the law holds of all cases; one that holds of some alone, or has none, cannot be told."""
    found = [bool(law(case)) for case in cases]
    return OPEN if not found or len(set(found)) > 1 else HOLDS if found[0] else FAILS


def intervals(law, cells) -> list[list[float]]:
    """Of the exponents of a law; [] where it tells nothing: more than a quarter of the runs, the late ones, had no onset."""
    return law["intervals"] if law and 4 * law["never"] <= sum(map(len, cells.values())) else []


def above_zero(pair) -> str:
    return OPEN if not pair or pair[0] <= 0 <= pair[1] else HOLDS if pair[0] > 0 else FAILS


def below_zero(pair) -> str:
    return above_zero(pair and [-pair[1], -pair[0]])


def said(starts, seeds) -> str:
    """Steps of onset, in the order of seeds."""
    last = seeds[0][-1]["step"]
    return ", ".join(f"step {x:,}" if x is not None else f"none in {last:,} steps" for x in starts)


def by(firsts, name, start) -> str:
    return ", ".join(f"{name.format(i)} {'never' if x is None else f'{x:,}'}" for i, x in enumerate(firsts, start))


def law_of(law, *names) -> str:
    if law is None:
        return "too few onsets to fit a law"
    parts = [
        f"{n}^{e:.2f} ({low:.2f} to {high:.2f})"
        for n, e, (low, high) in zip(names, law["exponents"], law["intervals"], strict=True)
    ]
    return f"onset in steps ~ {' x '.join(parts)}" + (f", {law['never']} runs without onset left out" if law["never"] else "")


def signed(change: dict, digits=2) -> str:
    low, high = change["interval"]
    return f"{change['mean']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def report(out: Path, name: str, scale):
    """REPORT.md, of all figures whose JSON is there: for each claim whether it holds, and what was measured."""
    lines = [
        f"# What was measured at the scale `{name}`", "",
        f"`python reproduce.py all --scale={name}`: {scale.config}, {scale.seeds} seeds a variant, values in their order.",
        f"Onset: the first of two consecutive evaluations with an exact match of {scale.threshold:g} or more, full alphabet.",
        "Intervals: 95%, by bootstrap over seeds.", "",
        "| figure | claim | here | measured |", "|---|---|---|---|",
    ]  # fmt: skip
    there = {letter: title for letter, (_, title) in DRAW.items() if (out / f"{letter}.json").exists()}
    for letter in there:
        for claim, how, text in json.loads((out / f"{letter}.json").read_text())["claims"]:
            lines.append(f"| {letter} | {claim} | **{how}** | {text} |")
    for letter, title in there.items():
        lines += ["", f"## {letter}. {title}", "", f"![{title}]({letter}.png)"]
    (out / "REPORT.md").write_text("\n".join(lines) + "\n")
