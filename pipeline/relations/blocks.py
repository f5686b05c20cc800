"""The relation loss block by block: on any device, without ever holding a relation matrix.

One document, a few relation heads and a block of queries at a time; loss and gradient come out of the same pass, since
dKL/dscores = p_student - p_teacher needs nothing that comes after the loss. With e = exp(scores), z = its row sums and
p = e / z, all but the exponentials is a matrix product (x, y: queries and keys of the pair; T teacher, S student):

    sum_j p_T s_T = x_T . (e_T y_T) / z_T      sum_j p_T s_S = x_S . (e_T y_S) / z_T
    KL            = sum_j p_T (s_T - s_S) - log z_T + log z_S
    dx            = (e_S y_S) / z_S - (e_T y_S) / z_T            rows of (p_S - p_T) y_S
    dy            = e_S^T (x_S / z_S) - e_T^T (x_S / z_T)

so e_T [y_T, y_S, 1] and e_S [y_S, 1] give the loss, dx and both z. A softmax does not change when one vector is taken
from all keys, so the keys are centred: the scores shrink, and the largest of a row is at least their mean, 0.

A piece of the work is a document and some of the heads; on a CPU each goes to a thread (pieces.py).

Shapes: A heads of a piece, n positions of a document, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.relations.pieces import Segments, map_pieces, segments

if TYPE_CHECKING:
    from pipeline.relations.qkv import QKV

# Centred scores up to this size are exponentiated as they are: exp(64) * 2^20 positions is far below the largest fp32,
# and a row whose largest score is at least 0 sums to at least 1. Beyond it, each row's maximum is taken off first.
_SAFE_SCORE = 64.0
# Scores of a block, 2 MiB in fp32: the smallest for which calling the operations costs little beside computing them.
_BLOCK_SCORES = 1 << 19


def blockwise_losses(
    teacher: QKV,
    student: QKV,
    grads: tuple[Tensor, ...],
    heads: int,
    pairs: Mapping[str, float],
    mask: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Loss of each pair, [pairs]; puts the gradient of the weighted total into `grads` unless that is empty.

    Args:
        teacher: [B, S, H_teacher] each.
        student: [B, S, H_student] each.
        grads: zeros [B, S, H_student] for queries, keys and values, of the type to compute in, or ().
        heads: relation heads.
        pairs: names and weights.
        mask: bool [B, S] or None.
        documents: int [B, S] or None.
    """
    b, s = student.query.shape[:2]
    device = student.query.device
    dtype = torch.float64 if torch.float64 in (teacher.query.dtype, student.query.dtype) else torch.float32
    tensors = [[x.detach().flatten(0, 1) for x in qkv] for qkv in (teacher, student)]
    gradients = [grad.flatten(0, 1) for grad in grads]

    def losses_of(piece: tuple[Tensor, float, slice]) -> Tensor:
        positions, per_position, some = piece
        scale = per_position / (heads * b)
        qkv_t, qkv_s = ([_heads(x, positions, heads, some, dtype) for x in qkv] for qkv in tensors)
        local = [torch.zeros_like(x) if grads else None for x in qkv_s]
        losses = []
        for pair, weight in pairs.items():
            x, y = "qkv".index(pair[0]), "qkv".index(pair[1])
            losses.append(_divergence(qkv_t[x], qkv_t[y], qkv_s[x], qkv_s[y], local[x], local[y], weight * scale))
        for gradient, part in zip(gradients, local, strict=False):
            gradient.unflatten(-1, (heads, -1))[positions, some] = part.transpose(0, 1)
        return torch.stack(losses) * scale

    pieces = list(_pieces(segments(mask, documents, (b, s), device), heads))
    if not pieces:
        return torch.zeros(len(pairs), dtype=dtype, device=device)
    return torch.stack(map_pieces(losses_of, pieces, device)).sum(0)


def _pieces(found: Segments, heads: int) -> Iterator[tuple[Tensor, float, slice]]:
    """Flat positions [n] of a document, 1 / real positions of its row, and some of the heads."""
    real: dict[int, int] = {}
    for row, size in zip(found.rows, found.sizes, strict=True):
        real[row] = real.get(row, 0) + size
    for row, positions in zip(found.rows, found.order.split(found.sizes), strict=True):
        together = max(1, _BLOCK_SCORES // len(positions) ** 2)
        for first in range(0, heads, together):
            yield positions, 1.0 / real[row], slice(first, min(first + together, heads))


def _heads(x: Tensor, positions: Tensor, heads: int, some: slice, dtype: torch.dtype) -> Tensor:
    """Some heads of a document: [B * S, H] -> contiguous [A, n, d]."""
    return x.unflatten(-1, (heads, -1))[positions, some].transpose(0, 1).to(dtype).contiguous()


def _divergence(
    xt: Tensor, yt: Tensor, xs: Tensor, ys: Tensor, gx: Tensor | None, gy: Tensor | None, weight: float
) -> Tensor:
    """Sum of KL over heads and positions of a piece, all [A, n, d]; adds weight times its gradient to gx and gy."""
    a, n, dt = xt.shape
    ds = xs.shape[-1]
    xt, xq = xt / math.sqrt(dt), xs / math.sqrt(ds)
    yt, yq = yt - yt.mean(1, keepdim=True), ys - ys.mean(1, keepdim=True)
    one = yt.new_ones(a, n, 1)
    right_t, right_s = torch.cat([yt, yq, one], -1), torch.cat([yq, one], -1)
    left_t, left_s = yt.transpose(1, 2), yq.transpose(1, 2)
    # Finding out needs the values on the host, which would make a GPU wait.
    shifted = xt.device.type != "cpu" or max(_largest_score(xt, yt), _largest_score(xq, yq)) > _SAFE_SCORE
    rows = max(1, min(n, _BLOCK_SCORES // n))
    buffer = xt.new_empty(2, a * rows * n)
    total = xt.new_zeros(())
    for first in range(0, n, rows):
        block = slice(first, min(first + rows, n))
        x_t, x_s = xt[:, block], xq[:, block]
        e_t, shift_t = _exp_scores(x_t, left_t, buffer[0], shifted)
        e_s, shift_s = _exp_scores(x_s, left_s, buffer[1], shifted)
        o_t, o_s = e_t @ right_t, e_s @ right_s  # [A, rows, dt + ds + 1], [A, rows, ds + 1]
        z_t, z_s = o_t[..., -1:], o_s[..., -1:]
        o_t, o_s = o_t[..., :-1] / z_t, o_s[..., :-1] / z_s
        total += (x_t * o_t[..., :dt]).sum() - (x_s * o_t[..., dt:]).sum()
        total += (z_s / z_t).log().sum() + (shift_s - shift_t)
        if gx is not None:
            gx[:, block].add_(o_s - o_t[..., dt:], alpha=weight / math.sqrt(ds))
            gy.baddbmm_(e_s.transpose(1, 2), x_s / z_s, alpha=weight)
            gy.baddbmm_(e_t.transpose(1, 2), x_s / z_t, alpha=-weight)
    return total


def _largest_score(x: Tensor, y: Tensor) -> float:
    """Upper bound of |x_i . y_j| over all heads (Cauchy-Schwarz)."""
    return float((x.norm(dim=-1).amax(1) * y.norm(dim=-1).amax(1)).max())


def _exp_scores(x: Tensor, y: Tensor, buffer: Tensor, shifted: bool) -> tuple[Tensor, Tensor | float]:
    """exp(x y - shift) in `buffer`, [A, rows, n], and the sum of the shifts."""
    shape = (x.shape[0], x.shape[1], y.shape[2])
    scores = torch.bmm(x, y, out=buffer[: math.prod(shape)].view(shape))
    if not shifted:
        return scores.exp_(), 0.0
    shift = scores.amax(-1, keepdim=True)
    return scores.sub_(shift).exp_(), shift.sum()
