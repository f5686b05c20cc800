"""The relation loss as Triton kernels: every score lives in on-chip memory only, forward and backward.

For one pair (x, y), one row of the batch and one relation head, with scores s = x y^T / sqrt(d) of teacher T and
student S in units of log 2 (so that exp2 does), m their running maximum and e = 2^(s - m):

    rows kernel     a block of queries walks over the keys and keeps, per query i, rescaled whenever m grows,
                    l_T = sum e_T     c = sum e_T (s_T - s_S)     a_T = sum e_T y_S     (and l_S, a_S)
                    KL_i / ln 2 = c / l_T - lse_T + lse_S         with lse = m + log2 l
                    dx_i = a_S / l_S - a_T / l_T
    columns kernel  a block of keys walks over the queries, now that m and l are known, and sums
                    dy_j = sum_i (2^(s_S - m_S) / l_S - 2^(s_T - m_T) / l_T) x_S,i

Scores are scaled and shifted in one operation with one rounding, in both kernels by the same number m. Shifting by the
rounded lse instead would leave its rounding in the exponent: an error of 2^-24 |lse|, which large scores make visible.

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

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.relations.qkv import QKV

_LOG2_E = math.log2(math.e)
# Blocks (queries, keys) of the kernels, the first that fits: in compiled sm_90 code the first has no spills and the
# fewest instructions a score.
_ROWS_BLOCKS = ((64, 64), (32, 64), (32, 32), (16, 32), (16, 16))
_COLUMNS_BLOCKS = ((64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16))
_STAGES = 3  # tiles of the inner loop that are in shared memory at once
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
    """a b summed in fp32.

    A device sums a score's products in one order in both kernels. The interpreter's order is its matrix library's,
    which changes with a tile's shape and the processor, so there a sum is rounded once. It knows no bfloat16 either.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows_kernel(
    xt, yt, xs, ys, dx, groups, lengths, row_scale, top_of_t, top_of_s, part_t, part_s, divergence,
    xt_b, xt_s, yt_b, yt_s, xs_b, xs_s, ys_b, ys_s, dx_b, dx_s,
    positions, heads, blocks, scale_t, scale_s, gradient_scale,
    DT: tl.constexpr, DS: tl.constexpr, PT: tl.constexpr, PS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, GROUPED: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = (program // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    i = (program % blocks) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    ct, cs = tl.arange(0, PT), tl.arange(0, PS)
    real = i < positions
    end = positions
    if GROUPED:
        group_i = tl.load(groups + batch * positions + i, mask=real, other=-1)
        real = real & (group_i >= 0)
        end = tl.load(lengths + batch)
    x_t = _load(xt + batch * xt_b + head * DT + i[:, None] * xt_s + ct[None, :], real, ct, WHOLE, DT, PT)
    x_s = _load(xs + batch * xs_b + head * DS + i[:, None] * xs_s + cs[None, :], real, cs, WHOLE, DS, PS)
    at_t = yt + batch * yt_b + head * DT + j[:, None] * yt_s + ct[None, :]
    at_s = ys + batch * ys_b + head * DS + j[:, None] * ys_s + cs[None, :]
    # Scores that are left out get -1e30. The maxima start above it, so that rows which have seen no key yet sum to 0.
    m_t, m_s = tl.full([ROWS], -1.0e25, tl.float32), tl.full([ROWS], -1.0e25, tl.float32)
    l_t, l_s, c = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    a_t, a_s = tl.zeros([ROWS, PS], tl.float32), tl.zeros([ROWS, PS], tl.float32)
    for start in range(0, end, KEYS):
        inside = start + j < positions
        held = inside
        if GROUPED:
            group_j = tl.load(groups + batch * positions + start + j, mask=inside, other=-2)
            held = group_j >= 0
        y_t = _load(at_t, held, ct, WHOLE, DT, PT)
        y_s = _load(at_s, held, cs, WHOLE, DS, PS)
        at_t += KEYS * yt_s
        at_s += KEYS * ys_s
        s_t = _dot(x_t, tl.trans(y_t), PRECISION)
        s_s = _dot(x_s, tl.trans(y_s), PRECISION)
        if GROUPED:
            allowed = group_i[:, None] == group_j[None, :]
            s_t, s_s = tl.where(allowed, s_t, -1.0e30), tl.where(allowed, s_s, -1.0e30)
        elif not EVEN:
            s_t, s_s = tl.where(inside[None, :], s_t, -1.0e30), tl.where(inside[None, :], s_s, -1.0e30)
        top_t, top_s = tl.maximum(m_t, tl.max(s_t, 1) * scale_t), tl.maximum(m_s, tl.max(s_s, 1) * scale_s)
        u_t, u_s = tl.fma(s_t, scale_t, -top_t[:, None]), tl.fma(s_s, scale_s, -top_s[:, None])
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
        # Padding gets a maximum so high that its probabilities are 0 in the columns kernel.
        tl.store(top_of_t + at, tl.where(real, m_t, 1.0e30), mask=i < positions)
        tl.store(top_of_s + at, tl.where(real, m_s, 1.0e30), mask=i < positions)
        tl.store(part_t + at, 1.0 / l_t, mask=i < positions)
        tl.store(part_s + at, 1.0 / l_s, mask=i < positions)
        step = (a_s / l_s[:, None] - a_t / l_t[:, None]) * (gradient_scale * tl.load(row_scale + batch))
        where = real[:, None] & (cs[None, :] < DS)
        out = dx + batch * dx_b + head * DS + i[:, None] * dx_s + cs[None, :]
        tl.store(out, tl.load(out, mask=where, other=0.0) + step, mask=where)


@triton.jit
def _columns_kernel(
    xt, yt, xs, ys, dy, groups, lengths, row_scale, top_of_t, top_of_s, part_t, part_s,
    xt_b, xt_s, yt_b, yt_s, xs_b, xs_s, ys_b, ys_s, dy_b, dy_s,
    positions, heads, blocks, scale_t, scale_s, gradient_scale,
    DT: tl.constexpr, DS: tl.constexpr, PT: tl.constexpr, PS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = (program // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    j = (program % blocks) * KEYS + tl.arange(0, KEYS)
    i = tl.arange(0, ROWS)
    ct, cs = tl.arange(0, PT), tl.arange(0, PS)
    real = j < positions
    end = positions
    if GROUPED:
        group_j = tl.load(groups + batch * positions + j, mask=real, other=-1)
        real = real & (group_j >= 0)
        end = tl.load(lengths + batch)
    y_t = _load(yt + batch * yt_b + head * DT + j[:, None] * yt_s + ct[None, :], real, ct, WHOLE, DT, PT)
    y_s = _load(ys + batch * ys_b + head * DS + j[:, None] * ys_s + cs[None, :], real, cs, WHOLE, DS, PS)
    at_t = xt + batch * xt_b + head * DT + i[:, None] * xt_s + ct[None, :]
    at_s = xs + batch * xs_b + head * DS + i[:, None] * xs_s + cs[None, :]
    total = tl.zeros([KEYS, PS], tl.float32)
    for start in range(0, end, ROWS):
        inside = start + i < positions
        held = inside
        if GROUPED:
            group_i = tl.load(groups + batch * positions + start + i, mask=inside, other=-2)
            held = group_i >= 0
        x_t = _load(at_t, held, ct, WHOLE, DT, PT)
        x_s = _load(at_s, held, cs, WHOLE, DS, PS)
        at_t += ROWS * xt_s
        at_s += ROWS * xs_s
        at = batch_head * positions + start + i
        top_t, top_s = tl.load(top_of_t + at, mask=inside, other=0.0), tl.load(top_of_s + at, mask=inside, other=0.0)
        of_t, of_s = tl.load(part_t + at, mask=inside, other=0.0), tl.load(part_s + at, mask=inside, other=0.0)
        s_t = _dot(y_t, tl.trans(x_t), PRECISION)  # [keys, rows]
        s_s = _dot(y_s, tl.trans(x_s), PRECISION)
        p_t = tl.exp2(tl.fma(s_t, scale_t, -top_t[None, :])) * of_t[None, :]
        p_s = tl.exp2(tl.fma(s_s, scale_s, -top_s[None, :])) * of_s[None, :]
        excess = p_s - p_t
        if GROUPED:
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
    rows_block, columns_block = blocks_for(teacher, student, heads, _shared_bytes(device)) or _too_wide(dt, ds, device)
    row_blocks, key_blocks = triton.cdiv(s, rows_block[0]), triton.cdiv(s, columns_block[1])
    divergence = torch.empty(b, heads * row_blocks, dtype=torch.float32, device=device)
    ends = torch.empty(4, b, heads, s, dtype=torch.float32, device=device) if grads else divergence.expand(4, -1, -1)
    scales = (_LOG2_E / math.sqrt(dt), _LOG2_E / math.sqrt(ds))
    options = dict(
        DT=dt,
        DS=ds,
        PT=_padded(dt),
        PS=_padded(ds),
        GROUPED=groups is not None,
        num_stages=_STAGES,
        enable_fp_fusion=True,
        PRECISION="widened" if _INTERPRETED else "ieee",
    )
    around = (groups if groups is not None else lengths, lengths, row_scale, *ends)
    losses = []
    for pair, weight in pairs.items():
        x, y = "qkv".index(pair[0]), "qkv".index(pair[1])
        tensors = (teacher[x], teacher[y], student[x], student[y])
        strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
        numbers = (*scales, weight / math.sqrt(ds))
        into = grads if grads else student  # never written without GRADIENT
        _rows_kernel[(b * heads * row_blocks,)](
            *tensors, into[x], *around, divergence, *strides, *into[x].stride()[:2], s, heads, row_blocks, *numbers,
            GRADIENT=bool(grads), **_block(s, *rows_block, groups is not None), **options,
        )  # fmt: skip
        losses.append((divergence.sum(1) * row_scale).sum())
        if grads:
            _columns_kernel[(b * heads * key_blocks,)](
                *tensors, into[y], *around, *strides, *into[y].stride()[:2], s, heads, key_blocks, *numbers,
                **_block(s, *columns_block, groups is not None), **options,
            )  # fmt: skip
    return torch.stack(losses)


def _block(positions: int, rows: int, keys: int, grouped: bool) -> dict[str, int | bool]:
    even = positions % math.lcm(rows, keys) == 0
    return dict(ROWS=rows, KEYS=keys, EVEN=even, WHOLE=even and not grouped)


def blocks_for(
    teacher: tuple[Tensor, ...], student: tuple[Tensor, ...], heads: int, shared_bytes: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Blocks (queries, keys) of the rows and of the columns kernel; None where even the smallest do not fit.

    Args:
        teacher: [B, S, H_teacher] each.
        student: [B, S, H_student] each.
        heads: relation heads.
        shared_bytes: shared memory that a block of the device may have.
    """
    columns_bytes = sum(_padded(x[0].shape[-1] // heads) * x[0].element_size() for x in (teacher, student))
    rows = next((b for b in _ROWS_BLOCKS if tile_bytes(columns_bytes, b[0], b[1]) <= shared_bytes), None)
    columns = next((b for b in _COLUMNS_BLOCKS if tile_bytes(columns_bytes, b[1], b[0]) <= shared_bytes), None)
    return None if rows is None or columns is None else (rows, columns)


def tile_bytes(columns_bytes: int, kept: int, walked: int) -> int:
    """Shared memory of a kernel that keeps a tile of so many positions and walks over tiles of so many others.

    Teacher's and student's tiles, of those walked over as many as there are stages, and four numbers a position.
    """
    return columns_bytes * (kept + _STAGES * walked) + 4 * 4 * _STAGES * walked


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1 << 40
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _too_wide(dt: int, ds: int, device: torch.device):
    raise UserError(
        f"relation heads {dt} and {ds} wide do not fit into the shared memory of {torch.cuda.get_device_name(device)}: "
        'choose more relation heads, or relations.implementation = "auto"'
    )


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
