"""Files that are whole or absent, whatever happens: written aside, flushed to the disk, then renamed."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) at `path`, replacing what was there; a crash leaves the old file or the new one."""
    write_chunks(path, [content.encode() if isinstance(content, str) else content])


def write_chunks(path: Path, chunks: Iterable, *, aside: str = "", flush_folder: bool = True) -> None:
    """The same for content that comes in pieces of bytes.

    Args:
        aside: part of the name it is written under first, for several processes that may write the same file.
        flush_folder: False where a later write to the same folder flushes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{aside}.partial")
    try:
        with partial.open("wb") as handle:
            for chunk in chunks:
                handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        partial.unlink(missing_ok=True)
    if flush_folder:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file that somebody else wrote."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    _sync(folder)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
