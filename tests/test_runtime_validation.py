import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from config import from_dict
from data import bins
from kernels import eager
from model import Llama
from runtime import distributed
from runtime.validation import repeated, validate

WORLD = distributed.World(0, 1, torch.device("cpu"))


def test_repeated_marks_the_ends_of_n_grams_seen_before_in_the_window():
    ids = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 9], [5, 5, 5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    targets = [[0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1], [0] * 8]
    assert repeated(ids).astype(int).tolist() == targets
    bigrams = [[0, 0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]
    assert repeated(ids, 2).astype(int).tolist() == bigrams
    large = np.full((1, 5), 65535) - np.array([0, 0, 0, 1, 0])
    assert repeated(large).tolist() == [[False] * 4]


def test_validation_is_the_mean_over_tokens_of_fixed_windows(settings):
    config = from_dict(settings)
    model = Llama(config.model(), eager)
    val = bins.Bin(Path(config.data) / "val.bin", config.seq_len, config.vocab_size)
    windows, stop = np.arange(val.n_windows), distributed.StopSignal(WORLD)
    got = validate(model, val, windows, 3, WORLD, stop)
    assert got == validate(model, val, windows, 3, WORLD, stop)
    ids = torch.from_numpy(val.windows(windows))
    each = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    again = torch.from_numpy(repeated(ids.numpy())).flatten()
    assert got["val_loss"] == pytest.approx(each.mean().item(), abs=1e-6)
    assert got["val_loss_repeated"] == pytest.approx(each[again].mean().item(), abs=1e-6)
    assert got["val_loss_new"] == pytest.approx(each[~again].mean().item(), abs=1e-6)


def test_a_signal_leaves_validation_where_it_is(settings):
    config = from_dict(settings)
    val = bins.Bin(Path(config.data) / "val.bin", config.seq_len, config.vocab_size)
    stop, seen = distributed.StopSignal(WORLD), []

    class Interrupted(bins.Bin):
        def windows(self, indices):
            seen.append(len(indices))
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return val.windows(indices)

    interrupted = Interrupted(val.path, config.seq_len, config.vocab_size)
    with pytest.raises(distributed.Stopped):
        validate(Llama(config.model(), eager), interrupted, np.arange(val.n_windows), 3, WORLD, stop)
    assert seen == [3, 3] and stop.stop_requested  # of 17 calls
    with pytest.raises(distributed.Stopped):  # the request stays
        validate(Llama(config.model(), eager), interrupted, np.arange(val.n_windows), 3, WORLD, stop)
    assert seen == [3, 3]
