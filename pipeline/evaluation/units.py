"""The unit of work: one model, one task, one learning rate, one seed. A whole record of it is never computed again.

A record's name holds a fingerprint of everything that decides its content: the model's weights and tokenizer, the
task's data, and the settings. So a record of other weights, data or settings is another file, never taken for this one.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep import durable
from data_prep.errors import UserError
from pipeline.evaluation.contestants import Contestant
from pipeline.tasks import examples, finetune
from pipeline.tasks.table import Task

FORMAT = 1  # a change of what a record holds or how a score is computed makes old records foreign


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One fine-tuning and its scores.

    Attributes:
        model: what is fine-tuned.
        task: on what.
        data: folder of the data; None: the hub.
        data_fingerprint: of the data that the coordinator has seen.
        limit: of the training examples.
        lr: None where nothing is trained.
        max_tokens: of an example or a window.
    """

    model: Contestant
    task: Task
    data: str | None
    data_fingerprint: str
    limit: int | None
    lr: float | None
    seed: int
    max_tokens: int

    @property
    def fingerprint(self) -> str:
        settings = dict(
            format=FORMAT,
            model=self.model.fingerprint,
            data=self.data_fingerprint,
            lr=self.lr,
            seed=self.seed,
            max_tokens=self.max_tokens,
            batch=finetune.BATCH_EXAMPLES,
            warmup=finetune.WARMUP_SHARE,
            weight_decay=finetune.WEIGHT_DECAY,
        )
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        lr = "frozen" if self.lr is None else f"{self.lr:g}"
        model = re.sub(r"[^A-Za-z0-9._-]", "_", self.model.name)
        return f"{self.task.name}/{model}-lr{lr}-seed{self.seed}-{self.fingerprint[:12]}"

    def path(self, out: Path) -> Path:
        return out / "units" / f"{self.name}.json"


def read(unit: Unit, out: Path) -> dict[str, Any] | None:
    """The unit's record; None if there is none that is whole and this unit's."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(unit.path(out).read_bytes())
        if isinstance(record, dict) and record.get("fingerprint") == unit.fingerprint and "scores" in record:
            return record
    return None


def work(unit: Unit, out: str, threads: int | None = None) -> dict[str, Any]:
    """Compute a unit and write its record, wherever this runs.

    Raises:
        UserError: the data here is not what the coordinator has seen.
    """
    if threads:
        torch.set_num_threads(threads)
    _quiet_libraries()
    data = _data(unit)
    trial = finetune.Trial(folder=unit.model.folder, lr=unit.lr, seed=unit.seed, max_tokens=unit.max_tokens)
    described = dict(
        fingerprint=unit.fingerprint,
        model=unit.model.name,
        task=unit.task.name,
        lr=unit.lr,
        seed=unit.seed,
        epochs=unit.task.epochs,
        train_examples=len(data.train),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    record = described | finetune.fine_tune(trial, data)
    text = json.dumps(record, indent=1, allow_nan=False)
    durable.write_chunks(unit.path(Path(out)), [text.encode()], aside=f".{os.getpid()}")
    return record


_kept: dict[str, examples.TaskData] = {}  # the data of the last unit, by its fingerprint: units follow each other


def _data(unit: Unit) -> examples.TaskData:
    if unit.data_fingerprint not in _kept:
        data = examples.load(unit.task, Path(unit.data) if unit.data else None, unit.limit)
        if data.fingerprint() != unit.data_fingerprint:
            where = unit.data or "the hub"
            raise UserError(
                f"the data of {unit.task.name} in {where} changed meanwhile, or is another on this machine: run "
                "the same command again"
            )
        _kept.clear()
        _kept[unit.data_fingerprint] = data
    return _kept[unit.data_fingerprint]


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # accelerate imports DeepSpeed, which else says that it found none
