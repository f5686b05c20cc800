"""What `make demo` promises, read from what it left: its student has learned, and is better for it.

make demo && .venv/bin/pytest tests/after_demo.py
"""

import json

import pytest

from data_prep import samples
from pipeline.training.metrics import read_metrics

RUN = samples.home() / "demo" / "run"


@pytest.fixture(scope="module")
def topics():
    lines = json.loads((RUN / "evaluation" / "results.json").read_text())["lines"]
    return next(line for line in lines if (line["task"], line["metric"]) == ("topics", "accuracy"))


def test_every_held_out_relation_comes_nearer_to_the_teachers():
    first, *_, last = read_metrics(RUN, "validation")
    assert (first["step"], last["step"]) == (0, 300)
    for pair in ("qq", "kk", "vv"):
        assert last["per_pair"][pair] < 0.7 * first["per_pair"][pair], pair


def test_the_student_fine_tuned_is_clearly_better_than_before_its_first_step(topics):
    scores = {name: score["mean"] for name, score in topics["models"].items()}
    assert scores["untrained"] + 0.1 < scores["student"] < scores["teacher"], scores
    assert topics["differences"]["untrained"]["low"] > 0.05  # the student's lead, the lower end of its interval
