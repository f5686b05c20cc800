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
    assert read_hostfile(path) == ["node1", "user@node2"]


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


def test_what_needs_no_login_is_not_tried(tmp_path):
    (tmp_path / "hosts").write_text("nowhere1 slots=1\nnowhere2 slots=1\n")
    hostfile = f"--hostfile={tmp_path / 'hosts'}"
    assert check_cluster(["--num_gpus=2"]) == (["--num_gpus=2"], [])
    assert check_cluster([hostfile, "--no_ssh"])[1] == []
    launcher, hosts = check_cluster([hostfile, "--launcher=slurm"])
    assert hosts == [] and {"--no_ssh_check", "--master_addr=nowhere1"} <= set(launcher)


def test_machines_that_let_nobody_in_are_named_with_the_reason(tmp_path):
    login = '#!/bin/sh\ncase "$*" in *good*) exit 0;; esac\necho "Permission denied" >&2\nexit 255\n'
    (tmp_path / "ssh").write_text(login)
    (tmp_path / "ssh").chmod(0o755)
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
