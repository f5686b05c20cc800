"""Folders that prepare is given: other people's, models without a tokenizer, empty sources, full disks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source, expand
from data_prep.request import request_from
from data_prep.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
HEX = "0123456789abcdef" * 2


@pytest.fixture
def request_of(samples, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Sentence number {n} of a small corpus."}) + "\n" for n in range(50)))

    def make(path=text, **changes):
        values = dict(tokenizer=str(samples.teacher), sources=(Source.parse(f"jsonl:{path}"),))
        return PrepareRequest(**values | changes)

    return make


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.pdf.partial", "train/thesis.pdf.partial"],
        [".work/thesis.txt"],
        [".work/request.json/thesis.txt"],
        ["manifest.json/thesis.txt"],
        ["manifest.json", "icons/192.png"],
    ],
)
def test_other_peoples_folders_are_refused_and_left_as_they_are(names, request_of, tmp_path):
    own = tmp_path / "own"
    for name in names:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text('{"name": "mine"}')
    before = names_in(own)
    with pytest.raises(UserError, match=f"{own}.*[Nn]othing was written"):
        prepare(request_of(), own, workers=0)
    assert names_in(own) == before


def test_a_file_and_a_link_to_nothing_are_no_folders(request_of, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="file is a file"):
        prepare(request_of(), tmp_path / "file", workers=0)
    with pytest.raises(UserError, match="link is a symbolic link that leads nowhere"):
        prepare(request_of(), tmp_path / "link", workers=0)


def test_of_partial_files_only_its_own_are_removed(request_of, tmp_path):
    """In a folder where a preparation was killed, and where somebody has put files since."""
    out, source = tmp_path / "corpus", tmp_path / "later.jsonl"
    source.write_text("no JSON")
    with pytest.raises(UserError, match="bad record"):
        prepare(request_of(source), out, workers=0)
    ours = [f"train/later/00000.bin.{HEX}.partial", "train/later/00000.idx.partial", "manifest.json.partial"]
    mine = ["thesis.pdf.partial", "train/thesis.pdf.partial", "train/later/thesis.pdf.partial", "tokenizer/a.partial"]
    for name in [*ours, *mine]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    with pytest.raises(UserError, match="bad record"):
        prepare(request_of(source), out, workers=0)
    assert [name for name in [*ours, *mine] if (out / name).exists()] == mine


@pytest.mark.parametrize("begun", [[], ["lock"], ["lock", "request.json.partial"]])
def test_a_start_that_was_killed_at_once_goes_on(begun, request_of, tmp_path):
    (tmp_path / "corpus" / ".work").mkdir(parents=True)
    for name in begun:
        (tmp_path / "corpus" / ".work" / name).write_text("")
    assert prepare(request_of(), tmp_path / "corpus", workers=0).manifest.shards


def test_a_damaged_result_is_refused_with_what_can_be_done_about_it(request_of, tmp_path):
    """Not with the advice to prepare it again, which is what was asked for."""
    corpus = prepare(request_of(), tmp_path / "corpus", workers=0)
    (corpus.folder / f"{corpus.manifest.shards[0].path}.idx").unlink()
    with pytest.raises(UserError, match="idx is missing .*choose another --out, or delete that folder first"):
        prepare(request_of(), tmp_path / "corpus", workers=0)


def test_a_model_folder_without_a_tokenizer_makes_no_corpus(request_of, samples, tmp_path):
    """Of its configuration alone an empty tokenizer would be invented, to which every word is unknown."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(samples.teacher / "config.json", bare)
    with pytest.raises(UserError, match="holds no tokenizer: expected one of tokenizer.json"):
        prepare(request_of(tokenizer=str(bare)), tmp_path / "corpus", workers=0)
    assert not (tmp_path / "corpus").exists()


def test_a_vocabulary_that_was_cut_short_makes_no_corpus(request_of, samples, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(samples.teacher / "config.json", bare)
    lines = (samples.teacher / "vocab.txt").read_text().splitlines()
    (bare / "vocab.txt").write_text("\n".join(lines[:9000]))
    with pytest.raises(UserError, match="knows 9,000 tokens, the model there has 30,522"):
        prepare(request_of(tokenizer=str(bare)), tmp_path / "corpus", workers=0)
    (bare / "config.json").write_text('{"model_type": "bert", "vocab_size": 9216}')
    assert prepare(request_of(tokenizer=str(bare)), tmp_path / "corpus", workers=0).manifest.shards


def test_unknown_tokens_are_counted_and_a_corpus_of_them_is_refused(request_of, shown, tmp_path, capsys):
    runes = tmp_path / "runes.jsonl"
    runes.write_text("".join(json.dumps({"text": "ᚠᚢᚦᚨᚱᚲ"}) + "\n" for _ in range(30)))
    with pytest.raises(UserError, match="100% of the tokens of source runes are unknown"):
        prepare(request_of(runes), tmp_path / "runes", workers=0)
    assert not (tmp_path / "runes" / "manifest.json").exists()
    mixed = tmp_path / "mixed.jsonl"
    text = json.dumps({"text": "One word is ᚠᚢᚦᚨᚱᚲ, and the others are plain English words."}) + "\n"
    mixed.write_text(text + '{"text": "ᚠ"}\n' + text)
    corpus = prepare(request_of(mixed, min_tokens=2), tmp_path / "mixed", workers=0, show_progress=False)
    counts = corpus.manifest.counts["mixed"]
    assert (counts["documents"], counts["text_tokens"], counts["unknown_tokens"]) == (2, 26, 2)
    assert counts["tokens"] == counts["text_tokens"] + counts["documents"]
    assert "8% of the tokens of source mixed are unknown" in capsys.readouterr().err
    assert "unknown tokens 2 (7.7% of the text)" in shown(corpus)


@pytest.mark.parametrize("teacher", ["byte_level_teacher", "unigram_teacher"])
def test_to_a_tokenizer_of_bytes_or_characters_other_scripts_are_no_more_unknown_than_to_its_own(
    teacher, request, request_of, tmp_path
):
    """Bytes know everything; of a vocabulary of characters each unknown one is counted."""
    source = tmp_path / "runes.jsonl"
    source.write_text(json.dumps({"text": "One word is ᚠᚢᚦᚨᚱᚲ, and the others are plain English words."}) + "\n")
    folder = request.getfixturevalue(teacher)
    counts = prepare(request_of(source, tokenizer=str(folder)), tmp_path / "corpus", workers=0).manifest.counts["runes"]
    ids = Tokenizer.load(folder).encode_batch(["One word is ᚠᚢᚦᚨᚱᚲ, and the others are plain English words."])[0]
    unknown = Tokenizer.load(folder).unknown_id
    assert counts["unknown_tokens"] == (ids == unknown).sum() == (0 if teacher == "byte_level_teacher" else 1)


def test_an_empty_result_is_forgotten_so_that_its_source_can_be_mended(request_of, tmp_path):
    source, out = tmp_path / "later.jsonl", tmp_path / "corpus"
    source.write_text('{"text": ""}\n')
    for _ in range(2):
        with pytest.raises(UserError, match="the sources hold no tokens"):
            prepare(request_of(source), out, workers=0)
    source.write_text('{"text": "Now there is something to read."}\n' * 5)
    assert prepare(request_of(source), out, workers=0).manifest.shards


def test_what_a_corpus_file_may_hold_for_a_source(tmp_path):
    """Values of every type, and names that no folder could have."""
    wrong = {"path": 3, "kind": ["jsonl"], "name": "n" * 101, "language": 1.5, "field": {}, "rows_per_document": []}
    for key, value in wrong.items():
        table = {"kind": "jsonl", "path": "a.jsonl", key: value}
        (tmp_path / "corpus.toml").write_text(
            'tokenizer = "t"\n[[source]]\n' + "".join(f"{name} = {json.dumps(v)}\n" for name, v in table.items())
            if value != {}
            else 'tokenizer = "t"\n[[source]]\nkind = "jsonl"\npath = "a.jsonl"\nfield = {}\n'
        )
        with pytest.raises(UserError, match=key if key != "name" else "source name"):
            request_from(tmp_path / "corpus.toml", [])


def test_no_source_gets_a_folder_outside_of_the_corpus(tmp_path):
    (tmp_path / "en.txt").write_text("text")
    with pytest.raises(UserError, match=r"would be called 'cc100-../../x'"):
        expand((Source.parse(f"cc100,language=../../x:{tmp_path / 'en.txt'}"),))
    long = tmp_path / f"{'n' * 240}.txt"
    long.write_text("text")
    assert len(expand((Source.parse(f"text:{long}"),))[0].name) < 100


# Prepares on disks that are full at another moment each, then goes on with room; opens the last one read-only.
FULL_DISKS = """
import subprocess, sys
from pathlib import Path
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.shards import Corpus
from data_prep.readers.sources import Source

root, teacher, text, *sizes = sys.argv[1:]
request = PrepareRequest(tokenizer=teacher, sources=(Source.parse(f"jsonl:{text}"),), unit_bytes=60_000,
                         shard_bytes=40_000, validation_fraction=0.1)
results = []
for size in [str(1 << 16), *sizes]:
    disk = Path(root, size)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        prepare(request, disk / "corpus", workers=0, show_progress=False)
    except UserError as error:
        print(error)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    prepare(request, disk / "corpus", workers=0, show_progress=False)
    results.append({path.relative_to(disk): path.read_bytes() for path in disk.rglob("*") if path.is_file()})
assert all(result == results[0] for result in results)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
assert prepare(request, disk / "corpus", workers=0).verify() == []
"""


@pytest.mark.slow
def test_full_and_read_only_disks(samples, tmp_path):
    """Whatever is being written, one message; with room the result is the same to the byte, and needs no writing."""
    text, tokenizer = tmp_path / "text.jsonl", Tokenizer.load(samples.teacher)
    text.write_text("".join(samples.leads("en").open(encoding="utf-8").readlines()[:400]))
    tokenizer.save(tmp_path / "saved")
    kept = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir()) >> 10
    tokenizer.encoder.save(tmp_path / "saved")
    needed = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir()) >> 10
    needed += kept  # the tokenizer twice: for the corpus, and for the workers
    sizes = [4, kept // 2, kept + 20, needed - 100, needed + 50, needed + 80, needed + 180, needed + 200]
    (tmp_path / "disks").mkdir()
    words = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISKS]
    words += [tmp_path / "disks", samples.teacher, text, *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    said = process.stdout.splitlines()
    assert all("run the same command again" in line for line in said)
    for words in ("corpus/tokenizer:", "corpus/.work/encoder:", "unit ", "shard "):
        assert any(words in line for line in said), said
