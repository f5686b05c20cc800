"""A checkpoint becomes a Hugging Face folder: safetensors, tokenizer, and a model card of the run's own record."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError
from pipeline.architectures import without_pooler
from pipeline.models import RelationEncoder, tail_parameter_names
from pipeline.monitor import read_metrics
from pipeline.run_folder import EXPORT, MODEL, FinishedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_exported(folder: Path) -> "PreTrainedModel":
    """The model of an exported folder, in eval mode, without the pooler that it was never given."""
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_pretrained(folder, **without_pooler(AutoConfig.from_pretrained(folder))).eval()


def export(run: FinishedRun, out: Path | None = None) -> Path:
    """Write the student of a checkpoint as a folder for `AutoModel` and `AutoTokenizer`; returns the folder.

    The folder appears at once, when it is whole; an earlier export of the same run is replaced.

    Raises:
        UserError: `out` is something else than an earlier export.
    """
    out = out or run.folder / EXPORT
    if out.exists() and any(out.iterdir()) and not (out / "model.safetensors").is_file():
        raise UserError(f"{out} is not empty and is no exported model; nothing was written. Give another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        fresh = Path(scratch) / "model"
        shutil.copytree(run.folder / MODEL, fresh)
        student = run.student()
        student.backbone.save_pretrained(fresh)
        (fresh / "README.md").write_text(model_card(run, student), encoding="utf-8")
        _check_reload(student.backbone, fresh)
        fresh.chmod(0o755)
        if out.exists():
            out.rename(Path(scratch) / "old")
        fresh.rename(out)
    return out


def model_card(run: FinishedRun, student: RelationEncoder, scores: dict[str, Any] | None = None) -> str:
    """The model card: what was distilled from what, on what, for how long, with which result."""
    recipe, record = run.recipe, run.record
    teacher = Path(recipe.teacher.model).name if Path(recipe.teacher.model).exists() else recipe.teacher.model
    held_out = [m for m in read_metrics(run.folder, "validation") if m["step"] <= record.step]
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
    if held_out:
        first, last = held_out[0], held_out[-1]
        facts["Held-out relation loss"] = "; ".join(
            f"{pair.upper()} {first['per_pair'][pair]:.4f} -> {last['per_pair'][pair]:.4f}" for pair in last["per_pair"]
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


def _scores_section(scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    lines = [f"| {name} | {value} |" for name, value in scores.items()]
    return "\n## Scores\n\n| measure | value |\n|---|---|\n" + "\n".join(lines) + "\n"


def _check_reload(model, folder: Path) -> None:
    """The folder must give back the same model: the same last hidden state for the same tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
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
