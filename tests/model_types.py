"""Models of transformers, tiny, trained by panda and by plain transformers: docs/models.md is made of the results.

``python tests/model_types.py`` tries all of them in half a minute and writes the table; with names, it prints those.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from token_batches import collate
from transformers import AutoConfig
from transformers import AutoModelForCausalLM

from panda.configuration.options import RunOptions
from panda.data.batches import TokenBatch
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.placement import place
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.isolation import refuse_without_positions
from panda.models.forward.trial import refuse_unfit
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.models.initialisation.creation import without_weights
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.tasks.scores import next_token_loss
from panda.weights.conversion import as_in_module
from panda.weights.conversion import as_published
from panda.weights.files import safetensors_weights
from panda.weights.files import write_weights
from panda.weights.json_object import read_json_object
from panda.weights.matching import matched
from panda.weights.stored_tensor import Weights

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- The rest is written by: python tests/model_types.py -->"
ENTRIES = 160
ROUTER_LOSS = 0.5
"""Its weight, large enough that a wrong one shows."""
LOSS, GRADIENT = 1e-5, 1e-3
"""The largest relative differences that count as equal."""

SIZES: dict[str, Any] = {
    "vocab_size": ENTRIES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values of a config.json, of which each type takes those that it has."""

_RANDOM = (
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "residual_dropout"),
    *("activation_dropout", "embed_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop"),
    *("resid_dropout", "emb_pdrop"),
)
"""What makes a forward pass random, and is 0 here."""
_NO_DROPOUT = dict.fromkeys(_RANDOM, 0.0)
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4, "n_groups": 1}

OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": ["sliding_attention", "full_attention"], "num_dense_layers": 1},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
        "mamba_n_groups": 1,
    },
    "bloom": {"n_head": 4, "n_layer": 2},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64, "n_ctx": 64},
    "cohere2_moe": {},
    "deepseek_v2": _LATENT | _ROUTED,
    "deepseek_v3": _LATENT | _ROUTED,
    "dots1": _ROUTED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "falcon": {"head_dim": None, "new_decoder_architecture": False},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "falcon_mamba": _MAMBA | {"time_step_rank": 4},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": ENTRIES,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe": _ROUTED,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 8},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "granitemoehybrid": {
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 8},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "mamba": _MAMBA | {"time_step_rank": 4},
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 8, "chunk_size": 8},
    "minicpm3": _LATENT,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "nemotron": {},
    "olmo_hybrid": _HYBRID | _LINEAR,
    "openai-gpt": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_5_text": _HYBRID | _LINEAR,
    "qwen3_5_moe_text": _HYBRID | _LINEAR,
    "qwen3_next": _HYBRID | _LINEAR,
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}
"""What a type needs besides, or calls otherwise."""

TYPES = """
afmoe apertus arcee bamba bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4
falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe
lfm2 llama mamba mamba2 minicpm3 minimax ministral mistral mixtral mpt nanochat nemotron olmo olmo2 olmo3 olmoe
openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma seed_oss smollm3 stablelm starcoder2 xglm
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Result:
    """What panda does with a model, beside plain transformers."""

    model_type: str
    experts: bool
    router_loss: bool
    padded: tuple[float, float]
    """Relative differences of the loss and of the gradient."""
    packed: tuple[float, float] | None
    """The same; None where packing is refused."""
    exported: bool
    """Whether plain transformers loads the export, with every weight as panda had it."""

    @property
    def is_equal(self) -> bool:
        return self.exported and all(
            loss <= LOSS and gradient <= GRADIENT for loss, gradient in filter(None, (self.padded, self.packed))
        )


def tiny(model_type: str) -> Any:
    """A model of that type in plain transformers, with weights far enough from zero that each of them matters."""
    values: dict[str, Any] = SIZES | _NO_DROPOUT | OWN.get(model_type, {}) | {"router_aux_loss_coef": ROUTER_LOSS}
    values |= {"aux_loss_coef": ROUTER_LOSS} if model_type == "jetmoe" else {}
    given = {name: value for name, value in values.items() if value is not None}
    config = AutoConfig.for_model(model_type, **given)
    config.output_router_logits = hasattr(config, "output_router_logits")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "A_log" not in name:
                parameter.mul_(3)
    return model


def samples() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    made = []
    for length in (5, 12, 9, 3, 14, 7):
        ids = generator.integers(3, ENTRIES, length).astype(np.int32)
        made.append((ids, np.arange(length) >= min(length - 1, 1 + length // 3)))
    return made


def of_transformers(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of plain transformers: the samples as one padded batch, with its attention mask."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    batch = collate([[sample] for sample in samples()], pad_token_id=0)
    output = model(input_ids=batch.input_ids, attention_mask=batch.real.long(), labels=batch.labels, use_cache=False)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), gradients


def built(folder: Path) -> tuple[Any, Weights]:
    """panda's module of the checkpoint in ``folder``, without weights, and the weights that it needs."""
    config = read_json_object(folder / "config.json")
    context = ModelContext(ENTRIES, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2, config=config)
    with without_weights():
        module = build_hf(HfOptions(), context)
    weights = as_in_module(module, safetensors_weights(folder), source=str(folder))
    return module, matched(module, weights, source=str(folder))


def of_panda(
    folder: Path, rows: list[list[list[Any]]], processes: Processes, *, packed: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step of panda's engine, over a micro batch for each of ``rows``."""
    options = RunOptions(max_grad_norm=0)
    module, weights = built(folder)
    if packed:
        refuse_without_positions(module, "hf")
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    place(module, weights, options, config, processes)
    rate = 1000.0  # so that the difference of weights has all digits of the gradient
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=rate), config, processes)
    refuse_unfit(engine.evaluating(), "hf", ENTRIES, processes.device)
    if packed:
        refuse_leaking(engine.evaluating(), "hf", ENTRIES, processes.device)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    loss_sum: Callable[[Any, TokenBatch], torch.Tensor] = next_token_loss
    result = engine.step([collate(micro, pad_token_id=0, packed=packed) for micro in rows], loss_sum)
    gradients = {name: (before[name] - p.detach()) / rate for name, p in module.named_parameters()}
    loss = float(result.loss)
    if result.step_loss is not None:
        loss += module.step_loss.weight * float(result.step_loss)
    engine.close()
    return loss, gradients


def difference(
    found: tuple[float, dict[str, torch.Tensor]], reference: tuple[float, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Relative difference of two losses, and the largest relative difference of the gradients of one tensor."""
    loss = abs(found[0] - reference[0]) / abs(reference[0])
    whole = math.sqrt(sum(float(g.square().sum()) for g in reference[1].values()))
    worst = 0.0
    for name, gradient in found[1].items():
        expected = reference[1].get(name, torch.zeros_like(gradient))
        worst = max(worst, float((gradient - expected).norm() / (expected.norm() + 1e-4 * whole)))
    return loss, worst


def is_exported(folder: Path, export: Path) -> bool:
    """Whether plain transformers loads what panda exports of the checkpoint in ``folder``, with the same weights."""
    _, weights = built(folder)
    export.mkdir()
    (export / "config.json").write_text((folder / "config.json").read_text())
    write_weights(as_published(export, weights), export)
    model, info = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, output_loading_info=True)
    state = model.state_dict()
    same = all(torch.equal(stored.read(), state[name]) for name, stored in weights.items())
    layout = safetensors_weights(folder).keys() == safetensors_weights(export).keys()
    return same and layout and not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def tried(model_type: str, processes: Processes) -> Result:
    """``model_type`` trained for a step by both, and exported."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model = tiny(model_type)
        model.save_pretrained(folder)
        each = samples()
        reference = of_transformers(folder)
        padded = of_panda(folder, [[[s] for s in each[:4]], [[s] for s in each[4:]]], processes, packed=False)
        try:
            rows = [[each[:3], each[3:4]], [each[4:]]]
            packed = difference(of_panda(folder, rows, processes, packed=True), reference)
        except UserError as problem:
            assert "batching: packed: refused" in str(problem), problem
            packed = None
        router = hasattr(built(folder)[0], "step_loss")
        experts = any("expert" in name for name, _ in model.named_parameters())
        return Result(
            model_type,
            experts,
            router,
            difference(padded, reference),
            packed,
            is_exported(folder, Path(temporary) / "export"),
        )


def table(results: list[Result]) -> str:
    lines = [
        "| `model_type` | experts | router loss | padded: loss, gradient | packed: loss, gradient | export |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        padded = "{:.0e}, {:.0e}".format(*each.padded)
        packed = "{:.0e}, {:.0e}".format(*each.packed) if each.packed else "refused"
        experts, router = "yes" if each.experts else "", "yes" if each.router_loss else ""
        lines.append(f"| {each.model_type} | {experts} | {router} | {padded} | {packed} | loads |")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    processes = join_processes()
    results, failed = [], []
    for name in names or TYPES:
        try:
            result = tried(name, processes)
        except Exception as problem:  # the other types are still tried
            failed.append(name)
            print(f"{name}: {type(problem).__name__}: {str(problem)[:600]}", flush=True)
            continue
        results.append(result)
        print("equal" if result.is_equal else "DIFFERENT", result, flush=True)
    unequal = [result.model_type for result in results if not result.is_equal]
    rows = table([result for result in results if result.is_equal])
    leave_processes()
    if names or failed or unequal:
        print(f"{rows}\nfailed: {failed}\ndifferent: {unequal}")
        return 1 if failed or unequal else 0
    page = TABLE.read_text(encoding="utf-8")
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    TABLE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\nMade with {made_with}.\n\n{rows}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
