"""What vLLM makes of folders: its configuration, its loader, its reading of adapters. Needs an environment with vLLM.

    python bench/read_vllm.py EXPORT ... [--adapters ADAPTERS ...]

Needs no GPU, since nothing is computed: a model is built by vLLM's classes on the CPU, and its `load_weights` gets the
tensors of the export. Prints a line of JSON for each folder. A parameter that gets no weights is an error;
`same_sum` says whether the sum of all magnitudes is that of the export. Imports no panda.
"""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import torch
import vllm.model_executor.models.registry as registry
import vllm.platforms
from safetensors.torch import load_file
from vllm.config import DeviceConfig
from vllm.config import VllmConfig
from vllm.config import set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment
from vllm.distributed import initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms.cpu import CpuPlatform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--adapters", nargs="*", default=[])
    arguments = parser.parse_args()
    # vLLM 0.33 for CUDA knows no platform on a machine without a GPU; and it looks at a class in a process of its own.
    vllm.platforms._current_platform = vllm.platforms.current_platform = CpuPlatform()
    registry._run_in_subprocess = lambda inspect: inspect()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    for number, export in enumerate(arguments.exports):
        print(json.dumps(read(export, address, first=number == 0)))
    for adapters in arguments.adapters:
        print(json.dumps(read_adapters(Path(adapters))))


def read(export: str, address: str, *, first: bool) -> dict[str, Any]:
    """The architecture and length that vLLM finds, and how many of its parameters the weights fill."""
    config = EngineArgs(model=export, dtype="float32", enforce_eager=True).create_model_config()
    whole = VllmConfig(model_config=config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(whole):
        if first:
            init_distributed_environment(1, 0, address, 0, "gloo")
            initialize_model_parallel(1, 1)
        model = initialize_model(whole)
        weights = {name: each for file in Path(export).glob("*.safetensors") for name, each in load_file(file).items()}
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.load_weights(iter(weights.items()))
    parameters = dict(model.named_parameters())
    empty = [name for name, each in parameters.items() if bool(each.isnan().any())]
    sums = [
        sum(float(each.detach().double().abs().sum()) for each in these.values()) for these in (parameters, weights)
    ]
    assert not empty, f"{export}: no weights for {empty[:5]}"
    sums = [_sum(parameters), _sum(weights)]  # a vocabulary may be filled up with zeros, so tensors are not compared
    return {
        "export": export,
        "architecture": config.architecture,
        "positions": config.max_model_len,
        "parameters": len(parameters),
        "tensors": len(weights),
        "same_sum": abs(sums[0] - sums[1]) <= 1e-6 * sums[1],
    }


def _sum(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(each.detach().double().abs().sum()) for each in tensors.values())


def read_adapters(folder: Path) -> dict[str, Any]:
    """What vLLM reads of adapters, and the layers that their tensors are for. Raises where it would not take them."""
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=256))
    names = load_file(folder / "adapter_model.safetensors")
    layers = {parse_fine_tuned_lora_name(name)[0] for name in names}
    return {"adapters": str(folder), "r": helper.r, "lora_alpha": helper.lora_alpha, "layers": len(layers)}


if __name__ == "__main__":
    main()
