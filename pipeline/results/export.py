"""A checkpoint becomes a Hugging Face folder: safetensors, tokenizer, and a model card of the run's own record."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from data_prep import durable
from data_prep.errors import UserError
from pipeline.encoders.architectures import without_pooler
from pipeline.encoders.models import RelationEncoder, tail_parameter_names
from pipeline.training.metrics import iterate_metrics
from pipeline.training.run_folder import EXPORT, MODEL, FinishedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MARKER = "minilm-export.json"
_KIND = "minilmv2-deepspeed export"


def load_exported(folder: Path) -> "PreTrainedModel":
    """The model of an exported folder, in fp32 and eval mode, without the pooler that it was never given."""
    from transformers import AutoConfig, AutoModel

    plain = dict(trust_remote_code=False)
    config = AutoConfig.from_pretrained(folder, **plain)
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **plain, **without_pooler(config)).eval()


def export(run: FinishedRun, out: Path | None = None) -> Path:
    """Write the student of a checkpoint as a folder for `AutoModel` and `AutoTokenizer`; returns the folder.

    The folder appears at once, when it is whole. An earlier export of the same run is replaced; files that somebody has
    put beside it stay.

    Raises:
        UserError: `out` holds something else than an earlier export of this run, or one that was changed by hand.
        OSError: the disk is full, or does not let the folder be moved; nobody's files are lost.
    """
    out = (out or run.folder / EXPORT).resolve()
    _check_replaceable(out, run.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=".export-"))
    fresh, old = scratch / "model", scratch / "old"
    try:
        _write(run, fresh)
        _swap(fresh, out, old, run.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _remove_export(old)
        with contextlib.suppress(OSError):
            scratch.rmdir()
    return out


def _write(run: FinishedRun, folder: Path) -> None:
    """The model as a new folder, read back and compared."""
    folder.mkdir()
    for file in sorted(path for path in (run.folder / MODEL).iterdir() if path.is_file()):
        shutil.copyfile(file, folder / file.name)  # not the modes of a run that may be read-only
    student = run.student()
    try:
        student.backbone.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, as its library says it
        raise UserError(f"no model can be written in {folder.parents[1]}: {error}. Nothing was left there") from error
    (folder / "README.md").write_text(model_card(run, student), encoding="utf-8")
    _check_reload(student.backbone, folder)
    mark(folder, [path.name for path in folder.iterdir()], run=run.name, step=run.record.step)
    _obey_umask(folder)


def _swap(fresh: Path, out: Path, old: Path, run: str) -> None:
    """Put `fresh` in the place of `out`, with what somebody else has put there; `out` is checked again just before."""
    beside = _check_replaceable(out, run)
    if taken := [name for name in beside if (fresh / name).exists()]:
        raise UserError(f"{', '.join(taken)} in {out} would be written over; nothing was written. Give another --out.")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
        for name in beside:
            (old / name).rename(out / name)
    except OSError:
        if not out.exists():
            old.rename(out)
        raise


def _remove_export(folder: Path) -> None:
    """Remove the files of a former export from its folder, and the folder if nothing else is in it."""
    ours = (*_read_marker(folder).get("files", ()), MARKER)
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):  # by what is there: a marker may name files elsewhere
            if path.name in ours:
                path.unlink()
        folder.rmdir()


def mark(folder: Path, names: Iterable[str], *, run: str, step: int) -> None:
    """Note which files of a folder are this program's, with their checksums, and of which run."""
    before = _read_marker(folder).get("files", {})
    files = before | {name: durable.sha256(folder / name) for name in names}
    record = dict(kind=_KIND, run=run, step=step, files=files)
    durable.write(folder / MARKER, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and marker.get("kind") == _KIND else {}


def _check_replaceable(out: Path, run: str) -> list[str]:
    """Names of what somebody else has put into the folder of an earlier export; refuses all but such a folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; nothing was written. Give another --out.")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    marker = _read_marker(out)
    if not names:
        return []
    if marker.get("run") != run or not isinstance(marker.get("files"), dict):
        raise UserError(
            f"{out} is not empty and no earlier export of this run ({MARKER} would say so); nothing was written. Give "
            "another --out."
        )
    ours = marker["files"]
    own = [name for name in names if name in ours]
    if changed := [n for n in own if not (out / n).is_file() or durable.sha256(out / n) != ours[n]]:
        raise UserError(
            f"{', '.join(changed)} in {out} was changed since it was exported; nothing was written. Give another "
            "--out, or move that folder away."
        )
    return [name for name in names if name not in ours and name != MARKER]


def _obey_umask(folder: Path) -> None:
    """Files written aside are the writer's alone; an exported model is as readable as any file that one makes."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


def model_card(run: FinishedRun, student: RelationEncoder, scores: dict[str, Any] | None = None) -> str:
    """The model card: what was distilled from what, on what, for how long, with which result."""
    recipe, record = run.recipe, run.record
    teacher = Path(recipe.teacher.model).name if Path(recipe.teacher.model).exists() else recipe.teacher.model
    facts = {
        "Teacher": f"`{teacher}`, layer {recipe.teacher.layer}",
        "Student": f"{recipe.student.shape}, {recipe.student.heads} heads, "
        f"{student.backbone.num_parameters():,} parameters, first weights: {recipe.student.init}",
        "Relations": ", ".join(f"{pair.upper()} x {weight:g}" for pair, weight in recipe.relations.pairs.items())
        + f"; {recipe.relations.heads} relation heads",
        "Training": f"{record.step:,} of {recipe.optimizer.steps:,} steps, {record.samples_seen:,} samples of "
        f"{recipe.data.seq_tokens} tokens, global batch {recipe.optimizer.global_batch_samples}",
        "Optimizer": f"AdamW, peak learning rate {recipe.optimizer.peak_lr:g}, {recipe.optimizer.schedule} decay after "
        f"{recipe.optimizer.warmup_steps:,} warm-up steps, weight decay {recipe.optimizer.weight_decay:g}",
        "Corpus": f"fingerprint `{record.corpus_fingerprint[:16]}`",
    }
    if losses := held_out(run):
        facts["Held-out relation loss"] = "; ".join(
            f"{pair.upper()} {before:.4f} -> {after:.4f}" for pair, (before, after) in losses.items()
        )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    tail = len(tail_parameter_names(student))
    return _CARD.format(
        name=f"{recipe.student.shape} distilled from {teacher}",
        rows=rows,
        tail=f"{tail} tensors, as {recipe.student.tail_init} initialisation left them",
        scores=_scores_section(scores),
        seq_tokens=recipe.data.seq_tokens,
    )


def held_out(run: FinishedRun) -> dict[str, tuple[float, float]]:
    """Each relation's held-out loss at the first validation and at the last one up to the checkpoint."""
    losses = [m["per_pair"] for m in iterate_metrics(run.folder, "validation") if m["step"] <= run.record.step]
    first, last = (losses[0], losses[-1]) if losses else ({}, {})
    return {pair: (first[pair], last[pair]) for pair in last if pair in first}


def _scores_section(scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    lines = [f"| {name} | {value} |" for name, value in scores.items()]
    return "\n## Scores\n\n| measure | value |\n|---|---|\n" + "\n".join(lines) + "\n"


def _check_reload(model, folder: Path) -> None:
    """The folder must give back the same model: the same last hidden state for the same tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = tokenizer("The exported model computes what the trained one did.", return_tensors="pt")
    with torch.no_grad():
        ours = model.eval()(**tokens).last_hidden_state
        theirs = load_exported(folder)(**tokens).last_hidden_state
    if not torch.equal(ours, theirs):
        raise RuntimeError(f"the model read back from {folder} differs from the one written")


_CARD = """---
library_name: transformers
tags: [minilmv2, distillation]
---
# {name}

An encoder distilled with [MiniLMv2](https://arxiv.org/abs/2012.15828) (multi-head self-attention relation
distillation) by minilmv2-deepspeed. Fine-tune it as any encoder of its architecture.

| | |
|---|---|
{rows}

The loss reaches the queries, keys and values of the last layer. What stands behind them in that layer (its attention
output and feed-forward: {tail}) was not trained and expects fine-tuning. There is no
pooler; a class that wants one says that it makes a new one.
{scores}
## Use

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained(".")
output = model(**tokenizer("a sentence", truncation=True, max_length={seq_tokens}, return_tensors="pt"))
```
"""
