import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.errors import UserError
from pipeline.export import export
from pipeline.monitor import read_metrics
from pipeline.run_folder import FinishedRun


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    return export(FinishedRun.open(runs.unbroken), tmp_path_factory.mktemp("export") / "student")


def test_export_reloads_to_the_weights_that_were_trained(runs, exported):
    tokens = AutoTokenizer.from_pretrained(exported)("Alan Turing was born in London.", return_tensors="pt")
    student = FinishedRun.open(runs.unbroken).student()
    model = AutoModel.from_pretrained(exported).eval()
    with torch.no_grad():
        ours = student.backbone(**tokens).last_hidden_state
        assert torch.equal(model(**tokens).last_hidden_state, ours)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (192, 3)
    assert {path.name for path in exported.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    assert not list(exported.glob("*.bin"))


def test_exported_tokenizer_is_the_teachers(samples, exported):
    text = "Distillation: naïve coöperation, 東京!"
    assert AutoTokenizer.from_pretrained(exported)(text) == AutoTokenizer.from_pretrained(samples.teacher)(text)


def test_an_earlier_step_can_be_exported(runs, exported, tmp_path):
    earlier = AutoModel.from_pretrained(export(FinishedRun.open(runs.unbroken, step=3), tmp_path / "step3"))
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(earlier.state_dict()[name], AutoModel.from_pretrained(exported).state_dict()[name])


def test_card_tells_of_this_run(runs, exported):
    card = (exported / "README.md").read_text()
    first, last = read_metrics(runs.unbroken, "validation")
    assert "all-MiniLM-L6-v2" in card and "6 of 6 steps" in card and "48 samples of 32 tokens" in card
    assert f"QQ {first['per_pair']['qq']:.4f} -> {last['per_pair']['qq']:.4f}" in card
    assert "was not trained" in card


def test_export_replaces_an_export_and_nothing_else(runs, tmp_path):
    run = FinishedRun.open(runs.unbroken)
    target = export(run, tmp_path / "model")
    (target / "stale.txt").write_text("old")
    assert export(run, target) == target and not (target / "stale.txt").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="nothing was written"):
        export(run, precious)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


def test_a_folder_that_is_no_run_is_named(runs, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        FinishedRun.open(tmp_path)
    copy = shutil.copytree(runs.unbroken, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has saved no checkpoint yet"):
        FinishedRun.open(copy)
