"""Every rank gives signs of life, so that one that is lost ends the job within minutes, with its name.

A collective waits half an hour for a rank whose machine has lost its network, and says nothing of use about one that
was killed. So a thread of each rank counts up a number on the store where all have met; rank 0 watches the numbers, all
watch the processes of their own machine and whether the store still answers. Who finds a loss writes it there, and all
ranks hear of it at their next beat.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable

import psutil
import torch.distributed as dist

from data_prep.errors import UserError, words_of
from pipeline.engine.meeting import ranges

EXIT_LOST = 74  # EX_IOERR: another rank is gone; start again, it goes on from the newest whole checkpoint
EXIT_MISTAKE = 2
LOST_SECONDS = 180  # MINILM_LOST_SECONDS in rank 0's environment changes it; 0 for no watching
_BEAT_SECONDS = 5.0
_BEATS_AT_LEAST = 6
_BEATS_WHEN_BROKEN = 3  # once a collective has failed, ranks that live only wait, and so beat in time
_LEAVING_SECONDS = 5.0  # the store goes with rank 0, which may leave a little before the others


class Heartbeat:
    """The signs of life of this rank, and the watch over the others'.

    Args:
        store: that all ranks reach, over a connection that nothing else uses.
        rank, world_size: this rank's number, and how many there are.
        host: name of this machine.
        keeper: who keeps the store, if it is not rank 0.
        on_loss: called in a thread, once, with what is lost and the exit code; it should end the process.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        host: str,
        on_loss: Callable[[str, int], None],
        keeper: str | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._on_loss = store, rank, world_size, on_loss
        self._keeper = keeper
        self._hosts: list[str] = []
        self._beside: dict[int, int] = {}  # rank -> process, of those on this machine
        self._number, self._answered = 0, 0
        self._stopped, self._lost, self._once = threading.Event(), threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        store.set(f"who/{rank}", json.dumps([host, _machine(), os.getpid()]))
        store.set(f"beat/{rank}", "0")
        if rank == 0:
            store.set("seconds", os.environ.get("MINILM_LOST_SECONDS", str(LOST_SECONDS)))

    def start(self) -> None:
        """Begin, when all ranks have made theirs."""
        found = self._store.multi_get([f"who/{rank}" for rank in range(self._world_size)])
        whose = [json.loads(words) for words in found]
        self._hosts = [host for host, _, _ in whose]
        me = whose[self._rank][1]
        self._beside = {r: pid for r, (_, place, pid) in enumerate(whose) if place == me and r != self._rank}
        self._lost_seconds = float(self._store.get("seconds"))
        if self._lost_seconds <= 0:
            return
        self._beat_seconds = min(_BEAT_SECONDS, self._lost_seconds / _BEATS_AT_LEAST)
        self._beats = round(self._lost_seconds / self._beat_seconds)
        for body in (self._beat, self._watch_store):
            self._threads.append(threading.Thread(target=body, name="heartbeat", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """At the end of the program, when all ranks have come to it."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_LEAVING_SECONDS)

    def ended_by(self, error: Exception) -> None:
        """Tell the others what ends this rank; where they have ended it, wait for their word, and do not come back."""
        if not self._threads:
            return
        if isinstance(error, (UserError, OSError)):
            self._tell(f"{words_of(error)} [{self._names([self._rank])}]", EXIT_MISTAKE)
        elif not _is_broken_collective(error):
            words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self._tell(f"{self._names([self._rank])} has crashed: {words}", EXIT_LOST)
        else:
            with contextlib.suppress(RuntimeError):
                self._store.set("broken", "")
            if self._lost.wait(self._lost_seconds + 2 * self._beat_seconds):
                threading.Event().wait(_LEAVING_SECONDS * 4)  # `on_loss` ends the process

    def _tell(self, words: str, code: int) -> None:
        self._stopped.set()
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("lost", "", json.dumps([words, code]))
            self._has_heard()

    def _has_heard(self) -> None:
        """The last thing that this rank says. Rank 0, which may keep the store, leaves after the others."""
        self._store.set(f"heard/{self._rank}", "")
        deadline = time.monotonic() + 2 * self._beat_seconds
        heard = [f"heard/{rank}" for rank in range(self._world_size)]
        while self._rank == 0 and time.monotonic() < deadline and not self._store.check(heard):
            time.sleep(0.05)

    def _lose(self, words: str, code: int) -> None:
        with self._once:
            if not self._stopped.is_set() and not self._lost.is_set():
                self._lost.set()
                self._on_loss(words, code)

    def _beat(self) -> None:
        silent, seen = [0] * self._world_size, [b""] * self._world_size
        while not self._stopped.wait(self._beat_seconds):
            try:
                self._number += 1
                self._store.set(f"beat/{self._rank}", str(self._number))
                words = self._gone_beside() or (self._gone_elsewhere(silent, seen) if self._rank == 0 else "")
                if words:
                    self._store.compare_set("lost", "", json.dumps([words, EXIT_LOST]))
                if self._store.check(["lost"]):
                    found = json.loads(self._store.get("lost"))
                    self._has_heard()
                    return self._lose(*found)
                self._answered = self._number
            except RuntimeError:  # nobody keeps the store
                if not self._stopped.wait(_LEAVING_SECONDS):
                    self._lose(f"{self._keepers_name()} is gone: killed, or crashed", EXIT_LOST)
                return

    def _watch_store(self) -> None:
        """Beats are counted, not seconds: a machine that was put to sleep has not lost the others."""
        seen, silent = -1, 0
        while not self._stopped.wait(self._beat_seconds):
            silent = silent + 1 if self._answered == seen else 0
            seen = self._answered
            if silent >= self._beats:
                return self._lose(f"{self._keepers_name()} {self._unheard()}", EXIT_LOST)

    def _gone_beside(self) -> str:
        """Ranks of this machine whose process has ended."""
        gone = [rank for rank, process in self._beside.items() if not _lives(process)]
        return f"{self._names(gone)} is gone: killed (out of memory?), or crashed" if gone else ""

    def _gone_elsewhere(self, silent: list[int], seen: list[bytes]) -> str:
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self._world_size)])
        for rank, beat in enumerate(beats):
            silent[rank] = silent[rank] + 1 if beat == seen[rank] else 0
            seen[rank] = beat
        broken = self._store.check(["broken"])
        enough = _BEATS_WHEN_BROKEN if broken else self._beats
        gone = [rank for rank, beats in enumerate(silent) if beats >= enough]
        if not gone:
            return ""
        return f"{self._names(gone)} {'is gone, or cannot be reached' if broken else self._unheard()}"

    def _unheard(self) -> str:
        seconds = f"{self._lost_seconds:.0f} s"
        return f"gave no sign of life for {seconds}: the machine is lost, or its network, or it stands still"

    def _names(self, gone: list[int]) -> str:
        hosts = dict.fromkeys(self._hosts[rank] for rank in gone)
        return ", ".join(
            f"rank {ranges([rank for rank in gone if self._hosts[rank] == host])} on {host}" for host in hosts
        )

    def _keepers_name(self) -> str:
        return self._keeper or self._names([0])


def _machine() -> str:
    """Same for processes that see each other's numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"alone {os.getpid()}"


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _is_broken_collective(error: Exception) -> bool:
    """Whether a collective failed for want of another rank; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
