"""The generation config of a checkpoint: where answers end, what panda follows of it, and what it leaves out and why.

``panda generate``, ``panda chat``, the answers at the end of a run and plain transformers' ``generate`` of an export
say the same words because there is one rule: what panda leaves out, its exports leave out too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from panda.registry.errors import in_brief
from panda.weights.formats import CONFIG
from panda.weights.json_object import read_json_object

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded, besides what a user's flags say."""

    ends: list[int]
    """The tokens at which an answer ends."""
    honoured: dict[str, Any]
    """Keys of a generation config that decide which token follows, or when to stop, with their values."""
    carried: dict[str, Any]
    """Keys that an export carries for other programs: how to sample, limits of length, special tokens."""
    left_out: dict[str, str]
    """Keys that nothing follows, neither here nor in an export, each with the reason."""

    def written(self) -> dict[str, Any]:
        """The content of ``generation_config.json`` in an export."""
        ends = {"eos_token_id": self.ends[0] if len(self.ends) == 1 else self.ends} if self.ends else {}
        return self.carried | self.honoured | ends

    def processors(self, prompt: list[int], max_length: int, device: torch.device) -> Any:
        """transformers' logits processors for an answer to ``prompt`` that ends by ``max_length`` tokens in all."""
        return _processors(self.honoured, _Asked(torch.tensor([prompt], device=device), self.ends, max_length))

    def criteria(self, tokenizer: Any, *, timed: bool) -> Any:
        """transformers' stopping criteria besides ``ends`` and length; only with ``timed`` also time.

        The ranks of a run would not agree on the time.
        """
        from transformers import MaxTimeCriteria
        from transformers import StoppingCriteriaList
        from transformers import StopStringCriteria

        criteria = StoppingCriteriaList()
        if "stop_strings" in self.honoured:
            criteria.append(StopStringCriteria(tokenizer, self.honoured["stop_strings"]))
        if timed and "max_time" in self.honoured:
            criteria.append(MaxTimeCriteria(self.honoured["max_time"]))
        return criteria

    def note(self, what: object) -> str | None:
        """One line that says what is left out of the generation config of ``what``; None where nothing is."""
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(key)
        parts = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in by_reason.items())
        return f"{what}: its generation config asks for what panda leaves out: {parts}" if parts else None


def answer_ends(taught: Iterable[int], tokenizer: Any, *described: Mapping[str, Any]) -> list[int]:
    """The tokens at which an answer may end; id 0 is one like any other.

    They are the ends in ``described``, the contents of generation_config.json and config.json of a checkpoint, the
    tokenizer's end of sequence, and those that training ``taught``.
    """
    stated = [_as_list(content.get("eos_token_id")) for content in described]
    found = [*(token for tokens in stated for token in tokens), *_as_list(tokenizer.eos_token_id), *taught]
    return list(dict.fromkeys(filter(_is_token, found)))


def generation_values(*folders: Path) -> list[dict[str, Any]]:
    """The contents of generation_config.json and config.json in ``folders``, where they exist, in this order.

    The first says how to decode. A config.json without a generation config beside it may do so too, as those of before
    2023 do. Raises UserError where one is not a JSON object.
    """
    names = (GENERATION_CONFIG, CONFIG)
    files = [folder / name for folder in folders for name in names]
    return [read_json_object(file) for file in files if file.exists()]


def vocabulary_of(model: Any, tokenizer: Any) -> int:
    """How many tokens ``model`` scores, or else how many ``tokenizer`` has."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows: int = getattr(text_config, "vocab_size", None) or len(tokenizer)
    return rows


def decoding(values: Mapping[str, Any], ends: list[int], tokenizer: Any, vocabulary: int) -> Decoding:
    """What is followed of ``values``, a generation config or the configuration of a model, with ``vocabulary`` rows.

    Whatever they are, an answer can be decoded, and plain transformers loads, uses and saves what an export says.
    """
    if "model_type" in values or "panda_model" in values:
        values = {
            key: value for key, value in values.items() if key in _PROCESSORS or key in (*_CARRIED, *_DESCRIPTIVE)
        }
    honoured: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    if wrong := [end for end in _as_list(values.get("eos_token_id")) if not _is_token(end)]:
        left_out["eos_token_id"] = f"{', '.join(map(repr, wrong))} is not a token"
    # In transformers' order of processors; do_sample first, on which depends what is said of the other keys.
    order = [*_STOPS, *_PROCESSORS, "do_sample", *_CARRIED]
    for key in sorted(values, key=lambda key: order.index(key) if key in order else len(order)):
        value = values[key]
        if key in _DESCRIPTIVE or _says_nothing(key, value):
            continue
        if key in _FLOATS and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)  # transformers refuses `temperature: 1`
        if reason := _reason(key, value):
            left_out[key] = reason
        elif key in _STOPS:
            problem = _stop_problem(key, value, tokenizer)
            left_out.update({key: problem} if problem else {})
            honoured.update({} if problem else {key: value})
        elif key in _PROCESSORS:
            problem = _processor_problem(honoured | {key: value}, ends, vocabulary)
            left_out.update({key: problem} if problem else {})
            honoured.update({} if problem else {key: value})
        else:
            problem = _carried_problem(key, value, values)
            left_out.update({key: problem} if problem else {})
            carried.update({} if problem else {key: value})
    return _as_transformers_accepts(Decoding(ends, honoured, carried, left_out))


def asks_to_sample(values: Mapping[str, Any]) -> str | None:
    """The sampling that ``values`` ask for, in words, such as "temperature 0.6, top_k 20"; None where they do not."""
    if values.get("do_sample") is not True or values.get("temperature") == 0:
        return None
    return ", ".join(f"{key} {values[key]}" for key in _WARPERS if values.get(key) is not None) or "do_sample"


# -- what is followed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    prompt: torch.Tensor
    """[1, length]"""
    ends: list[int]
    max_length: int


def _processors(settings: Mapping[str, Any], asked: _Asked) -> Any:
    from transformers import InfNanRemoveLogitsProcessor
    from transformers import LogitsProcessorList

    made = [build(settings[key], asked, settings) for key, build in _PROCESSORS.items() if key in settings]
    # Where all tokens are forbidden (a small vocabulary without repetition), any may be drawn; else this changes none.
    return LogitsProcessorList([*made, InfNanRemoveLogitsProcessor()] if made else [])


def _made(name: str, *arguments: Any, **named: Any) -> Any:
    import transformers

    return getattr(transformers, name)(*arguments, **named)


def _biases(value: Any) -> Any:
    """Sequence biases as transformers takes them: pairs from JSON, lists of ids and floats."""
    return [[list(ids), float(bias)] for ids, bias in value]


def _begin(asked: _Asked, settings: Mapping[str, Any]) -> int:
    length = asked.prompt.shape[1]
    return length + 1 if length <= 1 and "forced_bos_token_id" in settings else length


_Build = Callable[[Any, _Asked, Mapping[str, Any]], Any]
# In the order in which transformers (5.23, 2026-11) applies them, and with its arguments.
_PROCESSORS: dict[str, _Build] = {
    "sequence_bias": lambda value, asked, _: _made("SequenceBiasLogitsProcessor", _biases(value)),
    "encoder_repetition_penalty": lambda value, asked, _: _made(
        "EncoderRepetitionPenaltyLogitsProcessor", value, asked.prompt
    ),
    "repetition_penalty": lambda value, asked, _: _made("RepetitionPenaltyLogitsProcessor", value),
    "no_repeat_ngram_size": lambda value, asked, _: _made("NoRepeatNGramLogitsProcessor", value),
    "encoder_no_repeat_ngram_size": lambda value, asked, _: _made(
        "EncoderNoRepeatNGramLogitsProcessor", value, asked.prompt
    ),
    "bad_words_ids": lambda value, asked, _: _made("NoBadWordsLogitsProcessor", value, asked.ends),
    "min_length": lambda value, asked, _: _made(
        "MinLengthLogitsProcessor", value, asked.ends, device=asked.prompt.device.type
    ),
    "min_new_tokens": lambda value, asked, _: _made(
        "MinNewTokensLengthLogitsProcessor",
        asked.prompt.shape[1],
        value,
        asked.ends,
        device=asked.prompt.device.type,
    ),
    "forced_bos_token_id": lambda value, asked, _: _made("ForcedBOSTokenLogitsProcessor", value),
    "forced_eos_token_id": lambda value, asked, _: _made(
        "ForcedEOSTokenLogitsProcessor", asked.max_length, value, device=asked.prompt.device.type
    ),
    "remove_invalid_values": lambda value, asked, _: _made("InfNanRemoveLogitsProcessor"),
    "exponential_decay_length_penalty": lambda value, asked, _: _made(
        "ExponentialDecayLengthPenalty", tuple(value), asked.ends, asked.prompt.shape[1]
    ),
    "suppress_tokens": lambda value, asked, _: _made(
        "SuppressTokensLogitsProcessor", value, device=asked.prompt.device.type
    ),
    "begin_suppress_tokens": lambda value, asked, settings: _made(
        "SuppressTokensAtBeginLogitsProcessor", value, _begin(asked, settings), device=asked.prompt.device.type
    ),
}
_STOPS = ("stop_strings", "max_time")
_WARPERS = {
    "temperature": "TemperatureLogitsWarper",
    "top_h": "TopHLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}
"""How tokens are drawn where the user does not say it. panda takes the likeliest one, or what its own flags say."""
_CARRIED = ("do_sample", *_WARPERS, "max_length", "max_new_tokens", "bos_token_id", "pad_token_id")
_FLOATS = ("repetition_penalty", "encoder_repetition_penalty", *(name for name in _WARPERS if name != "top_k"))
_DESCRIPTIVE = ("eos_token_id", "transformers_version", "_from_model_config", "_commit_hash")
"""``eos_token_id`` is one of the ends; the others say nothing about decoding."""

_BEAMS = "beam search, but an answer is written token by token"
_AHEAD = "guesses tokens ahead, which changes no word"
_SPEED = "memory and speed only: no word changes"
_FORM = "the form of what `generate` returns"
_HUB = "a search whose code transformers fetches from the hub"
_LEFT_OUT = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"), _BEAMS),
    **dict.fromkeys(("constraints", "force_words_ids", "low_memory"), _BEAMS),
    "num_return_sequences": "one answer is written",
    **dict.fromkeys(("penalty_alpha", "dola_layers"), _HUB),
    **dict.fromkeys(("use_mtp", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"), _AHEAD),
    **dict.fromkeys(("num_assistant_tokens_schedule", "assistant_confidence_threshold", "is_assistant"), _AHEAD),
    **dict.fromkeys(("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type"), _AHEAD),
    "assistant_ensemble_weight": _AHEAD,
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config"), _SPEED),
    **dict.fromkeys(("disable_compile", "prefill_chunk_size", "continuous_batching_config"), _SPEED),
    "renormalize_logits": "changes no choice of a token",
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _FORM),
    "return_dict_in_generate": _FORM,
    "guidance_scale": "classifier-free guidance, which needs a second prompt",
    "watermarking_config": "panda puts no watermark into answers",
    "token_healing": "rewrites the prompt",
    "decoder_start_token_id": "for models with an encoder",
}
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "length_penalty": 1,
    "use_cache": True,
    "guidance_scale": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "typical_p": 1,
    "top_p": 1,
}
"""The values with which a key asks for nothing, besides null, false and what is empty."""


def _says_nothing(key: str, value: Any) -> bool:
    if value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value):
        return key != "use_cache" or value is not False
    return key in _NEUTRAL and bool(value == _NEUTRAL[key]) and isinstance(value, bool) == (key == "use_cache")


def _reason(key: str, value: Any) -> str | None:
    """Why ``key`` is not followed, whatever the model; None where it can be."""
    if key in _LEFT_OUT:
        return _LEFT_OUT[key]
    if key not in _STOPS and key not in _PROCESSORS and key not in _CARRIED:
        return "unknown to panda"
    return None if _is_finite(value) else "not a finite number"


def _stop_problem(key: str, value: Any, tokenizer: Any) -> str | None:
    from transformers import StopStringCriteria

    if key == "max_time":
        return None if _is_number(value) and value > 0 else f"{value!r} is not a time in seconds"
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        return f"{value!r} is not a list of texts"
    try:
        StopStringCriteria(tokenizer, value)
    except Exception as problem:  # it analyses the vocabulary, by rules that are not those of every tokenizer
        return f"not with this tokenizer: {in_brief(problem)}"
    return None


def _processor_problem(settings: Mapping[str, Any], ends: list[int], vocabulary: int) -> str | None:
    """Why transformers cannot follow the last of ``settings``, tried on scores; None where it can."""
    scores = torch.linspace(-1, 1, vocabulary)[None]
    try:
        for length in (1, 3):
            prompt = torch.zeros(1, length, dtype=torch.int64)
            asked = _Asked(prompt, ends, max_length=length + 3)
            made = [_PROCESSORS[key](settings[key], asked, settings) for key in _PROCESSORS if key in settings]
            for more in range(3):
                ids = torch.zeros(1, length + more, dtype=torch.int64)
                result = scores.clone()
                for processor in made:
                    result = processor(ids, result)
                if bool(result.isnan().any()) or (more == 0 and not bool(result.isfinite().any())):
                    return "it leaves no token to choose"
    except Exception as problem:  # of values that only transformers knows to be wrong
        return f"transformers cannot follow it: {in_brief(problem, 100)}"
    return None


def _carried_problem(key: str, value: Any, values: Mapping[str, Any]) -> str | None:
    if key in ("bos_token_id", "pad_token_id"):
        return None if _is_token(value) else f"{value!r} is not a token"
    if key in ("max_length", "max_new_tokens"):
        return None if _is_token(value) and value > 0 else f"{value!r} is not a number of tokens"
    if values.get("do_sample") is not True:
        is_flag = key == "do_sample"
        return f"{value!r} is neither true nor false" if is_flag else "only for sampling, and do_sample is not true"
    if values.get("temperature") == 0:
        return "temperature 0 takes the likeliest token"
    if key == "do_sample":
        return None
    try:
        if key == "top_k" and not _is_token(value):
            raise ValueError(f"{value!r} is not a number of tokens")
        if key != "top_k" or value > 0:  # 0: all tokens
            _made(_WARPERS[key], value)
    except Exception as problem:
        return f"transformers cannot follow it: {in_brief(problem, 100)}"
    return None


def _as_transformers_accepts(found: Decoding) -> Decoding:
    """``found`` without keys that this transformers refuses to save together with those before them."""
    import transformers

    config: Any = transformers.GenerationConfig
    left_out, accepted = dict(found.left_out), dict[str, Any]()
    for key, value in found.written().items():
        try:
            config(**accepted, **{key: value}).validate(strict=True)
            accepted[key] = value
        except Exception as problem:
            left_out[key] = f"transformers refuses it: {in_brief(problem, 100)}"
    honoured = {key: value for key, value in found.honoured.items() if key in accepted}
    carried = {key: value for key, value in found.carried.items() if key in accepted}
    return Decoding(found.ends, honoured, carried, left_out)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


_MOST_TOKENS = 2**31
"""No vocabulary has so many."""


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)
