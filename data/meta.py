"""The format of a prepared dataset: uint16 token ids in train.bin and val.bin, described by meta.json."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from errors import UserError

FORMAT = 1
SPLITS = ("train", "val")
TOKEN = np.dtype("<u2")
MAX_VOCAB = 65536  # ids that uint16 can hold
SPLIT = {"tokens": int, "docs": int, "bytes": int, "blake2b": str}
META = {"vocab_size": int, "fingerprint": str, "tokenizer": dict, "splits": {split: SPLIT for split in SPLITS}}


def make_meta(vocab_size: int, splits: dict, counts, details: dict) -> dict:
    """Returns the contents of meta.json.

    splits: {split: {"tokens", "docs", "bytes", "blake2b"}}
    counts: (vocab_size,), how often each id occurs in the training tokens
    details: whatever else is to be recorded, the tokenizer's entry among it
    """
    fixed = {"format": FORMAT, "dtype": "uint16 little-endian", "vocab_size": vocab_size, "splits": splits}
    return fixed | details | {"fingerprint": fingerprint(splits), "counts": [int(n) for n in counts]}


def meta_to_json(meta: dict) -> str:
    """Returns the text of meta.json: indented, but the counts on a line of their own."""
    text = json.dumps({name: value for name, value in meta.items() if name != "counts"}, indent=2, ensure_ascii=False)
    return f'{text[:-2]},\n  "counts": {json.dumps(meta["counts"])}\n}}\n'


def load_meta(folder) -> dict | None:
    """Returns the folder's meta.json, or None if there is none. Raises UserError for one that data.prepare did not write.

    Those of before lack `counts`.
    """
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}); remove the folder and prepare it again") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, expected {FORMAT} of data.prepare; remove the folder and prepare it again")
    wrong = _misfit(meta, META)
    if wrong is None and not is_counts(meta.get("counts"), meta["vocab_size"]):
        wrong = "counts"
    if wrong is not None:
        raise UserError(f"{path}: {wrong} is missing or of the wrong kind; remove the folder and prepare it again")
    with contextlib.suppress(ValueError):
        if meta["fingerprint"] == fingerprint(meta["splits"]):
            return meta
    raise UserError(f"{path}: its fingerprint is not that of its splits; remove the folder and prepare it again")


def is_counts(counts, vocab_size: int) -> bool:
    """Returns whether `counts` is what is stored as the counts of a vocabulary's ids: None, or a list of ints."""
    if counts is None:
        return True
    return type(counts) is list and len(counts) == vocab_size and all(type(n) is int and 0 <= n < 2**63 for n in counts)


def fingerprint(splits: dict) -> str:
    """Returns the fingerprint of a dataset: a hash of its splits' hashes."""
    digests = b"".join(bytes.fromhex(splits[split]["blake2b"]) for split in SPLITS)
    return hashlib.blake2b(digests, digest_size=16).hexdigest()


def _misfit(value, shape) -> str | None:
    """Returns the name of the first entry of nested dicts that is not of the type in its place in `shape`, or None."""
    if not isinstance(shape, dict):
        return None if type(value) is shape else ""
    if not isinstance(value, dict):
        return ""
    for name, below in shape.items():
        wrong = _misfit(value.get(name), below)
        if wrong is not None:
            return f"{name}.{wrong}" if wrong else name
    return None
