"""The Llama forward pass a second time, written from the papers: the oracle of model.py.

Nothing is shared with model.py but the names of the weights, and every step is done in another way: one head and one
query at a time, rotary as a complex product with angles in float64, the norm by a vector norm, silu as a quotient.
"""

import math

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
    projected = x @ layer["attention.wqkv.weight"].T + layer.get("attention.wqkv.bias", 0)
    all_q, all_k, all_v = projected.split([config.n_heads * Dh, Hkv * Dh, Hkv * Dh], dim=1)
    outputs = []
    for h in range(config.n_heads):
        mine = slice(h * Dh, (h + 1) * Dh)
        shared = slice(h // group * Dh, (h // group + 1) * Dh)
        q, k, v = rotate(all_q[:, mine], config), rotate(all_k[:, shared], config), all_v[:, shared]  # (T, Dh)
        out = []
        for t in range(len(x)):
            weights = torch.exp(k[: t + 1] @ q[t] / Dh**0.5)
            out.append(weights @ v[: t + 1] / weights.sum())
        outputs.append(torch.stack(out))
    return torch.cat(outputs, dim=1) @ layer["attention.wo.weight"].T + layer.get("attention.wo.bias", 0)


def rotate(x, config):
    """x (T, Dh): channels i and i + Dh/2 are one complex number, turned by position * speed i."""
    half = x.shape[1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(speeds(config), dtype=torch.float64)
    z = torch.complex(x[:, :half], x[:, half:])
    z = z * torch.polar(torch.ones_like(angle), angle).to(z.dtype)
    return torch.cat((z.real, z.imag), dim=1)


def speeds(config):
    """The Dh/2 angles per position, theta^(-2i / Dh), scaled by wavelength as in Meta's `apply_scaling` of llama-models."""
    found = []
    for i in range(config.head_dim // 2):
        speed = config.rope_theta ** (-2 * i / config.head_dim)
        wavelength, length = 2 * math.pi / speed, config.rope_original_seq_len
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        if length == 0 or wavelength > length / low:
            speed /= config.rope_factor
        elif wavelength >= length / high:
            smooth = (length / wavelength - low) / (high - low)
            speed = (1 - smooth) * speed / config.rope_factor + smooth * speed
        found.append(speed)
    return found


def feed_forward(x, layer):
    gate, up = (x @ layer["mlp.gate_up.weight"].T + layer.get("mlp.gate_up.bias", 0)).tensor_split(2, dim=1)
    return (gate / (1 + torch.exp(-gate)) * up) @ layer["mlp.down.weight"].T + layer.get("mlp.down.bias", 0)
