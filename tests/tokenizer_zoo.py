"""Tokenizers and chat templates of the kinds that are in use, made here: one small specimen of each.

A tokenizer is a folder like one of the hub (tokenizer.json and tokenizer_config.json, or what its kind has),
which AutoTokenizer reads. Each knows the special tokens that the templates write. ``real_tokenizers.py`` makes
folders of tokenizers in use, which join the zoo where PANDA_REAL_TOKENIZERS names the folder that they are in.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chat_templates import TEMPLATES as TEMPLATES
from tokenizers import AddedToken
from tokenizers import Regex
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

TEXT = """\
The heron waits in the reeds, and the pike waits below it. Neither is in a hurry.
user assistant system model tool think thought answer question
What is the capital of France? The capital of France is Paris. And of Spain? Madrid.
How many birds are there? There are 3 birds; yesterday there were 12, in 2024 there were 1,024.
def fish(pond):\n    return [f"{each.name}\\n" for each in pond if each.size > 10]\n
{"name": "weather", "arguments": {"city": "Paris"}} {"temperature": 21.5}
Once  upon   a time\tthere was\n\n a tab.\r\nIt's, they're, I'll, don't, we've, he'd.
Die Größe des Flusses überrascht: über ein Kilometer. Où est l'été, à côté de la forêt?
日本語のテキスト、漢字とかな。 你好，世界！ Привет, мир. مرحبا 😀 👍🏽 ﬁ ½ Å
"""
"""What the vocabularies are learnt from."""

CONTROL = (
    *("<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("<｜User｜>", "<｜Assistant｜>"),
)
"""The special tokens that templates write, beside bos and eos."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _write(folder: Path, tokenizer: Tokenizer, tokenizer_class: str = "PreTrainedTokenizerFast", **config: Any) -> Path:
    """Write ``tokenizer`` to ``folder`` as the hub's repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in added}
    config = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": decoder, "model_max_length": 2048, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _copy(source: Path, folder: Path) -> Path:
    """A real tokenizer, which learns the special tokens that the templates write."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    tokenizer.add_special_tokens({"extra_special_tokens": [*CONTROL]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    return folder


def _control(tokenizer: Tokenizer, *more: str, but: tuple[str, ...] = (), **flags: bool) -> None:
    """Add the tokens of CONTROL, and ``more`` before them, as special tokens with ``flags``."""
    names = [name for name in (*more, *CONTROL) if name not in but]
    tokenizer.add_special_tokens([AddedToken(name, special=True, **{"normalized": False} | flags) for name in names])


def _begins(bos: str, tokenizer: Tokenizer) -> processors.PostProcessor:
    """The post-processor that writes ``bos`` before a text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


# Byte-level BPE


@functools.cache
def _byte_level_merges() -> tuple[tuple[str, str], ...]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=700, min_frequency=1, show_progress=False))
    return tuple(tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"])


def _byte_level(*first: str, step: int = 1, add_prefix_space: bool = False, **options: Any) -> Tokenizer:
    """GPT-2's kind: 256 bytes, then merges. ``first``: the tokens with the lowest ids; ``step``: between ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(_byte_level_merges())
    pieces = dict.fromkeys([*first, *alphabet, *("".join(merge) for merge in merges)])
    vocabulary = {piece: number * step for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def gpt2(folder: Path) -> Path:
    """One special token is bos, eos and unk; none is written around a text."""
    tokenizer = _byte_level()
    _control(tokenizer, "<|endoftext|>")
    end = "<|endoftext|>"
    return _write(folder, tokenizer, "GPT2Tokenizer", bos_token=end, eos_token=end, unk_token=end)


def gpt2_prefix_space(folder: Path) -> Path:
    """A space is put before the first word of a text (RoBERTa, OPT; an option of GPT-2's)."""
    tokenizer = _byte_level(add_prefix_space=True)
    _control(tokenizer, "<|endoftext|>")
    return _write(folder, tokenizer, add_prefix_space=True, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama3(folder: Path) -> Path:
    """Words by a regular expression, whole words before merges, and a post-processor that writes bos."""
    tokenizer = _byte_level(ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _control(tokenizer, "<|end_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begins("<|begin_of_text|>", tokenizer)]
    )
    return _write(folder, tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen(folder: Path) -> Path:
    """No bos; added tokens that are not special; a class of transformers that builds its pipeline itself."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _control(tokenizer, "<|endoftext|>")
    plain = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return _write(
        folder, tokenizer, "Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def smollm2(folder: Path) -> Path:
    """Digits one by one; bos is the token that begins a turn; the special tokens have the lowest ids."""
    tokenizer = _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    _control(tokenizer, "<|endoftext|>")
    return _write(folder, tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")


def eos_zero(folder: Path) -> Path:
    """The end token's id is 0; no bos (Pythia, Falcon)."""
    tokenizer = _byte_level("<|endoftext|>")
    _control(tokenizer, "<|endoftext|>")
    return _write(folder, tokenizer, bos_token=None, eos_token="<|endoftext|>")


def nfkc(folder: Path) -> Path:
    """A normaliser that rewrites text: compatibility characters, as in Claude 2's tokenizer."""
    tokenizer = _byte_level("<EOT>")
    tokenizer.normalizer = normalizers.NFKC()
    _control(tokenizer, "<EOT>")
    return _write(folder, tokenizer, bos_token="<EOT>", eos_token="<EOT>")


def strips(folder: Path) -> Path:
    """Special tokens that take the space before them, one found only in normalised text, and added words."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    _control(tokenizer, "<s>", "</s>", but=("<|end|>",), lstrip=True)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=True)])
    tokenizer.add_tokens([AddedToken("heron", single_word=True), AddedToken("pike", lstrip=True, rstrip=True)])
    return _write(folder, tokenizer, bos_token="<s>", eos_token="</s>")


def holes(folder: Path) -> Path:
    """Every third id is in use: the highest id is above the number of tokens."""
    specials = ("<s>", "</s>", *CONTROL)
    tokenizer = _byte_level(*specials, step=3)
    _control(tokenizer, "<s>", "</s>")
    return _write(folder, tokenizer, bos_token="<s>", eos_token="</s>")


# BPE of sentencepiece's kind: spaces are part of pieces, bytes stand in for unknown characters


@functools.cache
def _sentencepiece_merges() -> tuple[tuple[str, str], ...]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, min_frequency=1, show_progress=False))
    return tuple(tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"])


def _sentencepiece_vocabulary(*first: str) -> dict[str, int]:
    """``first`` tokens, then the bytes, pieces, and characters."""
    merged = ["".join(merge) for merge in _sentencepiece_merges()]
    characters = sorted(set(TEXT.replace(" ", "▁")) - set("\n\t\r😀👍🏽"))
    pieces = dict.fromkeys([*first, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters])
    return {piece: number for number, piece in enumerate(pieces)}


def _sentencepiece(*first: str) -> Tokenizer:
    vocabulary = _sentencepiece_vocabulary(*first)
    merges = [merge for merge in _sentencepiece_merges() if {*merge, "".join(merge)} <= set(vocabulary)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _llama2(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.post_processor = _begins("<s>", tokenizer)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    return _write(folder, tokenizer, **config)


def _prepending() -> Tokenizer:
    """A normaliser writes "▁" before each piece of text between special tokens: Llama 2's first tokenizer.json."""
    tokenizer = _sentencepiece("<unk>", "<s>", "</s>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def llama2_prepend(folder: Path) -> Path:
    """``Prepend`` as tokenizer.json has it, read as it is (not built again by a class)."""
    tokenizer = _prepending()
    _control(tokenizer, "<unk>", "<s>", "</s>")
    return _llama2(folder, tokenizer, legacy=True)


def llama2_legacy(folder: Path) -> Path:
    """The same file with the class LlamaTokenizer and ``legacy: true`` (Llama 2, TinyLlama, Vicuna)."""
    tokenizer = _prepending()
    _control(tokenizer, "<unk>", "<s>", "</s>")
    return _llama2(folder, tokenizer, tokenizer_class="LlamaTokenizer", legacy=True)


def llama2_metaspace(folder: Path) -> Path:
    """``legacy: false``: "▁" before the first word of a text only."""
    tokenizer = _sentencepiece("<unk>", "<s>", "</s>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _control(tokenizer, "<unk>", "<s>", "</s>")
    return _llama2(folder, tokenizer, tokenizer_class="LlamaTokenizer", legacy=False)


def mistral(folder: Path) -> Path:
    """The instruction marks are special tokens inside the vocabulary; "▁" before each piece of text."""
    marks = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    tokenizer = _sentencepiece("<unk>", "<s>", "</s>", *marks)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    _control(tokenizer, "<unk>", "<s>", "</s>", *marks)
    return _llama2(folder, tokenizer, legacy=False)


def phi3(folder: Path) -> Path:
    """Special tokens that take the space after them (``rstrip``), line breaks too."""
    tokenizer = _prepending()
    _control(tokenizer, "<unk>", "<s>", "<|endoftext|>", but=CONTROL)
    _control(tokenizer, "</s>", rstrip=True)
    return _llama2(folder, tokenizer, eos_token="<|endoftext|>", legacy=False)


def gemma(folder: Path) -> Path:
    """Spaces are kept as they are, none is put before a text; bos is written."""
    tokenizer = _sentencepiece("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _control(tokenizer, "<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer.post_processor = _begins("<bos>", tokenizer)
    return _write(folder, tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


# Other models of text


def unigram(folder: Path) -> Path:
    """T5's: likely pieces; runs of space are one; no bos, and eos is written after a text; special tokens inside."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>", *CONTROL[:2]]
    learner.train_from_iterator(
        [TEXT],
        trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    pieces = [tuple(piece) for piece in json.loads(learner.to_str())["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    _control(tokenizer, "<pad>", "</s>", "<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _write(folder, tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def wordpiece(folder: Path) -> Path:
    """BERT's: lower case, words and their parts, [UNK] for others; [CLS] and [SEP] around a text."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    learner.decoder = decoders.WordPiece()
    _control(learner, *specials)
    learner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, learner.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _write(folder, learner, bos_token="[CLS]", eos_token="[SEP]", **names)


def word_level(folder: Path) -> Path:
    """A list of words; space is lost, and words that are not in it are one token."""
    words = [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(TEXT)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    _control(tokenizer, "<unk>", "<s>", "</s>")
    return _write(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byt5(folder: Path) -> Path:
    """A tokenizer written in Python, without tokenizer.json: bytes."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=[*CONTROL])
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_model(folder: Path) -> Path:
    """A tokenizer.model of sentencepiece and no tokenizer.json; transformers needs the package to read it."""
    import io

    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=written,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()
    flags = {"normalized": False, "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | dict(enumerate(CONTROL, size))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "added_tokens_decoder": {str(number): {"content": name, **flags} for number, name in names.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "gpt2": gpt2,
    "gpt2-prefix-space": gpt2_prefix_space,
    "llama3": llama3,
    "qwen": qwen,
    "smollm2": smollm2,
    "eos-zero": eos_zero,
    "nfkc": nfkc,
    "strips": strips,
    "holes": holes,
    "llama2-prepend": llama2_prepend,
    "llama2-legacy": llama2_legacy,
    "llama2-metaspace": llama2_metaspace,
    "mistral": mistral,
    "phi3": phi3,
    "gemma": gemma,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word-level": word_level,
    "byt5": byt5,
    "sentencepiece-model": sentencepiece_model,
}
"""Makes the folder of a tokenizer, which is returned."""

if importlib.util.find_spec("sentencepiece") is None:
    del TOKENIZERS["sentencepiece-model"]

for _made in sorted(Path(os.environ.get("PANDA_REAL_TOKENIZERS", os.devnull)).glob("*/tokenizer_config.json")):
    TOKENIZERS[f"real-{_made.parent.name}"] = functools.partial(_copy, _made.parent)


@functools.cache
def _specimens() -> Path:
    """The folder of all that this process has made."""
    made = Path(tempfile.mkdtemp(prefix="panda-tokenizers-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def folder_of(name: str, template: str | None = None) -> Path:
    """The folder of the tokenizer ``name`` with the chat template ``template``, made once in a process."""
    folder = _specimens() / name / (template or "none")
    if template is None:
        TOKENIZERS[name](folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    else:
        shutil.copytree(folder_of(name), folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    return folder


def load(name: str, template: str | None = None) -> Any:
    """The tokenizer ``name`` with the chat template ``template``: a new object, free to change."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder_of(name, template)), local_files_only=True)
