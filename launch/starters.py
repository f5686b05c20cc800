"""Which rank of how many this process is, as `srun` or `mpirun` says it; torchrun and DeepSpeed's launcher say it in
RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which the rest of the program reads.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

from data_prep.errors import UserError

# name: (rank, ranks, rank on this machine, ranks on this machine, what names the job)
_STARTERS = {
    "mpirun (OpenMPI)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ()),
    # only inside of a step, which srun makes: a batch script has a SLURM_PROCID too
    "srun": (
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        ("SLURM_JOB_ID",),
    ),
}


_PREFIX = "MINILM_"
_ON_THE_WAY = "PYTHON_CARRIED_"  # DeepSpeed hands on only variables that begin with PYTHON or the like


def variables_to_carry(environment: Mapping[str, str]) -> dict[str, str]:
    """This project's variables under names with which they reach other machines."""
    return {f"{_ON_THE_WAY}{name}": value for name, value in environment.items() if name.startswith(_PREFIX)}


def carried_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that have come so; a machine's own come first."""
    names = [name.removeprefix(_ON_THE_WAY) for name in environment if name.startswith(_ON_THE_WAY)]
    return {name: environment[_ON_THE_WAY + name] for name in names if name not in environment}


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and so on for a process that is one of several; empty if it is alone, or has them already.

    Raises:
        UserError: it is one of several on several machines, and nothing says where rank 0 is.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    for starter, (rank, ranks, local_rank, local_ranks, job) in _STARTERS.items():
        if environment.get(rank, "").isdigit() and int(environment.get(ranks, "0") or 0) > 1:
            here = _tasks_on(environment.get(local_ranks, ""), int(environment.get("SLURM_NODEID", "0") or 0))
            found = {
                "RANK": environment[rank],
                "WORLD_SIZE": environment[ranks],
                "LOCAL_RANK": environment.get(local_rank, "0"),
                "LOCAL_SIZE": str(here or environment[ranks]),
            }
            address = environment.get("MASTER_ADDR") or _first_machine(environment, found)
            if not address:
                raise UserError(
                    f"{starter} started this as rank {found['RANK']} of {found['WORLD_SIZE']}, on several machines, "
                    "and does not say where rank 0 is: give its name in MASTER_ADDR (mpirun -x MASTER_ADDR=HOST ...)"
                )
            name = next((environment[key] for key in job if environment.get(key)), "")
            return {**found, "MASTER_ADDR": address, "MASTER_PORT": environment.get("MASTER_PORT") or _port(name)}
    return {}


def check_alone(launcher: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse to start a job from each task of srun or mpirun, unless each starts the ranks of its own machine.

    Args:
        launcher: options of `deepspeed`.
        environment: of this process.

    Raises:
        UserError: this is one of several, and would start all ranks.
    """
    if launcher and "--no_ssh" not in launcher and (rank := rank_variables(environment)):
        raise UserError(
            f"this is task {rank['RANK']} of {rank['WORLD_SIZE']} of srun or mpirun, and each would start a job "
            f"of its own: without {launcher[0]} they are the ranks of one job; with it, start one task alone"
        )


def _tasks_on(described: str, node: int) -> int:
    """Tasks of a node out of a number, or Slurm's `8(x3),4`; 0 if it does not say."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", described):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else counts[0] if len(counts) == 1 else 0


def _first_machine(environment: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Where rank 0 runs: this machine if all ranks do, the first of Slurm's step else; "" if nothing says."""
    if found["LOCAL_SIZE"] == found["WORLD_SIZE"]:
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = re.match(r"([^,\[]+)(?:\[(\d+))?([^,\]]*\]?)", nodes)
    return f"{first.group(1)}{first.group(2) or ''}" if first else ""


def _port(job: str) -> str:
    """The same for all ranks of a job, and another for the next."""
    return str(20_000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 10_000)
