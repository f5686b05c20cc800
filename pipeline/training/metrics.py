"""metrics.jsonl: the records of a run for programs, one JSON object a line, of bounded size; no torch is needed."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SCORES = {  # of a validation record, where they were measured -> their names for people
    "neighbours_in_common": "neighbours in common",
    "probe_accuracy": "probe",
}
METRICS_BYTES = 256 << 20  # a file that passes this loses every second of its older training records


def read_metrics(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, oldest first, of one kind or of all."""
    return list(iterate_metrics(output, kind))


def iterate_metrics(output: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records one by one, of one kind or of all; lines that are cut short or otherwise no records are left out."""
    path = output / METRICS
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                record = _replaced(json.loads(line), lambda x: x is None, math.nan)
                if _is_record(record) and kind in (None, record["kind"]):
                    yield record


def _is_record(record: Any) -> bool:
    """Whether it is one that `RunLog` may have written, in what is read of it later."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("kind"), str):
        return False
    pairs = record.get("per_pair", {})
    if not isinstance(pairs, dict):
        return False
    numbers = [record.get(name, 0) for name in ("loss", "tokens_per_second", *SCORES)] + list(pairs.values())
    whole = {"loss", "per_pair"} <= record.keys() or record["kind"] != "validation"
    return whole and all(type(number) in (int, float) for number in numbers)


def thinned(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every second training record, and all others."""
    keep = False
    for record in records:
        keep = keep ^ (record["kind"] == "train")
        if keep or record["kind"] != "train":
            yield record


def line_of(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON, which knows no number that is not finite: null stands for it."""
    return (
        json.dumps(_replaced(record, lambda x: isinstance(x, float) and not math.isfinite(x), None)) + "\n"
    ).encode()


def _replaced(value: Any, which: Callable[[Any], bool], by: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, which, by) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(inner, which, by) for inner in value]
    return by if which(value) else value
