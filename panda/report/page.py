"""The page: one file that needs no network, and no JavaScript to be read."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import panda
from panda.files.terminal import number_of
from panda.report.charts import charts
from panda.report.html import Html
from panda.report.html import as_written
from panda.report.html import element
from panda.report.html import folded
from panda.report.html import html
from panda.report.html import joined
from panda.report.html import table
from panda.report.reported import Missing
from panda.report.reported import Reported
from panda.report.texts import answers_of
from panda.report.texts import data_of
from panda.report.texts import missing
from panda.report.texts import samples_of
from panda.report.texts import scale
from panda.run.description import origins_in

HEADINGS = {
    "curves": "Curves",
    "answers": "Answers before and after",
    "samples": "Samples and the loss of their tokens",
    "data": "Data",
    "time": "Time and memory",
    "configuration": "Configuration",
    "provenance": "Provenance",
}
SKIPPED = 200
UNSAID = ("origins", "components", "packages", "user_files", "command", "format")
"""Of provenance.json: what has a place of its own."""


def page(runs: Sequence[Reported], over: str = "steps") -> str:
    """The page of ``runs``, with curves over ``over``."""
    script, style = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    # Whatever stands in the data of a run, a browser executes this script only, and fetches nothing.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    names = ", ".join(run.recorded.name for run in runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{names} – panda"),
        Html(f"<style>{style}</style>"),
    )
    parts = {
        "curves": html(charts([run.recorded for run in runs], over), *map(_skipped, runs)),
        "answers": _each(runs, answers_of),
        "samples": html(scale(runs), _each(runs, samples_of)),
        "data": _each(runs, data_of),
        "time": _time_and_memory(runs),
        "configuration": _configuration(runs),
        "provenance": _each(runs, _provenance),
    }
    body = element(
        "body",
        element("h1", names),
        element("p", f"Reported by panda {panda.__version__}.", class_="faint"),
        element("nav", *(element("a", HEADINGS[key], href=f"#{key}") for key in parts)),
        _summary(runs),
        *(element("section", element("h2", HEADINGS[key]), part, id=key) for key, part in parts.items()),
        element("button", "Show all again", class_="all", type="button"),
        Html(f"<script>{script}</script>"),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _each(runs: Sequence[Reported], part: Any) -> Html:
    """``part`` of each of ``runs``, under its name where there are several."""
    several = len(runs) > 1
    return html(*(html(element("h3", run.recorded.name) if several else "", part(run)) for run in runs))


# -- how far, and how good


def _summary(runs: Sequence[Reported]) -> Html:
    columns = [dict(_facts(run)) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    head = ["", *(run.recorded.name for run in runs)] if len(runs) > 1 else []
    damaged = [
        element(
            "p",
            f"{run.recorded.name}: {number_of(run.damaged, 'damaged line is', 'damaged lines are')} left out of it.",
            class_="missing",
        )
        for run in runs
        if run.damaged
    ]
    return html(table(([key, *(column.get(key, "") for column in columns)] for key in keys), head), *damaged)


def _facts(run: Reported) -> Iterator[tuple[str, str]]:
    row, facts = run.row, run.provenance
    yield "status", str(row["status"])
    total = row["total_steps"]
    yield "steps", f"{row['step']:,}" + (f" of {total:,}" if total else "")
    if row["loss"] is not None:
        yield "loss", f"{row['loss']:.4f} at last, least {row['least_loss']:.4f}"
    best = [(value, each["step"]) for each in run.recorded.evaluations if _is_finite(value := each["eval_loss"])]
    if best:
        yield "evaluation loss", f"{best[-1][0]:.4f} at last, best {min(best)[0]:.4f} at step {min(best)[1]:,}"
    if (metric := row.get("best_metric")) not in (None, "eval_loss"):
        which = "highest" if row["higher_is_better"] else "lowest"
        yield f"best {metric}", f"{row['best_value']:.4f} at step {row['best_step']:,}, the {which}"
    if run.weights:
        yield "weights that answer below", run.weights
    last: Mapping[str, Any] = run.recorded.records[-1] if run.recorded.records else {}
    for key, name in (("tokens", "tokens trained on"), ("skipped_steps", "skipped steps")):
        if isinstance(last.get(key), int) and (last[key] or key == "tokens"):
            yield name, f"{last[key]:,}"
    if row["tokens_per_second"]:
        yield "speed", f"{row['tokens_per_second']:,.0f} tokens a second"
    for key, name in (("parameters", "parameters"), ("trained_parameters", "trained parameters")):
        if isinstance(facts.get(key), int):
            yield name, f"{facts[key]:,}"
    for key, name in (("checkpoint", "began with"), ("started", "started"), ("device", "device"), ("ranks", "ranks")):
        if key in facts:
            yield name, str(facts[key] if facts[key] is not None else "random weights")
    if isinstance(end := facts.get("end"), dict) and isinstance(stopped := end.get("stopped"), dict):
        yield "stopped by", f"{stopped.get('by')}: {stopped.get('reason')}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _skipped(run: Reported) -> Html:
    """The steps that were skipped, and why."""
    if not run.skipped:
        return Html()
    rows = [
        [f"{each.get('step')}", str(each.get("why")), as_written(each.get("loss")), as_written(each.get("grad_norm"))]
        for each in run.skipped[:SKIPPED]
    ]
    more = f", of which these are the first {SKIPPED}" if len(run.skipped) > SKIPPED else ""
    title = f"{run.recorded.name}: {number_of(len(run.skipped), 'skipped step')}{more}"
    return element("details", element("summary", title), table(rows, ("step", "why", "loss", "gradient norm")))


# -- time and memory


def _time_and_memory(runs: Sequence[Reported]) -> Html:
    times = [_times(run) for run in runs]
    keys = dict.fromkeys(key for found in times for key in found)
    head = ["", *(run.recorded.name if len(runs) > 1 else "" for run in runs)]
    said: list[Html] = []
    if keys:
        shares = [sum(found.values()) for found in times]
        rows = [
            [key, *(_time_cell(found.get(key), whole) for found, whole in zip(times, shares, strict=True))]
            for key in keys
        ]
        rows.append(["in all", *map(_duration, shares)])
        said += [
            element("div", table(rows, head), class_="numbers"),
            element("p", "On record of all starts; without starting, exporting and the last save.", class_="note"),
        ]
    else:
        said.append(element("p", "No time is on record yet."))
    return html(*said, _memory(runs), *(_profile(run) for run in runs if run.profile))


def _times(run: Reported) -> dict[str, float]:
    """Seconds by part."""
    records, evaluations = run.recorded.records, run.recorded.evaluations
    training = waiting = 0.0
    before = 0
    for record in records:
        passed, seconds = record["step"] - before, record.get("step_seconds")
        before = record["step"]
        if passed > 0 and _is_finite(seconds):
            training += passed * seconds
            waiting += passed * seconds * (share if _is_finite(share := record.get("data_wait")) else 0)
    parts = {
        "training steps": training - waiting,
        "waiting for data": waiting,
        "evaluating": _sum(evaluations, "eval_seconds"),
        "saving": _sum(records, "save_seconds"),
        "resuming": _sum(records, "resume_seconds"),
    }
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(_finite(records, key))


def _time_cell(seconds: float | None, whole: float) -> str:
    return "" if seconds is None else f"{_duration(seconds)}  ({seconds / whole:.1%})"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _memory(runs: Sequence[Reported]) -> Html:
    rows = []
    keys = dict.fromkeys(key for run in runs for key in run.memory)
    rows += [[f"{key} (estimated)", *(f"{run.memory.get(key, 0):.1f} GiB" for run in runs)] for key in keys]
    most = [_most(run, "memory_gib") for run in runs]
    if any(value is not None for value in most):
        rows.append(["most that was allocated", *("" if value is None else f"{value:.1f} GiB" for value in most)])
    if not rows:
        return element("p", "Memory is on record of runs on GPUs only.", class_="note")
    head = ["memory of a GPU", *(run.recorded.name if len(runs) > 1 else "" for run in runs)]
    return element("div", element("h3", "Memory"), table(rows, head), class_="numbers")


def _most(run: Reported, key: str) -> float | None:
    return max(_finite(run.recorded.records, key), default=None)


def _finite(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in records if _is_finite(record.get(key))]


def _profile(run: Reported) -> Html:
    title = f"Parts of a step, by the plugin profile: {run.recorded.name}"
    return element("details", element("summary", title), element("pre", run.profile))


# -- configuration and provenance


def _configuration(runs: Sequence[Reported]) -> Html:
    said: list[Html] = []
    if len(runs) > 1:
        said.append(_differences(runs))
    for run in runs:
        origins = origins_in(run.provenance)
        rows = [
            [key, as_written(value), origins.get(key.rpartition(".")[2], origins.get(key, ""))]
            for key, value in run.configuration.items()
        ]
        chosen = [row for row in rows if row[2] not in ("default", "")]
        others = [row for row in rows if row[2] in ("default", "")]
        head = ("key", "value", "from")
        if len(runs) > 1:
            said.append(element("h3", run.recorded.name))
        if not rows:
            said.append(missing(Missing("config.yaml is missing or damaged"), "The configuration"))
            continue
        said.append(table(chosen, head) if chosen else element("p", "All keys have their defaults."))
        said.append(
            element(
                "details",
                element("summary", f"{number_of(len(others), 'key')} with their defaults"),
                table(others, head),
            )
        )
    return html(*said)


def _differences(runs: Sequence[Reported]) -> Html:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.configuration)
    rows = []
    for key in keys:
        values = [as_written(run.configuration[key]) if key in run.configuration else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    title = element("h3", "What differs")
    if not rows:
        return html(title, element("p", "All keys have the same values."))
    return html(title, table(rows, ["key", *(run.recorded.name for run in runs)]))


def _provenance(run: Reported) -> Html:
    facts = run.provenance
    if not facts:
        return missing(Missing("provenance.json is missing or damaged"), "Where the run came from")
    rows: list[tuple[object, object]] = []
    if isinstance(command := facts.get("command"), list):
        rows.append(("command", element("code", joined(" ", command))))
    rows += [(key.replace("_", " "), folded(value)) for key, value in facts.items() if key not in UNSAID]
    packages = facts.get("packages")
    if isinstance(packages, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in packages.items())))
    components = facts.get("components")
    if isinstance(components, dict):
        rows.append(("components", folded({name: _provider(found) for name, found in components.items()})))
    if facts.get("user_files"):
        rows.append(("files of the user (sha256)", folded(facts["user_files"])))
    return table(rows)


def _provider(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    return f"{found.get('distribution')} {found.get('version')}, {found.get('module')}"
