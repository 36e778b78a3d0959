"""Whether copying comes after the loss has flattened, and how abruptly: the claims of figure a."""

import math

from paper.report import INCONCLUSIVE, verdict
from runtime.curves import at_the_end, onset

FLAT = 0.9  # of its fall: from here on the loss counts as flat


def surges(seeds, scale) -> dict[str, list[float]]:
    """Measures each seed that ends with copying.

    wait_steps: the step at which copying reaches a tenth of its final value
    rise_steps: the steps from there to nine tenths
    loss_fallen_before: the share of the validation loss's fall, from ln V (an untrained model) to its lowest value, that was
        complete at the last evaluation before `wait_steps`
    new_fallen_before: the same of the loss on new tokens, which copying does not lower
    """
    found = {"wait_steps": [], "rise_steps": [], "loss_fallen_before": [], "new_fallen_before": []}
    untrained = math.log(scale.base.vocab_size)
    for rows in seeds:
        end = at_the_end(rows, scale.copying)
        if end < scale.threshold or onset(rows, scale.threshold, scale.copying) is None:
            continue
        tenth, nine = (onset(rows, share * end, scale.copying) or rows[-1]["step"] for share in (0.1, 0.9))
        for name, loss in {"loss_fallen_before": "val_loss", "new_fallen_before": "val_loss_new"}.items():
            before = [untrained, *(row[loss] for row in rows if row["step"] < tenth)]
            found[name].append((untrained - before[-1]) / (untrained - min(row[loss] for row in rows)))
        found["wait_steps"].append(tenth)
        found["rise_steps"].append(nine - tenth)
    return found


def claims(found, seeds: int) -> list[list[str]]:
    """Returns the two claims. While one of the seeds does not end with copying, neither is judged."""
    waits, rises, fallen, new = found.values()
    of = f", in the {len(fallen)} of {seeds} seeds that end with copying"
    flat = f"before copying rose, the validation loss had fallen {_shares(fallen)} of its way from ln V"
    flat += f", that of new tokens {_shares(new)}"
    rose, waited = (", ".join(f"{step:,}" for step in steps) for steps in (rises, waits))
    steep = f"from a tenth to nine tenths of its final value in {rose} steps, after {waited}"
    told = [
        (
            f"copying stays absent until the loss has flattened ({FLAT:.0%} of its fall)",
            verdict(fallen, lambda x: x >= FLAT),
            flat,
        ),
        (
            "copying comes abruptly (it rises in fewer steps than it was absent)",
            verdict(list(zip(rises, waits, strict=True)), lambda pair: pair[0] < pair[1]),
            steep,
        ),
    ]
    if not fallen:
        return [[claim, INCONCLUSIVE, "no seed ends with copying"] for claim, *_ in told]
    return [[claim, how if len(fallen) == seeds else INCONCLUSIVE, text + of] for claim, how, text in told]


def _shares(values: list[float]) -> str:
    return ", ".join(f"{x:.0%}" for x in values)
