"""``panda estimate``: a table, a sweep and JSON, without data, weights or a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.cli.main import main

SHAPE = "--arch llama-tiny --hidden_size 1024 --intermediate_size 2816 --num_layers 8 --num_heads 8 --vocab_size 32000"
FLAGS = f"{SHAPE} --precision bf16 --max_seq_length 2048 --per_gpu_train_batch_size 4"


@pytest.fixture(autouse=True)
def without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed, in tests before these, leaves the variables of one."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def said(capsys: pytest.CaptureFixture[str], flags: str) -> list[str]:
    assert main(["estimate", *f"{FLAGS} {flags}".split()]) == 0
    return capsys.readouterr().out.splitlines()


def test_parts_are_named_beside_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = 8 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 2 * 32000 * 1024 + 1024
    lines = said(capsys, "--card a100 --activation_checkpointing none --compile false")
    assert lines[0] == f"llama-tiny: {parameters:,} parameters, all trained"
    assert lines[1] == "bf16, ZeRO stage 1, adamw, padded rows, 4 x 2,048 tokens a micro batch on each of 1 GPU"
    table = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in lines[3:] if "  " in line}
    assert table["GiB on each GPU"] == "A100"
    assert (table["activation_checkpointing"], table["compile"]) == ("none", "false")
    assert table["weights"] == f"{2 * parameters / 2**30:.1f}"
    assert table["optimizer states"] == f"{8 * parameters / 2**30:.1f}"
    assert table["the card has"] == "79.2" and table["fits"] == "yes"
    parts = [
        float(line.split()[-1]) for line in lines[6 : lines.index(next(x for x in lines if x.startswith("in all")))]
    ]
    assert sum(parts) == pytest.approx(float(table["in all"]), abs=0.5)


def test_layers_that_stay_are_counted_for_each_card(capsys: pytest.CaptureFixture[str]) -> None:
    stays = "Layers that stay gathered through a step, in the room that is left: 8 on A100."
    for stage, gpus, is_said in ((3, 2, True), (3, 1, False), (2, 2, False)):
        assert (stays in said(capsys, f"--card a100 --zero_stage {stage} --gpus {gpus}")) is is_said


@pytest.mark.parametrize(
    ("flags", "cell", "sentence"),
    [
        ("", "2+ steps", "compile (auto): it pays from 2 steps on."),
        ("--max_steps 9", "2+ steps", "compile (auto): it takes about 30 s, and saves about "),
        ("--max_steps 1", "2+ steps", "compile (auto): it takes about 30 s, and would save about "),
        ("--use_quant --quant_bits 8", "false", "compile (auto): 8 bits are not known to work compiled."),
        ("--compile", "true", ""),
        ("--compile off", "false", ""),
    ],
)
def test_whether_the_run_is_compiled_is_said(
    flags: str, cell: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, f"--card l4 --gradient_accumulation_steps 1024 {flags}")
    (row,) = (line for line in lines if line.startswith("compile  "))
    assert row.removeprefix("compile ").strip() == cell
    assert [line.startswith(sentence) for line in lines if line.startswith("compile (auto)")] == [True] * bool(sentence)


def test_what_does_not_fit_is_told_with_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--card 6 --activation_checkpointing none")
    advice = next(line for line in lines if line.startswith("6 GiB: does not fit. "))
    assert "The cheapest single change that makes it fit 6 GiB: `" in advice


def test_common_cards_are_compared_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    header, how = said(capsys, "")[3:5]
    assert header.split()[-4:] == ["H200", "H100", "A100-40", "RTX-4090"]
    assert how.split() == ["activation_checkpointing", "none", "none", "none", "none"]


def test_four_cards_fit_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["estimate", "--arch", "llama-7b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 79] == []
    assert any(line.startswith("RTX-4090: does not fit. ") for line in lines)


def test_a_sweep_has_a_row_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--card 9 --sweep")
    begin = next(number for number, line in enumerate(lines) if line.startswith("ZeRO stage"))
    assert lines[begin].split()[2::2] == ["1", "2", "4", "8", "16", "32", "64"]
    rows = {line[0]: line[12:] for line in lines[begin + 1 : begin + 5]}
    assert list(rows) == ["0", "1", "2", "3"]
    sizes = {
        stage: [float(cell.strip(" sf*")) for cell in (row[i : i + 10] for i in range(0, 70, 10))]
        for stage, row in rows.items()
    }
    assert sizes["1"][1] > sizes["1"][-1], "more ranks, less of the optimizer on each"
    assert "*" in rows["1"]
    refused = said(capsys, "--card 9 --sweep --tensor_parallel_size 2")
    assert "3           refused" in refused


def test_json_has_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(
        "\n".join(said(capsys, "--card 6 --json --gpus 2 --zero_stage 2 --activation_checkpointing none"))
    )
    assert (found["gpus"], found["zero_stage"], found["rows"], found["length"]) == (2, 2, 4, 2048)
    (card,) = found["cards"]
    assert card["total"] == sum(card["parts"].values()) == card["allocated"] + card["parts"]["context"]
    assert (card["memory"], card["fits"]) == (6 * 2**30, False)
    assert card["change"]["gpus"] >= 2
    assert card["compile"] is True and card["compile_from_steps"] > 0
    assert found["flops_per_token"] > 6 * (found["parameters"] - 32000 * 1024)


def test_a_file_is_read_as_for_training_but_not_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\ninstruction_tuning_data_dir: nobody/nothing\nprecision: bf16\n")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["estimate", str(file), "--zero_stage", "3", "--card", "h100"]) == 0
    assert (
        "ZeRO stage 3, adamw, padded rows, 1 x 2,048 tokens a micro batch on each of 4 GPUs" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--card", "--card: expected a value"),
        ("--card h1", "--card: 'h1' is not a card that panda knows (H200, H100"),
        ("--gpus two", "--gpus: 'two' is not a number of GPUs."),
        ("--gpus 0", "--gpus: '0' is not a number of GPUs."),
        ("--sweep=yes", "--sweep: expected no value"),
        ("--seeed 3", "unknown key 'seeed'"),
        ("--gpus 3 --tensor_parallel_size 2", "tensor_parallel_size: 2 processes hold a copy"),
    ],
)
def test_mistakes_are_explained(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *f"{FLAGS} {flags}".split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["abc", "0", "-1"])
def test_a_launcher_that_says_no_number_of_ranks(
    ranks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(["estimate", *FLAGS.split()]) == 2
    assert f"WORLD_SIZE={ranks} in the environment: expected a number of ranks" in capsys.readouterr().err


def test_help_and_nothing() -> None:
    assert main(["estimate", "--help"]) == 0
    assert main(["estimate"]) == 2
