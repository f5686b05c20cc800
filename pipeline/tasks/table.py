"""The tasks that a student is scored by, a row each.

A row says what the rows of the data hold (`columns`, `target`), how they are scored (`metrics`), and where they come
from: a data set of the hub, or files in the same columns. Adding a task is adding a row; a user's own files need none:
`NAME:KIND` takes the columns of the kind.

    kind        an example                       the model gives
    text        one text, a class                a class
    pair        two texts, a class               a class
    regression  one or two texts, a number       a number
    tokens      words, a tag each                tags, scored as entities
    span        a question, a text, answers      a part of the text, or nothing
    retrieval   two texts that belong together   vectors; nothing is fine-tuned
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from data_prep.errors import UserError

CONVERTED = "refs/convert/parquet"  # where the hub keeps its conversion of data sets that were programs
Kind = Literal["text", "pair", "regression", "tokens", "span", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Attributes:
        name: what it is called on the command line, and its folder below --data.
        kind: see above.
        columns: of the texts, or words, or question and context.
        target: column of what is to be found.
        labels: names of the classes or tags by their number; None: the values that the training split holds.
        metrics: see `pipeline.tasks.metrics`; the first one chooses the learning rate.
        hub: id of the data set on the hub, with its configuration and revision (None: the newest). A configuration with
            `{language}` in it is one a language.
        splits: that are reported, the first of them that is there with its variants (`validation_matched`).
        languages: of the reported splits; the model is trained on `train_languages` of them.
        train_from: task whose training split is used, and whose reported one, if both are one data set of the hub.
        aliases: other names of a column, as the task's own distribution has them.
        header: columns of a table without a first line of names.
        values: other names of a label.
        epochs: over the training split.
        max_tokens: longer examples are cut, or, for spans, read in windows.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    target: str = "label"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: tuple[str, ...] = ("validation",)
    languages: tuple[str, ...] = ()
    train_languages: tuple[str, ...] = ()
    train_from: str | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    header: tuple[str, ...] | None = None
    values: dict[str, str] = field(default_factory=dict, hash=False)
    epochs: int = 3
    max_tokens: int = 128

    @property
    def is_frozen(self) -> bool:
        """Whether the model is scored as it is."""
        return self.kind == "retrieval"


def _glue(name: str, kind: Kind, columns: tuple[str, ...], **rest) -> Task:
    return Task(name=name, kind=kind, columns=columns, hub="nyu-mll/glue", config=name, **rest)


_ENTAILMENT = ("entailment", "neutral", "contradiction")
_XNLI = ("en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")
_ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_SPAN = dict(kind="span", columns=("question", "context"), target="answers", max_tokens=384)
_NLI = dict(
    kind="pair",
    columns=("premise", "hypothesis"),
    labels=_ENTAILMENT,
    metrics=("accuracy",),
    aliases={"premise": ("sentence1",), "hypothesis": ("sentence2", "hypo"), "label": ("gold_label",)},
    values={"contradictory": "contradiction"},
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "cola",
            "text",
            ("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("mcc",),
            header=("source", "label", "star", "sentence"),
            epochs=10,
        ),
        _glue("sst2", "text", ("sentence",), labels=("negative", "positive"), metrics=("accuracy",)),
        _glue(
            "mrpc",
            "pair",
            ("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            aliases={"sentence1": ("#1 String",), "sentence2": ("#2 String",), "label": ("Quality",)},
            epochs=10,
        ),
        _glue(
            "stsb",
            "regression",
            ("sentence1", "sentence2"),
            metrics=("pearson", "spearman"),
            aliases={"label": ("score",)},
            epochs=10,
        ),
        _glue(
            "qqp",
            "pair",
            ("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            aliases={"label": ("is_duplicate",)},
        ),
        Task(name="mnli", hub="nyu-mll/glue", config="mnli", **_NLI),
        _glue(
            "qnli",
            "pair",
            ("question", "sentence"),
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
        ),
        _glue(
            "rte",
            "pair",
            ("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
            epochs=10,
        ),
        Task(name="squad", hub="rajpurkar/squad", metrics=("f1", "exact_match"), **_SPAN),
        Task(name="squad2", hub="rajpurkar/squad_v2", metrics=("f1", "exact_match"), **_SPAN),
        Task(
            name="xnli",
            hub="facebook/xnli",
            config="{language}",
            splits=("test",),
            languages=_XNLI,
            train_languages=("en",),
            **_NLI,
        ),
        Task(
            name="xnli-translate-train",
            hub="facebook/xnli",
            config="{language}",
            splits=("test",),
            languages=_XNLI,
            train_languages=_XNLI,
            train_from="xnli",
            **_NLI,
        ),
        Task(
            name="mlqa",
            hub="facebook/mlqa",
            config="mlqa.{language}.{language}",
            revision=CONVERTED,
            metrics=("mlqa_f1", "mlqa_exact_match"),
            splits=("test",),
            languages=("en", "es", "de", "ar", "hi", "vi", "zh"),
            train_from="squad",
            **_SPAN,
        ),
        Task(
            name="conll2003",
            kind="tokens",
            columns=("tokens",),
            target="ner_tags",
            labels=_ENTITIES,
            metrics=("entity_f1",),
            hub="eriktks/conll2003",
            revision=CONVERTED,
            splits=("test",),
            aliases={"ner_tags": ("tags",)},
        ),
    )
}

# What a user's own task has: its test split is reported where there is one.
_OWN: dict[str, dict] = {
    "text": dict(columns=("text",), metrics=("accuracy", "macro_f1"), aliases={"text": ("sentence",)}),
    "pair": dict(columns=("sentence1", "sentence2"), metrics=("accuracy", "macro_f1")),
    "regression": dict(columns=("sentence1", "sentence2"), metrics=("pearson", "spearman")),
    "tokens": dict(columns=("tokens",), target="tags", metrics=("entity_f1",), aliases={"tags": ("ner_tags",)}),
    "span": dict(columns=("question", "context"), target="answers", metrics=("f1", "exact_match"), max_tokens=384),
    "retrieval": dict(columns=("query", "document"), metrics=("accuracy_at_1", "mrr")),
}


def find_task(name: str) -> Task:
    """A row of the table, or for `NAME:KIND` a row made for a user's own files.

    Raises:
        UserError: the table has no such row, or there is no such kind.
    """
    name, colon, kind = name.partition(":")
    if not colon:
        if name not in TASKS:
            raise UserError(
                f"there is no task {name!r}: choose from {', '.join(TASKS)}, or NAME:KIND for files of your own, with "
                f"KIND one of {', '.join(_OWN)}"
            )
        return TASKS[name]
    if kind not in _OWN or not name or "/" in name or name.startswith("."):
        raise UserError(f"{name}:{kind}: expected NAME:KIND with KIND one of {', '.join(_OWN)}, such as reviews:text")
    if name in TASKS:
        raise UserError(f"{name}:{kind}: {name} is a task of the table; give {name}, or another name for your files")
    return Task(name=name, kind=kind, splits=("test", "validation"), **_OWN[kind])


def find_tasks(names: str) -> list[Task]:
    """The rows of `a,b,c`, each once."""
    found = {name: find_task(name) for name in (part.strip() for part in names.split(",")) if name}
    if not found:
        raise UserError(f"no task is named in {names!r}: give such as sst2,rte")
    repeated = {task.name for task in found.values()}
    if len(repeated) < len(found):
        raise UserError(f"{names}: a task is named with two kinds")
    return list(found.values())


def with_epochs(task: Task, epochs: int | None) -> Task:
    return task if epochs is None else dataclasses.replace(task, epochs=epochs)
