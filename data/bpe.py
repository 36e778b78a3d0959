"""Trains the tokenizer that --tokenizer=bpe asks for, on a sample of the source."""

import hashlib
import heapq
import io
import re

from data.tokenizer_kinds import HEX, require
from errors import UserError

SAMPLE_BYTES = 20_000_000  # of text to train on: more changes the tokenizer little and takes longer
PIECE_CHARS = 65536  # the sample is drawn in pieces of this many characters


def train_bpe(texts, vocab_size: int) -> bytes:
    """Trains a sentencepiece BPE model on a sample of the texts (an iterable of str) and returns its .model bytes.

    The same texts give the same bytes, in any order. unk is 0, bos 1, eos 2. Decoding gives back the text that was encoded,
    except that U+2581 becomes a space: nothing is normalised, and a character without a piece becomes its UTF-8 bytes.
    """
    if not 300 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size={vocab_size}: a bpe vocabulary has 300 to 65536 ids, 259 of them bytes and specials")
    model = io.BytesIO()
    lines = [line for piece in _sample(texts) for line in piece.split("\n") if line]
    if not lines:
        raise UserError("no text to train a tokenizer on")
    try:
        require("sentencepiece").SentencePieceTrainer.train(
            # sentencepiece before 0.2.3 aborts the process on a required character that the text lacks.
            sentence_iterator=iter([*lines, *HEX]),
            max_sentence_length=4 * PIECE_CHARS,  # in bytes; a longer line would be left out
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # one piece for the indentation of a line of code
            split_digits=True,
            byte_fallback=True,
            required_chars=HEX,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        limit = re.search(r"value <= (?P<most>\d+)|\d+ vs (?P<least>\d+)", str(e))
        if not limit:
            raise
        bound = f"yields at most {limit['most']}" if limit["most"] else f"needs at least {limit['least']}"
        raise UserError(f"--vocab_size={vocab_size}: this text {bound} ids; or pass --tokenizer=bytes") from None
    return model.getvalue()


def _sample(texts) -> list[str]:
    """Returns the pieces with the lowest hashes, SAMPLE_BYTES in all: spread over all texts, whatever their order."""
    heap = []
    total = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            piece = text[start : start + PIECE_CHARS]
            data = piece.encode()
            heapq.heappush(heap, (-_hash(data), len(data), piece))  # the highest hash is at the top
            total += len(data)
            while total > SAMPLE_BYTES:
                total -= heapq.heappop(heap)[1]
    return [piece for *_, piece in sorted(heap)]


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
