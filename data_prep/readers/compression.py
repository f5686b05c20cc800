"""Files as streams of decompressed bytes: where they break off is told apart from where they end."""

import bz2
import contextlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO

READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 10  # of what a file or a stream begins with
COMPRESSED_SUFFIXES = (".bz2", ".gz", ".xz", ".zst")
_BZ2_STREAM = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED_SUFFIXES)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file for reading its decompressed bytes: that stream, and the one below it."""
    suffix = os.path.splitext(path)[1].lower()
    with open(path, "rb") as raw:
        if is_compressed(path) and not os.path.getsize(path):
            yield _Nothing(), raw
        elif suffix == ".bz2":
            yield Streams(raw, bz2.BZ2Decompressor), raw
        elif suffix == ".gz":
            yield Streams(raw, _Gzip), raw
        elif suffix == ".xz":
            yield Streams(raw, lzma.LZMADecompressor), raw
        elif suffix == ".zst":
            yield _open_zstandard(raw), raw
        else:
            yield raw, raw


class _Nothing:
    """A compressed file of no bytes: not even an empty text was compressed into it."""

    def read(self, size: int) -> bytes:
        raise EOFError("no bytes at all")


class _Gzip:
    """zlib's decompressor for one stream, with the face of those of bzip2 and xz."""

    def __init__(self) -> None:
        self._stream, self._rest, self._is_full = zlib.decompressobj(wbits=31), b"", False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._rest and not self._is_full

    def decompress(self, data: bytes, size: int) -> bytes:
        found = self._stream.decompress(self._rest + data, size)
        self._rest, self._is_full = self._stream.unconsumed_tail, len(found) == size
        return found


class Streams:
    """Streams of gzip, bzip2 or xz end to end. What follows and is no stream is an error, and what precedes a tear is
    read, as it is not everywhere in Python's own classes."""

    def __init__(self, raw, start: Callable):
        """Args:
        raw: the compressed bytes.
        start: makes a decompressor for one stream.
        """
        self._raw, self._start, self._stream = raw, start, start()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none only at the end."""
        while True:
            more = b""
            if self._stream.eof:
                # zeros may fill up a file
                more = self._stream.unused_data.lstrip(b"\0") or self._raw.read(READ_BYTES).lstrip(b"\0")
                if not more:
                    return b""
                self._stream = self._start()
            elif self._stream.needs_input and not (more := self._raw.read(READ_BYTES)):
                raise EOFError("it ends in the middle of a stream")
            if data := self._stream.decompress(more, size):
                return data


def _open_zstandard(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


def bzip2_streams(path: str) -> list[int]:
    """Offsets of the bzip2 streams of a file; more than one in the multistream dumps of Wikipedia."""
    offsets, base, tail = [], 0, b""
    with open(path, "rb") as file:
        while data := file.read(16 * READ_BYTES):
            window = tail + data
            offsets += [base - len(tail) + match.start() for match in _BZ2_STREAM.finditer(window)]
            base += len(data)
            tail = window[-9:]  # one byte less than the pattern, so that nothing is found twice
    return offsets


def begins_bzip2_stream(path: str, offset: int, pattern: re.Pattern[bytes]) -> bool:
    """Whether the bytes of the stream at an offset begin like a pattern."""
    with open(path, "rb") as raw:
        head, torn = read_up_to(Streams(Range(raw, offset, os.path.getsize(path)), bz2.BZ2Decompressor), HEAD_BYTES)
    return not torn and pattern.match(head) is not None


class Range:
    """A part of a file as a readable stream."""

    def __init__(self, file: IO[bytes], start: int, stop: int):
        self._file, self._left = file, stop - start
        file.seek(start)

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def read_all(file: IO[bytes]) -> tuple[bytes, str]:
    """All bytes of a file, and the reason if it breaks off."""
    return read_up_to(file, 1 << 62)


def read_up_to(file: IO[bytes], size: int) -> tuple[bytes, str]:
    """Up to `size` bytes, and the reason if the file breaks off there."""
    parts, left = [], size
    while left > 0:
        try:
            data = file.read(left if isinstance(file, Range) else min(left, READ_BYTES))
        except (EOFError, lzma.LZMAError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return b"".join(parts), f"truncated or damaged: {error}"
        except zlib.error as error:
            return b"".join(parts), f"truncated or damaged: {error}"
        if not data:
            break
        parts.append(data)
        left -= len(data)
    return b"".join(parts), ""
