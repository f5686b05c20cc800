"""All ranks meet before the first collective, which would wait for whoever is missing: on a key-value store.

Each leaves a report there: where it runs, what it found wrong, and what must be the same everywhere. Rank 0 reads them
all and answers; so a mistake on one machine, a machine that differs and one that never comes end the job on all others
with the same words, within minutes.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from data_prep import samples
from data_prep.errors import UserError

_FINE = "fine"
_SHOWN = 5
_UNSET = "not set"
_MISTAKE_SECONDS = 10  # for others to come and hear of a mistake
OWN_PORT = "a port of its own, such as --master_port 29501 (MASTER_PORT in the environment for srun and mpirun)"


def _home() -> str:
    return os.environ.get("MINILM_HOME", _UNSET)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank says of itself.

    Attributes:
        host: name of its machine.
        mistake: a mistake of the user's that it has found; "" for none.
        facts: name -> value of what must be equal on all ranks that report it.
        home: its MINILM_HOME, in which it looks for what the recipe names.
    """

    host: str
    mistake: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    home: str = field(default_factory=_home)


def name_of_start(store: dist.Store, report: Report, *, rank: int, world_size: int, seconds: float) -> str:
    """A name of this start of all ranks, on a store that outlives them.

    torchrun starts all ranks again when one has ended, and what the old ones have left in its store must not be taken
    for the new ones'; but its agents do not count the starts alike. So each rank shows a number of its own, rank 0 says
    which it sees, and again when one changes, until all ranks have found theirs among them.

    Raises:
        UserError: a rank did not come.
    """
    mine, said = uuid.uuid4().hex, None
    shown = [f"start/rank/{number}" for number in range(world_size)]
    store.set(shown[rank], mine)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if rank == 0 and store.check(shown) and (seen := [store.get(key).decode() for key in shown]) != said:
            said = seen
            store.set("start/ranks", " ".join(seen))
        numbers = store.get("start/ranks").decode() if store.check(["start/ranks"]) else ""
        if mine in numbers.split():
            name = hashlib.sha256(numbers.encode()).hexdigest()[:16]
            store.set(f"start/{name}/{rank}", "")
            if store.check([f"start/{name}/{number}" for number in range(world_size)]):
                return name
        time.sleep(0.02)
    raise UserError(
        f"rank {rank} on {report.host} has waited {seconds:.0f} s for all {world_size} ranks to start: look at the "
        "other machines"
    )


def come(store: dist.Store, report: Report, *, rank: int) -> None:
    """Say that this rank is there, before it writes anything else: a second job may have been sent to the same port.

    Raises:
        UserError: a rank of this number has come before.
    """
    if store.add(f"came/{rank}", 1) > 1:
        raise UserError(_in_another_job(rank, report))


def meet(store: dist.Store, report: Report, *, rank: int, world_size: int, seconds: float) -> float:
    """Wait for all ranks, and for rank 0's answer; how far this machine's clock is ahead of rank 0's, in seconds.

    Args:
        store: that all ranks reach.
        report: this rank's.
        rank, world_size: this rank's number, and how many there are.
        seconds: how long a rank may be late.

    Raises:
        UserError: on all ranks that are there: one has made a mistake, differs, or is missing. On a rank of another
            job, which has more ranks or fewer.
    """
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    if rank == 0:
        reports = _collect(store, world_size, seconds)
        store.set("answer", json.dumps([verdict(reports, seconds) or _FINE, time.time(), world_size]))
    try:
        store.wait(["answer"], timedelta(seconds=2 * seconds))
    except (dist.DistStoreError, RuntimeError):
        raise UserError(
            f"rank {rank} on {report.host} has come to the others, but rank 0 gave no answer: look at its machine"
        ) from None
    now = time.time()
    answer, clock, answered_ranks = json.loads(store.get("answer"))
    if answered_ranks != world_size:
        raise UserError(_in_another_job(rank, report))
    _leave(store, rank, world_size)
    if answer != _FINE:
        raise UserError(answer)
    return now - clock


def _in_another_job(rank: int, report: Report) -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"rank {rank} on {report.host} found another job's ranks at {address}: give each job on a machine {OWN_PORT}"


def verdict(reports: Sequence[Report | None], seconds: float = 0) -> str:
    """What is wrong among the reports of all ranks, in their order; "" if nothing is.

    Args:
        reports: None for a rank that did not come.
        seconds: how long those were waited for.
    """
    problem = _problem(reports, seconds)
    return problem and problem + _on_homes(problem, reports)


def _on_homes(problem: str, reports: Sequence[Report | None]) -> str:
    """What may be behind a problem of several machines: they look in different folders, or in one that nobody named."""
    there = [(f"rank {rank} on {report.host}", report) for rank, report in enumerate(reports) if report]
    homes = {report.home: who for who, report in reversed(there)}
    by_default = homes.keys() == {_UNSET} and str(samples.home()) in problem
    if len({report.host for _, report in there}) < 2 or not (len(homes) > 1 or by_default):
        return ""
    found = ", ".join(f"{home} ({who})" for home, who in homes.items()) if len(homes) > 1 else f"{_UNSET} there"
    return (
        f"\nMINILM_HOME is {found}: `bash launch/distill.sh` hands it on to all machines, `deepspeed` does where it "
        "stands in ~/.deepspeed_env (MINILM_HOME=FOLDER)."
    )


def _problem(reports: Sequence[Report | None], seconds: float) -> str:
    there = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if mistakes := [(rank, report) for rank, report in there if report.mistake]:
        rank, report = mistakes[0]
        everywhere = len(mistakes) == len(reports)
        return report.mistake + ("" if everywhere else f" (rank {rank} on {report.host}, {len(mistakes)} ranks in all)")
    if len(there) < len(reports):
        missing = [rank for rank, report in enumerate(reports) if report is None]
        hosts = ", ".join(sorted({report.host for _, report in there}))
        return (
            f"{len(missing)} of {len(reports)} ranks did not come within {seconds:.0f} s: rank {ranges(missing)}. "
            f"There are those on {hosts}. Look whether the other machines are up, reach MASTER_ADDR and have "
            "this project and its environment."
        )
    lines = []
    seen: dict[str, tuple[int, str]] = {}
    for rank, report in there:
        for name, value in report.facts.items():
            first, expected = seen.setdefault(name, (rank, value))
            if value != expected:
                theirs = f"{expected} (rank {first} on {reports[first].host})"
                lines.append(f"  {name}: {value} (rank {rank} on {report.host}), {theirs}")
    if not lines:
        return ""
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(
        ["the ranks of this job differ, and would train something else each:", *lines[:_SHOWN], *more]
        + ["Make the machines alike and start again; --skip-preflight starts all the same."]
    )


def _collect(store: dist.Store, world_size: int, seconds: float) -> list[Report | None]:
    """The reports of all ranks; a mistake ends the waiting soon, since who made it waits for no one."""
    reports: list[Report | None] = [None] * world_size
    deadline = time.monotonic() + seconds
    while None in reports and time.monotonic() < deadline:
        for rank in [rank for rank, report in enumerate(reports) if report is None]:
            if store.check([f"report/{rank}"]):
                reports[rank] = Report(**json.loads(store.get(f"report/{rank}")))
                if reports[rank].mistake:
                    deadline = min(deadline, time.monotonic() + _MISTAKE_SECONDS)
        time.sleep(0.02)
    return reports


def _leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Rank 0 may hold the store, and goes last."""
    store.set(f"heard/{rank}", "")
    if rank == 0:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not all(store.check([f"heard/{r}"]) for r in range(world_size)):
            time.sleep(0.02)


def ranges(numbers: Sequence[int]) -> str:
    """4, 5, 6, 9 -> 4-6, 9"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)
