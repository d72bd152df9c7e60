"""``check_model`` accepts models that keep the promises, and rejects each of those that break one."""

from __future__ import annotations

import pytest
from distributions import Distributions
from launching import EVERY_WAY

from panda.testing import check_model

TOY = '''
from panda import Meta, NoOptions, UserError, register_model

@dataclass(frozen=True)
class ToyOptions:
    """Options of the toy."""

    defect: str = ""
    """What is wrong with it."""


@register_model("toy", options=ToyOptions)
def build_toy(options, context):
    """A mean of what came before."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    defect = options.defect
    rows = 259 if defect == "fixed vocabulary" else context.vocab_size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, hidden, position_ids=None):
            length = hidden.shape[1]
            seen = torch.ones(length, length).tril()
            if defect == "looks ahead":
                seen = torch.ones(length, length)
            if defect == "does not see":
                seen = torch.ones(length, length).tril() * (torch.arange(length) != 3)
            seen = seen.expand(len(hidden), length, length)
            if position_ids is not None and defect != "leaks in a row":
                sample = (position_ids == 0).cumsum(-1)
                seen = seen * (sample[:, :, None] == sample[:, None])
            if defect == "length matters":
                mixed = seen @ hidden / length
            else:
                mixed = seen @ hidden / seen.sum(-1, keepdim=True).clamp(min=1)
            if defect == "rows see each other":
                mixed = mixed + mixed.mean(0)
            inner = F.linear(mixed, self.inner.weight, self.inner.bias) if defect == "reads weights" else (
                self.inner(mixed))
            wide = torch.tanh(inner)
            if defect == "draws always":
                wide = F.dropout(wide, 0.1, training=True)
            return hidden * (defect != "does not see") + self.outer(wide)

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(rows, 16)
            self.layers = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(16, rows, bias=False)
            if defect == "unused":
                self.spare = nn.Linear(16, 16)
            if defect == "not in the export":
                self.scale = torch.rand(16)
            if defect == "needs values":
                self.head.weight.sum().item()

        def forward(self, input_ids, position_ids=None):
            if defect == "shifted":
                input_ids = input_ids.roll(1, dims=1)
            if defect == "changes weights":
                with torch.no_grad():
                    self.layers[0].inner.weight.clamp_(-0.02, 0.02)
            hidden = self.embedding(input_ids)
            if defect == "not in the export":
                hidden = hidden * self.scale
            for layer in self.layers:
                hidden = layer(hidden, position_ids)
            if defect == "detached":
                hidden = hidden.detach()
            logits = self.head(hidden)
            if defect == "last only":
                return logits[:, -1]
            return logits / 0 if defect == "not finite" else logits

    if defect == "raises":
        raise RuntimeError("out of luck")
    return Toy()
'''

DEFECTS = {
    "raises": "it is built: RuntimeError: out of luck",
    "last only": r"logits: \[2, 259\] for tokens",
    "not finite": "logits: .* some not finite",
    "fixed vocabulary": "vocabulary: (259 logits for|the last of) .*519 entries",
    "looks ahead": "causality: logits move by",
    "shifted": "causality: logits move by",
    "does not see": r"attention: changing the token at \[3\] changes no logits",
    "rows see each other": "rows: logits of a row move",
    "length matters": "padding: logits of a sample move",
    "leaks in a row": "packing: logits of a sample move",
    "draws always": "repetition: logits of the same tokens",
    "unused": "gradients: no gradient in spare.weight, spare.bias",
    "detached": "gradients: no gradient in embedding.weight",
    "changes weights": "ZeRO-3: 3 losses, apart by",
    "not in the export": "export and back: 1 loss, apart by",
    "reads weights": "adapters: adapters on 4 layers, of which 2 did not move",
}
"""What is wrong with the toy, and what is said of it."""


@pytest.fixture
def toy(distributions: Distributions) -> Distributions:
    distributions.install("acme-toys", {"models": {"toy": "acme_toys.toy"}}, {"acme_toys.toy": TOY})
    return distributions


def test_a_model_that_keeps_all_promises(toy: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    check_model("toy", lora_target_modules=["inner", "outer"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "check_model toy: model toy of acme-toys 1.0 (entry point panda.models: toy = acme_toys.toy)"
    kept = [line.split()[1] for line in lines[1:] if line.startswith("  ok ")]
    assert len(kept) == len(lines) - 1 == 13, "and no notes"


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_model_that_breaks_a_promise(toy: Distributions, defect: str) -> None:
    with pytest.raises(AssertionError, match=f"- {DEFECTS[defect]}") as caught:
        check_model("toy", defect=defect, lora_target_modules=["inner", "outer"])
    assert str(caught.value).startswith("check_model toy: model toy of acme-toys 1.0")


def test_what_does_not_apply_is_a_note(toy: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    check_model("toy", defect="needs values")
    assert "note    export and back: the factory fails under `torch.device('meta')`" in capsys.readouterr().out
    check_model("toy")
    assert "note    adapters: `use_lora` is refused: use_lora: it is not known which linear" in capsys.readouterr().out


@pytest.mark.skipif(not EVERY_WAY, reason="the tutorial's test checks a model, too")
def test_pandas_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    check_model("llama-tiny", num_layers=2, hidden_size=32)
    assert "\n  note " not in capsys.readouterr().out
