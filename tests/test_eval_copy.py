import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm

import eval_copy
import sample
from cli import run_command
from config import ROOT, Config, ModelConfig
from data import bins
from data.tokenizer import Chars, load_tokenizer
from errors import UserError
from kernels import eager
from measures import batching, heads
from measures.batching import affordable
from measures.copying import predict
from model import Llama
from runtime import checkpoint, metrics, plots, validation
from sample import load
from tests.conftest import heed_interrupts, write_dataset
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
    assert "4 random sequences of 12 + 6 tokens" in printed and "20 samples of 4 questions each" in printed
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
    assert rows[0].keys() >= {
        "copy_exact_full",
        "uses_hex16",
        "ceiling_full",
        "score_mended",
        "recall",
        "pairs",
        "previous_max",
    }
    save(tmp_path / "ckpt_6.pt", small_model(tokenizer), tokenizer, 6)
    (tmp_path / "ckpt_best.pt").write_bytes((tmp_path / "ckpt_6.pt").read_bytes())  # a name that has no step
    capsys.readouterr()
    assert eval_copy.main([str(tmp_path), "--over_steps", "--samples=4"]) == 0
    assert capsys.readouterr().out.startswith("step 6: ") and metrics.read(tmp_path / "measures.jsonl")[:3] == rows
    before = (tmp_path / "measures.jsonl").read_bytes()
    assert eval_copy.main([str(tmp_path), "--over_steps", "--samples=4"]) == 0
    assert "has all 4 checkpoints" in capsys.readouterr().out
    save(tmp_path / "ckpt_8.pt", small_model(tokenizer), tokenizer, 8)
    for other in ("--samples=5", "--context=60", "--alphabet=hex16"):  # the last asks fewer questions, not others
        status = run_command(eval_copy.main, [str(tmp_path), "--over_steps", "--samples=4", other])
        refused = "has scores on other questions" in capsys.readouterr().err
        assert (status, refused) == ((0, False) if other == "--alphabet=hex16" else (2, True))
        assert ((tmp_path / "measures.jsonl").read_bytes() == before) == refused


def test_held_out_text_of_another_tokenizer_is_refused(tmp_path):
    data = write_dataset(tmp_path / "set", rows=400, length=97)
    tokenizer = Chars(load_tokenizer(data).size + 3)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    with pytest.raises(UserError, match="its tokenizer is not the model's"):
        eval_copy.main([str(tmp_path / "ckpt.pt"), "--samples=4", f"--data={data}"])
    short = write_dataset(tmp_path / "short", rows=8, length=80)
    with pytest.raises(UserError, match="80 tokens are fewer than a window of .*; pass --context=79 or less"):
        eval_copy.main([str(tmp_path / "ckpt.pt"), "--samples=4", f"--data={short}"])


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
    assert found["icl_50_500"] is None and "not available: needs a context of at least 500" in capsys.readouterr().out


def test_without_its_induction_head_the_hand_built_model_neither_copies_nor_predicts_repeated_tokens(tmp_path, capsys):
    data = write_dataset(tmp_path / "set", rows=400, length=257)
    tokenizer = load_tokenizer(data)
    model, _, _ = induction_model(tokenizer.size, 256, tokenizer.bos)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    argv = [str(tmp_path), "--samples=4", "--ablate=zero", f"--data={data}", "--json", str(tmp_path / "x.json")]
    assert eval_copy.main(argv) == 0
    found = json.loads((tmp_path / "x.json").read_text())[0]["ablation"]
    whole, without = found["top"][:2]
    assert whole["exact"] > 0.5 and without["exact"] == 0
    val = bins.Bin(data / "val.bin", 256, tokenizer.size)
    windows = val.windows(bins.order(0, 0, val.n_windows)[:64])
    again = validation.repeated(windows)
    losses = -model(torch.from_numpy(windows[:, :-1])).log_softmax(-1)
    losses = losses.gather(-1, torch.from_numpy(windows[:, 1:, None]).long())[..., 0].detach().numpy()
    assert whole["loss_repeated"] == pytest.approx(losses[again].mean(), rel=1e-4)
    assert whole["loss_new"] == pytest.approx(losses[~again].mean(), rel=1e-4)
    assert without["loss_repeated"] > whole["loss_repeated"] + 1
    assert "Without the k heads" in capsys.readouterr().out


def test_the_prompt_is_continued(tmp_path):
    tokenizer = Chars(64)
    model, _, _ = induction_model(tokenizer.size, 256, tokenizer.bos)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    text = "the quick brown fox jumps. the qui"
    command = [sys.executable, "eval_copy.py", str(tmp_path / "ckpt.pt"), "--prompt", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(text + "ck brown fox jumps. the quick brown fox jumps.")


def test_training_the_command_and_the_curves_over_steps_have_the_same_scores(tmp_path):
    """One function computes them, at two levels of detail."""
    tokenizer = Chars(20)
    model = small_model(tokenizer)
    save(tmp_path / "ckpt_3.pt", model, tokenizer)
    save(tmp_path / "ckpt.pt", model, tokenizer)
    logged = eval_copy.training_row(model, tokenizer, eval_copy.make_tests(tokenizer, 96, samples=5))
    assert model.training and set(logged) == {
        "copy_exact_full", "copy_token_full", "copy_exact_hex16", "copy_token_hex16", "induction_max", "previous_max"
    }  # fmt: skip
    assert eval_copy.main([str(tmp_path), "--over_steps", "--samples=5"]) == 0
    (over_steps,) = metrics.read(tmp_path / "measures.jsonl")
    result = eval_copy.evaluate(tmp_path, eval_copy.parse([str(tmp_path), "--samples=5"]))
    for name in ("full", "hex16"):
        assert logged[f"copy_token_{name}"] == over_steps[f"copy_token_{name}"] == result["copy"][name]["token"]
    assert over_steps["induction"] == result["heads"]["induction"]
    assert over_steps["induction_max"] == np.max(result["heads"]["induction"])  # 32 samples; during training 8
    assert logged["induction_max"] == pytest.approx(over_steps["induction_max"], abs=0.05)


def test_a_new_score_of_heads_takes_one_entry(tmp_path, capsys, monkeypatch):
    tokenizer = Chars(20)
    (tmp_path / "run").mkdir()
    for name in ("ckpt", "ckpt_3"):
        save(tmp_path / f"run/{name}.pt", small_model(tokenizer), tokenizer)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "tokens": 0, "val_loss": 3}\n')
    drawn = []
    monkeypatch.setattr(plots, "heat_map", lambda ax, scores, title: drawn.append(title))
    entry = heads.Score("self: attention to itself", lambda p: p.diagonal(0), headline=True)
    monkeypatch.setitem(heads.SCORES, "itself", entry)
    args = ["--samples=2", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "s.json")]
    assert eval_copy.main([str(tmp_path / "run"), *args]) == 0
    assert "self: attention to itself" in capsys.readouterr().out and "self" in drawn
    assert np.shape(json.loads((tmp_path / "s.json").read_text())[0]["heads"]["itself"]) == (2, 4)
    assert eval_copy.main([str(tmp_path / "run"), "--over_steps", "--samples=2"]) == 0
    assert np.shape(metrics.read(tmp_path / "run/measures.jsonl")[0]["itself"]) == (2, 4)
    row = eval_copy.training_row(small_model(tokenizer), tokenizer, eval_copy.make_tests(tokenizer, 96, 2))
    assert 0 < row["itself_max"] <= 1


def test_held_out_text_is_a_default_alphabet_where_it_is_given(tmp_path, capsys):
    data = write_dataset(tmp_path / "set", rows=400, length=97)
    tokenizer = load_tokenizer(data)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    assert eval_copy.main([str(tmp_path), "--samples=4", f"--data={data}", "--json", str(tmp_path / "x.json")]) == 0
    copy = json.loads((tmp_path / "x.json").read_text())[0]["copy"]
    assert list(copy) == ["full", "hex16", "text"] and "are right when the passage is new" in capsys.readouterr().out
    text = np.fromfile(data / "val.bin", "<u2").astype(np.int64)
    whole = " ".join(map(str, text))
    args = eval_copy.parse([str(tmp_path), f"--data={data}"])
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_copy, "predict", lambda model, test: asked.append(test) or predict(model, test))
        eval_copy.evaluate(tmp_path, args)
    assert all(" ".join(map(str, passage)) in whole for sample in asked[2].sequences[:20] for passage in sample)


def test_what_is_known_of_the_training_data_shows(tmp_path, capsys, monkeypatch):
    tokenizer = Chars(300)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    original = sample.tokenizer_from_state

    def counted(state):
        tokenizer = original(state)
        tokenizer.counts = np.append(np.arange(300) ** 2, 10**5) * (np.arange(301) > 40)
        tokenizer.counts[41:44] = 1  # of 9 million
        return tokenizer

    monkeypatch.setattr(sample, "tokenizer_from_state", counted)
    assert eval_copy.main([str(tmp_path), "--samples=100", "--json", str(tmp_path / "x.json")]) == 0
    copy = json.loads((tmp_path / "x.json").read_text())[0]["copy"]
    assert (
        list(copy) == ["full", "hex16", "top128"]
        and copy["full"]["untrained"] == [41, 44]
        and copy["top128"]["untrained"] == [0, 0]
    )
    printed = capsys.readouterr().out
    assert "full: 41 of its ids never occur in the training data, and 3 more are less than 1e-5 of it" in printed
    assert "top128: " not in printed


def test_the_default_number_of_samples_is_what_a_few_minutes_on_two_cores_allow():
    shapes = {
        "SmolLM2-135M": ModelConfig(576, 30, 9, 3, hidden_dim=1536, vocab_size=49152, seq_len=1024, tie_embeddings=True),
        "demo": ModelConfig(64, 2, 2, hidden_dim=128, vocab_size=65, seq_len=128),
    }
    samples = {}
    for name, config in shapes.items():
        model = SimpleNamespace(config=config, embed=SimpleNamespace(weight=torch.zeros(1)))
        samples[name] = eval_copy.copy_samples(model, config.seq_len, eval_copy.parse(["x"]))
        cost = {k: (affordable(model, tokens, most), tokens) for k, (most, tokens) in eval_copy.SAMPLES.items()}
        tokens = sum(n * each for n, each in cost.values()) + 2 * samples[name] * 1080  # two alphabets
        assert 2 * config.n_parameters * tokens < 1.6e13  # three minutes at 90 GFLOP/s
        assert eval_copy.copy_samples(model, config.seq_len, eval_copy.parse(["x", "--samples=3"])) == 3
    assert samples == {"SmolLM2-135M": 17, "demo": 500}


def test_the_progress_bar_ends_near_its_total_and_a_short_evaluation_shows_none(tmp_path, capsys, monkeypatch):
    tokenizer = Chars(300)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    assert eval_copy.main([str(tmp_path), "--samples=5", "--ablate=zero"]) == 0
    first = capsys.readouterr()
    assert first.err == ""
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"delay": 0})
            bars.append(self)

    monkeypatch.setattr(batching, "tqdm", Bar)
    assert eval_copy.main([str(tmp_path), "--samples=5", "--ablate=zero"]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "scores: " in again.err and "ablation: " in again.err
    for bar in bars:  # shorter in places, where bos or the vocabulary makes it so, and prefix matching is left out
        assert bar.n == pytest.approx(bar.total, rel=0.1), bar.desc
    assert len(bars) == 2 and not load(tmp_path)[0].blocks[0].mlp._forward_hooks


def test_an_interrupt_is_one_line_and_status_130(tmp_path):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    command = [sys.executable, "eval_copy.py", *[str(tmp_path)] * 9, "--samples=500"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_interrupts, **pipes)
    assert child.stdout.readline()  # of the first table: eight are to come
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[1] == "interrupted\n" and child.returncode == 130


def test_no_output_replaces_a_file_of_another_kind(tmp_path, capsys, monkeypatch):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.png").write_text("not a picture")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(eval_copy, "evaluate", lambda *_: pytest.fail("evaluated before the outputs were checked"))
    for option in (
        f"--json={tmp_path / 'ckpt.pt'}", f"--json={tmp_path / 'config.json'}", f"--plot={tmp_path / 'notes.png'}",
        f"--plot={tmp_path / 'ckpt.pt'}", f"--json={tmp_path}", f"--json={tmp_path / 'ckpt.pt/x.json'}",
        f"--json={tmp_path / 'no/x.json'}", f"--plot={tmp_path / 'no/x.png'}", "--plot=x.xyz", "--plot=x",
    ):  # fmt: skip
        assert run_command(eval_copy.main, [str(tmp_path), option]) == 2
        error = capsys.readouterr().err
        assert option.split("=")[1] in error and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outputs_of_this_command_are_replaced(tmp_path):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    for name in ("x.png", "x.svg", "x.pdf"):
        outputs = [f"--json={tmp_path / 'x.json'}", f"--plot={tmp_path / name}"]
        for _ in range(2):
            assert eval_copy.main([str(tmp_path), "--samples=1", *outputs]) == 0


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the pipe")
def test_a_closed_pipe_keeps_the_scores(tmp_path):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    path = tmp_path / "x.json"
    evaluate = shlex.join([sys.executable, "eval_copy.py", str(tmp_path), "--samples=1", f"--json={path}"])
    done = subprocess.run(f"({evaluate}; echo status $? >&2) | true", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "status 0" in done.stderr and len(json.loads(path.read_text())) == 1


def test_each_mistake_ends_with_status_2_and_one_line(tmp_path, capsys):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    save(tmp_path / "short.pt", small_model(tokenizer, seq_len=40), tokenizer)
    (tmp_path / "text.pt").write_text("no checkpoint")
    state = checkpoint.load(tmp_path / "ckpt.pt")
    checkpoint.save(tmp_path / "wide.pt", state | {"config": state["config"] | {"dim": 64}})
    checkpoint.save(tmp_path / "strange.pt", state | {"config": state["config"] | {"dims": 64}})
    state["model"]["norm"][0] = float("nan")
    checkpoint.save(tmp_path / "nan.pt", state)
    (tmp_path / "run").mkdir()
    save(tmp_path / "run/ckpt.pt", small_model(tokenizer), tokenizer)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "to\n{"step": 2}\n')
    cases = [
        (["none.pt"], "none.pt: no such file or folder"),
        (["text.pt"], "text.pt: not a checkpoint"),
        (["short.pt"], "a context of 40 tokens is too short"),
        (["wide.pt"], "do not match"),
        (["strange.pt"], "dims: no such setting"),
        (["nan.pt"], "nan.pt: has weights that are not finite"),
        (["ckpt.pt", "--alphabet", "21"], "alphabet=21"),
        (["none", "--over_steps"], "no checkpoints of several steps; train with --ckpt_keep=1000"),
        (["ckpt.pt", "--prompt", "A"], "character 'A'"),
        (["ckpt.pt", "--prompt", "a" * 96], "97 tokens"),
        (["ckpt.pt", "--samples=1", "--json", str(tmp_path / "no/x.json")], "no/x.json"),
        (["ckpt.pt", "--alphabet", "top4"], "alphabet=top4: how often each id occurs in the training data is not known"),
        (["ckpt.pt", "--alphabet", "text"], "pass --data=FOLDER"),
        (["ckpt.pt", "--data=nowhere"], "nowhere/val.bin: no such file; python -m data.prepare --help says how to make it"),
        (["ckpt.pt", "--attention", "a" * 96, str(tmp_path / "x.html")], "prompt of 97 tokens"),
        (["ckpt.pt", "--attention", "a", str(tmp_path / "no/x.html")], "no/x.html: cannot be written"),
        (["ckpt.pt", "--context=97"], "--context=97: this model's context is 96"),
        (["ckpt.pt", "--samples=0"], "--samples=0: expected 1 or more"),
        (["run", "--plot", str(tmp_path / "x.png")], "metrics.jsonl"),
        (["run", "--over_steps", "--data=a"], "--over_steps writes only measures.jsonl; leave out --data"),
        (["run", "--over_steps", "--alphabet", "text"], "--over_steps has no held-out text; leave out --alphabet=text"),
        (["ckpt.pt", "--over_steps"], "--over_steps takes a run directory; pass"),
        (["ckpt.pt", "--prompt=a", "--json=x.json"], "--prompt and --attention measure nothing; leave out --json"),
        (["ckpt.pt", "--attention", "a", "x.html", "--data=a"], "measure nothing; leave out --data"),
        (["run", "nope", "--prompt", "a"], "nope: --prompt and --attention take one model"),
    ]
    for (name, *args), words in cases:
        assert run_command(eval_copy.main, [str(tmp_path / name), *args]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
