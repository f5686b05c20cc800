"""Batches from real shards: contents, resume on any number of ranks, mixtures, refusals."""

import itertools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from data_prep.shards import Corpus, ShardWriter
from data_prep.tokens.tokenizer import Tokenizer
from pipeline.data.loader import DataOptions, Loader, SampleSet, validation_batches

CLS, SEP, PAD = 1, 2, 0
SEQ = 10
WINDOW = SEQ - 2


def write_corpus(folder: Path, documents: dict[str, list[list[np.ndarray]]], dtype: str = "uint16") -> Corpus:
    """A corpus from {"split/source/language": [documents of a shard, ...]}; separators are added."""
    shards = []
    for name, contents in documents.items():
        split, source, language = name.split("/")
        for number, shard in enumerate(contents):
            path = f"{split}/{source}/{number:05}"
            writer = ShardWriter(folder, path, dtype=dtype, split=split, source=source, language=language)
            for document in shard:
                writer.add(np.append(document, SEP))
            shards.append(writer.close())
    tokenizer = {
        "fingerprint": "f",
        "vocabulary_tokens": 65_001 if dtype == "uint16" else 250_002,
        "cls_id": CLS,
        "sep_id": SEP,
        "pad_id": PAD,
    }
    manifest = Manifest(format_version=1, tokenizer=tokenizer, dtype=dtype, request={}, counts={}, shards=tuple(shards))
    (folder / "manifest.json").write_text(manifest.to_json())
    return Corpus.open(folder)


def numbered(tokens: int, first: int = 10) -> list[np.ndarray]:
    """One document whose tokens count upwards, so that every token tells where it came from."""
    return [np.arange(first, first + tokens - 1)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Two sources, three and two shards, with tails; every token of the corpus is different."""
    return write_corpus(
        tmp_path / "corpus",
        {
            "train/large/en": [numbered(10 * WINDOW + 3, 100), numbered(7 * WINDOW, 1000), numbered(5, 5000)],
            "train/small/fr": [numbered(3 * WINDOW + 7, 2000), numbered(2 * WINDOW + 1, 3000)],
            "validation/large/en": [numbered(9 * WINDOW, 4000)],
        },
    )


def options(**changes) -> DataOptions:
    return DataOptions(**{"seq_tokens": SEQ, "seed": 3, **changes})


def take(loader: Loader, batches: int) -> list:
    taken = list(itertools.islice(loader, batches))
    loader.close()
    return taken


def global_batches(corpus: Corpus, batches: int, *, world_size: int = 1, micro: int = 1, seen: int = 0, size: int = 24):
    """Rows of whole global batches, put together from all ranks: int64 [batches, size, s]."""
    steps = size // world_size // micro
    rows = []
    for rank in range(world_size):
        loader = Loader(
            corpus,
            options(temperature_alpha=0.5),
            global_batch_samples=size,
            micro_batch_samples=micro,
            rank=rank,
            world_size=world_size,
            samples_seen=seen,
        )
        got = take(loader, batches * steps)
        rows.append(np.concatenate([b.input_ids.numpy() for b in got]).reshape(batches, size // world_size, SEQ))
    return np.concatenate(rows, axis=1)


def test_a_window_sample_is_consecutive_tokens_between_the_special_ones(corpus):
    batch = take(Loader(corpus, options(), global_batch_samples=8, micro_batch_samples=8), 1)[0]
    assert batch.input_ids.shape == (8, SEQ) and str(batch.input_ids.dtype) == "torch.int64"
    assert batch.attention_mask is None and batch.document_ids is None and batch.position_ids is None
    assert batch.samples.tolist() == list(range(8))
    ids = batch.input_ids.numpy()
    assert (ids[:, 0] == CLS).all() and (ids[:, -1] == SEP).all()
    stream = np.concatenate([np.asarray(corpus.tokens(s)) for s in corpus.shards("train")])
    for row in ids:
        at = int(np.flatnonzero(stream == row[1])[0])
        assert row[1:-1].tolist() == stream[at : at + WINDOW].tolist()


@pytest.mark.parametrize("shuffle", [{}, {"block_samples": 2}, {"shift_windows": True}])
def test_an_epoch_sees_every_window_exactly_once(corpus, shuffle):
    sample_set = SampleSet(corpus, options(**shuffle))
    assert sample_set.sizes.tolist() == [17, 5]
    for epoch in range(3):
        places = sample_set.locate(np.arange(epoch * 22, (epoch + 1) * 22))
        seen = sorted(zip(places.shard.tolist(), places.index.tolist(), strict=True))
        windows = [s.tokens // WINDOW for s in corpus.shards("train")]
        assert seen == [(shard, window) for shard, count in enumerate(windows) for window in range(count)]
        assert (places.epoch == epoch).all()
        tokens = sample_set.read(places).input_ids[:, 1:-1].numpy().ravel()
        distinct = tokens[tokens != SEP]
        assert len(np.unique(distinct)) == len(distinct), "a token came twice"
        lost = sum(s.tokens for s in corpus.shards("train")) - len(tokens)
        assert lost == sum(s.tokens % WINDOW for s in corpus.shards("train")), "more than the shards' tails is lost"


def test_shifted_windows_are_cut_elsewhere_in_each_epoch(corpus):
    sample_set = SampleSet(corpus, options(shift_windows=True))
    begins = []
    for epoch in range(6):
        rows = sample_set.read(sample_set.locate(np.arange(epoch * 22, (epoch + 1) * 22))).input_ids.numpy()
        begins.append(frozenset(rows[:, 1].tolist()))
    assert len(set(begins)) == 6


@pytest.mark.parametrize(("world_size", "micro"), [(1, 6), (2, 12), (2, 3), (3, 8), (3, 1), (8, 3)])
def test_global_batches_do_not_depend_on_the_number_of_ranks(corpus, world_size, micro):
    assert np.array_equal(
        global_batches(corpus, 5, world_size=world_size, micro=micro), global_batches(corpus, 5, micro=24)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("stopped_after", [1, 4, 1000])
def test_resuming_on_any_number_of_ranks_equals_never_stopping(corpus, world_size, stopped_after):
    straight = global_batches(corpus, 3, seen=stopped_after * 24, micro=24)
    resumed = global_batches(corpus, 3, seen=stopped_after * 24, world_size=world_size)
    assert np.array_equal(resumed, straight)
    if stopped_after < 1000:
        assert np.array_equal(global_batches(corpus, stopped_after + 3, micro=24)[stopped_after:], straight)


def test_sample_in_constant_time_is_the_sample_of_the_batches(corpus):
    batches = take(Loader(corpus, options(), global_batch_samples=6, micro_batch_samples=3, samples_seen=12), 4)
    sample_set = SampleSet(corpus, options())
    for batch in batches:
        for row, k in zip(batch.input_ids.numpy(), batch.samples.tolist(), strict=True):
            assert sample_set.sample(k).tolist() == row.tolist()


def test_a_small_source_repeats_while_a_large_one_goes_on(corpus):
    loader = Loader(corpus, options(weights={"large": 1, "small": 1}), global_batch_samples=2, micro_batch_samples=2)
    epochs = loader.epochs(100)
    assert epochs == {"large": pytest.approx(50 / 17), "small": pytest.approx(10)}
    places = loader.sample_set.locate(np.arange(100))
    from_small = places.shard >= 3
    assert sorted(places.epoch[from_small].tolist()) == [e for e in range(10) for _ in range(5)]


def test_shares_are_those_of_the_samples(corpus):
    loader = Loader(corpus, options(temperature_alpha=0.3), global_batch_samples=4, micro_batch_samples=4)
    shards = loader.sample_set.locate(np.arange(1234)).shard
    small = float((shards >= 3).mean())
    expected = {"source/large": 1 - small, "source/small": small, "language/en": 1 - small, "language/fr": small}
    assert loader.shares(1234) == pytest.approx(expected)
    assert small == pytest.approx(5**0.3 / (5**0.3 + 17**0.3), abs=2 / 1234)
    assert set(loader.shares(0).values()) == {0.0}


def test_temperature_is_over_languages_and_weights_may_name_them(tmp_path):
    corpus = write_corpus(
        tmp_path,
        {
            "train/a/en": [numbered(30 * WINDOW)],
            "train/b/en": [numbered(10 * WINDOW, 300)],
            "train/c/fr": [numbered(10 * WINDOW, 400)],
        },
    )
    flat = SampleSet(corpus, options(temperature_alpha=0.0)).mixture.counts(800).tolist()
    assert flat == pytest.approx([300, 100, 400], abs=1)
    by_language = SampleSet(corpus, options(weights={"en": 1, "fr": 3})).mixture.counts(800).tolist()
    assert by_language == pytest.approx([150, 50, 600], abs=1)


@pytest.mark.parametrize("name", ["b", "fr"])
def test_a_source_without_a_full_window_cannot_be_asked_for(tmp_path, name):
    corpus = write_corpus(tmp_path, {"train/a/en": [numbered(30 * WINDOW)], "train/b/fr": [numbered(WINDOW - 1)]})
    with pytest.raises(UserError, match="weights ask for b, which has no full window"):
        SampleSet(corpus, options(weights={"a": 1, name: 1}))
    for fine in ({"weights": {"a": 1, name: 0}}, {"temperature_alpha": 0.5}, {}):
        made = SampleSet(corpus, options(**fine))
        assert made.mixture.counts(60).tolist() == [60, 0] and made.without_samples == ["b"]  # which the run says


def test_natural_proportions_by_default(corpus):
    assert SampleSet(corpus, options()).mixture.counts(22).tolist() == [17, 5]


def test_attention_inside_documents(tmp_path):
    documents = [np.array([11, 12]), np.array([13, 14, 15]), np.array([21] * 7), np.array([31] * 20)]
    corpus = write_corpus(tmp_path, {"train/a/en": [documents]})
    batch = next(validate_in_order(corpus, attention="document"))
    rows = batch.input_ids.tolist()
    assert batch.attention_mask is None
    # The first document ends inside the first window, the second closes it; the third window is inside one document.
    at = rows.index([CLS, 11, 12, SEP, 13, 14, 15, SEP, 21, SEP])
    assert batch.document_ids[at].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert batch.position_ids[at].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    at = rows.index([CLS, 21, 21, 21, 21, 21, 21, SEP, 31, SEP])
    assert batch.document_ids[at].tolist() == [0] * 8 + [1] * 2
    at = rows.index([CLS, *[31] * 8, SEP])
    assert batch.document_ids[at].tolist() == [0] * SEQ
    assert batch.position_ids[at].tolist() == list(range(SEQ))


def test_a_window_that_ends_with_a_separator_closes_its_last_document(tmp_path):
    corpus = write_corpus(tmp_path, {"train/a/en": [[np.arange(50, 50 + WINDOW - 1)]]})
    batch = next(validate_in_order(corpus, attention="document"))
    assert batch.input_ids[0, -2:].tolist() == [SEP, SEP]
    assert batch.document_ids[0].tolist() == [0] * SEQ


def validate_in_order(corpus: Corpus, **changes):
    sample_set = SampleSet(corpus, options(**changes))
    yield sample_set.read(sample_set.locate(np.arange(int(sample_set.sizes.sum()))))


def test_one_document_a_row(tmp_path):
    documents = [[np.arange(100 * d, 100 * d + d) for d in (1, 5, 3)], [np.arange(700, 708)]]
    corpus = write_corpus(tmp_path, {"train/a/en": documents})
    loader = Loader(
        corpus, options(packing="none", attention="document"), global_batch_samples=4, micro_batch_samples=2
    )
    seen = []
    for batch in take(loader, 2):
        longest = int(batch.attention_mask.sum(1).max()) if batch.attention_mask is not None else SEQ
        assert batch.input_ids.shape == (2, longest)
        for row, mask, document in zip(batch.input_ids, batch.attention_mask, batch.document_ids, strict=True):
            real = row[mask].tolist()
            assert real[0] == CLS and real[-1] == SEP
            assert set(row[~mask].tolist()) <= {PAD} and set(document[~mask].tolist()) <= {-1}
            assert set(document[mask].tolist()) == {0}
            seen.append(tuple(real[1:-1]))
    assert sorted(seen) == sorted(tuple(d.tolist()) for shard in documents for d in shard)


def test_a_long_document_gives_its_pieces_in_turn(tmp_path):
    corpus = write_corpus(tmp_path, {"train/a/en": [[np.arange(100, 100 + 2 * WINDOW + 1), np.arange(10, 13)]]})
    sample_set = SampleSet(corpus, options(packing="none"))
    pieces = set()
    for epoch in range(3):
        batch = sample_set.read(sample_set.locate(np.arange(2 * epoch, 2 * epoch + 2)))
        row = int(batch.input_ids[:, 1].argmax())
        assert batch.attention_mask is not None and batch.document_ids is None
        pieces |= set(batch.input_ids[row][batch.attention_mask[row]][1:-1].tolist())
    assert pieces == set(range(100, 100 + 2 * WINDOW + 1))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_large_token_numbers_survive(tmp_path, dtype):
    top = 65_000 if dtype == "uint16" else 250_001
    corpus = write_corpus(tmp_path, {"train/a/en": [[np.full(WINDOW, top)]]}, dtype)
    assert SampleSet(corpus, options()).sample(0).tolist() == [CLS, *[top] * WINDOW, SEP]


def test_validation_is_fixed_and_divided_among_ranks(corpus):
    def rows(world_size: int, **changes) -> list[list[int]]:
        out = []
        for rank in range(world_size):
            batches = validation_batches(
                corpus, options(**changes), samples=8, micro_batch_samples=3, rank=rank, world_size=world_size
            )
            out += [row for batch in batches for row in batch.input_ids.tolist()]
        return out

    assert len(rows(1)) == 8
    assert rows(1) == rows(2) == rows(4) == rows(1, seed=99, weights={"large": 1})
    assert len(rows(3)) == 6, "ranks must make equally many steps"
    assert all(4000 <= row[1] < 5000 for row in rows(1)), "training data in the validation batches"


def test_all_ranks_refuse_a_batch_that_does_not_divide(corpus):
    def build(batch: int, micro: int, world_size: int) -> Loader:
        return Loader(
            corpus, options(), global_batch_samples=batch, micro_batch_samples=micro, rank=0, world_size=world_size
        )

    build(24, 8, 3)
    with pytest.raises(UserError, match=r"32 samples cannot be divided evenly among 3 ranks: choose 30 or 33"):
        build(32, 8, 3)
    with pytest.raises(UserError, match="choose 8 samples"):
        build(4, 1, 8)
    with pytest.raises(UserError, match=r"12 of the 24 samples .* micro-batches of 5 .* \[1, 2, 3, 4, 6, 12\]"):
        build(24, 5, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_tokens": 2}, "seq_tokens is 2"),
        ({"attention": "both"}, 'attention is "both"'),
        ({"packing": "all"}, 'packing is "all"'),
        ({"block_samples": -1}, "block_samples is -1"),
        ({"temperature_alpha": 1.5}, "temperature_alpha is 1.5"),
        ({"temperature_alpha": 0.5, "weights": {"large": 1}}, "both weights and temperature_alpha"),
        ({"weights": {"large": 1, "de": 1}}, "weights name de: the corpus has large, small"),
        ({"weights": {"large": 1}}, "weights leave open small"),
        ({"weights": {"large": 0, "small": 0}}, "not all 0"),
        ({"weights": {"large": 1, "small": float("nan")}}, "expected numbers of at least 0"),
        ({"seq_tokens": 500}, "no shard of 498 tokens"),
    ],
)
def test_wrong_options_are_refused(corpus, changes, message):
    with pytest.raises(UserError, match=message):
        SampleSet(corpus, options(**changes))


def test_a_missing_split_and_a_shortened_shard_are_refused(corpus):
    with pytest.raises(UserError, match='no split "test"'):
        SampleSet(corpus, options(), "test")
    sample_set = SampleSet(corpus, options())
    os.truncate(corpus.folder / "train/large/00000.bin", 40)
    with pytest.raises(UserError, match="00000.bin ends before byte .* has changed"):
        sample_set.read(sample_set.locate(np.arange(22)))
    (corpus.folder / "train/large/00000.bin").unlink()
    sample_set = SampleSet(corpus, options())
    with pytest.raises(UserError, match="cannot open .*large/00000.bin"):
        sample_set.read(sample_set.locate(np.arange(22)))


def test_threads_do_not_close_each_others_files(tmp_path, monkeypatch):
    """More shards than are kept open, and more threads than that: every row is still the right one."""
    monkeypatch.setattr("pipeline.data.reader._OPEN_SHARDS", 2)
    shards = [numbered(40 * WINDOW, 100 + 1000 * s) for s in range(8)]
    corpus = write_corpus(tmp_path, {"train/a/en": shards})
    sample_set = SampleSet(corpus, options(block_samples=4))
    places = sample_set.locate(np.arange(320))
    expected = sample_set.read(places).input_ids.numpy()

    def work(thread: int) -> bool:
        for at in range(0, 320, 10):
            rows = slice((at + 40 * thread) % 320, (at + 40 * thread) % 320 + 10)
            sample_set.announce(places[rows])
            if not np.array_equal(sample_set.read(places[rows]).input_ids.numpy(), expected[rows]):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_an_error_of_a_reading_thread_reaches_the_consumer(corpus):
    loader = Loader(corpus, options(), global_batch_samples=22, micro_batch_samples=22)
    os.truncate(corpus.folder / "train/large/00000.bin", 0)
    with pytest.raises(UserError, match="00000.bin"):
        next(iter(loader))


def test_waiting_is_measured_and_the_loader_can_be_closed_and_iterated_again(corpus):
    loader = Loader(corpus, options(), global_batch_samples=4, micro_batch_samples=2)
    first = take(loader, 3)
    assert loader.data_wait_seconds > 0
    again = take(loader, 3)
    assert [b.samples.tolist() for b in first] == [b.samples.tolist() for b in again] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("changes", [{}, {"shift_windows": True}, {"packing": "none"}, {"attention": "document"}])
def test_a_slow_disk_changes_no_token(corpus, changes, monkeypatch):
    """Rows that do not come from memory are announced to the disk and read in its order; the batches stay the same."""
    sample_set = SampleSet(corpus, options(**changes))
    places = sample_set.locate(np.arange(40, 40 + sample_set.sizes.sum()))
    from_memory = sample_set.read(places)
    for bound in ("_CACHED_ROW_SECONDS", "_CACHED_ANNOUNCED_ROW_SECONDS"):
        monkeypatch.setattr(f"pipeline.data.reader.{bound}", 0.0)
    announced: list[int] = []
    announce = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *span: (announced.append(span[1]), announce(*span)))
    sample_set.read(places)
    announced.clear()
    from_disk = sample_set.read(places)
    assert len(announced) == len(places.samples)
    for name, value in vars(from_memory).items():
        assert (value is None) == (getattr(from_disk, name) is None)
        assert value is None or np.array_equal(value, getattr(from_disk, name))


@pytest.mark.parametrize("packing", ["window", "none"])
def test_blocks_are_announced_before_they_are_read(tmp_path, packing, monkeypatch):
    """With block shuffle the disk is asked for whole runs of neighbouring rows, and in time."""
    documents = [np.full(WINDOW - 1, 50 + d) for d in range(9000)]  # a document a window
    corpus = write_corpus(tmp_path, {"train/a/en": [documents[:5000], documents[5000:]]})
    asked: list[tuple[int, int, int, int]] = []
    announce = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *span: (asked.append(span), announce(*span)))
    monkeypatch.setattr("pipeline.data.reader._CACHED_ROW_SECONDS", float("inf"))  # no announcements row by row
    loader = Loader(
        corpus, options(packing=packing, block_samples=200), global_batch_samples=128, micro_batch_samples=128
    )
    seen = np.concatenate([batch.samples for batch in take(loader, 9000 // 128)])
    assert len(seen) == len(np.unique(seen)) == 9000 // 128 * 128
    row_bytes = 2 * WINDOW
    assert all(size % row_bytes == 0 for _, _, size, _ in asked)
    assert np.mean([size for _, _, size, _ in asked]) > 50 * row_bytes, "neighbours are asked for one by one"
    assert sum(size for _, _, size, _ in asked) > 0.7 * 9000 * row_bytes


def test_a_consumer_that_computes_does_not_wait_for_data(corpus):
    """Batches are read ahead: one is taken, and the reading of those far behind it has begun by itself."""
    loader = Loader(corpus, options(), global_batch_samples=8, micro_batch_samples=8, prefetch_batches=8)
    read, done, asked, answers = loader.sample_set.read_batches, [], threading.Event(), threading.Event()

    def read_batches(*arguments):
        if len(done) == 2:
            asked.set()
            answers.wait()
        done.append(read(*arguments))
        return done[-1]

    loader.sample_set.read_batches = read_batches
    batches = iter(loader)
    next(batches)
    assert asked.wait(60)
    ready = sum(map(len, done)) - 1
    assert ready > 8 and len([next(batches) for _ in range(ready)]) == ready  # without the disk, which does not answer
    answers.set()
    loader.close()


def test_a_slow_source_of_batches_shows_as_waiting(corpus, monkeypatch):
    loader = Loader(corpus, options(), global_batch_samples=256, micro_batch_samples=128)
    read = loader.sample_set.read_batches
    monkeypatch.setattr(loader.sample_set, "read_batches", lambda *a: (time.sleep(0.3), read(*a))[1])
    take(loader, 6)
    assert loader.data_wait_seconds > 0.05


def test_micro_batches_larger_than_a_reading_task(corpus):
    loader = Loader(corpus, options(), global_batch_samples=6000, micro_batch_samples=3000, samples_seen=600)
    samples = np.concatenate([b.samples for b in take(loader, 5)])
    assert samples.tolist() == list(range(600, 15_600))


def test_windows_of_a_real_corpus_join_to_its_text(samples, tmp_path):
    source = Source.parse(f"jsonl:{samples.leads('en')}")
    request = PrepareRequest(tokenizer=str(samples.teacher), sources=(source,), limit_documents=200)
    corpus = prepare(request, tmp_path / "corpus", workers=0, show_progress=False)
    tokenizer = Tokenizer.load(samples.teacher)
    sample_set = SampleSet(corpus, options(seq_tokens=128))
    places = sample_set.locate(np.arange(int(sample_set.sizes.sum())))
    rows = sample_set.read(places).input_ids.numpy()
    assert (rows[:, 0] == tokenizer.cls_id).all() and (rows[:, -1] == tokenizer.sep_id).all()
    stream = np.concatenate(rows[np.lexsort((places.index, places.shard)), 1:-1])
    texts = [json.loads(line)["text"] for line in samples.leads("en").read_text().splitlines()[:200]]
    expected = np.concatenate([np.append(ids, tokenizer.sep_id) for ids in tokenizer.encode_batch(texts)])
    assert 0 <= len(expected) - len(stream) < 126
    assert np.array_equal(stream, expected[: len(stream)])


def test_an_epoch_over_changing_numbers_of_ranks_counts_every_window_once(tmp_path):
    """Four global batches on 3 ranks, the next six on 8: together one epoch, nothing twice, nothing skipped."""
    corpus = write_corpus(
        tmp_path,
        {
            "train/a/en": [numbered(100 * WINDOW + 1, 10), numbered(50 * WINDOW, 2000)],
            "train/b/fr": [numbered(90 * WINDOW + 5, 4000)],
        },
    )
    first_tokens: list[int] = []
    for world_size, done, batches in ((3, 0, 4), (8, 4, 6)):
        steps = set()
        for rank in range(world_size):
            loader = Loader(
                corpus,
                options(),
                global_batch_samples=24,
                micro_batch_samples=1,
                rank=rank,
                world_size=world_size,
                samples_seen=done * 24,
            )
            own = take(loader, batches * 24 // world_size)
            steps.add(len(own))
            first_tokens += [int(batch.input_ids[0, 1]) for batch in own]
        assert len(steps) == 1
    expected = [10 + WINDOW * i for i in range(100)]
    expected += [2000 + WINDOW * i for i in range(50)] + [4000 + WINDOW * i for i in range(90)]
    assert sorted(first_tokens) == expected
