"""The questions of proof.py: what is varied, and what all students of a study share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import teachers

from data_prep import samples


@dataclass(frozen=True, kw_only=True)
class Question:
    """A study.

    Attributes:
        vary: a recipe's key and its values, see `minilm distill --vary`: students of one run, side by side.
        apart: in its place, students that cannot share a run's batches or differ in several keys, each by the name it
            goes by, with its overrides.
        teacher: its name.
        tasks: of labelled.py, where they are not the usual ones.
        each_untrained: whether every student has first weights of its own.
        masked_words: whether a model of the same shape is trained without a teacher.
        peer: whether bertdistiller trains a student in the same time.
        scored_at: the shares of the steps after which students are scored, the last of which is all.
    """

    vary: str = ""
    apart: Mapping[str, list[str]] = field(default_factory=dict)
    teacher: str = samples.TEACHER
    tasks: tuple[str, ...] = ()
    overrides: list[str] = field(default_factory=list)
    each_untrained: bool = False
    masked_words: bool = False
    peer: bool = False
    scored_at: tuple[float, ...] = (1.0,)


QUESTIONS = {
    "baselines": Question(  # the teacher's width, so that `slice` begins as every other layer of the teacher
        vary="student.init=random,slice",
        overrides=["student.shape=3x384", "student.feed_forward=1536"],
        each_untrained=True,
        masked_words=True,
    ),
    "pairs": Question(
        vary="relations.pairs={qq=1.0,kk=1.0,vv=1.0},{qk=1.0,vv=1.0},{qq=1.0},{kk=1.0},{vv=1.0}",
    ),
    "heads": Question(vary="relations.heads=12,24,48"),
    "layers": Question(vary="teacher.layer=3,4,5,6"),
    "init": Question(vary="student.init=random,embeddings,slice", each_untrained=True),
    "base-layers": Question(
        vary="teacher.layer=6,7,8,9,10,11,12",
        teacher=teachers.NAME,
        overrides=["student.shape=4x192", "relations.heads=48"],
    ),
    "transfer": Question(vary="student.init=embeddings", teacher=teachers.E5, tasks=("transfer", "declarations")),
    "text": Question(
        apart={"windows": [], "documents-apart": ["data.attention=document"], "document-a-row": ["data.packing=none"]}
    ),
    "shapes": Question(
        apart={
            f"3x{width}": [f"student.shape=3x{width}", f"student.feed_forward={4 * width}"] for width in (96, 192, 384)
        },
        each_untrained=True,
    ),
    "seeds": Question(apart={f"seed-{seed}": [f"run.seed={seed}"] for seed in (1, 2, 3)}, each_untrained=True),
    "equal-time": Question(vary="student.init=random", peer=True),
    "curve": Question(vary="student.init=random,embeddings", each_untrained=True, scored_at=(0.1, 0.3, 1.0)),
}
