"""Is the student any good? An exported model against its teacher and against the student it started as.

* held-out relation loss before and after, from the run's record;
* size, and forward speed on this machine;
* a linear probe: logistic regression on frozen, mean-pooled features of labelled texts. Nothing is fine-tuned, so the
  number says what the features hold; it is lower than a fine-tuned score and comparable between the models only.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.encoders.architectures import without_pooler
from pipeline.results.export import add_scores, exported
from pipeline.shipping.card import held_out
from pipeline.shipping.huggingface import load_exported
from pipeline.training.build import fresh_student, teacher_settings
from pipeline.training.metrics import iterate_metrics
from pipeline.training.run_folder import FinishedRun

MODELS = ("teacher", "student", "untrained")


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """Labelled texts; the first part of a fixed shuffle trains the probe, the rest tests it."""

    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Attributes:
    held_out: pair -> (loss before the first step, loss at the exported step).
    tokens_per_second: of training, median over the logged intervals.
    parameters: of teacher, student, untrained student.
    forward_tokens_per_second: on this machine, same texts, same threads.
    probe_accuracy: share of right answers; empty without a probe file.
    """

    step: int
    held_out: dict[str, tuple[float, float]]
    tokens_per_second: float
    parameters: dict[str, int]
    forward_tokens_per_second: dict[str, float]
    probe_accuracy: dict[str, float] = field(default_factory=dict)
    probe_majority: float | None = None
    probe_texts: int = 0


def evaluate(run: FinishedRun, *, probe: Path | None, texts: int = 1200, seq_tokens: int = 64, seed: int = 1) -> Scores:
    """Score the exported student of a run (exporting it first if needed), and write the scores into its folder.

    Args:
        run: the run.
        probe: JSONL with `text` and a label in `topic` or `label`; None leaves the probe out.
        texts: labelled texts taken, half to train the probe and half to test it.
        seq_tokens: longer texts are cut for the probe and the timing.
        seed: of the choice of texts.
    """
    from transformers import AutoTokenizer

    task = read_probe(probe, texts=texts, seed=seed) if probe else None
    folder = exported(run)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    models = {name: model.eval() for name, model in load_models(run, folder).items()}
    accuracy = {}
    if task:
        for name, model in models.items():
            features = [embed(model, tokenizer, t, seq_tokens) for t in (task.train_texts, task.test_texts)]
            accuracy[name] = linear_probe(features[0], task.train_labels, features[1], task.test_labels)
    trained = (m for m in iterate_metrics(run.folder, "train") if m["step"] <= run.record.step)
    scores = Scores(
        step=run.record.step,
        held_out=held_out(run),
        tokens_per_second=statistics.median([m.get("tokens_per_second", 0) for m in trained] or [0]),
        parameters={name: model.num_parameters() for name, model in models.items()},
        forward_tokens_per_second=forward_speed(models, seq_tokens),
        probe_accuracy=accuracy,
        probe_majority=_majority(task.test_labels) if task else None,
        probe_texts=len(task.test_labels) if task else 0,
    )
    add_scores(run, {**asdict(scores), "measures": describe(scores)})
    return scores


def describe(scores: Scores) -> dict[str, Any]:
    """The scores as lines for people: measure -> value."""
    lines = {f"held-out {pair.upper()} loss": f"{a:.4f} -> {b:.4f}" for pair, (a, b) in scores.held_out.items()}
    for name, value in scores.probe_accuracy.items():
        lines[f"linear probe accuracy, {name}"] = f"{value:.1%} of {scores.probe_texts:,} texts"
    for name in ("teacher", "student"):
        lines[f"parameters, {name}"] = f"{scores.parameters[name]:,}"
    return lines


def tables(scores: Scores) -> list:
    """The scores for a rich console: the held-out loss, the models side by side, and a note."""
    from rich.table import Table

    losses = Table("relation", "before", f"after {scores.step:,} steps", "change", title="Held-out relation loss (KL)")
    for pair, (before, after) in scores.held_out.items():
        losses.add_row(pair.upper(), f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.0%}")
    models = Table("model", "parameters", "forward tokens/s", "probe accuracy", title="Student against teacher")
    for name in MODELS:
        speed, parameters = scores.forward_tokens_per_second[name], scores.parameters[name]
        accuracy = f"{scores.probe_accuracy[name]:.1%}" if name in scores.probe_accuracy else "-"
        models.add_row(name, f"{parameters:,}", f"{speed:,.0f}", accuracy)
    note = f"trained at {scores.tokens_per_second:,.0f} tokens/s"
    if scores.probe_majority is not None:
        note += f"; probe: {scores.probe_texts:,} test texts, largest class {scores.probe_majority:.1%}"
    return [losses, models, note]


def load_models(run: FinishedRun, folder: Path) -> dict[str, nn.Module]:
    """The whole teacher, the exported student, and the student as it was before its first step."""
    from transformers import AutoModel

    recipe = run.recipe
    trust = dict(trust_remote_code=recipe.teacher.trust_remote_code, dtype=torch.float32)
    return {
        "teacher": AutoModel.from_pretrained(recipe.teacher.model, **trust, **without_pooler(teacher_settings(recipe))),
        "student": load_exported(folder),
        "untrained": fresh_student(recipe).backbone,
    }


def read_probe(path: Path, *, texts: int, seed: int) -> ProbeTask:
    """Read labelled texts and split them in half, in an order that depends on `seed` alone."""
    if not path.is_file():
        raise UserError(f"there is no probe file {path}; expected JSONL lines with `text` and `topic` or `label`")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row["text"] + "", str(row["label"] if "label" in row else row["topic"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: expected an object with `text` and `topic` or `label`") from None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [rows[i] for i in order[:texts]]
    labels = sorted({label for _, label in rows})
    if len(labels) < 2 or len(rows) < 4:
        raise UserError(f"{path} holds {len(rows)} texts with {len(labels)} labels: too few for a probe")
    half = len(rows) // 2
    numbers = [labels.index(label) for _, label in rows]
    return ProbeTask(
        train_texts=[text for text, _ in rows[:half]],
        train_labels=numbers[:half],
        test_texts=[text for text, _ in rows[half:]],
        test_labels=numbers[half:],
        labels=labels,
    )


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: list[str], seq_tokens: int, rows: int = 32) -> torch.Tensor:
    """Mean of the last hidden state over real tokens: [texts, hidden]. Texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=seq_tokens, return_tensors="pt"
        )
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        for i, feature in zip(chosen, (hidden * mask).sum(1) / mask.sum(1), strict=True):
            features[i] = feature
    return torch.stack(features)


def linear_probe(
    train: torch.Tensor, train_labels: list[int], test: torch.Tensor, test_labels: list[int], decay: float = 1e-3
) -> float:
    """Accuracy of logistic regression with an L2 penalty of `decay`, on standardised features [texts, hidden]."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    goal, truth = torch.tensor(train_labels), torch.tensor(test_labels)
    probe = nn.Linear(train.shape[1], int(max(goal.max(), truth.max())) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(probe(train), goal) + decay * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (probe(test).argmax(1) == truth).float().mean().item()


@torch.no_grad()
def forward_speed(models: dict[str, nn.Module], seq_tokens: int, rows: int = 8, runs: int = 5) -> dict[str, float]:
    """Tokens a second of a forward pass of full rows; the models take turns, the median of the runs counts."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for run in range(runs + 1):
        for name, model in models.items():
            ids = torch.randint(5, model.config.vocab_size, (rows, seq_tokens), generator=generator)
            began = time.perf_counter()
            model(input_ids=ids)
            if run:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return {name: rows * seq_tokens / statistics.median(times) for name, times in seconds.items()}


def _majority(labels: list[int]) -> float:
    return max(labels.count(label) for label in set(labels)) / len(labels)
