"""Attention masks, in the form that each backbone takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.encoders.architectures import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


@contextmanager
def masking(
    backbone: PreTrainedModel,
    architecture: Architecture,
    allowed: Tensor | None,
    attention_mask: Tensor | None,
    input_ids: Tensor,
) -> Iterator[Tensor | dict[str, Tensor] | None]:
    """The attention mask as the backbone takes it, from the allowed scores."""
    if architecture.mask == "deberta":  # wants [batch, positions] and makes its own scores' mask of it
        encoder = backbone.encoder
        if allowed is not None:
            encoder.get_attention_mask = lambda _: allowed
        try:
            yield torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        finally:
            encoder.__dict__.pop("get_attention_mask", None)
    elif allowed is None:
        yield None
    elif architecture.mask == "sliding":  # a ready mask is not narrowed to the window of local layers
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        near = (at[:, None] - at).abs() <= backbone.config.sliding_window
        masks = {"full_attention": allowed, "sliding_attention": allowed & near}
        yield {name: _for_attention(backbone, mask) for name, mask in masks.items()}
    else:
        yield _for_attention(backbone, allowed)


def _for_attention(backbone: PreTrainedModel, allowed: Tensor) -> Tensor:
    """SDPA takes booleans; a hand-written attention adds the mask to its scores."""
    if backbone.config._attn_implementation == "sdpa":
        return allowed
    dtype = backbone.dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
