"""A new tokenizer: a byte-level BPE that is trained on texts."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from panda.weights.tokenizers import write_tokenizer_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
SMALLEST = len(SPECIAL_TOKENS) + 256
"""Entries of a tokenizer that has learnt nothing: the special tokens, and each byte."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What no token crosses the borders of. LLaMA 3's pattern, with the marks of Indic and other scripts beside letters."""
PIECE = 1 << 16
"""Characters that are given to the trainer at once, at most: a long text without spaces is one word of a piece."""


def trained_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` entries, fewer where ``texts`` have no more repeated pairs of tokens.

    Any text has an encoding, since each byte is a token. Needs memory for the different words of the texts, and not for
    the texts.
    """
    from tokenizers import Regex
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import pre_tokenizers
    from tokenizers import processors
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    # As LLaMA's: plain transformers begins a text as training does.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]


def write_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Make ``folder``, with what transformers' AutoTokenizer reads (4.57 and 5)."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(config, folder)
