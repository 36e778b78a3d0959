"""Verdicts on the paper's claims, the wording of what was measured, and REPORT.md."""

import json
from pathlib import Path

HOLDS, FAILS, OPEN, TOLD = "holds", "fails", "cannot be told", "measured"


def verdict(cases: list, law) -> str:
    """Whether the law holds in all cases; it cannot be told where it holds in some of them, or where there are none."""
    found = {bool(law(case)) for case in cases}
    return OPEN if len(found) != 1 else HOLDS if found.pop() else FAILS


def above_zero(interval) -> str:
    return OPEN if not interval or interval[0] <= 0 <= interval[1] else HOLDS if interval[0] > 0 else FAILS


def below_zero(interval) -> str:
    return above_zero(interval and [-interval[1], -interval[0]])


def intervals(law) -> list[list[float]]:
    """The intervals of the exponents of a fitted law; [] where they cannot be trusted, because more than a quarter of the runs,
    the late ones, had no onset.
    """
    return (law["intervals"] or []) if law and 4 * law["never"] <= law["runs"] else []


def at_exponents(law, wanted: tuple[float, ...], near: float = 0.5) -> str:
    """Whether the law has the wanted exponents: it has where each interval holds its exponent and nothing that is `near` or
    more away from it, and it has not where one interval excludes its exponent. A wider interval tells nothing.
    """
    found = list(zip(intervals(law), wanted, strict=False))
    if any(not low <= e <= high for (low, high), e in found):
        return FAILS
    return HOLDS if found and all(e - near < low and high < e + near for (low, high), e in found) else OPEN


def law_text(law, names) -> str:
    if law is None:
        return "too few onsets to fit a law"
    pairs = law["intervals"] or [None] * len(names)
    parts = [f"{n}^{e:.2f}{_interval(pair, '.2f')}" for n, e, pair in zip(names, law["exponents"], pairs, strict=True)]
    never = f", {law['never']} runs without onset left out" if law["never"] else ""
    return f"onset in steps ~ {' x '.join(parts)}{never}"


def signed(change: dict, digits=2) -> str:
    return f"{change['mean']:+.{digits}f}{_interval(change['interval'], f'+.{digits}f')}"


def _interval(pair, form: str) -> str:
    return f" ({pair[0]:{form}} to {pair[1]:{form}})" if pair else " (no interval)"


def steps_text(starts, last: int) -> str:
    """The onset of each seed, in their order; last: the last step of these runs."""
    return ", ".join(f"step {x:,}" if x is not None else f"none in {last:,} steps" for x in starts)


def listed(firsts, name: str, start: int) -> str:
    return ", ".join(f"{name.format(i)} {'never' if x is None else f'{x:,}'}" for i, x in enumerate(firsts, start))


def write_report(out: Path, name: str, scale, figures: dict):
    """Writes REPORT.md for all figures whose JSON is in `out`: each claim, its verdict, what was measured, and the pictures."""
    onsets = "; ".join(f"{column} of {threshold:g} or more{by}" for by, column, threshold in scale.each_onset())
    seeds = f"{scale.seeds} seeds a variant" + (f", {scale.base_seeds} of the base" if scale.base_seeds else "")
    lines = [
        f"# What was measured at the scale `{name}`", "",
        f"`python reproduce.py all --scale={name}`: {scale.config}, {seeds}; values are listed in the order of seeds.", "",
        f"Onset: the first of two consecutive evaluations with {onsets}. In brackets: 95% intervals, by Student's t over seeds "
        "for means, and by linear regression on the logarithms for exponents. A claim about an exponent holds if its interval "
        "contains the claimed value and none 0.5 or more away, and fails if it does not contain the value.", "",
        "| figure | claim | here | measured |", "|---|---|---|---|",
    ]  # fmt: skip
    there = {letter: figure for letter, figure in figures.items() if (out / f"{letter}.json").exists()}
    for letter in there:
        for claim, how, text in json.loads((out / f"{letter}.json").read_text())["claims"]:
            lines.append(f"| {letter} | {claim} | **{how}** | {text} |")
    for letter, figure in there.items():
        caption = " ".join(figure.draw.__doc__.split())
        lines += ["", f"## {letter}. {figure.title}", "", f"![{figure.title}]({letter}.png)", "", caption]
    lines += ["", "Lines over seeds are their mean, bands reach from the lowest to the highest seed."]
    (out / "REPORT.md").write_text("\n".join(lines) + "\n")
