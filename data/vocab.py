"""Text <-> token ids: bytes, single characters, a sentencepiece model, or ids alone.

A prepared folder names its vocabulary in meta.json (`to_meta`, `load`); a checkpoint carries the whole of it in plain
values (`state`, `from_state`), so that it turns text into ids with no other file.
"""

import hashlib
import heapq
import io
import re
import string
from pathlib import Path

import numpy as np

from data.bins import DataError, load_meta

HEX = "0123456789abcdef"
SAMPLE_BYTES = 20_000_000  # of text that a tokenizer is trained on: more changes it little and takes longer
PIECE_CHARS = 65536  # the sample is drawn in pieces of this many characters


class Vocab:
    """One interface to all kinds.

    size: how many ids there are; bos, eos: the ids that begin and end a document, or None;
    special: the ids that stand for no text. decode skips them, and ids beyond size that a padded model may draw.
    """

    kind: str
    size: int
    bos: int | None = None
    eos: int | None = None
    special: frozenset = frozenset()

    def encode(self, text: str):
        """Text -> its ids, a list or array (n,), without bos."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        raise NotImplementedError

    def state(self) -> dict:
        """Plain values, bytes among them, that from_state makes this vocabulary from."""
        return {"kind": self.kind}

    def hex_ids(self) -> list[int] | None:
        """The ids of the characters 0-9a-f, or None where one of them is no token by itself."""
        ids = [self._character(c) for c in HEX]
        return None if None in ids else ids

    def _character(self, c: str) -> int | None:
        return None

    def _text_ids(self, ids) -> list[int]:
        return [i for i in map(int, ids) if i < self.size and i not in self.special]


class Bytes(Vocab):
    """The 256 bytes of UTF-8, then bos."""

    kind, size, bos, special = "bytes", 257, 256, frozenset({256})

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(self._text_ids(ids)).decode(errors="replace")

    def _character(self, c):
        return ord(c)


class Chars(Vocab):
    """An alphabet of n characters, then bos: a-z A-Z 0-9 space and full stop first, then Chinese ones."""

    kind = "chars"
    FIRST = string.ascii_letters + string.digits + " ."
    MOST = 0xA000 - 0x4E00  # the characters of the block CJK Unified Ideographs

    def __init__(self, alphabet: int):
        n = alphabet
        if not 1 <= n <= self.MOST:
            raise DataError(f"--alphabet={n}: expected 1 to {self.MOST} characters")
        self.alphabet = self.FIRST[:n] + "".join(chr(0x4E00 + i) for i in range(len(self.FIRST), n))
        self.ids = {c: i for i, c in enumerate(self.alphabet)}
        self.bos, self.size, self.special = n, n + 1, frozenset({n})

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            shown = self.alphabet if len(self.alphabet) <= 64 else self.alphabet[:64] + "..."
            raise DataError(f"character {e.args[0]!r} is not in the alphabet of {len(self.ids)}: {shown!r}") from None

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in self._text_ids(ids))

    def state(self):
        return {"kind": self.kind, "alphabet": len(self.alphabet)}

    def _character(self, c):
        return self.ids.get(c)


class SentencePiece(Vocab):
    """A sentencepiece model, from the bytes of its .model file. Encode whole documents: many models put a space first."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model
        self.sp = _sentencepiece().SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"tokenizer of {len(model)} bytes: not a sentencepiece model") from None
        self.size = self.sp.vocab_size()
        self.bos, self.eos = (i if i >= 0 else None for i in (self.sp.bos_id(), self.sp.eos_id()))
        textless = (self.sp.is_control, self.sp.is_unknown, self.sp.is_unused)
        self.special = frozenset(i for i in range(self.size) if any(is_(i) for is_ in textless))

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode(self._text_ids(ids))

    def state(self):
        return {"kind": self.kind, "model": self.model}

    def _character(self, c):
        i = self.sp.piece_to_id(c)
        return None if i in self.special else i


class Ids(Vocab):
    """No text: what bins without a meta.json hold."""

    kind = "ids"

    def __init__(self, size: int):
        self.size = size

    def encode(self, text):
        raise DataError("this data has no tokenizer (no meta.json beside its bins), so text cannot be turned into ids")

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)

    def state(self):
        return {"kind": self.kind, "size": self.size}


def from_state(state: dict) -> Vocab:
    kinds = {"bytes": Bytes, "chars": Chars, "sentencepiece": SentencePiece, "ids": Ids}
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise DataError(f"tokenizer kind {kind!r}: expected one of {', '.join(kinds)}")
    values = {name: value for name, value in state.items() if name != "kind"}
    try:
        return kinds[kind](**values)
    except (TypeError, ValueError, AttributeError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"tokenizer of kind {kind!r}: {', '.join(values) or 'nothing'} cannot be read") from None


def to_meta(vocab: Vocab) -> tuple[dict, dict[str, bytes]]:
    """A vocabulary's entry in meta.json, and the files that lie beside it."""
    state = vocab.state()
    if "model" not in state:
        return state, {}
    model = state.pop("model")
    return state | {"file": "tokenizer.model", "sha256": hashlib.sha256(model).hexdigest()}, {"tokenizer.model": model}


def load(folder, size: int = 65536) -> Vocab:
    """The vocabulary of a prepared folder; Ids(size) where it has no meta.json.

    Raises DataError where the tokenizer's file is missing or is not the one that the bins were made with.
    """
    meta = load_meta(folder)
    if meta is None:
        return Ids(size)
    entry = dict(meta["tokenizer"])
    if "file" in entry:
        path, stated = Path(folder) / entry.pop("file"), entry.pop("sha256")
        if not path.is_file():
            raise DataError(f"{path}: no such file; the bins beside it were made with it: prepare the folder again")
        entry["model"] = path.read_bytes()
        found = hashlib.sha256(entry["model"]).hexdigest()
        if found != stated:
            raise DataError(f"{path}: sha256 {found}, but meta.json states {stated}: it is not the tokenizer of these bins")
    return from_state(entry)


def train_bpe(texts, vocab_size: int) -> bytes:
    """Trains a sentencepiece BPE model on a sample of the texts (an iterable of str) and returns its .model bytes.

    What it encodes it decodes to the same text, U+2581 (which stands for the space) excepted: nothing is normalised,
    and a character without a piece becomes its UTF-8 bytes. unk 0, bos 1, eos 2; the same texts give the same bytes.
    """
    if not 300 <= vocab_size <= 65536:
        raise DataError(f"--vocab_size={vocab_size}: a bpe vocabulary has 300 to 65536 ids, 259 of them bytes and specials")
    model, lines = io.BytesIO(), [line for piece in _sample(texts) for line in piece.split("\n") if line]
    if not lines:
        raise DataError("no text to train a tokenizer on")
    try:
        _sentencepiece().SentencePieceTrainer.train(
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
        raise DataError(f"--vocab_size={vocab_size}: this text {bound} ids; or pass --tokenizer=bytes") from None
    return model.getvalue()


def _sample(texts) -> list[str]:
    """The pieces whose hashes are lowest, SAMPLE_BYTES of them: spread over all texts, whatever their order."""
    heap, total = [], 0
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


def _sentencepiece():
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise DataError("sentencepiece is not installed, and this tokenizer needs it: pip install sentencepiece") from None
    return sentencepiece
