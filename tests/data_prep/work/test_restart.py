"""Killed, starved or broken at any moment: what is finished stays, and the result is the same to the byte."""

import lzma
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from tests.read import files_of

ROOT = Path(__file__).resolve().parents[3]
UNIT_BYTES, SHARD_BYTES = 30_000, 150_000

SCRIPT = """
import sys
from pathlib import Path
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source

if __name__ == "__main__":
    out, tokenizer, *paths = sys.argv[1:]
    request = PrepareRequest(tokenizer=tokenizer, sources=tuple(map(Source.parse, paths)), validation_fraction=0.1,
                             unit_bytes=UNIT_BYTES, shard_bytes=SHARD_BYTES)
    try:
        prepare(request, Path(out), workers=2, show_progress=False)
    except UserError as error:
        sys.exit(f"user error: {error}")
"""


@pytest.fixture(scope="module")
def inputs(samples, tmp_path_factory):
    """A plain and a compressed source, both of many units."""
    folder = tmp_path_factory.mktemp("input")
    lines = samples.leads("en").read_text().splitlines()
    (folder / "plain.jsonl").write_text("\n".join(lines[:1500]))
    with lzma.open(folder / "packed.jsonl.xz", "wt", preset=1) as file:
        file.write("\n".join(lines[1500:3000]))
    return [f"jsonl,language=en:{folder / name}" for name in ("plain.jsonl", "packed.jsonl.xz")]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(f"UNIT_BYTES, SHARD_BYTES = {UNIT_BYTES}, {SHARD_BYTES}\n{SCRIPT}")
    return path


@pytest.fixture(scope="module")
def uninterrupted(samples, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "corpus"
    request = PrepareRequest(
        tokenizer=str(samples.teacher),
        sources=tuple(map(Source.parse, inputs)),
        validation_fraction=0.1,
        unit_bytes=UNIT_BYTES,
        shard_bytes=SHARD_BYTES,
    )
    prepare(request, out, workers=0, show_progress=False)
    return files_of(out)


@pytest.fixture
def start(script, samples, inputs, tmp_path):
    """Starts a run in a process group of its own."""
    started = []

    def run():
        command = [sys.executable, script, tmp_path / "c", samples.teacher, *inputs]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def records(out):
    """Finished parts and shards, and when each was written."""
    found = [path for kind in ("parts", "shards") for path in (out / ".work" / kind).rglob("*.json")]
    return {path: path.stat().st_mtime_ns for path in found}


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(process):
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def test_kill_9_again_and_again(start, tmp_path, uninterrupted):
    out = tmp_path / "c"
    seen = {}
    for wanted in (1, 20):
        process = start()
        wait_for(lambda wanted=wanted: len(records(out)) >= wanted, process)
        process.kill()
        process.wait()
        assert not (out / "manifest.json").exists()
        now = records(out)
        assert seen.items() <= now.items()  # nothing finished was done again
        seen = now
    process = start()
    _, message = process.communicate(timeout=120)
    assert process.returncode == 0, message
    assert files_of(out) == uninterrupted


def test_workers_end_with_their_coordinator(start, tmp_path):
    process = start()
    wait_for(lambda: len(records(tmp_path / "c")) >= 1, process)
    workers = children(process)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.slow
def test_a_dead_worker_is_reported_with_its_units(start, tmp_path, uninterrupted):
    process = start()
    wait_for(lambda: len(records(tmp_path / "c")) >= 2, process)
    workers = [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "user error: unit " in message and "of source" in message and "a worker died" in message
    assert "Traceback" not in message.split("user error")[1]
    finished = start()
    assert finished.wait(timeout=120) == 0
    assert files_of(tmp_path / "c") == uninterrupted


@pytest.mark.slow
def test_a_worker_that_stands_still_and_files_of_others_change_nothing(start, tmp_path, uninterrupted):
    """Stopped for a while, as by a laptop's lid; then killed, with files there that no run has written."""
    process = start()
    wait_for(lambda: len(records(tmp_path / "c")) >= 2, process)
    workers = [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(workers[0], signal.SIGCONT)
    wait_for(lambda: len(records(tmp_path / "c")) >= 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in (tmp_path / "c" / ".work" / "parts").iterdir():
        for name in ("notes.json", "000001-x.json", "000000-00001.json.partial", "x-00001.json", ".hidden"):
            (folder / name).write_text("mine")
        (folder / "folder.json").mkdir()
    assert start().wait(timeout=120) == 0
    assert files_of(tmp_path / "c") == uninterrupted


def test_a_file_system_that_takes_no_more(start, tmp_path, uninterrupted):
    """A limit on file sizes stops the first shard as a full disk would; what was finished stays."""
    process = start()
    wait_for(lambda: len(records(tmp_path / "c")) >= 1, process)
    for pid in (process.pid, *children(process)):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, resource.RLIM_INFINITY))
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "user error: shard train/" in message and "File too large" in message and "Finished units are kept" in message
    )
    assert "Traceback" not in message
    assert records(tmp_path / "c") and not (tmp_path / "c" / "manifest.json").exists()
    assert start().wait(timeout=120) == 0
    assert files_of(tmp_path / "c") == uninterrupted
