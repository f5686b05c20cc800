"""ZeRO stages and numbers of ranks: the same curve on each, and from one to another in the middle of a run."""

import json
import shutil

import pytest
import torch

from data_prep import durable
from pipeline.checkpoint import find, read_weights
from pipeline.elastic import UNIVERSAL, convert
from pipeline.monitor import read_metrics

NO_DROPOUT = "student.dropout=0.0"  # its masks belong to a rank, so another number of ranks draws others


def ds_config(folder, stage):
    path = folder / f"stage{stage}.json"
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    durable.write(path, json.dumps(config))
    return f"--ds-config={path}"


def losses(folder):
    return {record["step"]: record["loss"] for record in read_metrics(folder, "train")}


@pytest.fixture(scope="module")
def unbroken(distill, tmp_path_factory):
    """Six steps at stage 1 on two ranks, without dropout."""
    folder = tmp_path_factory.mktemp("unbroken")
    distill(folder / "run", ds_config(folder, 1), NO_DROPOUT)
    return folder / "run"


def test_conversion_is_done_once_and_leaves_the_checkpoint_whole(unbroken, tmp_path):
    folder = shutil.copytree(unbroken / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    universal = convert(folder)
    moments = torch.load(next(universal.rglob("exp_avg_sq.pt")), weights_only=True)["param"]
    assert universal.name == UNIVERSAL and moments.min() >= 0 and moments.any()
    before = universal.stat().st_mtime_ns
    assert convert(folder) == universal and universal.stat().st_mtime_ns == before
    assert find(folder.parent, "auto").step == 3 and not list(folder.glob(".universal-*"))


def test_from_two_ranks_to_one(unbroken, distill, tmp_path):
    run = tmp_path / "run"
    distill(run, ds_config(tmp_path, 1), NO_DROPOUT, "--stop-at=3")
    distill(run, ds_config(tmp_path, 1), NO_DROPOUT, ranks=1)
    _same_curve(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ((0, 2), [(1, 1)]),
        ((1, 2), [(0, 2), (1, 4), (2, 1), (3, 2)]),
        ((2, 1), [(1, 2)]),
        ((3, 2), [(1, 2), (3, 1), (3, 4)]),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_from_any_stage_and_ranks_to_others(source, targets, unbroken, distill, tmp_path):
    """(stage, ranks) -> (stage, ranks)."""
    start = tmp_path / "start"
    distill(start, ds_config(tmp_path, source[0]), NO_DROPOUT, "--stop-at=3", ranks=source[1])
    for stage, ranks in targets:
        run = shutil.copytree(start, tmp_path / f"to-{stage}-{ranks}")
        distill(run, ds_config(tmp_path, stage), NO_DROPOUT, ranks=ranks)
        _same_curve(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_follows_the_same_curve(ranks, distill, tmp_path):
    """Twenty steps in fp32, micro-batches of two: within 1e-5 of stage 0."""
    arguments = ["optimizer.steps=20", "checkpoint.every_steps=20", NO_DROPOUT]
    curves = {}
    for stage in (0, 1, 2, 3):
        distill(tmp_path / f"stage{stage}", ds_config(tmp_path, stage), *arguments, ranks=ranks)
        curves[stage] = losses(tmp_path / f"stage{stage}")
    assert len(curves[0]) == 20
    for stage in (1, 2, 3):
        assert curves[stage] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 2), ("bf16", 3)])
def test_resuming_is_bit_exact_on_other_stages_too(stage, precision, distill, tmp_path):
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    durable.write(tmp_path / "ds.json", json.dumps(config))
    arguments = [f"--ds-config={tmp_path / 'ds.json'}"]
    distill(tmp_path / "unbroken", *arguments)
    distill(tmp_path / "resumed", *arguments, "--stop-at=3")
    distill(tmp_path / "resumed", *arguments)
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "resumed")
    ours, theirs = (read_weights(tmp_path / name / "checkpoints" / "step-00000006") for name in ("unbroken", "resumed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _same_curve(run, unbroken):
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)
    ours, theirs = (read_weights(folder / "checkpoints" / "step-00000006") for folder in (run, unbroken))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_number(distill, tmp_path):
    for name, extra in (("kept", {}), ("again", {"activation_checkpointing": {}})):
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, **extra}
        durable.write(tmp_path / f"{name}.json", json.dumps(config))
        distill(tmp_path / name, f"--ds-config={tmp_path / name}.json", NO_DROPOUT, ranks=1)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)
