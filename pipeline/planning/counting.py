"""Tensors and operations, counted while they come and go."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "lift_fresh"}


@dataclass(kw_only=True)
class Work:
    """Operations of a phase.

    Attributes:
        products: operations of matrix products by their shape (rows, inner, columns).
        flops: all of them.
        bytes: that other operations read and write, by kind: `gelu`, `random` or `other`.
        elements: results of other operations, by kind.
        launches: operations that start something on a device.
    """

    products: Counter = field(default_factory=Counter)
    flops: int = 0
    bytes: Counter = field(default_factory=Counter)
    elements: Counter = field(default_factory=Counter)
    launches: int = 0

    def times(self, factor: float) -> Work:
        """So many of it."""
        scaled = [Counter({key: value * factor for key, value in x.items()}) for x in self._counters()]
        return Work(
            products=scaled[0],
            bytes=scaled[1],
            elements=scaled[2],
            flops=int(self.flops * factor),
            launches=int(self.launches * factor),
        )

    def _counters(self) -> Sequence[Counter]:
        return self.products, self.bytes, self.elements


class LiveBytes(TorchDispatchMode):
    """Bytes of meta tensors that operations have made and that are still held (`now`), the most there were (`most`).

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: dict[int, weakref.ref] = {}
        self._work = Work()
        for tensor in known:
            storage = tensor.untyped_storage()
            self._storages[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        self._count_work(function, given, made, args, kwargs, result)
        for tensor in made:
            if tensor.device.type == "meta":
                self._count(tensor.untyped_storage())
        return result

    def restart(self) -> int:
        """Begin a new maximum; what is held now."""
        self.most = self.now
        return self.now

    def take_work(self) -> Work:
        """The operations since the last call."""
        work, self._work = self._work, Work()
        return work

    def _count(self, storage: torch.UntypedStorage) -> None:
        known, size = id(storage), storage.nbytes()
        if known in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            self._storages.pop(known, None)

        self._storages[known] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def _count_work(self, function, given: list[Tensor], made: list[Tensor], args, kwargs, result) -> None:
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else str(function)
        if name in _NOTHING or not made or _is_view(function, given, made):
            return
        work = self._work
        work.launches += 1
        if name in _PRODUCTS:
            flops = flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
            work.flops += flops
            left = given[-2]
            work.products[(made[0].numel() // made[0].shape[-1], left.shape[-1], made[0].shape[-1])] += flops
            return
        kind = "random" if "bernoulli" in name or "random" in name else "gelu" if "gelu" in name else "other"
        work.elements[kind] += sum(x.numel() for x in made)
        read = () if name == "embedding" else given  # of the table, only the rows that are looked up
        work.bytes[kind] += sum(x.numel() * x.element_size() for x in (*read, *made))


def _is_view(function, given: list[Tensor], made: list[Tensor]) -> bool:
    if function._schema.is_mutable:
        return False
    before = {id(x.untyped_storage()) for x in given}
    return all(id(x.untyped_storage()) in before for x in made)
