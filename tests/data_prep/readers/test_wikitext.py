"""Wikitext to text: what stays, what goes, whatever is left open, and in time that grows with the text alone."""

import bz2
import html
import itertools
import random
import re
import time

import pytest

from data_prep.readers.wikipedia import expected_characters, parse_pages
from data_prep.readers.wikitext import clean
from tests.data_prep.readers.test_wikipedia import block_of_pages


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        # apostrophes that do not pair hide no end of a table or a reference
        ("Before.\n{|\n| ''never closed\n|}\nBetween.\n{|\n| b\n|}\nAfter.", "Before.\nBetween.\nAfter."),
        ("One<ref>''never closed</ref> two '''three'''<ref>x</ref> four.", "One two three four."),
        ("{| class=a\n|-\n! ''Head\n|-\n| {{x|y=''}}\n|}\nText '''stays'''.", "Text stays."),
        # templates that are words
        ("Greek {{lang|el|ἀναρχία}}, {{lang-fr|mot}} and {{transl|ru|slovo}}.", "Greek ἀναρχία, mot and slovo."),
        ("It is {{convert|5|km|mi}} long, {{convert|3|-|7|sqmi}} wide.", "It is 5 km long, 3–7 sq mi wide."),
        ("{{convert|22|e6acre|ha}}, {{convert|2|x|3|m}}", "22 million acre, 2 × 3 m"),
        (
            "{{nowrap|New York}} {{as of|2010}} {{circa|1900}} {{frac|1|2}} {{US$|5}}",
            "New York As of 2010 c. 1900 1/2 US$5",
        ),
        ("A{{nbsp}}b{{ndash}}c{{snd}}d {{quote|1=Said [[x|she]].}}", "A b–c – d Said she."),
        ("{{formatnum:1234}} {{unité|5|km}} {{nobr|[[a|b]]}}", "1234 5 km b"),
        ("{{lang|el|{{nowrap|a {{unknown}} b}}}}", "a b"),
        # holes are closed
        ("from the Greek {{x}}, i.e. {{y}} anarchy ({{IPA|a}}; {{z}} b) {{cn}}.", "from the Greek, i.e. anarchy (b)."),
        ("found,{{cn}} and some{{cn}}have ( {{x}} ) x", "found, and somehave x"),
        ("digraphs {{x}}, {{y}}, {{z}} and more", "digraphs, and more"),
        ("the angle <math>a^2</math>, and <math>b</math>.", "the angle, and."),
        # apostrophes as MediaWiki reads them
        ("'''''both''''' '''b''' ''i'' it's l'''amour''", "both b i it's l'amour"),
        ("''x''<sub>''i''</sub> ''a''<ref>r</ref>''b''", "xi ab"),
        ("'''unclosed bold\nand ''the next", "unclosed bold\nand the next"),
        # links
        ("[[wikt:word|word]] [[wikt:x]] [[:fr:Mot]] [[fr:Mot]] [[w:en:Page|page]]", "word fr:Mot page"),
        ("[[File:x.jpg|thumb|a [[b]] ''c'' {{d}} [http://e f]]]Text", "Text"),
        ("[//example.org Title] [mailto:a@b.c] https://example.org/a_(b) end", "Title end"),
        ("[[a|b]]s and [[c]]ed, [[d#e|f|g]]", "bs and ced, f|g"),
        # entities, comments, nowiki
        ("a&nbsp;b &ndash; c &lt;ref&gt; <nowiki>{{raw}}</nowiki> d<!-- x {{ -->e", "a b – c <ref> {{raw}} de"),
        ("a <!-- never closed", "a never closed"),
        ("<ref name=a/>b<ref name='c' />d<REF>e</Ref>f<ref>never closed", "bdfnever closed"),
        ("<gallery>\nFile:a|b\n</gallery>c<table><tr><td>d<table>e</table></td></tr></table>f", "cf"),
        # what opens another kind inside
        ("[[File:a|{{b]] c {{d}} e", "c e"),
        ("{{a|[[b}} c [[d]] e", "c d e"),
        ("{{{1|default}}} {{a|{{{2}}}}} x {{{{b}}}} y", "x y"),
        ("{|\n| open table\nProse after it.\n{|\n| b\n|}\nMore.", "Prose after it.\nMore."),
        (":::{|\n| x\n|}\ny", "y"),
        ("; term : meaning\n:: reply\n*# item", "term : meaning\nreply\nitem"),
        ("a < b and c > d, x<y", "a < b and c > d, x<y"),
        # files under any name of their namespace
        ("[[Bild:Foo.jpg|thumb|200px|Eine [[b|Unterschrift]]]]Text", "Text"),
        ("[[Imagen:a b.SVG|thumb|x]][[Картинка:Я.jpeg |мини|y]]Text [[:Bild:Foo.jpg|shown]]", "Text shown"),
        ("[[commons:File:a.jpg|a picture]], [[Foo.jpg]], [[Star Wars: Episode I|Wars]]", "a picture, Foo.jpg, Wars"),
        # titles with a colon that are no interlanguage links
        ("[[SQL:2003]], [[Re:Zero]] [[CSI:NY]] [[Sex:Pol]] [[xyz:a]]", "SQL:2003, Re:Zero CSI:NY Sex:Pol xyz:a"),
        ("[[de:A]][[zh-min-nan:B]][[simple:C]][[be-x-old:D]][[roa-tara:E|f]]Text", "Text"),
        # code inside of a sentence
        ("Call <code>print()</code> to print.", "Call print() to print."),
        ("Press <kbd>A</kbd>, <tt>''b''</tt> or <CODE class=x>[[c|d]]</CODE>''e''.", "Press A, b or de."),
        ("Before <code>\na = 1\n\nb</code><samp>c\nd</samp> after.", "Before after."),
        (
            "Never <code>closed\n\nbut <code>x</code> and <tt>prose\n\nthe end.",
            "Never closed\nbut x and prose\nthe end.",
        ),
        ("Named x ({{IPA|y}}), f({{z}}) and g(<!-- h -->) ().", "Named x, f and g()."),
        # variants of a script
        ("-{zh-hans:计算机; zh-hant:電腦}-和-{字}-。", "计算机和字。"),
        ("-{A|zh-cn:[[a|内存]];zh-tw:{{nowrap|記憶體}};}-甲-{R|乙}-", "内存甲乙"),
        ("-{H|zh-cn:a;zh-tw:b}--{T|zh:c}--{-|zh:d}-文", "文"),
        ("-{zh-tw:{{nowrap|甲&nbsp;a}}}-乙 {{nowrap|-{zh:丙;zh-hant:丁}-}} [[x|-{A|zh-hk:戊}-]]", "甲 a乙 丙 戊"),
        ("-{sr-ec:реч;sr-el:reč}- {{nowrap|a}}-{{nowrap|b}}-{c}-", "реч a-bc"),
        ("e-{x a}- -{open {{b}}- c}-d }- e", "ex a open - cd }- e"),
        ("a -{open", "a -{open"),
        # more templates that are words
        (
            "{{convert|6|ft|2|in|cm}} {{cvt|12|st|4|lb|kg}} {{convert|2|yd|1|ft|3|in|m}}",
            "6 ft 2 in 12 st 4 lb 2 yd 1 ft 3 in",
        ),
        (
            "{{convert|3|lb|5|oz|kg|abbr=on}}, {{convert|1|mi|20|yd}}, {{convert|6|ft|m|2}}",
            "3 lb 5 oz, 1 mi 20 yd, 6 ft",
        ),
        ("{{convert|5|to|10|km}}, {{convert|5|-|10|km|mi}}, {{convert|5|x|10|m}}", "5 to 10 km, 5–10 km, 5 × 10 m"),
        ("{{convert|5|,|6|, and|7|km}}, {{convert|2|*|3|xx|4|m}}", "5, 6, and 7 km, 2 × 3 × 4 m"),
        (
            "{{as of|2015|6|30}}, {{as of|2015|06|lc=y}}, {{As of|2015|June|since=y}}",
            "As of 30 June 2015, as of June 2015, Since June 2015",
        ),
        (
            "{{as of|2015|6|30|df=US|lc=on}}, {{as of|2015|alt=by 2015}}, {{as of|2015|1|bare=y}}",
            "as of June 30, 2015, by 2015, January 2015",
        ),
        (
            "{{as of}}{{chem|H|2|O}} {{chem2|SO4(2-)}} {{Chem2|2 H2 + O2 -> 2 H2O|link=x}}",
            "H2O SO42− 2 H2 + O2 → 2 H2O",
        ),
        ("[mailto:a@b.c mail] and [MAILTO:a@b.c?subject=x]", "mail and"),
        ("", ""),
    ],
)
def test_what_stays(wikitext, expected):
    assert clean(wikitext) == expected


PARTS = {
    "template": ("{{x|", "}}"),
    "parameter": ("{{{x|", "}}}"),
    "table": ("\n{|\n| ", "\n|}\n"),
    "reference": ("<ref>", "</ref>"),
    "file": ("[[File:x|thumb|", "]]"),
    "gallery": ("<gallery>", "</gallery>"),
    "comment": ("<!--", "-->"),
    "html table": ("<table>", "</table>"),
}


FLAT = {"reference", "gallery", "comment"}  # the first closing tag ends them, in MediaWiki too
NESTED = [
    names
    for names in itertools.product(PARTS, repeat=3)
    if not any(outer == inner and outer in FLAT for outer, inner in itertools.combinations(names, 2))
]


@pytest.mark.parametrize("names", NESTED, ids="-".join)
def test_whatever_is_nested_goes_with_what_is_around_it(names):
    text = "inside"
    for name in reversed(names):
        text = f"{PARTS[name][0]}{text}{PARTS[name][1]}"
    assert clean(f"Words before it. {text} Words after it.").replace("\n", " ").split() == (
        "Words before it. Words after it.".split()
    )


@pytest.mark.parametrize("name", PARTS)
def test_what_is_never_closed_hides_nothing(name):
    opening = PARTS[name][0]
    text = clean(f"Words before it. {opening}words inside\n\nWords after it. {{{{x}}}} [[Link|shown]]\n\nThe end.")
    assert all(words in text for words in ("Words before it.", "Words after it.", "shown", "The end."))
    assert "{{" not in text and "[[" not in text and "<ref" not in text


WIKIS = {  # the same page in the markup of other wikis: files, categories, switches, quantities, languages
    "de": ("Datei", "Kategorie", "{{lang|el|λόγος}}", "__KEIN_INHALTSVERZEICHNIS__"),
    "ru": ("Файл", "Категория", "{{lang-el|λόγος}}", "__БЕЗ_ОГЛ__"),
    "ar": ("ملف", "تصنيف", "{{lang|el|λόγος}}", "__بلافهرس__"),
    "ja": ("ファイル", "カテゴリ", "{{lang|el|λόγος}}", "__目次非表示__"),
}


@pytest.mark.parametrize("language", WIKIS)
def test_markup_of_other_languages(language, tmp_path):
    file, category, word, switch = WIKIS[language]
    names = "".join(f'<namespace key="{k}" case="x">{n}</namespace>' for k, n in ((6, file), (14, category)))
    text = f"{switch}[[{file}:a.jpg|mini|b [[c]]]]'''Wort''' von {word}, {{{{x}}}} Ende.\n[[{category}:D]]\n[[en:Word]]"
    block = block_of_pages(tmp_path, f"<siteinfo>{names}</siteinfo>", [("T", text)])
    assert list(parse_pages(block)) == ["T\n\nWort von λόγος, Ende."]


HOSTILE = ["{{", "}}", "{{{", "{{}}", "{{x}} ", "{{lang|a|", "[[", "]]", "[[File:", "[http://a ", "http://"]
HOSTILE += ["{|", "\n{|\n", "|}", "\n|}", "<table", "<ref>", "<ref", "</ref>", "<nowiki>", "<!--", "''", "'''"]
HOSTILE += [
    "(",
    "( ,",
    "=",
    "\n=",
    " ",
    "&",
    "__A",
    "-{",
    "}-",
    "-{a}-",
    "-{A|zh:",
    "zh:a;",
    "-{}}",
    "}}-{",
    "\n|",
    "\n|-\n",
]
HOSTILE += [
    "<code>",
    "<code>\n",
    "<tt><code>",
    "</code>",
    "[[a:b.jpg",
    "[[a:.jpg ",
    "\n{|\x02",
    "{{as of|",
    "[mailto:a ",
]
HOSTILE += ["-{zh:a;zh:b;}-", "(see", "x()", "\n!"]


CLOSED = [("-{", "zh:a;", "}-"), ("-{", "-{zh:", "}-" * 50_000), ("{{convert", "|1|x", "}}"), ("[[a:", ".jpg ", "]]")]
CLOSED += [("<code>", "<code>", "</code>\n</code>"), ("{|\n", "|a=", "\n|a"), ("{{chem|", "(1-)", "}}")]


@pytest.mark.parametrize(("before", "piece", "after"), [*(("", piece, "") for piece in HOSTILE), *CLOSED])
def test_time_grows_with_the_text(before, piece, after):
    """Eight times the text may take eight times the time, and some noise; quadratic would be sixty-four."""

    def seconds(count):
        text = f"{before}{piece * (count // len(piece))}{after}"
        began = time.process_time()
        clean(text)
        expected_characters(text)
        return time.process_time() - began

    assert seconds(400_000) < 24 * max(0.02, min(seconds(50_000) for _ in range(3)))


@pytest.mark.parametrize(
    "prose",
    [
        "'''!!!''' is an American band.",
        "'''!Kung''' is a language.",
        "!Xóõ is another one.",
        "|x| denotes the absolute value, ||x|| a norm.",
        "|x| = 5",
    ],
)
@pytest.mark.parametrize("around", ["{}", "{{|\n! a !! b\n|-\n| 1 || 2\n|}}\n{}", "{}\n{{| class=x\n|-\n|1||2\n"])
def test_lines_that_begin_like_rows_are_prose(prose, around):
    assert clean(around.format(prose)) == prose.replace("'''", "")


@pytest.mark.parametrize(
    "rows",
    [
        '{| class="wikitable"\n|+Title\n!Head!!Other\n|-\n|1||2\n| 3\n',
        "::{|\n|1\n\n|2\n",
        "{{nowrap|a\n{|\n| b}}\n|1||2\n",
        "{{Table begin}}\n! Head\n|-\n|1||2\n{{Table end}}\n",
        "{{x}}{| class=a\n|-\n|1\n|}\n",
        "{{Infobox\n|name = x\n|image=y\n|z\n",
    ],
)
def test_rows_of_tables_that_nothing_closes_go(rows):
    text = clean(f"Before.\n{rows}After.").replace("Infobox\n", "")
    assert text in ("Before.\nAfter.", "Before.\na\nAfter.")


def test_random_markup_never_fails_and_loses_no_plain_words():
    chance = random.Random(5)
    tiles = [
        *HOSTILE,
        "word ",
        "\n",
        "|",
        "a",
        ".",
        ", ",
        "&nbsp;",
        "</table>",
        "<br>",
        "* ",
        "== H ==\n",
        "\x02",
        "\x03",
    ]
    for _ in range(3000):
        clean("".join(chance.choices(tiles, k=chance.randrange(1, 60))))
    for _ in range(300):
        openings = "".join(chance.choices(["{{", "[[", "<ref>", "\n{|\n", "''", "<!--", "<gallery>"], k=5))
        assert "surely kept" in clean(f"{openings}\n\nsurely kept")


def test_an_article_that_loses_its_text_is_noticed(tmp_path):
    prose = "This is a line of prose that a reader would read from its beginning to its end. " * 8
    lost = "\n\n".join([prose] * 12)
    pages = [("Whole", lost), ("Lost", f"{{{{x|\n{lost}\n}}}}\n{prose}")]
    block = block_of_pages(tmp_path, "", pages)
    whole, shortened = parse_pages(block)
    assert type(whole) is str and getattr(shortened, "title", None) == "Lost"


def test_real_articles_keep_their_text(samples):
    """No article of the sample is marked as shortened."""
    xml = bz2.decompress(samples.enwiki.read_bytes()).decode()
    texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL)]
    articles = [text for text in texts if expected_characters(text)]
    assert len(articles) > 80 and all(len(clean(text)) >= expected_characters(text) for text in articles)
