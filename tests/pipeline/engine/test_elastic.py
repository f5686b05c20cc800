"""From one number of ranks, stage or place of the state to another in the middle of a run, under the real launcher.

The configurations that come with the project, one by one: test_stages.py.
"""

import json
import shutil

import pytest
import torch
from rich.console import Console

from data_prep import durable
from pipeline.engine.checkpoint import read_weights
from pipeline.engine.elastic import empty_state
from pipeline.engine.operators import import_deepspeed
from pipeline.results import report
from pipeline.results.export import export
from pipeline.shipping.huggingface import load_exported
from pipeline.training.metrics import read_metrics
from pipeline.training.run_folder import FinishedRun
from tests.read import losses_of

NO_DROPOUT = "student.dropout=0.0"  # its masks belong to a rank, so another number of ranks draws others


def ds_config(folder, stage, offload=None, **sections):
    """`offload`: what is not kept on the device, "optimizer" or "param", and where."""
    path = folder / f"stage{stage}.json"
    zero = {"stage": stage, **{f"offload_{what}": where for what, where in (offload or {}).items()}}
    durable.write(path, json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, **sections}))
    return f"--ds-config={path}"


@pytest.fixture(scope="module")
def unbroken(distill, tmp_path_factory):
    """Six steps at stage 1 on two ranks, without dropout."""
    folder = tmp_path_factory.mktemp("unbroken")
    distill(folder / "run", ds_config(folder, 1), NO_DROPOUT)
    return folder / "run"


@pytest.mark.slow
def test_from_two_ranks_to_one(unbroken, distill, tmp_path):
    run = tmp_path / "run"
    distill(run, ds_config(tmp_path, 1), NO_DROPOUT, "--stop-at=3")
    distill(run, ds_config(tmp_path, 1), NO_DROPOUT, ranks=1)
    _same_curve(run, unbroken)


@pytest.mark.slow
def test_from_two_ranks_to_four_and_to_three_at_stage_3(unbroken, distill, tmp_path):
    run, twelve = tmp_path / "run", "optimizer.global_batch_samples=12"
    distill(tmp_path / "unbroken", ds_config(tmp_path, 1), NO_DROPOUT, twelve)
    for stage, ranks, stop in ((1, 2, "--stop-at=2"), (1, 4, "--stop-at=4"), (3, 3, "--resume=auto")):
        distill(run, ds_config(tmp_path, stage), NO_DROPOUT, twelve, stop, ranks=ranks)
    _same_curve(run, tmp_path / "unbroken")


def fp16_is_supported():
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


@pytest.mark.slow
@pytest.mark.skipif(not fp16_is_supported(), reason="DeepSpeed has no fp16 on this processor")
def test_a_loss_scale_that_overflows_is_resumed_bit_for_bit(distill, tmp_path):
    """So large that steps before and after the stop are skipped."""
    scale = {"enabled": True, "initial_scale_power": 26, "hysteresis": 1}
    arguments = [ds_config(tmp_path, 2, fp16=scale)]
    distill(tmp_path / "unbroken", *arguments)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    process = distill(tmp_path / "resumed", *arguments, "--resume=3")
    assert "resumed from step 3" in process.stdout
    assert losses_of(tmp_path / "unbroken") == losses_of(tmp_path / "resumed")
    assert 0 < len(read_metrics(tmp_path / "resumed", "skipped")) < 5
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
        report.show(run, lines)
    assert "whole" in shown.get() and "torn" not in shown.get()
    finished = FinishedRun.open(run)
    weights = load_exported(export(finished, run.parent / "export")).state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())


def _same_curve(run, unbroken):
    assert losses_of(run) == pytest.approx(losses_of(unbroken), rel=1e-5)
    ours, theirs = (read_weights(folder / "checkpoints" / "step-00000006") for folder in (run, unbroken))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_number(distill, tmp_path):
    for name, extra in (("kept", {}), ("again", {"activation_checkpointing": {}})):
        distill(tmp_path / name, ds_config(tmp_path, 2, **extra), NO_DROPOUT, ranks=1)
    assert losses_of(tmp_path / "again") == pytest.approx(losses_of(tmp_path / "kept"), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_adams_step_is_where_the_optimizer_wants_it(fused):
    """Fused AdamW refuses a step on another device than its parameter, which only a GPU would show."""
    partition = torch.zeros(5, device="meta", dtype=torch.bfloat16)
    state = empty_state(partition, fused=fused, own=True)
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(5))], fused=fused)
    made.param_groups[0]["params"][0].grad = torch.ones(5)
    made.step()
    (own,) = made.state.values()
    assert state.keys() == own.keys() and state["step"].dtype == own["step"].dtype
    assert state["step"].device.type == ("meta" if fused else "cpu")
    moments = [state[key] for key in ("exp_avg", "exp_avg_sq")]
    assert {(moment.device.type, moment.dtype) for moment in moments} == {("meta", torch.float32)}
    assert empty_state(partition, fused=False, own=False)["step"] == 0  # DeepSpeed's CPU Adam counts in a number
