"""The command `minilm`: thin wrappers that read arguments, call one function and print what it returns."""

import os
import sys
import warnings
from pathlib import Path

import click

from data_prep.errors import UserError, words_of

EXIT_USER_ERROR = 2


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    quiet_libraries()
    try:
        minilm.main(prog_name="minilm", standalone_mode=False)
    except (UserError, OSError) as error:
        click.echo(f"minilm: error: {words_of(error)}", err=True)
        sys.exit(EXIT_USER_ERROR)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        click.echo("minilm: interrupted", err=True)
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="minilmv2-deepspeed")
def minilm() -> None:
    """Distill small encoders from large ones (MiniLMv2) with DeepSpeed.

    \b
    minilm samples                                     real text and a real teacher to try it on
    minilm prepare --tokenizer T --source ... --out C  text -> token shards
    minilm plan --recipe R --gpu G                     what that will take: memory, time, cost
    minilm distill --recipe R                          shards + teacher -> checkpoints
    minilm export RUN                                  checkpoint -> Hugging Face model
    minilm evaluate RUN_OR_MODEL                       exported model -> scores, on tasks if asked
    minilm compare RUN...                              runs side by side: what differs, what came of it
    minilm inspect PATH                                what is in a corpus or a run
    """


@minilm.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder; $MINILM_HOME/samples by default.")
def samples(out: Path | None) -> None:
    """Fetch the sample teacher and texts (120 MB), or make sure that they are whole.

    \b
    Example:
      minilm samples
    """
    from data_prep import samples as store

    store.fetch(out)


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


def recipe_options(command):
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


@minilm.command()
@recipe_options
@click.option("--num-gpus", type=click.IntRange(min=1), help="Ranks on this machine; without GPUs, CPU processes.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="After a crash.")
def distill(recipes, vary, ds_config, resume, overrides, num_gpus, max_restarts, **options) -> None:
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
    sys.exit(supervise.launch([*arguments, "--max-restarts", str(max_restarts)]))


@minilm.command()
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
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the scaling curve, .svg.")
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
    request.deliver(planner, made, _console(), price=price, plot=plot, write=write, as_json=as_json)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and start-up notes off the terminal; their warnings and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _do_without_torch() -> None:
    """Let this process never import torch, which transformers does for nothing wherever it is: seconds and memory."""
    sys.modules.setdefault("torch", None)


@minilm.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), help="Of the checkpoint; the newest whole one by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; RUN/export by default.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--sentence-transformers", is_flag=True, help="Add what that library wants, with mean pooling.")
@click.option("--onnx", is_flag=True, help="Add ONNX files in fp32 and int8, compared and timed (extra `onnx`).")
@click.option("--push-to-hub", metavar="REPO", help="Upload to NAME or OWNER/NAME on the hub, private if it is new.")
@click.option("--public", is_flag=True, help="With --push-to-hub: a new repository can be seen by all.")
def export(run: Path, step: int | None, out: Path | None, push_to_hub: str | None, public: bool, **options) -> None:
    """Turn a run's checkpoint into a Hugging Face folder with model, tokenizer, licence and model card.

    \b
    Examples:
      minilm export runs/demo/run
      minilm export runs/demo/run --dtype bf16 --out /models/student
      minilm export runs/demo/run --sentence-transformers --onnx --push-to-hub me/my-student
    """
    from pipeline.results import export as exporter
    from pipeline.shipping import hub
    from pipeline.training.run_folder import FinishedRun

    if public and not push_to_hub:
        raise UserError("--public says how a new repository is seen: give --push-to-hub REPO too")
    if push_to_hub:
        hub.check_name(push_to_hub)
    finished = FinishedRun.open(run, step)
    folder = exporter.export(finished, out, exporter.Options(**options))
    click.echo(f"step {finished.record.step} of {run} -> {folder}")
    for remark in exporter.remarks(finished, folder):
        _console().print(remark)
    if push_to_hub:
        click.echo(f"pushed to {hub.push(folder, push_to_hub, public=public)}")


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Learning rates with commas between them."""
    try:
        found = tuple(float(part) for part in text.split(",")) if text is not None else None
    except ValueError:
        raise click.BadParameter(f"{text!r} is not such as 5e-5,1e-4") from None
    if found is not None and not all(0 < number < 1 for number in found):
        raise click.BadParameter(f"{text!r} holds a number that is no learning rate: expected such as 5e-5,1e-4")
    return None if found is None else tuple(sorted(set(found)))


@minilm.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@click.option("--step", type=click.IntRange(min=1), help="Of the run's checkpoint; the newest whole one by default.")
@click.option("--against", multiple=True, metavar="MODEL", help="Another model to compare with; may be repeated.")
@click.option("--tasks", help="Fine-tune on these, such as sst2,rte or NAME:KIND for files of your own.")
@click.option("--data", type=click.Path(path_type=Path), help="DIR/<task>/train.*, validation.*, test.*; else the hub.")
@click.option("--quick", is_flag=True, help="One learning rate and three seeds.")
@click.option("--lr", "learning_rates", callback=_numbers, metavar="A,B,...", help="Learning rates of the grid.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many.  [default: 5]")
@click.option("--epochs", type=click.IntRange(min=1), help="Over the training split.  [default: 3, small tasks 10]")
@click.option("--limit", type=click.IntRange(min=1), help="Train on at most so many examples of a task.")
@click.option("--out", type=click.Path(path_type=Path), help="Records and results.  [default: RUN/evaluation]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results there too.")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done and how long it would take.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), help="Units at a time.  [default: one a GPU, else one]")
@click.option("--ray-address", help="Ray cluster to join; RAY_ADDRESS or a new local one by default.")
@click.option("--probe", type=click.Path(path_type=Path), help="Labelled texts, JSONL: `text`, `topic` or `label`.")
@click.option("--texts", type=click.IntRange(min=4), default=1200, show_default=True, help="Labelled texts to take.")
def evaluate(json_file, plan_only, engine, workers, ray_address, **asked) -> None:
    """Say how good a student is: against its teacher, against itself before its first step, against others.

    Without --tasks only what needs no fine-tuning. With --tasks every model is fine-tuned with the same budget; killed
    at any moment, the same command goes on. Needs the extra `eval`. Kinds of your own tasks: text, pair, regression,
    tokens, span, retrieval.

    \b
    Examples:
      minilm evaluate runs/demo/run --probe runs/samples/leads-en.jsonl
      minilm evaluate runs/demo/run --tasks sst2,rte --data glue/ --quick
      minilm evaluate runs/demo/run --tasks reviews:text --data my/ --against nreimers/MiniLM-L3-H384-uncased
      minilm evaluate ./my-model --tasks xnli,mlqa --engine ray
    """
    from data_prep import durable
    from pipeline.evaluation import command, labelfree, report

    request = command.Request(**asked)
    if request.tasks is None:
        scores = command.without_labels(request)
        text, tables = labelfree.as_json(scores), labelfree.tables(scores)
    else:
        where = dict(engine=engine, workers=workers, ray_address=ray_address)
        found = command.on_tasks(request, plan_only=plan_only, **where)
        if found is None:
            return
        text, tables = report.as_json(found), report.tables(found)
    if json_file:
        durable.write(json_file, text)
    for table in tables:
        _console().print(table)


@minilm.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the losses against tokens and time, .svg.")
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
    _console().print(comparison.table(outcomes))
    if plot:
        durable.write(plot, curves.picture(outcomes))
        click.echo(f"curves: {plot}")


def _console():
    from rich.console import Console

    # Names of files and sources are shown as they are: brackets in them are no markup.
    return Console(width=None if sys.stdout.isatty() else 120, markup=False)


@minilm.command()
@click.option("--tokenizer", help="The teacher: its tokenizer makes the tokens.")
@click.option("--source", "source_texts", multiple=True, metavar="KIND[,OPTION=VALUE]:PATH", help="May be repeated.")
@click.option("--corpus", type=click.Path(path_type=Path), help="A TOML file with tokenizer, options and sources.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the corpus.")
@click.option("--validation", type=float, help="Share of documents held out, chosen by their hash.  [default: 0]")
@click.option("--min-tokens", type=int, help="Drop shorter documents.  [default: 1]")
@click.option("--limit", type=int, help="At most so many documents of each source.")
@click.option("--shard-bytes", metavar="SIZE", help="Size of a shard, such as 500MB.  [default: 1GB]")
@click.option("--on-bad-record", type=click.Choice(["stop", "skip"]), help="skip counts them.  [default: stop]")
@click.option("--encoder", type=click.Choice(["auto", "reference"]), help="reference is slow.  [default: auto]")
@click.option(
    "--workers",
    type=int,
    help="Processes (0: the command's own), or tasks at a time.  [default: all cores; 0 for little input]",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--ray-address", help="Ray cluster to join; RAY_ADDRESS or a new local one by default.")
def prepare(out, source_texts, corpus, shard_bytes, workers, engine, ray_address, **options) -> None:
    """Turn text into token shards. Killed at any moment, the same command goes on.

    \b
    Kinds of source, with the options they take:
      wikipedia   dumps (.xml.bz2), or Parquet with a column `text`
      bookcorpus  a folder of one .txt a book, or Parquet with a sentence a row
      cc100       xx.txt.xz, a shard folder for each language
      jsonl, parquet, text, hub   field=, language=, name=, documents=file|paragraph|line, config=, split=
    \b
    Examples:
      minilm prepare --tokenizer runs/samples/all-MiniLM-L6-v2 --out runs/corpus --validation 0.02 \\
          --source wikipedia:runs/samples/enwiki-sample.xml.bz2 --source jsonl:runs/samples/leads-en.jsonl
      minilm prepare --tokenizer xlm-roberta-large --out /data/cc100-tokens --source 'cc100:/data/cc100/*.txt.xz'
      minilm prepare --corpus corpus.toml --out /data/corpus --engine ray
    """
    _do_without_torch()
    from data_prep.prepare import prepare as run
    from data_prep.request import request_from

    options["shard_bytes"] = shard_bytes
    request = request_from(corpus, source_texts, **options)
    made = run(request, out, workers=workers, engine=engine, ray_address=ray_address)
    shards = made.manifest.shards
    click.echo(f"{out}: {sum(s.documents for s in shards):,} documents, {sum(s.tokens for s in shards):,} tokens")


@minilm.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Decode N documents (corpus).")
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of lengths and languages, .svg (corpus).")
def inspect(path: Path, sample: int | None, verify: bool, plot: Path | None) -> None:
    """Say what is in a corpus or in a run.

    \b
    Examples:
      minilm inspect runs/demo/corpus
      minilm inspect runs/demo/corpus --verify --sample 3 --plot corpus.svg
      minilm inspect runs/demo/run --verify
    """
    _do_without_torch()
    if sample or plot or (path / "manifest.json").is_file() or (path / ".work").is_dir():
        from data_prep import report as corpus_report
        from data_prep.shards import Corpus

        corpus_report.show(Corpus.open(path), _console(), sample=sample, verify=verify, plot=plot)
    else:
        from pipeline.results import report as run_report

        _console().print(run_report.table(path, verify=verify))
