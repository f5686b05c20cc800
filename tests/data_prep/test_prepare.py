"""From sources to a corpus: content, determinism, resuming, refusals."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.shards import Corpus
from data_prep.sources import Source


def files_of(folder):
    """Every file of a corpus and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    corpus = prepare(request_for(samples, path), tmp_path / "c", workers=1, show_progress=False)
    reference = AutoTokenizer.from_pretrained(samples.teacher)
    expected = [ids + [reference.sep_token_id] for ids in reference(texts, add_special_tokens=False)["input_ids"]]
    assert list(documents_of(corpus, "train")) == expected
    assert len(corpus.shards("train")) > 1
    assert not (tmp_path / "c" / ".work").exists()


def test_workers_do_not_change_a_byte(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    request = request_for(samples, path, validation_fraction=0.1)
    for workers in (1, 3):
        prepare(request, tmp_path / str(workers), workers=workers, show_progress=False)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_another_request_into_the_same_folder_is_refused(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    prepare(request_for(samples, path), tmp_path / "c", workers=1, show_progress=False)
    before = files_of(tmp_path / "c")
    with pytest.raises(UserError, match="min_tokens"):
        prepare(request_for(samples, path, min_tokens=5), tmp_path / "c", workers=1, show_progress=False)
    prepare(request_for(samples, path), tmp_path / "c", workers=1, show_progress=False)
    assert files_of(tmp_path / "c") == before


def test_validation_split_is_decided_by_the_text(samples, small_jsonl, tmp_path):
    path, texts = small_jsonl
    corpus = prepare(
        request_for(samples, path, validation_fraction=0.2), tmp_path / "a", workers=1, show_progress=False
    )
    held_out = list(documents_of(corpus, "validation"))
    assert 0.1 < len(held_out) / len(texts) < 0.3
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(json.dumps({"text": text}) for text in reversed(texts)) + "\n")
    again = prepare(
        request_for(samples, shuffled, validation_fraction=0.2), tmp_path / "b", workers=1, show_progress=False
    )
    assert list(documents_of(again, "validation")) == held_out[::-1]


def test_limit_takes_the_first_documents(samples, small_jsonl, tmp_path):
    path, _ = small_jsonl
    everything = prepare(request_for(samples, path), tmp_path / "all", workers=1, show_progress=False)
    some = prepare(request_for(samples, path, limit_documents=250), tmp_path / "some", workers=2, show_progress=False)
    assert list(documents_of(some, "train")) == list(documents_of(everything, "train"))[:250]


def test_an_unfinished_folder_is_not_a_corpus(tmp_path):
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="not finished"):
        Corpus.open(tmp_path)
