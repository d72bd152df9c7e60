"""What a run says that it is going to do, against what it does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import BIN
from launching import run_panda
from launching import run_script
from model_types import tiny

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.manifest import Progress
from panda.registry.location import resolve_path
from panda.run.assembly import lay_out
from panda.run.outlook import outlook
from panda.run.preparation import prepare

TINY = "--arch llama-tiny --num_layers 2 --hidden_size 16 --intermediate_size 24 --num_heads 2"
TINY_64 = f"{TINY} --max_seq_length 64"
ROWS = [{"input": "x" * length, "target": "y" * 4} for length in (1, 3, 5, 20, 40, 80)]
Outlook = Callable[..., dict[str, list[str]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(llama(), tmp_path_factory.mktemp("checkpoint") / "base")


def prepared_lines(
    flags: str, ranks: int, progress: Progress | None, resumed: Path | None, data: str = "rows.json"
) -> list[str]:
    given = ["--instruction_tuning_data_dir", data, "--token_cache", "cache", *flags.split()]
    configuration = configure(parse_arguments(given))
    prepared = prepare(configuration, ranks)
    prepared.decide()
    layout = lay_out(configuration.options, prepared.dataset, ranks, *([progress] if progress else []))
    return outlook(prepared, layout, Path("runs/x"), resumed)


@pytest.fixture
def said(folder: Path) -> Outlook:
    """``said(flags)``: the lines under each label; notes under ``note``."""

    def lines_of(
        flags: str,
        ranks: int = 1,
        progress: Progress | None = None,
        resumed: Path | None = None,
        data: str = "rows.json",
    ) -> dict[str, list[str]]:
        parts: dict[str, list[str]] = {"note": []}
        label = ""
        for line in prepared_lines(flags, ranks, progress, resumed, data):
            if line.startswith("note: "):
                parts["note"].append(line.removeprefix("note: "))
                continue
            label = line[:12].strip() or label
            parts.setdefault(label, []).append(line[12:])
        return parts

    return lines_of


def test_random_weights_are_called_random_and_the_default_tokenizer_too(said: Outlook) -> None:
    parts = said(f"{TINY_64} --seed 7")
    hidden, between, layers, vocabulary = 16, 24, 2, 259
    norms = (2 * layers + 1) * hidden
    parameters = 2 * vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * between) + norms
    assert parts["model"] == [f"llama (llama-tiny), {parameters:,} parameters, all trained"]
    assert parts["weights"] == ["random, drawn from seed 7"]
    assert parts["tokenizer"] == ["panda:data/sample/tokenizer (the default, which reads bytes), 259 entries"]
    assert parts["text"] == [r"plain, separator '\n'"]
    assert parts["output"] == ["runs/x"]
    assert "evaluation" not in parts


MIXTURE = "num_hidden_layers=1 hidden_size=16 moe_intermediate_size=16 num_experts=4 vocab_size=320"
ROUTER_LOSSES = {
    "": "on, weight 0.001 (arch qwen3-30b-a3b)",
    "--router_aux_loss_coef 0.02": "on, weight 0.02 (--router_aux_loss_coef)",
    "--router_aux_loss_coef 0": "off (--router_aux_loss_coef)",
}
STATED = {
    True: ["router loss on, weight 0.25 (output_router_logits in the checkpoint's config.json)"],
    False: [
        "router loss off (no output_router_logits in the checkpoint's config.json)",
        "`router_aux_loss_coef: 0.25`, the weight there, turns it on",
    ],
}


@pytest.mark.parametrize("flags", ROUTER_LOSSES)
def test_whether_the_router_loss_is_on_is_said_with_who_decides_it(said: Outlook, flags: str) -> None:
    parts = said(f"--arch qwen3-30b-a3b --hf_config {MIXTURE} --max_seq_length 64 {flags}")
    assert parts["model"][1:] == [f"router loss {ROUTER_LOSSES[flags]}"]


@pytest.mark.parametrize("states", STATED)
def test_a_checkpoint_of_experts_says_whether_its_router_loss_is_on(
    said: Outlook, folder: Path, *, states: bool
) -> None:
    model = tiny("qwen3_moe")
    model.resize_token_embeddings(259)
    model.config.update({"output_router_logits": states, "router_aux_loss_coef": 0.25})
    save_hf(model, folder / "experts")
    parts = said("--ckpt_path experts --max_seq_length 64 --use_lora")
    assert parts["model"][1 : 1 + len(STATED[states])] == STATED[states]


def test_experts_without_a_known_router_loss_say_so(said: Outlook, folder: Path) -> None:
    model = tiny("deepseek_v3")
    model.resize_token_embeddings(259)
    save_hf(model, folder / "experts")
    parts = said("--ckpt_path experts --max_seq_length 64")
    assert parts["model"][1:] == ["router loss: DeepseekV3ForCausalLM has none that panda knows"]


def test_a_checkpoint_is_named_with_its_own_tokenizer(said: Outlook, checkpoint: Path, folder: Path) -> None:
    parts = said(f"--model hf --ckpt_path {checkpoint} --max_seq_length 64 --learning_rate 1e-5")
    assert parts["model"][0].startswith("hf (llama), ")
    assert parts["weights"] == [f"{checkpoint} (a folder): safetensors, llama"]
    assert parts["tokenizer"] == [f"{checkpoint}, the checkpoint's own, 259 entries"]
    (folder / "link").symlink_to(checkpoint)
    own = said(f"--model hf --ckpt_path {checkpoint} --tokenizer link --max_seq_length 64 --learning_rate 1e-5")
    assert own["tokenizer"] == ["link, the checkpoint's own, 259 entries"]
    assert not [note for note in (*parts["note"], *own["note"]) if "tokenizer" in note]


def test_a_tokenizer_that_is_not_the_checkpoints_is_noted(said: Outlook, checkpoint: Path, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(resolve_path("panda:data/sample/tokenizer"), other)
    flags = f"--model llama --ckpt_path {checkpoint} --tokenizer other --max_seq_length 64 --learning_rate 1e-5"
    equal = said(flags)
    assert equal["tokenizer"] == ["other, not the checkpoint's, 259 entries"]
    assert not [note for note in equal["note"] if "entries" in note]
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [entry for entry, number in vocabulary.items() if number in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    note = "2 of the 259 entries of this tokenizer have another id in the checkpoint's own, or none"
    assert note in said(flags)["note"]

    moved = {entry: (number + 2) % len(vocabulary) for entry, number in vocabulary.items()}
    tokenizer["model"]["vocab"] = moved
    for added in tokenizer["added_tokens"]:
        added["id"] = moved[added["content"]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    note = "259 of the 259 entries of this tokenizer have another id in the checkpoint's own, or none;"
    assert f"{note} the checkpoint's embeddings mean nothing to it" in said(flags)["note"]


def test_where_the_checkpoint_has_no_tokenizer_that_is_noted(said: Outlook, checkpoint: Path, folder: Path) -> None:
    bare = folder / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    flags = f"--model llama --ckpt_path bare --tokenizer {checkpoint} --max_seq_length 64 --learning_rate 1e-5"
    assert any(note.startswith("the checkpoint has no tokenizer of its own") for note in said(flags)["note"])


@pytest.mark.parametrize("limit", [12, 30, 64, 128])
def test_the_share_that_is_cut_is_counted(said: Outlook, limit: int) -> None:
    parts = said(f"{TINY} --max_seq_length {limit}")
    whole = [len("<") + len(row["input"]) + len("\n") + len(row["target"]) + len(">") for row in ROWS]
    longer = sum(length > limit for length in whole)
    tokens, answers = sum(min(length, limit) for length in whole), len(ROWS) * (4 + 1)
    assert parts["data"][:2] == [
        "rows.json: 6 samples of 6 rows in 1 file",
        f"{tokens} tokens, {answers} of them with loss",
    ]
    if longer:
        share = f"{longer} of 6 samples ({longer / 6:.1%}) {'is' if longer == 1 else 'are'}"
        assert parts["data"][2] == f"{share} cut to {limit} tokens (max_seq_length)"
    else:
        assert parts["data"][2] == f"no sample is cut to {limit} tokens"


def test_rows_that_are_left_out_are_told_with_the_data(said: Outlook, folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps([*ROWS, {"input": "a"}]))
    (folder / "held.json").write_text(json.dumps([*ROWS[:2], {"target": "a"}]))
    parts = said(f"{TINY_64} --eval_data_dir held.json --eval_steps 5")
    assert parts["data"][0] == "rows.json: 6 samples of 7 rows in 1 file"
    assert "bad row: rows.json, row 7: no field 'target'" in parts["data"][3]
    assert "1 of 7 rows cannot be used and is left out." in parts["data"]
    assert parts["evaluation"][:2] == ["every 5 steps and at the end", "held.json: 2 samples of 3 rows in 1 file"]
    assert "1 of 3 rows cannot be used and is left out." in parts["evaluation"]
    assert said(f"{TINY_64} --eval_data_dir held.json")["evaluation"][0] == "only at the end"


def test_samples_that_are_held_out_by_a_fraction_are_told(said: Outlook) -> None:
    parts = said(f"{TINY_64} --eval_fraction 0.5 --max_samples 4 --eval_steps 5")
    assert parts["data"][0] == "rows.json: 2 samples of 6 rows in 1 file"
    assert parts["data"][-2:] == [
        "max_samples: 4 of 6 samples are used, the first of each data set",
        "eval_fraction: 2 of 4 samples are held out, and not trained on",
    ]
    assert parts["evaluation"][0] == "every 5 steps and at the end"
    assert parts["evaluation"][1].startswith("2 held-out samples of the data above (eval_fraction), ")


RATE = "is high for full fine-tuning of a checkpoint"


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        ("", True),  # the default, 1e-3
        ("--learning_rate 1e-4", True),
        ("--learning_rate 5e-5", False),
        ("--optimizer adamw8bit", True),
        ("--optimizer lamb", False),
        ("--use_lora --learning_rate 2e-4", False),
        ("--use_lora", False),
    ],
)
def test_a_high_learning_rate_on_all_weights_of_a_checkpoint_is_noted(
    said: Outlook, checkpoint: Path, flags: str, noted: bool
) -> None:
    notes = said(f"--model llama --ckpt_path {checkpoint} --max_seq_length 64 {flags}")["note"]
    assert any(RATE in note for note in notes) == noted, notes
    assert not [note for note in notes if "adapters" in note]


def test_high_rates_of_adapters_are_noted_and_none_on_random_weights(said: Outlook, checkpoint: Path) -> None:
    high = said(f"--model llama --ckpt_path {checkpoint} --max_seq_length 64 --use_lora --learning_rate 2e-3")
    assert "learning_rate 0.002 is high for adapters: 1e-4 to 1e-3 are usual" in high["note"]
    assert not [note for note in said(f"{TINY_64} --learning_rate 2e-3")["note"] if "high" in note]


def test_adapters_are_counted_and_named(said: Outlook, checkpoint: Path) -> None:
    parts = said(f"--model llama --ckpt_path {checkpoint} --max_seq_length 64 --use_quant --lora_r 4")
    hidden, between, kv = 32, 48, 16
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, between)] * 3
    trained = 2 * sum(4 * (rows + columns) for rows, columns in shapes)
    assert parts["model"] == [
        f"llama, {sum(p.numel() for p in llama().parameters()):,} parameters; {trained:,} of adapters are trained",
        "LoRA adapters of rank 4, alpha 16, dropout 0.05",
        "on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ]
    assert parts["weights"] == [f"{checkpoint} (a folder): safetensors, llama; frozen, in 4 bits (NF4)"]
    assert parts["engine"][0].startswith("bf16, ZeRO stage 1; 1 rank on ")
    whole = said(f"--model llama --ckpt_path {checkpoint} --max_seq_length 64 --use_lora")
    assert whole["weights"] == [f"{checkpoint} (a folder): safetensors, llama; frozen"]


def test_samples_and_tokens_of_a_step_are_those_of_all_ranks(said: Outlook, folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps([{"input": "abc", "target": "de"}] * 12))  # 8 tokens each
    flags = f"{TINY_64} --per_gpu_train_batch_size 2 --gradient_accumulation_steps 3 --num_train_epochs 1.5"
    assert said(flags)["steps"] == [
        "3 steps of 6 samples (2 x 3 x 1, micro batch x accumulation x ranks): 1.5 epochs",
        "about 48 tokens a step, in padded rows: 100.0% data",
    ]
    two = said(f"{flags} --batching packed --max_steps 4", ranks=2)["steps"]
    assert two[0] == "4 steps of 12 samples (2 x 3 x 2, micro batch x accumulation x ranks): 4 epochs"
    assert re.fullmatch(
        r"about 96 tokens a step, in packed rows of up to 64: [\d.]+% data, [\d.]+ samples a row", two[1]
    )


def test_the_engine_and_the_checkpoints_are_described(said: Outlook, folder: Path) -> None:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    parts = said(
        f"{TINY_64} --precision bf16 --zero_stage 2 --deepspeed_config ds.json --activation_checkpointing full"
        " --compile --save_steps 10 --save_total_limit 2 --lr_scheduler cosine --learning_rate 2e-4",
        ranks=2,
    )
    expected = (
        "bf16, ZeRO stage 2, optimizer state offloaded to cpu, full activation checkpointing, compiled; 2 ranks on "
    )
    assert parts["engine"][0].startswith(expected)
    assert parts["saves"] == [
        "every 10 steps, every 30 minutes, at the end, on Ctrl-C and SIGTERM; the newest 2 are kept",
        "at most 10 steps or 30 minutes, the shorter of them, are lost if the run is killed or the machine fails",
    ]
    assert parts["optimizer"] == ["adamw, learning_rate 0.0002 (--learning_rate), schedule cosine"]
    lost = "lost if the run is killed or the machine fails"
    none = said(f"{TINY_64} --save_final false --save_minutes 0")
    assert none["saves"] == ["on Ctrl-C and SIGTERM", f"all of it is {lost}"]
    few = said(f"{TINY_64} --save_final false --save_minutes 0 --save_steps 10")
    assert few["saves"] == ["every 10 steps, on Ctrl-C and SIGTERM", f"at most 10 steps are {lost}"]
    assert said(TINY_64)["saves"] == [
        "every 30 minutes, at the end, on Ctrl-C and SIGTERM",
        f"at most 30 minutes are {lost}",
    ]


def test_files_with_names_of_splits_beside_train_are_noted(said: Outlook, folder: Path) -> None:
    names = (
        "data/train-00000-of-00001.json",
        "data/test-00000-of-00001.json",
        "other.json",
        "dev/a.json",
        "dev/b.json",
    )
    for name in names:
        (folder / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "got" / name).write_text(json.dumps([{"input": name, "target": "y"}]))

    def noted(given: str, flags: str = "") -> list[str]:
        parts = said(f"{TINY_64} {flags}", data=given)
        return [line for label in ("data", "evaluation") for line in parts.get(label, []) if line.startswith("note: ")]

    assert noted("got") == ["note: files named dev and test are trained on too; `got:train` takes those of train"]
    assert noted("got", "--eval_data_dir got/dev/*") == [
        "note: files named test are trained on too; `got:train` takes those of train"
    ]
    assert noted("rows.json", "--eval_data_dir got/data") == [
        "note: got/data: files named train are evaluated on too, beside test"
    ]
    for given in ("got/dev", "got/data/test-00000-of-00001.json", "got:train", "got/data/t*"):
        assert noted(given) == [], given
    (folder / "got" / "README.md").write_text("---\nconfigs:\n- {config_name: all, data_files: '*/*.json'}\n---\n")
    assert noted("got") == [], "the card says that all are of train"
    (folder / "got" / "README.md").unlink()
    (folder / "got" / "data" / "train-00000-of-00001.json").unlink()
    assert noted("got") == []


def test_a_mix_names_each_part(said: Outlook, folder: Path) -> None:
    (folder / "docs.json").write_text(json.dumps([{"text": "some text"}] * 4))
    parts = said(f"{TINY_64} --task mix --pretraining_data_dir docs.json --pretrain_weight 0.5")
    assert parts["text"] == [r"instruct: plain, separator '\n'; pretrain: text as it is"]
    assert parts["data"][0] == "rows.json, docs.json: 10 samples of 10 rows in 2 files"
    assert parts["data"][-1] == "an epoch is 6 of 6 samples of instruct and 2 of 4 samples of pretrain"


def test_a_run_in_the_place_of_one_that_exists_says_so(said: Outlook, folder: Path) -> None:
    default = Path("runs/instruct-llama-tiny")
    default.mkdir(parents=True)
    assert said(TINY_64)["output"] == [f"runs/x (there is a {default} already)"]
    assert said(f"{TINY_64} --run_name herons")["output"] == ["runs/x"]


def test_a_run_that_is_resumed_says_from_where(said: Outlook) -> None:
    at, path = Progress(step=2, position=4, tokens=0, units=0, skipped_steps=0), Path("runs/x/step-2")
    flags = f"{TINY_64} --gradient_accumulation_steps 2"
    assert said(flags, progress=at, resumed=path)["output"] == ["runs/x, resumed from runs/x/step-2, step 2 of 3"]
    done = said(f"{flags} --max_steps 2", progress=at, resumed=path)
    assert done["output"] == ["runs/x, resumed from runs/x/step-2, step 2 of 2; nothing is left to train"]
    auto = said(f"{flags} --resume auto")["output"]
    assert auto == ["runs/x, where there is no checkpoint yet: the run starts from the beginning"]


def test_a_warm_up_that_another_length_of_the_run_changes_is_noted(said: Outlook) -> None:
    path = Path("runs/x/checkpoints/step-2")
    path.mkdir(parents=True)
    Path("runs/x/provenance.json").write_text(json.dumps({"total_steps": 20}))
    flags = f"{TINY_64} --gradient_accumulation_steps 2 --max_steps"

    def noted(more: str, step: int = 2) -> list[str]:
        at = Progress(step=step, position=4 * step, tokens=0, units=0, skipped_steps=0)
        return [note for note in said(f"{flags} {more}", progress=at, resumed=path)["note"] if "warm" in note]

    assert noted("40 --warmup_proportion 0.1") == [
        "warmup_proportion: the run had 20 steps and has 40, of which 4 are the warm-up: the learning rate is still"
        " rising after step 2. `warmup_steps` makes it the same in a run of any length"
    ]
    assert noted("40 --warmup_proportion 0.1", step=4) == [], "after it"
    assert noted("20 --warmup_proportion 0.2") == noted("40 --warmup_steps 10") == []


def test_steps_of_another_size_are_noted_with_the_learning_rate(said: Outlook) -> None:
    path = Path("runs/x/checkpoints/step-2")
    path.mkdir(parents=True)
    Path("runs/x/provenance.json").write_text(json.dumps({"total_steps": 12, "step_samples": 2}))
    at = Progress(step=2, position=4, tokens=0, units=0, skipped_steps=0)
    flags = f"{TINY_64} --lr_scheduler linear --warmup_steps 0 --learning_rate 1e-3 --max_steps"

    def noted(more: str) -> list[str]:
        return [note for note in said(f"{flags} {more}", progress=at, resumed=path)["note"] if "a step has" in note]

    assert noted("6 --gradient_accumulation_steps 4") == [
        "a step has 4 samples, and had 2, so the run has 6 steps in place of 12: the learning rate of step 3 is"
        " 0.000667, and would have been 0.000833"
    ]
    assert noted("6 --gradient_accumulation_steps 2") == []


def test_a_peak_that_is_never_reached_is_noted(said: Outlook) -> None:
    note = "the run ends within the warm-up: the learning rate is below its peak until the last step"
    flags = f"{TINY_64} --gradient_accumulation_steps 1"
    assert note in said(f"{flags} --warmup_steps 7")["note"]
    assert note in said(f"{flags} --warmup_steps 6")["note"], "in the last of its six steps"
    assert note not in said(f"{flags} --warmup_steps 5")["note"]
    one = f"{flags} --max_steps 1 --warmup_steps"
    assert note in said(f"{one} 2")["note"] and note not in said(f"{one} 1")["note"]


def test_a_plugin_that_waits_for_evaluations_is_noted_where_there_are_none(said: Outlook, folder: Path) -> None:
    source = "from panda import hookimpl, register_plugin\n"
    for name, acts in (("stops", ""), ("watches", "\n    acts = False")):
        source += f"""
@register_plugin({name!r})
class {name.title()}:
    "A plugin."{acts}
    def __init__(self, options, context): ...
    @hookimpl
    def panda_evaluation(self, run, record): ...
"""
    (folder / "herons_plugin.py").write_text(source)
    flags = f"{TINY_64} --plugins ./herons_plugin.py:stops ./herons_plugin.py:watches"
    (note,) = (note for note in said(flags)["note"] if "panda_evaluation" in note)
    assert note.startswith("plugin stops has the hook panda_evaluation, and this run is never evaluated: set")
    assert not any("panda_evaluation" in note for note in said(f"{flags} --eval_fraction 0.5").get("note", []))


def test_a_run_on_two_ranks_says_once_what_check_says_too(folder: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, folder / "base")
    small = "--model llama --ckpt_path base --max_seq_length 64 --num_workers 0 -p no:tensorboard -p no:plot"
    flags = [*small.split(), "--instruction_tuning_data_dir", "rows.json", "--max_steps", 1, "--token_cache", "cache"]
    checked = run_panda("panda", "check", *flags, cwd=folder, WORLD_SIZE="2")
    assert checked.returncode == 0, checked.stderr
    trained = run_script(BIN / "panda-train", *flags, cwd=folder, ranks=2).splitlines()
    first = checked.stdout.splitlines()
    assert len(first[-1]) <= 100 and first[-1].startswith("not tried yet: ")
    first = first[first.index("loading torch and DeepSpeed ...") : -1]
    assert trained[: len(first) + 1] == [*first, "loading the weights ..."]
    assert sum(line.startswith("model  ") for line in trained) == 1
    assert trained.count(first[0]) == trained.count("loading the weights ...") == trained.count("training ...") == 1
    assert any("(1 x 64 x 2, micro batch x accumulation x ranks)" in line for line in first)
    assert max(map(len, first)) <= 100


def test_data_that_is_less_than_a_step_is_one(said: Outlook) -> None:
    """Six rows, where a step has 64 by default: what is said of it is what it has."""
    lines, full = said(TINY_64), said(f"{TINY_64} --gradient_accumulation_steps 6")
    assert lines["steps"][0].startswith("1 step of 6 samples (1 x 64 x 1,")
    assert lines["steps"][1].split(" in ")[0] == full["steps"][1].split(" in ")[0]
    assert any(
        note.startswith("all 6 samples are one step, which is for 64: lower gradient_acc") for note in lines["note"]
    )
    assert not any("are one step" in note for note in full["note"])
    three = said(f"{TINY_64} --num_train_epochs 3")["steps"][0]
    assert three.startswith("1 step of 18 samples") and three.endswith("3 epochs")
    assert said(f"{TINY_64} --max_steps 2")["steps"][0].startswith("2 steps of 64 samples")
