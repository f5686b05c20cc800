"""Teacher and student: Hugging Face encoders that run only as far as the queries, keys and values the loss compares.

`RelationEncoder` wraps an ordinary encoder (`backbone`) without changing it: during its own forward the last layer is
replaced by its Q/K/V projections, and at any other time the backbone is the plain model, so that its names, its
`save_pretrained` and its forward are Hugging Face's. The teacher is built with its first L layers only.

The last layer's attention output and feed-forward ("the tail") get no gradient from this loss. They are frozen, so that
an optimizer neither holds state for them nor lets weight decay shrink them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline import cpu_attention, student_init
from pipeline.architectures import Architecture, architecture_of, position_limit
from pipeline.pieces import segments
from pipeline.relations import QKV

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
]

FAMILIES = ("teacher", "bert")


class RelationEncoder(nn.Module):
    """An encoder whose forward returns the queries, keys and values of its last layer.

    Attributes:
        backbone: the Hugging Face model; outside of this module's forward it behaves like any other.
        config: the backbone's configuration.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture_of(backbone.config)

    @property
    def config(self) -> PretrainedConfig:
        return self.backbone.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> QKV:
        """Queries, keys and values of the last layer, [batch, positions, hidden] each, before any rotation.

        Args:
            input_ids: int64 [batch, positions].
            attention_mask: bool [batch, positions], True where there is a real token; None: no padding.
            position_ids: int64 [batch, positions], counted from 0; None: the model's own numbering.
            document_ids: int [batch, positions]; attention stays inside positions of equal number. None: no borders.
        """
        if position_ids is not None:
            position_ids = position_ids + self.architecture.position_offset(self.config)
        if self._fits_cpu_attention(input_ids, attention_mask):
            return self._forward_without_padding(input_ids, attention_mask, position_ids, document_ids)
        allowed = allowed_scores(attention_mask, document_ids)
        with self._projecting_last_layer() as qkv, self._masking(allowed, attention_mask, input_ids) as mask:
            self.backbone(input_ids, attention_mask=mask, position_ids=position_ids)
        return qkv[0]

    def _fits_cpu_attention(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        if input_ids.device.type != "cpu" or (attention_mask is not None and not attention_mask.any()):
            return False
        layers = self.architecture.layer_list(self.backbone)
        checkpointing = getattr(layers[0], "gradient_checkpointing", False)  # would run layers again, outside of this
        return self.architecture.segments and self.config._attn_implementation == "sdpa" and not checkpointing

    def _forward_without_padding(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, document_ids: Tensor | None
    ) -> QKV:
        """The same on a CPU: real positions only, end to end in one row, attending inside their segments."""
        if attention_mask is None and document_ids is None:
            with self._projecting_last_layer() as qkv, cpu_attention.installed(self.config, None):
                self.backbone(input_ids, position_ids=position_ids)
            return qkv[0]
        if position_ids is None:
            position_ids = self._default_positions(input_ids, attention_mask)
        if document_ids is not None:
            real = document_ids >= 0
            attention_mask = real if attention_mask is None else attention_mask & real
        found = segments(attention_mask, document_ids, input_ids.shape, input_ids.device)
        ids, positions = (x.flatten()[found.order][None] for x in (input_ids, position_ids))
        with self._projecting_last_layer() as qkv, cpu_attention.installed(self.config, found.sizes):
            self.backbone(ids, position_ids=positions)
        zeros = qkv[0].query.new_zeros(input_ids.numel(), qkv[0].query.shape[-1])
        return QKV(*(zeros.index_copy(0, found.order, x[0]).view(*input_ids.shape, -1) for x in qkv[0]))

    def _default_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """How the backbone numbers positions by itself, [batch, positions]."""
        numbers = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        if self.architecture.first_position is None and attention_mask is not None:  # RoBERTa skips padding
            numbers = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return numbers + self.architecture.position_offset(self.config)

    @contextmanager
    def _projecting_last_layer(self) -> Iterator[list[QKV]]:
        """Replace the last layer's forward by its projections, whose result appears in the list."""
        layer = self.architecture.layer_list(self.backbone)[-1]
        found: list[QKV] = []

        def forward(hidden_states: Tensor, *_: object, **__: object):
            found.append(project(layer, hidden_states, self.architecture))
            return (hidden_states, None) if self.architecture.layer_returns_tuple else hidden_states

        previous = layer.__dict__.get("forward")
        layer.forward = forward
        try:
            yield found
        finally:
            if previous is None:
                del layer.forward
            else:
                layer.forward = previous

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
    return QKV(*(outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)))


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
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the configuration of the model {model!r}: {str(error).splitlines()[0]}. "
            "Give a local folder or the id of a model on the hub."
        ) from error
    architecture_of(config)
    return config


def load_teacher(
    model: str,
    *,
    layer: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> RelationEncoder:
    """A frozen teacher in eval mode that ends at the Q/K/V projections of `layer`.

    Args:
        model: local folder, or id of a model on the hub, with safetensors weights.
        layer: the layer compared, counted from 1 as in the paper; later layers are not loaded.
        dtype: of the weights and of the result.
        device: where it runs.
        trust_remote_code: run the code that comes with the model.

    Raises:
        UserError: the model is missing or incomplete, its architecture unknown, or it has no such layer.
    """
    config = teacher_config(model, trust_remote_code)
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(f"teacher layer {layer} does not exist: {model} has layers 1 to {config.num_hidden_layers}")
    backbone = _load_backbone(model, with_layers(config, layer), dtype, trust_remote_code)
    return RelationEncoder(backbone).to(device).eval().requires_grad_(False)


def _location(model: str) -> str:
    return os.path.expanduser(model)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of the configuration with another number of layers."""
    values = config.to_dict()
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    if kinds := values.pop("layer_types", None):  # of attention, one per layer; absent, the class makes its own
        values |= {"layer_types": kinds[:layers]} if layers <= len(kinds) else {}
    return type(config).from_dict(values)


def _load_backbone(model: str, config: PretrainedConfig, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    from transformers import AutoModel
    from transformers.utils import logging

    options = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
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
            **options,
        )
    except OSError as error:
        raise UserError(f"cannot load the weights of {model!r}: {str(error).splitlines()[0]}") from error
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
) -> RelationEncoder:
    """A student in train mode, its tail frozen.

    Args:
        shape: its size.
        teacher: configuration of the teacher, which gives vocabulary, positions and special ids.
        family: "teacher" for the teacher's architecture, "bert" for BERT's with the teacher's vocabulary.
        init: first weights, see `pipeline.student_init`.
        tail_init: first (and last) weights of the tail, see `pipeline.student_init`.
        dropout: of hidden states and attention, in [0, 1).
        seed: of the random weights.
        teacher_model: where the teacher's weights are, for an `init` that uses them.
        trust_remote_code: run the code that comes with the teacher.

    Raises:
        UserError: family, init or tail_init is unknown, or the shape does not fit the architecture.
    """
    from transformers import AutoModel

    kind, layers = student_init.parse_init(init, shape.layers, teacher.num_hidden_layers)
    if tail_init not in student_init.TAIL_INITS:
        raise UserError(f"tail_init {tail_init!r} is unknown; choose one of {', '.join(student_init.TAIL_INITS)}")
    if kind != "random" and teacher_model is None:
        raise UserError(f"student init {init!r} needs the teacher's weights")
    config = student_config(shape, teacher, family=family, dropout=dropout)
    options = {"add_pooling_layer": False} if architecture_of(config).has_pooler else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = RelationEncoder(AutoModel.from_config(config, dtype=torch.float32, **options))
    if kind != "random":
        weights = _load_backbone(teacher_model, teacher, torch.float32, trust_remote_code)
        student_init.start_from_teacher(encoder, weights, kind, layers)
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
