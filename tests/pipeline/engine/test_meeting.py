"""Ranks meet before they train: machines that differ, make a mistake or never come are named on all others."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from data_prep import samples
from data_prep.errors import UserError
from pipeline.engine import process_group
from pipeline.engine.meeting import Report, come, meet, name_of_start, verdict

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "distill.sh"


def reports(*facts, **mistakes):
    made = [Report(host=f"node{number}", facts=fact) for number, fact in enumerate(facts)]
    for name, words in mistakes.items():
        made[int(name[1:])] = Report(host=f"node{name[1:]}", mistake=words)
    return made


def test_equal_ranks_are_fine():
    assert verdict(reports({"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "2"}), 60) == ""


def test_a_difference_is_named_with_both_values_and_machines():
    words = verdict(reports({"torch": "2.6", "lr": "1"}, {"torch": "2.6", "lr": "1"}, {"torch": "2.7", "lr": "1"}), 60)
    assert "torch: 2.7 (rank 2 on node2), 2.6 (rank 0 on node0)" in words and "lr" not in words


def test_what_is_missing_and_what_went_wrong_is_named():
    some = [*reports({}, {}), None, None, *reports({}), None]
    assert "3 of 6 ranks did not come within 60 s: rank 2-3, 5" in verdict(some, 60)
    assert verdict([*reports({}, r0="no corpus"), None], 60) == "no corpus (rank 0 on node0, 1 ranks in all)"
    assert verdict(reports({}, {}, r0="no corpus", r1="no corpus"), 60) == "no corpus"


def test_where_ranks_look_in_other_folders_or_in_the_default_one_a_mistake_is_said_with_it(monkeypatch):
    monkeypatch.delenv("MINILM_HOME", raising=False)
    alike, other = Report(host="node1", home="/shared"), Report(host="node2", mistake="no corpus")
    words = verdict([alike, other])
    assert words.startswith("no corpus (rank 1 on node2") and "~/.deepspeed_env" in words
    assert "/shared (rank 0 on node1)" in words and "not set (rank 1 on node2)" in words
    assert verdict([alike, Report(host="node2", home="/local")]) == ""
    mistakes = ["no corpus", f"no corpus {samples.home()}/demo"]
    assert [
        "MINILM_HOME is not set there" in verdict([Report(host=host, mistake=mistake) for host in hosts])
        for hosts in ("ab", "aa")
        for mistake in mistakes
    ] == [False, True, False, False]


def meeting(port, told, *, seconds=20, missing=0):
    """What each rank hears."""

    def rank(number):
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=number == 0, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        try:
            meet(store, told[number], rank=number, world_size=len(told) + missing, seconds=seconds)
        except UserError as error:
            return str(error)
        return "fine"

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(rank, range(len(told))))


def test_all_hear_the_same(port):
    assert meeting(port, reports({"a": "1"}, {"a": "1"}, {"a": "1"})) == ["fine"] * 3


def test_a_clock_that_is_wrong_is_said_once_a_machine(port, capsys, monkeypatch):
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set("answer", json.dumps(["fine", time.time() - 300, 2]))
    ahead = meet(store, Report(host="node1"), rank=1, world_size=2, seconds=5)
    assert 299 < ahead < 305
    for local_rank in "01":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        process_group._warn_of_clock(ahead, "node1")
    process_group._warn_of_clock(2, "node1")
    assert capsys.readouterr().err.count("the clock of node1 is 300 s ahead of that of rank 0") == 1


def test_all_hear_of_a_mistake_a_difference_or_an_absence(port):
    first, second = meeting(port, reports({"a": "1"}, {}, r1="corpus missing"))
    assert first == second == "corpus missing (rank 1 on node1, 1 ranks in all)"
    first, second = meeting(port + 1, reports({"a": "1"}, {"a": "2"}))
    assert first == second and "a: 2 (rank 1 on node1), 1 (rank 0 on node0)" in first
    began = time.monotonic()
    first, second = meeting(port + 2, reports({}, {}), seconds=1, missing=2)
    assert first == second and "2 of 4 ranks did not come within 1 s: rank 2-3" in first
    assert time.monotonic() - began < 15


def test_a_rank_of_another_job_on_the_same_port_is_told_at_once(port):
    first = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    there = Report(host="node1")
    come(first, there, rank=1)
    second = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    with pytest.raises(UserError, match="rank 1 on node2 found another job's ranks at .* --master_port"):
        come(second, Report(host="node2"), rank=1)
    come(second, Report(host="node2"), rank=2)  # of three, where the first job has two
    first.set("answer", json.dumps(["fine", time.time(), 2]))
    with pytest.raises(UserError, match="rank 2 on node2 found another job's ranks"):
        meet(second, Report(host="node2"), rank=2, world_size=3, seconds=5)
    assert meet(first, there, rank=1, world_size=2, seconds=5) < 5


def test_starts_on_a_store_that_outlives_them_have_names_of_their_own(port):
    """As torchrun's store does. Where a rank comes late, the others see what its old one has left."""
    keeper = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def start(rank, late=0.0):
        time.sleep(late)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        return name_of_start(store, Report(host="node"), rank=rank, world_size=3, seconds=20)

    with ThreadPoolExecutor(3) as pool:
        first = set(pool.map(start, range(3)))
        second = set(pool.map(start, range(3), [0, 0, 0.5]))
        third = set(pool.map(start, range(3), [0.5, 0, 0]))
    assert len(first) == len(second) == len(third) == 1 and len(first | second | third) == 3
    with pytest.raises(UserError, match="rank 1 on node has waited 1 s for all 3 ranks"):
        name_of_start(keeper, Report(host="node"), rank=1, world_size=3, seconds=1)


def test_a_second_job_does_not_touch_the_first(port, tmp_path, toy_overrides):
    """Its rank 0 ran on another machine, or found the port taken; its rank 1 comes to the first job's store."""
    late = ["optimizer.steps=400"]
    first = start_ranks(port, tmp_path / "first", toy_overrides, late, late)
    log = tmp_path / "first" / "run" / "metrics.jsonl"
    began = time.monotonic()
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() - began < 100 and all(process.poll() is None for process in first)
        time.sleep(0.1)
    (stray,) = start_ranks(port, tmp_path / "second", toy_overrides, late, first_rank=1)
    began = time.monotonic()
    assert "another job's ranks" in stray.communicate(timeout=100)[1] and stray.returncode == 2
    assert time.monotonic() - began < 60
    assert all(process.poll() is None for process in first)
    for process in first:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in first] == [75, 75]


def ranks_of_two_machines(port, tmp_path, overrides, *differences, **environment):
    """Exit codes and standard errors of ranks that somebody started by hand; each has its own overrides."""
    running = start_ranks(port, tmp_path, overrides, *differences, **environment)
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert all("Traceback" not in said for said, _ in ended), ended
    return [code for _, code in ended], "".join(said for said, _ in ended)


def start_ranks(port, tmp_path, overrides, *differences, first_rank=0, **environment):
    running = []
    tmp_path.mkdir(exist_ok=True)
    for rank, own in enumerate(differences, first_rank):
        variables = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        variables = {name: str(value) for name, value in {**variables, **environment}.items()}
        command = [sys.executable, SCRIPT, "--recipe", "demo", *overrides, f"run.output={tmp_path / 'run'}", *own]
        running.append(
            subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, **variables, "TMPDIR": str(tmp_path)},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    return running


def test_nodes_that_differ_do_not_train_together(port, tmp_path, toy_overrides):
    codes, said = ranks_of_two_machines(
        port, tmp_path, toy_overrides, ["optimizer.peak_lr=1e-3"], ["optimizer.peak_lr=5e-4"]
    )
    assert codes == [2, 2] and "recipe optimizer.peak_lr: 0.0005 (rank 1 on" in said
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_one_node_ends_the_others_at_once(port, tmp_path, toy_overrides):
    began = time.monotonic()
    codes, said = ranks_of_two_machines(port, tmp_path, toy_overrides, [], ["data.corpus=/nowhere"])
    assert codes == [2, 2] and "/nowhere" in said and "(rank 1 on" in said
    codes, said = ranks_of_two_machines(port + 1, tmp_path, toy_overrides, [], ["--recipe=unheard-of"])
    assert codes == [2, 2] and "there is no recipe 'unheard-of'" in said
    assert time.monotonic() - began < 100


def test_a_node_that_never_comes_is_said(port, tmp_path, toy_overrides):
    (code,), said = ranks_of_two_machines(port, tmp_path, toy_overrides, [], MINILM_RENDEZVOUS_SECONDS=1)
    assert code == 2 and "1 of 2 ranks did not come within 1 s: rank 1" in said
