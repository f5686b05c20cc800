"""Every shipped DeepSpeed configuration, on one rank and on two: train, stop, resume, move on, export, score.

The runs are those of a toy teacher, trained one after another in one process group a number of ranks, as far as the
tests that were asked for look at them. What CPUs and GPUs take by default, and ZeRO-3, are tested fast, the others are
slow tests. On a machine with GPUs the same cases run on them (`pytest -m gpu`), on one and on as many as there are.
"""

import contextlib
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from data_prep.shards import Corpus
from pipeline.data.loader import Loader
from pipeline.engine.checkpoint import read_weights
from pipeline.engine.records import find
from pipeline.engine.student import learning_rate_factor
from pipeline.evaluation.command import Request, without_labels
from pipeline.recipes import load_recipe
from pipeline.results import report
from pipeline.results.export import export
from pipeline.shipping.huggingface import load_exported
from pipeline.training.build import data_options
from pipeline.training.metrics import read_metrics
from pipeline.training.run_folder import FinishedRun
from tests import toy
from tests.jobs import NAMES, RUNNABLE, precision, settings, train
from tests.read import losses_of

STEPS = 4
# How far a curve may be from that of fp32 without ZeRO, relative: what the precision gives, not the stage.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}


EVERYDAY = ("cpu", "zero1", "zero3")  # what CPUs and GPUs take by default, and the most partitioned
RANKS = (1, 2) if not torch.cuda.is_available() or torch.cuda.device_count() > 1 else (1,)


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log-*.txt")))


@pytest.fixture(scope="module")
def toy_run(samples, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("stages")
    overrides = [o for o in toy.make(folder, samples.leads()) if not o.startswith(("optimizer.steps", "checkpoint."))]
    return folder, [*overrides, f"optimizer.steps={STEPS}", "checkpoint.every_steps=2", "student.dropout=0.0"]


@pytest.fixture(scope="module")
def trained(toy_run, request) -> Path:
    """Runs NAME-RANKS unbroken, and made from their middle: NAME-RANKS-resumed, -other-ranks and -next.

    Of those names and ranks that tests of this session have; and what they are compared with.
    """
    folder, overrides = toy_run
    params = [item.callspec.params for item in request.session.items if "name" in parameters_here(item, request.path)]
    asked = {(found["name"], found.get("ranks", RANKS[-1])) for found in params}
    needed = {"fp32-stage0", *(name for name, _ in asked)}
    for ranks in RANKS:
        names = [name for name in RUNNABLE if name in needed]
        _train_apart(folder, ranks, [_job(overrides, f"{name}-{ranks}", name) for name in names])
    for ranks in RANKS:
        jobs = []
        for name in (name for name in RUNNABLE if (name, ranks) in asked):
            here, there = f"{name}-{ranks}", f"{name}-{3 - ranks}"
            jobs.append(_job(overrides, f"{here}-resumed", name, copy=here, resume="2"))
            if len(RANKS) > 1:
                jobs.append(_job(overrides, f"{here}-other-ranks", name, copy=there, resume="2"))
            if ranks == RANKS[-1]:
                jobs.append(_job(overrides, f"{here}-next", following(name), copy=here, resume="2"))
        _train_apart(folder, ranks, jobs)
    return folder


def _train_apart(folder: Path, ranks: int, jobs: list[dict]) -> None:
    """Those in fp16 in processes of their own: the last bits of what torch computes in fp16 on a CPU hang on what the
    process has computed before."""
    for is_half in (False, True):
        if chosen := [job for job in jobs if job["config"].get("fp16", {}).get("enabled", False) == is_half]:
            train(folder, ranks, chosen)


def parameters_here(item: pytest.Item, path: Path) -> dict:
    """Those of a test of this file; none if it has none, or lies elsewhere."""
    return item.callspec.params if item.path == path and hasattr(item, "callspec") else {}


def following(name: str) -> str:
    return RUNNABLE[(RUNNABLE.index(name) + 1) % len(RUNNABLE)]


def _job(overrides: list[str], run: str, name: str, **start: str) -> dict:
    return dict(run=run, config=settings(name), overrides=overrides, **start)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(run / "checkpoints" / f"step-{STEPS:08d}")


def case(name: str, *ranks: int):
    """The values of a test's parameters, with marks."""
    marks = [] if name in EVERYDAY and ranks in ((), RANKS[-1:]) else [pytest.mark.slow]
    if name not in RUNNABLE:
        marks.append(pytest.mark.skip(reason="DeepSpeed has no fp16 on this processor"))
    return pytest.param(name, *ranks, marks=marks)


pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.mark.parametrize(("name", "ranks"), [case(name, ranks) for name in NAMES for ranks in RANKS])
class TestEveryConfiguration:
    def test_follows_the_curve_of_fp32_without_zero(self, name, ranks, trained):
        reference, ours = losses_of(trained / f"fp32-stage0-{ranks}"), losses_of(trained / f"{name}-{ranks}")
        assert len(ours) == STEPS and ours[STEPS] < ours[1]
        assert ours == pytest.approx(reference, rel=TOLERANCE[precision(name)])
        norms = [record["gradient_norm"] for record in read_metrics(trained / f"{name}-{ranks}", "train")]
        expected = [r["gradient_norm"] for r in read_metrics(trained / f"fp32-stage0-{ranks}", "train")]
        assert norms == pytest.approx(expected, rel=10 * TOLERANCE[precision(name)]) and min(norms) > 0

    def test_resumes_bit_for_bit(self, name, ranks, trained):
        unbroken, resumed = trained / f"{name}-{ranks}", trained / f"{name}-{ranks}-resumed"
        assert losses_of(resumed) == losses_of(unbroken)
        ours, theirs = last_weights(resumed), last_weights(unbroken)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)

    @pytest.mark.skipif(len(RANKS) == 1, reason="a rank needs a GPU of its own, and there is one")
    def test_goes_on_with_another_number_of_ranks(self, name, ranks, trained):
        moved, unbroken = trained / f"{name}-{ranks}-other-ranks", trained / f"{name}-{3 - ranks}"
        assert all(losses_of(moved)[step] == losses_of(unbroken)[step] for step in (1, 2))
        _close(moved, unbroken, precision(name))

    def test_is_inspected_exported_and_scored(self, name, ranks, trained):
        run = trained / f"{name}-{ranks}"
        lines = Console(width=200)
        with lines.capture() as shown:
            report.show(run, lines)
        assert shown.get().count("whole") == 2 and "torn" not in shown.get()
        exported = load_exported(export(FinishedRun.open(run))).state_dict()
        weights = last_weights(run)
        assert all(torch.equal(exported[key], weights[f"backbone.{key}"]) for key in exported)
        trained_names = [key for key in weights if key.endswith("layer.0.attention.self.query.weight")]
        rounded = [torch.equal(weights[key], weights[key].bfloat16().float()) for key in trained_names]
        assert trained_names and not any(rounded)  # the fp32 master, not what the model computes with


@pytest.mark.parametrize("name", map(case, NAMES))
def test_goes_on_with_the_next_configuration(name, trained):
    """On the most ranks only: their number changes in the test above."""
    coarser = max(precision(name), precision(following(name)), key=lambda kind: TOLERANCE[kind])
    _close(trained / f"{name}-{RANKS[-1]}-next", trained / f"{name}-{RANKS[-1]}", coarser)


def _close(run: Path, unbroken: Path, kind: str) -> None:
    """The same curve, and the same weights up to the order of sums, or the precision."""
    assert losses_of(run) == pytest.approx(losses_of(unbroken), rel=TOLERANCE[kind])
    ours, theirs = last_weights(run), last_weights(unbroken)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-4 if kind == "fp32" else 1e-2)


@pytest.mark.parametrize("name", ["cpu", "zero1"])
def test_scores_of_a_run(name, trained):
    scores = without_labels(Request(model=str(trained / f"{name}-{RANKS[-1]}")))
    assert scores.held_out.keys() == {"qq", "kk", "vv"}
    assert all(after < before for before, after in scores.held_out.values())


@pytest.mark.parametrize("name", ["zero1"])
def test_going_back_sets_later_checkpoints_aside(name, trained):
    run = trained / f"{name}-{RANKS[-1]}-resumed"
    (aside,) = (run / "aside").iterdir()
    assert {path.name for path in aside.iterdir()} == {f"step-{STEPS:08d}", "metrics.jsonl"}
    assert [r["step"] for r in read_metrics(aside, "train")] == [1, 2, 3, 4]
    assert find(run / "checkpoints", "auto").step == STEPS
    assert f"went back to step 2: the checkpoints of later steps are now in {aside}" in log_of(trained)


@pytest.fixture(scope="module")
def spoilt(toy_run) -> dict[str, Path]:
    """Runs whose teacher has NaN in the embedding of a token that only some batches hold."""
    folder, overrides = toy_run
    teacher = shutil.copytree(folder / "teacher", folder / "spoilt-teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][token_of_two_steps(overrides, steps=8)] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    names = ["fp32-stage0", "zero0", "zero1", "zero2", "zero3", "fp32-stage3"]
    more = ["optimizer.steps=8", f"teacher.model={teacher}", "logging.validation_samples=2"]
    train(folder, RANKS[-1], [_job([*overrides, *more], f"{name}-spoilt", name) for name in names])
    return {name: folder / f"{name}-spoilt" for name in names}


def token_of_two_steps(overrides: list[str], steps: int) -> int:
    """A token that two of the first global batches hold."""
    recipe = load_recipe("demo", overrides)
    size = recipe.optimizer.global_batch_samples
    loader = Loader(
        Corpus.open(recipe.data.corpus), data_options(recipe), global_batch_samples=size, micro_batch_samples=size
    )
    with contextlib.closing(loader):
        batches = [set(batch.input_ids.flatten().tolist()) for batch in itertools.islice(loader, steps)]
    return next(token for token in sorted(set.union(*batches)) if sum(token in batch for batch in batches) == 2)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_alike_at_every_stage(spoilt, toy_run):
    """NaN in one micro-batch of one rank: no rank steps, the count and the learning rate go on, weights stay finite."""
    folder, _ = toy_run
    skipped = {name: [r["step"] for r in read_metrics(run, "skipped")] for name, run in spoilt.items()}
    assert len(skipped["zero1"]) == 2
    assert all(steps == skipped["zero1"] for steps in skipped.values()), skipped
    options = load_recipe(str(spoilt["zero1"] / "recipe.toml")).optimizer
    rates = [options.peak_lr * learning_rate_factor(step, options) for step in range(8)]
    for run in spoilt.values():
        records = read_metrics(run, "train")
        assert [record["lr"] for record in records] == pytest.approx(rates)
        assert records[-1]["skipped_steps"] == len(skipped["zero1"])
        weights = read_weights(run / "checkpoints" / "step-00000008")
        assert all(weight.isfinite().all() for weight in weights.values())
    assert "the teacher's own queries, keys or values of layer 3 are not finite" in log_of(folder)
