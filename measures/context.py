"""What a model makes of its context: losses on random tokens that occur twice, losses by position, and recall.

Losses are in nats per token. The model is left in eval mode.
"""

import numpy as np
import torch
import torch.nn.functional as F

from errors import UserError
from measures.heads import fitting, repeated
from model import Llama

SUBSEQUENCE, RECALL_LENGTH = 384, 50  # of TransformerLens and of Aoyama et al.
PASS, ROWS = 32768, 4096  # tokens a pass through the blocks, and through the head


@torch.no_grad()
def token_losses(model: Llama, windows: np.ndarray) -> np.ndarray:
    """Windows (B, T+1) of token ids -> (B, T) float64: at [:, t] the loss of token t+1 (from 0) after those before it."""
    model.eval()
    losses = []
    for ids in torch.from_numpy(np.asarray(windows, dtype=np.int64)).split(max(1, PASS // windows.shape[1])):
        ids = ids.to(model.embed.weight.device)
        rows = model.hidden(ids[:, :-1]).flatten(0, 1).split(ROWS)  # (n, D) each
        pieces = zip(rows, ids[:, 1:].flatten().split(ROWS), strict=True)
        flat = torch.cat([F.cross_entropy(_logits(model, x), targets, reduction="none") for x, targets in pieces])
        losses.append(flat.view(len(ids), -1).cpu().double())
    return torch.cat(losses).numpy()


def _logits(model: Llama, x):
    """x (n, D) -> (n, V), of fp32 at least."""
    logits = model.lm_head(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def induction_loss(model: Llama, ids, bos: int | None, samples: int = 32, seed: int = 0) -> dict[str, float]:
    """Mean loss on s random tokens that occur twice: of the second copy, and of the same tokens in the first.

    As TransformerLens defines it (evals.induction_loss): s = 384, or what fits the context, and bos, where there is one, takes
    the place of the first token of the first copy. So two tokens of the second copy cannot be known from the first: its first
    one, and the next, which follows the token that bos overwrote. `second` is the mean over the s-2 others, tokens
    s+2 .. 2s-1 of the 2s (from 0), which is [:, s+1:] of token_losses; `first` that over tokens 2 .. s-1, [:, 1:s-1], which
    are the same ids. Theirs takes 4 samples.

    Raises UserError where three tokens twice do not fit the context.
    """
    s = min(SUBSEQUENCE, model.config.seq_len // 2)
    if s < 3:
        raise UserError(f"seq_len={model.config.seq_len}: too short for the induction loss, which takes 6 tokens at least")
    tokens = repeated(ids, s, samples, seed, None)
    if bos is not None:
        tokens[:, 0] = bos
    losses = token_losses(model, tokens)  # (samples, 2s - 1)
    return {"first": float(losses[:, 1 : s - 1].mean()), "second": float(losses[:, s + 1 :].mean())}


def position_losses(model: Llama, windows: np.ndarray) -> np.ndarray:
    """Mean loss by context position (Olsson et al. 2022) over windows (B, T+1) of a bin -> (T,) float64.

    At [t] it is the mean loss of the prediction that is made with t+1 tokens in view.
    """
    return token_losses(model, windows).mean(0)


def icl_score(losses: np.ndarray, early: int = 50, late: int = 500) -> float | None:
    """Olsson et al. 2022: the loss at the `late`-th position of the context less that at the `early`-th, counted from 1, of
    position_losses (T,). Below 0 where the model makes use of the context between; None where T < late.
    """
    return float(losses[late - 1] - losses[early - 1]) if len(losses) >= late else None


@torch.no_grad()
def associative_recall(model: Llama, ids, bos: int | None, samples: int = 100, seed: int = 0) -> dict[str, float]:
    """Aoyama et al. 2025: s distinct tokens occur twice, and at each of the second copy the next one is asked for.

    Tokens r_0 .. r_(s-1) twice, s = 50 or what fits the context (or len(ids) where that is less). At position s+j the right
    token is r_(j+1), and r_0 at the last, which followed r_(s-1) too: s questions a sample. accuracy: share of them with the
    right token the likeliest; rank: mean number of ids of the vocabulary that are likelier. Of ids with one and the same logit
    each is the first as often as the other, so that a model that knows nothing has accuracy 1/V and rank (V-1)/2; theirs
    counts the right one as the first of them. Theirs begins with r_0, without bos.

    Raises UserError where two tokens twice do not fit the context.
    """
    model.eval()
    ids = np.asarray(ids, dtype=np.int64)
    s = min(fitting(model, RECALL_LENGTH, bos), len(ids))
    rng, lead = np.random.default_rng(seed), int(bos is not None)
    part = np.stack([rng.permutation(ids)[:s] for _ in range(samples)])  # (samples, s)
    tokens = torch.from_numpy(np.concatenate((np.full((samples, lead), bos or 0), part, part), axis=1))
    tokens, right = tokens.to(model.embed.weight.device), torch.from_numpy(np.roll(part, -1, axis=1))  # (samples, s)
    hits, ranks = [], []
    for x, target in zip(tokens.split(PASS // (2 * s)), right.to(tokens.device).split(PASS // (2 * s)), strict=True):
        rows = model.hidden(x)[:, lead + s :].flatten(0, 1).split(ROWS)
        for row, wanted in zip(rows, target.flatten().split(ROWS), strict=True):
            logits = _logits(model, row)  # (n, V)
            logit = logits.gather(-1, wanted[:, None])
            above, level = (logits > logit).sum(-1), (logits == logit).sum(-1) - 1  # (n,)
            hits.append((above == 0) / (level + 1))
            ranks.append(above + level / 2)
    return {"accuracy": torch.cat(hits).mean().item(), "rank": torch.cat(ranks).mean().item()}


@torch.no_grad()
def key_values(model: Llama, ids, bos: int | None, pairs: int = 16, samples: int = 100, seed: int = 0) -> float:
    """Multi-query associative recall (Arora et al. 2023): pairs of a key and a value, then the same pairs in another order; the
    share of keys of the second round after which the right value is the likeliest token.

    All tokens of a sample are distinct. Where copying needs one to go on with what came next, here each pair must be found
    anew. Fewer pairs where the context or `ids` hold less; UserError where it does not hold two.
    """
    model.eval()
    ids, lead = np.asarray(ids, dtype=np.int64), int(bos is not None)
    n = min(pairs, fitting(model, 2 * pairs, bos) // 2, len(ids) // 2)
    if n < 2:
        raise UserError(f"seq_len={model.config.seq_len}, {len(ids)} ids: too few for two pairs of a key and a value")
    rng = np.random.default_rng(seed)
    first = np.stack([rng.permutation(ids)[: 2 * n].reshape(n, 2) for _ in range(samples)])  # (samples, n, 2)
    second = np.stack([rng.permutation(rows) for rows in first])
    tokens = np.concatenate(
        (np.full((samples, lead), bos or 0), first.reshape(samples, -1), second.reshape(samples, -1)), axis=1
    )
    hits = []
    for x in torch.from_numpy(tokens).to(model.embed.weight.device).split(max(1, PASS // tokens.shape[1])):
        asked = model.hidden(x[:, :-1])[:, lead + 2 * n :: 2]  # (B, n, D): at the keys of the second round
        hits.append(_logits(model, asked.flatten(0, 1)).argmax(-1) == x[:, lead + 2 * n + 1 :: 2].flatten())
    return torch.cat(hits).double().mean().item()
