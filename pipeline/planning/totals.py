"""The whole run: its time, what it writes, what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import Corpus
from pipeline.engine import deepspeed_config
from pipeline.planning.models import Models
from pipeline.planning.steps import Step

DISK_BYTES_A_SECOND = 1e9
TEXT_BYTES_A_TOKEN = 4  # measured on English, French and Spanish (docs/prepare.md)
PREPARE_BYTES_A_CORE = 29.5e6  # of JSON lines and plain text, with XLM-R's vocabulary (docs/prepare.md)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Of the whole run.

    Attributes:
        seconds: steps, validation and saving.
        gpu_hours: of all devices.
        checkpoint_bytes, save_seconds: of one checkpoint, all students.
        checkpoints_kept: at most.
        tokens: that training reads.
        corpus_tokens, corpus_bytes: of the corpus on disk; of one that is read once where there is none.
        corpus_from: where these are from, in words.
        text_bytes, prepare_core_hours: of its text, and of `minilm prepare`.
    """

    seconds: float
    gpu_hours: float
    checkpoint_bytes: int
    save_seconds: float
    checkpoints_kept: int
    tokens: int
    corpus_tokens: int
    corpus_bytes: int
    corpus_from: str
    text_bytes: float
    prepare_core_hours: float


def totals_of(
    students: list[Models], config: dict[str, Any], step: Step, ranks: int, text_bytes: float | None
) -> Totals:
    """Of the run that a step is one of.

    Args:
        config: merged with the recipe.
        text_bytes: of the corpus's text, where it is not prepared yet.
    """
    recipe = students[0].recipe
    steps = max(m.recipe.optimizer.steps for m in students)
    checkpoint = sum(_checkpoint_bytes(m, config) for m in students)
    save = checkpoint / DISK_BYTES_A_SECOND
    every = recipe.logging.validate_every_steps
    forward = sum(step.seconds[name] for name in ("teacher", "student")) + step.seconds["loss"] / 2
    samples = recipe.logging.validation_samples / recipe.optimizer.global_batch_samples
    validations = 2 + (steps // every if every else 0)
    saves = steps // recipe.checkpoint.every_steps + 1
    seconds = steps * step.total + validations * samples * forward + saves * save
    tokens = steps * step.tokens
    width = 2 if students[0].teacher.config.vocab_size <= 1 << 16 else 4
    corpus_tokens, origin = tokens, "no corpus yet: one that is read once"
    if text_bytes is not None:
        corpus_tokens, origin = int(text_bytes / TEXT_BYTES_A_TOKEN), "from --text, at 4 bytes a token"
    elif (Path(recipe.data.corpus) / "manifest.json").is_file():
        shards = Corpus.open(recipe.data.corpus).manifest.shards
        corpus_tokens, origin = sum(shard.tokens for shard in shards), recipe.data.corpus
    text = text_bytes or corpus_tokens * TEXT_BYTES_A_TOKEN
    kept = recipe.checkpoint.keep_last
    if recipe.checkpoint.keep_every_steps:
        kept += steps // recipe.checkpoint.keep_every_steps
    return Totals(
        seconds=seconds,
        gpu_hours=seconds * ranks / 3600,
        checkpoint_bytes=checkpoint,
        save_seconds=save,
        checkpoints_kept=kept,
        tokens=tokens,
        corpus_tokens=corpus_tokens,
        corpus_bytes=corpus_tokens * width,
        corpus_from=origin,
        text_bytes=text,
        prepare_core_hours=text / PREPARE_BYTES_A_CORE / 3600,
    )


def _checkpoint_bytes(models: Models, config: dict[str, Any]) -> int:
    """DeepSpeed's files: the weights as they compute, and the optimizer's: moments, and weights in fp32."""
    c, trained = deepspeed_config.compute_dtype(config).itemsize, sum(models.trained)
    plain = deepspeed_config.zero_stage(config) == 0 and c == 4
    return c * models.student_parameters + (8 if plain else 12) * trained
