"""Which share of the samples each source gets: given by name, by temperature, or the natural proportions."""

from collections.abc import Mapping, Sequence

from data_prep.errors import UserError
from pipeline.data.order import temperature_weights


def source_weights(
    sources: Sequence[str],
    languages: Sequence[str],
    sizes: Sequence[int],
    given: Mapping[str, float] | None,
    temperature_alpha: float | None,
) -> list[float]:
    """One weight a source, any scale.

    Args:
        sources, languages, sizes: name, language and samples an epoch of each source. A source without a language
            stands for a language of its own.
        given: weights by name of source, or of language: then divided among its sources by size.
        temperature_alpha: shares of languages ~ n^alpha, divided likewise.

    Raises:
        UserError: `given` names what the corpus does not have, leaves a source open, or asks for an empty one.
    """
    if given is None and temperature_alpha is None:
        return list(sizes)
    groups = [language or source for language, source in zip(languages, sources, strict=True)]
    in_group = dict.fromkeys(groups, 0)
    for group, size in zip(groups, sizes, strict=True):
        in_group[group] += size
    rows = list(zip(sources, groups, sizes, strict=True))
    if given is None:
        of_group = dict(zip(in_group, temperature_weights(list(in_group.values()), temperature_alpha), strict=True))
        return [of_group[g] * n / max(in_group[g], 1) for _, g, n in rows]
    _check(given, rows, in_group)
    return [float(given[s]) if s in given else given[g] * n / max(in_group[g], 1) for s, g, n in rows]


def _check(given: Mapping[str, float], rows: list[tuple[str, str, int]], in_group: Mapping[str, int]) -> None:
    """Refuses weights that do not fit the sources; rows are (source, language, samples)."""
    sources = [source for source, _, _ in rows]
    unknown = sorted(set(given) - set(sources) - set(in_group))
    if unknown:
        raise UserError(f"weights name {', '.join(unknown)}: the corpus has {', '.join(sources)}")
    missing = [s for s, g, _ in rows if s not in given and g not in given]
    if missing:
        raise UserError(f"weights leave open {', '.join(missing)}: give each source a weight, 0 to leave it out")
    if not all(0 <= w < float("inf") for w in given.values()) or not any(given.values()):
        raise UserError(f"weights are {dict(given)}: expected numbers of at least 0, not all 0")
    empty = [s for s, g, n in rows if (given[s] and not n if s in given else given[g] and not in_group[g])]
    if empty:
        raise UserError(f"weights ask for {', '.join(empty)}, which has no full window of tokens: give it weight 0")
