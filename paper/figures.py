"""The figures of reproduce.py: which runs each takes, what is drawn, and each claim with what was measured.

A figure is a function of the runs' rows, {variant: [rows of seed 0, rows of seed 1, ...]} for the variants that have been
measured, at least one, of the scale and of the picture's file. It returns what is kept as JSON; its "claims" are [claim,
verdict, what was measured]. Its docstring is the caption. To add a figure, write it here under @figure, which names its
runs and the measures that its table shows beside the usual ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from paper import shared
from paper.report import MEASURED, above_zero, at_exponents, below_zero, in_order, intervals, listed, signed, verdict
from paper.shared import draw_copying_and_loss, draw_curves, draw_onsets, label, law_claims, laws, measure_name, onsets
from paper.statistics import difference
from paper.surge import claims as claims_of_surges
from paper.surge import surges
from paper.treatments import TREATMENTS, claims_of_treatment, compare, paired, treatments
from runtime.curves import at_the_end, onset
from runtime.plots import bars, doses, heat, lines, panels, save

HEX = "copy_exact_hex16"


class Figure(NamedTuple):
    title: str
    variants: Callable  # see paper.shared
    columns: tuple[str, ...]
    draw: Callable


FIGURES: dict[str, Figure] = {}


def figure(letter: str, title: str, variants: Callable, columns: tuple[str, ...] = ()):
    """Registers the decorated function as a figure."""

    def register(draw):
        FIGURES[letter] = Figure(title, variants, columns, draw)
        return draw

    return register


@figure("a", "Loss and copying over tokens", shared.base)
def figure_a(data, scale, file):
    """Left: the share of right answers in the copy test, for two alphabets. Right: the validation loss of all tokens, and of
    new and repeated ones apart. Both over training tokens, to see whether copying comes after the loss has flattened.
    """
    (seeds,) = data.values()
    picture, (left, right) = panels(2)
    for name in (scale.copying, scale.copying.rsplit("_", 1)[0] + "_hex16"):
        lines(left, {measure_name(name): seeds}, name, "tokens")
    for name, text in {"val_loss_new": "new tokens", "val_loss_repeated": "repeated tokens", "val_loss": "all tokens"}.items():
        lines(right, {text: seeds}, name, "tokens")
    shared.describe(left, scale.copying, "tokens")
    left.set(title="copying")
    shared.describe(right, "val_loss", "tokens")
    save(picture, file)

    found = surges(seeds, scale)
    return found | {"claims": claims_of_surges(found, len(seeds)) + shared.apart(seeds, scale)}


@figure("b", "Batch size: steps or tokens", shared.batches)
def figure_b(data, scale, file):
    """Copying and the validation loss for several batch sizes, each over update steps and over training tokens. If copying
    depends on update steps alone, its curves coincide in the first panel and not in the second. Last panel: the onset over the
    batch size, with the fitted power law, and those of steps alone (exponent 0) and tokens alone (-1).
    """
    picture, (*axes, last) = panels(5)
    draw_curves(axes, data, [(name, axis) for name in (scale.copying, "val_loss") for axis in ("step", "tokens")])
    varied = shared.batches(scale), {"batch": "batch_size"}
    found = laws(data, scale, *varied)
    draw_onsets(last, data, scale, *varied, found, {"steps alone": 0.0, "tokens alone": -1.0})
    save(picture, file)
    claim = "when copying comes depends on update steps, not on tokens"
    tail = ", where 0 is steps alone and -1 tokens alone"
    return {"fit": found, "claims": law_claims(found, claim, lambda law: at_exponents(law, (0,)), tail)}


@figure("c", "Learning rate", lambda scale: shared.rates(scale, 3))
def figure_c(data, scale, file):
    """Copying (left) and the validation loss (right) for several learning rates, over update steps."""
    draw_copying_and_loss(file, data, scale)
    found = laws(data, scale, shared.rates(scale), {"rate": "learning_rate"})
    sooner = "a higher learning rate makes copying come earlier"
    claims = law_claims(found, sooner, lambda law: below_zero((intervals(law) or [None])[0]))
    rates = list(shared.rates(scale, 3))
    if {rates[0], rates[-1]} <= data.keys():
        gain = difference(scale.copying, list(zip(data[rates[0]], data[rates[-1]], strict=False)))
        text = f"final accuracy at {label(rates[-1])} minus that at {label(rates[0])}: {signed(gain)}"
        claims.append(["a higher learning rate makes copying stronger", above_zero(gain["interval"]), text])
    return {"fit": found, "claims": claims}


@figure("d", "Induction heads by layer", shared.depths)
def figure_d(data, scale, file):
    """One panel per seed of the deepest model: the colour is the highest induction score I of the heads in a layer. If
    induction heads form from shallow to deep layers, the lower rows brighten first. Last panel: copying, and the deepest
    model's best head.
    """
    seeds = list(data.values())[-1]
    picture, axes = panels(len(seeds) + 1)
    for seed, (ax, rows) in enumerate(zip(axes, seeds, strict=False)):
        heat(ax, best_heads(rows).T, range(best_heads(rows).shape[1]), [row["step"] for row in rows], scale=(0, 1))
        ax.set(title=f"highest induction score I, seed {seed}", xlabel="update steps", ylabel="layer")
    lines(axes[-1], {f"copying, {label(name)}": runs for name, runs in data.items()}, scale.copying)
    lines(axes[-1], {"best head": [[row | {"I": np.max(row["score_mended"])} for row in rows] for rows in seeds]}, "I")
    axes[-1].set(title="copying and the best head", xlabel="update steps", ylim=(-0.05, 1.05))
    save(picture, file)
    firsts = {name: [first_heads(rows) for rows in runs] for name, runs in data.items()}
    found = {"first_step": firsts, "claims": [claim_d(name, first) for name, first in firsts.items()]}
    if len(scale.layers) > 1:
        found["fit"] = laws(data, scale, shared.depths(scale), {"layers": "n_layers"})
        found["claims"] += law_claims(found["fit"], "how the onset depends on the number of layers", lambda law: MEASURED)
    return found


def best_heads(rows) -> np.ndarray:
    """(evaluations, layers): the highest induction score I of each layer."""
    return np.array([np.max(row["score_mended"], axis=1) for row in rows])


def first_heads(rows) -> list[float | None]:
    at = [row["step"] for row in rows]
    return [onset([{"step": s, "I": i} for s, i in zip(at, layer, strict=True)], 0.3, "I") for layer in best_heads(rows).T]


def claim_d(variant: str, firsts):
    order = [[x for x in first if x is not None] for first in firsts]
    how = verdict(order, lambda x: in_order(x) if len(x) > 1 else None)
    text = "; ".join(f"seed {seed}: {listed(first, 'layer {}', 0)}" for seed, first in enumerate(firsts))
    claim = f"induction heads form from shallow to deep layers, among the layers that form one ({label(variant)})"
    return [claim, how, f"first step at which a head of the layer has I of at least 0.3: {text}"]


@figure("e", "Attention dropout and weight decay", treatments)
def figure_e(data, scale, file):
    """Copying (left) and the validation loss (right) with attention dropout, with weight decay, and with neither (base)."""
    draw_copying_and_loss(file, data, scale)
    found, claims = {}, []
    for name, pairs in paired(data, "base").items():
        found[name] = compare(pairs, scale, (scale.copying, HEX))
        claims += claims_of_treatment(TREATMENTS[name][0], found[name], scale)
    return found | {"claims": claims}


@figure("f", "Batch x context", shared.grid)
def figure_f(data, scale, file):
    """The onset of copying for each batch size and context, the median over seeds: in update steps (left) and in training
    tokens (right). If steps decide, the left panel has one colour; if tokens decide, the right one has. "never": most seeds
    have no onset, or none has been measured.
    """
    middle = {name: np.median([np.inf if o is None else o for o in onsets(seeds, scale)]) for name, seeds in data.items()}
    contexts = list(scale.grid)
    sizes = list(scale.grid[contexts[0]])
    picture, (left, right) = panels(2)
    for ax, unit, title in ((left, None, "onset, update steps"), (right, 1e6, "onset, millions of tokens")):
        values = [[middle.get(f"batch{b}-context{c}", np.inf) * (b * c / unit if unit else 1) for c in contexts] for b in sizes]
        heat(ax, np.where(np.isinf(values), np.nan, values), sizes, contexts, text="{:.2f}" if unit else "{:.0f}")
        ax.set(title=f"{title}, median of the seeds", xlabel="context (tokens)", ylabel="batch (sequences)")
    save(picture, file)
    found = laws(data, scale, shared.grid(scale), {"batch": "batch_size", "context": "seq_len"})
    paper = "onset comes at a constant number of steps (the paper: exponents 0 and 0)"
    aoyama = "onset comes at tokens ~ sqrt(batch x context) (Aoyama et al.: exponents -0.5 and -0.5)"
    claims = law_claims(found, paper, lambda law: at_exponents(law, (0, 0)))
    return {"fit": found, "claims": claims + law_claims(found, aoyama, lambda law: at_exponents(law, (-0.5, -0.5)))}


@figure("g", "Learning rate x steps", shared.rates)
def figure_g(data, scale, file):
    """Left: copying as colour, the mean over seeds, for each learning rate (row) over update steps. Right: the step of onset
    of each seed over the learning rate, on logarithmic axes, with the fitted power law and that of the question (-1).
    """
    varied = shared.rates(scale), {"rate": "learning_rate"}
    found = laws(data, scale, *varied)
    rates = {name: rate for name, rate in zip(shared.rates(scale), scale.rates, strict=True) if name in data}
    at = [row["step"] for row in next(iter(data.values()))[0]]
    picture, (left, right) = panels(2)
    values = [[np.mean([rows[i][scale.copying] for rows in seeds]) for i in range(len(at))] for seeds in data.values()]
    heat(left, np.array(values), [f"{rate:g}" for rate in rates.values()], at, scale=(0, 1))
    left.set(title="copying, mean over seeds", xlabel="update steps", ylabel="learning rate")
    draw_onsets(right, data, scale, *varied, found, {"rate x steps constant": -1.0})
    save(picture, file)
    claim = "open question 2: onset comes at a constant rate x steps (exponent -1)"
    return {"fit": found, "claims": law_claims(found, claim, lambda law: at_exponents(law, (-1,)))}


@figure("h", "What dropout and decay do to copying and to loss", treatments)
def figure_h(data, scale, file):
    """How much each treatment changes three measures at the end of training. Bars are means over seeds of the difference to
    the base run of the same seed, whiskers their 95% intervals; one that contains zero is inconclusive.
    """
    names = {
        scale.copying: "final accuracy",
        "val_loss_repeated": "loss on repeated tokens",
        "val_loss_new": "loss on new tokens",
    }
    found = {name: {n: difference(n, pairs) for n in names} for name, pairs in paired(data, "base").items()}
    picture, axes = panels(3)
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        bars(ax, {treatment: changes[name] for treatment, changes in found.items()})
        ax.set(title=title, ylabel="change against base")
    save(picture, file)
    text = "; ".join(f"{t}: {', '.join(f'{names[n]} {signed(x, 3)}' for n, x in of.items())}" for t, of in found.items())
    claim = "open question 3: what dropout and decay do to copying and to loss, separately"
    return found | {"claims": [[claim, MEASURED, text]]}


@figure("i", "Order of the k-grams that the model uses", shared.base)
def figure_i(data, scale, file):
    """Left: how far the answers at hex16 depend on the k-th last token, from 0 (by chance) to 1 (always). Right: copying at
    hex16; a dotted line is the expected score of copying a random one of the tokens that followed the last k.
    """
    (seeds,) = data.values()
    picture, (left, right) = panels(2)
    ladder = [[[{"step": r["step"], "use": r["uses_hex16"][k]} for r in rows] for rows in seeds] for k in range(4)]
    for k, runs in enumerate(ladder, 1):
        lines(left, {f"k = {k}": runs}, "use")
    left.set(title="hex16: use of the k-th last token", xlabel="update steps")
    left.set(ylabel="0: by chance, 1: always", ylim=(-0.2, 1.08))
    lines(right, {"all six tokens": seeds}, HEX)
    for k, level in enumerate(seeds[0][-1]["ceiling_hex16"], 1):
        right.axhline(level, color="0.6", lw=0.8, ls=":")
        right.annotate(f"k = {k}", (1.01, level), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    shared.describe(right, HEX, "step")
    save(picture, file)

    firsts = [[onset(ladder[k][seed], 0.5, "use") for k in range(4)] for seed in range(len(seeds))]
    how = verdict(firsts, climbs)
    text = "; ".join(f"seed {seed}: {listed(first, 'k = {}', 1)}" for seed, first in enumerate(firsts))
    claim = "at hex16 the model comes to use longer k-grams in order: k = 1, 2 and so on"
    return {"first_step": firsts, "claims": [[claim, how, f"first step at which the use of token k is one half: {text}"]]}


def climbs(first: list[float | None]) -> bool | None:
    """Returns whether the first steps of k = 1, 2 ... rise; None if fewer than two k are used, or one below another is not."""
    used = [x for x in first if x is not None]
    return in_order(used) if len(used) > 1 and used == first[: len(used)] else None


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
    ends = {name: float(np.mean([at_the_end(rows, name) for rows in seeds])) for name in names}
    text = "; ".join(f"{task}: onset at {listed(found[n], 'seed {}', 0)}, end {ends[n]:.2f}" for n, task in names.items())
    return {"onset": found, "final": ends, "claims": [["open question 1: what else comes with copying", MEASURED, text]]}


@figure("k", "Warm-up", shared.warmups)
def figure_k(data, scale, file):
    """Copying (left) and the validation loss (right) for several lengths of warm-up in updates, at one batch size."""
    draw_copying_and_loss(file, data, scale)
    found = laws(data, scale, shared.warmups(scale), {"warm-up": "warmup_steps"})
    claim = "when copying comes does not depend on the length of warm-up (exponent 0)"
    return {"fit": found, "claims": law_claims(found, claim, lambda law: at_exponents(law, (0,)))}


@figure("l", "How much repetition does copying need?", shared.repeats, ("induction_max", *shared.CORPUS))
def figure_l(data, scale, file):
    """The base's text with none (repeat 0) to many of its training tokens in verbatim copies of passages from shortly before.
    Panels: copying; the highest attention of an induction head; the loss on held-out text, which has no copies; and what each
    seed reaches at the end, by the share of copies. In the table, frequency is the share of training tokens that occurred
    earlier in their window; reliability is how often the next token is then the one that followed the latest occurrence;
    predictable is the share of targets that followed their current token earlier in the window.
    """
    return dose_response(data, scale, file, "repeat", 0, "share of copies", "a share of copies of {}")


@figure("m", "How much must copying count in the loss?", shared.weights, ("induction_max", "val_loss_new", "val_loss_repeated"))
def figure_m(data, scale, file):
    """The base's text, where targets that followed their current token earlier in the window count more (weight above 1) or
    less than the others in the training loss, or not at all (weight 0). Panels: copying; the highest attention of an
    induction head; the loss on held-out text, where all tokens count the same; and what each seed reaches at the end, by the
    weight.
    """
    return dose_response(data, scale, file, "weight", 1, "weight of repeated targets", "a weight of {} for repeated targets")


def dose_response(data, scale, file, prefix, base, what, treatment):
    """Draws the variants prefix + dose, and compares each with that of the dose `base`, seed by seed."""
    picture, (*axes, last) = panels(4)
    draw_curves(axes, data, [(name, "tokens") for name in (scale.copying, "induction_max", "val_loss")])
    exact = scale.copying.replace("token", "exact")
    reached = {n: {s: [at_the_end(rows, n) for rows in seeds] for s, seeds in data.items()} for n in (exact, scale.copying)}
    doses(last, [name.removeprefix(prefix) for name in data], {measure_name(n): list(of.values()) for n, of in reached.items()})
    last.set(title="copying at the end, each seed", xlabel=what, ylabel="share right", ylim=(-0.03, 1.03))
    save(picture, file)
    ends = reached[exact]
    first = next((label(name) for name, values in ends.items() if min(values) >= 0.5), "none")
    text = "; ".join(f"{label(name)}: {', '.join(f'{x:.2f}' for x in values)}" for name, values in ends.items())
    claim = f"the smallest {what} at which every seed ends with an exact match of 0.5 ({measure_name(exact)})"
    found = {"exact": ends, "claims": [[claim, MEASURED, f"{first}; at the end {text}"]]}
    for name, pairs in paired(data, f"{prefix}{base}").items():
        dose = name.removeprefix(prefix)
        found[name] = compare(pairs, scale, (scale.copying, "val_loss"))
        found["claims"] += claims_of_treatment(treatment.format(dose), found[name], scale, hinders=float(dose) < base)
    return found
