"""Labelled data that a toy can learn, and how it is evaluated."""

import numpy as np

from pipeline.evaluation import design
from pipeline.tasks.table import find_tasks, with_epochs

COLOURS = ("red", "blue", "green", "white", "black", "grey")


def rows_of(kind, count, seed):
    """Examples that a toy can learn: the target is a matter of which words there are."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        colour, other = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        first = f"the house {rng.integers(1000)} is {colour}"
        label = int(colour in COLOURS[:3])
        rows.append(
            {
                "text": {"text": first, "label": ("dark", "bright")[label]},
                "pair": {"sentence1": first, "sentence2": f"and {other}", "label": label},
                "regression": {"sentence1": first, "sentence2": other, "label": label + rng.random()},
                "tokens": {"tokens": first.split(), "tags": ["O", "B-THING", "O", "O", "B-COLOUR"]},
                "span": {
                    "question": "which colour?",
                    "context": f"{first} today",
                    "answers": {"text": [colour] * label, "answer_start": [first.index(colour)] * label},
                },
                "retrieval": {"query": first, "document": f"{first} too"},
            }[kind]
        )
    return rows


KINDS = ("text", "pair", "regression", "tokens", "span", "retrieval")


def plan_of(models, data, out, names, epochs=1, **options):
    tasks = [with_epochs(task, epochs) for task in find_tasks(names)]
    options = design.Options(data=data, **{"learning_rates": (3e-3,), "seeds": 1, **options})
    return design.plan(models, tasks, options, out)
