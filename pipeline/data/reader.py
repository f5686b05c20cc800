"""Rows of tokens read from the shards of a corpus, as tensors.

Reads are positioned reads (`pread`), not memory maps: a map pulls in a whole read-ahead window around every random
sample, counts what it has touched as the process's memory, and kills the process when a network disk fails. A read asks
for the bytes of one row and fails with a message.
"""

import os
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.manifest import ShardInfo
from data_prep.shards import Corpus
from pipeline.data.order import derive_key

# Open shards a reader keeps; far below the usual limit of 1024 files of a process.
_OPEN_SHARDS = 256
# A row that takes longer did not come from the page cache; once announced, rows from a good disk take little more than
# the second bound.
_CACHED_ROW_SECONDS, _CACHED_ANNOUNCED_ROW_SECONDS = 20e-6, 4e-6
# Rows of a shard that are no farther apart are worth reading together with what lies between them.
_NEAR_ROWS = 32
_SHIFT = 1  # tells the keys of window shifts from those of orders


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: b rows of s tokens.

    Attributes:
        input_ids: int64 [b, s].
        attention_mask: bool [b, s], True for real tokens; None when there is no padding.
        document_ids: int32 [b, s], number of the document within its row, -1 for padding; None when attention is
            "window".
        position_ids: int64 [b, s], position within the document, from 0; None for the model's default.
        samples: int64 [b], the samples' numbers in the training order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    samples: np.ndarray

    def __getitem__(self, rows: slice) -> "Batch":
        """Some rows, sharing memory."""
        parts = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return Batch(**parts)

    @property
    def tokens(self) -> int:
        """Real ones, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """What an encoder takes, on a device: all but the samples' numbers."""
        tensors = {name: value for name, value in vars(self).items() if name != "samples"}
        return {name: t if t is None else t.to(device, non_blocking=True) for name, t in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where samples lie; all int64 [n].

    Attributes:
        samples: number in the training order.
        shard: index into the reader's shards.
        index: number of the window (or document) within the shard.
        epoch: how often the sample's source had been through before.
    """

    samples: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    def __getitem__(self, rows: slice) -> "Places":
        return Places(**{name: values[rows] for name, values in vars(self).items()})


class _File:
    """An open file that closes itself when the last thread lets go of it."""

    def __init__(self, path: str) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}. Was the corpus moved or deleted?") from error
        self._path, self._close = path, os.close

    def read(self, size: int, offset: int) -> bytes:
        """Exactly `size` bytes, however many reads they take."""
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                raise UserError(
                    f"{self._path} ends before byte {offset + size}: it has changed since the corpus was opened. "
                    "Restore it, or prepare the corpus again."
                )
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._close(self.descriptor)


class Reader:
    """Reads places of a corpus into batches; may be used by several threads at once."""

    def __init__(
        self,
        corpus: Corpus,
        shards: tuple[ShardInfo, ...],
        *,
        seq_tokens: int,
        packing: str,
        attention: str,
        shift_seed: int | None,
    ) -> None:
        ids = corpus.manifest.tokenizer
        self._cls, self._sep, self._pad = ids["cls_id"], ids["sep_id"], ids["pad_id"]
        self._ends = np.array([shard.tokens for shard in shards], np.int64)
        self._dtype = np.dtype(corpus.manifest.dtype).newbyteorder("<")
        self._width, self._vocabulary = self._dtype.itemsize, ids["vocabulary_tokens"]
        self._name = lambda shard: f"{corpus.folder / shards[shard].path}"
        self._seq, self._window = seq_tokens, seq_tokens - 2
        self._inside_documents, self._shift_seed = attention == "document", shift_seed
        self._whole_documents = packing == "none"
        self._file = lru_cache(_OPEN_SHARDS)(lambda shard: _File(f"{corpus.folder / shards[shard].path}.bin"))
        self._index = lru_cache(_OPEN_SHARDS)(lambda shard: corpus.index(shards[shard]))
        self._from_disk = False

    def read(self, places: Places) -> Batch:
        """The rows of a batch, read in the order in which they lie on the disk."""
        return self._read_documents(places) if self._whole_documents else self._read_windows(places)

    def announce(self, places: Places) -> None:
        """Asks the disk, without waiting, for all that lies between rows that are near to each other."""
        if not hasattr(os, "posix_fadvise"):
            return
        order = np.lexsort((places.index, places.shard))
        shard, index = places.shard[order], places.index[order]
        breaks = np.flatnonzero((np.diff(shard) != 0) | (np.diff(index) > _NEAR_ROWS)) + 1
        for first, last in zip([0, *breaks], [*breaks - 1, len(order) - 1], strict=True):
            start, stop = self._first_token(shard[first], index[first]), self._first_token(shard[last], index[last] + 1)
            file = self._file(int(shard[first]))  # kept, for a file that nobody holds is closed
            os.posix_fadvise(file.descriptor, start * self._width, (stop - start) * self._width, os.POSIX_FADV_WILLNEED)

    def _first_token(self, shard: int, index: int) -> int:
        """Where a row (before any shift) begins in its shard, or where the row before it ended."""
        if not self._whole_documents:
            return int(index) * self._window
        offsets = self._index(int(shard)).offsets_bytes
        return int(offsets[index]) // self._width if index < len(offsets) else int(self._ends[shard])

    def _read_windows(self, places: Places) -> Batch:
        """Rows [CLS] window [SEP]."""
        start = places.index * self._window
        if self._shift_seed is not None:
            key = derive_key(self._shift_seed, _SHIFT, places.shard, places.epoch)
            start += (key % np.uint64(self._window)).astype(np.int64)
        read = self._bytes(places.shard, start, np.full(len(start), self._window))
        ids = np.empty((len(start), self._seq), np.int64)
        ids[:, 0], ids[:, -1] = self._cls, self._sep
        tokens = np.frombuffer(read, self._dtype)
        self._check_ids(tokens, places.shard, np.full(len(start), self._window))
        ids[:, 1:-1] = tokens.reshape(-1, self._window)
        documents, positions = _documents(ids, self._sep) if self._inside_documents else (None, None)
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=None,
            document_ids=documents,
            position_ids=positions,
            samples=places.samples,
        )

    def _read_documents(self, places: Places) -> Batch:
        """Rows [CLS] document [SEP], padded to the longest; of a long document, one piece an epoch, in turns."""
        where = zip(places.shard.tolist(), places.index.tolist(), places.epoch.tolist(), strict=True)
        start, tokens = np.array([self._piece(*place) for place in where]).T
        read = self._bytes(places.shard, start, tokens)
        real = np.arange(int(tokens.max()) + 2) < tokens[:, None] + 2
        ids = np.full(real.shape, self._pad, np.int64)
        ids[:, 0] = self._cls
        ids[np.arange(len(ids)), tokens + 1] = self._sep
        inner = real.copy()
        inner[:, 0] = inner[np.arange(len(ids)), tokens + 1] = False
        found = np.frombuffer(read, self._dtype)
        self._check_ids(found, places.shard, tokens)
        ids[inner] = found
        mask = torch.from_numpy(real)
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=None if real.all() else mask,
            document_ids=mask.to(torch.int32) - 1 if self._inside_documents else None,
            position_ids=None,
            samples=places.samples,
        )

    def _check_ids(self, tokens: np.ndarray, shard: np.ndarray, sizes: np.ndarray) -> None:
        """Refuse ids that no embedding exists for; names the shard.

        Args:
            tokens: of all rows, end to end.
            shard: of each row.
            sizes: tokens of each row.
        """
        if not len(tokens) or (tokens.max() < self._vocabulary and (self._width == 2 or tokens.min() >= 0)):
            return
        bad = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocabulary))[0])
        name = self._name(int(shard[np.searchsorted(np.cumsum(sizes), bad, side="right")]))
        raise UserError(
            f"{name}.bin holds the token id {tokens[bad]}, but the vocabulary has {self._vocabulary:,} tokens: the "
            "file is damaged. Copy or prepare the corpus again."
        )

    def _piece(self, shard: int, document: int, epoch: int) -> tuple[int, int]:
        """First token and length of a document without its separator, or of the piece whose turn it is."""
        index = self._index(shard)
        tokens = int(index.lengths[document]) - 1
        pieces = max(1, -(-tokens // self._window))
        piece = (document + epoch) % pieces
        start, stop = piece * tokens // pieces, (piece + 1) * tokens // pieces
        return int(index.offsets_bytes[document]) // self._width + start, stop - start

    def _bytes(self, shard: np.ndarray, start: np.ndarray, tokens: np.ndarray) -> bytes:
        """The bytes of spans of tokens, end to end; what runs over a shard's end goes on at its beginning."""
        began = time.perf_counter()
        if self._from_disk:
            order = np.lexsort((start, shard))
            rows = self._rows(shard[order], start[order], tokens[order], announce=True)
            rows = [rows[i] for i in np.argsort(order).tolist()]
            bound = _CACHED_ANNOUNCED_ROW_SECONDS
        else:
            rows = self._rows(shard, start, tokens, announce=False)
            bound = _CACHED_ROW_SECONDS
        self._from_disk = time.perf_counter() - began > bound * len(rows)
        return b"".join(rows)

    def _rows(self, shard: np.ndarray, start: np.ndarray, tokens: np.ndarray, *, announce: bool) -> list[bytes]:
        numbers, offsets, sizes = shard.tolist(), (start * self._width).tolist(), (tokens * self._width).tolist()
        files = {number: self._file(number) for number in set(numbers)}  # held until the last read
        descriptors = [files[number].descriptor for number in numbers]
        if announce and hasattr(os, "posix_fadvise"):
            # All requests at once, so that the disk works on the whole batch; pointless for what is cached.
            for span in zip(descriptors, offsets, sizes, strict=True):
                os.posix_fadvise(*span, os.POSIX_FADV_WILLNEED)
        rows = list(map(os.pread, descriptors, sizes, offsets))
        if sum(map(len, rows)) < sum(sizes):
            for row in (i for i, size in enumerate(sizes) if len(rows[i]) < size):
                file, offset = files[numbers[row]], offsets[row]
                inside = min(sizes[row], int(self._ends[numbers[row]]) * self._width - offset)
                rows[row] = file.read(inside, offset) + file.read(sizes[row] - inside, 0)
        return rows


def _documents(ids: np.ndarray, sep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of full rows: each ends with its separator; [CLS] belongs to the first, the closing [SEP] to the last.

    Args:
        ids: int64 [b, s].

    Returns:
        document_ids int32 [b, s] and position_ids int64 [b, s], which restart at 0 in every document.
    """
    rows, tokens = ids.shape
    row, column = np.nonzero(ids[:, 1:-2] == sep)
    begins = np.concatenate([np.arange(rows) * tokens, row * tokens + column + 2])  # in the flattened batch
    begins.sort()
    lengths = np.diff(begins, append=rows * tokens)
    count = np.arange(len(begins))
    number = count - np.maximum.accumulate(np.where(begins % tokens == 0, count, 0))
    documents = np.repeat(number.astype(np.int32), lengths).reshape(ids.shape)
    positions = (np.arange(rows * tokens) - np.repeat(begins, lengths)).reshape(ids.shape)
    return torch.from_numpy(documents), torch.from_numpy(positions)
