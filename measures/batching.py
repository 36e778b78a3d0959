"""Batches, cost and progress of evaluations."""

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from model import Llama

TOKENS = 8192  # per forward pass on a CPU; four times as many elsewhere, as launching a pass takes a GPU's host longer
ROWS = 4096  # of logits, or of the embedding in float64
FLOPS = 1e12  # budget of a measure on a CPU, about 10 s on two cores; other devices get 100 times as much


def wide(x):
    """Returns x in fp32 or wider: bf16 has two to three significant digits, too few for a softmax or a mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def affordable(model: Llama, tokens: int, most: int, least: int = 4, share: float = 1.0) -> int:
    """Returns how many samples of `tokens` tokens cost `share` * FLOPS at 2 FLOPs a parameter and token, from least to most.

    It depends only on the model and the kind of its device, so that the same command asks the same questions.
    """
    budget = share * FLOPS * (1 if model.embed.weight.device.type == "cpu" else 100)
    each = 2 * tokens * model.config.n_parameters
    return min(max(int(budget / each), least), most)


@contextlib.contextmanager
def progress(model: Llama, tokens: int, title: str):
    """Shows on stderr how many of `tokens` tokens the model has read within this block, from the third second on.

    If stderr is not a terminal, a line is printed every half minute. Hooks on the MLPs count every forward pass of the model.
    """
    terminal = sys.stderr.isatty()
    seconds = 0.2 if terminal else 30
    bar = tqdm(
        total=tokens, desc=title, unit="tok", unit_scale=True, delay=3, mininterval=seconds, maxinterval=max(seconds, 10),
        smoothing=0, leave=not terminal, dynamic_ncols=terminal,
    )  # fmt: skip

    def count(module, args, output):  # (B, T, D)
        bar.update(output.shape[:-1].numel() / len(model.blocks))

    with bar, contextlib.ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.mlp.register_forward_hook(count).remove)
        yield


def batches(model: Llama, *arrays: np.ndarray) -> Iterator[list[torch.Tensor]]:
    """Yields the rows of arrays (B, ...) as tensors on the model's device, some at a time: TOKENS ids of the first, (B, T)."""
    device = model.embed.weight.device
    step = max(1, TOKENS * (1 if device.type == "cpu" else 4) // arrays[0].shape[1])
    for i in range(0, len(arrays[0]), step):
        yield [torch.from_numpy(array[i : i + step]).to(device) for array in arrays]


@torch.no_grad()
def logits_at(model: Llama, tokens: np.ndarray, targets: np.ndarray, asked=slice(None)) -> Iterator[tuple]:
    """Yields logits (n, V) and their target ids (n,) for the positions `asked` of token ids (B, T), sample by sample.

    targets (B, number of positions asked): the token that should come after each of these positions.
    """
    model.eval()
    for some, right in batches(model, tokens, targets):
        hidden = model.hidden(some)[:, asked].flatten(0, 1)  # (n, D)
        for x, y in zip(hidden.split(ROWS), right.flatten().split(ROWS), strict=True):
            yield wide(model.lm_head(x)), y
