"""What a run spends beside its steps: logging and saving.

    python tests/benchmarks/overheads.py --recipe demo [section.key=value ...]

Takes real steps of a recipe on this machine (after `make demo`, the demo's corpus and teacher are there), logs every
one of them, saves a few times, and prints the cost of each beside the cost of a step. Saving is split into what
DeepSpeed writes and what the completion protocol adds: flush to the disk, checksums, record.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict

from pipeline.engine import deepspeed_config, process_group, records
from pipeline.recipes import load_recipe
from pipeline.training import job, run_folder
from pipeline.training.trainer import Distillation

STEPS, SAVES = 40, 5


def timed(owner, name: str, seconds: dict[str, list[float]]) -> None:
    """Replace a method by itself with a clock around it."""
    method = getattr(owner, name)

    def run(*arguments, **options):
        began = time.perf_counter()
        result = method(*arguments, **options)
        seconds[name].append(time.perf_counter() - began)
        return result

    setattr(owner, name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ds-config", default="auto")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limits = [f"run.output={folder}", f"optimizer.steps={STEPS}", "optimizer.warmup_steps=1"]
        intervals = ["logging.every_steps=1", f"checkpoint.every_steps={STEPS // SAVES}"]
        recipe = load_recipe(options.recipe, [*options.overrides, *limits, *intervals])
        usual = load_recipe(options.recipe, options.overrides)
        ds_config = deepspeed_config.read_ds_config(options.ds_config)
        corpus = job.check_all([recipe], ds_config, world_size=1)
        process_group.init_distributed()
        run = Distillation([recipe], ds_config, corpus, [None])
        (student,) = run.runs
        seconds: dict[str, list[float]] = defaultdict(list)
        for name in ("_take_step", "_log_step", "_save"):
            timed(run, name, seconds)
        timed(student.engine, "save_checkpoint", seconds)
        run.train()
        newest = records.read_record(student.output / run_folder.CHECKPOINTS / records.tag_of(STEPS))
        run.close()
    step, log, save, written = (
        statistics.median(seconds[name]) for name in ("_take_step", "_log_step", "_save", "save_checkpoint")
    )
    megabytes = sum(file["bytes"] for file in newest.files.values()) / 1e6
    every_log, every_save = usual.logging.every_steps, usual.checkpoint.every_steps
    print(f"step  {step * 1e3:9.1f} ms")
    print(f"log   {log * 1e3:9.1f} ms: {log / step:.2%} of a step if each is logged, ", end="")
    print(f"{log / step / every_log:.3%} at every {every_log}")
    print(
        f"save  {save * 1e3:9.1f} ms for {megabytes:,.0f} MB, of which DeepSpeed's writing {written * 1e3:.1f} ms: ",
        end="",
    )
    print(f"{save / step / every_save:.2%} of the time at every {every_save} steps")


if __name__ == "__main__":
    main()
