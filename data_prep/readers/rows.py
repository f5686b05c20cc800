"""Row formats: Parquet files and `datasets` tables, read by ranges of rows, never whole.

A span counts row groups of a Parquet file or rows of a dataset. BookCorpus has one sentence a row and no mark between
books: runs of rows are joined back into long documents.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_prep.errors import UserError, first_line
from data_prep.readers.formats import BadRecord, Span

BATCH_ROWS = 1024


def parquet_row_groups(path: str, field: str) -> list[int]:
    """Size in bytes of the text column of each row group."""
    metadata = _open_parquet(path, field).metadata
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    column = paths.index(field) if field in paths else 0
    return [metadata.row_group(g).column(column).total_uncompressed_size for g in range(metadata.num_row_groups)]


def first_row(path: str, field: str, group: int) -> int:
    """Number of the first row of a row group in its file."""
    metadata = _open_parquet(path, field).metadata
    return sum(metadata.row_group(number).num_rows for number in range(group))


def _open_parquet(path: str, field: str):
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.lib.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    if field not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column {field!r}, only {columns}. Name the text column with `field=...`.")
    return file


def parquet_texts(span: Span, field: str) -> Iterator[Any]:
    """The values of the text column in a range of row groups; bytes where they are no UTF-8.

    Raises:
        UserError: a page of the file is damaged.
    """
    import pyarrow.lib

    file = _open_parquet(span.path, field)
    groups = list(range(span.start, span.stop))
    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[field]):
            yield from _values(batch.column(0))
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise UserError(f"{span.path} is damaged: {first_line(error)}") from error


def _values(column) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


@contextlib.contextmanager
def _torch_unmentioned() -> Iterator[None]:
    """Where torch is kept out of this process by an entry of None, `datasets` would take that for torch itself."""
    is_kept_out = "torch" in sys.modules and sys.modules["torch"] is None
    if is_kept_out:
        del sys.modules["torch"]
    try:
        yield
    finally:
        if is_kept_out:
            sys.modules.setdefault("torch", None)


@_torch_unmentioned()
def open_dataset(path: str, config: str, split: str, revision: str, field: str):
    """A hub dataset, a folder of data files, or what `save_to_disk` wrote, memory-mapped."""
    import datasets

    try:
        if any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(path)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(path, config or None, split=split, revision=revision or None)
    except Exception as error:  # the library raises many kinds for a wrong name, no network and bad files
        raise UserError(
            f"hub dataset {path!r} (config {config!r}, split {split!r}) cannot be opened: {first_line(error)}"
        ) from error
    if field not in table.column_names:
        raise UserError(f"{path} has no column {field!r}, only {', '.join(table.column_names)}.")
    return table


def dataset_texts(table, span: Span, field: str) -> Iterator[Any]:
    """The values of the text column in a range of rows of a `datasets.Dataset`."""
    for start in range(span.start, span.stop, BATCH_ROWS):
        yield from table[start : min(start + BATCH_ROWS, span.stop)][field]


def as_documents(values: Iterator[Any], path: str, first_row: int, rows_per_document: int) -> Iterator[str | BadRecord]:
    """One document a row, or `rows_per_document` rows (sentences) joined by spaces into one."""
    row = first_row
    while rows := list(islice(values, max(1, rows_per_document))):
        texts = []
        for value in rows:
            if isinstance(value, str):
                texts.append(value)
            else:
                reason = f"row {row}: the text column holds {type(value).__name__}, expected a string"
                yield BadRecord(path, -1, reason)
            row += 1
        if texts:
            yield texts[0] if rows_per_document <= 1 else " ".join(text.strip() for text in texts)
