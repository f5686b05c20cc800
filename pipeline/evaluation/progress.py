"""How long an evaluation takes: the plan in words before it starts, and one line a unit with the time that is left."""

import sys
from collections.abc import Callable
from typing import Any

from pipeline.evaluation.design import Records, Study
from pipeline.evaluation.units import Unit
from pipeline.tasks import finetune
from pipeline.training.monitor import clock


class Progress:
    """One line a unit, with the time that is left: by the estimates, corrected by what units have taken."""

    def __init__(self, study: Study, done: Records, say: Callable[[str], None]) -> None:
        self._study, self._say, self._done = study, say, done
        self._estimated = self._taken = 0.0
        self.slots = 1

    def add(self, unit: Unit, record: dict[str, Any]) -> None:
        self._estimated += self._study.estimated_seconds(unit)
        self._taken += record["seconds"]
        left = seconds_left(self._study, self._done) * self._taken / max(self._estimated, 1e-9) / self.slots
        metric, splits = unit.task.metrics[0], record["scores"]
        score = sum(scores[metric]["value"] for scores in splits.values()) / len(splits)
        among = f" over {len(splits)} splits" if len(splits) > 1 else ""
        tried = "" if unit.lr is None else f" lr {unit.lr:g} seed {unit.seed}"
        total = max(len(self._done), self._study.expected_units())
        self._say(
            f"{len(self._done)}/{total} {unit.task.name} {unit.model.name}{tried}: "
            f"{metric} {score:.3f}{among}{' (diverged)' if record.get('diverged') else ''} in "
            f"{record['seconds']:,.0f} s, left {clock(left)}"
        )


def seconds_left(study: Study, done: Records) -> float:
    """Estimated seconds of what is not done, on this machine's speed, one unit after another."""
    total = 0.0
    for task in study.tasks:
        for model in study.models:
            unit = study.unit(model, task, None, 1)
            trained = len(study.options.learning_rates) + study.options.seeds - 1
            of_these = sum(u.task.name == task.name and u.model.name == model.name for u in done)
            total += max(0, (1 if task.is_frozen else trained) - of_these) * study.estimated_seconds(unit)
    return total


def announce(study: Study, done: Records) -> list[str]:
    """The plan in words, before anything heavy starts."""
    options = study.options
    trained = sum(not task.is_frozen for task in study.tasks)
    lines = [
        f"models: {', '.join(model.name for model in study.models)}; tasks: "
        f"{', '.join(task.name for task in study.tasks)}"
    ]
    if trained:
        lines.append(
            f"learning rates {', '.join(f'{lr:g}' for lr in options.learning_rates)}, {options.seeds} seeds, batch "
            f"{finetune.BATCH_EXAMPLES}, warm-up {finetune.WARMUP_SHARE:.0%}"
        )
    lines.append(
        f"{study.expected_units()} units, {len(done)} done, about {clock(seconds_left(study, done))} left on this "
        "machine, one at a time"
    )
    return [*lines, *study.notes]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
