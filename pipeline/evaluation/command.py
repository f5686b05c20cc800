"""`minilm evaluate`: a run's student, or any model, scored without labels or on tasks."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep import samples
from data_prep.errors import UserError
from pipeline import provenance
from pipeline.evaluation import contestants, design, labelfree, progress, report, results, study
from pipeline.results.export import add_scores, exported
from pipeline.shipping import card
from pipeline.tasks import metrics
from pipeline.tasks.probe import PROBE_TEXTS, read_probe
from pipeline.tasks.table import Task, find_tasks, with_epochs
from pipeline.training.run_folder import FinishedRun


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        model: a run's folder, a model's, or an id of the hub.
        step: of the run's checkpoint; None: the newest whole one.
        against: other models.
        tasks: names with commas between; None: what needs no labels.
        data: folder of the tasks' files; None: the hub.
        learning_rates, seeds, epochs, limit: None: as the tasks and `quick` say.
        out: folder of records and results; None: `evaluation/` of the run, or below the home folder.
        probe, texts: of the linear probe.
    """

    model: str
    step: int | None = None
    against: tuple[str, ...] = ()
    tasks: str | None = None
    data: Path | None = None
    quick: bool = False
    learning_rates: tuple[float, ...] | None = None
    seeds: int | None = None
    epochs: int | None = None
    limit: int | None = None
    out: Path | None = None
    probe: Path | None = None
    texts: int = PROBE_TEXTS

    def run(self) -> FinishedRun | None:
        """The run that is asked about; None for a model."""
        folder = Path(self.model).expanduser()
        if (folder / "config.json").is_file() or (not folder.exists() and self.step is None):
            return None
        return FinishedRun.open(folder, self.step)

    def options(self) -> design.Options:
        """How much is spent: what was given, and for the rest what is usual."""
        usual = design.QUICK if self.quick else design.Options()
        return design.Options(
            data=self.data,
            learning_rates=self.learning_rates or usual.learning_rates,
            seeds=self.seeds or usual.seeds,
            limit=self.limit,
        )


def without_labels(request: Request) -> labelfree.Scores:
    """Score without labels; a run's scores are written into its exported folder and its card."""
    run = request.run()
    probe = read_probe(request.probe, texts=request.texts) if request.probe else None
    if run is None:
        return labelfree.of_models(contestants.named([request.model, *request.against]), probe=probe)
    scores = labelfree.of_run(run, exported(run), contestants.named(request.against), probe=probe)
    add_scores(run, {**asdict(scores), "measures": labelfree.describe(scores)})
    return scores


def on_tasks(
    request: Request,
    *,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    plan_only: bool = False,
    say: Callable[[str], None] = progress.say,
) -> results.Results | None:
    """Fine-tune and score all models on all tasks; None if only the plan was asked for.

    Raises:
        UserError: a mistake in the request or the data, before anything is trained.
    """
    metrics.require_libraries()
    tasks = [with_epochs(task, request.epochs) for task in find_tasks(request.tasks or "")]
    if request.data is not None and not request.data.is_dir():
        raise UserError(f"--data {request.data}: there is no such folder")
    run = request.run()
    out = request.out or _home(request, run)
    design.claim(out)
    folder = exported(run) if run else None
    folders = contestants.of_run(run, folder, out) if run and folder else contestants.named([request.model])
    models = contestants.measure(folders | contestants.named(request.against, taken=folders))
    planned = design.plan(models, tasks, request.options(), out)
    for line in progress.announce(planned, study.records(planned)):
        say(line)
    if plan_only:
        return None
    done = study.run(planned, engine=engine, workers=workers, ray_address=ray_address, say=say)
    student = contestants.STUDENT if run else next(iter(folders))
    origin = (provenance.read(run.folder, run.recipe)[0].teacher, run.recipe.student.shape) if run else None
    found = results.collect(planned, done, student, origin)
    report.write(found, out, run.record.step if run else None)
    if run and folder:
        _add_results(run, folder, found, tasks)
    say(f"records, tables and pictures: {out}")
    return found


def _add_results(run: FinishedRun, folder: Path, found: results.Results, tasks: list[Task]) -> None:
    """The student's scores for its card, beside those of other tasks that were evaluated earlier."""
    records = report.for_card(found, tasks)
    names = {record["dataset_name"] for record in records}
    earlier = [r for r in card.read_scores(folder).get("results", []) if r["dataset_name"] not in names]
    measures = {
        f"{line.task} {line.split}, {line.metric}, {name}": report.percent(score)
        for line in found.lines
        for name, score in line.models.items()
        if name in (contestants.TEACHER, contestants.UNTRAINED)
    }
    add_scores(run, {"results": [*earlier, *records], "measures": measures})


def _home(request: Request, run: FinishedRun | None) -> Path:
    if run:
        return run.folder / "evaluation"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", request.model.strip("./")) or "model"
    return samples.home() / "evaluation" / name
