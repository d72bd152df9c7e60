"""Mistakes that are likely, and exactly what is said of each: what was given, what was expected, what to do.

The command lines run in a folder with the files of FILES; ``OK`` stands for a model and data that are right.
"""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.cli import main as panda
from panda.cli import train

FILES = {
    "rows.json": '[{"input": "a", "target": "b"}]',
    "wrong.json": '[{"question": "a", "answr": "b"}]',
    "empty.json": "",
    "cut.json": '[{"input": "a", "target": "b"}, {"inp',
    "latin.json": b'[{"input": "caf\xe9", "target": "b"}]',
    "utf16.json": '[{"input": "a", "target": "b"}]'.encode("utf-16"),
    "twice.json": '[{"input": "a", "input": "b", "target": "c"}]',
    "no-data/notes.bin": "",
    "tabs.yaml": "arch: llama-tiny\n\tseed: 1\n",
    "twice.yaml": "arch: llama-tiny\nseed: 1\nseed: 2\n",
    "nested.yaml": "arch: llama-tiny\noptimizer:\n  name: adamw\n",
    "list.yaml": "- arch: llama-tiny\n",
    "latin.yaml": b"arch: llama-tiny\nrun_name: caf\xe9\n",
    "colon.yaml": "arch llama-tiny\n",
    "bom.yaml": b"\xef\xbb\xbfarch: llama-tiny\nsed: 1\n",
    "configs/run.yaml": "arch: llama-tiny\n",
    "taken/thesis.txt": "",
    "no-model/readme.txt": "",
    "no-weights/config.json": '{"model_type": "llama"}',
    "pickle/config.json": '{"model_type": "llama"}',
    "pickle/pytorch_model.bin": "",
    "adapters/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "/else/base", "r": 8}',
    "adapters/adapter_model.safetensors": "",
    "components.py": "x = 1\n",
    "deepspeed.json": '{"fp16": {"enabled": true}}',
    "cut-deepspeed.json": '{"fp16": ',
}

FORMATS = ".parquet or .arrow or .feather or .csv or .tsv or .json or .jsonl or .ndjson or .txt"
TOKENIZERS = "tokenizer.json, vocab.json, tokenizer.model, spiece.model, sentencepiece.bpe.model, tiktoken.model"
FIELDS = (
    "no field 'input' and no 'target' (nor instruction/input/output, prompt/completion, question/answer or messages;"
    " input_field and target_field name others)"
)
OK = "--arch llama-tiny --instruction_tuning_data_dir rows.json"
DATA = "--arch llama-tiny --instruction_tuning_data_dir"

MISTAKES = {
    # names
    "panda trian": "unknown command 'trian'. Did you mean 'train'? `panda --help` lists the commands.",
    "panda-train --arch llama-tiny --task instuct": "--task: unknown task 'instuct'. Did you mean 'instruct'?"
    " `panda list tasks` shows what is installed.",
    "panda-train --arch lama-tiny": "--arch: unknown arch 'lama-tiny'. Did you mean 'llama-tiny'?"
    " `panda list archs` shows what is installed.",
    "panda-train OK --optimizer adam": "--optimizer: unknown optimizer 'adam'. Did you mean 'adamw' or 'adamw8bit'?"
    " `panda list optimizers` shows what is installed.",
    "panda-train OK --lr_scheduler cosin": "--lr_scheduler: unknown lr_scheduler 'cosin'. Did you mean 'cosine'?"
    " `panda list lr_schedulers` shows what is installed.",
    "panda-train OK --plugins tensorbord": "--plugins: unknown plugin 'tensorbord'. Did you mean 'tensorboard'?"
    " `panda list plugins` shows what is installed.",
    "panda-train OK -p tensorboard": "-p tensorboard: expected `-p no:NAME`. To add a plugin, write `--plugins NAME`.",
    "panda-train OK --plugins components.py:Watch": "--plugins: {here}/components.py: it declares no plugin 'Watch'. A"
    ' declaration is read in the source: `@register_plugin("NAME")`, with the name written out, at the top of the'
    " file.",
    "panda-train OK --user_dir components": "--user_dir: '{here}/components' is not a folder.",
    "panda show optimzer adamw": "unknown kind 'optimzer'. Did you mean 'optimizers'? The kinds are: tasks, models,"
    " archs, optimizers, lr_schedulers, readers, plugins, kinds, metrics.",
    # keys
    "panda-train OK --learning_rte 1e-3": "--learning_rte: unknown key 'learning_rte'. Did you mean 'learning_rate'?",
    "panda-train OK --lr 1e-3": "--lr: 'lr' is not one of panda's keys: write `learning_rate`.",
    "panda-train OK --fp16": "--fp16: 'fp16' is not one of panda's keys: write `precision: fp16`.",
    "panda-train OK --nproc_per_node 2": "--nproc_per_node: 'nproc_per_node' is not one of panda's keys: it is for"
    " torchrun or deepspeed, and stands before `panda-train` (docs/machines.md).",
    "panda-train OK --seed 1 --seed 2": "--seed is given twice.",
    # values
    "panda-train OK --seed one": "--seed: 'one' is not an integer >= 0 and < 4294967296.",
    "panda-train OK --max_steps 1.5": "--max_steps: '1.5' is not an integer >= -1 and <= 1000000000.",
    "panda-train OK --max_steps": "--max_steps: a value is missing: an integer >= -1 and <= 1000000000.",
    "panda-train OK --learning_rate 0": "--learning_rate: '0' is not a number > 0 and <= 1000.",
    "panda-train OK --learning_rate 1e-4,3e-4": "--learning_rate: '1e-4,3e-4' is not a number > 0 and <= 1000. It is"
    " one number, with a point for its fraction; `panda sweep` trains several values.",
    "panda-train OK --precision bfloat16": "--precision: 'bfloat16' is not one of fp32, bf16, fp16.",
    "panda-train OK --template chta": "--template: 'chta' is not one of auto, chat, plain.",
    "panda-train OK --use_lora maybe": "--use_lora: 'maybe' is not true or false.",
    "panda-train OK --adam_betas 0.9": "--adam_betas: '0.9' is not 2 values, each a number >= 0 and < 1. 1 was given.",
    "panda-train OK --data_weights 1 2": "data_weights: 2 weights are given for 1 path: rows.json. Give each path its"
    " weight, in their order.",
    "panda generate no-model --prompt x --top_p 2": "--top_p: 2.0 is not a number > 0 and <= 1.",
    # configurations
    "panda-train run.yaml": "'run.yaml': expected a flag, --key value. Did you mean `--config run.yaml`?",
    "panda-train --config missing.yaml": "missing.yaml: no such configuration file (looked in {here}).",
    "panda-train --config configs": "configs: it is a folder, not a configuration file. Did you mean configs/run.yaml?",
    "panda-train --config tabs.yaml": "tabs.yaml:2: not valid YAML: while scanning for the next token, found character"
    " '\\t' that cannot start any token. YAML admits no tab there: use spaces.",
    "panda-train --config twice.yaml": "twice.yaml:3: 'seed' is given twice, first at twice.yaml:2. Keep one.",
    "panda-train --config nested.yaml": "nested.yaml:2: the value of 'optimizer' is nested. panda's configuration is"
    " flat: one level, `key: value`, where a value is a scalar or a list of scalars. `panda translate` writes files of"
    " other tools so.",
    "panda-train --config list.yaml": "list.yaml:1: expected `key: value` lines, found a list.",
    "panda-train --config colon.yaml": "colon.yaml:1: expected `key: value` lines, found the text 'arch llama-tiny'.",
    "panda-train --config latin.yaml": "latin.yaml:2: cannot be read: not UTF-8: byte 0xe9. Save the file as UTF-8.",
    "panda-train --config bom.yaml": "bom.yaml:2: unknown key 'sed'. Did you mean 'seed'?",
    "panda-train OK --deepspeed_config deepspeed.json": "deepspeed_config: deepspeed.json:1: 'fp16' is derived from"
    " panda's `precision`. Take it out of the file and set `precision`.",
    "panda-train OK --deepspeed_config cut-deepspeed.json": "deepspeed_config: cut-deepspeed.json: not valid JSON:"
    " Expecting value: line 1 column 10 (char 9).",
    # what cannot be combined
    "panda-train OK --lora_r 8": "lora_*, use_dora or use_rslora without use_lora: refused, since they configure"
    " adapters, and there are none without `use_lora`. Instead: `use_lora`, or leave them out.",
    "panda-train OK --eval_steps 10": "eval_steps without eval_data_dir or eval_fraction: refused, since there is"
    " nothing to evaluate on. Instead: name held-out data with `eval_data_dir`, hold a part out with `eval_fraction`,"
    " or leave `eval_steps` out.",
    "panda-train OK --tensor_parallel_size 2 --zero_stage 3": "tensor_parallel_size with zero_stage: 3: refused, since"
    " both partition the weights, and a checkpoint of the two together cannot be read back whole. Instead: `zero_stage:"
    " 2`, or `zero_stage: 3` without `tensor_parallel_size`.",
    "panda-train OK --hidden_size 10 --num_heads 3": "hidden_size 10 is not divisible by num_heads 3.",
    # data
    "panda-train --arch llama-tiny": "instruction_tuning_data_dir: './dataset/instruction_tuning' does not exist"
    " (looked in {here}). Give a folder of " + FORMATS + " files, or one such file.",
    f"panda-train {DATA} missing.json": "instruction_tuning_data_dir: 'missing.json' does not exist (looked in {here})."
    " Give a folder of " + FORMATS + " files, or one such file.",
    f"panda-train {DATA} no-data": "instruction_tuning_data_dir: 'no-data' has no file that ends in " + FORMATS + "; it"
    " has .bin. `reader` says how files are read; `panda list readers`.",
    f"panda-train {DATA} '*.parquet'": "instruction_tuning_data_dir: nothing matches the pattern '*.parquet' (looked in"
    " {here}).",
    f"panda prepare {DATA} wrong.json": "instruction_tuning_data_dir: 'wrong.json' has no row that can be trained on.\n"
    f"    bad row: wrong.json, row 1: {FIELDS}; its fields are: 'question', 'answr'\n"
    "    1 of 1 row cannot be used and is left out.",
    f"panda prepare {DATA} empty.json": "empty.json: the file is empty. Expected a JSON array of objects, an object, or"
    " JSON Lines.",
    f"panda prepare {DATA} cut.json": "cut.json:1:34: not valid JSON, in row 2: Unterminated string starting at. The"
    " file ends there: is it cut short?",
    f"panda prepare {DATA} latin.json": "latin.json:1: not UTF-8: byte 0xe9. Convert the file to UTF-8.",
    f"panda prepare {DATA} utf16.json": "utf16.json:1: not UTF-8: byte 0xff. It begins as UTF-16. Convert it to UTF-8.",
    f"panda prepare {DATA} twice.json": "instruction_tuning_data_dir: 'twice.json' has no row that can be trained on.\n"
    "    bad row: twice.json, row 1: it has 'input' twice, with two values\n"
    "    1 of 1 row cannot be used and is left out.",
    # places
    "panda-train OK --output_dir taken": "output_dir: 'taken' is not empty. `--resume auto` continues the run in it;"
    " for a new run choose another directory, or move this one away.",
    "panda-train OK --output_dir rows.json": "output_dir: 'rows.json' is a file. Name a folder.",
    "panda-train OK --output_dir rows.json/run": "output_dir: cannot make 'rows.json/run': {here}/rows.json is a file.",
    "panda-train OK --run_name a/b": "run_name: 'a/b' is not the name of a folder. For a path, use `output_dir`.",
    "panda-train OK --resume nowhere": "resume: no complete checkpoint at 'nowhere'. Give a run directory, its"
    " `checkpoints`, or one `step-...` folder; or `auto`.",
    "panda-train --resume taken": "--resume: no run at 'taken': no config.yaml in it. Name a run directory, its"
    " `checkpoints`, or one `step-...` folder.",
    "panda prepare OK --token_cache rows.json": "token_cache: cannot make 'rows.json': File exists. Set `token_cache`"
    " to a folder that can be written to.",
    "panda runs missing": "missing: no such folder. Name the one that has your runs: panda runs DIR.",
    "panda plot taken": "taken: expected a run directory, with the config.yaml of its run in it.",
    "panda export taken": "taken: no complete checkpoint there. Name a run directory, or a `step-...` folder.",
    # models
    "panda-train OK --ckpt_path no-model": "ckpt_path: no-model has no config.json, so it is not a checkpoint of a"
    " model; it has readme.txt.",
    "panda-train OK --ckpt_path no-weights": "ckpt_path: no-weights has no weights: none of *.safetensors*, *.bin*,"
    " consolidated.*.pth.",
    "panda-train OK --ckpt_path rows.json": "ckpt_path: 'rows.json' is a file. Name the folder that it is in.",
    "panda-train OK --ckpt_path pickle": "ckpt_path: pickle holds its weights in pickles (*.bin*), and loading a pickle"
    " can run code that is in it. If you trust its origin, add `--allow_pickle`; panda then loads it with torch's"
    " `weights_only`, which accepts only tensors.",
    "panda-train OK --ckpt_path adapters": "ckpt_path: adapters holds adapters whose base was not found: they name"
    " '/else/base', which is not a folder here. Name the folder of the weights that they were trained on with"
    " `base_path`.",
    "panda-train OK --tokenizer no-model": "tokenizer: 'no-model' has no tokenizer that transformers loads (none of "
    + TOKENIZERS
    + "). Name a folder that has one, such as that of a model.",
    "panda generate nowhere --prompt x": "'nowhere' is not a folder. Name a run directory, an export, or any folder in"
    " Hugging Face's format.",
    "panda generate taken --prompt x": "'taken' contains no model: no complete checkpoint, no export, no config.json.",
}
"""Command lines, and what is said on stderr after ``error: ``. ``{here}`` is the working folder."""

NEEDS_NO_GPU = {
    "panda-train OK --precision fp16": "precision: fp16 needs a GPU. Write `precision: bf16` or `fp32`.",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def said(command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a mistake, which ends the command with exit code 2."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("PANDA_CACHE", str(here.parent / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    program, *words = shlex.split(command.replace("OK", OK))
    main = train.main if program == "panda-train" else panda.main
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "", "torch is not loaded to find it"
    return captured.err


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_said_in_words(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"error: {MISTAKES[command]}\n".replace("{here}", str(here))
    assert said(command, here, monkeypatch, capsys) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
@pytest.mark.parametrize("command", NEEDS_NO_GPU)
def test_what_only_a_gpu_does_is_refused_without_one(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(command, here, monkeypatch, capsys) == f"error: {NEEDS_NO_GPU[command]}\n"


def test_adapters_on_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig
    from peft import get_peft_model

    get_peft_model(llama(1), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapters")
    save_hf(llama(1, hidden_size=64, intermediate_size=128), tmp_path / "other")
    capsys.readouterr()  # what is said when a library is loaded
    error = said("panda generate adapters --ckpt_path other --prompt x", tmp_path, monkeypatch, capsys)
    assert error == (
        "error: adapters: these adapters do not fit this LlamaForCausalLM: they were trained on another base."
        " base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight is [2, 32] in them, and [2, 64] on it."
        " Name the one that they were trained on.\n"
    )


def test_a_full_disk_is_said_with_what_to_do(
    here: Path, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    with full_disk(64):
        error = said(f"panda prepare OK --token_cache {cache}", here, monkeypatch, capsys)
    assert error == (
        f"error: token_cache: cannot write to {str(cache)!r}: the disk is full. Make room there (any folder in it can"
        " be deleted), or set `token_cache` to another folder.\n"
    )


def test_a_mistake_leaves_nothing_behind(here: Path) -> None:
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert found == {*FILES}
