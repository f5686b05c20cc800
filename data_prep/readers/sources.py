"""Sources of text: what they are called, how they split into work units, and the documents in a unit.

A unit is cut from the input and the options alone, never from the number of workers or the clock, so that the same
command always makes the same units and an interrupted run can go on from the finished ones.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.readers import compression, finding, formats, rows, wikipedia
from data_prep.readers.formats import BadRecord, Block, Span

KINDS = ("wikipedia", "bookcorpus", "cc100", "jsonl", "parquet", "text", "hub")
_OPTIONS = {  # beside language and name
    "wikipedia": {"field"},
    "bookcorpus": {"field", "documents", "rows_per_document"},
    "cc100": set(),
    "jsonl": {"field"},
    "parquet": {"field", "rows_per_document"},
    "text": {"documents"},
    "hub": {"field", "rows_per_document", "config", "split", "revision"},
}
_PAGE_START = re.compile(rb"\s*<page>")
_MOST_MISSES = 8  # bzip2 streams that begin with no page, after which a dump is read as one
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
        pairs = [("kind", kind), ("path", os.path.expanduser(path)), *(o.partition("=")[::2] for o in options)]
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"source {text!r} says {twice} twice.")
        return cls.from_options(dict(pairs))

    @classmethod
    def from_options(cls, options: dict) -> "Source":
        """Checks names and values, as they come from a command line or a TOML table."""
        known = {item.name for item in fields(cls)} - _FILLED
        if unknown := sorted(set(options) - known):
            raise UserError(f"source option {', '.join(unknown)} is not known; known are {', '.join(sorted(known))}.")
        own = _OPTIONS.get(str(options.get("kind")), known) | {"kind", "path", "name", "language"}
        if foreign := sorted(set(options) - own):
            raise UserError(f"a source of kind {options['kind']} has no option {', '.join(foreign)}.")
        if missing := {"kind", "path"} - set(options):
            raise UserError(f"a source needs {' and '.join(sorted(missing))}; given: {options}.")
        options = dict(options)
        if wrong := sorted(key for key in set(options) - {"rows_per_document"} if not isinstance(options[key], str)):
            raise UserError(f"source option {wrong[0]}={options[wrong[0]]!r}: expected a text.")
        rows_asked = str(options.get("rows_per_document", 0))
        if not re.fullmatch(r"[0-9]{1,9}", rows_asked):
            raise UserError(f"rows_per_document={rows_asked} is no number of rows.")
        options["rows_per_document"] = int(rows_asked)
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
        for path in finding.find_files(source.kind, source.path):
            by_language.setdefault(source.language or finding.language_of(source.kind, path), []).append(path)
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
        if _is_parquet(source, path):
            for group, group_bytes in enumerate(rows.parquet_row_groups(path, source.field)):
                yield Span(path, group, group + 1), group_bytes, False
        elif not compression.is_compressed(path):
            step = size if _delimiter(source, path) is None else unit_bytes
            for start in range(0, size, step or 1):
                stop = min(start + step, size)
                yield Span(path, start, stop), stop - start, False
        else:
            yield from _compressed_spans(source, path, size, unit_bytes)


def _compressed_spans(source: Source, path: str, size: int, unit_bytes: int) -> Iterator[tuple[Span, int, bool]]:
    step = max(1, unit_bytes // COMPRESSION_RATIO)
    if source.kind == "wikipedia" and path.lower().endswith(".bz2") and size > step:
        cuts = _cuts_at_pages(path, step)
        if len(cuts) > 1:
            for start, stop in zip(cuts, [*cuts[1:], size], strict=True):
                yield Span(path, start, stop), (stop - start) * COMPRESSION_RATIO, False
            return
    streamed = size > step and _delimiter(source, path) is not None
    yield Span(path, 0, size), size * COMPRESSION_RATIO, streamed


def _cuts_at_pages(path: str, step: int) -> list[int]:
    """Offsets of bzip2 streams, `step` apart, that begin with a page, as those of multistream dumps do; 0 first."""
    cuts, misses = [0], 0
    for offset in compression.bzip2_streams(path)[1:]:
        if offset - cuts[-1] >= step:
            if compression.begins_bzip2_stream(path, offset, _PAGE_START):
                cuts.append(offset)
            elif (misses := misses + 1) > _MOST_MISSES and len(cuts) == 1:
                break
    return cuts


def _is_parquet(source: Source, path: str) -> bool:
    return source.kind == "parquet" or path.lower().endswith(".parquet")


def _delimiter(source: Source, path: str) -> bytes | None:
    """What ends a record of a file; None where a file is one document."""
    if source.kind == "wikipedia":
        return wikipedia.PAGE_END
    if source.kind == "jsonl" or source.documents == "line":
        return b"\n"
    if source.kind == "cc100" or source.documents == "paragraph":
        return formats.blank_line(path)
    return None


def blocks(unit: Unit, block_bytes: int) -> Iterator[Block]:
    """The blocks of a streamed unit, each of which can be handed to another process."""
    span = unit.spans[0]
    yield from formats.span_blocks(span, _delimiter(unit.source, span.path), block_bytes)


def documents(unit: Unit, block: Block | None = None) -> Iterator[str | BadRecord]:
    """The documents of a unit, or of one block of a streamed unit, in order."""
    if block is not None:
        yield from _parse(unit.source, block)
        return
    for span in unit.spans:
        if unit.source.kind == "hub":
            texts = rows.dataset_texts(unit.source.table, span, unit.source.field)
            yield from _rows(unit.source, span, texts, span.start)
        elif _is_parquet(unit.source, span.path):
            first = rows.first_row(span.path, unit.source.field, span.start)
            yield from _rows(unit.source, span, rows.parquet_texts(span, unit.source.field), first)
        elif (delimiter := _delimiter(unit.source, span.path)) is None:
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
        yield formats.plain(data).decode().strip()
    except UnicodeDecodeError as error:
        yield BadRecord(path, error.start, f"not valid UTF-8: {error.reason}")


def _parse(source: Source, block: Block) -> Iterator[str | BadRecord]:
    if source.kind == "jsonl":
        yield from formats.parse_jsonl(block, source.field)
    elif source.kind == "wikipedia":
        yield from wikipedia.parse_pages(block)
    else:
        yield from formats.parse_delimited(block, lines=source.documents == "line")
    if block.torn:
        yield BadRecord(block.path, block.offset_bytes + len(block.data), block.torn)
