"""All units of an evaluation: spread over an engine, gone on with after a kill.

Every learning rate of the grid is tried with the first seed. The one that is best on the held-back part of the training
split then gets the other seeds. So each model has the same budget, |grid| + |seeds| - 1 trainings a task, and what is
reported chooses nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import torch

from data_prep.work.engines import RayEngine, open_engine
from pipeline.evaluation import units
from pipeline.evaluation.contestants import Contestant
from pipeline.evaluation.design import Records, Study
from pipeline.evaluation.progress import Progress
from pipeline.evaluation.units import Unit
from pipeline.tasks.table import Task


def records(study: Study) -> Records:
    """What is done already, of this plan."""
    return {unit: record for unit in _all_units(study) if (record := units.read(unit, study.out)) is not None}


def _all_units(study: Study) -> Iterator[Unit]:
    for task in study.tasks:
        for model in study.models:
            for lr in (None,) if task.is_frozen else study.options.learning_rates:
                for seed in range(1, 2 if task.is_frozen else study.options.seeds + 1):
                    yield study.unit(model, task, lr, seed)


def wanted(study: Study, done: Records) -> list[Unit]:
    """The units that can be computed now: the grid, then the other seeds of the learning rate that was best."""
    found = []
    for task in study.tasks:
        for model in study.models:
            lrs = (None,) if task.is_frozen else study.options.learning_rates
            grid = [study.unit(model, task, lr, 1) for lr in lrs]
            if missing := [unit for unit in grid if unit not in done]:
                found += missing
                continue
            best = chosen_lr(grid, done)
            seeds = range(2, 2 if task.is_frozen else study.options.seeds + 1)
            found += [u for u in (study.unit(model, task, best, seed) for seed in seeds) if u not in done]
    return found


def reported(study: Study, done: Records, model: Contestant, task: Task) -> list[Unit]:
    """The units whose scores are reported, by seed: those of the learning rate that was chosen."""
    lrs = (None,) if task.is_frozen else study.options.learning_rates
    best = chosen_lr([study.unit(model, task, lr, 1) for lr in lrs], done)
    seeds = range(1, 2 if task.is_frozen else study.options.seeds + 1)
    return [study.unit(model, task, best, seed) for seed in seeds]


def chosen_lr(grid: Sequence[Unit], done: Records) -> float | None:
    """The learning rate with the best selection score: the lowest of equals, one that diverged only if all did."""

    def order(unit: Unit) -> tuple:
        return done[unit].get("diverged", False), -(done[unit]["selection"] or 0), unit.lr or 0

    return min(grid, key=order).lr


def run(
    study: Study,
    *,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    say: Callable[[str], None] = print,
) -> Records:
    """Compute what is missing, and return the records of the units that count, in the plan's order.

    Raises:
        UserError, OSError: of a unit; those that are done are kept.
    """
    done = records(study)
    if wanted(study, done):
        _run(study, done, _open(engine, workers, ray_address), Progress(study, done, say))
    return done


def _open(engine: str, workers: int | None, ray_address: str | None):
    """One unit a GPU; without GPUs one after another in this process, or one a process if several are asked for."""
    gpus = torch.cuda.device_count()
    if engine == "local" and workers is None:
        workers = gpus if gpus > 1 else 0
    return open_engine(engine, workers, ray_address, 0, gpus=gpus if engine == "local" else 1)


def _run(study: Study, done: Records, engine, progress: Progress) -> None:
    threads = _threads(engine)
    running: dict[Future, Unit] = {}
    progress.slots = engine.slots
    try:
        while True:
            waiting = [unit for unit in wanted(study, done) if unit not in running.values()]
            while waiting and len(running) < engine.slots:
                unit = waiting.pop(0)
                running[engine.submit(units.work, unit, str(study.out.resolve()), threads)] = unit
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                done[unit] = future.result()
                progress.add(unit, done[unit])
    finally:
        engine.close()


def _threads(engine) -> int | None:
    """Threads of a unit, where several share a machine's cores."""
    if isinstance(engine, RayEngine):
        return None if engine.gpus else 1
    return max(1, len(os.sched_getaffinity(0)) // engine.slots) if engine.slots > 1 else None
