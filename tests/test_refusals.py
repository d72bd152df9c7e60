from __future__ import annotations

import pytest

from panda.cli.train import main
from panda.refusals import REFUSALS
from panda.run_options import RunOptions

REFUSED = {
    "max_steps: 0": ["--max_steps", "0"],
    "ckpt_path": ["--ckpt_path", "pretrain/llama-7b"],
    "lora_*, use_dora or use_rslora without use_lora": ["--use_rslora"],
    "use_quant with use_lora: false": ["--use_quant", "--use_lora", "false", "--precision", "bf16"],
    "use_quant without bitsandbytes": ["--use_quant", "--use_lora", "--precision", "bf16"],
    "quant_bits without use_quant": ["--quant_bits", "8"],
    "quant_bits: 8 with zero_stage: 3": [
        *("--use_quant", "--use_lora", "--precision", "bf16", "--quant_bits", "8", "--zero_stage", "3"),
    ],
    "bit_training": ["--bit_training"],
    "precision: fp16 with zero_stage: 0": ["--precision", "fp16", "--zero_stage", "0"],
    "compile with zero_stage: 3": ["--compile", "--zero_stage", "3"],
}


def test_every_refusal_is_tried_here() -> None:
    assert [refusal.what for refusal in REFUSALS] == list(REFUSED)


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_gives_its_reason_and_what_to_use_instead(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if "without bitsandbytes" in what else object()
    monkeypatch.setattr("panda.refusals.find_spec", lambda name: found)
    assert main(["--arch", "llama-7b", *REFUSED[what]]) == 2
    captured = capsys.readouterr()
    (refusal,) = (refusal for refusal in REFUSALS if refusal.what == what)
    assert captured.err == f"error: {what}: refused, since {refusal.reason}. Instead: {refusal.instead}.\n"
    assert captured.out == ""


def test_several_refusals_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "llama-7b", "--max_steps", "0", "--precision", "fp16", "--zero_stage", "0"]) == 2
    assert [line.count("refused") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_defaults_and_neighbours_of_what_is_refused_are_not() -> None:
    for options in (
        RunOptions(),
        RunOptions(precision="fp16", zero_stage=1),
        RunOptions(precision="bf16"),
        RunOptions(use_quant=True, use_lora=True, zero_stage=3),
        RunOptions(use_quant=True, use_lora=True, quant_bits=8, zero_stage=2),
        RunOptions(lora_r=64, lora_alpha=16.0, lora_dropout=0.05),
        RunOptions(use_lora=True, lora_r=8, lora_target_modules=("q_proj",), use_dora=True),
    ):
        assert [refusal.what for refusal in REFUSALS if refusal.applies(options)] == []


def test_a_refusal_reads_as_a_sentence() -> None:
    for refusal in REFUSALS:
        for text in (refusal.reason, refusal.instead):
            assert text and text.strip() == text and not text.endswith(".")
