"""Wikipedia XML dumps (`*-pages-articles*.xml.bz2`): pages to clean text.

Kept are articles (namespace 0) that are not redirects; what of their wikitext is text, `wikitext` says. An article of
which less is left than its lines of prose promise is marked, so that it is counted and named in the manifest.
"""

import codecs
import functools
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from data_prep.errors import UserError
from data_prep.readers.compression import open_binary, read_up_to
from data_prep.readers.formats import BadRecord, Block
from data_prep.readers.links import ENGLISH_NAMES
from data_prep.readers.wikitext import clean, without_comments

PAGE_END = b"</page>"
_PAGE = re.compile(rb"<page>.*?</page>", re.DOTALL)
_NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>')
_DROPPED_NAMESPACES = (-2, 6, 14)  # Media, File, Category
_SHORT_TEMPLATE = re.compile(r"\{\{[^{}\n]*\}\}")


class ShortenedArticle(str):
    """The text of an article of which less is left than its wikitext promises."""

    title: str

    def __new__(cls, text: str, title: str) -> "ShortenedArticle":
        made = super().__new__(cls, text)
        made.title = title
        return made


@functools.lru_cache(maxsize=64)
def dropped_namespaces(path: str) -> frozenset[str]:
    """Names of the file and category namespaces in the wiki's own language, from the head of the dump."""
    with open_binary(path) as (file, _):
        data, _ = read_up_to(file, 1 << 17)  # where it breaks off, its reader says so
    head = data.decode("utf-8", errors="ignore").partition("</siteinfo>")[0]
    local = {
        html.unescape(name).casefold() for key, name in _NAMESPACE.findall(head) if int(key) in _DROPPED_NAMESPACES
    }
    return ENGLISH_NAMES | local


def parse_pages(block: Block) -> Iterator[str | BadRecord]:
    """The articles in a block of a dump, as `title`, an empty line and the clean text."""
    if block.data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(
            f"{block.path} is in UTF-16; dumps of Wikipedia are in UTF-8. Convert it first: "
            "bzcat IN | iconv -f UTF-16 -t UTF-8 | bzip2 > OUT"
        )
    names, end = dropped_namespaces(block.path), 0
    for match in _PAGE.finditer(block.data):
        end = match.end()
        try:
            page = ElementTree.fromstring(match.group())
        except ElementTree.ParseError as error:
            yield BadRecord(block.path, block.offset_bytes + match.start(), f"not a valid page: {error}")
            continue
        if page.findtext("ns", "0") != "0" or page.find("redirect") is not None:
            continue
        *_, revision = page.findall("revision") or [page]  # the newest, where a dump holds the history
        wikitext = revision.findtext("text") or ""
        if revision.findtext("model") in (None, "wikitext"):
            body, expected = clean(wikitext, names), expected_characters(wikitext)
            if body or expected:
                title = page.findtext("title") or ""
                text = f"{title}\n\n{body}".rstrip()
                yield ShortenedArticle(text, title) if len(body) < expected else text
    if not block.torn and (half := block.data.find(b"<page>", end)) >= 0:
        yield BadRecord(block.path, block.offset_bytes + half, "a page without its end: the dump breaks off here")


def expected_characters(wikitext: str) -> int:
    """How many characters of text a page has at least, by a look at its lines that shares little with `clean`.

    Lines that begin like prose or a list, without references and templates of one line; of these, three fifths, since
    links and files hold more than what is read. Pages with little prose promise nothing.
    """
    lines = _SHORT_TEMPLATE.sub("", _without_references(without_comments(wikitext))).split("\n")
    prose = sum(len(line) for line in lines if line[:1].isalpha() or line[:1] in "'\"*#:")
    return int(0.6 * prose) if prose > 2000 else 0


def _without_references(text: str) -> str:
    first, *rest = re.split("<ref", text, flags=re.IGNORECASE)
    kept = [first]
    for part in rest:
        opening, _, content = part.partition(">")
        _, closed, after = content.partition("</ref")
        kept.append(after if closed and not opening.endswith("/") else content)
    return "".join(kept)
