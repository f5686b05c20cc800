"""Answers that are parts of a text: how they are compared (SQuAD, MLQA), and how they are read off a model's scores.

SQuAD (Rajpurkar et al., 2016, 2018): answers are lower-cased, freed of punctuation and of the articles a, an, the, and
their white space is made single. An answer is exact if it then equals one of the right ones; its F1 is that of the bags
of words, the best over the right answers. Where there is no answer, only the empty one is right.

MLQA (Lewis et al., 2020): punctuation is all of Unicode's, articles are those of the language (Arabic's wherever it
stands), and Chinese is compared by character.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"ال",
}
LARGEST_ANSWER_TOKENS, BEST = 30, 20


def normalise(text: str, language: str | None = None) -> list[str]:
    """An answer as the words that count: SQuAD's if no language is given, MLQA's else."""
    text = text.lower()
    if language is None:
        text = "".join(c for c in text if c not in string.punctuation)
        return re.sub(ARTICLES["en"], " ", text).split()
    text = "".join(c for c in text if not _is_punctuation(c))
    if language in ARTICLES:
        text = re.sub(ARTICLES[language], " ", text)
    if language == "zh":
        return re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text).split()
    return text.split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(found: str, answers: Sequence[str], language: str | None = None) -> float:
    """1 if an answer equals one of the right ones after normalisation; no right ones means that none is right."""
    words = normalise(found, language)
    return float(any(words == normalise(answer, language) for answer in _right(answers, language)))


def f1(found: str, answers: Sequence[str], language: str | None = None) -> float:
    """Words in common with the right answer that is nearest."""
    words = normalise(found, language)
    return max(_overlap(words, normalise(answer, language)) for answer in _right(answers, language))


def _right(answers: Sequence[str], language: str | None) -> Sequence[str]:
    """Right answers of which normalisation leaves something, or the empty one."""
    return [answer for answer in answers if normalise(answer, language)] or [""]


def _overlap(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0


def best_answer(
    context: str,
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    offsets: Sequence[Sequence[tuple[int, int] | None]],
) -> tuple[str, float]:
    """The likeliest answer over all windows of a context, and by how much its score beats that of no answer.

    Args:
        context: the text that the answer is a part of.
        starts, ends: of each window, a score for every token to be the answer's first or last one; token 0 stands for
            no answer.
        offsets: of each window, where a token stands in the context; None for what is not context.
    """
    best, text, nothing = -np.inf, "", np.inf
    for start, end, places in zip(starts, ends, offsets, strict=True):
        nothing = min(nothing, float(start[0] + end[0]))
        inside = np.array([place is not None for place in places])
        if not inside.any():
            continue
        likely = [np.argsort(np.where(inside, x[: len(places)], -np.inf))[::-1][:BEST] for x in (start, end)]
        for first in likely[0]:
            for last in likely[1]:
                if not (inside[first] and inside[last] and first <= last < first + LARGEST_ANSWER_TOKENS):
                    continue
                if (score := float(start[first] + end[last])) > best:
                    best, text = score, context[places[first][0] : places[last][1]]
    return text, best - nothing


def no_answer_threshold(margins: Sequence[float], found: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """The margin below which "no answer" gives the best F1 on these questions; -inf where it never does."""
    order = np.argsort(margins)
    answered = np.array([f1(found[i], answers[i]) for i in order])
    silent = np.array([f1("", answers[i]) for i in order])
    # The first k questions are left without an answer, the others keep theirs.
    totals = np.concatenate([[0.0], np.cumsum(silent)]) + answered.sum() - np.concatenate([[0.0], np.cumsum(answered)])
    k = int(np.argmax(totals))
    sorted_margins = np.asarray(margins)[order]
    if k == 0:
        return -np.inf
    return float(sorted_margins[k - 1] + sorted_margins[k]) / 2 if k < len(order) else np.inf
