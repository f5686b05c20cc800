"""Checkpoints that are whole or do not exist.

DeepSpeed names a checkpoint `latest` before all ranks have finished writing it. Here `save_latest=False` keeps it from
that; every rank flushes and sums its own files, and only after that rank 0 writes the completion record
`complete.json` (by rename) and moves `latest` (by rename). A folder without a record, or whose files differ from it, is
torn: readers pass it over and say so.

    checkpoints/latest                       the tag of the newest whole checkpoint
    checkpoints/step-00000300/complete.json  files with sizes and checksums, step, samples, world size, recipe, corpus
    checkpoints/step-00000300/*.pt           DeepSpeed's own files
"""

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep import durable
from data_prep.errors import UserError
from pipeline.elastic import load_elsewhere
from pipeline.operators import import_deepspeed

RECORD = "complete.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a whole checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        samples_seen: samples of all ranks that led to it; the loader's whole state.
        world_size, zero_stage: of the run that wrote it.
        recipe: the part of the recipe that decides the weights (`Recipe.learned`).
        corpus_fingerprint: of the corpus it was trained on.
        files: name -> {"bytes", "sha256"}.
    """

    step: int
    samples_seen: int
    world_size: int
    zero_stage: int
    recipe: dict[str, Any]
    corpus_fingerprint: str
    files: dict[str, dict[str, Any]]


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def save(engine, folder: Path, record: Record, *, keep_last: int, keep_every_steps: int) -> None:
    """Write one checkpoint; all ranks call it at the same step. `record.files` is filled in here.

    Args:
        engine: the student's DeepSpeed engine.
        folder: the run's `checkpoints/`.
        keep_last: how many of the newest stay.
        keep_every_steps: multiples of it stay for ever; 0 for none.

    Raises:
        UserError: the disk has too little room; nothing is written then, and earlier checkpoints stay.
    """
    rank, tag = dist.get_rank(), tag_of(record.step)
    target = folder / tag
    _check_room(engine, folder)
    if rank == 0 and target.exists():
        shutil.rmtree(target)  # torn: a whole one of this step would have been resumed from
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state={"samples_seen": record.samples_seen}, save_latest=False)
    gathered: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _flush_own_files(target, rank))
    if rank == 0:
        files = {name: facts for part in gathered for name, facts in sorted((part or {}).items())}
        durable.write(target / RECORD, json.dumps({**asdict(record), "files": files}, indent=1))
        durable.sync_folder(folder)
        durable.write(folder / "latest", tag)
        _remove_old(folder, keep_last, keep_every_steps)
    dist.barrier()


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
        if not resume.isdigit():
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
    except (ValueError, TypeError) as error:
        return f"its completion record cannot be read ({error})"
    for name, facts in record.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
        if checksums and durable.sha256(path) != facts["sha256"]:
            return f"{name} differs from its checksum"
    return None


def read_record(checkpoint: Path) -> Record:
    return Record(**json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))


def check_belongs(record: Record, *, recipe: dict[str, Any], corpus_fingerprint: str, folder: Path) -> None:
    """Refuse a checkpoint of another recipe or another corpus."""
    if lines := differences(json.loads(json.dumps(recipe)), record.recipe):
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
    """Give the engine the weights, optimizer state and schedule of a checkpoint, and make sure that it took them.

    A checkpoint of the same number of ranks and ZeRO stage is loaded as it is, and training goes on bit for bit; any
    other goes through `pipeline.elastic`.
    """
    if (record.world_size, record.zero_stage) != (dist.get_world_size(), engine.zero_optimization_stage()):
        source = folder / tag_of(record.step)
        load_elsewhere(engine, source, zero_stage=record.zero_stage, weights=read_weights(source))
        return
    path, client_state = engine.load_checkpoint(str(folder), tag=tag_of(record.step))
    if path is None or client_state.get("samples_seen") != record.samples_seen or engine.global_steps != record.step:
        raise RuntimeError(f"DeepSpeed did not load {folder / tag_of(record.step)}: {path}, {client_state}")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's full fp32 weights of a checkpoint of any ZeRO stage, on the CPU; no process group is needed."""
    stage = read_record(checkpoint).zero_stage
    weights: dict[str, torch.Tensor] = {}
    if stage < 3:  # whole, but in the precision of training, and the only place of frozen weights at stage 1
        states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        weights = {name: tensor.float() for name, tensor in states["module"].items()}
    if stage > 0:  # in fp32, from all ranks' partitions
        import_deepspeed()
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        quiet = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            master = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
            weights.update({name: tensor.clone() for name, tensor in master.items()})
    return weights


def _check_room(engine, folder: Path) -> None:
    """Refuse on all ranks to begin what the disk cannot hold, before DeepSpeed writes half of it."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    # The weights as they are computed with (at most fp32), and for trained ones the fp32 master and Adam's two moments.
    needed = sum(count * (16 if trained else 4) for count, trained in sizes)
    free = [0]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        free = [shutil.disk_usage(folder).free]
    dist.broadcast_object_list(free)
    if free[0] < needed:
        raise UserError(
            f"the disk of {folder} is too full to save: a checkpoint takes about {needed / 1e6:,.0f} MB, "
            f"{free[0] / 1e6:,.0f} MB are free. Make room and start the same command again; it goes on from the newest "
            "whole checkpoint."
        )


def _flush_own_files(target: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush the files that this rank wrote to the disk; name -> size and checksum."""
    facts = {}
    for path in sorted(target.rglob("*")):
        if path.is_file() and _writer_of(path.name) == rank:
            durable.sync_file(path)
            facts[str(path.relative_to(target))] = {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
    return facts


def _writer_of(name: str) -> int:
    """The rank that wrote a file: DeepSpeed puts it into the names of partitioned files, rank 0 writes the others."""
    _, found, rest = name.partition("zero_pp_rank_")
    return int(rest.split("_")[0]) if found else 0


def _remove_old(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    whole = sorted(path.parent for path in folder.glob(f"step-*/{RECORD}"))
    for checkpoint in whole[:-keep_last]:
        step = read_record(checkpoint).step
        if not (keep_every_steps and step % keep_every_steps == 0):
            (checkpoint / RECORD).unlink()  # first, so that a half removed one is torn, not whole
            shutil.rmtree(checkpoint)
