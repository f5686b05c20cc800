"""Every way to start ranks on two machines, and on four, with the losses of as many ranks on one."""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.supervise import for_a_shell
from tests.conftest import free_port
from tests.launch import nodes as machines
from tests.launch.nodes import ROOT
from tests.read import losses_of

SCRIPT = ROOT / "launch" / "distill.sh"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
in_ci = pytest.mark.slow
elsewhere = [pytest.mark.launchers, pytest.mark.exhaustive]


def losses_alone(ranks, overrides, output):
    """Losses of ranks on this machine."""
    command = ["bash", SCRIPT, f"--num_gpus={ranks}", f"--master_port={free_port()}", "--recipe", "demo", *overrides]
    command.append(f"run.output={output}")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, timeout=240)
    return losses_of(output)


@pytest.fixture(scope="module")
def alone(toy_overrides, tmp_path_factory):
    return losses_alone(2, toy_overrides, tmp_path_factory.mktemp("alone") / "run")


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

    run.arguments = arguments
    run.hosts = ["--hostfile", tmp_path / "hosts"]
    return run


@pytest.fixture
def corpus(toy_overrides):
    return next(Path(word.partition("=")[2]) for word in toy_overrides if word.startswith("data.corpus="))


@in_ci
def test_pdsh(job, corpus):
    """Words with a shell's characters arrive as they are, and so does what they are about."""
    job.arguments.append(f"data.corpus=${{{{MINILM_HOME}}}}/{corpus.name}")
    job("bash", SCRIPT, *job.hosts, MINILM_HOME=str(corpus.parent))


@in_ci
def test_words_pass_deepspeed_and_the_other_machines_shell_as_they_are():
    from deepspeed.launcher.multinode_runner import PDSHRunner

    words = ["data.corpus=${HOME}/a", "run.output=a b/$HOME", 'a=["b", "c"]', 'a=["b"]', "it's", "`a` \\ b", "(a;b)*"]
    arguments = argparse.Namespace(user_args=[for_a_shell(word) for word in words], user_script="")
    line = " ".join(["printf '%s\\n'", *PDSHRunner(arguments, "").user_arguments])
    assert subprocess.check_output(["bash", "-c", line], text=True).splitlines() == words


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


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_deepspeed_itself_and_a_variable_that_it_does_not_hand_on(job, nodes, corpus, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "corpus").symlink_to(corpus)
    job.arguments[:] = [word for word in job.arguments if not word.startswith("data.corpus=")]
    log, words = tmp_path / "log.txt", ["deepspeed", *job.hosts, "--master_addr", "node1", SCRIPT]
    home = dict(MINILM_HOME=str(tmp_path))
    assert nodes.start("node1", *words, *job.arguments, log=log, **home).wait(240) == 2, log.read_text()
    said = log.read_text()
    assert "MINILM_HOME is not set there" in said and "it stands in ~/.deepspeed_env" in said, said
    assert "Traceback" not in said
    (tmp_path / "variables").write_text(f"MINILM_HOME={tmp_path}\n")
    job(*words, DS_ENV_FILE=str(tmp_path / "variables"), **home)


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_a_hostfile_of_one_machine_that_is_another(job, tmp_path):
    (tmp_path / "hosts").write_text("node2 slots=2\n")
    said = job("bash", SCRIPT, *job.hosts)
    assert "node2: done" in said and "node1:" not in said


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_four_machines_train_as_one_and_end_for_a_mistake_of_one(toy_overrides, corpus, tmp_path_factory, tmp_path):
    if reason := machines.reason_not_to():
        pytest.skip(reason)
    nodes = machines.Nodes(tmp_path_factory.mktemp("nodes"), count=4, shared=(tmp_path_factory.getbasetemp(),))
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in nodes.names))
    words = ["bash", SCRIPT, "--hostfile", tmp_path / "hosts", "--recipe", "demo", *toy_overrides]
    with contextlib.closing(nodes):
        done = nodes.run("node1", *words, f"run.output={tmp_path / 'run'}")
        assert done.returncode == 0, done.stdout + done.stderr
        alone = losses_alone(4, toy_overrides, tmp_path / "alone")
        assert losses_of(tmp_path / "run") == pytest.approx(alone, rel=1e-5)

        nodes.run("node4", "mount", "-t", "tmpfs", "tmpfs", corpus)
        done = nodes.run("node1", *words, f"run.output={tmp_path / 'mistake'}")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
        said = re.findall("^(node.): distill: error: (.*) .rank", done.stderr, re.MULTILINE)
        assert sorted(node for node, _ in said) == nodes.names, done.stderr
        (words,) = {words for _, words in said}
        assert words.startswith(f"{corpus} is not a prepared corpus") and "(rank 3 on node4" in words


def path_with_mpirun(launcher, folder):
    """A folder with the mpirun of a library; both are packages of Debian."""
    found = shutil.which("mpirun.openmpi" if launcher == "openmpi" else "mpirun.mpich")
    if found is None:
        pytest.skip(f"needs the mpirun of {launcher}")
    (folder / "bin").mkdir()
    # By its name: called by its whole path Open MPI puts its own folder, with a python3 in it, first in PATH.
    (folder / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {Path(found).name} "$@"\n')
    (folder / "bin" / "mpirun").chmod(0o755)
    return str(folder / "bin")
