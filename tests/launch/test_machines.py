"""Two machines: DeepSpeed's launcher over pdsh and ssh, both of them this machine under two names."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.training.metrics import read_metrics
from tests.conftest import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "distill.sh"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SSHD and shutil.which("pdsh")), reason="needs pdsh and openssh-server"),
]


@pytest.fixture
def machines(tmp_path, port):
    """The environment of a login shell from which `ssh node1` and `ssh node2` work, and a host file."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    server = dict(Port=port, ListenAddress="127.0.0.1", HostKey=tmp_path / "host", StrictModes="no", UsePAM="no")
    server |= dict(AuthorizedKeysFile=tmp_path / "user.pub", PidFile="none", PermitRootLogin="yes")
    options = [word for key, value in server.items() for word in ("-o", f"{key}={value}")]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    client = dict(HostName="127.0.0.1", Port=port, IdentityFile=tmp_path / "user", StrictHostKeyChecking="no")
    client |= dict(UserKnownHostsFile="/dev/null", LogLevel="ERROR")
    (tmp_path / "config").write_text("Host node1 node2\n" + "".join(f"  {k} {v}\n" for k, v in client.items()))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/config "$@"\n')
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    daemon = subprocess.Popen([SSHD, "-D", "-f", "/dev/null", *options])
    yield {**os.environ, "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    daemon.terminate()
    daemon.wait(10)


def start(folder, environment, *arguments, before=()):
    command = [*before, "bash", SCRIPT, "--hostfile", folder / "hosts", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", "--recipe", "demo", *arguments, f"run.output={folder / 'run'}"]
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)


def test_two_machines_train_as_one_and_stop_together(machines, runs, small_run, tmp_path):
    log = tmp_path / "log.txt"
    assert start(tmp_path, machines, *small_run).wait(200) == 0, log.read_text()
    ours, theirs = ([r["loss"] for r in read_metrics(folder, "train")] for folder in (tmp_path / "run", runs.unbroken))
    assert ours == pytest.approx(theirs, rel=1e-4)

    shutil.rmtree(tmp_path / "run")
    job = start(tmp_path, machines, *small_run, "optimizer.steps=100000", "checkpoint.every_steps=100000")
    wait_for_a_step(tmp_path, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75, log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("*/complete.json"))
    assert not processes(tmp_path)


def test_a_job_started_from_a_third_machine_can_be_stopped(machines, small_run, tmp_path):
    """Its supervisor sees no rank: it lives in a process namespace of its own, they do not."""
    log, apart = tmp_path / "log.txt", ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    overrides = [*small_run, "optimizer.steps=100000", "checkpoint.every_steps=100000"]
    job = start(tmp_path, machines, *overrides, before=apart)
    wait_for_a_step(tmp_path, job)
    (supervisor,) = [p for p in processes(tmp_path) if "--launch" in p.cmdline() and "unshare" not in p.cmdline()]
    supervisor.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75, log.read_text()
    assert not psutil.wait_procs(processes(tmp_path), timeout=40)[1], log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("*/complete.json")), log.read_text()


@pytest.mark.parametrize("seconds", [2, 4, 5])
def test_a_signal_while_they_start_ends_all(seconds, machines, small_run, tmp_path):
    """While the machines are logged in to, while ranks begin, while they load."""
    job = start(tmp_path, machines, *small_run)
    time.sleep(seconds)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75, (tmp_path / "log.txt").read_text()
    assert not psutil.wait_procs(processes(tmp_path), timeout=20)[1]


def processes(folder):
    """Of the job whose run lies in this folder."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if f"run.output={folder}" in " ".join(process.info["cmdline"] or [])]


def wait_for_a_step(folder, job):
    deadline = time.monotonic() + 120
    while not read_metrics(folder / "run", "train"):
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.2)
