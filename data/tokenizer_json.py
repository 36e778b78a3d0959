"""The tokenizer of a tokenizer.json, run by Hugging Face's library `tokenizers`."""

from data.tokenizer_kinds import Tokenizer, require
from errors import UserError


class TokenizerJson(Tokenizer):
    """Any tokenizer of `tokenizers`, from the bytes of its tokenizer.json.

    bos, eos: that file does not name them; config.json beside it does
    vocab_size: number of ids of the model; special tokens beyond it, added for other models, are left out
    """

    kind = "tokenizers"
    file = "tokenizer.json"

    def __init__(self, model: bytes, bos: int | None = None, eos: int | None = None, vocab_size: int = 2**31):
        self.model = model
        self.bos = bos
        self.eos = eos
        self.vocab_size = vocab_size
        try:
            self.tokenizer = require("tokenizers").Tokenizer.from_buffer(model)
        except UserError:
            raise
        except Exception as e:  # tokenizers raises no narrower class
            raise UserError(f"not a tokenizer.json that the installed tokenizers reads ({str(e).splitlines()[0]})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # text that reads like a special token is text
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special} | {bos, eos} - {None}
        text = set(self.tokenizer.get_vocab().values()) - special
        self.size = 1 + max(text | {i for i in special if i < vocab_size})
        self.special = frozenset(range(self.size)) - text

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(self._text_ids(ids))

    def altered(self, text, ids):
        return None if self.decode(ids) == text else "changed by the tokenizer"

    def _values(self):
        return super()._values() | {"bos": self.bos, "eos": self.eos, "vocab_size": self.vocab_size}

    def _character(self, c):
        i = self.tokenizer.token_to_id(c)
        return None if i in self.special else i
