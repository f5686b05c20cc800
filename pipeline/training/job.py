"""One rank's part of a job: from the recipe to the exit code."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.engine import deepspeed_config, process_group, ranks
from pipeline.training import preflight, run_folder
from pipeline.training.monitor import profiler
from pipeline.training.trainer import Distillation


def distill(
    recipe: Recipe,
    ds_config: dict[str, Any],
    *,
    resume: str = "auto",
    stop_at_step: int | None = None,
    profile: bool = False,
    compile_layers: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> int:
    """Run the recipe on this rank and return the exit code.

    Args:
        recipe: what is learned.
        ds_config: a DeepSpeed configuration, see `deepspeed_config.read_ds_config`.
        resume: "auto", "never" or a step, see `records.find`.
        stop_at_step: save and leave after this step, as if the job's time were over, but with exit code 0.
        profile: write a trace of a few steps into the run's folder.
        compile_layers: run the layers of teacher and student through torch.compile.
        on_start: called once signals no longer end this process but are answered with a checkpoint.

    Returns:
        0 when the last step (or `stop_at_step`) is done and saved, EXIT_REQUEUE after a signal, EXIT_DIVERGED when too
        many steps in a row were not finite.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    corpus = preflight.check(recipe, ds_config, world_size=world_size)
    process_group.init_distributed()
    record = ranks.decided_by_rank_0(lambda: preflight.find_checkpoint(recipe, corpus, resume))
    merged = deepspeed_config.merge(recipe, ds_config, world_size=world_size)
    with _claimed(Path(recipe.run.output)), contextlib.closing(Distillation(recipe, merged, corpus, record)) as run:
        if compile_layers:
            run.compile_layers()
        on_start()
        with profiler(run.output, run.rank) if profile else contextlib.nullcontext() as tracer:
            return run.train(stop_at_step, after_step=tracer.step if tracer else lambda: None)


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """The run's folder held by rank 0 for all ranks, which see that it is the same one."""
    with contextlib.ExitStack() as held:

        def claim() -> str:
            return held.enter_context(contextlib.closing(run_folder.Claim(output))).run

        run = ranks.decided_by_rank_0(claim)
        ranks.all_agree(lambda: run_folder.check_shared(output, run))
        yield
