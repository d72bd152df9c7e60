"""What one version of transformers reads from folders: JSON, one line each. Imports no panda; see exports.py.

    python bench/read_export.py FOLDER ... [--base BASE] [--trust_remote_code]

With --base the folders hold adapters, which peft puts on BASE. --trust_remote_code is passed on, as set-ups for
serving and evaluation do for any model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

TEXTS = (
    "Hello world, 12345  +  6 = ?",
    " leading and trailing \n\n",
    "Grüße, 世界! 👋🏽 naïve\u00a0x\tù",
    "a<|end|> b <|end|>\nc</s> <s>d",
    "def f(x):\n    return x  # it's we'll",
)
CHAT = [{"role": "user", "content": "Say ù 👋 twice."}, {"role": "assistant", "content": " ok\n"}]


def read(folder: str, base: str | None, trust: bool) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(base or folder, trust_remote_code=trust, dtype="auto")
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    direct = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = torch.arange(1, 201)[None] % model.config.vocab_size
    # With all inputs that the tokenizer makes, but for the same ids in every version.
    asked = {key: value[:, :8] for key, value in tokenizer(TEXTS[0], return_tensors="pt").items()}
    asked["input_ids"] = ids[:, :8]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
        answer = model.generate(**asked, max_new_tokens=4, do_sample=False)[0]
    turns = tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None
    return {
        "logits": logits.tolist(),
        "dtype": str(model.dtype),
        "answer": answer.tolist(),
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "direct": [direct.encode(text).ids for text in TEXTS],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side],
        "chat": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--base")
    parser.add_argument("--trust_remote_code", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "peft")}
    print(json.dumps(versions))
    for folder in given.folders:
        try:
            print(json.dumps(read(folder, given.base, given.trust_remote_code)))
        except Exception as problem:  # what a reader of this folder would see
            print(json.dumps({"error": f"{type(problem).__name__}: {problem}"[:200]}))


if __name__ == "__main__":
    main()
