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
        rows: inputs with labels, as the collator takes them; for spans a row a window.
        words: for tokens, of each row the word that every position begins; None elsewhere.
        windows: for spans, of each row the number of its example and its tokens' places in the context.
    """

    rows: list[dict[str, Any]]
    words: list[list[int | None]] = field(default_factory=list)
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
    """The first piece of each word bears its tag."""
    rows, words = [], []
    for example in examples:
        inputs = tokenizer(list(example.texts), is_split_into_words=True, truncation=True, max_length=max_tokens)
        numbers = inputs.word_ids()
        firsts = [n if n is not None and n != before else None for before, n in zip([None, *numbers], numbers)]  # noqa: B905
        labels = [IGNORED if n is None else example.target[n] for n in firsts]
        rows.append({**inputs, "labels": labels})
        words.append(firsts)
    return Features(rows=rows, words=words)


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
    if not inside or places[inside[0]][0] > begin or places[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def pad(tokenizer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one batch of tensors, as long as its longest row."""
    import torch

    labels = ("labels", "start_positions", "end_positions")
    batch = tokenizer.pad([{k: v for k, v in row.items() if k not in labels} for row in rows], return_tensors="pt")
    length = batch["input_ids"].shape[1]
    for name in labels:
        if name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                side = tokenizer.padding_side
                gaps = [[IGNORED] * (length - len(value)) for value in values]
                pairs = zip(values, gaps, strict=True)
                values = [value + gap if side == "right" else gap + value for value, gap in pairs]
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
        return [_tags(*row) for row in zip(output, features.words, examples, strict=True)], []
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


def _tags(positions: np.ndarray, words: list[int | None], example: Example) -> list[int | None]:
    """A tag a word; None for words that were cut off."""
    tags: list[int | None] = [None] * len(example.texts)
    for tag, word in zip(positions, words):  # noqa: B905 - padding follows
        if word is not None:
            tags[word] = int(tag)
    return tags
