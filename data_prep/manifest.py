"""What a prepared corpus says of itself: `manifest.json`, checked strictly before anything in it is used."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from data_prep.errors import UserError

FORMAT_VERSION = 1
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid")
NotNegative = Annotated[int, Field(ge=0)]


class TokenizerInfo(TypedDict):
    """What made a corpus's ids."""

    fingerprint: str
    vocabulary_tokens: Annotated[int, Field(gt=0, lt=1 << 31)]
    cls_id: NotNegative
    sep_id: NotNegative
    pad_id: NotNegative
    encoder: NotRequired[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    __pydantic_config__ = _STRICT

    path: Annotated[str, Field(pattern=r"^(train|validation)/[A-Za-z0-9_][A-Za-z0-9._-]*/[0-9]+$")]
    """Such as "train/wikipedia-en/00000": relative to the corpus, without suffix."""
    split: Literal["train", "validation"]
    source: str
    language: str
    documents: NotNegative
    tokens: NotNegative
    """Separators included."""
    bytes: NotNegative
    """Size of the .bin file."""
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus is."""

    __pydantic_config__ = _STRICT

    format_version: int
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "int32"]
    request: dict
    counts: dict[str, dict[str, int]]
    shards: tuple[ShardInfo, ...]
    shortened: dict[str, list[str]] = field(default_factory=dict)
    """By source, titles of articles that lost more text than their markup explains; the first hundred."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


_MANIFEST = pydantic.TypeAdapter(Manifest)


def parse_manifest(path: Path, raw: bytes) -> Manifest:
    """The manifest in the bytes of the file at `path`.

    Raises:
        UserError: it is damaged, of another version, or says what no preparation writes.
    """
    try:
        version = json.loads(raw)["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}. Prepare again.")
        manifest = _MANIFEST.validate_json(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged ({where}: {first['msg']}). Prepare the corpus again.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Prepare the corpus again.") from None
    _check_consistent(path, manifest)
    return manifest


def _check_consistent(path: Path, manifest: Manifest) -> None:
    """Refuse what no preparation writes: a shard twice or in a foreign folder, special ids out of the vocabulary."""
    paths = Counter(shard.path for shard in manifest.shards)
    problems = [f"shard {name} is listed {count} times" for name, count in paths.items() if count > 1]
    for shard in manifest.shards:
        if shard.path.split("/")[:2] != [shard.split, shard.source]:
            problems.append(f"shard {shard.path} is listed as {shard.split} of {shard.source}")
        if shard.bytes != shard.tokens * np.dtype(manifest.dtype).itemsize:
            problems.append(f"shard {shard.path} is listed with {shard.tokens} tokens and {shard.bytes} bytes")
    special = [manifest.tokenizer[name] for name in ("cls_id", "sep_id", "pad_id")]
    if max(special) >= manifest.tokenizer["vocabulary_tokens"]:
        problems.append(f"special ids {special} lie outside of the vocabulary")
    if problems:
        raise UserError(f"{path} is damaged ({problems[0]}). Prepare the corpus again.")
