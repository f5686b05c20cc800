"""Stopping together: a signal to any rank, or the end of the launcher, stops all ranks after the same step.

Handlers only note the signal. At each step's end the ranks agree by an all-reduce, so that all save the same step; a
rank that saved inside a handler would leave the others waiting in a collective.
"""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

EXIT_REQUEUE = 75  # EX_TEMPFAIL: "saved, start me again"
EXIT_DIVERGED = 3  # starting it again would end the same way
_LAUNCHER_WORDS = (b"deepspeed", b"deepspeed.launcher.launch", b"deepspeed.launcher.runner", b"--launch")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Collects reasons to stop on this rank and agrees on them with the others."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._launchers = _launcher_ancestors()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._note)

    def agreed(self, device: torch.device) -> bool:
        """True on all ranks if any rank has a reason to stop; every rank calls it once a step."""
        if self.reason is None and any(_parent_of(pid) != parent for pid, parent in self._launchers):
            self.reason = "the launcher is gone"
        flag = torch.tensor([self.reason is not None], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = bool(flag.item())
        if stop and self.reason is None:
            self.reason = "another rank was asked to stop"
        return stop

    def _note(self, number: int, frame) -> None:
        self.reason = f"received {signal.Signals(number).name}"


def _launcher_ancestors() -> list[tuple[int, int]]:
    """(process, its parent) from this one upwards, as far as DeepSpeed's launcher and ours (launch/supervise.py) reach.

    DeepSpeed's launcher forwards no signal and leaves its ranks running when it dies; a change of these parents tells.
    Any other parent (a shell, a scheduler) may end without meaning us.
    """
    pairs, pid = [], os.getpid()
    while parent := _parent_of(pid):
        try:
            command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        except OSError:
            break
        if not any(word.rpartition(b"/")[2] in _LAUNCHER_WORDS for word in command[:5]):
            break
        pairs.append((pid, parent))
        pid = parent
    return pairs


def _parent_of(pid: int) -> int:
    """The parent's process number; 0 if the process is gone or the system does not tell."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
