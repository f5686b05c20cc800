"""The files of a source: found in a folder or by a pattern, refused where they are of a kind that is not read."""

import glob
import os
import re
import sys

from data_prep.errors import UserError
from data_prep.readers.compression import COMPRESSED_SUFFIXES

_SUFFIXES = {
    "wikipedia": (".xml", ".parquet"),
    "bookcorpus": (".txt", ".parquet"),
    "cc100": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt",),
}
_PART = r"(?:-p\d+p\d+)?"  # of a dump: ...-pages-articles1.xml-p1p41242.bz2
_FOREIGN = (".7z", ".zip", ".zstd", ".tar", ".tgz", ".rar", ".lz4", "-multistream-index.txt.bz2")
_LANGUAGE_OF_FILE = {
    "wikipedia": re.compile(r"([a-z]{2,3}(?:_[a-z_]+)?|simple)wiki-"),
    "cc100": re.compile(r"([a-z]{2,3}(?:[_-][A-Za-z]+)?)\.txt"),
}


def language_of(kind: str, path: str) -> str:
    pattern = _LANGUAGE_OF_FILE.get(kind)
    match = pattern.match(os.path.basename(path)) if pattern else None
    return match.group(1) if match else ""


def find_files(kind: str, path: str) -> list[str]:
    """The files of a source, sorted; in a folder those with a suffix of this kind."""
    if os.path.isdir(path):
        plain = "|".join(map(re.escape, _SUFFIXES[kind]))
        packed = "|".join(map(re.escape, COMPRESSED_SUFFIXES))
        ending = re.compile(rf".*(?:{plain}){_PART}(?:{packed})?", re.IGNORECASE | re.DOTALL)
        there = _files_below(path)
        found = [name for name in there if ending.fullmatch(name)]
        _tell_passed_over(kind, path, [name for name in there if not ending.fullmatch(name)])
        expected = f"no file ending in {', '.join(_SUFFIXES[kind])} (also compressed) in that folder"
    else:
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        expected = "no such file, and no file matches it as a pattern"
    if not found:
        raise UserError(f"source {kind}:{path}: {expected}. Check the path.")
    for name in found:
        if name.lower().endswith(_FOREIGN):
            raise UserError(f"source {kind}: {name} is of a kind that is not read. Unpack it, or leave it out.")
        try:
            open(name, "rb").close()
        except OSError as error:
            raise UserError(f"source {kind}: {name} cannot be read ({error.strerror}).") from None
    return [os.path.abspath(name) for name in found]


def _files_below(path: str) -> list[str]:
    """All files of a folder, also behind links, each folder once; sorted."""
    found, seen = [], set()
    for root, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [os.path.join(root, name) for name in names]
    return sorted(found)


def _tell_passed_over(kind: str, path: str, names: list[str]) -> None:
    shown = [name for name in names if not os.path.basename(name).startswith(".")]
    if shown:
        print(
            f"prepare: {len(shown)} files in {path} are no {kind} by their names and are passed over, "
            f"such as {shown[0]}",
            file=sys.stderr,
        )
