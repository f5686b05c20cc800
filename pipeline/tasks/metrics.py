"""How answers are scored; every score is a fraction (or a correlation), never a percentage.

Classes, numbers and entities are scored by scikit-learn, scipy and seqeval. SQuAD's and MLQA's scores are their own
definitions, written out in `spans`: answers are compared after normalisation, by words in common (F1) or as a whole.

A score's dependence on the test examples that happen to be there is kept as its *jackknife*: the score with each of
`GROUPS` interleaved groups of examples left out. That serves all metrics alike, and makes differences between models
paired.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep.errors import UserError
from pipeline.tasks.spans import exact_match, f1

GROUPS = 20

Metric = Callable[[Sequence[Any], Sequence[Any]], float]


def _accuracy(gold: Sequence[int], found: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, found))


def _f1(gold: Sequence[int], found: Sequence[int]) -> float:
    """Of class 1, as GLUE has it."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, found, zero_division=0))


def _macro_f1(gold: Sequence[int], found: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, found, average="macro", zero_division=0))


def _mcc(gold: Sequence[int], found: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, found))


def _correlation(name: str) -> Metric:
    def score(gold: Sequence[float], found: Sequence[float]) -> float:
        from scipy import stats

        if np.ptp(gold) == 0 or np.ptp(found) == 0:  # a model that says the same of everything
            return 0.0
        return float(getattr(stats, name)(gold, found).statistic)

    return score


def scored_tags(labels: Sequence[str]) -> tuple[str, ...]:
    """Tags as seqeval reads them, for `entity_f1`: it takes a tag's first letter for the place in the entity.

    IOB1, IOB2 and IOBES stay; BILOU is the last in other letters. Types alone (`O`, `PER`, `ORG`) are entities as long
    as they last; where there is not even `O`, each word has a tag of its own, and F1 is the share of right ones.

    Raises:
        UserError: the tags are numbers, or of several kinds.
    """
    types = [label for label in labels if label != "O"]
    if all(re.fullmatch(r"[BIESLU](-.+)?", label) for label in types):
        return tuple({"L": "E", "U": "S"}.get(label[0], label[0]) + label[1:] for label in labels)
    if all(re.fullmatch(r".+-[BIESLU]", label) for label in types):
        turned = (f"{label[-1]}-{label[:-2]}" if label != "O" else label for label in labels)
        return scored_tags(tuple(turned))
    if any(label.lstrip("-").isdecimal() for label in types):
        raise UserError(f"the tags are numbers ({', '.join(labels[:5])}, ...): give names, such as O, B-PER, I-PER")
    if strange := [label for label in types if re.match(r"[BIESLU]-", label)]:
        other = next(label for label in types if label not in strange)
        raise UserError(f"some tags are like {strange[0]} and others like {other}: give them in one form")
    within = "I-" if len(types) < len(labels) else "S-"
    return tuple(label if label == "O" else within + label for label in labels)


def _entity_f1(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    from seqeval.metrics import f1_score

    return float(f1_score(list(map(list, gold)), list(map(list, found)), zero_division=0))


def _mean(values: Callable[[Any, Any], float]) -> Metric:
    return lambda gold, found: float(np.mean([values(g, f) for g, f in zip(gold, found, strict=True)]))


# Gold of the span metrics: (answers, language). Gold of the retrieval metrics: nothing; found: the rank from 1.
METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1 of class 1": _f1,
    "macro_f1": _macro_f1,
    "mcc": _mcc,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "entity_f1": _entity_f1,
    "f1": _mean(lambda gold, found: f1(found, gold[0])),
    "exact_match": _mean(lambda gold, found: exact_match(found, gold[0])),
    "mlqa_f1": _mean(lambda gold, found: f1(found, gold[0], gold[1])),
    "mlqa_exact_match": _mean(lambda gold, found: exact_match(found, gold[0], gold[1])),
    "accuracy_at_1": _mean(lambda gold, found: found == 1),
    "mrr": _mean(lambda gold, found: 1 / found),
}


def metric_of(name: str, kind: str) -> Metric:
    """The metric that a task of a kind calls so: F1 is of class 1 for classes, of words in common for spans."""
    return METRICS["f1 of class 1" if name == "f1" and kind in ("text", "pair") else name]


def scores(name: str, kind: str, gold: Sequence[Any], found: Sequence[Any]) -> dict[str, Any]:
    """A metric's value over all examples, and its jackknife."""
    metric = metric_of(name, kind)
    if len(gold) != len(found):
        raise ValueError(f"{len(found)} answers to {len(gold)} questions")
    groups = min(GROUPS, len(gold))
    rest = [metric(_without(gold, g, groups), _without(found, g, groups)) for g in range(groups)] if groups > 1 else []
    return {"value": metric(gold, found), "jackknife": rest, "examples": len(gold)}


def _without(values: Sequence[Any], group: int, groups: int) -> list[Any]:
    return [value for number, value in enumerate(values) if number % groups != group]


def require_libraries() -> None:
    """Refuse to begin what could not be scored.

    Raises:
        UserError: the extra `eval` is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import scipy  # noqa: F401
        import seqeval  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tasks needs the package {error.name}: `pip install 'minilmv2-deepspeed[eval]'` (in a clone: "
            "`pip install -c constraints.txt -e '.[eval]'`)"
        ) from None
