"""The loss without logits: value and gradient are those of the loss with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from launching import TESTS
from launching import run_script
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.files.compilers import can_compile
from panda.models.forward import cross_entropy
from panda.models.forward.cross_entropy import linear_cross_entropy
from panda.models.forward.cross_entropy import offer_loss_sum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TOKENS, WIDTH, VOCABULARY = 37, 24, 101


def with_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The reference: all logits at once, and torch's own loss."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def loss_and_gradients(
    loss: Callable[..., torch.Tensor], dtype: torch.dtype, device: str, scale: float = 0.25
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator).to(device)
    # Rounded to bf16 first: every dtype is given the same numbers.
    inputs = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in (hidden, weight)]
    value = loss(*inputs, labels)
    (value * scale).backward()
    return value.detach(), *(tensor.grad for tensor in inputs)  # type: ignore[return-value]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 5 * VOCABULARY, 2**26])
def test_value_and_gradient_in_float32_are_those_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, device: str, at_once: int
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", at_once)
    reference = loss_and_gradients(with_logits, torch.float64, device)
    for found, expected in zip(loss_and_gradients(linear_cross_entropy, torch.float32, device), reference, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [5 * VOCABULARY, 2**26])
def test_bf16_is_as_near_the_truth_as_full_logits_in_bf16(
    monkeypatch: pytest.MonkeyPatch, device: str, at_once: int
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", at_once)
    truth = loss_and_gradients(with_logits, torch.float64, device)
    plain = loss_and_gradients(with_logits, torch.bfloat16, device)
    found = loss_and_gradients(linear_cross_entropy, torch.bfloat16, device)
    # The same bf16 logits, so the same value.
    assert found[0].dtype == torch.float32
    assert abs(found[0] - plain[0]) <= 1e-6 * plain[0]
    for mine, theirs, exact in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_a_machine_that_cannot_compile_does_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, here the CPU, whose machine has Triton and no compiler."""
    expected = loss_and_gradients(linear_cross_entropy, torch.bfloat16, "cpu")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    can_compile.cache_clear()
    found = loss_and_gradients(linear_cross_entropy, torch.bfloat16, "cpu")
    can_compile.cache_clear()
    assert all(map(torch.equal, found, expected))


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 5))
    labels = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda *inputs: linear_cross_entropy(*inputs, labels), (hidden, weight))


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    loss = linear_cross_entropy(hidden, weight, labels)
    (expected,) = torch.autograd.grad(with_logits(hidden, weight, labels), hidden)
    (found,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(found, expected, atol=1e-5)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).grad_fn is None


def tiny_llama(*, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **shape))
    return model.to(dtype)


def rows_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(VOCABULARY, (3, 11), generator=generator)
    labels = input_ids.clone()
    labels[0, :9] = labels[1, ::2] = labels[2] = -100  # the last row teaches nothing
    return input_ids, labels


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_a_model_gives_the_loss_and_gradients_that_its_logits_give(tied: bool, counted: bool) -> None:
    input_ids, labels = rows_and_labels()
    plain = tiny_llama(tied=tied, dtype=torch.float64)
    logits = plain(input_ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    model = tiny_llama(tied=tied)
    offer_loss_sum(model)
    count = int((labels[:, 1:] != -100).sum())
    loss = model(input_ids, labels=labels, supervised_tokens=count if counted else None)
    loss.backward()
    assert abs(loss - expected) <= 1e-6 * expected
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 2e-6 * theirs.grad.abs().max(), name


def test_positions_and_the_plain_forward_are_as_they_were() -> None:
    input_ids, labels = rows_and_labels()
    model, plain = tiny_llama(tied=False), tiny_llama(tied=False)
    offer_loss_sum(model)
    positions = torch.arange(11).remainder(6).expand(3, -1)  # two documents a row
    assert torch.equal(model(input_ids).logits, plain(input_ids).logits)
    expected = F.cross_entropy(
        plain(input_ids, position_ids=positions).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    found = model(input_ids, position_ids=positions, labels=labels)
    assert abs(found - expected) < 1e-5
    assert abs(model(input_ids, labels=labels) - expected) > 1e-4  # positions matter


def test_labels_that_all_count_for_nothing_give_zero_and_gradients_of_zero() -> None:
    model = tiny_llama(tied=False)
    offer_loss_sum(model)
    input_ids, labels = rows_and_labels()
    loss = model(input_ids, labels=torch.full_like(labels, -100), supervised_tokens=0)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_a_head_that_is_no_plain_linear_layer_is_asked_for_its_logits() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    input_ids, labels = rows_and_labels()
    model = tiny_llama(tied=False)
    offer_loss_sum(model)
    model.lm_head.__class__ = Doubled
    expected = F.cross_entropy(model(input_ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert abs(model(input_ids, labels=labels) - expected) < 1e-5


class _LargestLogits(TorchDispatchMode):
    """Rows of the tallest tensor that is as wide as the vocabulary, but for the head's weight, transposed."""

    rows, width = 0, 32

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.ndim >= 2 and result.shape[-1] == VOCABULARY:
            rows = result.shape[:-1].numel()
            self.rows = max(self.rows, 0 if rows == self.width else rows)
        return result


def test_logits_are_made_for_supervised_tokens_alone_and_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    input_ids, labels = rows_and_labels()
    model = tiny_llama(tied=False)
    offer_loss_sum(model)
    for at_once, expected in ((2**26, int((labels[:, 1:] != -100).sum())), (3 * VOCABULARY, 3)):
        monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", at_once)
        with _LargestLogits() as largest:
            model(input_ids, labels=labels).backward()
        assert largest.rows == expected
    with _LargestLogits() as largest:
        model(input_ids)
    assert largest.rows == input_ids.numel()


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Losses and weights of steps on two ranks under ZeRO-3, and of the same in one process with full logits."""
    folder = tmp_path_factory.mktemp("zero3")
    for ranks in (1, 2):
        run_script(TESTS / "models/forward/train_with_loss_sum.py", folder / f"{ranks}.json", ranks=ranks, cwd=folder)
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in ("1", "2")}


@pytest.mark.parametrize("case", ["tied", "untied", "tied adapters", "untied adapters"])
def test_under_zero_3_a_partitioned_head_learns_what_full_logits_teach_it(
    zero3: dict[str, dict[str, Any]], case: str
) -> None:
    expected, found = zero3["1"][case], zero3["2"][case]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["losses"][-1] < 0.98 * found["losses"][0]
    for name, weight in expected["weights"].items():
        difference = torch.tensor(found["weights"][name]) - torch.tensor(weight)
        assert difference.abs().max() < 1e-6, name
