"""First weights of a student: random as in the paper, or taken from the teacher; and those of its untrained tail.

    random          the architecture's own initialisation
    embeddings      the teacher's embedding tables, projected on their principal components; the layers random
    slice           embeddings and layers of the teacher, every axis thinned evenly to the student's size
    pca             the same with the residual stream projected on the embeddings' principal components

`slice` and `pca` take teacher layers spread evenly up to the last; `slice:2,4,6` names them, counted from 1, one per
student layer. With P [H_teacher, H_student] the projection (for `slice` a selection of columns), a matrix that reads
the residual stream becomes W P, one that writes into it P^T W. Thinning d dimensions of a head to d' would shrink its
scores x y^T / sqrt(d) by sqrt(d' / d); queries and keys are enlarged by (d / d')^(1/4) each to make up for it.

The tail (what the last layer does after its Q/K/V projections) is never trained by the relation loss:

    random          as the rest of a random student, for fine-tuning, as in the paper
    identity        its output projections are zero, so that the last hidden state is the (normalised) input of the last
                    layer, which training has shaped: features that are of use without fine-tuning
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.encoders.architectures import Architecture, architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pipeline.encoders.encoder import RelationEncoder

INITS = ("random", "embeddings", "slice", "pca")
TAIL_INITS = ("random", "identity")


def parse_init(init: str, student_layers: int, teacher_layers: int) -> tuple[str, list[int]]:
    """Kind of initialisation, and for each student layer the teacher layer (from 0) that it starts from.

    Raises:
        UserError: the kind is unknown, or the layers do not fit.
    """
    kind, _, listed = init.partition(":")
    if kind not in INITS or (listed and kind not in ("slice", "pca")):
        raise UserError(f"student init {init!r} is unknown; choose one of {', '.join(INITS)}, or such as slice:2,4,6")
    if not listed:
        return kind, [(i + 1) * teacher_layers // student_layers - 1 for i in range(student_layers)]
    try:
        layers = [int(number) - 1 for number in listed.split(",")]
    except ValueError:
        raise UserError(f"student init {init!r}: layers are numbers with commas between, such as slice:2,4,6") from None
    if len(layers) != student_layers or not all(0 <= layer < teacher_layers for layer in layers):
        raise UserError(
            f"student init {init!r} must name {student_layers} teacher layers from 1 to {teacher_layers}, one for each "
            "student layer"
        )
    return kind, layers


@torch.no_grad()
def start_from_teacher(student: RelationEncoder, teacher: PreTrainedModel, kind: str, layers: list[int]) -> None:
    """Overwrite the student's weights with those made from the teacher's.

    Raises:
        UserError: the architectures name their weights differently, or the student is the wider one.
    """
    row, config = student.architecture, student.config
    if config.hidden_size > teacher.config.hidden_size:
        raise UserError(f"init {kind!r} needs a student no wider than its teacher ({teacher.config.hidden_size})")
    source = dict(teacher.named_parameters())
    theirs = architecture_of(teacher.config)
    words = source[f"{theirs.word_embeddings}.weight"].float()
    projection = _projection(words, teacher.config.hidden_size, config, kind)
    tables = tuple(f"{name}." for name in (row.word_embeddings, *row.tables))
    for name, parameter in student.backbone.named_parameters():
        if kind == "embeddings" and not name.startswith(tables):
            continue
        origin = _origin(name, row, layers).replace(row.word_embeddings, theirs.word_embeddings)
        if origin not in source:
            if kind == "embeddings":  # a table that only the student's family has
                continue
            raise UserError(f"init {kind!r}: the teacher has no weight {origin!r}; choose 'random' for this pair")
        weight = source[origin].float()
        if name.startswith(f"{row.positions}."):  # the first real position moves where the families number differently
            first = theirs.position_offset(teacher.config) - row.position_offset(config)
            weight = weight[max(first, 0) :][: len(parameter)]
        if kind != "pca" or "norm" not in name.lower():  # the scales of a norm belong to dimensions that are gone
            parameter.copy_(_resized(weight, parameter.shape, _axes(name, row), projection))
    if kind != "embeddings":
        _keep_scale_of_scores(student, teacher)


def _projection(words: Tensor, available: int, config: PretrainedConfig, kind: str) -> Tensor:
    """The student's residual stream in the teacher's, [H_teacher, H_student]."""
    if kind == "slice" or words.shape[1] != available:  # some embeddings are narrower than the residual stream
        return torch.eye(available)[:, _spread(available, config.hidden_size)]
    return _principal_components(words, config.hidden_size)


def clear_tail(student: RelationEncoder) -> None:
    """Zero what the last layer's attention and feed-forward add to the residual stream."""
    layer = student.architecture.layer_list(student.backbone)[-1]
    for name in (student.architecture.attention_output, student.architecture.feed_forward_output):
        for parameter in layer.get_submodule(name).parameters():
            torch.nn.init.zeros_(parameter)


def _origin(name: str, row: Architecture, layers: list[int]) -> str:
    """The teacher's name for a student's parameter."""
    if not name.startswith(f"{row.layers}."):
        return name
    number, _, rest = name.removeprefix(f"{row.layers}.").partition(".")
    return f"{row.layers}.{layers[int(number)]}.{rest}"


def _axes(name: str, row: Architecture) -> tuple[str, str]:
    """What the axes of a matrix are: the residual stream or something else; a vector has the first one."""
    inside = name.removeprefix(f"{row.layers}.").partition(".")[2] if name.startswith(f"{row.layers}.") else ""
    writes = inside.startswith((f"{row.attention_output}.", f"{row.feed_forward_output}."))
    return ("residual", "other") if writes else ("other", "residual")


def _resized(weight: Tensor, shape: torch.Size, axes: tuple[str, str], projection: Tensor) -> Tensor:
    """A weight brought to the student's shape."""
    for axis, size in enumerate(shape):
        if axis < 2 and axes[axis] == "residual" and weight.shape[axis] == len(projection):
            weight = torch.tensordot(weight, projection, dims=([axis], [0])).movedim(-1, axis)
        else:
            weight = weight.index_select(axis, _spread(weight.shape[axis], size))
    return weight


def _spread(available: int, wanted: int) -> Tensor:
    return torch.arange(wanted) * available // wanted if wanted <= available else torch.arange(wanted) % available


def _principal_components(table: Tensor, width: int) -> Tensor:
    """Directions of largest variance of the rows of a table, [H, width], each with its largest entry positive."""
    vectors = torch.linalg.eigh(torch.cov(table.double().T))[1].flip(-1)[:, :width]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (vectors * signs).float()


def _keep_scale_of_scores(student: RelationEncoder, teacher: PreTrainedModel) -> None:
    row = student.architecture
    widths = [config.hidden_size // config.num_attention_heads for config in (teacher.config, student.config)]
    factor = (widths[0] / widths[1]) ** 0.25
    for layer in row.layer_list(student.backbone):
        for name in row.projections[:2]:
            for parameter in layer.get_submodule(name).parameters():
                rows = parameter.shape[0] * 2 // 3 if len(row.projections) == 1 else parameter.shape[0]
                parameter[:rows] *= factor
