"""The tokenizer of a tokenizer.json, run by Hugging Face's library `tokenizers`."""

import json

from data.tokenizer_kinds import Tokenizer
from errors import UserError, first_line, require


class TokenizerJson(Tokenizer):
    """Any tokenizer of `tokenizers`, from the bytes of its tokenizer.json.

    bos, eos: that file does not name them; config.json beside it does (`named_in`)
    vocab_size: number of ids of the model; special tokens beyond it, added for other models, are left out
    """

    kind = "tokenizers"
    file = "tokenizer.json"

    def __init__(self, model: bytes, bos: int | None = None, eos: int | None = None, vocab_size: int = 2**31):
        self.model = model
        self.bos = bos
        self.eos = eos
        self.vocab_size = vocab_size
        library = require("tokenizers", "a tokenizer.json", "hf")
        try:
            self.tokenizer = library.Tokenizer.from_buffer(model)
        except BaseException as e:  # tokenizers raises no narrower class than Exception, and its panics are not even that
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise UserError(f"not a tokenizer.json that the installed tokenizers reads ({first_line(e)})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # text that reads like a special token is text
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special} | {bos, eos} - {None}
        text = set(self.tokenizer.get_vocab().values()) - special
        if not text:
            raise UserError("tokenizer.json has an empty vocabulary")
        self.size = 1 + max(text | {i for i in special if i < vocab_size})
        self.special = frozenset(range(self.size)) - text

    @staticmethod
    def named_in(values: dict) -> dict:
        """Returns bos, eos and vocab_size as config.json names them. Raises UserError for ids that the model lacks."""
        bos, eos = values.get("bos_token_id", 1), values.get("eos_token_id", 2)  # the defaults of LlamaConfig
        eos = eos[0] if isinstance(eos, list) and eos else eos  # of several, all of which are special
        size = values.get("vocab_size")
        if type(size) is not int or any(i is not None and (type(i) is not int or not 0 <= i < size) for i in (bos, eos)):
            ids = f"bos_token_id={json.dumps(bos)}, eos_token_id={json.dumps(eos)}"
            raise UserError(f"{ids}: expected ids below vocab_size={json.dumps(size)}")
        return {"bos": bos, "eos": eos, "vocab_size": size}

    def encode(self, text):
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise UserError(f"tokenizer.json cannot encode this text ({first_line(e)})") from None

    def decode(self, ids):
        return self.tokenizer.decode(self._text_ids(ids))

    def altered(self, text, ids):
        return None if self.decode(ids) == text else "changed by the tokenizer"

    def values(self):
        return super().values() | {"bos": self.bos, "eos": self.eos, "vocab_size": self.vocab_size}

    def _id_of(self, c):
        i = self.tokenizer.token_to_id(c)
        return None if i in self.special else i
