"""A real Slurm of two nodes, both of them this machine: srun starts the ranks, signals save, and a job is requeued."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.read import losses_of

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "distill.sh"
NEEDED = ("slurmctld", "slurmd", "srun", "munged")
NODES = ("n1", "n2")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(shutil.which(name, path=PATH) for name in NEEDED), reason="needs Slurm and munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as which slurmd runs jobs"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which srun and sbatch find a cluster of this test's own."""
    folder = tmp_path_factory.mktemp("slurm")
    port = free_port()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    files = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    munge = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
    command = ["munged", "--force", "--foreground", f"--key-file={folder}/key", *munge]
    running = [subprocess.Popen(command, env={"PATH": PATH})]
    settings = f"""
        ClusterName=test
        MpiDefault=none
        SlurmctldHost={socket.gethostname()}(127.0.0.1)
        SlurmctldPort={port}
        SlurmUser=root
        AuthInfo=socket={files["socket"]}
        CredType=cred/munge
        ProctrackType=proctrack/pgid
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool-%n
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd-%n.pid
        KillWait=60
    """.replace("    ", "")
    settings += f"NodeName={','.join(NODES)} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 "
    settings += f"Port=[{port + 1}-{port + 2}]\n"
    settings += "PartitionName=all Nodes=ALL Default=YES State=UP\n"
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(settings)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    environment["MASTER_ADDR"] = "127.0.0.1"  # the names of these nodes have no address
    daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    try:
        wait_until(files["socket"].exists)
        for command in daemons:
            log = (folder / "log.txt").open("a")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_until(lambda: ask(environment, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", folder / "log.txt")
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "-u", "root"], env=environment, capture_output=True)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(condition, log=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log and log.exists() else "too late"
        time.sleep(0.2)


def ask(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def test_srun_starts_ranks_of_one_job_on_both_nodes(cluster, toy_overrides, tmp_path):
    arguments = ["--recipe", "demo", *toy_overrides]
    command = ["srun", "-N2", "-n2", "bash", SCRIPT, *arguments, f"run.output={tmp_path / 'srun'}"]
    done = subprocess.run(list(map(str, command)), env=cluster, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = ["bash", SCRIPT, "--num_gpus", "2", *arguments, f"run.output={tmp_path / 'alone'}"]
    subprocess.run(list(map(str, alone)), env=cluster, check=True, capture_output=True, timeout=180)
    assert losses_of(tmp_path / "srun") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-5)


def test_an_array_trains_a_value_a_task(cluster, toy_overrides, tmp_path):
    options = ["--wait", "--array=0-1", "--nodes=1", "--ntasks-per-node=1"]
    options += [f"--output={tmp_path}/log-%a.txt", f"--chdir={SCRIPT.parents[1]}"]
    arguments = ["--recipe", "demo", *toy_overrides, "--vary", "optimizer.peak_lr=1e-3,1e-4"]
    batch = ["sbatch", *options, SCRIPT.with_name("slurm.sbatch"), *arguments, f"run.output={tmp_path / 'sweep'}"]
    environment = {**cluster, "MINILM_PROJECT": str(SCRIPT.parents[1])}
    done = subprocess.run(list(map(str, batch)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "".join(path.read_text() for path in tmp_path.glob("log-*.txt"))
    fast, slow = (losses_of(tmp_path / "sweep" / f"optimizer.peak_lr={lr}") for lr in ("1e-3", "1e-4"))
    assert len(fast) == len(slow) == 6 and fast[6] < slow[6]


def test_a_warning_before_the_end_saves_and_the_job_is_requeued_and_goes_on(cluster, toy_overrides, tmp_path):
    long = ["optimizer.steps=100000", "checkpoint.every_steps=100000", f"run.output={tmp_path / 'run'}"]
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log.txt", f"--chdir={SCRIPT.parents[1]}"]
    batch = [
        "sbatch",
        "--parsable",
        *options,
        SCRIPT.with_name("slurm.sbatch"),
        "--recipe",
        "demo",
        *toy_overrides,
        *long,
    ]
    log, checkpoints = tmp_path / "log.txt", tmp_path / "run" / "checkpoints"
    job = ask({**cluster, "MINILM_PROJECT": str(SCRIPT.parents[1])}, *map(str, batch)).strip()

    def steps():
        return len(losses_of(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0

    wait_until(lambda: steps() > 2, log, 120)
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)
    wait_until(lambda: list(checkpoints.glob("*/complete.json")), log)
    (saved,) = [int(path.parent.name.removeprefix("step-")) for path in checkpoints.glob("*/complete.json")]
    wait_until(lambda: "PENDING" in ask(cluster, "scontrol", "show", "job", job), log)
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=cluster, check=True)
    wait_until(lambda: f"resumed from step {saved} " in log.read_text() and steps() > saved, log, 180)
    subprocess.run(["scancel", job], env=cluster, check=True)
    wait_until(lambda: not ask(cluster, "squeue", "-h").strip(), log)
