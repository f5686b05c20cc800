"""Rows of tokens read from the shards of a corpus, as tensors.

Reads are positioned reads (`pread`), not memory maps: a map pulls in a whole read-ahead window around every random
sample, holds the interpreter lock while the disk works, and kills the process when a network disk fails. A read asks
for the bytes of one row, lets other threads run, and fails with a message.
"""

import os
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.shards import Corpus, ShardInfo
from pipeline.order import derive_key

# Open shards a reader keeps; far below the usual limit of 1024 files of a process.
_OPEN_SHARDS = 256
# A row that takes longer than this did not come from the page cache.
_CACHED_ROW_SECONDS = 20e-6
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
        return Places(
            samples=self.samples[rows], shard=self.shard[rows], index=self.index[rows], epoch=self.epoch[rows]
        )


class _File:
    """An open file that closes itself when the last thread lets go of it."""

    def __init__(self, path: str) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}. Was the corpus moved or deleted?") from error
        self._path, self._close = path, os.close

    def read(self, size: int, offset: int) -> bytes:
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
        self._corpus, self._shards = corpus, shards
        self._dtype = np.dtype(corpus.manifest.dtype).newbyteorder("<")
        self._seq, self._window = seq_tokens, seq_tokens - 2
        self._inside_documents, self._shift_seed = attention == "document", shift_seed
        self._whole_documents = packing == "none"
        self._file = lru_cache(_OPEN_SHARDS)(lambda shard: _File(f"{corpus.folder / shards[shard].path}.bin"))
        self._index = lru_cache(_OPEN_SHARDS)(lambda shard: corpus.index(shards[shard]))
        self._from_disk = False

    def read(self, places: Places) -> Batch:
        """The rows of a batch, read in the order in which they lie on the disk."""
        return self._read_documents(places) if self._whole_documents else self._read_windows(places)

    def _read_windows(self, places: Places) -> Batch:
        """Rows [CLS] window [SEP]."""
        order = np.lexsort((places.index, places.shard))
        shard = places.shard[order]
        start = places.index[order] * self._window
        if self._shift_seed is not None:
            start += derive_key(self._shift_seed, _SHIFT, shard, places.epoch[order]).astype(np.int64) % self._window
        spans = list(zip(shard.tolist(), start.tolist(), [self._window] * len(start), strict=True))
        read = np.frombuffer(self._bytes(spans), self._dtype).reshape(-1, self._window)
        ids = np.empty((len(order), self._seq), np.int64)
        ids[:, 0], ids[:, -1] = self._cls, self._sep
        ids[order, 1:-1] = read
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
        order = np.lexsort((places.index, places.shard))
        spans = [self._piece(*p) for p in np.stack([places.shard, places.index, places.epoch], 1)[order].tolist()]
        read = np.frombuffer(self._bytes(spans), self._dtype)
        lengths = np.array([tokens for _, _, tokens in spans])
        ids = np.full((len(order), int(lengths.max()) + 2), self._pad, np.int64)
        real = np.zeros(ids.shape, bool)
        for row, tokens, stop in zip(order.tolist(), lengths.tolist(), np.cumsum(lengths).tolist(), strict=True):
            ids[row, 0], ids[row, tokens + 1] = self._cls, self._sep
            ids[row, 1 : tokens + 1] = read[stop - tokens : stop]
            real[row, : tokens + 2] = True
        mask = torch.from_numpy(real)
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=None if real.all() else mask,
            document_ids=mask.to(torch.int32) - 1 if self._inside_documents else None,
            position_ids=None,
            samples=places.samples,
        )

    def _piece(self, shard: int, document: int, epoch: int) -> tuple[int, int, int]:
        """Span of a document without its separator: all of it, or the piece whose turn it is in this epoch."""
        index = self._index(shard)
        tokens = int(index.lengths[document]) - 1
        pieces = max(1, -(-tokens // self._window))
        piece = (document + epoch) % pieces
        start, stop = piece * tokens // pieces, (piece + 1) * tokens // pieces
        return shard, int(index.offsets_bytes[document]) // self._dtype.itemsize + start, stop - start

    def _bytes(self, spans: list[tuple[int, int, int]]) -> bytes:
        """The tokens of sorted spans (shard, first token, tokens), end to end; a span may run over a shard's end."""
        began = time.perf_counter()
        width = self._dtype.itemsize
        files = [self._file(shard) for shard, _, _ in spans]
        if self._from_disk and hasattr(os, "posix_fadvise"):
            # All requests at once, so that the disk works on the whole batch; pointless for what is cached.
            for file, (_, start, tokens) in zip(files, spans, strict=True):
                os.posix_fadvise(file.descriptor, start * width, tokens * width, os.POSIX_FADV_WILLNEED)
        parts = []
        for file, (shard, start, tokens) in zip(files, spans, strict=True):
            over = start + tokens - self._shards[shard].tokens
            if over <= 0:
                parts.append(file.read(tokens * width, start * width))
            else:  # shifted windows treat a shard as a ring
                parts.append(file.read((tokens - over) * width, start * width))
                parts.append(file.read(over * width, 0))
        self._from_disk = time.perf_counter() - began > _CACHED_ROW_SECONDS * len(spans)
        return b"".join(parts)


def _documents(ids: np.ndarray, sep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of full rows: each ends with its separator; [CLS] belongs to the first, the closing [SEP] to the last.

    Args:
        ids: int64 [b, s].

    Returns:
        document_ids int32 [b, s] and position_ids int64 [b, s], which restart at 0 in every document.
    """
    begins = np.zeros(ids.shape, bool)
    begins[:, 2:-1] = ids[:, 1:-2] == sep
    documents = np.cumsum(begins, axis=1, dtype=np.int32)
    column = np.arange(ids.shape[1])
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    return torch.from_numpy(documents), torch.from_numpy(positions)
