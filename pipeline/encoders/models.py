"""The frozen teacher and the student: loaded, shaped, built.

The teacher is built with its first L layers only, and ends at the projections of layer L. The student's last attention
output and feed-forward ("the tail") get no gradient from the relation loss. They are frozen, so that an optimizer
neither holds state for them nor lets weight decay shrink them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_prep.errors import UserError, first_line
from pipeline.encoders import student_init
from pipeline.encoders.architectures import architecture_of, plain_calls, position_limit, without_pooler
from pipeline.encoders.encoder import RelationEncoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "RelationEncoder",
    "StudentShape",
    "build_student",
    "load_teacher",
    "position_limit",
    "tail_parameter_names",
    "teacher_config",
    "with_layers",
]

FAMILIES = ("teacher", "bert")


def teacher_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Configuration of a teacher, without its weights.

    Args:
        model: local folder, or id of a model on the hub.
        trust_remote_code: run the code that comes with the model.

    Raises:
        UserError: there is no such model, or its architecture is unknown.
    """
    from transformers import AutoConfig

    is_path = os.path.isabs(model) or model.startswith((".", "~")) or Path(model).exists()
    if is_path and not (Path(model).expanduser() / "config.json").is_file():
        raise UserError(f"no model in {model}: a folder with config.json, model.safetensors and a tokenizer is needed")
    try:
        config = AutoConfig.from_pretrained(_location(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library has a kind of its own for every way in which a file can be wrong
        reason = first_line(error)
        raise UserError(
            f"cannot read the configuration of the model {model!r}: {reason}. "
            "Give a local folder or the id of a model on the hub."
        ) from error
    architecture_of(config)
    return plain_calls(config)


def load_teacher(
    model: str,
    *,
    layer: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> RelationEncoder:
    """A frozen teacher in eval mode that ends at the Q/K/V projections of `layer`.

    Args:
        model: local folder, or id of a model on the hub, with safetensors weights.
        layer: the layer compared, counted from 1 as in the paper; later layers are not loaded. Several layers, in
            rising order, make the teacher return a tuple.
        dtype: of the weights and of the result.
        device: where it runs.
        trust_remote_code: run the code that comes with the model.

    Raises:
        UserError: the model is missing or incomplete, its architecture unknown, or it has no such layer.
    """
    config = teacher_config(model, trust_remote_code)
    layers = None if isinstance(layer, int) else tuple(layer)
    for number in (layer,) if layers is None else layers:
        if not 1 <= number <= config.num_hidden_layers:
            raise UserError(
                f"teacher layer {number} does not exist: {model} has layers 1 to {config.num_hidden_layers}"
            )
    deepest = layer if layers is None else max(layers, default=1)
    backbone = _load_backbone(model, with_layers(config, deepest), dtype, trust_remote_code)
    return RelationEncoder(backbone, layers).to(device).eval().requires_grad_(False)


def _location(model: str) -> str:
    return os.path.expanduser(model)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of the configuration with another number of layers."""
    values = config.to_dict()
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    if kinds := values.pop("layer_types", None):  # of attention, one per layer; absent, the class makes its own
        values |= {"layer_types": kinds[:layers]} if layers <= len(kinds) else {}
    return type(config).from_dict(values)


def _load_backbone(model: str, config: PretrainedConfig, dtype: torch.dtype | str, trust: bool) -> PreTrainedModel:
    from transformers import AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # weights of the layers left out would be reported as unexpected
    try:
        backbone, report = AutoModel.from_pretrained(
            _location(model),
            config=config,
            dtype=dtype,
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            **without_pooler(config),
        )
    except Exception as error:  # as for the configuration
        reason = first_line(error)
        raise UserError(f"cannot load the weights of {model!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UserError(f"{model} lacks {len(missing)} weights of its architecture, such as {missing[0]}")
    return backbone


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """Size of a student: layers, hidden size, attention heads and inner size of the feed-forward."""

    layers: int
    hidden: int
    heads: int = 12
    feed_forward: int

    @classmethod
    def parse(cls, name: str, *, heads: int | None = None, feed_forward: int | None = None) -> StudentShape:
        """Shape from a name such as "6x384": layers x hidden, 12 heads, a feed-forward of 4 x hidden.

        Raises:
            UserError: the name does not read like that, or the heads do not divide the hidden size.
        """
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if not match:
            raise UserError(f"student shape {name!r} is not LAYERSxHIDDEN, such as 6x384")
        layers, hidden = int(match[1]), int(match[2])
        heads = heads or 12
        if not layers or not hidden or hidden % heads:
            raise UserError(f"student shape {name} needs a hidden size that its {heads} attention heads divide")
        return cls(layers=layers, hidden=hidden, heads=heads, feed_forward=feed_forward or 4 * hidden)


def build_student(
    shape: StudentShape,
    teacher: PretrainedConfig,
    *,
    family: str = "teacher",
    init: str = "random",
    tail_init: str = "random",
    dropout: float = 0.1,
    seed: int = 1,
    teacher_model: str | None = None,
    trust_remote_code: bool = False,
    layers: Sequence[int] | None = None,
) -> RelationEncoder:
    """A student in train mode, its tail frozen.

    Args:
        shape: its size.
        teacher: configuration of the teacher, which gives vocabulary, positions and special ids.
        family: "teacher" for the teacher's architecture, "bert" for BERT's with the teacher's vocabulary.
        init: first weights, see `pipeline.encoders.student_init`.
        tail_init: first (and last) weights of the tail, see `pipeline.encoders.student_init`.
        dropout: of hidden states and attention, in [0, 1).
        seed: of the random weights.
        teacher_model: where the teacher's weights are, for an `init` that uses them.
        trust_remote_code: run the code that comes with the teacher.
        layers: layers whose queries, keys and values the student returns, see `RelationEncoder`.

    Raises:
        UserError: family, init or tail_init is unknown, or the shape does not fit the architecture.
    """
    from transformers import AutoModel

    kind, origins = student_init.parse_init(init, shape.layers, teacher.num_hidden_layers)
    if tail_init not in student_init.TAIL_INITS:
        raise UserError(f"tail_init {tail_init!r} is unknown; choose one of {', '.join(student_init.TAIL_INITS)}")
    if kind != "random" and teacher_model is None:
        raise UserError(f"student init {init!r} needs the teacher's weights")
    config = student_config(shape, teacher, family=family, dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = RelationEncoder(AutoModel.from_config(config, dtype=torch.float32, **without_pooler(config)), layers)
    if kind != "random":
        needed = with_layers(teacher, 1) if kind == "embeddings" else teacher  # every rank reads them for itself
        weights = _load_backbone(teacher_model, needed, "auto", trust_remote_code)
        student_init.start_from_teacher(encoder, weights, kind, origins)
    if tail_init == "identity":
        student_init.clear_tail(encoder)
    for name in tail_parameter_names(encoder):
        encoder.get_parameter(name).requires_grad_(False)
    return encoder.train()


def student_config(shape: StudentShape, teacher: PretrainedConfig, *, family: str, dropout: float) -> PretrainedConfig:
    """The student's configuration: the teacher's, or BERT's, with the student's sizes and dropout."""
    if family not in FAMILIES:
        raise UserError(f"student family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    config = with_layers(teacher if family == "teacher" else _bert_config(teacher), shape.layers)
    row = architecture_of(config)
    if row.rotary and shape.hidden // shape.heads % 2:
        raise UserError(
            f"{config.model_type} needs attention heads of an even width; {shape.heads} heads of a hidden size of "
            f"{shape.hidden} are {shape.hidden // shape.heads} wide"
        )
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = shape.hidden
    config.hidden_size = shape.hidden
    config.num_attention_heads = shape.heads
    setattr(config, row.feed_forward_size, shape.feed_forward)
    for name in row.dropouts:
        setattr(config, name, dropout)
    config.architectures, config.name_or_path = None, ""
    return config


def _bert_config(teacher: PretrainedConfig) -> PretrainedConfig:
    from transformers import BertConfig

    special = {name: getattr(teacher, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return BertConfig(vocab_size=teacher.vocab_size, max_position_embeddings=position_limit(teacher), **special)


def tail_parameter_names(encoder: RelationEncoder) -> list[str]:
    """Names, relative to the encoder, of the parameters that the relation loss gives no gradient."""
    row, backbone = encoder.architecture, encoder.backbone
    layers = len(row.layer_list(backbone))
    last = f"{row.layers}.{layers - 1}."
    used = tuple(f"{last}{name}." for name in (*row.projections, *((row.norm,) if row.norm else ())))
    outside: Sequence[str] = (*row.final, "pooler", *(row.shared if layers == 1 else ()))
    return [
        f"backbone.{name}"
        for name, _ in backbone.named_parameters()
        if (name.startswith(last) and not name.startswith(used))
        or name.startswith(tuple(f"{prefix}." for prefix in outside))
    ]
