"""Checks that refuse what cannot be trained, before anything is written."""

import os

import torch

from config import Config
from errors import UserError


def check_data(config: Config, train_bin, tokenizer):
    """Raises UserError if the vocabulary or the batch does not suit the data."""
    if tokenizer.size > config.vocab_size:
        needs = tokenizer.size
        raise UserError(f"vocab_size={config.vocab_size}: {train_bin.path.parent} has {needs} ids; pass --vocab_size={needs}")
    if config.batch_size > train_bin.n_windows:
        raise UserError(f"batch_size={config.batch_size}: {train_bin.path} has only {train_bin.n_windows:,} sequences")


def check_memory(config: Config, device: torch.device):
    """Raises UserError if the weights, gradients and moments of a model exceed the device's memory.

    They take 16 bytes per parameter; with Muon, whose matrices have one moment, at least 12.
    """
    size = config.n_parameters * (12 if config.optimizer == "muon" else 16)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # a CPU, or Metal, which shares its memory
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if size > available:
        raise UserError(
            f"dim={config.dim}, n_layers={config.n_layers}: out of memory: {config.n_parameters:,} parameters take "
            f"{size / 1e9:,.0f} GB, and there are {available / 1e9:,.0f} GB; choose a smaller model"
        )
