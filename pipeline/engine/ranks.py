"""What all ranks share: one rank decides and all follow, a mistake that one rank finds ends all alike, each tells all.

Ranks that decide for themselves may decide differently (free memory, network disks that show files late), and then wait
for each other in different collectives. These functions are collective: every rank calls them in the same order.
"""

import socket
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError
from pipeline.engine.meeting import Report, verdict

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
    result, mistake = None, ""
    try:
        result = check()
    except (UserError, OSError) as error:
        mistake = str(error) or type(error).__name__
    if problem := verdict(gathered(Report(host=socket.gethostname(), mistake=mistake))):
        raise UserError(problem)
    return result


def gathered(value: Result) -> list[Result]:
    """The values of all ranks, in their order."""
    values: list[Result] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class SharedRows:
    """A matrix of which every rank has some rows, by their numbers, such as vectors of samples.

    Args:
        count: rows; what is put under other numbers is left out.
    """

    def __init__(self, count: int) -> None:
        self._count, self._rows = count, None  # the width comes with the first rows

    def put(self, numbers: np.ndarray, rows: Tensor) -> None:
        """Rows of this rank.

        Args:
            numbers: int64 [n]; a number is put once, by one rank.
            rows: [n, width].
        """
        if self._rows is None:
            self._rows = rows.new_zeros(self._count, rows.shape[1])
        wanted = np.flatnonzero(numbers < self._count)
        self._rows[numbers[wanted]] = rows[wanted]

    def together(self) -> Tensor:
        """The rows of all ranks, [count, width], zero where there is none; every rank has put some."""
        dist.all_reduce(self._rows)
        return self._rows
