"""The figures of reproduce.py: which runs each takes, what is drawn, and each claim with what was measured.

A figure is a function of the runs' rows, {variant: [rows of seed 0, rows of seed 1, ...]}, of the scale and of the picture's
file. It returns what is kept as JSON; its "claims" are [claim, verdict, what was measured]. Its docstring is the caption. To
add a figure, write it here under @figure, which names its runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from paper import shared
from paper.report import FAILS, TOLD, above_zero, at_exponents, below_zero, intervals, listed, signed, verdict
from paper.shared import draw_curves, label, law_claims, laws, mean_end, measure_name, onset_text, onsets, treatments
from paper.statistics import difference, rounding_of_a_difference, summary
from runtime.curves import at_the_end, onset
from runtime.plots import bars, heat, lines, panels, points, save

HEX = "copy_exact_hex16"


class Figure(NamedTuple):
    title: str
    variants: Callable  # see paper.shared
    draw: Callable


FIGURES: dict[str, Figure] = {}


def figure(letter: str, title: str, variants: Callable):
    """Registers the decorated function as a figure."""

    def register(draw):
        FIGURES[letter] = Figure(title, variants, draw)
        return draw

    return register


@figure("a", "Loss and copying over tokens", shared.base)
def figure_a(data, scale, file):
    """Left: the share of right answers in the copy test, for two alphabets. Right: the validation loss of all tokens, and of
    new and repeated ones apart. Both over training tokens, to see whether copying comes after the loss has flattened.
    """
    (seeds,) = data.values()
    picture, (left, right) = panels(2)
    for name, text in {scale.copying: measure_name(scale.copying), HEX: measure_name(HEX)}.items():
        lines(left, {text: seeds}, name, "tokens")
    for name, text in {"val_loss_new": "new tokens", "val_loss_repeated": "repeated tokens", "val_loss": "all tokens"}.items():
        lines(right, {text: seeds}, name, "tokens")
    shared.describe(left, scale.copying, "tokens")
    left.set(title="copying")
    shared.describe(right, "val_loss", "tokens")
    save(picture, file)

    waits, rises, fallen = [], [], []
    starts = onsets(seeds, scale)
    for rows in (rows for rows, start in zip(seeds, starts, strict=True) if start is not None):
        end = at_the_end(rows, scale.copying)
        tenth, nine = (next(r["step"] for r in rows if r[scale.copying] >= share * end) for share in (0.1, 0.9))
        losses = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
        first = losses[0][1]
        before = [loss for step, loss in losses if step < tenth][-1:] or [first]
        fallen.append((first - before[0]) / (first - min(loss for _, loss in losses)))
        waits.append(tenth)
        rises.append(nine - tenth)
    found = {"onset": starts, "wait_steps": waits, "rise_steps": rises, "loss_fallen_before": fallen}
    return found | {"claims": claims_a(found, onset_text(starts, seeds))}


def claims_a(found, onset_at: str):
    waits, rises, fallen = (found[name] for name in ("wait_steps", "rise_steps", "loss_fallen_before"))
    before = ", ".join(f"{x:.0%}" for x in fallen) or "none"
    rose, waited = (", ".join(map(str, steps)) for steps in (rises, waits))
    return [
        ["copying stays absent long after the loss has flattened", verdict(fallen, lambda x: x >= 0.9),
         f"onset at {onset_at}; {before} of the fall of the validation loss came before copying rose"],
        ["when copying comes, it comes abruptly", verdict(list(zip(rises, waits, strict=True)), lambda x: x[0] < x[1]),
         f"from a tenth to nine tenths of its final value in {rose} steps, after {waited}"],
    ]  # fmt: skip


@figure("b", "Batch size: steps or tokens", shared.batches)
def figure_b(data, scale, file):
    """Copying (left pair) and the validation loss (right pair) for several batch sizes, over update steps and over training
    tokens. If copying depends on update steps alone, its curves coincide in the first panel and not in the second.
    """
    draw_curves(file, data, [(name, axis) for name in (scale.copying, "val_loss") for axis in ("step", "tokens")])
    found, kept = laws(data, scale, [(batch,) for batch in scale.batches], ["batch"])
    claim = "when copying comes depends on update steps, not on tokens"
    tail = ", where 0 is steps alone and -1 tokens alone"
    return kept | {"claims": law_claims(found, claim, lambda law: at_exponents(law, (0,)), tail)}


@figure("c", "Learning rate", lambda scale: shared.rates(scale, 3))
def figure_c(data, scale, file):
    """Copying (left) and the validation loss (right) for several learning rates, over update steps."""
    draw_curves(file, data, [(scale.copying, "step"), ("val_loss", "step")])
    found, kept = laws(data, scale, [(rate,) for rate in scale.rates[-3:]], ["rate"])
    sooner = "a higher learning rate makes copying come earlier"
    claims = law_claims(found, sooner, lambda law: below_zero((intervals(law) or [None])[0]))
    first, *_, last = data.values()
    gain = difference(scale.copying, list(zip(first, last, strict=False)))
    ends = ", ".join(f"{label(name)}: {mean_end(seeds, scale.copying):.2f}" for name, seeds in data.items())
    text = f"final accuracy at {ends}; last minus first {signed(gain)}"
    claims.append(["a higher learning rate makes copying stronger", above_zero(gain["interval"]), text])
    return kept | {"gain": gain, "claims": claims}


@figure("d", "Induction heads by layer", lambda scale: {f"layers{scale.layers}": {"n_layers": scale.layers}})
def figure_d(data, scale, file):
    """One panel per seed: the colour is the highest induction score I of the heads in a layer. If induction heads form from
    shallow to deep layers, the lower rows brighten first. Last panel: the best head of all layers beside copying.
    """
    (seeds,) = data.values()
    picture, axes = panels(len(seeds) + 1)
    firsts = []
    for seed, (ax, rows) in enumerate(zip(axes, seeds, strict=False)):
        at = [row["step"] for row in rows]
        best = np.array([np.max(row["score_mended"], axis=1) for row in rows]).T  # (layers, steps)
        heat(ax, best, range(len(best)), at, scale=(0, 1))
        ax.set(title=f"highest induction score I, seed {seed}", xlabel="update steps", ylabel="layer")
        firsts.append([onset([{"step": s, "I": i} for s, i in zip(at, layer, strict=True)], 0.3, "I") for layer in best])
    lines(axes[-1], {"copying": seeds}, scale.copying)
    lines(axes[-1], {"best head": [[row | {"I": np.max(row["score_mended"])} for row in rows] for rows in seeds]}, "I")
    axes[-1].set(title="copying and the best head", xlabel="update steps", ylim=(-0.05, 1.05))
    save(picture, file)
    return {"first_step": firsts, "claims": [claim_d(firsts)]}


def claim_d(firsts):
    order = [[x for x in first if x is not None] for first in firsts]
    telling = [x for x in order if len(set(x)) > 1]
    how = verdict(telling if len(telling) == len(order) else [], lambda x: x == sorted(x))
    text = "; ".join(f"seed {seed}: {listed(first, 'layer {}', 0)}" for seed, first in enumerate(firsts))
    return ["induction heads form from shallow to deep layers", how, f"first step with a head of I at or above 0.3: {text}"]


@figure("e", "Attention dropout and weight decay", treatments)
def figure_e(data, scale, file):
    """Copying (left) and the validation loss (right) with attention dropout, with weight decay, and with neither (base)."""
    draw_curves(file, data, [(scale.copying, "step"), ("val_loss", "step")])
    found, claims = {}, []
    for name, title in {"dropout0.1": "attention dropout of 10%", "decay0.1": "weight decay of 0.1"}.items():
        pairs = list(zip(data["base"], data[name], strict=False))
        found[name] = {}
        for by, column, threshold in scale.each_onset():
            starts = [[onset(rows, threshold, column) for rows in pair] for pair in pairs]
            claim, change = earlier(starts, pairs, shared.every(data))
            found[name][f"onset{by}"] = [b for _, b in starts]
            found[name][f"onset_change{by}"] = change
            claims.append([f"{title} makes copying come earlier{by}", *claim])
        final, hex16 = (found[name].setdefault(column, difference(column, pairs)) for column in (scale.copying, HEX))
        claims.append([f"{title} improves the final accuracy", above_zero(final["interval"]),
                       f"change of the final accuracy {signed(final)}, at hex16 {signed(hex16)}"])  # fmt: skip
    return found | {"claims": claims}


def earlier(starts, pairs, step: float):
    """-> ([verdict, text], the change of onset) from the onsets of each pair, without a treatment and with it."""
    both = [b - a for a, b in starts if None not in (a, b)]
    change = summary(both, rounding_of_a_difference(step)) if both else None
    lost = any(b is None for _, b in starts) and not any(a is None for a, _ in starts)
    without, treated = zip(*pairs, strict=True)
    text = f"onset at {onset_text([b for _, b in starts], treated)}; without at {onset_text([a for a, _ in starts], without)}"
    text += f"; change {signed(change, 0)} steps" if change else ""
    return [FAILS if lost else below_zero(change and change["interval"]), text], change


@figure("f", "Batch x context", shared.grid)
def figure_f(data, scale, file):
    """The onset of copying for each batch size and context, the median over seeds: in update steps (left) and in training
    tokens (right). If steps decide, the left panel has one colour; if tokens decide, the right one has. "never": most seeds
    have no onset.
    """
    cells = [(batch, context) for batch in scale.grid[0] for context in scale.grid[1]]
    medians = [np.median([np.inf if o is None else o for o in onsets(seeds, scale)]) for seeds in data.values()]
    middle = dict(zip(cells, medians, strict=True))
    picture, (left, right) = panels(2)
    for ax, unit, title in ((left, None, "onset, update steps"), (right, 1e6, "onset, millions of tokens")):
        values = [[middle[b, c] * (b * c / unit if unit else 1) for c in scale.grid[1]] for b in scale.grid[0]]
        heat(ax, np.where(np.isinf(values), np.nan, values), *scale.grid, text="{:.2f}" if unit else "{:.0f}")
        ax.set(title=f"{title}, median of the seeds", xlabel="context (tokens)", ylabel="batch (sequences)")
    save(picture, file)
    found, kept = laws(data, scale, cells, ["batch", "context"])
    paper = "onset comes at a constant number of steps (the paper: exponents 0 and 0)"
    aoyama = "onset comes at tokens ~ sqrt(batch x context) (Aoyama et al.: exponents -0.5 and -0.5)"
    claims = law_claims(found, paper, lambda law: at_exponents(law, (0, 0)))
    return kept | {"claims": claims + law_claims(found, aoyama, lambda law: at_exponents(law, (-0.5, -0.5)))}


@figure("g", "Learning rate x steps", shared.rates)
def figure_g(data, scale, file):
    """Left: copying as colour, the mean over seeds, for each learning rate (row) over update steps. Right: the step of onset
    of each seed over the learning rate, on logarithmic axes, and the power law fitted to them.
    """
    found, kept = laws(data, scale, [(rate,) for rate in scale.rates], ["rate"])
    at = [row["step"] for row in next(iter(data.values()))[0]]
    picture, (left, right) = panels(2)
    values = [[np.mean([rows[i][scale.copying] for rows in seeds]) for i in range(len(at))] for seeds in data.values()]
    heat(left, np.array(values), [f"{r:g}" for r in scale.rates], at, scale=(0, 1))
    left.set(title="copying, mean over seeds", xlabel="update steps", ylabel="learning rate")
    starts = [
        (r, o) for r, seeds in zip(scale.rates, data.values(), strict=True) for o in onsets(seeds, scale) if o is not None
    ]
    points(right, starts, found[0][1] and found[0][1]["exponents"][0], "rate")
    right.set(title="onset of each seed", xlabel="learning rate", ylabel="update steps")
    save(picture, file)
    claim = "open question 2: onset comes at a constant rate x steps (exponent -1)"
    return kept | {"claims": law_claims(found, claim, lambda law: at_exponents(law, (-1,)))}


def more_treatments(scale):
    return treatments(scale) | {"decay0.01": {"weight_decay": 0.01}}


@figure("h", "What dropout and decay do to copying and to loss", more_treatments)
def figure_h(data, scale, file):
    """How much each treatment changes three measures at the end of training. Bars are means over seeds of the difference to
    the base run of the same seed, whiskers their 95% intervals: a whisker that crosses zero tells nothing.
    """
    names = {scale.copying: "final accuracy", "val_loss_repeated": "loss on repeated tokens", "val_loss_new": "on new tokens"}
    pairs = {name: list(zip(data["base"], seeds, strict=False)) for name, seeds in data.items() if name != "base"}
    found = {treatment: {name: difference(name, pair) for name in names} for treatment, pair in pairs.items()}
    draw_h(file, found, names)
    return found | {"claims": [claim_h(found, names)]}


def draw_h(file, found, names):
    picture, axes = panels(3)
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        bars(ax, {treatment: changes[name] for treatment, changes in found.items()})
        ax.set(title=title, ylabel="change against base")
    save(picture, file)


def claim_h(found, names):
    changes = {t: ", ".join(f"{names[n]} {signed(x, 3)}" for n, x in of.items()) for t, of in found.items()}
    text = "; ".join(f"{treatment}: {change}" for treatment, change in changes.items())
    return ["open question 3: what dropout and decay do to copying and to loss, separately", TOLD, text]


@figure("i", "The ladder of k", shared.base)
def figure_i(data, scale, file):
    """Left: how far the answers at hex16 depend on the k-th last token, from 0 (by chance) to 1 (always). Right: copying at
    hex16; a dotted line is what a model would reach that looks up the last k tokens alone.
    """
    (seeds,) = data.values()
    picture, (left, right) = panels(2)
    ladder = [[[{"step": r["step"], "use": r["uses_hex16"][k]} for r in rows] for rows in seeds] for k in range(4)]
    for k, runs in enumerate(ladder, 1):
        lines(left, {f"k = {k}": runs}, "use")
    left.set(
        title="hex16: use of the k-th last token", xlabel="update steps", ylabel="0: by chance, 1: always", ylim=(-0.2, 1.08)
    )
    lines(right, {"all six tokens": seeds}, HEX)
    for k, level in enumerate(seeds[0][-1]["ceiling_hex16"], 1):
        right.axhline(level, color="0.6", lw=0.8, ls=":")
        right.annotate(f"k = {k}", (1.01, level), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    shared.describe(right, HEX, "step")
    save(picture, file)

    firsts = [[onset(ladder[k][seed], 0.5, "use") for k in range(4)] for seed in range(len(seeds))]
    climbed = [[x for x in first if x is not None] for first in firsts]
    how = verdict([x for x in climbed if len(x) > 1] if all(len(x) > 1 for x in climbed) else [], lambda x: x == sorted(set(x)))
    text = "; ".join(f"seed {seed}: {listed(first, 'k = {}', 1)}" for seed, first in enumerate(firsts))
    claim = "the surge at hex16 climbs k = 1, 2, 3, 4 one after the other"
    return {"first_step": firsts, "claims": [[claim, how, f"first step at which the use of token k is one half: {text}"]]}


@figure("j", "Other in-context tasks", shared.base)
def figure_j(data, scale, file):
    """Copying beside two other tasks that the context alone solves, recall in order and recall of a value by its key."""
    (seeds,) = data.values()
    names = {scale.copying: "copying", "recall": "recall, in order", "pairs": "recall of a value by its key"}
    picture, (ax,) = panels(1)
    for name, text in names.items():
        lines(ax, {text: seeds}, name)
    ax.set(title="in-context tasks", xlabel="update steps", ylabel="accuracy", ylim=(-0.03, 1.05))
    save(picture, file)
    found = {name: [onset(rows, scale.threshold, name) for rows in seeds] for name in names}
    ends = {name: mean_end(seeds, name) for name in names}
    text = "; ".join(f"{task}: onset at {onset_text(found[n], seeds)}, {ends[n]:.2f} at the end" for n, task in names.items())
    return {"onset": found, "final": ends, "claims": [["open question 1: what else comes with copying", TOLD, text]]}


@figure("k", "Warm-up", lambda scale: {f"warmup{n}": {"warmup_steps": n} for n in scale.warmups})
def figure_k(data, scale, file):
    """Copying (left) and the validation loss (right) for several lengths of warm-up in updates, at one batch size."""
    draw_curves(file, data, [(scale.copying, "step"), ("val_loss", "step")])
    found, kept = laws(data, scale, [(n,) for n in scale.warmups], ["warm-up"])
    claim = "when copying comes does not depend on the length of warm-up (exponent 0)"
    return kept | {"claims": law_claims(found, claim, lambda law: at_exponents(law, (0,)))}
