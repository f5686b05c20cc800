"""Whose an exported folder is: the marker that names its files, and a new export in the place of an earlier one."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.errors import UserError

MARKER = "minilm-export.json"
_KIND = "minilmv2-deepspeed export"
_ASIDE, _LOCK = ".minilm-export-", "lock"


def mark(folder: Path, names: Iterable[str], *, run: str, step: int, facts: dict[str, Any]) -> None:
    """Note which files of a folder are this program's, with their checksums, of which run, and what the card says.

    Args:
        folder: the exported one.
        names: of files that are new or changed, with `/` between folders.
        run, step: whose checkpoint it is.
        facts: of `card.Facts`, plain.
    """
    before = read_marker(folder).get("files", {})
    files = before | {name: durable.sha256(folder / name) for name in names}
    record = dict(kind=_KIND, run=run, step=step, files=files, facts=facts)
    durable.write(folder / MARKER, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_marker(folder: Path) -> dict[str, Any]:
    """What a folder says of itself; empty if it is no export."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(marker, dict) and marker.get("kind") == _KIND and isinstance(marker.get("files"), dict)
    return marker if ours else {}


def files_of(folder: Path) -> list[str]:
    """Names of all files of a folder that was just written, with `/` between folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_whole(folder: Path) -> bool:
    """Whether a folder is an export with all of its files, byte for byte."""
    files = read_marker(folder).get("files", {})
    safe = [name for name in files if _is_inside(folder, name)]
    return bool(files) and safe == list(files) and all(durable.sha256(folder / n) == files[n] for n in safe)


def _is_inside(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def check_replaceable(out: Path, run: str) -> list[str]:
    """Names of what somebody else has put into the folder of an earlier export; refuses all but such a folder.

    Raises:
        UserError: `out` holds something else than an earlier export of this run, or one that was changed by hand.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; nothing was written. Give another --out.")
    if not out.exists() or not any(out.iterdir()):
        return []
    marker = read_marker(out)
    if marker.get("run") != run:
        raise UserError(
            f"{out} is not empty and no earlier export of this run ({MARKER} would say so); nothing was written. Give "
            "another --out."
        )
    ours = marker["files"]
    own, others = _told_apart(out, ours)
    if changed := [name for name in own if not (out / name).is_file() or durable.sha256(out / name) != ours[name]]:
        raise UserError(
            f"{', '.join(changed)} in {out} was changed since it was exported; nothing was written. Give another "
            "--out, or move that folder away."
        )
    return others


def check_place(out: Path) -> None:
    """Refuse a folder that could not be put in its place by renaming.

    Raises:
        UserError: it is a mount, the shell stands in it, or nothing can be made beside it.
    """
    if os.path.ismount(out):
        raise UserError(
            f"{out} is a mount and cannot be replaced by renaming: give a folder in it, such as {out}/student"
        )
    if Path.cwd().is_relative_to(out):
        raise UserError(f"you are in {out}, which would be replaced: go elsewhere first, or give another --out")
    above = next(path for path in out.parents if path.exists())
    if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"nothing can be written in {above}, where {out.name} is put together and renamed: give another --out"
        )


def _told_apart(folder: Path, ours: Iterable[str], below: str = "") -> tuple[list[str], list[str]]:
    """Names of what an export has written, and of what others have put beside it; by what is there, not by a marker
    that may name files elsewhere. A folder that holds nothing of the export's is one name."""
    own, others = [], []
    for path in sorted((folder / below).iterdir()):
        name = f"{below}{path.name}"
        if name in ours:
            own.append(name)
        elif path.is_dir() and not path.is_symlink() and any(other.startswith(f"{name}/") for other in ours):
            inside = _told_apart(folder, ours, f"{name}/")
            own, others = own + inside[0], others + inside[1]
        elif name != MARKER:
            others.append(name)
    return own, others


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in, held by a lock; what exports that were killed have left there is put right.

    Whoever was killed between moving an earlier export away and putting the new one in its place finds the earlier one
    where it was; who was killed just after that, what lay beside it.
    """
    for left in out.parent.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError), (left / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            place = out.parent / lock.read()
            if (left / "old").exists() and not place.exists():
                (left / "old").rename(place)
            elif read_marker(place).get("run") == read_marker(left / "old").get("run", ""):
                _, beside = _told_apart(left / "old", read_marker(left / "old")["files"])
                _move([name for name in beside if not (place / name).exists()], left / "old", place)
            _clear(left)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=_ASIDE))
    try:
        with (scratch / _LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept there either
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(out.name)
            lock.flush()
            yield scratch
    finally:
        _clear(scratch)


def _clear(scratch: Path) -> None:
    """Remove what an export has put aside, and nothing else."""
    shutil.rmtree(scratch / "model", ignore_errors=True)
    remove(scratch / "old")
    if not (scratch / "old").exists():
        with contextlib.suppress(OSError):
            (scratch / _LOCK).unlink()
            scratch.rmdir()


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target / name)


def swap(fresh: Path, out: Path, old: Path, run: str) -> None:
    """Put `fresh` in the place of `out`, with what somebody else has put there; `out` is checked again just before.

    Args:
        fresh: the new folder.
        out: what it becomes.
        old: where the earlier export goes.
        run: whose export it must be.
    """
    beside = check_replaceable(out, run)
    if taken := [name for name in beside if (fresh / name).exists()]:
        raise UserError(f"{', '.join(taken)} in {out} would be written over; nothing was written. Give another --out.")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
        _move(beside, old, out)
    except OSError:
        if not out.exists():
            old.rename(out)
        raise


def remove(folder: Path) -> None:
    """Remove the files of a former export from its folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        own, _ = _told_apart(folder, read_marker(folder).get("files", {}))
        for name in (*own, MARKER):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
        folder.rmdir()


def obey_umask(folder: Path) -> None:
    """Files written aside are the writer's alone; an exported model is as readable as any file that one makes."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
