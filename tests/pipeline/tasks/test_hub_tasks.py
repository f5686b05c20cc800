"""Tasks whose data are the hub's own conversion to Parquet: a folder for each configuration, and no list of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.hub import serve

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import json
from pipeline.tasks.sources import Hub
from pipeline.tasks.table import find_task
mlqa, conll = Hub(find_task("mlqa")), Hub(find_task("conll2003"))
found = [mlqa.reported_keys()[:3], mlqa.rows("test", "de"), mlqa.rows("test", "en")]
print(json.dumps([*found, conll.reported_keys(), conll.rows("test", "")]))
"""


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_mlqa_and_conll_of_the_hub(tmp_path):
    for language in ("en", "de"):
        question = {"question": language, "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
        for split in ("test", "validation"):
            put(tmp_path / "mlqa" / f"mlqa.{language}.{language}" / split / "0000.parquet", [question])
    for split in ("train", "validation", "test"):
        put(tmp_path / "conll" / "conll2003" / split / "0000.parquet", [{"tokens": [split], "ner_tags": [1]}])
    there = {"datasets/facebook/mlqa": tmp_path / "mlqa", "datasets/eriktks/conll2003": tmp_path / "conll"}
    with serve(there) as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    mlqa, german, english, conll, words = json.loads(done.stdout.splitlines()[-1])
    assert mlqa == [["test", "en"], ["test", "es"], ["test", "de"]] and conll == [["test", ""]]
    assert [row["question"] for row in (*german, *english)] == ["de", "en"]
    assert words == [{"tokens": ["test"], "ner_tags": [1]}]
