"""Model cards: what an export says of itself, that the hub can read it, and whose README.md stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from panda.run.description import origins_in
from panda.run.model_card import model_card
from panda.weights.export import exporting
from panda.weights.run_folders import CARD_MARK

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FACTS: dict[str, Any] = {
    "origins": {"task": "--task", "seed": "default", "learning_rate": "run.yaml:3", "compile": "decided: on a CPU"},
    "data_sets": [{"location": f"org/rows:default:train@{COMMIT}"}, {"location": "/data/own"}],
    "total_steps": 40,
    "parameters": 1_000_000,
    "trained_parameters": 1000,
    "samples": 12,
    "ranks": 2,
    "device": "cuda:0",
    "packages": {"torch": "2.13"},
}


def written(folder: Path, *, described: dict[str, Any] | None = None, **facts: Any) -> Path:
    """The directory of a run of 40 steps, whose 30th was the best."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(described or {"model_type": "llama"}))
    base = facts.pop("base", "org/base")
    config = {"task": "instruct", "seed": 1, "learning_rate": 0.5, "compile": False, "ckpt_path": base}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | facts.pop("config", {}), sort_keys=False))
    (folder / "provenance.json").write_text(json.dumps(FACTS | facts))
    losses = {10: 3.0, 20: 2.5, 30: 1.5, 40: 2.0}
    lines = [
        {"step": step, "eval_loss": loss, "eval_accuracy": 0.5, "eval_tokens": 9, "eval_seconds": 1.5}
        for step, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_hub_can_read_what_a_card_says(tmp_path: Path) -> None:
    card = ModelCard(model_card(written(tmp_path / "my_run"), 40, adapters=True))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["org/rows"],
        "tags": ["panda", "instruct", "lora"],
    }
    text = str(card.text)
    assert "# my\\_run\n" in text and "Trained from org/base with panda" in text
    assert "1,000,000 parameters, of which 1,000 were trained." in text
    assert (
        "| | last, step 40 | best by loss, step 30 |\n|---|---|---|\n| loss | 2.0000 | 1.5000 |\n| accuracy | 0.5000"
        in text
    )
    assert "seconds" not in text and "- steps: 40\n" in text and "- on 2 ranks, cuda\n" in text
    assert "```yaml\ntask: instruct\nlearning_rate: 0.5\n```\n" in text  # no defaults, and nothing that was decided


def test_the_card_of_an_earlier_checkpoint_has_the_evaluations_up_to_it(tmp_path: Path) -> None:
    text = model_card(written(tmp_path / "run"), 20, adapters=False)
    assert "| | last, step 20 | best by loss, step 20 |" in text and "- steps: 20 of 40\n" in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "## Evaluation" not in model_card(tmp_path / "run", 20, adapters=False)


def test_the_best_is_that_by_the_runs_own_metric_and_what_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    config = {"best_metric": "eval_f1", "best_higher_is_better": None}
    run = written(tmp_path / "run", config=config, evaluation_metrics={"eval_f1": "higher"})
    values = {10: (3.0, 0.5), 20: (2.5, 0.75), 30: (1.5, 0.25), 40: (math.nan, math.nan)}
    lines = [json.dumps({"step": step, "eval_loss": a, "eval_f1": b}) for step, (a, b) in values.items()]
    (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    text = model_card(run, 40, adapters=False)
    assert "| | last, step 30 | best by f1, step 20 |\n|---|---|---|\n| loss | 1.5000 | 2.5000 |\n" in text
    assert "\n| f1 | 0.2500 | 0.7500 |\n" in text
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("r_is_better: null", "r_is_better: false")
    )
    assert "best by f1, step 30" in model_card(run, 40, adapters=False), "as the user has it"
    (run / "metrics.jsonl").write_text(lines[-1] + "\n")
    assert "## Evaluation" not in model_card(run, 40, adapters=False)


def test_nothing_that_a_run_is_called_is_markup(tmp_path: Path) -> None:
    run = written(tmp_path / "~~a~~ &lt; $x$ *b* [c](d)", base="/models/_e_ <i>")
    text = model_card(run, 40, adapters=False)
    assert "# \\~\\~a\\~\\~ \\&lt; \\$x\\$ \\*b\\* \\[c\\](d)\n" in text
    assert "Trained from \\_e\\_ \\<i\\> with panda" in text


@pytest.mark.parametrize(
    ("base", "known"),
    [
        (f"/x/hub/models--org--some-model/snapshots/{COMMIT}", "org/some-model"),
        ("/data/own/base", None),
        (None, None),
    ],
)
def test_a_base_is_named_only_where_it_is_on_the_hub(base: str | None, known: str | None, tmp_path: Path) -> None:
    text = model_card(written(tmp_path / "run", base=base), 40, adapters=False)
    assert ModelCard(text).data.to_dict().get("base_model") == known
    assert "/data" not in text and "/x/" not in text and ("random weights" in text) == (base is None)


def test_a_licence_is_that_which_the_base_states(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = written(tmp_path / "run", base=str(base))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# base\n")
    data = ModelCard(model_card(run, 40, adapters=False)).data.to_dict()
    assert data["license"] == "apache-2.0" and "language" not in data
    for content in ("# no metadata", "---\n[", "---\nlicense: 3\n---"):
        (base / "README.md").write_text(content)
        assert "license" not in ModelCard(model_card(run, 40, adapters=False)).data.to_dict()


def test_a_model_that_is_not_of_transformers_says_so(tmp_path: Path) -> None:
    run = written(tmp_path / "run", described={"panda_model": "acme:rwkv"})
    assert ModelCard(model_card(run, 40, adapters=False)).data.library_name == "panda"


def test_neither_secrets_nor_paths_are_in_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-0123456789")
    config = {"learning_rate": ["/home/me/secret place/a", "/b/c"], "task": "```\nsecret-0123456789"}
    text = model_card(written(tmp_path / "run", config=config, base="org/secret-0123456789"), 40, adapters=False)
    assert "/home" not in text and "/b/" not in text and "secret-0123" not in text
    assert text.count("```") == 2  # the text of a key does not end the block


def test_what_little_is_left_of_a_run_is_enough(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    text = model_card(tmp_path / "run", 3, adapters=False)
    assert ModelCard(text).data.tags == ["panda"] and "- steps: 3\n" in text


def test_a_card_of_another_author_stays_and_that_of_panda_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for card, expected in ((f"{CARD_MARK}\nold", None), (f"{CARD_MARK}\nnew", None), ("my own words", "my own words")):
        with exporting(folder, f"{CARD_MARK}\ncard of {card}") as new:
            new.mkdir()
            (new / "config.json").write_text("{}")
        assert "card of" in (folder / "README.md").read_text()
        (folder / "README.md").write_text(card)
        with exporting(folder, "another card") as new:
            new.mkdir()
            (new / "config.json").write_text("{}")
        assert (folder / "README.md").read_text() == (expected or "another card")
        (folder / "README.md").unlink()


def test_origins_are_those_of_the_start_that_gave_a_value() -> None:
    own = {"seed": "/r/config.yaml:4", "max_steps": "--max_steps", "task": "/r/config.yaml:1"}
    first = {"seed": "default", "max_steps": "run.yaml:3", "task": "--task"}
    resumed = {"origins": own, "earlier_starts": [{"origins": first}, {"origins": own}, "damaged"]}
    assert origins_in(resumed) == {"seed": "default", "max_steps": "--max_steps", "task": "--task"}
    assert origins_in({"origins": own}) == own and origins_in({"origins": 3, "earlier_starts": 4}) == {}
