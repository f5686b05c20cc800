"""An encoder that runs only as far as the queries, keys and values that the relation loss compares.

It wraps an ordinary Hugging Face encoder (`backbone`) without changing it: during its own forward the last layer is
replaced by its Q/K/V projections, and at any other time the backbone is the plain model, so that its names, its
`save_pretrained` and its forward are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.encoders import masks, unpadded
from pipeline.encoders.architectures import (
    architecture_of,
    mixes_neighbours,
    require_activation_checkpointing,
)
from pipeline.encoders.projections import projecting
from pipeline.relations.qkv import QKV

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class RelationEncoder(nn.Module):
    """An encoder whose forward returns the queries, keys and values of its last layer.

    Attributes:
        backbone: the Hugging Face model; outside of this module's forward it behaves like any other.
        config: the backbone's configuration.
        layers: layers (from 1, ending with the last) whose queries, keys and values are returned, for studies that
            compare more than one; None: the last one's, not in a tuple.
    """

    def __init__(self, backbone: PreTrainedModel, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture_of(backbone.config)
        self.layers = None if layers is None else tuple(layers)
        self.is_compiled = self._always_masked = False
        depth = len(self.architecture.layer_list(backbone))
        if layers is not None and (not layers or sorted(set(layers)) != list(layers) or layers[-1] != depth):
            raise UserError(f"layers {list(layers)} must rise and end with the last layer that is run, {depth}")

    @property
    def config(self) -> PretrainedConfig:
        return self.backbone.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> QKV | tuple[QKV, ...]:
        """Queries, keys and values, [batch, positions, hidden] each, before any rotation.

        Args:
            input_ids: int64 [batch, positions].
            attention_mask: bool [batch, positions], True where there is a real token; None: no padding.
            position_ids: int64 [batch, positions], counted from 0; None: the model's own numbering.
            document_ids: int [batch, positions]; attention stays inside positions of equal number. None: no borders.
        """
        if document_ids is not None and mixes_neighbours(self.config):
            raise UserError(
                f"a {self.config.model_type} with a convolution (conv_kernel_size) lets documents of a window see each "
                'other: use data.attention = "window"'
            )
        if attention_mask is None and self._always_masked:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        if position_ids is not None:
            position_ids = position_ids + self.architecture.position_offset(self.config)
        inputs = input_ids, attention_mask, position_ids, document_ids
        run = (self.backbone, self.architecture)
        if not self.is_compiled and unpadded.is_possible(*run, input_ids, attention_mask):
            return self._result(unpadded.forward(*run, self._watched, *inputs))
        allowed = masks.allowed_scores(attention_mask, document_ids)
        with (
            projecting(*run, self._watched) as found,
            masks.masking(*run, allowed, attention_mask, input_ids) as mask,
        ):
            self.backbone(input_ids, attention_mask=mask, position_ids=position_ids)
        return self._result(found)

    def compile_layers(self, *, ragged: bool = False, **options: Any) -> None:
        """Compile every layer that runs as it is: not the last, of which only the projections run, nor those watched.

        One layer is compiled once and serves for all, so this takes seconds, not minutes.

        Args:
            ragged: batches differ in length and in whether they hold padding; one compiled form serves all of them.
            options: torch.compile's.
        """
        for number, layer in enumerate(self.architecture.layer_list(self.backbone)[:-1], start=1):
            if number not in self._watched:
                layer.compile(**({"dynamic": True} if ragged else {}), **options)
        self.is_compiled, self._always_masked = True, ragged

    def checkpoint_activations(self) -> None:
        """Compute the layers' activations again in the backward pass instead of keeping them.

        Raises:
            UserError: the architecture does not know how.
        """
        require_activation_checkpointing(self.config)
        self.backbone.gradient_checkpointing_enable()

    @property
    def _watched(self) -> tuple[int, ...]:
        """Layers before the last whose queries, keys and values are returned too."""
        return (self.layers or ())[:-1]

    def _result(self, found: dict[int, QKV]) -> QKV | tuple[QKV, ...]:
        ordered = tuple(found[layer] for layer in sorted(found))
        return ordered[0] if self.layers is None else ordered
