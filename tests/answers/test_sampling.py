"""Answers in batches, decoded as `panda generate` decodes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import llama
from model_types import ENTRIES
from model_types import tiny

from panda.answers.generation import greedy
from panda.answers.sampling import Manner
from panda.answers.sampling import random_numbers
from panda.answers.sampling import sampled
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.registry.contexts import ModelContext
from panda.weights.generation_config import Decoding

PROMPTS = [[5], [6, 7, 8, 9], [5, 6, 5, 6, 5], [12, 13, 14]]
CPU, NEW, ENDS = torch.device("cpu"), 12, [1]


class Plain(torch.nn.Module):
    """The same model, without a way of its own to generate."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids).logits


@pytest.mark.parametrize("wrap", [lambda model: model, Plain])
def test_each_row_is_decoded_as_it_is_alone(wrap: Any) -> None:
    """What a generation config asks for sees a row's own tokens, and none of the padding before them."""
    torch.manual_seed(0)
    model = wrap(llama()).eval()
    decoding = Decoding(ENDS, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {}, {})
    plain = sampled_answers(model, Decoding(ENDS, {}, {}, {}), [])
    last, pad = plain[1][2], plain[0][0]
    stops = [lambda row, scores: row[:, -1] == last]
    for how, criteria in ((decoding, []), (Decoding(ENDS, {}, {}, {}), stops)):
        alone = [
            greedy(
                model,
                [prompt],
                max_new_tokens=NEW,
                pad_token_id=pad,
                end_tokens=ENDS,
                processors=how.processors,
                criteria=criteria,
                device=CPU,
            )[0]
            for prompt in PROMPTS
        ]
        assert sampled_answers(model, how, criteria, pad) == alone
        assert alone != plain


def sampled_answers(model: Any, how: Decoding, criteria: list[Any], pad: int = 0) -> list[list[int]]:
    """The answers to all prompts at once, without the token that ends one."""
    found = sampled(
        model,
        PROMPTS,
        np.zeros((len(PROMPTS), NEW)),
        Manner(NEW, temperature=0.0),
        end_tokens=ENDS,
        pad_token_id=pad,
        device=CPU,
        processors=how.processors,
        criteria=criteria,
    )
    return [[token for token in each.token_ids if token not in ENDS] for each in found]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neo", "gpt_bigcode", "xglm", "opt", "mixtral"])
def test_log_probs_of_prompts_of_unlike_lengths_are_those_of_each_alone(model_type: str) -> None:
    """In plain transformers. Positions that are learned count from a prompt's first token, and not from the padding."""
    plain = tiny(model_type).eval()
    config = plain.config.to_dict()
    model: Any = build_hf(HfOptions(), ModelContext(ENTRIES, 64, 0, 1, 2, config=config)).eval()
    model.load_state_dict(plain.state_dict())
    prompts, plain.config.output_router_logits = [[5, 6, 7, 8, 9, 10], [11, 12, 13]], False
    draws = random_numbers(1, [(0, number) for number in range(len(prompts))], NEW)
    answers = sampled(model, prompts, draws, Manner(NEW), end_tokens=ENDS, pad_token_id=0, device=CPU)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer.token_ids]), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.token_ids)[:, None])
        assert answer.log_probs == pytest.approx(expected.squeeze(-1).tolist(), abs=1e-4)
