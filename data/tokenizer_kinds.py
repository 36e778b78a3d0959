"""The kinds of tokenizers: bytes, single characters, a sentencepiece model, GPT-2's BPE by tiktoken, and bare ids."""

import base64
import functools
import string

import numpy as np

from errors import UserError

HEX = "0123456789abcdef"
# GPT-2's, as tiktoken writes it: contractions, then words, numbers and signs, each with the space before it, then spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LINES_CHARS = 1024  # given to sentencepiece at once, if the ids stay the same: it is faster on short text
GPT2_CHARS = 2**19  # given to tiktoken at once: the pattern overflows its stack on 999,999 spaces before a letter


class Tokenizer:
    """The interface of all tokenizers.

    size: number of ids
    bos, eos: the ids that begin and end a document, or None
    special: the ids that have no text. decode skips these, and ids >= size, which a model with a padded vocabulary may generate
    lossless: False if the model's normaliser alters most text, not only text that holds something rare
    file: the name of the file beside the bins whose bytes are `model`, or None if there is no such file
    counts: (size,) int64, how often each id occurs in the training data; None if unknown
    """

    kind: str
    size: int
    file: str | None = None
    lossless: bool = True
    bos: int | None = None
    eos: int | None = None
    special: frozenset = frozenset()
    counts: np.ndarray | None = None

    def encode(self, text: str):
        """Returns the ids of the text, a list or array (n,), without bos."""

    def decode(self, ids) -> str:
        """Returns the text of the ids, special ones left out."""

    def altered(self, text: str, ids) -> str | None:
        """Returns, for ids = encode(text), why decode(ids) is not `text`, in a few words; None if it is."""
        return None

    def state(self) -> dict:
        """Returns the plain values that tokenizer_from_state makes this tokenizer from."""
        return self.values() | ({} if self.counts is None else {"counts": self.counts.tolist()})

    def values(self) -> dict:
        """Returns `state` without the counts: what turns text into ids."""
        return {"kind": self.kind} | ({"model": self.model} if self.file else {})

    def hex_ids(self) -> list[int] | None:
        """Returns the ids of the characters 0-9a-f, or None if one of them is no token by itself."""
        ids = [self._id_of(c) for c in HEX]
        return None if None in ids else ids

    def _id_of(self, character: str) -> int | None:
        return None

    def _text_ids(self, ids) -> list[int]:
        return [i for i in map(int, ids) if i < self.size and i not in self.special]


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8, then bos."""

    kind = "bytes"
    size = 257
    bos = 256
    special = frozenset({256})
    _id_of = staticmethod(ord)

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(self._text_ids(ids)).decode(errors="replace")


class Chars(Tokenizer):
    """An alphabet of n characters, then bos: a-z A-Z 0-9 space and full stop first, then Chinese ones."""

    kind = "chars"
    FIRST = string.ascii_letters + string.digits + " ."
    MOST = 0xA000 - 0x4E00  # size of the Unicode block CJK Unified Ideographs

    def __init__(self, alphabet: int):
        n = alphabet
        if not 1 <= n <= self.MOST:
            raise UserError(f"--alphabet={n}: expected 1 to {self.MOST} characters")
        self.alphabet = self.FIRST[:n] + "".join(chr(0x4E00 + i) for i in range(len(self.FIRST), n))
        self.ids = {c: i for i, c in enumerate(self.alphabet)}
        self._id_of = self.ids.get
        self.bos = n
        self.size = n + 1
        self.special = frozenset({n})

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise UserError(f"character {e} is not in the alphabet of {len(self.ids)}: {self.alphabet[:64]!r}") from None

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in self._text_ids(ids))

    def values(self):
        return {"kind": self.kind, "alphabet": len(self.alphabet)}


class SentencePiece(Tokenizer):
    """A sentencepiece model, from the bytes of its .model file. Encode whole documents: many models put a space first."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"{len(model)} bytes that are not a sentencepiece model") from None
        self.size = self.sp.vocab_size()
        self.bos, self.eos = (i if i >= 0 else None for i in (self.sp.bos_id(), self.sp.eos_id()))
        textless = (self.sp.is_control, self.sp.is_unknown, self.sp.is_unused)
        self.special = frozenset(i for i in range(self.size) if any(is_(i) for is_ in textless))

    def encode(self, text):
        if self._dummies is None:
            return self.sp.encode(text)
        cut = text.find("\n", LINES_CHARS)
        ids = self.sp.encode(text if cut < 0 else text[:cut])
        while cut >= 0:
            start, cut = cut, text.find("\n", cut + LINES_CHARS)
            ids += self.sp.encode(text[start:] if cut < 0 else text[start:cut])[self._dummies :]
        return ids

    @functools.cached_property
    def _dummies(self) -> int | None:
        """The number of ids that the model puts before text that begins with a line end; None if text may not be cut there.

        Encoding between line ends gives the ids of the whole text if no piece crosses a line end, and if a piece's score is
        its rank among the merges of BPE, so that merging depends on nearby text alone.
        """
        if not self.lossless or "\n" in "".join(self.sp.id_to_piece(i) for i in range(self.size)):
            return None
        ranks = all(self.sp.get_score(i).is_integer() for i in range(self.size))
        *dummies, end = self.sp.encode("\n")
        return len(dummies) if ranks and self.sp.is_byte(end) else None

    def decode(self, ids):
        return self.sp.decode(self._text_ids(ids))

    @functools.cached_property
    def lossless(self):
        """Whether the normaliser keeps spaces and each character of the Basic Multilingual Plane as they are."""
        text = f"  x  {''.join(chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000)}  "
        shown = text.replace(" ", "\u2581")
        return self.sp.normalize(text) in (shown, "\u2581" + shown)  # some put one space first, and decode takes it away

    def altered(self, text, ids):
        if "\u2581" in text:
            return "holds U+2581, which becomes a space"
        if self.sp.unk_id() in ids:
            return "holds characters that the model lacks"
        return None if self.lossless or self.decode(ids) == text else "changed by the model's normaliser"

    def _id_of(self, character):
        i = self.sp.piece_to_id(character)
        return None if i in self.special else i


class Tiktoken(Tokenizer):
    """GPT-2's byte-level BPE, from the bytes of a ranks file: a token in base64, a space and its rank on each line.

    Text is split into words by GPT-2's pattern, which a ranks file does not name. bos is <|endoftext|>: the only id
    that is not a rank (50256, which follows the last rank in gpt2 and lies between ranks in p50k_base). It separates
    documents, so there is no eos. Text that reads <|endoftext|> is text like any other.
    """

    kind = "tiktoken"
    file = "tokenizer.tiktoken"

    def __init__(self, model: bytes):
        import tiktoken

        self.model = model
        self.ranks, self.bos = _ranks(model)
        self.size = len(self.ranks) + 1
        self.special = frozenset({self.bos})
        # Without its special tokens, which it would otherwise look for in text.
        self.encoding = tiktoken.Encoding("ranks", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens={})
        self._id_of = self.encoding.encode_single_token

    def encode(self, text):
        # 1.6 times as fast as encode_ordinary, which makes a list.
        ids = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        return np.concatenate(ids) if len(ids) > 1 else ids[0]

    def decode(self, ids):
        return self.encoding.decode(self._text_ids(ids), errors="replace")


def _ranks(model: bytes) -> tuple[dict[bytes, int], int]:
    """Returns the tokens of a ranks file with their ids, and the one id up to n that none of its n tokens has."""
    try:
        pairs = [line.split() for line in model.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UserError("not a ranks file of tiktoken: expected a base64 token and its rank on each line") from None
    free = set(range(len(ranks) + 1)).difference(ranks.values())
    if len(ranks) < len(pairs) or len(free) != 1 or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError("not a ranks file of tiktoken: its ranks leave gaps, some occur twice, or one of the bytes is missing")
    return ranks, free.pop()


def _pieces(text: str):
    """Yields pieces of at most GPT2_CHARS characters, cut before a space or newline that ends a word, so that the ids stay."""
    start = 0
    while len(text) - start > GPT2_CHARS:
        end = start + GPT2_CHARS
        places = (i for i in range(end, start, -1) if text[i] in " \n" and not text[i - 1].isspace())
        cut = next(places, end)  # a stretch without such a place is cut anywhere
        yield text[start:cut]
        start = cut
    yield text[start:]


class Ids(Tokenizer):
    """Token ids without text, as in bins without a meta.json."""

    kind = "ids"

    def __init__(self, size: int):
        self.size = size

    def encode(self, text):
        missing = "no meta.json beside the bins, no tokenizer.json or tokenizer.model in the folder of a Llama"
        raise UserError(f"text cannot be turned into ids without a tokenizer ({missing})")

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)

    def values(self):
        return {"kind": self.kind, "size": self.size}
