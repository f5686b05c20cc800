"""Runs side by side: in what they differ, and what came of it; no GPU and no process group is needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline import provenance
from pipeline.config import Recipe, flat
from pipeline.recipes import load_recipe
from pipeline.shipping.folder import MARKER
from pipeline.training.metrics import SCORES, iterate_metrics
from pipeline.training.run_folder import EXPORT, MODEL, read_ended, short_names

Point = tuple[float, float, float]  # tokens seen, seconds of training, loss or score
_NO_DIFFERENCE = ("run.output", "teacher.placement", "teacher.nvme_path", "data.verify", "relations.implementation")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run's folder says of it.

    Attributes:
        name: its folder, as short as tells it from the others.
        step: of its last record.
        held_out: relation -> the last held-out loss, which was measured at `held_out_step`.
        tokens_per_second: of its last training record; of all of a step's time, also where others trained beside it.
        parameters: of the student.
        scores: measure -> value: the last ones of training, and those that `evaluate` has left in the exported folder.
        training, validation: the losses of every record, oldest first.
        scored: of `metrics.SCORES`, measure -> every value that was measured while training.
        has_ended: it gave up while others beside it went on.
        teacher, corpus: their fingerprints, whatever lies at their paths now; the paths in runs that know no better.
    """

    name: str
    recipe: Recipe
    step: int
    held_out: dict[str, float]
    held_out_step: int
    tokens_per_second: float
    parameters: int
    scores: dict[str, float]
    training: list[Point] = field(repr=False)
    validation: list[Point] = field(repr=False)
    scored: dict[str, list[Point]] = field(repr=False)
    has_ended: bool = False
    teacher: str
    corpus: str


def read(folders: Sequence[Path]) -> list[Outcome]:
    """The outcomes of runs, in the order given.

    Raises:
        UserError: a folder is not a run's.
    """
    found = []
    names = short_names(folders)
    for folder, name in zip(folders, names, strict=True):
        if not (folder / "recipe.toml").is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no recipe.toml. Give a recipe's run.output.")
        recipe = load_recipe(str(folder / "recipe.toml"))
        training, validation, scored, records = _course(folder, recipe)
        last = records.get("train", {})
        teacher, corpus = provenance.fingerprints(folder)
        found.append(
            Outcome(
                name=name,
                recipe=recipe,
                step=last.get("step", 0),
                held_out=records.get("validation", {}).get("per_pair", {}),
                held_out_step=records.get("validation", {}).get("step", 0),
                tokens_per_second=last.get("tokens_per_second", 0.0),
                parameters=_parameters(folder),
                scores={f"{SCORES[name]}, training": course[-1][2] for name, course in scored.items()}
                | _scores(folder),
                training=training,
                validation=validation,
                scored=scored,
                has_ended=read_ended(folder) is not None,
                teacher=teacher or recipe.teacher.model,
                corpus=corpus or recipe.data.corpus,
            )
        )
    return found


def differences(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Keys of the recipes that are not the same in all runs -> the value of each run."""
    recipes = [dict(flat(outcome.recipe.to_dict())) for outcome in outcomes]
    keys = dict.fromkeys(key for values in recipes for key in values if key not in _NO_DIFFERENCE)
    rows = {key: [_text(values.get(key)) for values in recipes] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def groups(outcomes: Sequence[Outcome]) -> list[str]:
    """A letter for each run; the losses of two runs say something about each other only where the letters agree.

    That is where the same relations of the same teacher are learned, on samples of the same length of the same text.
    """
    kinds: dict[str, str] = {}
    return [kinds.setdefault(_measured_by(outcome), chr(ord("A") + len(kinds))) for outcome in outcomes]


def _measured_by(outcome: Outcome) -> str:
    """What the value of a run's loss depends on, beside the student."""
    recipe, relations = outcome.recipe, outcome.recipe.relations
    held_out = (outcome.corpus, recipe.data.seq_tokens, recipe.data.packing, recipe.data.attention)
    what = (outcome.teacher, recipe.teacher.layer, relations.heads, sorted(relations.pairs), relations.layers)
    return json.dumps([what, held_out, recipe.logging.validation_samples, recipe.run.seed], default=str)


def table(outcomes: Sequence[Outcome]):
    """What differs, held-out losses, scores, size and speed; as a rich group.

    A row a run, or where there are fewer runs than values, a column a run.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    differing, letters = differences(outcomes), groups(outcomes)
    values = _values(outcomes, differing, letters)
    result = Table("run")
    if len(values) > len(outcomes):
        for outcome in outcomes:
            result.add_column(outcome.name, justify="right", overflow="fold")
        for heading, row in values.items():
            result.add_row(heading, *row)
    else:
        for heading in values:
            result.add_column(heading, justify="left" if heading in differing else "right")
        for outcome, *row in zip(outcomes, *values.values(), strict=True):
            result.add_row(outcome.name, *row)
    notes = []
    if len(set(letters)) > 1:
        notes.append(
            "Held-out losses compare only within a letter: another teacher layer, other relation heads or another text "
            "make another scale. Between letters only scores count (minilm evaluate)."
        )
    if not differing and len(outcomes) > 1:
        notes.append("The recipes do not differ.")
    return Group(result, *map(Text, notes))


def _values(
    outcomes: Sequence[Outcome], differing: dict[str, list[str]], letters: Sequence[str]
) -> dict[str, list[str]]:
    """Heading -> what stands there for each run."""
    mark = {letter: f" {letter}" if len(set(letters)) > 1 else "" for letter in letters}
    values = dict(differing)
    values["step"] = [
        f"{o.step:,} of {o.recipe.optimizer.steps:,}{', gave up' if o.has_ended else ''}" for o in outcomes
    ]
    for pair in dict.fromkeys(pair for outcome in outcomes for pair in outcome.held_out):
        values[f"held-out {pair}"] = [
            f"{outcome.held_out[pair]:.4f}{mark[letter]}{_at(outcome)}" if pair in outcome.held_out else ""
            for outcome, letter in zip(outcomes, letters, strict=True)
        ]
    for measure in dict.fromkeys(measure for outcome in outcomes for measure in outcome.scores):
        values[measure] = [f"{o.scores[measure]:.4g}" if measure in o.scores else "" for o in outcomes]
    values["parameters"] = [f"{outcome.parameters:,}" for outcome in outcomes]
    values["tokens/s"] = [f"{outcome.tokens_per_second:,.0f}" for outcome in outcomes]
    return values


def _at(outcome: Outcome) -> str:
    """At which step the held-out loss was measured, if not at the last one."""
    return "" if outcome.held_out_step == outcome.step else f" at {outcome.held_out_step:,}"


def _course(
    folder: Path, recipe: Recipe
) -> tuple[list[Point], list[Point], dict[str, list[Point]], dict[str, dict[str, Any]]]:
    """The losses of the training records and of the held-out ones, the scores, and the last record of each kind."""
    tokens = recipe.optimizer.global_batch_samples * recipe.data.seq_tokens  # of a step, less where rows are padded
    training, validation, scored, last = [], [], {}, {}
    step, seconds = 0, 0.0
    for record in iterate_metrics(folder):
        last[record["kind"]] = record
        if record["kind"] == "train" and "loss" in record:
            a_step = record.get("seconds", {}).get("total", 0.0) if isinstance(record.get("seconds"), dict) else 0.0
            seconds += max(0, record["step"] - step) * a_step
            step = record["step"]
            if isinstance(record.get("tokens_seen"), int) and step > 0:
                tokens = record["tokens_seen"] / step
            training.append((step * tokens, seconds, record["loss"]))
        elif record["kind"] == "validation":
            at = record["step"] * tokens, seconds
            validation.append((*at, record["loss"]))
            for name in SCORES.keys() & record.keys():
                scored.setdefault(name, []).append((*at, record[name]))
    return training, validation, {name: scored[name] for name in SCORES if name in scored}, last


def _parameters(folder: Path) -> int:
    """Of the student, by its configuration."""
    import torch
    from transformers import AutoConfig, AutoModel

    from pipeline.encoders.architectures import without_pooler

    try:
        config = AutoConfig.from_pretrained(folder / MODEL, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=False, **without_pooler(config)).num_parameters()
    except (OSError, ValueError) as error:
        raise UserError(f"the student's configuration in {folder / MODEL} cannot be read: {error}") from error


def _scores(folder: Path) -> dict[str, float]:
    """The student's scores that `evaluate` has left beside its export: probe accuracy and tasks."""
    path = folder / EXPORT / "scores.json"
    if not path.is_file() or not (folder / EXPORT / MARKER).is_file():
        return {}
    try:
        scores = json.loads(path.read_bytes())
        found = {"probe": scores["probe_accuracy"]["student"]} if scores.get("probe_accuracy") else {}
        for result in scores.get("results", []):
            found[f"{result['dataset_name']} {result['metric']}"] = result["value"]
        return {name: float(value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
