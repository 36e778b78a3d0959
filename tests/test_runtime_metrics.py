import json

import pytest

from config import ModelConfig
from runtime import metrics


def test_flops_per_token_of_llama162m():
    """6 x the 137.8 M parameters in matrix products, and 6 x 12 layers x 1,024 x 768 for causal attention: 884 MFLOP."""
    matrices = 12 * (4 * 768**2 + 3 * 768 * 3072) + 32000 * 768
    assert metrics.flops_per_token(ModelConfig()) == 6 * matrices + 6 * 12 * 1024 * 768 == pytest.approx(884e6, rel=1e-3)


def test_an_unknown_card_has_no_peak_and_a_longer_name_wins():
    assert metrics.peak_flops("NVIDIA H200") == 989e12
    assert metrics.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert metrics.peak_flops("NVIDIA L40S") == 362e12
    assert metrics.peak_flops("Quadro 9") is None


def test_rows_after_the_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = metrics.Metrics(path, 0)
    for step in (10, 20, 30):
        rows.write({"step": step, "loss": 1 / step})
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')
    rows = metrics.Metrics(path, 20)
    assert rows.last == {"step": 20, "loss": 0.05}
    rows.write(rows.last | {"val_loss": 1.0})
    rows.write({"step": 30, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert metrics.read(path)[-1]["loss"] == 0.5
    metrics.Metrics(path, 0)
    assert metrics.read(path) == []


def test_the_log_line_leaves_out_what_is_not_known():
    row = {"step": 50, "tokens": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "ms": 3.0, "tokens_per_s": 1e5, "eta_s": 3700}
    line = metrics.log_line(50, 200, row)
    assert line == "step  50/200  25% | loss 2.0000 | lr 1.00e-03 | norm 1.00 | 3.0 ms | 100,000 tok/s | ETA 1h01m"
    assert "MFU 41.0%" in metrics.log_line(50, 200, row | {"mfu": 0.41})
