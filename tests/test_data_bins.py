import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config import ROOT
from data.bins import Bin, fingerprint, order, window_indices
from data.meta import load_meta
from errors import RunFailed, UserError
from tests.test_data_writer import write


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


def test_the_order_is_read_only():
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
    with pytest.raises(UserError, match=r"8 tokens are fewer .* 9; pass --seq_len=7"):
        Bin(plain(tmp_path / "train.bin", range(8)), seq_len=8, vocab_size=9)
    assert Bin(tmp_path / "train.bin", seq_len=7, vocab_size=9).n_windows == 1


def test_the_last_window_ends_inside_the_bin_whatever_its_length(tmp_path):
    for n in range(5, 14):
        bin = Bin(plain(tmp_path / "train.bin", range(n)), seq_len=4, vocab_size=n)
        assert bin.windows([bin.n_windows - 1])[0, -1] == 4 * bin.n_windows < n
        assert n - 1 - 4 * bin.n_windows < 4


def test_every_uint16_survives_the_round_trip(tmp_path):
    write(tmp_path, np.arange(65536))
    assert (tmp_path / "train.bin").stat().st_size == 131072
    assert (tmp_path / "train.bin").read_bytes()[:4] == b"\0\0\1\0"
    assert np.array_equal(Bin(tmp_path / "train.bin", 65535, 65536).windows([0])[0], np.arange(65536))


def test_reader_refuses_an_id_beyond_the_vocabulary_and_names_the_size_that_fits(tmp_path):
    bin = Bin(plain(tmp_path / "train.bin", [1, 2, 3, 256, 4, 5]), seq_len=2, vocab_size=256)
    assert bin.windows([0]).tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match=r"train.bin: token id 256, .*vocab_size=256; pass --vocab_size=257"):
        bin.windows([0, 1])
    write(tmp_path, [1, 2, 3, 256, 4, 5], vocab_size=2048)
    with pytest.raises(UserError, match="pass --vocab_size=2048"):
        Bin(tmp_path / "train.bin", seq_len=2, vocab_size=256).windows([1])


def test_unusable_files_are_named_in_one_line(tmp_path):
    path = tmp_path / "train.bin"
    for content, message in ((None, "no such file"), (b"", "0 bytes"), (b"123", "3 bytes")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as e:
            Bin(path, 1, 10)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("n", [50, 150])
def test_a_bin_that_is_not_of_the_size_in_meta_is_refused(tmp_path, n):
    write(tmp_path, range(100))
    plain(tmp_path / "train.bin", range(n))
    with pytest.raises(UserError, match=f"{n} tokens, but meta.json states 100"):
        Bin(tmp_path / "train.bin", 8, 1000)


def test_a_meta_json_that_is_not_ours_is_refused(tmp_path):
    for content in ("{", "[]", "{}", '{"format": 99}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match="meta.json"):
            load_meta(tmp_path)


def test_bins_without_meta_load_unchanged(tmp_path):
    assert load_meta(tmp_path) is None
    bin = Bin(plain(tmp_path / "train.bin", range(100)), seq_len=9, vocab_size=50257)
    assert bin.n_windows == 11 and bin.windows([10])[0].tolist() == list(range(90, 100))


def headed(path, tokens, magic=20240520, version=1, stated=None, dtype="<u2"):
    """A bin as llm.c's and modded-nanogpt's scripts write it."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = magic, version, len(tokens) if stated is None else stated
    path.write_bytes(head.tobytes() + np.array(tokens, dtype=dtype).tobytes())
    return path


SHARDED = {
    "llm.c": (headed, "tiny_{split}_{i:06}.bin"),
    "modded-nanogpt": (headed, "fineweb_{split}_{i:06}.bin"),
    "nanoGPT, in parts": (plain, "{split}_{i}.bin"),
}


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("cuts", [[1000], [7, 500], [1, 1, 2, 3, 13, 400, 401, 999]])
def test_where_a_stream_is_cut_into_files_makes_no_difference(tmp_path, kind, cuts):
    write, name = SHARDED[kind]
    tokens = np.random.default_rng(0).integers(50257, size=1000)
    one = Bin(plain(tmp_path / "whole.bin", tokens), seq_len=6, vocab_size=50257)
    for split in ("train", "val"):
        for i, part in enumerate(np.split(tokens, cuts)):
            if len(part) or write is headed:  # a headed file may hold no token
                write(tmp_path / name.format(split=split, i=i), part)
    for split in ("train", "val"):
        many = Bin(tmp_path / f"{split}.bin", seq_len=6, vocab_size=50257)
        assert (many.n_tokens, many.n_windows) == (one.n_tokens, one.n_windows) == (1000, 166)
        chosen = order(0, 0, 166)
        assert np.array_equal(many.windows(chosen), one.windows(chosen))


def test_llama2c_validates_on_its_first_shard_and_trains_on_the_others(tmp_path):
    for i in range(3):
        plain(tmp_path / f"data{i:02}.bin", range(i * 100, i * 100 + 100))
    assert Bin(tmp_path / "val.bin", 99, 300).windows([0])[0].tolist() == list(range(100))
    assert Bin(tmp_path / "train.bin", 199, 300).windows([0])[0].tolist() == list(range(100, 300))


def test_a_shard_of_training_tokens_is_not_read_as_validation_because_of_its_name(tmp_path):
    plain(tmp_path / "retrieval_train_0.bin", range(100))
    plain(tmp_path / "retrieval_val_0.bin", range(100, 200))
    assert Bin(tmp_path / "train.bin", 99, 300).windows([0])[0].tolist() == list(range(100))
    assert Bin(tmp_path / "val.bin", 99, 300).windows([0])[0].tolist() == list(range(100, 200))


def test_train_bin_itself_wins_over_what_else_has_train_in_its_name(tmp_path):
    plain(tmp_path / "old_train_1.bin", range(50))
    assert Bin(plain(tmp_path / "train.bin", range(9)), 8, 9).n_tokens == 9


def test_a_header_that_is_not_that_of_its_file_is_refused(tmp_path):
    for path, message in (
        (headed(tmp_path / "a.bin", range(100), stated=150), "header states 150 tokens, but it holds 100"),
        (headed(tmp_path / "b.bin", range(100), stated=99), "header states 99 tokens, but it holds 100"),
        (headed(tmp_path / "c.bin", range(100), magic=20240801, version=7, dtype="<u4"), "uint32"),
        (headed(tmp_path / "d.bin", range(100), magic=20240801, version=7, dtype="<u4", stated=1100), "uint32"),
    ):
        with pytest.raises(UserError, match=message) as e:
            Bin(path, 8, 1000)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_tokens_that_look_like_half_a_header_are_tokens(tmp_path):
    tokens = [20240520 % 65536, 20240520 // 65536, *range(600)]
    assert Bin(plain(tmp_path / "train.bin", tokens), 601, 65536).windows([0])[0].tolist() == tokens


def test_a_bin_of_over_two_billion_tokens_is_read_to_its_end(tmp_path):
    n, path = 2**31 + 2**20 + 1, tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.truncate(2 * n)  # holes, which take no room on the disk
        file.seek(2 * (n - 5))
        file.write(np.arange(1, 6, dtype="<u2").tobytes())
    bin = Bin(path, seq_len=1024, vocab_size=6)
    assert (bin.n_tokens, bin.n_windows) == (n, 2**21 + 2**10)
    chosen = order(0, 0, bin.n_windows)
    last = int(np.flatnonzero(chosen == bin.n_windows - 1)[0])
    assert bin.windows(window_indices(0, last, 1, bin.n_windows))[0, -5:].tolist() == [1, 2, 3, 4, 5]


def test_an_order_costs_4_bytes_a_window_and_is_numpys_permutation():
    assert order(0, 0, 1000).nbytes == 4000 and order(0, 0, 1000).dtype == np.int32
    assert np.array_equal(order(0, 0, 1000), np.random.default_rng([0, 0]).permutation(1000))


def test_a_bin_is_mapped_once_and_read_only(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(np, "memmap", lambda *a, _memmap=np.memmap, **k: opened.append(a) or _memmap(*a, **k))
    bin = Bin(plain(tmp_path / "train.bin", range(100)), seq_len=9, vocab_size=100)
    for _ in range(5):
        bin.windows([0, 3])
    assert len(opened) == 1
    with pytest.raises(ValueError):
        bin.shards[0].tokens[0] = 1


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


def test_a_batch_checks_each_file_that_it_reads_once_and_no_other(tmp_path, monkeypatch):
    for i in range(4):
        plain(tmp_path / f"train_{i}.bin", range(100))
    bin = Bin(tmp_path / "train.bin", seq_len=10, vocab_size=100)
    looked = []
    monkeypatch.setattr(Path, "stat", lambda path, _stat=Path.stat, **k: looked.append(path.name) or _stat(path, **k))
    windows = bin.windows([0, 1, 2, 3, 9, 12, 13])
    assert looked == ["train_0.bin", "train_1.bin"]
    assert windows[4].tolist() == [*range(90, 100), 0]


def test_a_file_put_back_under_another_inode_is_the_same_file_and_a_changed_one_is_not(tmp_path):
    path = plain(tmp_path / "train.bin", range(100))
    bin = Bin(path, seq_len=10, vocab_size=100)
    shutil.copy2(path, tmp_path / "copy.bin")
    os.replace(tmp_path / "copy.bin", path)
    assert bin.windows([1])[0].tolist() == list(range(10, 21))
    os.utime(path, ns=(0, 0))
    with pytest.raises(RunFailed, match="changed since this run opened it"):
        bin.windows([1])


def test_a_file_given_as_the_folder_is_refused_with_the_folder_to_pass(tmp_path):
    write(tmp_path, range(100))
    command = [sys.executable, "train.py", f"--data={tmp_path / 'train.bin'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert f"{tmp_path / 'train.bin'}: is a file; pass the folder that holds it: --data={tmp_path}\n" in done.stderr
    assert not (tmp_path / "run").exists()
