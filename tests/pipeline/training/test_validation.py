"""Scores while training: the same on any number of ranks and at any stage, and training does not notice them."""

import pytest
import torch

from pipeline.engine.checkpoint import read_weights
from pipeline.tasks.probe import ProbeTask
from pipeline.training.metrics import read_metrics
from pipeline.training.validation import accuracy, batches_of, neighbours
from tests import toy
from tests.jobs import settings, train
from tests.read import losses_of

# At step 0 all have the same weights; later those of other ranks and stages differ by the rounding of sums.
NAMES = ("fp32-stage0", "fp32-stage3")


@pytest.fixture(scope="module")
def probe(samples, tmp_path_factory):
    """Texts of all topics of the sample."""
    path = tmp_path_factory.mktemp("probe") / "probe.jsonl"
    lines = samples.leads().read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[::40]), encoding="utf-8")
    return path


def scores(run) -> list[tuple[float, float]]:
    return [(r["neighbours_in_common"], r["probe_accuracy"]) for r in read_metrics(run, "validation")]


@pytest.mark.slow
def test_scores_are_the_same_on_any_ranks_and_stages_and_change_nothing(samples, probe, tmp_path):
    made = [o for o in toy.make(tmp_path, samples.leads()) if not o.startswith("checkpoint.")]
    plain = [*made, "logging.validation_samples=48", "checkpoint.every_steps=6", "logging.validate_every_steps=2"]
    probed = [*plain, f"logging.probe={probe}", "student.dropout=0.0"]
    for ranks in (1, 2):
        jobs = [dict(run=f"{name}-{ranks}", config=settings(name), overrides=probed) for name in NAMES]
        with_dropout = dict(config=settings("zero1"), overrides=plain)
        jobs.append(dict(with_dropout, run=f"plain-{ranks}"))
        jobs.append(dict(with_dropout, run=f"probed-{ranks}", overrides=[*plain, f"logging.probe={probe}"]))
        assert set(train(tmp_path, ranks, jobs).values()) == {0}
        one, other = (tmp_path / f"{which}-{ranks}" for which in ("plain", "probed"))
        assert losses_of(one) == losses_of(other)
        ours, theirs = (read_weights(run / "checkpoints" / "step-00000006") for run in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    reference = scores(tmp_path / "fp32-stage0-1")
    assert (
        len(reference) == 4 and len(set(reference)) > 1 and all(0 < score < 1 for pair in reference for score in pair)
    )
    for name in NAMES:
        for ranks in (1, 2):
            found = scores(tmp_path / f"{name}-{ranks}")
            assert found[0] == pytest.approx(reference[0], abs=1e-3)
            assert found == [pytest.approx(pair, abs=0.03) for pair in reference]  # a text or two of a hundred
    said = "".join(path.read_text() for path in tmp_path.glob("log-*.txt"))
    assert f"neighbours in common {reference[0][0]:.1%}  probe {reference[0][1]:.1%}" in said
    (events,) = (tmp_path / "fp32-stage0-1" / "tensorboard").glob("events.out.tfevents.*")
    assert b"validation/neighbours_in_common" in events.read_bytes()
    assert b"validation/probe_accuracy" in events.read_bytes()


@pytest.mark.slow
def test_labelled_texts_that_are_missing_end_all_ranks_with_one_message(distill, tmp_path):
    process = distill(tmp_path / "run", f"logging.probe={tmp_path / 'none.jsonl'}", expect=2)
    assert "logging.probe: there is no probe file" in process.stderr and "Traceback" not in process.stderr
    assert process.stderr.count("distill: error") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("texts", "world_size"), [(7, 1), (7, 2), (8, 4), (1, 3)])
def test_every_rank_makes_as_many_passes_and_every_text_has_its_turn(texts, world_size):
    ids = torch.arange(2 * texts).view(texts, 2)
    parts = [
        list(batches_of(ids, ids >= 0, micro_batch_samples=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1 and parts[0]
    batches = [batch for part in parts for batch in part]
    assert {batch.input_ids.shape for batch in batches} == {(2, 2)}
    rows = {
        int(number): row.tolist()
        for batch in batches
        for number, row in zip(batch.samples, batch.input_ids, strict=True)
    }
    assert len(rows) == 2 * len(batches)  # no number twice
    assert [rows[number] for number in range(texts)] == ids.tolist()


def test_what_cannot_be_told_is_left_out():
    vectors = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    spoilt = vectors.clone()
    spoilt[3, 2] = float("nan")
    assert neighbours(vectors, 2 * vectors) == {"neighbours_in_common": 1.0}
    assert neighbours(vectors[:31], vectors[:31]) == neighbours(spoilt, vectors) == neighbours(vectors, spoilt) == {}
    labels = (vectors[:, 0] > 0).int().tolist()
    task = ProbeTask(
        train_texts=[], train_labels=labels[:16], test_texts=[], test_labels=labels[16:], labels=["no", "yes"]
    )
    assert accuracy(vectors, task)["probe_accuracy"] > 0.7 and accuracy(spoilt, task) == {}
