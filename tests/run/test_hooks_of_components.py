"""Hooks that are methods of what factories of any kind return are called in a run that chose these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.runner import train

HOOK = """
    @hookimpl
    def panda_step_end(self, run, step): calls.append(("{0}", step, id(self)))
"""
HOOKED = '''
calls = []

class Whole:
    def __init__(self, build): self.build = build
    def __call__(self, *given): return self.build(*given)
{factory}

@register_kind("gauge")
class Gauge:
    """What something is worth."""

register_gauge = decorator_for("gauge")

@register_gauge("hooked")
class HookedGauge(Gauge):
    def __init__(self, options, context): pass
{gauge}

@dataclass(frozen=True)
class HookedOptions(InstructOptions):
    gauge: Annotated[tuple[str, ...], Names("gauge")] = ("hooked",)

@register_task("hooked", options=HookedOptions)
class Hooked(Instruct):
    def __init__(self, options, context):
        super().__init__(options, context)
        self.gauge = context.named[0].build(None, Gauge)
{task}

class Descent(torch.optim.SGD):
    pass
{optimizer}

@register_optimizer("hooked")
def descent(options, context):
    return Descent(context.param_groups)

class Network(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(size, 4), torch.nn.Linear(4, size))

    def forward(self, input_ids): return self.layers(input_ids)
{model}

register_model("hooked")(Whole(lambda options, context: Network(context.vocab_size)))

class Level:
    def __call__(self, step): return 1.0
{lr_scheduler}

@register_lr_scheduler("hooked")
def level(options, context): return Level()

@register_reader("hooked")
class Reading(JsonReader):
    pass
{reader}
'''
KINDS = ("task", "optimizer", "model", "lr_scheduler", "reader")


def test_methods_of_components_are_live_hooks(
    processes: Any, distributions: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = (
        "import torch\nfrom panda.tasks.instruct import Instruct, InstructOptions\n"
        "from panda.data.json_reader import JsonReader\n"
    )
    source = imports + HOOKED.format(**{kind: HOOK.format(kind) for kind in (*KINDS, "factory", "gauge")})
    entry_points = {f"{kind}s": {"hooked": "acme.hooked"} for kind in (*KINDS, "gauge")}
    distributions.install("acme", entry_points | {"kinds": {"gauge": "acme.hooked"}}, {"acme.hooked": source})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"input": "a", "target": "b"}]')
    argv = [part for kind in KINDS for part in (f"--{kind}", "hooked")]
    argv += ["--max_steps", "2", "--num_workers", "0", "--instruction_tuning_data_dir", "rows.json", "--prompts", "a"]
    run = train(configure(parse_arguments([*argv, "-p", "no:plot", "-p", "no:tensorboard"])))
    import acme.hooked

    calls = acme.hooked.calls
    assert sorted(set(calls)) == sorted(calls), "each once"
    assert [(kind, step) for kind, step, _ in sorted(calls)] == sorted(
        (kind, step) for kind in (*KINDS, "factory", "gauge") for step in (1, 2)
    )
    assert run is not None
    assert {which for kind, _, which in calls if kind == "model"} == {id(run.engine.module)}, "the one that is trained"
