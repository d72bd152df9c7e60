"""Training from a checkpoint follows a plain transformers loop from the same one, and comes out as that does.

Ten full steps, each over all of the data, so that order and split do not matter; the loop is written
here. What is exported is loaded by plain transformers, in a process that never imports panda.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_delta
from checkpoint_files import save_hf
from checkpoint_files import save_meta
from launching import losses
from launching import run_code
from launching import train_many
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

STEPS, RATE, BETAS, EPSILON, DECAY, CLIP = 10, 1e-3, (0.9, 0.99), 1e-5, 0.1, 0.5

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)
    print(json.dumps({"ids": ids.tolist(), "logits": model(ids).logits.tolist(),
                      "answer": answer[0, ids.shape[1]:].tolist(), "config": model.config.to_dict(),
                      "generation": model.generation_config.to_dict()}))
assert not any(name.split(".")[0] == "panda" for name in sys.modules)
"""


def rows() -> list[dict[str, str]]:
    generator = random.Random(2)
    return [
        {
            "input": "".join(generator.choices("abcdefgh ", k=generator.randint(2, 20))),
            "target": "".join(generator.choices("abcdefgh ", k=generator.choice([1, 3, 20]))),
        }
        for _ in range(8)
    ]


def plain_loop(folder: Path) -> tuple[list[float], Any]:
    """Losses and the trained model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    history = []
    for _ in range(STEPS):
        total: Any = 0.0
        count = 0
        for row in rows():
            prompt = [1, *(byte + 3 for byte in (row["input"] + "\n").encode())]
            answer = [*(byte + 3 for byte in row["target"].encode()), 2]
            predicted = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
            count += len(answer)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        history.append(loss.item())
    return history, model.eval()


BIAS: dict[str, Any] = {"attention_bias": True, "tie_word_embeddings": True}
LLAMA = ("--model", "llama")
DELTA = (*LLAMA, "--ckpt_path", "fine-delta", "--base_path", "hf")
RUNS: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "hf": ("hf", 1, (*LLAMA, "--ckpt_path", "hf")),
    "tied": ("tied", 1, (*LLAMA, "--ckpt_path", "tied", "--zero_stage", 1)),
    "meta": ("hf", 1, (*LLAMA, "--ckpt_path", "meta", "--allow_pickle", "--tokenizer", "hf")),
    "delta": ("target", 1, DELTA),
    "no-pad": ("hf", 1, (*LLAMA, "--ckpt_path", "hf", "--tokenizer", "no-pad")),
    "auto": ("hf", 1, ("--model", "hf", "--ckpt_path", "hf")),
    **{f"zero{stage}": ("hf", 2, (*LLAMA, "--ckpt_path", "hf", "--zero_stage", stage)) for stage in (0, 1, 2, 3)},
    "zero3-tied": ("tied", 2, (*LLAMA, "--ckpt_path", "tied", "--zero_stage", 3)),
    "zero3-delta": ("target", 2, (*DELTA, "--zero_stage", 3)),
}
"""What the plain loop starts from, ranks, flags."""


def arguments(name: str) -> list[object]:
    _, ranks, flags = RUNS[name]
    return [
        *("--instruction_tuning_data_dir", "rows.json", "--output_dir", f"run-{name}", "--max_seq_length", 64),
        *("--per_gpu_train_batch_size", 2, "--gradient_accumulation_steps", 4 // ranks, "--num_workers", 0),
        *("--learning_rate", RATE, "--lr_scheduler", "constant", "--warmup_steps", 0, "--max_steps", STEPS),
        *("--adam_betas", ",".join(map(str, BETAS)), "--adam_epsilon", EPSILON, "--weight_decay", DECAY),
        *("--max_grad_norm", CLIP, "-p", "no:tensorboard"),
        *flags,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints, the data, and a run of each kind."""
    folder = tmp_path_factory.mktemp("pretrained")
    base, target = llama(1), llama(2)
    save_hf(base, folder / "hf")
    save_hf(target, folder / "target")
    save_hf(llama(3, **BIAS), folder / "tied")
    save_meta(base, folder / "meta")
    save_delta(target, base, folder / "fine-delta")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "no-pad")
    assert AutoTokenizer.from_pretrained(folder / "no-pad").pad_token_id is None
    (folder / "rows.json").write_text(json.dumps(rows()))
    for ranks in (1, 2):
        train_many([arguments(name) for name in RUNS if RUNS[name][1] == ranks], ranks=ranks, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, tuple[list[float], Any]]:
    return {start: plain_loop(folder / start) for start in ("hf", "target", "tied")}


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    """What plain transformers makes of each export."""
    printed = run_code(PLAIN, *(folder / f"run-{name}" / "export" for name in RUNS), cwd=folder)
    return dict(zip(RUNS, map(json.loads, printed.splitlines()), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_follow_the_plain_loop(
    folder: Path, references: dict[str, tuple[list[float], Any]], name: str
) -> None:
    history, model = references[RUNS[name][0]]
    found = losses(folder / f"run-{name}")
    assert len(found) == STEPS and history[-1] < history[0]
    assert max(abs(a - b) / b for a, b in zip(found, history, strict=True)) < 1e-6
    exported = AutoModelForCausalLM.from_pretrained(folder / f"run-{name}" / "export").state_dict()
    expected = model.state_dict()
    assert exported.keys() == expected.keys()
    assert max(float((exported[key].double() - expected[key]).abs().max()) for key in expected) < 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_an_export_is_the_trained_model_to_plain_transformers(
    exported: dict[str, Any], references: dict[str, tuple[list[float], Any]], name: str
) -> None:
    model, found = references[RUNS[name][0]][1], exported[name]
    ids = torch.tensor(found["ids"])
    assert found["ids"] == [[1, *(byte + 3 for byte in b"abc\n")]], "the chat template is what training showed"
    assert torch.allclose(torch.tensor(found["logits"]), model(ids).logits.float(), atol=1e-5, rtol=0)
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2)[0, ids.shape[1] :]
    assert found["answer"] == answer.tolist()


def test_an_export_keeps_what_the_checkpoint_said(folder: Path, exported: dict[str, Any]) -> None:
    for name in ("hf", "zero3", "delta", "auto", "tied"):
        before = json.loads((folder / RUNS[name][0] / "config.json").read_text())
        after = exported[name]["config"]
        assert {key: after[key] for key in before} == before | {"transformers_version": after["transformers_version"]}
        assert exported[name]["generation"]["eos_token_id"] == 2


def test_the_run_records_what_it_started_from(folder: Path) -> None:
    facts = json.loads((folder / "run-delta" / "provenance.json").read_text())
    assert facts["checkpoint"] == (
        "fine-delta (a folder): a delta, safetensors, llama; added to hf (a folder): safetensors, llama"
    )
    assert facts["parameters"] == sum(p.numel() for p in llama().parameters())
    facts = json.loads((folder / "run-zero3" / "provenance.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in llama().parameters())
