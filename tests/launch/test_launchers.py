"""Every way to start ranks on two machines, with the losses of the same two ranks on one."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.nodes import ROOT
from tests.read import losses_of

SCRIPT = ROOT / "launch" / "distill.sh"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
in_ci = pytest.mark.slow
elsewhere = [pytest.mark.launchers, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def alone(toy_overrides, tmp_path_factory):
    """Losses of two ranks on this machine."""
    output = tmp_path_factory.mktemp("alone") / "run"
    command = ["bash", SCRIPT, "--num_gpus", "2", "--recipe", "demo", *toy_overrides, f"run.output={output}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, timeout=240)
    return losses_of(output)


@pytest.fixture
def job(nodes, toy_overrides, alone, tmp_path):
    """Run a launcher's words and the script's on the first node, or on all; its losses are those of one machine."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    arguments = ["--recipe", "demo", *toy_overrides, f"run.output={tmp_path / 'run'}"]

    def run(*words, on=("node1",), **environment):
        logs = {node: tmp_path / f"{node}.log" for node in on}
        started = [
            nodes.start(node, *(str(w).format(number=n) for w in (*words, *arguments)), log=logs[node], **environment)
            for n, node in enumerate(on)
        ]
        codes = [process.wait(300) for process in started]
        said = "\n".join(log.read_text() for log in logs.values())
        assert codes == [0] * len(on), said
        assert losses_of(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
        return said

    run.hosts = ["--hostfile", tmp_path / "hosts"]
    return run


@in_ci
def test_pdsh(job):
    job("bash", SCRIPT, *job.hosts)


@in_ci
def test_no_ssh_with_the_very_words_of_the_kubernetes_job(job, nodes, tmp_path):
    *_, config, work = yaml.safe_load_all((ROOT / "launch" / "k8s.yaml").read_text())
    (container,) = work["spec"]["template"]["spec"]["containers"]
    words = [word for word in container["args"] if not re.match("--recipe|[a-z]+[.]", word)]
    hosts = config["data"]["hosts"].replace("slots=8", "slots=1")
    for node in nodes.names:
        nodes.run(node, "mkdir", "-p", "/tmp/distill")
        nodes.run(node, "tee", "/tmp/distill/hosts", text=hosts)
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "{number}").replace("/etc/", "/tmp/") for word in words]
    assert "--node_rank={number}" in words
    job("bash", SCRIPT, *words, on=nodes.names)


@pytest.mark.parametrize("launcher", [pytest.param(name, marks=elsewhere) for name in ("openmpi", "mpich", "impi")])
def test_deepspeeds_launcher(launcher, job, tmp_path):
    """Intel's mpirun is not free: MPICH's stands for it, from which it comes and whose options it takes."""
    job("bash", SCRIPT, *job.hosts, "--launcher", launcher, **AS_ROOT, first=path_with_mpirun(launcher, tmp_path))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=elsewhere) for kind in ("openmpi", "mpich")])
def test_mpirun_itself(kind, job, tmp_path):
    hosts = ["-np", "2", "--host", "node1,node2", "-x", "MASTER_ADDR=node1", "-x", "PATH"]
    if kind == "mpich":
        hosts = ["-n", "2", "-ppn", "1", "-hosts", "node1,node2", "-genv", "MASTER_ADDR", "node1"]
    job("mpirun", *hosts, "bash", SCRIPT, **AS_ROOT, first=path_with_mpirun(kind, tmp_path))


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_torchrun_starts_all_again_when_a_rank_is_killed(job, nodes, toy_overrides, tmp_path):
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
    words += ["--rdzv-id=1", "--rdzv-endpoint=node1:29400", SCRIPT]
    job(*words, on=nodes.names)
    shutil.rmtree(tmp_path / "run")
    log = tmp_path / "log.txt"
    more = ["--recipe", "demo", *toy_overrides, "optimizer.steps=100000", "checkpoint.every_steps=2"]
    more += [f"run.output={tmp_path / 'run'}", "--stop-at=60"]
    both = [nodes.start(node, *words, *more, log=log) for node in nodes.names]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/*/complete.json")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    nodes.processes("node2", str(SCRIPT), "optimizer.steps=100000")[-1].kill()
    assert [process.wait(240) for process in both] == [0, 0], log.read_text()
    assert "resumed from step" in log.read_text() and max(losses_of(tmp_path / "run")) == 60


def path_with_mpirun(launcher, folder):
    """A folder with the mpirun of a library; both are packages of Debian."""
    found = shutil.which("mpirun.openmpi" if launcher == "openmpi" else "mpirun.mpich")
    if found is None:
        pytest.skip(f"needs the mpirun of {launcher}")
    (folder / "bin").mkdir()
    (folder / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {found} "$@"\n')
    (folder / "bin" / "mpirun").chmod(0o755)
    return str(folder / "bin")
