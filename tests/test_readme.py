"""The README's commands and names are those of the code."""

import dataclasses
import re
import shlex

import pytest

import eval_copy
from config import ROOT, Config, load
from data import prepare

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")]


def commands(start):
    return [shlex.split(c.removeprefix(start)) for c in COMMANDS if c.startswith(start)]


@pytest.mark.parametrize("argv", commands("python train.py "), ids=" ".join)
def test_each_train_command_loads(argv):
    if argv != ["--help"]:
        load([str(ROOT / a) if a.endswith(".py") else a for a in argv])


def test_the_torchrun_command_loads():
    assert commands("torchrun --nproc_per_node=8 train.py") == [[]] and load([])


@pytest.mark.parametrize("argv", commands("python -m data.prepare "), ids=" ".join)
def test_each_prepare_command_parses(argv):
    assert prepare.parse(argv)[0]["source"] in (*prepare.SOURCES, "from-bin")


@pytest.mark.parametrize("argv", commands("python eval_copy.py "), ids=" ".join)
def test_each_evaluation_command_parses(argv):
    assert eval_copy.parse(argv).paths


def test_make_targets_exist():
    made = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert made == {"demo", "test"} <= targets


def test_each_setting_is_in_the_table_and_nothing_else_is():
    table = README.split("## Settings")[1].split("## Speed")[0]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^\| \w.*", table, re.M)).replace("`", " ")))
    fields = {f.name for f in dataclasses.fields(Config)}
    assert fields <= named
    listed = {w for cell in re.findall(r"`([a-z_0-9 ]+)`", table) for w in cell.split()}
    assert listed - {"config"} <= fields


def test_each_file_of_the_map_exists():
    tree = README.split("## How it is built")[1].split("A document on disk")[0]
    folder = ""
    for name in re.findall(r"^    (\s*[\w./]+)  ", tree, re.M):
        indented, name = name.startswith(" "), name.strip()
        folder = folder if indented else (name if name.endswith("/") else "")
        assert (ROOT / (folder + name if indented else name)).exists(), name


def test_each_trap_names_tests_that_exist():
    rows = re.findall(r"^\| (\d+) \|.*", traps := (ROOT / "tests/TRAPS.md").read_text(), re.M)
    assert rows == [str(i) for i in range(1, 41)]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")), re.M))
    named = set(re.findall(r"`(test_\w+)`", traps))
    assert len(named) > 30 and named <= defined
