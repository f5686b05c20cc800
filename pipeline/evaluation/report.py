"""Results for people and programs: tables on the terminal, Markdown, JSON, TensorBoard, a picture, the model card's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_prep import durable
from pipeline.evaluation import picture
from pipeline.evaluation.contestants import TEACHER
from pipeline.evaluation.results import CONFIDENCE, MEAN, Difference, Line, Results, Score
from pipeline.tasks.table import Task

JSON, MARKDOWN, PICTURE, TENSORBOARD = "results.json", "results.md", "results.svg", "tensorboard"

_CARD_TASKS = {
    "tokens": "token-classification",
    "span": "question-answering",
    "retrieval": "sentence-similarity",
}


def write(results: Results, out: Path, step: int | None) -> None:
    """All forms of the results into a folder."""
    durable.write(out / JSON, as_json(results))
    durable.write(out / MARKDOWN, markdown(results))
    durable.write(out / PICTURE, picture.draw(results))
    _write_tensorboard(results, out / TENSORBOARD, step or 0)


def as_json(results: Results) -> str:
    """Everything, fractions as fractions."""
    return json.dumps(dataclasses.asdict(results), indent=1, ensure_ascii=False) + "\n"


def score_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of scores, in percent: mean and deviation over the seeds."""
    heads = ["task", "split", "metric", "examples", *results.models]
    rows = [
        [
            line.task,
            line.split,
            line.metric,
            f"{line.examples:,}",
            *(percent(line.models[name]) for name in results.models),
        ]
        for line in results.lines
    ]
    if len(results.headlines()) > 1:
        averages = [f"{100 * results.average(name):.1f}" for name in results.models]
        rows.append(["mean of the tasks", "", "", "", *averages])
    return heads, rows


def difference_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of the student's differences, in points."""
    others = [name for name in results.models if name != results.student]
    heads = ["task", "split", "metric", *(f"{results.student} - {name}" for name in others)]
    rows = [
        [line.task, line.split, line.metric, *(_difference(line.differences[name]) for name in others)]
        for line in results.lines
    ]
    return heads, rows


def notes(results: Results) -> list[str]:
    """How the numbers came about, and what others have published."""
    settings = results.settings
    epochs = ", ".join(f"{name} {count}" for name, count in settings["epochs"].items())
    lines = []
    if len(results.models) > 1:
        lines.append(f"intervals: {CONFIDENCE:.0%}, over seeds and test examples, paired")
    whole = results.average(TEACHER) if TEACHER in results.models else 0
    if whole > 0 and results.student != TEACHER:
        kept = results.average(results.student) / whole
        lines.append(f"{results.student} keeps {kept:.1%} of the {TEACHER}'s score")
    if frozen := [line.task for line in results.headlines() if line.task not in settings["epochs"]]:
        lines.append(f"{', '.join(frozen)}: the models as they are, nothing is fine-tuned")
    if epochs:
        rates = ", ".join(f"{lr:g}" for lr in settings["learning_rates"])
        limit = f", at most {settings['limit']:,} training examples" if settings["limit"] else ""
        lines.append(f"learning rates {rates}; {settings['seeds']} seeds; epochs: {epochs}{limit}")
        chosen = {
            name: ", ".join(
                f"{line.task} {line.models[name].lr:g}" for line in results.headlines() if line.models[name].lr
            )
            for name in results.models
        }
        if len(settings["learning_rates"]) > 1:
            lines += [f"chosen for {name}: {text}" for name, text in chosen.items()]
    for line in results.headlines():
        if bad := [f"{name} ({score.diverged})" for name, score in line.models.items() if score.diverged]:
            lines.append(f"{line.task}: not finite with some seeds: {', '.join(bad)}")
    lines += [
        f"published: {row.shape} from {row.teacher}, {row.task} {row.metric} {row.value:.1f} ({row.source})"
        for row in results.published
    ]
    return lines


def markdown(results: Results) -> str:
    """The tables and notes as Markdown."""
    tables = [_markdown_table(*score_rows(results))]
    if len(results.models) > 1:
        tables.append(_markdown_table(*difference_rows(results)))
    listed = "\n".join(f"- {note}" for note in notes(results))
    return "\n\n".join(["# Scores", *tables, listed]) + "\n"


def tables(results: Results) -> list:
    """The same for a rich console."""
    from rich.table import Table

    shown: list[Any] = []
    titled = [("Scores (%)", score_rows)]
    titled += [("Differences (points)", difference_rows)] if len(results.models) > 1 else []
    for title, rows_of in titled:
        heads, rows = rows_of(results)
        table = Table(*heads, title=title)
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return [*shown, "\n".join(notes(results))]


def for_card(results: Results, tasks: list[Task]) -> list[dict[str, Any]]:
    """The student's scores as records for the model card's `model-index`, fractions."""
    by_name = {task.name: task for task in tasks}
    return [
        {
            "task_type": _CARD_TASKS.get(by_name[line.task].kind, "text-classification"),
            "dataset_name": line.task,
            "dataset_type": by_name[line.task].hub or line.task,
            "dataset_config": by_name[line.task].config if "{" not in (by_name[line.task].config or "") else None,
            "split": line.split,
            "metric": line.metric,
            "value": line.models[results.student].mean,
            "deviation": line.models[results.student].deviation,
            "seeds": len(line.models[results.student].seeds),
        }
        for line in results.lines
        if line.split != MEAN
    ]


def percent(score: Score) -> str:
    """Mean and deviation over the seeds."""
    spread = "" if score.deviation is None else f" ± {100 * score.deviation:.1f}"
    return f"{100 * score.mean:.1f}{spread}"


def _difference(found: Difference) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:+.1f}"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _write_tensorboard(results: Results, folder: Path, step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in results.lines:
            for name, score in line.models.items():
                writer.add_scalar(f"{_tag(line)}/{name}", score.mean, step)
        writer.add_text("scores", markdown(results), step)


def _tag(line: Line) -> str:
    return f"evaluate/{line.task}/{line.split}/{line.metric}"
