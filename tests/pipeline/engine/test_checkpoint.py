import io
import json
import shutil

import pytest
import torch

from data_prep import durable
from data_prep.errors import UserError
from pipeline.engine import checkpoint, records, zero_files


@pytest.fixture
def checkpoints(runs, tmp_path):
    """A copy of a real run's checkpoints, at steps 3 and 6."""
    return shutil.copytree(runs.unbroken / "checkpoints", tmp_path / "checkpoints")


def test_auto_takes_the_newest_whole_one(checkpoints):
    assert records.find(checkpoints, "auto").step == 6
    assert records.find(checkpoints, "3").step == 3


@pytest.mark.parametrize("damage", ["cut", "missing", "no record", "broken record"])
def test_a_torn_one_is_named_and_passed_over(checkpoints, damage):
    torn = checkpoints / "step-00000006"
    file = next(torn.glob("*optim_states.pt"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "no record":
        (torn / records.RECORD).unlink()
    else:
        (torn / records.RECORD).write_text("{")
    lines = []
    assert records.find(checkpoints, "auto", log=lines.append).step == 3
    assert len(lines) == 1 and "step-00000006" in lines[0]
    with pytest.raises(UserError, match="step 6 cannot be used"):
        records.find(checkpoints, "6")


def test_a_flipped_bit_is_found_by_checksum(checkpoints):
    file = next((checkpoints / "step-00000006").glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert records.why_torn(file.parent) is None
    assert "differs from its checksum" in records.why_torn(file.parent, checksums=True)
    with pytest.raises(UserError, match="is damaged: .*optim_states.pt differs from its checksum"):
        checkpoint.read_weights(file.parent)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_resumed_from(runs, distill, tmp_path):
    """40,000 wrong bytes in the optimizer's state of rank 1: no rank trains on them, and the reason is said."""
    run = shutil.copytree(runs.resumed, tmp_path / "run")
    file = next((run / "checkpoints" / "step-00000003").glob("zero_pp_rank_1*optim_states.pt"))
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 40_000)
    data[middle] = bytes(byte ^ 255 for byte in data[middle])
    file.write_bytes(data)
    process = distill(run, "--resume=3", expect=2)
    assert f"{file.name} differs from its checksum" in process.stderr and "rank 1" in process.stderr
    assert "Traceback" not in process.stderr
    assert records.find(run / "checkpoints", "auto").step == 6  # nothing was set aside


class Stranger:
    """What an attacker pickles: loading it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_a_strangers_pickle_is_refused_and_not_run(kind, checkpoints, tmp_path):
    folder = checkpoints / "step-00000006"
    for file in folder.glob(f"*{kind}.pt"):
        file.write_bytes(pickle_in_torchs_way({"module": {}, "optimizer_state_dict": Stranger(tmp_path / "ran")}))
    record = json.loads((folder / records.RECORD).read_text())
    for name, facts in record["files"].items():  # as an attacker would, with checksums that are right
        facts |= {"bytes": (folder / name).stat().st_size, "sha256": durable.sha256(folder / name)}
    (folder / records.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoint.read_weights(folder)
    assert not (tmp_path / "ran").exists()


def pickle_in_torchs_way(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [b"", b"not a file of torch", bytes(1000)])
def test_damaged_files_are_named(damage, checkpoints):
    folder = checkpoints / "step-00000006"
    next(folder.glob("*model_states.pt")).write_bytes(damage)
    with pytest.raises(UserError, match="model_states.pt cannot be read as a checkpoint"):
        zero_files.read(folder, zero_stage=1)


def test_files_of_ranks_that_do_not_add_up_are_refused(checkpoints):
    folder = checkpoints / "step-00000006"
    sorted(folder.glob("*optim_states.pt"))[1].unlink()
    with pytest.raises(UserError, match="do not fit together"):
        zero_files.read(folder, zero_stage=1)


def test_torn_ones_go_when_a_newer_one_is_whole(checkpoints):
    torn = checkpoints / "step-00000004"
    shutil.copytree(checkpoints / "step-00000003", torn)
    (torn / records.RECORD).unlink()
    later = shutil.copytree(torn, checkpoints / "step-00000009")
    checkpoint.remove_old(checkpoints, keep_last=1, keep_every_steps=3)
    assert not torn.exists() and later.exists()
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == [f"step-0000000{step}" for step in (3, 6, 9)]


def test_a_file_that_rank_0_does_not_see_is_no_part_of_a_whole_checkpoint(checkpoints):
    folder = checkpoints / "step-00000006"
    files = records.read_record(folder).files
    records.check_all_seen(folder, files)
    next(folder.glob("zero_pp_rank_1*")).rename(checkpoints / "elsewhere")
    with pytest.raises(UserError, match="zero_pp_rank_1.* is missing. run.output must be one folder"):
        records.check_all_seen(folder, files)


def test_no_program_is_left_beside_the_checkpoints(checkpoints):
    assert not list(checkpoints.rglob("*.py"))


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(checkpoints):
    for record in checkpoints.glob(f"*/{records.RECORD}"):
        record.unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        records.find(checkpoints, "auto", log=lambda line: None)


def test_fresh_starts(checkpoints, tmp_path):
    assert records.find(tmp_path / "nothing", "auto") is None
    assert records.find(tmp_path / "nothing", "never") is None
    with pytest.raises(UserError, match="would write over it"):
        records.find(checkpoints, "never")
    with pytest.raises(UserError, match="step 5 cannot be used"):
        records.find(checkpoints, "5")
    with pytest.raises(UserError, match="auto, never or a step"):
        records.find(checkpoints, "newest")


def test_foreign_corpus_is_refused(checkpoints):
    record = records.find(checkpoints, "auto")
    same = dict(recipe=record.recipe, corpus_fingerprint=record.corpus_fingerprint, folder=checkpoints)
    same |= dict(teacher_fingerprint=record.teacher_fingerprint)
    records.check_belongs(record, **same)
    with pytest.raises(UserError, match="another corpus"):
        records.check_belongs(record, **{**same, "corpus_fingerprint": "0" * 64})
    with pytest.raises(UserError, match="learned from another teacher"):
        records.check_belongs(record, **{**same, "teacher_fingerprint": "0" * 64})
    with pytest.raises(UserError, match="optimizer.steps: 7 here, 6 there"):
        other = json.loads(json.dumps(record.recipe))
        other["optimizer"]["steps"] = 7
        records.check_belongs(record, **{**same, "recipe": other})


def test_weights_are_read_whole_without_a_process_group(checkpoints):
    weights = checkpoint.read_weights(checkpoints / "step-00000006")
    assert all(tensor.dtype == torch.float32 and tensor.numel() for tensor in weights.values())
    earlier = checkpoint.read_weights(checkpoints / "step-00000003")
    tail = [name for name in weights if ".layer.2." in name and "attention.self" not in name]
    trained = [name for name in weights if name.endswith("layer.0.attention.self.query.weight")]
    assert tail and all(torch.equal(weights[name], earlier[name]) for name in tail)
    assert trained and not any(torch.equal(weights[name], earlier[name]) for name in trained)
