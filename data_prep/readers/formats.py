"""Byte formats: compressed files, blocks of whole records, and the documents in a block.

A file is read as a stream of blocks, each of a bounded number of bytes and cut right after a record delimiter, so that
a record never spans two blocks. That one rule serves all byte formats: a worker can take a range of an uncompressed
file, a run of streams of a multistream bzip2 file, or a block that another process has decompressed, and sees whole
records.
"""

import bz2
import codecs
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import msgspec
import numpy as np

from data_prep.readers.compression import READ_BYTES, Range, Streams, is_compressed, open_binary, read_up_to

_BLANK = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read: where it starts in its (decompressed) file (-1: the reason says), and why."""

    path: str
    offset_bytes: int
    reason: str

    def describe(self) -> str:
        """Where and why, with the line number (found by reading the file up to there)."""
        if self.offset_bytes < 0:
            return f"{self.path}, {self.reason}"
        return f"{self.path}, line {line_at(self.path, self.offset_bytes)} (byte {self.offset_bytes}): {self.reason}"


@dataclass(frozen=True)
class Block:
    """Whole records of a file, starting `offset_bytes` into its decompressed bytes."""

    path: str
    offset_bytes: int
    data: bytes
    torn: str = ""
    """Why the file could not be read to its end after this block."""
    input_bytes: int = 0
    """Bytes read from the disk for it."""


@dataclass(frozen=True)
class Span:
    """Part of a file: bytes (uncompressed, or bzip2 streams), or row groups, or rows."""

    path: str
    start: int
    stop: int


def line_at(path: str, offset_bytes: int) -> int:
    """The number (from 1) of the line at an offset of the decompressed file; reads the file up to there."""
    line, left = 1, offset_bytes
    with open_binary(path) as (file, _):
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            line += data.count(b"\n")
            left -= len(data)
    return line


def stream_blocks(
    file: IO[bytes], path: str, delimiter: bytes, block_bytes: int, offset: int = 0, raw: IO[bytes] | None = None
) -> Iterator[Block]:
    """Cuts a stream after the last delimiter of every `block_bytes`; a longer record makes a longer block."""
    rest, position = bytearray(), 0
    while True:
        data, torn = read_up_to(file, block_bytes)
        searched = max(0, len(rest) - len(delimiter))
        rest += data
        if torn or len(data) < block_bytes:
            if torn or rest:
                # what follows the last delimiter of a torn file is half a record
                cut = rest.rfind(delimiter) + len(delimiter) if torn and delimiter in rest else 0 if torn else len(rest)
                payload = bytes(memoryview(rest)[:cut])
                rest.clear()  # a record may be large, and its reader takes long
                yield Block(path, offset, payload, torn, raw.tell() - position if raw else 0)
            return
        cut = rest.rfind(delimiter, searched)
        if cut >= 0:
            cut += len(delimiter)
            read, position = raw.tell() - position if raw else 0, raw.tell() if raw else 0
            payload = bytes(memoryview(rest)[:cut])
            del rest[:cut], data
            yield Block(path, offset, payload, input_bytes=read)
            offset += cut


def _record_start(file: IO[bytes], position: int, delimiter: bytes, size: int) -> int:
    """Where the first record that starts at or after `position` starts."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    start = position - len(delimiter)
    if start < 0:
        start = 0
    file.seek(start)
    window, base = b"", start
    while data := file.read(READ_BYTES):
        window += data
        found = window.find(delimiter)
        if found >= 0:
            return base + found + len(delimiter)
        keep = len(delimiter) - 1
        base += len(window) - keep
        window = window[len(window) - keep :]
    return size


def span_blocks(span: Span, delimiter: bytes, block_bytes: int) -> Iterator[Block]:
    """The blocks of a span: all records that start inside it.

    A span of a compressed file is the whole file, or, for bzip2, a run of whole streams.
    """
    size = os.path.getsize(span.path)
    if not is_compressed(span.path):
        with open(span.path, "rb") as file:
            start = _record_start(file, span.start, delimiter, size)
            stop = _record_start(file, span.stop, delimiter, size)
            if start < stop:
                yield from stream_blocks(Range(file, start, stop), span.path, delimiter, block_bytes, start)
    elif (span.start, span.stop) == (0, size):
        with open_binary(span.path) as (file, raw):
            yield from stream_blocks(file, span.path, delimiter, block_bytes, raw=raw)
    else:
        with open(span.path, "rb") as raw:
            file = Streams(Range(raw, span.start, span.stop), bz2.BZ2Decompressor)
            yield from stream_blocks(file, span.path, delimiter, block_bytes, span.start)


def parse_jsonl(block: Block, field: str) -> Iterator[str | BadRecord]:
    """One JSON object a line, with the text under `field`."""
    try:
        texts = _texts_of_lines(block.data, field)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # read it again, slowly, to tell which line and why
        yield from _parse_jsonl_slowly(block, field)
    else:
        yield from texts


def _texts_of_lines(data: bytes, field: str) -> list[str]:
    """All texts of a block, or an error if any line is out of the ordinary."""
    texts = [record.text for record in _decoder(field).decode_lines(data)]
    newlines = np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))  # three times as fast as count
    if len(texts) != newlines + (not data.endswith(b"\n")):
        raise ValueError("a blank line, or two records in a line")
    return texts


@functools.cache
def _decoder(field: str):
    """Reads the text of each line and passes over all other fields."""
    record = msgspec.defstruct("Record", [("text", str, msgspec.field(name=field))], gc=False)
    return msgspec.json.Decoder(record)


def _parse_jsonl_slowly(block: Block, field: str) -> Iterator[str | BadRecord]:
    offset = block.offset_bytes
    for line in _lines(block.data):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except UnicodeDecodeError as error:
            yield BadRecord(block.path, start, f"not valid UTF-8: {error.reason}")
        except (ValueError, RecursionError) as error:
            yield BadRecord(block.path, start, f"not valid JSON: {error}")
        except (KeyError, TypeError):
            yield BadRecord(block.path, start, f"no field {field!r} in this record")
        else:
            if isinstance(text, str) and _has_lone_surrogate(text):  # escaped, or as bytes, which `json` lets pass
                yield BadRecord(block.path, start, "half a surrogate pair, which is no character")
            elif isinstance(text, str):
                yield text
            else:
                yield BadRecord(block.path, start, f"field {field!r} is {type(text).__name__}, expected a string")


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines that end in a newline only (`bytes.splitlines` would also cut at a carriage return)."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start) + 1 or len(data)
        yield data[start:stop]
        start = stop


@functools.lru_cache(maxsize=64)
def blank_line(path: str) -> bytes:
    """What a blank line looks like where blocks are cut: as Windows writes it, if most of the first lines end so."""
    with open_binary(path) as (file, _):
        head, _ = read_up_to(file, READ_BYTES)
    return b"\r\n\r\n" if 2 * head.count(b"\r\n") > head.count(b"\n") else b"\n\n"


def plain(data: bytes) -> bytes:
    """Text without a byte-order mark at its start and with lines that end in a newline only."""
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")


def parse_delimited(block: Block, *, lines: bool = False) -> Iterator[str | BadRecord]:
    """Plain text: a document ends at each blank line, which may hold spaces, or with `lines` at each line."""
    start = len(codecs.BOM_UTF8) if not block.offset_bytes and block.data.startswith(codecs.BOM_UTF8) else 0
    ends = re.finditer(rb"\n" if lines else _BLANK, block.data)
    for stop, after in itertools.chain((match.span() for match in ends), [(len(block.data), 0)]):
        record, begin, start = block.data[start:stop], start, after
        try:
            text = record.decode()
        except UnicodeDecodeError as error:
            where = block.offset_bytes + begin + error.start
            yield BadRecord(block.path, where, f"not valid UTF-8: {error.reason}")
        else:
            if text and not text.isspace():
                yield text.replace("\r\n", "\n").strip("\r\n")
