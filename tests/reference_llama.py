"""The Llama forward pass a second time, written from the papers: the oracle of model.py.

Nothing is shared with model.py but the names of the weights, and every step is done in another way: one head and one
query at a time, rotary as a complex product with angles in float64, the norm by a vector norm, silu as a quotient.
"""

import torch


def reference_logits(state_dict, config, tokens, dtype=torch.float64):
    """Logits (B, T, V) of token ids (B, T), for the state_dict of a model.Llama and its config."""
    w = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    rows = []
    for sequence in tokens:
        x = torch.stack([w["embed.weight"][t] for t in sequence.tolist()])  # (T, D)
        for i in range(config.n_layers):
            layer = {n.removeprefix(f"blocks.{i}."): v for n, v in w.items() if n.startswith(f"blocks.{i}.")}
            x = x + attention(norm(x, layer["attention_norm"], config), layer, config)
            x = x + feed_forward(norm(x, layer["mlp_norm"], config), layer)
        rows.append(norm(x, w["norm"], config) @ w["lm_head.weight"].T)
    return torch.stack(rows)


def norm(x, gain, config):
    mean_square = torch.linalg.vector_norm(x, dim=1, keepdim=True) ** 2 / config.dim
    return gain * x / (mean_square + config.norm_eps) ** 0.5


def attention(x, layer, config):
    Dh, Hkv, group = config.head_dim, config.n_kv_heads, config.n_heads // config.n_kv_heads
    wq, wk, wv = layer["attention.wqkv.weight"].split([config.dim, Hkv * Dh, Hkv * Dh])
    outputs = []
    for h in range(config.n_heads):
        mine = slice(h * Dh, (h + 1) * Dh)
        shared = slice(h // group * Dh, (h // group + 1) * Dh)
        q, k, v = rotate(x @ wq[mine].T, config), rotate(x @ wk[shared].T, config), x @ wv[shared].T  # (T, Dh)
        out = []
        for t in range(len(x)):
            weights = torch.exp(k[: t + 1] @ q[t] / Dh**0.5)
            out.append(weights @ v[: t + 1] / weights.sum())
        outputs.append(torch.stack(out))
    return torch.cat(outputs, dim=1) @ layer["attention.wo.weight"].T


def rotate(x, config):
    """x (T, Dh): channels i and i + Dh/2 are one complex number, turned by position * theta^(-2i / Dh)."""
    half = x.shape[1] // 2
    speed = torch.tensor([config.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * speed
    z = torch.complex(x[:, :half], x[:, half:])
    z = z * torch.polar(torch.ones_like(angle), angle).to(z.dtype)
    return torch.cat((z.real, z.imag), dim=1)


def feed_forward(x, layer):
    w_gate, w_up = layer["mlp.gate_up.weight"].tensor_split(2)
    gate = x @ w_gate.T
    return (gate / (1 + torch.exp(-gate)) * (x @ w_up.T)) @ layer["mlp.down.weight"].T
