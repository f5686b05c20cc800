"""Sources to token shards, restartably: the request and the run's folder.

All state is files under `OUT/.work/`: a finished unit is never done again, an unfinished one leaves nothing that could
be taken for whole. The manifest is written last, and then `.work` goes.
"""

import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep import claim, durable
from data_prep.errors import UserError
from data_prep.manifest import FORMAT_VERSION, Manifest
from data_prep.readers import sources
from data_prep.readers.sources import Source
from data_prep.request import PrepareRequest
from data_prep.shards import Corpus, token_dtype
from data_prep.tokens.tokenizer import Tokenizer
from data_prep.work import engines, units
from data_prep.work.assembly import Assembly
from data_prep.work.parts import SPLITS
from data_prep.work.progress import Progress
from data_prep.work.units import UnitOptions

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
    engines.require(engine, workers)
    out = Path(out).absolute()
    try:
        return _prepare(
            request, out, lambda size: engines.open_engine(engine, workers, ray_address, size), show_progress
        )
    except OSError as error:
        name = str(error.filename or out)
        name = name if len(name) <= MOST_NAME else f"{name[: MOST_NAME // 2]}...{name[-MOST_NAME // 2 :]}"
        kept = f" Everything finished is kept in {out}:" if claim.is_begun(out) else " Nothing was begun:"
        raise UserError(
            f"{name}: {error.strerror or error}.{kept} mend that, then run the same command again."
        ) from error


def _prepare(request: PrepareRequest, out: Path, start_engine: Callable, show_progress: bool) -> Corpus:
    work = out / claim.WORK_FOLDER
    units.forget_earlier()
    claim.check_claimable(out)
    finished = claim.open_finished(out) if (out / "manifest.json").exists() else None
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
        return _again(finished, out, state)
    expanded = sources.open_tables(expanded)
    work.mkdir(parents=True, exist_ok=True)
    with claim.locked(work):
        if (out / "manifest.json").exists():  # another run has finished it meanwhile
            return _again(claim.open_finished(out), out, state)
        inputs = claim.inputs_of(expanded)
        claim.claim(out, work, state, inputs)
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
        _check_inputs(out, work, inputs, expanded)
        _check_result(out, work, counts, expanded)
        made = dict(counts=counts, shortened=shortened, shards=tuple(shards))
        manifest = Manifest(dtype=options.dtype, **made, **state)
        durable.write(out / "manifest.json", manifest.to_json())
        claim.clear(work)  # before another run may take the lock
    shutil.rmtree(work, ignore_errors=True)
    return Corpus.open(out)


def _again(finished: Corpus, out: Path, state: dict) -> Corpus:
    """A corpus that is there already, if it is the one that is asked for."""
    claim.refuse_if_different(out, {key: getattr(finished.manifest, key) for key in state}, state)
    shutil.rmtree(out / claim.WORK_FOLDER, ignore_errors=True)
    return finished


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


def _save(write: Callable[[Path], None], folder: Path) -> None:
    try:
        write(folder)
    except Exception as error:  # the tokenizers' own libraries tell of a full disk in their own ways
        if isinstance(error, OSError) and error.filename:
            raise
        raise UserError(
            f"the tokenizer cannot be written to {folder}: {error}. Make room, then run the same command again."
        ) from error


def _check_inputs(out: Path, work: Path, before: claim.Inputs, expanded: list[Source]) -> None:
    """Refuse a corpus of files that changed while they were read: units are cut from what they were."""
    if names := claim.changed(before, claim.inputs_of(expanded)):
        for name in names:
            claim.forget(out, work, name)
        raise UserError(
            f"the input of {', '.join(names[:5])} changed while it was read, and what was made of it is thrown away. "
            "Run the same command again when nothing writes there any more."
        )


def _check_result(out: Path, work: Path, counts: dict[str, dict[str, int]], expanded: list[Source]) -> None:
    """Refuse a corpus without tokens, forgotten so that its sources can be mended, or one of unknown tokens; name
    sources of which nothing was read."""
    tokens = sum(source.get("tokens", 0) for source in counts.values())
    if not tokens:
        claim.clear(work)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        read = sum(source.get("documents_read", 0) for source in counts.values())
        raise UserError(
            f"the sources hold no tokens ({read:,} documents were read, all too short or empty): no corpus was made. "
            "Check the sources and their options, then run the command again."
        )
    for source in expanded:
        if not counts.get(source.name, {}).get("documents_read"):
            print(
                f"prepare: no document was read of source {source.name} ({len(source.files)} files, such as "
                f"{source.files[0]}). Is it of the kind {source.kind}?",
                file=sys.stderr,
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


def _remove_partial_files(out: Path) -> None:
    """Of an earlier start: those that this program writes, by the names it gives them."""
    ours = itertools.chain(
        *((out / split).glob(f"*/{name}.partial") for split in SPLITS for name in ("[0-9]*.bin.*", "[0-9]*.idx")),
        (out / claim.WORK_FOLDER).rglob("*.partial"),
        [out / "manifest.json.partial"],
    )
    for path in ours:
        path.unlink(missing_ok=True)
