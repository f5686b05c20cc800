"""Run DeepSpeed's launcher, and tell the truth about how it ended.

The launcher forwards no signal to its ranks, may exit 0 after they were killed, and leaves them running when it dies
itself. So this process starts it apart from the terminal, hands signals to the ranks of this machine all at once,
outlives the last of them, and exits with what they say of themselves. With `--max-restarts` it starts a job that has
crashed again; the job resumes from its newest whole checkpoint.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

import psutil

from data_prep.errors import UserError
from launch.cluster import check_cluster
from launch.starters import check_alone, rank_variables, variables_to_carry
from launch.status import RUNNING, STARTING, STATUS, statuses_in

SCRIPT = Path(__file__).resolve().parent / "distill.sh"
JOB = "PYTHON_MINILM_JOB"  # DeepSpeed hands variables to other machines only if they begin with PYTHON or the like
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REQUEUE = 75
LOST = 74
_SSH_LOST = 255
FINAL_CODES = (0, 2, 3, REQUEUE)  # done, the user's mistake, diverged, asked to stop
GRACE_SECONDS = 120
LEAVE_SECONDS = 300  # after a signal or the last rank's end, for a launcher that waits for a machine that is gone
KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=8"  # so that pdsh notices such a machine
RESTART_SECONDS = 5
REPEAT_SECONDS = 5
_LAUNCHER_VALUES = (
    *("--num_gpus", "--num_nodes", "--hostfile", "--include", "--exclude", "--node_rank"),
    *("--master_addr", "--master_port", "--launcher", "--launcher_args", "--ssh_port"),
)
_LAUNCHER_FLAGS = ("--no_ssh", "--no_ssh_check", "--force_multi")


def launch(arguments: list[str]) -> int:
    """Start a job on this machine, or from it, and return its exit code.

    Args:
        arguments: options of `deepspeed` (such as --num_gpus 2), `--max-restarts N`, and those of a rank, mixed.

    Returns:
        0 done; 2 a user's mistake; 3 the loss was not finite for too long; 75 stopped by a signal, nothing is lost;
        74 a rank of another machine is gone; anything else: the job has crashed.
    """
    launcher, ranks, restarts = split_arguments(arguments)
    try:
        check_alone(launcher, os.environ)
        launcher, hosts = check_cluster(launcher)
    except UserError as error:
        _refuse(str(error))
    job = _Job(launcher, ranks, hosts)
    while True:
        code = job.run()
        if code in FINAL_CODES and (code != REQUEUE or job.signalled) or job.signalled or restarts == 0:
            return code
        restarts -= 1
        job.go_on()
        print(f"the job ended with code {code}; starting it again ({restarts} restarts left)", file=sys.stderr)
        time.sleep(RESTART_SECONDS)
        if job.signalled:
            return REQUEUE


def is_rank(arguments: list[str]) -> bool:
    """Whether srun or mpirun started this as one of several ranks, rather than as what starts them."""
    launcher, _, _ = split_arguments(arguments)
    try:
        return not launcher and bool(rank_variables(os.environ))
    except UserError:  # the rank will say it
        return True


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str], int]:
    """(options of the launcher, arguments of the ranks, how often to restart)."""
    launcher: list[str] = []
    ranks: list[str] = []
    restarts = "0"
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in _LAUNCHER_FLAGS:
            launcher.append(word)
        elif name in (*_LAUNCHER_VALUES, "--max-restarts"):
            if not equals and not rest:
                _refuse(f"{name} needs a value")
            value = value if equals else rest.pop(0)
            if name == "--max-restarts":
                restarts = value
            else:
                launcher.append(f"{name}={value}")
        else:
            ranks.append(word)
    if not restarts.isdigit():
        _refuse(f"--max-restarts takes a number, not {restarts!r}")
    return launcher, ranks, int(restarts)


def _refuse(message: str) -> NoReturn:
    print(f"distill: error: {message}", file=sys.stderr)
    sys.exit(2)


class _Job:
    """One job: its launcher, its ranks on this and other machines, and the signals on their way to them."""

    def __init__(self, launcher: list[str], ranks: list[str], hosts: list[str]) -> None:
        self._name = uuid.uuid4().hex
        words = map(for_a_shell, ranks) if hosts else ranks
        self._command = [_deepspeed(), *launcher, str(SCRIPT), f"--job={self._name}", *words]
        self._several_machines = any(word.startswith("--hostfile=") for word in launcher)
        self._hosts = hosts
        self._by_srun = "--launcher=slurm" in map(str.lower, launcher)
        self._launcher: subprocess.Popen | None = None
        self._status: Path | None = None
        self._errands: list[subprocess.Popen] = []  # that bring the signal to other machines
        self._signal: signal.Signals | None = None
        self._signalled_at, self._ended_at = 0.0, 0.0
        for number in FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._note)

    def go_on(self) -> None:
        """From the newest checkpoint at the next start, wherever the first one was told to begin."""
        if "--resume=auto" not in self._command:
            self._command.append("--resume=auto")

    @property
    def signalled(self) -> bool:
        return self._signal is not None

    def run(self) -> int:
        self._status = Path(tempfile.mkdtemp(prefix="minilm-status-"))
        self._ended_at = 0.0
        environment = {"PDSH_SSH_ARGS_APPEND": KEEP_ALIVE, **os.environ, **variables_to_carry(os.environ)}
        environment |= {JOB: self._name, STATUS: str(self._status)}
        try:
            self._launcher = subprocess.Popen(self._command, env=environment, start_new_session=True)
            code = self._wait_for_launcher()
            self._outlive_ranks()
            statuses = self._statuses()
            code = _verdict(code, statuses.values(), self._several_machines, self._signal)
            _say_who_was_killed(code, statuses)
            return code
        finally:
            for errand in self._errands:
                if errand.poll() is None:  # at a machine that is lost
                    _kill_tree(errand.pid)
            folder, self._status = self._status, None
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_for_launcher(self) -> int:
        while True:
            try:
                return self._launcher.wait(REPEAT_SECONDS)
            except subprocess.TimeoutExpired:
                if self.signalled and (self._hosts or self._by_srun):
                    self._forward()  # a rank may have begun after the signal went round
                if self._has_waited_long_enough():
                    print("the launcher does not end, perhaps for a machine that is lost: leaving it", file=sys.stderr)
                    _kill_tree(self._launcher.pid)

    def _has_waited_long_enough(self) -> bool:
        """Since the signal, or since the last rank of this machine has ended."""
        words = self._statuses().values()
        if words and not {STARTING, RUNNING} & set(words) and not self._ended_at:
            self._ended_at = time.monotonic()
        since = self._signalled_at or self._ended_at
        return bool(since) and time.monotonic() - since > LEAVE_SECONDS

    def _statuses(self) -> dict[str, str]:
        """What the ranks of this machine say; see `RankStatus`."""
        return statuses_in(self._status) if self._status else {}

    def _note(self, number: int, frame) -> None:
        self._signal = signal.SIGUSR1 if number == signal.SIGUSR1 or self._by_srun else signal.SIGTERM
        self._signalled_at = self._signalled_at or time.monotonic()
        self._forward()

    def _forward(self) -> None:
        """Hand the signal to all ranks, wherever they are; where there are none yet, end what would start them."""
        ranks = self._ranks()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(self._signal)
        if self._launcher is None:
            return
        if self._hosts:
            pattern = rf"distill[.]sh --local_rank=[0-9]+ --job={self._name}"  # matches ranks, but not its own command
            words = ["pdsh", "-w", ",".join(self._hosts), "pkill", f"-{self._signal.name}", "-f", shlex.quote(pattern)]
            environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._errands.append(subprocess.Popen(words, env=environment, **quiet))
        elif self._by_srun:  # it hands SIGUSR1 to all its tasks; told to terminate, it would have them killed
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._launcher.pid).children():
                    child.send_signal(signal.SIGUSR1)
        elif not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGTERM)

    def _ranks(self) -> list[psutil.Process]:
        """Processes of this job that are ranks, not their launcher and not their own helpers."""
        found = {}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if environment.get(JOB) == self._name and "LOCAL_RANK" in environment:
                    found[process.pid] = process
            except psutil.Error:
                continue
        return [process for process in found.values() if process.ppid() not in found]

    def _outlive_ranks(self) -> None:
        """Wait for ranks that the launcher left behind: they save and leave by themselves, or are made to."""
        for action in (None, psutil.Process.terminate, psutil.Process.kill):
            ranks = self._ranks()
            for rank in ranks if action else []:
                action(rank)
            if not psutil.wait_procs(ranks, timeout=GRACE_SECONDS)[1]:
                return


def for_a_shell(word: str) -> str:
    """As DeepSpeed hands it to the shell of another machine: words with spaces between double quotes, others bare."""
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _kill_tree(process: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for one in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _verdict(
    launcher_code: int, statuses: Collection[str], several_machines: bool, signalled: signal.Signals | None
) -> int:
    """The ranks' own word if all of this machine left one, and the same; else the launcher's.

    A job that was told to stop before any rank had anything to save has lost nothing: no rank of this machine says that
    it runs, or none says anything and the signal itself has ended those of other machines, as it ends none that runs.
    The launcher's success is believed only where no rank runs on this machine to confirm it.
    """
    if signalled and set(statuses) <= {STARTING, str(REQUEUE)}:
        by_the_signal = launcher_code in (128 + signalled, 256 - signalled)
        if statuses or by_the_signal or not several_machines:
            return REQUEUE
    if len(set(statuses)) == 1 and not {STARTING, RUNNING} & set(statuses):
        return int(next(iter(statuses)))
    if several_machines and not statuses and launcher_code in (0, _SSH_LOST):
        return LOST if launcher_code else 0
    if 192 < launcher_code < 256:
        return 128 + 256 - launcher_code  # a rank's signal, as shells say it and not as Python does
    return launcher_code if launcher_code > 0 else 1


def _say_who_was_killed(code: int, statuses: dict[str, str]) -> None:
    """Where a signal has ended ranks and nobody was left to say so."""
    silent = sorted((rank for rank, word in statuses.items() if word in (STARTING, RUNNING)), key=int)
    if code - 128 in set(signal.Signals) and silent and str(LOST) not in statuses.values():
        name = signal.Signals(code - 128).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        who = f"rank {', '.join(silent)} on {socket.gethostname()}"
        print(f"distill: error: {who} is gone: the job was ended by {name}{memory}", file=sys.stderr)


def _deepspeed() -> str:
    """The launcher that belongs to this Python, whatever the shell's PATH says."""
    beside = Path(sys.executable).parent / "deepspeed"
    return str(beside) if beside.is_file() else "deepspeed"
