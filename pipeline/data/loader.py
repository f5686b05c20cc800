"""Batches out of a prepared corpus: any sample in constant time, the whole state one integer.

`SampleSet` answers "what is sample k?": `pipeline.data.order` names a source and a window of it, a search in the
prefix sums of the shards' window counts names the place, and the tokens are read there. `Loader` deals the endless
sequence of samples to ranks and micro-batches and reads ahead on a background thread.

A sample of packing "window" is [CLS], `seq_tokens - 2` consecutive tokens of a shard, [SEP]; only a shard's last
incomplete window is left out. A sample of packing "none" is one document, padded to the longest of its micro-batch.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import Corpus
from pipeline.data.order import Mixture, block_permute, derive_key, permute
from pipeline.data.reader import Batch, Places, Reader
from pipeline.data.shares import source_weights

# Samples whose places are computed in one go: enough to make the arithmetic's fixed cost vanish.
_PLAN_SAMPLES = 2048
# Samples read in one go, so that handing over between threads costs little however small the micro-batches are.
_TASK_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a sample is and in which order samples come.

    Attributes:
        seq_tokens: length of a row, special tokens included.
        seed: names the order.
        weights: share of each source (or language), any scale; 0 leaves one out. Natural proportions if None.
        temperature_alpha: shares of languages ~ n^alpha instead of `weights`; the sources of one language divide its
            share by their sizes.
        attention: "window" (across documents) or "document" (inside each document of a row only).
        packing: "window" (rows are full windows of the token stream) or "none" (one document a row).
        block_samples: 0 shuffles a whole source; otherwise blocks of so many neighbours are read close in time.
        shift_windows: cut the windows at another place in every epoch.
    """

    seq_tokens: int
    seed: int
    weights: Mapping[str, float] | None = None
    temperature_alpha: float | None = None
    attention: str = "window"
    packing: str = "window"
    block_samples: int = 0
    shift_windows: bool = False

    def __post_init__(self) -> None:
        if self.seq_tokens < 3:
            raise UserError(f"seq_tokens is {self.seq_tokens}: a row needs two special tokens and at least one other")
        if self.attention not in ("window", "document"):
            raise UserError(f'attention is "{self.attention}": expected "window" or "document"')
        if self.packing not in ("window", "none"):
            raise UserError(f'packing is "{self.packing}": expected "window" or "none"')
        if self.block_samples < 0:
            raise UserError(f"block_samples is {self.block_samples}: expected 0 (full shuffle) or a positive number")
        if self.weights is not None and self.temperature_alpha is not None:
            raise UserError("both weights and temperature_alpha are given: they set the same shares, leave one out")
        if self.temperature_alpha is not None and not 0 <= self.temperature_alpha <= 1:
            raise UserError(f"temperature_alpha is {self.temperature_alpha}: expected 0 (all equal) to 1 (natural)")


class SampleSet:
    """The samples of one split of a corpus, in training order.

    Attributes:
        sources: names, in the order of the manifest; `languages` runs parallel.
        sizes: samples an epoch of each source.
        mixture: how the sources are interleaved.
    """

    def __init__(self, corpus: Corpus, options: DataOptions, split: str = "train") -> None:
        self.corpus, self.options, self.split = corpus, options, split
        shards = corpus.shards(split)
        if not shards:
            how = "with --validation 0.01, say" if split == "validation" else "from sources with more text"
            raise UserError(f'corpus {corpus.folder} has no split "{split}": prepare it again, {how}')
        language_of = {shard.source: shard.language for shard in shards}
        self.sources = tuple(language_of)
        self.languages = tuple(language_of.values())
        number = {source: i for i, source in enumerate(self.sources)}
        self.shards = tuple(sorted(shards, key=lambda shard: number[shard.source]))
        self._window = options.seq_tokens - 2
        whole = options.packing == "none"
        counts = np.array([s.documents if whole else s.tokens // self._window for s in self.shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        owner = np.array([number[shard.source] for shard in self.shards], np.int64)
        self.sizes = np.bincount(owner, counts, len(self.sources)).astype(np.int64)
        self._source_first = np.cumsum(self.sizes) - self.sizes
        if not self.sizes.any():
            raise UserError(
                f'split "{split}" of corpus {corpus.folder} has no shard of {self._window} tokens: '
                "choose a smaller seq_tokens, or larger shards"
            )
        sizes = self.sizes.tolist()
        self.mixture = Mixture.of(
            source_weights(self.sources, self.languages, sizes, options.weights, options.temperature_alpha)
        )
        self._reader = Reader(
            corpus,
            self.shards,
            seq_tokens=options.seq_tokens,
            packing=options.packing,
            attention=options.attention,
            shift_seed=options.seed if options.shift_windows else None,
        )

    @property
    def without_samples(self) -> list[str]:
        """Sources that have less text than one sample takes."""
        return [source for source, size in zip(self.sources, self.sizes, strict=True) if not size]

    def locate(self, samples: np.ndarray) -> Places:
        """Finds samples by number, in O(log shards) each; vectorised."""
        source, ordinal = self.mixture.locate(samples)
        size = self.sizes[source]
        epoch, position = np.divmod(ordinal, size)
        key = derive_key(self.options.seed, source, epoch)
        if self.options.block_samples:
            drawn = block_permute(position, size, key, self.options.block_samples)
        else:
            drawn = permute(position, size, key)
        drawn += self._source_first[source]
        shard = np.searchsorted(self._first, drawn, side="right") - 1
        return Places(samples=samples, shard=shard, index=drawn - self._first[shard], epoch=epoch)

    def sample(self, k: int) -> np.ndarray:
        """Token ids of sample k, special tokens included; int64 [s]."""
        return self.read(self.locate(np.array([k], np.int64))).input_ids[0].numpy()

    def read(self, places: Places) -> Batch:
        """One batch of located samples."""
        return self._reader.read(places)

    def announce(self, places: Places) -> None:
        """Asks the disk for samples that will be read soon; pays where they lie close together."""
        self._reader.announce(places)

    def read_batches(self, places: Places, samples: int) -> list[Batch]:
        """Located samples in batches of `samples`, read in one go."""
        cuts = [slice(at, at + samples) for at in range(0, len(places.samples), samples)]
        if self.options.packing == "none":  # each batch is as long as its own longest row
            return [self.read(places[rows]) for rows in cuts]
        whole = self.read(places)
        return [whole[rows] for rows in cuts]


class Loader:
    """The micro-batches of one rank, endless, read ahead on a background thread.

    Global batch g holds samples [samples_seen + g * B, samples_seen + (g + 1) * B), whatever the number of ranks; rank
    r takes the r-th of `world_size` equal parts, in micro-batches of `micro_batch_samples`. So every rank makes the
    same number of steps, and a run resumed on another number of ranks sees the batches it would have seen.

    Attributes:
        data_wait_seconds: time the consumer has spent waiting for batches so far.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: DataOptions,
        *,
        split: str = "train",
        global_batch_samples: int,
        micro_batch_samples: int,
        rank: int = 0,
        world_size: int = 1,
        samples_seen: int = 0,
        prefetch_batches: int = 4,
    ) -> None:
        rank_samples = _part(global_batch_samples, micro_batch_samples, world_size)
        self.sample_set = SampleSet(corpus, options, split)
        self.data_wait_seconds = 0.0
        self._batch, self._micro, self._rank_samples = global_batch_samples, micro_batch_samples, rank_samples
        self._first_sample = samples_seen + rank * rank_samples
        # One task of the reading thread: several micro-batches if they are small.
        self._task_samples = micro_batch_samples * max(1, _TASK_SAMPLES // micro_batch_samples)
        self._tasks = max(2, -(-prefetch_batches * micro_batch_samples // self._task_samples))
        self._plan_samples = self._task_samples * max(1, _PLAN_SAMPLES // self._task_samples)
        self._plan = lru_cache(3)(self._locate)
        self._thread: ThreadPoolExecutor | None = None

    def _locate(self, plan: int) -> Places:
        """Places of the next so many of this rank's samples."""
        own = np.arange(plan * self._plan_samples, (plan + 1) * self._plan_samples, dtype=np.int64)
        batch, within = np.divmod(own, self._rank_samples)
        return self.sample_set.locate(self._first_sample + batch * self._batch + within)

    def _read(self, task: int) -> list[Batch]:
        plan, row = divmod(task * self._task_samples, self._plan_samples)
        if row == 0 and self.sample_set.options.block_samples:
            self.sample_set.announce(self._plan(plan + 1))
        return self.sample_set.read_batches(self._plan(plan)[row : row + self._task_samples], self._micro)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        pending = deque(self._thread.submit(self._read, task) for task in range(self._tasks))
        for following in count(self._tasks):
            began = time.perf_counter()
            batches = pending.popleft().result()
            self.data_wait_seconds += time.perf_counter() - began
            pending.append(self._thread.submit(self._read, following))
            yield from batches

    def shares(self, samples_seen: int) -> dict[str, float]:
        """Share of the first `samples_seen` samples that each source ("source/NAME") and language has had."""
        counts = self.sample_set.mixture.counts(samples_seen) / max(samples_seen, 1)
        shares = {f"source/{s}": float(c) for s, c in zip(self.sample_set.sources, counts, strict=True)}
        for language, share in zip(self.sample_set.languages, counts, strict=True):
            if language:
                shares[f"language/{language}"] = shares.get(f"language/{language}", 0.0) + float(share)
        return shares

    def epochs(self, samples_seen: int) -> dict[str, float]:
        """How often each source has been through after `samples_seen` samples."""
        counts = self.sample_set.mixture.counts(samples_seen) / np.maximum(self.sample_set.sizes, 1)
        return dict(zip(self.sample_set.sources, counts.tolist(), strict=True))

    def close(self) -> None:
        """Stops reading ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None


def _part(global_batch_samples: int, micro_batch_samples: int, world_size: int) -> int:
    """Samples of a global batch that each rank takes; refuses batches that do not divide evenly."""
    rank_samples, rest = divmod(global_batch_samples, world_size)
    if rest or rank_samples < 1:
        lower, upper = rank_samples * world_size, (rank_samples + 1) * world_size
        choices = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"a global batch of {global_batch_samples} samples cannot be divided evenly among {world_size} ranks: "
            f"choose {choices} samples, or a number of ranks that divides {global_batch_samples}"
        )
    if micro_batch_samples < 1 or rank_samples % micro_batch_samples:
        fitting = [n for n in range(1, rank_samples + 1) if rank_samples % n == 0]
        raise UserError(
            f"each of {world_size} ranks takes {rank_samples} of the {global_batch_samples} samples of a global batch, "
            f"which micro-batches of {micro_batch_samples} do not divide: choose one of {fitting}"
        )
    return rank_samples


def validation_batches(
    corpus: Corpus,
    options: DataOptions,
    *,
    samples: int,
    micro_batch_samples: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's part of the first `samples` validation samples: the same ones in every run and at every step.

    The order does not depend on the seed, and sources come in natural proportions. Every rank gets equally many
    batches: at most `world_size - 1` of the asked samples are left out.
    """
    fixed = replace(options, seed=0, weights=None, temperature_alpha=None, block_samples=0, shift_windows=False)
    sample_set = SampleSet(corpus, fixed, "validation")
    part = min(samples, int(sample_set.sizes.sum())) // world_size
    if part == 0:
        raise UserError(
            f"the validation split of {corpus.folder} has {int(sample_set.sizes.sum())} samples and {samples} were "
            f"asked for: {world_size} ranks need at least one each. Raise logging.validation_samples, or prepare the "
            "corpus with a larger --validation"
        )
    places = sample_set.locate(np.arange(rank * part, (rank + 1) * part, dtype=np.int64))
    for row in range(0, part, micro_batch_samples):
        yield sample_set.read(places[row : row + micro_batch_samples])
