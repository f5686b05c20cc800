"""Trains a list of runs one after another on the ranks of one process group, which costs seconds instead of minutes.

Started by torchrun with a folder that holds jobs.json, a list of

    {"run": name of the run's folder, "config": a DeepSpeed configuration, "copy": a run to start from, "resume": ...,
     "overrides": [...]}

Each job goes through the same `distill` that the launch script calls. Rank 0 writes the exit codes to codes-RANKS.json.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

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
        recipe = load_recipe("demo", [*job["overrides"], f"run.output={output}"])
        codes[job["run"]] = distill(recipe, job["config"], resume=job.get("resume", "auto"))
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"codes-{jobs}").write_text(json.dumps(codes))
    process_group.leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
