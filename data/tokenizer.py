"""Text <-> token ids: bytes, single characters, a sentencepiece model, tiktoken's ranks, or ids alone.

A prepared folder names its tokenizer in meta.json; a checkpoint carries the whole of it in plain
values (`state`, `tokenizer_from_state`), so that it turns text into ids with no other file.
"""

import base64
import difflib
import functools
import hashlib
import string
import textwrap
import threading
from pathlib import Path

import numpy as np

from data.meta import load_meta
from errors import UserError

HEX = "0123456789abcdef"
DOWNLOAD_SECONDS = 60  # after which a download of one or two MB counts as failed
WHAT = "bytes, bpe, a file.model of sentencepiece, a file.tiktoken of ranks, or a tiktoken encoding such as gpt2"
# GPT-2's, as tiktoken writes it: contractions, then tokenizer, numbers and signs, each with the space before it, then spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LINES_CHARS = 1024  # of text that sentencepiece is given at once, where it makes no difference: it is faster with less
GPT2_CHARS = 2**19  # at once: the pattern overflows its stack on 999,999 spaces before a letter


class Tokenizer:
    """One interface to all kinds.

    size: how many ids there are; bos, eos: the ids that begin and end a document, or None;
    special: the ids that stand for no text. decode skips them, and ids beyond size that a padded model may draw;
    lossless: False where text is altered as a rule, by a model's normaliser, and not only where it holds something rare;
    file: the name beside the bins of the file whose bytes are `model`, or None where there is no such file.
    """

    kind: str
    size: int
    file: str | None = None
    lossless: bool = True
    bos: int | None = None
    eos: int | None = None
    special: frozenset = frozenset()

    def encode(self, text: str):
        """Text -> its ids, a list or array (n,), without bos."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        raise NotImplementedError

    def altered(self, text: str, ids) -> str | None:
        """Why decode(ids) is not `text`, where ids = encode(text), in a few words; None where it is."""
        return None

    def state(self) -> dict:
        """Plain values, bytes among them, that tokenizer_from_state makes this vocabulary from."""
        return {"kind": self.kind} | ({"model": self.model} if self.file else {})

    def hex_ids(self) -> list[int] | None:
        """The ids of the characters 0-9a-f, or None where one of them is no token by itself."""
        ids = [self._character(c) for c in HEX]
        return None if None in ids else ids

    def _character(self, c: str) -> int | None:
        return None

    def _text_ids(self, ids) -> list[int]:
        return [i for i in map(int, ids) if i < self.size and i not in self.special]


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8, then bos."""

    kind, size, bos, special = "bytes", 257, 256, frozenset({256})

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(self._text_ids(ids)).decode(errors="replace")

    def _character(self, c):
        return ord(c)


class Chars(Tokenizer):
    """An alphabet of n characters, then bos: a-z A-Z 0-9 space and full stop first, then Chinese ones."""

    kind = "chars"
    FIRST = string.ascii_letters + string.digits + " ."
    MOST = 0xA000 - 0x4E00  # the characters of the block CJK Unified Ideographs

    def __init__(self, alphabet: int):
        n = alphabet
        if not 1 <= n <= self.MOST:
            raise UserError(f"--alphabet={n}: expected 1 to {self.MOST} characters")
        self.alphabet = self.FIRST[:n] + "".join(chr(0x4E00 + i) for i in range(len(self.FIRST), n))
        self.ids = {c: i for i, c in enumerate(self.alphabet)}
        self.bos, self.size, self.special = n, n + 1, frozenset({n})

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            shown = self.alphabet if len(self.alphabet) <= 64 else self.alphabet[:64] + "..."
            raise UserError(f"character {e.args[0]!r} is not in the alphabet of {len(self.ids)}: {shown!r}") from None

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in self._text_ids(ids))

    def state(self):
        return {"kind": self.kind, "alphabet": len(self.alphabet)}

    def _character(self, c):
        return self.ids.get(c)


class SentencePiece(Tokenizer):
    """A sentencepiece model, from the bytes of its .model file. Encode whole documents: many models put a space first."""

    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.sp = sentencepiece().SentencePieceProcessor()
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
        """How many ids the model puts before text that begins with a line end, if text may be cut there: the ids are those of
        the whole where no piece goes across a line end, and where a piece's score is its rank among the merges of BPE, so that
        what is merged depends on what is near alone. None where it may not.
        """
        if not self.lossless or "\n" in "".join(self.sp.id_to_piece(i) for i in range(self.size)):
            return None
        scores, (*dummies, end) = (self.sp.get_score(i) for i in range(self.size)), self.sp.encode("\n")
        return len(dummies) if self.sp.is_byte(end) and all(map(float.is_integer, scores)) else None

    def decode(self, ids):
        return self.sp.decode(self._text_ids(ids))

    @functools.cached_property
    def lossless(self):
        """Whether the normaliser leaves spaces, and each character of the Basic Multilingual Plane, as they are."""
        text = f"  x  {''.join(chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000)}  "
        shown = text.replace(" ", "\u2581")
        return self.sp.normalize(text) in (shown, "\u2581" + shown)  # some put one space first, and decode takes it away

    def altered(self, text, ids):
        if "\u2581" in text:
            return "holds U+2581, which becomes a space"
        if self.sp.unk_id() in ids:
            return "holds characters that the model lacks"
        return None if self.lossless or self.decode(ids) == text else "changed by the model's normaliser"

    def _character(self, c):
        i = self.sp.piece_to_id(c)
        return None if i in self.special else i


class Tiktoken(Tokenizer):
    """GPT-2's byte-level BPE, from the bytes of a ranks file: a token in base64, a space and its rank on each line.

    A ranks file does not name the pattern that splits text into tokenizer: it is GPT-2's here, as it is in all encodings of
    tiktoken that fit uint16. bos is their <|endoftext|>: the one id up to the last rank, or next to it, that is no rank.
    That is 50256 in gpt2, after the last rank, and in p50k_base, among them. There is no eos, as bos marks the border
    between two documents. Text that reads <|endoftext|> is text like any other.
    """

    kind, file = "tiktoken", "tokenizer.tiktoken"

    def __init__(self, model: bytes):
        self.model, ranks = model, _ranks(model)
        self.size = len(ranks) + 1
        (self.bos,) = set(range(self.size)).difference(ranks.values())
        self.special = frozenset({self.bos})
        # Without its special tokens, which it would otherwise look for in text.
        self.encoding = _tiktoken().Encoding("ranks", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        # 1.6 times as fast as encode_ordinary, which makes a list.
        ids = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        return np.concatenate(ids) if len(ids) > 1 else ids[0]

    def decode(self, ids):
        return self.encoding.decode(self._text_ids(ids), errors="replace")

    def _character(self, c):
        return self.encoding.encode_single_token(c)


def _ranks(model: bytes) -> dict[bytes, int]:
    """The tokens of a ranks file and their ids. n lines hold n of the ids 0 to n, each once, and all 256 bytes."""
    lines, ranks = [line for line in bytes.splitlines(model) if line], {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"not a ranks file of tiktoken: line {number} is not a base64 token and its rank") from None
    if len(ranks) < len(lines) or len(set(range(len(lines) + 1)).difference(ranks.values())) != 1:
        raise UserError(f"not a ranks file of tiktoken: its {len(lines)} ranks leave gaps, or some are there twice")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"not a ranks file of tiktoken: it lacks {len(lacking)} of the 256 bytes, such as 0x{lacking[0]:02x}")
    return ranks


def _pieces(text: str):
    """Text in pieces of at most GPT2_CHARS characters, cut where GPT2_PATTERN ends a word: the ids are those of the whole.

    Only a stretch of GPT2_CHARS without such a place, a space or newline behind another character, is cut elsewhere.
    """
    start = 0
    while len(text) - start > GPT2_CHARS:
        end = start + GPT2_CHARS
        places = (i for i in range(end, start, -1) if text[i] in " \n" and not text[i - 1].isspace())
        cut = next(places, end)
        yield text[start:cut]
        start = cut
    yield text[start:]


class Ids(Tokenizer):
    """No text: what bins without a meta.json hold."""

    kind = "ids"

    def __init__(self, size: int):
        self.size = size

    def encode(self, text):
        raise UserError("this data has no tokenizer (no meta.json beside its bins), so text cannot be turned into ids")

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)

    def state(self):
        return {"kind": self.kind, "size": self.size}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer=NAME means: any of WHAT but bpe, which data.prepare trains.

    Raises UserError where there is no such tokenizer, where uint16 does not hold its ids, and where it has no bos.
    """
    try:
        if name == "bytes":
            return Bytes()
        kind = {".model": SentencePiece, ".tiktoken": Tiktoken}.get(Path(name).suffix)
        if kind and not Path(name).is_file():
            raise UserError("no such file")
        tokenizer = kind(Path(name).read_bytes()) if kind else _encoding(name)
        _fits(tokenizer.size)
        if tokenizer.bos is None:
            raise UserError("it has no bos, the id that begins a document here; name a model that was trained with one")
    except UserError as e:
        raise UserError(f"--tokenizer={name}: {e}") from None
    return tokenizer


def _fits(size: int):
    if size > 65536:
        raise UserError(f"a vocabulary of {size:,} ids does not fit uint16, which holds 65,536; name a smaller one")


def _encoding(name: str) -> Tiktoken:
    """tiktoken's encoding of that name, which tiktoken downloads on first use and keeps in its own cache."""
    try:
        tiktoken = _tiktoken()
    except UserError as e:
        raise UserError(f"expected {WHAT}; {e}") from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        near = difflib.get_close_matches(name, ["bytes", "bpe", *known], cutoff=0.4)
        raise UserError(f"expected {WHAT}" + (f"; the nearest names are {', '.join(near)}" if near else ""))
    got = [TimeoutError(f"not done in {DOWNLOAD_SECONDS} s")]

    def get():
        try:
            got.append(tiktoken.get_encoding(name))
        except Exception as e:
            got.append(e)

    # In a thread, because tiktoken sets no limit to its wait for a network that does not answer.
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if isinstance(encoding := got[-1], Exception):
        why = textwrap.shorten(f"{type(encoding).__name__}: {encoding}", 160)
        raise UserError(
            f"tiktoken cannot download it ({why}); bring its ranks file here by other means (gpt2's is "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken), and pass --tokenizer=FILE.tiktoken"
        )
    _fits(encoding.max_token_value + 1)
    tokens = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    tokenizer = Tiktoken(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in tokens))
    probe = "I'll SHE'LL  12345\n\n\t\tdef f(x):\r\n  "
    if encoding.special_tokens_set != {"<|endoftext|>"} or encoding.eot_token != tokenizer.bos:
        raise UserError("it has other special tokens than <|endoftext|>; name gpt2, r50k_base or p50k_base")
    if encoding.encode_ordinary(probe) != list(tokenizer.encode(probe)):
        raise UserError("it splits text otherwise than GPT-2 does; name gpt2, r50k_base or p50k_base")
    return tokenizer


def tokenizer_from_state(state: dict) -> Tokenizer:
    kinds = {"bytes": Bytes, "chars": Chars, "sentencepiece": SentencePiece, "tiktoken": Tiktoken, "ids": Ids}
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"tokenizer kind {kind!r}: expected one of {', '.join(kinds)}")
    values = {name: value for name, value in state.items() if name != "kind"}
    try:
        return kinds[kind](**values)
    except (TypeError, ValueError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"tokenizer of kind {kind!r}: {', '.join(values) or 'nothing'} cannot be read") from None


def tokenizer_to_meta(tokenizer: Tokenizer) -> tuple[dict, dict[str, bytes]]:
    """A vocabulary's entry in meta.json, and the files that lie beside it."""
    state = tokenizer.state()
    if "model" not in state:
        return state, {}
    model = state.pop("model")
    return state | {"file": tokenizer.file, "sha256": hashlib.sha256(model).hexdigest()}, {tokenizer.file: model}


def load_tokenizer(folder, size: int = 65536) -> Tokenizer:
    """The vocabulary of a prepared folder; Ids(size) where it has no meta.json.

    Raises UserError where the tokenizer's file is missing or is not the one that the bins were made with.
    """
    meta = load_meta(folder)
    if meta is None:
        return Ids(size)
    entry = dict(meta["tokenizer"])
    if "file" in entry:
        path, stated = Path(folder) / entry.pop("file"), entry.pop("sha256")
        if not path.is_file():
            raise UserError(f"{path}: no such file; the bins beside it were made with it: prepare the folder again")
        entry["model"] = path.read_bytes()
        found = hashlib.sha256(entry["model"]).hexdigest()
        if found != stated:
            raise UserError(f"{path}: sha256 {found}, but meta.json states {stated}: it is not the tokenizer of these bins")
    return tokenizer_from_state(entry)


def sentencepiece():
    """The package, which only its models need."""
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise UserError("sentencepiece is not installed, and this tokenizer needs it: pip install sentencepiece") from None
    return sentencepiece


def _tiktoken():
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise UserError("tiktoken is not installed, and this tokenizer needs it: pip install tiktoken") from None
    return tiktoken
