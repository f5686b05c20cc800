"""A checkpoint becomes a Hugging Face folder: weights, tokenizer, licence, and a model card of the run's own record."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError
from pipeline import provenance
from pipeline.encoders.architectures import architecture_of
from pipeline.encoders.models import RelationEncoder, tail_parameter_names
from pipeline.provenance import Provenance
from pipeline.shipping import card, folder, huggingface, onnx_files, sentence_embedder
from pipeline.training.run_folder import EXPORT, MODEL, FinishedRun


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an exported folder holds beside the model, its tokenizer, licence and card. None: what an earlier export
    there held, else fp32 and nothing more.

    Attributes:
        dtype: of the weights: fp32, bf16 or fp16.
        sentence_transformers: what that library looks for, with mean pooling.
        onnx: ONNX files, made of the weights in fp32.
    """

    dtype: str | None = None
    sentence_transformers: bool | None = None
    onnx: bool | None = None


def export(run: FinishedRun, out: Path | None = None, options: Options = Options()) -> Path:  # noqa: B008 - frozen
    """Write the student of a checkpoint as a folder for `AutoModel` and `AutoTokenizer`; returns the folder.

    The folder appears at once, when it is whole. An earlier export of the same run is replaced; files that somebody has
    put beside it stay, and so do the scores of the same step.

    Args:
        run: the run and its checkpoint.
        out: the folder; `export/` of the run if absent.
        options: what it holds.

    Raises:
        UserError: `out` holds something else than an earlier export of this run, or one that was changed by hand, or
            cannot be put in its place.
        OSError: the disk is full, or does not let the folder be moved; nobody's files are lost.
    """
    out = (out or run.folder / EXPORT).resolve()
    folder.check_place(out)
    folder.check_replaceable(out, run.name)
    options = _completed(options, out)
    if options.onnx:
        onnx_files.require()
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder.aside(out) as scratch:
        _write(run, scratch / "model", options, _scores_to_keep(run, out))
        folder.swap(scratch / "model", out, scratch / "old", run.name)
    return out


def exported(run: FinishedRun) -> Path:
    """The folder with the run's export of this step: the one that is there, or made now.

    Raises:
        UserError: as `export`; also if scores lie there that no evaluation has written.
    """
    out = (run.folder / EXPORT).resolve()
    marker = folder.read_marker(out)
    facts = card.read_facts(marker)
    is_this = marker.get("run") == run.name and marker.get("step") == run.record.step and facts is not None
    if not (is_this and folder.is_whole(out)):
        out = export(run)
    if (out / card.SCORES).exists() and card.SCORES not in folder.read_marker(out)["files"]:
        raise UserError(f"{out / card.SCORES} is no evaluation's and would be written over: move it away first")
    return out


def add_scores(run: FinishedRun, scores: dict[str, Any]) -> Path:
    """Write scores into the exported folder of a run and into its card, beside those of earlier evaluations.

    Args:
        run: the run and its checkpoint.
        scores: keys of `scores.json`; those that are there already are replaced. `measures` and `results` come into the
            card, see `card.model_card`.

    Returns:
        The folder.
    """
    out = exported(run)
    before = card.read_scores(out)
    merged = {**before, **scores}
    if "measures" in scores:
        merged["measures"] = {**before.get("measures", {}), **scores["measures"]}
    facts = card.read_facts(folder.read_marker(out))
    _write_card(run, out, provenance.read(run.folder, run.recipe)[0], facts, merged)
    folder.mark(out, [card.SCORES, "README.md"], run=run.name, step=run.record.step, facts=asdict(facts))
    return out


def remarks(run: FinishedRun, out: Path) -> list:
    """What whoever ships an exported folder should know, for a rich console."""
    from rich.table import Table

    found = []
    if facts := card.read_facts(folder.read_marker(out)):
        if facts.onnx:
            head, *lines = onnx_files.rows(facts.onnx)
            table = Table(*head, title="ONNX beside PyTorch")
            for line in lines:
                table.add_row(*line)
            found += [table, onnx_files.note(facts.onnx)]
    origin, _ = provenance.read(run.folder, run.recipe)
    if not origin.license:
        found.append(
            f"licence: unknown, because neither a card nor a LICENSE lies beside {origin.teacher}. Find it out before "
            "you hand the student on"
        )
    return found


def _write(run: FinishedRun, out: Path, options: Options, scores: dict[str, Any]) -> None:
    """The model as a new folder, read back and compared."""
    out.mkdir()
    origin, notices = provenance.read(run.folder, run.recipe)
    student = run.student()
    dtype = huggingface.DTYPES[options.dtype]
    huggingface.write_tokenizer(run.folder / MODEL, out, seq_tokens=run.recipe.data.seq_tokens)
    huggingface.write_model(student.backbone, out, dtype=dtype)
    huggingface.check_reload(student.backbone, run.folder / MODEL, out, dtype=dtype)
    facts = _formats(run, student, out, options)
    for name, content in notices.items():
        durable.write(out / name, content)
    _write_card(run, out, origin, facts, scores)
    folder.mark(out, folder.files_of(out), run=run.name, step=run.record.step, facts=asdict(facts))
    folder.obey_umask(out)


def _formats(run: FinishedRun, student: RelationEncoder, out: Path, options: Options) -> card.Facts:
    """Write what was asked for beside the model, and gather the facts of the card."""
    seq_tokens = run.recipe.data.seq_tokens
    if options.sentence_transformers:
        sentence_embedder.write(out, hidden=student.config.hidden_size, seq_tokens=seq_tokens)
    return card.Facts(
        parameters=student.backbone.num_parameters(),
        tail_tensors=len(tail_parameter_names(student)),
        dtype=options.dtype,
        pooler=architecture_of(student.config).has_pooler,
        sentence_transformers=options.sentence_transformers,
        onnx=onnx_files.write(student.backbone, out, seq_tokens=seq_tokens) if options.onnx else {},
        agreement=None if options.dtype == "fp32" else huggingface.agreement(student.backbone, out),
    )


def _write_card(run: FinishedRun, out: Path, origin: Provenance, facts: card.Facts, scores: dict[str, Any]) -> None:
    text = card.model_card(run, origin, facts, scores)
    durable.write(out / "README.md", text)
    if scores:
        durable.write(out / card.SCORES, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")


def _completed(options: Options, out: Path) -> Options:
    """With what was not asked for as the earlier export has it."""
    facts = card.read_facts(folder.read_marker(out))
    before = (facts.dtype, facts.sentence_transformers, bool(facts.onnx)) if facts else ("fp32", False, False)
    asked = (options.dtype, options.sentence_transformers, options.onnx)
    dtype, embedder, onnx = (b if a is None else a for a, b in zip(asked, before, strict=True))
    return Options(dtype=dtype, sentence_transformers=embedder, onnx=onnx)


def contents(out: Path) -> str:
    """What an exported folder holds, in words."""
    facts = card.read_facts(folder.read_marker(out))
    more = {"sentence-transformers": facts.sentence_transformers, "ONNX": bool(facts.onnx)} if facts else {}
    return ", ".join([facts.dtype if facts else "", *(name for name, there in more.items() if there)])


def _scores_to_keep(run: FinishedRun, out: Path) -> dict[str, Any]:
    """Of an earlier export of the same step; those of another step are another student's."""
    marker = folder.read_marker(out)
    ours = marker.get("step") == run.record.step and card.SCORES in marker.get("files", {})
    return card.read_scores(out) if ours else {}
