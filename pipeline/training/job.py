"""One rank's part of a job: from the recipe to the exit code."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from data_prep.errors import UserError, words_of
from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.engine import process_group, ranks
from pipeline.engine.meeting import Report
from pipeline.training import company, preflight, run_folder
from pipeline.training.monitor import profiler
from pipeline.training.stopping import EXIT_DIVERGED
from pipeline.training.trainer import Distillation


def distill(
    recipes: Sequence[Recipe],
    ds_config: dict[str, Any],
    *,
    resume: str = "auto",
    stop_at_step: int | None = None,
    profile: bool = False,
    compile_layers: bool = False,
    skip_preflight: bool = False,
    on_start: Callable[[], None] = lambda: None,
    on_loss: Callable[[str, int], None] | None = None,
) -> int:
    """Run one or several recipes side by side on this rank and return the exit code.

    Args:
        recipes: what is learned; several share the teacher's pass, see `company.check`.
        ds_config: a DeepSpeed configuration, see `deepspeed_config.read_ds_config`.
        resume: "auto", "never" or a step, see `records.find`.
        stop_at_step: save and leave after this step, as if the job's time were over, but with exit code 0.
        profile: write a trace of a few steps into the (first) run's folder.
        compile_layers: run the layers of teacher and students through torch.compile.
        skip_preflight: start though the machines differ.
        on_start: called once signals no longer end this process but are answered with a checkpoint.
        on_loss: called when another rank is lost, with what to say and the exit code, see `engine.heartbeat`.

    Returns:
        0 when the last step (or `stop_at_step`) is done and saved, EXIT_REQUEUE after a signal, EXIT_DIVERGED when too
        many steps in a row were not finite, in one of the runs at least.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    corpus, report = _report(recipes, ds_config, world_size, compare=world_size > 1 and not skip_preflight)
    process_group.init_distributed(report, on_loss=on_loss)
    chosen = ranks.decided_by_rank_0(lambda: company.still_running(recipes))
    for left_out in (recipe for i, recipe in enumerate(recipes) if i not in chosen):
        _say(f"{left_out.run.output} has given up (its {run_folder.ENDED} says why) and is left out")
    if not chosen:
        return EXIT_DIVERGED
    running = [recipes[i] for i in chosen]
    checkpoints = ranks.decided_by_rank_0(lambda: company.find_checkpoints(running, corpus, resume))
    with (
        _claimed([Path(recipe.run.output) for recipe in running]),
        contextlib.closing(Distillation(running, ds_config, corpus, checkpoints)) as run,
    ):
        if compile_layers:
            run.compile_layers()
        on_start()
        rank = dist.get_rank()
        with profiler(run.runs[0].output, rank) if profile else contextlib.nullcontext() as tracer:
            code = run.train(stop_at_step, after_step=tracer.step if tracer else lambda: None)
    return EXIT_DIVERGED if code == 0 and len(running) < len(recipes) else code


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def check_all(recipes: Sequence[Recipe], ds_config: dict[str, Any], *, world_size: int) -> Corpus:
    """Refuse what cannot run, and return the corpus of all recipes; see `preflight.check` and `company.check`."""
    company.check(recipes, ds_config)
    return preflight.check(recipes, ds_config, world_size=world_size)


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
    recipes: Sequence[Recipe], ds_config: dict[str, Any], world_size: int, *, compare: bool
) -> tuple[Corpus | None, Report]:
    """The corpus, and what this rank tells the others: a mistake, or what must be the same for all."""
    host = socket.gethostname()
    try:
        corpus = check_all(recipes, ds_config, world_size=world_size)
        return corpus, Report(host=host, facts=preflight.facts(recipes, ds_config, corpus) if compare else {})
    except (UserError, OSError) as error:
        if world_size == 1:
            raise
        return None, Report(host=host, mistake=words_of(error))


@contextlib.contextmanager
def _claimed(outputs: Sequence[Path]) -> Iterator[None]:
    """The runs' folders held by rank 0 for all ranks, which see that they are the same ones."""
    with contextlib.ExitStack() as held:

        def claim() -> list[str]:
            return [held.enter_context(contextlib.closing(run_folder.Claim(output))).run for output in outputs]

        runs = ranks.decided_by_rank_0(claim)
        ranks.all_agree(lambda: [run_folder.check_shared(*pair) for pair in zip(outputs, runs, strict=True)])
        yield
