"""The layers of the tree: who may import whom, read from the source, imports inside functions included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOTTOM = {"errors", "files", "cli"}
# What each top-level file or package may import, beside itself and the bottom layer.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "cli": {"errors"},
    "config": set(),
    "kernels": set(),
    "model": {"config"},
    "measures": {"model", "config"},
    "runtime": {"config"},
    "data": {"config"},
    "hf": {"measures", "model", "runtime", "data", "config"},
    "paper": {"measures", "model", "runtime", "data", "config"},
    "sample": {"model", "runtime", "data", "hf", "kernels", "config"},
    "eval_copy": {"sample", "measures", "model", "runtime", "data", "hf", "kernels", "config"},
}
EVERYTHING = set(ALLOWED) | {"train", "reproduce", "bench", "benchmarks"}
ALLOWED |= {name: EVERYTHING for name in ("train", "reproduce", "bench", "benchmarks")}


def source_files() -> list[Path]:
    return sorted(p for name in ALLOWED for p in [ROOT / f"{name}.py", *(ROOT / name).glob("*.py")] if p.exists())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files()}


def imports(path: Path) -> set[str]:
    """Returns the modules of this project that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_layer_and_those_below(module):
    layer = module.split(".")[0]
    allowed = ALLOWED[layer] | {layer} | (set() if layer in BOTTOM else BOTTOM)
    assert {name for name in imports(MODULES[module]) if name.split(".")[0] not in allowed} == set()


def test_there_are_no_import_cycles():
    graph = {module: imports(path) for module, path in MODULES.items()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from data import bins", {"data.bins"}),
        ("def f():\n    import train", {"train"}),
        ("from data.bins import Bin\nimport numpy", {"data.bins"}),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imports(path) == found
