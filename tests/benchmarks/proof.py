"""What makes a student good: studies of a real teacher, each one run with students side by side, scored on real labels.

    python tests/benchmarks/proof.py QUESTION ... [--steps 1000]                    # of questions.py
    python tests/benchmarks/proof.py equal-time --peer-python PEER/bin/python       # see peer.py
    python tests/benchmarks/proof.py pairs --override student.shape=6x384 --override relations.heads=24

For each study: a corpus of the samples with the teacher's tokenizer; `bash launch/distill.sh --vary ...`; every student
exported; then `minilm evaluate` on film reviews and on topics of Wikipedia's leads, frozen (a linear probe, on all
texts) and fine-tuned (3 seeds, the first `--limit` training texts), beside the teacher and the students before their
first step; `baselines` also beside a model of the same shape that learned masked words from the same samples
(masked_words.py). Killed anywhere, the same command goes on. The tables are printed, and kept in
$MINILM_HOME/proof/STUDY.

The texts of the topics are part of the corpus (their labels are not); the reviews are not.
"""

import argparse
import os
import subprocess
from pathlib import Path

import labelled
import masked_words
import peer
import teachers
from questions import QUESTIONS, Question
from rich.console import Console
from rich.table import Table

from data_prep import durable, samples
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from pipeline.encoders.models import teacher_config
from pipeline.evaluation import contestants, design, labelfree, report, results, study
from pipeline.recipes import load_recipes
from pipeline.results.export import export, exported
from pipeline.tasks import probe
from pipeline.tasks.table import find_tasks
from pipeline.training.run_folder import FinishedRun, short_names

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "distill.sh"
TEACHERS = {
    samples.TEACHER: lambda: samples.fetch() / samples.TEACHER,
    teachers.NAME: teachers.mpnet_base,
    teachers.E5: teachers.multilingual_e5_small,
}
SELDOM = ["checkpoint.every_steps=1000", "logging.every_steps=50"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=2000, help="training texts of a fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="of a fine-tuning")
    parser.add_argument("--lr", type=float, default=5e-4, help="of a fine-tuning: small students want a large one")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8000, help="of the linear probe")
    parser.add_argument("--tasks", nargs="+", default=("reviews", "topics"), choices=labelled.KINDS)
    parser.add_argument("--peer-python", help="interpreter with bertdistiller")
    parser.add_argument("--without-teacher", action="store_true", help="do not fine-tune it, which takes longest")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of all recipes")
    parser.add_argument("--out", type=Path, default=samples.home() / "proof")
    options = parser.parse_args()
    if not options.peer_python and any(QUESTIONS[name].peer for name in options.questions):
        parser.error("equal-time wants --peer-python, an interpreter with bertdistiller: see tests/benchmarks/step.py")
    for name in options.questions:
        answer(name, QUESTIONS[name], options)


def answer(name: str, question: Question, options: argparse.Namespace) -> None:
    out = options.out / name
    runs = distill(question, out, options)
    models = contestants_of(question, runs, out, options.steps)
    if question.peer:
        untrained = Path(models[contestants.UNTRAINED])
        trained = peer.train(options.peer_python, FinishedRun.open(runs[0]), untrained, out / "bertdistiller")
        models["bertdistiller"] = str(trained)
    console = Console(record=True, width=160)
    tasks = question.tasks or options.tasks
    data = labelled.folder(*tasks)
    for task in tasks:
        if labelled.KINDS[task] == "text":
            console.print(frozen(data / task / "train.jsonl", models, options.texts))
    if options.without_teacher or question.teacher == teachers.NAME:  # whose fine-tuning would take hours here
        models = {name: folder for name, folder in models.items() if name != contestants.TEACHER}
    planned = design.plan(
        contestants.measure(models),
        find_tasks(",".join(f"{task}:{labelled.KINDS[task]}" for task in tasks)),
        design.Options(data=data, learning_rates=(options.lr,), seeds=options.seeds, limit=options.limit),
        out / "evaluation",
    )
    found = results.collect(planned, study.run(planned, say=print), next(iter(models)), None)
    report.write(found, out / "evaluation", options.steps)
    console.print(report.markdown(found))
    durable.write(out / "answer.txt", console.export_text())


def distill(question: Question, out: Path, options: argparse.Namespace) -> list[Path]:
    """The runs' folders, trained."""
    teacher = TEACHERS[question.teacher]()
    last = teacher_config(str(teacher)).num_hidden_layers
    words = [f"teacher.model={teacher}", f"teacher.layer={last}", f"data.corpus={corpus(teacher, question)}"]
    words += [*SELDOM, f"optimizer.steps={options.steps}", f"optimizer.warmup_steps={options.steps // 10}"]
    if len(question.scored_at) > 1:
        often = round(options.steps * min(question.scored_at))
        words += [f"checkpoint.every_steps={often}", f"checkpoint.keep_every_steps={often}"]
        topics = labelled.folder("topics") / "topics" / "train.jsonl"
        words += [f"logging.validate_every_steps={often}", f"logging.probe={topics}"]
    words += [*question.overrides, *options.override]
    command = ["bash", SCRIPT, "--num_gpus", options.ranks, "--recipe", "demo"]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks)), **os.environ}
    runs = []
    for name, own in question.apart.items() or [("", [])]:
        vary = [question.vary] if question.vary else []
        given = [*words, *own, f"run.output={out / 'runs' / name}"]
        more = [word for value in vary for word in ("--vary", value)]
        subprocess.run(list(map(str, [*command, *more, *given])), check=True, env=environment)
        runs += [Path(recipe.run.output) for recipe in load_recipes(["demo"], given, vary)]
    return runs


def corpus(teacher: Path, question: Question) -> Path:
    """The samples' Wikipedia with a teacher's tokenizer, in English or in all languages of the tasks."""
    folder, there = samples.home() / "proof" / f"corpus-{teacher.name}", samples.fetch()
    if not (folder / "manifest.json").is_file():
        languages = labelled.LANGUAGES if "transfer" in question.tasks else ("en",)
        texts = [f"wikipedia:{there / samples.ENWIKI}"]
        texts += [f"jsonl,language={name}:{there / samples.LEADS.format(language=name)}" for name in languages]
        sources = tuple(map(Source.parse, texts))
        prepare(PrepareRequest(tokenizer=str(teacher), sources=sources, validation_fraction=0.02), folder)
    return folder


def contestants_of(question: Question, runs: list[Path], out: Path, steps: int) -> dict[str, str]:
    """Folders of the models by name: students by their value, the teacher, and students before their first step."""
    students, untrained, teacher = {}, {}, {}
    for name, folder in zip(short_names(runs), runs, strict=True):
        run, value = FinishedRun.open(folder), name.split("=", 1)[-1]
        found = contestants.of_run(run, exported(run), out)
        students[value] = found[contestants.STUDENT]
        for step in (round(share * steps) for share in question.scored_at[:-1]):
            earlier = export(FinishedRun.open(folder, step), out / "models" / f"{name}-{step}")
            students[f"{value}, {step} steps"] = str(earlier)
        teacher = {contestants.TEACHER: found[contestants.TEACHER]}
        if question.each_untrained or not untrained:
            label = f"untrained, {value}" if question.each_untrained else contestants.UNTRAINED
            untrained[label] = found[contestants.UNTRAINED]
    if question.masked_words:
        untrained["masked words"] = str(masked_words.train(FinishedRun.open(runs[0]).recipe, out / "masked_words"))
    return students | teacher | untrained


def frozen(file: Path, models: dict[str, str], texts: int) -> Table:
    """A linear probe, and the nearest neighbours that the teacher finds too, on labelled texts."""
    first = {contestants.TEACHER: models[contestants.TEACHER]}  # with which neighbours are compared
    train = probe.read_probe(file, texts=texts)
    scores = labelfree.of_models(first | models, probe=train)
    table = Table(
        "model",
        "probe",
        "10 nearest",
        "adjacent halves",
        title=f"{file.parent.name}, frozen ({scores.probe_texts} texts)",
    )
    for name in models:
        values = (scores.probe_accuracy[name], scores.neighbours[name], scores.adjacent[name])
        table.add_row(name, *(f"{100 * value:.1f}" for value in values))
    return table


if __name__ == "__main__":
    main()
