"""What an evaluation is to do: which models on which tasks, how much is spent on each, how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from pipeline.evaluation.contestants import Contestant
from pipeline.evaluation.units import Unit
from pipeline.tasks import examples, features, finetune
from pipeline.tasks.examples import TaskData
from pipeline.tasks.table import Task

_SAMPLED_EXAMPLES = 200
_KIND = "minilmv2-deepspeed evaluation"
_MARKER = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is spent: the same for every model.

    Attributes:
        data: folder of the tasks' files; None: the hub.
        learning_rates: the grid.
        seeds: how many, counted from 1.
        limit: of the training examples of a task.
    """

    data: Path | None = None
    learning_rates: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 3e-4)
    seeds: int = 5
    limit: int | None = None


QUICK = Options(learning_rates=(1e-4,), seeds=3)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be done; made by `plan`.

    Attributes:
        out: folder of the records.
        tokens: for (model, task), the tokens that a unit runs through, a training step counted as three forward passes.
    """

    models: tuple[Contestant, ...]
    tasks: tuple[Task, ...]
    options: Options
    out: Path
    data_fingerprints: dict[str, str]
    max_tokens: dict[str, int]
    tokens: dict[tuple[str, str], float]
    notes: tuple[str, ...]

    def unit(self, model: Contestant, task: Task, lr: float | None, seed: int) -> Unit:
        return Unit(
            model=model,
            task=task,
            data=str(self.options.data.resolve()) if self.options.data else None,
            data_fingerprint=self.data_fingerprints[task.name],
            limit=self.options.limit,
            lr=lr,
            seed=seed,
            max_tokens=self.max_tokens[task.name],
        )

    def expected_units(self) -> int:
        trained = len(self.options.learning_rates) + self.options.seeds - 1
        return sum(1 if task.is_frozen else trained for task in self.tasks) * len(self.models)

    def estimated_seconds(self, unit: Unit) -> float:
        return self.tokens[unit.model.name, unit.task.name] / unit.model.forward_tokens_per_second


Records = dict[Unit, dict[str, Any]]


def plan(models: Sequence[Contestant], tasks: Sequence[Task], options: Options, out: Path) -> Study:
    """Read the data of all tasks, so that every mistake in it comes before the first training.

    Raises:
        UserError: see `examples.load`.
    """
    fingerprints, lengths, tokens, notes = {}, {}, {}, []
    tokenizers = {model.name: finetune.load_tokenizer(model.folder, "text") for model in models}
    for task in tasks:
        data = examples.load(task, options.data, options.limit)
        fingerprints[task.name] = data.fingerprint()
        lengths[task.name] = min(task.max_tokens, *(model.max_tokens for model in models))
        notes.append(f"{task.name}: {_sizes(data)}")
        if data.unlabelled:
            notes.append(f"{task.name}: {data.unlabelled:,} rows without a label are left out")
        if data.torn:
            notes.append(f"{task.name}: {data.torn:,} rows with too few or too many fields are left out")
        if lengths[task.name] < task.max_tokens:
            notes.append(
                f"{task.name}: examples are cut to {lengths[task.name]} tokens, the longest that all models take"
            )
        for model in models:
            tokens[model.name, task.name] = _tokens(tokenizers[model.name], data, lengths[task.name])
    return Study(
        models=tuple(models),
        tasks=tuple(tasks),
        options=options,
        out=out,
        data_fingerprints=fingerprints,
        max_tokens=lengths,
        tokens=tokens,
        notes=tuple(notes),
    )


def claim(out: Path) -> None:
    """Take a folder that is new, empty or an evaluation's.

    Raises:
        UserError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another --out")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if names and not (out / _MARKER).is_file():
        raise UserError(
            f"{out} holds files that are no evaluation's ({', '.join(sorted(names)[:3])}): give another --out"
        )
    if not (out / _MARKER).is_file():
        durable.write(out / _MARKER, f'{{"kind": "{_KIND}"}}\n')


def _sizes(data: TaskData) -> str:
    reported = ", ".join(f"{split} {len(examples):,}" for split, examples in data.reported.items())
    if data.task.is_frozen:
        return reported
    return f"{len(data.train):,} examples to train on, {len(data.selection):,} to choose by; reported: {reported}"


def _tokens(tokenizer, data: TaskData, max_tokens: int) -> float:
    """Tokens of a unit in forward passes: training counts three times, once an epoch."""

    def total(sample: list) -> float:
        if not sample:
            return 0.0
        step = max(1, len(sample) // _SAMPLED_EXAMPLES)
        chosen = sample[::step][:_SAMPLED_EXAMPLES]
        kind = data.task.kind if data.task.kind == "span" else "text"
        texts = chosen if kind == "span" else [examples.Example(texts=(" ".join(e.texts),), target=0) for e in chosen]
        rows = features.encode(tokenizer, texts, kind, max_tokens).rows
        return sum(len(row["input_ids"]) for row in rows) / len(chosen) * len(sample)

    scored = total(data.selection) + sum(map(total, data.reported.values()))
    return 3 * data.task.epochs * total(data.train) + scored
