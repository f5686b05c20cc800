"""Trains a list of runs one after another on the ranks of one process group, which costs seconds instead of minutes.

Started by torchrun with a folder that holds jobs.json, a list of

    {"run": name of the run's folder, "config": a DeepSpeed configuration, "copy": a run to start from, "resume": ...,
     "overrides": [...], "students": {name: overrides of its own}}

With `students` several train side by side, each in the folder RUN/NAME.

Each job goes through the same `distill` that the launch script calls. Rank 0 writes the exit codes to codes-RANKS.json.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from launch.status import end_process
from pipeline.engine import process_group
from pipeline.recipes import load_recipe
from pipeline.training.job import distill


def main(folder: Path, jobs: str) -> None:
    process_group.init_distributed()
    codes = {}
    for job in json.loads((folder / jobs).read_text()):
        output = folder / job["run"]
        if dist.get_rank() == 0 and "copy" in job:
            shutil.copytree(folder / job["copy"], output)
        dist.barrier()
        students = {output / name: own for name, own in job.get("students", {}).items()} or {output: []}
        recipes = [load_recipe("demo", [*job["overrides"], *own, f"run.output={o}"]) for o, own in students.items()]
        options = {name: job[name] for name in ("resume", "stop_at_step") if name in job}
        codes[job["run"]] = distill(recipes, job["config"], **options)
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"codes-{jobs}").write_text(json.dumps(codes))
    process_group.leave_process_group()
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
