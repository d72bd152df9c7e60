"""What SGLang makes of exports: its configuration and its loader. Needs an environment with SGLang.

    python bench/read_sglang.py EXPORT ...

As read_vllm.py: nothing is computed, and needs no GPU. A parameter that gets no weights is an error. Imports no panda.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment
from sglang.srt.distributed import initialize_model_parallel
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs
from sglang.srt.server_args import set_global_server_args_for_scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+")
    for number, export in enumerate(parser.parse_args().exports):
        print(json.dumps(read(export, first=number == 0)))


def read(export: str, *, first: bool) -> dict[str, Any]:
    """The class and length that SGLang finds, and how many of its parameters the weights fill."""
    arguments = ServerArgs(model_path=export, device="cpu", dtype="float32")
    set_global_server_args_for_scheduler(arguments)
    config = ModelConfig.from_server_args(arguments)
    if first:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=address, backend="gloo"
        )
        initialize_model_parallel(backend="gloo")
    found, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
    weights = {name: each for file in Path(export).glob("*.safetensors") for name, each in load_file(file).items()}
    parameters = _loaded(found, config, weights)
    empty = [name for name, each in parameters.items() if bool(each.isnan().any())]
    assert not empty, f"{export}: no weights for {empty[:5]}"
    sums = [_sum(parameters), _sum(weights)]
    return {
        "export": export,
        "architecture": found.__name__,
        "positions": config.context_len,
        "parameters": len(parameters),
        "tensors": len(weights),
        "same_sum": abs(sums[0] - sums[1]) <= 1e-6 * sums[1],
    }


def _loaded(found: Any, config: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a model of the class ``found`` that has loaded ``weights``."""
    ranks: dict[str, int] = {}
    while True:
        try:
            with get_parallel().override(**ranks):
                model = found(config=config.hf_config, quant_config=None)
                parameters = dict(model.named_parameters())
                for parameter in parameters.values():
                    parameter.data.fill_(torch.nan)
                model.load_weights(iter(weights.items()))
                return parameters
        except RuntimeError as problem:
            # SGLang 0.5.23 lets its scheduler say which rank of each group this process is; here there is one.
            asked = re.search(r"parallel name '(\w+)' has not been written", str(problem))
            if asked is None or asked[1] in ranks:
                raise
            ranks[asked[1]] = 0


def _sum(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(each.detach().double().abs().sum()) for each in tensors.values())


if __name__ == "__main__":
    main()
