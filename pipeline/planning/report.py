"""A plan for people: tables, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.planning.memory import GIGA
from pipeline.planning.plan import Machines, Option, Plan
from pipeline.planning.steps import link_of

if TYPE_CHECKING:
    from rich.table import Table

PARTS = {  # of memory, and their heads in the table
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "loss": "loss",
    "teacher": "teacher",
    "buffers": "buffers",
    "context": "other",
}


def tables(plan: Plan, price: float | None) -> Iterator[Table | str]:
    """What is to be printed, one after another."""
    machines = plan.machines
    yield (
        f"{machines.ranks} x {machines.rates.name} ({machines.nodes} x {machines.gpus_per_node}); "
        f"{machines.rates.source}"
    )
    yield models_table(plan)
    yield memory_table(plan)
    if plan.chosen is None:
        return
    yield f"chosen: {chosen_words(plan.chosen)}"
    yield from (f"  {line}" for line in arithmetic(plan.chosen))
    yield step_table(plan)
    yield totals_table(plan, price)
    yield curve_table(plan)


def models_table(plan: Plan) -> Table:
    table = _table("Models", ["", "parameters", "trained", "of"])
    first = plan.students[0]
    layer, model = first.recipe.teacher.layer, first.recipe.teacher.model
    table.add_row(
        "teacher",
        f"{first.teacher_parameters:,}",
        "0",
        f"{model} to layer {layer} (whole: {first.whole_teacher:,}), from {first.known_from}",
    )
    for number, models in enumerate(plan.students, 1):
        name = "student" if len(plan.students) == 1 else f"student {number}"
        student = models.recipe.student
        words = f"{student.shape}, {student.heads} heads, vocabulary {models.student.config.vocab_size:,}"
        table.add_row(name, f"{models.student_parameters:,}", f"{sum(models.trained):,}", words)
    return table


def memory_table(plan: Plan) -> Table:
    limit = plan.machines.rates.memory / GIGA
    columns = ["DeepSpeed", "teacher is", "micro", *PARTS.values(), "sum", "host", "fits", "step"]
    table = _table(f"GiB of a rank at the moment that most is held (there are {limit:.1f})", columns)
    for option in plan.options:
        parts = option.memory.device
        table.add_row(
            f"{'>' if option is plan.chosen else ' '} {option.name}",
            option.placement,
            str(option.micro_batch),
            *(f"{parts.get(name, 0) / GIGA:.2f}" for name in PARTS),
            f"{option.memory.total / GIGA:.2f}",
            f"{sum(option.memory.host.values()) / GIGA:.2f}",
            "yes" if option.fits else "no",
            _milliseconds(option.step.total),
        )
    return table


def step_table(plan: Plan) -> Table:
    step, machines = plan.chosen.step, plan.machines
    table = _table("One step", ["part", "time", "share"])
    for name, seconds in step.seconds.items():
        if seconds:
            table.add_row(name, _milliseconds(seconds), f"{seconds / step.total:.0%}")
    table.add_row("in all", _milliseconds(step.total), f"{step.binds} binds")
    table.add_row("tokens", f"{step.tokens:,}", f"{step.tokens / step.total:,.0f} a second")
    rate = step.flops / step.total / machines.ranks
    table.add_row("operations", f"{step.flops / 1e12:.3g}e12", f"{rate / 1e12:.3g} TFLOP/s a rank")
    link = link_of(machines.rates, ranks=machines.ranks, gpus_per_node=machines.gpus_per_node)
    table.add_row("on the wire", f"{step.wire_bytes / 1e6:,.0f} MB a rank", f"over {link / 1e9:,.0f} GB/s")
    return table


def totals_table(plan: Plan, price: float | None) -> Table:
    totals, recipe = plan.totals, plan.students[0].recipe
    table = _table("The run", ["", ""])
    steps = max(models.recipe.optimizer.steps for models in plan.students)
    table.add_row("steps", f"{steps:,} of {recipe.optimizer.global_batch_samples} x {recipe.data.seq_tokens} tokens")
    table.add_row("time", duration(totals.seconds))
    table.add_row("GPU-hours" if not plan.machines.rates.is_cpu else "rank-hours", f"{totals.gpu_hours:,.1f}")
    if price is not None:
        table.add_row("cost", f"{totals.gpu_hours * price:,.0f} at {price:g} a GPU-hour")
    size = totals.checkpoint_bytes
    table.add_row(
        "checkpoint",
        f"{size / 1e9:.2f} GB, {totals.save_seconds:.1f} s at 1 GB/s; at most {totals.checkpoints_kept} kept: "
        f"{size * totals.checkpoints_kept / 1e9:,.1f} GB",
    )
    table.add_row("tokens read", f"{totals.tokens:,} ({totals.tokens / max(1, totals.corpus_tokens):.2g} epochs)")
    table.add_row("corpus", f"{totals.corpus_bytes / 1e9:,.1f} GB on disk ({totals.corpus_from})")
    hours = totals.prepare_core_hours
    table.add_row(
        "to prepare it",
        f"{totals.text_bytes / 1e9:,.1f} GB of text, {hours:,.1f} core-hours: {hours / 24:.2f} days on one core, "
        f"{duration(hours / 64 * 3600)} on 64",
    )
    return table


def curve_table(plan: Plan) -> Table:
    table = _table("On other numbers of these devices", ["devices", "micro-batch", "step", "tokens/s", "gain", "binds"])
    base = next((point.step for point in plan.curve if point.step), None)
    for point in plan.curve:
        if point.step is None:
            batch = plan.students[0].recipe.optimizer.global_batch_samples
            table.add_row(str(point.ranks), "", "", "", "", f"a global batch of {batch} cannot be shared by so many")
            continue
        table.add_row(
            str(point.ranks),
            str(point.micro_batch),
            _milliseconds(point.step.total),
            f"{point.step.tokens / point.step.total:,.0f}",
            f"{base.total / point.step.total:.1f}",
            point.step.binds,
        )
    return table


def chosen_words(option: Option) -> str:
    return (
        f"{option.name}, teacher.placement={option.placement}, micro-batch {option.micro_batch} x "
        f"{option.config['gradient_accumulation_steps']}; {option.memory.total / GIGA:.2f} GiB, most in the phase "
        f"'{option.memory.moment}'"
    )


def arithmetic(option: Option) -> list[str]:
    """How the sums come about."""
    phases = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in option.memory.phases.items())
    return [*option.memory.arithmetic, f"held in each phase: {phases} GiB"]


def nothing_fits(plan: Plan) -> str:
    least = min(plan.options, key=lambda option: option.memory.total)
    limit = plan.machines.rates.memory / GIGA
    return (
        f"no configuration fits into {limit:.1f} GiB a rank; the least is {chosen_words(least)}. Take more devices or "
        "larger ones, a smaller student, or shorter samples (data.seq_tokens)."
    )


def as_values(plan: Plan, price: float | None) -> dict[str, Any]:
    """Plain values for `--json`."""
    totals = plan.totals
    return {
        "machines": _machines(plan.machines),
        "teacher": {"parameters": plan.students[0].teacher_parameters, "whole": plan.students[0].whole_teacher},
        "students": [
            {"parameters": m.student_parameters, "trained": sum(m.trained), "shape": m.recipe.student.shape}
            for m in plan.students
        ],
        "options": [_option(option) for option in plan.options],
        "chosen": None if plan.chosen is None else _option(plan.chosen),
        "totals": None if totals is None else vars(totals) | {"cost": price and price * totals.gpu_hours},
        "curve": [
            {"devices": p.ranks, "seconds": p.step and p.step.total, "binds": p.step and p.step.binds}
            for p in plan.curve
        ],
    }


def _machines(machines: Machines) -> dict[str, Any]:
    return {"nodes": machines.nodes, "gpus_per_node": machines.gpus_per_node, "device": machines.rates.name}


def _option(option: Option) -> dict[str, Any]:
    return {
        "ds_config": option.name,
        "placement": option.placement,
        "micro_batch": option.micro_batch,
        "fits": option.fits,
        "bytes": option.memory.device | {"sum": option.memory.total},
        "host_bytes": option.memory.host,
        "phases": option.memory.phases,
        "seconds": option.step.seconds | {"sum": option.step.total},
        "flops": option.step.flops,
        "wire_bytes": option.step.wire_bytes,
    }


def duration(seconds: float) -> str:
    """In the unit that people would take."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _table(title: str, columns: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold", show_header=any(columns))
    for number, column in enumerate(columns):
        left = number == 0 or column in ("of", "binds", "", "teacher is")
        table.add_column(column, justify="left" if left else "right", no_wrap=column not in ("of", "binds", ""))
    return table
