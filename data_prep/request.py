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

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources import Source

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


def read_corpus_file(path: Path, **overrides) -> PrepareRequest:
    """The request in a TOML file: the fields of `PrepareRequest`, and a `[[source]]` table for each source.

    Relative paths of sources count from the folder of the file.

    Raises:
        UserError: no such file, not TOML, or an unknown or mistyped key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"corpus file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"corpus file {path} is not valid TOML: {error}.") from error
    tables = content.pop("source", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"corpus file {path}: write each source as a table headed [[source]].")
    types = {item.name: item.type for item in fields(PrepareRequest) if item.name != "sources"}
    if unknown := sorted(set(content) - set(types)):
        raise UserError(f"corpus file {path}: {', '.join(unknown)} is not known; known are {', '.join(sorted(types))}.")
    content = {**content, **{key: value for key, value in overrides.items() if value is not None}}
    if "tokenizer" not in content:
        raise UserError(f"corpus file {path} names no tokenizer: add `tokenizer = ...`, or give --tokenizer.")
    for key, value in content.items():
        expected = {str: str, float: (int, float)}.get(types[key], int)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UserError(f"corpus file {path}: {key} = {value!r} has the wrong type.")
    return PrepareRequest(sources=tuple(_source(table, path.parent) for table in tables), **content)


def _source(table: dict, folder: Path) -> Source:
    source = Source.from_options(table)
    if source.kind == "hub" and not (folder / source.path).is_dir():
        return source
    return Source.from_options({**table, "path": str(folder / source.path)})
