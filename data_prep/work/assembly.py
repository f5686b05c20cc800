"""The coordinator: feeds units to an engine, and turns parts into shards as soon as they are complete in order."""

import contextlib
import errno
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.manifest import ShardInfo
from data_prep.readers import sources
from data_prep.readers.formats import Block
from data_prep.readers.sources import Source, Unit
from data_prep.work import parts, units
from data_prep.work.parts import Part, ShardJob, ShardPlanner
from data_prep.work.progress import Progress
from data_prep.work.units import UnitOptions

READER_THREADS = 16
SHORTENED_NAMED = 100  # articles of a source that the manifest names


def stream_end(unit: Unit, work: Path) -> Path:
    """Where the number of blocks of a streamed unit is kept once it was read to its end."""
    return work / "parts" / unit.source.name / f"{unit.number:06d}.end"


def done_blocks(source: str, work: Path) -> dict[int, set[int]]:
    """Numbers of the blocks that have their part, for each streamed unit of a source; its folder is listed once."""
    done: dict[int, set[int]] = {}
    for record in (work / "parts" / source).glob("*-*.json"):
        unit, _, block = record.stem.partition("-")
        if unit.isdigit() and block.isdigit():
            done.setdefault(int(unit), set()).add(int(block))
    return done


def unread_blocks(unit: Unit, work: Path, block_bytes: int, done: frozenset[int]) -> Iterator[Block]:
    """Blocks of a streamed unit that are not done; leaves the number of blocks behind at the end."""
    count = 0
    for number, block in enumerate(sources.blocks(unit, block_bytes)):
        count += 1
        if number not in done:
            yield block
    parts.publish(stream_end(unit, work), [str(count).encode()])


@dataclass
class _SourceState:
    """How far a source has come."""

    source: Source
    units: list[Unit]
    planner: ShardPlanner
    done_blocks: dict[int, set[int]]
    unit: int = 0
    block: int = 0
    is_assembled: bool = False
    counts: Counter = field(default_factory=Counter)
    shortened: list[str] = field(default_factory=list)


class Assembly:
    """One run over all sources."""

    def __init__(
        self, plans, engine, options: UnitOptions, out: Path, shard_bytes: int, block_bytes: int, progress: Progress
    ):
        self._engine, self._options, self._out, self._progress = engine, options, out, progress
        self._work = Path(options.work_folder)
        self._block_bytes = block_bytes
        self._states = [
            _SourceState(
                source,
                planned,
                ShardPlanner(source.name, source.language, options.dtype, shard_bytes, options.limit_documents),
                done_blocks(source.name, self._work),
            )
            for source, planned in plans
        ]
        self._by_name = {state.source.name: state for state in self._states}
        self._pending: dict[Future, tuple] = {}
        self._shards: list[ShardInfo] = []
        self._readers_of: Counter[Path] = Counter()  # shards in work that read a part
        self._stopped = threading.Event()

    def run(self) -> tuple[list[ShardInfo], dict[str, dict[str, int]], dict[str, list[str]]]:
        """Does what is left to do; shards, and by source counts and the titles of shortened articles."""
        try:
            for state in self._states:
                self._advance(state)
            for unit, number, block in self._feed():
                self._submit(unit, number, block)
                while len(self._pending) >= self._engine.slots + 1:
                    self._collect()
            while self._pending:
                self._collect()
        finally:
            self._stopped.set()
        shards = sorted(self._shards, key=lambda shard: shard.path)
        for state in self._states:  # a limit may have cut the last part
            for name in ("documents", "tokens"):
                state.counts[name] = sum(getattr(s, name) for s in shards if s.source == state.source.name)
        counts = {state.source.name: dict(sorted(state.counts.items())) for state in self._states}
        return shards, counts, {s.source.name: s.shortened[:SHORTENED_NAMED] for s in self._states if s.shortened}

    # Feeding: plain units from the plan, blocks from threads that each read one compressed stream.

    def _feed(self) -> Iterator[tuple[Unit, int, object]]:
        items: queue.Queue = queue.Queue(maxsize=2)
        streamed = [unit for state in self._states for unit in state.units if unit.streamed and not self._skip(unit)]
        readers = min(len(streamed), self._engine.slots, READER_THREADS)
        todo, lock = iter(streamed), threading.Lock()
        for _ in range(readers):
            threading.Thread(target=self._read_streams, args=(todo, lock, items), daemon=True).start()
        plain = (unit for state in self._states for unit in state.units if not unit.streamed)
        while readers or plain is not None:
            if readers and (plain is None or not items.empty()):  # blocks go first: their readers wait for room
                item = items.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    readers -= 1
                elif isinstance(item, Unit):  # read to its end
                    self._advance(self._by_name[item.source.name])
                else:
                    yield item
            elif (unit := next(plain, None)) is None:
                plain = None
            elif not self._skip(unit):
                yield unit, 0, None

    def _read_streams(self, todo: Iterator[Unit], lock: threading.Lock, items: queue.Queue) -> None:
        """Body of a reader thread. Sends (unit, number, block), the unit at its end, and None when nothing is left."""
        try:
            while not self._stopped.is_set():
                with lock:
                    unit = next(todo, None)
                if unit is None:
                    break
                done = self._done_blocks(unit)
                numbers = (number for number in itertools.count() if number not in done)
                for block in self._engine.blocks(unit, self._work, self._block_bytes, done):
                    number = next(numbers)
                    if self._stopped.is_set() or self._state(unit).is_assembled:
                        break
                    self._put(items, (unit, number, block))
                else:
                    self._put(items, unit)
        except BaseException as error:  # raised again by the coordinator
            self._put(items, error)
        self._put(items, None)

    def _put(self, items: queue.Queue, item: object) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.2)
                return

    def _done_blocks(self, unit: Unit) -> frozenset[int]:
        """Numbers of a streamed unit's blocks that were done when this run began."""
        return frozenset(self._state(unit).done_blocks.get(unit.number, ()))

    def _state(self, unit: Unit) -> _SourceState:
        return self._by_name[unit.source.name]

    def _skip(self, unit: Unit) -> bool:
        """Whether nothing is left to do for a unit."""
        if unit.streamed:
            end = stream_end(unit, self._work)
            done = end.exists() and len(self._done_blocks(unit)) == int(end.read_text())
        else:
            done = units.part_of(unit, 0, self._work).is_done
        if done:
            self._progress.skip(unit.input_bytes)
        return done or self._state(unit).is_assembled

    # Collecting: finished units move the assembly of their source forward; finished shards free their parts.

    def _submit(self, unit: Unit, number: int, block: object) -> None:
        future = self._engine.submit(units.encode_unit, unit, number, block, self._options)
        self._pending[future] = (unit, number)

    def _collect(self) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                result = future.result()
            except (BrokenExecutor, OSError, MemoryError) as error:
                raise self._explained(error, future) from error
            what, number = self._pending.pop(future)
            if isinstance(what, ShardJob):
                self._shard_done(what, result)
            else:
                self._progress.add(result)
                self._advance(self._state(what))

    def _explained(self, error: BaseException, future: Future) -> UserError:
        """What to tell the user when a piece of work failed through no fault of its text."""
        if isinstance(error, OSError):
            what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            blamed, hint = [self._pending[future]], "Free some space" if error.errno == errno.ENOSPC else "Mend that"
        else:
            what = "out of memory" if isinstance(error, MemoryError) else "a worker died (killed, or out of memory?)"
            blamed, hint = sorted(self._pending.values(), key=str), "Use fewer --workers if memory is short"
        names = "; ".join(itertools.starmap(_describe, blamed))
        return UserError(f"{names} failed: {what}. Finished units are kept. {hint}, then run the same command again.")

    def _advance(self, state: _SourceState) -> None:
        """Takes in all parts of a source that are complete in order."""
        while not state.is_assembled:
            if state.unit == len(state.units) or state.planner.is_full:
                state.is_assembled = True
                self._start_shards(state.planner.finish())
                return
            unit = state.units[state.unit]
            part = units.part_of(unit, state.block, self._work)
            if not part.is_done:
                end = stream_end(unit, self._work)
                if not (unit.streamed and end.exists() and int(end.read_text()) == state.block):
                    return
                state.unit, state.block = state.unit + 1, 0
                continue
            record = part.record()
            state.shortened += record.pop("shortened_titles", ())
            state.counts.update(record)
            self._start_shards(state.planner.add(part))
            if unit.streamed:
                state.block += 1
            else:
                state.unit += 1

    def _start_shards(self, jobs: list[ShardJob]) -> None:
        for job in jobs:
            record = parts.shard_record(self._work, job.path)
            if record.exists():
                self._shards.append(ShardInfo(**parts.read_record(record)))
                continue
            self._readers_of.update({piece.base for piece in job.pieces})
            self._pending[self._engine.submit(parts.build_shard, job, self._out, self._work)] = (job, 0)

    def _shard_done(self, job: ShardJob, info: ShardInfo) -> None:
        self._shards.append(info)
        bases = {piece.base for piece in job.pieces}
        self._readers_of.subtract(bases)
        waiting = self._by_name[job.source].planner.open_parts()
        for base in bases - waiting:
            if not self._readers_of[base]:
                Part(base).drop_tokens()


def _describe(what: Unit | ShardJob, number: int) -> str:
    return f"shard {what.path}" if isinstance(what, ShardJob) else units.describe(what, number)
