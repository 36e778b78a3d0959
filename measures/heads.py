"""Scores of every attention head, each an (n_layers, n_heads) float64 array: where a head looks, and what it writes.

Where it looks is measured on random tokens that occur several times in the same order, so that nothing but the context helps;
what it writes, by the eigenvalues of its OV circuit, from the weights alone. In a model with fewer key and value heads, query
head h uses those of head h // (H / Hkv).

SCORES holds them all. To add a score, add an entry: tables, JSON, pictures, training and the curves over steps follow it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from errors import UserError
from measures.batching import ROWS, batches
from model import Llama

LENGTH = 100  # s of the paper's section 4
OLSSON_LENGTH, OLSSON_TIMES, OLSSON_SAMPLES = 25, 4, 10


class Patterns(NamedTuple):
    """Attention probabilities (B, H, T, T) of one layer, on `lead` tokens and then s tokens that occur twice."""

    probs: torch.Tensor
    s: int
    lead: int

    def diagonal(self, back: int):
        """Returns the attention among the repeated tokens from each position to the one `back` before it: (B, H, 2s - back)."""
        return self.probs[:, :, self.lead :, self.lead :].diagonal(-back, dim1=-2, dim2=-1)


class Given(NamedTuple):
    """The inputs of a score that is not a mean of attention. core: embed_unembed(model); found: the scores before it in
    SCORES, by name.
    """

    model: Llama
    ids: np.ndarray
    bos: int | None
    seed: int
    core: torch.Tensor
    found: dict[str, np.ndarray]


class Score(NamedTuple):
    """title: its name in tables and pictures; empty for a variant that only the JSON holds.
    attention: (Patterns) -> (B, H, n), attention whose mean is the score; or
    other: (Given) -> (n_layers, n_heads).
    headline: its maximum over heads is logged during training as <name>_max, and it is drawn head by head.
    """

    title: str
    attention: Callable[[Patterns], torch.Tensor] | None = None
    other: Callable[[Given], np.ndarray] | None = None
    headline: bool = False


def repeated(ids, s: int, samples: int, seed: int, bos: int | None, times: int = 2) -> np.ndarray:
    """Draws s tokens uniformly from `ids`, with replacement, and repeats them so that they occur `times` times in one order.

    Returns (samples, lead + times * s) int64, where lead is 1 and the first id is bos, or 0 where bos is None. The same
    arguments give the same tokens; another bos or `times` changes nothing in the draw.
    """
    part = np.random.default_rng(seed).choice(np.asarray(ids, dtype=np.int64), (samples, s))
    lead = np.full((samples, 0 if bos is None else 1), 0 if bos is None else bos)
    return np.concatenate((lead, *[part] * times), axis=1)


def fitting(model: Llama, most: int, bos: int | None, times: int = 2) -> int:
    """Returns `most`, or the largest s such that bos and `times` * s tokens fit the context. Raises UserError if s < 2."""
    lead, seq_len = int(bos is not None), model.config.seq_len
    s = min(most, (seq_len - lead) // times)
    if s < 2:
        raise UserError(
            f"seq_len={seq_len}: too short for tokens that occur {times} times, which take {lead + 2 * times} at least"
        )
    return s


def pattern_scores(probs, s: int, lead: int = 0) -> dict:
    """Returns the attention scores of one layer, (H,) each, from its probabilities; see Patterns."""
    patterns = Patterns(probs, s, lead)
    return {name: score.attention(patterns).mean((0, 2)) for name, score in SCORES.items() if score.attention}


def attention_scores(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the attention scores of all layers, (n_layers, n_heads) each, from one pass; s = 100, or what fits the context.

    Raises UserError where two tokens twice do not fit.
    """
    s, lead = fitting(model, LENGTH, bos), int(bos is not None)
    return _averaged(model, repeated(ids, s, samples, seed, bos), lambda probs: pattern_scores(probs, s, lead))


@torch.no_grad()
def _averaged(model: Llama, tokens: np.ndarray, score) -> dict[str, np.ndarray]:
    """Returns the mean of score(probs) over token ids (B, T): {name: (n_layers, n_heads)}.

    score takes the attention probabilities of one layer and a few samples, (b, H, T, T), and returns {name: (H,)}. No more of
    them is in memory at once.
    """
    model.eval()
    total = {}
    for (some,) in batches(model, tokens):
        layers = [score(probs) for probs in model.attention_maps(some)]
        for name in layers[0]:
            values = torch.stack([layer[name] for layer in layers]).cpu().double().numpy()
            total[name] = total.get(name, 0) + values * (len(some) / len(tokens))
    return total


def scores(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns all SCORES by name, (n_layers, n_heads) each, from two passes over random tokens and from the weights."""
    found = attention_scores(model, ids, bos, samples, seed)
    given = Given(model, ids, bos, seed, embed_unembed(model), found)
    for name, score in SCORES.items():
        if score.other:
            found[name] = score.other(given)
    return found


def prefix_matching(model: Llama, ids, bos: int | None, seed: int = 0) -> np.ndarray:
    """Returns the prefix-matching score of Olsson et al. 2022, with their erratum: (n_layers, n_heads).

    On 25 random tokens that occur 4 times, fewer where the context is short: the attention from a token to those after its
    earlier occurrences, summed over these, and averaged over all tokens of copies 2 to 4. Raises UserError if 2 do not fit.
    """
    s, lead = fitting(model, OLSSON_LENGTH, bos, OLSSON_TIMES), int(bos is not None)

    def score(probs):
        inner = probs[:, :, lead:, lead:]
        # The token after the occurrence m copies ago is m * s - 1 back; the first entry is the last token of copy m.
        after = [inner.diagonal(1 - m * s, dim1=-2, dim2=-1)[..., 1:].sum(-1) for m in range(1, OLSSON_TIMES)]  # (B, H)
        return {"": sum(after).mean(0) / ((OLSSON_TIMES - 1) * s)}

    return _averaged(model, repeated(ids, s, OLSSON_SAMPLES, seed, bos, OLSSON_TIMES), score)[""]


@torch.no_grad()
def embed_unembed(model: Llama) -> torch.Tensor:
    """Returns W_E W_U, (D, D) float64 on the CPU."""
    embed, unembed = model.embed.weight.cpu(), model.lm_head.weight.cpu()  # (V, D)
    return sum(e.double().T @ u.double() for e, u in zip(embed.split(ROWS), unembed.split(ROWS), strict=True))


@torch.no_grad()
def ov_eigenvalues(model: Llama, folded: bool = False, core=None) -> np.ndarray:
    """Returns the Dh eigenvalues of each head's W_U W_O W_V W_E that may differ from 0: (n_layers, n_heads, Dh) complex128.

    This (V, V) matrix says how the head, attending to a token, changes the logit of every token (Elhage et al. 2021). Its other
    eigenvalues are 0; these are those of W_V (W_E W_U) W_O, (Dh, Dh), and are computed in float64 on the CPU.

    folded: with the gain of the attention's norm in W_V and that of the final norm in W_U. The paper (section 4) prints the
    product without gains, and so does the default. core: embed_unembed(model), where it is known already.
    """
    c = model.config
    split = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
    core = embed_unembed(model) if core is None else core
    if folded:
        core = core * model.norm.cpu().double()
    values = []
    for block in model.blocks:
        w_v = block.attention.wqkv.weight.cpu().double().split(split)[2]  # (Hkv * Dh, D)
        if folded:
            w_v = w_v * block.attention_norm.cpu().double()
        w_v = w_v.unflatten(0, (-1, c.head_dim)).repeat_interleave(c.n_heads // c.n_kv_heads, dim=0)  # (H, Dh, D)
        w_o = block.attention.wo.weight.cpu().double().unflatten(1, (-1, c.head_dim)).transpose(0, 1)  # (H, D, Dh)
        values.append(np.linalg.eigvals((w_v @ core @ w_o).numpy()))
    return np.stack(values).astype(np.complex128)


def eigenvalue_score(model: Llama, folded: bool = False, core=None) -> np.ndarray:
    """Returns EP (paper, section 4), (n_layers, n_heads): the sum of a head's OV eigenvalues over that of their moduli.

    It lies in [-1, 1]. 1: the head makes whatever token it attends to more likely; 0 if all of its eigenvalues are 0.
    """
    values = ov_eigenvalues(model, folded, core)
    total, moduli = values.sum(-1).real, np.abs(values).sum(-1)
    return np.divide(total, moduli, out=np.zeros_like(total), where=moduli > 0)


# Positions in these comments count the repeated tokens from 1: token i occurs at i and at s+i.
SCORES = {
    # From the second occurrence of a token to what followed the first: from s+i-1 to i for i = 2 .. s.
    "induction": Score("induction: attention to what followed", lambda p: p.diagonal(p.s - 1)[..., 1 : p.s], headline=True),
    # As printed (Lv et al. 2024, section 4), i = 1 .. s-1. At i = 1 the query is the last token of the first copy, which has
    # nothing to induce from, so that a perfect head scores (s-2)/(s-1).
    "induction_paper": Score("", lambda p: p.diagonal(p.s - 1)[..., : p.s - 1]),
    # i = 1 .. s+1, the whole diagonal (Main_Demo of TransformerLens): a perfect head scores s/(s+1).
    "diagonal": Score("", lambda p: p.diagonal(p.s - 1)),
    # From the second occurrence of a token to the first: from s+i to i.
    "duplicate": Score("duplicate token: attention to its first copy", lambda p: p.diagonal(p.s)),
    # From each token to the one before it, `lead` among them.
    "previous": Score(
        "previous token: attention to the one before", lambda p: p.probs.diagonal(-1, dim1=-2, dim2=-1), headline=True
    ),
    "prefix_matching": Score("prefix matching (Olsson et al.)", other=lambda g: prefix_matching(g.model, g.ids, g.bos, g.seed)),
    "eigenvalue": Score("", other=lambda g: eigenvalue_score(g.model, False, g.core)),
    "eigenvalue_folded": Score(
        "OV eigenvalues: promotes what it attends to", other=lambda g: eigenvalue_score(g.model, True, g.core)
    ),
    # I = attention * eigenvalues (paper, section 4): as printed; and with i from 2 and the gains of the norms folded in.
    "score_paper": Score("", other=lambda g: g.found["induction_paper"] * g.found["eigenvalue"]),
    "score_mended": Score(
        "induction score I: attention x eigenvalues", other=lambda g: g.found["induction"] * g.found["eigenvalue_folded"]
    ),
}
