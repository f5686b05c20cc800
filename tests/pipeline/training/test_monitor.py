import json
import math
import textwrap

from pipeline.training import monitor
from pipeline.training.metrics import read_metrics
from pipeline.training.monitor import RunLog, Terminal


def log(folder, first_step=0, events=None):
    sink = events if events is not None else []
    return RunLog(folder, sink.extend, first_step=first_step, is_main=True, say=print)


def test_records_reach_the_file_and_tensorboard(tmp_path):
    events = []
    run_log = log(tmp_path, events=events)
    run_log.record("train", 1, {"loss": 2.0, "per_pair": {"qq": 0.5}, "note": "text"})
    run_log.close()
    assert read_metrics(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 2.0, "per_pair": {"qq": 0.5}, "note": "text"}
    ]
    assert events == [("train/loss", 2.0, 1), ("train/per_pair/qq", 0.5, 1)]


def test_what_a_crash_undid_is_forgotten_on_resume(tmp_path):
    first = log(tmp_path)
    for step in range(1, 6):
        first.record("train", step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    log(tmp_path, first_step=3).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").stat().st_ino != before  # a new file, by rename


def test_numbers_that_are_not_finite_are_null_for_programs_and_nan_here(tmp_path):
    run_log = log(tmp_path)
    run_log.record("train", 1, {"loss": float("nan"), "gradient_norm": float("inf"), "per_pair": {"qq": 1.0}})
    run_log.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["gradient_norm"] is None
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["per_pair"] == {"qq": 1.0}


def test_steps_that_are_taken_again_are_shown_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    for first, last, value in ((0, 5, 1.0), (3, 6, 2.0)):  # the second start goes on from step 3
        with SummaryWriter(str(tmp_path), filename_suffix=str(first)) as writer:
            monitor.forget_later(writer, first)
            for step in range(first + 1, last + 1):
                writer.add_scalar("train/loss", value, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_what_is_left_counts_from_the_first_step(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    terminal = Terminal(total_steps=30, first_step=10, is_main=True)
    now[0] += 300  # loading takes long
    terminal.begin()
    now[0] += 10
    terminal.progress(20, "loss 1.0")
    assert capsys.readouterr().out == "step 20/30  loss 1.0  left 0:00:10\n"


def test_other_ranks_write_nothing(tmp_path, capsys):
    run_log = RunLog(tmp_path, [].extend, first_step=0, is_main=False, say=print)
    run_log.record("train", 1, {"loss": 1.0})
    run_log.close()
    terminal = Terminal(total_steps=1, first_step=0, is_main=False)
    terminal.progress(1, "text")
    terminal.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_progress_is_plain_lines_without_a_terminal(capsys):
    terminal = Terminal(total_steps=10, first_step=0, is_main=True)
    terminal.progress(5, "loss 1.0")
    terminal.close()
    assert capsys.readouterr().out.startswith("step 5/10  loss 1.0  left 0:00:0")


def test_a_file_that_grows_is_thinned_and_keeps_its_course(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "METRICS_BYTES", 20_000)
    run_log = log(tmp_path)
    for step in range(1, 3001):
        run_log.record("train", step, {"loss": 1.0 / step})
        if step % 500 == 0:
            run_log.record("validation", step, {"loss": 1.0, "per_pair": {}})
    run_log.close()
    steps = [record["step"] for record in read_metrics(tmp_path, "train")]
    assert (tmp_path / "metrics.jsonl").stat().st_size < 21_000
    assert steps == sorted(set(steps)) and steps[0] < 200 and steps[-1] == 3000 and len(steps) > 100
    assert [record["step"] for record in read_metrics(tmp_path, "validation")] == [500, 1000, 1500, 2000, 2500, 3000]


def test_logging_that_fails_does_not_end_a_training(tmp_path, capsys):
    """A full disk (/dev/full) and a library that raises: said once each, and tried again."""

    def broken(events):
        raise RuntimeError("the writer's thread has died")

    run_log = RunLog(tmp_path, broken, first_step=0, is_main=True, say=print)
    run_log._file.close()
    run_log._file = open("/dev/full", "ab", buffering=0)
    for step in (1, 2, 3):
        run_log.record("train", step, {"loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written") == 1 and "No space left" in said
    assert said.count("the writer's thread has died") == 1
    run_log._file = (tmp_path / "metrics.jsonl").open("ab", buffering=0)
    run_log.record("train", 4, {"loss": 1.0})
    run_log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [4]


FILL = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from pipeline.training.monitor import RunLog
    from pipeline.training.metrics import read_metrics
    folder = Path(sys.argv[1])
    (folder / "ballast").write_bytes(bytes(60_000))
    log = RunLog(folder, [].extend, first_step=0, is_main=True, say=print)
    for step in range(1, 41):
        log.record("train", step, {"loss": 1.0, "text": "x" * 5000})
        if step == 30:
            os.unlink(folder / "ballast")
    steps = [record["step"] for record in read_metrics(folder)]
    assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == len(steps)
    assert steps[0] == 1 and 30 not in steps and steps[-10:] == list(range(31, 41)), steps
    """
)


def test_a_disk_that_fills_up_leaves_no_half_line_and_logging_goes_on_when_there_is_room(on_small_disk):
    """A disk takes the first part of a record that it has no room for without an error."""
    process = on_small_disk("128k", FILL)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("No space left on device") == 1


def test_thinning_that_fails_is_tried_again_and_logging_goes_on(tmp_path, monkeypatch, capsys):
    """Such as on a disk without room for both files: here the name of the new one is taken by a folder."""
    monkeypatch.setattr(monitor, "METRICS_BYTES", 2_000)
    run_log = log(tmp_path)
    (tmp_path / "metrics.jsonl.partial").mkdir()
    for step in range(1, 101):
        run_log.record("train", step, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 101))
    (tmp_path / "metrics.jsonl.partial").rmdir()
    for step in range(101, 401):
        run_log.record("train", step, {"loss": 1.0})
    run_log.close()
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    assert (tmp_path / "metrics.jsonl").stat().st_size < 10_000
    assert [record["step"] for record in read_metrics(tmp_path)][-1] == 400


def test_records_that_cannot_be_thinned_do_not_rewrite_the_file_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "METRICS_BYTES", 2_000)
    run_log, files = log(tmp_path), set()
    for step in range(1, 301):
        run_log.record("checkpoint", step, {"seconds": 1.0})
        files.add((tmp_path / "metrics.jsonl").stat().st_ino)
    run_log.close()
    assert len(read_metrics(tmp_path)) == 300 and len(files) < 10


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    good = [{"kind": "train", "step": 1, "loss": 1.0}, {"kind": "validation", "step": 1, "loss": 1, "per_pair": {}}]
    bad = [[], 7, None, {"kind": "train"}, {"kind": [], "step": 1}, {"kind": "train", "step": "1"}, {"step": 1}]
    bad += [{"kind": "train", "step": 1, "loss": "x"}, {"kind": "validation", "step": 1, "loss": 1.0}]
    bad += [{"kind": "validation", "step": 1, "loss": 1.0, "per_pair": {"qq": "x"}}]
    lines = [json.dumps(record) for record in (*bad, *good)] + ["", "{", "[" * 100_000, "\x00"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    assert read_metrics(tmp_path) == good
