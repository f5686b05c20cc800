"""A run's student beside its teacher and what it started as, on tasks; the card of its folder says the scores."""

import json

import pytest
from huggingface_hub import metadata_load

from pipeline.evaluation import command
from tests import toy
from tests.jobs import settings, train

pytestmark = pytest.mark.slow


def test_of_a_run_teacher_student_and_untrained_student_are_compared(samples, data, tmp_path):
    overrides = toy.make(tmp_path, samples.leads())
    train(tmp_path, 1, [dict(run="run", config=settings("cpu"), overrides=overrides)])
    run, said = tmp_path / "run", []
    options = dict(model=str(run), tasks="text:text,lang:text", data=data, learning_rates=(1e-3,), seeds=2, epochs=1)
    found = command.on_tasks(command.Request(**options), say=said.append)
    assert list(found.models) == ["teacher", "student", "untrained"] and found.student == "student"
    assert all(set(line.differences) == {"teacher", "untrained"} for line in found.lines)
    assert found.models["student"]["fingerprint"] != found.models["untrained"]["fingerprint"]
    text = next(line for line in found.lines if line.task == "text" and line.metric == "accuracy")
    front = metadata_load(run / "export" / "README.md")
    scored = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in front["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert any(value == pytest.approx(text.models["student"].mean, abs=1e-3) for value in scored.values()), scored
    assert (run / "evaluation" / "results.svg").is_file()
    before = json.loads((run / "export" / "scores.json").read_text())
    # Of another task alone: what was scored before stays.
    command.on_tasks(command.Request(**{**options, "tasks": "lang:text"}), say=said.append)
    after = json.loads((run / "export" / "scores.json").read_text())
    assert {r["dataset_name"] for r in after["results"]} == {r["dataset_name"] for r in before["results"]}
