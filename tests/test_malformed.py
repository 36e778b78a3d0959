"""Malformed configs, command lines, bins, meta files and checkpoints, from a generator with a fixed seed: each ends with status
2 and one line, and nothing is written over.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import eval_copy
import train
from cli import run_command
from config import ADDED, MAY_CHANGE, Config, ModelConfig, from_dict, load
from runtime import checkpoint, distributed
from tests.faults import fault

JUNK = [None, True, -1, 0, 10**12, 0.5, float("nan"), "", "x", "../x", [], [1], {}, {"a": 1}, b"\xff"]


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    """A finished run, and its settings: what is damaged here is a copy of it."""
    out = tmp_path_factory.mktemp("made") / "run"
    settings = dict(
        data=str(dataset), out_dir=str(out), dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=17, seq_len=63,
        batch_size=4, micro_batch_size=4, max_steps=1, warmup_steps=0, eval_interval=0, copy_eval_interval=0, device="cpu",
        compile="off",
    )  # fmt: skip
    assert train.train(from_dict(settings), distributed.start(from_dict(settings))) == 0
    return settings


def train_status(argv):
    return run_command(lambda argv: train.main(load(argv)), argv)


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def misspelt(rng, name):
    i = rng.randrange(len(name))
    return rng.choice([name[:i] + name[i + 1 :], name[:i] + "q" + name[i:], name + "s", name.upper()])


def wrong_value(rng, name):
    kind = {"int": ["x", "1.5", "", "nan", "1e"], "float": ["x", "nan", "1,5", ""], "bool": ["2", "yes!", ""]}
    own = Config.__dataclass_fields__[name].type
    return rng.choice(kind.get(getattr(own, "__name__", ""), ["nowhere", "?", ""]))


def a_command_line(rng, settings, folder):
    name = rng.choice([n for n in settings if n not in ("data", "out_dir")])
    return train_status, flags(settings) + [
        rng.choice(
            [
                f"--{misspelt(rng, name)}=1",
                f"--{name}={wrong_value(rng, name)}",
                f"--{name}",
                f"-{name[0]}",
                "--dim=15",
                "--n_heads=3",
                "--n_kv_heads=5",
                "--seq_len=0",
                "--vocab_size=70000",
                "--vocab_size=3",
                "--batch_size=0",
                "--learning_rate=-1",
                "--attn_dropout=1",
                "--min_lr=2",
                "--resume=/none.pt",
                "--norm_eps=0",
                "--rope_theta=inf",
                "--data=/none",
                "no_such_config.py",
                "--kernels=fast",
                "--device=tpu",
                "--beta2=1",
            ]
        )
    ]


def a_config_file(rng, settings, folder):
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    name = rng.choice([n for n in settings if n not in ("data", "out_dir")])
    last = rng.choice(
        [
            f"{misspelt(rng, name)} = 1",
            f"{name} = {rng.choice([x for x in JUNK if type(x) not in (int, float, bool)])!r}",
            "dim = (",
            "dim = 1 / 0",
            "import no_such_module",
            "dim = undefined",
            "\0",
            "def f(): pass",
            "raise SystemExit(0)",
            "dim = 2 ** 100000",
        ]
    )
    lines.append(last)  # it wins
    path = folder / "config.py"
    path.write_bytes(rng.choice([rng.randbytes(50), "\n".join(lines).encode(), "\n".join(lines).encode()]))
    return train_status, [str(path)]


def damaged(rng, path):
    data = path.read_bytes()
    i = rng.randrange(len(data))
    path.write_bytes(rng.choice([b"", data[:i], data[:1], rng.randbytes(len(data)), rng.randbytes(7)]))


def a_bin(rng, settings, folder):
    data = Path(shutil.copytree(settings["data"], folder / "set"))
    damaged(rng, data / rng.choice(["train.bin", "val.bin"]))
    if rng.random() < 0.3:  # as nanoGPT's: nothing says how long they should be
        (data / "meta.json").unlink()
        (data / "train.bin").write_bytes(rng.choice([b"", b"\0", rng.randbytes(30), b"\xff\xff" * 400]))
    return train_status, flags(settings | {"data": str(data), "out_dir": str(folder / "run"), "eval_interval": 1})


def mutated(rng, value):
    """The nested value with one entry, anywhere in it, gone or of another kind."""
    value = dict(value) if isinstance(value, dict) else list(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(list(keys))
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
        value[key] = mutated(rng, value[key])
    elif isinstance(value, dict) and rng.random() < 0.4:
        del value[key]
    else:
        value[key] = rng.choice([x for x in JUNK if type(x) is not type(value[key])])
    return value


def a_meta(rng, settings, folder):
    data = Path(shutil.copytree(settings["data"], folder / "set"))
    path, meta = data / "meta.json", json.loads((data / "meta.json").read_text())
    used = {name: meta[name] for name in ("format", "splits", "tokenizer", "vocab_size", "fingerprint")}
    text = json.dumps(meta | {}, indent=1)
    changed = json.dumps(
        {k: v for k, v in meta.items() if k not in used} | mutated(rng, used), default=lambda x: x.decode("latin-1")
    )
    path.write_text(rng.choice([changed, changed, changed, text[: rng.randrange(len(text) - 2)], "[]", "null", "7", "{}"]))
    return train_status, flags(settings | {"data": str(data), "out_dir": str(folder / "run")})


def a_checkpoint(rng, settings, folder):
    out = Path(shutil.copytree(settings["out_dir"], folder / "run"))
    for path in out.glob("ckpt_*"):
        path.unlink()
    state, evaluate = torch.load(out / "ckpt.pt", weights_only=True), rng.random() < 0.5
    state["tokenizer"].pop("counts", None)  # checkpoints without these are read too
    for name in ("overflows", "loss_scale", "kernels"):
        state.pop(name)
    if rng.random() < 0.6:
        shape = {field.name for field in dataclasses.fields(ModelConfig)}
        known = (shape if evaluate else state["config"].keys() - MAY_CHANGE) - ADDED  # older checkpoints lack ADDED, and load
        matters = {k: v for k, v in state["config"].items() if k in known}
        used = state | {"config": matters}
        names = ["optimizer", "data_fingerprint"] if evaluate else ["tokenizer"]
        unread = {name: used.pop(name) for name in ["skipped", *names]}
        changed = unread | mutated(rng, used)
        if isinstance(changed.get("config"), dict):
            changed["config"] = {k: v for k, v in state["config"].items() if k not in matters} | changed["config"]
        torch.save(changed, out / "ckpt.pt")
    else:
        damaged(rng, out / "ckpt.pt")
    if evaluate:
        return lambda argv: run_command(eval_copy.main, argv), [str(out), "--samples=1", "--device=cpu"]
    return train_status, flags(settings | {"out_dir": str(out), "max_steps": 2})


KINDS = {
    "command line": a_command_line, "config file": a_config_file, "bin": a_bin, "meta.json": a_meta, "checkpoint": a_checkpoint
}  # fmt: skip


def contents(folder):
    """Whatever a refused command must leave as it was: not run.pid, which names the last process."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.pid"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_malformed_input_ends_with_status_2_and_one_line(made, tmp_path, capsys, kind, count):
    for case in range(count):
        folder = tmp_path / str(case)
        folder.mkdir()
        entry, argv = KINDS[kind](random.Random(case), made, folder)
        before = contents(folder) | contents(Path(made["out_dir"]))
        with fault(f"malformed {kind}"):
            code = entry(argv)
            out, err = capsys.readouterr()
            assert code == 2, (case, argv, code, out, err)
            assert len(err.strip().splitlines()) == 1, (case, argv, err)
            after = contents(folder) | contents(Path(made["out_dir"]))
            assert all(after[path] == data for path, data in before.items()), (case, argv)


def test_the_inputs_are_valid_before_they_are_damaged(made):
    assert eval_copy.main([made["out_dir"], "--samples=1", "--device=cpu"]) == 0
    assert train_status(flags(made | {"max_steps": 2, "eval_interval": 1})) == 0
    assert checkpoint.load(made["out_dir"])["step"] == 2
