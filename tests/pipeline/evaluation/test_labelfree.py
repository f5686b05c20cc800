import json
import shutil

import pytest

from data_prep.errors import UserError
from pipeline.evaluation.command import Request, without_labels
from pipeline.results.export import export
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
