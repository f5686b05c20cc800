"""The launch script in each way that people start it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "distill.sh"
BIN = Path(sys.executable).parent


def start(command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", **environment}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_the_shell_accepts_it():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


def test_python_accepts_it():
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")


@pytest.mark.parametrize(
    "command",
    [
        ["deepspeed", "--master_port={port}", "{script}", "--recipe", "no such recipe"],
        ["bash", "{script}", "--num_gpus", "2", "--master_port={port}", "--recipe", "no such recipe"],
        ["torchrun", "--standalone", "--nproc-per-node=2", "{script}", "--recipe", "no such recipe"],
    ],
    ids=["deepspeed", "bash", "torchrun"],
)
def test_every_way_of_starting_reaches_python_with_its_arguments(command, port, tmp_path):
    """From a foreign folder and through a symbolic link with a space in its name; the spaces of arguments survive."""
    link = tmp_path / "a link.sh"
    link.symlink_to(SCRIPT)
    process = start([word.format(script=link, port=port) for word in command], cwd=tmp_path)
    assert "there is no recipe 'no such recipe'" in process.stderr
    assert process.stderr.count("distill: error") == 1
    if command[0] != "torchrun":  # torchrun turns every failure into 1
        assert process.returncode == 2


def test_launcher_options_behind_the_script_are_explained(tmp_path):
    process = start(["python3", SCRIPT, "--recipe", "demo", "--num_gpus", "2"], cwd=tmp_path)
    assert process.returncode == 2 and "--num_gpus belongs to the launcher" in process.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--num_gpus"], "--num_gpus needs a value"), (["--max-restarts", "some"], "takes a number, not 'some'")],
)
def test_launcher_options_with_a_wrong_value_are_refused(words, message, tmp_path):
    process = start(["bash", SCRIPT, "--recipe", "demo", *words], cwd=tmp_path)
    assert process.returncode == 2 and message in process.stderr and "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(small_run, tmp_path):
    with socket.create_server(("", 0)) as other_job:
        port = other_job.getsockname()[1]
        command = ["bash", SCRIPT, "--num_gpus=2", f"--master_port={port}", "--recipe", "demo", *small_run]
        process = start([*command, f"run.output={tmp_path / 'run'}"], cwd=tmp_path)
    assert process.returncode == 2 and f"port {port} is taken" in process.stderr, process.stderr


def test_a_python_without_the_packages_is_named(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    process = start(["bash", SCRIPT, "--recipe", "demo"], cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert process.returncode == 2 and "activate the project's environment" in process.stderr


def test_bash_runs_one_rank_to_the_end(toy_overrides, tmp_path):
    overrides = [*toy_overrides, f"run.output={tmp_path / 'run'}", "optimizer.steps=1", "optimizer.warmup_steps=0"]
    process = start(["bash", SCRIPT, "--recipe", "demo", *overrides], cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "done: 1 steps, 8 samples" in process.stdout


def test_shellcheck_finds_nothing():
    process = subprocess.run(
        [BIN / "shellcheck", SCRIPT, SCRIPT.with_name("slurm.sbatch")], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


def test_every_failing_start_from_one_shell_says_why(tmp_path):
    """Ranks of one job share a parent, and so do jobs of one rank that a shell starts one after another."""
    words = f'"{sys.executable}" "{SCRIPT}" --recipe'
    process = start(["bash", "-c", f"{words} first; {words} second; true"], cwd=tmp_path)
    assert "no recipe 'first'" in process.stderr and "no recipe 'second'" in process.stderr
