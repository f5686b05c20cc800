import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.tasks import metrics, spans


def test_squad_answers_are_compared_as_squad_does():
    assert spans.exact_match("The Seine!", ["seine"]) == 1
    assert spans.exact_match("the river Seine", ["Seine"]) == 0
    assert spans.f1("the river Seine", ["Seine", "a canal"]) == pytest.approx(2 / 3)
    assert spans.f1("a b", ["b an b"]) == pytest.approx(2 / 3)  # articles go: b is compared with b b
    assert spans.f1("x x y", ["x y y"]) == pytest.approx(2 / 3)
    assert spans.f1("", []) == spans.exact_match("", []) == 1
    assert spans.f1("something", []) == 0 == spans.f1("", ["something"])


@pytest.mark.parametrize(
    ("language", "found", "right"),
    [
        ("de", "der Rhein", "Rhein"),
        ("es", "«Los Andes»", "andes"),
        ("vi", "những con sông", "con sông"),
        ("ar", "النهر", "نهر"),
        ("hi", "गंगा।", "गंगा"),
        ("en", "the “Rhine”", "Rhine"),
    ],
)
def test_mlqa_normalises_by_language(language, found, right):
    assert spans.exact_match(found, [right], language) == 1
    assert spans.f1(found, [right], language) == 1


def test_mlqa_compares_chinese_by_character():
    assert spans.f1("长江水", ["长江"], "zh") == pytest.approx(0.8)
    assert spans.normalise("2020年3月", "zh") == ["2020", "年", "3", "月"]
    assert spans.f1("der Rhein", ["Rhein"], "en") < 1  # German articles are words elsewhere


def test_best_answer_lies_inside_of_one_window():
    context = "The blue river"
    offsets = [None, (0, 3), (4, 8), (9, 14)]
    start, end = np.array([0.0, 1, 5, 0]), np.array([0.0, 6, 0, 4])  # the likeliest end comes before the start
    assert spans.best_answer(context, [start], [end], [offsets]) == ("blue river", 9.0)
    silent = np.array([9.0, 0, 0, 0])
    text, margin = spans.best_answer(context, [start, silent], [end, silent], [offsets, offsets])
    assert (text, margin) == ("blue river", 9.0)  # no answer is as good as the window that likes it least
    assert spans.best_answer(context, [silent], [silent], [offsets])[1] == -18


def test_threshold_of_no_answer_gives_the_best_f1():
    margins, found = [-3.0, 2.0, -1.0, 5.0], ["x", "x", "x", "x"]
    threshold = spans.no_answer_threshold(margins, found, [[], ["x"], [], ["x"]])
    assert -1 < threshold < 2
    assert spans.no_answer_threshold(margins, found, [["x"]] * 4) == -np.inf
    assert spans.no_answer_threshold(margins, found, [[]] * 4) == np.inf


@pytest.mark.parametrize(
    ("gold", "found", "f1"),
    [
        ("ORG O PER PER O LOC", "O O PER PER O LOC", 0.8),  # types alone: one of three entities is missed
        ("ORG O PER PER O LOC", "ORG ORG PER PER O LOC", 2 / 3),  # an entity is another one if it is longer
        ("U-LOC U-LOC B-PER L-PER", "U-LOC O B-PER L-PER", 0.8),
        ("S-LOC S-LOC B-PER E-PER", "S-LOC O B-PER E-PER", 0.8),
        ("PER-B PER-I O LOC-B", "PER-B PER-I O O", 2 / 3),
        ("B I O B", "B I O O", 2 / 3),
        ("I-PER B-PER O I-LOC", "I-PER I-PER O I-LOC", 0.4),  # IOB1, as conlleval has it
        ("NOUN VERB NOUN DET", "NOUN NOUN NOUN DET", 0.75),  # a tag for each word: the share of right ones
    ],
)
def test_entities_in_every_way_to_write_them(gold, found, f1):
    gold, found = gold.split(), found.split()
    labels = sorted({*gold, *found})
    tags = dict(zip(labels, metrics.scored_tags(labels), strict=True))
    made = metrics.scores("entity_f1", "tokens", [[tags[tag] for tag in gold]], [[tags[tag] for tag in found]])
    assert made["value"] == pytest.approx(f1)


def test_tags_that_are_none_are_refused():
    for labels, message in ((["0", "1"], "numbers"), (["O", "B-PER", "ORG"], "B-PER and others like ORG")):
        with pytest.raises(UserError, match=message):
            metrics.scored_tags(labels)


def test_scores_and_their_jackknife():
    gold, found = [0, 1] * 30, [0, 1] * 29 + [1, 1]
    made = metrics.scores("accuracy", "text", gold, found)
    assert made["value"] == pytest.approx(59 / 60) and len(made["jackknife"]) == metrics.GROUPS
    assert sum(value == 1 for value in made["jackknife"]) == 1  # the group of the one mistake is left out once
    assert metrics.scores("mcc", "text", gold, gold)["value"] == 1
    assert metrics.scores("f1", "pair", [0, 1, 1], [1, 1, 0])["value"] == pytest.approx(0.5)
    assert metrics.scores("spearman", "regression", [1.0, 2.0, 3.0], [1.0, 4.0, 9.0])["value"] == pytest.approx(1)
    assert metrics.scores("pearson", "regression", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])["value"] == 0
    tags = [["B-PER", "I-PER", "O"], ["O", "B-LOC", "O"]]
    wrong = [["B-PER", "O", "O"], ["O", "B-LOC", "O"]]
    assert metrics.scores("entity_f1", "tokens", tags, wrong)["value"] == pytest.approx(0.5)
    assert metrics.scores("mrr", "retrieval", [None] * 2, [1, 4])["value"] == pytest.approx(0.625)
