"""panda's own plugins that act, in runs on two ranks: under every sharding, and resumed, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributions import installed_for_runs
from launching import EVERY_WAY
from launching import assert_same_end
from launching import exported_weights
from launching import losses
from launching import metrics
from launching import train_many
from launching import zero3_at_once
from safetensors.torch import load_file

from panda.cli.export import main as export_main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.checkpoints.weights_copies import evaluated_weights
from panda.hooks.freeze import FreezeOptions
from panda.hooks.freeze import Stretch
from panda.hooks.freeze import stretches
from panda.hooks.watched import Watched
from panda.registry import UserError
from panda.registry.options import build
from panda.run.best_evaluation import best_evaluation
from panda.runner import train

AT_ONCE = """
@hookimpl
def panda_run_start(run):
    run.stop("to see what a run begins with")
"""
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--max_samples", 60, "--eval_fraction", 0.2, "--gradient_accumulation_steps", 2, "--prompts", "a"),
    *("--lr_scheduler", "constant", "--warmup_steps", 2, "--weight_decay", 0.5, "--max_steps", 6, "--save_steps", 3),
)
STAGES = ("0", "1", "2", "3") if EVERY_WAY else ("2", "3")
"""tests/engine/test_other_weights.py tries an average under each."""
WAYS: dict[str, list[object]] = {
    **{stage: ["--zero_stage", stage] for stage in STAGES[:-1]},
    "lora": ["--use_lora", "--lora_r", 4, "--zero_stage", 2],
    "tensor": ["--tensor_parallel_size", 2, "--vocab_size", 260],
}
EMA = ("--plugins", "ema", "--ema_decay", 0.6)
DIVERGING = ("--learning_rate", 0.5, "--eval_steps", 1, "--per_gpu_train_batch_size", 4)
"""The loss soon goes up, and up again."""
ALONE: dict[str, list[object]] = {
    "stopping": [*DIVERGING, "--plugins", "early_stopping", "--max_steps", 12, "--save_steps", 4],
    "plateau": [*DIVERGING, "--plugins", "rate_on_plateau", "--plateau_patience", 1, "--max_steps", 8],
    "best": [*DIVERGING, "--plugins", "best_checkpoint", "--save_total_limit", 1, "--max_steps", 3],
}
"""Runs on one rank; tests/run/test_acting.py has ranks agree on what is asked."""
FREEZE = ("--plugins", "freeze", "--freeze", "*embed*=2-4", "*norm*", "--save_steps", 1, "--zero_stage", 1)


def command(*flags: object) -> list[object]:
    """``RUN`` with ``flags``, of which the last one of a name counts."""
    values: dict[object, list[object]] = {}
    for each in (*RUN, *flags):
        if str(each).startswith("--"):
            values[name := each] = []
        else:
            values[name].append(each)
    return [part for name, given in values.items() for part in (name, *given)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each way a run without an average, one with it, and one that goes on from its third step elsewhere; a run of
    each other plugin, and one that goes on from a step in the middle."""
    folder = tmp_path_factory.mktemp("acting-plugins")
    environment = installed_for_runs(folder / "site", "once", {"plugins": {"at-once": "at_once"}}, {"at_once": AT_ONCE})
    ways = WAYS | {"3": zero3_at_once(folder)}
    configurations = []

    def add(name: str, *flags: object, resumed: int = 0, of: str = "") -> None:
        go_on = ["--resume", folder / of / f"checkpoints/step-{resumed:08d}"] if resumed else []
        size = () if "tensor" in name else ("--per_gpu_train_batch_size", 2)
        configurations.append(command(*size, *flags, *go_on, "--output_dir", folder / name))

    for name, way in ways.items():
        every = ["--save_steps", 1] if name in STAGES else []
        add(f"{name}-plain", *way, *every)
        add(f"{name}-ema", *way, *EMA)
        add(f"{name}-ema-resumed", *way, *EMA, resumed=3, of=f"{name}-ema")
    add("begin", "--plugins", "at-once")
    add("freeze", *FREEZE)
    add("freeze-resumed", *FREEZE, resumed=3, of="freeze")
    add("other-stage", *ways["3"], *EMA, resumed=3, of="2-ema")
    train_many(configurations, ranks=2, cwd=folder, **environment)
    configurations.clear()
    for name, flags in ALONE.items():
        add(name, *flags)
    add("stopping-resumed", *ALONE["stopping"], resumed=4, of="stopping")
    add("plateau-resumed", *ALONE["plateau"], resumed=6, of="plateau")
    add("other-ranks", *EMA, "--per_gpu_train_batch_size", 4, resumed=3, of="2-ema")
    train_many(configurations, cwd=folder)
    return folder


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: each.read() for name, each in checkpoint_weights(run / f"checkpoints/step-{step:08d}").items()}


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "export").glob("*.safetensors")))


@pytest.mark.parametrize("name", [*WAYS, "3"])
def test_training_is_that_without_an_average_and_a_resumed_average_has_the_same_bits(runs: Path, name: str) -> None:
    plain, ema, resumed = (runs / f"{name}-{which}" for which in ("plain", "ema", "ema-resumed"))
    assert losses(ema) == losses(plain)
    trained = [saved(run, 6) for run in (plain, ema, resumed)]
    assert all(each.equal(other[key]) for other in trained[1:] for key, each in trained[0].items())
    assert_same_end(resumed, ema, after=3)
    assert not all(each.equal(exported(plain)[key]) for key, each in exported(ema).items()), "the average is exported"
    evaluated = [[r["eval_loss"] for r in metrics(run) if "eval_loss" in r] for run in (plain, ema, resumed)]
    assert evaluated[0] != evaluated[1] == evaluated[2], "and evaluated"
    by_panda, is_other = evaluated_weights(ema / "checkpoints/step-00000006")
    assert is_other and not evaluated_weights(plain / "checkpoints/step-00000006")[1]
    if name != "lora":  # whose export has other names
        assert all(by_panda[key].read().equal(each) for key, each in exported(ema).items())
    provenance = json.loads((ema / "provenance.json").read_text())
    assert provenance["end"]["exported_weights"] == "plugin ema"


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_that_of_float64(runs: Path, stage: str) -> None:
    assert list((runs / "begin/checkpoints").glob("step-*")) == [runs / "begin/checkpoints/step-00000000"]
    average = {name: each.double() for name, each in saved(runs / "begin", 0).items()}
    for number in range(6):
        decay = min(0.6, (1 + number) / (10 + number))
        weights = saved(runs / f"{stage}-plain", number + 1)
        average = {name: decay * each + (1 - decay) * weights[name].double() for name, each in average.items()}
    for name, each in exported_weights(runs / f"{stage}-ema").items():
        assert (each.double() - average[name]).abs().max() <= 1e-6 * average[name].abs().max(), name


@pytest.mark.parametrize("name", ["other-stage", "other-ranks"])
def test_an_average_goes_on_elsewhere(runs: Path, name: str) -> None:
    expected = exported_weights(runs / "2-ema")
    for key, each in exported_weights(runs / name).items():
        assert (each - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


def evaluations(run: Path) -> list[float]:
    return [record["eval_loss"] for record in metrics(run) if "eval_loss" in record]


def test_a_run_ends_after_evaluations_that_are_no_better(runs: Path) -> None:
    found = evaluations(runs / "stopping")
    best = min(found)
    assert len(found) == found.index(best) + 1 + 3 < 12
    stopped = json.loads((runs / "stopping/provenance.json").read_text())["end"]["stopped"]
    assert stopped["by"] == "plugin early_stopping" and stopped["options"]["early_stopping_patience"] == 3
    assert stopped["reason"] == (
        f"eval_loss has been {best:.4g} at step {found.index(best) + 1} at best, and no better in the 3 evaluations"
        " since"
    )
    assert_same_end(runs / "stopping-resumed", runs / "stopping", after=4)
    assert evaluations(runs / "stopping-resumed") == found[4:], "it counts on"


def test_the_rate_is_lowered_where_evaluations_are_no_better_and_a_resumed_run_does_it_again(runs: Path) -> None:
    factor, best, expected = 1.0, float("inf"), []
    for loss in evaluations(runs / "plateau"):
        expected.append(factor)
        factor, best = (factor, loss) if loss < best else (max(factor / 2, 0.01), best)
    rates = [record["learning_rate"] / 0.5 for record in metrics(runs / "plateau") if "loss" in record]
    assert rates[1:] == expected[1:] and rates[0] == 0.5, "the warm-up has two steps"
    assert min(rates) < 0.5
    assert_same_end(runs / "plateau-resumed", runs / "plateau", after=6)


def test_the_best_checkpoint_is_kept_beside_the_last(runs: Path) -> None:
    found = evaluations(runs / "best")
    best = found.index(min(found)) + 1
    folder = runs / "best/checkpoints"
    assert {path.name for path in folder.glob("step-*")} == {f"step-{best:08d}", "step-00000003"} and best < 3
    assert (folder / "best").read_text() == f"step-{best:08d}\n"


def test_weights_are_frozen_between_two_steps(runs: Path) -> None:
    run = runs / "freeze"
    at = [saved(runs / "begin", 0), *(saved(run, step) for step in range(1, 7))]
    for step in range(1, 7):
        for name, each in at[step].items():
            kept = "norm" in name or ("embed" in name and 2 <= step <= 4)
            assert each.equal(at[step - 1][name]) == kept, (step, name)
    assert_same_end(runs / "freeze-resumed", run, after=3)


def test_a_checkpoint_is_exported_with_what_it_was_evaluated_with(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("2-ema", "lora-ema"):
        for flags, weights in (((), runs / name), (("--trained",), runs / name.replace("ema", "plain"))):
            output = tmp_path / f"{name}{len(flags)}"
            assert export_main([str(runs / name), "--output", str(output), *flags]) == 0
            assert ("the weights that it was evaluated with" in capsys.readouterr().out) == (not flags)
            found = load_file(next(output.glob("*.safetensors")))
            assert all(each.equal(found[key]) for key, each in exported(weights).items())


# -- without a run ----------------------------------------------------------------------------


def test_what_counts_as_better(capsys: pytest.CaptureFixture[str]) -> None:
    class AtStep:
        def __init__(self, step: int) -> None:
            self.step = step
            self.higher_is_better = {"eval_rougeL"}
            self.held_out, self.resumed_from = {"": "a fingerprint"}, Path(f"step-{step:08d}")
            self.processes, self.plan = SimpleNamespace(rank=0), SimpleNamespace(total_steps=9)

        def stop(self, reason: str) -> None:
            self.stopped = reason

    def taken(watched: Watched, values: list[float]) -> list[bool]:
        return [watched.take(AtStep(step), {watched.metric: value}) for step, value in enumerate(values)]  # type: ignore[arg-type]

    nan = float("nan")
    lower = Watched("ours", "eval_x", threshold=0.5)
    assert taken(lower, [nan, 3, 2.5, 2.4, nan, 2.6]) == [False, True, False, True, False, False]
    assert (lower.best, lower.best_step, lower.since) == (2.4, 3, 2)
    values = [float("-inf"), 2, 1, 1, nan, 1]
    judged = Watched("ours", "eval_loss")
    assert taken(judged, values) == [False, True, True, False, False, False], "of equal ones the first"
    found = best_evaluation(Path("nowhere"), [{"step": step, "eval_loss": value} for step, value in enumerate(values)])
    assert found is not None and (found.value, found.step) == (judged.best, judged.best_step) == (1, 2)
    higher = Watched("ours", "eval_x", higher_is_better=True)
    assert taken(higher, [1, 1, 2, -3]) == [True, False, True, False]
    capsys.readouterr()
    assert taken(Watched("ours", "eval_rougeL"), [1, 1, 2, -3]) == [True, False, True, False], "as the run knows"
    assert capsys.readouterr().out == "note: ours: the highest eval_rougeL is taken for the best\n"
    assert taken(Watched("ours", "eval_rougeL", higher_is_better=False), [1, 1, 2, -3]) == [True, False, False, True]
    assert taken(Watched("ours", "eval_x"), [2, 1]) == [True, True]
    assert capsys.readouterr().out == "note: ours: the lowest eval_x is taken for the best\n"
    with pytest.raises(UserError, match=r"ours: 'rougeL' is no metric of evaluations.*did you mean 'eval_rougeL'"):
        Watched("ours", "rougeL")
    again = Watched("ours", "eval_x", higher_is_better=True)
    run = AtStep(4)
    state = higher.state(run)  # type: ignore[arg-type]
    again.load(run, json.loads(json.dumps(state)))  # type: ignore[arg-type]
    assert again.state(run) == state  # type: ignore[arg-type]
    earlier = Watched("ours", "eval_x", higher_is_better=True)
    earlier.load(run, {key: each for key, each in state.items() if key != "held_out"})  # type: ignore[arg-type]
    assert earlier.best == 2, "of a version that did not say on what data"
    other = Watched("ours", "eval_y")
    other.load(run, state)  # type: ignore[arg-type]
    assert other.best is None, "of another metric"
    other = Watched("ours", "eval_x")
    other.load(run, state | {"held_out": {"": "another"}})  # type: ignore[arg-type]
    assert other.best is None, "of other data"
    said = "note: ours: evaluations until step-00000004 were on other held-out data: it starts afresh\n"
    assert capsys.readouterr().out == said
    other = Watched("ours", "eval_y")
    for step, said in ((1, ""), (9, "note: ours has done nothing: {}\n")):
        run = AtStep(step)
        assert not other.take(run, {"step": step, "eval_x": 1, "eval_why": 2})  # type: ignore[arg-type]
        problem = "evaluations have no 'eval_y'. They have: eval_x, eval_why"
        assert run.stopped == problem and capsys.readouterr().out == said.format(problem)
    assert (other.best, other.since) == (None, 0)


def test_what_freeze_means() -> None:
    assert stretches(("a*", "b=2-3", "c=-4", "d=5-")) == [
        Stretch("a*", 1, None),
        Stretch("b", 2, 3),
        Stretch("c", 1, 4),
        Stretch("d", 5, None),
    ]
    for wrong in ("", "=1-2", "a=", "a=3", "a=3-2", "a=0-2", "a=x-y"):
        with pytest.raises(UserError, match="is not PATTERN or PATTERN=FIRST-LAST"):
            build(FreezeOptions, {"freeze": [wrong]})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plugins", "freeze"], "freeze"),
        (
            ["--plugins", "freeze", "--freeze", "*embde*"],
            "is trained. These are: model.embed_tokens.weight, model.layers.*.self_attn.q_proj.weight, ",
        ),
        (
            ["--plugins", "early_stopping", "--eval_steps", 1, "--early_stopping_metric", "eval_los"],
            "early_stopping_metric: evaluations of this run have no 'eval_los'. Did you mean 'eval_loss'? They have:"
            " eval_loss, eval_tokens, eval_supervised_tokens, eval_seconds.",
        ),
    ],
)
def test_what_a_plugin_cannot_do_is_an_error(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(configure(parse_arguments([*map(str, command(*flags)), "-p", "no:tensorboard", "-p", "no:plot"])))
    assert message in str(caught.value)
