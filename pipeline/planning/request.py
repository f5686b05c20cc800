"""What is asked of `minilm plan`, answered: the machines by their words, and the files that are wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from data_prep import durable
from data_prep.errors import UserError
from pipeline import devices
from pipeline.config import Recipe
from pipeline.planning import picture, rates, report
from pipeline.planning.plan import Machines, Plan, Planner

THIS_MACHINE = ("this-machine", "cpu")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
MOST_GPUS = 1 << 16


def plan_for(
    recipes: Sequence[Recipe],
    *,
    students: int = 1,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: str = "this-machine",
    ds_config: str = "auto",
    vocabulary: int | None = None,
    text: str | None = None,
    network_gbit: float = 400.0,
) -> tuple[Planner, Plan]:
    """The plan.

    Args:
        recipes: one for each student of the run.
        students: so many of each recipe.
        gpu: a key of the table, or this machine, which is measured if it has no GPU of the table.
        text: size of the corpus's text, such as "2.4TB".
        network_gbit: that one device sends to other machines, 10^9 bits a second.
    """
    if nodes * gpus_per_node > MOST_GPUS:
        raise UserError(f"{nodes:,} x {gpus_per_node:,} devices: at most {MOST_GPUS:,} are planned for")
    batch = recipes[0].optimizer.global_batch_samples
    if batch % (nodes * gpus_per_node):
        raise UserError(
            f"optimizer.global_batch_samples = {batch} cannot be shared evenly by {nodes * gpus_per_node} ranks: use "
            f"another number of devices, or another global batch"
        )
    if gpu not in THIS_MACHINE:
        devices.named(gpu)
    text_bytes = None if text is None else size_of(text)
    planner = Planner([recipe for recipe in recipes for _ in range(students)], vocabulary=vocabulary)
    machines = machines_of(planner, gpu, nodes=nodes, gpus_per_node=gpus_per_node, network=network_gbit / 8 * 1e9)
    return planner, planner.plan(machines, ds_config=ds_config, text_bytes=text_bytes)


def machines_of(planner: Planner, gpu: str, *, nodes: int, gpus_per_node: int, network: float) -> Machines:
    """The machines of a job by the key of their device; a UserError for one that is not known."""
    device, key = None, gpu
    if gpu == "this-machine" and torch.cuda.is_available():
        key = torch.cuda.get_device_name()
        device = devices.recognised(key)
        if device is None:
            raise UserError(f"the device {key!r} of this machine is not in the table: give --gpu one of its keys")
    elif gpu not in THIS_MACHINE:
        device = devices.named(gpu)
    sizes = dict(nodes=nodes, gpus_per_node=gpus_per_node)
    if device is None:
        memory = psutil.virtual_memory().total // gpus_per_node
        share = min(16, planner.recipe.optimizer.global_batch_samples // (nodes * gpus_per_node))
        positions = planner.recipe.data.seq_tokens
        numbers = share * positions * planner.students[0].student.config.hidden_size
        measured = rates.of_this_machine(
            planner.shapes(share), planner.widths(), positions=positions, numbers=numbers, memory=memory
        )
        return Machines(rates=measured, threads=torch.get_num_threads(), **sizes)
    sheet = rates.of_device(key, device, half=True, network=network)
    return Machines(rates=sheet, bf16=device.bf16, **sizes)


def size_of(words: str) -> float:
    """Bytes of a size such as 2.4TB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", words.lower())
    if not match or float(match[1]) <= 0:
        raise UserError(f"{words!r} is no size: expected a number with a unit, such as 16GB or 2.4TB")
    return float(match[1]) * _UNITS[match[2]]


def deliver(
    planner: Planner,
    plan: Plan,
    console,
    *,
    price: float | None,
    plot: Path | None,
    write: Path | None,
    as_json: Path | None,
) -> None:
    """Print the plan and write what is wanted of it; a UserError at the end where nothing fits."""
    for part in report.tables(plan, price):
        console.print(part, highlight=False)
    if as_json is not None:
        durable.write(as_json, json.dumps(report.as_values(plan, price), indent=2) + "\n")
        console.print(f"values: {as_json}", highlight=False)
    if plan.chosen is None:
        raise UserError(report.nothing_fits(plan))
    if plot is not None:
        durable.write(plot, picture.picture(plan))
        console.print(f"picture: {plot}", highlight=False)
    if write is not None:
        durable.write(write, json.dumps(planner.written(plan.chosen), indent=2) + "\n")
        console.print(
            f"DeepSpeed configuration: {write} (--ds-config {write} teacher.placement={plan.chosen.placement})",
            highlight=False,
        )
