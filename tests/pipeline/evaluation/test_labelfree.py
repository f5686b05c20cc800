import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from pipeline.evaluation.command import Request, without_labels
from pipeline.results.export import export
from pipeline.tasks.probe import read_probe
from pipeline.tasks.vectors import linear_probe, neighbours_in_common, ranks
from pipeline.training.run_folder import FinishedRun


@pytest.mark.slow
def test_scores_of_a_real_run(runs, samples, tmp_path):
    run = shutil.copytree(runs.resumed, tmp_path / "run")
    scores = without_labels(Request(model=str(run), probe=samples.leads("en"), texts=120))
    accuracy = scores.probe_accuracy
    assert set(accuracy) == {"teacher", "student", "untrained"}
    assert accuracy["teacher"] > accuracy["untrained"] and accuracy["teacher"] > scores.probe_majority
    assert scores.neighbours["teacher"] == 1 > scores.neighbours["student"] > 0 and scores.texts > 32
    assert scores.adjacent["teacher"] > 0.1  # of 101 texts: chance is 0.01
    assert scores.held_out.keys() == {"qq", "kk", "vv"}
    assert scores.parameters["student"] == scores.parameters["untrained"] < scores.parameters["teacher"]
    assert all(speed > 0 for speed in scores.forward_tokens_per_second.values())
    written = json.loads((run / "export" / "scores.json").read_text())
    assert written["probe_accuracy"] == accuracy
    card = (run / "export" / "README.md").read_text()
    assert f"linear probe accuracy, student | {accuracy['student']:.1%}" in card


def test_scores_of_somebody_else_are_not_written_over(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.resumed, run, ignore=shutil.ignore_patterns("export"))
    (export(FinishedRun.open(run)) / "scores.json").write_text("mine")
    with pytest.raises(UserError, match="scores.json is no evaluation's"):
        without_labels(Request(model=str(run)))
    assert (run / "export" / "scores.json").read_text() == "mine"


def test_probe_separates_what_is_separable_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    noise = torch.randn(600, 8, generator=generator)
    signal = torch.nn.functional.one_hot(labels, 8) * 6.0 + noise
    half = labels.tolist()[:300], labels.tolist()[300:]
    assert linear_probe(signal[:300], half[0], signal[300:], half[1]) > 0.95
    assert linear_probe(noise[:300], half[0], noise[300:], half[1]) < 0.5


def test_probe_file_is_split_by_seed_and_checked(samples, tmp_path):
    one, again, other = (read_probe(samples.leads("en"), texts=100, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.train_texts) == len(one.test_texts) == 50 and not set(one.train_texts) & set(one.test_texts)
    with pytest.raises(UserError, match="there is no probe file"):
        read_probe(tmp_path / "none.jsonl", texts=10, seed=1)
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_probe(tmp_path / "bad.jsonl", texts=10, seed=1)
    (tmp_path / "few.jsonl").write_text('{"text": "a", "label": 1}\n' * 5)
    with pytest.raises(UserError, match="5 texts with 1 labels"):
        read_probe(tmp_path / "few.jsonl", texts=10, seed=1)


def test_ranks_and_neighbours_of_vectors():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert ranks(vectors, 3 * vectors) == [1] * 50
    assert ranks(vectors, torch.ones(50, 8)) == [50] * 50  # all as near as the right one: no merit
    assert neighbours_in_common(vectors, 2 * vectors + 1) == 1
    other = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert neighbours_in_common(vectors, other) < 0.4
