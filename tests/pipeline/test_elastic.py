"""ZeRO stages and numbers of ranks: the same curve on each, and from one to another in the middle of a run."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from data_prep import durable
from pipeline import report
from pipeline.checkpoint import find, read_weights
from pipeline.elastic import UNIVERSAL, convert
from pipeline.export import export, load_exported
from pipeline.monitor import read_metrics
from pipeline.run_folder import FinishedRun

NO_DROPOUT = "student.dropout=0.0"  # its masks belong to a rank, so another number of ranks draws others


def ds_config(folder, stage, offload=None, **sections):
    """`offload`: what is not kept on the device, "optimizer" or "param", and where."""
    path = folder / f"stage{stage}.json"
    zero = {"stage": stage, **{f"offload_{what}": where for what, where in (offload or {}).items()}}
    durable.write(path, json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, **sections}))
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
    _can_be_inspected_and_exported(start)
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
@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16", 2)],
)
def test_resuming_is_bit_exact_on_other_stages_too(stage, precision, distill, tmp_path):
    sections = {precision: {"enabled": True}} if precision != "fp32" else {}
    if precision == "bf16" and stage:
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":  # a loss scale so large that steps before and after the stop are skipped
        sections["fp16"] |= {"initial_scale_power": 26, "hysteresis": 1}
    arguments = [ds_config(tmp_path, stage, **sections)]
    distill(tmp_path / "unbroken", *arguments)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    process = distill(tmp_path / "resumed", *arguments, "--resume=3")
    assert "resumed from step 3" in process.stdout
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "resumed")
    skipped = [record["step"] for record in read_metrics(tmp_path / "resumed", "skipped")]
    assert bool(skipped) == (precision == "fp16") and len(skipped) < 5
    ours, theirs = (read_weights(tmp_path / name / "checkpoints" / "step-00000006") for name in ("unbroken", "resumed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_state_in_host_memory_can_be_moved_and_logged_to_csv(unbroken, distill, tmp_path):
    """Optimizer and weights offloaded to the CPU: the same curve, also from stage 2 to 3 and back to one rank."""
    run, cpu = tmp_path / "run", {"device": "cpu"}
    csv = {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    distill(run, ds_config(tmp_path, 2, {"optimizer": cpu}, csv_monitor=csv), NO_DROPOUT, "--stop-at=2")
    distill(run, ds_config(tmp_path, 3, {"optimizer": cpu, "param": cpu}), NO_DROPOUT, "--stop-at=4")
    _can_be_inspected_and_exported(run)
    distill(run, ds_config(tmp_path, 3, {"optimizer": cpu}), NO_DROPOUT, ranks=1)
    _same_curve(run, unbroken)
    assert len((tmp_path / "csv" / "train_loss.csv").read_text().splitlines()) == 3


@pytest.mark.exhaustive
def test_weights_on_nvme_give_the_same_curve(unbroken, distill, tmp_path):
    """Needs libaio's headers, and minutes to compile DeepSpeed's reads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    offload = {"optimizer": {"device": "cpu"}, "param": {"device": "nvme", "nvme_path": str(disk)}}
    arguments = [ds_config(tmp_path, 3, offload), NO_DROPOUT]
    arguments += ["teacher.placement=zero3_nvme", f"teacher.nvme_path={disk}"]
    distill(tmp_path / "run", *arguments, "--stop-at=3")
    distill(tmp_path / "run", *arguments)
    _same_curve(tmp_path / "run", unbroken)


def _can_be_inspected_and_exported(run):
    lines = Console(width=200)
    with lines.capture() as shown:
        lines.print(report.table(run))
    assert "whole" in shown.get() and "torn" not in shown.get()
    finished = FinishedRun.open(run)
    weights = load_exported(export(finished, run.parent / "export")).state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())


def _same_curve(run, unbroken):
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)
    ours, theirs = (read_weights(folder / "checkpoints" / "step-00000006") for folder in (run, unbroken))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_number(distill, tmp_path):
    for name, extra in (("kept", {}), ("again", {"activation_checkpointing": {}})):
        distill(tmp_path / name, ds_config(tmp_path, 2, **extra), NO_DROPOUT, ranks=1)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)
