"""Ranks that are lost are named to all others. Here they live in one process, each with a connection of its own."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from queue import Queue

import pytest
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.engine.heartbeat import EXIT_LOST, Heartbeat


@pytest.fixture
def hearts(monkeypatch):
    """Make three ranks on machines a, b, c, and a queue of what each is told: (rank, words, code)."""
    monkeypatch.setenv("MINILM_LOST_SECONDS", "1.2")
    monkeypatch.setattr("pipeline.engine.heartbeat._LEAVING_SECONDS", 0.3)
    server = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    told, made = Queue(), []

    def make(**options):
        for rank, host in enumerate("abc"):
            connection = dist.TCPStore("127.0.0.1", server[0].port, timeout=timedelta(seconds=5))
            heard = lambda words, code, rank=rank: told.put((rank, words, code))  # noqa: E731
            made.append(Heartbeat(connection, rank=rank, world_size=3, host=host, on_loss=heard, **options))
        return made, told, server

    yield make
    for heart in made:
        heart.stop()


def all_told(told, count):
    found = [told.get(timeout=20) for _ in range(count)]
    assert len({(words, code) for _, words, code in found}) == 1, found
    return sorted(rank for rank, _, _ in found), *found[0][1:]


def test_a_rank_without_signs_of_life_is_named_to_all_others(hearts):
    made, told, _ = hearts()
    made[0].start()
    made[1].start()
    ranks, words, code = all_told(told, 2)
    assert ranks == [0, 1] and code == EXIT_LOST
    assert words.startswith("rank 2 on c gave no sign of life for 1 s")


def test_ranks_that_live_and_leave_are_not_lost(hearts):
    made, told, server = hearts()
    for heart in made:
        heart.start()
    time.sleep(2)
    for heart in reversed(made):
        heart.stop()
    server.clear()
    time.sleep(1)
    assert told.empty()


def test_what_ends_a_rank_is_heard_by_the_others(hearts):
    made, told, _ = hearts()
    for heart in made:
        heart.start()
    made[1].ended_by(UserError("no room on the disk"))
    assert all_told(told, 2) == ([0, 2], "no room on the disk [rank 1 on b]", 2)


def test_a_crash_is_told_and_a_failed_collective_waits_for_the_cause(hearts):
    made, told, _ = hearts()
    for heart in made:
        heart.start()
    made[2].ended_by(ZeroDivisionError("division by zero\nmore"))
    made[1].ended_by(dist.DistBackendError("Connection closed by peer"))
    assert all_told(told, 2) == ([0, 1], "rank 2 on c has crashed: ZeroDivisionError: division by zero", EXIT_LOST)


def test_a_process_of_the_same_machine_that_is_gone_is_noticed_at_the_next_beat(hearts, monkeypatch):
    monkeypatch.setenv("MINILM_LOST_SECONDS", "600")
    monkeypatch.setattr("pipeline.engine.heartbeat._BEAT_SECONDS", 0.2)
    made, told, _ = hearts()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = json.loads(made[2]._store.get("who/2"))
    made[2]._store.set("who/2", json.dumps([*who[:2], process.pid]))
    for heart in made[:2]:
        heart.start()
    time.sleep(0.6)
    assert told.empty()
    process.kill()
    ranks, words, code = all_told(told, 2)
    assert ranks == [0, 1] and words.startswith("rank 2 on c is gone") and code == EXIT_LOST


def test_the_end_of_the_store_is_the_end_of_rank_0(hearts):
    made, told, server = hearts()
    for heart in made[1:]:
        heart.start()
    server.clear()
    assert all_told(told, 2) == ([1, 2], "rank 0 on a is gone: killed, or crashed", EXIT_LOST)
