"""Runs without and with a treatment, compared seed by seed."""

from paper.report import ENOUGH, FAILS, HOLDS, INCONCLUSIVE, above_zero, below_zero, signed
from paper.shared import base, every, measure_name
from paper.statistics import OTHER_QUESTIONS, difference, rounding_of_a_difference, summary
from runtime.curves import onset

TREATMENTS = {
    "dropout0.1": ("attention dropout of 10%", {"attn_dropout": 26 / 256}),
    "decay0.01": ("weight decay of 0.01", {"weight_decay": 0.01}),
    "decay0.1": ("weight decay of 0.1", {"weight_decay": 0.1}),
}
OPPOSITE = {HOLDS: FAILS, FAILS: HOLDS, INCONCLUSIVE: INCONCLUSIVE}


def treatments(scale):
    """Returns the variants of the figures on dropout and weight decay, as in paper.shared."""
    return base(scale) | {name: settings for name, (_, settings) in TREATMENTS.items()}


def paired(data, without: str) -> dict[str, list[tuple]]:
    """Returns the rows of the runs without and with each treatment, for each seed that both have; {} if `without` has none."""
    pairs = {name: zip(data.get(without, ()), seeds, strict=False) for name, seeds in data.items() if name != without}
    return {name: found for name, both in pairs.items() if (found := list(both))}


def compare(pairs, scale, columns) -> dict:
    """Returns what a treatment changes.

    "onset" + suffix: {"starts": the onsets of each pair, "change": their mean difference over the pairs that have both, None if
        there are none}
    column: the difference at the end; where the runs were not asked the same questions, its interval is wider by
        OTHER_QUESTIONS on either side
    """
    found = {}
    for by, column, threshold in scale.each_onset():
        starts = [[onset(rows, threshold, column) for rows in pair] for pair in pairs]
        both = [after - before for before, after in starts if None not in (before, after)]
        change = summary(both, rounding_of_a_difference(every(pairs[0][0]))) if both else None
        found[f"onset{by}"] = {"starts": starts, "change": change}
    found |= {column: difference(column, pairs) for column in columns}
    alphabet = scale.copying.rsplit("_", 1)[1]
    questions = {rows[-1].get(f"questions_{alphabet}") for pair in pairs for rows in pair}
    if len(questions) > 1 and found[scale.copying]["interval"]:
        low, high = found[scale.copying]["interval"]
        found[scale.copying]["interval"] = [low - OTHER_QUESTIONS, high + OTHER_QUESTIONS]
    return found


def earlier(starts, change) -> str:
    """Returns the verdict on whether a treatment makes the onset come earlier.

    Runs without an onset count as late: if more of them have the treatment, the others cannot show that it brings the onset
    earlier; if fewer have it, they cannot show that it brings it later.
    """
    without, treated = (sum(x is None for x in side) for side in zip(*starts, strict=True))
    if change is None:
        found = {(0, len(starts)): FAILS, (len(starts), 0): HOLDS}.get((without, treated), INCONCLUSIVE)
        return found if len(starts) >= ENOUGH else INCONCLUSIVE
    how = below_zero(change["interval"])
    return INCONCLUSIVE if how == HOLDS and treated > without or how == FAILS and treated < without else how


def claims_of_treatment(title: str, found: dict, scale, hinders=False) -> list[list[str]]:
    """Returns the claims that a treatment makes copying come earlier and end stronger; if it `hinders`, later and weaker."""
    sooner, better = ("later", "lowers") if hinders else ("earlier", "raises")
    judged = OPPOSITE if hinders else {how: how for how in OPPOSITE}
    claims = []
    for by, *_ in scale.each_onset():
        starts, change = found[f"onset{by}"].values()
        text = f"change of the onset {signed(change, 0)}, in steps" if change else "no seed has both onsets"
        without, treated = (sum(x is None for x in side) for side in zip(*starts, strict=True))
        text += f"; without an onset: {treated} of {len(starts)} runs with it, {without} of {len(starts)} without it"
        claims.append([f"{title} makes copying come {sooner}{by}", judged[earlier(starts, change)], text])
    text = ", ".join(f"{measure_name(name)} {signed(x, 3)}" for name, x in found.items() if not name.startswith("onset"))
    how = judged[above_zero(found[scale.copying]["interval"])]
    return [*claims, [f"{title} {better} the final accuracy", how, f"change at the end: {text}"]]
