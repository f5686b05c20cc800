"""JSON values damaged place by place, as strangers' files and rotten disks have them."""

import copy
from collections.abc import Iterator
from typing import Any


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value: the keys that lead to it; the empty tuple is the whole."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value: Any, place: tuple, other: Any) -> Any:
    """A copy with another value at a place that is not the whole; without that place where `other` is `...`."""
    value = copy.deepcopy(value)
    target = value
    for key in place[:-1]:
        target = target[key]
    if other is ...:
        del target[place[-1]]
    else:
        target[place[-1]] = other
    return value
