"""What a worker does with one piece of work: read its documents, encode them in batches, write a part."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.readers import sources
from data_prep.readers.formats import BadRecord, Block
from data_prep.readers.sources import Unit
from data_prep.readers.wikipedia import ShortenedArticle
from data_prep.tokens.tokenizer import Disagreement, Encoder
from data_prep.work import parts
from data_prep.work.parts import SPLITS, Part

BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What a worker needs to know besides the unit."""

    encoder_folder: str
    work_folder: str
    dtype: str
    sep_id: int
    unknown_id: int
    """-1 if the tokenizer has none."""
    validation_fraction: float
    min_tokens: int
    limit_documents: int | None
    on_bad_record: str


def part_of(unit: Unit, block_number: int, work: str | Path) -> Part:
    """The part that a unit, or a block of a streamed unit, leaves behind."""
    suffix = f"-{block_number:05d}" if unit.streamed else ""
    return Part(Path(work) / "parts" / unit.source.name / f"{unit.number:06d}{suffix}")


def describe(unit: Unit, block_number: int) -> str:
    """A unit as error messages name it."""
    files = sorted({span.path for span in unit.spans})
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    block = f", block {block_number}" if unit.streamed else ""
    return f"unit {unit.number}{block} of source {unit.source.name!r} ({where})"


def encode_unit(unit: Unit, block_number: int, block: Block | None, options: UnitOptions) -> dict[str, int]:
    """Writes the part of one piece of work; returns its record, and the input bytes that it took.

    Raises:
        UserError: a bad record, unless they are skipped.
        OSError: an unreadable file or a full disk.
    """
    encoder = _encoder(options.encoder_folder)
    try:
        tokens, lengths, record = _encode(encoder, unit, block, options)
    except Disagreement:  # about one document, but who knows about which others
        tokens, lengths, record = _encode(encoder.by_reference(), unit, block, options)
        record["disagreements"] = 1
    part_of(unit, block_number, options.work_folder).write(tokens, lengths, record)
    return {**record, "input_bytes": block.input_bytes if block else unit.input_bytes}


def _encode(
    encoder: Encoder, unit: Unit, block: Block | None, options: UnitOptions
) -> tuple[dict[str, list[np.ndarray]], np.ndarray, dict[str, int]]:
    """Tokens by split, signed lengths of all documents (negative: held out), and what was counted."""
    counts: Counter[str] = Counter()
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    signed_lengths: list[np.ndarray] = []
    shortened: list[str] = []
    for texts in _batches(unit, block, options, counts, shortened):
        ids, lengths = encoder.encode_flat(texts, counts)
        keep = lengths >= max(1, options.min_tokens)
        held_out = _held_out(texts, options.validation_fraction)
        if options.limit_documents is not None:
            keep &= np.cumsum(keep) <= options.limit_documents - counts["documents"]
        closed, closed_lengths = _close_documents(ids, lengths, options.sep_id, options.dtype)
        for split, chosen in (("train", keep & ~held_out), ("validation", keep & held_out)):
            if chosen.any():
                tokens[split].append(closed[np.repeat(chosen, closed_lengths)] if not chosen.all() else closed)
        signed_lengths.append(np.where(held_out, -closed_lengths, closed_lengths)[keep])
        counts["documents"] += int(keep.sum())
        counts["tokens"] += int(closed_lengths[keep].sum())
        counts["text_tokens"] += int(lengths[keep].sum())
        counts["unknown_tokens"] += _occurrences(options.unknown_id, ids, lengths, keep)
        counts["dropped_short"] += int((lengths < max(1, options.min_tokens)).sum())
        if counts["documents"] == options.limit_documents:
            break
    titles = {"shortened_articles": len(shortened), "shortened_titles": shortened} if shortened else {}
    record = {**counts, **titles}
    return tokens, np.concatenate(signed_lengths) if signed_lengths else np.zeros(0, dtype=np.int32), record


def forget_earlier() -> None:
    """What this process knows of the files of an earlier corpus, which another may have replaced."""
    _encoder.cache_clear()
    parts.split_lengths.cache_clear()


@functools.lru_cache(maxsize=2)
def _encoder(folder: str) -> Encoder:
    return Encoder.load(folder)


def _batches(
    unit: Unit, block: Block | None, options: UnitOptions, counts: Counter, shortened: list[str]
) -> Iterator[list[str]]:
    """The texts of a piece of work, some millions of characters at a time; bad records stop it or are counted."""
    texts, characters = [], 0
    for item in sources.documents(unit, block):
        if isinstance(item, BadRecord):
            if options.on_bad_record != "skip":
                raise UserError(
                    f"bad record in {item.describe()}. Mend the file, or count and skip such records with "
                    "--on-bad-record skip."
                )
            counts["bad_records"] += 1
            continue
        if isinstance(item, ShortenedArticle):
            shortened.append(item.title)
        texts.append(item)
        characters += len(item)
        if characters >= BATCH_CHARACTERS:
            counts["documents_read"] += len(texts)
            yield texts
            texts, characters = [], 0
    counts["documents_read"] += len(texts)
    if texts:
        yield texts


def _held_out(texts: list[str], fraction: float) -> np.ndarray:
    """Which documents belong to the validation split: a hash of the text decides, so copies stay together."""
    if fraction <= 0:
        return np.zeros(len(texts), dtype=bool)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8") < int(fraction * 2**64)


def _occurrences(token: int, ids: np.ndarray, lengths: np.ndarray, keep: np.ndarray) -> int:
    """How often a token occurs in the documents that are kept."""
    found = ids == token
    return int(np.count_nonzero(found if keep.all() else found & np.repeat(keep, lengths)))


def _close_documents(ids: np.ndarray, lengths: np.ndarray, sep_id: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the separator after every document, and the lengths with it."""
    ends = np.cumsum(lengths + 1) - 1
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise RuntimeError(f"the token id {ids.max()} does not fit into {dtype}")
    closed = np.empty(len(ids) + len(lengths), dtype=np.dtype(dtype).newbyteorder("<"))
    inside = np.ones(len(closed), dtype=bool)
    inside[ends] = False
    closed[inside] = ids
    closed[ends] = sep_id
    return closed, (lengths + 1).astype(np.int32)
