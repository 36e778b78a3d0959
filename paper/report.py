"""Verdicts on the paper's claims, the wording of what was measured, and REPORT.md."""

import itertools
import json
import shlex
from pathlib import Path

from files import atomic_write
from paper.statistics import OTHER_QUESTIONS, is_misfit

HOLDS, FAILS, INCONCLUSIVE, MEASURED = "holds", "fails", "inconclusive", "measured"
ENOUGH = 3  # seeds, for a verdict that rests on no interval


def verdict(cases: list, law) -> str:
    """Returns whether the law holds in all cases: ENOUGH seeds or more, in each of which law(case) is True, False, or None if
    the case does not tell.
    """
    found = {law(case) for case in cases}
    if len(cases) < ENOUGH or len(found) != 1:
        return INCONCLUSIVE
    return {True: HOLDS, False: FAILS, None: INCONCLUSIVE}[found.pop()]


def in_order(steps: list[float]) -> bool | None:
    """Returns whether the steps rise; None if some are equal and none falls, as evaluations may be too far apart to tell."""
    pairs = list(itertools.pairwise(steps))
    return all(a < b for a, b in pairs) or (None if all(a <= b for a, b in pairs) else False)


def above_zero(interval) -> str:
    return INCONCLUSIVE if not interval or interval[0] <= 0 <= interval[1] else HOLDS if interval[0] > 0 else FAILS


def below_zero(interval) -> str:
    return above_zero(interval and [-interval[1], -interval[0]])


def intervals(law) -> list[list[float]]:
    """Returns the intervals of the exponents of a fitted law; [] where they cannot be trusted, because some of the runs, the
    late ones, had no onset.
    """
    return (law["intervals"] or []) if law and not law["never"] else []


def at_exponents(law, wanted: tuple[float, ...], near: float = 0.5) -> str:
    """Returns HOLDS if every interval contains its wanted exponent and lies within `near` of it, FAILS if any interval excludes
    its exponent, and INCONCLUSIVE otherwise. A law that the onsets do not follow never holds.
    """
    found = list(zip(intervals(law), wanted, strict=False))
    if any(not low <= e <= high for (low, high), e in found):
        return FAILS
    if not found or is_misfit(law["misfit"]):
        return INCONCLUSIVE
    return HOLDS if all(e - near < low and high < e + near for (low, high), e in found) else INCONCLUSIVE


def law_text(law, names) -> str:
    if law is None:
        return "too few onsets to fit a law"
    pairs = law["intervals"] or [None] * len(law["exponents"])
    parts = [f"{n}^{e:.2f}{_interval(pair, '.2f')}" for n, e, pair in zip(names, law["exponents"], pairs, strict=True)]
    text = f"onset in steps ~ {' x '.join(parts)}, from the {law['runs'] - law['never']} of {law['runs']} runs that have one"
    if is_misfit(law["misfit"]):
        text += f"; the onsets follow no power law (lack of fit, p = {law['misfit']:.3f})"
    return text


def signed(change: dict, digits=2) -> str:
    n = len(change["values"])
    return f"{change['mean']:+.{digits}f}{_interval(change['interval'], f'+.{digits}f')} in {n} seed{'s' * (n > 1)}"


def _interval(pair, form: str) -> str:
    return f" ({pair[0]:{form}} to {pair[1]:{form}})" if pair else " (no interval)"


def listed(firsts, name: str, start: int) -> str:
    return ", ".join(f"{name.format(i)} {'never' if x is None else f'{x:,}'}" for i, x in enumerate(firsts, start))


def write_report(out: Path, name: str, scale, figures: dict):
    """Writes REPORT.md from the figures' JSON in `out`: each claim, its verdict, what was measured, the pictures, their runs.

    What has not been measured has empty cells, and is said to be missing.
    """
    onsets = "; ".join(f"{column} of {threshold:g} or more{by}" for by, column, threshold in scale.each_onset())
    command = shlex.join([scale.config, *(f"--{k}={v}" for k, v in scale.settings.items())])
    seeds = f"{scale.seeds} seeds a variant" + (f", {scale.base_seeds} of the base" if scale.base_seeds else "")
    lines = [
        f"# What was measured at the scale `{name}`", "",
        f"`python reproduce.py all --scale={name}`: `{command}`, {seeds}; values are listed in the order of "
        f"seeds. The copy test has a context of {scale.context} tokens.", "",
        f"Onset: the first of two consecutive evaluations with {onsets}. In brackets: 95% intervals, by Student's t over seeds "
        "for means, and by linear regression on the logarithms for exponents. A claim about an exponent holds if its interval "
        "contains the claimed value and none 0.5 or more away, and fails if it does not contain the value. Where the onsets of "
        "the cells lie further from a power law than the seeds within them explain, which an F test of lack of fit decides at "
        "5%, the interval is that of these distances, and the claim does not hold. A treatment is compared with the base of "
        "the same seeds; where the two were not asked the same questions, the interval of the difference in accuracy is wider "
        f"by {OTHER_QUESTIONS} on either side. A claim without an interval takes {ENOUGH} seeds that agree.", "",
        "| figure | claim | here | measured |", "|---|---|---|---|",
    ]  # fmt: skip
    found = {letter: json.loads(path.read_text()) for letter in figures if (path := out / f"{letter}.json").exists()}
    for letter, figure in figures.items():
        if letter not in found:
            lines.append(f"| {letter} | {figure.title} | | missing: no run has been measured |")
            continue
        runs = found[letter].get("runs", [])
        planned = sum(run["planned"] for run in runs)
        missing = planned - sum(run["seeds"] for run in runs)
        so_far = f"; {missing} of {planned} runs are missing" if missing else ""
        lines += [f"| {letter} | {claim} | **{how}** | {text}{so_far} |" for claim, how, text in found[letter]["claims"]]
    for letter in found:
        title, caption = figures[letter].title, " ".join(figures[letter].draw.__doc__.split())
        lines += ["", f"## {letter}. {title}", "", f"![{title}]({letter}.png)", "", caption, ""]
        lines += table_of_runs(found[letter].get("runs", []))
    lines += ["", "Lines over seeds are their mean, bands reach from the lowest to the highest seed."]
    atomic_write(out / "REPORT.md", "\n".join(lines) + "\n")


def table_of_runs(runs: list[dict]) -> list[str]:
    """Returns the rows of describe_runs as a table: the onset of each seed in steps, and means at the end with intervals."""
    if not runs:
        return []
    numbers = ("steps", "tokens a step")
    columns = ["runs", "seeds", *numbers, *runs[0]["onset"], *(f"{name}, at the end" for name in runs[0]["end"])]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in runs:
        there, planned = run["seeds"], run["planned"]
        cells = [run["runs"], f"{there}" if there == planned else f"{there} of {planned}, the others are missing"]
        cells += [f"{run[name]:,}" for name in numbers]
        cells += [", ".join("never" if x is None else f"{x:,}" for x in starts) for starts in run["onset"].values()]
        cells += [
            "" if end is None else f"{end['mean']:.3f}{_interval(end['interval'], '.3f') if end['interval'] else ''}"
            for end in run["end"].values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
