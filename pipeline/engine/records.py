"""The completion record of a checkpoint: what makes it whole, and what that says of it; no torch is needed.

The records alone are the truth: `latest` is written for DeepSpeed's own tools, and nothing here reads it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from data_prep import durable
from data_prep.errors import UserError, first_line

RECORD = "complete.json"


class FileFacts(TypedDict):
    """Of one file of a checkpoint."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a whole checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        samples_seen: samples of all ranks that led to it; the loader's whole state.
        world_size, zero_stage: of the run that wrote it.
        layout: what else its files depend on, see `layout_of`.
        recipe: the part of the recipe that decides the weights (`Recipe.learned`).
        corpus_fingerprint: of the corpus it was trained on.
        teacher_fingerprint: of the teacher; empty in records that are older than it.
        files: name -> {"bytes", "sha256"}.
    """

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="forbid")

    step: Annotated[int, Field(gt=0)]
    samples_seen: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(gt=0)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    recipe: dict[str, Any]
    corpus_fingerprint: str
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+\.pt$")], FileFacts]
    layout: dict[str, str] = field(default_factory=dict)
    teacher_fingerprint: str = ""


_RECORD = pydantic.TypeAdapter(Record)


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find(folder: Path, resume: str, *, log: Callable[[str], None] = print) -> Record | None:
    """The checkpoint to start from, or None for a fresh start.

    Args:
        folder: the run's `checkpoints/`; need not exist.
        resume: "auto" (the newest whole one), "never", or a step.

    Raises:
        UserError: checkpoints are there but must not be used, or cannot be.
    """
    tags = sorted((p.name for p in folder.glob("step-*") if p.is_dir()), reverse=True)
    if resume == "never":
        if tags:
            raise UserError(
                f"{folder} already holds {tags[0]}; --resume never would write over it. Use another run.output."
            )
        return None
    if resume != "auto":
        if not (resume.isascii() and resume.isdigit() and len(resume) < 15):
            raise UserError(f"--resume takes auto, never or a step, not {resume!r}")
        wanted = tag_of(int(resume))
        if problem := why_torn(folder / wanted):
            whole = ", ".join(map(str, whole_steps(folder))) or "none"
            raise UserError(f"step {resume} cannot be used: {problem}. Whole checkpoints: {whole}")
        return read_record(folder / wanted)
    for tag in tags:
        problem = why_torn(folder / tag)
        if not problem:
            return read_record(folder / tag)
        log(f"passing over the checkpoint {tag}: {problem}")
    if tags:
        raise UserError(
            f"no checkpoint in {folder} is whole: copy it again if it was copied, or start anew in another run.output"
        )
    return None


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's `checkpoints/` that are whole, by the sizes of their files; rising."""
    return [step_of(path) for path in sorted(folder.glob("step-*")) if why_torn(path) is None]


def why_torn(checkpoint: Path, *, checksums: bool = False) -> str | None:
    """Why a checkpoint cannot be used; None if it is whole. Sizes are always compared, checksums on request."""
    if not checkpoint.is_dir():
        return f"there is no {checkpoint}"
    try:
        record = read_record(checkpoint)
    except FileNotFoundError:
        return "it was never finished (no completion record)"
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return f"its completion record cannot be read ({first_line(error)})"
    return _difference(checkpoint, record.files, checksums=checksums)


def was_finished(checkpoint: Path) -> bool:
    """Whether it was whole once: it has a completion record, whatever that says now."""
    return (checkpoint / RECORD).exists()


def read_record(checkpoint: Path) -> Record:
    """The completion record of a checkpoint.

    Raises:
        ValueError: it is damaged, or another checkpoint's.
    """
    record = _RECORD.validate_json((checkpoint / RECORD).read_bytes())
    if tag_of(record.step) != checkpoint.name:
        raise ValueError(f"it is that of step {record.step}")
    return record


def check_belongs(
    record: Record, *, recipe: dict[str, Any], corpus_fingerprint: str, teacher_fingerprint: str, folder: Path
) -> None:
    """Refuse a checkpoint of another recipe, another corpus or another teacher; where they lie does not matter."""
    theirs = json.loads(json.dumps(record.recipe))
    for section, name in (("data", "corpus"), ("teacher", "model")):  # in records that are older than the fingerprint
        theirs.get(section, {}).pop(name, None)
    if lines := differences(json.loads(json.dumps(recipe)), theirs):
        raise UserError(
            f"the checkpoints in {folder} were made by another recipe:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nUse the same values to go on with that run, or another run.output for a new one."
        )
    if record.corpus_fingerprint != corpus_fingerprint:
        raise UserError(
            f"the checkpoints in {folder} were trained on another corpus than data.corpus holds now "
            f"({record.corpus_fingerprint[:12]} there, {corpus_fingerprint[:12]} here). "
            "Bring that corpus back, or use another run.output."
        )
    if record.teacher_fingerprint and record.teacher_fingerprint != teacher_fingerprint:
        raise UserError(
            f"the checkpoints in {folder} learned from another teacher than teacher.model names now "
            f"({record.teacher_fingerprint[:12]} there, {teacher_fingerprint[:12]} here). Bring that teacher back, "
            "or use another run.output."
        )


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two recipes' plain values differ, as `section.key: ours, theirs`."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            lines += differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            lines.append(f"{prefix}{key}: {mine!r} here, {other!r} there")
    return lines


def check_files(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse files of a checkpoint that differ from their size or checksum."""
    if problem := _difference(checkpoint, files, checksums=True):
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {problem}. Move that folder away and start again, to go on from "
            "the checkpoint before it."
        )


def check_all_seen(target: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse a checkpoint of which rank 0 does not see every file in its size."""
    if problem := _difference(target, files, checksums=False):
        raise UserError(
            f"the checkpoint {target} is not whole where rank 0 looks at it: {problem}. run.output must be one folder "
            "that all machines share."
        )


def _difference(checkpoint: Path, files: dict[str, dict[str, Any]], *, checksums: bool) -> str | None:
    """The first file that is not what the record says."""
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
        if checksums and durable.sha256(path) != facts["sha256"]:
            return f"{name} differs from its checksum"
    return None
