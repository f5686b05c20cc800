"""Fixtures that all tests share: the real samples, a small corpus, real runs of two ranks."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from data_prep import samples as sample_store
from tests import toy

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "distill.sh"


# Files that take a minute or so each: first, so that no worker is left alone with one at the end.
LONG_FILES = (
    "test_stages.py",
    "test_trainer.py",
    "test_strangers.py",
    "test_checkpoint.py",
    "test_cli.py",
    "test_distill_sh.py",
    "test_kernel.py",
    "test_step.py",
    "test_placement.py",
    "test_restart.py",
    "test_meeting.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Real text and a real teacher, fetched once and checked."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / sample_store.TEACHER

    @property
    def enwiki(self) -> Path:
        return self.folder / sample_store.ENWIKI

    @property
    def bgwiki(self) -> Path:
        return self.folder / sample_store.BGWIKI

    def leads(self, language: str = "en") -> Path:
        return self.folder / sample_store.LEADS.format(language=language)


@pytest.fixture(scope="session")
def samples() -> Samples:
    return Samples(folder=sample_store.fetch(log=lambda line: None))


@pytest.fixture(scope="session")
def corpus_folder(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 600 English leads, a tenth of them held out."""
    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    folder = tmp_path_factory.mktemp("corpus") / "leads"
    source = Source.parse(f"jsonl,language=en:{samples.leads('en')}")
    request = PrepareRequest(
        tokenizer=str(samples.teacher), sources=(source,), validation_fraction=0.1, limit_documents=600
    )
    prepare(request, folder, workers=0, show_progress=False)
    return folder


@pytest.fixture(scope="session")
def small_run(samples: Samples, corpus_folder: Path) -> list[str]:
    """Overrides that make the demo recipe a matter of seconds, with a real teacher."""
    return [f"teacher.model={samples.teacher}", f"data.corpus={corpus_folder}", *toy.SIX_STEPS]


@pytest.fixture(scope="session")
def toy_overrides(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make the demo recipe train a toy, with a random teacher."""
    return toy.make(tmp_path_factory.mktemp("toy"), samples.leads())


@pytest.fixture(scope="session")
def distill(small_run: list[str]) -> Callable[..., subprocess.CompletedProcess]:
    """Run `launch/distill.sh` under the real launcher with real ranks; returns the finished process."""

    def run(output: Path, *arguments: str, ranks: int = 2, expect: int = 0) -> subprocess.CompletedProcess:
        command = [Path(sys.executable).parent / "deepspeed", f"--num_gpus={ranks}", f"--master_port={free_port()}"]
        command += [SCRIPT, "--recipe", "demo", *small_run, f"run.output={output}", *arguments]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.run(
            list(map(str, command)), env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == expect, process.stdout[-4000:] + process.stderr[-4000:]
        return process

    return run


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Two runs of six steps on two ranks: one in a go, one stopped after three steps and resumed."""

    unbroken: Path
    resumed: Path


@pytest.fixture(scope="session")
def runs(distill, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Made once for all of pytest's workers, which only read them."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    both = Runs(unbroken=folder / "unbroken", resumed=folder / "resumed")
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            distill(both.unbroken)
            distill(both.resumed, "--stop-at=3")
            distill(both.resumed)
            (folder / "made").touch()
    return both


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run Python code whose first argument is a folder that is a file system of its own; what is left there is printed.

    It gets the folder, then `arguments`. The size is that of a tmpfs: "128k".
    """
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs file systems of one's own (unshare --map-root-user --mount)")
    inside = 'mount -t tmpfs -o size="$1" tmpfs "$2"; shift; "${@:2}"; code=$?; ls -A "$1"; exit $code'

    def run(size: str, code: str, *arguments: Path) -> subprocess.CompletedProcess:
        command = [*unshare, "bash", "-c", inside, "bash", size, tmp_path, sys.executable, "-c", code, tmp_path]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
        words = list(map(str, [*command, *arguments]))
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that the system gives out by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
