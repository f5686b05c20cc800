"""Files of labelled examples as rows: Parquet, JSON lines, CSV, TSV, SQuAD's JSON, CoNLL's columns.

A row is a dict of the file's own columns. Which file holds which split is read off its name:

    train.jsonl   train-00000-of-00003.parquet   dev.tsv   validation_matched.csv   test.fr.jsonl   xnli.test.tsv
    test-context-de-question-de.json   train-v2.0.json
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, first_line

Row = dict[str, Any]

_NAME = re.compile(
    r"(?:[a-z0-9]+\.)?(?P<split>train|validation|valid|dev|test)(?P<variant>_matched|_mismatched)?"
    r"(?:-context-(?P<context>[a-z]{2})-question-(?P<question>[a-z]{2}))?"
    r"(?:-v\d\.\d)?(?:\.(?P<language>[a-z]{2,3}(?:[-_][A-Za-z]+)?))?(?:-\d+-of-\d+)?"
    r"\.(?P<ending>parquet|jsonl|json|csv|tsv|conll|txt)"
)
_SPLITS = {"dev": "validation", "valid": "validation"}


def splits_of(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The files of a task by (split with its variant, language or nothing)."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if not match or (match["context"] or "") != (match["question"] or ""):
            continue
        split = _SPLITS.get(match["split"], match["split"]) + (match["variant"] or "")
        found.setdefault((split, match["language"] or match["context"] or ""), []).append(path)
    return found


def read_rows(path: Path, header: tuple[str, ...] | None = None) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: its ending says what it holds.
        header: the columns of a table that does not begin with their names.

    Raises:
        UserError: the file is not what its ending says; the message names the line.
    """
    try:
        yield from _READERS[path.suffix](path, header)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _parquet(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from None
    yield from table.to_pylist()


def _json_lines(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, found {line[:40]!r}")
        yield row


def _json(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """SQuAD's own nesting (articles, paragraphs, questions), or JSON lines under another name."""
    text = path.read_bytes()
    try:
        tree = json.loads(text)
        nested = isinstance(tree, dict) and isinstance(tree.get("data"), list)
    except (ValueError, RecursionError):
        nested = False
    if not nested:
        yield from _json_lines(path, header)
        return
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no SQuAD file: {type(error).__name__} {error} is missing or of another kind"
        ) from None


def _csv(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """Commas, with quotes around fields that need them."""
    yield from _table(path, csv.reader(io.StringIO(_text(path), newline=""), strict=True), header)


def _tsv(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """Tabs and nothing else: GLUE's files hold quotes that are never closed."""
    yield from _table(path, (line.rstrip("\r").split("\t") for line in _lines(path)), header)


def _table(path: Path, lines: Iterator[list[str]], header: tuple[str, ...] | None) -> Iterator[Row]:
    names: list[str] | None = None
    number = 0
    while True:
        number += 1
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        if not fields or fields == [""]:
            continue
        if names is None:
            is_header = header is None or {"sentence", "label"} <= set(fields)
            names = fields if is_header else list(header)
            if len(set(names)) < len(names):
                raise UserError(f"{path}: two columns have the same name")
            if is_header:
                continue
        if len(fields) != len(names):
            raise UserError(
                f"{path}, row {number}: expected the {len(names)} fields of the first row, found {len(fields)}"
            )
        yield dict(zip(names, fields, strict=True))


def _conll(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """A word a line, first its text and last its tag; an empty line ends a sentence; -DOCSTART- lines are no words."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*_lines(path), ""], start=1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-" and not (line.startswith("# ") and len(fields) > 2 and not words):
            if len(fields) < 2:
                raise UserError(f"{path}, line {number}: expected a word and a tag, found {line[:40]!r}")
            words.append(fields[0])
            tags.append(fields[-1])
        elif not fields and words:
            yield {"tokens": words, "tags": tags}
            words, tags = [], []


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _lines(path: Path) -> list[str]:
    return _text(path).split("\n")


_READERS = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".conll": _conll,
    ".txt": _conll,
}
