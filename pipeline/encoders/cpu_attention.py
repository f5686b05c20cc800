"""Self-attention on a CPU, inside segments, with dropout, without holding the attention matrices.

torch's attention materialises every matrix several times over as soon as there is dropout, and computes padding like
any other position. Here the rows of a batch are segments of one long sequence that has no padding, and a segment's
heads are computed a few at a time, in the backward pass once more, so that nothing but the log-sum-exp of each position
is kept. The dropout of a few heads of a segment has a seed of its own, drawn from torch's default generator: the result
depends on `torch.manual_seed`, not on the number of threads, and the backward pass draws the same numbers again.

With p = exp(s - lse), k = 0 or 1 / (1 - rate), o = (p k) v, and do the gradient of o:

    dv = (p k)^T do      ds = p k (do v^T) - p (do . o)      dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)

Shapes: T positions of all segments, n of one, h heads, d head width, A heads of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.relations.pieces import map_pieces

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Scores of a piece, 1 MiB in fp32: larger ones leave the cache, smaller ones are dominated by calls.
_PIECE_SCORES = 1 << 18
_SEED_LIMIT = 1 << 62
_NAME = "minilm_segments"


def segmented_attention(
    query: Tensor, key: Tensor, value: Tensor, *, sizes: Sequence[int], scale: float, dropout: float
) -> Tensor:
    """Attention inside consecutive segments.

    Args:
        query: [h, T, d], as key and value.
        key: see above.
        value: see above.
        sizes: positions of each segment, T in all.
        scale: of the scores.
        dropout: rate at which attention probabilities are dropped, in [0, 1).

    Returns:
        [h, T, d].
    """
    if dropout == 0.0:
        parts = zip(*(x[None].split(sizes, 2) for x in (query, key, value)), strict=True)
        return torch.cat([scaled_dot_product_attention(*part, scale=scale)[0] for part in parts], 1)
    return _DropoutAttention.apply(query, key, value, tuple(sizes), scale, dropout)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, ...], scale: float, rate: float):
        pieces = list(_pieces(query.shape[0], sizes))
        out, ends = torch.empty_like(query), query.new_empty(query.shape[:2])

        def forward_piece(piece: tuple[slice, slice, int]) -> None:
            heads, positions, seed = piece
            q, k, v = (x[heads, positions] for x in (query, key, value))
            p = torch.bmm(q * scale, k.transpose(1, 2))
            ends[heads, positions] = torch.logsumexp(p, -1)
            p.sub_(ends[heads, positions, None]).exp_().mul_(_kept(p, seed, rate))
            out[heads, positions] = torch.bmm(p, v).mul_(1.0 / (1.0 - rate))

        map_pieces(forward_piece, pieces, query.device)
        ctx.save_for_backward(query, key, value, out, ends)
        ctx.pieces, ctx.scale, ctx.rate = pieces, scale, rate
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, out, ends = ctx.saved_tensors
        scale, rate = ctx.scale, ctx.rate
        grads = tuple(torch.empty_like(x) for x in (query, key, value))

        def backward_piece(piece: tuple[slice, slice, int]) -> None:
            heads, positions, seed = piece
            q, k, v, o, do = (x[heads, positions] for x in (query, key, value, out, grad))
            p = torch.bmm(q * scale, k.transpose(1, 2)).sub_(ends[heads, positions, None]).exp_()
            dropped = _kept(p, seed, rate).mul_(p)
            do = do * (1.0 / (1.0 - rate))
            grads[2][heads, positions] = torch.bmm(dropped.transpose(1, 2), do)
            ds = torch.bmm(do, v.transpose(1, 2)).mul_(dropped)
            ds.sub_(p.mul_((do * o).sum(-1, keepdim=True).mul_(1.0 - rate)))
            grads[0][heads, positions] = torch.bmm(ds, k).mul_(scale)
            grads[1][heads, positions] = torch.bmm(ds.transpose(1, 2), q).mul_(scale)

        map_pieces(backward_piece, ctx.pieces, query.device)
        return (*grads, None, None, None)


def _pieces(heads: int, sizes: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """Some heads of a segment, its positions, and a seed."""
    start, cut = 0, []
    for size in sizes:
        together = max(1, _PIECE_SCORES // max(1, size * size))
        for first in range(0, heads, together):
            cut.append((slice(first, min(first + together, heads)), slice(start, start + size)))
        start += size
    seeds = torch.randint(_SEED_LIMIT, (len(cut),)).tolist()
    return ((*piece, seed) for piece, seed in zip(cut, seeds, strict=True))


def _kept(scores: Tensor, seed: int, rate: float) -> Tensor:
    """1 where a score is kept and 0 where it is dropped, with probability round(rate * 65536) / 65536."""
    count = scores.numel()
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lanes = words.view(torch.int16)[:count].view(scores.shape)  # four draws out of each random number
    return torch.ge(lanes, round(rate * 65536) - 32768, out=torch.empty_like(scores))


@contextmanager
def installed(config: PretrainedConfig, sizes: Sequence[int] | None) -> Iterator[None]:
    """Let a model attend inside segments of the given sizes (None: the rows of its batch) for a while."""
    from transformers import AttentionInterface

    def attend(module, query: Tensor, key: Tensor, value: Tensor, _mask, scaling=None, dropout=0.0, **_ignored):
        b, h, s, d = query.shape
        joined = (x.transpose(0, 1).reshape(h, b * s, d) for x in (query, key, value))
        out = segmented_attention(*joined, sizes=sizes or [s] * b, scale=scaling or d**-0.5, dropout=dropout)
        return out.view(h, b, s, d).permute(1, 2, 0, 3), None

    AttentionInterface.register(_NAME, attend)
    before, config._attn_implementation = config._attn_implementation, _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
