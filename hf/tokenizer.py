"""Converts a tokenizer to the tokenizer.json of the `tokenizers` library, which transformers' AutoTokenizer reads.

The ids are those of our own encode(). Text that looks like a special token is encoded as text, here as there
(split_special_tokens). transformers puts bos before a text unless told otherwise; our encode() leaves that to its caller.

transformers 5.24 has converters for two of the four kinds, tiktoken and sentencepiece, which give the same ids on our test
corpus. They are not used: export would need transformers and protobuf, in recent versions, to save 40 lines.
"""

import base64
import json


def files(tokenizer) -> dict[str, str] | None:
    """Returns the texts of tokenizer.json and tokenizer_config.json, or None if the tokenizer cannot be converted."""
    if tokenizer.kind == "tokenizers":
        tokens = {i: token for token, i in tokenizer.tokenizer.get_vocab().items()}
        return {"tokenizer.json": tokenizer.model.decode()} | _config(tokenizer, tokens)
    convert = {"bytes": _bytes, "chars": _chars, "sentencepiece": _sentencepiece, "tiktoken": _tiktoken}.get(tokenizer.kind)
    converted = convert(tokenizer) if convert else None
    if converted is None or len(converted["model"]["vocab"]) != tokenizer.size:
        return None
    tokens = {i: token for token, i in converted["model"]["vocab"].items()}
    literal = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None} | converted
    whole["added_tokens"] = [{"id": i, "content": tokens[i]} | literal for i in sorted(tokenizer.special)]
    whole["post_processor"] = None if tokenizer.bos is None else _bos_first(tokens[tokenizer.bos], tokenizer.bos)
    unknown = converted["model"].get("unk_token")
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False)} | _config(tokenizer, tokens, unknown)


def _config(tokenizer, tokens: dict[int, str], unknown: str | None = None) -> dict[str, str]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "clean_up_tokenization_spaces": False}
    named = {"bos_token": tokens.get(tokenizer.bos), "eos_token": tokens.get(tokenizer.eos), "unk_token": unknown}
    return {"tokenizer_config.json": json.dumps(config | {name: t for name, t in named.items() if t}, indent=2)}


def _bos_first(token: str, i: int) -> dict:
    bos, a, b = {"SpecialToken": {"id": token, "type_id": 0}}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB")
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, b], "special_tokens": special}


def _bpe(vocab: dict[str, int], merges: list[str], **options) -> dict:
    return {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | options | {
        "vocab": vocab, "merges": merges
    }  # fmt: skip


def _merges(ranked: list, text: dict) -> list[str]:
    """Returns all pairs of tokens that make up one of the `ranked` tokens, in its rank's order; `text` names the tokens.

    If two pairs make up one token, BPE on pairs merges them in this order and not in that of their places in the text; a
    trained vocabulary reaches a token through one pair only.
    """
    pairs = ((token[:i], token[i:]) for token in ranked for i in range(1, len(token)))
    return [f"{text[left]} {text[right]}" for left, right in pairs if left in text and right in text]


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
    characters = _byte_characters()
    lines = (line.split() for line in tokenizer.model.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    text = {token: "".join(characters[b] for b in token) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": tokenizer.bos}
    merges = _merges(sorted(ranks, key=ranks.get), text)
    return _byte_level(use_regex=True) | {"model": _bpe(vocab, merges, ignore_merges=True)}  # a word that is a token is one


def _byte_level(use_regex: bool) -> dict:
    """Bytes as characters; with use_regex, text is split into words as by GPT-2's tokenizer."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"pre_tokenizer": step, "decoder": step}


def _byte_characters() -> list[str]:
    """GPT-2's character for each byte: the byte's own if it is printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    other = iter(range(256, 512))
    return [chr(b if b in printable else next(other)) for b in range(256)]


def _sentencepiece(tokenizer) -> dict | None:
    """Converts BPE whose normalizer changes nothing but spaces, as data.bpe and Llama have it; None for other models."""
    sp = tokenizer.sp
    vocab = {sp.id_to_piece(i): i for i in range(tokenizer.size)}
    plain = {piece: i for piece, i in vocab.items() if i not in tokenizer.special and not sp.is_byte(i)}
    scores = {piece: sp.get_score(i) for piece, i in plain.items() if len(piece) > 1}
    # In BPE each score is a rank of its own; user-defined symbols, which come before all merges, share the first merge's.
    ranks = all(map(float.is_integer, scores.values())) and len(set(scores.values())) == len(scores)
    unused = any(sp.is_unused(i) for i in range(tokenizer.size))
    if not (tokenizer.lossless and ranks) or unused:
        return None
    prefix = sp.normalize("x") != "x"  # a space is put before each text
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space] if prefix else [space]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    merges = _merges(sorted(scores, key=scores.get, reverse=True), {piece: piece for piece in plain})
    byte_fallback = any(sp.is_byte(i) for i in range(tokenizer.size))
    model = _bpe(vocab, merges, unk_token=sp.id_to_piece(sp.unk_id()), fuse_unk=True, byte_fallback=byte_fallback)
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {"normalizer": normalizer, "decoder": {"type": "Sequence", "decoders": back}, "model": model}
