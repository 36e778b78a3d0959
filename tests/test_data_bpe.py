import pytest

from data import bpe as training
from data.bpe import train_bpe
from data.tokenizer import SentencePiece
from errors import UserError


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


def test_bpe_sizes_that_cannot_be_are_refused_with_the_bound(corpus):
    for size in (299, 65537):
        with pytest.raises(UserError, match=f"--vocab_size={size}: .* 300 to 65536"):
            train_bpe(corpus, size)
    with pytest.raises(UserError, match=r"--vocab_size=9000: .* at most \d+ ids") as e:
        train_bpe(corpus, 9000)
    most = int(str(e.value).split("at most ")[1].split()[0])
    assert SentencePiece(train_bpe(corpus, most)).size == most
    with pytest.raises(UserError, match=r"--vocab_size=400: .* at least \d+ ids"):
        train_bpe(["".join(chr(0x4E00 + i) for i in range(1000))], 400)
    for nothing in ([], ["", "\n\n"]):
        with pytest.raises(UserError, match="no text"):
            train_bpe(nothing, 400)


def test_the_sample_is_bounded_spread_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(training, "SAMPLE_BYTES", 50 * 1000)
    monkeypatch.setattr(training, "PIECE_CHARS", 1000)
    whole = [f"{i:04d}" * 500 for i in range(200)]  # two pieces of 1000 bytes each
    sample = training._sample(whole)
    assert sum(map(len, sample)) == 50 * 1000 and sample == training._sample(reversed(whole))
    places = [int(piece[:4]) for piece in sample]
    assert min(places) < 40 and max(places) >= 160
