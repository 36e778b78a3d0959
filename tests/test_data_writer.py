import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.bins import Bin
from data.meta import load_meta
from data.writer import Writer
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write(folder, train, val=(0, 1, 2), vocab_size=65536):
    with Writer(folder, vocab_size) as writer:
        writer.add("train", train)
        writer.add("val", val)
        return writer.commit({"source": "test", "tokenizer": {"kind": "bytes"}}, {})


@pytest.mark.parametrize("ids", [[70000], [-1], [5, 100], np.array([2**40]), np.array([65535], dtype=np.uint16)])
def test_writer_refuses_an_id_that_uint16_or_the_vocabulary_cannot_hold(tmp_path, ids):
    with pytest.raises(UserError, match=str(max(ids, key=abs))), Writer(tmp_path / "new", 100) as writer:
        writer.add("train", ids)
    assert not (tmp_path / "new").exists()


def test_meta_counts_what_was_written(tmp_path):
    with Writer(tmp_path, 300) as writer:
        writer.add("train", [256, 1, 2], n_bytes=2)
        writer.add("train", np.array([256, 3]), n_bytes=1)
        writer.add("val", [], n_bytes=0)
        meta = writer.commit({"bos_id": 256, "tokenizer": {"kind": "bytes"}}, {"extra": b"beside"})
    assert load_meta(tmp_path) == meta and meta["bos_id"] == 256 and meta["vocab_size"] == 300
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    assert meta["counts"] == np.bincount([256, 1, 2, 256, 3], minlength=300).tolist()
    assert (train["tokens"], train["docs"], train["bytes"]) == (5, 2, 3)
    assert (val["tokens"], val["docs"], val["bytes"]) == (0, 1, 0)
    assert train["blake2b"] == hashlib.blake2b((tmp_path / "train.bin").read_bytes(), digest_size=16).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["extra", "meta.json", "train.bin", "val.bin"]


def test_an_exception_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path, range(10))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, 100) as writer:
        writer.add("train", range(50))
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_kill_while_writing_leaves_nothing_that_looks_like_a_dataset(tmp_path):
    code = """
import sys
from data.writer import Writer
with Writer(sys.argv[1], 100) as writer:
    writer.add("train", range(50))
    writer.files["train"].flush()
    print("written", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".partial"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("renames", range(4))  # of meta.json, tokenizer.model and the bins
def test_a_kill_between_the_renames_is_seen_by_the_reader(tmp_path, monkeypatch, renames, old):
    done = []
    if old:
        write(tmp_path, range(50), range(50), vocab_size=100)

    def replace(source, target, _replace=os.replace):
        if target.parent.name == ".partial":
            return _replace(source, target)
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(_replace(source, target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, 100) as writer:
        writer.add("train", range(50))
        writer.add("val", range(50))
        writer.commit({"tokenizer": {"kind": "bytes"}}, {"tokenizer.model": b"model"})
    assert load_meta(tmp_path) is not None or not done
    with pytest.raises(UserError, match="no such file"):
        for split in ("train", "val"):
            Bin(tmp_path / f"{split}.bin", 8, 100)


def half(folder, key="k"):
    """A writer that was left after a save, and had more added since."""
    with Writer(folder, 100, key) as writer:
        writer.add("train", range(50), n_bytes=7)
        writer.save({"at": 3})
        writer.add("train", range(9))
        writer.add("val", range(30))


def test_resuming_keeps_what_was_saved_and_drops_what_came_after(tmp_path):
    half(tmp_path / "a")
    with Writer(tmp_path / "a", 100, "k") as writer:
        assert writer.state == {"at": 3} and writer.totals["train"] == {"tokens": 50, "docs": 1, "bytes": 7}
        writer.add("val", range(40))
        went_on = writer.commit({"tokenizer": {"kind": "bytes"}}, {})
    with Writer(tmp_path / "b", 100, "k") as writer:
        assert writer.state is None
        writer.add("train", range(50), n_bytes=7)
        writer.add("val", range(40))
        assert writer.commit({"tokenizer": {"kind": "bytes"}}, {}) == went_on
    assert went_on["counts"] == [1] * 50 + [0] * 50
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert one == two and one.keys() == {"meta.json", "train.bin", "val.bin"}


@pytest.mark.parametrize("renames", range(3))
def test_a_commit_cut_short_after_a_save_is_resumed(tmp_path, monkeypatch, renames):
    done = []

    def replace(source, target, _replace=os.replace):
        if target.parent.name != ".partial":
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        _replace(source, target)

    half(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), Writer(tmp_path, 100, "k") as writer:
        patched.setattr(os, "replace", replace)
        writer.add("val", range(40))
        writer.commit({"tokenizer": {"kind": "bytes"}}, {})
    with Writer(tmp_path, 100, "k") as writer:
        assert writer.totals["train"]["tokens"] == 50
        writer.add("val", range(40))
        writer.commit({"tokenizer": {"kind": "bytes"}}, {})
    assert Bin(tmp_path / "train.bin", 49, 100).windows([0])[0].tolist() == list(range(50))
    assert Bin(tmp_path / "val.bin", 39, 100).n_tokens == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_an_unfinished_dataset_of_another_key_is_refused_and_kept(tmp_path):
    half(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / ".partial").iterdir()}
    with pytest.raises(UserError, match="unfinished"), Writer(tmp_path, 100, "another"):
        pass
    assert {p.name: p.read_bytes() for p in (tmp_path / ".partial").iterdir()} == before


def test_unfinished_bins_shorter_than_their_journal_are_refused(tmp_path):
    half(tmp_path)
    os.truncate(tmp_path / ".partial/train.bin", 10)
    with pytest.raises(UserError, match="start again"), Writer(tmp_path, 100, "k"):
        pass
    (tmp_path / ".partial/journal.json").write_text('{"key": "k"')
    with pytest.raises(UserError, match="damaged; remove .*partial and start again"), Writer(tmp_path, 100, "k"):
        pass


def test_two_writers_do_not_write_one_dataset(tmp_path):
    with Writer(tmp_path, 100) as writer:
        with pytest.raises(UserError, match="another process is writing it"), Writer(tmp_path, 100):
            pass
        writer.add("train", range(50))
        writer.commit({"tokenizer": {"kind": "bytes"}}, {})
    assert Bin(tmp_path / "train.bin", 49, 100).n_tokens == 50
