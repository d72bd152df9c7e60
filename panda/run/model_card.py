"""Model cards: the README.md of an export, as the hub reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import panda
from panda.data.data_sets import name_and_commit
from panda.files.private import private
from panda.files.records import read_records
from panda.files.terminal import printable_line
from panda.run.best_evaluation import best_evaluation
from panda.run.best_evaluation import is_finite
from panda.run.description import origins_in
from panda.run.description import read_provenance
from panda.run.directory import MODEL_FOLDER
from panda.run.directory import configuration_in
from panda.weights.formats import CONFIG
from panda.weights.hub import is_name
from panda.weights.json_object import read_json_object
from panda.weights.run_folders import CARD_MARK
from panda.weights.run_folders import METRICS

LICENCE = ("license", "license_name", "license_link")
_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
"""A folder in the cache of the hub: it names the model."""


def model_card(run: Path, step: int, *, adapters: bool) -> str:
    """The card of an export of ``run`` with the weights after ``step``; ``adapters``: it has only these.

    What is not known is left out: a licence is stated where the base's folder has a card that states one. It is sent to
    others with the model: of paths only the last part is written, and no secret.
    """
    config, facts = configuration_in(run), read_provenance(run)
    config = {key.removeprefix("run."): value for key, value in config.items()}
    base, task = str(config.get("ckpt_path") or ""), str(config.get("task") or "")
    name = _name_on_hub(base)
    sets = facts.get("data_sets")
    named = [name_and_commit(str(each.get("location"))) for each in sets if isinstance(each, dict)] if sets else []
    described = read_json_object(run / MODEL_FOLDER / CONFIG)
    library = "peft" if adapters else "panda" if "panda_model" in described else "transformers"
    metadata = {
        "base_model": name,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "datasets": sorted({found[0] for found in named if found}) or None,
        **_licence(base),
        "tags": ["panda", *([task] if re.fullmatch(r"[\w.:-]+", task) else []), *(["lora"] if adapters else [])],
    }
    known = private({key: value for key, value in metadata.items() if value is not None})
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    lines = [*_title(run, facts, name or base), *_evaluation(run, step), *_training(config, facts, step)]
    text: str = private("\n".join(lines))
    return f"---\n{front}---\n{CARD_MARK}\n{text}\n"


def _name_on_hub(base: str) -> str | None:
    """The name on the hub of the checkpoint ``base``; None where it is not known."""
    if is_name(base):
        return base
    found = _IN_CACHE.search(base)
    return f"{found['owner']}/{found['name']}" if found else None


def _licence(base: str) -> dict[str, str]:
    """What the card in the folder ``base`` says of the licence."""
    try:
        text = (Path(base) / "README.md").read_text(encoding="utf-8") if base else ""
        found = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---") else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in LICENCE if isinstance(found.get(key), str)} if isinstance(found, dict) else {}


def _title(run: Path, facts: Mapping[str, Any], base: str) -> Iterator[str]:
    trained, whole = facts.get("trained_parameters"), facts.get("parameters")
    yield f"# {_text(run.absolute().name)}"
    yield ""
    of = f"from {_text(_last(base))}" if base else "from random weights"
    size = f", {whole:,} parameters" if isinstance(whole, int) else ""
    part = f", of which {trained:,} were trained" if isinstance(trained, int) and trained != whole else ""
    yield f"Trained {of} with panda {panda.__version__}{size}{part}."


def _evaluation(run: Path, step: int) -> Iterator[str]:
    records = [record for record in read_records(run / METRICS) if record["step"] <= step]
    evaluations = [record for record in records if is_finite(record.get("eval_loss"))]
    if not evaluations:
        return
    last = evaluations[-1]
    found = best_evaluation(run, evaluations)
    best = next((record for record in evaluations if found and record["step"] == found.step), last)
    metrics = [key for key, value in last.items() if _is_metric(key, value)]
    by = f" by {_text(found.metric.removeprefix('eval_').replace('_', ' '))}" if found else ""
    yield ""
    yield "## Evaluation"
    yield ""
    yield f"| | last, step {last['step']:,} | best{by}, step {best['step']:,} |"
    yield "|---|---|---|"
    for key in metrics:
        cells = [f"{each[key]:.4f}" if is_finite(each.get(key)) else "" for each in (last, best)]
        yield f"| {_text(key.removeprefix('eval_').replace('_', ' '))} | {' | '.join(cells)} |"


def _is_metric(key: str, value: Any) -> bool:
    """Whether an entry of an evaluation is a result: a count or a time is none."""
    return key.startswith("eval_") and isinstance(value, float) and not key.endswith("seconds")


def _training(config: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> Iterator[str]:
    yield ""
    yield "## Training"
    yield ""
    total, device, ranks = facts.get("total_steps"), facts.get("device"), facts.get("ranks")
    yield f"- steps: {step:,}" + (f" of {total:,}" if isinstance(total, int) and total != step else "")
    for key in ("samples", "tokens", "supervised_tokens"):
        if isinstance(value := facts.get(key), int):
            yield f"- {key.replace('_', ' ')} of the data: {value:,}"
    if device:
        yield f"- on {ranks} {'rank' if ranks == 1 else 'ranks'}, {_text(str(device).partition(':')[0])}"
    packages = facts.get("packages")
    if isinstance(packages, dict):
        yield f"- {', '.join(f'{_text(name)} {_text(version)}' for name, version in packages.items())}"
    origins = origins_in(facts)
    chosen = {
        key: _last(value)
        for key, value in config.items()
        if not origins.get(key, "default").startswith(("default", "decided: ", "checkpoint "))
    }
    if chosen:
        yield ""
        yield "Keys that are not at their defaults, in the form of panda's configuration:"
        yield ""
        yield "```yaml"
        yield from (
            yaml.safe_dump(private(chosen), sort_keys=False, allow_unicode=True).replace("```", "'''").splitlines()
        )
        yield "```"


def _last(value: Any) -> Any:
    """``value`` of a configuration, of a path the last part."""
    if isinstance(value, list):
        return [_last(each) for each in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) and value.startswith(("/", "~")) else value


def _text(text: Any) -> str:
    """``text`` in Markdown, where it is no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", printable_line(str(text)))
