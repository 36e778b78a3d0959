"""The Llama in one file: RMSNorm before each half of a block, rotary positions, grouped-query attention, SwiGLU.

The ops (kernels.eager or another op set) are passed to the model, so nothing here depends on a device. Parameters are fp32, or
have the dtype of the file that they come from; activations have the given dtype, and each weight is cast where it is used.
B, T, H, Dh, D, F, V: batch, time, heads, head dim, model dim, feed-forward dim, vocabulary.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from config import ModelConfig


class Linear(nn.Linear):
    """A projection whose weight, and bias if it has one, are cast to the dtype of the activations."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops):
        super().__init__()
        self.ops = ops
        self.dropout = config.attn_dropout
        self.head_dim = config.head_dim
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]  # of q, k and v
        self.wqkv = Linear(config.dim, sum(self.heads) * config.head_dim, config.attention_bias)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim, config.attention_bias)

    def project(self, x):
        """x (B, T, D) -> the heads of q, k and v, one after the other, (B, T, H + 2 Hkv, Dh)."""
        return self.wqkv(x).unflatten(-1, (-1, self.head_dim))

    def qkv(self, x, rope):
        """x (B, T, D) -> q (B, T, H, Dh), k and v (B, T, Hkv, Dh), with q and k rotated to their positions."""
        q, k, v = self.project(x).split(self.heads, dim=2)
        q, k = self.ops.rotary(q, k, *rope)
        return q, k, v

    def forward(self, x, rope, seed=None, extend=None):
        dropout = self.dropout if self.training else 0.0
        if extend is None:
            y = self.ops.rotary_attention(self.project(x), *rope, self.heads[1], dropout, seed)  # (B, T, H, Dh)
        else:
            q, k, v = self.qkv(x, rope)
            k, v = extend(k, v)  # (B, start + T, Hkv, Dh)
            y = self.ops.causal_attention(q, k, v, dropout, seed)  # (B, T, H, Dh)
        return self.wo(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops):
        super().__init__()
        self.ops = ops
        self.gate_up = Linear(config.dim, 2 * config.hidden_dim, config.mlp_bias)
        self.down = Linear(config.hidden_dim, config.dim, config.mlp_bias)

    def forward(self, x):
        return self.down(self.ops.swiglu(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ops):
        super().__init__()
        self.ops = ops
        self.eps = config.norm_eps
        self.attention_norm = nn.Parameter(torch.empty(config.dim))
        self.attention = Attention(config, ops)
        self.mlp_norm = nn.Parameter(torch.empty(config.dim))
        self.mlp = MLP(config, ops)

    def forward(self, x, residual, next_norm, rope, seed=None, extend=None):
        """residual (B, T, D) is the residual stream, and x its norm by attention_norm, computed before the block.

        Returns the new stream's norm by next_norm (D,), the next block's x, and the new stream: an addition and the norm that
        follows it are one op. seed (B,) keys attention dropout; extend(k, v) is KVCache.extend of this layer.
        """
        x = self.attention(x, rope, seed, extend)
        x, residual = self.ops.add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.ops.add_rms_norm(self.mlp(x), residual, next_norm, self.eps)


class Llama(nn.Module):
    def __init__(self, config: ModelConfig, ops, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.ops = ops
        self.dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.dim))
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("cos", None, persistent=False)  # (T, Dh/2)
        self.register_buffer("sin", None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embed, wqkv, gate_up, lm_head   normal, std 0.02
        wo, down                        normal, std 0.02 / sqrt(2 n_layers): the 2 n_layers matrices that write to the residual
        norm weights                    1
        biases                          0
        cos, sin                        the rotary table, fp32 whatever the dtype
        """
        for name, p in self.named_parameters():
            residual = name.endswith(("wo.weight", "down.weight"))
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                p.normal_(0.0, 0.02 * ((2 * self.config.n_layers) ** -0.5 if residual else 1.0))
        self.cos, self.sin = rotary_table(self.config, self.embed.weight.device)

    def _apply(self, fn, recurse=True):
        """Moves or casts the model, but keeps the rotary table in fp32 (in bf16, positions beyond 256 collide) and lm_head
        tied.
        """
        self.cos = self.sin = None
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.cos, self.sin = rotary_table(self.config, self.embed.weight.device)
        return self

    def rope(self, start, T):
        return self.cos[start : start + T], self.sin[start : start + T]

    def hidden(self, tokens, seed=None, cache=None):
        """Token ids (B, T) -> the normed residual stream (B, T, D), which lm_head reads."""
        start = cache.length if cache else 0
        rope = self.rope(start, tokens.shape[1])
        x, residual, norms = self.embedded(tokens)
        for i, (block, norm) in enumerate(zip(self.blocks, norms, strict=True)):
            run = block if self.training else block.forward  # a block is compiled for the one shape of training
            extend = cache and functools.partial(cache.extend, i)
            x, residual = run(x, residual, norm, rope, None if seed is None else seed + i, extend)
        if cache:
            cache.length += tokens.shape[1]
        return x

    def embedded(self, tokens):
        """Token ids (B, T) -> what the first block reads, (B, T, D) twice, and the norm weight that each block ends with."""
        first, *norms = *(block.attention_norm for block in self.blocks), self.norm
        residual = self.embed(tokens).to(self.dtype)
        return self.ops.rms_norm(residual, first, self.config.norm_eps), residual, norms

    def forward(self, tokens, targets=None, seed=None, cache=None):
        """Token ids (B, T) -> the mean loss over the targets (B, T) that are not -100, in nats; or logits (B, T, V).

        seed (B,) int64 keys attention dropout, one per sequence. With a cache, the tokens continue what it holds.
        """
        x = self.hidden(tokens, seed, cache)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """The mean loss over the targets (B, T) that are not -100, given x (B, T, D) as `hidden` returns it."""
        return self.ops.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight.to(x.dtype), targets.flatten())

    @torch.no_grad()
    def attention_maps(self, tokens):
        """Yields the attention probabilities (B, H, T, T) of each layer in turn, without storing them."""
        rope = self.rope(0, tokens.shape[1])
        x, residual, norms = self.embedded(tokens)
        for block, norm in zip(self.blocks, norms, strict=True):
            q, k, _ = block.attention.qkv(x, rope)
            yield self.ops.attention_probs(q, k)
            x, residual = block.forward(x, residual, norm, rope)

    @torch.no_grad()
    def generate(self, tokens, n, temperature=0.0, top_k=0):
        """Yields the next token of each sequence, (B,), n times or until the context (seq_len) is full, after prompts (B, T).

        Greedy below a temperature of 1e-6; otherwise sampled, from the top_k most likely tokens if top_k is not 0.
        """
        n = min(n, self.config.seq_len - tokens.shape[1])
        cache = KVCache(self, len(tokens), tokens.shape[1] + n)
        for _ in range(n):
            logits = self(tokens, cache=cache)[:, -1].float()  # (B, V)
            if temperature >= 1e-6:  # logits divided by much less overflow
                if top_k:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                    logits = logits.masked_fill(logits < least, -float("inf"))
                tokens = torch.multinomial((logits / temperature).softmax(-1), 1)  # (B, 1)
            else:
                tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
            yield tokens[:, 0]


class KVCache:
    """Keys and values of the positions seen so far, at most `max_len`. Setting `length` back rewinds it."""

    def __init__(self, model: Llama, batch: int, max_len: int | None = None):
        c = model.config
        shape = (c.n_layers, 2, batch, max_len or c.seq_len, c.n_kv_heads, c.head_dim)
        self.kv = torch.empty(shape, dtype=model.dtype, device=model.embed.weight.device)
        self.length = 0

    def extend(self, layer, k, v):
        """Writes k, v (B, T, Hkv, Dh) of a layer from `length` on; returns its keys and values: (B, length + T, Hkv, Dh)."""
        end = self.length + k.shape[1]
        keys, values = self.kv[layer]  # (B, max_len, Hkv, Dh) each
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


def rotary_table(config: ModelConfig, device):
    """cos and sin (T, Dh/2) of position * theta^(-2i/Dh) / rope_factor, fp32. Su et al. 2021.

    Llama 3.1's scaling divides frequencies of up to `low` turns in the original context, keeps those of `high` or more, and
    interpolates in between.
    """
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    positions = torch.arange(config.seq_len, device=device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (i / config.head_dim)  # operation by operation as transformers rounds them
    kept = 0.0
    if config.rope_original_seq_len:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_seq_len / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    frequencies = (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    angles = torch.outer(positions, frequencies)  # (T, Dh/2)
    return angles.cos(), angles.sin()
