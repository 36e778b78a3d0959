"""Scores of every attention head, each as an (n_layers, n_heads) float64 array: what it looks at, and what it writes.

What a head looks at is measured on random tokens that occur several times in the same order, where nothing but the context
helps; what it writes, by the eigenvalues of its OV circuit, from the weights alone. Query head h of a model with fewer key and
value heads has the keys and values of head h // (H / Hkv).
"""

import numpy as np
import torch

from errors import UserError
from model import Llama

LENGTH = 100  # s of the paper's section 4
OLSSON_LENGTH, OLSSON_TIMES, OLSSON_SAMPLES = 25, 4, 10
ROWS = 4096  # of the embedding that are float64 at once


def repeated(ids, s: int, samples: int, seed: int, bos: int | None, times: int = 2) -> np.ndarray:
    """s tokens drawn from `ids`, each as likely as the other and with replacement, that occur `times` times in one order.

    -> (samples, lead + times * s) int64, where lead is 1 and the first id is bos, or 0 where bos is None. The same arguments
    give the same tokens, and another bos or `times` the same draw.
    """
    part = np.random.default_rng(seed).choice(np.asarray(ids, dtype=np.int64), (samples, s))
    lead = np.full((samples, 0 if bos is None else 1), 0 if bos is None else bos)
    return np.concatenate((lead, *[part] * times), axis=1)


def fitting(model: Llama, most: int, bos: int | None, times: int = 2) -> int:
    """`most`, or the largest s for which bos and `times` * s tokens fit the context. Raises UserError if it is below 2."""
    lead, seq_len = int(bos is not None), model.config.seq_len
    s = min(most, (seq_len - lead) // times)
    if s < 2:
        raise UserError(
            f"seq_len={seq_len}: too short for tokens that occur {times} times, which take {lead + 2 * times} at least"
        )
    return s


def pattern_scores(probs, s: int, lead: int = 0) -> dict:
    """Mean attention, (H,) each, from the probabilities (B, H, T, T) on `lead` tokens and then s tokens that occur twice.

    Positions below count the repeated tokens from 1, so that token i occurs at i and s+i.

    induction        from s+i-1 to i for i = 2..s: from the second occurrence of a token to what followed the first
    induction_paper  the range as printed (Lv et al. 2024, section 4), i = 1..s-1. At i = 1 the query is the last token of the
                     first copy, which has nothing to induce from, so that a perfect head scores (s-2)/(s-1)
    diagonal         i = 1..s+1, all that the diagonal holds (Main_Demo of TransformerLens): a perfect head scores s/(s+1)
    duplicate        from s+i to i for i = 1..s: from the second occurrence of a token to the first
    previous         from each token to the one before it, `lead` among them
    """
    inner = probs[:, :, lead:, lead:]  # (B, H, 2s, 2s), of rows that are not scaled to sum to 1 without the lead
    back = inner.diagonal(1 - s, dim1=-2, dim2=-1)  # (B, H, s+1): i = 1 .. s+1
    return {
        "induction": back[..., 1:s].mean((0, 2)),
        "induction_paper": back[..., : s - 1].mean((0, 2)),
        "diagonal": back.mean((0, 2)),
        "duplicate": inner.diagonal(-s, dim1=-2, dim2=-1).mean((0, 2)),
        "previous": probs.diagonal(-1, dim1=-2, dim2=-1).mean((0, 2)),
    }


@torch.no_grad()
def attention_scores(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """pattern_scores of all heads, (n_layers, n_heads) each, in one pass; s = 100 or what fits the context.

    Raises UserError where two tokens twice do not fit.
    """
    model.eval()
    s = fitting(model, LENGTH, bos)
    layers = [pattern_scores(probs, s, int(bos is not None)) for probs in _maps(model, repeated(ids, s, samples, seed, bos))]
    return {name: _array([layer[name] for layer in layers]) for name in layers[0]}


@torch.no_grad()
def prefix_matching(model: Llama, ids, bos: int | None, samples: int = OLSSON_SAMPLES, seed: int = 0) -> np.ndarray:
    """Olsson et al. 2022: on 25 random tokens that occur 4 times, the attention from a token to those after its earlier
    occurrences, summed over these, and its mean over all tokens of copies 2 to 4. (n_layers, n_heads).

    Their appendix says the tokens before the earlier occurrences, and its erratum those after. Here all of `ids` are drawn,
    with no trim of common and rare ones. Fewer than 25 where the context is short; UserError where 2 do not fit.
    """
    model.eval()
    s, lead = fitting(model, OLSSON_LENGTH, bos, OLSSON_TIMES), int(bos is not None)
    scores = []
    for probs in _maps(model, repeated(ids, s, samples, seed, bos, OLSSON_TIMES)):
        inner = probs[:, :, lead:, lead:]
        # The token after the occurrence m copies ago is m * s - 1 back; the first entry is the last token of copy m.
        after = [inner.diagonal(1 - m * s, dim1=-2, dim2=-1)[..., 1:].sum(-1) for m in range(1, OLSSON_TIMES)]  # (B, H)
        scores.append(sum(after).mean(0) / ((OLSSON_TIMES - 1) * s))
    return _array(scores)


@torch.no_grad()
def ov_eigenvalues(model: Llama, folded: bool = False) -> np.ndarray:
    """The eigenvalues of W_U W_O W_V W_E of each head that are not 0 by its rank, (n_layers, n_heads, Dh) complex128.

    Elhage et al. 2021: how the head, attending to a token, changes the logit of that token. (V, V) matrices of rank Dh: they
    share the eigenvalues of W_V (W_E W_U) W_O, (Dh, Dh), which are computed, in float64 on the CPU.

    folded: with the gain of the attention's norm in W_V and that of the final norm in W_U. The paper (section 4) prints the
    product without gains, and so does the default.
    """
    c = model.config
    split = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
    embed, head = model.embed.weight.cpu(), model.lm_head.weight.cpu()  # (V, D)
    core = sum(e.double().T @ u.double() for e, u in zip(embed.split(ROWS), head.split(ROWS), strict=True))  # (D, D)
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


def eigenvalue_score(model: Llama, folded: bool = False) -> np.ndarray:
    """EP (paper, section 4): the sum of a head's OV eigenvalues over that of their moduli, (n_layers, n_heads) in [-1, 1].

    1: whatever token the head attends to, it makes more likely; 0 for a head whose eigenvalues are all 0. folded:
    see ov_eigenvalues.
    """
    return _positivity(ov_eigenvalues(model, folded))


def _positivity(values: np.ndarray) -> np.ndarray:
    total, moduli = values.sum(-1).real, np.abs(values).sum(-1)
    return np.divide(total, moduli, out=np.zeros_like(total), where=moduli > 0)


def paper_score(attention: dict, eigenvalue: np.ndarray, eigenvalue_folded: np.ndarray) -> dict[str, np.ndarray]:
    """I = A-bar * EP of each head (paper, section 4), (n_layers, n_heads) in [-1, 1], from what the functions above return.

    paper: as printed, induction_paper and gains left out. mended: induction, and gains folded in.
    """
    return {
        "paper": attention["induction_paper"] * eigenvalue,
        "mended": attention["induction"] * eigenvalue_folded,
    }


def scores(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """All of the above by name, (n_layers, n_heads) each: two passes over random tokens drawn from `ids`, and the weights."""
    attention = attention_scores(model, ids, bos, samples, seed)
    eigenvalue = {"eigenvalue": eigenvalue_score(model), "eigenvalue_folded": eigenvalue_score(model, folded=True)}
    return (
        attention
        | {"prefix_matching": prefix_matching(model, ids, bos, seed=seed)}
        | eigenvalue
        | {f"score_{name}": score for name, score in paper_score(attention, *eigenvalue.values()).items()}
    )


def _maps(model: Llama, tokens: np.ndarray):
    return model.attention_maps(torch.from_numpy(tokens).to(model.embed.weight.device))


def _array(layers: list) -> np.ndarray:
    """(H,) tensors, one a layer -> (n_layers, n_heads) float64."""
    return torch.stack(layers).cpu().double().numpy()
