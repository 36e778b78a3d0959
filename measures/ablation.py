"""What a model loses without some of its heads, compared with what it loses without as many others.

    ranking = heads.attention_scores(model, ids, bos)["induction"]
    ablation_curve(model, lambda model: copy_scores(model, test)["exact"], ranking, ks=(0, 1, 2, 4))

A head is an index (layer, head). Its output is the (B, T, Dh) slice of what attention.wo reads.
"""

import contextlib
import weakref

import numpy as np
import torch

from measures.batching import progress
from measures.copying import CopyTest, copy_scores, predict
from measures.heads import LENGTH, fitting, repeated
from model import KVCache, Llama

HOW = ("zero", "mean", "pattern")
REMOVED = (0, 1, 2, 4, 8, 16, 32)  # numbers of heads


@contextlib.contextmanager
def removed(model: Llama, heads, how: str = "zero", means=None):
    """Removes `heads`, an iterable of (layer, head), from the model's forward passes within this context.

    zero     the output of each is 0.
    mean     the output of each is its mean, from means = head_means(model, tokens). (Crosbie & Shutova 2024.)
    pattern  the output of each is 0, while all heads attend as they would if none were removed (pattern-preserving ablation,
             Olsson et al. 2022): queries and keys come from an intact pass alongside. What is lost is what the heads write,
             not where other heads look because of it. Twice the work of a pass.

    All three work with a KVCache; for pattern it must be filled within this context, and is left with the keys and values of
    the intact pass. attention_maps yields the patterns of the ablated pass.
    Raises ValueError for another `how`, a head that the model lacks, mean without means, and pattern within pattern.
    """
    by_layer = _by_layer(model, heads)
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    if how == "mean" and means is None:
        raise ValueError("how='mean': expected means, as head_means(model, tokens) returns them")
    with contextlib.ExitStack() as stack:
        if how == "pattern":
            stack.enter_context(_pattern_preserved(model, by_layer))
        else:
            for layer, mine in by_layer.items():
                value = means[layer, mine] if how == "mean" else 0.0  # (n, Dh)
                hook = model.blocks[layer].attention.wo.register_forward_pre_hook(_replacing(mine, value, model.config))
                stack.callback(hook.remove)
        yield model


def _by_layer(model: Llama, heads) -> dict[int, list[int]]:
    L, H = model.config.n_layers, model.config.n_heads
    by_layer = {}
    for layer, head in sorted({(int(layer), int(head)) for layer, head in heads}):
        if not (0 <= layer < L and 0 <= head < H):
            raise ValueError(f"head ({layer}, {head}): this model has layers 0 to {L - 1} of heads 0 to {H - 1}")
        by_layer.setdefault(layer, []).append(head)
    return by_layer


def _replacing(mine: list[int], value, config):
    """A forward pre-hook of attention.wo that sets the outputs of heads `mine` to value, 0 or (n, Dh)."""

    def hook(_, args):
        x = args[0].unflatten(-1, (config.n_heads, config.head_dim)).clone()  # (B, T, H, Dh)
        x[..., mine, :] = value.to(x) if torch.is_tensor(value) else value
        return (x.flatten(-2),)

    return hook


@torch.no_grad()
def head_means(model: Llama, tokens) -> torch.Tensor:
    """The mean output of each head over all positions and samples of token ids (B, T), in one pass in eval mode:
    (n_layers, n_heads, Dh), fp32 or wider.
    """
    model.eval()
    c, means = model.config, []

    def hook(_, args):
        x = args[0]
        means.append(x.to(torch.promote_types(x.dtype, torch.float32)).mean((0, 1)))  # (H * Dh,)

    with contextlib.ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.attention.wo.register_forward_pre_hook(hook).remove)
        model.hidden(torch.as_tensor(tokens).to(model.embed.weight.device))
    return torch.stack(means).view(c.n_layers, c.n_heads, c.head_dim)


@contextlib.contextmanager
def _pattern_preserved(model: Llama, by_layer: dict[int, list[int]]):
    """Makes this model's hidden() run every batch twice in one: the first half intact, the second without the heads but with
    the queries and keys of the first. It returns the second half.
    """
    if "hidden" in vars(model):
        raise ValueError("how='pattern': already so; name all heads in one call")
    hidden, both = model.hidden, False  # both: whether a batch of two halves is under way
    twins = weakref.WeakKeyDictionary()  # the caller's KVCache -> one of both halves

    def hidden_twice(tokens, seed=None, cache: KVCache | None = None):
        nonlocal both
        B, twin = len(tokens), None
        if cache:
            if cache.length and cache not in twins:
                raise ValueError("how='pattern': this KVCache was filled outside of the context; begin with an empty one")
            twin = twins.setdefault(cache, KVCache(model, 2 * B, cache.kv.shape[3]))
            twin.length = cache.length
        both = True
        x = hidden(torch.cat((tokens, tokens)), cache=twin)
        both = False
        if cache:
            new = slice(cache.length, twin.length)
            cache.kv[:, :, :, new] = twin.kv[:, :, :B, new]
            cache.length = twin.length
        return x[B:]

    def shared(project):
        def patched(x):
            qkv = project(x)  # (2 B, T, H + 2 Hkv, Dh)
            if both:
                intact, ablated = (half[:, :, : -model.config.n_kv_heads] for half in qkv.chunk(2))  # q and k
                ablated.copy_(intact)
            return qkv

        return patched

    def second_half(hook):
        return lambda module, args: (torch.cat((args[0].chunk(2)[0], *hook(module, args[0].chunk(2)[1:]))),) if both else None

    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            block.attention.project = shared(block.attention.project)
            stack.callback(delattr, block.attention, "project")
            if layer in by_layer:
                hook = second_half(_replacing(by_layer[layer], 0.0, model.config))
                stack.callback(block.attention.wo.register_forward_pre_hook(hook).remove)
        model.hidden = hidden_twice
        stack.callback(delattr, model, "hidden")
        yield


def ablation_curve(model: Llama, score_fn, ranking, ks, how="zero", seed=0, controls=3, means=None) -> dict:
    """Scores the model, as score_fn(model) does, without the k highest heads of `ranking` (n_layers, n_heads), for each k of
    `ks`, and without `controls` random sets of k others.

    A random set has as many heads of each layer as the k highest have there, drawn from the others (Crosbie & Shutova 2024).
    Where a layer has too few others, the set takes them all and fills up with heads of other layers; `unmatched` counts these.
    Where more than half of all heads are removed there is no such set. The draw depends on seed, k and the heads removed.

    Returns {"heads": [[layer, head], ...], "k": [...], "top": [...], "random": [[...], ...], "unmatched": [...]}: the heads,
    highest first, as many as the largest k; then for each k the score, the scores of the random sets ([] where there is none),
    and the largest `unmatched` of these. Raises ValueError for a k that is no number of heads.
    """
    ranking, ks = np.asarray(ranking), [int(k) for k in ks]
    order = np.argsort(-ranking, axis=None, kind="stable")
    order = [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, ranking.shape), strict=True)]
    if bad := [k for k in ks if not 0 <= k <= len(order)]:
        raise ValueError(f"k={bad[0]}: expected 0 to {len(order)}, the number of heads")

    def score(heads):
        with removed(model, heads, how, means):
            return float(score_fn(model))

    result = {"heads": [list(head) for head in order[: max(ks, default=0)]], "k": [], "top": [], "random": [], "unmatched": []}
    for k in ks:
        draws = [matched(order[:k], ranking.shape, (seed, k, c)) for c in range(controls)]
        top = score(order[:k])
        result["k"].append(k)
        result["top"].append(top)
        result["random"].append([score(heads) if k else top for heads, _ in filter(None, draws)])
        result["unmatched"].append(max((n for _, n in filter(None, draws)), default=0))
    return result


def copying_without_heads(model: Llama, test: CopyTest, ranking: np.ndarray, how: str, ids: np.ndarray) -> dict:
    """ablation_curve of the exact match, up to half of all heads; `mean` is taken on random tokens of `ids` that occur twice.

    A progress bar on stderr counts the tokens that the model reads.
    """
    ks = [k for k in REMOVED if k <= ranking.size // 2]
    means = head_means(model, repeated(ids, fitting(model, LENGTH, test.bos), 32, 1, test.bos))
    curves = sum(1 + 3 * (k > 0) for k in ks) * (2 if how == "pattern" else 1)
    with progress(model, curves * test.cost(), "ablation"):
        return ablation_curve(
            model, lambda model: copy_scores(test, predict(model, test))["exact"], ranking, ks, how, means=means
        )


def matched(top, shape, seed) -> tuple[list[tuple[int, int]], int] | None:
    """Draws as many random heads as `top` has, none of them in it, with as many of each layer where possible.

    Returns ([(layer, head), ...], how many could not be matched by layer), or None where the model has too few other heads.
    shape: (n_layers, n_heads).
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
    missing = len(taken) - len(drawn)
    return sorted(drawn + [left[i] for i in rng.permutation(len(left))[:missing]]), missing
