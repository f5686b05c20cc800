"""Wikipedia dumps: which pages, what text, and multistream dumps read in pieces."""

import bz2
import html
import re

import pytest

from data_prep.errors import UserError
from data_prep.readers import compression, formats, sources
from data_prep.readers.formats import BadRecord
from data_prep.readers.sources import Source
from data_prep.readers.wikipedia import dropped_namespaces
from data_prep.readers.wikitext import clean
from tests.data_prep.readers.test_sources import items_of, texts_of


@pytest.fixture(scope="module")
def articles(samples):
    (source,) = sources.expand((Source.parse(f"wikipedia,language=en:{samples.enwiki}"),))
    (unit,) = sources.plan(source, 64 << 20)
    return list(sources.documents(unit))


def some_pages(samples, count=130):
    """The head of the sample, and its first pages."""
    xml = bz2.decompress(samples.enwiki.read_bytes())
    return xml[: xml.index(b"<page>")], re.findall(rb"\s*<page>.*?</page>", xml, re.DOTALL)[:count]


def multistream(path, samples, pages_per_stream):
    """Writes pages as Wikipedia does: the head, then a bzip2 stream for every few pages, then the end."""
    head, pages = some_pages(samples)
    groups = [b"".join(pages[i : i + pages_per_stream]) for i in range(0, len(pages), pages_per_stream)]
    path.write_bytes(b"".join(map(bz2.compress, [head, *groups, b"\n</mediawiki>"])))
    return path


def block_of_pages(folder, head, pages):
    """A dump of pages (title, wikitext) as one block."""
    made = "".join(
        f"<page><title>{title}</title><ns>0</ns><revision><model>wikitext</model>"
        f"<text>{html.escape(text)}</text></revision></page>"
        for title, text in pages
    )
    path = folder / "xxwiki-1.xml"
    path.write_text(f"<mediawiki>{head}{made}</mediawiki>")
    return formats.Block(str(path), 0, path.read_bytes())


def test_the_sample_has_its_articles_and_no_redirects(articles, samples):
    xml = bz2.decompress(samples.enwiki.read_bytes()).decode()
    pages = re.findall(r"<page>.*?</page>", xml, re.DOTALL)
    kept = [p for p in pages if "<ns>0</ns>" in p and "<redirect" not in p]
    assert 0 < len(kept) < len(pages)
    assert len(articles) == len(kept) == 106
    titles = [re.search(r"<title>(.*?)</title>", page)[1] for page in kept]
    assert [item.split("\n")[0] for item in articles] == titles


def test_no_markup_is_left_in_real_articles(articles):
    text = "\n".join(articles)
    for residue in (
        "{{",
        "}}",
        "[[",
        "]]",
        "{|",
        "|}",
        "<ref",
        "</",
        "'''",
        "__NOTOC__",
        "Category:",
        "File:",
        "style=",
    ):
        assert residue not in text, residue
    assert "thumb|" not in text
    assert len(text) > 2_000_000


@pytest.mark.parametrize(
    "wikitext, expected",
    [
        ("'''Bold''' and ''italic'' [[word|words]] of [[Paris]].", "Bold and italic words of Paris."),
        ("Before<ref>a [[b]] {{c}}</ref> after<ref name=x /> end<ref name='y'>z</ref>.", "Before after end."),
        ("One{{cite web|url=http://x|title={{nested|y}}}} two.", "One two."),
        ("[[File:A.jpg|thumb|A [[cat]] on {{x}}]]Text [[Image:b.png]]here.[[Category:Things]]", "Text here."),
        ("[[Datei:A.jpg|mini|Ein Bild]]Text.[[Kategorie:Dinge]] [[fr:Texte]]", "Text."),
        ("See [[:Category:Things|the category]] and [[Help: A Day|help]].", "See the category and help."),
        ('{| class="wikitable"\n|-\n! a !! b\n|-\n| 1 || 2\n|}\nAfter the table.', "After the table."),
        ("{|\n| a\n{|\n| nested\n|}\n|}\nAfter both.", "After both."),
        ("* one\n* two [[three|3]]\n# four\n: five", "one\ntwo 3\nfour\nfive"),
        ("Water is H<sub>2</sub>O &mdash; 5&nbsp;km<br/>away <!-- hidden -->now.", "Water is H2O — 5 km\naway now."),
        ("Formula <math>x^2</math> gone, <code>x</code> too.", "Formula gone, x too."),
        ("<gallery>\nFile:a.jpg|caption\n</gallery>Text.", "Text."),
        ("[http://example.org A title] and [http://example.org] and more", "A title and and more"),
        ("Born ({{IPA|x}}; {{birth date|1}}) in [[Rome]].", "Born in Rome."),
        ("Text.\n\n== Empty ==\n\n== Full ==\nMore.\n\n=== Deep ===\n\n== See also ==\n{{x}}", "Text.\n\nFull\nMore."),
        ("== Parent ==\n=== Child ===\nWords.", "Parent\n\nChild\nWords."),
        ("__NOTOC__Text{{unclosed and more", "Textunclosed and more"),
        ("Text with [[unclosed link and more", "Text with unclosed link and more"),
        ("<nowiki>[[not a link]]</nowiki> text", "[[not a link]] text"),
        ("<blockquote>Quoted <span style='x'>words</span></blockquote>", "Quoted words"),
        ("{{only}}{{templates}}", ""),
    ],
)
def test_clean(wikitext, expected):
    assert clean(wikitext, frozenset({"file", "image", "category", "datei", "kategorie"})) == expected


def test_namespaces_in_the_language_of_the_wiki(tmp_path):
    path = tmp_path / "dewiki-x-pages-articles.xml.bz2"
    head = "<mediawiki><siteinfo>" + "".join(
        f'<namespace key="{key}" case="first-letter">{name}</namespace>'
        for key, name in ((-2, "Medium"), (0, ""), (6, "Datei"), (14, "Kategorie"), (4, "Wikipedia"))
    )
    page = (
        "<page><title>{0}</title><ns>{1}</ns>{2}<revision><model>wikitext</model>"
        "<text>[[Datei:x.jpg]]Inhalt von {0} &amp;amp; mehr.[[Kategorie:Z]]</text></revision></page>"
    )
    pages = [
        page.format("Ä", 0, ""),
        page.format("Weiter", 0, '<redirect title="Ä" />'),
        page.format("Diskussion:Ä", 1, ""),
    ]
    path.write_bytes(bz2.compress((head + "</siteinfo>\n" + "\n".join(pages) + "</mediawiki>").encode()))
    assert {"datei", "kategorie", "medium", "file"} <= dropped_namespaces(str(path))
    (source,) = sources.expand((Source.parse(f"wikipedia:{path}"),))
    assert (source.name, source.language) == ("wikipedia-de", "de")
    (unit,) = sources.plan(source, 1 << 20)
    assert list(sources.documents(unit)) == ["Ä\n\nInhalt von Ä & mehr."]


@pytest.mark.parametrize("unit_bytes", [100_000, 400_000])
def test_multistream_dumps_are_split_at_their_streams(samples, articles, tmp_path, unit_bytes):
    path = multistream(tmp_path / "enwiki-x-pages-articles-multistream.xml.bz2", samples, 10)
    assert len(compression.bzip2_streams(str(path))) == 15
    (source,) = sources.expand((Source.parse(f"wikipedia:{path}"),))
    units = list(sources.plan(source, unit_bytes))
    assert len(units) > 1 and not any(unit.streamed for unit in units)
    found = [item for unit in units for item in sources.documents(unit)]
    assert len(found) > 5 and found == articles[: len(found)]


@pytest.mark.parametrize("block_bytes", [100_000, 500_000])
def test_a_dump_of_one_stream_is_read_in_blocks(samples, articles, tmp_path, block_bytes):
    head, pages = some_pages(samples)
    path = tmp_path / "enwiki-x-pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(b"".join([head, *pages, b"</mediawiki>"])))
    (source,) = sources.expand((Source.parse(f"wikipedia:{path}"),))
    (unit,) = sources.plan(source, block_bytes)
    assert unit.streamed
    found = [item for block in sources.blocks(unit, block_bytes) for item in sources.documents(unit, block)]
    assert len(found) > 5 and found == articles[: len(found)]


def page(number, revisions=("text",), namespace="<ns>0</ns>"):
    texts = "".join(f"<revision><text>{text} {number}</text></revision>" for text in revisions)
    return f"<page><title>T{number}</title>{namespace}{texts}</page>\n".encode()


def test_streams_that_begin_anywhere_lose_no_page(tmp_path):
    """As pbzip2 cuts them, at bytes; those of multistream dumps begin with pages."""
    pages = [page(number) for number in range(3000)]
    data, path = b"".join(pages), tmp_path / "enwiki-x.xml.bz2"
    expected = [f"T{number}\n\ntext {number}" for number in range(3000)]
    for pieces in ([data[i : i + 9000] for i in range(0, len(data), 9000)], [b"".join(pages[:1500]), *pages[1500:1700],
                   b"".join(pages[1700:])]):  # fmt: skip
        path.write_bytes(b"".join(map(bz2.compress, pieces)))
        assert texts_of(Source.parse(f"wikipedia:{path}"), 2000) == expected


def test_dumps_of_other_makes(tmp_path):
    """Without namespaces, with the history of a page, and broken off within one."""
    path = tmp_path / "enwiki-x.xml"
    path.write_bytes(page(1, namespace="") + page(2, revisions=("old", "new")) + page(3, namespace="<ns>1</ns>"))
    assert texts_of(Source.parse(f"wikipedia:{path}")) == ["T1\n\ntext 1", "T2\n\nnew 2"]
    path.write_bytes(page(1) + page(2)[:-20])
    whole, half = items_of(Source.parse(f"wikipedia:{path}"))
    assert whole == "T1\n\ntext 1" and "a page without its end" in half.describe()
    torn = tmp_path / "enwiki-y.xml.bz2"
    torn.write_bytes(bz2.compress(page(1))[:-20])
    (found,) = items_of(Source.parse(f"wikipedia:{torn}"))
    assert "truncated" in found.describe()


def test_a_broken_page_is_a_bad_record(tmp_path):
    path = tmp_path / "xxwiki-1.xml"
    good = "<page><title>A</title><ns>0</ns><revision><text>Good.</text></revision></page>"
    path.write_text(f"<mediawiki>\n{good}\n<page><title>B</title><ns>0</revision></page>\n{good}</mediawiki>")
    (source,) = sources.expand((Source.parse(f"wikipedia:{path}"),))
    items = [item for unit in sources.plan(source, 1 << 20) for item in sources.documents(unit)]
    assert [type(item) for item in items] == [str, BadRecord, str]
    assert "line 3" in items[1].describe() and "not a valid page" in items[1].describe()


def test_a_dump_in_another_encoding_is_refused(samples):
    (source,) = sources.expand((Source.parse(f"wikipedia,language=bg:{samples.bgwiki}"),))  # UTF-16
    with pytest.raises(UserError, match="is in UTF-16; .*iconv -f UTF-16 -t UTF-8"):
        [item for unit in sources.plan(source, 64 << 20) for item in sources.documents(unit)]
