from pipeline.monitor import RunLog, read_metrics


def log(folder, first_step=0, events=None):
    sink = events if events is not None else []
    return RunLog(folder, sink.extend, total_steps=10, first_step=first_step, is_main=True)


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
    log(tmp_path, first_step=3).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    run_log = RunLog(tmp_path, [].extend, total_steps=1, first_step=0, is_main=False)
    run_log.record("train", 1, {"loss": 1.0})
    run_log.progress(1, "text")
    run_log.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capsys):
    run_log = log(tmp_path)
    run_log.progress(5, "loss 1.0")
    run_log.close()
    assert capsys.readouterr().out.startswith("step 5/10  loss 1.0  left 0:00:0")
