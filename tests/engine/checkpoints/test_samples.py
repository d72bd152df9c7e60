"""Checkpoints that earlier versions wrote are read: the bits of the weights, the optimizer, and what comes next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from written_sample import AGREEMENT
from written_sample import PROGRESS
from written_sample import an_engine
from written_sample import losses

from panda.engine.checkpoints.folders import MANIFEST
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import read_progress
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.processes import Processes
from panda.registry import UserError

SAMPLES = Path(__file__).with_name("samples")
NEXT = [1.7034571170806885, 1.4970310926437378, 1.5313291549682617]
"""The losses that followed in the process that wrote the sample."""


@pytest.fixture(params=[1, 2])
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The sample of format 2, and the same in format 1, of before 0.1.0: with sizes, and without sha256."""
    folder = shutil.copytree(SAMPLES / "step-00000002", tmp_path / "step-00000002")
    if request.param == 1:
        stated = json.loads((folder / MANIFEST).read_text())
        del stated["sha256"], stated["passing"], stated["progress"]["evaluation_due"]
        stated["progress"]["supervised_tokens"] = stated["progress"].pop("units")
        files = {name: written["size"] for name, written in stated["files"].items()}
        (folder / MANIFEST).write_text(json.dumps(stated | {"format": 1, "files": files}, indent=2) + "\n")
    return folder


def test_a_sample_goes_on_as_it_did(processes: Processes, sample: Path) -> None:
    assert find_checkpoint(sample.parent) == sample
    assert read_progress(sample, AGREEMENT) == PROGRESS
    engine = an_engine(processes)
    assert load_checkpoint(engine, sample), "bit for bit"
    assert losses(engine, 3) == pytest.approx(NEXT, rel=1e-5)


def test_a_sample_goes_on_in_another_stage(processes: Processes, sample: Path) -> None:
    engine = an_engine(processes, zero_stage=0)
    assert not load_checkpoint(engine, sample)
    for name, stored in checkpoint_weights(sample).items():
        assert (stored.read() == engine.module.state_dict()[name]).all()
    moments = [state["exp_avg"].abs().sum().item() for state in engine.own_optimizer.state.values()]
    assert len(moments) == 4 and all(moment > 0 for moment in moments)


def test_damage_of_a_sample_is_found(processes: Processes, sample: Path) -> None:
    file = sample / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[content.index(checkpoint_weights(sample)["0.weight"].read().numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert damage(sample) is None, "sizes do not tell"
    with pytest.raises(UserError, match=r"checkpoint is damaged: mp_rank_00_model_states.pt has another content"):
        load_checkpoint(an_engine(processes), sample)
