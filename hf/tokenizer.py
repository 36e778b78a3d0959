"""Converts a tokenizer to the tokenizer.json of Hugging Face's library `tokenizers`, which transformers' AutoTokenizer reads.

The ids are those of our own encode(). Text that looks like a special token is encoded as text on both sides
(split_special_tokens). transformers puts bos before a text unless told otherwise; our encode() leaves that to its caller.
"""

import json

from errors import require


def files(tokenizer) -> dict[str, str] | None:
    """Returns the texts of tokenizer.json and tokenizer_config.json, or None if the tokenizer cannot be converted."""
    converters = {"bytes": _bytes, "chars": _chars, "sentencepiece": _sentencepiece, "tiktoken": _tiktoken}
    unknown = None
    if tokenizer.kind == "tokenizers":
        theirs = tokenizer.tokenizer
        text = tokenizer.model.decode()
    elif tokenizer.kind in converters:
        library = require("tokenizers", "writing a tokenizer.json", "hf")
        theirs = converters[tokenizer.kind](library, tokenizer)
        if theirs is None or theirs.get_vocab_size() != tokenizer.size:
            return None
        special = [theirs.id_to_token(i) for i in sorted(tokenizer.special)]
        theirs.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
        if tokenizer.bos is not None:
            bos = theirs.id_to_token(tokenizer.bos)
            bos_first = {"single": f"{bos} $A", "pair": f"{bos} $A $B", "special_tokens": [(bos, tokenizer.bos)]}
            theirs.post_processor = library.processors.TemplateProcessing(**bos_first)
        unknown = theirs.model.unk_token
        text = theirs.to_str()
    else:
        return None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "clean_up_tokenization_spaces": False}
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    config |= {name: theirs.id_to_token(i) for name, i in named.items() if i is not None}
    config |= {"unk_token": unknown} if unknown else {}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2)}


def _bytes(library, tokenizer):
    vocab = {c: i for i, c in enumerate(_byte_characters())} | {"<s>": tokenizer.bos}
    return _byte_level(library, library.models.BPE(vocab, []), use_regex=False)


def _chars(library, tokenizer):
    vocab = {c: i for i, c in enumerate(tokenizer.alphabet)} | {"<s>": tokenizer.bos}
    # A character outside the alphabet is an error in tokenizers too: this model has no unknown token.
    theirs = library.Tokenizer(library.models.WordLevel(vocab, unk_token=""))
    theirs.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    theirs.decoder = library.decoders.Fuse()
    return theirs


def _tiktoken(library, tokenizer):
    characters = _byte_characters()
    ranks = tokenizer.ranks
    text = {token: "".join(characters[b] for b in token) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": tokenizer.bos}
    merges = _merges(sorted(ranks, key=ranks.get), text)
    model = library.models.BPE(vocab, merges, ignore_merges=True)  # a word that is a token is one
    return _byte_level(library, model, use_regex=True)


def _byte_level(library, model, use_regex: bool):
    """Bytes as characters; with use_regex, text is split into words as by GPT-2's tokenizer."""
    theirs = library.Tokenizer(model)
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    theirs.decoder = library.decoders.ByteLevel()
    return theirs


def _byte_characters() -> list[str]:
    """Returns GPT-2's character for each byte: the byte's own if it is printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    other = iter(range(256, 512))
    return [chr(b if b in printable else next(other)) for b in range(256)]


def _merges(ranked: list, text: dict) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make up one of the `ranked` tokens, in its rank's order; `text` names the tokens.

    If two pairs make up the same token, they are merged in this order, not by their positions in the text; in a trained
    vocabulary, BPE reaches a token through only one pair.
    """
    pairs = ((token[:i], token[i:]) for token in ranked for i in range(1, len(token)))
    return [(text[left], text[right]) for left, right in pairs if left in text and right in text]


def _sentencepiece(library, tokenizer):
    """Converts BPE whose normalizer changes nothing but spaces, as train_bpe's and Llama's; returns None for other models."""
    sp = tokenizer.sp
    vocab = {sp.id_to_piece(i): i for i in range(tokenizer.size)}
    plain = {piece: i for piece, i in vocab.items() if i not in tokenizer.special and not sp.is_byte(i)}
    scores = {piece: sp.get_score(i) for piece, i in plain.items() if len(piece) > 1}
    # In BPE each score is a rank of its own; user-defined symbols, which come before all merges, share the first merge's.
    ranks = all(map(float.is_integer, scores.values())) and len(set(scores.values())) == len(scores)
    if not (tokenizer.lossless and ranks) or any(sp.is_unused(i) for i in range(tokenizer.size)):
        return None
    merges = _merges(sorted(scores, key=scores.get, reverse=True), {piece: piece for piece in plain})
    byte_fallback = any(map(sp.is_byte, vocab.values()))
    unknown = sp.id_to_piece(sp.unk_id())
    model = library.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    theirs = library.Tokenizer(model)
    there = [library.normalizers.Replace(" ", "\u2581")]
    back = [library.decoders.Replace("\u2581", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    if sp.normalize("x") != "x":  # the model puts a space before each text
        there.insert(0, library.normalizers.Prepend("\u2581"))
        back.append(library.decoders.Strip(" ", 1, 0))
    theirs.normalizer = library.normalizers.Sequence(there)
    theirs.decoder = library.decoders.Sequence(back)
    return theirs
