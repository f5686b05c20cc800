"""Commands on what has been learned: a folder to hand over, and scores."""

from pathlib import Path

import click

from data_prep.errors import UserError
from launch.commands.console import console


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), help="Of the checkpoint; the newest whole one by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; RUN/export by default.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the weights.  [default: fp32]")
@click.option(
    "--sentence-transformers/--no-sentence-transformers", default=None, help="What that library wants, mean pooling."
)
@click.option("--onnx/--no-onnx", default=None, help="ONNX in fp32 and int8, compared and timed (extra `onnx`).")
@click.option("--push-to-hub", metavar="REPO", help="Upload to NAME or OWNER/NAME on the hub, private if it is new.")
@click.option("--public", is_flag=True, help="With --push-to-hub: a new repository can be seen by all.")
def export(run: Path, step: int | None, out: Path | None, push_to_hub: str | None, public: bool, **options) -> None:
    """Turn a run's checkpoint into a Hugging Face folder with model, tokenizer, licence and model card.

    Exported again, a folder holds what it held before, unless something else is said.

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
    click.echo(f"step {finished.record.step} of {run} -> {folder} ({exporter.contents(folder)})")
    for remark in exporter.remarks(finished, folder):
        console().print(remark)
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


@click.command()
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
        console().print(table)
