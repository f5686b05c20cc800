"""Every kind of source: the documents in it, whatever the compression and however it is cut into units."""

import bz2
import functools
import gzip
import json
import lzma
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.errors import UserError
from data_prep.readers import formats, sources
from data_prep.readers.formats import BadRecord
from data_prep.readers.sources import Source

COMPRESSORS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def items_of(source, unit_bytes=1 << 20):
    """All documents and bad records of a source, read unit by unit and block by block."""
    found = []
    for expanded in sources.open_tables(sources.expand((source,))):
        for unit in sources.plan(expanded, unit_bytes):
            if unit.streamed:
                for block in sources.blocks(unit, unit_bytes):
                    found += sources.documents(unit, block)
            else:
                found += sources.documents(unit)
    return found


def texts_of(source, unit_bytes=1 << 20):
    found = items_of(source, unit_bytes)
    assert all(isinstance(item, str) for item in found), found
    return found


def write(path, text, suffix=""):
    path = path.with_name(path.name + suffix)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(COMPRESSORS[suffix](data))
    return path


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_jsonl_is_the_same_however_it_is_cut(tmp_path, suffix, unit_bytes):
    texts = [f"document {number} " + "é\u2028x" * (number % 9) for number in range(40)]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts))
    path = write(tmp_path / "a.jsonl", lines + "\n", suffix)
    assert texts_of(Source.parse(f"jsonl:{path}"), unit_bytes) == texts


def test_zstandard(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    compress = functools.partial(pyarrow.compress, codec="zstd", asbytes=True)
    texts = [f"text {number} " + "x" * 100 for number in range(3000)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(compress(data[:100_000]) + compress(data[100_000:]))
    assert texts_of(Source.parse(f"jsonl:{path}")) == texts
    path.write_bytes(path.read_bytes()[:-20])
    assert "truncated or damaged" in items_of(Source.parse(f"jsonl:{path}"))[-1].describe()


@pytest.mark.parametrize("unit_bytes", [1, 10, 1 << 20])
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_cc100_documents_end_at_blank_lines(tmp_path, suffix, unit_bytes):
    path = write(tmp_path / "sw.txt", "first\nparagraph two\n\nsecond document\n\nthird: čšž\n", suffix)
    (source,) = sources.expand((Source.parse(f"cc100:{path}"),))
    assert (source.name, source.language) == ("cc100-sw", "sw")
    assert texts_of(source, unit_bytes) == ["first\nparagraph two", "second document", "third: čšž"]


@pytest.mark.parametrize("unit_bytes", [1, 20, 1 << 20])
@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("source", ["cc100", "text,documents=paragraph"])
def test_texts_as_windows_writes_them(tmp_path, source, suffix, unit_bytes):
    """A byte-order mark, carriage returns and blank lines that hold spaces are no text, and hide no blank line."""
    lines = ["\ufefffirst", "line two", "", "second", " \t", "third", ""]
    path = write(tmp_path / "sw.txt", "\r\n".join(lines), suffix)
    assert texts_of(Source.parse(f"{source}:{path}"), unit_bytes) == ["first\nline two", "second", "third"]
    assert texts_of(Source.parse(f"text:{path}")) == ["first\nline two\n\nsecond\n \t\nthird"]
    assert texts_of(Source.parse(f"text,documents=line:{path}"), unit_bytes) == ["first", "line two", "second", "third"]


def test_files_are_found_behind_links_and_in_any_case_and_the_others_are_told(tmp_path, capsys):
    books, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    books.mkdir()
    elsewhere.mkdir()
    for path in (books / "a.txt", books / "B.TXT", books / "notes.md", elsewhere / "c.txt"):
        write(path, path.name)
    (books / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(books)
    assert texts_of(Source.parse(f"text:{books}")) == ["B.TXT", "a.txt", "c.txt"]
    assert "1 files in" in (said := capsys.readouterr().err) and "notes.md" in said
    for name in ("dewiki-x-pages-articles.xml.bz2", "enwiki-x-pages-articles1.xml-p1p41242.bz2"):
        write(tmp_path / name, b"")
    found = sources.expand((Source.parse(f"wikipedia:{tmp_path}"),))
    assert [source.name for source in found] == ["wikipedia-de", "wikipedia-en"]
    write(tmp_path / "x.xml.7z", b"7z")
    with pytest.raises(UserError, match="x.xml.7z is of a kind that is not read"):
        sources.expand((Source.parse(f"wikipedia:{tmp_path}/*.7z"),))


def test_parquet_under_any_name(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "0a1b2c")
    assert texts_of(Source.parse(f"parquet:{tmp_path}/0a1b2c")) == ["one", "two"]


def test_cc100_folder_has_a_source_for_each_language(tmp_path):
    for language in ("sw", "de", "zh-Hans", "my_zaw"):
        write(tmp_path / f"{language}.txt", "text\n", ".xz")
    for spelled in (tmp_path, tmp_path / "*.txt.xz"):
        expanded = sources.expand((Source.parse(f"cc100:{spelled}"),))
        assert [(s.name, s.language) for s in expanded] == [
            ("cc100-de", "de"),
            ("cc100-my_zaw", "my_zaw"),
            ("cc100-sw", "sw"),
            ("cc100-zh-Hans", "zh-Hans"),
        ]


def test_books_in_a_folder_are_one_document_each(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "Book B.\n\nChapter 2.\n", "a.txt": "Book A.", "sub/c.txt": "Book C."}.items():
        write(tmp_path / name, text)
    (tmp_path / "notes.md").write_text("not a book")
    assert texts_of(Source.parse(f"bookcorpus:{tmp_path}")) == ["Book A.", "Book B.\n\nChapter 2.", "Book C."]


@pytest.mark.parametrize("documents, expected", [("file", 1), ("paragraph", 2), ("line", 3)])
def test_plain_text_documents(tmp_path, documents, expected):
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    found = texts_of(Source.parse(f"text,documents={documents}:{path}"))
    assert len([text for text in found if text]) == expected


def parquet(path, rows, column="text", group_rows=10):
    table = pyarrow.table({"id": list(range(len(rows))), column: rows})
    pyarrow.parquet.write_table(table, path, row_group_size=group_rows)
    return path


def test_parquet(tmp_path):
    texts = [f"row {number}" for number in range(35)]
    path = parquet(tmp_path / "a.parquet", texts)
    assert texts_of(Source.parse(f"parquet:{path}"), 1) == texts
    assert texts_of(Source.parse(f"wikipedia,language=en:{path}")) == texts


def test_bookcorpus_sentences_are_joined_back(tmp_path):
    path = parquet(tmp_path / "books.parquet", [f"sentence {n} ." for n in range(25)], group_rows=100)
    found = texts_of(Source.parse(f"bookcorpus,rows_per_document=10:{path}"))
    assert [text.count("sentence") for text in found] == [10, 10, 5]
    assert found[0].startswith("sentence 0 . sentence 1 .")
    assert len(texts_of(Source.parse(f"bookcorpus:{path}"))) == 1


def test_saved_datasets_and_local_repositories(tmp_path):
    import datasets

    texts = [f"text {number}" for number in range(50)]
    table = datasets.Dataset.from_dict({"body": texts})
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "repository").mkdir()
    parquet(tmp_path / "repository" / "train.parquet", texts, column="body")
    for folder in ("saved", "both", "repository"):
        assert texts_of(Source.parse(f"hub,field=body:{tmp_path / folder}"), 100) == texts
    with pytest.raises(UserError, match="no column 'text', only body"):
        texts_of(Source.parse(f"hub:{tmp_path / 'saved'}"))


def test_a_dataset_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="hub dataset 'nobody/nothing'.*cannot be opened"):
        texts_of(Source.parse("hub:nobody/nothing"))


BAD_JSONL = {
    b'{"text": "ok"}\n{"text": broken\n{"text": "last"}\n': (2, "not valid JSON"),
    b'{"text": "ok"}\n{"body": "other"}\n{"text": "last"}\n': (2, "no field 'text'"),
    b'{"text": "ok"}\n\n{"text": 5}\n{"text": "last"}\n': (3, "is int, expected a string"),
    b'{"text": "ok"}\n{"text": "\xff\xfe"}\n{"text": "last"}\n': (2, "not valid UTF-8"),
    b'{"text": "ok"}\n[1, 2]\n{"text": "last"}\n': (2, "no field 'text'"),
    b'{"text": "ok"}\n{"text": "half \\ud800 pair"}\n{"text": "last"}\n': (2, "surrogate"),
}


@pytest.mark.parametrize("data", BAD_JSONL)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_json_records_are_named_by_file_and_line(tmp_path, data, suffix):
    line, reason = BAD_JSONL[data]
    path = write(tmp_path / "a.jsonl", data, suffix)
    good_1, bad, good_2 = items_of(Source.parse(f"jsonl:{path}"))
    assert (good_1, good_2) == ("ok", "last")
    assert isinstance(bad, BadRecord)
    assert f"{path}, line {line} " in bad.describe() and reason in bad.describe()


def test_bad_bytes_in_plain_text(tmp_path):
    path = write(tmp_path / "xx.txt", b"good\n\nbad \xff bytes\n\ngood again\n")
    items = items_of(Source.parse(f"cc100:{path}"))
    assert [type(item) for item in items] == [str, BadRecord, str]
    assert "line 3" in items[1].describe()


def test_missing_values_and_columns_in_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["one", None, "three"])
    items = items_of(Source.parse(f"parquet:{path}"))
    assert "row 1" in items[1].describe() and "NoneType" in items[1].describe()
    with pytest.raises(UserError, match="no column 'body', only id, text"):
        items_of(Source.parse(f"parquet,field=body:{path}"))
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match="b.parquet is not a readable Parquet file"):
        items_of(Source.parse(f"parquet:{tmp_path / 'b.parquet'}"))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("unit_bytes", [500, 1 << 20])
def test_truncated_compressed_file_gives_its_whole_records_and_says_so(tmp_path, suffix, unit_bytes, samples):
    path = write(tmp_path / "a.jsonl", samples.leads().read_bytes()[:3_000_000], suffix)
    whole = [item for item in items_of(Source.parse(f"jsonl:{path}")) if isinstance(item, str)]
    if suffix == ".gz":  # without its checksum: nothing of the text is missing
        complete = path.read_bytes()
        path.write_bytes(complete[:-9])
        *documents, torn = items_of(Source.parse(f"jsonl:{path}"), unit_bytes)
        assert isinstance(torn, BadRecord) and len(documents) >= len(whole) - 2
        path.write_bytes(complete)
    path.write_bytes(path.read_bytes()[:-200_000])
    *documents, torn = items_of(Source.parse(f"jsonl:{path}"), unit_bytes)
    assert isinstance(torn, BadRecord) and "truncated or damaged" in torn.describe()
    assert documents == whole[: len(documents)]
    assert 0 < len(documents) < len(whole)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_what_follows_a_compressed_file_and_is_no_stream_is_damage(tmp_path, suffix):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n', suffix)
    whole = path.read_bytes()
    path.write_bytes(whole + COMPRESSORS[suffix](b'{"text": "two"}\n') + bytes(8))  # another stream, and padding
    assert texts_of(Source.parse(f"jsonl:{path}")) == ["one", "two"]
    for damaged in (whole + b"garbage", b""):
        path.write_bytes(damaged)
        *texts, bad = items_of(Source.parse(f"jsonl:{path}"))
        assert texts in ([], ["one"]) and isinstance(bad, BadRecord) and "truncated or damaged" in bad.describe()


def test_parquet_columns_that_hold_no_text_are_bad_records_row_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1]
    broken = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"a\xff\xfe"))
    columns = [([1, 2], "int"), (["a", None], "NoneType"), ([["a"], ["b"]], "list"), ([{"x": "a"}], "dict")]
    for values, kind in [*columns, ([b"a", b"b"], "bytes"), (broken, "bytes")]:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
        bad = items_of(Source.parse(f"parquet:{path}"))[-1]
        assert isinstance(bad, BadRecord) and f"holds {kind}, expected a string" in bad.describe()


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some words to compress"] * 9000}), path, compression="zstd")
    whole = bytearray(path.read_bytes())
    whole[30:60] = bytes(30)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="a.parquet is damaged"):
        items_of(Source.parse(f"parquet:{path}"))


def test_half_a_surrogate_is_a_bad_record_escaped_or_raw(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "a\xed\xa0\x80b"}\n{"text": "a\\ud800b"}\n{"text": "two"}\n')
    one, raw, escaped, two = items_of(Source.parse(f"jsonl:{path}"))
    assert (one, two) == ("one", "two") and "line 2" in raw.describe()
    assert all("half a surrogate pair" in bad.describe() for bad in (raw, escaped))


def test_an_empty_file_has_no_documents(tmp_path):
    assert texts_of(Source.parse(f"jsonl:{write(tmp_path / 'a.jsonl', '')}")) == []
    assert texts_of(Source.parse(f"jsonl:{write(tmp_path / 'b.jsonl', '', '.xz')}")) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("jsonl", "expected KIND:PATH"),
        ("csv:a.csv", "KIND one of wikipedia, bookcorpus"),
        ("jsonl:", "expected KIND:PATH"),
        ("jsonl,colour=red:a", "colour is not known"),
        ("text,documents=page:a", "documents='page'"),
        ("jsonl,name=../x:a", "source name"),
        ("parquet,rows_per_document=many:a", "no number of rows"),
        ("parquet,rows_per_document=-3:a", "no number of rows"),
        ("jsonl,rows_per_document=5:a", "kind jsonl has no option rows_per_document"),
        ("cc100,documents=line:a", "kind cc100 has no option documents"),
        ("jsonl,path=b:a", "says path twice"),
        ("jsonl,name=b,name=c:a", "twice"),
    ],
)
def test_sources_that_are_mistyped(text, message):
    with pytest.raises(UserError, match=message):
        Source.parse(text)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        sources.expand((Source.parse(f"jsonl:{tmp_path}/x.jsonl"),))
    with pytest.raises(UserError, match="no file ending in .jsonl"):
        sources.expand((Source.parse(f"jsonl:{tmp_path}"),))
    write(tmp_path / "a.jsonl", "")
    with pytest.raises(UserError, match="two sources are called 'a'"):
        sources.expand((Source.parse(f"jsonl:{tmp_path}/a.jsonl"),) * 2)


def test_reading_needs_little_memory_whatever_the_size(tmp_path):
    path = tmp_path / "big.txt.xz"
    with lzma.open(path, "wb", preset=0) as file:
        for _ in range(200):
            file.write((b"some text " * 50 + b"\n\n") * 500)  # 50 MB in all
    tracemalloc.start()
    unit_bytes = 1 << 20
    (source,) = sources.expand((Source.parse(f"cc100,language=en:{path}"),))
    count = 0
    for unit in sources.plan(source, unit_bytes):
        for block in formats.span_blocks(unit.spans[0], b"\n\n", unit_bytes):
            count += sum(1 for _ in sources.documents(unit, block))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count >= 100_000
    assert peak_bytes < 16 << 20
