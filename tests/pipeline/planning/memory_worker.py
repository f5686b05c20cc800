"""Takes real steps of real runs and says how much memory each rank needed at most; a forked process for each run.

Started by torchrun with a folder that holds jobs.json, a list of {"config": ..., "overrides": [...]}. Rank 0 writes
peaks.json: for each job the resident bytes at the highest point of its steps, above those of the process before it.
"""

import gc
import json
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, before the processes part)
import torch
import transformers.models.bert.modeling_bert  # noqa: F401

from pipeline.engine import process_group
from pipeline.recipes import load_recipe
from pipeline.training import preflight
from pipeline.training.trainer import Distillation


def main(folder: Path) -> None:
    jobs, peaks = json.loads((folder / "jobs.json").read_text()), []
    first_port = int(os.environ["MASTER_PORT"])
    for number, job in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(first_port + 1 + number)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.write(writer, json.dumps(peak_of(job, folder / f"run{number}")).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            peaks.append(json.loads(answer.read()))
        os.wait()
    if os.environ["RANK"] == "0":
        (folder / "peaks.json").write_text(json.dumps(peaks))


def peak_of(job: dict, output: Path) -> int:
    before = resident("VmRSS")
    torch.set_num_threads(1)
    process_group.init_distributed()
    recipe = load_recipe("demo", [*job["overrides"], f"run.output={output}"])
    ranks = torch.distributed.get_world_size()
    corpus = preflight.check([recipe], job["config"], world_size=ranks)
    run = Distillation([recipe], job["config"], corpus, [None])
    batches = iter(run.loader)
    run._take_step(batches)  # makes the optimizer's state
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run._take_step(batches)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
