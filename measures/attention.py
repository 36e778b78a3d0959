"""The attention of single heads, as data for pictures: on random tokens that occur twice, and on a prompt.

`page` fills attention.html, which needs no other file and no network.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch

from errors import UserError
from measures.heads import fitting, repeated
from model import Llama

STRIPE_LENGTH = 25  # tokens that occur twice in the picture: few enough to tell their positions apart
MOST_CELLS = 2**24  # attention probabilities in a page, a byte each


@torch.no_grad()
def stripes(model: Llama, ids, bos: int | None, scores: dict[str, np.ndarray], seed: int = 0) -> dict:
    """Returns the attention of the best induction head, and of the best previous-token head in a layer before it (in any layer
    if that is the first), on s random tokens that occur twice.

    scores: as heads.attention_scores returns them. Returns {"s": s, "lead": 1 if bos is the first token, else 0, "heads":
    {score: (layer, head, value, probabilities (T, T))}}.
    """
    model.eval()
    s = fitting(model, STRIPE_LENGTH, bos)
    layer, head = np.unravel_index(scores["induction"].argmax(), scores["induction"].shape)
    before = scores["previous"][: layer or None]
    best = {"previous": np.unravel_index(before.argmax(), before.shape), "induction": (layer, head)}
    tokens = torch.from_numpy(repeated(ids, s, 1, seed, bos)).to(model.embed.weight.device)
    maps = {i: probs[0] for i, probs in enumerate(model.attention_maps(tokens)) if i in (layer, best["previous"][0])}
    found = {
        name: (int(i), int(j), float(scores[name][i, j]), maps[i][j].float().cpu().numpy()) for name, (i, j) in best.items()
    }
    return {"s": s, "lead": int(bos is not None), "heads": found}


@torch.no_grad()
def page(model: Llama, ids: list[int], words: list[str], scores: dict[str, np.ndarray], title: str) -> str:
    """Returns an HTML page of every head's attention on the token ids (T,), whose texts are `words`.

    scores: as heads.attention_scores returns them. A probability p is stored as the byte round(255 sqrt(p)), within 0.004 of
    it. Raises UserError where the page would grow beyond MOST_CELLS.
    """
    model.eval()
    T, heads = len(ids), model.config.n_layers * model.config.n_heads
    if heads * T * (T + 1) // 2 > MOST_CELLS:
        most = int((2 * MOST_CELLS / heads) ** 0.5)
        raise UserError(f"prompt of {T} tokens: the page of a model with {heads} heads shows {most} tokens at most")
    rows, columns = np.tril_indices(T)
    layers = model.attention_maps(torch.tensor([ids], device=model.embed.weight.device))
    maps = b"".join(
        (probs[0].float().sqrt() * 255).round().byte().cpu().numpy()[:, rows, columns].tobytes() for probs in layers
    )
    data = {"title": title, "words": words, "layers": model.config.n_layers, "heads": model.config.n_heads}
    data |= {name: scores[name].round(3).tolist() for name in ("induction", "previous")}
    data["maps"] = base64.b64encode(maps).decode()
    template = Path(__file__).with_name("attention.html").read_text(encoding="utf-8")
    return template.replace('"DATA"', json.dumps(data).replace("<", "\\u003c"))
