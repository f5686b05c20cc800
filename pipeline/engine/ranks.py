"""Decisions that all ranks share: one rank decides and all follow, and a mistake that one rank finds ends all alike.

Ranks that decide for themselves may decide differently (free memory, network disks that show files late), and then wait
for each other in different collectives. These functions are collective: every rank calls them in the same order.
"""

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from data_prep.errors import UserError

Result = TypeVar("Result")


def decided_by_rank_0(decide: Callable[[], Result]) -> Result:
    """What rank 0 decides, on all ranks.

    Args:
        decide: called on rank 0 alone; its result is pickled.

    Raises:
        UserError: on all ranks, where it raises one or an OSError.
    """
    outcome: list[tuple] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(decide(), None)]
        except (UserError, OSError) as error:
            outcome = [(None, str(error))]
    dist.broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise UserError(error)
    return result


def all_agree(check: Callable[[], Result]) -> Result:
    """The result of `check` on this rank, if no rank finds a mistake.

    Args:
        check: called on every rank; no collective inside.

    Raises:
        UserError: on all ranks, with the first rank's words, where any raises one or an OSError.
    """
    result, mistake = None, None
    try:
        result = check()
    except (UserError, OSError) as error:
        mistake = (dist.get_rank(), socket.gethostname(), str(error))
    mistakes = [found for found in gathered(mistake) if found]
    if not mistakes:
        return result
    rank, host, words = mistakes[0]
    where = "" if len(mistakes) == dist.get_world_size() else f" (rank {rank} on {host}, {len(mistakes)} ranks in all)"
    raise UserError(words + where)


def gathered(value: Result) -> list[Result]:
    """The values of all ranks, in their order."""
    values: list[Result] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
