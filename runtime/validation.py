"""The loss on held-out windows, of all tokens and of new and repeated ones separately, and which tokens are repeated."""

import math

import numpy as np
import torch

from runtime import distributed


@torch.no_grad()
def validate(model, val_bin, windows: np.ndarray, micro: int, world: distributed.World, stop: distributed.StopSignal) -> dict:
    """Returns the mean loss in nats per token over the windows with the indices `windows`, `micro` at a time; the same for any
    number of ranks, some of which may get none. Raises Stopped if a signal asks the run to stop.

    A token is repeated if it and the two before it occurred in this order earlier in its window; all others are new.
    """
    mine = windows[world.rank :: world.size]

    def losses():
        sums = torch.zeros(2, 2, dtype=torch.float64)  # (new, repeated) x (loss, tokens)
        for i in range(0, len(mine), micro):
            ids = val_bin.windows(mine[i : i + micro])
            x, y = distributed.on_device(ids, world.device)
            hidden = model.hidden(x)  # (B, T, D)
            again = torch.from_numpy(repeated(ids)).to(world.device)  # (B, T)
            for kind, mask in enumerate((~again, again)):
                count = mask.sum().item()
                if count:
                    loss = model.loss(hidden, y.masked_fill(~mask, -100))
                    sums[kind] += torch.tensor([loss.item() * count, count])
        return sums

    model.eval()
    sums = stop.interruptible(losses)
    model.train()
    (new, n_new), (old, n_old) = world.sum(sums).tolist()
    row = {"val_loss": (new + old) / (n_new + n_old)}
    if n_new and n_old:
        row |= {"val_loss_new": new / n_new, "val_loss_repeated": old / n_old}
    return row


def bits_per_byte(loss: float, meta: dict | None) -> dict:
    """Returns {"val_bpb": the loss, given in nats per token, in bits per byte of text}, or {} if the bytes are unknown."""
    split = meta["splits"]["val"] if meta else {}
    return {"val_bpb": loss / math.log(2) * split["tokens"] / split["bytes"]} if split.get("bytes") else {}


def reweighted(ids: np.ndarray, y: torch.Tensor, weight: float, chance: np.ndarray) -> tuple[torch.Tensor, float]:
    """Returns the targets y (B, T) with -100 where they are left out, and the share of those that are kept.

    Targets that induction could predict, because they already followed the current token earlier in the window, count `weight`
    times as much as the others: a random share of those that count less is kept (Hapax, arXiv 2511.05743, leaves out all that
    induction could predict). chance (B, T) is uniform in [0, 1). The first target of a window is always kept, so that each
    window has a loss.
    """
    share = np.where(repeated(ids, 2), min(weight, 1), 1 / max(weight, 1))
    share[:, 0] = 1
    kept = chance < share
    return y.masked_fill(torch.from_numpy(~kept).to(y.device), -100), float(kept.mean())


def repeated(ids: np.ndarray, n: int = 3) -> np.ndarray:
    """Returns for windows (B, T+1) whether each target ends an n-gram, n = 2 or 3, that occurred earlier in its window: (B, T)
    bool.
    """
    B, T = ids.shape[0], ids.shape[1] - 1
    ngrams = 0
    for i in range(n):
        ngrams = ngrams * 65536 + ids[:, i : T + 2 - n + i]  # (B, T+2-n), 16 bits a token
    again = np.zeros((B, T), dtype=bool)
    again[:, n - 2 :] = True
    for row, keys in zip(again, ngrams, strict=True):
        row[n - 2 + np.unique(keys, return_index=True)[1]] = False
    return again
