"""One rank's part of a job: from the recipe to the exit code."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import UserError, words_of
from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.engine import deepspeed_config, process_group, ranks
from pipeline.engine.meeting import Report
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
    skip_preflight: bool = False,
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
        skip_preflight: start though the machines differ.
        on_start: called once signals no longer end this process but are answered with a checkpoint.

    Returns:
        0 when the last step (or `stop_at_step`) is done and saved, EXIT_REQUEUE after a signal, EXIT_DIVERGED when too
        many steps in a row were not finite.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    corpus, report = _report(recipe, ds_config, world_size, compare=world_size > 1 and not skip_preflight)
    process_group.init_distributed(report)
    record = ranks.decided_by_rank_0(lambda: preflight.find_checkpoint(recipe, corpus, resume))
    merged = deepspeed_config.merge(recipe, ds_config, world_size=world_size)
    with _claimed(Path(recipe.run.output)), contextlib.closing(Distillation(recipe, merged, corpus, record)) as run:
        if compile_layers:
            run.compile_layers()
        on_start()
        with profiler(run.output, run.rank) if profile else contextlib.nullcontext() as tracer:
            return run.train(stop_at_step, after_step=tracer.step if tracer else lambda: None)


def fail_together(error: UserError | OSError) -> NoReturn:
    """End this rank and the others for a mistake that was found before `distill`.

    Raises:
        UserError: always.
    """
    words = words_of(error)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        process_group.init_distributed(Report(host=socket.gethostname(), mistake=words))
    raise UserError(words) from error


def _report(
    recipe: Recipe, ds_config: dict[str, Any], world_size: int, *, compare: bool
) -> tuple[Corpus | None, Report]:
    """The corpus, and what this rank tells the others: a mistake, or what must be the same for all."""
    host = socket.gethostname()
    try:
        corpus = preflight.check(recipe, ds_config, world_size=world_size)
        return corpus, Report(host=host, facts=preflight.facts(recipe, ds_config, corpus) if compare else {})
    except (UserError, OSError) as error:
        if world_size == 1:
            raise
        return None, Report(host=host, mistake=words_of(error))


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """The run's folder held by rank 0 for all ranks, which see that it is the same one."""
    with contextlib.ExitStack() as held:

        def claim() -> str:
            return held.enter_context(contextlib.closing(run_folder.Claim(output))).run

        run = ranks.decided_by_rank_0(claim)
        ranks.all_agree(lambda: run_folder.check_shared(output, run))
        yield
