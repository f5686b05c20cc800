"""The models that are compared, as folders: the student, its teacher, the student before its first step, and others."""

import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import durable
from data_prep.errors import UserError, first_line
from pipeline.encoders.architectures import ARCHITECTURES, position_limit
from pipeline.engine import placement
from pipeline.shipping import huggingface
from pipeline.training.build import fresh_student
from pipeline.training.run_folder import FinishedRun

TEACHER, STUDENT, UNTRAINED = "teacher", "student", "untrained"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]
_TOKENIZER_NAMES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "sentencepiece", "spm")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model that is scored.

    Attributes:
        name: in tables.
        folder: with configuration, safetensors weights and tokenizer.
        fingerprint: of its weights, configuration and tokenizer.
        parameters: how many, without a pooler.
        forward_tokens_per_second: on this machine, rows of 64 tokens.
        max_tokens: the longest row it takes.
    """

    name: str
    folder: str
    fingerprint: str
    parameters: int
    forward_tokens_per_second: float
    max_tokens: int


def of_run(run: FinishedRun, student: Path, out: Path) -> dict[str, str]:
    """The folders of a run's teacher, its exported student, and the untrained student (made below `out`), by name."""
    return {
        TEACHER: local_folder(run.recipe.teacher.model),
        STUDENT: str(student),
        UNTRAINED: str(_untrained(run, out / "models", student)),
    }


def _untrained(run: FinishedRun, models: Path, student: Path) -> Path:
    """The student before its first step as a folder, made once for a recipe."""
    folder = models / f"untrained-{run.recipe.fingerprint()[:12]}"
    if (folder / "whole").exists():
        return folder
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in student.iterdir():
        if path.name.startswith(_TOKENIZER_NAMES):
            shutil.copyfile(path, scratch / path.name)
    huggingface.write_model(fresh_student(run.recipe).backbone, scratch)  # with the pooler that the student has
    scratch.rename(folder)
    durable.write(folder / "whole", "")
    return folder


def named(models: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Folders of models by the names they go by: the last part of a path or an id, numbered where it is `taken`."""
    found: dict[str, str] = {}
    for model in models:
        name = base = Path(model.rstrip("/")).name or model
        number = 2
        while name in found or name in taken or name in (TEACHER, STUDENT, UNTRAINED):
            name, number = f"{base}-{number}", number + 1
        found[name] = local_folder(model)
    return found


def local_folder(model: str) -> str:
    """The folder of a model; one of the hub is fetched.

    Raises:
        UserError: neither a folder with config.json nor a model of the hub that can be reached.
    """
    path = Path(model).expanduser()
    if path.exists() or path.is_absolute() or model.startswith("."):
        if not (path / "config.json").is_file():
            raise UserError(
                f"no model in {model}: expected a folder with config.json, model.safetensors and a tokenizer"
            )
        return str(path)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=_PATTERNS)
    except Exception as error:  # every way in which a network can fail
        raise UserError(
            f"{model!r} is no folder, and no model of the hub that can be fetched: {first_line(error)}"
        ) from error


def measure(folders: dict[str, str]) -> list[Contestant]:
    """Load each model once: its size, its speed beside the others, its fingerprint."""
    from transformers import AutoConfig

    from pipeline.tasks.vectors import forward_speed, load_encoder

    models, limits = {}, {}
    for name, folder in folders.items():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            models[name] = load_encoder(folder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"cannot load the model in {folder}: {first_line(error)}") from error
        known = config.model_type in ARCHITECTURES
        limits[name] = position_limit(config) if known else getattr(config, "max_position_embeddings", 512)
    speeds = forward_speed(models, min(64, *limits.values()))
    return [
        Contestant(
            name=name,
            folder=str(Path(folder).resolve()),
            fingerprint=_fingerprint(Path(folder)),
            parameters=models[name].num_parameters(),
            forward_tokens_per_second=speeds[name],
            max_tokens=limits[name],
        )
        for name, folder in folders.items()
    ]


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256(placement.teacher_fingerprint(str(folder)).encode())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_TOKENIZER_NAMES) and path.is_file():
            digest.update(json.dumps([path.name, durable.sha256(path)]).encode())
    return digest.hexdigest()
