"""Every token of an answer makes rows of a new length: nothing is prepared for one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.answers.generation import continuation
from panda.answers.generation import greedy
from panda.answers.generation import lengths_vary
from panda.answers.sampling import Manner
from panda.answers.sampling import sampled
from panda.cli.main import main
from panda.run import ending

CPU = torch.device("cpu")
ATTENTION = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of attention, whether it may be one of cuDNN, which plans for its length."""
    seen: list[bool] = []

    def attention(*given: Any, **named: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return ATTENTION(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return seen


def by_greedy(model: Any) -> None:
    greedy(model, [[5, 6]], max_new_tokens=3, pad_token_id=0, end_tokens=[], device=CPU)


def by_continuation(model: Any) -> None:
    list(continuation(model, [5, 6], max_new_tokens=3, end_tokens=[], temperature=0, top_p=1, device=CPU))


def by_sampling(model: Any) -> None:
    sampled(model, [[5, 6]], np.zeros((1, 3)), Manner(3), end_tokens=[], pad_token_id=0, device=CPU)


def by_sampling_of_any_model(model: Any) -> None:
    plain = torch.nn.Module()
    plain.forward = lambda rows, **_: model(rows)  # type: ignore[method-assign]
    by_sampling(plain)


@pytest.mark.parametrize("write", [by_greedy, by_continuation, by_sampling, by_sampling_of_any_model])
def test_answers_are_written_by_kernels_that_take_any_length(planned: list[bool], write: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model: Any = llama().eval()
    write(model)
    assert len(planned) >= 3 and not any(planned)
    model(torch.tensor([[5, 6]]))
    assert planned[-1], "everything else has all kernels"


@pytest.mark.parametrize("before", [True, False])
def test_afterwards_the_kernels_are_those_of_before(before: bool) -> None:
    torch.backends.cuda.enable_cudnn_sdp(before)  # type: ignore[no-untyped-call]
    try:
        with pytest.raises(RuntimeError, match="out of memory"), lengths_vary():
            raise RuntimeError("out of memory")
        assert torch.backends.cuda.cudnn_sdp_enabled() is before  # type: ignore[no-untyped-call]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)  # type: ignore[no-untyped-call]


def test_panda_generate_writes_by_such_kernels(planned: list[bool], tmp_path: Path) -> None:
    save_hf(llama(), tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a", "--max_new_tokens", "3"]) == 0
    assert len(planned) >= 3 and not any(planned)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_answers_at_the_end_of_a_run_compile_nothing(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model: Any = llama().eval()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True) if compiled else model.forward
    options = SimpleNamespace(prompts=["a"], max_seq_length=16, per_gpu_eval_batch_size=1, compiled=compiled)
    made = SimpleNamespace(ends=[], processors=None, criteria=lambda tokenizer, timed: [])
    run: Any = SimpleNamespace(
        options=options,
        decoding=made,
        answers=[],
        directory=tmp_path,
        engine=SimpleNamespace(evaluating=lambda: model),
        processes=SimpleNamespace(rank=0, device=CPU),
        resolved=SimpleNamespace(components={"task": SimpleNamespace(attributed=lambda part: torch.no_grad())}),
        task=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
    )
    monkeypatch.setattr(ending, "_encoded", lambda run, prompts, most: (prompts, [[5, 6]]))
    monkeypatch.setattr(ending, "decoded", lambda tokenizer, ids: str(len(ids)))
    ending._answer(run)
    assert run.answers == [{"prompt": "a", "answer": "14"}] and not graphs
