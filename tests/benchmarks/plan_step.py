"""A plan's step beside real ones: measures this processor, takes steps of a run, measures again.

    torchrun --nproc-per-node=1 tests/benchmarks/plan_step.py FOLDER section.key=value ...

FOLDER is for the run. Everything on one thread and in processor time, so that other programs on the machine count less.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from pipeline.engine import process_group
from pipeline.planning import rates
from pipeline.planning.plan import Machines, Planner
from pipeline.recipes import load_recipe
from pipeline.training import preflight
from pipeline.training.trainer import Distillation

CONFIG = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 1}}
STEPS = 3


def main(folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    process_group.init_distributed()
    recipe = load_recipe("demo", [*overrides, f"run.output={folder / 'run'}"])
    corpus = preflight.check([recipe], CONFIG, world_size=1)
    planner = Planner([recipe])
    planned = [planned_step(planner)]
    run = Distillation([recipe], CONFIG, corpus, [None])
    batches = iter(run.loader)
    run._take_step(batches)
    taken = []
    for _ in range(STEPS):
        began = time.process_time()
        run._take_step(batches)
        taken.append(time.process_time() - began)
    planned.append(planned_step(planner))
    mean = statistics.mean(step.total for step in planned)
    print(f"planned {mean:.2f} s, taken {statistics.median(taken):.2f} s: {mean / statistics.median(taken):.2f}")
    print({name: round(seconds, 3) for name, seconds in planned[-1].seconds.items()})


def planned_step(planner: Planner):
    numbers = 16 * planner.recipe.data.seq_tokens * planner.students[0].student.config.hidden_size
    measured = rates.of_this_machine(
        planner.shapes(16),
        planner.widths(),
        positions=planner.recipe.data.seq_tokens,
        numbers=numbers,
        memory=1 << 40,
        clock=time.process_time,
    )
    return planner.option("own", CONFIG, "replica", Machines(nodes=1, gpus_per_node=1, rates=measured)).step


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
