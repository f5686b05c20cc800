"""Teacher and student of a recipe as sizes: on the meta device, from configurations alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError
from pipeline.config import Recipe
from pipeline.encoders.architectures import position_limit, without_pooler
from pipeline.encoders.encoder import RelationEncoder
from pipeline.encoders.models import build_student, tail_parameter_names, teacher_config, with_layers
from pipeline.training.build import compared_layers, student_shape
from pipeline.training.preflight import check_against_teacher

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BERT = dict(vocab_size=30_522, max_position_embeddings=512, type_vocab_size=2, pad_token_id=0)
_ROBERTA = dict(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
_MINI = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
# Teachers of the shipped recipes, and those near to them, for machines without the hub: model type and sizes.
KNOWN_TEACHERS: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base-uncased": ("bert", _BERT | _BASE),
    "bert-large-uncased": ("bert", _BERT | _LARGE),
    "bert-base-multilingual-cased": ("bert", _BERT | _BASE | dict(vocab_size=119_547)),
    "roberta-base": ("roberta", _ROBERTA | _BASE),
    "roberta-large": ("roberta", _ROBERTA | _LARGE),
    "xlm-roberta-base": ("xlm-roberta", _ROBERTA | _BASE | dict(vocab_size=250_002)),
    "xlm-roberta-large": ("xlm-roberta", _ROBERTA | _LARGE | dict(vocab_size=250_002)),
    "all-MiniLM-L6-v2": ("bert", _BERT | _MINI),
}


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a recipe trains and with what, without weights.

    Attributes:
        teacher, student: on the meta device, in fp32; the teacher ends at its compared layer.
        whole_teacher: parameters of the teacher with all its layers.
        known_from: where the teacher's sizes are from, in words.
    """

    recipe: Recipe
    teacher: RelationEncoder
    student: RelationEncoder
    whole_teacher: int
    known_from: str

    @property
    def teacher_parameters(self) -> int:
        return sum(p.numel() for p in self.teacher.parameters())

    @property
    def student_parameters(self) -> int:
        return sum(p.numel() for p in self.student.parameters())

    @property
    def trained(self) -> list[int]:
        """Sizes of the student's parameters that the optimizer changes."""
        return [p.numel() for p in self.student.parameters() if p.requires_grad]

    @property
    def frozen_parameters(self) -> int:
        return sum(self.student.get_parameter(name).numel() for name in tail_parameter_names(self.student))

    def in_type(self, dtype: torch.dtype) -> Models:
        """A copy that computes in another type."""
        teacher, student = (copy.deepcopy(encoder).to(dtype) for encoder in (self.teacher, self.student))
        return dataclasses.replace(self, teacher=teacher, student=student)


def models_of(recipe: Recipe, *, vocabulary: int | None = None, teacher_layer: int | None = None) -> Models:
    """Teacher and student of a recipe.

    Args:
        vocabulary: tokens of a trimmed vocabulary; the teacher's own if absent.
        teacher_layer: to which the teacher runs, for all students beside each other; the recipe's if absent.

    Raises:
        UserError: the teacher is unknown here and cannot be had, or the recipe does not fit it.
    """
    config, known_from = sizes_of(recipe)
    if vocabulary is not None:
        if not 0 < vocabulary <= config.vocab_size:
            raise UserError(
                f"--vocabulary {vocabulary:,}: the teacher {recipe.teacher.model} has {config.vocab_size:,} tokens; "
                "a trimmed vocabulary has fewer"
            )
        config.vocab_size = vocabulary
    check_against_teacher(
        recipe, layers=config.num_hidden_layers, hidden=config.hidden_size, positions=position_limit(config)
    )
    teacher_layers, student_layers = compared_layers(recipe)
    deepest = teacher_layer or recipe.teacher.layer
    if deepest > recipe.teacher.layer:
        teacher_layers = None  # what is watched on the way to the last layer takes no weights and no products
    student = recipe.student
    with torch.device("meta"):
        teacher = RelationEncoder(_backbone(with_layers(config, deepest)), teacher_layers)
        small = build_student(
            student_shape(recipe), config, family=student.family, dropout=student.dropout, layers=student_layers
        )
        whole = sum(p.numel() for p in _backbone(config).parameters())
    return Models(
        recipe=recipe,
        teacher=teacher.eval().requires_grad_(False),
        student=small,
        whole_teacher=whole,
        known_from=known_from,
    )


def sizes_of(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """The teacher's configuration, and where it is from: a local folder, the hub's cache, the table, or the hub."""
    model, trust = recipe.teacher.model, recipe.teacher.trust_remote_code
    if (Path(model).expanduser() / "config.json").is_file():
        return teacher_config(model, trust), "its folder"
    with contextlib.suppress(UserError), _offline():
        return teacher_config(model, trust), "the hub's cache"
    name = model.rstrip("/").rpartition("/")[2]
    if name in KNOWN_TEACHERS:
        kind, sizes = KNOWN_TEACHERS[name]
        return _config(kind, sizes), "the table of known teachers"
    return teacher_config(model, trust), "the hub"


@contextlib.contextmanager
def _offline():
    """Let the hub's library look at its cache alone."""
    import huggingface_hub.constants as hub

    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _config(kind: str, sizes: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **sizes)


def _backbone(config: PretrainedConfig):
    from transformers import AutoModel

    return AutoModel.from_config(config, dtype=torch.float32, **without_pooler(config))
