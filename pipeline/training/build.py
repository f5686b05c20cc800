"""What a recipe asks for, made of it: models before their first step, and the options of the data."""

import dataclasses

from transformers import PretrainedConfig

from pipeline.config import Recipe
from pipeline.data.loader import DataOptions
from pipeline.encoders.models import RelationEncoder, StudentShape, build_student, teacher_config


def teacher_settings(recipe: Recipe) -> PretrainedConfig:
    """The teacher's configuration."""
    return teacher_config(recipe.teacher.model, trust_remote_code=recipe.teacher.trust_remote_code)


def student_shape(recipe: Recipe) -> StudentShape:
    """The student's sizes; a UserError where they do not go together."""
    student = recipe.student
    return StudentShape.parse(student.shape, heads=student.heads, feed_forward=student.feed_forward)


def data_options(recipe: Recipe) -> DataOptions:
    """Which samples come in which order."""
    names = {field.name for field in dataclasses.fields(DataOptions)} - {"seed"}
    return DataOptions(seed=recipe.run.seed, **{name: getattr(recipe.data, name) for name in names})


def compared_layers(recipe: Recipe) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Layers of teacher and student that are compared, from 1; None for the usual single pair."""
    pairs = recipe.relations.layers
    if pairs is None:
        return None, None
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def fresh_student(recipe: Recipe) -> RelationEncoder:
    """The student as it is before its first step; the same one at every call."""
    return build_student(
        student_shape(recipe),
        teacher_settings(recipe),
        family=recipe.student.family,
        init=recipe.student.init,
        tail_init=recipe.student.tail_init,
        dropout=recipe.student.dropout,
        seed=recipe.run.seed,
        teacher_model=recipe.teacher.model,
        trust_remote_code=recipe.teacher.trust_remote_code,
        layers=compared_layers(recipe)[1],
    )
