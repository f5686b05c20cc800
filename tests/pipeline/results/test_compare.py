"""Comparing real runs that differ in a key."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from data_prep.errors import UserError
from pipeline.results import compare, curves, report
from pipeline.training.metrics import read_metrics


def shown(outcomes) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))
    console.print(compare.table(outcomes))
    return console.export_text()


@pytest.fixture
def pair(runs, tmp_path):
    """The same run twice, the second one with another rate in its recipe and other losses."""
    light = shutil.ignore_patterns("checkpoints")  # 200 MB that no comparison reads
    one, other = (shutil.copytree(runs.unbroken, tmp_path / name, ignore=light) for name in ("one", "other"))
    recipe = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(re.sub(r"peak_lr = .*", "peak_lr = 0.5", recipe))
    return [one, other]


def test_what_differs_and_what_came_of_it(pair):
    outcomes = compare.read(pair)
    assert compare.differences(outcomes) == {"optimizer.peak_lr": ["0.002", "0.5"]}
    text = shown(outcomes)
    held_out = read_metrics(pair[0], "validation")[-1]["per_pair"]
    assert f"{held_out['qq']:.4f} " in text and "6 of 6" in text and f"{outcomes[0].parameters:,}" in text
    assert "within a letter" not in text and [outcome.name for outcome in outcomes] == ["one", "other"]


def test_losses_of_another_scale_are_marked(pair):
    recipe = pair[1] / "recipe.toml"
    recipe.write_text(re.sub(r"(?m)^heads = 48", "heads = 24", recipe.read_text()))
    outcomes = compare.read(pair)
    assert compare.groups(outcomes) == ["A", "B"] and "within a letter" in shown(outcomes)


def test_a_corpus_that_was_made_anew_at_its_path_is_another_text(pair):
    record = pair[1] / "provenance" / "provenance.json"
    known = json.loads(record.read_text())
    assert known["corpus_fingerprint"] and compare.groups(compare.read(pair)) == ["A", "A"]
    record.write_text(json.dumps(known | dict(corpus_fingerprint="another")))
    assert compare.groups(compare.read(pair)) == ["A", "B"]
    recipe = pair[0] / "recipe.toml"
    record.write_text(json.dumps(known))
    recipe.write_text(re.sub(r"(?m)^corpus = .*", 'corpus = "moved"', recipe.read_text()))
    assert compare.groups(compare.read(pair)) == ["A", "A"]


def test_scores_that_evaluate_has_left_are_shown_and_others_are_not(pair):
    export = pair[0] / "export"
    shutil.rmtree(export, ignore_errors=True)
    export.mkdir()
    result = dict(dataset_name="sst2", metric="accuracy", value=0.9123)
    (export / "scores.json").write_text(json.dumps(dict(probe_accuracy={"student": 0.61}, results=[result])))
    assert compare.read(pair)[0].scores == {}  # somebody else's file
    (export / "minilm-export.json").write_text("{}")
    assert compare.read(pair)[0].scores == {"probe": 0.61, "sst2 accuracy": 0.9123}
    (export / "scores.json").write_text("[1")
    assert compare.read(pair)[0].scores == {}


def test_scores_of_training_are_shown_where_there_are_any(pair):
    metrics = pair[0] / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert read_metrics(pair[0], "validation") and "training" not in shown(compare.read(pair))
    for number, record in enumerate(r for r in records if r["kind"] == "validation"):
        record |= dict(neighbours_in_common=0.25 + number / 8, probe_accuracy=0.5)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    outcomes = compare.read(pair)
    assert outcomes[0].scores == {"neighbours in common, training": 0.375, "probe, training": 0.5}
    assert outcomes[1].scores == {} and "0.375" in shown(outcomes)
    picture = ElementTree.fromstring(curves.picture(outcomes))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len([line for line in lines if line.get("points")]) == 4 + 4  # two panels of losses, and two of each score
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    report.show(pair[0], console)
    assert "37.5% at step 6" in console.export_text()


def test_a_held_out_loss_of_another_step_says_so(pair):
    metrics = pair[0] / "metrics.jsonl"
    whole = metrics.read_text()
    assert " at 0" not in shown(compare.read(pair))
    kept = [line for line in whole.splitlines(True) if not ('"validation"' in line and '"step": 0' not in line)]
    metrics.write_text("".join(kept))  # as of a run that was stopped before it measured again
    assert " at 0" in shown(compare.read(pair))
    metrics.write_text(whole)


def test_the_picture_holds_a_curve_of_each_run_against_tokens_and_time(pair):
    picture = ElementTree.fromstring(curves.picture(compare.read(pair)))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 and all(len(line.get("points").split()) >= 2 for line in lines)
    marks = [text.text for text in picture.findall("{http://www.w3.org/2000/svg}text") if text.text[0].isdigit()]
    assert len(marks) >= 8 and all(len(mark.replace(",", "").replace(".", "").strip("0")) <= 2 for mark in marks), marks
    outcomes = compare.read(pair)
    assert outcomes[0].training[-1][0] == 6 * 8 * 32  # tokens
    assert outcomes[0].training[-1][1] == pytest.approx(
        sum(r["seconds"]["total"] for r in read_metrics(pair[0], "train"))
    )


def test_a_folder_that_is_no_run_is_named(pair, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare.read([pair[0], tmp_path])
