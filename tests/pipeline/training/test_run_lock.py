"""One job at a time, on file systems with locks and without."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from data_prep.errors import UserError
from pipeline.training import run_lock

BEAT = 0.1
HOLD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from pipeline.training.run_lock import Heartbeat
    lock = Heartbeat(Path(sys.argv[1]), beat_seconds=float(sys.argv[2]))
    print("held", flush=True)
    sys.stdin.read()
    """
)


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock"), str(BEAT)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def on_another_machine(path):
    holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, "host": "elsewhere"}))


def test_a_file_that_is_touched_is_left_alone_and_one_of_a_dead_process_is_taken_at_once(holder, tmp_path):
    path = tmp_path / "run.lock"
    with pytest.raises(UserError, match=f"is being written by process {holder.pid} on .*, since "):
        run_lock.Heartbeat(path, beat_seconds=BEAT)
    holder.kill()
    holder.wait()
    run_lock.Heartbeat(path, beat_seconds=0.0).close()  # without beats to wait for


def test_a_dead_process_of_another_machine_is_known_by_its_silence(holder, tmp_path):
    path = tmp_path / "run.lock"
    on_another_machine(path)
    with pytest.raises(UserError, match="on elsewhere, since "):
        run_lock.Heartbeat(path, beat_seconds=BEAT)
    holder.kill()
    holder.wait()
    run_lock.Heartbeat(path, beat_seconds=BEAT).close()


def test_a_lock_that_was_let_go_is_free(tmp_path):
    run_lock.Heartbeat(tmp_path / "run.lock", beat_seconds=BEAT).close()
    run_lock.Heartbeat(tmp_path / "run.lock", beat_seconds=BEAT).close()
    run_lock.acquire(tmp_path / "run.lock").close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_touched(code, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock = run_lock.acquire(tmp_path / "run.lock")
    assert "has no locks" in capsys.readouterr().out
    assert any(thread.name == "run lock" for thread in threading.enumerate())
    lock.close()


def test_a_disk_that_fails_is_not_called_another_job(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run_lock.acquire(tmp_path / "run.lock")
