"""Checkpoints that are whole or do not exist.

DeepSpeed names a checkpoint `latest` before all ranks have finished writing it. Here `save_latest=False` keeps it from
that; every rank flushes and sums its own files, and only after that rank 0 writes the completion record
`complete.json` (by rename) and moves `latest` (by rename). A folder without a record, or whose files differ from it, is
torn: readers pass it over and say so.

    checkpoints/latest                       the tag of the newest whole checkpoint, for DeepSpeed's own tools
    checkpoints/step-00000300/complete.json  files with sizes and checksums, step, samples, world size, recipe, corpus
    checkpoints/step-00000300/*.pt           DeepSpeed's own files

What DeepSpeed reads, it reads through `zero_files.load`, which runs no code of a file's, and only after all ranks have
compared the files with their checksums.
"""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep import durable
from data_prep.errors import UserError
from pipeline.engine import elastic, ranks, records, zero_files
from pipeline.engine.student import trained_names

ASIDE = "aside"
# DeepSpeed drops programs of its own beside a checkpoint; they leave frozen weights out at stage 1 and cannot read bf16
# with fp32 accumulation. `minilm export` reads all.
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def save(engine, folder: Path, record: records.Record) -> None:
    """Write one checkpoint; all ranks call it at the same step. `files` and `layout` of the record are filled in here.

    Args:
        engine: the student's DeepSpeed engine.
        folder: the run's `checkpoints/`.

    Raises:
        UserError: the disk has too little room, or rank 0 does not see another's files; earlier checkpoints stay.
    """
    rank, tag = dist.get_rank(), records.tag_of(record.step)
    target = folder / tag
    ranks.decided_by_rank_0(lambda: _make_room(engine, folder, target))
    state = {"samples_seen": record.samples_seen, zero_files.GROUPS: list(map(list, trained_names(engine.module)))}
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    parts = ranks.gathered(_flush_own_files(target, rank))
    files = {name: facts for part in parts for name, facts in sorted(part.items())}

    def complete() -> None:
        records.check_all_seen(target, files)
        whole = {**asdict(record), "files": files, "layout": layout_of(engine)}
        durable.write(target / records.RECORD, json.dumps(whole, indent=1))
        durable.sync_folder(folder)
        durable.write(folder / "latest", tag)

    ranks.decided_by_rank_0(complete)


def layout_of(engine) -> dict[str, str]:
    """Beside ranks and stage, what DeepSpeed's files depend on: the classes of its optimizers, and the precision."""
    kinds = dict(optimizer=type(engine.optimizer).__name__, updates=type(engine.basic_optimizer).__name__)
    return {**kinds, "precision": str(next(engine.module.parameters()).dtype).removeprefix("torch.")}


def load(engine, folder: Path, record: records.Record) -> None:
    """Give the engine the weights and optimizer state of a checkpoint, and make sure that it took them.

    All files are compared with their checksums first, each by one of the ranks. A checkpoint of the same number of
    ranks, stage and layout is loaded as it is, and training goes on bit for bit; any other by `elastic`.

    Raises:
        UserError: on all ranks, where a file differs, is damaged or is not seen by one of them.
    """
    source, rank, world_size = folder / records.tag_of(record.step), dist.get_rank(), dist.get_world_size()
    own = {name: facts for name, facts in record.files.items() if zero_files.writer_of(name) % world_size == rank}
    ranks.all_agree(lambda: records.check_files(source, own))
    here = (world_size, engine.zero_optimization_stage(), layout_of(engine))
    if (record.world_size, record.zero_stage, record.layout) != here:
        elastic.set_state(engine, *ranks.all_agree(lambda: zero_files.read(source, zero_stage=record.zero_stage)))
        engine.global_steps, engine.global_samples = record.step, record.samples_seen
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        engine.skipped_steps = zero_files.read_skipped_steps(source)
        return
    engine.checkpoint_engine.load = lambda path, map_location=None: zero_files.load(path)
    path, client_state = engine.load_checkpoint(str(folder), tag=records.tag_of(record.step))
    if path is None or client_state.get("samples_seen") != record.samples_seen or engine.global_steps != record.step:
        raise RuntimeError(f"DeepSpeed did not load {source}: {path}, {client_state}")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's full fp32 weights of a whole checkpoint, on the CPU, checked; no process group is needed."""
    record = records.read_record(checkpoint)
    records.check_files(checkpoint, record.files)
    weights, _ = zero_files.read(checkpoint, zero_stage=record.zero_stage)
    return weights


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints of later steps out of the way, so that two timelines never mix; the folder they are in now.

    The metrics so far are copied beside them. `latest` names the step again.

    Args:
        folder: the run's `checkpoints/`.
        step: of the whole checkpoint that the run goes back to; 0 for the beginning.
    """
    later = [path for path in folder.glob("step-*") if path.name > records.tag_of(step)]
    if not later:
        return None
    target = folder.parent / ASIDE / f"after-{records.tag_of(step)}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.mkdir(parents=True)
    if (folder.parent / "metrics.jsonl").is_file():
        shutil.copyfile(folder.parent / "metrics.jsonl", target / "metrics.jsonl")
    for path in later:
        path.rename(target / path.name)
    if step:
        durable.write(folder / "latest", records.tag_of(step))
    else:
        (folder / "latest").unlink(missing_ok=True)
    return target


def _make_room(engine, folder: Path, target: Path) -> None:
    check_room(engine, folder)
    if target.exists():
        shutil.rmtree(target)  # torn: a whole one of this step would have been resumed from


def check_room(engine, folder: Path) -> None:
    """Make the folder, and refuse to begin what its disk cannot hold, before DeepSpeed writes half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = state_bytes(engine)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} is too full to save: a checkpoint takes about {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free. Make room and start the same command again; it goes on from the newest "
            "whole checkpoint."
        )


def state_bytes(engine) -> int:
    """Bytes of a student's state over all ranks, replicas not counted.

    The weights as they are computed with (at most fp32), and for trained ones the fp32 master and Adam's two moments.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    return sum(count * (16 if trained else 4) for count, trained in sizes)


def _flush_own_files(target: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush the files that this rank wrote to the disk; name -> size and checksum."""
    facts = {}
    for path in sorted(target.rglob("*")):
        if path.is_file() and zero_files.writer_of(path.name) == rank:
            durable.sync_file(path)
            facts[str(path.relative_to(target))] = {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
    return facts


def remove_old(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove whole checkpoints that are not to be kept, torn ones before the newest whole one, and stray programs.

    Args:
        folder: the run's `checkpoints/`, with a whole one at least.
        keep_last: how many of the newest stay.
        keep_every_steps: multiples of it stay for ever; 0 for none.
    """
    whole = sorted(path.parent for path in folder.glob(f"step-*/{records.RECORD}"))
    torn = [path for path in folder.glob("step-*") if path not in whole and path < whole[-1]]
    kept = [path for path in whole if keep_every_steps and records.step_of(path) % keep_every_steps == 0]
    old = [path for path in whole[:-keep_last] if path not in kept]
    for checkpoint in old:
        (checkpoint / records.RECORD).unlink()  # first, so that a half removed one is torn, not whole
    for checkpoint in (*old, *torn):
        shutil.rmtree(checkpoint)
    for name in _RECOVERY_SCRIPTS:
        (folder / name).unlink(missing_ok=True)
