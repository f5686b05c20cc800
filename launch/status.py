"""What a rank says of itself to the supervisor of its machine, and to the user."""

import atexit
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

STATUS = "PYTHON_MINILM_STATUS"
STARTING, RUNNING = "starting", "running"
SAY_SECONDS = 10
_SAID = ".said"


def statuses_in(folder: Path) -> dict[str, str]:
    """Rank -> what it says, of the ranks of this machine."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != _SAID}


class RankStatus:
    """What a rank says of itself: a file that reads `starting`, `running`, then its exit code.

    A rank that is starting has nothing to save yet: a signal just ends it. Without a supervisor nothing is written.
    """

    def __init__(self) -> None:
        folder = os.environ.get(STATUS)
        self._path = Path(folder) / os.environ.get("RANK", "0") if folder and Path(folder).is_dir() else None
        job = f"minilm-{os.getuid()}-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
        self._said = self._path.with_name(_SAID) if self._path else Path(tempfile.gettempdir()) / f"{job}{_SAID}"
        self.write(STARTING)

    def running(self) -> None:
        self.write(RUNNING)

    def write(self, status: int | str) -> None:
        if self._path is not None:
            self._path.write_text(str(status))

    def end(self, words: str, code: int) -> NoReturn:
        """End this process at once: threads of a process group that has lost a rank would abort an orderly end."""
        self.say_once(f"distill: error: {words}")
        self.write(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def say_once(self, words: str) -> None:
        """Print on standard error what went wrong, unless another rank of this machine has said why it ends.

        The launcher ends all ranks with the first that ends: the others wait until the words are out.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            print(words, file=sys.stderr, flush=True)
            return
        with contextlib.suppress(OSError):
            if time.time() - self._said.stat().st_mtime > SAY_SECONDS:
                self._said.unlink()  # of another job, which had this one's parent and port by chance
        try:
            with self._said.open("x") as said:
                print(words, file=sys.stderr, flush=True)
                said.write(words)
        except FileExistsError:
            deadline = time.monotonic() + SAY_SECONDS
            while not self._said.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.05)
        except OSError:
            print(words, file=sys.stderr, flush=True)


def end_process(code: int) -> NoReturn:
    """End a rank that has nothing more to do, with this exit code.

    Python's own way out takes down the interpreter while threads of the process group may still want it, which aborts
    about one rank in a hundred after all its work is done; a launcher then calls the whole job failed.
    """
    try:
        with contextlib.suppress(SystemExit):
            sys.exit(code)  # for those who replace it to learn the code, as W&B does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
