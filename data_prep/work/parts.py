"""Parts and shards: what a work unit leaves behind, and how parts become shards whichever is finished first.

Each unit writes one part under `.work/`: its token bytes per split, the length of every document, and last a record,
whose presence means that the part is whole. Parts are laid end to end in the order of the input and cut into shards at
the first document that reaches the shard size. Both steps depend on the input and the options alone, so neither the
number of workers nor an interruption can show in the result.
"""

import functools
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import ShardInfo
from data_prep.shards import COPY_BYTES, ShardWriter

SPLITS = ("train", "validation")


def publish(path: Path, chunks: Iterable, *, flush_folder: bool = True) -> None:
    """Writes a file that a worker which outlived a killed run may be writing too: each under a name of its own."""
    durable.write_chunks(path, chunks, aside=f".{uuid.uuid4().hex}", flush_folder=flush_folder)


def read_record(path: Path) -> dict:
    """What a finished piece of work has left behind.

    Raises:
        UserError: the disk has not kept it.
    """
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it, then run the same command again.") from None


@dataclass(frozen=True)
class Part:
    """The files of one finished piece of work; `base` is their path without suffix."""

    base: Path

    @property
    def is_done(self) -> bool:
        return self._file("json").exists()

    def _file(self, suffix: str) -> Path:
        return self.base.with_name(f"{self.base.name}.{suffix}")

    def tokens_file(self, split: str) -> Path:
        """Token bytes of one split."""
        return self._file(f"{split}.bin")

    def record(self) -> dict[str, Any]:
        """What was counted while the part was made, and `shortened_titles` if there are any."""
        return read_record(self._file("json"))

    def signed_lengths(self) -> np.ndarray:
        """int32 lengths of the documents in the order of the input; negative for validation."""
        return np.fromfile(self._file("lengths"), dtype="<i4")

    def write(self, tokens: dict[str, list[np.ndarray]], signed_lengths: np.ndarray, record: dict[str, Any]) -> None:
        """Writes all files of the part, the record last."""
        for split in SPLITS:
            if tokens[split]:
                chunks = (np.ascontiguousarray(ids).data for ids in tokens[split])
                publish(self.tokens_file(split), chunks, flush_folder=False)
        publish(self._file("lengths"), [np.asarray(signed_lengths, dtype="<i4").tobytes()], flush_folder=False)
        publish(self._file("json"), [json.dumps(record).encode()])

    def drop_tokens(self) -> None:
        """Frees the disk once all tokens are in shards."""
        for split in SPLITS:
            self.tokens_file(split).unlink(missing_ok=True)


@dataclass(frozen=True)
class Piece:
    """Documents `first:last` of one split of a part, and where their bytes are."""

    base: Path
    first: int
    last: int
    start_bytes: int
    stop_bytes: int


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written from pieces of parts."""

    path: str
    split: str
    source: str
    language: str
    dtype: str
    pieces: tuple[Piece, ...]


class ShardPlanner:
    """Lays the parts of one source end to end, in order, and cuts them into shards."""

    def __init__(self, source: str, language: str, dtype: str, shard_bytes: int, limit_documents: int | None):
        self._labels = {"source": source, "language": language, "dtype": dtype}
        self._item_bytes = np.dtype(dtype).itemsize
        self._shard_bytes = shard_bytes
        self._left = limit_documents
        self._pieces: dict[str, list[Piece]] = {split: [] for split in SPLITS}
        self._filled = dict.fromkeys(SPLITS, 0)
        self._numbers = dict.fromkeys(SPLITS, 0)

    @property
    def is_full(self) -> bool:
        """Whether the limit of documents is reached, so that later parts do not count."""
        return self._left == 0

    def open_parts(self) -> set[Path]:
        """Parts with documents that wait for their shard to fill."""
        return {piece.base for pieces in self._pieces.values() for piece in pieces}

    def add(self, part: Part) -> list[ShardJob]:
        """Appends the next part; returns the shards that are complete with it."""
        lengths = part.signed_lengths()[: self._left]
        if self._left is not None:
            self._left -= len(lengths)
        jobs = []
        for split, chosen in (("train", lengths[lengths > 0]), ("validation", -lengths[lengths < 0])):
            jobs += self._cut(part.base, split, np.cumsum(chosen, dtype=np.int64) * self._item_bytes)
        return jobs

    def _cut(self, base: Path, split: str, ends_bytes: np.ndarray) -> list[ShardJob]:
        jobs, first, start = [], 0, 0
        while first < len(ends_bytes):
            wanted = start + self._shard_bytes - self._filled[split]
            last = min(int(np.searchsorted(ends_bytes, wanted)) + 1, len(ends_bytes))
            stop = int(ends_bytes[last - 1])
            self._pieces[split].append(Piece(base, first, last, start, stop))
            self._filled[split] += stop - start
            if self._filled[split] >= self._shard_bytes:
                jobs.append(self._close(split))
            first, start = last, stop
        return jobs

    def _close(self, split: str) -> ShardJob:
        path = f"{split}/{self._labels['source']}/{self._numbers[split]:05d}"
        job = ShardJob(path=path, split=split, pieces=tuple(self._pieces[split]), **self._labels)
        self._numbers[split] += 1
        self._pieces[split], self._filled[split] = [], 0
        return job

    def finish(self) -> list[ShardJob]:
        """The last, smaller shard of each split."""
        return [self._close(split) for split in SPLITS if self._pieces[split]]


@functools.lru_cache(maxsize=4)
def split_lengths(base: Path, split: str) -> np.ndarray:
    lengths = Part(base).signed_lengths()
    return lengths[lengths > 0] if split == "train" else -lengths[lengths < 0]


def shard_record(work: Path, path: str) -> Path:
    """Where the description of a finished shard is kept until the manifest is written."""
    return work / "shards" / f"{path}.json"


def build_shard(job: ShardJob, out: Path, work: Path) -> ShardInfo:
    """Copies the pieces of a shard into place, checksums them on the way, and records it as done."""
    labels = {"split": job.split, "source": job.source, "language": job.language}
    writer = ShardWriter(out, job.path, dtype=job.dtype, **labels)
    try:
        for piece in job.pieces:
            with Part(piece.base).tokens_file(job.split).open("rb") as file:
                file.seek(piece.start_bytes)
                left = piece.stop_bytes - piece.start_bytes
                while left:
                    data = file.read(min(left, COPY_BYTES))
                    if not data:
                        raise OSError(f"{file.name} is shorter than its record says")
                    writer.add_raw(data, ())
                    left -= len(data)
            writer.add_raw(b"", split_lengths(piece.base, job.split)[piece.first : piece.last])
        info = writer.close()
    except BaseException:
        writer.abandon()
        raise
    publish(shard_record(work, job.path), [json.dumps(asdict(info)).encode()])
    return info
