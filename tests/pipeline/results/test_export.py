import json
import os
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.errors import UserError
from pipeline.results.export import export
from pipeline.shipping import folder as shipped
from pipeline.shipping.folder import MARKER
from pipeline.training.metrics import read_metrics
from pipeline.training.run_folder import FinishedRun


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
    assert not list(tmp_path.glob(".minilm-export-*"))


def test_what_is_put_there_while_the_model_is_made_stays_too(runs, tmp_path):
    """Looked at again just before the folders change places; what the model would be written over is refused."""
    run = FinishedRun.open(runs.unbroken)
    target = export(run, tmp_path / "model")
    fresh = shutil.copytree(target, tmp_path / "fresh")
    (target / "late.txt").write_text("mine")
    (fresh / "late.txt").write_text("the model's")
    with pytest.raises(UserError, match="late.txt in .* would be written over; nothing was written"):
        shipped.swap(fresh, target, tmp_path / "old", run.name)
    assert (target / "late.txt").read_text() == "mine" and not (tmp_path / "old").exists()
    (fresh / "late.txt").unlink()
    shipped.swap(fresh, target, tmp_path / "old", run.name)
    assert (target / "late.txt").read_text() == "mine"


def test_a_marker_removes_no_files_elsewhere(runs, tmp_path):
    """The marker of a folder from somebody else may name any file."""
    run = FinishedRun.open(runs.unbroken)
    target = export(run, tmp_path / "model")
    (tmp_path / "thesis.txt").write_text("mine")
    marker = json.loads((target / MARKER).read_text())
    names = ("../thesis.txt", "../../thesis.txt", str(tmp_path / "thesis.txt"))
    (target / MARKER).write_text(json.dumps({**marker, "files": marker["files"] | dict.fromkeys(names, "0" * 64)}))
    export(run, target)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis.txt"]


def test_a_link_is_followed_and_a_read_only_run_makes_a_writable_model(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.unbroken, run)
    for path in (*(run / "model").iterdir(), run / "model"):
        path.chmod(path.stat().st_mode & ~0o222)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    assert export(FinishedRun.open(run), tmp_path / "link") == tmp_path / "disk" / "model"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model").stat().st_mode & 0o200


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_nothing(runs, on_small_disk):
    code = "import sys; from launch import cli; sys.argv[:] = ['minilm', 'export', sys.argv[2], '--out', sys.argv[1]"
    process = on_small_disk("100k", f"{code} + '/model']; cli.main()", runs.unbroken)
    assert process.returncode == 2 and process.stdout == "", process.stdout + process.stderr
    assert "No space left on device" in process.stderr and "Traceback" not in process.stderr


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
