import os
import signal
import subprocess
import sys
import textwrap

import pytest

RANK = textwrap.dedent(
    """
    import sys, time, torch, torch.distributed as dist
    from launch.status import end_process
    from pipeline.engine import process_group
    from pipeline.training.stopping import StopRequest
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
    stop = StopRequest()
    print("ready", flush=True)
    steps = 0
    while not stop.agreed(torch.device("cpu")):
        steps += 1
        time.sleep(0.02)
    print(steps, stop.reason, flush=True)
    process_group.leave_process_group()
    end_process(0)
    """
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(number, tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for rank in range(2)
    ]
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n", "ready\n"]
    ranks[1].send_signal(number)
    (out0, _), (out1, _) = (rank.communicate(timeout=60) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    steps0, reason0 = out0.strip().split(" ", 1)
    steps1, reason1 = out1.strip().split(" ", 1)
    assert steps0 == steps1
    assert reason0 == "another rank was asked to stop" and reason1 == f"received {number.name}"
