"""Runs that are killed: what is left behind, what the exit code says, and whether the next start goes on from there."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.engine.checkpoint import read_weights
from pipeline.training.metrics import read_metrics
from tests.read import losses_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "distill.sh"
BIN = Path(sys.executable).parent
KILLS = 12  # each at a random moment of a random process, in steps and in saves
LONG = ["optimizer.steps=100000", "checkpoint.every_steps=100000"]
pytestmark = pytest.mark.slow


JOBS: list["Job"] = []  # of the running test


@pytest.fixture(autouse=True)
def nothing_outlives_its_test():
    JOBS.clear()
    yield
    for process in (process for job in JOBS for process in job.processes()):
        process.kill()


class Job:
    """A job under the launch script, its output going to a file."""

    def __init__(self, folder, port, *arguments, start=("bash",)):
        self.log = folder / "log.txt"
        self.output = folder / "run"
        self._mark = f"run.output={self.output}"
        options = ["--num_gpus=2", f"--master_port={port}"]
        begin = [SCRIPT, *options] if start[-1] == "bash" else [*options, SCRIPT]
        command = [*start, *begin, "--recipe", "demo", *arguments, self._mark]
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        JOBS.append(self)

    def wait_for_step(self, step, seconds=120):
        deadline = time.monotonic() + seconds
        while not any(record["step"] >= step for record in read_metrics(self.output, "train")):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def processes(self, *words):
        """Of this job: those whose command line has all the words."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if self._mark in line and all(word in line for word in words):
                found.append(process)
        return found

    def ranks(self):
        return self.processes("--local_rank=")

    def wait_until_gone(self, seconds):
        _, alive = psutil.wait_procs(self.processes(), timeout=seconds)
        assert not alive, self.log.read_text()

    def saved_steps(self):
        records = (self.output / "checkpoints").glob("*/complete.json")
        return sorted(int(record.parent.name.removeprefix("step-")) for record in records)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_and_exits_75(number, small_run, tmp_path, port):
    job = Job(tmp_path, port, *small_run, *LONG)
    job.wait_for_step(3)
    job.process.send_signal(number)
    assert job.process.wait(120) == 75
    job.wait_until_gone(60)
    (step,) = job.saved_steps()
    assert step == max(record["step"] for record in read_metrics(job.output, "train"))


@pytest.mark.parametrize("seconds", [0.5, 6])
def test_a_signal_before_the_first_step_loses_nothing_and_exits_75(seconds, small_run, tmp_path, port):
    job = Job(tmp_path, port, *small_run, *LONG)
    time.sleep(seconds)  # within the launchers' start, and that of the ranks
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(120) == 75, job.log.read_text()
    job.wait_until_gone(60)


TERMINAL = """
import os, pty, signal, sys
child, terminal = pty.fork()
if not child:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it would be ignored under nohup, as a user of nohup wants it
    os.execvp(sys.argv[1], sys.argv[1:])
while os.read(terminal, 65536):
    pass
"""


@pytest.mark.parametrize("launcher", ["bash", "deepspeed"])
def test_a_terminal_that_is_closed_saves(launcher, small_run, tmp_path, port):
    """Standard output is gone by the time there is something to say."""
    job = Job(tmp_path, port, *small_run, *LONG, start=[sys.executable, "-c", TERMINAL, launcher])
    job.wait_for_step(2)
    job.process.kill()
    job.wait_until_gone(60)
    (step,) = job.saved_steps()
    assert step == max(record["step"] for record in read_metrics(job.output, "train"))


@pytest.mark.parametrize("victim", ["deepspeed", "deepspeed.launcher.launch"])
def test_no_orphans_when_a_launcher_is_killed(victim, small_run, tmp_path, port):
    job = Job(tmp_path, port, *small_run, *LONG)
    job.wait_for_step(2)
    (process,) = [p for p in job.processes("--master_port") if _is_launcher(p, victim)]
    process.kill()
    assert job.process.wait(120) == 75
    job.wait_until_gone(60)
    assert job.saved_steps() and re.search("stopping: (the launcher is gone|another rank)", job.log.read_text())


def test_a_killed_rank_ends_the_job_and_a_restart_gives_the_same_weights(runs, small_run, tmp_path, port):
    arguments = [*small_run, "checkpoint.every_steps=2", "--max-restarts=2"]
    job = Job(tmp_path, port, *arguments)
    job.wait_for_step(3)
    job.ranks()[1].kill()
    assert job.process.wait(180) == 0, job.log.read_text()
    assert "starting it again" in job.log.read_text() and "resumed from step" in job.log.read_text()
    ours = read_weights(job.output / "checkpoints" / "step-00000006")
    undisturbed = read_weights(runs.unbroken / "checkpoints" / "step-00000006")
    assert all(torch.equal(ours[name], undisturbed[name]) for name in undisturbed)
    job.wait_until_gone(60)


def test_a_crash_is_not_called_success(small_run, tmp_path, port):
    job = Job(tmp_path, port, *small_run, *LONG)
    job.wait_for_step(2)
    job.ranks()[0].kill()
    assert job.process.wait(120) not in (0, 2, 75)
    job.wait_until_gone(60)


def _is_launcher(process, victim):
    words = [Path(word).name for word in process.cmdline()[:5]]
    return victim in words


def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_needed(small_run, tmp_path, port):
    """On a file system of its own, of 260 MB: room for two checkpoints of about 110 MB, not for three."""
    (tmp_path / "disk").mkdir()
    arguments = [*small_run, "checkpoint.every_steps=2", f"run.output={tmp_path / 'disk' / 'run'}"]
    start = ["bash", SCRIPT, "--num_gpus=2", f"--master_port={port}", "--recipe", "demo", *arguments]
    inside = (
        'mount -t tmpfs -o size=260m tmpfs "$1" && shift && "$@"; code=$?; find "$DISK" -name complete.json; exit $code'
    )
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", inside, "bash", tmp_path / "disk", *start]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DISK": str(tmp_path / "disk")}
    process = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 2, process.stdout + process.stderr
    assert re.search("is too full to save: a checkpoint takes about [0-9]+ MB", process.stderr)
    assert "Traceback" not in process.stderr
    kept = re.findall("step-0*([0-9]+)/complete.json", process.stdout)
    assert kept and "6" not in kept


def test_chaos_of_kills_and_the_same_weights(small_run, distill, tmp_path, port):
    """Kill a rank, the launcher or the supervisor at random moments, in steps and in saves, and start again."""
    length = ["optimizer.steps=60", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "logging.every_steps=1"]
    distill(tmp_path / "undisturbed", *length)
    chance = random.Random(1)
    (tmp_path / "chaos").mkdir()
    kills = 0
    while True:
        job = Job(tmp_path / "chaos", port, *small_run, *length)
        if kills < KILLS:
            start = len(read_metrics(job.output))
            deadline = time.monotonic() + 60
            while len(read_metrics(job.output)) <= start and job.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)  # until it takes steps: kills during start-up prove little and cost as much
            time.sleep(chance.uniform(0, 1.0))
            if victims := job.processes():
                chance.choice(victims).kill()
                kills += 1
        code = job.process.wait(180)
        job.wait_until_gone(60)
        if code == 0:
            break
        assert kills, job.log.read_text()
    ours, theirs = (
        read_weights(folder / "checkpoints" / "step-00000060") for folder in (job.output, tmp_path / "undisturbed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses_of(job.output) == losses_of(tmp_path / "undisturbed")
    print(f"{kills} kills")
