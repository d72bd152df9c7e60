"""The end of a run: its export and its answers."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

from panda.answers.generation import greedy
from panda.configuration.options import RunOptions
from panda.data.token_dataset import SampleSet
from panda.files.whole import write_whole
from panda.models.adapters.lora import export_adapters
from panda.run.assembly import load_tokenizer
from panda.run.directory import EXPORT
from panda.run.directory import MODEL_FOLDER
from panda.run.state import Run
from panda.weights.export import export
from panda.weights.stored_tensor import Weights

if TYPE_CHECKING:
    from peft import PeftModel

ANSWERED_PROMPTS = 2
ANSWER_TOKENS = 64


def finish(run: Run) -> None:
    """Export the model, and let it answer the prompts. Every rank has to call it."""
    run.engine.give_weights(partial(_export, run), trained_only=run.options.use_lora)
    tokenizer = run.task.tokenizer
    of_task = run.resolved.components["task"].attributed
    with of_task("`example_prompts`"):
        prompts = list(run.options.prompts) or run.task.example_prompts(ANSWERED_PROMPTS)
    with of_task("`encode_prompt`"):
        encoded = [run.task.encode_prompt(prompt) for prompt in prompts]
    module = run.engine.evaluating()
    positions = _positions(module, run.options)
    if long := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) > positions]:
        if run.processes.rank == 0:
            unanswered = f"{len(long)} of {len(prompts)} prompts are not answered"
            print(f"{unanswered}: the model has only {positions:,} positions.", flush=True)
        prompts = [prompt for prompt in prompts if prompt not in long]
        encoded = [ids for ids in encoded if len(ids) <= positions]
    rows = run.options.per_gpu_eval_batch_size
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows]
        continued = greedy(
            module,
            encoded[start : start + rows],
            max_new_tokens=ANSWER_TOKENS,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=run.task.end_tokens[0],
            device=run.processes.device,
            positions=positions,
        )
        run.answers += [
            {"prompt": prompt, "answer": tokenizer.decode(ids)} for prompt, ids in zip(some, continued, strict=True)
        ]
    if run.processes.rank == 0:
        write_whole(run.directory / "answers.json", json.dumps(run.answers, indent=2, ensure_ascii=False) + "\n")


def _positions(module: Any, options: RunOptions) -> int:
    """The most tokens that ``module`` may be given, prompt and answer: more than any run has, if it does not say."""
    stated = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return max(stated, options.max_seq_length) if isinstance(stated, int) else 1 << 40


def work_at_the_end(options: RunOptions, held_out: SampleSet | None) -> dict[str, Any]:
    """The work at the end of a run besides the export, as values to compare: a finished run need not repeat it."""
    return {"eval_data": held_out.fingerprint if held_out else None, "prompts": list(options.prompts)}


def _export(run: Run, weights: Weights) -> None:
    description, folder = run.directory / MODEL_FOLDER, run.directory / EXPORT
    if run.options.use_lora:
        adapters = {name: tensor.read() for name, tensor in weights.items()}
        export_adapters(cast("PeftModel", run.engine.module), adapters, folder, load_tokenizer(str(description)))
    else:
        export(description, weights, folder)
