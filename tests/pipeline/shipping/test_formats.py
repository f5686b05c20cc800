"""The folder as other libraries take it: sentence-transformers, onnxruntime, and the hub."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from launch import cli
from pipeline.encoders.architectures import ARCHITECTURES
from pipeline.results.export import Options, exported
from pipeline.results.export import export as export_run
from pipeline.shipping import folder, onnx_files
from pipeline.shipping.huggingface import load_exported
from pipeline.training.run_folder import FinishedRun
from tests.hub import serve
from tests.pipeline.shipping.test_huggingface import make_student, teachers  # noqa: F401

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["Alan Turing was born in London.", "word " * 100, "yes"]


def last_hidden_state(model_folder, texts):
    tokens = AutoTokenizer.from_pretrained(model_folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return tokens, load_exported(model_folder)(**tokens).last_hidden_state


@pytest.mark.slow
def test_sentence_transformers_takes_the_folder(runs, tmp_path):
    from sentence_transformers import CrossEncoder, SentenceTransformer, losses

    out = export_run(FinishedRun.open(runs.unbroken), tmp_path / "out", Options(sentence_transformers=True))
    model = SentenceTransformer(str(out), device="cpu")
    assert model.max_seq_length == 32
    tokens, hidden = last_hidden_state(out, TEXTS)
    mask = tokens["attention_mask"][..., None]
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), (hidden * mask).sum(1) / mask.sum(1))
    features = [model.tokenize(TEXTS[:2]), model.tokenize(TEXTS[1:])]
    features = [{name: value for name, value in batch.items() if torch.is_tensor(value)} for batch in features]
    losses.CosineSimilarityLoss(model)(features, torch.tensor([0.1, 0.9])).backward()
    assert model[0].auto_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    for one in (out, export_run(FinishedRun.open(runs.unbroken), tmp_path / "plain")):
        pair = CrossEncoder(str(one), num_labels=1, device="cpu")
        assert pair.predict([("a question", "an answer")]).shape == (1,)


@pytest.mark.slow
def test_onnx_files_compute_what_the_model_does(runs, tmp_path):
    import onnxruntime

    run = FinishedRun.open(runs.unbroken)
    out = export_run(run, options=Options(onnx=True, dtype="bf16"), out=tmp_path / "run" / "export")
    plain = export_run(run, tmp_path / "plain")
    card = (out / "README.md").read_text()
    assert "| ONNX int8 |" in card and "PyTorch fp32" in card and "mean cosine" in card and "\n- onnx\n" in card
    session = onnxruntime.InferenceSession(out / onnx_files.FP32)
    assert [i.name for i in session.get_inputs()] == ["input_ids", "token_type_ids", "attention_mask"]
    for texts in (TEXTS, TEXTS[:1], ["yes"] * 7):  # other numbers of rows and positions than it was made with
        tokens, hidden = last_hidden_state(plain, texts)
        (theirs,) = session.run(None, {name: value.numpy() for name, value in tokens.items()})
        real = tokens["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(theirs)[real], hidden[real], rtol=0, atol=onnx_files.FP32_TOLERANCE)
    whole, quantized = ((out / name).stat().st_size for name in (onnx_files.FP32, onnx_files.INT8))
    assert quantized < 0.3 * whole and folder.is_whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_becomes_onnx(kind, teachers, tmp_path, monkeypatch):  # noqa: F811
    if kind == "electra":  # as of students beyond a gigabyte
        monkeypatch.setattr(onnx_files, "_ONE_FILE", 0)
    student = make_student(teachers(kind), tmp_path)
    facts = onnx_files.write(student.backbone, tmp_path, seq_tokens=32)
    assert facts["difference"] <= onnx_files.FP32_TOLERANCE and facts["cosine"] > 0.9
    assert (tmp_path / f"{onnx_files.FP32}.data").exists() == (kind == "electra")


def test_a_file_that_computes_something_else_is_not_handed_over(teachers, tmp_path, monkeypatch):  # noqa: F811
    student = make_student(teachers("bert"), tmp_path)

    class Other:
        def __init__(self, path, names):
            self.off = 0.5 if path.name == "model.onnx" else -2.0

        def __call__(self, *inputs):
            with torch.no_grad():
                hidden = student.backbone(inputs[0], attention_mask=inputs[2]).last_hidden_state
            return hidden * self.off

    for name in ("_export", "_quantize"):
        monkeypatch.setattr(onnx_files, name, lambda *paths: paths[-1].write_bytes(b"onnx"))
    monkeypatch.setattr(onnx_files, "_Session", Other)
    with pytest.raises(RuntimeError, match="onnx/model.onnx differs from the model"):
        onnx_files.write(student.backbone, tmp_path, seq_tokens=32)
    monkeypatch.setattr(onnx_files, "FP32_TOLERANCE", 99.0)
    for path in (tmp_path / "onnx").iterdir():
        path.unlink()
    (tmp_path / "onnx").rmdir()
    facts = onnx_files.write(student.backbone, tmp_path, seq_tokens=32)
    assert not facts["int8"] and [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    assert "no int8 file" in onnx_files.note(facts) and len(onnx_files.rows(facts)) == 3


def test_options_without_their_libraries_are_refused_before_anything_is_made(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = CliRunner().invoke(cli.minilm, ["export", str(runs.unbroken), "--onnx", "--out", str(tmp_path / "out")])
    assert "pip install 'minilmv2-deepspeed[onnx]'" in str(result.exception) and not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli.minilm, ["export", str(runs.unbroken), "--push-to-hub", "a/b/c"])
    assert "is no name of a repository" in str(result.exception)
    result = CliRunner().invoke(cli.minilm, ["export", str(runs.unbroken), "--public"])
    assert "give --push-to-hub REPO too" in str(result.exception)


PUSH = "import sys; from launch.cli import main; sys.argv[0] = 'minilm'; main()"


def push(hub, cache, run, *arguments):
    command = [sys.executable, "-c", PUSH, "export", str(run), "--push-to-hub", "someone/student", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(cache), "HF_TOKEN": "hf_of_the_tests"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_what_is_pushed_is_what_was_exported_and_nothing_beside_it(runs, tmp_path):
    out = export_run(FinishedRun.open(runs.unbroken), tmp_path / "out")
    (out / "thesis.txt").write_text("mine")
    with serve({}, uploads=tmp_path / "uploads") as hub:
        process = push(hub, tmp_path / "cache", runs.unbroken, "--out", str(out))
        assert process.returncode == 0, process.stderr
        made = hub.repositories["models/someone/student"]
        assert hub.created == {"someone/student": "private"}
    assert "pushed to http" in process.stdout
    pushed = folder.files_of(made)
    assert pushed == sorted(folder.read_marker(out)["files"]) and "thesis.txt" not in pushed
    assert all((made / name).read_bytes() == (out / name).read_bytes() for name in pushed)


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_folder_and_says_so(runs, tmp_path):
    with serve({}) as hub:  # takes nothing
        process = push(hub, tmp_path / "cache", runs.unbroken, "--out", str(tmp_path / "out"))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "is whole, but was not pushed to someone/student" in process.stderr and folder.is_whole(tmp_path / "out")


def test_evaluation_keeps_what_was_asked_for(runs, tmp_path):
    run = FinishedRun.open(shutil.copytree(runs.unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    out = export_run(run, options=Options(sentence_transformers=True))
    other = FinishedRun.open(run.folder, step=3)
    assert exported(other) == out and (out / "1_Pooling" / "config.json").is_file()
