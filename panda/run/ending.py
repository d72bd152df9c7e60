"""The end of a run: its export and its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

from panda.answers.generation import greedy
from panda.answers.positions import held_positions
from panda.answers.text import decoded
from panda.configuration.options import RunOptions
from panda.data.token_dataset import SampleSet
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.activity import stand
from panda.files.terminal import printable
from panda.files.whole import write_whole
from panda.models.adapters.lora import export_adapters
from panda.models.forward.layers import without_compiling
from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.run.assembly import load_tokenizer
from panda.run.directory import EXPORT
from panda.run.directory import MODEL_FOLDER
from panda.run.model_card import model_card
from panda.run.state import Run
from panda.weights.export import export
from panda.weights.run_folders import newest_checkpoint
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import bytes_of
from panda.weights.stored_tensor import counted

if TYPE_CHECKING:
    from peft import PeftModel

ANSWERED_PROMPTS = 2
ANSWER_TOKENS = 64


def finish(run: Run) -> None:
    """Export the model, and let it answer the prompts, with the weights that it is evaluated with.

    Every rank has to call it.
    """
    whose = f" with the weights of {run.evaluated_weights[0]}" if run.evaluated_weights else ""
    with run.using_evaluated_weights():
        with activity(f"exporting the model{whose}", unit="B", announced=True) as shown:
            run.engine.give_weights(partial(_export, run, shown), trained_only=run.options.use_lora)
        _answer(run)


def _answer(run: Run) -> None:
    tokenizer = run.task.tokenizer
    of_task = run.resolved.components["task"].attributed
    with of_task("`example_prompts`"):
        prompts = list(run.options.prompts) or run.task.example_prompts(ANSWERED_PROMPTS)
    module = run.engine.evaluating()
    criteria = run.decoding.criteria(tokenizer, timed=False)
    most = min(run.options.max_seq_length, held_positions(module) or run.options.max_seq_length)
    with of_task("`encode_prompt`"):
        prompts, encoded = _encoded(run, prompts, most)
    rows = run.options.per_gpu_eval_batch_size
    stand("answering")
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows]
        with without_compiling(run.options.compiled):
            continued = greedy(
                module,
                encoded[start : start + rows],
                max_new_tokens=ANSWER_TOKENS,
                max_length=most,
                pad_token_id=tokenizer.pad_token_id or 0,
                end_tokens=run.decoding.ends,
                processors=run.decoding.processors,
                criteria=criteria,
                device=run.processes.device,
            )
        run.answers += [
            {"prompt": prompt, "answer": decoded(tokenizer, ids)} for prompt, ids in zip(some, continued, strict=True)
        ]
    if run.processes.rank == 0 and not run.answers:
        (run.directory / "answers.json").unlink(missing_ok=True)  # of an earlier end of the run
    elif run.processes.rank == 0:
        write_whole(run.directory / "answers.json", json.dumps(run.answers, indent=2, ensure_ascii=False) + "\n")


def _encoded(run: Run, prompts: list[str], most: int) -> tuple[list[str], list[list[int]]]:
    """Those of ``prompts`` that can be written as in training, and their tokens.

    With its answer, for which up to half is kept, each has ``most`` tokens; of longer ones the last tokens are left.
    """
    kept = min(ANSWER_TOKENS, most // 2)
    room = most - kept
    whose = "max_seq_length" if most == run.options.max_seq_length else "the model's positions"
    written: list[str] = []
    encoded: list[list[int]] = []
    notes = []
    for prompt in prompts:
        try:
            ids = run.task.encode_prompt(prompt)
        except UserError as problem:  # a template that wants a system turn, say: no reason to lose what was trained
            notes.append(f"no answer to {problem}")
            continue
        written.append(prompt)
        encoded.append(run.task.encoder.cut(ids, room))
        if len(ids) > room:
            notes.append(
                f"the prompt {prompt[:20]!r}... is cut to its last {room:,} of {len(ids):,} tokens: of {most:,}"
                f" ({whose}) {kept:,} are kept for its answer"
            )
    if run.processes.rank == 0:
        for note in notes:
            print(printable(f"note: {note}"), flush=True)
    return written, encoded


def how_it_ended(run: Run) -> dict[str, Any]:
    """What provenance.json says of the end of ``run``: who stopped it, whose weights were exported, and the
    seconds that saving and resuming took."""
    found: dict[str, Any] = dict(run.spent)
    if run.stopped is not None:
        found["stopped"] = {**asdict(run.stopped), "options": options_of_stopper(run.resolved, run.stopped.by)}
    if run.evaluated_weights is not None:
        found["exported_weights"] = run.evaluated_weights[0]
    return found


def options_of_stopper(resolved: Resolved, by: str) -> dict[str, Any] | None:
    """The options of the component ``by`` that stopped a run, as JSON has them; None if ``resolved`` lacks it."""
    for chosen in resolved.chosen:
        if chosen.offer.label == by:
            options: dict[str, Any] = json.loads(json.dumps(asdict(chosen.options), default=str))
            return options
    return {} if any(offer.label == by for offer in resolved.hook_modules) else None


def work_at_the_end(options: RunOptions, held_out: Mapping[str, SampleSet]) -> dict[str, Any]:
    """The work at the end of a run besides the export, as values to compare: a finished run need not repeat it."""
    fingerprints: Any = {name: dataset.fingerprint for name, dataset in held_out.items()} or None
    if not options.eval_names and fingerprints:
        fingerprints = fingerprints[""]  # as it was before sets had names
    return {"eval_data": fingerprints, "prompts": list(options.prompts)}


def _export(run: Run, shown: Activity, weights: Weights) -> None:
    shown.total = bytes_of(weights)
    weights = counted(weights, shown.advance)
    description, folder = run.directory / MODEL_FOLDER, run.directory / EXPORT
    card = model_card(run.directory, run.step, adapters=run.options.use_lora)
    newest = newest_checkpoint(run.directory)
    if run.options.use_lora:
        adapters = {name: tensor.read() for name, tensor in weights.items()}
        tokenizer = load_tokenizer(str(description))
        export_adapters(
            cast("PeftModel", run.engine.module), adapters, folder, description, tokenizer, card, newest=newest
        )
    else:
        export(description, weights, folder, card, newest=newest)
