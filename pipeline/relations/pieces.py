"""Segments of a batch, and independent pieces of work for the threads of a CPU.

A segment is what may be compared or attended to together: the real positions of a row, or those of one of its
documents.

A parallel region for each small operation makes every thread wait for the slowest one, thousands of times in a training
step; when other programs run on the machine too, each wait may last as long as the system's scheduler pleases. So the
work is cut into pieces which share nothing, and a thread computes a piece from beginning to end by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def map_pieces(function: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device) -> list[Result]:
    """Results of the function in the order of the pieces, without gradients; on a GPU one after another."""
    before = torch.get_num_threads()
    threads = min(before, len(pieces)) if device.type == "cpu" else 1

    def run(piece: Piece) -> Result:
        with torch.no_grad():  # a setting of each thread
            return function(piece)

    if threads <= 1:
        return [run(piece) for piece in pieces]
    torch.set_num_threads(1)  # also that of the matrix library, which all threads share
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, pieces))
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The real positions of a batch, segment after segment.

    Attributes:
        order: int64 [real positions], their places in the flattened batch.
        sizes: positions of each segment; none is empty.
        rows: the row of the batch that each segment is in.
    """

    order: Tensor
    sizes: list[int]
    rows: list[int]


def segments(mask: Tensor | None, documents: Tensor | None, shape: tuple[int, int], device: torch.device) -> Segments:
    """Segments of a batch of `shape` [rows, positions]; a document need not be in one piece.

    Args:
        mask: bool [rows, positions], True where there is a real token; None: everywhere.
        documents: int [rows, positions], numbers of the documents in a row; None: a row is one.
        shape: of the batch.
        device: where the batch is.
    """
    b, s = shape
    if mask is None and documents is None:
        return Segments(order=torch.arange(b * s, device=device), sizes=[s] * b, rows=list(range(b)))
    row = torch.arange(b, device=device)[:, None].expand(b, s)
    keep = torch.ones(b, s, dtype=torch.bool, device=device) if mask is None else mask
    number = torch.zeros_like(row) if documents is None else documents.long()
    group = (row * (number.max() + 1) + number)[keep]
    by_group = group.argsort(stable=True)
    order = keep.flatten().nonzero().squeeze(1)[by_group]
    found, sizes = group[by_group].unique_consecutive(return_counts=True)
    return Segments(order=order, sizes=sizes.tolist(), rows=(found // (number.max() + 1)).tolist())
