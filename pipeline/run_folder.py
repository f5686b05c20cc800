"""A run's folder: what the trainer puts there, and how it is read without the teacher, a GPU or a process group."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from data_prep.shards import Corpus
from pipeline import checkpoint
from pipeline.architectures import without_pooler
from pipeline.config import Recipe, load_recipe, write_recipe
from pipeline.models import RelationEncoder

CHECKPOINTS, MODEL, EXPORT = "checkpoints", "model", "export"


def describe(output: Path, recipe: Recipe, ds_config: dict[str, Any], corpus: Corpus, student: RelationEncoder) -> None:
    """Write what it takes to read the checkpoints: recipe, DeepSpeed configuration, the student's, its tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, output / "recipe.toml")
    durable.write(output / "deepspeed.json", json.dumps(ds_config, indent=2))
    shutil.copytree(corpus.folder / "tokenizer", output / MODEL, dirs_exist_ok=True)
    student.config.save_pretrained(output / MODEL)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run and one of its checkpoints."""

    folder: Path
    recipe: Recipe
    record: checkpoint.Record

    @classmethod
    def open(cls, folder: Path, step: int | None = None) -> "FinishedRun":
        """A run with its newest whole checkpoint, or that of `step`."""
        if not (folder / "recipe.toml").is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no recipe.toml. Give a recipe's run.output.")
        record = checkpoint.find(folder / CHECKPOINTS, "auto" if step is None else str(step))
        if record is None:
            raise UserError(f"the run in {folder} has saved no checkpoint yet")
        return cls(folder=folder, recipe=load_recipe(str(folder / "recipe.toml")), record=record)

    def student(self) -> RelationEncoder:
        """The student with the checkpoint's weights, in fp32 on the CPU."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(self.folder / MODEL)
        encoder = RelationEncoder(AutoModel.from_config(config, **without_pooler(config)))
        weights = checkpoint.read_weights(self.folder / CHECKPOINTS / checkpoint.tag_of(self.record.step))
        encoder.load_state_dict(weights, strict=True)
        return encoder.eval()
