import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from pipeline import checkpoint


@pytest.fixture
def checkpoints(runs, tmp_path):
    """A copy of a real run's checkpoints, at steps 3 and 6."""
    return shutil.copytree(runs.unbroken / "checkpoints", tmp_path / "checkpoints")


def test_auto_takes_the_newest_whole_one(checkpoints):
    assert checkpoint.find(checkpoints, "auto").step == 6
    assert checkpoint.find(checkpoints, "3").step == 3


@pytest.mark.parametrize("damage", ["cut", "missing", "no record", "broken record"])
def test_a_torn_one_is_named_and_passed_over(checkpoints, damage):
    torn = checkpoints / "step-00000006"
    file = next(torn.glob("*optim_states.pt"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "no record":
        (torn / checkpoint.RECORD).unlink()
    else:
        (torn / checkpoint.RECORD).write_text("{")
    lines = []
    assert checkpoint.find(checkpoints, "auto", log=lines.append).step == 3
    assert len(lines) == 1 and "step-00000006" in lines[0]
    with pytest.raises(UserError, match="cannot resume from step 6"):
        checkpoint.find(checkpoints, "6")


def test_a_flipped_bit_is_found_by_checksum(checkpoints):
    file = next((checkpoints / "step-00000006").glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert checkpoint.why_torn(file.parent) is None
    assert "differs from its checksum" in checkpoint.why_torn(file.parent, checksums=True)


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(checkpoints):
    for record in checkpoints.glob(f"*/{checkpoint.RECORD}"):
        record.unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        checkpoint.find(checkpoints, "auto", log=lambda line: None)


def test_fresh_starts(checkpoints, tmp_path):
    assert checkpoint.find(tmp_path / "nothing", "auto") is None
    assert checkpoint.find(tmp_path / "nothing", "never") is None
    with pytest.raises(UserError, match="would write over it"):
        checkpoint.find(checkpoints, "never")
    with pytest.raises(UserError, match="cannot resume from step 5"):
        checkpoint.find(checkpoints, "5")
    with pytest.raises(UserError, match="auto, never or a step"):
        checkpoint.find(checkpoints, "newest")


def test_foreign_corpus_is_refused(checkpoints):
    record = checkpoint.find(checkpoints, "auto")
    same = dict(recipe=record.recipe, corpus_fingerprint=record.corpus_fingerprint, folder=checkpoints)
    checkpoint.check_belongs(record, **same)
    with pytest.raises(UserError, match="another corpus"):
        checkpoint.check_belongs(record, **{**same, "corpus_fingerprint": "0" * 64})
    with pytest.raises(UserError, match="optimizer.steps: 7 here, 6 there"):
        other = json.loads(json.dumps(record.recipe))
        other["optimizer"]["steps"] = 7
        checkpoint.check_belongs(record, **{**same, "recipe": other})


def test_weights_are_read_whole_without_a_process_group(checkpoints):
    weights = checkpoint.read_weights(checkpoints / "step-00000006")
    assert all(tensor.dtype == torch.float32 and tensor.numel() for tensor in weights.values())
    earlier = checkpoint.read_weights(checkpoints / "step-00000003")
    tail = [name for name in weights if ".layer.2." in name and "attention.self" not in name]
    trained = [name for name in weights if name.endswith("layer.0.attention.self.query.weight")]
    assert tail and all(torch.equal(weights[name], earlier[name]) for name in tail)
    assert trained and not any(torch.equal(weights[name], earlier[name]) for name in trained)
