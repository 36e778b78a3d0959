import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.bins import Bin, DataError, Writer, fingerprint, load_meta, order, window_indices

ROOT = Path(__file__).resolve().parent.parent


def write(folder, train, val=(0, 1, 2), vocab_size=65536):
    with Writer(folder, vocab_size) as writer:
        writer.add("train", train)
        writer.add("val", val)
        return writer.commit({"source": "test", "tokenizer": {"kind": "bytes"}}, {})


def plain(path, tokens):
    """A bin as nanoGPT's and llama2.c's scripts write it."""
    np.array(tokens, dtype=np.uint16).tofile(path)
    return path


def test_each_window_comes_once_per_epoch():
    for start in (0, 57, 114):
        assert sorted(window_indices(0, start, 57, 57)) == list(range(57))
    assert not np.array_equal(order(0, 0, 57), order(0, 1, 57))
    assert not np.array_equal(order(0, 0, 57), order(1, 0, 57))


def test_a_batch_may_span_any_number_of_epochs():
    run = np.concatenate([order(3, epoch, 5) for epoch in range(5)])
    assert np.array_equal(window_indices(3, 4, 17, 5), run[4:21])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_order_does_not_depend_on_how_a_batch_is_cut(world_size, micro_batch):
    start, count, n = 40, 24, 50
    cut = []
    for rank in range(world_size):
        first, end = start + rank * count // world_size, start + (rank + 1) * count // world_size
        cut += [window_indices(7, p, min(micro_batch, end - p), n) for p in range(first, end, micro_batch)]
    assert np.array_equal(np.concatenate(cut), window_indices(7, start, count, n))


def test_order_is_the_one_that_older_checkpoints_were_trained_with():
    """NumPy does not promise its streams: should a release change them, no run could be resumed on it."""
    first = order(0, 0, 1000)[:16].tolist()
    assert first == [459, 206, 222, 162, 711, 814, 350, 890, 518, 264, 683, 674, 511, 391, 329, 325]
    later = np.concatenate([order(1234, epoch, 1000) for epoch in (1, 7)]).astype("<i8")
    assert hashlib.blake2b(later.tobytes(), digest_size=8).hexdigest() == "dbda8cb41095191b"


def test_order_cannot_be_changed_by_whoever_is_handed_it():
    with pytest.raises(ValueError):
        order(0, 0, 10)[0] = 3


def test_windows_are_the_tokens_in_their_place_and_share_one_with_the_next(tmp_path):
    write(tmp_path, np.arange(1000))
    bin = Bin(tmp_path / "train.bin", seq_len=7, vocab_size=1000)
    assert (bin.n_tokens, bin.n_windows) == (1000, 142)
    windows = bin.windows([0, 141, 5])
    assert windows.dtype == np.int64
    assert windows.tolist() == [list(range(w * 7, w * 7 + 8)) for w in (0, 141, 5)]


def test_seq_len_plus_one_tokens_are_one_window_and_seq_len_tokens_are_an_error(tmp_path):
    bin = Bin(plain(tmp_path / "train.bin", range(9)), seq_len=8, vocab_size=9)
    assert bin.n_windows == 1 and bin.windows([0]).tolist() == [list(range(9))]
    with pytest.raises(DataError, match=r"8 tokens are fewer .* 9; pass --seq_len=7"):
        Bin(plain(tmp_path / "train.bin", range(8)), seq_len=8, vocab_size=9)
    assert Bin(tmp_path / "train.bin", seq_len=7, vocab_size=9).n_windows == 1


def test_the_last_window_ends_inside_the_bin_whatever_its_length(tmp_path):
    for n in range(5, 14):
        bin = Bin(plain(tmp_path / "train.bin", range(n)), seq_len=4, vocab_size=n)
        assert bin.windows([bin.n_windows - 1])[0, -1] == 4 * bin.n_windows < n
        assert n - 1 - 4 * bin.n_windows < 4


@pytest.mark.parametrize("ids", [[70000], [-1], [5, 100], np.array([2**40]), np.array([65535], dtype=np.uint16)])
def test_writer_refuses_an_id_that_uint16_or_the_vocabulary_cannot_hold(tmp_path, ids):
    with pytest.raises(DataError, match=str(max(ids, key=abs))), Writer(tmp_path / "new", 100) as writer:
        writer.add("train", ids)
    assert not (tmp_path / "new").exists()


def test_writer_refuses_a_vocabulary_beyond_uint16(tmp_path):
    with pytest.raises(DataError, match="65537"):
        Writer(tmp_path, 65537)


def test_every_uint16_survives_the_round_trip(tmp_path):
    write(tmp_path, np.arange(65536))
    assert (tmp_path / "train.bin").stat().st_size == 131072
    assert (tmp_path / "train.bin").read_bytes()[:4] == b"\0\0\1\0"
    assert np.array_equal(Bin(tmp_path / "train.bin", 65535, 65536).windows([0])[0], np.arange(65536))


def test_reader_refuses_an_id_beyond_the_vocabulary_and_names_the_size_that_fits(tmp_path):
    bin = Bin(plain(tmp_path / "train.bin", [1, 2, 3, 256, 4, 5]), seq_len=2, vocab_size=256)
    assert bin.windows([0]).tolist() == [[1, 2, 3]]
    with pytest.raises(DataError, match=r"train.bin: token id 256, .*vocab_size=256; pass --vocab_size=257"):
        bin.windows([0, 1])
    write(tmp_path, [1, 2, 3, 256, 4, 5], vocab_size=2048)
    with pytest.raises(DataError, match="pass --vocab_size=2048"):
        Bin(tmp_path / "train.bin", seq_len=2, vocab_size=256).windows([1])


def test_unusable_files_are_named_in_one_line(tmp_path):
    path = tmp_path / "train.bin"
    for content, message in ((None, "no such file"), (b"", "empty"), (b"123", "3 bytes")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message) as e:
            Bin(path, 1, 10)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("n", [50, 150])
def test_a_bin_that_is_not_of_the_size_in_meta_is_refused(tmp_path, n):
    write(tmp_path, range(100))
    plain(tmp_path / "train.bin", range(n))
    with pytest.raises(DataError, match=f"{n} tokens, but meta.json states 100"):
        Bin(tmp_path / "train.bin", 8, 1000)


def test_a_meta_json_that_is_not_ours_is_refused(tmp_path):
    for content in ("{", "[]", "{}", '{"format": 99}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(DataError, match="meta.json"):
            load_meta(tmp_path)


def test_bins_without_meta_load_unchanged(tmp_path):
    assert load_meta(tmp_path) is None
    bin = Bin(plain(tmp_path / "train.bin", range(100)), seq_len=9, vocab_size=50257)
    assert bin.n_windows == 11 and bin.windows([10])[0].tolist() == list(range(90, 100))


def test_a_bin_is_mapped_once_and_read_only(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(np, "memmap", lambda *a, _memmap=np.memmap, **k: opened.append(a) or _memmap(*a, **k))
    bin = Bin(plain(tmp_path / "train.bin", range(100)), seq_len=9, vocab_size=100)
    for _ in range(5):
        bin.windows([0, 3])
    assert len(opened) == 1
    with pytest.raises(ValueError):
        bin.tokens[0] = 1


def test_meta_counts_what_was_written(tmp_path):
    with Writer(tmp_path, 300) as writer:
        writer.add("train", [256, 1, 2], n_bytes=2)
        writer.add("train", np.array([256, 3]), n_bytes=1)
        writer.add("val", [], n_bytes=0)
        meta = writer.commit({"bos_id": 256, "tokenizer": {"kind": "bytes"}}, {"extra": b"beside"})
    assert load_meta(tmp_path) == meta and meta["bos_id"] == 256 and meta["vocab_size"] == 300
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    assert (train["tokens"], train["docs"], train["bytes"]) == (5, 2, 3)
    assert (val["tokens"], val["docs"], val["bytes"]) == (0, 1, 0)
    assert train["blake2b"] == hashlib.blake2b((tmp_path / "train.bin").read_bytes(), digest_size=16).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["extra", "meta.json", "train.bin", "val.bin"]


def test_fingerprint_tells_datasets_apart_with_and_without_meta(tmp_path):
    seen = set()
    for i, (train, val) in enumerate([(range(9), [1]), (range(1, 10), [1]), (range(9), [2]), (range(10), [])]):
        write(tmp_path / str(i), train, val)
        again = write(tmp_path / f"{i} again", train, val)
        assert fingerprint(tmp_path / str(i)) == fingerprint(tmp_path / f"{i} again") == again["fingerprint"]
        seen.add(fingerprint(tmp_path / str(i)))
        (tmp_path / str(i) / "meta.json").unlink()
        seen.add(fingerprint(tmp_path / str(i)))
    assert len(seen) == 8


def test_fingerprint_without_meta_reads_both_ends_of_a_large_bin(tmp_path):
    tokens = np.zeros(3 * 2**20, dtype=np.uint16)
    seen = set()
    for changed in (0, 2**19 - 1, -1, -(2**19)):
        tokens[changed] += 1
        plain(tmp_path / "train.bin", tokens)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


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
from data.bins import Writer
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
    left = [p.name for p in tmp_path.iterdir()]
    assert left and all(name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_the_renames_is_seen_by_the_reader(tmp_path, monkeypatch, renames, old):
    done = []
    if old:
        write(tmp_path, range(50), range(50), vocab_size=100)

    def replace(source, target, _replace=os.replace):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(_replace(source, target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, 100) as writer:
        writer.add("train", range(50))
        writer.add("val", range(50))
        writer.commit({"tokenizer": {"kind": "bytes"}}, {"tokenizer.model": b"model"})
    assert load_meta(tmp_path) is not None or not done
    with pytest.raises(DataError, match="no such file"):
        for split in ("train", "val"):
            Bin(tmp_path / f"{split}.bin", 8, 100)
