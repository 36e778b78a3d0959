"""A vocabulary as the tokenizer.json of the `tokenizers` library, which transformers' AutoTokenizer reads with no code of ours.

The ids are those of our own encode(). Text that reads like a special token is text like any other, here as there
(split_special_tokens). transformers puts bos before a text unless told otherwise; our encode() leaves that to its caller.
"""

import base64
import json


def files(tokenizer) -> dict[str, str] | None:
    """tokenizer.json and tokenizer_config.json of a data.tokenizer.Tokenizer; None where it cannot be converted."""
    make = {"bytes": _bytes, "chars": _chars, "sentencepiece": _sentencepiece, "tiktoken": _tiktoken}.get(tokenizer.kind)
    made = make(tokenizer) if make else None
    if made is None or len(made["model"]["vocab"]) != tokenizer.size:
        return None
    tokens = {i: token for token, i in made["model"]["vocab"].items()}
    whole = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None} | made
    literal = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole["added_tokens"] = [{"id": i, "content": tokens[i]} | literal for i in sorted(tokenizer.special)]
    whole["post_processor"] = None if tokenizer.bos is None else _bos_first(tokens[tokenizer.bos], tokenizer.bos)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "clean_up_tokenization_spaces": False}
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    config |= {name: tokens[i] for name, i in named.items() if i is not None}
    if made["model"].get("unk_token"):
        config["unk_token"] = made["model"]["unk_token"]
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False), "tokenizer_config.json": json.dumps(config, indent=2)}


def _bos_first(token: str, i: int) -> dict:
    bos, a, b = {"SpecialToken": {"id": token, "type_id": 0}}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB")
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, b], "special_tokens": special}


def _bpe(vocab: dict[str, int], merges: list[str], **options) -> dict:
    defaults = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    defaults |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE"} | defaults | options | {"vocab": vocab, "merges": merges}


def _merges(ranked: list, parts: dict) -> list[str]:
    """All pairs of `parts` that make up one of the ranked tokens, by its rank: what BPE on ranks of tokens merges.

    Where two pairs make one token, the order of BPE on pairs is theirs, and not that of their places in the text; a trained
    vocabulary reaches a token by one pair alone.
    """
    cuts = ((token[:i], token[i:]) for token in ranked for i in range(1, len(token)))
    return [f"{parts[left]} {parts[right]}" for left, right in cuts if left in parts and right in parts]


def _bytes(tokenizer) -> dict:
    vocab = {c: i for i, c in enumerate(_byte_characters())} | {"<s>": tokenizer.bos}
    return _byte_level(use_regex=False) | {"model": _bpe(vocab, [])}


def _chars(tokenizer) -> dict:
    vocab = {c: i for i, c in enumerate(tokenizer.alphabet)} | {"<s>": tokenizer.bos}
    # A character outside the alphabet is an error there too: this model has no unknown token.
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
    return {"pre_tokenizer": each, "decoder": {"type": "Fuse"}, "model": model}


def _tiktoken(tokenizer) -> dict:
    characters, ranks = _byte_characters(), {}
    for line in tokenizer.model.splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    shown = {token: "".join(characters[b] for b in token) for token in ranks}
    vocab = {shown[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": tokenizer.bos}
    merges = _merges(sorted(ranks, key=ranks.get), shown)
    return _byte_level(use_regex=True) | {"model": _bpe(vocab, merges, ignore_merges=True)}  # a word that is a token is one


def _byte_level(use_regex: bool) -> dict:
    """Bytes as characters, and with use_regex GPT-2's tokenizer."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"pre_tokenizer": step, "decoder": step}


def _byte_characters() -> list[str]:
    """GPT-2's character for each byte: its own where it prints, else one from U+0100 on."""
    prints, other = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(b if b in prints else next(other)) for b in range(256)]


def _sentencepiece(tokenizer) -> dict | None:
    """BPE whose normaliser changes nothing but spaces, as data.bpe and Llama's makers trained it; None for another model."""
    sp = tokenizer.sp
    vocab = {sp.id_to_piece(i): i for i in range(tokenizer.size)}
    plain = {piece: i for piece, i in vocab.items() if i not in tokenizer.special and not sp.is_byte(i)}
    scores = {piece: sp.get_score(i) for piece, i in plain.items() if len(piece) > 1}
    # In BPE a score is a rank, each once; symbols of the user's, which come before all merges, share the first merge's.
    ranks = all(map(float.is_integer, scores.values())) and len(set(scores.values())) == len(scores)
    unused = any(sp.is_unused(i) for i in range(tokenizer.size))
    if not (tokenizer.lossless and ranks) or unused:
        return None
    first = sp.normalize("x") != "x"  # a space before each text
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space] if first else [space]}
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    merges = _merges(sorted(scores, key=scores.get, reverse=True), {piece: piece for piece in plain})
    options = {"unk_token": sp.id_to_piece(sp.unk_id()), "fuse_unk": True}
    model = _bpe(vocab, merges, **options, byte_fallback=any(sp.is_byte(i) for i in range(tokenizer.size)))
    return {"normalizer": normalizer, "decoder": {"type": "Sequence", "decoders": back}, "model": model}
