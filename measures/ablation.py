"""Scores a model without some of its heads and, as a control, without as many random others.

    ranking = heads.attention_scores(model, ids, bos)["induction"]
    ablation_curve(model, lambda model: copy_scores(test, predict(model, test))["exact"], ranking, ks=(0, 1, 2, 4))

A head is an index (layer, head). Its output is the (B, T, Dh) slice of what attention.wo reads.
"""

import contextlib
import functools

import numpy as np
import torch

from measures.batching import progress, wide
from measures.context import token_losses
from measures.copying import CopyTest, copy_scores, predict
from measures.heads import LENGTH, fitting, repeated
from model import Llama

HOW = ("zero", "mean")
REMOVED = (0, 1, 2, 4, 8, 16, 32)  # numbers of heads


@contextlib.contextmanager
def removed(model: Llama, heads, means=None):
    """Removes `heads`, a collection of (layer, head), from the model's forward passes within this context.

    The output of each head becomes 0, or its mean if means = head_means(model, tokens) is given (Crosbie & Shutova 2024).
    """
    with contextlib.ExitStack() as stack:
        for layer in {layer for layer, _ in heads}:
            mine = [head for i, head in heads if i == layer]
            value = torch.zeros(()) if means is None else means[layer, mine]  # (n, Dh)
            hook = functools.partial(_replace, mine, value, model.config.head_dim)
            stack.callback(model.blocks[layer].attention.wo.register_forward_pre_hook(hook).remove)
        yield model


def _replace(mine: list[int], value: torch.Tensor, head_dim: int, module, args):
    """A forward pre-hook of attention.wo that sets the outputs of heads `mine` to value, a scalar or (n, Dh)."""
    x = args[0].unflatten(-1, (-1, head_dim)).clone()  # (B, T, H, Dh)
    x[..., mine, :] = value.to(x)
    return (x.flatten(-2),)


@torch.no_grad()
def head_means(model: Llama, tokens) -> torch.Tensor:
    """Returns the mean output of each head over all positions and samples of token ids (B, T): (n_layers, n_heads, Dh), fp32
    or wider. The model is left in eval mode.
    """
    model.eval()
    c, means = model.config, []

    def hook(_, args):
        means.append(wide(args[0]).mean((0, 1)))  # (H * Dh,)

    with contextlib.ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.attention.wo.register_forward_pre_hook(hook).remove)
        model.hidden(torch.as_tensor(tokens).to(model.embed.weight.device))
    return torch.stack(means).view(c.n_layers, c.n_heads, c.head_dim)


def ablation_curve(model: Llama, score_fn, ranking, ks, means=None, seed=0, controls=3) -> dict:
    """Calls score_fn(model) without the k highest heads of `ranking` (n_layers, n_heads), for each k of `ks`, and without
    up to `controls` different sets of k others, as `matched` draws them.

    Returns {"heads": [[layer, head], ...], "k": [...], "top": [...], "random": [[...], ...]}: the heads, highest first, as many
    as the largest k; then for each k the score, and the scores of the random sets ([] where there is none).
    """
    order = best_first(ranking)

    def score(heads):
        with removed(model, heads, means):
            return score_fn(model)

    result = {"heads": [list(head) for head in order[: max(ks)]], "k": list(ks), "top": [], "random": []}
    for k in ks:
        result["top"].append(score(order[:k]))
        result["random"].append([score(heads) for heads in other_sets(order[:k], np.shape(ranking), seed, controls)])
    return result


def best_first(ranking) -> list[tuple[int, int]]:
    """Returns the heads by their value in ranking (n_layers, n_heads), the highest first."""
    order = np.argsort(-np.asarray(ranking), axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, np.shape(ranking)), strict=True)]


def other_sets(top, shape, seed=0, controls=3) -> list[tuple]:
    """Returns the different sets among `controls` draws of `matched`."""
    draws = (matched(top, shape, (seed, len(top), c)) for c in range(controls if top else 0))
    return [heads for heads in dict.fromkeys(draws) if heads]


def scores_without_heads(model: Llama, test: CopyTest, ranking: np.ndarray, how: str, ids: np.ndarray, text=None) -> dict:
    """Returns ablation_curve of {"exact": the exact match} for up to half of all heads; mean outputs are over random tokens of
    `ids` that occur twice.

    text: windows (B, T+1) of held-out text, and whether each of their targets (B, T) is a repeated one. With it the scores have
    "loss_repeated" and "loss_new" too, in nats per token, where there are such tokens. A progress bar on stderr counts the
    tokens that the model reads.
    """
    ks = [k for k in REMOVED if k <= ranking.size // 2]
    means = None
    if how == "mean":
        means = head_means(model, repeated(ids, fitting(model, LENGTH, test.bos), 32, 1, test.bos))

    def scores(model):
        found = {"exact": copy_scores(test, predict(model, test))["exact"]}
        if text:
            windows, again = text
            losses = token_losses(model, windows)
            kinds = {"loss_repeated": again, "loss_new": ~again}
            found |= {name: float(losses[kind].mean()) for name, kind in kinds.items() if kind.any()}
        return found

    passes = sum(1 + len(other_sets(best_first(ranking)[:k], ranking.shape)) for k in ks)
    with progress(model, passes * (test.cost() + (text[1].size if text else 0)), "ablation"):
        return ablation_curve(model, scores, ranking, ks, means)


def matched(top, shape, seed) -> tuple[tuple[int, int], ...] | None:
    """Draws as many random heads as `top` has, none of them in it, and as many of each layer (Crosbie & Shutova 2024).

    Where a layer has too few others, heads of other layers take their place; None where more than half of all heads are in
    `top`. shape: (n_layers, n_heads).
    """
    L, H = shape
    rng, taken = np.random.default_rng(seed), set(top)
    if 2 * len(taken) > L * H:
        return None
    drawn = []
    for layer in range(L):
        others = [(layer, head) for head in range(H) if (layer, head) not in taken]
        wanted = H - len(others)
        drawn += [others[i] for i in rng.permutation(len(others))[:wanted]]
    left = [(layer, head) for layer in range(L) for head in range(H) if (layer, head) not in taken.union(drawn)]
    return tuple(sorted(drawn + [left[i] for i in rng.permutation(len(left))[: len(taken) - len(drawn)]]))
