"""One rank of a job, whoever started it: from the command line to the exit code."""

import os
import socket
import sys

import click

from data_prep.errors import UserError, words_of
from launch.cli import EXIT_USER_ERROR, quiet_libraries
from launch.commands.runs import recipe_options
from launch.starters import carried_variables, rank_variables
from launch.status import RankStatus, end_process
from launch.streams import outlive_the_terminal


@click.command()
@recipe_options
@click.option("--local_rank", "--local-rank", hidden=True)
@click.option("--job", hidden=True)
@click.option("--num_gpus", "--num-gpus", hidden=True)
@click.pass_obj
def _distill_rank(status, recipes, vary, ds_config, resume, overrides, stop_at, num_gpus, **options) -> int:
    from pipeline.engine import deepspeed_config, process_group
    from pipeline.recipes import load_recipes
    from pipeline.training import job as jobs

    if num_gpus:
        raise UserError("--num_gpus belongs to the launcher: deepspeed --num_gpus 2 launch/distill.sh --recipe ...")
    try:
        given = load_recipes(recipes, overrides, vary), deepspeed_config.read_ds_config(ds_config)
    except (UserError, OSError) as error:
        jobs.fail_together(error)
    wanted = {name: options[name] for name in ("profile", "compile_layers", "skip_preflight")}
    hooks = dict(on_start=status.running, on_loss=status.end)
    with process_group.sharing_fate():
        code = jobs.distill(*given, resume=resume, stop_at_step=stop_at, **hooks, **wanted)
        process_group.leave_process_group()
    return code


def distill_rank() -> None:
    """One rank of `launch/distill.sh`, started by deepspeed, torchrun or srun."""
    quiet_libraries()
    outlive_the_terminal()
    try:
        os.environ.update(carried_variables(os.environ))
        os.environ.update(rank_variables(os.environ))
    except UserError as error:
        click.echo(f"distill: error: {error}", err=True)
        sys.exit(EXIT_USER_ERROR)
    status = RankStatus()
    try:
        code = _distill_rank.main(prog_name="distill.sh", standalone_mode=False, obj=status)
    except (UserError, OSError, click.ClickException) as error:
        words = error.format_message() if isinstance(error, click.ClickException) else words_of(error)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            words += f" [rank {os.environ.get('RANK')} on {socket.gethostname()}]"
        status.end(words, EXIT_USER_ERROR)
    status.write(code)
    end_process(code)
