import hashlib
import json
import random

import pytest

from data import vocab
from data.bins import DataError, Writer

NASTY = [
    "", " ", "  x  ", "a\tb\r\nc\n\n    d", " " * 50, "\n" * 20, "x" * 500, "\0\x01\x7f", "🙂👩‍👩‍👧",
    "مرحبا بالعالم", "你好，世界", "<s></s><unk><0x41>", "\ufeffé e\u0301", "\u2028\x0b\x0c\x85", "﷽ﬁ①½", "\U0010ffff",
    "\u2585", "0123 4567", "    def f(x):\n\treturn x",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    words = [("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))) for _ in range(200)]
    return ["\n".join("    " * rng.randint(0, 3) + " ".join(rng.choices(words, k=8)) for _ in range(40)) for _ in range(20)]


@pytest.fixture(scope="module")
def bpe(corpus):
    return vocab.train_bpe(corpus, 500)


@pytest.fixture(params=["bytes", "chars", "many chars", "sentencepiece"])
def words(request):
    if request.param == "sentencepiece":
        return vocab.SentencePiece(request.getfixturevalue("bpe"))
    return {"bytes": vocab.Bytes(), "chars": vocab.Chars(64), "many chars": vocab.Chars(20000)}[request.param]


def texts(words):
    return ["", "text to go on with", words.alphabet] if words.kind == "chars" else NASTY


def test_decode_undoes_encode(words):
    for text in texts(words):
        ids = words.encode(text)
        assert all(0 <= i < words.size and i not in words.special for i in ids), text
        assert words.decode(ids) == text


def test_decode_skips_special_ids_and_ids_that_only_a_padded_model_has(words):
    ids = list(words.encode("abc"))
    assert words.decode([words.bos, *ids[:1], *words.special, words.size, 65535, *ids[1:], words.bos]) == "abc"


def test_bos_is_special_and_inside_the_vocabulary(words):
    assert words.bos in words.special and max(words.special) < words.size


def test_state_is_plain_and_makes_the_same_vocabulary(words):
    assert all(type(value) in (str, int, bytes) for value in words.state().values())
    again = vocab.from_state(words.state())
    assert (again.kind, again.size, again.bos, again.eos) == (words.kind, words.size, words.bos, words.eos)
    assert again.special == words.special and again.hex_ids() == words.hex_ids()
    for text in texts(words):
        assert list(again.encode(text)) == list(words.encode(text))


def test_hex_ids_are_the_sixteen_characters(words):
    ids = words.hex_ids()
    assert len(set(ids)) == 16 and not words.special & set(ids)
    assert [words.decode([i]) for i in ids] == list("0123456789abcdef")


def test_hex_ids_are_none_where_a_character_is_no_token():
    assert vocab.Chars(61).hex_ids() is None  # a-z A-Z 0-8
    assert vocab.Chars(62).hex_ids() is not None
    assert vocab.Ids(50257).hex_ids() is None


def test_bytes_are_utf8_and_broken_utf8_is_shown():
    assert list(vocab.Bytes().encode("é")) == [0xC3, 0xA9]
    assert vocab.Bytes().decode([0xC3, 256, 65]) == "\ufffdA"


def test_an_unknown_character_is_named():
    with pytest.raises(DataError, match=r"character '!' is not in the alphabet of 64"):
        vocab.Chars(64).encode("no!")
    for size in (0, 30000):
        with pytest.raises(DataError, match=f"--alphabet={size}"):
            vocab.Chars(size)


def test_ids_have_no_text():
    ids = vocab.from_state(vocab.Ids(50257).state())
    assert (ids.size, ids.bos, ids.special) == (50257, None, set())
    assert ids.decode([3, 50256]) == "3 50256"
    with pytest.raises(DataError, match="no tokenizer"):
        ids.encode("text")


def test_bpe_is_deterministic_and_has_the_size_asked_for(corpus, bpe):
    words = vocab.SentencePiece(bpe)
    assert vocab.train_bpe(iter(corpus), 500) == bpe
    assert vocab.train_bpe(reversed(corpus), 500) == bpe
    assert (words.size, words.bos, words.eos, words.special) == (500, 1, 2, {0, 1, 2})


def test_bpe_merges_words_and_indentation_and_splits_digits(corpus, bpe):
    words = vocab.SentencePiece(bpe)
    assert len(words.encode(corpus[0])) < len(corpus[0]) / 1.5
    assert len(words.encode("        ")) < 4
    assert len(words.encode("1234")) == 4


def test_bpe_sizes_that_cannot_be_are_refused_with_the_bound(corpus):
    for size in (299, 65537):
        with pytest.raises(DataError, match=f"--vocab_size={size}: .* 300 to 65536"):
            vocab.train_bpe(corpus, size)
    with pytest.raises(DataError, match=r"--vocab_size=9000: .* at most \d+ ids") as e:
        vocab.train_bpe(corpus, 9000)
    most = int(str(e.value).split("at most ")[1].split()[0])
    assert vocab.SentencePiece(vocab.train_bpe(corpus, most)).size == most
    with pytest.raises(DataError, match=r"--vocab_size=400: .* at least \d+ ids"):
        vocab.train_bpe(["".join(chr(0x4E00 + i) for i in range(1000))], 400)
    for nothing in ([], ["", "\n\n"]):
        with pytest.raises(DataError, match="no text"):
            vocab.train_bpe(nothing, 400)


def test_the_sample_is_bounded_spread_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(vocab, "SAMPLE_BYTES", 50 * 1000)
    monkeypatch.setattr(vocab, "PIECE_CHARS", 1000)
    whole = [f"{i:04d}" * 500 for i in range(200)]  # two pieces of 1000 bytes each
    sample = vocab._sample(whole)
    assert sum(map(len, sample)) == 50 * 1000 and sample == vocab._sample(reversed(whole))
    places = [int(piece[:4]) for piece in sample]
    assert min(places) < 40 and max(places) >= 160


def prepared(folder, words):
    entry, files = vocab.to_meta(words)
    with Writer(folder, words.size) as writer:
        writer.commit({"tokenizer": json.loads(json.dumps(entry))}, files)
    return folder


def test_a_prepared_folder_gives_its_vocabulary_back(words, tmp_path):
    assert vocab.load(prepared(tmp_path, words)).state() == words.state()


def test_a_folder_without_meta_gives_ids(tmp_path):
    assert vocab.load(tmp_path, 50257).state() == {"kind": "ids", "size": 50257}


def test_a_tokenizer_that_is_missing_or_another_one_is_refused(tmp_path, bpe):
    model = prepared(tmp_path, vocab.SentencePiece(bpe)) / "tokenizer.model"
    model.write_bytes(bpe[:-1] + b"?")
    with pytest.raises(DataError, match=hashlib.sha256(bpe).hexdigest()):
        vocab.load(tmp_path)
    model.unlink()
    with pytest.raises(DataError, match="tokenizer.model: no such file"):
        vocab.load(tmp_path)
    with pytest.raises(DataError, match="not a sentencepiece model"):
        vocab.SentencePiece(b"nonsense")
    with pytest.raises(DataError, match="'morse'"):
        vocab.from_state({"kind": "morse"})
