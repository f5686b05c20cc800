"""Several students from one pass of the teacher: each is bit for bit the one that it would be alone."""

import shutil

import pytest
import torch

from pipeline.engine import records
from pipeline.engine.checkpoint import read_weights
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
    return folder, [*overrides, *more]


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
    """Weights, losses and held-out losses of each student, bit for bit."""
    for student in STUDENTS:
        together, resumed, alone = (folder / f"{name}-{ranks}" / run / student for run in RUNS)
        for run in (together, resumed):
            ours, theirs = (read_weights(one / "checkpoints" / f"step-{STEPS:08d}") for one in (run, alone))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert losses_of(run) == losses_of(alone) and len(losses_of(run)) == STEPS
            held_out = [[(r["step"], r["per_pair"]) for r in read_metrics(one, "validation")] for one in (run, alone)]
            assert held_out[0] == held_out[1] and len(held_out[0]) == 3
        aside = list((folder / f"{name}-{ranks}" / "resumed" / student / "aside").glob("*/step-00000004"))
        assert len(aside) == 1  # nothing is lost


def test_each_student_is_the_one_that_it_would_be_alone(toy_run):
    """Also after a kill and a resume."""
    assert_all_the_same(run_all(*toy_run, ["zero1"], ranks=1), "zero1", 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_every_other_configuration(ranks, toy_run):
    names = [name for name in RUNNABLE if (name, ranks) != ("zero1", 1)]
    folder = run_all(*toy_run, names, ranks=ranks)
    for name in names:
        assert_all_the_same(folder, name, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["teacher.placement=zero3"], ["data.packing=none"], ["data.attention=document"]])
def test_with_a_partitioned_teacher_and_other_samples(more, toy_run, tmp_path):
    _, overrides = toy_run
    assert_all_the_same(run_all(tmp_path, [*overrides, *more], ["zero1"], ranks=2), "zero1", 2)
