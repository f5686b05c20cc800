"""What a run's folder holds, as tables for people; no GPU and no process group is needed."""

from pathlib import Path

from data_prep.errors import UserError
from pipeline.engine import records
from pipeline.recipes import load_recipe
from pipeline.training.metrics import SCORES, iterate_metrics


def show(folder: Path, console, *, verify: bool = False) -> None:
    """The recipe in short, the last record of each kind, and every checkpoint, whole or torn.

    Args:
        folder: of the run.
        console: a rich console.
        verify: read every byte of the checkpoints and compare checksums; else sizes alone are compared.

    Raises:
        UserError: the folder is no run's; or, to `verify`, a checkpoint is damaged (not: was never finished).
    """
    from rich.console import Group
    from rich.table import Table

    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder} is neither a corpus (manifest.json) nor a run (recipe.toml)")
    recipe = load_recipe(str(folder / "recipe.toml"))
    run = Table("", "", title=str(folder), show_header=False)
    run.add_row("teacher", f"{recipe.teacher.model}, layer {recipe.teacher.layer}")
    run.add_row("student", f"{recipe.student.shape}, first weights {recipe.student.init}")
    run.add_row("relations", f"{', '.join(recipe.relations.pairs)} with {recipe.relations.heads} heads")
    run.add_row("data", f"{recipe.data.corpus}, {recipe.data.seq_tokens} tokens a sample")
    last = {record["kind"]: record for record in iterate_metrics(folder) if "loss" in record}
    for kind in ("train", "validation"):
        if kind in last:
            run.add_row(f"{kind} loss", f"{last[kind]['loss']:.4f} at step {last[kind]['step']:,}")
    measured = last.get("validation", {})
    for name in filter(measured.__contains__, SCORES):
        run.add_row(SCORES[name], f"{measured[name]:.1%} at step {measured['step']:,}")
    damaged = []
    checkpoints = Table("checkpoint", "samples seen", "ranks", "ZeRO stage", "MB", "state", title="Checkpoints")
    for path in sorted((folder / "checkpoints").glob("step-*")):
        problem = records.why_torn(path, checksums=verify)
        if problem:
            checkpoints.add_row(path.name, "", "", "", "", f"torn: {problem}")
            damaged += [path.name] if records.was_finished(path) else []
            continue
        record = records.read_record(path)
        size = sum(facts["bytes"] for facts in record.files.values()) / 1e6
        row = (
            f"{record.samples_seen:,}",
            str(record.world_size),
            str(record.zero_stage),
            f"{size:,.1f}",
            "whole, verified" if verify else "whole",
        )
        checkpoints.add_row(path.name, *row)
    console.print(Group(run, checkpoints))
    if verify and damaged:
        raise UserError(f"damaged in {folder}: {', '.join(damaged)}. Whole checkpoints are not touched by that")
