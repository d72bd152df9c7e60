"""Compares a GGUF file with the export that it was made of: tokens, logits and an answer.

    python bench/read_gguf.py EXPORT FILE.gguf [--prompt TEXT] [--python PYTHON]

PYTHON is one of an environment with llama-cpp-python, which need not have panda. Weights in f32 show what the file
says; others are also rounded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

READER = """
import json, sys
from llama_cpp import Llama
file, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = Llama(file, logits_all=True, verbose=False, n_ctx=len(ids) + 64)
tokens = model.tokenize(text.encode(), add_bos=False, special=True)
model.eval(ids)
logits = [[float(value) for value in row] for row in model.scores[: len(ids)]]
answer = model.create_completion(tokens, temperature=0, max_tokens=32)["choices"][0]["text"]
print(json.dumps({"tokens": tokens, "logits": logits, "answer": answer}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("file")
    parser.add_argument("--prompt", default="When is the hide open?")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.export)
    model = AutoModelForCausalLM.from_pretrained(arguments.export, dtype=torch.float32).eval()
    asked = [{"role": "user", "content": arguments.prompt}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        answered = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=32)[0][len(ids) :]
    command = [arguments.python, "-c", READER, arguments.file, text, json.dumps(ids)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    other = torch.tensor(found["logits"])
    print(f"tokens      {'the same' if found['tokens'] == ids else 'others'}, {len(ids)}")
    print(f"logits      differ by {float((other - logits).abs().max()):.3g} of {float(logits.abs().max()):.3g}")
    print(f"likeliest   {'the same' if torch.equal(other.argmax(-1), logits.argmax(-1)) else 'others'} at each place")
    print(f"answers     {tokenizer.decode(answered, skip_special_tokens=True)!r}, {found['answer']!r}")


if __name__ == "__main__":
    main()
