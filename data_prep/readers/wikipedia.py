"""Wikipedia XML dumps (`*-pages-articles*.xml.bz2`): pages to clean text.

Kept are articles (namespace 0) that are not redirects. Of the wikitext stays what a reader would call running text:
paragraphs, headings, list items and the words of links. Templates, tables, references, formulas, galleries, files,
categories, comments and switches such as `__TOC__` go, and so do headings under which nothing is left.
"""

import codecs
import functools
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from data_prep.readers.formats import BadRecord, Block, open_binary

PAGE_END = b"</page>"
_PAGE = re.compile(rb"<page>.*?</page>", re.DOTALL)
_NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>')
_DROPPED_NAMESPACES = (-2, 6, 14)  # Media, File, Category
_ENGLISH_NAMES = frozenset({"media", "file", "image", "category"})
_DROPPED_TAGS = frozenset(
    "ref references table gallery math chem timeline score syntaxhighlight source templatedata imagemap hiero graph "
    "mapframe maplink section indicator inputbox categorytree style script ce code pre tr td th caption".split()
)
_LIST_TAGS = frozenset(("li", "dt", "dd"))
_BREAK_TAGS = frozenset(("br", "hr", "p", "div"))
_SWITCH = re.compile(r"__[A-Z]+__")
_INTERWIKI = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?$|simple$|wikt(?:ionary)?$|commons$|species$")
_LEFTOVER = re.compile(
    # markup that the parser took for text because it was never closed
    r"<(ref|gallery|math|timeline|table)\b[^<>]*?(?:/>|>.*?</\1\s*>)|</?[a-z]+(?:\s[^<>]*)?/?>"
    r"|^[ \t]*(?:[|!]|\{\||(?:\[\[)?(?:File|Image):)[^\n]*$|\{\{|\}\}|\[\[|\]\]",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
_EMPTY_PARENTHESES = re.compile(r" ?\((?:[\s,;:]|see)*\)")
_AFTER_OPENING = re.compile(r"\((?:\s*[;,])+\s*")
_SPACES = re.compile(r"[ \t\u00a0]+")
_HEADING_MARK = "\x01"


@functools.lru_cache(maxsize=64)
def dropped_namespaces(path: str) -> frozenset[str]:
    """Names of the file and category namespaces in the wiki's own language, from the head of the dump."""
    with open_binary(path) as (file, _):
        head = file.read(1 << 17).decode("utf-8", errors="ignore").partition("</siteinfo>")[0]
    local = {
        html.unescape(name).casefold() for key, name in _NAMESPACE.findall(head) if int(key) in _DROPPED_NAMESPACES
    }
    return _ENGLISH_NAMES | local


def parse_pages(block: Block) -> Iterator[str | BadRecord]:
    """The articles in a block of a dump, as `title`, an empty line and the clean text."""
    if block.data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        yield BadRecord(block.path, block.offset_bytes, "a dump in UTF-16, not UTF-8")
        return
    names = dropped_namespaces(block.path)
    for match in _PAGE.finditer(block.data):
        try:
            page = ElementTree.fromstring(match.group())
        except ElementTree.ParseError as error:
            yield BadRecord(block.path, block.offset_bytes + match.start(), f"not a valid page: {error}")
            continue
        if page.findtext("ns") != "0" or page.find("redirect") is not None:
            continue
        wikitext = page.findtext("revision/text") or ""
        if page.findtext("revision/model") in (None, "wikitext"):
            body = clean(wikitext, names)
            if body:
                yield f"{page.findtext('title')}\n\n{body}"


def clean(wikitext: str, dropped: frozenset[str] = _ENGLISH_NAMES) -> str:
    """Wikitext to running text."""
    import mwparserfromhell

    parts: list[str] = []
    _collect(mwparserfromhell.parse(wikitext), dropped, parts)
    text = _SWITCH.sub("", "".join(parts))
    text = _LEFTOVER.sub("", text)
    text = _EMPTY_PARENTHESES.sub("", _AFTER_OPENING.sub("(", text)).replace("'''", "").replace("''", "")
    return _tidy(text)


def _collect(wikicode, dropped: frozenset[str], parts: list[str]) -> None:
    """Appends the visible text of parsed wikitext to `parts`."""
    from mwparserfromhell import nodes

    for node in wikicode.nodes:
        kind = type(node)
        if kind is nodes.Text:
            parts.append(str(node))
        elif kind is nodes.Wikilink:
            _collect_link(node, dropped, parts)
        elif kind is nodes.Tag:
            tag = str(node.tag).strip().lower()
            if tag in _LIST_TAGS and node.wiki_markup:
                continue
            if tag in _BREAK_TAGS:
                parts.append("\n")
            if tag not in _DROPPED_TAGS and node.contents is not None:
                _collect(node.contents, dropped, parts)
                if tag in _BREAK_TAGS or tag in _LIST_TAGS:
                    parts.append("\n")
        elif kind is nodes.HTMLEntity:
            parts.append(node.normalize())
        elif kind is nodes.Heading:
            parts.append(f"\n{_HEADING_MARK}{node.level}")
            _collect(node.title, dropped, parts)
            parts.append("\n")
        elif kind is nodes.ExternalLink and node.title is not None:
            _collect(node.title, dropped, parts)


def _collect_link(node, dropped: frozenset[str], parts: list[str]) -> None:
    title = str(node.title).strip()
    prefix, colon, rest = title.partition(":")
    prefix = prefix.strip().casefold()
    if colon and (prefix in dropped or (prefix and not rest.startswith(" ") and _INTERWIKI.match(prefix))):
        return
    if node.text is not None:
        _collect(node.text, dropped, parts)
    else:
        parts.append(title.lstrip(":"))


def _tidy(text: str) -> str:
    """One paragraph a line, a blank line before headings, no headings without text below them."""
    lines: list[str] = []
    for raw in text.split("\n"):
        line = _SPACES.sub(" ", raw).strip()
        if line.strip("*#:;.,-–•·| "):
            lines.append(line)
    kept: list[str] = []
    following = 0  # level of the heading below, 9 once text was seen
    for line in reversed(lines):
        if line.startswith(_HEADING_MARK):
            level, title = int(line[1]), line[2:].strip()
            if following <= level or not title:
                continue  # nothing but headings of the same or a higher rank, or the end, comes below
            kept.append(f"\n{title}")
            following = level
        else:
            kept.append(line)
            following = 9
    return "\n".join(reversed(kept)).strip()
