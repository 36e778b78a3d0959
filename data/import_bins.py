"""A meta.json for bins that others made: nothing is copied, each token is read once."""

import hashlib
import os
from pathlib import Path

from data.bins import Shard, files
from data.meta import FORMAT, SPLITS, combined, load_meta
from data.tokenizer import Ids, get_tokenizer, tokenizer_to_meta
from data.writer import BLOCK, encoded
from errors import UserError


def import_bins(folder: Path, tokenizer_name: str = "") -> dict:
    """Writes meta.json, and the tokenizer's file where it has one, into a folder of bins. Returns the meta.

    tokenizer_name: as data.prepare takes it, empty where it is not known. Raises UserError where there is a meta.json,
    no bin of a split, a bin that is damaged, or an id that the tokenizer does not have.
    """
    if load_meta(folder):
        raise UserError(f"{folder}: has a meta.json already; remove it to have it made anew")
    found = {split: [Shard(path) for path in files(folder / f"{split}.bin")] for split in SPLITS}
    for split, shards in found.items():
        if not shards:
            raise UserError(f"{folder}: no file of {split} tokens; its name must have {split!r} in it and end in .bin")
    tokenizer = get_tokenizer(tokenizer_name) if tokenizer_name else None
    splits, highest = {}, 0
    for split, shards in found.items():
        digest, docs = hashlib.blake2b(digest_size=16), 0
        for shard in shards:
            for start in range(0, len(shard.tokens), BLOCK):
                tokens = shard.tokens[start : start + BLOCK]
                digest.update(tokens)
                highest = max(highest, int(tokens.max()))
                docs += int((tokens == tokenizer.bos).sum()) if tokenizer else 0
                if tokenizer and highest >= tokenizer.size:
                    raise UserError(
                        f"{shard.path}: token id {highest}, but {tokenizer_name} has {tokenizer.size} ids: it is another's"
                    )
        n_tokens = sum(len(shard.tokens) for shard in shards)
        splits[split] = {"tokens": n_tokens, "docs": docs, "bytes": 0, "blake2b": digest.hexdigest()}
    tokenizer = tokenizer or Ids(highest + 1)
    entry, small = tokenizer_to_meta(tokenizer)
    meta = {
        "format": FORMAT,
        "dtype": "uint16 little-endian",
        "vocab_size": tokenizer.size,
        "splits": splits,
        "tokenizer": entry,
        "bos_id": tokenizer.bos,
        "eos_id": tokenizer.eos,
        "separator": "unknown: made elsewhere",
        "source": {"arguments": {"source": "from-bin", "tokenizer": tokenizer_name}},
        "fingerprint": combined(splits),
    }
    for name, data in (small | {"meta.json": encoded(meta)}).items():
        aside = folder / f"{name}.{os.getpid()}.tmp"
        aside.write_bytes(data)
        os.replace(aside, folder / name)
    counts = ", ".join(f"{split} {splits[split]['tokens']:,} tokens in {len(found[split])} files" for split in SPLITS)
    print(f"{folder}: {counts}, vocab_size {tokenizer.size} ({tokenizer.kind})")
    return meta
