"""Takes two real steps of a run and says how much memory its ranks needed for the second.

Started by torchrun with a folder that holds job.json, {"config": ..., "overrides": [...]}. Rank 0 writes peak.json: the
resident bytes at the highest point of the step, above those of the process before the run, with everything imported.
"""

import gc
import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401  (imported before the first look)
import torch
import transformers.models.bert.modeling_bert  # noqa: F401

from data_prep import durable
from launch.status import end_process
from pipeline.engine import process_group
from pipeline.recipes import load_recipe
from pipeline.training import preflight
from pipeline.training.trainer import Distillation


def main(folder: Path) -> None:
    before = resident("VmRSS")
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    process_group.init_distributed()
    recipe = load_recipe("demo", [*job["overrides"], f"run.output={folder / 'run'}"])
    corpus = preflight.check([recipe], job["config"], world_size=torch.distributed.get_world_size())
    run = Distillation([recipe], job["config"], corpus, [None])
    batches = iter(run.loader)
    run._take_step(batches)  # makes the optimizer's state
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run._take_step(batches)
    if torch.distributed.get_rank() == 0:
        durable.write(folder / "peak.json", json.dumps(resident("VmHWM") - before))
    process_group.leave_process_group()
    end_process(0)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
