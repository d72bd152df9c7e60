"""The text of generated tokens, as a whole and piece by piece."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ``ids``: without special tokens, and otherwise all of it, also spaces before punctuation."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Pieces:
    """The text of tokens that come one by one; the pieces put together are the text of them all.

    Held back is only what later tokens can change: an incomplete character, and, for a tokenizer that spells bytes as
    tokens of their own (``<0x0A>``), a run of these, of which one wrong byte makes all of them unreadable.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = ""
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.in_bytes = False

    def add(self, token: int) -> str:
        """The text that is certain after ``token`` and was not before."""
        self.ids.append(token)
        if token in self.special:
            return ""
        spelt = self.tokenizer.convert_ids_to_tokens(token)
        self.in_bytes = isinstance(spelt, str) and bool(_BYTE.fullmatch(spelt))
        return "" if self.in_bytes else self._new(decoded(self.tokenizer, self.ids).rstrip(_INCOMPLETE))

    def rest(self) -> str:
        """What was held back, now that no token follows."""
        return self._new(decoded(self.tokenizer, self.ids))

    def _new(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        new = text[len(self.given) :]
        self.given = text
        return new
