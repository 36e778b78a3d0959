import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ROOT
from data import encode, sources
from data.bins import Bin, batch
from data.documents import Document, Part, numbered
from data.meta import SPLITS, load_meta
from data.prepare import parse, prepare, training_texts
from data.tokenizer import Bytes, SentencePiece, Tiktoken, load_tokenizer
from data.writer import another_fraction
from errors import UserError
from tests.faults import no_file_beyond
from tests.test_data_tokenizer import ANY_TEXT, NASTY, TOKENS, ranks, repeatable

GPT = ranks(TOKENS)


def run(*argv, first=None):
    command = [sys.executable, "-m", "data.prepare", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, preexec_fn=first, capture_output=True, text=True, check=False)


def documents(folder):
    """{split: [text of each document]}, read back from the bins."""
    tokenizer, found = load_tokenizer(folder), {}
    for split in SPLITS:
        ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
        assert ids[0] == tokenizer.bos
        found[split] = [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos)[1:])]
    return found


def texts(parts):
    return [document.text for part in parts for document, _ in part.read(None)]


def contents(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """Forty small files of text, one that is empty, one that is not UTF-8, and hidden ones."""
    folder = tmp_path / "mine"
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".git").mkdir()
    for i in range(40):
        (folder / ("deep/er" if i % 2 else "") / f"{i}.txt").write_bytes(f"file {i}\r\n\tof 你好 🙂  text\n".encode() * (i + 1))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / ".hidden").write_text("hidden")
    (folder / ".git/config").write_text("hidden")
    return folder


@pytest.mark.parametrize("options", [[], ["--tokenizer=bpe", "--vocab_size=300"]])
def test_bins_hold_the_documents_of_the_files(folder, tmp_path, options):
    out = prepare(["text", str(folder), f"--out={tmp_path / 'out'}", "--val_fraction=0.2", *options])
    found, meta = documents(out), load_meta(out)
    texts = [p.read_bytes().decode() for p in folder.rglob("*.txt") if p.name not in ("empty.txt", "latin.txt")]
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert meta["dropped"] == {"empty": 1, "undecodable": 1}
    for split in SPLITS:
        stated = meta["splits"][split]
        assert (stated["docs"], stated["bytes"]) == (len(found[split]), sum(len(t.encode()) for t in found[split]))
        assert stated["tokens"] * 2 == (out / f"{split}.bin").stat().st_size
    assert meta["bos_id"] == load_tokenizer(out).bos and meta["vocab_size"] == load_tokenizer(out).size


def test_preparing_twice_gives_the_same_bytes(folder, tmp_path):
    argv = ["text", str(folder), "--val_fraction=0.2", "--tokenizer=bpe", "--vocab_size=300"]
    one, two = (prepare([*argv, f"--out={tmp_path / name}"]) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_val_stays_val_when_documents_are_added_and_when_its_share_grows(folder, tmp_path):
    def val(name, fraction=0.2):
        out = prepare(["text", str(folder), f"--out={tmp_path / name}", f"--val_fraction={fraction}"])
        return set(documents(out)["val"])

    before, wider = val("before"), val("wider", 0.5)
    for i in range(20):
        (folder / f"0 new {i}.txt").write_text(f"new {i}")
    after = val("after")
    assert {text for text in after if not text.startswith("new")} == before < wider


def test_the_seed_chooses_another_val(folder, tmp_path):
    argv = ["text", str(folder), "--val_fraction=0.2"]
    one, two = (documents(prepare([*argv, f"--seed={s}", f"--out={tmp_path / str(s)}"]))["val"] for s in (0, 1))
    assert one != two


def test_each_window_of_repeats_is_one_row(tmp_path):
    out = prepare(
        ["repeats", f"--out={tmp_path}", "--rows=300", "--length=32", "--alphabet=20", "--span_max=32", "--val_fraction=0.1"]
    )
    train = Bin(out / "train.bin", seq_len=32, vocab_size=21)
    docs = load_meta(out)["splits"]["train"]["docs"]
    assert train.n_tokens == 32 * docs and train.n_windows == docs - 1  # the last row lacks a token to end on
    windows = train.windows(range(train.n_windows))
    assert (windows[:, 0] == 20).all() and (windows[:, 1:-1] < 20).all()
    rows = texts(sources.repeats(alphabet=20, length=32, rows=300, span_max=32))
    found = documents(out)
    assert sorted(found["train"] + found["val"]) == sorted(rows) and len(rows) == 300


@pytest.mark.parametrize(
    "knob", ["length=1", "rows=0", "span_min=0", "span_min=65", "tiled=1.5", "alphabet=0", "alphabet=99999"]
)
def test_impossible_options_are_refused_by_name(tmp_path, knob):
    with pytest.raises(UserError, match=f"--{knob}"):
        prepare(["repeats", f"--{knob}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_repeating_a_complete_prepare_does_nothing(tmp_path, capsys):
    argv = ["repeats", "--rows=200", "--length=16", "--val_fraction=0.1", f"--out={tmp_path}"]
    assert prepare(argv) == tmp_path
    before = contents(tmp_path)
    capsys.readouterr()
    assert prepare(argv) == tmp_path
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.count("\n") == 1


def test_another_python_is_no_other_dataset(folder, tmp_path, monkeypatch):
    def small():
        """Fifty short documents."""
        return [Part("small", numbered(lambda: [Document(str(i), f"text {i}") for i in range(50)]), 50)]

    monkeypatch.setitem(sources.SOURCES, "python-stdlib", small)
    argv = ["python-stdlib", "--val_fraction=0.2", f"--out={tmp_path / 'out'}"]
    out = prepare(argv)
    meta = load_meta(out)
    meta["source"]["python"] = "3.99"
    (out / "meta.json").write_text(json.dumps(meta))
    before = contents(out)
    prepare(argv)
    assert contents(out) == before


def test_other_arguments_are_refused_and_nothing_is_written_over(tmp_path):
    argv = ["repeats", "--rows=200", "--length=16", "--val_fraction=0.1", f"--out={tmp_path}"]
    prepare(argv)
    before = contents(tmp_path)
    done = run(*argv, "--seed=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr and "--out" in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.model", "tokenizer.json"])
def test_files_of_another_program_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"\1\0")
    with pytest.raises(UserError, match=f"{name} that data.prepare did not make"):
        prepare(["repeats", f"--out={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_left_without_its_tokenizer_is_made_anew(folder, tmp_path):
    out = tmp_path / "out"
    argv = ["text", str(folder), "--val_fraction=0.2", "--tokenizer=bpe", "--vocab_size=300", f"--out={out}"]
    prepare(argv)
    (out / "tokenizer.model").unlink()
    prepare(argv)
    load_tokenizer(out)


def test_names_that_are_not_utf8_are_kept_and_printed(tmp_path):
    folder = tmp_path / os.fsdecode(b"dos\xe9")
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"text {i}")
    (folder / "bad.txt").write_bytes(b"\xff")
    done = run("text", folder, "--val_fraction=0.3", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0 and "dos\\udce9/bad.txt:0" in done.stdout, done
    assert load_meta(tmp_path / "out")["source"]["arguments"]["paths"] == [str(folder)]


def test_a_folder_left_incomplete_is_made_anew(tmp_path):
    argv = ["repeats", "--rows=200", "--length=16", "--val_fraction=0.1", f"--out={tmp_path}"]
    prepare(argv)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "val.bin").unlink()
    os.truncate(tmp_path / "train.bin", 100)
    prepare(argv)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [[], ["--tokenizer=bpe", "--vocab_size=300"]])
def test_a_split_without_documents_is_refused_and_the_fraction_that_is_named_works(tmp_path, options):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.txt").write_text("".join(f"text {i} {chr(97 + j % 26)}{j**5:x}\n" for j in range(2000)))
    argv = ["text", str(tmp_path / "in"), f"--out={tmp_path / 'out'}", *options]
    for split, kind, fraction in (("val", "validation", 0.0001), ("train", "training", 0.9999)):
        with pytest.raises(UserError, match=f"selected for {kind}, of 4 in all; pass --val_fraction=") as e:
            prepare([*argv, f"--val_fraction={fraction}"])
        assert not (tmp_path / "out").exists()
        out = prepare([*argv, str(e.value).split()[-1], f"--out={tmp_path / split}"])
        assert load_meta(out)["splits"][split]["docs"] >= 1


def test_the_fraction_that_is_named_lies_between_the_places_however_close_they_are():
    for lowest, highest in ((0.1, 0.9), (0.51234, 0.5125), (0.3, 0.30000001), (0.0001, 0.9999)):
        for split in ("train", "val"):
            assert lowest < float(another_fraction(split, lowest, highest).split("=")[1]) < highest
    assert another_fraction("val", 0.5, 0.5) == "all of them have the same text; name other files"


def test_one_short_file_and_no_text_at_all_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("")
    for name, message in (("one.txt", "found 1 documents"), ("empty.txt", "found 0 documents, .*1 empty")):
        with pytest.raises(UserError, match=message):
            prepare(["text", str(tmp_path / name), f"--out={tmp_path / 'out'}"])


def test_the_command_by_its_file_name_is_told_how_it_is_run():
    done = subprocess.run([sys.executable, "data/prepare.py", "repeats"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "expected: python -m data.prepare, from the project's folder\n")


def test_a_source_takes_its_own_options_only():
    for argv in (
        ["repeats", "--tokenizer=bpe"],
        ["text", "a", "--rows=3"],
        ["python-stdlib", "a.txt"],
        ["text"],
        ["nowhere"],
        [],
    ):
        with pytest.raises(UserError, match="--help"):
            parse(argv)
    for seed in ("-1", "1e70", "0.5"):
        with pytest.raises(UserError, match="argument --seed"):
            parse(["repeats", f"--seed={seed}"])
    assert parse(["repeats", f"--seed={2**53 + 1}"])[0]["seed"] == 2**53 + 1
    for argv in (["text", ""], ["text", "a", "--out="], ["text", "a", "--out", ""], ["text", "a", "--tokenizer="]):
        with pytest.raises(UserError, match="has no value; is a shell variable unset"):
            parse(argv)
    assert parse(["redpajama", "--tokens=9", "--urls=https://host/list?sig=abc="])[0]["urls"].endswith("abc=")
    with pytest.raises(UserError, match="--tokeniser: no such option; did you mean --tokenizer?"):
        parse(["text", "a", "--tokeniser=bpe"])
    with pytest.raises(UserError, match="a: unexpected argument; name files before the options"):
        parse(["text", "b", "--seed=1", "a"])
    with pytest.raises(UserError, match="--tokenizer=bpe: is trained on text"):
        prepare(["from-bin", "a", "--tokenizer=bpe"])
    for argv in (
        ["python-stdlib", "--vocab_size=500"],
        ["python-stdlib", "--vocab_size=2048"],  # the default of --tokenizer=bpe
        ["repeats", "--val_fraction=0"],
        ["repeats", "--processes=0"],
        ["python-stdlib", "--repeat=0.95"],
    ):
        with pytest.raises(UserError, match=argv[1]):
            parse(argv)


@pytest.mark.parametrize(
    "argv", [["repeats", "--rows=20", "--seed=3"], ["text", "README.md", "--field=a", "--tokenizer=bytes"]]
)
def test_values_follow_an_equals_sign_or_a_space(argv):
    spaced = [part for arg in argv for part in arg.split("=")]
    assert len(spaced) > len(argv) and parse(spaced) == parse(argv)


def test_out_defaults_to_the_project_and_may_not_lie_in_the_text(tmp_path):
    assert parse(["repeats"])[1] == ROOT / "data/repeats"
    for out in (tmp_path, tmp_path / "bins"):
        with pytest.raises(UserError, match="which is read as text"):
            parse(["text", str(tmp_path), f"--out={out}"])


def test_data_bins_reports_a_damaged_config_of_a_run_in_one_line(tmp_path):
    for text in ("{", "[1]", '{"dim": "wide"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError):
            batch(tmp_path, 1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--step=100000000000000000000: the run has"):
        batch(tmp_path, 10**20)


def test_mistakes_are_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for argv in (
        ["text", tmp_path / "nowhere", f"--out={tmp_path / 'out'}"],
        ["repeats", "--alphabet=many"],
        ["repeats", "--rows=200", f"--out={tmp_path / 'file'}"],
    ):
        done = run(*argv)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_help_states_each_default():
    done = run("repeats", "--help")
    assert done.returncode == 0
    options = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(options) == 10 and done.stdout.count("(default:") == 10


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch):
    def interrupted():
        yield from itertools.repeat(Document("a", "text"), 100)
        raise KeyboardInterrupt

    def source():
        """A source that is interrupted."""
        return [Part("a", numbered(interrupted), 0)]

    monkeypatch.setitem(sources.SOURCES, "python-stdlib", source)
    with pytest.raises(KeyboardInterrupt):
        prepare(["python-stdlib", f"--out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["one process", "workers start", "workers encode"])
def test_ctrl_c_is_one_line_and_status_130(tmp_path, moment):
    command = [sys.executable, "-u", "-m", "data.prepare", "repeats", "--rows=10000000", f"--out={tmp_path / 'out'}"]
    command.append(f"--processes={1 if moment == 'one process' else 2}")
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert child.stdout.read(1)  # the progress bar
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")  # the workers, and what multiprocessing starts for itself
    while moment == "workers start" and len(children.read_text().split()) < 3:
        time.sleep(0.001)
    encoded = tmp_path / "out/.partial/train.bin"
    while moment == "workers encode" and not (encoded.exists() and encoded.stat().st_size):
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal sends it
    _, error = child.communicate(timeout=60)
    assert (child.returncode, error.decode()) == (130, "interrupted; run the same command again to resume\n")
    assert not (tmp_path / "out/train.bin").exists()


@pytest.mark.parametrize(("rows", "size"), [(2000, 2**18), (20, 2**11)], ids=["while writing", "while flushing"])
def test_a_full_disk_is_one_line_and_status_4(tmp_path, rows, size):
    arguments = ["repeats", f"--rows={rows}", "--val_fraction=0.3", f"--out={tmp_path / 'out'}"]
    full = run(*arguments, first=lambda: no_file_beyond(size))
    last = f"{tmp_path / 'out/.partial/train.bin'}: File too large; make room, then run the same command again"
    assert (full.returncode, full.stderr.splitlines()) == (4, [last])
    assert run(*arguments).returncode == 0


KILLED = """
import os, signal, sys
from data import encode, prepare, writer
encode.BATCH, writer.SAVE_SECONDS, left = 2000, 0, int(sys.argv[1])
save = writer.Writer.save
def save_and_die(self, state):
    global left
    if not state or left % 2:  # half of the deaths come between the bins and their journal
        save(self, state)
    if not state:  # a tokenizer was trained
        return
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if left % 2 == 0:
        save(self, state)
writer.Writer.save = save_and_die
prepare.prepare(sys.argv[2:])
"""


@pytest.mark.parametrize("options", [["--tokenizer=bytes", "--repeat=0.1"], ["--tokenizer=bpe", "--vocab_size=300"]])
def test_a_prepare_killed_repeatedly_gives_the_bytes_of_an_uninterrupted_one(folder, tmp_path, options, capsys):
    lines = [json.dumps({"text": f"line {i} 🙂" * (i % 50)}) for i in range(400)]
    (folder / "lines.jsonl").write_text("\n".join([*lines, "not json"]))
    argv = ["text", str(folder), "--val_fraction=0.2", *options]
    whole = prepare([*argv, f"--out={tmp_path / 'whole'}"])
    for left in (3, 1, 4, 7):
        command = [sys.executable, "-c", KILLED, str(left), *argv, f"--out={tmp_path / 'killed'}"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed/train.bin").exists()
    capsys.readouterr()
    killed = prepare([*argv, f"--out={tmp_path / 'killed'}"])
    said = capsys.readouterr().out
    assert "resuming after" in said and "training a bpe" not in said
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_source_that_changed_under_an_unfinished_dataset_is_not_appended_to_it(folder, tmp_path):
    argv = ["text", str(folder), "--val_fraction=0.2", f"--out={tmp_path / 'out'}"]
    subprocess.run([sys.executable, "-c", KILLED, "5", *argv], cwd=ROOT, capture_output=True)
    text = (folder / "0.txt").read_bytes()
    (folder / "0.txt").write_bytes(text.upper())  # of the same size
    with pytest.raises(UserError, match="its source has changed since; remove that folder"):
        prepare(argv)


def test_a_tokenizer_that_changed_under_an_unfinished_dataset_is_not_mixed_with_it(folder, tmp_path):
    file = tmp_path / "ranks.tiktoken"
    file.write_bytes(GPT)
    argv = ["text", str(folder), "--val_fraction=0.2", f"--tokenizer={file}", f"--out={tmp_path / 'out'}"]
    subprocess.run([sys.executable, "-c", KILLED, "5", *argv], cwd=ROOT, capture_output=True)
    assert (tmp_path / "out/.partial/journal.json").exists()
    file.write_bytes(ranks(TOKENS[:-1]))
    with pytest.raises(UserError, match="an unfinished dataset of other arguments"):
        prepare(argv)


def test_a_dataset_that_another_process_completed_meanwhile_is_not_written_over(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = ["text", str(folder), "--val_fraction=0.2", f"--out={out}"]
    made = []

    def slow(paths, field="text"):
        """Lists its files slowly."""
        if not made:
            made.append(True)
            prepare(first)
        return listed(paths, field)

    listed = sources.SOURCES["text"]
    monkeypatch.setitem(sources.SOURCES, "text", slow)
    with pytest.raises(UserError, match="made with other arguments"):
        prepare(["text", str(folder), "--val_fraction=0.3", f"--out={out}"])
    assert load_meta(out)["source"]["arguments"]["val_fraction"] == 0.2


def test_any_number_of_processes_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 5000)
    argv = ["text", str(folder), "--val_fraction=0.2", "--tokenizer=bpe", "--vocab_size=300", "--repeat=0.1"]
    found = [prepare([*argv, f"--processes={n}", f"--out={tmp_path / str(n)}"]) for n in (1, 2, 3)]
    one, *others = ({p.name: p.read_bytes() for p in out.iterdir()} for out in found)
    assert others == [one] * 2


def repeated(ids, bos, n=12):
    """The share of tokens that end n tokens which stand earlier in the same document."""
    count = 0
    for document in np.split(ids, np.flatnonzero(ids == bos)[1:]):
        seen = set()
        for i in range(n, len(document) + 1):
            gram = document[i - n : i].tobytes()
            count += gram in seen
            seen.add(gram)
    return count / len(ids)


@pytest.mark.parametrize("processes", [1, 2])
def test_repeat_adds_the_share_asked_for_to_the_training_text_and_records_it(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(encode, "BATCH", 20_000)
    rng = np.random.default_rng(0)
    for i in range(60):  # text without repetition of its own
        (tmp_path / f"{i}.txt").write_bytes(bytes(rng.integers(33, 127, size=8000, dtype=np.uint8)))
    argv = ["text", *map(str, tmp_path.glob("*.txt")), "--val_fraction=0.2", f"--processes={processes}"]
    plain = prepare([*argv, f"--out={tmp_path / 'plain'}"])
    out = prepare([*argv, "--repeat=0.08", f"--out={tmp_path / 'out'}"])
    train, before = (np.fromfile(folder / "train.bin", "<u2") for folder in (out, plain))
    meta = load_meta(out)["repeat"]
    assert meta["tokens"] == len(train) - len(before) and meta["share"] == meta["tokens"] / len(train)
    assert 0.07 < meta["share"] < 0.09 and repeated(before, 256) == 0
    mean = 60  # tokens in a copy, of which the first 11 end no 12 tokens seen before
    assert 0.9 < repeated(train, 256) / (meta["share"] * (mean - 11) / mean) < 1.1
    assert (out / "val.bin").read_bytes() == (plain / "val.bin").read_bytes()
    assert "repeat" not in load_meta(plain) and "repeat" not in load_meta(plain)["source"]["arguments"]
    assert load_meta(out)["counts"] == np.bincount(train, minlength=257).tolist()


def test_what_is_left_out_is_reported_and_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50))
    path.write_bytes(
        good.encode() + b'not json\n{"body": 1}\n{"text": "\xff"}\n{"text": ""}\n{"text": "\\ud800"}\n' + good.encode()
    )
    out = prepare(["text", str(path), "--val_fraction=0.2", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    assert load_meta(out)["dropped"] == {"empty": 1, "undecodable": 2, "not JSON": 1, "without text": 1}
    assert f"left out: 2 documents undecodable, the first {path}:53" in said
    found = documents(out)
    assert sorted(found["train"] + found["val"]) == sorted([f"text {i}" for i in range(50)] * 2)


def test_a_tokenizer_is_trained_on_the_beginning_of_a_large_source_each_group_by_its_quota(monkeypatch):
    def part(name, group, quota):
        return Part(name, numbered(lambda: (Document("", name * 100) for _ in itertools.count())), None, group, quota)

    monkeypatch.setattr("data.prepare.BPE_CHARS", 40_000)
    read = list(training_texts([part("a", "x", 10_000), part("b", "x", 10_000), part("c", "y", 30_000)]))
    assert Counter(text[0] for text in read) == {"a": 100, "c": 300}
    read = list(training_texts([part("a", "x", 100), part("c", "y", 300)]))  # --tokens=400: 20 characters for each
    assert Counter(text[0] for text in read) == {"a": 20, "c": 60}


def test_a_tokenizer_that_changed_under_a_dataset_is_seen(folder, tmp_path):
    text = ["text", str(folder), "--val_fraction=0.2"]
    first, second = (prepare([*text, "--tokenizer=bpe", f"--vocab_size={n}", f"--out={tmp_path / str(n)}"]) for n in (300, 304))
    model = tmp_path / "t.model"
    model.write_bytes((first / "tokenizer.model").read_bytes())
    argv = [*text, f"--tokenizer={model}", f"--out={tmp_path / 'out'}"]
    out = prepare(argv)
    for split in SPLITS:
        assert (out / f"{split}.bin").read_bytes() == (first / f"{split}.bin").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == model.read_bytes() and prepare(argv) == out
    model.write_bytes((second / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="made with another .*t.model"):
        prepare(argv)


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path, bpe):
    """The options of each tokenizer."""
    if request.param in ("bytes", "bpe"):
        return [f"--tokenizer={request.param}", *["--vocab_size=400"] * (request.param == "bpe")]
    name, data = ("t.model", bpe) if request.param == "sentencepiece" else ("t.tiktoken", GPT)
    (tmp_path / name).write_bytes(data)
    return [f"--tokenizer={tmp_path / name}"]


def test_the_bins_decode_to_the_documents_and_what_does_not_is_counted(tmp_path, tokenizer, capsys):
    texts = [text for text in NASTY if text] + [f"{i} \u2581 a block that sentencepiece takes for a space" for i in range(3)]
    lines = [{"text": f"{i} {text} {text}"} for i in range(20) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = prepare(["text", str(tmp_path / "a.jsonl"), "--val_fraction=0.2", f"--out={tmp_path / 'out'}", *tokenizer])
    found, altered = sum(documents(out).values(), []), load_meta(out)["altered"]
    blocks = 0 if load_tokenizer(out).kind != "sentencepiece" else 60
    assert altered == ({"holds U+2581, which becomes a space": 60} if blocks else {})
    assert sorted(found) == sorted(line["text"].replace("\u2581", " " if blocks else "\u2581") for line in lines)
    assert ("note: 60 documents do not decode to their text" in capsys.readouterr().out) == bool(blocks)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "tiktoken"])
@repeatable
@given(texts=st.lists(ANY_TEXT, max_size=20))
def test_whatever_the_documents_encoding_keeps_each_or_counts_it(bpe, kind, texts):
    kinds = {"bytes": Bytes, "sentencepiece": lambda: SentencePiece(bpe), "tiktoken": lambda: Tiktoken(GPT)}
    tokenizer = kinds[kind]()
    out = encode.encode(tokenizer, [Document(str(i), text) for i, text in enumerate(texts)], encode.Settings(0.5))
    found = [
        tokenizer.decode(part[1:])
        for ids in out.ids.values()
        for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos))[1:]
    ]
    kept = [text for text in texts if text]
    lost = [text for text in kept if "\u2581" in text and kind == "sentencepiece"]
    assert sum(out.counts["altered"].values()) == len(lost) and out.counts["dropped"]["empty"] == len(texts) - len(kept)
    assert sorted(found) == sorted(text.replace("\u2581", " ") if text in lost else text for text in kept)


@pytest.mark.soak
def test_a_source_larger_than_its_memory_is_prepared(tmp_path):
    """3 processes with at most 256 MiB of data each, where the source has 1 GB."""
    path, line = tmp_path / "a.jsonl", json.dumps({"text": "a document of some length " * 400}) + "\n"
    with open(path, "w") as file:
        for i in range(10**9 // len(line)):
            file.write(line.replace("some", str(i)))
    command = [sys.executable, "-m", "data.prepare", "text", str(path), f"--out={tmp_path / 'out'}", "--processes=2"]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**28, 2**28))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **limit)
    assert done.returncode == 0, done
    assert sum(split["docs"] for split in load_meta(tmp_path / "out")["splits"].values()) == 10**9 // len(line)
