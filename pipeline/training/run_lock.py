"""One job at a time writes to a run's folder: a lock that goes with the process or its machine, however they end.

A POSIX record lock is held where the file system has them, network file systems among them: the kernel, or the server's
lease, lets go of it. Children do not inherit it. It would be lost if this process closed another descriptor of the same
file, so nothing else opens that file for writing or reading while the lock is held.

Where there are none (Lustre mounted without `flock`, for one), the holder touches the file every few seconds instead. A
file that is not touched any more is taken over; no clocks of two machines are compared for that.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from data_prep.errors import UserError

BEAT_SECONDS = 5.0
MISSED_BEATS = 6  # so many in a row and the holder is dead
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def acquire(path: Path) -> "RecordLock | Heartbeat":
    """The lock of a folder, held until its `close`.

    Args:
        path: the lock's file, which tells others who holds it.

    Raises:
        UserError: another job holds it.
        OSError: the file cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(path) if error.errno in _HELD else {}
        file.close()
        if error.errno in _HELD:
            raise _refusal(path, holder) from None
        if error.errno not in _NO_LOCKS:
            raise
        print(f"the file system of {path.parent} has no locks: {path.name} is touched every few seconds instead")
        return Heartbeat(path)
    return RecordLock(file, path)


class RecordLock:
    """A locked file, open for as long as it is locked."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        try:
            file.truncate(0)
            file.write(_identity())
            file.flush()
        except OSError as error:
            error.filename = str(path)  # a full disk does not say which file
            with contextlib.suppress(OSError):
                file.close()
            raise

    def close(self) -> None:
        """Let another job have the folder."""
        self._file.close()


class Heartbeat:
    """A file that this process touches, and that others leave alone while it is touched."""

    def __init__(self, path: Path, *, beat_seconds: float = BEAT_SECONDS) -> None:
        self._path, self._beat_seconds, self._ended = path, beat_seconds, threading.Event()
        before = _read(path)
        if before and not _is_gone(before) and self._is_touched():
            raise _refusal(path, before)
        own = _identity()
        path.write_text(own, encoding="utf-8")
        time.sleep(min(1.0, beat_seconds))  # if two came at once, the last one has it
        if path.read_text(encoding="utf-8") != own:
            raise _refusal(path, _read(path))
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def close(self) -> None:
        """Let another job have the folder."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._path.write_text("", encoding="utf-8")

    def _is_touched(self) -> bool:
        """Whether somebody touches the file while one looks at it."""
        seen = self._path.stat().st_mtime_ns
        deadline = time.monotonic() + MISSED_BEATS * self._beat_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 5)
            if self._path.stat().st_mtime_ns != seen:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _identity() -> str:
    """This process as others can tell it: two of the same number differ in when they began."""
    me = psutil.Process()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps(dict(host=socket.gethostname(), process=me.pid, began=me.create_time(), since=since)) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """Who holds the lock; empty where nobody says so."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; of other machines one cannot tell at once."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(holder["process"]).create_time() != holder.get("began")
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True


def _refusal(path: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"
    return UserError(
        f"{path.parent} is being written by {who if holder else 'another job'}. Wait for it, stop it, or use another "
        "run.output."
    )
