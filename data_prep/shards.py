"""The on-disk format of a prepared corpus: Megatron-Core `.bin`/`.idx` token shards and a manifest.

    manifest.json                     what the corpus is: tokenizer, request, counts, shards with their checksums
    tokenizer/                        the tokenizer's own files
    <split>/<source>/<NNNNN>.bin      token ids, documents one after another, each closed by the separator
    <split>/<source>/<NNNNN>.idx      index of the documents

The index: magic "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences n u64, number of document bounds
u64, then lengths i32[n], byte offsets i64[n], bounds i64[n + 1].

All numbers are little-endian; dtype codes are Megatron-Core's (uint16 = 8, int32 = 4). A sequence is a document.
Writers write `*.partial`, flush to the disk and rename; readers check sizes against the manifest at once and checksums
on request.
"""

import hashlib
import os
import struct
import uuid
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import Manifest, ShardInfo, parse_manifest

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
_DTYPES = {
    8: np.dtype("<u2"),
    4: np.dtype("<i4"),
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    5: np.dtype("<i8"),
}
UINT16_VOCABULARY_LIMIT = 65_500  # the same bound as Megatron-Core's
COPY_BYTES = 1 << 20
INDEX_RUN = 1 << 18


def token_dtype(vocabulary_tokens: int) -> str:
    """The narrowest dtype that holds the vocabulary."""
    return "uint16" if vocabulary_tokens < UINT16_VOCABULARY_LIMIT else "int32"


def index_chunks(lengths: np.ndarray, dtype: str) -> Iterator[bytes]:
    """The .idx file for documents of these lengths (in tokens), in pieces: a shard may hold millions of them."""
    count, size, tokens = len(lengths), np.dtype(dtype).itemsize, 0
    yield _HEADER.pack(INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype], count, count + 1)
    runs = [lengths[start : start + INDEX_RUN] for start in range(0, count, INDEX_RUN)]
    yield from (run.astype("<i4", copy=False).tobytes() for run in runs)
    for run in runs:
        ends = tokens + np.cumsum(run, dtype="<i8")
        yield ((ends - run) * size).tobytes()
        tokens = ends[-1]
    for start in range(0, count + 1, INDEX_RUN):
        yield np.arange(start, min(start + INDEX_RUN, count + 1), dtype="<i8").tobytes()


@dataclass(frozen=True)
class Index:
    """A parsed .idx file; arrays are memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets_bytes: np.ndarray
    document_bounds: np.ndarray


def read_index(path: Path) -> Index:
    """Reads an .idx file, ours or Megatron-Core's.

    Raises:
        UserError: it is not such a file, or it is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:9] != INDEX_MAGIC:
        raise UserError(f"{path} is not a token index (it does not begin with MMIDIDX). Prepare the corpus again.")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != INDEX_VERSION or code not in _DTYPES:
        raise UserError(f"{path}: index version {version} with dtype code {code}; expected version {INDEX_VERSION}.")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if size < expected:
        raise UserError(
            f"{path} holds {size} bytes, its header promises {expected}: it is cut short. Prepare it again."
        )
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    lengths_stop = _HEADER.size + 4 * sequences
    offsets_stop = lengths_stop + 8 * sequences
    return Index(
        dtype=_DTYPES[code],
        lengths=raw[_HEADER.size : lengths_stop].view("<i4"),
        offsets_bytes=raw[lengths_stop:offsets_stop].view("<i8"),
        document_bounds=raw[offsets_stop:expected].view("<i8"),
    )


class ShardWriter:
    """Writes one shard: `add` documents, then `close`. Nothing appears under the final names before `close`."""

    def __init__(self, folder: Path, path: str, *, dtype: str, split: str, source: str, language: str = ""):
        self._base, self._path, self._dtype = folder / path, path, dtype
        self._labels = {"split": split, "source": source, "language": language}
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._base.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(f"{self._base}.bin.{uuid.uuid4().hex}.partial")
        self._file = self._partial.open("wb")

    def add(self, ids: np.ndarray) -> None:
        """Appends one document; `ids` end with the separator."""
        self.add_raw(np.ascontiguousarray(ids, dtype=self._dtype).data, np.array([len(ids)], dtype=np.int32))

    def add_raw(self, data, lengths: np.ndarray) -> None:
        """Appends bytes of the shard's dtype, and the lengths of the documents that end in them."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        self._lengths.frombytes(np.asarray(lengths, dtype=np.int32).tobytes())

    def close(self) -> ShardInfo:
        """Flushes to the disk, renames, and describes the shard."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        lengths, index = np.frombuffer(self._lengths, dtype=np.int32), Path(f"{self._base}.idx")
        durable.write_chunks(index, index_chunks(lengths, self._dtype))
        self._partial.replace(f"{self._base}.bin")
        durable.sync_folder(self._base.parent)
        return ShardInfo(
            path=self._path,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=self._bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=durable.sha256(index),
            **self._labels,
        )

    def abandon(self) -> None:
        """Removes what was written so far."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Corpus:
    """A prepared corpus, open for reading."""

    def __init__(self, folder: Path, manifest: Manifest, fingerprint: str):
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        self._tokens: dict[str, np.ndarray] = {}
        self._checked_indexes: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path, *, look: bool = True) -> "Corpus":
        """Opens a corpus after cheap checks: manifest, version, magic and sizes of every shard.

        Args:
            folder: of the corpus.
            look: at every shard on the disk, which is two files each; where another process has done so, the manifest
                can be believed.

        Raises:
            UserError: what is missing or wrong, and in which shard.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            what = (
                "is not finished: run the same `minilm prepare` again"
                if (folder / ".work").is_dir()
                else ("is not a prepared corpus (no manifest.json): make one with `minilm prepare`")
            )
            raise UserError(f"{folder} {what}.")
        raw = path.read_bytes()
        manifest = parse_manifest(path, raw)
        if not any(shard.tokens for shard in manifest.shards):
            raise UserError(f"{folder} holds no tokens: the corpus is empty. Check its sources.")
        for shard in manifest.shards if look else ():
            _check_sizes(folder, shard, manifest.dtype)
        return cls(folder, manifest, hashlib.sha256(raw).hexdigest())

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of "train" or "validation", in the order of the manifest."""
        return tuple(shard for shard in self.manifest.shards if shard.split == split)

    def tokens(self, shard: ShardInfo) -> np.ndarray:
        """The token ids of a shard, flat and memory-mapped; opened at the first call."""
        if shard.path not in self._tokens:
            path = self.folder / f"{shard.path}.bin"
            self._tokens[shard.path] = np.memmap(path, mode="r", dtype=np.dtype(self.manifest.dtype).newbyteorder("<"))
        return self._tokens[shard.path]

    def index(self, shard: ShardInfo) -> Index:
        """Lengths and offsets of the documents of a shard, mapped; read through the first time, to see that they fit.

        Raises:
            UserError: they do not, so that documents would be read from wrong places.
        """
        path = self.folder / f"{shard.path}.idx"
        index = read_index(path)
        if shard.path in self._checked_indexes:
            return index
        ends = np.cumsum(index.lengths, dtype=np.int64)
        starts = (ends - index.lengths) * np.dtype(self.manifest.dtype).itemsize
        whole = len(ends) == shard.documents and shard.tokens == (ends[-1] if len(ends) else 0)
        bounds = np.arange(len(ends) + 1)
        if not (
            whole
            and (index.lengths > 0).all()
            and np.array_equal(index.offsets_bytes, starts)
            and np.array_equal(index.document_bounds, bounds)
        ):
            raise UserError(
                f"{path} is damaged: its lengths, offsets and bounds do not fit together. Copy or prepare the corpus "
                "again."
            )
        self._checked_indexes.add(shard.path)
        return index

    def verify(self, workers: int | None = None) -> list[str]:
        """Reads every byte and compares checksums; names the files that differ."""

        def differs(item: tuple[str, str]) -> bool:
            path, expected = item
            return durable.sha256(self.folder / path) != expected

        items = [
            (f"{shard.path}.{suffix}", getattr(shard, f"{suffix}_sha256"))
            for shard in self.manifest.shards
            for suffix in ("bin", "idx")
        ]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # hashing releases the interpreter lock
            return [path for (path, _), bad in zip(items, pool.map(differs, items), strict=True) if bad]


def _check_sizes(folder: Path, shard: ShardInfo, dtype: str) -> None:
    expected = {"bin": shard.tokens * np.dtype(dtype).itemsize, "idx": _HEADER.size + 20 * shard.documents + 8}
    for suffix, size in expected.items():
        path = folder / f"{shard.path}.{suffix}"
        if not path.is_file():
            raise UserError(f"shard {shard.path}.{suffix} is missing from {folder}. Copy or prepare the corpus again.")
        if (actual := path.stat().st_size) != size:
            raise UserError(
                f"shard {shard.path}.{suffix} in {folder} has {actual} bytes, the manifest says {size}. "
                "Copy or prepare the corpus again."
            )
    with (folder / f"{shard.path}.idx").open("rb") as file:
        header = file.read(_HEADER.size)
    if header[:9] != INDEX_MAGIC or _HEADER.unpack(header)[1:4] != (INDEX_VERSION, DTYPE_CODES[dtype], shard.documents):
        raise UserError(f"shard {shard.path}.idx in {folder} has a wrong header. Copy or prepare the corpus again.")
