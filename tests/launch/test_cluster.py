"""Machines that a job cannot start on are named before DeepSpeed's launcher starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from launch.cluster import check_cluster, check_environment_files, read_hostfile

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "distill.sh"


def test_a_hostfile_is_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\n\nnode1 slots=8\nuser@node2   slots=4 # the old one\n")
    assert read_hostfile(path) == {"node1": 8, "user@node2": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1\n", "line 1: 'node1' is not `NAME slots=GPUS`"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 stands there twice"),
        ("node1 slots=many\n", "line 1"),
        ("# nothing\n", "names no machine"),
        ("\x00", "line 1"),
    ],
)
def test_a_wrong_hostfile_is_refused(text, words, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize("line", ["", "# comment", "novalue"])
def test_lines_that_deepspeed_would_not_read_are_named(line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    check_environment_files()
    (tmp_path / ".deepspeed_env").write_text(f"NCCL_DEBUG=INFO\n{line}\nA=b\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 2: .* is not NAME=value"):
        check_environment_files()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Make PATH a folder of programs that say a version."""

    def make(**versions):
        for name, version in versions.items():
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{version}'\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hosts").write_text("nowhere1 slots=1\nnowhere2 slots=1\n")
    return f"--hostfile={tmp_path / 'hosts'}"


def test_what_needs_no_login_is_not_tried(programs, hostfile, monkeypatch):
    programs(srun="slurm 22", mpirun="mpirun (Open MPI) 4.1.4", sinfo="nowhere1\nnowhere2")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert check_cluster(["--num_gpus=2"]) == (["--num_gpus=2"], [])
    assert check_cluster([hostfile, "--no_ssh", "--node_rank=1"])[1] == []
    launcher, hosts = check_cluster([hostfile, "--launcher=slurm", "--launcher_args=--gpus-per-node=8"])
    assert hosts == [] and {"--no_ssh_check", "--force_multi", "--master_addr=nowhere1"} <= set(launcher)
    nodes = "--nodelist=nowhere1,nowhere2 --nodes=2 --ntasks-per-node=1"
    assert f"--launcher_args={nodes} --gpus-per-node=8" in launcher
    launcher, _ = check_cluster([hostfile, "--launcher=openmpi", "--master_port=7", "--launcher_args=--bind-to none"])
    assert "--launcher_args=--bind-to none -x MASTER_ADDR=nowhere1 -x MASTER_PORT=7" in launcher


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no_ssh"], "--node_rank, from 0 to 1; given: none"),
        (["--no_ssh", "--node_rank=2"], "--node_rank, from 0 to 1; given: 2"),
        (["--launcher=mvapich"], "mvapich is not one that .* works with: pdsh slurm openmpi mpich impi"),
        (["--launcher=pdsh"], "needs pdsh on this machine"),
        (["--launcher=mpich"], r"needs the mpirun of MPICH, but the one in PATH is 'mpirun \(Open MPI\) 4.1.4'"),
        (["--launcher=openmpi", "--num_gpus=2"], "openmpi takes no --num_gpus: give a hostfile"),
        (["--launcher=slurm", "--num_nodes=1"], "slurm takes no --num_nodes: give a hostfile"),
        (["--launcher=slurm", "--master_port=7"], "MASTER_PORT in the environment"),
        (["--launcher=slurm"], "the hostfile names nowhere2, but Slurm has n1, nowhere1"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused_with_what_can(options, words, programs, hostfile, monkeypatch):
    programs(mpirun="mpirun (Open MPI) 4.1.4", srun="slurm 22", sinfo="nowhere1\nn1")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match=words):
        check_cluster([hostfile, *options])


@pytest.mark.parametrize("launcher", ["mpich", "impi", "slurm"])
def test_machines_of_unequal_slots(launcher, programs, hostfile, tmp_path, monkeypatch):
    programs(mpirun="HYDRA build details:", srun="slurm 22", sinfo="nowhere1\nnowhere2")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    check_cluster([hostfile, f"--launcher={launcher}"])
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    with pytest.raises(UserError, match=r"as many slots on each machine, .* \[1, 2\]"):
        check_cluster([hostfile, f"--launcher={launcher}"])


def test_machines_that_let_nobody_in_are_named_with_the_reason(tmp_path):
    login = '#!/bin/sh\ncase "$*" in *good*) exit 0;; esac\necho "Permission denied" >&2\nexit 255\n'
    for program in ("ssh", "pdsh"):
        (tmp_path / program).write_text(login)
        (tmp_path / program).chmod(0o755)
    (tmp_path / "hosts").write_text("good1 slots=1\nbad1 slots=1\nbad2 slots=1\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def refused(*options):
        command = ["bash", SCRIPT, *options, "--recipe", "demo"]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    said = refused("--hostfile", tmp_path / "hosts")
    assert "cannot log in to 2 of 3 machines" in said and "bad1: Permission denied; bad2: Permission denied" in said
    assert "there is no hostfile" in refused("--hostfile", tmp_path / "none")
