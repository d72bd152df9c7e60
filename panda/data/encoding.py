"""Text to token ids: special tokens where a template wrote them, characters where content spells them.

Content is marked by ``as_characters`` before it goes into a text: wherever it spells a special token, a
mark stands in its place. ``encode`` gives the same ids as the tokenizer does for a text without marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any

from panda.data.conversations import UnusableRowError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Around the number of a spelt token: characters that Unicode reserves for uses within a program."""
_STAND_IN = "PandaSpecialToken"
"""What special tokens are called where their own names are characters. No text may contain it."""
_PRECEDING = ("\n", "a", ".", "0", "\u4e00", " ")
"""Characters to tokenise a text after, so that it does not begin as the beginning of a text does."""


class Encoder:
    """Encodes texts with a Hugging Face tokenizer, without adding special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._is_fast = getattr(tokenizer, "backend_tokenizer", None) is not None
        self.added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        """Ids of all tokens that are found in a text before it is tokenised, by their text."""
        tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special: dict[str, int] = tokens
        """Ids of the special tokens, by their text."""
        self._spelt = [_OPEN, _CLOSE, *tokens]
        longest_first = sorted(self._spelt, key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, longest_first)))
        # Some tokenizers have thousands: few texts have the first two characters of one, which is fast to find out.
        self._beginnings = re.compile("|".join(map(re.escape, sorted({token[:2] for token in self._spelt}))))
        self._marks_and_tokens = re.compile(f"{_OPEN}([0-9]+){_CLOSE}|{self._spellings.pattern}")

    @cached_property
    def borders(self) -> set[str]:
        """Special tokens at which a text can be divided: what is encoded from one on does not depend on the rest.

        Not those that take space beside them, or are looked for after a normaliser has changed the text.
        """
        if not self._is_fast:
            return set()
        return {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }

    def as_characters(self, content: Any) -> Any:
        """``content``, a text or plain objects with texts, with marks where it spells a special token.

        Raises UnusableRowError where it spells one and the tokenizer cannot write that as characters.
        """
        if isinstance(content, str):
            if not self._beginnings.search(content):
                return content
            if (found := self._spellings.search(content)) and not self._is_fast:
                raise UnusableRowError(
                    f"it spells the special token {found[0]!r}, which this tokenizer cannot write as characters"
                )
            if found and _STAND_IN in content:
                raise UnusableRowError(f"it spells {found[0]!r} and {_STAND_IN!r}, which is a name of panda's own")
            return self._spellings.sub(lambda found: f"{_OPEN}{self._spelt.index(found[0])}{_CLOSE}", content)
        if isinstance(content, Mapping):
            return {self.as_characters(key): self.as_characters(value) for key, value in content.items()}
        if isinstance(content, list):
            return [self.as_characters(item) for item in content]
        return content

    def readable(self, text: str) -> str:
        """``text`` with what was spelt in place of the marks."""
        return re.sub(f"{_OPEN}([0-9]+){_CLOSE}", lambda found: self._spelt[int(found[1])], text)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        if not texts:
            return []
        marked = [number for number, text in enumerate(texts) if _OPEN in text]
        if not marked:
            return self._encode(texts)
        ids = self._encode(["" if _OPEN in text else text for text in texts])
        for number in marked:
            ids[number] = self._encode_marked(texts[number])
        return ids

    def encode_content(self, content: str) -> list[int]:
        """Token ids of a text by itself: no template, its special tokens as characters, begun as the tokenizer does.

        Raises UnusableRowError as ``as_characters`` does.
        """
        return [*self.begin, *self.encode([self.as_characters(content)])[0]]

    def continuation(self, before: str, after: str) -> list[int]:
        """Token ids of ``after`` where the tokens of ``before`` end at its border, which the tokenizer would merge.

        Both decode together to what the tokenizer makes of both texts, if any such ids are found. It is not enough to
        encode ``after`` on its own: many tokenizers begin a text with a space.
        """
        expected = self.decode(self.encode([before + after])[0])
        [begun] = self.encode([before])
        candidates = []
        # Some tokenizers make one space of several, of which ``before`` may have the first.
        for text, character in product((after, after.lstrip()), _PRECEDING):
            [first], [both] = self.encode([character]), self.encode([character + text])
            if both[: len(first)] == first:
                candidates.append(both[len(first) :])
        candidates += self.encode([after])
        exact = (ids for ids in candidates if self.decode([*begun, *ids]) == expected)
        return next(exact, candidates[0])

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The last ``length`` of ``ids``, with the token that begins a sequence first if they begin with it."""
        if len(ids) <= length:
            return ids
        begin = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        return [*begin, *ids[len(ids) - max(0, length - len(begin)) :]]

    def altered(self, texts: Sequence[str], ids: Sequence[list[int]]) -> int:
        """How many of ``texts`` their ``ids`` do not give back: characters are lost, or unknown to the tokenizer.

        What its normaliser does and space do not count.
        """
        backend = self.tokenizer.backend_tokenizer if self._is_fast else None
        decoded = backend.decode_batch(ids, skip_special_tokens=False) if backend else map(self.decode, ids)
        normalizer = backend and backend.normalizer
        count = 0
        for text, again in zip(texts, decoded, strict=True):
            written = self.readable(text)
            if _visible(again) != _visible(written):
                normal = (normalizer.normalize_str(each) if normalizer else each for each in (again, written))
                count += len({_visible(each) for each in normal}) > 1
        return count

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def begin(self) -> list[int]:
        """The special tokens with which the tokenizer itself begins a text; most often one or none."""
        whole: list[int] = self.tokenizer("a")["input_ids"]
        [text] = self._encode(["a"])
        start = next((n for n in range(len(whole)) if whole[n : n + len(text)] == text), 0)
        return whole[:start]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._is_fast:
            backend = self.tokenizer.backend_tokenizer
            # As transformers does, without each token's place in the text, which takes a fifth of the time.
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = False
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a text is too long for the model: it is cut
        )["input_ids"]
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        def written(found: re.Match[str]) -> str:
            return self._spelt[int(found[1])] if found[1] else self._stand_ins[found[0]]

        renamed, own = self._renamed
        ids = renamed.encode(self._marks_and_tokens.sub(written, text), add_special_tokens=False).ids
        return [own.get(token, token) for token in ids]

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        return {text: f"{_STAND_IN}{number}." for number, text in enumerate(self._spelt)}

    @cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with other names for its special tokens: in its texts, their own names are characters.

        And ids of its that are others in the tokenizer: of special tokens that are pieces of ordinary text, too.
        transformers' ``sanitize_control_tokens`` (5.23, 2026-11) encodes such characters apart from the text around
        them, which gives other ids than the text has without a template.
        """
        from tokenizers import Tokenizer

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        described |= {"post_processor": None, "padding": None, "truncation": None}
        names, model = self._stand_ins, described["model"]
        merged = {part for merge in model.get("merges") or () for part in merge}
        pieces = {name: names[name] for name in names if len(name) > 1 and name not in merged}
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(model["vocab"], list):
            model["vocab"] = [[pieces.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {pieces.get(piece, piece): number for piece, number in model["vocab"].items()}
        if model.get("unk_token") in pieces:
            model["unk_token"] = pieces[model["unk_token"]]
        renamed = Tokenizer.from_str(json.dumps(described))
        ids = [(renamed.token_to_id(names[text]), number) for text, number in self.special.items()]
        return renamed, {there: here for there, here in ids if there is not None and there != here}


def _visible(text: str) -> str:
    """``text`` without space, in the ways that tokenizers write it."""
    return "".join(text.replace("\u2581", " ").split())
