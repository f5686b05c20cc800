"""Requests from TOML files and command lines, and what `inspect` shows."""

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from data_prep import report
from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.readers.sources import Source
from data_prep.request import parse_size, request_from


@pytest.fixture
def corpus_file(tmp_path, samples):
    lines = samples.leads("en").read_text().splitlines()[:100]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = tmp_path / "corpus.toml"
    path.write_text(
        f'tokenizer = "{samples.teacher}"\nvalidation_fraction = 0.1\nshard_bytes = "10KB"\n\n'
        '[[source]]\nkind = "jsonl"\npath = "a.jsonl"\nlanguage = "en"\n'
    )
    return path


def test_file_and_command_line_together(corpus_file, tmp_path):
    request = request_from(corpus_file, ["text:b.txt"], min_tokens=3, validation=0.2, limit=None)
    assert request.validation_fraction == 0.2
    assert request.min_tokens == 3
    assert request.shard_bytes == 10_000
    assert [source.path for source in request.sources] == [str(tmp_path / "a.jsonl"), "b.txt"]
    assert request.sources[0] == Source(kind="jsonl", path=str(tmp_path / "a.jsonl"), language="en")


@pytest.mark.parametrize(
    "content, message",
    [
        ("tokenizer = ", "not valid TOML"),
        ('tokens = "x"', "tokens is not known; known are"),
        ('tokenizer = "x"\nmin_tokens = "five"', "min_tokens = 'five' has the wrong type"),
        ("min_tokens = 5", "no tokenizer given"),
        ('tokenizer = "x"\nsource = "a.jsonl"', r"\[\[source\]\]"),
        ('tokenizer = "x"\n[[source]]\nkind = "jsonl"', "a source needs path"),
        ('tokenizer = "x"\n[[source]]\nkind = "jsonl"\npath = "a"\ncolour = 1', "colour is not known"),
    ],
)
def test_mistakes_in_the_file(tmp_path, content, message):
    path = tmp_path / "c.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        request_from(path, [])


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        request_from(tmp_path / "c.toml", [])


@pytest.mark.parametrize("text, size", [("1GB", 10**9), ("1.5 MiB", 3 << 19), ("20kb", 20_000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1TB2", "big", "-1MB", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="expected a number with KB"):
        parse_size(text)


def test_inspect_shows_a_table_samples_checksums_and_a_picture(corpus_file, tmp_path):
    corpus = prepare(request_from(corpus_file, []), tmp_path / "c", workers=0, show_progress=False)
    out = io.StringIO()
    report.show(corpus, Console(file=out, width=150), sample=4, verify=True, plot=tmp_path / "c.svg")
    shown = out.getvalue()
    for expected in ("train", "validation", "en", "20th - century classical music", "checksums of the manifest"):
        assert expected in shown
    assert f"{sum(shard.tokens for shard in corpus.shards('train')):,}" in shown
    assert shown.count("document ") >= 4
    picture = "".join(ElementTree.parse(tmp_path / "c.svg").getroot().itertext())
    assert "Documents by length" in picture and "en" in picture

    path = corpus.folder / f"{corpus.shards('train')[0].path}.bin"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match="checksums differ.*train/a/00000.bin"):
        report.show(corpus, Console(file=out), verify=True)
    with pytest.raises(UserError, match="ends in .svg"):
        report.show(corpus, Console(file=out), plot=tmp_path / "c.png")
