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
SPLIT = {"tokens": int, "docs": int, "bytes": int, "blake2b": str}
META = {"vocab_size": int, "fingerprint": str, "tokenizer": dict, "splits": {split: SPLIT for split in SPLITS}}


def load_meta(folder) -> dict | None:
    """The folder's meta.json; None where there is none. Raises UserError for one that data.prepare did not write."""
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
    if wrong := _misfit(meta, META):
        raise UserError(f"{path}: {wrong} is missing or of the wrong kind; remove the folder and prepare it again")
    with contextlib.suppress(ValueError):
        if meta["fingerprint"] == combined(meta["splits"]):
            return meta
    raise UserError(f"{path}: its fingerprint is not that of its splits; remove the folder and prepare it again")


def combined(splits: dict) -> str:
    """The fingerprint of a dataset: a hash of its splits' hashes."""
    digests = b"".join(bytes.fromhex(splits[s]["blake2b"]) for s in SPLITS)
    return hashlib.blake2b(digests, digest_size=16).hexdigest()


def _misfit(value, shape) -> str | None:
    """The first entry of nested dicts that is not of the type that `shape` has in its place, by its name."""
    if not isinstance(shape, dict):
        return None if type(value) is shape else ""
    if not isinstance(value, dict):
        return ""
    for name, below in shape.items():
        wrong = _misfit(value.get(name), below)
        if wrong is not None:
            return f"{name}.{wrong}" if wrong else name
    return None
