"""Sources to token shards, restartably: the request and the run's folder.

All state is files under `OUT/.work/`: a finished unit is never done again, an unfinished one leaves nothing that could
be taken for whole. The manifest is written last, and then `.work` goes.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep import durable
from data_prep.errors import UserError
from data_prep.manifest import FORMAT_VERSION, Manifest
from data_prep.readers import sources
from data_prep.readers.sources import Source
from data_prep.request import PrepareRequest
from data_prep.shards import Corpus, token_dtype
from data_prep.tokens.tokenizer import Tokenizer
from data_prep.work.assembly import Assembly
from data_prep.work.engines import open_engine
from data_prep.work.parts import SPLITS
from data_prep.work.progress import Progress
from data_prep.work.units import UnitOptions

WORK_FOLDER = ".work"
MOST_NAME = 200  # characters of a path that a message shows
MANY_UNKNOWN = 0.05  # of a source's text, worth a line: names in foreign scripts stay below
MOST_UNKNOWN = 0.5  # refused: the teacher would see more unknown tokens than words


def prepare(
    request: PrepareRequest,
    out: Path,
    *,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Makes a corpus, or finishes one that was interrupted.

    Args:
        request: what to make; an unfinished or finished corpus made from another request is refused.
        out: folder of the corpus.
        workers: processes (local; 0: this one) or tasks at a time (ray); when None all cores, or this process
            where starting others would take longer than the work.
        engine: "local" or "ray".
        ray_address: the Ray cluster to join; a running one, or a new local one, when None.
        show_progress: a bar on a terminal, a line now and then elsewhere.

    Raises:
        UserError: a bad request, source or record, a full disk, a dead worker, a foreign folder.
    """
    request.check()
    out = Path(out).absolute()
    try:
        return _prepare(request, out, lambda size: open_engine(engine, workers, ray_address, size), show_progress)
    except OSError as error:
        name = str(error.filename or out)
        name = name if len(name) <= MOST_NAME else f"{name[: MOST_NAME // 2]}...{name[-MOST_NAME // 2 :]}"
        kept = f" Everything finished is kept in {out}:" if _is_begun(out) else " Nothing was begun:"
        raise UserError(
            f"{name}: {error.strerror or error}.{kept} mend that, then run the same command again."
        ) from error


def _prepare(request: PrepareRequest, out: Path, start_engine: Callable, show_progress: bool) -> Corpus:
    work = out / WORK_FOLDER
    _check_claimable(out)
    finished = _open_finished(out) if (out / "manifest.json").exists() else None
    expanded = sources.expand(request.sources) if finished is None else []  # names of files are checked first: quick
    tokenizer = Tokenizer.load(request.tokenizer, encoder=request.encoder)
    state = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocabulary_tokens": tokenizer.vocabulary_tokens,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "pad_id": tokenizer.pad_id,
            "encoder": tokenizer.encoder.versions,
        },
        "request": request.as_dict(),
    }
    if finished is not None:
        made = {key: getattr(finished.manifest, key) for key in state}
        _refuse_if_different(out, made, state)
        shutil.rmtree(work, ignore_errors=True)
        return finished
    expanded = sources.open_tables(expanded)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _claim(out, work, state, _inputs(expanded))
        _remove_partial_files(out)
        plans = [(source, list(sources.plan(source, request.unit_bytes))) for source in expanded]
        _save(tokenizer.save, out / "tokenizer")
        _save(tokenizer.encoder.save, work / "encoder")
        options = _unit_options(request, tokenizer, work)
        del tokenizer  # a large vocabulary takes half a gigabyte, which the work itself may need
        total = sum(unit.input_bytes for _, planned in plans for unit in planned)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(contextlib.closing(Progress(total, show=show_progress)))
            running = stack.enter_context(contextlib.closing(start_engine(total)))
            run = Assembly(plans, running, options, out, request.shard_bytes, request.unit_bytes, progress)
            shards, counts, shortened = run.run()
        _check_result(out, work, counts)
        made = dict(counts=counts, shortened=shortened, shards=tuple(shards))
        manifest = Manifest(dtype=options.dtype, **made, **state)
        durable.write(out / "manifest.json", manifest.to_json())
    shutil.rmtree(work)
    return Corpus.open(out)


def _unit_options(request: PrepareRequest, tokenizer: Tokenizer, work: Path) -> UnitOptions:
    return UnitOptions(
        encoder_folder=str(work / "encoder"),
        work_folder=str(work),
        dtype=token_dtype(tokenizer.vocabulary_tokens),
        sep_id=tokenizer.sep_id,
        unknown_id=tokenizer.unknown_id,
        validation_fraction=request.validation_fraction,
        min_tokens=request.min_tokens,
        limit_documents=request.limit_documents,
        on_bad_record=request.on_bad_record,
    )


def _open_finished(out: Path) -> Corpus:
    try:
        return Corpus.open(out)
    except UserError as error:  # preparing again, which it may advise, is just what cannot be done here
        raise UserError(f"{error} Nothing was written: choose another --out, or delete that folder first.") from None


def _check_claimable(out: Path) -> None:
    """Refuse a folder with other people's files; ours hold a manifest, or the work of an unfinished corpus."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a symbolic link that leads nowhere. Give a folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder that is new, empty or an unfinished corpus.")
    names = sorted(path.name for path in out.iterdir())
    if names and not _is_begun(out) and not (out / "manifest.json").is_file():
        raise UserError(
            f"--out {out} holds files that are no corpus ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
            "nothing was written. Give a folder that is new, empty or an unfinished corpus."
        )


def _is_begun(out: Path) -> bool:
    """Whether a preparation has begun in a folder, if only by a moment."""
    work = out / WORK_FOLDER
    try:
        begun = set(os.listdir(out)) == {WORK_FOLDER} and set(os.listdir(work)) <= {"lock", "request.json.partial"}
        return begun or (work / "request.json").is_file()
    except OSError:
        return False


def _save(write: Callable[[Path], None], folder: Path) -> None:
    try:
        write(folder)
    except Exception as error:  # the tokenizers' own libraries tell of a full disk in their own ways
        if isinstance(error, OSError) and error.filename:
            raise
        raise UserError(
            f"the tokenizer cannot be written to {folder}: {error}. Make room, then run the same command again."
        ) from error


def _check_result(out: Path, work: Path, counts: dict[str, dict[str, int]]) -> None:
    """Refuse a corpus without tokens, forgotten so that its sources can be mended, or one of unknown tokens."""
    tokens = sum(source.get("tokens", 0) for source in counts.values())
    if not tokens:
        shutil.rmtree(work)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        read = sum(source.get("documents_read", 0) for source in counts.values())
        raise UserError(
            f"the sources hold no tokens ({read:,} documents were read, all too short or empty): no corpus was made. "
            "Check the sources and their options, then run the command again."
        )
    for name, source in sorted(counts.items()):
        share = source.get("unknown_tokens", 0) / max(1, source.get("text_tokens", 0))
        if share > MOST_UNKNOWN:
            raise UserError(
                f"{share:.0%} of the tokens of source {name} are unknown to this tokenizer: it does not know this "
                "script, or is not the teacher's. No corpus was made; choose another tokenizer (and another --out)."
            )
        if share > MANY_UNKNOWN:
            print(f"prepare: {share:.0%} of the tokens of source {name} are unknown to this tokenizer", file=sys.stderr)


def _inputs(expanded: list[Source]) -> dict[str, list]:
    """Size and time of each input file, rows and fingerprint of each dataset: units are cut from them, so they must
    stay as they are.
    """
    hub = {source.name: [len(source.table), source.table._fingerprint] for source in expanded if source.kind == "hub"}
    files = sorted({path for source in expanded if source.kind != "hub" for path in source.files})
    return hub | {path: [(stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in files}


def _refuse_if_different(out: Path, made: dict, asked: dict) -> None:
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


def _claim(out: Path, work: Path, state: dict, inputs: dict[str, list]) -> None:
    path = work / "request.json"
    if not path.exists():
        durable.write(path, json.dumps({**state, "inputs": inputs}, indent=1))
        return
    try:
        made = json.loads(path.read_bytes())
        before = dict(made.pop("inputs"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete {out} and begin anew, or "
            "choose another --out."
        ) from None
    _refuse_if_different(out, made, state)
    if changed := sorted(name for name in before.keys() | inputs.keys() if before.get(name) != inputs.get(name)):
        raise UserError(
            f"{', '.join(changed[:5])} changed since {out} was begun, and units are cut from what it was. Put it back, "
            f"or delete {out} and begin anew (`revision=...` keeps a hub dataset as it is)."
        )


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process, however it ends."""
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `minilm prepare` is writing to {work.parent}. Wait for it, or stop it first."
            ) from None
        yield


def _remove_partial_files(out: Path) -> None:
    """Of an earlier start: those that this program writes, by the names it gives them."""
    ours = itertools.chain(
        *((out / split).glob(f"*/{name}.partial") for split in SPLITS for name in ("[0-9]*.bin.*", "[0-9]*.idx")),
        (out / WORK_FOLDER).rglob("*.partial"),
        [out / "manifest.json.partial"],
    )
    for path in ours:
        path.unlink(missing_ok=True)
