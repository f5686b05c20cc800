"""A task's data, checked: what is trained on, what chooses the learning rate, what is reported.

The learning rate is chosen on a part of the *training* split, taken by the hash of an example's text (for spans of its
context), so that it does not depend on the order of the files and nothing of a text is on both sides. That part is
trained on by no model, and never reported.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.tasks.files import Row
from pipeline.tasks.metrics import scored_tags
from pipeline.tasks.sources import Files, Hub, split_name
from pipeline.tasks.table import Task

SELECTION_SHARE, SELECTION_LARGEST = 0.1, 2000
_NO_LABEL = (-1, "-1", "-")  # as distributions of the table's tasks write it


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example.

    Attributes:
        texts: one text or two; for tokens the words; for spans question and context.
        target: a class's number, a number, the tags' numbers, or the answers as (text, first character).
    """

    texts: tuple[str, ...]
    target: Any


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task needs; `reported` by the name of the split (`validation_matched`, `test.fr`).

    `unlabelled` counts rows that were left out because nobody has labelled them, `torn` those of a distribution's own
    tables that have too few or too many fields.
    """

    task: Task
    labels: tuple[str, ...]
    train: list[Example]
    selection: list[Example]
    reported: dict[str, list[Example]]
    unlabelled: int
    torn: int

    def fingerprint(self) -> str:
        """Of everything in it, and of the task's row."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.task), sort_keys=True).encode())
        digest.update(json.dumps(self.labels).encode())
        for name, examples in (("train", self.train), ("selection", self.selection), *sorted(self.reported.items())):
            digest.update(f"\n{name} {len(examples)}\n".encode())
            for example in examples:
                digest.update(json.dumps([example.texts, example.target]).encode())
        return digest.hexdigest()


def load(task: Task, folder: Path | None, limit: int | None = None) -> TaskData:
    """Read a task from `folder`/<task>, or from the hub if there is no folder.

    Args:
        limit: at most so many examples are trained on, chosen by their hash.

    Raises:
        UserError: no such files or data set, a row without the task's columns, an unknown label, an empty split.
    """
    source = Files(task, folder) if folder else Hub(task)
    unlabelled = 0

    def checked(split: str, language: str, labels: tuple[str, ...] | None) -> list[Example]:
        nonlocal unlabelled
        where = f"{task.name}, {split_name(split, language)}"
        rows = list(source.rows(split, language))
        examples = list(_examples(rows, task, labels, where))
        unlabelled += len(rows) - len(examples)
        if not examples:
            raise UserError(f"{where}: none of {len(rows):,} rows has a label in `{task.target}`")
        return examples

    train_keys, reported_keys = source.train_keys(), source.reported_keys()
    labels = _labels(task, [row for key in train_keys for row in source.rows(*key)])
    if task.kind == "tokens":
        scored_tags(labels)  # refuses what is no tag
    train = [] if task.is_frozen else [e for key in train_keys for e in checked(*key, labels)]
    if task.kind == "span" and not task.hub:
        _check_places(train, task)
    reported = {split_name(*key): checked(*key, labels) for key in reported_keys}
    train, selection = _without_selection(train, task)
    if limit is not None:
        train = sorted(train, key=_hash)[:limit]
    if not task.is_frozen and not (train and selection):
        raise UserError(f"{task.name}: {len(train) + len(selection)} training examples are too few")
    return TaskData(
        task=task,
        labels=labels,
        train=train,
        selection=selection,
        reported=reported,
        unlabelled=unlabelled,
        torn=source.torn,
    )


def _labels(task: Task, rows: list[Row]) -> tuple[str, ...]:
    """Names of classes or tags by number; empty where there are none."""
    if task.labels is not None:
        return task.labels
    if task.kind not in ("text", "pair", "tokens"):
        return ()
    values: set[str] = set()
    for number, row in enumerate(rows, start=1):
        try:
            target = _column(row, task.target, task)
        except ValueError as error:
            raise UserError(f"{task.name}, train, row {number}: {error}") from None
        for value in target if task.kind == "tokens" and isinstance(target, list) else [target]:
            if not isinstance(value, (list, dict)) and not _is_unlabelled(value, task):
                values.add(_name(value))
    if len(values) < 2:
        raise UserError(f"{task.name}: the training split has {len(values)} different values in `{task.target}`")
    return tuple(
        sorted(values, key=lambda value: (not value.isdecimal(), int(value) if value.isdecimal() else 0, value))
    )


def _name(value: Any) -> str:
    """A class's name; 1.0 is class 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_unlabelled(value: Any, task: Task) -> bool:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return True
    return task.hub is not None and value in _NO_LABEL


def _examples(rows: Iterable[Row], task: Task, labels: tuple[str, ...] | None, where: str) -> Iterator[Example]:
    """Rows as examples; those without a label are left out."""
    for number, row in enumerate(rows, start=1):
        try:
            target = None if task.is_frozen else _target(row, task, labels or ())
            if target is None and not task.is_frozen:
                continue
            yield Example(texts=_texts(row, task), target=target)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}, row {number}: {error}") from None


def _texts(row: Row, task: Task) -> tuple[str, ...]:
    if task.kind == "tokens":
        words = _column(row, task.columns[0], task)
        if not isinstance(words, list) or not words:
            raise ValueError(f"`{task.columns[0]}` must be a list of words")
        return tuple(map(str, words))
    names = [name for name in task.columns if task.kind != "regression" or name == task.columns[0] or name in row]
    texts = tuple(_column(row, name, task) for name in names)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{' and '.join(f'`{name}`' for name in names)} must be texts")
    return texts


def _target(row: Row, task: Task, labels: tuple[str, ...]) -> Any:
    value = _column(row, task.target, task)
    if task.kind == "span":
        return _answers(value)
    if task.kind == "tokens":
        words = _column(row, task.columns[0], task)
        if not isinstance(value, list) or len(value) != len(words):
            raise ValueError(f"`{task.target}` must be a list of as many tags as there are words")
        return tuple(_class_number(tag, task, labels) for tag in value)
    if _is_unlabelled(value, task):
        return None
    if task.kind == "regression":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"`{task.target}` is {value!r}, no number")
        return number
    return _class_number(value, task, labels)


def _answers(value: Any) -> tuple[tuple[str, int], ...]:
    """Answers with their first characters, without white space at their edges; empty ones are none."""
    pairs = (
        [(answer["text"], answer["answer_start"]) for answer in value]
        if isinstance(value, list)
        else zip(value["text"], value["answer_start"], strict=True)
    )
    found = ((str(text).strip(), int(begin) + len(text) - len(text.lstrip())) for text, begin in pairs)
    return tuple((text, begin) for text, begin in found if text)


def _check_places(train: list[Example], task: Task) -> None:
    for example in train:
        for text, begin in example.target:
            if (there := example.texts[1][max(begin, 0) : begin + len(text)]) != text:
                raise UserError(
                    f"{task.name}, train: the answer {text[:60]!r} is said to begin at character {begin} of its "
                    f"context, where {there[:60]!r} stands; `answer_start` counts characters, from 0"
                )


def _class_number(value: Any, task: Task, labels: tuple[str, ...]) -> int:
    value = task.values.get(value, value) if isinstance(value, str) else value
    text = _name(value)
    if text in labels:
        return labels.index(text)
    if task.labels is not None and text.isdecimal() and int(text) < len(labels):
        return int(text)
    raise ValueError(f"`{task.target}` is {value!r}, which is none of {', '.join(labels)}")


def _column(row: Row, name: str, task: Task) -> Any:
    for candidate in (name, *task.aliases.get(name, ())):
        if candidate in row:
            return row[candidate]
    raise ValueError(f"there is no column `{name}`; the row has {', '.join(f'`{key}`' for key in row)}")


def _without_selection(train: list[Example], task: Task) -> tuple[list[Example], list[Example]]:
    """The training split in two: what is trained on, and what chooses the learning rate.

    Where so many examples share a text that too few or too many would be chosen, they are taken one by one.
    """
    wanted = min(SELECTION_LARGEST, max(1, round(SELECTION_SHARE * len(train))))
    for group in (lambda example: _group(example, task), _hash):
        by_hash: dict[str, list[Example]] = {}
        for example in train:
            by_hash.setdefault(group(example), []).append(example)
        selection: list[Example] = []
        chosen = set()
        for key in sorted(by_hash):
            if len(selection) < wanted and len(selection) + len(by_hash[key]) <= 2 * wanted:
                selection += by_hash[key]
                chosen.add(key)
        if 2 * len(selection) >= wanted and len(selection) < len(train):
            break
    if not selection and len(by_hash) > 1:  # few texts that come many times each
        chosen = {min(by_hash, key=lambda key: (len(by_hash[key]), key))}
        selection = [example for example in train if group(example) in chosen]
    return [example for example in train if group(example) not in chosen], selection


def _group(example: Example, task: Task) -> str:
    text = (
        example.texts[1]
        if task.kind == "span"
        else " ".join(example.texts)
        if task.kind == "tokens"
        else example.texts[0]
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _hash(example: Example) -> str:
    return hashlib.sha256(json.dumps(example.texts).encode()).hexdigest()
