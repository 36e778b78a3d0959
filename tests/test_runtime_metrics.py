import json
import types

import pytest
import torch

from config import Config, ModelConfig
from errors import UserError
from runtime import metrics
from runtime.distributed import World


def test_flops_per_token_of_llama162m():
    """6 x the 137.8 M parameters in matrix products, and 6 x 12 layers x 1,024 x 768 for causal attention: 884 MFLOP."""
    matrices = 12 * (4 * 768**2 + 3 * 768 * 3072) + 32000 * 768
    assert metrics.flops_per_token(ModelConfig()) == 6 * matrices + 6 * 12 * 1024 * 768 == pytest.approx(884e6, rel=1e-3)


def test_a_card_is_known_by_its_whole_name():
    known = {
        "NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA L40S": 362, "NVIDIA L40": 181, "NVIDIA L4": 121,
        "NVIDIA A40": 150, "NVIDIA GeForce RTX 4090": 165,
    }  # fmt: skip
    assert {card: metrics.peak_flops(card) for card in known} == {card: tflops * 1e12 for card, tflops in known.items()}
    for unknown in (
        "Quadro 9", "NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H20-3e", "",
    ):  # fmt: skip
        assert metrics.peak_flops(unknown) is None, unknown


def test_rows_after_the_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = metrics.Metrics(path, 0)
    for step in (10, 20, 30):
        rows.write({"step": step, "tokens": 0, "loss": 1 / step})
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')
    last = metrics.row_of(path, 20)
    assert last == {"step": 20, "tokens": 0, "loss": 0.05} and metrics.row_of(path, 25) == {}
    rows = metrics.Metrics(path, 20)
    rows.write(last | {"val_loss": 1.0})
    rows.write({"step": 30, "tokens": 0, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert metrics.read(path)[-1]["loss"] == 0.5
    metrics.Metrics(path, 0)
    assert metrics.read(path) == []


def test_the_row_of_the_checkpoint_stays_until_it_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = metrics.Metrics(path, 0)
    for step in (0, 10, 20, 30):
        rows.write({"step": step, "tokens": 0, "loss": 1.0})
    resumed = metrics.Metrics(path, 20)
    assert [row["step"] for row in metrics.read(path)] == [0, 10, 20]
    resumed.write({"step": 20, "tokens": 0, "loss": 1.0, "val_loss": 2.0})
    assert [row["step"] for row in metrics.read(path)] == [0, 10, 20] and metrics.read(path)[-1]["val_loss"] == 2.0


def test_the_announcement_counts_milestones_at_once_and_warns_of_a_warm_up_beyond_the_end():
    def lines(**changes):
        config = Config(ckpt_milestones=True, dtype="fp32", kernels="eager", **changes)
        train_bin = types.SimpleNamespace(n_tokens=10, n_windows=10)
        return metrics.announcement(config, World(0, 1, torch.device("cpu")), 8, 8, train_bin).splitlines()

    assert lines(max_steps=10**9)[-1].startswith("milestones: 1,000,010 files")
    assert lines(max_steps=20)[-1] == (
        "warning: warmup_steps=2000 exceeds max_steps=20: the learning rate ends at 1% of its peak"
    )
    for c in (dict(max_steps=2000), dict(max_steps=0)):
        assert not any("warning" in line for line in lines(**c))


def test_the_log_line_leaves_out_what_is_not_known():
    row = {"step": 50, "tokens": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "ms": 3.0, "tokens_per_s": 1e5, "eta_s": 3700}
    line = metrics.log_line(50, 200, row)
    assert line == "step  50/200  25% | loss 2.0000 | lr 1.00e-03 | norm 1.00 | 3.0 ms | 100,000 tok/s | ETA 1h01m"
    assert "MFU 41.0%" in metrics.log_line(50, 200, row | {"mfu": 0.41})


def test_every_line_fits_120_columns():
    row = {
        "loss": 11.2345, "lr": 1e-3, "grad_norm": 123.45, "ms": 12345.6, "tokens_per_s": 1234567.0, "mfu": 0.41, "eta_s": 1e6,
        "val_loss": 10.1234, "val_loss_new": 10.1234, "val_loss_repeated": 10.1234, "val_bpb": 3.1234, "copy_exact_full": 1.0,
        "copy_token_full": 1.0, "copy_exact_hex16": 0.123, "copy_token_hex16": 0.1, "induction_max": 0.987,
    }  # fmt: skip
    line = metrics.log_line(76294, 76294, row)
    assert len(line) <= 120 and "MFU 41.0%" in line and "ETA 277h46m" in line
    line = metrics.evaluation_line(row)
    assert len(line) <= 120 and "val loss 10.1234" in line and "full 1.000, hex16 0.123" in line and "induction 0.987" in line


def test_the_remaining_time_includes_evaluations_and_the_step_time_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    timer = metrics.Timer(Config(batch_size=2, seq_len=5, max_steps=31), World(0, 1, torch.device("cpu")))
    with timer.paused():  # before the first update, as is its compilation: neither counts
        now[0] += 100
    assert timer.lap(1) == {}
    timer.start(1)
    now[0] += 10  # ten steps of a second
    assert timer.lap(11) == {"ms": 1000, "tokens_per_s": 10, "eta_s": 20}
    with timer.paused():
        now[0] += 30
    now[0] += 10
    assert timer.lap(21) == {"ms": 1000, "tokens_per_s": 10, "eta_s": 25}  # 50 s in 20 steps, and 10 to go


@pytest.mark.parametrize("line", ['{"step": 2, "to', "7", "[]", '{"tokens": 3}', '{"step": 2}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "tokens": 1}}\n{line}\n{{"step": 3, "tokens": 3}}\n')
    with pytest.raises(UserError, match=f"{path}:2: "):
        metrics.read(path)
