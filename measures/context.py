"""How a model uses its context: losses on random tokens that occur twice, losses by position, and recall.

Losses are in nats per token. The model is left in eval mode.
"""

import numpy as np
import torch
import torch.nn.functional as F

from errors import UserError
from measures.batching import logits_at, progress
from measures.heads import fitting, repeated
from model import Llama

INDUCTION_LENGTH, RECALL_LENGTH, PAIRS = 384, 50, 16  # of TransformerLens, of Aoyama et al., of key_values


def token_losses(model: Llama, windows: np.ndarray) -> np.ndarray:
    """Windows (B, T+1) of token ids -> (B, T) float64; [:, t] is the loss of token t+1 given the t+1 tokens before it."""
    ids = np.asarray(windows, dtype=np.int64)
    losses = [
        F.cross_entropy(logits, right, reduction="none").cpu() for logits, right in logits_at(model, ids[:, :-1], ids[:, 1:])
    ]
    return torch.cat(losses).view(len(ids), -1).double().numpy()


def induction_loss(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, float]:
    """Returns the mean loss on s random tokens that occur twice: in the second copy, and on the same tokens in the first.

    As TransformerLens defines it (evals.induction_loss): s = 384, or what fits the context, and bos, where there is one, takes
    the place of the first token of the first copy. The first token of the second copy, and the next, which follows the token
    that bos overwrote, cannot be known from the first copy; both means are over the s - 2 others.
    Raises UserError where three tokens twice do not fit the context.
    """
    s = min(INDUCTION_LENGTH, model.config.seq_len // 2)
    if s < 3:
        raise UserError(f"seq_len={model.config.seq_len}: too short for the induction loss, which takes 6 tokens at least")
    tokens = repeated(ids, s, samples, seed, None)
    if bos is not None:
        tokens[:, 0] = bos
    losses = token_losses(model, tokens)  # (samples, 2s - 1)
    return {"first": float(losses[:, 1 : s - 1].mean()), "second": float(losses[:, s + 1 :].mean())}


def position_scores(model: Llama, windows: np.ndarray) -> dict:
    """Returns losses by context position on windows (B, T+1) of a bin (Olsson et al. 2022), and shows a progress bar.

    loss: a list (T,) whose [t] is the mean loss of the predictions made with t + 1 tokens in view
    icl_50_500, icl_50_1000: the in-context learning score, the loss at position 500 (1000) of the context, counted from 1,
    minus that at 50, and its standard error over windows, None for a single window: below 0 where the model uses the context
    between. None where the context is shorter.
    """
    with progress(model, windows[:, 1:].size, "held-out text"):
        losses = token_losses(model, windows)  # (B, T)
    scores = {}
    for late in (500, 1000):
        gains = losses[:, late - 1 : late] - losses[:, 49:50]  # (B, 1), or (B, 0) where the context is shorter
        error = float(gains.std(ddof=1) / len(gains) ** 0.5) if gains.size > 1 else None
        scores[f"icl_50_{late}"] = [float(gains.mean()), error] if gains.size else None
    return scores | {"loss": losses.mean(0).tolist()}


def associative_recall(model: Llama, ids, bos: int | None, samples: int = 100, seed: int = 0) -> dict[str, float]:
    """Measures recall as Aoyama et al. 2025: s distinct tokens occur twice, and each of the second copy must recall the next.

    s = 50, or what fits the context and `ids`; after the last token the first is asked for. accuracy: share of questions where
    the right token is the likeliest; rank: mean number of ids that are likelier. Ids with equal logits share their places, so
    that a model that knows nothing has accuracy 1/V and rank (V-1)/2. Raises UserError where two tokens twice do not fit.
    """
    ids, lead = np.asarray(ids, dtype=np.int64), int(bos is not None)
    s = min(fitting(model, RECALL_LENGTH, bos), len(ids))
    rng = np.random.default_rng(seed)
    part = np.stack([rng.permutation(ids)[:s] for _ in range(samples)])  # (samples, s)
    tokens = np.concatenate((np.full((samples, lead), bos or 0), part, part), axis=1)
    hits, ranks = [], []
    for logits, right in logits_at(model, tokens, np.roll(part, -1, axis=1), slice(lead + s, None)):
        logit = logits.gather(-1, right[:, None])
        above = (logits > logit).sum(-1)  # (n,)
        level = (logits == logit).sum(-1) - 1
        hits.append((above == 0) / (level + 1))
        ranks.append(above + level / 2)
    return {"accuracy": torch.cat(hits).mean().item(), "rank": torch.cat(ranks).mean().item()}


def key_values(model: Llama, ids, bos: int | None, samples: int = 100) -> float:
    """Measures multi-query associative recall (Arora et al. 2023): pairs of a key and a value, then the same pairs in another
    order. Returns the share of keys of the second round after which the right value is the likeliest token.

    All tokens of a sample are distinct. There are fewer pairs where the context or `ids` hold less; raises UserError where they
    do not hold two.
    """
    ids, lead = np.asarray(ids, dtype=np.int64), int(bos is not None)
    n = min(PAIRS, fitting(model, 2 * PAIRS, bos) // 2, len(ids) // 2)
    if n < 2:
        raise UserError(f"seq_len={model.config.seq_len}, {len(ids)} ids: too few for two pairs of a key and a value")
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(ids)[: 2 * n].reshape(n, 2) for _ in range(samples)])  # (samples, n, 2)
    second = np.stack([rng.permutation(rows) for rows in first])
    rounds = first.reshape(samples, -1), second.reshape(samples, -1)
    tokens = np.concatenate((np.full((samples, lead), bos or 0), *rounds), axis=1)[:, :-1]
    keys = slice(lead + 2 * n, None, 2)  # of the second round
    hits = [logits.argmax(-1) == right for logits, right in logits_at(model, tokens, second[:, :, 1], keys)]
    return torch.cat(hits).float().mean().item()
