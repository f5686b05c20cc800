"""Whose a corpus's folder is, and whether what was begun there is of the same request and the same input."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep import durable
from data_prep.errors import UserError
from data_prep.readers.sources import Source
from data_prep.shards import Corpus
from data_prep.tokens import tokenizer_files
from data_prep.work.parts import SPLITS

WORK_FOLDER = ".work"
_TOKENIZER_FILES = (
    *tokenizer_files.VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
)
Inputs = dict[str, list]  # source -> what its units are cut from


def open_finished(out: Path) -> Corpus:
    """A corpus that is there already, as preparing it again takes it."""
    try:
        return Corpus.open(out)
    except UserError as error:  # preparing again, which it may advise, is just what cannot be done here
        raise UserError(f"{error} Nothing was written: choose another --out, or delete that folder first.") from None


def check_claimable(out: Path) -> None:
    """Refuse a folder with other people's files; ours hold a manifest, or the work of an unfinished corpus."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a symbolic link that leads nowhere. Give a folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder that is new, empty or an unfinished corpus.")
    names = sorted(path.name for path in out.iterdir())
    if names and not is_begun(out) and not (out / "manifest.json").is_file():
        raise UserError(
            f"--out {out} holds files that are no corpus ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
            "nothing was written. Give a folder that is new, empty or an unfinished corpus."
        )


def is_begun(out: Path) -> bool:
    """Whether a preparation has begun in a folder, if only by a moment."""
    work = out / WORK_FOLDER
    try:
        begun = set(os.listdir(out)) == {WORK_FOLDER} and set(os.listdir(work)) <= {"lock", "request.json.partial"}
        return begun or (work / "request.json").is_file()
    except OSError:
        return False


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process, however it ends."""
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `minilm prepare` is writing to {work.parent}. Wait for it, or stop it first."
            ) from None
        yield


def clear(work: Path) -> None:
    """Remove everything but the lock, which is held."""
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def inputs_of(expanded: list[Source]) -> Inputs:
    """Of each source, what its units are cut from, and what must stay as it is: size and time of its files, or rows and
    fingerprint of its dataset."""
    found: Inputs = {}
    for source in expanded:
        if source.kind == "hub":
            found[source.name] = [len(source.table), source.table._fingerprint]
        else:
            found[source.name] = [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in source.files]
    return found


def claim(out: Path, work: Path, state: dict, inputs: Inputs) -> None:
    """Take a folder for a request, or go on with what was begun there.

    Finished work stays; that of a source whose input has changed is done anew. Where nothing is finished, another
    request may begin.

    Raises:
        UserError: work of another request is there.
    """
    path = work / "request.json"
    if any((work / "parts").rglob("*.json")):
        made, before = _read(path, out)
        if _only_skips_more(made, state):
            made["request"]["on_bad_record"] = "skip"  # no bad record is in what is finished
        refuse_if_different(out, made, state)
        for name in changed(before, inputs):
            print(f"prepare: the input of {name} changed since {out} was begun; it is done anew", file=sys.stderr)
            forget(out, work, name)
    else:
        shutil.rmtree(work / "encoder", ignore_errors=True)  # of a request that came to nothing
        for name in _TOKENIZER_FILES:
            (out / "tokenizer" / name).unlink(missing_ok=True)
    durable.write(path, json.dumps({**state, "inputs": inputs}, indent=1))


def changed(before: Inputs, now: Inputs) -> list[str]:
    """Names of sources whose input is not what it was."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    return sorted(name for name in now if before.get(name) != now[name])


def forget(out: Path, work: Path, source: str) -> None:
    """Throw away everything that was made of a source."""
    for folder in (work / "parts", *(work / "shards" / split for split in SPLITS), *(out / split for split in SPLITS)):
        shutil.rmtree(folder / source, ignore_errors=True)


def _read(path: Path, out: Path) -> tuple[dict, Inputs]:
    try:
        made = json.loads(path.read_bytes())
        return made, dict(made.pop("inputs"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete {out} and begin anew, or "
            "choose another --out."
        ) from None


def _only_skips_more(made: dict, asked: dict) -> bool:
    rules = [request.get("on_bad_record") for request in (made.get("request"), asked["request"]) if request]
    return rules == ["stop", "skip"]


def refuse_if_different(out: Path, made: dict, asked: dict) -> None:
    """Compares through JSON, where tuples and lists are alike."""
    made, asked = json.loads(json.dumps(made)), json.loads(json.dumps(asked))
    if made == asked:
        return
    flat_made, flat_asked = _flat(made), _flat(asked)
    names = sorted(key for key in flat_made.keys() | flat_asked.keys() if flat_made.get(key) != flat_asked.get(key))
    shown = "; ".join(f"{key}: there {flat_made.get(key)!r}, asked {flat_asked.get(key)!r}" for key in names[:5])
    raise UserError(
        f"{out} holds a corpus of another request ({shown}). Choose another --out, or delete that folder first."
    )


def _flat(value, prefix: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
    if isinstance(value, list):
        return {k: v for number, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}[{number}]").items()}
    return {prefix: value}
