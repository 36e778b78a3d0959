import base64
import hashlib
import io
import itertools
import json
import re
import sys
import unittest.mock

import numpy as np
import pytest
import sentencepiece
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.tokenizer
import data.tokenizer_kinds as kinds
from data.meta import load_meta
from data.tokenizer import get_tokenizer, load_tokenizer, tokenizer_from_state, tokenizer_to_meta, train_bpe
from data.tokenizer_json import TokenizerJson
from data.tokenizer_kinds import GPT2_PATTERN, HEX, Bytes, Chars, Ids, SentencePiece, Tiktoken, _pieces
from data.writer import Writer
from errors import UserError

NASTY = [
    "", " ", "  x  ", "a\tb\r\nc\n\n    d", " " * 50, "\n" * 20, "x" * 500, "\0\x01\x7f", "🙂👩‍👩‍👧",
    "مرحبا بالعالم", "你好，世界", "<s></s><unk><0x41>", "\ufeffé e\u0301", "\u2028\x0b\x0c\x85", "﷽ﬁ①½", "\U0010ffff",
    "\u2585", "0123 4567", "    def f(x):\n\treturn x",
    "<|endoftext|>", "a<|endoftext|>b", "I'll SHE'LL", " \ufffd", "⁇",
]  # fmt: skip
MERGES = ["  ", "    ", "\n\n", "th", "the", " the", "in", "ing", " d", " de", " def", "xx", "你", "\u0301", "12", "ab"]

# Any text that UTF-8 can hold, with what tokenizers trip on more often than by chance. Surrogates are no text.
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY + ["\u2581"])).map("".join)
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@pytest.fixture(scope="module")
def model(corpus):
    """Trains as Llama's tokenizer was trained, but for the options given, and returns the bytes of the .model."""

    def train(**options):
        file = io.BytesIO()
        llama = dict(model_type="bpe", vocab_size=500, normalization_rule_name="identity", remove_extra_whitespaces=False)
        llama |= dict(split_digits=True, byte_fallback=True, required_chars=HEX, num_threads=1, minloglevel=2)
        lines = iter("\n".join([*corpus, *HEX]).split("\n"))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **llama | options)
        return file.getvalue()

    return train


@pytest.fixture(scope="module")
def llama(model):
    return SentencePiece(model())


def ranks(tokens, ids=None) -> bytes:
    """A ranks file; the ids count from 0 unless given."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), i) for t, i in zip(tokens, ids or range(len(tokens)), strict=True))


TOKENS = [bytes([b]) for b in range(256)] + [merge.encode() for merge in MERGES if len(merge.encode()) == 2]
TOKENS += ["你".encode()[:2]] + [merge.encode() for merge in MERGES if len(merge.encode()) > 2]


@pytest.fixture(scope="module", params=["bytes", "chars", "many chars", "sentencepiece", "llama", "tiktoken"])
def tokenizer(request):
    if request.param == "sentencepiece":
        return SentencePiece(request.getfixturevalue("bpe"))
    if request.param == "llama":
        return request.getfixturevalue("llama")
    if request.param == "tiktoken":
        return Tiktoken(ranks(TOKENS))
    return {"bytes": Bytes(), "chars": Chars(64), "many chars": Chars(20000)}[request.param]


def texts(tokenizer):
    return ["", "text to go on with", tokenizer.alphabet] if tokenizer.kind == "chars" else NASTY


def test_decode_undoes_encode(tokenizer):
    for text in texts(tokenizer):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.size and i not in tokenizer.special for i in ids), text
        assert tokenizer.decode(ids) == text


@repeatable
@given(text=ANY_TEXT, places=st.lists(st.integers(0, 10**9)))
def test_decode_undoes_encode_of_any_text(tokenizer, text, places):
    if tokenizer.kind == "chars":
        text = "".join(tokenizer.alphabet[i % len(tokenizer.alphabet)] for i in places)
    ids = tokenizer.encode(text)
    assert tokenizer.lossless and all(0 <= i < tokenizer.size and i not in tokenizer.special for i in ids)
    if tokenizer.kind == "sentencepiece":
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    else:
        assert tokenizer.decode(ids) == text and tokenizer.altered(text, ids) is None


@pytest.fixture(scope="module", params=["bpe", "llama", "unigram", "across lines", "normalised"])
def sp(request, model):
    if request.param in ("bpe", "llama"):
        return SentencePiece(request.getfixturevalue("bpe")) if request.param == "bpe" else request.getfixturevalue("llama")
    options = {
        "llama": {},
        "unigram": dict(model_type="unigram"),
        "across lines": dict(user_defined_symbols=["a\nb", "\n\n"]),
        "normalised": dict(normalization_rule_name="nmt_nfkc"),
    }
    return SentencePiece(model(**options[request.param]))


@repeatable
@given(text=ANY_TEXT, words=st.lists(st.sampled_from(["\n", "\n\n", " the", "th", "a", "b", "    ", "\r\n", "你", "12", "\t"])))
def test_encoding_between_line_ends_gives_the_ids_of_the_whole(sp, text, words):
    with unittest.mock.patch.object(kinds, "LINES_CHARS", 2):
        for whole in (text, "".join(words), "".join(words) + text + "".join(words)):
            assert sp.encode(whole) == sp.sp.encode(whole)


def test_text_is_cut_for_models_of_bpe_alone_that_keep_lines_apart(sp, request):
    cuts = {"bpe": 0, "llama": 1, "unigram": None, "across lines": None, "normalised": None}
    assert sp._dummies == cuts[request.node.callspec.params["sp"]]


def test_decode_skips_special_ids_and_ids_that_only_a_padded_model_has(tokenizer):
    ids = list(tokenizer.encode("abc"))
    assert (
        tokenizer.decode([tokenizer.bos, *ids[:1], *tokenizer.special, tokenizer.size, 65535, *ids[1:], tokenizer.bos]) == "abc"
    )


def test_bos_is_special_and_inside_the_vocabulary(tokenizer):
    assert tokenizer.bos in tokenizer.special and max(tokenizer.special) < tokenizer.size


def test_state_is_plain_and_makes_the_same_vocabulary(tokenizer):
    assert all(type(value) in (str, int, bytes) for value in tokenizer.state().values())
    again = tokenizer_from_state(tokenizer.state())
    assert (again.kind, again.size, again.bos, again.eos) == (tokenizer.kind, tokenizer.size, tokenizer.bos, tokenizer.eos)
    assert again.special == tokenizer.special and again.hex_ids() == tokenizer.hex_ids()
    for text in texts(tokenizer):
        assert list(again.encode(text)) == list(tokenizer.encode(text))


def test_hex_ids_are_the_sixteen_characters(tokenizer):
    ids = tokenizer.hex_ids()
    assert len(set(ids)) == 16 and not tokenizer.special & set(ids)
    assert [tokenizer.decode([i]) for i in ids] == list("0123456789abcdef")


def test_hex_ids_are_none_where_a_character_is_no_token():
    assert Chars(61).hex_ids() is None  # a-z A-Z 0-8
    assert Chars(62).hex_ids() is not None
    assert Ids(50257).hex_ids() is None


def test_bytes_are_utf8_and_broken_utf8_is_shown():
    assert list(Bytes().encode("é")) == [0xC3, 0xA9]
    assert Bytes().decode([0xC3, 256, 65]) == "\ufffdA"


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"character '!' is not in the alphabet of 64"):
        Chars(64).encode("no!")
    for size in (0, 30000):
        with pytest.raises(UserError, match=f"--alphabet={size}"):
            Chars(size)


def test_ids_have_no_text():
    ids = tokenizer_from_state(Ids(50257).state())
    assert (ids.size, ids.bos, ids.special) == (50257, None, set())
    assert ids.decode([3, 50256]) == "3 50256"
    with pytest.raises(UserError, match="no tokenizer"):
        ids.encode("text")


def test_llamas_space_before_a_document_is_added_once_and_removed_by_decoding(llama):
    assert (llama.size, llama.sp.unk_id(), llama.bos, llama.eos, llama.special) == (500, 0, 1, 2, {0, 1, 2})
    pieces = [llama.sp.id_to_piece(i) for i in llama.encode("in\nb c\n d")]
    assert pieces[0][0] == "\u2581" and "".join(pieces).count("\u2581") == 1 + "in\nb c\n d".count(" ")
    for text in ("", " ", "  x", "x", " x ", "\n x"):
        assert llama.decode(llama.encode(text)) == text
        assert llama.decode([llama.bos, *llama.encode(text), llama.eos]) == text


MODELS = {
    "llama": ({}, True, set()),
    "no prefix": ({"add_dummy_prefix": False}, True, set()),
    "no bytes": ({"byte_fallback": False, "vocab_size": 300}, True, {"holds characters that the model lacks"}),
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"}, False, {"changed by the model's normaliser"}),
    "nfkc_cf": ({"normalization_rule_name": "nfkc_cf"}, False, {"changed by the model's normaliser"}),
    "spaces": ({"remove_extra_whitespaces": True}, False, {"changed by the model's normaliser"}),
    "suffix": ({"treat_whitespace_as_suffix": True}, False, {"changed by the model's normaliser"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_altered_is_none_exactly_where_the_text_comes_back(model, name):
    options, lossless, reasons = MODELS[name]
    tokenizer, seen = SentencePiece(model(**options)), set()
    assert tokenizer.lossless == lossless

    @repeatable
    @given(text=ANY_TEXT | st.text("ab in", max_size=5))
    def law(text):
        ids = tokenizer.encode(text)
        why = tokenizer.altered(text, ids)
        assert (why is None) == (tokenizer.decode(ids) == text)
        seen.add(why)

    law()
    assert seen == reasons | {None, "holds U+2581, which becomes a space"}


def test_tiktokens_endoftext_is_the_id_left_free_and_never_comes_of_text():
    tokenizer = Tiktoken(ranks(TOKENS))
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (len(TOKENS) + 1, len(TOKENS), None)
    assert tokenizer.bos not in tokenizer.encode("<|endoftext|>")
    assert list(tokenizer.encode("    the你 def")) == [TOKENS.index(t.encode()) for t in ["  ", " ", " the", "你", " def"]]
    ids = [*range(258), *range(259, len(TOKENS) + 1)]  # as p50k_base has it
    gap = Tiktoken(ranks(TOKENS, ids))
    assert (gap.size, gap.bos) == (len(TOKENS) + 1, 258) and gap.decode([258, *gap.encode("the 你")]) == "the 你"


def test_tiktoken_shows_broken_utf8():
    tokenizer = Tiktoken(ranks(TOKENS))
    assert tokenizer.decode([0xC3, tokenizer.bos, 65]) == "\ufffdA"


def test_tiktoken_encodes_what_overflows_its_pattern():
    tokenizer = Tiktoken(ranks(TOKENS))
    for text in ("x" * 1_000_000, " " * 1_000_000 + "x", "\n" * 1_000_000 + "x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@repeatable
@given(text=st.text("thex'd1 \n\u3000", min_size=20))
def test_text_cut_into_pieces_has_the_ids_of_the_whole(text):
    tokenizer = Tiktoken(ranks(TOKENS))
    whole = list(tokenizer.encode(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "GPT2_CHARS", 12)
        pieces = list(_pieces(text))
        assert "".join(pieces) == text and all(0 < len(piece) <= 12 for piece in pieces)
        places = [re.search(r"\S[ \n]", piece + after[0]) for piece, after in itertools.pairwise(pieces)]
        assert not all(places) or list(tokenizer.encode(text)) == whole


def test_a_file_that_is_not_a_ranks_file_is_refused():
    for lines in [
        b"nonsense",
        ranks(TOKENS) + b"==== 9\n",
        ranks(TOKENS) + b"YQ== \n",
        ranks(TOKENS) + b"YQ== 273\n",  # occurs twice
        ranks([*TOKENS, b"zz"], [*range(len(TOKENS)), 3]),
        ranks([*TOKENS, b"zz"], [*range(len(TOKENS)), 300]),  # a gap
        ranks(TOKENS[1:]),  # a byte is missing
        b"",
    ]:
        with pytest.raises(UserError, match="not a ranks file of tiktoken: ") as e:
            Tiktoken(lines)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("model", "normalizer", "said"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": ""}, None, "cannot encode this text (WordLevel error: "),
        ({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}, None, "cannot encode this text (Encountered an unknown"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}, None, "cannot encode this text (Unk token"),
        ({"type": "BPE", "vocab": {}, "merges": []}, None, "tokenizer.json has an empty vocabulary"),
        (
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": ""},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            "not a tokenizer.json that the installed tokenizers reads (Precompiled",
        ),
    ],
    ids=["WordLevel", "Unigram", "BPE", "empty", "charsmap"],
)
def test_a_tokenizer_json_that_cannot_encode_or_be_read_is_refused_in_one_line(model, normalizer, said):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: tokenizer.json cannot be read")
    parts = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
    file = {"version": "1.0", "added_tokens": [], "model": model, "normalizer": normalizer} | parts
    with pytest.raises(UserError, match=re.escape(said)) as e:
        TokenizerJson(json.dumps(file).encode()).encode("z")
    assert "\n" not in str(e.value)


def test_a_name_gives_its_tokenizer(tmp_path, bpe):
    (tmp_path / "a.model").write_bytes(bpe)
    (tmp_path / "b.tiktoken").write_bytes(ranks(TOKENS).replace(b"\n", b"\r\n"))
    assert get_tokenizer("bytes").kind == "bytes"
    assert get_tokenizer(str(tmp_path / "a.model")).state() == {"kind": "sentencepiece", "model": bpe}
    tokenizer = get_tokenizer(str(tmp_path / "b.tiktoken"))
    assert tokenizer.kind == "tiktoken" and list(tokenizer.encode("the")) == [TOKENS.index(b"the")]


def refused(name, match):
    with pytest.raises(UserError, match=match) as e:
        get_tokenizer(str(name))
    assert str(e.value).startswith(f"--tokenizer={name}: ") and "\n" not in str(e.value)


def test_a_name_of_no_tokenizer_is_refused_with_the_remedy(tmp_path, model):
    for suffix, fault in (("model", "8 bytes that are not a sentencepiece model"), ("tiktoken", "not a ranks file")):
        refused(tmp_path / f"a.{suffix}", "no such file")
        (tmp_path / f"a.{suffix}").write_bytes(b"nonsense")
        refused(tmp_path / f"a.{suffix}", fault)
    (tmp_path / "b.model").write_bytes(model(bos_id=-1))
    refused(tmp_path / "b.model", "has no bos")
    for name in ("gpt-2", "bytse", "tokenizer.txt"):
        refused(name, "expected bytes, bpe, a .model file .*, a .tiktoken file of ranks, or gpt2")


def test_more_ids_than_uint16_holds_are_refused(tmp_path):
    tokens = TOKENS[:256] + [bytes([a, b]) for a in range(256) for b in range(256)]
    for n, fits in ((65535, True), (65536, False)):
        (tmp_path / f"{n}.tiktoken").write_bytes(ranks(tokens[:n]))
        if fits:
            assert get_tokenizer(str(tmp_path / f"{n}.tiktoken")).size == 65536
        else:
            refused(tmp_path / f"{n}.tiktoken", "65,537 ids does not fit uint16")


@pytest.fixture
def encodings(monkeypatch):
    """tiktoken's encodings, by functions that return what tiktoken makes them from, in place of its own."""
    known = {}
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", known)
    return known


def encoding(pat_str=GPT2_PATTERN, **special):
    tokens = {token: i for i, token in enumerate(TOKENS)}
    special = {"<|endoftext|>": len(TOKENS)} | special
    return {"name": "any", "pat_str": pat_str, "mergeable_ranks": tokens, "special_tokens": special}


def test_an_encoding_of_tiktoken_keeps_its_ids_and_needs_no_network_again(encodings, monkeypatch):
    encodings["gpt2"] = encoding
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.model == ranks(TOKENS) and tokenizer.bos == len(TOKENS)
    for text in NASTY:
        assert list(tokenizer.encode(text)) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    encodings.clear()
    assert tokenizer_from_state(tokenizer.state()).decode(tokenizer.encode("the 你")) == "the 你"


@pytest.mark.parametrize("name", ["p50k_edit", "cl100k_base", "o200k_base"])
def test_an_encoding_that_is_not_gpt2s_kind_is_refused(name):
    refused(name, "expected bytes, .*gpt2, r50k_base, p50k_base")


def test_the_encodings_on_offer_split_text_as_gpt2_does_and_have_one_special_token(monkeypatch):
    """Those of tiktoken itself, with its own small vocabularies in place of the ones it would download."""
    plugin = pytest.importorskip("tiktoken_ext.openai_public", reason="this tiktoken has no encodings of its own")
    monkeypatch.setattr(plugin, "data_gym_to_mergeable_bpe_ranks", lambda **_: {t: i for i, t in enumerate(TOKENS)})
    monkeypatch.setattr(plugin, "load_tiktoken_bpe", lambda *_, **__: {t: i for i, t in enumerate(TOKENS)})
    for name in ("gpt2", "r50k_base", "p50k_base"):
        made = getattr(plugin, name)()
        assert made["pat_str"] == GPT2_PATTERN and list(made["special_tokens"]) == ["<|endoftext|>"]


def test_without_network_the_remedy_is_named(monkeypatch, encodings, tmp_path):
    def fails(_):
        raise ConnectionError("HTTPSConnectionPool(host='somewhere', port=443):\n" + "no route " * 100)

    encodings["gpt2"] = sys.modules["tiktoken_ext.openai_public"].gpt2
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", fails)
    refused("gpt2", r"cannot download it \(ConnectionError: HTTPS.*r50k_base.tiktoken\), and pass --tokenizer=FILE.tiktoken")


def prepared(folder, tokenizer):
    entries, files = tokenizer_to_meta(tokenizer)
    with Writer(folder, tokenizer.size) as writer:
        writer.commit(json.loads(json.dumps(entries)), files)
    return folder


def test_a_prepared_folder_gives_its_vocabulary_back(tokenizer, tmp_path):
    files = {"sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}
    assert list(tokenizer_to_meta(tokenizer)[1]) == ([files[tokenizer.kind]] if tokenizer.kind in files else [])
    state = load_tokenizer(prepared(tmp_path, tokenizer)).state()
    assert state | {"counts": None} == tokenizer.state() | {"counts": None}


def test_a_folder_without_meta_gives_ids(tmp_path):
    assert load_tokenizer(tmp_path, 50257).state() == {"kind": "ids", "size": 50257}


def test_a_tokenizer_that_is_missing_or_another_one_is_refused(tmp_path, bpe):
    model = prepared(tmp_path, SentencePiece(bpe)) / "tokenizer.model"
    model.write_bytes(bpe[:-1] + b"?")
    with pytest.raises(UserError, match=hashlib.sha256(bpe).hexdigest()):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(UserError, match="tokenizer.model: no such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a sentencepiece model"):
        SentencePiece(b"nonsense")
    with pytest.raises(UserError, match="'morse'"):
        tokenizer_from_state({"kind": "morse"})


def test_counts_travel_with_the_tokenizer_and_are_none_where_unknown(tokenizer, tmp_path):
    assert tokenizer.counts is None and "counts" not in tokenizer.state()
    entries, files = tokenizer_to_meta(tokenizer)
    with Writer(tmp_path, tokenizer.size) as writer:
        writer.add("train", [5, 0, 5, tokenizer.bos])
        writer.add("val", [1, 5])
        writer.commit(json.loads(json.dumps(entries)), files)
    counted = load_tokenizer(tmp_path)
    expected = np.bincount([5, 0, 5, tokenizer.bos], minlength=tokenizer.size)
    assert counted.counts.dtype == np.int64 and np.array_equal(counted.counts, expected)
    torch.save(counted.state(), tmp_path / "state.pt")
    again = tokenizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert np.array_equal(again.counts, expected) and again.state() == counted.state() != tokenizer.state()
    assert tokenizer_to_meta(counted) == tokenizer_to_meta(tokenizer)
    for wrong in ([], [1], "x", 7, [*expected.tolist()[:-1], 0.5], [-1, *expected.tolist()[1:]]):
        with pytest.raises(UserError, match="counts cannot be read"):
            tokenizer_from_state(counted.state() | {"counts": wrong})


def test_a_folder_prepared_before_ids_were_counted_loads_without_counts(tmp_path):
    prepared(tmp_path, Bytes())
    meta = load_meta(tmp_path)
    del meta["counts"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert load_tokenizer(tmp_path).counts is None and load_tokenizer(tmp_path).state() == {"kind": "bytes"}
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"counts": [1, 2]}))
    with pytest.raises(UserError, match="counts cannot be read"):
        load_tokenizer(tmp_path)


def test_bpe_is_deterministic_and_has_the_size_asked_for(corpus, bpe):
    tokenizer = SentencePiece(bpe)
    assert train_bpe(iter(corpus), 500) == bpe
    assert train_bpe(reversed(corpus), 500) == bpe
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.special) == (500, 1, 2, {0, 1, 2})


def test_bpe_merges_words_and_indentation_and_splits_digits(corpus, bpe):
    tokenizer = SentencePiece(bpe)
    assert len(tokenizer.encode(corpus[0])) < len(corpus[0]) / 1.5
    assert len(tokenizer.encode("        ")) < 4
    assert len(tokenizer.encode("1234")) == 4


def test_impossible_bpe_sizes_are_refused_with_the_bound(corpus):
    for size in (299, 65537):
        with pytest.raises(UserError, match=f"--vocab_size={size}: .* 300 to 65536"):
            train_bpe(corpus, size)
    with pytest.raises(UserError, match=r"--vocab_size=9000: this text allows at most \d+ ids") as e:
        train_bpe(corpus, 9000)
    most = int(re.search(r"pass --vocab_size=(\d+)", str(e.value))[1])
    assert SentencePiece(train_bpe(corpus, most)).size == most
    with pytest.raises(UserError, match="--vocab_size=2048: there is too little text for a bpe; pass --tokenizer=bytes"):
        train_bpe(["ab ab"], 2048)
    with pytest.raises(UserError, match=r"--vocab_size=400: .* 400 vs \d+"):
        train_bpe(["".join(chr(0x4E00 + i) for i in range(1000))], 400)
    for nothing in ([], ["", "\n\n"]):
        with pytest.raises(UserError, match="no text"):
            train_bpe(nothing, 400)


def test_the_sample_is_bounded_spread_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(data.tokenizer, "SAMPLE_BYTES", 50 * 1000)
    monkeypatch.setattr(data.tokenizer, "PIECE_CHARS", 1000)
    whole = [f"{i:04d}" * 500 for i in range(200)]  # two pieces of 1000 bytes each
    sample = data.tokenizer._sample(whole)
    assert sum(map(len, sample)) == 50 * 1000 and sample == data.tokenizer._sample(reversed(whole))
    places = [int(piece[:4]) for piece in sample]
    assert min(places) < 40 and max(places) >= 160
