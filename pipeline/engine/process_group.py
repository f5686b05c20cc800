"""This rank among the others: the process group, and the device that it computes on."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.engine import ranks
from pipeline.engine.heartbeat import Heartbeat
from pipeline.engine.meeting import OWN_PORT, Report, come, meet, name_of_start, verdict
from pipeline.engine.operators import import_deepspeed

RENDEZVOUS_SECONDS = 300  # how long a machine may be late; MINILM_RENDEZVOUS_SECONDS in the environment changes it
CLOCK_SECONDS = 30

_heartbeat: Heartbeat | None = None  # of the process group, which torch keeps in a variable of a module too


def init_distributed(
    report: Report | None = None,
    *,
    timeout_seconds: int = 1800,
    on_loss: Callable[[str, int], None] | None = None,
) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; alone if they are not set.

    Args:
        report: what this rank tells the others before; see `meeting.meet`.
        timeout_seconds: how long a collective waits for a rank.
        on_loss: called when another rank is lost, see `Heartbeat`; None: nobody watches.

    Raises:
        UserError: another process listens on MASTER_PORT; rank 0 cannot be reached; a rank is missing, differs or has
            found a mistake; another job's ranks meet at MASTER_PORT.
    """
    deepspeed = import_deepspeed()
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500")
    if not torch.cuda.is_available():
        # Without this DeepSpeed compiles a shared-memory op for a minute at the first start; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = ranks_on_this_machine()
        if "OMP_NUM_THREADS" not in os.environ or local_ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    report = report or Report(host=socket.gethostname())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if dist.is_initialized():  # by a program that runs several jobs
        if problem := verdict(ranks.gathered(report)):
            raise UserError(problem)
    else:
        seconds = float(os.environ.get("MINILM_RENDEZVOUS_SECONDS", RENDEZVOUS_SECONDS))
        store, start = _store(rank, world_size, seconds, keeps=rank == 0), "only-start"
        if _torchrun_keeps_store():
            start = name_of_start(store, report, rank=rank, world_size=world_size, seconds=seconds)
        store = dist.PrefixStore(start, store)
        if world_size > 1:
            meeting = dist.PrefixStore("meeting", store)
            come(meeting, report, rank=rank)
            heart = None
            if on_loss:
                own = dist.PrefixStore(start, _store(rank, world_size, seconds, keeps=False))
                heart = _make_heartbeat(own, report.host, rank, world_size, on_loss)
            ahead = meet(meeting, report, rank=rank, world_size=world_size, seconds=seconds)
            _warn_of_clock(ahead, report.host)
            if heart:
                heart.start()
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _warn_of_clock(ahead: float, host: str) -> None:
    """Say once a machine that its clock is wrong: training does not mind, but times in logs do not fit."""
    if abs(ahead) > CLOCK_SECONDS and os.environ["LOCAL_RANK"] == "0":
        direction = "ahead of" if ahead > 0 else "behind"
        print(f"warning: the clock of {host} is {abs(ahead):.0f} s {direction} that of rank 0", file=sys.stderr)


def _make_heartbeat(
    store: dist.Store, host: str, rank: int, world_size: int, on_loss: Callable[[str, int], None]
) -> Heartbeat:
    global _heartbeat
    store = dist.PrefixStore("heartbeat", store)
    keeper = f"torchrun at {os.environ['MASTER_ADDR']}" if _torchrun_keeps_store() else None
    _heartbeat = Heartbeat(store, rank=rank, world_size=world_size, host=host, on_loss=on_loss, keeper=keeper)
    return _heartbeat


@contextlib.contextmanager
def sharing_fate() -> Iterator[None]:
    """What ends this rank in here is told to the others, which end with it; see `Heartbeat.ended_by`."""
    try:
        yield
    except Exception as error:
        if _heartbeat:
            _heartbeat.ended_by(error)
        raise


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, world_size: int, seconds: float, *, keeps: bool) -> dist.Store:
    """A connection to the store of this job's ranks, which one of them keeps, or torchrun."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    master = keeps and not _torchrun_keeps_store()
    if master and world_size == 1:  # who is alone meets nobody, and may share a machine with others that are
        port = 0
    options = dict(is_master=master, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    try:
        store = dist.TCPStore(host, port, world_size, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} is taken, perhaps by another job on this machine: give this one {OWN_PORT}"
            ) from error
        raise UserError(
            f"rank {rank} on {socket.gethostname()} could not reach rank 0 at {host}:{port} within {seconds:.0f} s: "
            "look whether that machine is up, runs this job, and lets others in at that port"
        ) from error
    return store


def ranks_on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])


def leave_process_group() -> None:
    """At the end of a program, when all ranks have come to it: without this some end with an error now and then."""
    if dist.is_initialized():
        dist.barrier()
        if _heartbeat:
            _heartbeat.stop()
            dist.barrier()  # none may take one for lost that has left
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def local_devices() -> int:
    """Ranks that the launcher starts on this machine when it is not told: one a GPU, or one on the CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1
