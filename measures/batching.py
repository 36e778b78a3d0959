"""How much of a model's work is in memory at once during an evaluation."""

from collections.abc import Iterator

import numpy as np
import torch

from model import Llama

TOKENS = 32768  # per forward pass
ROWS = 4096  # of logits, or of the embedding in float64


def wide(logits):
    """Logits in fp32 or wider: the softmax of bf16 logits has two digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def logits_at(model: Llama, tokens: np.ndarray, targets: np.ndarray, asked=slice(None)) -> Iterator[tuple]:
    """Yields logits (n, V) and their target ids (n,) for the positions `asked` of token ids (B, T), sample by sample.

    targets (B, number of positions asked): the token that should come after each of these positions.
    """
    model.eval()
    device = model.embed.weight.device
    batch = max(1, TOKENS // tokens.shape[1])
    for i in range(0, len(tokens), batch):
        hidden = model.hidden(torch.from_numpy(tokens[i : i + batch]).to(device))[:, asked].flatten(0, 1)  # (n, D)
        right = torch.from_numpy(targets[i : i + batch]).to(device).flatten()  # (n,)
        for x, y in zip(hidden.split(ROWS), right.split(ROWS), strict=True):
            yield wide(model.lm_head(x)), y
