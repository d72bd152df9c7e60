"""Plugins that act: what one asks for on one rank, all ranks do alike, and a resumed run does again.

Runs of two ranks, in the ZeRO stages, with a plugin of a package. Losses and weights are compared to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributions import IMPORTS
from distributions import Distributions
from distributions import installed_for_runs
from launching import assert_same_end
from launching import exported_weights
from launching import losses
from launching import metrics
from launching import train_many

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run.asking import Asked
from panda.run.asking import Asking
from panda.run.state import Run
from panda.runner import train

ACTOR = """
import numpy
import torch

@dataclass(frozen=True)
class ActorOptions:
    do: str = "nothing"
    at_step: int = 3
    on_rank: int = 1

@register_plugin("actor", options=ActorOptions)
class Actor:
    def __init__(self, options, context):
        self.options = options
        self.heard = []

    def here(self, run, what, step):
        is_here = self.options.on_rank in (-1, run.processes.rank)
        return self.options.do == what and step == self.options.at_step and is_here

    @hookimpl
    def panda_step_start(self, run, step, batches):
        assert batches and all(batch.input_ids.device.type == "cpu" for batch in batches)
        if self.here(run, "skip", step):
            run.skip_step("it looks bad")

    @hookimpl
    def panda_step_end(self, run, step):
        if self.here(run, "stop", step):
            run.stop("enough")
        if self.here(run, "slow", step):
            run.scale_learning_rate(0.5)
        if self.here(run, "skip", step):
            run.save_checkpoint()
        if self.options.do == "log":
            run.log("half_a_step", torch.tensor(step / 2))
        self.heard.append(step)

    @hookimpl
    def panda_evaluation_start(self, run):
        if self.options.do == "log":
            run.log("answer", numpy.float32(42))

    @hookimpl
    def panda_evaluation(self, run, record):
        if self.options.do == "heard":
            everywhere = run.processes.from_all({**record, "eval_seconds": 0})
            assert everywhere == [everywhere[0]] * run.processes.world_size and "eval_loss" in record

    @hookimpl
    def panda_save_state(self, run):
        return {"heard": self.heard, "tensor": torch.tensor(self.heard).bfloat16(), "rate": float("inf")}

    @hookimpl
    def panda_load_state(self, run, state):
        assert state["tensor"].tolist() == state["heard"] and state["rate"] == float("inf")
        self.heard = state["heard"]

    @hookimpl
    def panda_run_end(self, run):
        (run.directory / f"heard-{run.processes.rank}.json").write_text(str(self.heard))
"""
STEPS = 6
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--warmup_steps", 2, "--learning_rate", 0.003),
    *("--max_steps", STEPS, "--prompts", "a", "--eval_fraction", 0.1),
)
ALONE: dict[str, tuple[object, ...]] = {
    "plain": (),
    "logged": ("actor", "--do", "log", "--eval_steps", 3),
}
"""Runs on one rank."""
TOGETHER: dict[str, tuple[object, ...]] = {
    "plain": ("--zero_stage", 2),
    "watched": ("actor", "--zero_stage", 2, "--do", "heard", "--eval_steps", 3),
    "stop": ("actor", "--zero_stage", 2, "--do", "stop"),
    "skip": ("actor", "--zero_stage", 2, "--do", "skip", "--save_steps", 2),
    "slow": ("actor", "--zero_stage", 2, "--do", "slow", "--on_rank", -1, "--save_steps", 4),
}
"""Runs on two ranks, of which the second one asks; in one, both do."""


def flags(folder: Path, ranks: int, name: str, way: tuple[object, ...], *more: object) -> list[object]:
    acting = ["--plugins", *way] if way[:1] == ("actor",) else list(way)
    directory = [] if "--output_dir" in more else ["--output_dir", folder / f"{ranks}-{name}"]
    return [*RUN, "--per_gpu_train_batch_size", 4 // ranks, *acting, *directory, *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("site")
    return installed_for_runs(folder, "acting", {"plugins": {"actor": "acting_plugin"}}, {"acting_plugin": ACTOR})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("acting")
    on_one = [flags(folder, 1, name, way) for name, way in ALONE.items()]
    on_two = [flags(folder, 2, name, way) for name, way in TOGETHER.items()]
    for name in ("slow", "skip"):
        resumed = ("--resume", folder / f"2-{name}/checkpoints/step-00000004")
        on_two.append(flags(folder, 2, name, TOGETHER[name], *resumed, "--output_dir", folder / f"2-{name}-from-4"))
    on = (*TOGETHER["stop"], "--at_step", 100, "--resume", folder / "2-stop/checkpoints/step-00000003")
    on_two.append(flags(folder, 2, "stop", on, "--output_dir", folder / "2-stop-on"))
    # With another number of ranks.
    moved = ("--resume", folder / "2-slow/checkpoints/step-00000004", "--output_dir", folder / "moved")
    train_many(on_two, ranks=2, cwd=folder, **environment)
    train_many([*on_one, flags(folder, 1, "slow", TOGETHER["slow"], *moved)], cwd=folder, **environment)
    return folder


def heard(run: Path, rank: int = 0) -> list[int]:
    found: list[int] = json.loads((run / f"heard-{rank}.json").read_text())
    return found


def test_a_plugin_that_asks_for_nothing_changes_no_bit(runs: Path) -> None:
    assert_same_end(runs / "2-watched", runs / "2-plain", after=0)


def test_a_stop_on_one_rank_stops_all_at_the_end_of_the_step(runs: Path) -> None:
    run = runs / "2-stop"
    assert [heard(run, rank) for rank in range(2)] == [[1, 2, 3]] * 2
    assert losses(run)[:3] == losses(runs / "2-plain")[:3]
    records = metrics(run)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    assert [record["step"] for record in records if "eval_loss" in record] == [3]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert (run / "export/model.safetensors").exists()
    end = json.loads((run / "provenance.json").read_text())["end"]
    assert end["step"] == 3
    assert (end["stopped"]["by"], end["stopped"]["reason"]) == ("plugin actor", "enough")


def test_a_run_of_two_ranks_goes_on_where_one_of_them_stopped_it(runs: Path) -> None:
    assert_same_end(runs / "2-stop-on", runs / "2-plain", after=3)
    assert heard(runs / "2-stop-on", 1) == [1, 2, 3, 4, 5, 6]


def test_a_step_is_left_out_on_all_ranks_where_one_asks(runs: Path) -> None:
    run, plain = runs / "2-skip", runs / "2-plain"
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 4, 5, 6]
    assert [record.get("left_out_steps", 0) for record in records] == [0, 0, 1, 1, 1]
    assert losses(run)[:2] == losses(plain)[:2] and losses(run)[2] != losses(plain)[3]
    rates = {record["step"]: record["learning_rate"] for record in metrics(plain) if "loss" in record}
    assert [record["learning_rate"] for record in records] == [rates[record["step"]] for record in records]
    progress = json.loads((run / "checkpoints/step-00000004/manifest.json").read_text())["progress"]
    untouched = json.loads((run / "checkpoints/step-00000002/manifest.json").read_text())["progress"]
    assert progress["left_out_steps"] == 1 and progress["position"] == 2 * untouched["position"]


@pytest.mark.parametrize("name", ["2-slow-from-4", "2-skip-from-4"])
def test_what_was_asked_for_survives_a_resume_to_the_bit(runs: Path, name: str) -> None:
    whole = runs / name.partition("-from")[0]
    first = int(name[-1])
    before = sum(record["step"] <= first for record in metrics(whole) if "loss" in record)
    assert losses(runs / name) == losses(whole)[before:]
    expected, found = exported_weights(whole), exported_weights(runs / name)
    assert all(expected[key].equal(found[key]) for key in expected)
    assert heard(runs / name) == heard(whole) == [1, 2, 3, 4, 5, 6], "its own state, too"


def test_a_learning_rate_is_scaled_once_for_all_ranks(runs: Path) -> None:
    slow, plain = (
        [record["learning_rate"] for record in metrics(runs / f"2-{name}") if "loss" in record]
        for name in ("slow", "plain")
    )
    assert slow == [*plain[:3], *(rate / 2 for rate in plain[3:])]
    assert losses(runs / "2-slow")[:4] == losses(runs / "2-plain")[:4]
    assert losses(runs / "2-slow")[4] != losses(runs / "2-plain")[4]


def test_state_and_factor_go_on_with_another_number_of_ranks(runs: Path) -> None:
    found = [record for record in metrics(runs / "moved") if "loss" in record]
    expected = [record for record in metrics(runs / "2-slow") if "loss" in record][4:]
    assert [record["learning_rate"] for record in found] == [record["learning_rate"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    assert heard(runs / "moved") == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_is_saved_where_one_rank_asks(runs: Path) -> None:
    saved = {int(path.name[5:]) for path in (runs / "2-skip/checkpoints").glob("step-*")}
    assert saved == {2, 3, 4, 6}, "of these, every second one by itself"


def test_numbers_that_hooks_add_are_in_the_records(runs: Path) -> None:
    records = metrics(runs / "1-logged")
    assert [record["half_a_step"] for record in records if "loss" in record] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert [record["eval_answer"] for record in records if "eval_loss" in record] == [42, 42]
    assert not any("half_a_step" in record for record in records if "eval_loss" in record)


# -- what is refused, in one process ----------------------------------------------------------

MISTAKEN = """
@dataclass(frozen=True)
class MistakenOptions:
    mistake: str = ""

@register_plugin("mistaken", options=MistakenOptions)
class Mistaken:
    def __init__(self, options, context):
        self.mistake = options.mistake

    @hookimpl
    def panda_log(self, run):
        if self.mistake == "stop on rank 0":
            run.stop("no")

    @hookimpl
    def panda_step_end(self, run):
        if self.mistake == "skip too late":
            run.skip_step("no")
        if self.mistake == "own key":
            run.log("grad_norm", 1)
        if self.mistake == "no number":
            run.log("mine", "1")
        if self.mistake == "backwards":
            run.scale_learning_rate(-1)

    @hookimpl
    def panda_evaluation_start(self, run):
        if self.mistake == "own key of evaluations":
            run.log("loss", 1)

    @hookimpl
    def panda_save_state(self, run):
        return {"tuple": {"nested": [(1, 2)]}} if self.mistake == "state" else {}

    @hookimpl
    def panda_load_state(self, run, state): pass

@register_plugin("watching")
class Watching:
    acts = False

    def __init__(self, options, context): pass

    @hookimpl
    def panda_step_end(self, run):
        run.stop("no")
"""


@pytest.fixture
def trained(distributions: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``trained(*flags)``: a run of two steps, in this process."""
    names = dict.fromkeys(("mistaken", "watching"), "mistakes.plugins")
    distributions.install("mistakes", {"plugins": names}, {"mistakes.plugins": MISTAKEN})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panda.run.ending.ANSWER_TOKENS", 2)

    def train_with(*given: str) -> Any:
        argv = [*map(str, RUN), "--logging_steps", "1", "-p", "no:tensorboard", "-p", "no:plot"]
        place = argv.index("--max_steps")
        if "--max_steps" in given:
            del argv[place : place + 2]
        else:
            argv[place + 1] = "2"
        argv += given
        return train(configure(parse_arguments(argv)))

    return train_with


def test_a_metric_that_only_the_first_evaluation_shows_to_be_missing_loses_no_work(
    trained: Any, processes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plugin `mistaken` adds to evaluations, and does not state what."""
    plugins = ("--plugins", "best_checkpoint", "mistaken", "--max_steps", "3", "--eval_steps", "1")
    run = trained(*plugins, "--best_metric", "eval_other", "--output_dir", "missing")
    said = capsys.readouterr().out
    assert "note: best_metric: whether evaluations have 'eval_other' is known at the first one" in said
    why = (
        "stopped after step 1 of 3 by plugin best_checkpoint: evaluations have no 'eval_other'. They have: eval_loss, "
    )
    assert why in said and (run.directory / "export").is_dir()
    assert [path.name for path in complete_checkpoints(run.directory / "checkpoints")] == ["step-00000001"]
    again = trained(
        "--max_steps", "3", "--resume", "auto", "--output_dir", "missing", *plugins[:3], "--eval_steps", "1"
    )
    assert again is not None and again.step == 3 and again.resumed_from is not None
    assert "the best until now, is gone" not in capsys.readouterr().out


def test_a_stopped_run_is_resumed_only_without_what_stopped_it(
    runs: Path,
    tmp_path: Path,
    processes: Any,
    trained: Any,
    distributions: Distributions,
    capsys: pytest.CaptureFixture[str],
) -> None:
    distributions.install("acting", {"plugins": {"actor": "acting_plugin"}}, {"acting_plugin": ACTOR})
    flags = ["--per_gpu_train_batch_size", "4", "--output_dir", "run", "--resume", "auto", "--max_steps", str(STEPS)]
    stop = ["--plugins", "actor", "--do", "stop", "--on_rank", "0"]
    trained(*flags, *stop)
    assert "stopped after step 3 of 6 by plugin actor: enough" in capsys.readouterr().out
    assert trained(*flags, *stop) is None
    assert (
        "the run was stopped after step 3 of 6 by plugin actor: enough; it is exported. To train further, leave it out"
        " by `-p no:actor`, or give it other options, and resume again" in capsys.readouterr().out
    )
    assert losses(tmp_path / "run") == losses(runs / "1-plain")[:3]
    trained(*flags, *stop, "--at_step", "100")
    assert "note: the run was stopped after step 3 by plugin actor: enough. It goes on" in capsys.readouterr().out
    plain = runs / "1-plain"
    assert losses(tmp_path / "run") == losses(plain)
    expected, found = exported_weights(plain), exported_weights(tmp_path / "run")
    assert all(expected[name].equal(found[name]) for name in expected)
    assert heard(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


class TwoRanks:
    """Ranks of which the other one asks for ``other``."""

    def __init__(self, other: Asked) -> None:
        self.other = other

    def any_(self, here: bool) -> bool:
        return here or bool(self.other)

    def from_all(self, asked: Asked) -> list[Asked]:
        return [asked, self.other]


def test_what_one_rank_asks_for_is_agreed_and_factors_that_differ_are_an_error() -> None:
    asking = Asking()
    asking.asked = Asked(stop={"a": "first"}, rate={"a": 0.5})
    found = asking.agreed(TwoRanks(Asked(stop={"a": "second", "b": "too"}, rate={"a": 0.5, "b": 0.1})))  # type: ignore[arg-type]
    assert found == Asked(stop={"a": "first", "b": "too"}, rate={"a": 0.5, "b": 0.1})
    assert asking.asked == Asked()
    asking.asked = Asked(rate={"a": 0.5})
    with pytest.raises(UserError, match=r"a scales the learning rate by 0\.25 and by 0\.5 on different ranks"):
        asking.agreed(TwoRanks(Asked(rate={"a": 0.25})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("stop on rank 0", RuntimeError, "run.stop was called where ranks do not meet"),
        ("skip too late", RuntimeError, "run.skip_step was called where ranks do not meet.*rank: panda_step_start"),
        ("own key", UserError, r"plugin mistaken: run.log\('grad_norm', ...\) has the name of another entry"),
        ("own key of evaluations", UserError, r"plugin mistaken: run.log\('loss', ...\) has the name of another entry"),
        ("no number", UserError, r"plugin mistaken: run.log\('mine', ...\) takes a number, not str"),
        ("backwards", UserError, "plugin mistaken scales the learning rate by -1"),
        ("state", UserError, r"at \['tuple'\]\['nested'\]\[0\] a tuple.*fault of mistakes 1.0"),
    ],
)
def test_what_a_hook_must_not_ask_for_is_an_error(
    processes: Any, trained: Any, mistake: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        trained("--plugins", "mistaken", "--mistake", mistake)
    if error is RuntimeError:
        assert "plugin 'mistaken': mistakes 1.0" in caught.value.__notes__[0]


def test_a_plugin_that_says_it_only_watches_must_not_ask(processes: Any, trained: Any) -> None:
    with pytest.raises(RuntimeError, match="was called by plugin watching, which says `acts = False`"):
        trained("--plugins", "watching")


def test_an_average_beside_that_of_the_optimizer_is_refused(processes: Any, trained: Any) -> None:
    with pytest.raises(UserError, match="plugin ema and optimizer schedule_free_adamw both give weights to evaluate"):
        trained("--optimizer", "schedule_free_adamw", "--plugins", "ema")


def test_what_two_plugins_hold_is_held_until_both_let_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: set[str] = set()
    freezing = SimpleNamespace(
        matching=lambda names: list(names), freeze=frozen.update, unfreeze=frozen.difference_update
    )
    run = object.__new__(Run)
    run.kept, run.frozen, run.engine = {}, {}, SimpleNamespace(freezing=freezing)  # type: ignore[assignment]

    def as_plugin(name: str) -> None:
        monkeypatch.setattr("panda.run.state.caller", lambda: SimpleNamespace(label=name))

    for name in ("a", "b", "a"):
        as_plugin(name)
        run.keep_checkpoint(5)
        run.freeze(["embed"])
    run.release_checkpoint(5)
    assert run.unfreeze(["embed"]) == [] and frozen == {"embed"} and list(run.kept) == [5]
    as_plugin("b")
    run.release_checkpoint(5)
    assert run.unfreeze(["embed", "head"]) == ["embed", "head"] and not frozen and not run.kept
    run.release_checkpoint(7)


def test_a_plugin_in_a_file_has_its_state_again_where_the_file_was_moved(
    processes: Any, trained: Any, tmp_path: Path
) -> None:
    (tmp_path / "held.py").write_text(IMPORTS + ACTOR)
    trained("--plugins", "./held.py:actor", "--do", "stop", "--at_step", "1", "--on_rank", "0", "--output_dir", "run")
    assert heard(tmp_path / "run") == [1]
    (tmp_path / "lab").mkdir()
    (tmp_path / "held.py").rename(tmp_path / "lab" / "held.py")
    trained("--plugins", "lab/held.py:actor", "--output_dir", "run", "--resume", "auto")
    assert heard(tmp_path / "run") == [1, 2]


def test_ranks_agree_only_where_something_may_act(
    processes: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0

    def any_(self: Processes, here: bool) -> bool:
        nonlocal asked
        asked += 1
        return here

    monkeypatch.setattr(Processes, "any_", any_)
    watching = ("--plugins", "profile", "ema", "--eval_steps", "1", "--save_steps", "1", "--output_dir", "run")
    trained(*watching)
    assert asked == 0, "of panda's own by default, and of these two, none"
    trained("--plugins", "mistaken")
    assert asked == 2 + 1, "after each step, and before the evaluation"
    capsys.readouterr()
    trained("--plugins", "mistaken", "--resume", "run/checkpoints/step-00000001", "--output_dir", "other")
    notes = capsys.readouterr().out
    assert "note: plugin mistakes:mistaken is new in this run: step-00000001 has no state of it" in notes
    assert "note: plugin panda-train:ema is not in this run: its state in step-00000001 is not used" in notes
