"""A run, its export, its adapters, the merged model and plain transformers say the same words, and stop."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import run_panda
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import GenerationConfig
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

from panda.answers.assistant import Answer
from panda.answers.assistant import Assistant
from panda.answers.loading import Answering
from panda.answers.loading import described_in
from panda.cli.main import main

Captured = pytest.CaptureFixture[str]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ROWS = [{"input": "Say heron", "target": "heron"}, {"input": "Say otter", "target": "otter </s"}]
COMMON = ["--model", "hf", "--instruction_tuning_data_dir", "rows.json", "--warmup_steps", 0]
COMMON += ["--gradient_accumulation_steps", 1, "--num_workers", 0, "-p", "no:tensorboard", "-p", "no:plot"]
COMMON += ["--per_gpu_train_batch_size", 2]


def save_base(folder: Path, **generation: Any) -> Path:
    """A LLaMA whose tokenizer ends sequences at 0 and whose chat template ends answers at 2."""
    save_hf(llama(4, eos_token_id=0, initializer_range=0.3), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<pad>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **generation}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    save_base(folder / "base", repetition_penalty=1.05, num_beams=3, stop_strings=["</s"])
    (folder / "rows.json").write_text(json.dumps(ROWS))
    argv = [*COMMON, "--template", "chat", "--ckpt_path", "base", "--num_train_epochs", 60]
    argv += ["--max_seq_length", 64, "--learning_rate", 1e-2]
    prompts = ["--prompts", "Say heron", "Say otter"]
    for name, more in (("full", []), ("lora", ["--use_lora", "true"])):
        done = run_panda("panda-train", *argv, *prompts, *more, "--output_dir", name, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "num_beams (beam search, but an answer is written token by token)" in done.stderr
    assert main(["export", str(folder / "lora"), "--merge"]) == 0
    return folder


def generated(what: Path, prompt: str, capsys: Captured) -> str:
    capsys.readouterr()
    assert main(["generate", str(what), "--prompt", prompt, "--max_new_tokens", "20"]) == 0
    captured = capsys.readouterr()
    assert "cut" not in captured.err
    return captured.out


@pytest.mark.parametrize(("prompt", "answer"), [("Say heron", "heron"), ("Say otter", "otter </s")])
def test_all_say_the_same_words_and_stop(folder: Path, capsys: Captured, prompt: str, answer: str) -> None:
    for run in ("full", "lora"):
        recorded = json.loads((folder / run / "answers.json").read_text())
        assert {"prompt": prompt, "answer": answer} in recorded
    for what in ("full", "full/export", "lora", "lora/export", "lora/merged"):
        assert generated(folder / what, prompt, capsys) == answer + "\n", what
    for what in ("full/export", "lora/merged", "lora/export"):
        tokenizer = AutoTokenizer.from_pretrained(folder / what)
        config = GenerationConfig.from_pretrained(folder / what)
        assert config.eos_token_id == [0, 2] and config.repetition_penalty == 1.05 and config.num_beams is None
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "base" if what == "lora/export" else folder / what)
        if what == "lora/export":
            model = PeftModel.from_pretrained(model, str(folder / what))
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )
        found = model.generate(**ids, max_new_tokens=20, tokenizer=tokenizer, generation_config=config, pad_token_id=0)
        new = found[0, ids["input_ids"].shape[1] :]
        assert len(new) < 20 and tokenizer.decode(new, skip_special_tokens=True) == answer


def test_adapters_by_themselves_have_their_base_in_the_type_of_training(folder: Path, tmp_path: Path) -> None:
    """A base that is stored in bf16 was trained on in fp32."""
    from panda.answers.loading import with_adapters
    from panda.weights.finding import Source

    stored = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    shutil.copytree(folder / "lora" / "export", tmp_path / "adapters")
    answering = with_adapters(Source(str(tmp_path / "adapters"), "RUN"), str(tmp_path / "base"))
    model = answering.assistant(torch.device("cpu")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_adapters_away_from_their_run_end_where_training_ended_and_where_their_base_does(
    folder: Path, capsys: Captured, tmp_path: Path
) -> None:
    from panda.answers.loading import with_adapters
    from panda.weights.finding import Source

    away = (folder / "lora" / "export").rename(tmp_path / "away")
    try:
        found = with_adapters(Source(str(away), "RUN"), str(folder / "base"))
        assert found.assistant(torch.device("cpu")).decoding.ends == [0, 2]
        (away / "generation_config.json").rename(away / "elsewhere.json")
        found = with_adapters(Source(str(away), "RUN"), str(folder / "base"))
        assert found.assistant(torch.device("cpu")).decoding.ends == [0]
        (away / "elsewhere.json").rename(away / "generation_config.json")
    finally:
        away.rename(folder / "lora" / "export")


# -- what is on which stream --------------------------------------------------------------------


def test_stdout_has_the_answers_and_nothing_else(folder: Path, capfd: Any) -> None:
    assert main(["generate", str(folder / "lora"), "--prompt", "Say heron", "Say otter"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "heron\n\notter </s\n"
    assert "> Say heron\n" in captured.err and "> Say otter\n" in captured.err
    assert main(["generate", str(folder / "base"), "--prompt", "x", "--max_new_tokens", "1"]) == 0
    captured = capfd.readouterr()
    assert len(captured.out) <= 2
    assert "its generation config asks for what panda leaves out: num_beams (beam search" in captured.err
    assert "the answer was cut after 1 token: `--max_new_tokens`" in captured.err


def test_what_libraries_print_while_they_load_is_not_on_stdout(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Answering.assistant

    def noisy(self: Answering, device: torch.device) -> Assistant:
        print("Setting accelerator to CPU")  # as DeepSpeed does when it is imported
        return load(self, device)

    monkeypatch.setattr(Answering, "assistant", noisy)
    assert main(["generate", str(folder / "full"), "--prompt", "Say heron"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "heron\n" and "Setting accelerator" in captured.err


def test_a_terminal_is_not_obedient_to_a_model(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Assistant, ids: Any, sampling: Any, write: Any, note: Any) -> Answer:
        write("\x1b[2Jdone\n")
        return Answer("", "stop", 0, 0)

    monkeypatch.setattr(Assistant, "answer", answer)
    assert main(["generate", str(folder / "full"), "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "\x1b[2Jdone\n\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["generate", str(folder / "full"), "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "\\x1b[2Jdone\n\n"


def ids_given(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    given: list[list[int]] = []

    def answer(self: Assistant, ids: list[int], sampling: Any, write: Any, note: Any) -> Answer:
        given.append(ids)
        return Answer("y", "stop", 0, 1)

    monkeypatch.setattr(Assistant, "answer", answer)
    return given


def test_a_system_turn_is_part_of_every_dialogue(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ids_given(monkeypatch)
    export = str(folder / "full" / "export")
    assert main(["generate", export, "--prompt", "a", "--system", "be"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n/reset\na\n"))
    assert main(["chat", export, "--system", "be"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(export)
    start = "<s>system\nbe</s>\n<s>user\na</s>\n<s>assistant\n"
    later = start + "y</s>\n<s>user\nb</s>\n<s>assistant\n"
    assert [tokenizer.decode(ids) for ids in given] == [start, start, later, start]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--prompt", "caf\udce9"], "--prompt: the byte 0xe9 after 3 characters is not UTF-8"),
        (["--prompt", "a", "--system", "\udcff"], "--system: the byte 0xff after 0 characters is not UTF-8"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature: nan is not a number >= 0."),
    ],
)
def test_what_cannot_be_given_is_told_in_one_line(folder: Path, capsys: Captured, argv: list[str], told: str) -> None:
    assert main(["generate", str(folder / "full"), *argv]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_a_template_that_raises_is_told_with_its_reason(folder: Path, capsys: Captured, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system turns here') }}")
    assert main(["generate", str(base), "--prompt", "a", "--system", "b"]) == 2
    captured = capsys.readouterr()
    assert "the chat template refuses it: no system turns here" in captured.err and captured.out == ""


def test_a_system_turn_that_the_template_leaves_out_is_refused(capsys: Captured, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    turns = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    (base / "chat_template.jinja").write_text(turns)
    assert main(["generate", str(base), "--prompt", "a", "--system", "b"]) == 2
    assert "the chat template leaves the system turn out" in capsys.readouterr().err
    assert main(["generate", str(base), "--prompt", "a", "--max_new_tokens", "1"]) == 0


def test_threads_sleep_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else answers take ten times as long on a machine that does other work; torch reads it when it is loaded."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_an_empty_prompt_is_refused(capsys: Captured, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    assert main(["generate", str(base), "--prompt", "a", "--system", "b"]) == 2
    assert "has no chat template, so a system turn is unknown" in capsys.readouterr().err
    assert main(["generate", str(base), "--prompt", "", "--max_new_tokens", "2"]) == 2
    assert "--prompt: it is empty. Write one." in capsys.readouterr().err
    assert main(["generate", str(base), "--prompt", " ", "--max_new_tokens", "2"]) == 0


def test_a_chat_goes_on_after_a_line_that_is_not_utf8(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ids_given(monkeypatch)
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\ncaf\xc3\xa9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", str(folder / "full")]) == 0
    assert "not sent: the byte 0xe9 after 3 characters is not UTF-8" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert [tokenizer.decode(ids) for ids in given] == ["<s>user\ncafé</s>\n<s>assistant\n"]


# -- positions that a model has learnt ------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a GPT-2 of 32 positions, whose answers would need more."""
    folder = tmp_path_factory.mktemp("learnt")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    save_hf(GPT2LMHeadModel(config), folder / "base", shards=False)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    argv = [*COMMON, "--ckpt_path", "base", "--max_steps", 1, "--prompts", "x" * 9, "x" * 99, "--output_dir", "run"]
    done = run_panda("panda-train", *argv, "--max_seq_length", 32, "--learning_rate", 1e-6, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_answers_at_the_end_of_a_run_stay_within_its_positions(learnt: Path) -> None:
    answers = [answer["answer"] for answer in json.loads((learnt / "answers.json").read_text())]
    # <s> and the separator beside the prompt; the second prompt is cut to half of the positions.
    assert len(answers[0].encode()) > 0 and len(answers) == 2
    assistant = described_in(learnt / "export").assistant(torch.device("cpu"))
    assert assistant.positions == 32


def test_a_prompt_or_an_answer_beyond_the_positions_is_cut_and_that_is_said(learnt: Path, capsys: Captured) -> None:
    assert main(["generate", str(learnt), "--prompt", "x" * 90]) == 0
    error = capsys.readouterr().err
    assert "prompt: its first 76 of 92 tokens were left out; the model has 32 positions for prompt and answer" in error
    assert "the answer was cut after 16 tokens: the model has 32 positions" in error
    assert main(["generate", str(learnt), "--prompt", "x" * 20, "--max_new_tokens", "3"]) == 0
    error = capsys.readouterr().err
    assert "left out" not in error and "cut after 3 tokens: `--max_new_tokens`" in error


def test_a_long_dialogue_loses_its_first_exchanges(
    learnt: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ids_given(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("aaaa\nbbbb\ncccc\ndddd\n"))
    assert main(["chat", str(learnt)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(learnt / "export")
    assert all(len(ids) <= 16 for ids in given)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in given] == [
        "aaaa\n",
        "aaaa\nybbbb\n",
        "bbbb\nycccc\n",
        "cccc\nydddd\n",
    ]
    assert "the dialogue's first exchange was left out; the model has 32 positions" in capsys.readouterr().err
