"""Sources of text: what they are called, how they split into work units, and the documents in a unit.

A unit is cut from the input and the options alone, never from the number of workers or the clock, so that the same
command always makes the same units and an interrupted run can go on from the finished ones.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.readers import compression, formats, rows, wikipedia
from data_prep.readers.formats import BadRecord, Block, Span

KINDS = ("wikipedia", "bookcorpus", "cc100", "jsonl", "parquet", "text", "hub")
_DELIMITERS = {"jsonl": b"\n", "cc100": b"\n\n", "wikipedia": wikipedia.PAGE_END}
_TEXT_DELIMITERS = {"line": b"\n", "paragraph": b"\n\n"}
_SUFFIXES = {
    "wikipedia": (".xml", ".parquet"),
    "bookcorpus": (".txt", ".parquet"),
    "cc100": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt",),
}
_LANGUAGE_OF_FILE = {
    "wikipedia": re.compile(r"([a-z]{2,3}(?:_[a-z_]+)?|simple)wiki-"),
    "cc100": re.compile(r"([a-z]{2,3}(?:[_-][A-Za-z]+)?)\.txt"),
}
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # a folder's name, on any file system
COMPRESSION_RATIO = 4  # of text, roughly: compressed units are planned this much smaller
BOOK_ROWS = 4096  # sentences a document when BookCorpus has one sentence a row
BLOCK_BYTES = 1 << 20
_FILLED = {"files", "table"}  # not the user's


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus to read, as the user describes it."""

    kind: str
    path: str
    """A file, a folder, a pattern with `*`, or for `hub` a dataset id or a folder made by `save_to_disk`."""
    name: str = ""
    """Folder of its shards; from kind and language when empty."""
    language: str = ""
    """Language code kept with every shard; taken from the file name where the format has it there."""
    field: str = "text"
    """Key or column of the text (jsonl, parquet, hub)."""
    documents: str = ""
    """Where a document of plain text ends: "file", "paragraph" (blank line) or "line"; for text and bookcorpus."""
    rows_per_document: int = 0
    """Rows joined into one document; 0 = one row, or 4096 for bookcorpus."""
    config: str = ""
    """Configuration of a hub dataset, such as "20231101.en"."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str = ""
    """Branch, tag or commit of a hub dataset; its newest commit when empty."""
    files: tuple[str, ...] = ()
    """Filled by `expand`: the files of this source, sorted."""
    table: object = dataclasses.field(default=None, compare=False, repr=False)
    """Filled by `open_tables`: the rows of a hub source. Memory-mapped, so it travels to workers as names of files."""

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Reads `KIND[,option=value...]:PATH`, such as `cc100:data/*.txt.xz` or
        `jsonl,field=body,language=en:x.jsonl`.
        """
        head, colon, path = text.partition(":")
        kind, *options = head.split(",")
        if not colon or not path or kind not in KINDS:
            raise UserError(f"source {text!r}: expected KIND:PATH with KIND one of {', '.join(KINDS)}.")
        pairs = dict(option.partition("=")[::2] for option in options)
        return cls.from_options({"kind": kind, "path": path, **pairs})

    @classmethod
    def from_options(cls, options: dict) -> "Source":
        """Checks names and values, as they come from a command line or a TOML table."""
        known = {item.name for item in fields(cls)} - _FILLED
        if unknown := sorted(set(options) - known):
            raise UserError(f"source option {', '.join(unknown)} is not known; known are {', '.join(sorted(known))}.")
        if missing := {"kind", "path"} - set(options):
            raise UserError(f"a source needs {' and '.join(sorted(missing))}; given: {options}.")
        options = dict(options)
        if wrong := sorted(key for key in set(options) - {"rows_per_document"} if not isinstance(options[key], str)):
            raise UserError(f"source option {wrong[0]}={options[wrong[0]]!r}: expected a text.")
        try:
            options["rows_per_document"] = int(options.get("rows_per_document", 0))
        except (ValueError, TypeError):
            raise UserError(f"rows_per_document={options['rows_per_document']!r} is not a whole number.") from None
        source = cls(**options)
        if source.kind not in KINDS:
            raise UserError(f"source kind {source.kind!r} is not known; known are {', '.join(KINDS)}.")
        if source.documents not in ("", "file", "paragraph", "line"):
            raise UserError(f"documents={source.documents!r}: expected file, paragraph or line.")
        if source.name and not re.fullmatch(_NAME, source.name):
            raise UserError(
                f"source name {source.name[:60]!r}: use at most 100 letters, digits, dots, hyphens and underscores."
            )
        return source

    def as_dict(self) -> dict:
        """What the user asked for, without defaults."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in _FILLED and getattr(self, item.name) != item.default
        }


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work: spans of one source, or one compressed stream whose blocks are pieces of work themselves."""

    source: Source
    number: int
    spans: tuple[Span, ...]
    input_bytes: int
    streamed: bool = False


def expand(sources: tuple[Source, ...]) -> list[Source]:
    """Sources with their files, one language each: a folder of CC-100 becomes one source a language.

    Raises:
        UserError: nothing to read, two sources of the same name, or an unknown kind of file.
    """
    expanded: list[Source] = []
    for source in sources:
        if source.kind == "hub":
            path = os.path.abspath(source.path) if os.path.isdir(source.path) else source.path
            expanded.append(_named(replace(source, files=(path,))))
            continue
        by_language: dict[str, list[str]] = {}
        for path in _find_files(source):
            by_language.setdefault(source.language or _language_of(source.kind, path), []).append(path)
        for language, paths in sorted(by_language.items()):
            expanded.append(_named(replace(source, language=language, files=tuple(paths)), len(by_language) > 1))
    names = [source.name for source in expanded]
    for name in names:
        if not re.fullmatch(_NAME, name):
            raise UserError(
                f"a source would be called {name[:60]!r}, from its kind, language and files: give it a name of at most "
                "100 letters, digits, dots, hyphens and underscores, as in `cc100,name=...:PATH`."
            )
        if names.count(name) > 1:
            raise UserError(
                f"two sources are called {name!r}: give one of them another name, as in `jsonl,name=...:PATH`."
            )
    return expanded


def open_tables(expanded: list[Source]) -> list[Source]:
    """Opens hub sources, once and for all workers: what is new on the hub meanwhile does not get in.

    Raises:
        UserError: there is no such dataset, or it has no such column.
    """
    return [replace(source, table=_open_table(source)) if source.kind == "hub" else source for source in expanded]


def _open_table(source: Source):
    return rows.open_dataset(source.files[0], source.config, source.split, source.revision, source.field)


def _named(source: Source, many_languages: bool = False) -> Source:
    if source.name and not many_languages:
        return source
    stem = source.name or (_stem(source.path) if source.kind in ("jsonl", "parquet", "text", "hub") else source.kind)
    by_language = source.language and (many_languages or source.kind in ("wikipedia", "cc100"))
    return replace(source, name=f"{stem}-{source.language}" if by_language else stem)


def _stem(path: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path.rstrip("/")).name.split(".")[0]).strip("-")
    return stem[:80] or "text"


def _language_of(kind: str, path: str) -> str:
    pattern = _LANGUAGE_OF_FILE.get(kind)
    match = pattern.match(os.path.basename(path)) if pattern else None
    return match.group(1) if match else ""


def _find_files(source: Source) -> list[str]:
    """The files of a source, sorted; in a folder those with a suffix of this kind."""
    path, suffixes = source.path, _SUFFIXES[source.kind]
    if os.path.isdir(path):
        endings = tuple(s + c for s in suffixes for c in ("", *compression.COMPRESSED_SUFFIXES))
        found = sorted(os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
        found = [name for name in found if name.endswith(endings)]
        expected = f"no file ending in {', '.join(suffixes)} (also compressed) in that folder"
    else:
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        expected = "no such file, and no file matches it as a pattern"
    if not found:
        raise UserError(f"source {source.kind}:{path}: {expected}. Check the path.")
    for name in found:
        try:
            open(name, "rb").close()
        except OSError as error:
            raise UserError(f"source {source.kind}: {name} cannot be read ({error.strerror}).") from None
    return [os.path.abspath(name) for name in found]


def plan(source: Source, unit_bytes: int) -> Iterator[Unit]:
    """Cuts a source, expanded and open, into units of about `unit_bytes` of text each."""
    number, spans, total = 0, [], 0
    for span, size, streamed in _spans(source, unit_bytes):
        if streamed or total + size > unit_bytes:
            if spans:
                yield Unit(source=source, number=number, spans=tuple(spans), input_bytes=total)
                number, spans, total = number + 1, [], 0
        if streamed:
            yield Unit(source=source, number=number, spans=(span,), input_bytes=span.stop, streamed=True)
            number += 1
        else:
            spans.append(span)
            total += size
    if spans:
        yield Unit(source=source, number=number, spans=tuple(spans), input_bytes=total)


def _spans(source: Source, unit_bytes: int) -> Iterator[tuple[Span, int, bool]]:
    """Spans of at most about `unit_bytes`, their size, and whether one must be read by a single process."""
    if source.kind == "hub":
        table = source.table
        row_bytes = max(1, (table.data.nbytes if table.data is not None else 0) // max(1, len(table)))
        step = max(1, unit_bytes // row_bytes)
        if multiple := _rows_per_document(source):
            step = max(multiple, step - step % multiple)
        for start in range(0, len(table), step):
            stop = min(start + step, len(table))
            yield Span(source.files[0], start, stop), (stop - start) * row_bytes, False
        return
    for path in source.files:
        size = os.path.getsize(path)
        if path.endswith(".parquet"):
            for group, group_bytes in enumerate(rows.parquet_row_groups(path, source.field)):
                yield Span(path, group, group + 1), group_bytes, False
        elif not compression.is_compressed(path):
            step = size if _delimiter(source) is None else unit_bytes
            for start in range(0, size, step or 1):
                stop = min(start + step, size)
                yield Span(path, start, stop), stop - start, False
        else:
            yield from _compressed_spans(source, path, size, unit_bytes)


def _compressed_spans(source: Source, path: str, size: int, unit_bytes: int) -> Iterator[tuple[Span, int, bool]]:
    step = max(1, unit_bytes // COMPRESSION_RATIO)
    if source.kind == "wikipedia" and path.endswith(".bz2") and size > step:
        streams = compression.bzip2_streams(path)
        if len(streams) > 2:
            cuts = [0]
            for offset in streams[1:]:
                if offset - cuts[-1] >= step:
                    cuts.append(offset)
            for start, stop in zip(cuts, [*cuts[1:], size], strict=True):
                yield Span(path, start, stop), (stop - start) * COMPRESSION_RATIO, False
            return
    streamed = size > step and _delimiter(source) is not None
    yield Span(path, 0, size), size * COMPRESSION_RATIO, streamed


def _delimiter(source: Source) -> bytes | None:
    """What ends a record; None where a file is one document."""
    if source.kind in ("text", "bookcorpus"):
        return _TEXT_DELIMITERS.get(source.documents or "file")
    return _DELIMITERS[source.kind]


def blocks(unit: Unit, block_bytes: int) -> Iterator[Block]:
    """The blocks of a streamed unit, each of which can be handed to another process."""
    yield from formats.span_blocks(unit.spans[0], _delimiter(unit.source), block_bytes)


def documents(unit: Unit, block: Block | None = None) -> Iterator[str | BadRecord]:
    """The documents of a unit, or of one block of a streamed unit, in order."""
    if block is not None:
        yield from _parse(unit.source, block)
        return
    for span in unit.spans:
        if unit.source.kind == "hub":
            texts = rows.dataset_texts(unit.source.table, span, unit.source.field)
            yield from _rows(unit.source, span, texts, span.start)
        elif span.path.endswith(".parquet"):
            first = rows.first_row(span.path, unit.source.field, span.start)
            yield from _rows(unit.source, span, rows.parquet_texts(span, unit.source.field), first)
        elif (delimiter := _delimiter(unit.source)) is None:
            yield from _whole_file(span.path)
        else:
            for piece in formats.span_blocks(span, delimiter, BLOCK_BYTES):
                yield from _parse(unit.source, piece)


def _rows(source: Source, span: Span, values: Iterator, first_row: int) -> Iterator[str | BadRecord]:
    return rows.as_documents(values, span.path, first_row, _rows_per_document(source))


def _rows_per_document(source: Source) -> int:
    return source.rows_per_document or (BOOK_ROWS if source.kind == "bookcorpus" else 0)


def _whole_file(path: str) -> Iterator[str | BadRecord]:
    with compression.open_binary(path) as (file, _):
        data, torn = compression.read_all(file)
    if torn:
        yield BadRecord(path, len(data), torn)
        return
    try:
        yield data.decode().strip()
    except UnicodeDecodeError as error:
        yield BadRecord(path, error.start, f"not valid UTF-8: {error.reason}")


def _parse(source: Source, block: Block) -> Iterator[str | BadRecord]:
    if source.kind == "jsonl":
        yield from formats.parse_jsonl(block, source.field)
    elif source.kind == "wikipedia":
        yield from wikipedia.parse_pages(block)
    else:
        yield from formats.parse_delimited(block, _delimiter(source))
    if block.torn:
        yield BadRecord(block.path, block.offset_bytes + len(block.data), block.torn)
