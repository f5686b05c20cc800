"""Checkpoints that are whole or do not exist.

DeepSpeed names a checkpoint `latest` before all ranks have finished writing it. Here `save_latest=False` keeps it from
that; every rank flushes and sums its own files, and only after that rank 0 writes the completion record
`complete.json` (by rename) and moves `latest` (by rename). A folder without a record, or whose files differ from it, is
torn: readers pass it over and say so.

    checkpoints/latest                       the tag of the newest whole checkpoint
    checkpoints/step-00000300/complete.json  files with sizes and checksums, step, samples, world size, recipe, corpus
    checkpoints/step-00000300/*.pt           DeepSpeed's own files

What DeepSpeed reads, it reads through `zero_files.load`, which runs no code of a file's, and only after all ranks have
compared the files with their checksums.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
import torch.distributed as dist
from pydantic import Field
from typing_extensions import TypedDict

from data_prep import durable
from data_prep.errors import UserError, first_line
from pipeline.engine import elastic, ranks, zero_files
from pipeline.engine.student import trained_names

RECORD = "complete.json"
ASIDE = "aside"
# DeepSpeed drops programs of its own beside a checkpoint; they leave frozen weights out at stage 1 and cannot read bf16
# with fp32 accumulation. `minilm export` reads all.
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


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


def save(engine, folder: Path, record: Record, *, keep_last: int, keep_every_steps: int) -> None:
    """Write one checkpoint; all ranks call it at the same step. `files` and `layout` of the record are filled in here.

    Args:
        engine: the student's DeepSpeed engine.
        folder: the run's `checkpoints/`.
        keep_last: how many of the newest stay.
        keep_every_steps: multiples of it stay for ever; 0 for none.

    Raises:
        UserError: the disk has too little room, or rank 0 does not see another's files; earlier checkpoints stay.
    """
    rank, tag = dist.get_rank(), tag_of(record.step)
    target = folder / tag
    ranks.decided_by_rank_0(lambda: _make_room(engine, folder, target))
    state = {"samples_seen": record.samples_seen, zero_files.GROUPS: list(map(list, trained_names(engine.module)))}
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    parts = ranks.gathered(_flush_own_files(target, rank))
    files = {name: facts for part in parts for name, facts in sorted(part.items())}

    def complete() -> None:
        check_all_seen(target, files)
        whole = {**asdict(record), "files": files, "layout": layout_of(engine)}
        durable.write(target / RECORD, json.dumps(whole, indent=1))
        durable.sync_folder(folder)
        durable.write(folder / "latest", tag)
        remove_old(folder, keep_last, keep_every_steps)

    ranks.decided_by_rank_0(complete)


def layout_of(engine) -> dict[str, str]:
    """Beside ranks and stage, what DeepSpeed's files depend on: the classes of its optimizers, and the precision."""
    kinds = dict(optimizer=type(engine.optimizer).__name__, updates=type(engine.basic_optimizer).__name__)
    return {**kinds, "precision": str(next(engine.module.parameters()).dtype).removeprefix("torch.")}


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
            raise UserError(f"cannot resume from step {resume}: {problem}")
        return read_record(folder / wanted)
    for tag in tags:
        problem = why_torn(folder / tag)
        if not problem:
            return read_record(folder / tag)
        log(f"passing over the checkpoint {tag}: {problem}")
    if tags:
        raise UserError(
            f"no checkpoint in {folder} is whole. Remove the folder to start anew, or use another run.output."
        )
    return None


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


def load(engine, folder: Path, record: Record) -> None:
    """Give the engine the weights and optimizer state of a checkpoint, and make sure that it took them.

    All files are compared with their checksums first, each by one of the ranks. A checkpoint of the same number of
    ranks, stage and layout is loaded as it is, and training goes on bit for bit; any other by `elastic`.

    Raises:
        UserError: on all ranks, where a file differs, is damaged or is not seen by one of them.
    """
    source, rank, world_size = folder / tag_of(record.step), dist.get_rank(), dist.get_world_size()
    own = {name: facts for name, facts in record.files.items() if zero_files.writer_of(name) % world_size == rank}
    ranks.all_agree(lambda: check_files(source, own))
    here = (world_size, engine.zero_optimization_stage(), layout_of(engine))
    if (record.world_size, record.zero_stage, record.layout) != here:
        elastic.set_state(engine, *ranks.all_agree(lambda: zero_files.read(source, zero_stage=record.zero_stage)))
        engine.global_steps, engine.global_samples = record.step, record.samples_seen
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        engine.skipped_steps = zero_files.read_skipped_steps(source)
        return
    engine.checkpoint_engine.load = lambda path, map_location=None: zero_files.load(path)
    path, client_state = engine.load_checkpoint(str(folder), tag=tag_of(record.step))
    if path is None or client_state.get("samples_seen") != record.samples_seen or engine.global_steps != record.step:
        raise RuntimeError(f"DeepSpeed did not load {source}: {path}, {client_state}")


def check_files(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse files of a checkpoint that differ from their size or checksum."""
    if problem := _difference(checkpoint, files, checksums=True):
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {problem}. Move that folder away and start again, to go on from "
            "the checkpoint before it."
        )


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's full fp32 weights of a whole checkpoint, on the CPU, checked; no process group is needed."""
    record = read_record(checkpoint)
    check_files(checkpoint, record.files)
    weights, _ = zero_files.read(checkpoint, zero_stage=record.zero_stage)
    return weights


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints of later steps out of the way, so that two timelines never mix; the folder they are in now.

    The metrics so far are copied beside them. `latest` names the step again.

    Args:
        folder: the run's `checkpoints/`.
        step: of the whole checkpoint that the run goes back to.
    """
    later = [path for path in folder.glob("step-*") if path.name > tag_of(step)]
    if not later:
        return None
    target = folder.parent / ASIDE / f"after-{tag_of(step)}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.mkdir(parents=True)
    if (folder.parent / "metrics.jsonl").is_file():
        shutil.copyfile(folder.parent / "metrics.jsonl", target / "metrics.jsonl")
    for path in later:
        path.rename(target / path.name)
    durable.write(folder / "latest", tag_of(step))
    return target


def _make_room(engine, folder: Path, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(engine, folder)
    if target.exists():
        shutil.rmtree(target)  # torn: a whole one of this step would have been resumed from


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


def _check_room(engine, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold, before DeepSpeed writes half of it."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    # The weights as they are computed with (at most fp32), and for trained ones the fp32 master and Adam's two moments.
    needed = sum(count * (16 if trained else 4) for count, trained in sizes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} is too full to save: a checkpoint takes about {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free. Make room and start the same command again; it goes on from the newest "
            "whole checkpoint."
        )


def _flush_own_files(target: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush the files that this rank wrote to the disk; name -> size and checksum."""
    facts = {}
    for path in sorted(target.rglob("*")):
        if path.is_file() and zero_files.writer_of(path.name) == rank:
            durable.sync_file(path)
            facts[str(path.relative_to(target))] = {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
    return facts


def remove_old(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove whole checkpoints that are not to be kept, torn ones before the newest whole one, and stray programs."""
    whole = sorted(path.parent for path in folder.glob(f"step-*/{RECORD}"))
    torn = [path for path in folder.glob("step-*") if path not in whole and path < whole[-1]]
    old = [path for path in whole[:-keep_last] if not (keep_every_steps and step_of(path) % keep_every_steps == 0)]
    for checkpoint in old:
        (checkpoint / RECORD).unlink()  # first, so that a half removed one is torn, not whole
    for checkpoint in (*old, *torn):
        shutil.rmtree(checkpoint)
    for name in _RECOVERY_SCRIPTS:
        (folder / name).unlink(missing_ok=True)
