"""An encoder that runs only as far as the queries, keys and values that the relation loss compares.

It wraps an ordinary Hugging Face encoder (`backbone`) without changing it: during its own forward the last layer is
replaced by its Q/K/V projections, and at any other time the backbone is the plain model, so that its names, its
`save_pretrained` and its forward are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.encoders import cpu_attention
from pipeline.encoders.architectures import (
    Architecture,
    architecture_of,
    mixes_neighbours,
    require_activation_checkpointing,
)
from pipeline.relations.pieces import segments
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
        if self._fits_cpu_attention(input_ids, attention_mask):
            return self._forward_without_padding(input_ids, attention_mask, position_ids, document_ids)
        allowed = allowed_scores(attention_mask, document_ids)
        with self._projecting() as found, self._masking(allowed, attention_mask, input_ids) as mask:
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
            if number not in (self.layers or ()):
                layer.compile(**({"dynamic": True} if ragged else {}), **options)
        self.is_compiled, self._always_masked = True, ragged

    def checkpoint_activations(self) -> None:
        """Compute the layers' activations again in the backward pass instead of keeping them.

        Raises:
            UserError: the architecture does not know how.
        """
        require_activation_checkpointing(self.config)
        self.backbone.gradient_checkpointing_enable()

    def _result(self, found: dict[int, QKV]) -> QKV | tuple[QKV, ...]:
        ordered = tuple(found[layer] for layer in sorted(found))
        return ordered[0] if self.layers is None else ordered

    def _fits_cpu_attention(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        if (
            input_ids.device.type != "cpu"
            or self.is_compiled
            or (attention_mask is not None and not attention_mask.any())
        ):
            return False
        layers = self.architecture.layer_list(self.backbone)
        checkpointing = getattr(layers[0], "gradient_checkpointing", False)  # would run layers again, outside of this
        return self.architecture.segments and self.config._attn_implementation == "sdpa" and not checkpointing

    def _forward_without_padding(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, document_ids: Tensor | None
    ) -> QKV:
        """The same on a CPU: real positions only, end to end in one row, attending inside their segments."""
        if attention_mask is None and document_ids is None:
            with self._projecting() as found, cpu_attention.installed(self.config, None):
                self.backbone(input_ids, position_ids=position_ids)
            return self._result(found)
        if position_ids is None:
            position_ids = self._default_positions(input_ids, attention_mask)
        if document_ids is not None:
            inside = document_ids >= 0
            attention_mask = inside if attention_mask is None else attention_mask & inside
        real = segments(attention_mask, document_ids, input_ids.shape, input_ids.device)
        ids, positions = (x.flatten()[real.order][None] for x in (input_ids, position_ids))
        with self._projecting() as found, cpu_attention.installed(self.config, real.sizes):
            self.backbone(ids, position_ids=positions)

        def padded(x: Tensor) -> Tensor:
            zeros = x.new_zeros(input_ids.numel(), x.shape[-1])
            return zeros.index_copy(0, real.order, x[0]).view(*input_ids.shape, -1)

        return self._result({layer: QKV(*map(padded, qkv)) for layer, qkv in found.items()})

    def _default_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """How the backbone numbers positions by itself, [batch, positions]."""
        numbers = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        if self.architecture.first_position is None and attention_mask is not None:  # RoBERTa skips padding
            numbers = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return numbers + self.architecture.position_offset(self.config)

    @contextmanager
    def _projecting(self) -> Iterator[dict[int, QKV]]:
        """Replace the last layer's forward by its projections; what the asked layers gave appears in the dictionary."""
        row, layers = self.architecture, self.architecture.layer_list(self.backbone)
        found: dict[int, QKV] = {}

        def forward(hidden_states: Tensor, *_: object, **__: object):
            found[len(layers)] = project(layers[-1], hidden_states, row)
            return (hidden_states, None) if row.layer_returns_tuple else hidden_states

        with ExitStack() as undo:
            for number in (self.layers or ())[:-1]:
                undo.enter_context(_watching(layers[number - 1], row, number, found))
            previous = layers[-1].__dict__.get("forward")
            layers[-1].forward = forward
            if previous is None:
                undo.callback(delattr, layers[-1], "forward")
            else:
                undo.callback(setattr, layers[-1], "forward", previous)
            yield found

    @contextmanager
    def _masking(
        self, allowed: Tensor | None, attention_mask: Tensor | None, input_ids: Tensor
    ) -> Iterator[Tensor | dict[str, Tensor] | None]:
        """The attention mask as the backbone takes it, from the allowed scores."""
        if self.architecture.mask == "deberta":  # wants [batch, positions] and makes its own scores' mask of it
            encoder = self.backbone.encoder
            if allowed is not None:
                encoder.get_attention_mask = lambda _: allowed
            try:
                yield torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            finally:
                encoder.__dict__.pop("get_attention_mask", None)
        elif allowed is None:
            yield None
        elif self.architecture.mask == "sliding":  # a ready mask is not narrowed to the window of local layers
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            near = (at[:, None] - at).abs() <= self.config.sliding_window
            masks = {"full_attention": allowed, "sliding_attention": allowed & near}
            yield {name: self._for_attention(mask) for name, mask in masks.items()}
        else:
            yield self._for_attention(allowed)

    def _for_attention(self, allowed: Tensor) -> Tensor:
        """SDPA takes booleans; a hand-written attention adds the mask to its scores."""
        if self.config._attn_implementation == "sdpa":
            return allowed
        dtype = self.backbone.dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def allowed_scores(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Which position may attend to which, bool [batch, 1, 1 or positions, positions]; None: all to all."""
    if attention_mask is None and document_ids is None:
        return None
    allowed = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if document_ids is not None:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        allowed = same if allowed is None else same & allowed
    # Scores with nothing allowed would give NaN, which even a gradient of zero does not remove.
    return allowed | ~allowed.any(-1, keepdim=True)


def project(layer: nn.Module, hidden_states: Tensor, architecture: Architecture) -> QKV:
    """Queries, keys and values of a layer for its input [batch, positions, hidden]."""
    if architecture.norm is not None:
        hidden_states = layer.get_submodule(architecture.norm)(hidden_states)
    outputs = [layer.get_submodule(name)(hidden_states) for name in architecture.projections]
    return _as_qkv(outputs)


def _as_qkv(outputs: list[Tensor]) -> QKV:
    return QKV(*(outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)))


@contextmanager
def _watching(layer: nn.Module, architecture: Architecture, number: int, found: dict[int, QKV]) -> Iterator[None]:
    """Put a layer's queries, keys and values into `found` while it runs as usual."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs.setdefault(name, output)  # some attentions project relative positions too, afterwards

    handles = [
        layer.get_submodule(name).register_forward_hook(partial(keep, name)) for name in architecture.projections
    ]
    try:
        yield
        found[number] = _as_qkv([outputs[name] for name in architecture.projections])
    finally:
        for handle in handles:
            handle.remove()
