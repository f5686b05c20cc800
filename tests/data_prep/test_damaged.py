"""Corpora that were damaged, and folders that are none: refused with the name of what is wrong, or read right."""

import copy
import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest

from data_prep import report
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.shards import Corpus, read_index
from data_prep.sources import Source
from data_prep.tokenizer import Tokenizer, fingerprint_of
from pipeline.loader import DataOptions, SampleSet

WRONG = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x",
    "\x00",
    "../../etc/passwd",
    "/etc/passwd",
    [],
    {},
    [1],
    {"a": 1},
    "é" * 999,
)


@pytest.fixture(scope="module")
def good(corpus_folder):
    return json.loads((corpus_folder / "manifest.json").read_text())


@pytest.fixture
def damaged(corpus_folder, tmp_path):
    """A copy of a real corpus, and a function that gives it another manifest."""
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")

    def write(manifest) -> None:
        (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))

    return folder, write


def use(folder) -> None:
    """All that reads a corpus."""
    corpus = Corpus.open(folder)
    report.table(corpus)
    for split in ("train", "validation"):
        if corpus.shards(split):
            for packing in ("window", "none"):
                samples = SampleSet(corpus, DataOptions(seq_tokens=32, seed=1, packing=packing), split)
                count = min(64, int(samples.sizes.sum()))
                samples.read(samples.locate(np.arange(count, dtype=np.int64)))


def places(value, path=()):
    """Every place in a JSON value: its keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(manifest, path, value):
    manifest = copy.deepcopy(manifest)
    target = manifest
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return manifest


# What says nothing of how a corpus is read, or is compared with a teacher's elsewhere.
LOOSE = {"request", "counts", "language", "bin_sha256", "idx_sha256", "encoder", "reference", "fast"}
LOOSE |= {"fingerprint", "vocabulary_tokens", "cls_id", "sep_id", "pad_id"}


def test_every_field_of_a_manifest_with_every_wrong_value(good, damaged):
    """Either a message, or a corpus that reads as it did (a request or a count may say what it likes)."""
    folder, write = damaged
    cases = refused = 0
    for path in places(good):
        if not path:
            continue
        for value in (*WRONG, ...):
            write(changed(good, path, value))
            cases += 1
            try:
                use(folder)
            except UserError as error:
                assert str(folder) in str(error)
                refused += 1
            else:
                assert path[0] in LOOSE or path[-1] in LOOSE or (path[0] == "shards" and value is ...), (path, value)
    assert cases > 700 and refused > 300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["shards"].append(m["shards"][0]), "is listed 2 times"),
        (lambda m: m["shards"][0].update(split="validation"), "is listed as validation of"),
        (lambda m: m["shards"][0].update(source="another"), "is listed as train of another"),
        (lambda m: m["shards"][0].update(path="../leads/train/leads-en/00000"), "path"),
        (lambda m: m["shards"][0].update(path="/train/leads-en/00000"), "path"),
        (lambda m: m["tokenizer"].update(sep_id=10**6), "outside of the vocabulary"),
        (lambda m: m.update(format_version=2), "format version 2"),
        (lambda m: m.update(extra=1), "extra"),
    ],
)
def test_what_no_preparation_writes_is_refused(change, words, good, damaged):
    folder, write = damaged
    manifest = copy.deepcopy(good)
    change(manifest)
    write(manifest)
    with pytest.raises(UserError, match=words):
        Corpus.open(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"x"', "{}", "[" * 100_000, '{"format_version": 1}', "\ufeff{}"]
)
def test_a_manifest_that_is_none(text, damaged):
    folder, write = damaged
    write(text)
    with pytest.raises(UserError, match="manifest.json"):
        Corpus.open(folder)


def test_an_index_whose_numbers_were_changed_is_refused_before_documents_are_read(damaged):
    """The file has its size and its header: only the lengths and offsets inside are wrong."""
    folder, _ = damaged
    path = next((folder / "train").rglob("*.idx"))
    whole = path.read_bytes()
    header, documents = 34, len(read_index(path).lengths)
    chance = random.Random(1)
    for _ in range(60):
        data = bytearray(whole)
        at = chance.randrange(header, header + 12 * documents)
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        corpus = Corpus.open(folder)
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            corpus.index(corpus.shards("train")[0])
        SampleSet(corpus, DataOptions(seq_tokens=32, seed=1)).sample(0)  # windows need no index


@pytest.mark.parametrize("packing", ["window", "none"])
def test_ids_that_no_embedding_exists_for_are_refused(packing, damaged):
    folder, _ = damaged
    path = next((folder / "train").rglob("*.bin"))
    tokens = np.fromfile(path, "<u2")
    tokens[::7] = 65_000
    tokens.tofile(path)
    samples = SampleSet(Corpus.open(folder), DataOptions(seq_tokens=32, seed=1, packing=packing))
    with pytest.raises(UserError, match=f"{path.name} holds the token id 65000, but the vocabulary has 30,522"):
        samples.read(samples.locate(np.arange(8, dtype=np.int64)))


def test_fingerprint_of_a_file_is_the_tokenizers(corpus_folder, samples, tmp_path):
    path = corpus_folder / "tokenizer" / "tokenizer.json"
    assert fingerprint_of(path) == Tokenizer.load(samples.teacher).fingerprint
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        fingerprint_of(tmp_path / "tokenizer.json")


# --- folders and tokenizers that prepare is given ------------------------------------------------------------------


@pytest.fixture
def request_of(samples, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Sentence number {n} of a small corpus."}) + "\n" for n in range(50)))

    def make(path=text, **changes):
        values = dict(tokenizer=str(samples.teacher), sources=(Source.parse(f"jsonl:{path}"),))
        return PrepareRequest(**values | changes)

    return make


def test_other_peoples_files_are_left_alone(request_of, tmp_path):
    own = tmp_path / "own"
    (own / "train").mkdir(parents=True)
    for name in ("thesis.pdf.partial", "train/thesis.pdf.partial"):
        (own / name).write_text("mine")
    with pytest.raises(UserError, match="holds files that are no corpus .*nothing was written"):
        prepare(request_of(), own, workers=0)
    assert sorted(str(p.relative_to(own)) for p in own.rglob("*")) == [
        "thesis.pdf.partial",
        "train",
        "train/thesis.pdf.partial",
    ]
    with pytest.raises(UserError, match="is a file"):
        prepare(request_of(), own / "thesis.pdf.partial", workers=0)


def test_a_file_put_beside_a_corpus_in_the_making_survives(request_of, tmp_path):
    out = tmp_path / "corpus"
    (out / ".work").mkdir(parents=True)
    (out / ".work" / "a.partial").write_text("ours")
    prepare(request_of(), out, workers=0)
    (out / "notes.partial").write_text("mine")
    assert prepare(request_of(), out, workers=0).manifest and (out / "notes.partial").read_text() == "mine"


def test_a_model_folder_without_a_tokenizer_makes_no_corpus(request_of, samples, tmp_path):
    """Of its configuration alone an empty tokenizer would be invented, to which every word is unknown."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(samples.teacher / "config.json", bare)
    with pytest.raises(UserError, match="holds no tokenizer: expected one of tokenizer.json"):
        prepare(request_of(tokenizer=str(bare)), tmp_path / "corpus", workers=0)
    assert not (tmp_path / "corpus").exists()


def test_unknown_tokens_are_counted_and_a_corpus_of_them_is_refused(request_of, tmp_path):
    runes = tmp_path / "runes.jsonl"
    runes.write_text("".join(json.dumps({"text": "ᚠᚢᚦᚨᚱᚲ ᚷᚹᚺᚾᛁᛃ ᛇᛈᛉᛊᛏᛒ " * 4}) + "\n" for _ in range(30)))
    with pytest.raises(UserError, match="9[0-9]% of the tokens of source runes are unknown"):
        prepare(request_of(runes), tmp_path / "runes", workers=0)
    assert not (tmp_path / "runes" / "manifest.json").exists()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps({"text": "One word is ᚠᚢᚦᚨᚱᚲ, and the others are plain English words."}) + "\n")
    counts = prepare(request_of(mixed), tmp_path / "mixed", workers=0).manifest.counts["mixed"]
    assert counts["unknown_tokens"] == 1


def test_an_empty_result_is_forgotten_so_that_its_source_can_be_mended(request_of, tmp_path):
    source, out = tmp_path / "later.jsonl", tmp_path / "corpus"
    source.write_text('{"text": ""}\n')
    for _ in range(2):
        with pytest.raises(UserError, match="the sources hold no tokens"):
            prepare(request_of(source), out, workers=0)
    source.write_text('{"text": "Now there is something to read."}\n' * 5)
    assert prepare(request_of(source), out, workers=0).manifest.shards


@pytest.mark.parametrize("kilobytes", [100, 400, 1000])
def test_a_full_disk_is_one_message_and_the_next_start_goes_on(kilobytes, samples, tmp_path):
    """Full while the tokenizer (700 KB) is saved, or at the first unit."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "A sentence that is repeated until it fills a disk."}\n' * 20_000)
    (tmp_path / "disk").mkdir()
    command = (
        f"import sys; from launch.cli import main; sys.argv[1:] = {['prepare', '--tokenizer', str(samples.teacher)]!r}"
    )
    command += f" + ['--source', 'jsonl:{text}', '--out', '{tmp_path}/disk/corpus', '--workers', '0']; main()"
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$1" && shift && "$@"'
    words = ["unshare", "--map-root-user", "--mount", "bash", "-c", mount, "bash", tmp_path / "disk"]
    words += [shutil.which("python"), "-c", command]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr[-3000:]
    assert "run the same command again" in process.stderr
