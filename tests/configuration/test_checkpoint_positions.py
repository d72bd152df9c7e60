"""How many positions a checkpoint has, whatever its configuration calls them and however its RoPE is stretched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.positions import positions_of
from panda.registry import UserError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0]}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"model_type": "gpt2", "n_positions": 64, "n_ctx": 64}, 64),
        ({"model_type": "mpt", "max_seq_len": 96}, 96),
        ({"model_type": "gpt_neox", "max_position_embeddings": 80}, 80),
        ({"model_type": "gpt2"}, 1024),  # transformers' default
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 72}}, 72),
        ({"model_type": "llama", "max_position_embeddings": -1}, 2048),
        ({"model_type": "mamba2"}, None),
        # as vLLM reads them: https://docs.vllm.ai, `_get_and_verify_max_len`
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 256),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
            },
            131072,
        ),
        ({"max_position_embeddings": 4096, "original_max_position_embeddings": 64, "rope_scaling": LONG}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "model_type": "gemma3_text",
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            131072,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}, 64),
    ],
)
def test_positions_are_found_under_every_name_and_stretched_by_every_rule(
    config: dict[str, Any], count: int | None
) -> None:
    found = positions_of(config)
    assert (found.count if found else None) == count


def test_the_default_length_gives_way_to_the_positions_and_a_value_that_was_set_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_hf(llama(max_position_embeddings=96), tmp_path / "short")
    flags = ["--model", "llama", "--ckpt_path", str(folder)]
    assert configure(parse_arguments(flags)).options.max_seq_length == 96
    assert "max_seq_length is 96, and not 2048, its default" in capsys.readouterr().err
    assert configure(parse_arguments([*flags, "--max_seq_length", "64"])).options.max_seq_length == 64
    assert "max_seq_length" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"max_seq_length: 97 \(--max_seq_length\), but .* 96 positions"):
        configure(parse_arguments([*flags, "--max_seq_length", "97"]))
