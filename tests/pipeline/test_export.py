import json
import os
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.errors import UserError
from pipeline.export import MARKER, export
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


def test_an_earlier_export_is_replaced_and_what_is_beside_it_stays(runs, tmp_path):
    run = FinishedRun.open(runs.unbroken)
    target = export(run, tmp_path / "model")
    (target / "notes.txt").write_text("mine")
    (target / "figures").mkdir()
    (target / "figures" / "loss.svg").write_text("mine")
    first = (target / "model.safetensors").stat().st_ino
    assert export(run, target) == target and (target / "model.safetensors").stat().st_ino != first
    assert (target / "notes.txt").read_text() == (target / "figures" / "loss.svg").read_text() == "mine"
    (target / "README.md").write_text("my own card")
    with pytest.raises(UserError, match="README.md in .* was changed since it was exported; nothing was written"):
        export(run, target)
    assert (target / "README.md").read_text() == "my own card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_else_is_replaced(runs, samples, tmp_path):
    """A teacher's folder holds a model.safetensors too."""
    run = FinishedRun.open(runs.unbroken)
    thesis, teacher, other = tmp_path / "thesis", tmp_path / "teacher", tmp_path / "other"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("mine")
    shutil.copytree(samples.teacher, teacher)
    shutil.copytree(export(run, tmp_path / "exported"), other)
    marker = json.loads((other / MARKER).read_text())
    (other / MARKER).write_text(json.dumps({**marker, "run": "another"}))
    (tmp_path / "file").write_text("mine")
    for folder in (thesis, teacher, other, tmp_path / "file"):
        before = _contents(folder)
        with pytest.raises(UserError, match="nothing was written"):
            export(run, folder)
        assert _contents(folder) == before
    assert not list(tmp_path.glob(".export-*"))


def _contents(path):
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in (path, *path.rglob("*"))}


def test_exported_files_obey_the_umask(exported):
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}
    assert exported.stat().st_mode & 0o777 == 0o777 & ~umask


def test_code_that_comes_with_a_run_is_not_run(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.unbroken, run)
    config = json.loads((run / "model" / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (run / "model" / "config.json").write_text(json.dumps(config))
    (run / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be made"):
        export(FinishedRun.open(run))
    assert not (tmp_path / "ran").exists() and not (run / "export").exists()


def test_a_folder_that_is_no_run_is_named(runs, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        FinishedRun.open(tmp_path)
    copy = shutil.copytree(runs.unbroken, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has saved no checkpoint yet"):
        FinishedRun.open(copy)
