"""What teacher and student are compared by."""

from typing import NamedTuple

from torch import Tensor


class QKV(NamedTuple):
    """Queries, keys and values of one layer, heads joined: each [batch, positions, hidden]."""

    query: Tensor
    key: Tensor
    value: Tensor
