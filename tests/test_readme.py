"""The README's commands and names are those of the code."""

import re
import shlex

import pytest

import eval_copy
from config import ROOT, load
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
    assert made == {"demo", "text", "test"} <= targets


def test_each_file_of_the_tree_exists_and_has_about_the_lines_stated():
    tree = re.findall(r"^    ([\w./]+/|\w+\.py) +([\d,]+)   ", README.split("## The code")[1].split("\n## ")[0], re.M)
    assert {"train.py", "model.py", "data/", "kernels/"} <= {name for name, _ in tree}
    for name, stated in tree:
        paths = (ROOT / name).rglob("*.py") if name.endswith("/") else [ROOT / name]
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        assert lines == pytest.approx(int(stated.replace(",", "")), rel=0.1, abs=5), name


def test_each_page_that_is_linked_exists():
    pages = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(pages) > 5
    for page in pages:
        assert (ROOT / page).exists(), page


def test_the_readme_has_at_most_1200_words():
    assert len(README.split()) <= 1200


def test_each_trap_names_tests_that_exist():
    rows = re.findall(r"^\| (\d+) \|.*", traps := (ROOT / "tests/TRAPS.md").read_text(), re.M)
    assert rows == [str(i) for i in range(1, 41)]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")), re.M))
    named = set(re.findall(r"`(test_\w+)`", traps))
    assert len(named) > 30 and named <= defined
