"""What can be said of a student in a minute without fine-tuning: against its teacher, and against what it started as.

* held-out relation loss before and after, from the run's record: it falls when the student learns, and says no more;
* agreement with the teacher on neighbours: of the ten texts that are nearest to a text, how many the teacher finds too;
* retrieval of adjacent sentences: how often the second half of a held-out text is the one nearest to the first half;
* a linear probe, where there are labels: logistic regression on frozen features;
* size, and forward speed on this machine.

Vectors are means of the last hidden state. Nothing is fine-tuned, so that the numbers say what the features hold; they
are comparable between models only.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError, first_line
from data_prep.shards import Corpus
from pipeline.data.loader import validation_batches
from pipeline.evaluation.contestants import STUDENT, TEACHER, UNTRAINED
from pipeline.shipping.card import held_out
from pipeline.tasks.probe import ProbeTask, majority
from pipeline.tasks.vectors import (
    FEWEST_TEXTS,
    NEAREST,
    embed,
    forward_speed,
    linear_probe,
    load_encoder,
    neighbours_in_common,
    ranks,
)
from pipeline.training.build import data_options, fresh_student
from pipeline.training.metrics import iterate_metrics
from pipeline.training.run_folder import FinishedRun

HELD_OUT_TEXTS = 512


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured, by the models' names; the first one is what the others are compared with.

    Attributes:
        parameters: how many.
        forward_tokens_per_second: on this machine, same texts, same threads.
        probe_accuracy: share of right answers; empty without a probe file.
        neighbours: share of the nearest texts that the first model finds too; empty without texts.
        adjacent: share of texts whose second half is the nearest to the first; empty without texts.
        texts: how many those were.
        step, held_out, tokens_per_second: of a run: the exported step; pair -> (loss before the first step, loss at
            that step); speed of training, median over the logged intervals.
        notes: what could not be measured, and why.
    """

    parameters: dict[str, int]
    forward_tokens_per_second: dict[str, float]
    probe_accuracy: dict[str, float] = field(default_factory=dict)
    probe_majority: float | None = None
    probe_texts: int = 0
    neighbours: dict[str, float] = field(default_factory=dict)
    adjacent: dict[str, float] = field(default_factory=dict)
    texts: int = 0
    step: int | None = None
    held_out: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens_per_second: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with its tokenizer."""

    model: nn.Module
    tokenizer: Any


def measure(models: dict[str, Loaded], *, probe: ProbeTask | None, texts: Sequence[str], seq_tokens: int) -> Scores:
    """Score models beside each other.

    Args:
        models: by name; the first one is what neighbours are compared with.
        probe: labelled texts, or None.
        texts: without labels, see `held_out_texts`; too few are none.
        seq_tokens: longer texts are cut.
    """
    accuracy, neighbours, adjacent, first = {}, {}, {}, None
    texts = texts if len(texts) >= FEWEST_TEXTS else ()
    for name, loaded in models.items():

        def vectors(chosen: Sequence[str], loaded: Loaded = loaded) -> torch.Tensor:
            return embed(loaded.model, loaded.tokenizer, chosen, seq_tokens)

        if probe:
            train, test = vectors(probe.train_texts), vectors(probe.test_texts)
            accuracy[name] = linear_probe(train, probe.train_labels, test, probe.test_labels)
        if texts:
            whole = vectors(texts)
            first = whole if first is None else first
            neighbours[name] = neighbours_in_common(first, whole)
            halves = [vectors(side) for side in zip(*map(_halves, texts), strict=True)]
            found = ranks(*halves, torch.eye(len(texts), dtype=torch.bool))
            adjacent[name] = sum(rank == 1 for rank in found) / len(found)
    return Scores(
        parameters={name: loaded.model.num_parameters() for name, loaded in models.items()},
        forward_tokens_per_second=forward_speed({n: loaded.model for n, loaded in models.items()}, seq_tokens),
        probe_accuracy=accuracy,
        probe_majority=majority(probe.test_labels) if probe else None,
        probe_texts=len(probe.test_labels) if probe else 0,
        neighbours=neighbours,
        adjacent=adjacent,
        texts=len(texts),
    )


def _halves(text: str) -> tuple[str, str]:
    """A text cut in two at the space that is nearest to its middle."""
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle > 0 else len(text) // 2
    return text[:middle], text[middle:].lstrip()


def of_run(
    run: FinishedRun,
    student: Path,
    others: dict[str, str],
    *,
    probe: ProbeTask | None,
    seq_tokens: int = 64,
) -> Scores:
    """Score a run's teacher, student, the student as it was before its first step, and others.

    Args:
        run: the run.
        student: its exported folder.
        others: folders of other models by name.
        probe: labelled texts, see `read_probe`; None leaves the probe out.
        seq_tokens: longer texts are cut for the probe and the timing.
    """
    exported = load(str(student))
    untrained = fresh_student(run.recipe).backbone.eval().to(exported.model.device)
    teacher = load(run.recipe.teacher.model, run.recipe.teacher.trust_remote_code)
    models = {TEACHER: teacher, STUDENT: exported, UNTRAINED: Loaded(untrained, exported.tokenizer)}
    models |= {name: load(folder) for name, folder in others.items()}
    notes: list[str] = []
    try:
        unlabelled = held_out_texts(run, exported.tokenizer)
    except (UserError, OSError) as error:
        unlabelled = []
        notes.append(f"neighbours and adjacent halves are not measured: {error}")
    scores = measure(models, probe=probe, texts=unlabelled, seq_tokens=seq_tokens)
    trained = (m for m in iterate_metrics(run.folder, "train") if m["step"] <= run.record.step)
    speeds = [m.get("tokens_per_second", 0) for m in trained] or [0]
    return replace(
        scores,
        step=run.record.step,
        held_out=held_out(run),
        tokens_per_second=statistics.median(speeds),
        notes=notes,
    )


def of_models(folders: dict[str, str], *, probe: ProbeTask | None, seq_tokens: int = 64) -> Scores:
    """The same for models without a run; the texts of the probe serve for neighbours and adjacent halves too."""
    unlabelled = probe.test_texts[:HELD_OUT_TEXTS] if probe else ()
    models = {name: load(folder) for name, folder in folders.items()}
    return measure(models, probe=probe, texts=unlabelled, seq_tokens=seq_tokens)


def load(model: str, trust_remote_code: bool = False) -> Loaded:
    """A model and its tokenizer.

    Raises:
        UserError: they cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        encoder = load_encoder(model, trust_remote_code)
        return Loaded(encoder, AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot load the model in {model}: {first_line(error)}") from error


def held_out_texts(run: FinishedRun, tokenizer, count: int = HELD_OUT_TEXTS) -> list[str]:
    """Texts of the corpus's validation split, as long as a sample of the run.

    Raises:
        UserError: the corpus is not there, or nothing of it was held out.
    """
    corpus = Corpus.open(run.recipe.data.corpus)
    if corpus.fingerprint != run.record.corpus_fingerprint:
        raise UserError(f"{corpus.folder} is not the corpus of the run any more")
    if not corpus.shards("validation"):
        raise UserError(f"{corpus.folder} has no validation split")
    batches = validation_batches(corpus, data_options(run.recipe), samples=count, micro_batch_samples=count)
    found: list[str] = []
    for batch in batches:
        masks = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        for ids, mask in zip(batch.input_ids, masks.bool(), strict=True):
            found.append(tokenizer.decode(ids[mask], skip_special_tokens=True))
    return [text for text in found if " " in text.strip()]


def as_json(scores: Scores) -> str:
    return json.dumps(asdict(scores), indent=1, ensure_ascii=False) + "\n"


def describe(scores: Scores) -> dict[str, str]:
    """The scores as lines for people: measure -> value."""
    lines = {f"held-out {pair.upper()} loss": f"{a:.4f} -> {b:.4f}" for pair, (a, b) in scores.held_out.items()}
    for name, value in scores.probe_accuracy.items():
        lines[f"linear probe accuracy, {name}"] = f"{value:.1%} of {scores.probe_texts:,} texts"
    for name, value in list(scores.neighbours.items())[1:]:
        lines[f"{NEAREST} nearest in common with the teacher, {name}"] = f"{value:.1%} of {scores.texts:,} texts"
    for name, value in scores.adjacent.items():
        lines[f"adjacent halves found, {name}"] = f"{value:.1%} of {scores.texts:,} texts"
    for name in list(scores.parameters)[:2]:
        lines[f"parameters, {name}"] = f"{scores.parameters[name]:,}"
    return lines


def tables(scores: Scores) -> list:
    """The scores for a rich console: the held-out loss, the models side by side, and notes."""
    from rich.table import Table

    shown: list = []
    if scores.held_out:
        losses = Table(
            "relation", "before", f"after {scores.step:,} steps", "change", title="Held-out relation loss (KL)"
        )
        for pair, (before, after) in scores.held_out.items():
            losses.add_row(pair.upper(), f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.0%}")
        shown.append(losses)
    measured = {
        "probe accuracy": scores.probe_accuracy,
        f"{NEAREST} nearest as the first": scores.neighbours,
        "adjacent halves": scores.adjacent,
    }
    measured = {title: values for title, values in measured.items() if values}
    models = Table("model", "parameters", "forward tokens/s", *measured, title="Nothing fine-tuned")
    for name, parameters in scores.parameters.items():
        speed = f"{scores.forward_tokens_per_second[name]:,.0f}"
        models.add_row(name, f"{parameters:,}", speed, *(f"{values[name]:.1%}" for values in measured.values()))
    shown.append(models)
    notes = []
    if scores.tokens_per_second is not None:
        notes.append(f"trained at {scores.tokens_per_second:,.0f} tokens/s")
    if scores.probe_majority is not None:
        notes.append(f"probe: {scores.probe_texts:,} test texts, largest class {scores.probe_majority:.1%}")
    if scores.texts:
        notes.append(f"neighbours and halves: {scores.texts:,} texts")
    return [*shown, "; ".join([*notes, *scores.notes])]
