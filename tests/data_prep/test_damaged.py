"""Corpora that were damaged, whole or in the making: refused with the name of what is wrong, or read right."""

import contextlib
import copy
import io
import json
import random
import shutil

import numpy as np
import pytest
from rich.console import Console

from data_prep import report
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from data_prep.shards import Corpus
from data_prep.tokens.tokenizer import Tokenizer
from data_prep.tokens.tokenizer_files import fingerprint_of
from pipeline.data.loader import DataOptions, SampleSet
from tests.damage import changed, places

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
    report.show(corpus, Console(file=io.StringIO()), plot=folder.parent / "picture.svg")
    for split in ("train", "validation"):
        if corpus.shards(split):
            for packing in ("window", "none"):
                samples = SampleSet(corpus, DataOptions(seq_tokens=32, seed=1, packing=packing), split)
                count = min(64, int(samples.sizes.sum()))
                samples.read(samples.locate(np.arange(count, dtype=np.int64)))


# What says nothing of how a corpus is read, or is compared with a teacher's elsewhere.
LOOSE = {"request", "counts", "language", "bin_sha256", "idx_sha256", "encoder", "reference", "fast"}
LOOSE |= {"shortened", "fingerprint", "vocabulary_tokens", "cls_id", "sep_id", "pad_id"}


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
    header = 34
    chance = random.Random(1)
    for _ in range(60):
        data = bytearray(whole)
        at = chance.randrange(header, len(whole))
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


def test_bytes_that_were_changed_are_found_by_their_checksum_and_read_as_other_ids_or_refused(damaged):
    folder, _ = damaged
    paths = sorted(path for split in ("train", "validation") for path in (folder / split).rglob("*.*"))
    chance = random.Random(2)
    for _ in range(60):
        path = chance.choice(paths)
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 200))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # a damaged header is refused before
            assert Corpus.open(folder).verify() == [str(path.relative_to(folder))]
        try:
            use(folder)
        except UserError as error:
            assert path.name in str(error) and str(folder) in str(error)
        path.write_bytes(whole)
    assert Corpus.open(folder).verify() == []


@pytest.mark.parametrize("size", [0, 33, 34, -1, 1])
@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_files_of_another_size(suffix, size, damaged):
    folder, _ = damaged
    path = next((folder / "train").rglob(f"*.{suffix}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:size] if size != 1 else whole + b"\0")
    with pytest.raises(UserError, match=f"{path.name} in .* has"):
        use(folder)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_folders_and_links_in_the_place_of_files(suffix, damaged):
    folder, _ = damaged
    path = next((folder / "train").rglob(f"*.{suffix}"))
    path.unlink()
    for put, take in (
        (path.mkdir, path.rmdir),
        (lambda: path.symlink_to(path.name), path.unlink),
        (lambda: path.symlink_to("nowhere"), path.unlink),
    ):
        put()
        with pytest.raises(UserError, match=f"{path.name} is missing"):
            use(folder)
        take()


def test_a_file_that_changes_after_the_corpus_was_opened(damaged):
    folder, _ = damaged
    samples = SampleSet(Corpus.open(folder), DataOptions(seq_tokens=32, seed=1, packing="none"))
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="cut short|ends before byte"):
        samples.read(samples.locate(np.arange(8, dtype=np.int64)))


def test_a_tokenizer_that_is_missing_or_another_decodes_nothing(damaged, shown):
    """A missing folder is no name of a model on the hub."""
    folder, _ = damaged
    assert "document 0" in shown(Corpus.open(folder), sample=1)
    path = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["the"], settings["model"]["vocab"]["of"] = 1997, 1996
    for text in (json.dumps(settings), "{}", "[]", "{", "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match="tokenizer.json (has changed|cannot be read)"):
            shown(Corpus.open(folder), sample=1)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        shown(Corpus.open(folder), sample=1)


def test_names_are_shown_as_they_are(good, damaged, shown):
    folder, write = damaged
    manifest = copy.deepcopy(good)
    for shard in manifest["shards"]:
        shard["language"] = "[/x][bold]"
    manifest["counts"] = {"[/red]": {"[/x]": 1}}
    write(manifest)
    text = shown(Corpus.open(folder))
    assert "[/x][bold]" in text and "[/red]: [/x] 1" in text


@pytest.mark.parametrize("split", ["request.json", "parts", "shards"])
def test_what_an_unfinished_corpus_has_written_down(split, samples, tmp_path):
    """Damaged, it is refused by its name, and nothing is lost."""
    text, out = tmp_path / "text.jsonl", tmp_path / "corpus"
    text.write_text('{"text": "A sentence of some words that fill a unit."}\n' * 40 + "no JSON\n")
    request = PrepareRequest(
        tokenizer=str(samples.teacher), sources=(Source.parse(f"jsonl:{text}"),), unit_bytes=500, shard_bytes=300
    )
    with pytest.raises(UserError, match="bad record"):
        prepare(request, out, workers=0, show_progress=False)
    record = next(path for path in sorted((out / ".work").rglob("*.json")) if split in str(path))
    whole = record.read_bytes()
    for content in (b"", b"{", b"[1]", b"7", b"null", b'"x"', b"\xff", whole[:-1]):
        record.write_bytes(content)
        with pytest.raises(UserError, match=f"{record.name} is damaged"):
            prepare(request, out, workers=0, show_progress=False)
    record.write_bytes(whole)
    with pytest.raises(UserError, match="bad record"):
        prepare(request, out, workers=0, show_progress=False)
