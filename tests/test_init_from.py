"""A run that starts from other weights: what it takes over, and what it refuses."""

import dataclasses
import os
from pathlib import Path

import pytest

import eval_copy
from config import ADDED, ROOT, Config, from_checkpoint, load
from data import bins
from hf import export
from hf import folder as huggingface
from runtime import checkpoint
from runtime.distributed import StopSignal, on_device
from runtime.validation import validate
from tests.test_runtime_distributed import rows
from tests.test_train import WORLD, equal, flags, losses, run, status, weights


@pytest.fixture
def source(settings, tmp_path):
    """The directory of a run with another seed, whose weights are also in ../hf."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: Hugging Face folders need it")
    out = tmp_path / "source"
    run(settings, out_dir=str(out), seed=5, eval_interval=0, ckpt_milestones=True, learning_rate=3e-2, max_steps=8)
    export.export(out, tmp_path / "hf")
    return out


KINDS = {"file": "ckpt.pt", "milestone": "milestone_8.pt", "run": ".", "hugging face": "../hf"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_losses_are_those_of_the_weights_started_from(settings, source, kind, capsys):
    path = source / KINDS[kind]
    started = run(settings, init_from=str(path), max_steps=1)
    assert f"starting from the weights of {path}, step {0 if kind == 'hugging face' else 8} there" in capsys.readouterr().out
    model, tokenizer, _ = eval_copy.load(path, device="cpu")
    train_bin, val_bin = (bins.Bin(Path(settings["data"]) / f"{split}.bin", 31, tokenizer.size) for split in ("train", "val"))
    val = validate(model, val_bin, bins.order(0, 0, val_bin.n_windows)[:16], 8, WORLD, StopSignal(WORLD))
    assert ({"step": 0, "tokens": 0} | val).items() <= started[0].items()
    x, y = on_device(train_bin.windows(bins.window_indices(0, 0, 8, train_bin.n_windows)), WORLD.device)
    assert started[1]["loss"] == model(x, y).item() != run(settings, max_steps=1, resume="none")[1]["loss"]


def test_all_forms_of_the_same_weights_give_the_same_run(settings, source, tmp_path):
    ends = []
    for i, kind in enumerate(KINDS.values()):
        run(settings, init_from=str(source / kind), out_dir=str(tmp_path / f"run{i}"), attn_dropout=0.1)
        ends.append(weights(settings, out_dir=str(tmp_path / f"run{i}")))
    assert all(equal(end, ends[0]) for end in ends[1:])


def test_a_resume_continues_from_its_own_checkpoint_and_equals_an_uninterrupted_run(settings, source, tmp_path, capsys):
    whole = run(settings, init_from=str(source), out_dir=str(tmp_path / "whole"))
    run(settings, init_from=str(source), max_steps=3)
    capsys.readouterr()
    after = run(settings, init_from=str(source))  # the same command
    said = capsys.readouterr().out
    assert f"resuming {settings['out_dir']}/ckpt.pt at step 3" in said and "starting from" not in said
    assert losses(after) == losses(whole) and equal(weights(settings), weights(settings, out_dir=str(tmp_path / "whole")))
    for path in source.iterdir():
        path.unlink()
    run(settings, max_steps=7)  # without it, and with the source gone
    run(settings, max_steps=8, init_from="")


def test_another_source_is_refused_on_resume_and_taken_by_a_new_run(settings, source, tmp_path, capsys):
    run(settings, max_steps=2)
    assert status(flags(settings, init_from=source)) == 2
    said = capsys.readouterr().err
    assert f"init_from={source}: " in said and "has init_from=''" in said and "--resume=none" in said
    assert len(said.splitlines()) == 1
    assert status(flags(settings, init_from=source, resume="none")) == 0
    assert status(flags(settings, init_from=os.path.relpath(source), max_steps=7)) == 0  # another name of the same place
    assert status(flags(settings, init_from=tmp_path / "hf", max_steps=8)) == 2


def test_a_source_may_have_another_context_and_dropout(settings, source):
    assert len(losses(run(settings, init_from=str(source), seq_len=63, attn_dropout=0.5, max_steps=1))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(dim=32), "dim=32, head_dim=16, but init_from={} has 16, 8; pass --dim=16 --head_dim=8"),
        (dict(n_layers=3, n_kv_heads=1), "n_layers=3, n_kv_heads=1, but init_from={} has 2, 2; pass --n_layers=2 "),
        (dict(rope_factor=2.0, mlp_bias=True), "rope_factor=2.0, mlp_bias=True, but init_from={} has 1.0, False; pass "),
        (dict(tie_embeddings=True), "tie_embeddings=True, but init_from={} has False; pass --tie_embeddings=false"),
        (dict(rope_theta=1e6), "rope_theta=1000000.0, but init_from={} has 10000.0; pass --rope_theta=10000.0"),
        (dict(norm_eps=1e-5), "norm_eps=1e-05, but init_from={} has 1e-06; pass --norm_eps=1e-06"),
        (dict(vocab_size=20), "vocab_size=20, but init_from={} has 17; pass --vocab_size=17"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "hugging face"])
def test_a_model_of_another_shape_is_refused_with_what_to_pass(settings, source, kind, changes, said, capsys):
    path = source / KINDS[kind]
    assert status(flags(settings | changes, init_from=path)) == 2
    error = capsys.readouterr().err
    assert said.format(path) in error and len(error.splitlines()) == 1
    assert not Path(settings["out_dir"]).exists()
    remedy = dict(flag.removeprefix("--").split("=") for flag in error.split("pass ")[1].split())
    assert status(flags(settings | changes | remedy, init_from=path, max_steps=1)) == 0


SCALED = dict(head_dim=10, rope_factor=4.0, rope_original_seq_len=20, attention_bias=True, mlp_bias=True, n_kv_heads=1)


def test_scaled_positions_biases_and_a_head_dim_train_on_and_are_written_back(settings, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed: Hugging Face folders need it")
    run(settings | SCALED)  # biases start at 0, and are trained
    export.export(settings["out_dir"], tmp_path / "hf")
    state = checkpoint.load(settings["out_dir"])
    assert all(w.abs().sum() > 0 for name, w in state["model"].items() if name.endswith("bias"))
    again = settings | SCALED | dict(init_from=str(tmp_path / "hf"), out_dir=str(tmp_path / "again"))
    first = run(again, max_steps=1)
    assert first[0]["val_loss"] == run(settings | SCALED)[-1]["val_loss"]
    back = huggingface.read(tmp_path / "hf")
    assert back["config"] == dataclasses.asdict(from_checkpoint(state["config"])) and equal(back["model"], state["model"])


def test_ids_beyond_uint16_are_refused_in_one_line(settings, source, tmp_path, capsys):
    state = checkpoint.load(source)
    state["config"]["vocab_size"] = 128256
    checkpoint.save(tmp_path / "large.pt", state)
    assert status(flags(settings, init_from=tmp_path / "large.pt")) == 2
    error = capsys.readouterr().err
    assert "large.pt: vocab_size=128256: must fit uint16 tokens" in error and len(error.splitlines()) == 1


def test_what_is_no_llama_is_refused_in_one_line(settings, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "x.pt").write_bytes(b"x")
    for path, said in (("hf", "model_type=gpt2"), ("x.pt", "not a checkpoint"), ("nowhere", "no such file or folder")):
        assert status(flags(settings, init_from=tmp_path / path)) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


def test_a_run_warns_of_another_tokenizer_and_not_of_an_unknown_one(settings, source, tmp_path, capsys):
    state = checkpoint.load(source)
    for tokenizer, warned in (
        ({"kind": "chars", "alphabet": 12}, 1),
        ({"kind": "ids", "size": 17}, 0),
        (state["tokenizer"], 0),
    ):
        checkpoint.save(tmp_path / "other.pt", state | {"tokenizer": tokenizer})
        assert status(flags(settings, init_from=tmp_path / "other.pt", max_steps=1, resume="none")) == 0
        assert capsys.readouterr().out.count(f"warning: the tokenizer of {tmp_path / 'other.pt'} is not that of") == warned


def test_two_ranks_start_from_the_same_weights(settings, source, tmp_path):
    same = settings | dict(init_from=str(tmp_path / "hf"), max_steps=2)
    one, two = losses(run(same)), losses(rows(same, ranks=2, out_dir=str(tmp_path / "two")))
    assert len(one) == 2 and one == pytest.approx(two, abs=1e-5)


def test_a_config_file_names_it_from_the_projects_root(tmp_path):
    (tmp_path / "mine.py").write_text('init_from = "runs/tiny"\n')
    assert Path(load([str(tmp_path / "mine.py")]).init_from).resolve() == ROOT / "runs/tiny"
    assert load([]).init_from == "" and Config.__dataclass_fields__["init_from"].default == ""


def test_a_checkpoint_that_lacks_newer_settings_is_resumed(settings):
    run(settings, max_steps=2)
    state = checkpoint.load(settings["out_dir"])
    for name in {"init_from", *ADDED}:
        assert dataclasses.asdict(load(flags(settings)))[name] == state["config"].pop(name)
    checkpoint.save(Path(settings["out_dir"]) / "ckpt.pt", state)
    assert len(losses(run(settings))) == 6
