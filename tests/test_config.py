import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import ADDED, ROOT, Config, ModelConfig, changed, command_line, from_checkpoint, from_dict, load, parse
from errors import UserError


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_defaults_are_llama162m():
    c = load([])
    assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, c.vocab_size, c.seq_len) == (
        768, 12, 12, 12, 3072, 32000, 1024
    )  # fmt: skip
    assert c.model() == Config().model()


def test_every_shipped_config_loads_and_names_its_run_directory():
    for path in (ROOT / "configs").glob("*.py"):
        assert Path(load([str(path)]).out_dir).resolve() == ROOT / "runs" / path.stem


def test_command_line_wins_over_file(tmp_path):
    path = write(tmp_path, "dim = 64\nn_heads = 2\nseed = 3\n")
    assert (load([path, "--seed=4"]).seed, load([path]).seed, load([path]).dim) == (4, 3, 64)


def test_a_value_may_follow_its_name_after_a_space_and_the_config_may_stand_anywhere(tmp_path):
    path = write(tmp_path, "dim = 64\nn_heads = 2\n")
    for argv in (
        [path, "--seed", "4", "--tie_embeddings", "true", "--min_lr=1e-5"],
        ["--seed=4", "--tie_embeddings", "true", path, "--min_lr", "1e-5"],
        ["--tie_embeddings=true", "--seed=4", "--min_lr=1e-5", path],
    ):
        c = load(argv)
        assert (c.dim, c.seed, c.tie_embeddings, c.min_lr) == (64, 4, True, 1e-5)


def test_an_empty_out_dir_is_the_configs_own(tmp_path):
    """As when the shell variable in --out_dir=$OUT is not set."""
    for argv in (["--out_dir="], ["--out_dir", ""]):
        assert load([write(tmp_path, ""), *argv]).out_dir == load([write(tmp_path, "")]).out_dir != ""


@pytest.mark.parametrize("name", ["config.json", "ckpt.pt"])
def test_a_file_that_is_no_config_is_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"dim": 64, "tie_embeddings": false}')
    with pytest.raises(UserError, match=f"{name}: a config is a Python file, such as .*--out_dir"):
        load([str(tmp_path / name)])


def test_the_parameters_counted_are_those_of_the_model():
    from kernels import eager
    from model import Llama

    for argv in (["--n_kv_heads=2"], ["--tie_embeddings=true", "--head_dim=6"], ["--attention_bias=true", "--mlp_bias=true"]):
        c = load([*argv, "--dim=32", "--n_heads=4", "--n_layers=3", "--hidden_dim=40", "--vocab_size=50"])
        assert c.n_parameters == sum(p.numel() for p in Llama(c.model(), eager).parameters())
    assert Config().n_parameters == 162_417_408


def test_file_paths_are_the_projects_and_command_line_paths_the_current_folders(tmp_path):
    c = load([write(tmp_path, 'data = "data/x"'), "--out_dir=here"])
    assert Path(c.data).resolve() == ROOT / "data/x" and c.out_dir == "here"


def test_other_data_than_the_files_is_not_prepared_as_the_files(tmp_path):
    path = write(tmp_path, 'data = "data/x"\nprepare = "repeats"')
    assert load([path]).prepare == "repeats" and load([path, "--data=mine"]).prepare == ""
    assert load([path, "--data=mine", "--prepare=files texts"]).prepare == "files texts"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learing_rate=1e-3"], ["learing_rate", "did you mean --learning_rate"]),
        (["--zzz=1"], ["zzz", "--help"]),
        (["--max_steps=many"], ["max_steps=many", "int"]),
        (["--max_steps=1.5"], ["max_steps=1.5", "int"]),
        (["--max_steps"], ["--max_steps", "expected one argument", "--help"]),
        (["--tie_embeddings=yes"], ["tie_embeddings=yes", "true, false"]),
        (["--schedule=linear"], ["schedule=linear", "cosine"]),
        (["--learning_rate=nan"], ["learning_rate=nan"]),
        (["--dim=100"], ["dim=100", "n_heads=12"]),
        (["--n_kv_heads=5"], ["n_heads=12", "n_kv_heads=5"]),
        (["--dim=36", "--n_heads=12"], ["dim=36", "even"]),
        (["--vocab_size=70000"], ["vocab_size=70000", "65536"]),
        (["--rope_factor=0"], ["rope_factor=0.0", "above 0"]),
        (["--rope_low_freq_factor=4"], ["rope_low_freq_factor=4.0", "below rope_high_freq_factor=4.0"]),
        (["--dtype=fp8"], ["dtype=fp8", "fp32, bf16, fp16"]),
        (["--max_steps=99999999999"], ["max_steps", "2^31"]),
        (["--batch_size=0"], ["batch_size=0", "at least 1"]),
        (["--attn_dropout=1"], ["attn_dropout=1.0", "255/256"]),
        (["nowhere.py"], ["nowhere.py", "configs/tiny.py"]),
        (["a.py", "b.py"], ["one config file"]),
    ],
)
def test_each_mistake_is_one_line_that_names_the_setting_and_the_remedy(argv, words):
    with pytest.raises(UserError) as e:
        load(argv)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learing_rate = 1e-2", ["learing_rate", "learning_rate"]),
        ("dim = '64'", ["dim='64'", "int"]),
        ("max_steps = 1e3", ["max_steps=1000.0", "int"]),
        ("tie_embeddings = 1", ["tie_embeddings=1", "bool"]),
        ("data = 3", ["data=3", "str"]),
        ("dim = = 3", ["mine.py:1", "SyntaxError"]),
        ("dim = 8\nx = 1 / 0", ["mine.py:2", "ZeroDivisionError"]),
    ],
)
def test_each_mistake_in_a_file_is_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as e:
        load([write(tmp_path, text)])
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_whole_numbers_may_be_written_as_floats_and_names_of_the_file_begin_with_an_underscore(tmp_path):
    assert parse("max_steps", "2e3") == 2000 and parse("max_steps", str(2**60 + 1)) == 2**60 + 1
    assert load([write(tmp_path, "import math\n_k = 8\ndim = _k * 12\nnorm_eps = 1")]).norm_eps == 1.0


def test_a_config_survives_json(tmp_path):
    import json

    c = load(["--n_kv_heads=4", "--tie_embeddings=true"])
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(c)))) == c


def test_a_setting_that_older_checkpoints_lack_has_not_changed_where_it_has_its_default():
    older = {name: value for name, value in dataclasses.asdict(Config()).items() if name not in ADDED}
    assert changed(older, Config()) == {}
    assert changed(older, Config(repeated_weight=2.0, mlp_bias=True)).keys() == {"repeated_weight", "mlp_bias"}


def test_an_older_name_of_a_setting_is_read_from_checkpoints():
    older = dataclasses.asdict(Config())
    del older["repeated_weight"]
    assert changed(older | {"mask_repeated": False}, Config()) == {}
    assert changed(older | {"mask_repeated": True}, Config(repeated_weight=0.0)) == {}
    assert changed(older | {"mask_repeated": True}, Config()) == {"repeated_weight": (0.0, 1.0)}
    assert from_checkpoint(older | {"mask_repeated": False}) == ModelConfig()


def test_help_names_every_field_in_under_a_second_and_without_torch():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    # An import of torch alone takes several seconds, so twice the promise still tells, on a machine busy with tests.
    assert time.perf_counter() - started < 2
    assert done.stdout == command_line().format_help()
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in done.stdout
    code = "import sys, config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
