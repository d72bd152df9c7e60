"""A model that looks ahead, or whose output is not what training needs, is refused before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import add_tokenizer
from checkpoint_files import llama
from launching import run_panda
from transformers import AutoConfig
from transformers import AutoModelForCausalLM

from panda.models.forward.trial import refuse_unfit
from panda.registry import UserError

CPU = torch.device("cpu")
BERT = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **BERT, **changes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_looks_ahead_and_a_decoder_does_not(dtype: torch.dtype) -> None:
    refuse_unfit(llama().eval().to(dtype), "llama", 259, CPU)
    refuse_unfit(bert(is_decoder=True).to(dtype), "bert", 259, CPU)
    with pytest.raises(UserError, match=r"looks ahead: .*encoder such as BERT"):
        refuse_unfit(bert().to(dtype), "bert", 259, CPU)


def test_a_mixture_of_experts_whose_rounding_depends_on_other_rows_is_not_refused() -> None:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        noise = 1e-3 * torch.sin(ids.sum().float() + ids.sum(1, keepdim=True))  # of the whole batch, and of the row
        return torch.nn.functional.one_hot(ids, 300).float() + noise.unsqueeze(2)

    refuse_unfit(forward, "experts", 259, CPU)


UNFIT: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a vocabulary that is too small": (lambda ids: torch.zeros(*ids.shape, 258), r"\[2, 16, 258\]; expected logits"),
    "a class for each row": (lambda ids: torch.zeros(2, 300), r"of shape \[2, 300\]"),
    "the last token only": (lambda ids: torch.zeros(2, 1, 300), r"of shape \[2, 1, 300\]"),
    "no tensor": (lambda ids: {"logits": 1}, "a dict"),
    "no numbers": (lambda ids: torch.full((*ids.shape, 300), torch.nan), "not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_output_of_another_shape_is_refused(name: str) -> None:
    forward, said = UNFIT[name]
    with pytest.raises(UserError, match=said):
        refuse_unfit(forward, "odd", 259, CPU)


def test_a_run_that_would_train_an_encoder_is_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    add_tokenizer(tmp_path / "bert")
    flags = (
        "--model",
        "hf",
        "--ckpt_path",
        tmp_path / "bert",
        "--instruction_tuning_data_dir",
        "panda:data/sample/instruct",
    )
    done = run_panda("panda-train", *flags, "--max_seq_length", 256, "--precision", "bf16", cwd=tmp_path)
    assert done.returncode == 2 and "model hf: refused, since it looks ahead" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("checkpoints"))
