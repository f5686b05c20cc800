"""Examples as a model's inputs, and its scores as answers, for every kind of task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.tasks import spans
from pipeline.tasks.examples import Example

IGNORED = -100  # a label that no loss counts
LARGEST_STRIDE, LARGEST_QUESTION = 128, 64


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model is given for examples.

    Attributes:
        rows: inputs with labels, as the collator takes them; for tokens and spans a row a window.
        words: for tokens, of each row the number of its example and the word that every position begins; None for
            positions that begin none, or one that another window counts.
        windows: for spans, of each row the number of its example and its tokens' places in the context.
    """

    rows: list[dict[str, Any]]
    words: list[tuple[int, list[int | None]]] = field(default_factory=list)
    windows: list[tuple[int, list[tuple[int, int] | None]]] = field(default_factory=list)


def encode(tokenizer, examples: Sequence[Example], kind: str, max_tokens: int) -> Features:
    """Tokens and labels of examples; longer ones are cut to `max_tokens`, or read in windows of that length."""
    if kind == "span":
        return _encode_spans(tokenizer, examples, max_tokens)
    if kind == "tokens":
        return _encode_words(tokenizer, examples, max_tokens)
    columns = zip(*(example.texts for example in examples), strict=True)
    inputs = tokenizer(*map(list, columns), truncation=True, max_length=max_tokens)
    names = list(inputs)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(inputs[name] for name in names), strict=True)]
    for row, example in zip(rows, examples, strict=True):
        row["labels"] = example.target
    return Features(rows=rows)


def _encode_words(tokenizer, examples: Sequence[Example], max_tokens: int) -> Features:
    """The first piece of each word bears its tag, in that window where it has most on both sides."""
    rows, words = [], []
    space = _missing_space(tokenizer)
    for number, example in enumerate(examples):
        inputs = tokenizer(
            [space + word for word in example.texts],
            is_split_into_words=True,
            truncation=True,
            max_length=max_tokens,
            stride=min(LARGEST_STRIDE, max_tokens // 3),
            return_overflowing_tokens=True,
        )
        windows = [_begun(inputs.word_ids(window), window) for window in range(len(inputs["input_ids"]))]
        for window, firsts in enumerate(_each_once(windows)):
            row = {name: inputs[name][window] for name in inputs if name in tokenizer.model_input_names}
            rows.append({**row, "labels": [IGNORED if n is None else example.target[n] for n in firsts]})
            words.append((number, firsts))
    return Features(rows=rows, words=words)


def _missing_space(tokenizer) -> str:
    """A space, where words that are given one by one would be read as if none stood between them."""
    apart = tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return "" if apart == tokenizer("a b", add_special_tokens=False)["input_ids"] else " "


def _begun(numbers: Sequence[int | None], window: int) -> list[int | None]:
    """The word that each position begins. The first word of a later window began in the one before it."""
    known = next((n for n in numbers if n is not None), None) if window else None
    pairs = zip([None, *numbers], numbers)  # noqa: B905 - one longer
    return [n if n not in (None, before, known) else None for before, n in pairs]


def _each_once(windows: list[list[int | None]]) -> list[list[int | None]]:
    """Each word in one window alone."""
    room = [{n: min(i, len(firsts) - i) for i, n in enumerate(firsts) if n is not None} for firsts in windows]
    best = {n: max(range(len(room)), key=lambda w: room[w].get(n, -1)) for n in set().union(*room)}
    return [[n if best.get(n) == window else None for n in firsts] for window, firsts in enumerate(windows)]


def _encode_spans(tokenizer, examples: Sequence[Example], max_tokens: int) -> Features:
    """Windows of question and context that overlap; a window without the whole answer is labelled as having none."""
    rows, windows = [], []
    for number, example in enumerate(examples):
        question, context = example.texts
        inputs = tokenizer(
            _first_tokens(tokenizer, question.strip(), min(LARGEST_QUESTION, max_tokens // 4)),
            context,
            truncation="only_second",
            max_length=max_tokens,
            stride=min(LARGEST_STRIDE, max_tokens // 3),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, offsets in enumerate(inputs["offset_mapping"]):
            sides = inputs.sequence_ids(window)
            places = [tuple(place) if side == 1 else None for side, place in zip(sides, offsets, strict=True)]
            row = {name: inputs[name][window] for name in inputs if name in tokenizer.model_input_names}
            row["start_positions"], row["end_positions"] = _positions(places, example.target)
            rows.append(row)
            windows.append((number, places))
    return Features(rows=rows, windows=windows)


def _first_tokens(tokenizer, text: str, count: int) -> str:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= count else text[: offsets[count - 1][1]]


def _positions(places: list[tuple[int, int] | None], answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """First and last token of the first right answer; 0, 0 where the window has not all of it."""
    if not answers:
        return 0, 0
    text, begin = answers[0]
    end = begin + len(text)
    inside = [i for i, place in enumerate(places) if place is not None and place[0] < end and place[1] > begin]
    context = [place for place in places if place is not None]
    if not inside or context[0][0] > begin or context[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def pad(tokenizer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one batch of tensors, as long as its longest row; padding stands on the right."""
    import torch

    labels = ("labels", "start_positions", "end_positions")
    batch = tokenizer.pad([{k: v for k, v in row.items() if k not in labels} for row in rows], return_tensors="pt")
    length = batch["input_ids"].shape[1]
    for name in labels:
        if name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                values = [value + [IGNORED] * (length - len(value)) for value in values]
            batch[name] = torch.tensor(values)
    return dict(batch)


def answers(kind: str, output: Any, features: Features, examples: Sequence[Example]) -> tuple[list[Any], list[float]]:
    """What a model's scores say of examples: class numbers, numbers, tags' numbers, or texts.

    Args:
        output: scores [rows, classes], [rows, 1], the tag's number at each position
            of every row, or scores of the first and the last token.

    Returns:
        One answer an example, and for spans by how much it beats that there is none.
    """
    if kind in ("text", "pair"):
        return output.argmax(1).tolist(), []
    if kind == "regression":
        return output[:, 0].tolist(), []
    if kind == "tokens":
        return _tags(output, features, examples), []
    windows: list[list[int]] = [[] for _ in examples]
    for row, (number, _) in enumerate(features.windows):
        windows[number].append(row)
    found = [
        spans.best_answer(
            example.texts[1], *([x[row] for row in rows] for x in output), [features.windows[row][1] for row in rows]
        )
        for example, rows in zip(examples, windows, strict=True)
    ]
    return [text for text, _ in found], [margin for _, margin in found]


def _tags(output: Sequence[np.ndarray], features: Features, examples: Sequence[Example]) -> list[list[int | None]]:
    """A tag a word; None for words of which the tokenizer leaves nothing."""
    tags: list[list[int | None]] = [[None] * len(example.texts) for example in examples]
    for positions, (number, words) in zip(output, features.words, strict=True):
        for tag, word in zip(positions, words):  # noqa: B905 - padding follows
            if word is not None:
                tags[number][word] = int(tag)
    return tags
