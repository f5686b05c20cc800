"""What a prepared corpus holds, as tables for people."""

from data_prep.shards import Corpus


def table(corpus: Corpus):
    """Shards, documents, tokens and bytes of each split, source and language, as a rich table."""
    from rich.table import Table

    result = Table("split", "source", "language", "shards", "documents", "tokens", "bytes", title=str(corpus.folder))
    groups: dict[tuple[str, str, str], list] = {}
    for shard in corpus.manifest.shards:
        groups.setdefault((shard.split, shard.source, shard.language), []).append(shard)
    for key, shards in sorted(groups.items()):
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("documents", "tokens", "bytes")]
        result.add_row(*key, str(len(shards)), *(f"{value:,}" for value in sums))
    return result
