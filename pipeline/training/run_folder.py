"""A run's folder: whose it is, what the trainer puts there, and how it is read without the teacher, a GPU or a group.

A folder is taken only if it is new, empty, or marked as a run's by `run.json`, which also gives the run a name that
what is exported from it bears. For the life of a job rank 0 holds a lock on `run.lock`, see `run_lock`.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError, first_line
from data_prep.shards import Corpus
from pipeline import provenance
from pipeline.config import Recipe
from pipeline.encoders.architectures import plain_calls, without_pooler
from pipeline.encoders.models import RelationEncoder
from pipeline.engine import checkpoint, records
from pipeline.engine.placement import teacher_fingerprint
from pipeline.recipes import load_recipe, write_recipe
from pipeline.training import run_lock

CHECKPOINTS, MODEL, EXPORT, MARKER, LOCK = "checkpoints", "model", "export", "run.json", "run.lock"
ENDED = "ended.json"  # of a run that gave up while others beside it went on
_KIND = "minilmv2-deepspeed run"


def check_claimable(output: Path) -> None:
    """Refuse a folder that holds something else than a run; nothing is touched.

    Raises:
        UserError: `output` is a file, or a folder with other people's files.
    """
    if output.is_symlink() and not output.exists():
        raise UserError(
            f"run.output = {str(output)!r} is a link to {os.readlink(output)!r}, which does not exist: make that folder"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"run.output = {str(output)!r} is a file: give a folder that is new, empty or a run's")
    if read_marker(output) is None and output.is_dir() and (others := _names(output)):
        raise UserError(
            f"run.output = {str(output)!r} holds files that no run wrote ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); nothing was written. Give a folder that is new, empty or a run's."
        )


def _names(folder: Path) -> list[str]:
    """What is in a folder, but for what a claim that was cut short has left."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{MARKER}.partial"))


def marker_of(output: Path) -> bytes:
    """The marker as it stands there; nothing if there is none."""
    try:
        return (output / MARKER).read_bytes()
    except FileNotFoundError:
        return b""


def require_unmoved(output: Path, marker: bytes) -> None:
    """Refuse to write where the folder that a job began with is no longer.

    Raises:
        UserError: it was moved, removed or replaced.
    """
    with contextlib.suppress(OSError):  # a disk that cannot be read now: whether it can be written, saving will tell
        if marker_of(output) != marker:
            raise UserError(
                f"{output} is no longer the folder that this job began with: it was moved, removed or replaced "
                "meanwhile. Nothing more is written. Put it back and start again: it goes on from its newest checkpoint"
            )


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the folder of a run says of itself, such as its name in `run`; None if it is no run's."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(marker, dict) and marker.get("kind") == _KIND and isinstance(marker.get("run"), str)
    return marker if ours else None


class Claim:
    """A run's folder held by this process; `close` or the end of the process lets go of it.

    Raises:
        UserError: the folder is not a run's, or another job writes to it.
    """

    def __init__(self, output: Path) -> None:
        check_claimable(output)
        output.mkdir(parents=True, exist_ok=True)
        self._lock = run_lock.acquire(output / LOCK)
        try:
            if read_marker(output) is None:
                marker = {"kind": _KIND, "format_version": 1, "run": uuid.uuid4().hex}
                durable.write(output / MARKER, json.dumps(marker, indent=1) + "\n")
            self.run: str = read_marker(output)["run"]
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another job have the folder."""
        self._lock.close()


def check_shared(output: Path, run: str, *, patience_seconds: float = 10.0) -> None:
    """Refuse a folder that this rank does not see as rank 0 does, which has just claimed it.

    Args:
        output: the run's folder.
        run: its name.
        patience_seconds: network file systems show new files late.
    """
    deadline = time.monotonic() + patience_seconds
    while (read_marker(output) or {}).get("run") != run:
        if time.monotonic() > deadline:
            raise UserError(
                f"run.output = {str(output)!r} is another folder here than on rank 0's machine: give one that all "
                "machines share"
            )
        time.sleep(0.2)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Paths of runs' folders without what they have in common in front."""
    whole = [Path(os.path.abspath(folder)) for folder in folders]
    above = Path(os.path.commonpath([folder.parent for folder in whole]))
    return [str(folder.relative_to(above)) for folder in whole]


def mark_ended(output: Path, *, step: int, reason: str) -> None:
    """Note that a run has given up: beside others it is not started again, alone it is."""
    durable.write(output / ENDED, json.dumps(dict(step=step, reason=reason), indent=1) + "\n")


def read_ended(output: Path) -> dict[str, Any] | None:
    """At which step and why a run has given up; None if it has not."""
    try:
        return json.loads((output / ENDED).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return dict(step=0, reason="unknown")


def describe(output: Path, recipe: Recipe, ds_config: dict[str, Any], corpus: Corpus, student: RelationEncoder) -> None:
    """Write what it takes to read the checkpoints (recipe, DeepSpeed configuration, the student's, its tokenizer), and
    where the student comes from."""
    output.mkdir(parents=True, exist_ok=True)
    (output / ENDED).unlink(missing_ok=True)
    write_recipe(recipe, output / "recipe.toml")
    durable.write(output / "deepspeed.json", json.dumps(ds_config, indent=2))
    (output / MODEL).mkdir(exist_ok=True)
    for file in sorted((corpus.folder / "tokenizer").iterdir()):
        durable.write(output / MODEL / file.name, file.read_bytes())  # not the modes of a corpus that may be read-only
    student.config.save_pretrained(output / MODEL)
    provenance.record(output, recipe, corpus, teacher_fingerprint(recipe.teacher.model))


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run and one of its checkpoints."""

    folder: Path
    recipe: Recipe
    record: records.Record

    @classmethod
    def open(cls, folder: Path, step: int | None = None) -> "FinishedRun":
        """A run with its newest whole checkpoint, or that of `step`."""
        if not (folder / "recipe.toml").is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no recipe.toml. Give a recipe's run.output.")
        record = records.find(folder / CHECKPOINTS, "auto" if step is None else str(step))
        if record is None:
            raise UserError(f"the run in {folder} has saved no checkpoint yet")
        return cls(folder=folder, recipe=load_recipe(str(folder / "recipe.toml")), record=record)

    @property
    def name(self) -> str:
        """Of the run, for what is made from it."""
        return (read_marker(self.folder) or {}).get("run", "")

    def student(self) -> RelationEncoder:
        """The student with the checkpoint's weights, in fp32 on the CPU.

        Raises:
            UserError: the configuration asks for code of its own, or the weights are not this student's.
        """
        from transformers import AutoConfig, AutoModel

        try:
            config = plain_calls(AutoConfig.from_pretrained(self.folder / MODEL, trust_remote_code=False))
            encoder = RelationEncoder(AutoModel.from_config(config, trust_remote_code=False, **without_pooler(config)))
            weights = checkpoint.read_weights(self.folder / CHECKPOINTS / records.tag_of(self.record.step))
            encoder.load_state_dict(weights, strict=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = first_line(error)
            raise UserError(f"the student in {self.folder / MODEL} cannot be made: {reason}") from error
        return encoder.eval()
