"""Exports of many kinds, read by the transformers here and by version 4.57.6 in an environment of its own.

    python bench/exports.py

Each kind is a tiny base with random weights, as a checkpoint on the hub is written, which panda-train fine-tunes for
one step at learning rate 1e-9: the export is the base, so either version must read the same from both (logits, type,
a greedy answer, ids and decoded text, rendered chat). The ids are also compared with those of training (transformers
here, on the base) and of the tokenizers library on tokenizer.json. The table says `same`, or what differs. If all
rows are the same, the keys of config.json, tokenizer_config.json and adapter_config.json are recorded in exports.json
beside this file; a test compares what panda writes with this record, so whoever changes keys runs this command.

The older transformers is installed with pip into --environment, which needs a package index, 70 MB and half a
minute; a folder that has it already is used as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "exports.json"
OLD = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0", "peft==0.17.1")
OLD_NEEDS = ("requests", "urllib3", "idna", "certifi", "charset_normalizer")
FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")
SAMPLE = HERE.parent / "panda" / "data" / "sample"

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
    "transformers_version": "4.57.6",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [float(n) for n in range(1, 9)]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "torch_dtype": "float32"}
GEMMA = {
    "head_dim": 16,
    "rope_theta": 50000.0,
    "rope_local_base_freq": 300.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama": ({"model_type": "llama", **SHAPE, "rope_theta": 2000.0}, "bytes", {}),
    "llama, llama3 RoPE": (
        {
            "model_type": "llama",
            **SHAPE,
            "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"},
        },
        "byte BPE",
        {},
    ),
    "llama, --model llama": (
        {"model_type": "llama", **SHAPE, "rope_theta": 900.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "sentencepiece, legacy",
        {"model": "llama"},
    ),
    "qwen2, yarn": (
        {
            "model_type": "qwen2",
            **SHAPE,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "torch_dtype": "bfloat16",
        },
        "byte BPE",
        {"precision": "bf16"},
    ),
    "qwen3, dynamic": (
        {"model_type": "qwen3", **SHAPE, "head_dim": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "byte BPE of 5",
        {},
    ),
    "gpt2": ({"model_type": "gpt2", **GPT2}, "GPT-2, prefix space", {}),
    "gemma3_text": ({"model_type": "gemma3_text", **SHAPE, **GEMMA}, "sentencepiece", {}),
    "phi3, longrope": (
        {
            "model_type": "phi3",
            **SHAPE,
            "rope_scaling": LONG,
            "original_max_position_embeddings": 64,
            "sliding_window": 16,
        },
        "rstrip",
        {},
    ),
    "mistral": ({"model_type": "mistral", **SHAPE, "sliding_window": 16, "rope_theta": 700.0}, "unigram", {}),
    "olmo2, linear": (
        {"model_type": "olmo2", **SHAPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "byte BPE",
        {},
    ),
    "stablelm": (
        {"model_type": "stablelm", **SHAPE, "partial_rotary_factor": 0.5, "rope_theta": 800.0},
        "byte BPE",
        {},
    ),
    "adapters": ({"model_type": "llama", **SHAPE, "rope_theta": 2000.0}, "sentencepiece", {"use_lora": "true"}),
    "adapters, merged": ({"model_type": "llama", **SHAPE, "rope_theta": 2000.0}, "bytes", {"use_lora": "true"}),
}
"""By name: config.json of the base, as transformers 4.57 wrote it; its tokenizer; more options of the run."""

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|{{ m['role'] }}|> 👋\u2028{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> 👋\u2028{% endif %}"
)
WORDS = ["Hello world", "Say hello twice, please.", "it's we'll return x", "user assistant 12345 + 6", "naïve Grüße"]


def write_tokenizer(kind: str, folder: Path) -> int:
    """Write a tokenizer of ``kind`` to ``folder`` as the hub has them. Returns its number of entries."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import pre_tokenizers
    from tokenizers import processors
    from tokenizers import trainers

    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    special = ["<unk>", "<s>", "</s>"]
    bos = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer" / "tokenizer.json"))
        config = json.loads((SAMPLE / "tokenizer" / "tokenizer_config.json").read_text())
    elif kind in ("byte BPE", "byte BPE of 5", "GPT-2, prefix space"):
        prefix = kind == "GPT-2, prefix space"
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            WORDS * 3,
            trainers.BpeTrainer(
                vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            ),
        )
        tokenizer.enable_truncation(8)  # as a program left it in many files on the hub
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True} if prefix else {}
        if kind == "byte BPE of 5":
            config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|end|>"]}
        elif not prefix:
            config |= {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|end|>"]}
    elif kind == "unigram":
        pieces = [*special, "▁", "▁He", "llo", "▁world", *"abcdefghijklmnopqrstuvwxyzHS,.=?+'123456", *fallback]
        tokenizer = Tokenizer(
            models.Unigram([(p, -float(n % 7)) for n, p in enumerate(pieces)], unk_id=0, byte_fallback=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        tokenizer.post_processor = bos
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    else:
        legacy = kind != "sentencepiece"
        tokenizer = _like_sentencepiece([*special, *fallback], legacy)
        tokenizer.post_processor = bos
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "clean_up_tokenization_spaces": False}
        (folder / "tokenizer.model").write_bytes(b"as if it were sentencepiece's")
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=kind == "rstrip", special=True)])
    tokenizer.add_tokens([AddedToken("<|user|>", rstrip=kind == "rstrip", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # In the configuration, where tools of 2023 to 2025 kept it.
    text = json.dumps(config | {"chat_template": TEMPLATE}, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer.get_vocab_size()


def _like_sentencepiece(special: list[str], legacy: bool) -> Any:
    """A tokenizer as those converted from sentencepiece are, with ``special`` entries first."""
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import normalizers
    from tokenizers import pre_tokenizers

    pieces = [*special, "▁", *sorted({*"".join(WORDS)} - {" "}), "▁H", "▁He", "ll", "▁t"]
    merges = [("▁", "H"), ("▁H", "e"), ("l", "l"), ("▁", "t")]
    tokenizer = Tokenizer(
        models.BPE({p: n for n, p in enumerate(pieces)}, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    replace = normalizers.Replace(" ", "▁")
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        decoder.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def make_base(kind: str, folder: Path) -> Path:
    """Write the base of ``kind`` to ``folder``."""
    import torch
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    config, tokenizer, _ = KINDS[kind]
    folder.mkdir(parents=True)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = {**config, "vocab_size": write_tokenizer(tokenizer, folder), **ids}
    given = json.loads(json.dumps({key: value for key, value in config.items() if key != "model_type"}))
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **given))
    made.to(getattr(torch, config["torch_dtype"])).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def options_of(kind: str, base: Path) -> dict[str, Any]:
    """The options of the run that fine-tunes ``base``, a folder."""
    return {
        "task": "instruct",
        "model": "hf",
        "ckpt_path": base,
        "instruction_tuning_data_dir": SAMPLE / "instruct",
        "template": "chat",
        "max_seq_length": 200,
        "learning_rate": 1e-9,
        "warmup_steps": 0,
        "max_steps": 1,
        "num_workers": 0,
        "precision": "fp32",
        **KINDS[kind][2],
    }


def train(kind: str, base: Path, run: Path) -> Path:
    """Train on ``base``; returns the export of the run."""
    flags = [f"--{key}={value}" for key, value in options_of(kind, base).items()]
    _call([sys.executable, "-m", "panda.cli.train", *flags, f"--output_dir={run}"])
    if "merged" not in kind:
        return run / "export"
    _call([sys.executable, "-m", "panda.cli.main", "export", str(run), "--merge"])
    return run / "merged"


def keys_of(folder: Path) -> dict[str, Any]:
    """The keys of the files in ``folder`` that readers look into, with those of RoPE."""

    def keys(values: Mapping[str, Any]) -> list[str]:
        nested = ("rope_parameters", "rope_scaling")
        inner = [f"{key}.{name}" for key in nested for name in values.get(key) or {}]
        return sorted([*values, *inner])

    return {name: keys(json.loads((folder / name).read_text())) for name in FILES if (folder / name).exists()}


def readings(folders: list[Path], packages: Path | None, *more: str) -> tuple[str, list[dict[str, Any]]]:
    """What the transformers in ``packages`` (None: the one here) reads from each of ``folders``; and versions."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if packages:
        environment["PYTHONPATH"] = str(packages)
    printed = _call([sys.executable, str(HERE / "read_export.py"), *map(str, folders), *more], environment)
    versions, *found = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    return ", ".join(f"{name} {version}" for name, version in versions.items()), found


def differences(export: dict[str, Any], base: dict[str, Any], here: dict[str, Any]) -> str:
    """What a version reads from ``export`` that is not as it should be; ``same`` if nothing.

    The model has to be the one that this version reads from the ``base``. The tokenizer has to be that of training,
    ``here``: a base's own may be read otherwise by another version (LlamaTokenizer with ``legacy``, in 5).
    """
    if "error" in export:
        return f"fails: {export['error']}"
    base = here if "error" in base else base  # written by a newer version than this one
    wrong = [key for key in ("dtype", "answer") if export[key] != base[key]]
    if max(abs(one - other) for one, other in zip(export["logits"], base["logits"], strict=True)) > 1e-5:
        wrong.append("logits")
    wrong += [key for key in ("ids", "decoded", "special", "chat") if export[key] != here[key]]
    if export["direct"] != here["ids"]:
        wrong.append("ids of tokenizers")
    return ", ".join(wrong) or "same"


def _call(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "panda-exports-transformers-4.57.6"
    parser.add_argument("--environment", type=Path, default=default, help=f"by default {default}")
    parser.add_argument("--keep", type=Path, help="a new folder for the bases and runs, which are removed otherwise")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="by default all, which records the keys")
    given = parser.parse_args()
    if not (given.environment / "transformers").is_dir():
        _call(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                str(given.environment),
                *OLD,
                *OLD_NEEDS,
            ]
        )
    kinds = given.kinds or list(KINDS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        bases = [make_base(kind, folder / f"base-{number}") for number, kind in enumerate(kinds)]
        exports = [train(kind, base, folder / f"run-{base.name}") for kind, base in zip(kinds, bases, strict=True)]
        print(f"{datetime.now(UTC):%Y-%m-%d}")
        cells: list[list[str]] = [[kind, KINDS[kind][1]] for kind in kinds]
        here: list[dict[str, Any]] = []
        for packages in (None, given.environment):
            versions, of_bases = readings(bases, packages)
            print(versions)
            here = here or of_bases
            of_exports = readings(exports, packages, "--trust_remote_code")[1]
            for number, (base, export) in enumerate(zip(bases, exports, strict=True)):
                if (export / "adapter_config.json").exists():
                    of_exports[number] = readings([export], packages, f"--base={base}")[1][0]
                cells[number].append(differences(of_exports[number], of_bases[number], here[number]))
        record = {kind: keys_of(export) for kind, export in zip(kinds, exports, strict=True)}
    print("\n| kind | tokenizer | here | 4.57.6 |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in cells))
    if any(row[2:] != ["same", "same"] for row in cells):
        raise SystemExit("not all are the same: nothing is recorded")
    if not given.kinds:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
