"""What a prepared corpus holds, for people: a table, decoded documents, checksums, a picture."""

import html
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import ShardInfo
from data_prep.shards import Corpus
from data_prep.tokens import tokenizer_files
from data_prep.tokens.tokenizer import Tokenizer

SAMPLE_CHARACTERS = 600
LENGTH_BINS = 24
SHORTENED_SHOWN = 10
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")


def show(corpus: Corpus, console, *, sample: int | None = None, verify: bool = False, plot: Path | None = None) -> None:
    """Prints the table, and what else was asked for.

    Raises:
        UserError: a checksum differs, or the picture's name does not end in .svg.
    """
    if plot is not None and plot.suffix != ".svg":
        raise UserError(f"--plot {plot}: the picture is an SVG, so give a name that ends in .svg.")
    console.print(table(corpus))
    for source, counts in sorted(corpus.manifest.counts.items()):
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in sorted(counts.items()))
        if (unknown := counts.get("unknown_tokens", 0)) > 0 and (text := counts.get("text_tokens", 0)) > 0:
            shown += f" ({unknown / text:.1%} of the text)"
        console.print(f"{source}: {shown}", highlight=False, markup=False)
        if titles := corpus.manifest.shortened.get(source):
            named = ", ".join(titles[:SHORTENED_SHOWN]) + (", ..." if len(titles) > SHORTENED_SHOWN else "")
            console.print(f"{source}: articles that lost much text: {named}", highlight=False, markup=False)
    if sample:
        for title, text in samples(corpus, sample):
            console.rule(title)
            console.print(text[:SAMPLE_CHARACTERS], markup=False, highlight=False)
    if plot is not None:
        durable.write(plot, picture(corpus))
        console.print(f"picture: {plot}", highlight=False)
    if verify:
        if bad := corpus.verify():
            raise UserError(f"checksums differ in {corpus.folder}: {', '.join(bad)}. Copy or prepare the corpus again.")
        console.print(f"all {len(corpus.manifest.shards)} shards have the checksums of the manifest", highlight=False)


def table(corpus: Corpus):
    """Shards, documents, tokens and bytes of each split, source and language, as a rich table."""
    from rich.table import Table

    result = Table("split", "source", "language", "shards", "documents", "tokens", "bytes", title=str(corpus.folder))
    groups: dict[tuple[str, str, str], list[ShardInfo]] = {}
    for shard in corpus.manifest.shards:
        groups.setdefault((shard.split, shard.source, shard.language), []).append(shard)
    for key, shards in sorted(groups.items()):
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("documents", "tokens", "bytes")]
        result.add_row(*key, str(len(shards)), *(f"{value:,}" for value in sums))
    return result


def samples(corpus: Corpus, count: int) -> list[tuple[str, str]]:
    """Some documents spread evenly over the corpus: where each is, and its text."""
    folder = corpus.folder / "tokenizer"
    tokenizer_files.require_unchanged(folder, corpus.manifest.tokenizer["fingerprint"])
    tokenizer = Tokenizer.load(folder)
    shards = corpus.manifest.shards
    ends = np.cumsum([shard.documents for shard in shards])
    found = []
    for number in np.unique(np.linspace(0, ends[-1] - 1, count).astype(int)):
        shard = shards[int(np.searchsorted(ends, number, side="right"))]
        document = int(number - (ends[shards.index(shard)] - shard.documents))
        index, tokens = corpus.index(shard), corpus.tokens(shard)
        start = int(index.offsets_bytes[document]) // tokens.dtype.itemsize
        ids = tokens[start : start + int(index.lengths[document])]
        found.append((f"{shard.path}, document {document}, {len(ids)} tokens", tokenizer.decode(ids)))
    return found


def picture(corpus: Corpus) -> str:
    """An SVG of the lengths of documents (on a logarithmic axis) and of the languages' shares of the tokens."""
    bins = np.zeros(LENGTH_BINS + 1, dtype=np.int64)
    tokens: Counter[str] = Counter()
    for shard in corpus.manifest.shards:
        exponents = np.log2(np.maximum(corpus.index(shard).lengths, 1)).astype(int)
        bins += np.bincount(exponents, minlength=len(bins))[: len(bins)]
        tokens[shard.language or shard.source] += shard.tokens
    filled = np.flatnonzero(bins)
    lengths = [(f"{2**e:,}", int(bins[e])) for e in range(filled[0], filled[-1] + 1)] if len(filled) else []
    shares = tokens.most_common()
    left = _bars("Documents by length (tokens, at least)", lengths, 20)
    right = _bars("Tokens by language", shares, 420)
    height = 70 + 20 * max(len(lengths), len(shares))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{left}{right}</svg>\n'
    )


def _bars(title: str, rows: list[tuple[str, int]], x: int) -> str:
    """Horizontal bars with their labels and values."""
    parts = [f'<text x="{x}" y="25" font-size="14" font-weight="bold">{html.escape(title)}</text>']
    largest, total = max((value for _, value in rows), default=1), sum(value for _, value in rows)
    for number, (name, value) in enumerate(rows):
        y, width = 45 + 20 * number, 150 * value / largest
        colour = _COLOURS[number % len(_COLOURS)] if x > 400 else _COLOURS[0]
        parts.append(
            f'<text x="{x + 95}" y="{y + 11}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{x + 100}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>'
            f'<text x="{x + 105 + width:.1f}" y="{y + 11}">{value:,} ({value / total:.1%})</text>'
        )
    return "".join(parts)
