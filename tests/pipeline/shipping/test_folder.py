"""What a consumer looks for in an exported folder, read with the libraries that consumers use."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModel, AutoTokenizer

from data_prep.errors import UserError
from pipeline.provenance import FOLDER, RECORD
from pipeline.results.export import Options, add_scores, contents, export, exported
from pipeline.shipping import folder
from pipeline.training.run_folder import FinishedRun

SST2 = {
    "task_type": "text-classification",
    "dataset_name": "sst2",
    "dataset_config": None,
    "split": "validation",
    "metric": "accuracy",
    "value": 0.912,
    "deviation": 0.004,
    "seeds": 3,
}


@pytest.fixture(scope="module")
def run(runs):
    return FinishedRun.open(runs.unbroken)


@pytest.fixture(scope="module")
def model(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("shipped") / "student")


def test_front_matter_says_where_the_student_comes_from(run, model, samples):
    front = metadata_load(model / "README.md")
    assert front["license"] == "apache-2.0" and front["language"] == ["en"]
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "feature-extraction"
    assert "base_model" not in front and "model-index" not in front  # a local teacher; nothing was evaluated
    for name in ("LICENSE", "NOTICE"):
        assert (model / name).read_bytes() == (samples.teacher / name).read_bytes()


def test_nothing_of_another_machine_or_task_is_left(run, model):
    before = json.loads((run.folder / "model" / "tokenizer_config.json").read_text())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    gone = {"local_files_only", "is_local", "max_length", "truncation_strategy", "stride"}
    assert gone <= set(before) and not gone & set(settings)
    assert settings["model_max_length"] == run.recipe.data.seq_tokens == 32
    backend = json.loads((model / "tokenizer.json").read_text())
    assert backend["truncation"] is None and backend["padding"] is None
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (
        len(tokenizer("word " * 100, truncation=True)["input_ids"]) == 32 and len(tokenizer("word")["input_ids"]) == 3
    )
    assert not {"classifier_dropout", "id2label", "problem_type", "_name_or_path"} & set(
        json.loads((model / "config.json").read_text())
    )


def test_it_loads_without_a_word_and_its_pooler_makes_nothing_up(model, caplog):
    loaded, report = AutoModel.from_pretrained(model, output_loading_info=True)
    assert not any(report.values()) and not caplog.records
    tokens = AutoTokenizer.from_pretrained(model)("Alan Turing was born in London.", return_tensors="pt")
    with torch.no_grad():
        output = loaded.eval()(**tokens)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0].tanh())


def test_scores_come_into_the_card_and_outlive_another_export(runs, tmp_path):
    run = FinishedRun.open(shutil.copytree(runs.unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    out = add_scores(run, {"results": [SST2], "measures": {"probe": "61.8%"}})
    add_scores(run, {"measures": {"agreement": "0.52"}})
    for _ in range(2):
        card = (out / "README.md").read_text()
        assert "| sst2 | validation | accuracy | 91.2% ± 0.4% | 3 |" in card
        assert "| probe | 61.8% |" in card and "| agreement | 0.52 |" in card
        (entry,) = metadata_load(out / "README.md")["model-index"][0]["results"]
        assert entry["task"] == {"type": "text-classification"}
        assert entry["dataset"] == {"name": "sst2", "type": "sst2", "split": "validation"}
        assert entry["metrics"] == [{"type": "accuracy", "value": 0.912}]
        assert folder.is_whole(out) and exported(run) == out
        export(run)
    with pytest.raises(UserError, match="a result of an evaluation cannot be shown"):
        add_scores(run, {"results": [{**SST2, "value": "91.2"}]})
    assert "91.2%" in (out / "README.md").read_text()
    export(FinishedRun.open(run.folder, step=3))  # another student
    assert not (out / "scores.json").exists() and "sst2" not in (out / "README.md").read_text()


def test_an_export_is_used_again_only_if_it_is_whole(runs, tmp_path):
    run = FinishedRun.open(shutil.copytree(runs.unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    out = export(run, options=Options(dtype="bf16"))
    weights = out / "model.safetensors"
    first = weights.stat().st_ino
    assert exported(run) == out and weights.stat().st_ino == first
    weights.unlink()
    assert exported(run) == out and AutoModel.from_pretrained(out).dtype == torch.bfloat16  # made as it was
    assert contents(export(run, options=Options(sentence_transformers=True))) == "bf16, sentence-transformers"
    assert contents(export(run, options=Options(dtype="fp32", sentence_transformers=False))) == "fp32"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_half_the_bits(run, model, tmp_path, dtype):
    half = export(run, tmp_path / dtype, Options(dtype=dtype))
    rounded = AutoModel.from_pretrained(half)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    whole = AutoModel.from_pretrained(model).state_dict()
    assert all(torch.equal(weight, whole[name].to(expected)) for name, weight in rounded.state_dict().items())
    assert (half / "model.safetensors").stat().st_size < 0.51 * (model / "model.safetensors").stat().st_size
    assert f"parameters in {dtype}" in (card := (half / "README.md").read_text())
    assert float(re.search(r"lowest cosine of a token's vector with the fp32 one: ([0-9.]+)", card)[1]) > 0.999


def test_a_run_that_took_nothing_down_is_exported_too(runs, tmp_path):
    """As runs of earlier versions have; what is still to be seen of the teacher counts."""
    copy = shutil.copytree(runs.unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("export", FOLDER))
    out = export(FinishedRun.open(copy))
    assert metadata_load(out / "README.md")["license"] == "apache-2.0" and (out / "NOTICE").is_file()
    recipe = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(re.sub(r'^(model|corpus) = "[^"]*"', r'\1 = "/nowhere"', recipe, flags=re.M))
    out = export(FinishedRun.open(copy))
    front = metadata_load(out / "README.md")
    assert front["license"] == "unknown" and "language" not in front and not (out / "NOTICE").exists()
    assert "Unknown: neither a card nor a LICENSE" in (out / "README.md").read_text()


def test_a_damaged_record_writes_nothing_elsewhere(runs, tmp_path):
    copy = shutil.copytree(runs.unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    record = copy / FOLDER / RECORD
    written = json.loads(record.read_text())
    for wrong in ({"notices": ["../LICENSE"]}, {"notices": ["/etc/passwd"]}, {"license": 3}, {"sources": None}):
        record.write_text(json.dumps({**written, **wrong}))
        with pytest.raises(UserError, match="is damaged"):
            export(FinishedRun.open(copy))
    (copy / FOLDER / "NOTICE").unlink()
    record.write_text(json.dumps(written))
    with pytest.raises(UserError, match="NOTICE is missing"):
        export(FinishedRun.open(copy))
    assert not (copy / "export").exists()


def test_what_a_killed_export_has_left_is_put_right(tmp_path):
    out = tmp_path / "out"
    with folder.aside(out) as scratch:
        (scratch / "model").mkdir()
        lock = (scratch / "lock").read_text()
        with folder.aside(out):  # another export at the same time leaves it alone
            assert (scratch / "model").is_dir()
    assert list(tmp_path.iterdir()) == [] and lock == "out"
    torn, between = tmp_path / ".minilm-export-torn", tmp_path / ".minilm-export-between"
    for left, inside in ((torn, "model"), (between, "old")):
        (left / inside).mkdir(parents=True)
        (left / "lock").write_text("out")
        (left / inside / "notes.txt").write_text(inside)
    with folder.aside(out):
        assert not torn.exists() and not between.exists()
        assert (out / "notes.txt").read_text() == "old"  # the earlier export, with what lay beside it
    (between / "old").mkdir(parents=True)
    (between / "lock").write_text("out")
    (between / "old" / "notes.txt").write_text("another's")
    with folder.aside(out):
        assert between.exists()  # both are there: nobody but the user can tell what is in it
    assert (between / "old" / "notes.txt").read_text() == "another's"


def test_what_lay_beside_an_export_that_was_killed_at_the_last_moment_is_put_back(tmp_path):
    out, left = tmp_path / "out", tmp_path / ".minilm-export-x"
    for root in (out, left / "old"):
        root.mkdir(parents=True)
        (root / "config.json").write_text(root.name)
        folder.mark(root, ["config.json"], run="a", step=1, facts={})
    (left / "lock").write_text("out")
    (left / "old" / "figs").mkdir()
    (left / "old" / "figs" / "loss.svg").write_text("mine")
    with folder.aside(out):
        assert (out / "figs" / "loss.svg").read_text() == "mine" and not left.exists()
        assert (out / "config.json").read_text() == "out"


def test_folders_of_others_beside_an_export_are_no_leftovers(tmp_path):
    for name in (".export-photos", ".minilm-export-photos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_text("x")
        (tmp_path / name / "a.jpg").write_text("mine")
    with folder.aside(tmp_path / "out"):
        pass
    assert len(list(tmp_path.glob("*/a.jpg"))) == 2


def test_a_place_where_no_folder_can_be_renamed_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "deep")
    with pytest.raises(UserError, match="you are in"):
        folder.check_place(tmp_path / "out")
    folder.check_place(tmp_path / "out" / "deep" / "new")
    for mount in ("/proc", "/sys"):
        with pytest.raises(UserError, match="is a mount"):
            folder.check_place(Path(mount))
    monkeypatch.setattr(folder.os, "access", lambda *asked: False)  # which root is never told by a folder's mode
    with pytest.raises(UserError, match="nothing can be written in"):
        folder.check_place(tmp_path / "new" / "deeper")


def test_folders_inside_of_an_export_are_its_own_file_by_file(tmp_path):
    out, fresh, elsewhere = tmp_path / "out", tmp_path / "fresh", tmp_path / "elsewhere"
    for root in (out, fresh):
        (root / "onnx").mkdir(parents=True)
        (root / "onnx" / "model.onnx").write_text("ours")
        (root / "config.json").write_text("{}")
        folder.mark(root, folder.files_of(root), run="a", step=1, facts={})
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    (out / "onnx" / "mine.txt").write_text("mine")
    (out / "figures" / "deep").mkdir(parents=True)
    (out / "figures" / "deep" / "loss.svg").write_text("mine")
    (out / "link").symlink_to(elsewhere)
    marker = json.loads((out / folder.MARKER).read_text())
    marker["files"] |= dict.fromkeys(("link/thesis.txt", "../elsewhere/thesis.txt"), "0" * 64)
    (out / folder.MARKER).write_text(json.dumps(marker))
    assert not folder.is_whole(out)
    folder.swap(fresh, out, tmp_path / "old", "a")
    folder.remove(tmp_path / "old")
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    assert kept == {
        *("config.json", "minilm-export.json", "onnx/model.onnx", "onnx/mine.txt", "figures/deep/loss.svg"),
    }
    assert (out / "link").is_symlink() and (elsewhere / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "old").exists()
    (out / "onnx" / "model.onnx").write_text("changed")
    with pytest.raises(UserError, match="onnx/model.onnx in .* was changed"):
        folder.check_replaceable(out, "a")
