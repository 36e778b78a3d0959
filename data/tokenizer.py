"""Loads the tokenizer of a name, a prepared folder or a checkpoint, and trains BPE tokenizers.

A prepared folder names its tokenizer in meta.json. A checkpoint contains the tokenizer as plain values (`Tokenizer.state`,
`tokenizer_from_state`), so that it needs no other file to encode text.
"""

import base64
import hashlib
import heapq
import io
import json
import re
import textwrap
from pathlib import Path

import numpy as np

from data.meta import MAX_VOCAB, load_meta
from data.tokenizer_json import TokenizerJson
from data.tokenizer_kinds import HEX, Bytes, Chars, Ids, SentencePiece, Tiktoken, Tokenizer
from errors import UserError, about

KINDS = {kind.kind: kind for kind in (Bytes, Chars, SentencePiece, Tiktoken, TokenizerJson, Ids)}
FILES = {".model": SentencePiece, ".tiktoken": Tiktoken, ".json": TokenizerJson}
ENCODINGS = ("gpt2", "r50k_base", "p50k_base")  # of tiktoken: those that split text as GPT-2 does, and fit uint16
CHOICES = "bytes, bpe, a .model file of sentencepiece, a tokenizer.json of Hugging Face, a .tiktoken file of ranks, or "
CHOICES += ", ".join(ENCODINGS)
LEAST_IDS = 300  # of a BPE that is trained here
SAMPLE_BYTES = 20_000_000  # of text to train a BPE on: more changes the tokenizer little and takes longer
PIECE_CHARS = 65536  # the sample is drawn in pieces of this many characters


def get_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that --tokenizer=NAME means: any of CHOICES but bpe, which data.prepare trains.

    Raises UserError if there is no such tokenizer, its ids do not fit uint16, or it has no bos.
    """
    path = Path(name)
    with about(f"--tokenizer={name}"):
        if name == "bytes":
            tokenizer = Bytes()
        elif name in ENCODINGS:
            tokenizer = _encoding(name)
        elif path.suffix not in FILES:
            raise UserError(f"expected {CHOICES}")
        elif not path.is_file():
            raise UserError("no such file")
        else:
            named = _config_beside(path) if path.suffix == ".json" else {}
            tokenizer = FILES[path.suffix](path.read_bytes(), **named)
        if tokenizer.size > MAX_VOCAB:
            raise UserError(f"a vocabulary of {tokenizer.size:,} ids does not fit uint16, which holds {MAX_VOCAB:,}")
        if tokenizer.bos is None:
            raise UserError("it has no bos, the id that begins a document here; name a model that was trained with one")
    return tokenizer


def _config_beside(path: Path) -> dict:
    """Returns what config.json beside a tokenizer.json says of its ids."""
    try:
        values = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError("expected a readable config.json beside it, which names its bos") from None
    return TokenizerJson.named_in(values if isinstance(values, dict) else {})


def _encoding(name: str) -> Tiktoken:
    """Returns tiktoken's encoding of that name, which tiktoken downloads on first use and keeps in its own cache."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:
        what = textwrap.shorten(f"{type(e).__name__}: {e}", 160)
        raise UserError(
            f"tiktoken cannot download it ({what}); download its ranks file by other means (gpt2's is "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken), and pass --tokenizer=FILE.tiktoken"
        ) from None
    tokens = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    return Tiktoken(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in tokens))


def tokenizer_from_state(state: dict) -> Tokenizer:
    """Returns the tokenizer of Tokenizer.state(). States of older checkpoints have no counts."""
    values = dict(state)
    kind = values.pop("kind", None)
    counts = values.pop("counts", None)
    try:
        tokenizer = KINDS[kind](**values)
        tokenizer.counts = None if counts is None else np.array(counts)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"tokenizer of kind {kind!r}: unknown, or its {', '.join(values) or 'state'} cannot be read") from None
    n = tokenizer.counts
    if n is not None and (n.dtype != np.int64 or n.shape != (tokenizer.size,) or n.min() < 0):
        raise UserError(f"tokenizer of kind {kind!r}: its counts cannot be read")
    return tokenizer


def tokenizer_to_meta(tokenizer: Tokenizer) -> tuple[dict, dict[str, bytes]]:
    """Returns a tokenizer's entries in meta.json, and the files to write beside it."""
    entry = tokenizer.values()
    files = {}
    if tokenizer.file:
        files[tokenizer.file] = model = entry.pop("model")
        entry |= {"file": tokenizer.file, "sha256": hashlib.sha256(model).hexdigest()}
    return {"tokenizer": entry, "bos_id": tokenizer.bos, "eos_id": tokenizer.eos}, files


def load_tokenizer(folder, size: int = MAX_VOCAB) -> Tokenizer:
    """Returns the tokenizer of a prepared folder, with the counts of its ids; Ids(size) if it has no meta.json.

    Raises UserError if the tokenizer's file is missing or is not the one that the bins were made with.
    """
    meta = load_meta(folder)
    if meta is None:
        return Ids(size)
    entry = dict(meta["tokenizer"])
    if "file" in entry:
        path = Path(folder) / entry.pop("file")
        stated = entry.pop("sha256", None)
        if not path.is_file():
            raise UserError(f"{path}: no such file; the bins beside it were made with it: prepare the folder again")
        entry["model"] = path.read_bytes()
        found = hashlib.sha256(entry["model"]).hexdigest()
        if found != stated:
            raise UserError(f"{path}: sha256 {found}, but meta.json states {stated}: it is not the tokenizer of these bins")
    return tokenizer_from_state(entry | {"counts": meta.get("counts")})


def train_bpe(texts, vocab_size: int) -> bytes:
    """Trains a sentencepiece BPE model on a sample of the texts (an iterable of str) and returns its .model bytes.

    The same texts give the same bytes, in any order. unk is 0, bos 1, eos 2. Decoding gives back the text that was encoded,
    except that U+2581 becomes a space: nothing is normalised, and a character without a piece becomes its UTF-8 bytes.
    """
    import sentencepiece

    if not LEAST_IDS <= vocab_size <= MAX_VOCAB:
        allowed = f"{LEAST_IDS} to {MAX_VOCAB} ids, 259 of them bytes and specials"
        raise UserError(f"--vocab_size={vocab_size}: a bpe vocabulary has {allowed}")
    model = io.BytesIO()
    lines = [line for piece in _sample(texts) for line in piece.split("\n") if line]
    if not lines:
        raise UserError("no text to train a tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.train(
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
        reason = " ".join(str(e).split("] ")[-1].split())
        if (most := re.search(r"value <= (\d+)", reason)) and int(most[1]) >= LEAST_IDS:
            remedy = f"this text allows at most {most[1]} ids; pass --vocab_size={most[1]}, or --tokenizer=bytes"
        elif most:
            remedy = "there is too little text for a bpe; pass --tokenizer=bytes"
        else:
            reason = re.sub(" or decrease character_coverage .*? option", "", reason)  # which is no option here
            remedy = f"{reason} Or pass --tokenizer=bytes"
        raise UserError(f"--vocab_size={vocab_size}: {remedy}") from None
    return model.getvalue()


def _sample(texts) -> list[str]:
    """Returns the pieces with the lowest hashes, SAMPLE_BYTES in all: spread over all texts, whatever their order."""
    heap = []
    total = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            piece = text[start : start + PIECE_CHARS]
            data = piece.encode()
            hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            heapq.heappush(heap, (-hashed, len(data), piece))  # the highest hash is at the top
            total += len(data)
            while total > SAMPLE_BYTES:
                total -= heapq.heappop(heap)[1]
    return [piece for *_, piece in sorted(heap)]
