"""What the pipeline must know about an encoder architecture to distil it: one row each.

A row says where the layers are, which projections of a layer give its queries, keys and values, which norm comes before
them, how positions are numbered, and what the configuration calls its sizes and dropouts. Adding an architecture is
adding a row and running the equality test over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table; paths are relative to the backbone (`layers`, `final`) or to one layer (the others).

    Attributes:
        layers: the list of layers.
        projections: query, key and value projections; one name if a single projection gives all three side by side.
        norm: norm that a pre-norm layer applies to its input before the projections.
        attention_output: projection of the attention's output back into the residual stream.
        feed_forward_output: second projection of the feed-forward.
        final: parameters behind the last layer, other than a pooler.
        shared: parameters that only layers after the first use, or every layer's attention scores and nothing else.
        layer_returns_tuple: the layer returns (hidden states, attention maps or nothing) instead of hidden states.
        has_pooler: the backbone's constructor takes `add_pooling_layer`.
        first_position: number of the first position in the position table; None: one more than the padding id.
        feed_forward_size: the configuration's name of the inner size of the feed-forward.
        dropouts: the configuration's names of the dropout rates that the backbone uses.
        rotary: positions turn pairs of a head's dimensions, so that heads must have an even width.
        segments: attention runs through transformers' attention functions and knows positions by their ids alone, so
            that documents can be run end to end in one row.
        mask: how the backbone takes its attention mask, see `RelationEncoder`.
        word_embeddings: the word embeddings.
        positions: the position embeddings, if there are any.
        tables: other embeddings that are added to the words'.
    """

    layers: str = "encoder.layer"
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    norm: str | None = None
    attention_output: str = "attention.output.dense"
    feed_forward_output: str = "output.dense"
    final: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    layer_returns_tuple: bool = False
    has_pooler: bool = True
    first_position: int | None = 0
    feed_forward_size: str = "intermediate_size"
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    rotary: bool = False
    segments: bool = True
    mask: str = "scores"
    word_embeddings: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    tables: tuple[str, ...] = ("embeddings.position_embeddings", "embeddings.token_type_embeddings")

    def layer_list(self, backbone: PreTrainedModel) -> nn.ModuleList:
        return backbone.get_submodule(self.layers)

    def position_offset(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1 if self.first_position is None else self.first_position


_ROBERTA = Architecture(first_position=None)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta-xl": Architecture(
        norm="attention.self_attn_layer_norm", final=("encoder.LayerNorm",), first_position=None
    ),
    "electra": Architecture(has_pooler=False),
    "mpnet": Architecture(
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        shared=("encoder.relative_attention_bias",),
        layer_returns_tuple=True,
        first_position=2,
        segments=False,
        tables=("embeddings.position_embeddings",),
    ),
    "deberta-v2": Architecture(
        projections=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        shared=("encoder.rel_embeddings", "encoder.LayerNorm", "encoder.conv"),
        layer_returns_tuple=True,
        has_pooler=False,
        segments=False,
        mask="deberta",
    ),
    "modernbert": Architecture(
        layers="layers",
        projections=("attn.Wqkv",),
        norm="attn_norm",
        attention_output="attn.Wo",
        feed_forward_output="mlp.Wo",
        final=("final_norm",),
        has_pooler=False,
        dropouts=("embedding_dropout", "mlp_dropout", "attention_dropout"),
        rotary=True,
        segments=False,
        mask="sliding",
        word_embeddings="embeddings.tok_embeddings",
        tables=(),
    ),
    "distilbert": Architecture(
        layers="transformer.layer",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        feed_forward_output="ffn.lin2",
        has_pooler=False,
        feed_forward_size="hidden_dim",
        dropouts=("dropout", "attention_dropout"),
        tables=("embeddings.position_embeddings",),
    ),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of a configuration.

    Raises:
        UserError: there is none; the message names those there are.
    """
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"models of type {config.model_type!r} cannot be distilled; known types are "
            f"{', '.join(sorted(ARCHITECTURES))}. A new one is a row in pipeline/encoders/architectures.py."
        )
    return ARCHITECTURES[config.model_type]


PLAIN_CALLS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False}


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Arguments that keep the constructor of the encoder from adding a pooler, which nothing here trains or reads."""
    return {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}


def plain_calls(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration itself, without what its owner asks of every call: tuples, hidden states, attentions."""
    for name, value in PLAIN_CALLS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def position_limit(config: PretrainedConfig) -> int:
    """Longest sample in positions that a model of this configuration takes."""
    return config.max_position_embeddings - architecture_of(config).position_offset(config)


def mixes_neighbours(config: PretrainedConfig) -> bool:
    """Whether something else than attention lets positions see each other: DeBERTa-v2's convolution."""
    return bool(getattr(config, "conv_kernel_size", 0))


def require_activation_checkpointing(config: PretrainedConfig) -> None:
    """Refuse a configuration whose model cannot compute its activations again."""
    from transformers import MODEL_MAPPING

    if not MODEL_MAPPING[type(config)].supports_gradient_checkpointing:
        raise UserError(
            f"{config.model_type} models cannot compute their activations again in the backward pass: take the section "
            "activation_checkpointing out of the DeepSpeed configuration"
        )
