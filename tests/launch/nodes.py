"""Machines on this machine: each with a network, a process list, a name, a temporary folder and an sshd of its own.

They hang at a switch that is a namespace too, so that nothing of the host's network is touched, and cables can be
pulled. Only root may make them.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
ROOT = Path(__file__).resolve().parents[2]
_NUMBERS = itertools.count()  # of the switches of this process
_BOOT = """
set -e
mount --make-rprivate /
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mkdir -p /run/sshd
mount -t tmpfs tmpfs /mnt
for folder in "${@:4}"; do mkdir -p "/mnt$folder"; mount --bind "$folder" "/mnt$folder"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
for folder in "${@:4}"; do mkdir -p "$folder"; mount --bind "/mnt$folder" "$folder"; done
ip link set lo up
exec "$3" -D -f "$2/sshd_config"
"""


def reason_not_to() -> str:
    """Why there can be no such machines here; "" if there can."""
    if os.geteuid() != 0:
        return "needs root, who alone makes networks"
    missing = [name for name in ("ip", "unshare", "nsenter", "pdsh") if shutil.which(name) is None]
    missing += [] if SSHD else ["sshd"]
    if missing:
        return f"needs {', '.join(missing)}"
    trial = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"needs namespaces: {trial.stderr.strip()}" if trial.returncode else ""


class Nodes:
    """Machines `node1`, `node2` ... that let root in by ssh without a password.

    Args:
        folder: for keys and settings; all machines see it, and the folders beside it.
        count: of machines.
        shared: folders below the temporary one that all machines see; all else there is each machine's own.
    """

    def __init__(self, folder: Path, count: int = 2, shared: tuple[Path, ...] = ()) -> None:
        self.names = [f"node{number + 1}" for number in range(count)]
        self._folder, self._tag = folder, f"ml{os.getpid()}-{next(_NUMBERS)}"
        self._daemons: dict[str, subprocess.Popen] = {}
        self._make_settings()
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number, name in enumerate(self.names):
                self._start(name, number, [folder, *shared])
            self._wait_for_logins()
        except BaseException:
            self.close()
            raise

    @property
    def _switch(self) -> str:
        return f"{self._tag}-switch"

    def _make_settings(self) -> None:
        folder = self._folder
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        lines = [f"10.77.0.{number + 1} {name} distill-{number}.distill" for number, name in enumerate(self.names)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        server = dict(HostKey=folder / "host", StrictModes="no", UsePAM="no", PermitRootLogin="yes", PidFile="none")
        server |= dict(AuthorizedKeysFile=folder / "user.pub", MaxStartups=100, UseDNS="no")
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        client = dict(IdentityFile=folder / "user", StrictHostKeyChecking="no", UserKnownHostsFile="/dev/null")
        client |= dict(LogLevel="ERROR")
        (folder / "config").write_text("Host *\n" + "".join(f"  {key} {value}\n" for key, value in client.items()))
        (folder / "bin").mkdir()
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)

    def _start(self, name: str, number: int, folders: list[Path]) -> None:
        net, cable = f"{self._tag}-{name}", f"cable{number}"
        _ip("netns", "add", net)
        _ip("-n", self._switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", net)
        _ip("-n", self._switch, "link", "set", cable, "master", "bridge", "up")
        _ip("-n", net, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
        _ip("-n", net, "link", "set", "eth0", "up")
        seen = [path for path in (*folders, ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        boot = ["bash", "-c", _BOOT, "boot", name, self._folder, SSHD, *dict.fromkeys(seen)]
        with (self._folder / f"{name}.log").open("w") as log:
            self._daemons[name] = subprocess.Popen(
                list(map(str, ["ip", "netns", "exec", net, *apart, *boot])), stdout=log, stderr=log
            )

    def _wait_for_logins(self) -> None:
        deadline = time.monotonic() + 20
        for name in self.names:
            while self.run(self.names[0], "ssh", name, "true").returncode:
                log = (self._folder / f"{name}.log").read_text()
                assert time.monotonic() < deadline and self._daemons[name].poll() is None, log
                time.sleep(0.1)

    def environment(self, first: str = "", **more: str) -> dict[str, str]:
        """Of a login shell: a folder, an ssh with the right key and this Python's commands come first in PATH."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
        path = [*filter(None, [first]), str(self._folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {**kept, "PATH": os.pathsep.join(path), **more}

    def command(self, node: str, *words) -> list[str]:
        """What runs a command on a node."""
        cd = f"cd {shlex.quote(str(self._folder))} && exec "
        inside = ["nsenter", "--target", str(self._first_process(node)), "--net", "--mount", "--uts", "--pid"]
        return [*inside, "bash", "-c", cd + shlex.join(map(str, words))]

    def start(self, node: str, *words, log: Path, first: str = "", **environment: str) -> subprocess.Popen:
        with log.open("a") as out:
            return subprocess.Popen(
                self.command(node, *words), env=self.environment(first, **environment), stdout=out, stderr=out
            )

    def run(self, node: str, *words, timeout: float = 240, text: str = "") -> subprocess.CompletedProcess:
        """To the end, with a text on its standard input."""
        return subprocess.run(
            self.command(node, *words),
            env=self.environment(),
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def cut_off(self, node: str) -> None:
        """Pull its cable: packets go nowhere, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"cable{self.names.index(node)}", "nomaster")

    def plug_in(self, node: str) -> None:
        _ip("-n", self._switch, "link", "set", f"cable{self.names.index(node)}", "master", "bridge")

    def processes(self, node: str, *words: str) -> list[psutil.Process]:
        """Of a node: those whose command line has all the words."""
        found = []
        space = os.readlink(f"/proc/{self._first_process(node)}/ns/pid")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if here and all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return found

    def _first_process(self, node: str) -> int:
        """Number of the node's process 1; `ip netns exec` has become unshare, whose child it is."""
        deadline = time.monotonic() + 10
        while not (children := psutil.Process(self._daemons[node].pid).children()):
            assert time.monotonic() < deadline, (self._folder / f"{node}.log").read_text()
            time.sleep(0.02)
        return children[0].pid

    def close(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()  # and with it, by --kill-child, all that runs there
            daemon.wait(10)
        for name in (*(f"{self._tag}-{name}" for name in self._daemons), self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
