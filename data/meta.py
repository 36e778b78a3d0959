"""The format of a prepared dataset: uint16 token ids in train.bin and val.bin, described by meta.json."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from errors import UserError
from files import atomic_write

FORMAT = 1
SPLITS = ("train", "val")
TOKEN = np.dtype("<u2")
MAX_VOCAB = 65536  # ids that uint16 can hold
BLOCK = 2**20  # tokens read at a time


def write_meta(folder: Path, vocab_size: int, splits: dict, counts, details: dict, files: dict[str, bytes]) -> dict:
    """Writes meta.json, and then the files of the tokenizer, into the folder of a dataset. Returns the meta.

    splits: {split: {"tokens", "docs", "bytes", "blake2b"}}
    counts: how often each id occurs in the training tokens
    details: other entries, including the tokenizer's
    """
    fixed = {"format": FORMAT, "dtype": "uint16 little-endian", "vocab_size": vocab_size, "splits": splits}
    meta = fixed | details | {"fingerprint": fingerprint(splits)}
    text = json.dumps(meta, indent=2)
    meta["counts"] = counts[:vocab_size].tolist()
    text = f'{text[:-2]},\n  "counts": {json.dumps(meta["counts"])}\n}}\n'  # on one line
    for name, data in ({"meta.json": text} | files).items():
        atomic_write(folder / name, data)
    return meta


def load_meta(folder) -> dict | None:
    """Returns the folder's meta.json, or None if there is none. Raises UserError if it is damaged.

    Datasets that were prepared before ids were counted have no `counts`.
    """
    path = Path(folder) / "meta.json"
    damaged = UserError(f"{path}: damaged, or not of format {FORMAT} of data.prepare; remove the folder and prepare it again")
    try:
        meta = json.loads(path.read_bytes())
        sizes = [meta["splits"][split][name] for split in SPLITS for name in ("tokens", "docs", "bytes")]
        sound = meta["format"] == FORMAT and meta["fingerprint"] == fingerprint(meta["splits"])
        sound &= type(meta["tokenizer"]) is dict
        sound &= all(type(size) is int for size in [meta["vocab_size"], *sizes])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise damaged from None
    if not sound:
        raise damaged
    return meta


def fingerprint(splits: dict) -> str:
    """Returns the fingerprint of a dataset: a hash of its splits' hashes."""
    digests = b"".join(bytes.fromhex(splits[split]["blake2b"]) for split in SPLITS)
    return hashlib.blake2b(digests, digest_size=16).hexdigest()


def scan(blocks: Iterable[np.ndarray]) -> tuple[str, np.ndarray]:
    """Returns the hash of the tokens in all blocks, and how often each id occurs in them: (MAX_VOCAB,)."""
    digest = hashlib.blake2b(digest_size=16)
    counts = np.zeros(MAX_VOCAB, np.int64)
    for block in blocks:
        digest.update(block)
        counts += np.bincount(block, minlength=MAX_VOCAB)
    return digest.hexdigest(), counts
