"""Weights of sources: natural, by temperature over languages, by name."""

import pytest

from data_prep.errors import UserError
from pipeline.data.shares import source_weights

SOURCES, LANGUAGES, SIZES = ("wiki-en", "books", "wiki-fr", "notes"), ("en", "en", "fr", ""), (300, 100, 100, 25)


def weights(given=None, alpha=None) -> list[float]:
    return source_weights(SOURCES, LANGUAGES, SIZES, given, alpha)


def test_natural_proportions_are_the_sizes_themselves():
    assert weights() == [300, 100, 100, 25]
    assert weights(alpha=1.0) == pytest.approx([n / 525 for n in SIZES])


def test_temperature_is_over_languages_and_a_source_without_one_stands_alone():
    total = 400**0.5 + 100**0.5 + 25**0.5
    assert weights(alpha=0.5) == pytest.approx([15 / total, 5 / total, 10 / total, 5 / total])


def test_weights_name_sources_or_languages_and_a_source_goes_first():
    assert weights({"en": 4, "fr": 2, "notes": 0}) == pytest.approx([3, 1, 2, 0])
    assert weights({"wiki-en": 5, "en": 4, "fr": 2, "notes": 1}) == pytest.approx([5, 1, 2, 1])


def test_a_source_without_samples_gets_nothing():
    assert source_weights(("a", "b"), ("en", "fr"), (10, 0), None, 0.0) == [1.0, 0.0]
    assert source_weights(("a", "b"), ("en", "fr"), (10, 0), {"a": 1, "fr": 0}, None) == [1.0, 0.0]
    with pytest.raises(UserError, match="ask for b"):
        source_weights(("a", "b"), ("en", "fr"), (10, 0), {"a": 1, "fr": 1}, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"en": 1, "fr": 1, "notes": 1, "de": 1}, "weights name de: the corpus has wiki-en, books, wiki-fr, notes"),
        ({"en": 1, "notes": 1}, "leave open wiki-fr"),
        ({"en": 1, "fr": -1, "notes": 1}, "at least 0"),
        ({"en": 1, "fr": float("inf"), "notes": 1}, "at least 0"),
        ({"en": 0, "fr": 0, "notes": 0}, "not all 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        weights(given)
