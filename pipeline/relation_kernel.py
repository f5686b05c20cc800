"""The relation loss as Triton kernels: every score lives in on-chip memory only, forward and backward.

For one pair (x, y), one row of the batch and one relation head, with scores s = x y^T / sqrt(d) of teacher T and
student S in units of log 2 (so that exp2 does), m their running maximum and e = 2^(s - m):

    rows kernel     a block of queries walks over the keys and keeps, per query i, rescaled whenever m grows,
                    l_T = sum e_T     c = sum e_T (s_T - s_S)     a_T = sum e_T y_S     (and l_S, a_S)
                    KL_i / ln 2 = c / l_T - lse_T + lse_S         with lse = m + log2 l
                    dx_i = a_S / l_S - a_T / l_T
    columns kernel  a block of keys walks over the queries, now that lse is known, and sums
                    dy_j = sum_i (2^(s_S - lse_S) - 2^(s_T - lse_T)) x_S,i

Four exponentials per score and pair, memory for two numbers per head and position. Head widths are padded to a power of
two of at least 16 inside the tiles. Padding and documents are one number per position: positions compare when their
numbers are equal, and -1 takes no part.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.qkv import QKV

_LOG2_E = math.log2(math.e)
# Blocks (queries, keys) of the kernels: in compiled sm_90 code, no spills and the fewest instructions a score.
_ROWS_BLOCK, _COLUMNS_BLOCK = (64, 64), (64, 128)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _load(pointers, inside, columns, EVEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile [positions, PADDED] of one head, zero where there is no position or no column."""
    if EVEN and WIDTH == PADDED:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b summed in fp32; the interpreter cannot multiply bfloat16, so there the operands are widened first."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows_kernel(
    xt, yt, xs, ys, dx, groups, lengths, row_scale, lse_t, lse_s, divergence,
    xt_b, xt_s, yt_b, yt_s, xs_b, xs_s, ys_b, ys_s, dx_b, dx_s,
    positions, heads, blocks, scale_t, scale_s, gradient_scale,
    DT: tl.constexpr, DS: tl.constexpr, PT: tl.constexpr, PS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = (program // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    i = (program % blocks) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    ct, cs = tl.arange(0, PT), tl.arange(0, PS)
    real = i < positions
    x_t = _load(xt + batch * xt_b + head * DT + i[:, None] * xt_s + ct[None, :], real, ct, EVEN, DT, PT)
    x_s = _load(xs + batch * xs_b + head * DS + i[:, None] * xs_s + cs[None, :], real, cs, EVEN, DS, PS)
    at_t = yt + batch * yt_b + head * DT + j[:, None] * yt_s + ct[None, :]
    at_s = ys + batch * ys_b + head * DS + j[:, None] * ys_s + cs[None, :]
    end = positions
    if GROUPED:
        group_i = tl.load(groups + batch * positions + i, mask=real, other=-1)
        real = real & (group_i >= 0)
        end = tl.load(lengths + batch)
    # Scores that are left out get -1e30. The maxima start above it, so that rows which have seen no key yet sum to 0.
    m_t, m_s = tl.full([ROWS], -1.0e25, tl.float32), tl.full([ROWS], -1.0e25, tl.float32)
    l_t, l_s, c = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    a_t, a_s = tl.zeros([ROWS, PS], tl.float32), tl.zeros([ROWS, PS], tl.float32)
    for start in range(0, end, KEYS):
        inside = start + j < positions
        y_t = _load(at_t, inside, ct, EVEN, DT, PT)
        y_s = _load(at_s, inside, cs, EVEN, DS, PS)
        at_t += KEYS * yt_s
        at_s += KEYS * ys_s
        s_t = _dot(x_t, tl.trans(y_t), PRECISION)
        s_s = _dot(x_s, tl.trans(y_s), PRECISION)
        if GROUPED:
            group_j = tl.load(groups + batch * positions + start + j, mask=inside, other=-2)
            allowed = group_i[:, None] == group_j[None, :]
            s_t, s_s = tl.where(allowed, s_t, -1.0e30), tl.where(allowed, s_s, -1.0e30)
        elif not EVEN:
            s_t, s_s = tl.where(inside[None, :], s_t, -1.0e30), tl.where(inside[None, :], s_s, -1.0e30)
        top_t, top_s = tl.maximum(m_t, tl.max(s_t, 1) * scale_t), tl.maximum(m_s, tl.max(s_s, 1) * scale_s)
        u_t, u_s = s_t * scale_t - top_t[:, None], s_s * scale_s - top_s[:, None]
        e_t, e_s = tl.exp2(u_t), tl.exp2(u_s)
        grown_t, grown_s = m_t - top_t, m_s - top_s
        shrink_t, shrink_s = tl.exp2(grown_t), tl.exp2(grown_s)
        c = tl.where(shrink_t > 0.0, (c + l_t * (grown_t - grown_s)) * shrink_t, 0.0) + tl.sum(e_t * (u_t - u_s), 1)
        l_t, l_s = l_t * shrink_t + tl.sum(e_t, 1), l_s * shrink_s + tl.sum(e_s, 1)
        m_t, m_s = top_t, top_s
        if GRADIENT:
            a_t = a_t * shrink_t[:, None] + _dot(e_t.to(y_s.dtype), y_s, PRECISION)
            a_s = a_s * shrink_s[:, None] + _dot(e_s.to(y_s.dtype), y_s, PRECISION)
    l_t, l_s = tl.where(real, l_t, 1.0), tl.where(real, l_s, 1.0)
    log_t, log_s = tl.log2(l_t), tl.log2(l_s)
    kl = tl.where(real, c / l_t - log_t + log_s, 0.0)
    tl.store(divergence + program, tl.sum(kl, 0) * 0.6931471805599453)
    if GRADIENT:
        at = batch_head * positions + i
        # Padding gets an end so high that its probabilities are 0 in the columns kernel.
        tl.store(lse_t + at, tl.where(real, m_t + log_t, 1.0e30), mask=i < positions)
        tl.store(lse_s + at, tl.where(real, m_s + log_s, 1.0e30), mask=i < positions)
        step = (a_s / l_s[:, None] - a_t / l_t[:, None]) * (gradient_scale * tl.load(row_scale + batch))
        where = real[:, None] & (cs[None, :] < DS)
        out = dx + batch * dx_b + head * DS + i[:, None] * dx_s + cs[None, :]
        tl.store(out, tl.load(out, mask=where, other=0.0) + step, mask=where)


@triton.jit
def _columns_kernel(
    xt, yt, xs, ys, dy, groups, lengths, row_scale, lse_t, lse_s,
    xt_b, xt_s, yt_b, yt_s, xs_b, xs_s, ys_b, ys_s, dy_b, dy_s,
    positions, heads, blocks, scale_t, scale_s, gradient_scale,
    DT: tl.constexpr, DS: tl.constexpr, PT: tl.constexpr, PS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = (program // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    j = (program % blocks) * KEYS + tl.arange(0, KEYS)
    i = tl.arange(0, ROWS)
    ct, cs = tl.arange(0, PT), tl.arange(0, PS)
    real = j < positions
    y_t = _load(yt + batch * yt_b + head * DT + j[:, None] * yt_s + ct[None, :], real, ct, EVEN, DT, PT)
    y_s = _load(ys + batch * ys_b + head * DS + j[:, None] * ys_s + cs[None, :], real, cs, EVEN, DS, PS)
    at_t = xt + batch * xt_b + head * DT + i[:, None] * xt_s + ct[None, :]
    at_s = xs + batch * xs_b + head * DS + i[:, None] * xs_s + cs[None, :]
    end = positions
    if GROUPED:
        group_j = tl.load(groups + batch * positions + j, mask=real, other=-1)
        real = real & (group_j >= 0)
        end = tl.load(lengths + batch)
    total = tl.zeros([KEYS, PS], tl.float32)
    for start in range(0, end, ROWS):
        inside = start + i < positions
        x_t = _load(at_t, inside, ct, EVEN, DT, PT)
        x_s = _load(at_s, inside, cs, EVEN, DS, PS)
        at_t += ROWS * xt_s
        at_s += ROWS * xs_s
        at = batch_head * positions + start + i
        ends_t, ends_s = tl.load(lse_t + at, mask=inside, other=0.0), tl.load(lse_s + at, mask=inside, other=0.0)
        s_t = _dot(y_t, tl.trans(x_t), PRECISION) * scale_t  # [keys, rows]
        s_s = _dot(y_s, tl.trans(x_s), PRECISION) * scale_s
        excess = tl.exp2(s_s - ends_s[None, :]) - tl.exp2(s_t - ends_t[None, :])
        if GROUPED:
            group_i = tl.load(groups + batch * positions + start + i, mask=inside, other=-2)
            excess = tl.where(group_j[:, None] == group_i[None, :], excess, 0.0)
        elif not EVEN:
            excess = tl.where(inside[None, :], excess, 0.0)
        total += _dot(excess.to(x_s.dtype), x_s, PRECISION)
    where = real[:, None] & (cs[None, :] < DS)
    out = dy + batch * dy_b + head * DS + j[:, None] * dy_s + cs[None, :]
    step = total * (gradient_scale * tl.load(row_scale + batch))
    tl.store(out, tl.load(out, mask=where, other=0.0) + step, mask=where)


def kernel_losses(
    teacher: QKV,
    student: QKV,
    grads: tuple[Tensor, ...],
    heads: int,
    pairs: Mapping[str, float],
    mask: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Loss of each pair, fp32 [pairs]; adds the gradient of the weighted total into `grads` unless that is empty.

    Args:
        teacher: [B, S, H_teacher] each, fp32, bf16 or fp16, last axis contiguous.
        student: [B, S, H_student] each, of one dtype, which may differ from the teacher's.
        grads: fp32 [B, S, H_student] for queries, keys and values, or ().
        heads: relation heads.
        pairs: names and weights.
        mask: bool [B, S] or None.
        documents: int [B, S] or None.
    """
    b, s, _ = student.query.shape
    device = student.query.device
    teacher, student = (tuple(x if x.stride(-1) == 1 else x.contiguous() for x in qkv) for qkv in (teacher, student))
    dt, ds = teacher[0].shape[-1] // heads, student[0].shape[-1] // heads
    groups, lengths, real = _groups(mask, documents, b, s, device)
    row_scale = 1.0 / (heads * b * real.clamp(min=1)).float()
    row_blocks, key_blocks = triton.cdiv(s, _ROWS_BLOCK[0]), triton.cdiv(s, _COLUMNS_BLOCK[1])
    divergence = torch.empty(b, heads * row_blocks, dtype=torch.float32, device=device)
    lse = torch.empty(2, b, heads, s, dtype=torch.float32, device=device) if grads else divergence.expand(2, -1, -1)
    scales = (_LOG2_E / math.sqrt(dt), _LOG2_E / math.sqrt(ds))
    options = dict(
        DT=dt,
        DS=ds,
        PT=max(16, triton.next_power_of_2(dt)),
        PS=max(16, triton.next_power_of_2(ds)),
        GROUPED=groups is not None,
        PRECISION="widened" if _INTERPRETED else "ieee",
    )
    around = (groups if groups is not None else lengths, lengths, row_scale, *lse)
    losses = []
    for pair, weight in pairs.items():
        x, y = "qkv".index(pair[0]), "qkv".index(pair[1])
        tensors = (teacher[x], teacher[y], student[x], student[y])
        strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
        numbers = (*scales, weight / math.sqrt(ds))
        into = grads if grads else student  # never written without GRADIENT
        _rows_kernel[(b * heads * row_blocks,)](
            *tensors, into[x], *around, divergence, *strides, *into[x].stride()[:2], s, heads, row_blocks, *numbers,
            GRADIENT=bool(grads), **_block(s, *_ROWS_BLOCK), **options,
        )  # fmt: skip
        losses.append((divergence.sum(1) * row_scale).sum())
        if grads:
            _columns_kernel[(b * heads * key_blocks,)](
                *tensors, into[y], *around, *strides, *into[y].stride()[:2], s, heads, key_blocks, *numbers,
                **_block(s, *_COLUMNS_BLOCK), **options,
            )  # fmt: skip
    return torch.stack(losses)


def _block(positions: int, rows: int, keys: int) -> dict[str, int | bool]:
    return dict(ROWS=rows, KEYS=keys, EVEN=positions % math.lcm(rows, keys) == 0)


def _groups(mask: Tensor | None, documents: Tensor | None, b: int, s: int, device) -> tuple[Tensor | None, ...]:
    """Group number of every position (-1: padding) or None, end of the last real position, and number of real ones."""
    if mask is None and documents is None:
        whole = torch.full((b,), s, dtype=torch.int32, device=device)
        return None, whole, whole
    groups = torch.zeros(b, s, dtype=torch.int32, device=device) if documents is None else documents.int()
    if mask is not None:
        groups = groups.masked_fill(~mask, -1)
    real = groups >= 0
    ends = torch.arange(1, s + 1, dtype=torch.int32, device=device) * real
    return groups.contiguous(), ends.amax(1), real.sum(1)
