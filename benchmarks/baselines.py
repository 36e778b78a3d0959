"""The models that a training step is compared with: each a function of the config, of the same shape.

A baseline is a module that maps (x, y), token ids and targets (B, T), to the mean loss; its parameters are fp32. On a GPU it
runs under autocast in bf16, with a residual stream in bf16 as ours has: autocast alone leaves it in fp32, of twice the bytes.
PlainLlama is the straightforward implementation: separate projections and PyTorch's own functions.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import Config
from errors import UserError
from hf import folder as hf_folder
from model import rotary_table


def residual_dtype(c: Config) -> torch.dtype | None:
    return torch.bfloat16 if c.device == "cuda" else None


class PlainBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.eps = c.norm_eps
        self.dropout = c.attn_dropout
        kv_dim = c.n_kv_heads * c.head_dim
        self.q, self.o = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(c.dim, kv_dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(c.dim, c.hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(c.dim)) for _ in range(2))

    def forward(self, x, cos, sin):
        h = F.rms_norm(x, x.shape[-1:], self.norm1.to(x.dtype), self.eps)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, T, Dh)
        how = {"is_causal": True, "dropout_p": self.dropout if self.training else 0.0, "enable_gqa": k.shape[1] != q.shape[1]}
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, **how)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, x.shape[-1:], self.norm2.to(x.dtype), self.eps)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class PlainLlama(nn.Module):
    def __init__(self, c: Config, backend: SDPBackend | None = None):
        super().__init__()
        self.eps = c.norm_eps
        self.backend = backend
        self.residual = residual_dtype(c)
        cos, sin = rotary_table(c, "cpu")
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers))
        self.norm = nn.Parameter(torch.ones(c.dim))
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(self, tokens, targets):
        x = self.embed(tokens).to(self.residual)
        with sdpa_kernel(self.backend) if self.backend else contextlib.nullcontext():
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm.to(x.dtype), self.eps)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


class HuggingFace(nn.Module):
    """LlamaForCausalLM of transformers with SDPA, and with Liger's kernels if asked for. It shifts the targets itself."""

    def __init__(self, c: Config, liger: bool):
        super().__init__()
        try:
            from transformers import LlamaConfig, LlamaForCausalLM

            if liger:
                from liger_kernel.transformers import apply_liger_kernel_to_llama

                apply_liger_kernel_to_llama()
        except ImportError as e:
            raise UserError(f"{e.name} is not installed") from None
        shape = {theirs: getattr(c, ours) for ours, theirs in hf_folder.FIELDS.items()}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        self.model = LlamaForCausalLM(LlamaConfig(**shape, **ids, use_cache=False, attn_implementation="sdpa"))
        residual = residual_dtype(c)
        self.model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.to(residual))

    def forward(self, tokens, targets):
        return self.model(input_ids=tokens, labels=tokens).loss


def nanogpt(path: str):
    """Returns the module model.py of a checkout of nanoGPT. Raises UserError if there is none."""
    file = Path(path, "model.py")
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.GPT and module.GPTConfig
    except Exception as e:  # whatever that file may raise
        raise UserError(
            f"--nanogpt={path}: expected a checkout of nanoGPT, whose model.py defines GPT and GPTConfig ({e})"
        ) from None
    return module


class NanoGPT(nn.Module):
    """nanoGPT's model (a GPT-2: learned positions, LayerNorm, GELU, tied embeddings) of the same shape, compiled as it does."""

    def __init__(self, c: Config, path: str):
        super().__init__()
        theirs = nanogpt(path)
        shape = dict(n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.dim, block_size=c.seq_len, vocab_size=c.vocab_size)
        with contextlib.redirect_stdout(sys.stderr):
            self.model = theirs.GPT(theirs.GPTConfig(**shape, dropout=c.attn_dropout, bias=False))
        self.model.compile()

    def forward(self, tokens, targets):
        return self.model(tokens.contiguous(), targets.contiguous())[1]  # it calls view()

    def optimizer(self, device_type):
        with contextlib.redirect_stdout(sys.stderr):
            return self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type)  # as its train.py does


def compiled(c: Config, backend: SDPBackend | None = None):
    model = PlainLlama(c, backend)
    model.compile(dynamic=False)
    return model


FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
BASELINES = {
    "plain": PlainLlama,
    "compile": compiled,
    "compile flash": lambda c: compiled(c, FLASH),
    "compile cudnn": lambda c: compiled(c, CUDNN),
    "hf": lambda c: HuggingFace(c, liger=False),
    "hf liger": lambda c: HuggingFace(c, liger=True),
}
ON = {"cuda": [name for name in BASELINES if name != "compile"], "cpu": ["plain", "compile", "hf"]}
