"""Two machines with networks of their own: what happens when a rank is killed, and when a cable is pulled."""

import re
import signal
import sys
import time

import psutil
import pytest

from pipeline.training.metrics import read_metrics
from tests.launch.nodes import ROOT
from tests.read import losses_of

SCRIPT = ROOT / "launch" / "distill.sh"
LONG = ["optimizer.steps=100000", "checkpoint.every_steps=100000"]
LOST_SECONDS = 15
WITHOUT_KEEP_ALIVE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from launch import supervise
supervise.LEAVE_SECONDS, supervise.KEEP_ALIVE = 10, ""
sys.exit(supervise.launch(sys.argv[1:]))
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def start(nodes, toy_overrides, tmp_path):
    """Start a job on both nodes from the first."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    jobs = []

    def begin(*overrides, by=("bash", SCRIPT), node="node1", **environment):
        words = [*by, "--hostfile", tmp_path / "hosts", "--recipe", "demo", *toy_overrides]
        words += [f"run.output={tmp_path / 'run'}", *overrides]
        seconds = {"MINILM_LOST_SECONDS": str(LOST_SECONDS)}
        jobs.append(nodes.start(node, *words, log=tmp_path / "log.txt", **seconds, **environment))
        return jobs[-1]

    yield begin
    for name in nodes.names:
        nodes.plug_in(name)
        for process in nodes.processes(name, str(tmp_path)):
            process.kill()
    for job in jobs:
        job.kill()


def wait_for_steps(folder, job, steps=2):
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "run", "train")) < steps:
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.1)


def ranks(nodes, node, folder):
    return nodes.processes(node, "--local_rank=", f"run.output={folder}")


def test_a_rank_that_is_killed_is_named_in_one_line(nodes, start, tmp_path):
    job, log = start(*LONG), tmp_path / "log.txt"
    wait_for_steps(tmp_path, job)
    (rank,) = ranks(nodes, "node2", tmp_path)
    rank.kill()
    assert job.wait(60) == 74, log.read_text()
    assert log.read_text().count("rank 1 on node2 is gone") == 1 and "Traceback" not in log.read_text()


def test_a_cable_that_is_pulled_ends_both_sides_and_a_restart_goes_on(nodes, start, tmp_path):
    log = tmp_path / "log.txt"
    soon = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=3 -o ServerAliveCountMax=5"}
    job = start(*LONG, "checkpoint.every_steps=2", **soon)
    wait_for_steps(tmp_path, job, 3)
    theirs = ranks(nodes, "node2", tmp_path)
    nodes.cut_off("node2")
    began = time.monotonic()
    while ranks(nodes, "node1", tmp_path) or any(process.is_running() for process in theirs):
        assert time.monotonic() - began < 3 * LOST_SECONDS + 30, log.read_text()
        time.sleep(0.5)
    assert f"rank 1 on node2 gave no sign of life for {LOST_SECONDS} s" in log.read_text()
    assert job.wait(60) == 74, log.read_text()  # ssh has noticed
    nodes.plug_in("node2")
    last = max(losses_of(tmp_path / "run")) + 2
    assert start(*LONG, f"--stop-at={last}").wait(240) == 0, log.read_text()
    assert re.search("resumed from step [0-9]+ ", log.read_text())
    assert max(losses_of(tmp_path / "run")) == last


def test_a_script_that_is_told_to_stop_leaves_a_launcher_that_waits_for_a_lost_machine(nodes, start, tmp_path):
    log = tmp_path / "log.txt"
    job = start(*LONG, by=(sys.executable, "-c", WITHOUT_KEEP_ALIVE, ROOT))
    wait_for_steps(tmp_path, job)
    nodes.cut_off("node2")
    time.sleep(1)
    (supervisor,) = nodes.processes("node1", "import supervise")
    supervisor.send_signal(signal.SIGTERM)
    assert job.wait(3 * LOST_SECONDS + 30) == 74, log.read_text()
    assert "leaving it" in log.read_text()
    assert not psutil.wait_procs(nodes.processes("node1", str(tmp_path)), timeout=10)[1]
