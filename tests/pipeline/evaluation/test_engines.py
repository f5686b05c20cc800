"""The units of an evaluation wherever they run: in one process, in several, on Ray; killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml

from pipeline.evaluation import study
from tests.hub import serve
from tests.labelled import plan_of

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scores(models, data, tmp_path_factory):
    """Of all units, computed in this process: what every other way has to give."""
    planned = plan_of(models, data, tmp_path_factory.mktemp("here"), "text:text,retr:retrieval", seeds=2)
    return scores_of(study.run(planned, workers=0, say=lambda line: None))


def scores_of(done):
    return {(unit.model.name, unit.task.name, unit.lr, unit.seed): record["scores"] for unit, record in done.items()}


def test_several_processes_give_the_same(models, data, scores, tmp_path):
    planned = plan_of(models, data, tmp_path, "text:text,retr:retrieval", seeds=2)
    assert scores_of(study.run(planned, workers=2, say=lambda line: None)) == scores


def test_a_ray_cluster_gives_the_same(models, data, scores, tmp_path):
    """Without GPUs, on two nodes."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        planned = plan_of(models, data, tmp_path, "text:text,retr:retrieval", seeds=2)
        done = study.run(planned, engine="ray", ray_address=cluster.address, say=lambda line: None)
    finally:
        cluster.shutdown()
    assert scores_of(done) == scores


def test_killed_with_9_the_same_command_goes_on(models, data, tmp_path):
    command = [sys.executable, "-c", "from launch.cli import main; main()", "evaluate", models[0].folder]
    command += ["--tasks", "text:text", "--data", data, "--lr", "1e-3", "--seeds", "4", "--out", tmp_path / "out"]
    start = dict(
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process = subprocess.Popen(list(map(str, command)), start_new_session=True, **start)

    def whole():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "units").rglob("*.json")}

    deadline = time.monotonic() + 120
    while not whole():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = whole()
    assert 1 <= len(before) < 4
    done = subprocess.run(list(map(str, command)), timeout=240, **start)
    assert done.returncode == 0, done.stdout
    assert before.items() <= whole().items() and len(whole()) == 4
    assert (tmp_path / "out" / "results.md").is_file()


def test_models_and_data_from_the_hub(models, data, tmp_path):
    """A data set as GLUE lies there: a configuration a task, labels that are numbers; fetched once, then offline."""
    glue = tmp_path / "glue"
    for split, name in (("train", "train"), ("validation", "test")):
        rows = [json.loads(line) for line in (data / "pair" / f"{name}.jsonl").read_text().splitlines()]
        table = datasets.Dataset.from_list([{**row, "idx": number} for number, row in enumerate(rows)])
        table = table.cast_column("label", datasets.ClassLabel(names=["entailment", "not_entailment"]))
        (glue / "rte").mkdir(parents=True, exist_ok=True)
        table.to_parquet(glue / "rte" / f"{split}-00000-of-00001.parquet")
    files = [dict(split=split, path=f"rte/{split}-*") for split in ("train", "validation")]
    card = dict(configs=[dict(config_name="rte", data_files=files)])
    (glue / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    with serve({"models/someone/toy": Path(models[0].folder), "datasets/nyu-mll/glue": glue}) as hub:
        words = ["--tasks", "rte", "--lr", "1e-3", "--seeds", "1", "--epochs", "1", "--out", tmp_path / "out"]
        command = [sys.executable, "-c", "from launch.cli import main; main()", "evaluate", "someone/toy", *words]
        online = {**os.environ, **hub.environment(tmp_path / "cache")}
        for environment in (online, online | {"HF_HUB_OFFLINE": "1"}):
            done = subprocess.run(
                list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads((tmp_path / "out" / "results.json").read_text())["lines"]
    assert (line["task"], line["split"], line["examples"]) == ("rte", "validation", 40)
    assert len(list((tmp_path / "out" / "units").rglob("*.json"))) == 1  # the second time nothing was left to do
