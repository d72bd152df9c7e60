"""Tensor parallelism changes where a model lies and not what it learns.

The reference is a plain loop over plain transformers in float64, written here.
"""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vocabulary_parts
from checkpoint_files import llama
from checkpoint_files import save_hf
from initial_model import initial_model
from lamb_reference import ReferenceLamb
from launching import EVERY_WAY
from launching import assert_same_end
from launching import exported_weights
from launching import losses
from launching import metrics
from launching import run_script
from launching import train_many
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig

from panda.cli.export import main as export_main
from panda.cli.generate import main as generate_main
from panda.cli.replay import main as replay
from panda.cli.train import main as train_main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.engine.processes import Processes
from panda.engine.tensor_parallel import split
from panda.registry import UserError
from panda.registry.contexts import TensorParallelPlan
from panda.runner import train

SHAPE: dict[str, int] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS, STEP_SAMPLES, SEED, SAVED = 10, 4, 7, 5
SAMPLES = STEPS * STEP_SAMPLES
BETAS, EPSILON, DECAY = (0.9, 0.99), 1e-4, 0.1
CLIPS = {"drawn": 1.9, "tied": 2.5}
"""By what the model begins as: below the norm of some steps and above that of others, by the test that says so."""
RATES = {"adamw": 1e-3, "nvlamb": 1e-2}
SPLITS = {1: (2, 2), 2: (2, 2), 4: (1, 2)}
"""Micro batch and accumulation, by number of processes. Of those two hold a copy of the model together."""
TIED: dict[str, Any] = {"attention_bias": True, "tie_word_embeddings": True, "vocab_size": 260}
FROM_TIED = ("--model", "llama", "--ckpt_path", "tied")
PACKED = ("--batching", "packed")

RUNS: dict[str, tuple[int, str, str, tuple[object, ...]]] = {
    **{
        f"{optimizer}-{ranks}-zero{stage}": (ranks, "drawn", optimizer, ("--zero_stage", stage))
        for ranks in (2, 4)
        for optimizer in RATES
        for stage in (0, 1, 2)
    },
    **{f"{optimizer}-1": (1, "drawn", optimizer, ()) for optimizer in RATES},
    "adamw-2-packed": (2, "drawn", "adamw", (*PACKED, "--activation_checkpointing", "full")),
    "adamw-2-selective": (2, "drawn", "adamw", ("--activation_checkpointing", "selective")),
    "adamw-2-tied": (2, "tied", "adamw", FROM_TIED),
    "nvlamb-4-tied": (4, "tied", "nvlamb", (*FROM_TIED, "--zero_stage", 2)),
}
if EVERY_WAY:
    RUNS["adamw-2-compiled"] = (2, "drawn", "adamw", ("--compile", "true"))
"""Processes, what the model begins as, optimizer, flags."""
BF16 = ("--precision", "bf16")
RESUMED = ["adamw-2-zero1", "nvlamb-2-zero0", "nvlamb-4-zero2", "bf16"]


def rows() -> list[dict[str, str]]:
    """With a character whose token (130) is the first of the second rank: there FairScale's padding token would be."""
    generator = random.Random(1)
    letters = "abcdefghij \x7f"
    return [
        {
            "input": "".join(generator.choices(letters, k=generator.randint(1, 20))),
            "target": "".join(generator.choices(letters, k=generator.choice([1, 2, 3, 25]))),
        }
        for _ in range(SAMPLES)
    ]


def arguments(name: str, output: str) -> list[object]:
    ranks, start, optimizer, more = RUNS.get(name, (2, "drawn", "nvlamb", BF16))
    micro, accumulation = SPLITS[ranks]
    arch = ("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48)
    arch += ("--num_heads", 4, "--num_key_value_heads", 2, "--vocab_size", 260)
    return [
        *(arch if start == "drawn" else ()),
        *("--instruction_tuning_data_dir", "rows.json", "--output_dir", output, "--seed", SEED, "--num_workers", 0),
        *("--per_gpu_train_batch_size", micro, "--gradient_accumulation_steps", accumulation, "--max_seq_length", 96),
        *("--optimizer", optimizer, "--learning_rate", RATES[optimizer], "--max_grad_norm", CLIPS[start]),
        *("--adam_betas", ",".join(map(str, BETAS)), "--adam_epsilon", EPSILON, "--weight_decay", DECAY),
        *("--lr_scheduler", "constant", "--warmup_steps", 0, "--max_steps", STEPS, "--save_steps", SAVED),
        *("--tensor_parallel_size", min(ranks, 2), "-p", "no:tensorboard", "-p", "no:plot"),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each run, and for those that continue one from its middle."""
    folder = tmp_path_factory.mktemp("tensor-parallel")
    (folder / "rows.json").write_text(json.dumps(rows()))
    save_hf(llama(3, **TIED), folder / "tied")
    for ranks in SPLITS:
        names = [name for name in [*RUNS, "bf16"] if RUNS.get(name, (2,))[0] == ranks]
        runs = [arguments(name, name) for name in names]
        for name in set(names) & set(RESUMED):
            checkpoint = folder / name / "checkpoints" / f"step-{SAVED:08d}"
            runs.append([*arguments(name, f"{name}-resumed"), "--resume", checkpoint])
        train_many(runs, ranks=ranks, cwd=folder)
    return folder


@cache
def plain_loop(start: str, optimizer_name: str) -> tuple[list[dict[str, float]], Any, dict[str, float]]:
    """The same training in one process: a record of each step, the model, and the last trust ratios of nvlamb."""
    drawn = LlamaConfig(**SHAPE, rms_norm_eps=1e-6, pad_token_id=0)  # type: ignore[arg-type]
    model = (initial_model(drawn, SEED) if start == "drawn" else llama(3, **TIED)).double()
    weights = dict(model.named_parameters())
    rate = RATES[optimizer_name]
    adamw = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    lamb = ReferenceLamb(
        {name: weight.detach().numpy().copy() for name, weight in weights.items()},
        betas=BETAS,
        epsilon=EPSILON,
        decay=dict.fromkeys(weights, DECAY),
        max_grad_norm=CLIPS[start],
    )
    data, history = rows(), []
    order = SampleOrder([Source(SAMPLES, SAMPLES)], SEED)
    for step in range(STEPS):
        total: Any = 0.0
        count = 0
        for sample in order.samples(range(step * STEP_SAMPLES, (step + 1) * STEP_SAMPLES)):
            prompt = [1, *(byte + 3 for byte in (data[sample]["input"] + "\n").encode())]
            answer = [*(byte + 3 for byte in data[sample]["target"].encode()), 2]
            predicted = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
            count += len(answer)
        loss = total / count
        model.zero_grad()
        loss.backward()
        if optimizer_name == "nvlamb":
            gradients = {name: weight.grad.numpy() for name, weight in weights.items()}
            norm = float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values())))
            lamb.step(gradients, rate)
            for name, weight in weights.items():
                weight.data = torch.tensor(lamb.weights[name])
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPS[start]))
            adamw.step()
        history.append({"loss": loss.item(), "grad_norm": norm})
    return history, model.eval(), lamb.ratios


def start_of(name: str) -> tuple[str, str]:
    _, start, optimizer, _ = RUNS[name]
    return start, optimizer


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_follow_one_process(folder: Path, name: str) -> None:
    history, model, _ = plain_loop(*start_of(name))
    found = metrics(folder / name)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record, expected in zip(found, history, strict=True):
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    trained, expected_weights = exported_weights(folder / name), dict(model.named_parameters())
    assert trained.keys() == expected_weights.keys()
    for key, weight in expected_weights.items():
        assert float((trained[key].double() - weight).abs().max()) < 1e-6 * max(1.0, float(weight.norm())), key


@pytest.mark.parametrize(("start", "optimizer"), sorted({start_of(name) for name in RUNS}))
def test_clipping_is_active_in_some_steps_and_not_in_others(start: str, optimizer: str) -> None:
    norms = [record["grad_norm"] for record in plain_loop(start, optimizer)[0]]
    assert min(norms) < CLIPS[start] < max(norms)


@pytest.mark.parametrize("name", ["nvlamb-2-zero0", "nvlamb-4-zero2"])
def test_trust_ratios_are_of_whole_parameters(folder: Path, name: str) -> None:
    ratios = list(plain_loop("drawn", "nvlamb")[2].values())
    expected = {"trust_ratio_min": min(ratios), "trust_ratio_max": max(ratios)}
    last = metrics(folder / name)[-1]
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_rank_holds_a_part_of_each_large_matrix(folder: Path) -> None:
    for rank in (0, 1):
        file = folder / f"adamw-2-zero1/checkpoints/step-{STEPS:08d}/mp_rank_{rank:02d}_model_states.pt"
        shapes = {name: tuple(tensor.shape) for name, tensor in torch.load(file, weights_only=False)["module"].items()}
        layer = "model.layers.1."
        assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (130, 32)
        assert shapes[f"{layer}self_attn.q_proj.weight"] == (16, 32)
        assert shapes[f"{layer}self_attn.k_proj.weight"] == (8, 32)
        assert shapes[f"{layer}self_attn.o_proj.weight"] == (32, 16)
        assert shapes[f"{layer}mlp.down_proj.weight"] == (32, 24)
        assert shapes["model.norm.weight"] == (32,)
    facts = json.loads((folder / "adamw-2-zero1/provenance.json").read_text())
    alone = json.loads((folder / "adamw-1/provenance.json").read_text())
    assert [facts[key] for key in ("parameters", "trained_parameters")] == [alone["parameters"]] * 2


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, name: str) -> None:
    assert_same_end(folder / f"{name}-resumed", folder / name, after=SAVED)


def test_in_16_bits_the_norm_is_of_the_whole_model(folder: Path) -> None:
    """bf16 rounds to 8 bits; the norm of one rank's part is some 6 % less."""
    history = plain_loop("drawn", "nvlamb")[0]
    norms = [record["grad_norm"] for record in metrics(folder / "bf16")]
    assert norms == pytest.approx([record["grad_norm"] for record in history], rel=2e-2)


@pytest.mark.parametrize("name", ["adamw-2-packed", "adamw-2-tied", "nvlamb-4-zero2", "bf16"])
def test_shards_are_joined_from_a_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    assert export_main([str(folder / name), "--output", str(tmp_path / "out")]) == 0
    joined, expected = load_file(tmp_path / "out" / "model.safetensors"), exported_weights(folder / name)
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["adamw-2-zero2", "adamw-2-tied", "nvlamb-4-tied", "nvlamb-4-zero0"])
def test_an_export_is_the_trained_model_to_plain_transformers(folder: Path, name: str) -> None:
    model = plain_loop(*start_of(name))[1]
    exported = AutoModelForCausalLM.from_pretrained(folder / name / "export")
    ids = torch.tensor([[1, 103, 130, 100, 259, 2]])
    assert torch.allclose(exported(ids).logits.double(), model(ids).logits, atol=1e-5, rtol=0)


def test_it_answers_from_its_checkpoint_as_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered = json.loads((folder / "adamw-2-zero1/answers.json").read_text())[0]
    assert generate_main([str(folder / "adamw-2-zero1"), "--prompt", answered["prompt"], "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == answered["answer"]


# -- the loss, in several parts ---------------------------------------------------------------


def test_the_loss_of_a_vocabulary_in_parts_is_that_of_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(vocabulary_parts.compute, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    hidden, weight, labels = (
        tensor.requires_grad_(tensor.is_floating_point()) for tensor in vocabulary_parts.problem()
    )
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (3 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for got, expected in zip(found, (loss, hidden.grad, weight.grad.chunk(2)[rank]), strict=True):
            assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


# -- the embedding, in two parts --------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 2, 7])
def test_the_parts_of_an_embedding_learn_what_the_whole_does(
    monkeypatch: pytest.MonkeyPatch, padding: int | None
) -> None:
    """The padding token's row, in whichever part it is, learns nothing; here both ranks are one process."""
    layers = "fairscale.nn.model_parallel.layers"
    monkeypatch.setattr(f"{layers}.get_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(f"{layers}.reduce_from_model_parallel_region", lambda output: output)
    plan = TensorParallelPlan(column=(), row=(), vocabulary=("0",), sizes={})
    whole = torch.nn.Embedding(10, 4, padding_idx=padding, dtype=torch.float64)
    ids, factors = torch.tensor([*range(10), 2, 7]), torch.randn(12, 4, dtype=torch.float64)
    outputs, parts = [], []
    for rank in range(2):
        monkeypatch.setattr(f"{layers}.get_model_parallel_rank", lambda rank=rank: rank)
        module = torch.nn.Sequential(copy.deepcopy(whole))
        split(module, plan, Processes(rank, 2, torch.device("cpu"), tensor_ranks=2))
        outputs.append(module(ids))
        (outputs[-1] * factors).sum().backward()
        parts.append(module[0].weight.grad)
    (whole(ids) * factors).sum().backward()
    assert torch.equal(outputs[0] + outputs[1], whole(ids))
    assert whole.weight.grad is not None
    assert torch.equal(torch.cat(parts), whole.weight.grad)
    assert [row for row in range(10) if not whole.weight.grad[row].any()] == ([] if padding is None else [padding])


# -- what cannot be ---------------------------------------------------------------------------


def test_processes_that_make_no_whole_copies_are_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_by_launcher = {
        "WORLD_SIZE": "3",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name, value in set_by_launcher.items():
        monkeypatch.setenv(name, value)
    assert train_main(["--arch", "llama-7b", "--tensor_parallel_size", "2"]) == 2
    assert "2 processes hold a copy of the model together, and there are 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--num_key_value_heads", 1), ["cannot share model 'llama' evenly", "it has num_key_value_heads 1."]),
        (("--vocab_size", 261), ["it has vocab_size 261.", "`vocab_size: 262` has rows that no token uses"]),
        (("--num_heads", 1, "--num_key_value_heads", 1), ["num_heads 1, num_key_value_heads 1.", "divides them"]),
    ],
)
def test_sizes_that_do_not_divide_are_told_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("not read")
    argv = [*arguments("adamw-2-zero0", "out"), *more]
    for flag in more[::2]:
        at = argv.index(flag)
        del argv[at : at + 2]
    with pytest.raises(UserError) as raised:
        train(configure(parse_arguments(list(map(str, argv)))))
    assert all(word in str(raised.value) for word in words)


def test_a_model_without_a_plan_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    argv = [*arguments("adamw-2-tied", "out")]
    argv[argv.index("llama")] = "hf"
    with pytest.raises(UserError, match="model 'hf' does not say how it is split"):
        train(configure(parse_arguments(list(map(str, argv)))))


def test_replay_takes_the_step_again_on_the_same_ranks(folder: Path) -> None:
    run = "adamw-2-zero1"
    lines = run_script("panda.cli.main", "replay", run, SAVED + 1, ranks=2, cwd=folder).splitlines()
    now, then = (next(line for line in lines if line.startswith(f"  {which} ")) for which in ("now", "the run"))
    assert now.split()[1:] == then.split()[2:]
    recorded = losses(folder / run)[SAVED]
    assert f"loss {recorded:.4g}, " in now
    samples = [line.split() for line in lines if "  rows.json:" in line]
    assert len(samples) == STEP_SAMPLES
    units = [float(sample[2]) for sample in samples]
    mean = sum(float(sample[0]) * count for sample, count in zip(samples, units, strict=True)) / sum(units)
    assert mean == pytest.approx(recorded, rel=1e-3)


@pytest.mark.parametrize(("here", "said"), [("1", "here is 1"), ("4", "here are 4")])
def test_replay_on_other_ranks_is_refused_with_the_command(
    folder: Path, here: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", here)
    assert replay(["adamw-2-zero1", "6", "--all"]) == 2
    error = capsys.readouterr().err
    assert said in error and "torchrun --nproc_per_node 2 -m panda.cli.main replay adamw-2-zero1 6 --all" in error


def test_another_size_is_no_continuation(processes: Processes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    argv = [*arguments("adamw-1", "other"), "--resume", folder / "adamw-2-zero0"]
    with pytest.raises(UserError, match="tensor_parallel_size was 2 and is 1"):
        train(configure(parse_arguments(list(map(str, argv)))))
