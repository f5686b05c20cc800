"""Queries, keys and values out of the layers of a backbone while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.encoders.architectures import Architecture
from pipeline.relations.qkv import QKV

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def projecting(
    backbone: PreTrainedModel, architecture: Architecture, watched: Sequence[int]
) -> Iterator[dict[int, QKV]]:
    """Replace the last layer's forward by its projections; what it gives appears in the dictionary, by layers from 1.

    Args:
        backbone: run inside of this context.
        architecture: its row.
        watched: earlier layers (from 1) whose queries, keys and values are wanted too.
    """
    row, layers = architecture, architecture.layer_list(backbone)
    found: dict[int, QKV] = {}

    def forward(hidden_states: Tensor, *_: object, **__: object):
        found[len(layers)] = project(layers[-1], hidden_states, row)
        return (hidden_states, None) if row.layer_returns_tuple else hidden_states

    with ExitStack() as undo:
        for number in watched:
            undo.enter_context(_watching(layers[number - 1], row, number, found))
        previous = layers[-1].__dict__.get("forward")
        layers[-1].forward = forward
        if previous is None:
            undo.callback(delattr, layers[-1], "forward")
        else:
            undo.callback(setattr, layers[-1], "forward", previous)
        yield found


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
