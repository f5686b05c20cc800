"""The model card: what was distilled from what, on what, for how long, with which result; and the same for machines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from data_prep.errors import UserError, first_line
from pipeline.provenance import Provenance
from pipeline.shipping import onnx_files
from pipeline.training.metrics import iterate_metrics
from pipeline.training.run_folder import FinishedRun

SCORES = "scores.json"
_STRICT = pydantic.ConfigDict(strict=True, extra="ignore")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an export has found out about itself, for its card.

    Attributes:
        parameters: of the student, without a pooler.
        tail_tensors: weights that the loss never reached.
        dtype: of the weights: fp32, bf16 or fp16.
        pooler: there is one, which passes the first token on.
        sentence_transformers: the folder has what that library wants.
        onnx: what `onnx_files.write` found; empty without ONNX files.
        agreement: lowest cosine between token vectors of the rounded weights and of those in fp32; None in fp32.
    """

    __pydantic_config__ = _STRICT

    parameters: int
    tail_tensors: int
    dtype: str = "fp32"
    pooler: bool = False
    sentence_transformers: bool = False
    onnx: dict[str, Any] = field(default_factory=dict)
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A score of the student on a task, as `scores.json` lists it under `results`; values are fractions."""

    __pydantic_config__ = _STRICT

    task_type: str
    dataset_name: str
    metric: str
    value: float
    split: str = ""
    dataset_type: str = ""
    dataset_config: str | None = None
    deviation: float | None = None
    seeds: int | None = None


_RESULTS = pydantic.TypeAdapter(list[Result])
_FACTS = pydantic.TypeAdapter(Facts)


def read_facts(marker: dict[str, Any]) -> Facts | None:
    """The facts that an export's marker holds; None if it is of an earlier version, or damaged."""
    try:
        return _FACTS.validate_json(json.dumps(marker.get("facts")))
    except pydantic.ValidationError:
        return None


def read_scores(folder: Path) -> dict[str, Any]:
    """What was measured of an exported student; empty if nothing was.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SCORES
    try:
        scores = json.loads(path.read_bytes()) if path.is_file() else {}
        results_of(scores)
    except (ValueError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): move it away and evaluate again") from None
    return scores


def results_of(scores: dict[str, Any]) -> list[Result]:
    """The results among scores.

    Raises:
        UserError: one is none that a card can show.
    """
    try:
        return _RESULTS.validate_json(json.dumps(scores.get("results", [])))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"a result of an evaluation cannot be shown: {first['loc']}: {first['msg']}") from None


def model_card(run: FinishedRun, origin: Provenance, facts: Facts, scores: dict[str, Any]) -> str:
    """The card of an exported student, front matter and text.

    Args:
        run: its run and checkpoint.
        origin: where it comes from.
        facts: what the export found out.
        scores: of `scores.json`: `measures` are lines for people (measure -> text), `results` are those of `Result`.
    """
    recipe = run.recipe
    results = results_of(scores)
    name = f"{recipe.student.shape} distilled from {origin.teacher}"
    sections = [
        f"# {name}",
        "An encoder distilled with [MiniLMv2](https://arxiv.org/abs/2012.15828) (multi-head self-attention relation\n"
        "distillation) by minilmv2-deepspeed. Fine-tune it as any encoder of its architecture.",
        _table(("", ""), _facts(run, origin, facts).items()),
        _untrained(recipe.student.init, recipe.student.tail_init, facts),
        _licence(origin),
        _scores(results, scores.get("measures", {})),
        _formats(facts),
        _use(recipe.data.seq_tokens, facts),
    ]
    text = "\n\n".join(section for section in sections if section)
    return f"---\n{_front_matter(name, origin, facts, results)}\n---\n{text}\n"


def held_out(run: FinishedRun) -> dict[str, tuple[float, float]]:
    """Each relation's held-out loss at the first validation and at the last one up to the checkpoint."""
    losses = [m["per_pair"] for m in iterate_metrics(run.folder, "validation") if m["step"] <= run.record.step]
    first, last = (losses[0], losses[-1]) if losses else ({}, {})
    return {pair: (first[pair], last[pair]) for pair in last if pair in first}


def _front_matter(name: str, origin: Provenance, facts: Facts, results: Sequence[Result]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    scored = [
        EvalResult(
            task_type=result.task_type,
            dataset_type=result.dataset_type or result.dataset_name,
            dataset_name=result.dataset_name,
            dataset_config=result.dataset_config,
            dataset_split=result.split or None,
            metric_type=result.metric,
            metric_value=round(result.value, 6),
        )
        for result in results
    ]
    extra = ["sentence-transformers"] if facts.sentence_transformers else []
    extra += ["onnx"] if facts.onnx else []
    data = ModelCardData(
        license=origin.license or "unknown",
        license_name=origin.license_name or None,
        license_link=origin.license_link or None,
        language=list(origin.languages) or None,
        datasets=list(origin.datasets) or None,
        base_model=origin.base_model or None,
        # The hub knows finetune, adapter, merge and quantized; a distilled student is shown among the first.
        base_model_relation="finetune" if origin.base_model else None,
        library_name="sentence-transformers" if facts.sentence_transformers else "transformers",
        pipeline_tag="feature-extraction",
        tags=["minilmv2", "distillation", *extra],
        model_name=name,
        eval_results=scored or None,
    )
    if not scored:
        del data.model_name
    return data.to_yaml()


def _facts(run: FinishedRun, origin: Provenance, facts: Facts) -> dict[str, str]:
    recipe, record = run.recipe, run.record
    pairs = ", ".join(f"{pair.upper()} x {weight:g}" for pair, weight in recipe.relations.pairs.items())
    sources = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in origin.sources.items())
    lines = {
        "Teacher": f"`{origin.teacher}`, layer {recipe.teacher.layer}",
        "Student": f"{recipe.student.shape}, {recipe.student.heads} heads, {facts.parameters:,} parameters in "
        f"{facts.dtype}, first weights: {recipe.student.init}",
        "Relations": f"{pairs}; {recipe.relations.heads} relation heads",
        "Training": f"{record.step:,} of {recipe.optimizer.steps:,} steps, {record.samples_seen:,} samples of "
        f"{recipe.data.seq_tokens} tokens, global batch {recipe.optimizer.global_batch_samples}",
        "Optimizer": f"AdamW, peak learning rate {recipe.optimizer.peak_lr:g}, {recipe.optimizer.schedule} decay after "
        f"{recipe.optimizer.warmup_steps:,} warm-up steps, weight decay {recipe.optimizer.weight_decay:g}",
        "Corpus": f"{sources + '; ' if sources else ''}fingerprint `{record.corpus_fingerprint[:16]}`",
    }
    if losses := held_out(run):
        lines["Held-out relation loss"] = "; ".join(
            f"{pair.upper()} {before:.4f} -> {after:.4f}" for pair, (before, after) in losses.items()
        )
    if facts.agreement is not None:
        lines["Rounding"] = f"lowest cosine of a token's vector with the fp32 one: {facts.agreement:.5f}"
    return lines


def _untrained(init: str, tail_init: str, facts: Facts) -> str:
    made = {"slice": "taken from a layer of the teacher", "pca": "projected from a layer of the teacher"}
    origin = (
        "zero, so that they change nothing" if tail_init == "identity" else made.get(init.partition(":")[0], "random")
    )
    text = (
        "The loss reaches the queries, keys and values of the last layer. What stands behind them in that layer (its\n"
        f"attention output and feed-forward: {facts.tail_tensors} tensors, {origin})\n"
        "was not trained and expects fine-tuning."
    )
    if facts.pooler:
        text += (
            " Nor was the pooler, which is there because the class wants one:\n"
            "its matrix is the identity, so that `pooler_output` is the hyperbolic tangent of the first token's last\n"
            "hidden state."
        )
    return text


def _licence(origin: Provenance) -> str:
    if not origin.license:
        return (
            "## Licence\n\nUnknown: neither a card nor a LICENSE lay beside the teacher. A student inherits what its "
            "teacher and its text demand."
        )
    name = origin.license_name or origin.license
    own = [f"[{file}]({file})" for file in origin.notices]
    return f"## Licence\n\n{name}, the teacher's" + (f"; its own words: {', '.join(own)}." if own else ".")


def _scores(results: Sequence[Result], measures: dict[str, Any]) -> str:
    parts = []
    if results:
        rows = [
            (
                f"{r.dataset_name}{f' ({r.dataset_config})' if r.dataset_config else ''}",
                r.split or "-",
                r.metric,
                f"{r.value:.1%}" + (f" ± {r.deviation:.1%}" if r.deviation is not None else ""),
                r.seeds or "-",
            )
            for r in results
        ]
        parts.append("Fine-tuned, mean and standard deviation over seeds:")
        parts.append(_table(("data set", "split", "metric", "value", "seeds"), rows))
    if measures:
        parts.append(_table(("measure", "value"), measures.items()))
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def _formats(facts: Facts) -> str:
    if not facts.onnx:
        return ""
    head, *lines = onnx_files.rows(facts.onnx)
    names = ", ".join(f"`{name}`" for name in onnx_files.files(facts.onnx))
    return f"## ONNX\n\n{names}\n\n{_table(head, lines)}\n\n{onnx_files.note(facts.onnx)}"


def _use(seq_tokens: int, facts: Facts) -> str:
    lines = [
        "## Use\n\n```python",
        "from transformers import AutoModel, AutoTokenizer\n",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModel.from_pretrained(".")',
        'output = model(**tokenizer("a sentence", truncation=True, return_tensors="pt"))',
        f"```\n\nIt was trained on windows of {seq_tokens} tokens, at which the tokenizer cuts.",
    ]
    if facts.sentence_transformers:
        lines += [
            "\n```python\nfrom sentence_transformers import SentenceTransformer\n",
            'vectors = SentenceTransformer(".").encode(["a sentence", "another one"])',
            "```\n\nThe vectors are means over tokens; they were not trained to be near for sentences of one meaning.",
        ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
