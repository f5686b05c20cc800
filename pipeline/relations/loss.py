"""The loss of MiniLMv2: KL divergence between the self-attention relations of teacher and student.

Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation", arXiv 2012.15828, section 3. Queries, keys and
values of one layer are joined over the attention heads and split again into A relation heads of width d = hidden / A.
For a pair (x, y) of {Q, K, V} and a row of the batch with n real positions:

    R(x, y) = softmax(x y^T / sqrt(d))                                          per relation head, [n, n]
    L(x, y) = 1 / (A n) * sum over heads and positions of KL(R_teacher || R_student)

averaged over the rows of the batch; the total is the weighted sum over the chosen pairs. Padding takes part neither as
a query nor as a key, and with `document_ids` a relation stays inside its document.

Three implementations of one function: `reference` builds the matrices and reads like the equations above, `chunked`
(relation_blocks.py) keeps only a block of them and runs on any device, `triton` (relation_kernel.py) keeps none.

Shapes: B rows, S positions, H hidden, A relation heads, d = H / A, n real positions of a document in a row.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.relations.qkv import QKV

PAIRS = ("qq", "kk", "vv", "qk", "qv", "kq", "kv", "vq", "vk")
IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")


@dataclass(frozen=True, kw_only=True)
class RelationLoss:
    """Weighted `total` (a scalar to call backward on) and the unweighted loss of each pair, detached."""

    total: Tensor
    per_pair: dict[str, Tensor]


def relation_loss(
    teacher: QKV,
    student: QKV,
    *,
    heads: int,
    pairs: Mapping[str, float] | None = None,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    implementation: str = "auto",
) -> RelationLoss:
    """Distance between the self-attention relations of teacher and student.

    Args:
        teacher: [B, S, H_teacher] each; no gradient flows into it.
        student: [B, S, H_student] each.
        heads: relation heads A; divides both hidden sizes.
        pairs: weight of each pair, a subset of `PAIRS`; Q-Q, K-K and V-V with weight 1 unless given.
        mask: bool, or 0 and 1, [B, S], true where there is a real token; None when there is no padding. What teacher
            and student hold at padding, be it NaN, does not matter.
        document_ids: int [B, S]; relations are kept between positions with equal numbers. Negative is padding.
        implementation: one of `IMPLEMENTATIONS`; `auto` takes triton on CUDA and chunked elsewhere.

    Raises:
        UserError: the heads do not divide the hidden sizes, or a pair or implementation is unknown.
        ValueError: the shapes of teacher, student, mask and document_ids do not belong together, or the mask is one of
            numbers to add to scores.

    A batch without positions has a loss of 0.
    """
    pairs = {"qq": 1.0, "kk": 1.0, "vv": 1.0} if pairs is None else dict(pairs)
    _check(teacher, student, heads, pairs, mask, document_ids)
    if mask is not None:
        mask = mask.bool()
    if document_ids is not None:
        if document_ids.dtype == torch.int64:  # the numbers may be of any size, and only equality counts
            document_ids = torch.where(document_ids < 0, -1, document_ids.unique(return_inverse=True)[1]).int()
        real = document_ids >= 0
        mask = real if mask is None else mask & real
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if not teacher.query.shape[:2].numel():
        nothing = sum(x.sum() for x in student).float() * 0.0
        return RelationLoss(total=nothing, per_pair={pair: nothing.detach() for pair in pairs})
    if implementation == "auto":
        implementation = _best_implementation(teacher, student, heads)
    if implementation == "reference":
        losses = _reference(teacher, student, heads, pairs, mask, document_ids)
        total = sum(weight * losses[i] for i, weight in enumerate(pairs.values()))
    else:
        total, losses = _LossAndGradient.apply(
            _fused(implementation), teacher, heads, pairs, mask, document_ids, _wants_gradient(student), *student
        )
    return RelationLoss(total=total, per_pair=dict(zip(pairs, losses.detach().unbind(), strict=True)))


def layerwise_relation_loss(
    teacher: Sequence[QKV], student: Sequence[QKV], *, weights: Sequence[float], **options: Any
) -> RelationLoss:
    """Weighted sum of the loss over several pairs of layers, for studies; the paper and the recipes use one pair.

    Args:
        teacher: one QKV for each pair of layers.
        student: the same.
        weights: of the pairs of layers.
        options: those of `relation_loss`.

    Returns:
        The weighted total, and the losses as `"1.qq"`, numbered by the pair of layers from 1.
    """
    losses = [relation_loss(t, s, **options) for t, s in zip(teacher, student, strict=True)]
    total = sum(weight * loss.total for weight, loss in zip(weights, losses, strict=True))
    parts = {f"{i}.{pair}": value for i, loss in enumerate(losses, 1) for pair, value in loss.per_pair.items()}
    return RelationLoss(total=total, per_pair=parts)


def _check(teacher: QKV, student: QKV, heads: int, pairs: Mapping[str, float], mask, document_ids) -> None:
    if not pairs or not set(pairs) <= set(PAIRS):
        raise UserError(f"unknown relation pairs {sorted(pairs)}; choose one or more of {', '.join(PAIRS)}")
    for role, qkv in (("teacher", teacher), ("student", student)):
        hidden = qkv.query.shape[-1]
        if heads < 1 or hidden % heads:
            raise UserError(f"{heads} relation heads do not divide the {role}'s hidden size {hidden}; choose a divisor")
        if any(x.shape != qkv.query.shape for x in qkv):
            raise ValueError(f"the {role}'s Q, K, V differ in shape: {[tuple(x.shape) for x in qkv]}")
    positions = teacher.query.shape[:2]
    for name, shape in (
        ("student", student.query.shape[:2]),
        ("mask", positions if mask is None else mask.shape),
        ("document_ids", positions if document_ids is None else document_ids.shape),
    ):
        if shape != positions:
            raise ValueError(f"teacher has [batch, positions] {tuple(positions)}, {name} has {tuple(shape)}")
    for name, x in (("mask", mask), ("document_ids", document_ids)):
        if x is not None and (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name} is of type {x.dtype}; expected booleans or whole numbers")


def _best_implementation(teacher: QKV, student: QKV, heads: int) -> str:
    if student.query.device.type != "cuda" or _compute_dtype(*teacher, *student) == torch.float64:
        return "chunked"
    if not importlib.util.find_spec("triton"):
        return "chunked"
    from pipeline.relations.kernel import blocks_for

    device = torch.cuda.get_device_properties(student.query.device)
    if blocks_for(teacher, student, heads, device.shared_memory_per_block_optin) is not None:
        return "triton"
    warnings.warn(
        f"relation heads of {teacher.query.shape[-1] // heads} and {student.query.shape[-1] // heads} dimensions do "
        f"not fit into the shared memory of {device.name}: the loss is computed block by block, which is slower",
        stacklevel=3,
    )
    return "chunked"


def _fused(implementation: str) -> Callable[..., Tensor]:
    """The function behind an implementation that computes losses and gradients together."""
    if implementation == "chunked":
        from pipeline.relations.blocks import blockwise_losses

        return blockwise_losses
    try:
        from pipeline.relations.kernel import kernel_losses
    except ModuleNotFoundError as error:
        raise UserError("implementation 'triton' needs the package triton; 'auto' does without it") from error
    return kernel_losses


def _wants_gradient(student: QKV) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in student)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _pair_of(qkv: QKV, pair: str) -> tuple[Tensor, Tensor]:
    return qkv["qkv".index(pair[0])], qkv["qkv".index(pair[1])]


# --- reference: the equations, one line each ---------------------------------------------------------------------


def relation_heads(x: Tensor, heads: int) -> Tensor:
    """Split the joined hidden axis into relation heads: [B, S, H] -> [B, A, S, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def relation_log_probs(x: Tensor, y: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """log softmax(x y^T / sqrt(d)): [B, S, H] twice -> [B, A, S, S]; -inf where `allowed` [B, 1, S, S] is False."""
    x, y = relation_heads(x, heads), relation_heads(y, heads)
    scores = x @ y.transpose(-1, -2) / math.sqrt(x.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).log_softmax(-1)


def _reference(teacher: QKV, student: QKV, heads: int, pairs, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Loss of each pair, [pairs], through ordinary autograd; holds matrices of [B, A, S, S]."""
    dtype = _compute_dtype(*teacher, *student)
    b, s = student.query.shape[:2]
    real = student.query.new_ones(b, s, dtype=torch.bool) if mask is None else mask
    allowed = real[:, :, None] & real[:, None, :]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    # A padding query has no key at all; its softmax is taken over every position and thrown away below.
    allowed = (allowed | ~real[:, :, None])[:, None]
    losses = []
    for pair in pairs:
        # Padding is set to 0 first: 0 times NaN would be NaN.
        x_t, y_t = (x.detach().to(dtype).masked_fill(~real[..., None], 0.0) for x in _pair_of(teacher, pair))
        x_s, y_s = (x.to(dtype).masked_fill(~real[..., None], 0.0) for x in _pair_of(student, pair))
        log_t, log_s = relation_log_probs(x_t, y_t, heads, allowed), relation_log_probs(x_s, y_s, heads, allowed)
        divergence = (log_t.exp() * (log_t - log_s).masked_fill(~allowed, 0.0)).sum(-1)  # [B, A, S]
        per_row = divergence.masked_fill(~real[:, None], 0.0).sum((1, 2)) / (heads * real.sum(-1).clamp(min=1))
        losses.append(per_row.mean())
    return torch.stack(losses)


# --- fused: loss and gradient in one pass ----------------------------------------------------------------------------


class _LossAndGradient(torch.autograd.Function):
    """The loss, whose gradient is made in the same pass: backward only scales it.

    `fill` is `blockwise_losses` or `kernel_losses`: gives the loss of each pair and adds to the gradients it is handed.
    """

    @staticmethod
    def forward(ctx, fill, teacher: QKV, heads: int, pairs, mask, documents, wants_gradient: bool, *student: Tensor):
        dtype = _compute_dtype(*teacher, *student)
        # Contiguous whatever the student's layout is: implementations write into views of them.
        grads = tuple(x.new_zeros(x.shape, dtype=dtype) for x in student) if wants_gradient else ()
        losses = fill(QKV(*teacher), QKV(*student), grads, heads, pairs, mask, documents)
        total = losses @ losses.new_tensor(list(pairs.values()))
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in student]
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor, _: Any):
        needed = ctx.needs_input_grad[-3:]
        grads = (
            (grad_total * grad).to(dtype) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
        )
        return (None,) * 7 + tuple(grads)
