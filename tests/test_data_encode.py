import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import encode
from data.documents import Document, Part, numbered
from data.encode import Settings, batches, encode_all, insert_repeats
from data.tokenizer import Bytes
from errors import UserError


def part(name, texts, group=""):
    return Part(name, numbered(lambda: (Document(f"{name}:{i}", text) for i, text in enumerate(texts))), group=group)


ROOT = Path(__file__).resolve().parent.parent
PARTS = [part("a", ["x" * n for n in range(100)]), part("b", []), part("c", ["y" * 2000, "z"]), part("d", ["w"] * 300)]


def never(group):
    return False


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 1000)


def test_batches_hold_every_document_once_and_in_order():
    found = list(batches(PARTS, (0, None), never))
    assert [d for b in found for d in b.documents] == [d for p in PARTS for d, _ in p.read(None)]
    assert len(found) > 10 and all(b.documents for b in found)


def test_batches_from_where_one_ended_are_the_rest_of_them():
    found = list(batches(PARTS, (0, None), never))
    for i, batch in enumerate(found):
        assert list(batches(PARTS, batch.end, never)) == found[i + 1 :]


def test_a_batch_is_of_one_group_and_of_a_full_one_no_more_is_read():
    parts = [part(name, ["x" * 600] * 5, group) for name, group in zip("abcd", "ppqq", strict=True)]
    found = list(batches(parts, (0, None), never))
    assert [(b.group, len(b.documents)) for b in found] == [("p", 2)] * 5 + [("q", 2)] * 5
    taken = []
    for batch in batches(parts, (0, None), lambda group: group == "p" and len(taken) >= 2):
        taken.append(batch)
    assert [b.group for b in taken] == ["p"] * 2 + ["q"] * 5


def test_encoding_counts_what_it_writes_and_what_it_leaves_out():
    documents = [
        Document("1", "one"), Document("2", ""), Document("3", None, "undecodable"), Document("4", None, "undecodable"),
        Document("5", "two 🙂"), Document("6", None, "not JSON"),
    ]  # fmt: skip
    out = encode.encode(Bytes(), documents, Settings(0.0))
    assert out.ids["train"].tolist() == [256, *b"one", 256, *"two 🙂".encode()] and out.ids["train"].dtype == np.uint16
    assert out.ids["val"].size == 0 and out.counts["docs"] == {"train": 2} and out.counts["bytes"] == {"train": 3 + 8}
    assert out.counts["dropped"] == {"empty": 1, "undecodable": 2, "not JSON": 1}
    assert out.first == {"empty": "2", "undecodable": "3", "not JSON": "6"}


def test_a_document_is_held_out_by_its_text_alone():
    texts = [f"text {i}" for i in range(1000)]
    out = encode.encode(Bytes(), [Document("", text) for text in texts], Settings(0.2))
    held = {text for text in texts if encode.split_hash(text.encode(), 0) < 0.2}
    assert 150 < len(held) == out.counts["docs"]["val"] < 250
    for order in (reversed(texts), sorted(texts, key=lambda text: text[::-1])):
        again = encode.encode(Bytes(), [Document("", text) for text in order], Settings(0.2))
        assert again.counts == out.counts and sorted(again.ids["val"]) == sorted(out.ids["val"])


def plain(pairs):
    return [(b, {s: ids.tolist() for s, ids in e.ids.items()}, e.counts, e.first) for b, e in pairs]


def test_any_number_of_processes_gives_the_same_in_the_same_order():
    one = plain(encode_all(batches(PARTS, (0, None), never), Bytes(), Settings(0.1, 3), processes=1))
    assert len(one) > 10
    assert plain(encode_all(batches(PARTS, (0, None), never), Bytes(), Settings(0.1, 3), processes=3)) == one


def test_the_source_is_not_read_far_ahead_of_what_is_encoded():
    read = []
    endless = Part("e", numbered(lambda: (read.append(i) or Document(str(i), "x" * 1000) for i in itertools.count())))
    pairs = encode_all(batches([endless], (0, None), never), Bytes(), Settings(0.1), processes=2)
    for _ in range(20):
        next(pairs)
    pairs.close()
    assert len(read) <= 20 + 2 * (encode.AHEAD + 1) + 2


def test_a_killed_process_is_reported_in_one_line():
    pairs = encode_all(batches(PARTS * 50, (0, None), never), Bytes(), Settings(0.1), processes=2)
    next(pairs)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="one of 2 processes was killed.*--processes=1"):
        list(pairs)


def test_worker_processes_end_when_their_parent_is_killed():
    code = """
import itertools, multiprocessing, os, signal
from data import encode
from tests.test_data_encode import PARTS, never
from data.tokenizer import Bytes
encode.BATCH = 1000
pairs = encode.encode_all(encode.batches(PARTS * 50, (0, None), never), Bytes(), encode.Settings(0.1), processes=2)
next(pairs)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The pipe of its output is open until the last of them has gone.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and len(done.stdout.split()) == 2


class Distinct(Bytes):
    """A tokenizer that makes of the text "n ..." the ids 0 to n - 1, each once: a second one can only be a copy."""

    def encode(self, text):
        return np.arange(int(text.split()[0]))


@pytest.mark.parametrize("share", [0.005, 0.02, 0.08, 0.5, 0.9])
def test_the_share_asked_for_lies_in_passages_of_20_to_100_tokens_copied_from_shortly_before(share):
    rng = np.random.default_rng(0)
    total = copied = 0
    passages = []
    for n in np.repeat([10, 30, 100, 1000, 30_000], [400, 400, 400, 400, 40]).tolist():
        ids = insert_repeats(np.arange(n), share, rng)
        originals = np.unique(ids, return_index=True)[1]  # where each id stands first
        is_copy = np.ones(len(ids), bool)
        is_copy[originals] = False
        assert np.array_equal(ids[~is_copy], np.arange(n))
        places = np.flatnonzero(is_copy)
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(ids[places]) != 1)) + 1
        passages += [part for part in np.split(places, breaks) if len(part)]
        if share <= 0.02:  # few enough that copies hardly meet
            assert (places - originals[ids[places]]).max(initial=0) < 500
        total += len(ids)
        copied += is_copy.sum()
    assert abs(copied / total - share) < 0.05 * share
    if share <= 0.02:
        lengths = [len(part) for part in passages]
        assert len(lengths) > 50 and min(lengths) >= 20 and max(lengths) <= 100


def test_copies_depend_on_the_text_and_the_seed_alone_and_documents_held_out_get_none():
    texts = [f"{n} text {i}" for i, n in enumerate([10, 40, 400, 4000] * 25)]
    documents = [Document(text, text) for text in texts]
    plain, copies, again, other = (
        encode.encode(Distinct(), documents, settings)
        for settings in (Settings(0.2), Settings(0.2, 0, 0.1), Settings(0.2, 0, 0.1), Settings(0.2, 1, 0.1))
    )
    assert copies.ids["train"].tolist() == again.ids["train"].tolist() != other.ids["train"].tolist()
    assert copies.ids["val"].tolist() == plain.ids["val"].tolist() and copies.counts["bytes"] == plain.counts["bytes"]
    assert len(copies.ids["train"]) == len(plain.ids["train"]) + copies.counts["copied"]["train"]
    assert "copied" not in plain.counts
    cut = [encode.encode(Distinct(), documents[i : i + 7], Settings(0.2, 0, 0.1)) for i in range(0, 100, 7)]
    assert np.concatenate([out.ids["train"] for out in cut]).tolist() == copies.ids["train"].tolist()
    assert sum(out.counts["copied"]["train"] for out in cut) == copies.counts["copied"]["train"]


def test_a_ctrl_c_that_another_thread_takes_is_kept_to_the_end_of_the_block():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()  # before the block, so that its mask lets the signal through
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt), encode._ctrl_c_later():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            reached = True
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
        thread.join()
    assert reached
