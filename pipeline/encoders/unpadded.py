"""An encoder's forward on a CPU without padding: real positions only, end to end in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.encoders import cpu_attention
from pipeline.encoders.architectures import Architecture
from pipeline.encoders.projections import projecting
from pipeline.relations.pieces import segments
from pipeline.relations.qkv import QKV

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_possible(
    backbone: PreTrainedModel, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor | None
) -> bool:
    """Whether this batch of this backbone can be run so: on a CPU, with an attention that can be replaced."""
    if input_ids.device.type != "cpu" or (attention_mask is not None and not attention_mask.any()):
        return False
    layers = architecture.layer_list(backbone)
    checkpointing = getattr(layers[0], "gradient_checkpointing", False)  # would run layers again, outside of this
    return architecture.segments and backbone.config._attn_implementation == "sdpa" and not checkpointing


def forward(
    backbone: PreTrainedModel,
    architecture: Architecture,
    watched: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
) -> dict[int, QKV]:
    """Queries, keys and values by layer, as `projecting` finds them; zeros where there is padding.

    Args:
        backbone, architecture: of a `RelationEncoder`.
        watched: layers (from 1) before the last whose queries, keys and values are wanted too.
        input_ids, attention_mask, document_ids: as in `RelationEncoder.forward`.
        position_ids: as the backbone counts; None: its own numbering.
    """
    if attention_mask is None and document_ids is None:
        with projecting(backbone, architecture, watched) as found, cpu_attention.installed(backbone.config, None):
            backbone(input_ids, position_ids=position_ids)
        return found
    if position_ids is None:
        position_ids = _default_positions(backbone, architecture, input_ids, attention_mask)
    if document_ids is not None:
        inside = document_ids >= 0
        attention_mask = inside if attention_mask is None else attention_mask & inside
    real = segments(attention_mask, document_ids, input_ids.shape, input_ids.device)
    ids, positions = (x.flatten()[real.order][None] for x in (input_ids, position_ids))
    with projecting(backbone, architecture, watched) as found, cpu_attention.installed(backbone.config, real.sizes):
        backbone(ids, position_ids=positions)

    def padded(x: Tensor) -> Tensor:
        zeros = x.new_zeros(input_ids.numel(), x.shape[-1])
        return zeros.index_copy(0, real.order, x[0]).view(*input_ids.shape, -1)

    return {layer: QKV(*map(padded, qkv)) for layer, qkv in found.items()}


def _default_positions(
    backbone: PreTrainedModel, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """How the backbone numbers positions by itself, [batch, positions]."""
    numbers = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    if architecture.first_position is None and attention_mask is not None:  # RoBERTa skips padding
        numbers = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return numbers + architecture.position_offset(backbone.config)
