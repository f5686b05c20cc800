"""Sources to token shards, restartably: the request, the run's folder, and the engines that do the work.

All state is files under `OUT/.work/`: a finished unit is never done again, an unfinished one leaves nothing that could
be taken for whole. The manifest is written last, and then `.work` goes.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from data_prep import durable, sources
from data_prep.assembly import Assembly, unread_blocks
from data_prep.errors import UserError
from data_prep.formats import Block
from data_prep.progress import Progress
from data_prep.shards import FORMAT_VERSION, Corpus, Manifest, token_dtype
from data_prep.sources import Source, Unit
from data_prep.tokenizer import Tokenizer
from data_prep.units import UnitOptions

WORK_FOLDER = ".work"


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """What decides the bytes of a corpus, and nothing else."""

    tokenizer: str
    sources: tuple[Source, ...]
    validation_fraction: float = 0.0
    """Share of documents held out; a hash of the text decides which."""
    min_tokens: int = 1
    """Shorter documents are dropped."""
    limit_documents: int | None = None
    """At most so many documents of each source, the first ones."""
    shard_bytes: int = 1 << 30
    on_bad_record: str = "stop"
    """"stop" or "skip" (and count)."""
    unit_bytes: int = 32 << 20
    """Text in a piece of work, about."""

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not self.sources:
            raise UserError("no source given. Name at least one, as in `--source wikipedia:dump.xml.bz2`.")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation fraction {self.validation_fraction}: expected at least 0 and less than 1.")
        if self.on_bad_record not in ("stop", "skip"):
            raise UserError(f"on_bad_record {self.on_bad_record!r}: expected stop or skip.")
        for name in ("min_tokens", "shard_bytes", "unit_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected at least 1.")
        if self.limit_documents is not None and self.limit_documents < 1:
            raise UserError(f"limit of {self.limit_documents} documents: expected at least 1.")

    def as_dict(self) -> dict:
        """The request as the manifest keeps it."""
        return {
            "tokenizer": self.tokenizer,
            "sources": [source.as_dict() for source in self.sources],
            "validation_fraction": self.validation_fraction,
            "min_tokens": self.min_tokens,
            "limit_documents": self.limit_documents,
            "shard_bytes": self.shard_bytes,
            "on_bad_record": self.on_bad_record,
            "unit_bytes": self.unit_bytes,
        }


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
        workers: processes (local) or tasks at a time (ray); all cores when None.
        engine: "local" or "ray".
        ray_address: the Ray cluster to join; a running one, or a new local one, when None.
        show_progress: a bar on a terminal, a line now and then elsewhere.

    Raises:
        UserError: a bad request, source or record, a full disk, a dead worker, a foreign folder.
    """
    request.check()
    out, work = Path(out), Path(out) / WORK_FOLDER
    tokenizer = Tokenizer.load(request.tokenizer)
    state = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocabulary_tokens": tokenizer.vocabulary_tokens,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "pad_id": tokenizer.pad_id,
        },
        "request": request.as_dict(),
    }
    if (out / "manifest.json").exists():
        corpus = Corpus.open(out)
        made = {key: getattr(corpus.manifest, key) for key in state}
        _refuse_if_different(out, made, state)
        shutil.rmtree(work, ignore_errors=True)
        return corpus
    expanded = sources.expand(request.sources)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _claim(out, work, {**state, "inputs": _inputs(expanded)})
        _remove_partial_files(out)
        plans = [(source, list(sources.plan(source, request.unit_bytes))) for source in expanded]
        tokenizer.save(out / "tokenizer")
        tokenizer.encoder.save(work / "encoder")
        options = UnitOptions(
            encoder_folder=str(work / "encoder"),
            work_folder=str(work),
            dtype=token_dtype(tokenizer.vocabulary_tokens),
            sep_id=tokenizer.sep_id,
            validation_fraction=request.validation_fraction,
            min_tokens=request.min_tokens,
            limit_documents=request.limit_documents,
            on_bad_record=request.on_bad_record,
        )
        total = sum(unit.input_bytes for _, planned in plans for unit in planned)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(contextlib.closing(Progress(total, show=show_progress)))
            running = stack.enter_context(contextlib.closing(_open_engine(engine, workers, ray_address)))
            run = Assembly(plans, running, options, out, request.shard_bytes, request.unit_bytes, progress)
            shards, counts = run.run()
        manifest = Manifest(dtype=options.dtype, counts=counts, shards=tuple(shards), **state)
        durable.write(out / "manifest.json", manifest.to_json())
    shutil.rmtree(work)
    return Corpus.open(out)


def _inputs(expanded: list[Source]) -> list[list]:
    """Names, sizes and times of the input files: units are cut from them, so they must stay as they are."""
    files = sorted({path for source in expanded if source.kind != "hub" for path in source.files})
    return [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in files]


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


def _claim(out: Path, work: Path, state: dict) -> None:
    path = work / "request.json"
    if path.exists():
        _refuse_if_different(out, json.loads(path.read_bytes()), state)
    else:
        durable.write(path, json.dumps(state, indent=1))


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
    for path in out.rglob("*.partial"):
        path.unlink(missing_ok=True)


# Engines: `submit` runs a function somewhere, `blocks` reads a compressed stream somewhere, `slots` is how many run at
# once.


def _open_engine(name: str, workers: int | None, ray_address: str | None):
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: expected at least 1.")
    if name == "local":
        count = workers or len(os.sched_getaffinity(0))
        return InlineEngine() if count == 1 else LocalEngine(count)
    raise UserError(f"engine {name!r}: expected local or ray.")


class InlineEngine:
    """Everything in this process, one piece after another."""

    slots = 1

    def submit(self, function: Callable, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def blocks(self, unit: Unit, work: Path, block_bytes: int) -> Iterator[tuple[int, Block]]:
        return unread_blocks(unit, work, block_bytes)

    def close(self) -> None:
        pass


class LocalEngine:
    """Processes on this machine. Compressed streams are read by threads of the coordinator, which has nothing else to
    do.
    """

    def __init__(self, workers: int):
        self.slots = workers
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def submit(self, function: Callable, *arguments) -> Future:
        return self._pool.submit(function, *arguments)

    def blocks(self, unit: Unit, work: Path, block_bytes: int) -> Iterator[tuple[int, Block]]:
        return unread_blocks(unit, work, block_bytes)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread a worker, and no worker without its coordinator."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
