"""The scores of one model as a table for people to read."""

import numpy as np

from measures.ablation import best_first
from measures.copying import PREFIX, SUFFIX
from measures.heads import SCORES
from measures.kgrams import K

WIDTH = 48  # of the first column


def table(result: dict) -> str:
    """Formats what eval_copy.evaluate returns."""
    about = f"{result['path']}: step {result['step']:,}, {result['parameters']:,} parameters, context {result['seq_len']:,}"
    parts = [[about], _copying(result["copy"]), _kgrams(result["copy"]), _heads(result["heads"]), _context(result)]
    if "ablation" in result:
        parts.append(_ablation(result["ablation"]))
    return "\n\n".join("\n".join(part) for part in parts)


def _row(title: str, cells) -> str:
    return f"  {title:<{WIDTH - 2}}" + "   ".join(cells)


def _copying(copy: dict) -> list[str]:
    c = next(iter(copy.values()))
    asked = f"{c['samples']} samples of {len(c['exact_by_sequence'])} questions each"
    lines = [
        f"Copying: the model reads {c['sequences']} random sequences of {PREFIX} + {SUFFIX} tokens, then the first",
        f"{PREFIX} of one of them again, and must continue with its other {SUFFIX}. {asked}.",
        f"  {'alphabet':<19}{f'all {SUFFIX} right':>11}{'(95% interval)':>18}    each   first    loss     new   questions",
    ]
    for name, c in copy.items():
        title = f"{name} ({c['ids']:,} ids)"
        interval = "({:.3f} to {:.3f})".format(*c["interval"])
        numbers = "".join(f"{x:8.3f}" for x in (c["token"], c["first"], -c["logprob"], -c["logprob_unseen"]))
        lines.append(f"  {title:<19}{c['exact']:11.3f}{interval:>18}{numbers}   {c['questions']}")
    lines += [
        f"  each: share of single tokens right; first: of the first of the {SUFFIX}; loss: nats per token; new: loss at the",
        "  sequence's first occurrence, where it cannot be copied; questions: a hash, equal if models were asked the same",
    ]
    for name, c in copy.items():
        if c["untrained"] and c["untrained"][1]:
            never, rare = c["untrained"]
            more = f"and {rare - never:,} more are less than 1e-5 of it"
            lines.append(f"  {name}: {never:,} of its ids never occur in the training data, {more}")
    if "text" in copy:
        lines.append(f"  text: {copy['text']['token_unseen']:.3f} of single tokens are right when the passage is new")
    return lines


def _kgrams(copy: dict) -> list[str]:
    header = "".join(f"  k = {k}" for k in K)
    lines = [
        "k-gram baseline: looks up the last k tokens in the context and predicts what followed. Use by the model: how far its",
        "predictions depend on the k-th last token (0: as by chance, 1: always).",
        f"  {'alphabet':<19}{f'all {SUFFIX} right, baseline':<31}use by the model",
        f"  {'':<17}{header:<31}{header}",
    ]
    for name, c in copy.items():
        ceilings = "".join(f"{c['kgram']['ceiling'][k]:7.3f}" for k in K)
        uses = "".join(f"{'-' if (use := c['kgram']['uses'][k]) is None else f'{use:.2f}':>7}" for k in K)
        lines.append(f"  {name:<17}{ceilings:<31}{uses}")
    return lines


def _heads(heads: dict) -> list[str]:
    lines = ["Attention heads: the three with the highest score"]
    for name, score in SCORES.items():
        if score.title and name in heads:
            values = np.array(heads[name])
            lines.append(_row(score.title, (f"layer {i} head {j}: {values[i, j]:.3f}" for i, j in best_first(values)[:3])))
    return lines


def _context(result: dict) -> list[str]:
    losses, recall = result["context"]["induction_loss"], result["context"]["recall"]
    lines = [
        "Use of the context",
        _row("loss on random tokens (1st, 2nd occurrence)", [f"{losses['first']:.3f}, {losses['second']:.3f}"]),
        _row(
            "recall of the next token, in order", [f"{recall['accuracy']:.3f}; mean rank of the right one {recall['rank']:.1f}"]
        ),
        _row("recall of a value by its key, in any order", [f"{result['context']['pairs']:.3f}"]),
    ]
    if positions := result.get("positions"):
        loss = positions["loss"]
        at = [i for i in (1, 10, 50, 100, 500, 1000, len(loss)) if i <= len(loss)]
        lines.append(_row("loss on held-out text, by position", (f"{i:,}: {loss[i - 1]:.3f}" for i in at)))
        late = [
            f"({n}) - (50): {x[0]:+.3f}" + (f" (standard error {x[1]:.3f})" if x[1] is not None else "")
            for n in (500, 1000)
            if (x := positions[f"icl_50_{n}"]) is not None
        ]
        lines.append(_row("in-context learning score", late or ["not available: needs a context of at least 500"]))
    return lines


def _ablation(a: dict) -> list[str]:
    exact = f"all {SUFFIX} right, {a['alphabet']}, {a['samples']} samples"
    titles = {"exact": exact, "loss_repeated": "loss on repeated tokens", "loss_new": "loss on new tokens"}
    lines = [
        "Without the k heads of the highest induction score I; others: without k other heads, of the same layers where these",
        "have enough, lowest to highest of up to 3 draws",
    ]
    lines.append(_row("", (f"k = {k:<8}" for k in a["k"])).rstrip())
    for name in a["top"][0]:
        lines.append(_row(titles[name], (f"{top[name]:<12.3f}" for top in a["top"])))
        lines.append(_row("  others", (_span([draw[name] for draw in draws]) for draws in a["random"])).rstrip())
    return lines


def _span(scores: list[float]) -> str:
    if not scores:
        return f"{'-':<12}"
    low, high = f"{min(scores):.3f}", f"{max(scores):.3f}"
    return f"{low if low == high else f'{low}-{high}':<12}"
