"""Standard output that a run can outlive: a terminal is closed, the end of a pipe goes away, and training goes on."""

import sys


class LastingStream:
    """A text stream whose writes are dropped once nobody takes them."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def outlive_the_terminal() -> None:
    """For this process, before a library keeps the streams of now."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
