"""A real Slurm of two nodes, both of them this machine, with a key and settings of its own. Only root may start it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import free_port

NODES = ("n1", "n2")
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
_SETTINGS = """\
ClusterName=test
MpiDefault=none
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
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
SlurmdTimeout=10
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 Port=[{first}-{last}]
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def reason_not_to() -> str:
    """Why there can be no Slurm here; "" if there can."""
    if missing := [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name, path=_PATH)]:
        return f"needs {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "needs root, as which slurmd runs jobs"


class Slurm:
    """The nodes `n1` and `n2`, of two processors each.

    Args:
        folder: for key, settings, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "slurm.log"
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["MASTER_ADDR"] = "127.0.0.1"  # the names of these nodes have no address
        self._running: dict[str, subprocess.Popen] = {}
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        port = free_port()
        places = dict(folder=folder, host=socket.gethostname(), nodes=",".join(NODES))
        ports = dict(port=port, first=port + 1, last=port + len(NODES))
        (folder / "slurm.conf").write_text(_SETTINGS.format(**places, **ports))
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        key = [f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
        try:
            self._start("munge", "munged", "--force", "--foreground", *key, *files)
            wait_until((folder / "munge.socket").exists, self.log)
            self._start("controller", "slurmctld", "-D")
            for node in NODES:
                self._start(node, "slurmd", "-D", "-N", node)
            wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES)), self.log)
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, *command: str) -> None:
        with self.log.open("a") as log:
            self._running[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def run(self, *command, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
        """To the end, with more variables."""
        words, environment = list(map(str, command)), self.environment | environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)

    def ask(self, *command, **environment: str) -> str:
        """What a command says that must succeed."""
        done = self.run(*command, timeout=60, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ranks(self, job: str, node: str = "") -> list[psutil.Process]:
        """Processes that srun has started for a job, on one node or on all."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                own = process.environ()
                ours = own.get("SLURM_CONF") == self.environment["SLURM_CONF"] and own.get("SLURM_JOB_ID") == job
                if ours and "SLURM_STEP_NUM_TASKS" in own and own.get("SLURMD_NODENAME") in ([node] if node else NODES):
                    found.append(process)
        return found

    def pull_the_plug(self, node: str, job: str) -> None:
        """All of a node is gone at once: its daemon, a job's ranks there, and what looks after them."""
        ranks = self.ranks(job, node)
        self._running[node].kill()
        for process in {parent for rank in ranks if (parent := rank.parent())} | set(ranks):
            process.kill()

    def plug_in(self, node: str) -> None:
        """After `pull_the_plug`: it starts, and is used again once Slurm has missed it."""
        wait_until(lambda: "down" in self.ask("sinfo", "-h", "-n", node, "-o", "%T"), self.log)
        self._running[node].wait(10)
        self._start(node, "slurmd", "-D", "-N", node)
        self.ask("scontrol", "update", f"nodename={node}", "state=resume")

    def close(self) -> None:
        subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, capture_output=True)
        for process in reversed(self._running.values()):
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(condition: Callable[[], object], log: Path, seconds: float = 60) -> None:
    """Until it holds; or fail, with the log.

    Raises:
        AssertionError: it did not in this time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "too late"
        time.sleep(0.2)
