"""One thread per process: faster and steadier for models this small, and two test processes fit two cores."""

import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tests.triton_interpreter  # noqa: F401  before anything imports Triton

# isort: split
import numpy as np
import pytest
import torch

from data.tokenizer import Chars, tokenizer_to_meta, train_bpe
from data.writer import Writer
from tests.faults import TALLY

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_terminal_summary(terminalreporter):
    if TALLY:
        terminalreporter.section("faults")
        for kind, (tried, survived) in TALLY.items():
            terminalreporter.line(f"{kind:<40}{tried:>6} tried {survived:>6} survived {tried - survived:>4} lost")


def write_dataset(folder, rows=400, length=32, alphabet=16, seed=0):
    """A prepared folder of rows that each hold one random segment twice, bos before each: windows of `length`."""
    tokenizer = Chars(alphabet)
    rng = np.random.default_rng(seed)
    with Writer(folder, tokenizer.size) as writer:
        for i in range(rows):
            segment = rng.integers(alphabet, size=length // 2)
            row = np.concatenate(([tokenizer.bos], segment, segment))[:length]
            writer.add("val" if i % 8 == 0 else "train", row, n_bytes=length - 1)
        entries, files = tokenizer_to_meta(tokenizer)
        writer.commit(entries | {"source": {"arguments": {}}}, files)
    return folder


def heed_interrupts():
    """For a child process: a shell starts its background jobs with SIGINT ignored, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started, on Linux."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """A run in this process takes SIGINT and SIGTERM over; the test session wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def corpus():
    rng = random.Random(0)
    tokenizer = [("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))) for _ in range(200)]
    return ["\n".join("    " * rng.randint(0, 3) + " ".join(rng.choices(tokenizer, k=8)) for _ in range(40)) for _ in range(20)]


@pytest.fixture(scope="session")
def bpe(corpus):
    return train_bpe(corpus, 500)


@pytest.fixture
def settings(dataset, tmp_path):
    """Settings of a run of a second or two."""
    return dict(
        data=str(dataset), out_dir=str(tmp_path / "run"), dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=17,
        seq_len=31, batch_size=8, micro_batch_size=8, max_steps=6, learning_rate=1e-2, warmup_steps=2, eval_interval=3,
        eval_batches=2, copy_eval_interval=0, log_interval=1, ckpt_interval=3, device="cpu", compile="off",
    )  # fmt: skip
