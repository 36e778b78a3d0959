import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import eval_copy
from config import ROOT, Config, ModelConfig
from data import bins
from data.tokenizer import Chars, load_tokenizer
from kernels import eager
from model import Llama
from runtime import checkpoint, metrics
from tests.conftest import write_dataset
from tests.handbuilt import induction_model


def small_model(tokenizer, seq_len=96, seed=0):
    torch.manual_seed(seed)
    shape = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=tokenizer.size, seq_len=seq_len)
    model = Llama(shape, eager).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 8 if p.dim() > 1 else 1  # so that its predictions differ from place to place
    return model


def save(path, model, tokenizer, step=3):
    config = Config(**dataclasses.asdict(model.config))
    state = {"model": model.state_dict(), "step": step, "config": dataclasses.asdict(config), "tokenizer": tokenizer.state()}
    checkpoint.save(path, state)


def test_the_command_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    tokenizer = Chars(20)
    out = tmp_path / "a run"  # a path with a space
    out.mkdir()
    save(out / "ckpt.pt", small_model(tokenizer), tokenizer)
    rows = [{"step": s, "tokens": s, "val_loss": 3.0, "val_loss_new": 3.1, "copy_exact_full": 0.1 * s} for s in range(4)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--samples=20", "--json", tmp_path / "s.json", "--plot", tmp_path / "p.png"]
    assert eval_copy.main([str(a) for a in (out, out / "ckpt.pt", *args, "--alphabet", "full", "4")]) == 0
    printed = capsys.readouterr().out
    assert "4 sequences of 12+6 tokens, 4 of them asked, 20 samples: 80 queries" in printed
    scores = json.loads((tmp_path / "s.json").read_text())
    assert len(scores) == 2 and scores[0]["step"] == 3 and set(scores[0]["copy"]) == {"full", "4"}
    assert f"{scores[0]['copy']['4']['token']:.3f}" in printed
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_each_checkpoint_of_a_run_is_measured_once(tmp_path, capsys):
    tokenizer = Chars(20)
    for step, name in ((1, "milestone_1"), (2, "ckpt_2"), (4, "ckpt_4")):
        save(tmp_path / f"{name}.pt", small_model(tokenizer, seed=step), tokenizer, step)
    assert eval_copy.main([str(tmp_path), "--over_steps", "--samples=4"]) == 0
    rows = metrics.read(tmp_path / "measures.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4] and len({row["questions_hex16"] for row in rows}) == 1
    assert rows[0].keys() >= {"copy_exact_full", "uses_hex16", "ceiling_full", "score_mended", "recall", "pairs"}
    save(tmp_path / "ckpt_6.pt", small_model(tokenizer), tokenizer, 6)
    capsys.readouterr()
    assert eval_copy.main([str(tmp_path), "--over_steps", "--samples=4"]) == 0
    assert capsys.readouterr().out.startswith("step 6: ") and metrics.read(tmp_path / "measures.jsonl")[:3] == rows


def test_the_loss_by_position_is_that_of_the_data(tmp_path, capsys):
    data = write_dataset(tmp_path / "set", rows=400, length=97)
    tokenizer = load_tokenizer(data)
    model = small_model(tokenizer)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    assert eval_copy.main([str(tmp_path / "ckpt.pt"), "--samples=4", f"--data={data}", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())[0]["positions"]
    val = bins.Bin(data / "val.bin", 96, tokenizer.size)
    window = torch.from_numpy(val.windows(range(val.n_windows)))
    whole = model(window[:, :-1], window[:, 1:]).item()
    assert val.n_windows <= 64 and len(found["loss"]) == 96 and sum(found["loss"]) / 96 == pytest.approx(whole, rel=1e-5)
    assert found["icl_50_500"] is None and "none: it takes a context of 500" in capsys.readouterr().out


def test_without_its_induction_head_the_hand_built_model_does_not_copy(tmp_path, capsys):
    tokenizer = Chars(64)
    model, _, _ = induction_model(tokenizer.size, 256, tokenizer.bos)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    assert eval_copy.main([str(tmp_path), "--samples=4", "--ablate=zero", "--json", str(tmp_path / "x.json")]) == 0
    ablation = json.loads((tmp_path / "x.json").read_text())[0]["ablation"]
    assert ablation["top"][0] > 0.5 and ablation["top"][1] == 0 and "exact match without k heads" in capsys.readouterr().out


def test_the_prompt_is_gone_on_with(tmp_path):
    tokenizer = Chars(64)
    model, _, _ = induction_model(tokenizer.size, 256, tokenizer.bos)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    text = "the quick brown fox jumps. the qui"
    command = [sys.executable, "eval_copy.py", str(tmp_path / "ckpt.pt"), "--prompt", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(text + "ck brown fox jumps. the quick brown fox jumps.")


def test_each_mistake_ends_with_status_2_and_one_line(tmp_path, capsys):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    save(tmp_path / "short.pt", small_model(tokenizer, seq_len=40), tokenizer)
    (tmp_path / "text.pt").write_text("no checkpoint")
    state = checkpoint.load(tmp_path / "ckpt.pt")
    checkpoint.save(tmp_path / "wide.pt", state | {"config": state["config"] | {"dim": 64}})
    checkpoint.save(tmp_path / "strange.pt", state | {"config": state["config"] | {"dims": 64}})
    cases = [
        (["none.pt"], "none.pt: no such checkpoint"),
        (["text.pt"], "text.pt: not a checkpoint"),
        (["short.pt"], "seq_len=40: too short"),
        (["wide.pt"], "do not fit"),
        (["strange.pt"], "dims: no such setting"),
        (["ckpt.pt", "--alphabet", "21"], "alphabet=21"),
        (["none", "--over_steps"], "no checkpoints of several steps; train with --ckpt_keep=1000"),
        (["ckpt.pt", "--prompt", "A"], "character 'A'"),
        (["ckpt.pt", "--prompt", "a" * 96], "97 tokens"),
        (["ckpt.pt", "--samples=1", "--json", str(tmp_path / "no/x.json")], "no/x.json"),
    ]
    for (name, *args), words in cases:
        assert eval_copy.main([str(tmp_path / name), *args]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
