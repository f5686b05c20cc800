"""Commands on runs: to plan, to train, to compare."""

import sys
from pathlib import Path

import click

from launch.commands.console import console

_RECIPE_OPTIONS = [
    click.option(
        "--recipe",
        "recipes",
        required=True,
        multiple=True,
        help="A shipped recipe's name or a TOML file; several train side by side.",
    ),
    click.option(
        "--vary", multiple=True, metavar="KEY=V1,V2", help="A run for each value, side by side; may be repeated."
    ),
    click.option("--ds-config", default="auto", show_default=True, help="A shipped configuration or a JSON file."),
    click.option("--resume", default="auto", show_default=True, help="auto (newest whole checkpoint), never, or STEP."),
    click.option("--stop-at", type=click.IntRange(min=1), help="Save and leave after this step."),
    click.option("--profile", is_flag=True, help="Write a trace of a few steps to RUN/profile."),
    click.option("--compile", "compile_layers", is_flag=True, help="Run the layers through torch.compile."),
    click.option("--skip-preflight", is_flag=True, help="Start though machines differ in versions or settings."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
]


def _picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".svg":
        raise click.BadParameter(f"{path}: the picture is an SVG, so give a name that ends in .svg")
    return path


def recipe_options(command):
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


@click.command()
@recipe_options
@click.option("--num-gpus", type=click.IntRange(min=1), help="Ranks on this machine; without GPUs, CPU processes.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="After a crash.")
@click.option(
    "--master-port", "--master_port", type=click.IntRange(1, 65535), help="Where ranks meet.  [default: a free one]"
)
def distill(recipes, vary, ds_config, resume, overrides, num_gpus, max_restarts, master_port, **options) -> None:
    """Distill students on this machine: checks everything, then runs `deepspeed launch/distill.sh`.

    \b
    Examples:
      minilm distill --recipe demo --num-gpus 2
      minilm distill --recipe my.toml optimizer.peak_lr=3e-4 run.output=/data/run2
      minilm distill --recipe roberta-large-12x384 --recipe roberta-large-6x384
      minilm distill --recipe my.toml --vary teacher.layer=17,19,21 --vary relations.heads=24,48
    """
    from launch import supervise
    from pipeline.engine import deepspeed_config, process_group
    from pipeline.recipes import load_recipes
    from pipeline.training import company, job

    checked = load_recipes(recipes, overrides, vary)
    settings, ranks = deepspeed_config.read_ds_config(ds_config), num_gpus or process_group.local_devices()
    corpus = job.check_all(checked, settings, world_size=ranks)
    company.find_checkpoints([checked[i] for i in company.still_running(checked)], corpus, resume)
    arguments = [word for name in recipes for word in ("--recipe", name)]
    arguments += [word for values in vary for word in ("--vary", values)]
    arguments += ["--ds-config", ds_config, "--resume", resume, *overrides]
    arguments += ["--stop-at", str(options["stop_at"])] if options["stop_at"] else []
    arguments += ["--profile"] if options["profile"] else []
    arguments += ["--compile"] if options["compile_layers"] else []
    arguments += ["--skip-preflight"] if options["skip_preflight"] else []
    arguments += ["--num_gpus", str(num_gpus)] if num_gpus else []
    arguments += ["--master_port", str(master_port or process_group.free_port())]
    sys.exit(supervise.launch([*arguments, "--max-restarts", str(max_restarts)]))


@click.command()
@click.option("--recipe", "recipes", multiple=True, required=True, help="May be repeated: students side by side.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=1, show_default=True, help="Devices of each.")
@click.option("--gpu", default="this-machine", show_default=True, help="h100-sxm, a100-pcie-80gb, ... or cpu.")
@click.option("--ds-config", default="auto", show_default=True, help="auto compares the shipped ones.")
@click.option("--students", type=click.IntRange(min=1), default=1, show_default=True, help="So many of each recipe.")
@click.option("--vocabulary", type=click.IntRange(min=1), metavar="N", help="Tokens of a trimmed vocabulary.")
@click.option("--text", metavar="SIZE", help="Of the corpus, such as 2.4TB, while it is not prepared.")
@click.option(
    "--network",
    "network_gbit",
    type=click.FloatRange(min=0.1),
    default=400,
    show_default=True,
    help="Gbit/s of each device to other machines.",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of a GPU-hour.")
@click.option("--plot", type=click.Path(path_type=Path), callback=_picture, help="Scaling curve, .svg.")
@click.option("--write", type=click.Path(path_type=Path), help="The chosen DeepSpeed configuration, .json.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="All of it as values.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def plan(recipes, overrides, price, plot, write, as_json, **options) -> None:
    """Say what a run will take: memory, time, cost, disk. Needs no GPU, weights, hub or corpus.

    \b
    Examples:
      minilm plan --recipe xlmr-large-12x384 --nodes 4 --gpus-per-node 8 --gpu h100-sxm --price 2.5
      minilm plan --recipe demo --gpu cpu --gpus-per-node 2
      minilm plan --recipe bert-base-6x384 --gpu a100-sxm-80gb --write ds.json --plot scaling.svg
    """
    from pipeline.planning import request
    from pipeline.recipes import load_recipe

    planner, made = request.plan_for([load_recipe(recipe, overrides) for recipe in recipes], **options)
    request.deliver(planner, made, console(), price=price, plot=plot, write=write, as_json=as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--plot", type=click.Path(path_type=Path), callback=_picture, help="Losses against tokens and time, .svg."
)
def compare(runs: tuple[Path, ...], plot: Path | None) -> None:
    """Say in what runs differ, and what came of it.

    \b
    Examples:
      minilm compare runs/study/*
      minilm compare runs/a runs/b --plot study.svg
    """
    from data_prep import durable
    from pipeline.results import compare as comparison
    from pipeline.results import curves

    outcomes = comparison.read(runs)
    console().print(comparison.table(outcomes))
    if plot:
        durable.write(plot, curves.picture(outcomes))
        click.echo(f"curves: {plot}")
