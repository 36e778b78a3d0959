"""A meta.json for bins made by other programs: nothing is copied, each token is read once."""

import hashlib
from pathlib import Path

import numpy as np

from data.bins import Shard, files
from data.meta import MAX_VOCAB, SPLITS, load_meta, make_meta, meta_to_json
from data.tokenizer import Ids, get_tokenizer, tokenizer_to_meta
from data.writer import BLOCK
from errors import UserError
from files import atomic_write


def import_bins(folder: Path, tokenizer_name: str = "") -> dict:
    """Writes meta.json, and the tokenizer's file if it has one, into a folder of bins. Returns the meta.

    tokenizer_name: as data.prepare takes it; empty if it is not known. Raises UserError if there is a meta.json already, no
    bin of a split, a damaged bin, or an id that the tokenizer does not have.
    """
    if load_meta(folder):
        raise UserError(f"{folder}: has a meta.json already; remove it to have it made again")
    found = {split: [Shard(path) for path in files(folder / f"{split}.bin")] for split in SPLITS}
    for split, shards in found.items():
        if not shards:
            raise UserError(f"{folder}: no file of {split} tokens; its name must have {split!r} in it and end in .bin")
    tokenizer = get_tokenizer(tokenizer_name) if tokenizer_name else None
    splits = {}
    counts = {}
    for split, shards in found.items():
        digest = hashlib.blake2b(digest_size=16)
        counts[split] = np.zeros(MAX_VOCAB, np.int64)
        for shard in shards:
            for start in range(0, len(shard.tokens), BLOCK):
                tokens = shard.tokens[start : start + BLOCK]
                digest.update(tokens)
                counts[split] += np.bincount(tokens, minlength=MAX_VOCAB)
            highest = int(counts[split].nonzero()[0].max(initial=0))
            if tokenizer and highest >= tokenizer.size:
                raise UserError(f"{shard.path}: token id {highest}, but {tokenizer_name} has only {tokenizer.size} ids")
        docs = int(counts[split][tokenizer.bos]) if tokenizer else 0
        n_tokens = int(counts[split].sum())
        splits[split] = {"tokens": n_tokens, "docs": docs, "bytes": 0, "blake2b": digest.hexdigest()}
    tokenizer = tokenizer or Ids(int(sum(counts.values()).nonzero()[0].max(initial=0)) + 1)
    entry, small = tokenizer_to_meta(tokenizer)
    details = {
        "tokenizer": entry,
        "bos_id": tokenizer.bos,
        "eos_id": tokenizer.eos,
        "separator": "unknown: made elsewhere",
        "source": {"arguments": {"source": "from-bin", "tokenizer": tokenizer_name}},
    }
    meta = make_meta(tokenizer.size, splits, counts["train"][: tokenizer.size], details)
    for name, data in (small | {"meta.json": meta_to_json(meta)}).items():
        atomic_write(folder / name, data)
    sizes = ", ".join(f"{split} {splits[split]['tokens']:,} tokens in {len(found[split])} files" for split in SPLITS)
    print(f"{folder}: {sizes}, vocab_size {tokenizer.size} ({tokenizer.kind})")
    return meta
