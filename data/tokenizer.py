"""Text <-> token ids: the tokenizer that --tokenizer names, that of a prepared folder, and that of a checkpoint.

A prepared folder names its tokenizer in meta.json. A checkpoint carries all of it in plain values (`Tokenizer.state`,
`tokenizer_from_state`), so that it turns text into ids with no other file.
"""

import base64
import difflib
import hashlib
import json
import textwrap
from pathlib import Path

import numpy as np

from data.meta import MAX_VOCAB, is_counts, load_meta
from data.tokenizer_json import TokenizerJson
from data.tokenizer_kinds import Bytes, Chars, Ids, SentencePiece, Tiktoken, Tokenizer, require
from errors import UserError

ENCODINGS = ("gpt2", "r50k_base", "p50k_base")  # of tiktoken: those that split text as GPT-2 does, and fit uint16
CHOICES = "bytes, bpe, a .model file of sentencepiece, a tokenizer.json of Hugging Face, a .tiktoken file of ranks, or "
CHOICES += ", ".join(ENCODINGS)


def get_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that --tokenizer=NAME means: any of CHOICES but bpe, which data.prepare trains.

    Raises UserError if there is no such tokenizer, its ids do not fit uint16, or it has no bos.
    """
    try:
        kind = {".model": SentencePiece, ".tiktoken": Tiktoken, ".json": TokenizerJson}.get(Path(name).suffix)
        if name == "bytes":
            tokenizer = Bytes()
        elif name in ENCODINGS:
            tokenizer = _encoding(name)
        elif kind is None:
            near = difflib.get_close_matches(name, ["bytes", "bpe", *ENCODINGS], cutoff=0.4)
            raise UserError(f"expected {CHOICES}" + (f"; did you mean {near[0]}?" if near else ""))
        elif not Path(name).is_file():
            raise UserError("no such file")
        else:
            named = _config_beside(Path(name)) if kind is TokenizerJson else {}
            tokenizer = kind(Path(name).read_bytes(), **named)
        if tokenizer.size > MAX_VOCAB:
            raise UserError(f"a vocabulary of {tokenizer.size:,} ids does not fit uint16, which holds {MAX_VOCAB:,}")
        if tokenizer.bos is None:
            raise UserError("it has no bos, the id that begins a document here; name a model that was trained with one")
    except UserError as e:
        raise UserError(f"--tokenizer={name}: {e}") from None
    return tokenizer


def _config_beside(path: Path) -> dict:
    """Returns what config.json beside a tokenizer.json says of its ids."""
    try:
        values = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError):
        raise UserError("there is no config.json beside it, which names its bos") from None
    return TokenizerJson.named_in(values if isinstance(values, dict) else {})


def _encoding(name: str) -> Tiktoken:
    """Returns tiktoken's encoding of that name, which tiktoken downloads on first use and keeps in its own cache."""
    tiktoken = require("tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:
        what = textwrap.shorten(f"{type(e).__name__}: {e}", 160)
        raise UserError(
            f"tiktoken cannot download it ({what}); bring its ranks file here by other means (gpt2's is "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken), and pass --tokenizer=FILE.tiktoken"
        ) from None
    tokens = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    return Tiktoken(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in tokens))


def tokenizer_from_state(state: dict) -> Tokenizer:
    """Returns the tokenizer of Tokenizer.state(). States of before have no counts."""
    kinds = {kind.kind: kind for kind in (Bytes, Chars, SentencePiece, Tiktoken, TokenizerJson, Ids)}
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"tokenizer kind {kind!r}: expected one of {', '.join(kinds)}")
    values = {name: value for name, value in state.items() if name not in ("kind", "counts")}
    try:
        tokenizer = kinds[kind](**values)
    except (TypeError, ValueError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"tokenizer of kind {kind!r}: {', '.join(values) or 'nothing'} cannot be read") from None
    counts = state.get("counts")
    if not is_counts(counts, tokenizer.size):
        raise UserError(f"tokenizer of kind {kind!r}: counts cannot be read")
    tokenizer.counts = None if counts is None else np.array(counts, np.int64)
    return tokenizer


def tokenizer_to_meta(tokenizer: Tokenizer) -> tuple[dict, dict[str, bytes]]:
    """Returns a tokenizer's entry in meta.json, and the files that lie beside it."""
    state = tokenizer.state()
    state.pop("counts", None)  # those of a new dataset are not known yet
    if "model" not in state:
        return state, {}
    model = state.pop("model")
    return state | {"file": tokenizer.file, "sha256": hashlib.sha256(model).hexdigest()}, {tokenizer.file: model}


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
