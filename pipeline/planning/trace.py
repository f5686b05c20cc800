"""What a micro-batch holds and does: its own forward and backward pass, on torch's meta device.

Tensors of the meta device have shapes and types and no memory, so the models run as they are, whatever their
architecture, and every tensor that comes and goes and every operation is counted. Two things are stood in for by what
they keep, and their operations are counted elsewhere (steps.py): an attention that holds no matrices (queries, keys,
values, its result and a number a head and position), and the relation loss (the gradient of queries, keys and values
in fp32).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.encoders.encoder import RelationEncoder
from pipeline.planning.counting import LiveBytes, Work

_NAME = "minilm_planned"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Bytes and operations of a micro-batch on one rank, besides the weights.

    Attributes:
        teacher: the most bytes that the teacher's forward pass holds, its result included.
        targets: the teacher's queries, keys and values, which wait for the loss.
        kept: what the student's forward pass leaves for the backward pass.
        student: the most that the student's forward pass holds.
        loss: the gradient of the student's queries, keys and values.
        backward: the most that the backward pass holds, `kept` included, where gradients of weights go at once.
        backward_with_gradients: the same where gradients of weights stay until the update.
        work: operations of the phases `teacher`, `student` and `backward`.
        fused_attention: whether teacher and student attend without matrices, which `work` then leaves out.
    """

    teacher: int
    targets: int
    kept: int
    student: int
    loss: int
    backward: int
    backward_with_gradients: int
    work: dict[str, Work]
    fused_attention: dict[str, bool]


def trace(teacher: RelationEncoder, student: RelationEncoder, *, samples: int, positions: int, on_cpu: bool) -> Trace:
    """Run a micro-batch of full windows.

    Args:
        teacher, student: on the meta device, of the type they compute in.
        samples, positions: of the micro-batch.
        on_cpu: as a CPU runs it, else as a GPU.
    """
    ids = torch.zeros(samples, positions, dtype=torch.long, device="meta")
    weights = [*teacher.parameters(), *student.parameters(), *teacher.buffers(), *student.buffers()]
    with ExitStack() as stack:
        live = stack.enter_context(LiveBytes([*weights, ids]))
        if not on_cpu:
            stack.enter_context(_dropout_of_gpus())
        fused = {"teacher": _is_fused(teacher, on_cpu), "student": _is_fused(student, on_cpu)}
        with torch.no_grad(), _attention(teacher, on_cpu):
            targets = teacher(ids)
        most_teacher, held = live.most, live.now
        work = {"teacher": live.take_work()}
        del targets
        found = {}
        for gradients_stay in (False, True):
            before = live.restart()
            with _attention(student, on_cpu):
                outputs = student(ids)
            most_student = live.most - before
            outputs = [outputs] if student.layers is None else outputs
            flat = [x for qkv in outputs for x in qkv]
            del outputs
            work["student"] = live.take_work()
            loss = sum(4 * x.numel() for x in flat)
            total = _Loss.apply(*flat)
            del flat
            kept = live.now - before - loss
            live.restart()
            live.take_work()
            with _attention(student, on_cpu):  # for activations that are computed again
                found[gradients_stay] = _backward(total, student, live, gradients_stay) - before
            work["backward"] = live.take_work()
    return Trace(
        teacher=most_teacher,
        targets=held,
        kept=kept,
        student=most_student,
        loss=loss,
        backward=found[False],
        backward_with_gradients=found[True],
        work=work,
        fused_attention=fused,
    )


def _backward(total: Tensor, student: RelationEncoder, live: LiveBytes, gradients_stay: bool) -> int:
    """The most bytes while it runs."""
    hooks = []
    for parameter in student.parameters():
        if parameter.requires_grad and not gradients_stay:
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop))
    total.backward()
    most = live.most
    for hook in hooks:
        hook.remove()
    for parameter in student.parameters():
        parameter.grad = None
    return most


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _dropout_of_gpus() -> Iterator[None]:
    """On a GPU dropout is one operation and keeps a byte an element; elsewhere several, and a number."""
    functional, plain = torch.nn.functional, torch.nn.functional.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else plain(x, p, training, inplace)

    functional.dropout = dropout
    try:
        yield
    finally:
        functional.dropout = plain


class _Loss(torch.autograd.Function):
    """The relation loss by what it keeps."""

    @staticmethod
    def forward(ctx, *student: Tensor) -> Tensor:
        ctx.save_for_backward(*(torch.empty_like(x, dtype=torch.float32) for x in student))
        ctx.dtypes = [x.dtype for x in student]
        return student[0].new_empty(())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple((grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


class _Attention(torch.autograd.Function):
    """An attention without matrices by what it keeps; queries, keys and values [..., positions, width]."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _: Tensor):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _is_fused(encoder: RelationEncoder, on_cpu: bool) -> bool:
    layers = encoder.architecture.layer_list(encoder.backbone)
    again = getattr(layers[0], "gradient_checkpointing", False)
    own = encoder.architecture.segments and not again  # encoders/unpadded.py
    return encoder.backbone.config._attn_implementation == "sdpa" and (own or not on_cpu)


@contextmanager
def _attention(encoder: RelationEncoder, on_cpu: bool) -> Iterator[None]:
    """Let an encoder attend without matrices, where it would."""
    from transformers import AttentionInterface

    def on_gpu(_module, query: Tensor, key: Tensor, value: Tensor, *_, **__):
        joined = (x.transpose(1, 2).contiguous() for x in (query, key, value))  # they are, but for rotated ones
        return _Attention.apply(*joined), None

    def on_processor(_module, query: Tensor, key: Tensor, value: Tensor, *_, **__):  # as cpu_attention.py does
        b, h, s, d = query.shape
        out = _Attention.apply(*(x.transpose(0, 1).reshape(h, b * s, d) for x in (query, key, value)))
        return out.view(h, b, s, d).permute(1, 2, 0, 3), None

    config, before = encoder.backbone.config, encoder.backbone.config._attn_implementation
    if _is_fused(encoder, on_cpu):
        AttentionInterface.register(_NAME, on_processor if on_cpu else on_gpu)
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
