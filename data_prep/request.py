"""What a corpus is made of: the request, from a command line or a TOML file.

tokenizer = "xlm-roberta-large"
validation_fraction = 0.001

[[source]]
kind = "cc100"
path = "/data/cc100/*.txt.xz"

[[source]]
kind = "wikipedia"
path = "/data/dumps/enwiki-20240101-pages-articles-multistream.xml.bz2"
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.errors import UserError
from data_prep.readers.sources import Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """What decides the bytes of a corpus, and nothing else."""

    tokenizer: str
    sources: tuple[Source, ...]
    validation_fraction: float = 0.0
    """Share of documents held out; a hash of the text decides which."""
    min_tokens: int = 1
    """Shorter documents are dropped."""
    limit_documents: int | None = None
    """At most so many documents of each source, the first ones."""
    shard_bytes: int = 1 << 30
    on_bad_record: str = "stop"
    """"stop" or "skip" (and count)."""
    unit_bytes: int = 32 << 20
    """Text in a piece of work, about."""
    encoder: str = "auto"
    """"auto", or "reference" to let `tokenizers` encode everything."""

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not self.sources:
            raise UserError("no source given. Name at least one, as in `--source wikipedia:dump.xml.bz2`.")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation fraction {self.validation_fraction}: expected at least 0 and less than 1.")
        if self.on_bad_record not in ("stop", "skip"):
            raise UserError(f"on_bad_record {self.on_bad_record!r}: expected stop or skip.")
        if self.encoder not in ("auto", "reference"):
            raise UserError(f"encoder {self.encoder!r}: expected auto or reference.")
        for name in ("min_tokens", "shard_bytes", "unit_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected at least 1.")
        if self.limit_documents is not None and self.limit_documents < 1:
            raise UserError(f"limit of {self.limit_documents} documents: expected at least 1.")

    def as_dict(self) -> dict:
        """The request as the manifest keeps it."""
        return {
            "tokenizer": self.tokenizer,
            "sources": [source.as_dict() for source in self.sources],
            "validation_fraction": self.validation_fraction,
            "min_tokens": self.min_tokens,
            "limit_documents": self.limit_documents,
            "shard_bytes": self.shard_bytes,
            "on_bad_record": self.on_bad_record,
            "unit_bytes": self.unit_bytes,
            "encoder": self.encoder,
        }


_NAMES = {"validation": "validation_fraction", "limit": "limit_documents"}
_SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def request_from(corpus_file: Path | None, source_texts: Sequence[str], **options) -> PrepareRequest:
    """The request of a command line: a TOML file, sources and options, of which the command line's win.

    Relative paths in the file count from its folder.

    Args:
        corpus_file: fields of `PrepareRequest`, and a `[[source]]` table for each source.
        source_texts: further sources, as `Source.parse` reads them.
        options: fields of `PrepareRequest` by their names on the command line; None = not given.

    Raises:
        UserError: no such file, not TOML, an unknown or mistyped key, or no tokenizer.
    """
    content = _read_toml(corpus_file) if corpus_file else {}
    tables = content.pop("source", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{corpus_file}: write each source as a table headed [[source]].")
    content |= {_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    if isinstance(content.get("shard_bytes"), str):
        content["shard_bytes"] = parse_size(content["shard_bytes"])
    _check_types(content, corpus_file)
    if "tokenizer" not in content:
        raise UserError("no tokenizer given: add --tokenizer, a model folder or hub id, or a line in the corpus file.")
    if corpus_file and not options.get("tokenizer") and content["tokenizer"]:
        near = corpus_file.parent / content["tokenizer"]
        content["tokenizer"] = str(near) if near.is_dir() else content["tokenizer"]
    sources = [_source(table, corpus_file.parent) for table in tables] + [Source.parse(text) for text in source_texts]
    return PrepareRequest(sources=tuple(sources), **content)


def parse_size(text: str) -> int:
    """Bytes in a size such as "500MB", "1GiB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if not match:
        raise UserError(f"size {text!r}: expected a number with KB, MB, GB, KiB, MiB, GiB or nothing.")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"corpus file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"corpus file {path} is not valid TOML: {error}.") from error


def _check_types(content: dict, path: Path | None) -> None:
    types = {item.name: item.type for item in fields(PrepareRequest) if item.name != "sources"}
    if unknown := sorted(set(content) - set(types)):
        raise UserError(f"{path}: {', '.join(unknown)} is not known; known are {', '.join(sorted(types))}.")
    for key, value in content.items():
        expected = {str: str, float: (int, float)}.get(types[key], int)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UserError(f"{path}: {key} = {value!r} has the wrong type.")


def _source(table: dict, folder: Path) -> Source:
    source = Source.from_options(table)
    if source.kind == "hub" and not (folder / source.path).is_dir():
        return source
    return Source.from_options({**table, "path": str(folder / source.path)})
