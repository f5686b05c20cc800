"""Real runs: two gloo ranks under DeepSpeed, a real teacher, real text."""

import re
import shutil

import pytest
import torch

from pipeline.engine.checkpoint import read_weights
from pipeline.training.metrics import read_metrics
from pipeline.training.student_run import micro_batch_seed


def losses(folder, kind="train"):
    return [(record["step"], record["loss"], record["per_pair"]) for record in read_metrics(folder, kind)]


def test_six_steps_equal_three_and_three_bit_for_bit(runs):
    assert [step for step, *_ in losses(runs.unbroken)] == [1, 2, 3, 4, 5, 6]
    assert losses(runs.unbroken) == losses(runs.resumed)
    assert losses(runs.unbroken, "validation") == losses(runs.resumed, "validation")
    ours, theirs = (read_weights(folder / "checkpoints" / "step-00000006") for folder in (runs.unbroken, runs.resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_lowers_the_held_out_loss(runs):
    validation = losses(runs.unbroken, "validation")
    assert [step for step, *_ in validation] == [0, 6]
    assert validation[-1][1] < validation[0][1]


def test_output_folder_holds_what_is_promised(runs):
    names = {path.name for path in runs.unbroken.iterdir()}
    assert {"recipe.toml", "deepspeed.json", "model", "checkpoints", "tensorboard", "metrics.jsonl"} <= names
    (events,) = (runs.unbroken / "tensorboard").glob("events.out.tfevents.*")
    assert b"optimizer.steps = 6" in events.read_bytes() and b"train/per_pair/qq" in events.read_bytes()
    assert (runs.unbroken / "checkpoints" / "latest").read_text() == "step-00000006"


def test_checkpoint_of_another_recipe_is_refused_and_kept(runs, distill):
    before = sorted((path, path.stat().st_mtime_ns) for path in runs.unbroken.rglob("*"))
    process = distill(runs.unbroken, "optimizer.peak_lr=5e-4", expect=2)
    assert "optimizer.peak_lr: 0.0005 here, 0.002 there" in process.stderr
    assert "Traceback" not in process.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in runs.unbroken.rglob("*")) == before


def test_seeds_differ_between_steps_micro_batches_ranks_and_runs():
    numbers = [
        (seed, step, number, rank) for seed in (1, 2) for step in range(20) for number in (0, 1) for rank in (0, 3)
    ]
    assert len({micro_batch_seed(*each) for each in numbers}) == len(numbers)
    assert micro_batch_seed(1, 2, 3, 4) == micro_batch_seed(1, 2, 3, 4)


@pytest.mark.slow
def test_several_pairs_of_layers_on_request(distill, tmp_path):
    distill(
        tmp_path / "run", "relations.layers=[[3, 2, 0.5], [6, 3, 1.0]]", "optimizer.steps=2", "optimizer.warmup_steps=1"
    )
    step, loss, parts = losses(tmp_path / "run")[-1]
    assert step == 2 and set(parts) == {"1.qq", "1.kk", "1.vv", "2.qq", "2.kk", "2.vv"}
    weights = {name: 0.5 if name.startswith("1.") else 1.0 for name in parts}
    assert abs(loss - sum(weights[name] * part for name, part in parts.items())) < 1e-5


@pytest.mark.slow
def test_profile_writes_a_trace_and_changes_nothing(runs, distill, tmp_path):
    distill(tmp_path / "run", "--profile")
    assert list((tmp_path / "run" / "profile").glob("rank0*.pt.trace.json"))
    assert losses(tmp_path / "run") == losses(runs.unbroken)


@pytest.mark.slow
def test_compiled_layers_follow_the_same_curve(distill, tmp_path, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)  # inductor writes C++ that no compiler takes for `default`
    distill(tmp_path / "plain", "student.dropout=0.0")
    distill(tmp_path / "compiled", "--compile", "student.dropout=0.0")
    plain, compiled = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_a_corpus_without_held_out_split_trains_without_that_loss(samples, distill, tmp_path):
    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    source = Source.parse(f"jsonl,language=en:{samples.leads('en')}")
    request = PrepareRequest(tokenizer=str(samples.teacher), sources=(source,), limit_documents=100)
    prepare(request, tmp_path / "corpus", workers=0, show_progress=False)
    process = distill(
        tmp_path / "run", f"data.corpus={tmp_path / 'corpus'}", "optimizer.steps=2", "optimizer.warmup_steps=1", ranks=1
    )
    assert "no held-out loss" in process.stdout and "done: 2 steps" in process.stdout
    assert losses(tmp_path / "run", "validation") == []


@pytest.mark.slow
def test_a_mistake_that_one_rank_alone_finds_is_said_once(samples, distill, tmp_path):
    """Two sources that take turns, a sample each a step: one rank alone reads the second, whose ids are damaged."""
    import numpy as np

    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    lines = samples.leads("en").read_text().splitlines()
    for name, part in (("a", lines[:150]), ("b", lines[150:300])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    sources = tuple(Source.parse(f"jsonl:{tmp_path / name}.jsonl") for name in ("a", "b"))
    prepare(PrepareRequest(tokenizer=str(samples.teacher), sources=sources), tmp_path / "corpus", workers=0)
    path = tmp_path / "corpus" / "train" / "b" / "00000.bin"
    np.full(path.stat().st_size // 2, 65_000, "<u2").tofile(path)
    batch = ["optimizer.global_batch_samples=2", "data.weights={a = 1.0, b = 1.0}"]
    process = distill(tmp_path / "run", f"data.corpus={tmp_path / 'corpus'}", *batch, expect=2)
    assert process.stderr.count("distill: error") == 1 and "Traceback" not in process.stderr
    assert f"{path} holds the token id 65000" in process.stderr and re.search(r"\[rank [01] on .+\]", process.stderr)


@pytest.mark.slow
def test_a_finished_run_whose_corpus_and_teacher_have_moved_is_known_again(
    runs, samples, corpus_folder, distill, tmp_path
):
    """What they are is compared, not where they lie; the corpus lies there read-only. Nothing changes."""
    run = shutil.copytree(runs.resumed, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    corpus = shutil.copytree(corpus_folder, tmp_path / "moved-corpus")
    teacher = shutil.copytree(samples.teacher, tmp_path / "moved-teacher")
    for path in (*corpus.rglob("*"), corpus):
        path.chmod(path.stat().st_mode & ~0o222)
    process = distill(run, f"data.corpus={corpus}", f"teacher.model={teacher}")
    assert "resumed from step 6" in process.stdout and "done: 6 steps" in process.stdout
    assert (run / "metrics.jsonl").read_bytes() == before
