"""Names of models and datasets on the hub in the place of folders, with the real client libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import metadata_load

from data_prep.shards import Corpus
from pipeline.training.metrics import read_metrics
from tests.hub import serve

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
configs:
- config_name: 20231101.en
  data_files:
  - split: train
    path: 20231101.en/train-*
---
"""


@pytest.fixture
def texts(samples):
    with samples.leads().open() as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(3000), strict=False)]


@pytest.fixture
def dataset(texts, tmp_path):
    """A repository as that of Wikipedia: a configuration a language, a split in several files."""
    folder = tmp_path / "dataset"
    (folder / "20231101.en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number in range(3):
        rows = pyarrow.table({"text": texts[number * 1000 : (number + 1) * 1000]})
        pyarrow.parquet.write_table(rows, folder / "20231101.en" / f"train-{number:05d}-of-00003.parquet")
    return folder


@pytest.fixture
def hub(samples, dataset):
    with serve({"models/someone/teacher": samples.teacher, "datasets/someone/wikipedia": dataset}) as server:
        yield server


PREPARE = """
import sys
from pathlib import Path
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
if __name__ == "__main__":
    request = PrepareRequest(
        tokenizer="someone/teacher", sources=tuple(map(Source.parse, sys.argv[2:])), unit_bytes=100_000
    )
    try:
        prepare(request, Path(sys.argv[1]), workers=2, show_progress=False)
    except UserError as error:
        sys.exit(str(error))
"""
WIKIPEDIA = "hub,config=20231101.en,language=en:someone/wikipedia"


def prepare(hub, out, *sources, **environment):
    (out.parent / "prepare.py").write_text(PREPARE)
    return subprocess.run(
        [sys.executable, out.parent / "prepare.py", out, *sources],
        env={**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(out.parent / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_dataset_is_asked_for_once_however_many_units_it_has(hub, texts, tmp_path):
    process = prepare(hub, tmp_path / "corpus", WIKIPEDIA)
    assert process.returncode == 0, process.stderr
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.manifest.counts["wikipedia"]["documents"] == len(texts)
    assert len([request for request in hub.requests if "dataset_infos.json" in request]) == 1

    process = prepare(hub, tmp_path / "offline", WIKIPEDIA, HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stderr
    assert Corpus.open(tmp_path / "offline").manifest.shards == corpus.manifest.shards


@pytest.mark.slow
def test_a_dataset_that_changed_meanwhile_is_not_mixed_in(hub, dataset, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no record")
    process = prepare(hub, tmp_path / "corpus", WIKIPEDIA, f"jsonl:{bad}")
    assert "not valid JSON" in process.stderr
    (dataset / "20231101.en" / "train-00002-of-00003.parquet").unlink()
    process = prepare(hub, tmp_path / "corpus", WIKIPEDIA, f"jsonl:{bad}")
    assert "the input of wikipedia changed since" in process.stderr and "not valid JSON" in process.stderr
    bad.write_text('{"text": "a record"}')
    process = prepare(hub, tmp_path / "corpus", WIKIPEDIA, f"jsonl:{bad}")
    assert process.returncode == 0, process.stderr
    assert Corpus.open(tmp_path / "corpus").manifest.counts["wikipedia"]["documents"] == 2000


@pytest.mark.slow
def test_a_run_with_a_teacher_from_the_hub(hub, samples, distill, tmp_path, monkeypatch):
    """Under ZeRO-3, whose loading is our own; the exported student needs no hub."""
    for name, value in hub.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    run, teacher = tmp_path / "run", ["teacher.model=someone/teacher", "teacher.placement=zero3"]
    distill(run, *teacher, "optimizer.steps=2", "checkpoint.every_steps=2")
    assert [record["step"] for record in read_metrics(run, "train")] == [1, 2]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", "from launch.cli import main; main()", "export", run]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (run / "export" / "model.safetensors").is_file()
    front = metadata_load(run / "export" / "README.md")
    assert (front["base_model"], front["base_model_relation"]) == ("someone/teacher", "finetune")
    assert front["license"] == "apache-2.0" and (run / "export" / "NOTICE").is_file()
