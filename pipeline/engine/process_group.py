"""This rank among the others: the process group, and the device that it computes on."""

import os
from datetime import timedelta

import torch

from data_prep.errors import UserError
from pipeline.engine.operators import import_deepspeed


def init_distributed(*, timeout_seconds: int = 1800) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; alone if they are not set.

    Raises:
        UserError: another process listens on MASTER_PORT.
    """
    deepspeed = import_deepspeed()
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if not torch.cuda.is_available():
        # Without this DeepSpeed compiles a shared-memory op for a minute at the first start; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = ranks_on_this_machine()
        if "OMP_NUM_THREADS" not in os.environ or local_ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is taken, perhaps by another job on this machine: give this one a port "
            "of its own, such as --master_port 29501"
        ) from error


def ranks_on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])


def leave_process_group() -> None:
    """At the end of a program, when all ranks have come to it: without this some end with an error now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def local_devices() -> int:
    """Ranks that the launcher starts on this machine when it is not told: one a GPU, or one on the CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1
