"""From sources to a corpus: content, determinism, resuming, refusals."""

import dataclasses
import fcntl
import json
import lzma
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers import sources
from data_prep.readers.sources import Source
from data_prep.shards import Corpus
from data_prep.tokens.tokenizer import Tokenizer
from data_prep.work import engines, units
from tests.read import files_of


@pytest.fixture(scope="module")
def small_jsonl(samples, tmp_path_factory):
    """600 real documents in a JSONL file, and their texts."""
    lines = samples.leads("en").read_text().splitlines()[:600]
    path = tmp_path_factory.mktemp("text") / "small.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, [json.loads(line)["text"] for line in lines]


def request_for(samples, path, **options):
    options = {"unit_bytes": 50_000, "shard_bytes": 60_000, **options}
    source = Source.parse(f"jsonl,language=en:{path}")
    return PrepareRequest(tokenizer=str(samples.teacher), sources=(source,), **options)


def documents_of(corpus, split):
    for shard in corpus.shards(split):
        tokens, index = corpus.tokens(shard), corpus.index(shard)
        starts = np.asarray(index.offsets_bytes) // tokens.dtype.itemsize
        for start, length in zip(starts, index.lengths, strict=True):
            yield tokens[start : start + length].tolist()


def test_every_document_arrives_in_order_with_the_teachers_ids(samples, small_jsonl, tmp_path):
    path, texts = small_jsonl
    corpus = prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    reference = AutoTokenizer.from_pretrained(samples.teacher)
    expected = [ids + [reference.sep_token_id] for ids in reference(texts, add_special_tokens=False)["input_ids"]]
    assert list(documents_of(corpus, "train")) == expected
    assert len(corpus.shards("train")) > 1
    assert not (tmp_path / "c" / ".work").exists()


def test_workers_do_not_change_a_byte(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    request = request_for(samples, path, validation_fraction=0.1)
    for workers in (0, 1, 3):
        prepare(request, tmp_path / str(workers), workers=workers, show_progress=False)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_another_request_into_the_same_folder_is_refused(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    before = files_of(tmp_path / "c")
    with pytest.raises(UserError, match="min_tokens"):
        prepare(request_for(samples, path, min_tokens=5), tmp_path / "c", workers=0, show_progress=False)
    prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    assert files_of(tmp_path / "c") == before


def test_validation_split_is_decided_by_the_text(samples, small_jsonl, tmp_path):
    path, texts = small_jsonl
    corpus = prepare(
        request_for(samples, path, validation_fraction=0.2), tmp_path / "a", workers=0, show_progress=False
    )
    held_out = list(documents_of(corpus, "validation"))
    assert 0.1 < len(held_out) / len(texts) < 0.3
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(json.dumps({"text": text}) for text in reversed(texts)) + "\n")
    again = prepare(
        request_for(samples, shuffled, validation_fraction=0.2), tmp_path / "b", workers=0, show_progress=False
    )
    assert list(documents_of(again, "validation")) == held_out[::-1]


def test_limit_takes_the_first_documents(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    everything = prepare(request_for(samples, path), tmp_path / "all", workers=0, show_progress=False)
    some = prepare(request_for(samples, path, limit_documents=250), tmp_path / "some", workers=2, show_progress=False)
    assert list(documents_of(some, "train")) == list(documents_of(everything, "train"))[:250]
    assert some.manifest.counts["small"]["documents"] == 250


def stopped_run(samples, small_jsonl, tmp_path):
    """A run that stops at a bad last line, and its request."""
    path = tmp_path / "bad.jsonl"
    path.write_text(small_jsonl[0].read_text() + "not json\n")
    request = request_for(samples, path)
    line = len(small_jsonl[1]) + 1
    with pytest.raises(UserError, match=rf"bad record in {path}, line {line} .*--on-bad-record skip"):
        prepare(request, tmp_path / "c", workers=0, show_progress=False)
    return path, request


def test_a_bad_record_stops_or_is_counted(samples, small_jsonl, tmp_path):
    path, request = stopped_run(samples, small_jsonl, tmp_path)
    skipping = request_for(samples, path, on_bad_record="skip")
    fresh = prepare(skipping, tmp_path / "d", workers=2, show_progress=False)
    assert fresh.manifest.counts["bad"]["bad_records"] == 1
    assert fresh.manifest.counts["bad"]["documents"] == len(small_jsonl[1])
    went_on = prepare(skipping, tmp_path / "c", workers=0, show_progress=False)  # as the message advises
    assert went_on.manifest == fresh.manifest
    with pytest.raises(UserError, match="another request .*on_bad_record"):
        prepare(request, tmp_path / "c", workers=0, show_progress=False)


def test_another_tokenizer_is_refused_in_an_unfinished_folder_and_a_mended_file_is_read_anew(
    samples, small_jsonl, tmp_path, byte_level_teacher, capsys
):
    path, request = stopped_run(samples, small_jsonl, tmp_path)
    other = dataclasses.replace(request, tokenizer=str(byte_level_teacher))
    with pytest.raises(UserError, match="another request .*fingerprint"):
        prepare(other, tmp_path / "c", workers=0, show_progress=False)
    lines = small_jsonl[0].read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    made = prepare(request, tmp_path / "c", workers=0, show_progress=False)
    assert "the input of bad changed since" in capsys.readouterr().err
    assert made.manifest == prepare(request, tmp_path / "d", workers=0, show_progress=False).manifest


def test_a_file_that_changes_while_it_is_read_makes_no_corpus(samples, small_jsonl, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(small_jsonl[0].read_text())
    encode, lines = units.encode_unit, path.read_text().splitlines(keepends=True)

    def another_writes(*work):
        path.write_text("".join(lines[::-1]))
        return encode(*work)

    monkeypatch.setattr(units, "encode_unit", another_writes)
    with pytest.raises(UserError, match="the input of a changed while it was read"):
        prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    assert not (tmp_path / "c" / "manifest.json").exists()
    monkeypatch.undo()
    made = prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    assert len(list(documents_of(made, "train"))) == len(lines)
    assert made.manifest == prepare(request_for(samples, path), tmp_path / "d", workers=0, show_progress=False).manifest


def test_a_corpus_that_another_run_has_just_finished_is_not_replaced(samples, small_jsonl, tmp_path, monkeypatch):
    """The other one began earlier, and ends while this one loads its tokenizer."""
    path, out = small_jsonl[0], tmp_path / "c"
    load = Tokenizer.load

    def slow(*source, **options):
        monkeypatch.setattr(Tokenizer, "load", load)
        prepare(request_for(samples, path), out, workers=0, show_progress=False)
        return load(*source, **options)

    monkeypatch.setattr(Tokenizer, "load", slow)
    with pytest.raises(UserError, match="another request"):
        prepare(request_for(samples, path, min_tokens=5), out, workers=0, show_progress=False)
    assert Corpus.open(out).manifest.request["min_tokens"] == 1


def test_a_request_of_which_nothing_is_finished_leaves_the_folder_to_another(samples, small_jsonl, tmp_path):
    request = request_for(samples, small_jsonl[0])
    wrong = dataclasses.replace(request, sources=(Source.parse(f"jsonl,field=body:{small_jsonl[0]}"),))
    with pytest.raises(UserError, match="no field 'body'"):
        prepare(wrong, tmp_path / "c", workers=0, show_progress=False)
    prepare(request, tmp_path / "c", workers=0, show_progress=False)


def test_two_corpora_of_one_process_at_one_place_are_each_their_own(samples, small_jsonl, tmp_path, byte_level_teacher):
    for teacher in (samples.teacher, byte_level_teacher):
        request = dataclasses.replace(request_for(samples, small_jsonl[0]), tokenizer=str(teacher))
        made = prepare(request, tmp_path / "c", workers=0, show_progress=False)
        reference = AutoTokenizer.from_pretrained(teacher)
        ids = reference(small_jsonl[1][:1], add_special_tokens=False)["input_ids"][0]
        assert next(documents_of(made, "train"))[:-1] == ids
        shutil.rmtree(tmp_path / "c")


def test_a_source_of_which_nothing_is_read_is_named(samples, small_jsonl, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    request = request_for(samples, small_jsonl[0])
    both = dataclasses.replace(request, sources=(*request.sources, Source.parse(f"jsonl:{tmp_path}/empty.jsonl")))
    prepare(both, tmp_path / "c", workers=0, show_progress=False)
    assert "no document was read of source empty" in (said := capsys.readouterr().err) and "source small" not in said


def test_an_engine_that_cannot_be_had_is_refused_before_anything_is_written(samples, small_jsonl, tmp_path):
    for asked in (dict(workers=-1), dict(engine="slurm")):
        with pytest.raises(UserError, match="expected"):
            prepare(request_for(samples, small_jsonl[0]), tmp_path / "c", show_progress=False, **asked)
    assert not (tmp_path / "c").exists()


def test_a_second_run_in_the_same_folder_is_refused(samples, small_jsonl, tmp_path):
    path, request = stopped_run(samples, small_jsonl, tmp_path)
    with (tmp_path / "c" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `minilm prepare` is writing"):
            prepare(request, tmp_path / "c", workers=0, show_progress=False)


def test_a_file_that_vanishes_is_named(tmp_path):
    path = tmp_path / "books"
    path.mkdir()
    (path / "a.txt").write_text("A book.")
    (path / "b.txt").symlink_to(path / "a.txt")
    source = Source.parse(f"bookcorpus:{path}")
    (expanded,) = sources.expand((source,))
    units = list(sources.plan(expanded, 1))
    (path / "b.txt").unlink()
    with pytest.raises(OSError, match="b.txt"):
        [item for unit in units for item in sources.documents(unit)]


def test_many_sources_of_every_kind_in_one_call(samples, small_jsonl, tmp_path):
    _, texts = small_jsonl
    with lzma.open(tmp_path / "sw.txt.xz", "wt") as file:
        file.write("\n\n".join(texts[:200]))
    with lzma.open(tmp_path / "de.txt.xz", "wt") as file:
        file.write("\n\n".join(texts[200:300]))
    (tmp_path / "books").mkdir()
    for number in range(5):
        (tmp_path / "books" / f"{number}.txt").write_text("\n\n".join(texts[number * 20 : number * 20 + 20]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "p.parquet", row_group_size=100)
    kinds = (f"cc100:{tmp_path}/*.txt.xz", f"bookcorpus:{tmp_path}/books", f"parquet,language=en:{tmp_path}/p.parquet")
    request = PrepareRequest(
        tokenizer=str(samples.teacher),
        sources=tuple(map(Source.parse, kinds)),
        unit_bytes=20_000,
        shard_bytes=40_000,
        min_tokens=2,
    )
    for workers in (0, 2):
        corpus = prepare(request, tmp_path / f"c{workers}", workers=workers, show_progress=False)
    assert files_of(tmp_path / "c0") == files_of(tmp_path / "c2")
    languages = {shard.source: shard.language for shard in corpus.manifest.shards}
    assert languages == {"cc100-sw": "sw", "cc100-de": "de", "bookcorpus": "", "p": "en"}
    documents = {name: counts["documents"] for name, counts in corpus.manifest.counts.items()}
    assert documents == {"cc100-sw": 200, "cc100-de": 100, "bookcorpus": 5, "p": len(texts)}
    assert all(shard.bytes < 40_000 + 2 * 4000 for shard in corpus.shards("train") if shard.source != "bookcorpus")


def test_short_documents_are_dropped_and_counted(samples, small_jsonl, tmp_path):
    path, texts = small_jsonl
    corpus = prepare(request_for(samples, path, min_tokens=100), tmp_path / "c", workers=0, show_progress=False)
    counts = corpus.manifest.counts["small"]
    assert min(map(len, documents_of(corpus, "train"))) == 101
    assert counts["documents"] + counts["dropped_short"] == counts["documents_read"] == len(texts)


def test_the_manifest_says_who_encoded_what(samples, small_jsonl, tmp_path):
    path, texts = small_jsonl
    corpus = prepare(request_for(samples, path), tmp_path / "c", workers=0, show_progress=False)
    counts, encoder = corpus.manifest.counts["small"], corpus.manifest.tokenizer["encoder"]
    assert counts["fast_encoded"] + counts["reference_encoded"] == len(texts)
    assert counts["encoded_twice"] > 0
    assert encoder["fast"].startswith("tokie ") and encoder["reference"].startswith("tokenizers ")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sources": ()}, "no source given"),
        ({"validation_fraction": 1.0}, "validation fraction"),
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"limit_documents": 0}, "limit of 0"),
        ({"on_bad_record": "ignore"}, "expected stop or skip"),
        ({"encoder": "fast"}, "expected auto or reference"),
    ],
)
def test_requests_out_of_range(samples, options, message, tmp_path):
    request = dataclasses.replace(request_for(samples, "nowhere.jsonl"), **options)
    with pytest.raises(UserError, match=message):
        prepare(request, tmp_path / "c", workers=0, show_progress=False)
    with pytest.raises(UserError, match="expected local or ray"):
        prepare(request_for(samples, __file__), tmp_path / "c", engine="dask", show_progress=False)


def test_an_unfinished_folder_is_not_a_corpus(tmp_path):
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="not finished"):
        Corpus.open(tmp_path)


def test_one_compressed_file_keeps_two_workers_busy(samples, small_jsonl, tmp_path, monkeypatch):
    """The first two pieces of work wait for each other: they must be under way at the same time."""
    path = tmp_path / "one.jsonl.xz"
    path.write_bytes(lzma.compress(small_jsonl[0].read_bytes()))
    meeting = threading.Barrier(2, timeout=60)

    class TwoAtOnce(engines.InlineEngine):
        slots = 2

        def __init__(self):
            self.pool, self.meetings = ThreadPoolExecutor(2), 0

        def submit(self, function, *arguments):
            self.meetings += 1
            return self.pool.submit(self.run, self.meetings <= 2, function, *arguments)

        def run(self, waits, function, *arguments):
            if waits:
                meeting.wait()
            return function(*arguments)

        def close(self):
            self.pool.shutdown()

    engine = TwoAtOnce()
    monkeypatch.setattr(engines, "open_engine", lambda *_: engine)
    corpus = prepare(request_for(samples, path), tmp_path / "c", show_progress=False)
    assert engine.meetings > 4 and not meeting.broken
    assert corpus.manifest.counts["one"]["documents"] == len(small_jsonl[1])


def test_progress_is_plain_lines_in_a_log_and_a_bar_on_a_terminal(samples, small_jsonl, tmp_path, monkeypatch, capsys):
    path, texts = small_jsonl
    prepare(request_for(samples, path), tmp_path / "c", workers=0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "\r" not in lines[0]
    assert re.search(rf"prepare: +100\.0%, [\d.]+ MB/s text, {len(texts)} documents, [\d,]+ tokens, 0 s left", lines[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    prepare(request_for(samples, path), tmp_path / "d", workers=0)
    bar = capsys.readouterr().err
    assert "\r" in bar and "100%" in bar and f"{len(texts)} documents" in bar and "MB/s text" in bar
