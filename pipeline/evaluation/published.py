"""Scores that others have published of students of a teacher and a shape, to stand beneath one's own.

They come with their source and are development-set scores as printed there. Between such a row and one's own lie other
data, other budgets and other fine-tuning; the authors' grid of learning rates is not known.
"""

from dataclasses import dataclass

UNILM = "microsoft/unilm, minilm/README.md"
BLOOMBERG = "bloomberg/minilmv2.bb, README.md, which quotes the paper"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One score, in percent as published."""

    teacher: str
    shape: str
    task: str
    metric: str
    value: float
    source: str


def _rows(teacher: str, shape: str, source: str, **scores: float) -> list[Published]:
    metrics = dict(squad2="f1", mlqa="mlqa_f1", qqp="accuracy")
    return [
        Published(teacher=teacher, shape=shape, task=t, metric=metrics.get(t, "accuracy"), value=v, source=source)
        for t, v in scores.items()
    ]


ROWS: tuple[Published, ...] = (
    *_rows("roberta-large", "6x768", UNILM, mnli=87.0, squad2=81.6),
    *_rows("roberta-large", "12x384", UNILM, mnli=86.9, squad2=82.3),
    *_rows("roberta-large", "6x384", UNILM, mnli=84.4, squad2=76.4),
    *_rows("bert-large", "6x768", UNILM, mnli=85.0, squad2=77.7),
    *_rows("bert-large", "6x384", UNILM, mnli=83.0, squad2=74.3),
    *_rows("bert-base", "6x768", UNILM, mnli=84.2, squad2=76.3),
    *_rows("bert-base", "6x384", UNILM, mnli=82.8, squad2=72.9),
    *_rows("xlm-roberta-large", "12x384", UNILM, xnli=72.9, mlqa=64.9),
    *_rows("xlm-roberta-large", "6x384", UNILM, xnli=69.3, mlqa=59.0),
    *_rows("bert-base", "6x768", BLOOMBERG, qnli=90.8, qqp=91.1, rte=72.1, sst2=92.4),
)

_TEACHERS = ("roberta-large", "xlm-roberta-large", "bert-large", "bert-base")


def published(teacher: str, shape: str, task: str) -> list[Published]:
    """What is published of a teacher (a hub id or a folder named like one), a shape and a task."""
    name = teacher.rstrip("/").rpartition("/")[2].lower()
    found = [t for t in _TEACHERS if name in (t, f"{t}-uncased")]
    return [row for row in ROWS if row.teacher in found and row.shape == shape and row.task == task]
