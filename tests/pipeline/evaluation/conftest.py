"""Labelled data that a toy can learn, and two toys."""

import json
import shutil

import pytest

from pipeline.evaluation.contestants import measure
from tests import toy
from tests.labelled import COLOURS, KINDS, rows_of

TRAINABLE = dict(initializer_range=0.02, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for kind in KINDS:
        (folder / kind[:4]).mkdir()
        for split, count in (("train", 96), ("test", 40)):
            lines = "\n".join(map(json.dumps, rows_of(kind, count, len(split))))
            (folder / kind[:4] / f"{split}.jsonl").write_text(lines)
    shutil.copytree(folder / "text", folder / "lang")
    for language in ("fr", "es"):
        shutil.copy(folder / "lang" / "test.jsonl", folder / "lang" / f"test.{language}.jsonl")
    return folder


@pytest.fixture(scope="module")
def models(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    texts = [*toy.first_texts(samples.leads(), 50), *[f"the house is {c}" for c in COLOURS for _ in range(20)]]
    made = {f"m{seed}": str(toy.make_teacher(folder / f"m{seed}", texts, seed=seed, **TRAINABLE)) for seed in (1, 2)}
    return measure(made)
