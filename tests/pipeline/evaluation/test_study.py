"""Every kind of task, fine-tuned and scored on toys; kills, stale records, and what the numbers mean."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.evaluation import command, design, report, results, study, units
from pipeline.evaluation.contestants import Contestant
from pipeline.tasks.table import find_task
from tests.labelled import KINDS, plan_of


@pytest.mark.slow
def test_every_kind_is_fine_tuned_and_scored(models, data, tmp_path):
    names = ",".join(f"{kind[:4]}:{kind}" for kind in KINDS) + ",lang:text"
    planned = plan_of(models, data, tmp_path, names, epochs=6)
    said = []
    done = study.run(planned, workers=0, say=said.append)
    assert len(done) == planned.expected_units() == 14 and len(said) == 14 and "left 0:00:00" in said[-1]
    assert sum("over 3 splits" in line for line in said) == 2  # of the task in three languages, by both models
    found = results.collect(planned, done, "m1", None)
    by_task = {line.task: line for line in found.headlines()}
    assert by_task["toke"].models["m1"].mean > 0.9  # tags follow from the words' places
    assert by_task["retr"].models["m1"].mean > 0.5 and by_task["retr"].models["m1"].lr is None
    assert [line.split for line in found.lines if line.task == "lang"][::2] == ["test", "test.es", "test.fr", "mean"]
    assert by_task["lang"].models["m1"].mean == pytest.approx(by_task["text"].models["m1"].mean)
    report.write(found, tmp_path, step=3)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["lines"][0]["models"]["m1"]["seeds"] == list(found.lines[0].models["m1"].seeds)
    assert "| text | test | accuracy | 40 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.svg").read_text().count("<circle") == 4 and list((tmp_path / "tensorboard").iterdir())
    card = report.for_card(found, list(planned.tasks))
    assert {record["task_type"] for record in card} == {
        *("text-classification", "token-classification", "question-answering", "sentence-similarity")
    }


def test_killed_anywhere_the_same_command_goes_on(models, data, tmp_path, monkeypatch):
    """The first learning rate of the grid is tried, the process dies, and no unit that was whole is done again."""
    options = dict(learning_rates=(1e-4, 1e-3), seeds=2)
    work, calls = units.work, []

    def dies_at_the_third(unit, *rest):
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(unit, *rest)

    monkeypatch.setattr(units, "work", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        study.run(plan_of(models[:1], data, tmp_path, "text:text", **options), workers=0, say=lambda line: None)
    again = plan_of(models[:1], data, tmp_path, "text:text", **options)
    assert len(study.records(again)) == 2
    torn = next((tmp_path / "units").rglob("*.json"))
    torn.write_bytes(torn.read_bytes()[:100])
    done = study.run(again, workers=0, say=lambda line: None)
    assert len(calls) == 3 + 2 and len(done) == again.expected_units() == 3
    grid = [again.unit(models[0], again.tasks[0], lr, 1) for lr in (1e-4, 1e-3)]
    best = max(grid, key=lambda unit: done[unit]["selection"])
    assert {unit.lr for unit in study.reported(again, done, models[0], again.tasks[0])} == {best.lr}
    assert study.wanted(again, done) == []


def test_records_of_anything_else_are_not_taken(models, data, tmp_path):
    planned = plan_of(models[:1], data, tmp_path / "out", "text:text")
    study.run(planned, workers=0, say=lambda line: None)
    assert len(study.records(planned)) == 1
    other = tmp_path / "other"
    shutil.copytree(data / "text", other / "text")
    with (other / "text" / "test.jsonl").open("a") as file:
        file.write('\n{"text": "the house is red", "label": "bright"}')
    changed = (
        plan_of(models[:1], other, tmp_path / "out", "text:text"),  # data
        plan_of([dataclasses.replace(models[1], name="m1")], data, tmp_path / "out", "text:text"),  # weights
        plan_of(models[:1], data, tmp_path / "out", "text:text", learning_rates=(2e-3,)),
        plan_of(models[:1], data, tmp_path / "out", "text:text", limit=50),
    )
    assert [len(study.records(plan)) for plan in changed] == [0, 0, 0, 0]
    stale = dataclasses.replace(planned, data_fingerprints={"text": "of other data"})
    with pytest.raises(UserError, match="changed meanwhile"):
        study.run(stale, workers=0, say=lambda line: None)


def test_other_peoples_files_are_not_mixed_with(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no evaluation's"):
        design.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_learning_rate_is_chosen_by_the_held_back_part_alone(models, data, tmp_path):
    planned = plan_of(models[:1], data, tmp_path, "text:text", learning_rates=(1e-5, 1e-4, 1e-3, 1e-2))
    grid = [planned.unit(models[0], planned.tasks[0], lr, 1) for lr in planned.options.learning_rates]
    records = [
        {"selection": 0.8, "scores": {}},
        {"selection": 0.9, "scores": {}},
        {"selection": 0.9, "scores": {}},
        {"selection": 1.0, "scores": {}, "diverged": True},
    ]
    assert study.chosen_lr(grid, dict(zip(grid, records, strict=True))) == 1e-4


def test_interval_of_a_difference_covers_the_truth():
    """Models of 80 % and 75 %, seeds that differ by two points: the interval holds the true 5 points as it should."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        tables = []
        for truth in (0.80, 0.75):
            seeds = []
            for _ in range(4):
                right = rng.random(400) < truth + rng.normal(0, 0.02)
                groups = right.reshape(20, 20)  # groups stand side by side here, interleaved in a record
                seeds.append([(right.mean(), (right.sum() - groups.sum(1)) / 380)])
            tables.append(seeds)
        found = results.difference(*tables)
        hits += found.low <= 0.05 <= found.high
    assert 0.92 <= hits / 300 <= 1.0
    one = [[(0.5, np.array([0.5, 0.5]))]]
    assert results.difference(one, one) == results.Difference(value=0.0, low=0.0, high=0.0)


def test_interval_of_a_mean_over_splits_knows_the_small_one():
    """Splits of 400 and 5 examples: the mean hangs on the small one. Of one example nothing is known."""
    rng = np.random.default_rng(0)
    hits, chance = 0, {400: 0.80, 5: 0.80}
    for _ in range(300):
        tables = []
        for _ in range(2):
            splits = []
            for size, truth in chance.items():
                right = rng.random(size) < truth
                groups = [right[group::20] for group in range(min(20, size))]
                splits.append((right.mean(), np.array([(right.sum() - g.sum()) / (size - len(g)) for g in groups])))
            tables.append([splits])
        found = results.difference(*tables)
        hits += found.low <= 0 <= found.high
    assert hits / 300 >= 0.9
    lone = [[(0.5, np.array([0.5, 0.6])), (1.0, np.array([]))]]
    assert results.difference(lone, lone).low is None


def test_notes_say_what_the_student_keeps_and_what_was_never_fine_tuned():
    def line(task, **means):
        scores = {
            name: results.Score(mean=mean, deviation=None, seeds=(mean,), lr=None, diverged=0)
            for name, mean in means.items()
        }
        return results.Line(task=task, split="test", metric="accuracy", examples=10, models=scores, differences={})

    found = results.Results(
        student="student",
        models=dict(teacher={}, student={}),
        settings=dict(epochs={"sst2": 3}, learning_rates=[1e-4], seeds=1, limit=None),
        lines=[line("sst2", teacher=0.9, student=0.8), line("pairs", teacher=0.7, student=0.4)],
        published=[],
    )
    said = report.notes(found)
    assert "student keeps 75.0% of the teacher's score" in said  # (0.8 + 0.4) / (0.9 + 0.7)
    assert any("pairs" in note and "nothing is fine-tuned" in note and "sst2" not in note for note in said)
    alone = report.notes(dataclasses.replace(found, models=dict(student={})))
    assert not any("keeps" in note or "interval" in note for note in alone)


def test_published_rows_stand_beneath_students_of_their_teacher_and_shape():
    from pipeline.evaluation.published import published

    assert [row.value for row in published("google-bert/bert-base-uncased", "6x768", "rte")] == [72.1]
    assert [row.value for row in published("/models/xlm-roberta-large", "12x384", "xnli")] == [72.9]
    assert published("bert-base-multilingual-cased", "6x768", "rte") == []
    assert published("bert-base-uncased", "3x192", "rte") == []


def test_a_model_without_a_run_and_mistakes(models, data, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILM_HOME", str(tmp_path / "home"))
    asked = command.Request(
        model=models[0].folder, tasks="retr:retrieval", data=data, against=(models[1].folder, models[0].folder)
    )
    found = command.on_tasks(asked, say=lambda line: None)
    assert list(found.models) == ["m1", "m2", "m1-2"] and found.student == "m1"
    assert found.lines[0].differences["m1-2"].value == 0
    only_planned = dataclasses.replace(asked, tasks="text:text")
    assert command.on_tasks(only_planned, plan_only=True, say=lambda line: None) is None
    scores = command.without_labels(dataclasses.replace(asked, tasks=None))
    assert set(scores.parameters) == {"m1", "m2", "m1-2"}
    for wrong in (
        dict(tasks="text:text", data=tmp_path / "none"),
        dict(tasks="rte"),
        dict(model=str(tmp_path)),
        dict(against=(str(tmp_path),)),
    ):
        with pytest.raises(UserError):
            command.on_tasks(dataclasses.replace(asked, **wrong), say=lambda line: None)


def test_examples_are_cut_to_what_all_models_take(models, data, tmp_path):
    short = Contestant(**{**dataclasses.asdict(models[0]), "name": "short", "max_tokens": 32})
    planned = plan_of([short, models[1]], data, tmp_path, "text:text")
    assert planned.max_tokens["text"] == 32 and any("32 tokens" in note for note in planned.notes)
    assert find_task("text:text").max_tokens == 128
