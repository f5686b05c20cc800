"""Several students from one pass of the teacher: each is bit for bit the one that it would be alone."""

import shutil

import pytest
import torch

from pipeline.engine import records
from pipeline.engine.checkpoint import read_weights
from pipeline.results import compare
from pipeline.training import run_folder
from pipeline.training.metrics import read_metrics
from tests import toy
from tests.jobs import RUNNABLE, settings, train
from tests.read import losses_of

STEPS = 4
# Of other shapes, learning from other layers with other relations, at other rates, with dropout.
STUDENTS = {
    "deep": [],
    "wide": ["student.shape=1x48", "relations.heads=4", "teacher.layer=2", "optimizer.clip_norm=0.0"],
    "two-layers": ["student.shape=3x24", "relations.layers=[[1, 2, 0.5], [3, 3, 1.0]]", "optimizer.peak_lr=5e-4"],
}
RUNS = ("together", "resumed", "alone")


@pytest.fixture(scope="module")
def toy_run(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("side")
    overrides = [o for o in toy.make(folder, samples.leads()) if not o.startswith(("optimizer.steps", "checkpoint."))]
    more = [f"optimizer.steps={STEPS}", "checkpoint.every_steps=2", "logging.validate_every_steps=2"]
    (folder / "probe.jsonl").write_text("\n".join(samples.leads().read_text(encoding="utf-8").splitlines()[::100]))
    scored = ["logging.validation_samples=32", f"logging.probe={folder / 'probe.jsonl'}"]
    return folder, [*overrides, *more, *scored]


def run_all(folder, overrides, names, *, ranks):
    """Of each configuration: NAME-RANKS/together unbroken, /alone/STUDENT, and /resumed after a kill.

    The kill came while the last checkpoints were written: one student has none of its last step, and all go back.
    """
    first, second = [], []
    for name in names:
        common, run = dict(config=settings(name), overrides=overrides), f"{name}-{ranks}"
        first.append(dict(run=f"{run}/together", students=STUDENTS, **common))
        second.append(dict(run=f"{run}/resumed", students=STUDENTS, **common))
        for student, own in STUDENTS.items():
            first.append(dict(run=f"{run}/alone/{student}", config=settings(name), overrides=[*overrides, *own]))
    assert set(train(folder, ranks, first).values()) == {0}
    for name in names:
        killed = shutil.copytree(folder / f"{name}-{ranks}" / "together", folder / f"{name}-{ranks}" / "resumed")
        (killed / "wide" / "checkpoints" / records.tag_of(STEPS) / records.RECORD).unlink()
    assert set(train(folder, ranks, second).values()) == {0}
    return folder


def assert_all_the_same(folder, name, ranks):
    """Weights, losses, held-out losses and scores of each student, bit for bit."""
    for student in STUDENTS:
        together, resumed, alone = (folder / f"{name}-{ranks}" / run / student for run in RUNS)
        for run in (together, resumed):
            ours, theirs = (read_weights(one / "checkpoints" / f"step-{STEPS:08d}") for one in (run, alone))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert losses_of(run) == losses_of(alone) and len(losses_of(run)) == STEPS
            held_out = [read_metrics(one, "validation") for one in (run, alone)]
            assert held_out[0] == held_out[1] and len(held_out[0]) == 3
            assert all("probe_accuracy" in record for record in held_out[0])
        aside = list((folder / f"{name}-{ranks}" / "resumed" / student / "aside").glob("*/step-00000004"))
        assert len(aside) == 1  # nothing is lost


def test_each_student_is_the_one_that_it_would_be_alone(toy_run):
    """Also after a kill and a resume."""
    assert_all_the_same(run_all(*toy_run, ["zero1"], ranks=1), "zero1", 1)


@pytest.mark.slow
def test_on_two_ranks_in_fp32_and_at_stage_3(toy_run):
    folder = run_all(*toy_run, ["cpu", "zero3"], ranks=2)
    for name in ("cpu", "zero3"):
        assert_all_the_same(folder, name, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_every_other_configuration(ranks, toy_run):
    names = [name for name in RUNNABLE if (name, ranks) not in (("zero1", 1), ("cpu", 2), ("zero3", 2))]
    folder = run_all(*toy_run, names, ranks=ranks)
    for name in names:
        assert_all_the_same(folder, name, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["teacher.placement=zero3"], ["data.packing=none"], ["data.attention=document"]])
def test_with_a_partitioned_teacher_and_other_samples(more, toy_run, tmp_path):
    _, overrides = toy_run
    assert_all_the_same(run_all(tmp_path, [*overrides, *more], ["zero1"], ranks=2), "zero1", 2)


@pytest.mark.slow
def test_a_student_that_diverges_ends_alone_and_is_left_out_afterwards(distill, tmp_path):
    """As users start it: two rates, one of them far too large."""
    study = tmp_path / "study"
    vary = ["--vary", "optimizer.peak_lr=2e-3,1e30", "checkpoint.stop_after_skipped_steps=2"]
    process = distill(study, *vary, "--stop-at=4", expect=3)
    good, bad = study / "optimizer.peak_lr=2e-3", study / "optimizer.peak_lr=1e30"
    assert "2 students side by side" in process.stdout and "giving up: 2 steps in a row" in process.stdout
    assert run_folder.read_ended(bad)["step"] == 3 and run_folder.read_ended(good) is None
    assert records.whole_steps(bad / "checkpoints") == [3] and 4 in records.whole_steps(good / "checkpoints")
    process = distill(study, *vary, expect=3)
    assert "has given up" in process.stdout and "resumed from step 4" in process.stdout
    assert [outcome.has_ended for outcome in compare.read([good, bad])] == [False, True]
    alone = distill(bad, "optimizer.peak_lr=1e30", "checkpoint.stop_after_skipped_steps=2", expect=3)
    assert "resumed from step 3" in alone.stdout  # alone it may try again


def test_recipes_that_do_not_go_together_are_refused_before_anything_is_written(distill, tmp_path):
    process = distill(tmp_path / "study", "--vary", "data.seq_tokens=16,32", ranks=1, expect=2)
    assert "data.seq_tokens: 16 in recipe 1, 32 in recipe 2" in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "study").exists()
