"""What the records of an evaluation say: means, deviations, and how the student differs from each other model.

A difference between two models has two sources of chance: the seeds, and the test examples that happen to be there.
Both are paired: seed by seed (variance of the differences over the seeds, divided by their number), and example by
example (the jackknife over interleaved groups, see `pipeline.tasks.metrics`; of a mean over splits each split by
itself). The variances are added, the degrees of freedom are those of Welch and Satterthwaite, and the interval is
Student's at 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation import study as studies
from pipeline.evaluation.design import Records, Study
from pipeline.evaluation.published import Published, published
from pipeline.tasks.table import Task

CONFIDENCE = 0.95
MEAN = "mean"

Values = list[tuple[float, np.ndarray]]  # of one seed: for each split the score and its jackknife


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model's score, a fraction, over the seeds.

    Attributes:
        mean, deviation: over the seeds; the deviation of one seed is None.
        seeds: the value of each.
        lr: that was chosen.
        diverged: how many of the seeds gave numbers that are not finite.
    """

    mean: float
    deviation: float | None
    seeds: tuple[float, ...]
    lr: float | None
    diverged: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The student's score less another model's, with its interval (None where nothing is known of chance)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A metric of a split of a task, for all models; `differences` of the student by the other's name."""

    task: str
    split: str
    metric: str
    examples: int
    models: dict[str, Score]
    differences: dict[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Attributes:
    student: the model whose differences are given: the run's student, or the one named.
    lines: in the order of the tasks; several splits of a task are followed by their mean.
    published: scores of others, beneath.
    """

    student: str
    models: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    lines: list[Line]
    published: list[Published]

    def headlines(self) -> list[Line]:
        """One line a task: its first metric, as the mean over its splits."""
        last: dict[str, Line] = {}
        for line in self.lines:
            first = last.get(line.task)
            if first is None or (line.metric == first.metric and line.split == MEAN):
                last[line.task] = line
        return list(last.values())

    def average(self, model: str) -> float:
        """Mean of the headlines."""
        return float(np.mean([line.models[model].mean for line in self.headlines()]))


def collect(study: Study, done: Records, student: str, origin: tuple[str, str] | None) -> Results:
    """The results of a study whose units are all done.

    Args:
        student: name of the model that is asked about.
        origin: its teacher and its shape, where they are known.
    """
    lines = [line for task in study.tasks for line in _lines(study, done, task, student)]
    rows = [row for task in study.tasks for row in (published(*origin, task.name) if origin else ())]
    options = study.options
    return Results(
        student=student,
        models={
            model.name: dict(
                parameters=model.parameters,
                forward_tokens_per_second=model.forward_tokens_per_second,
                fingerprint=model.fingerprint,
            )
            for model in study.models
        },
        settings=dict(
            learning_rates=list(options.learning_rates),
            seeds=options.seeds,
            limit=options.limit,
            epochs={task.name: task.epochs for task in study.tasks if not task.is_frozen},
            max_tokens=dict(study.max_tokens),
        ),
        lines=lines,
        published=rows,
    )


def _lines(study: Study, done: Records, task: Task, student: str) -> list[Line]:
    records = {m.name: [done[unit] for unit in studies.reported(study, done, m, task)] for m in study.models}
    splits = list(next(iter(records.values()))[0]["scores"])
    parts = [*([split] for split in splits), *([splits] if len(splits) > 1 else [])]
    return [_line(task, part, metric, records, student) for part in parts for metric in task.metrics]


def _line(task: Task, splits: list[str], metric: str, records: dict[str, list[dict]], student: str) -> Line:
    scores, differences = {}, {}
    tables = {name: [_values(record, splits, metric) for record in own] for name, own in records.items()}
    for name, own in records.items():
        values = [float(np.mean([value for value, _ in seed])) for seed in tables[name]]
        scores[name] = Score(
            mean=float(np.mean(values)),
            deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            seeds=tuple(values),
            lr=own[0].get("lr"),
            diverged=sum(bool(record.get("diverged")) for record in own),
        )
        if name != student:
            differences[name] = difference(tables[student], tables[name])
    first = next(iter(records.values()))[0]
    return Line(
        task=task.name,
        split=splits[0] if len(splits) == 1 else MEAN,
        metric=metric,
        examples=sum(first["scores"][split][metric]["examples"] for split in splits),
        models=scores,
        differences=differences,
    )


def _values(record: dict[str, Any], splits: list[str], metric: str) -> Values:
    """A seed's score on each split, with its jackknife."""
    parts = [record["scores"][split][metric] for split in splits]
    return [(part["value"], np.array(part["jackknife"])) for part in parts]


def difference(ours: Sequence[Values], theirs: Sequence[Values]) -> Difference:
    """Of two models' scores and jackknifes, seed by seed, of the mean over the splits; see the head of this file.

    Where a split has too few examples for a jackknife, there is no interval.
    """
    from scipy import stats

    gaps = [[(a[0] - b[0], a[1] - b[1]) for a, b in zip(*seed, strict=True)] for seed in zip(ours, theirs, strict=True)]
    seeds = np.array([np.mean([value for value, _ in seed]) for seed in gaps])
    value = float(seeds.mean())
    variances = []  # with their degrees of freedom
    if len(seeds) > 1:
        variances.append((float(seeds.var(ddof=1)) / len(seeds), len(seeds) - 1))
    for split in zip(*gaps, strict=True):
        groups = np.mean([jackknife for _, jackknife in split], axis=0)
        if (n := len(groups)) < 2:
            return Difference(value=value, low=None, high=None)
        variance = (n - 1) / n * float(((groups - groups.mean()) ** 2).sum())
        variances.append((variance / len(gaps[0]) ** 2, n - 1))
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return Difference(value=value, low=value, high=value)
    freedom = total**2 / sum(variance**2 / freedom for variance, freedom in variances)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * total**0.5
    return Difference(value=value, low=value - half, high=value + half)
