"""Files of labelled examples as rows: Parquet, JSON lines, CSV, TSV, SQuAD's JSON, CoNLL's columns.

A row is a dict of the file's own columns. Which file holds which split is read off its name:

    train.jsonl   train-00000-of-00003.parquet   dev.tsv   validation_matched.csv   test.fr.jsonl   xnli.test.tsv
    test-context-de-question-de.json   train-v2.0.json

A split is one file, or all the shards of one.
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
    r"(?:-v\d\.\d)?(?:\.(?P<language>[a-z]{2,3}(?:[-_][A-Za-z]+)?))?"
    r"(?:-(?P<shard>\d+)-of-(?P<shards>\d+)(?:-[0-9a-f]+)?)?\.(?P<ending>parquet|jsonl|json|csv|tsv|conll|txt)"
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


def require_one(paths: list[Path]) -> None:
    """Refuse files that are not one split.

    Raises:
        UserError: some are not shards of the same whole, or shards are missing.
    """
    matches = [match for path in paths if (match := _NAME.fullmatch(path.name))]
    shards = sorted(int(match["shard"] or 0) for match in matches)
    wholes = {(match["shards"], match["ending"]) for match in matches}
    names = ", ".join(path.name for path in paths)
    if len(wholes) > 1 or (len(paths) > 1 and matches[0]["shards"] is None):
        raise UserError(f"{paths[0].parent}: {names} all hold the same split; leave one of them there")
    if (count := int(matches[0]["shards"] or 1)) != len(shards) or shards != list(range(count)):
        raise UserError(f"{paths[0].parent}: of {count} shards of a split only {names} are there")


def read_rows(path: Path, header: tuple[str, ...] | None = None, torn: list[int] | None = None) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: its ending says what it holds.
        header: the columns of a table that does not begin with their names.
        torn: takes the numbers of a TSV's rows that have too few or too many fields; without it they are a mistake.

    Raises:
        UserError: the file is not what its ending says; the message names the line.
    """
    reader = _READERS[path.suffix]
    try:
        yield from _tsv(path, header, torn) if reader is _tsv else reader(path, header)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _parquet(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """Classes that the library `datasets` has written as numbers are given by their names."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from None
    names = _class_names(table.schema)
    for row in table.to_pylist():
        for column, classes in names.items():
            row[column] = _named(row[column], classes)
        yield row


def _class_names(schema) -> dict[str, list[str]]:
    """Column -> names of its classes by number, as `datasets` keeps them in a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        inner = {name: feature.get("feature", feature) for name, feature in features.items()}
        found = {name: feature["names"] for name, feature in inner.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # written by another library
        return {}
    return {name: names for name, names in found.items() if name in schema.names}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value


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
    """SQuAD's own nesting (articles, paragraphs, questions), a list of rows, or JSON lines under another name."""
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, list) and all(isinstance(row, dict) for row in tree):
        yield from tree
        return
    if not (isinstance(tree, dict) and isinstance(tree.get("data"), list)):
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


def _tsv(path: Path, header: tuple[str, ...] | None, torn: list[int] | None = None) -> Iterator[Row]:
    """Tabs and nothing else: GLUE's files hold quotes that are never closed."""
    yield from _table(path, (line.rstrip("\r").split("\t") for line in _lines(path)), header, torn)


def _table(
    path: Path, lines: Iterator[list[str]], header: tuple[str, ...] | None, torn: list[int] | None = None
) -> Iterator[Row]:
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
        if len(fields) != len(names) and torn is not None:
            torn.append(number)
            continue
        if len(fields) != len(names):
            raise UserError(
                f"{path}, row {number}: expected the {len(names)} fields of the first row, found {len(fields)}"
            )
        yield dict(zip(names, fields, strict=True))


def _conll(path: Path, header: tuple[str, ...] | None) -> Iterator[Row]:
    """A word a line, first its text and last its tag; an empty line ends a sentence; -DOCSTART- lines are no words.

    Nor are lines before a sentence that begin with # and hold a = or have not as many fields as the lines of words.
    """
    words: list[str] = []
    tags: list[str] = []
    lines = _lines(path)
    columns = next((len(line.split()) for line in lines if line.split() and not line.startswith(("#", "-DOC"))), 0)
    for number, line in enumerate([*lines, ""], start=1):
        fields = line.split()
        is_comment = line.startswith("# ") and not words and (len(fields) != columns or "=" in fields)
        if fields and fields[0] != "-DOCSTART-" and not is_comment:
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
