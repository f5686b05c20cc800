"""Wikitext to running text, in one walk over its delimiters.

What stays is what a reader would call text: paragraphs, headings, list items, the words of links, and templates that
stand for words (`templates`). Other templates, tables, references, formulas, galleries, files, categories, comments
and switches such as `__TOC__` go, and so do headings under which nothing is left.

As in MediaWiki, the end of a tag such as `<ref>` is the next closing one whatever lies between, and braces and brackets
pair up by themselves: apostrophes that do not pair never hide the end of a table or a reference. What is never closed
loses its delimiter alone; its text stays, but for the rows of a table. Every walk is linear in the text.
"""

import html
import re

from data_prep.readers.apostrophes import without_marks
from data_prep.readers.links import ENGLISH_NAMES, link_text
from data_prep.readers.templates import HOLE, arguments, close_holes, first_variant, words_of

# Tags whose content is no text, up to the next closing one.
_DROPPED_TAGS = (
    "ref references gallery math chem timeline score syntaxhighlight source templatedata imagemap hiero graph mapframe "
    "maplink section indicator inputbox categorytree templatestyles style script ce pre".split()
)
_CODE_TAGS = ("code", "tt", "kbd", "samp", "var")  # words of a sentence, unless they take several lines
_TOKENS = (
    r"\{\{+|\}\}+|\[\[|\]\]+|\n[ \t:*#]*\{\||\n[ \t]*\|\}(?!\})|<table\b[^<>]*>|</table\s*>"
    rf"|<(?P<tag>nowiki|{'|'.join((*_DROPPED_TAGS, *_CODE_TAGS))})\b[^<>]*>"
)
_DELIMITERS = re.compile(_TOKENS, re.IGNORECASE)
_DELIMITERS_AND_VARIANTS = re.compile(rf"-\{{(?!\{{)|\}}\}}*-(?!\{{(?!\{{))|{_TOKENS}", re.IGNORECASE)
_CODE_BOUNDS = {tag: re.compile(rf"<(/?){tag}\b[^<>]*>", re.IGNORECASE) for tag in _CODE_TAGS}
_CLOSING = {tag: re.compile(rf"</{tag}\s*>", re.IGNORECASE) for tag in ("nowiki", *_DROPPED_TAGS)}
_BREAKS = re.compile(r"</?(?:br|hr|p|div|li|dt|dd|tr|blockquote|poem|center)\b[^<>]*>", re.IGNORECASE)
_TAGS = re.compile(
    r"</?(?:b|i|u|s|small|big|sub|sup|span|font|em|strong|cite|q|abbr|acronym|ul|ol|dl|ins|del|strike"
    r"|h[1-6]|ruby|rb|rt|rp|rtc|bdi|bdo|wbr|time|data|mark|caption|td|th|thead|tbody|tfoot|table|noinclude|includeonly"
    rf"|onlyinclude|nowiki|{'|'.join((*_DROPPED_TAGS, *_CODE_TAGS))})\b[^<>]*>",
    re.IGNORECASE,
)
_EXTERNAL = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\[\]<>]*(?:[ \t]+([^\[\]\n]*))?\]", re.IGNORECASE)
_BARE_ADDRESS = re.compile(
    r"\b(?:https?|ftp)://(?:[^\s\[\]<>\"|{}().,;:!?']|\([^\s()\[\]<>\"|{}]*\)|[.,;:!?'](?=[\w/~%&#=+-]))*",
    re.IGNORECASE,
)
_SWITCH = re.compile(r"__(?![a-z])[^\W_]+(?:_[^\W_]+)*__")
_HEADING = re.compile(r"(={1,6})(.+?)\1\s*$")
_FILE_LINE = re.compile(r"(?:\[\[)?(?:File|Image):", re.IGNORECASE)  # of a gallery that was never closed
_SEAM = "\x03"  # where a tag was cut out, so that marks of bold and italic on either side stay two
_OPENED = "\x04"  # where a table begins; gone with it if it is closed
_ROW = re.compile(rf"\n[ \t{HOLE}{_SEAM}]*(?:\{{\||[|!])")  # or prose: |x|, !Kung
_SURE_ROW = re.compile(r"\{\||[|!]\s|[|!]$|\|[+}]|\|-+(?:\s|$)|\|[^|=]{1,40}=")
_AFTER_OPENING = re.compile(r"\((?:\s*[;,])+\s*")
_EMPTY_PARENTHESES = re.compile(r"\((?:(?:[\s,;:]|see)+|(?<![A-Za-z0-9_]\())\)")  # but print() is a word
_WITH_SPACE_BEFORE = re.compile(rf" ?{_EMPTY_PARENTHESES.pattern}")
_SPACES = re.compile(r"[ \t\u00a0]+")
_DEEPEST = 64  # constructs inside of each other that are looked at; deeper ones lose their delimiters alone


def clean(wikitext: str, dropped: frozenset[str] = ENGLISH_NAMES) -> str:
    """Wikitext to running text.

    Args:
        wikitext: of a page, as XML gives it.
        dropped: names of the namespaces of files and categories in the wiki's own language, case-folded.
    """
    text = "".join(_walk("\n" + without_comments(wikitext), dropped))
    if _OPENED in text or _ROW.search(text):
        text = _without_rows(text)
    text = "\n".join(map(without_marks, text.split("\n")))
    text = _TAGS.sub("", _BREAKS.sub("\n", _SWITCH.sub("", text))).replace(_SEAM, "")
    text = _EXTERNAL.sub(lambda found: found.group(1) or HOLE, text)
    if "://" in text:
        text = _BARE_ADDRESS.sub(HOLE, text)
    text = _SPACES.sub(" ", html.unescape(text))
    if HOLE in text:
        text = close_holes(text)
    text = _AFTER_OPENING.sub("(", text)
    if _EMPTY_PARENTHESES.search(text):
        text = _WITH_SPACE_BEFORE.sub("", text)
    return _tidy(text)


def _without_rows(text: str) -> str:
    """Without the rows of tables that nothing closes, or that a template opened.

    Lines that begin like rows may be prose. They are rows behind the opening of a table and behind a line that can be
    nothing else, since a cell's text need not look like one.
    """
    kept, inside = [], False
    for line in text.split("\n"):
        if line.startswith(_OPENED):  # what follows are attributes
            inside = True
            continue
        line = line.replace(_OPENED, "")
        if _ROW.match(f"\n{line}"):
            inside = inside or _SURE_ROW.match(line.lstrip(f" \t{HOLE}{_SEAM}")) is not None
            if inside:
                continue
        kept.append(line)
    return "\n".join(kept)


def without_comments(text: str) -> str:
    if "<!--" not in text:
        return text
    first, *rest = text.split("<!--")
    kept = [first]
    for part in rest:
        _, closed, after = part.partition("-->")
        kept.append(after if closed else part)
    return "".join(kept)


class _Walk:
    """What has been seen of a page: finished pieces of text, and what is open.

    Attributes:
        pieces: text so far.
        open: kind and first piece of everything that is open, the innermost last.
        places: for each kind, where in `open` those of it are.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.open: list[tuple[str, int]] = []
        self.places: dict[str, list[int]] = {kind: [] for kind in ("{{", "{{{", "[[", "{|", "<table", "-{")}

    def begin(self, kind: str) -> None:
        self.places[kind].append(len(self.open))
        self.open.append((kind, len(self.pieces)))

    def end(self, kind: str) -> int | None:
        """Close the innermost of a kind, and with it what is open inside; its first piece, or None if none is open."""
        if not self.places[kind]:
            return None
        place = self.places[kind][-1]
        for other, _ in reversed(self.open[place:]):
            self.places[other].pop()
        first = self.open[place][1]
        del self.open[place:]
        return first


def _walk(text: str, dropped: frozenset[str]) -> list[str]:
    """Pieces of text without what is no text."""
    walk = _Walk()
    pieces = walk.pieces
    unclosed: set[str] = set()  # tags that nothing closes from here on
    at = 0
    delimiters = _DELIMITERS_AND_VARIANTS if "-{" in text else _DELIMITERS
    match = delimiters.search(text)
    while match is not None:
        start, end = match.span()
        if start > at:
            pieces.append(text[at:start])
        at = end
        token = match.group()
        head = token[0]
        if head == "[":
            walk.begin("[[")
        elif head == "]":
            if len(token) % 2:  # the first ends an address
                pieces.append("]")
            for _ in range(len(token) // 2):
                if (first := walk.end("[[")) is not None:
                    _close_link(pieces, first, len(walk.open), dropped)
        elif head == "{":
            _open_braces(walk, len(token))
        elif head == "}":
            _close_braces(walk, token)
        elif head == "-":
            walk.begin("-{")
            pieces.append(token)  # stays if nothing closes it
        elif head == "\n":
            pieces.append("\n")
            if token[-1] == "|":
                walk.begin("{|")
                pieces.append(_OPENED)
            elif (first := walk.end("{|")) is not None:
                del pieces[first:]
        elif (tag := match.group("tag")) is not None:
            at = _skip_tag(text, token, tag.lower(), end, unclosed, pieces)
        elif token[1] != "/":
            walk.begin("<table")
        elif (first := walk.end("<table")) is not None:
            del pieces[first:]
        match = delimiters.search(text, at)
    pieces.append(text[at:])
    return pieces


def _skip_tag(text: str, token: str, tag: str, end: int, unclosed: set[str], pieces: list[str]) -> int:
    """Where text goes on behind an opening tag and what belongs to it."""
    mark = _SEAM if tag in ("ref", "references") else HOLE
    if token.endswith("/>"):
        pieces.append(mark)
        return end
    if (bounds := _CODE_BOUNDS.get(tag)) is not None:
        bound = bounds.search(text, end)
        if bound is None or not bound.group(1) or text.find("\n", end, bound.start()) < 0:
            pieces.append(token)
            return end
        pieces.append(HOLE)
        return bound.end()
    closing = None if tag in unclosed else _CLOSING[tag].search(text, end)
    if closing is None:
        unclosed.add(tag)
        return end
    pieces.append(text[end : closing.start()] if tag == "nowiki" else mark)
    return closing.end()


def _open_braces(walk: _Walk, count: int) -> None:
    if count % 2 and count > 1:
        walk.begin("{{{")
        count -= 3
    for _ in range(count // 2):
        walk.begin("{{")


def _close_braces(walk: _Walk, token: str) -> None:
    """Two or more braces, or some and a dash, which end a variant if one brace is left for it."""
    pieces = walk.pieces
    dash = token[-1] == "-"
    count = len(token) - dash
    while count >= 2:
        templates, parameters = walk.places["{{"], walk.places["{{{"]
        if count >= 3 and parameters and (not templates or parameters[-1] > templates[-1]):
            del pieces[walk.end("{{{") :]
            count -= 3
        elif templates:
            first = walk.end("{{")
            _close_template(pieces, first, len(walk.open))
            count -= 2
        else:
            break
    if dash:
        first = walk.end("-{") if count else None
        if first is None or len(walk.open) > _DEEPEST:
            pieces.append(token if token == "}-" else "-")
        else:
            pieces[first:] = [first_variant("".join(pieces[first + 1 :])) or HOLE]


def _close_link(pieces: list[str], first: int, depth: int, dropped: frozenset[str]) -> None:
    if depth > _DEEPEST or len(pieces) == first:
        return
    inner = pieces[first] if len(pieces) == first + 1 else "".join(pieces[first:])
    if (words := link_text(inner, dropped)) is None:
        del pieces[first:]
    else:
        pieces[first:] = [words]


def _close_template(pieces: list[str], first: int, depth: int) -> None:
    words = words_of(pieces[first]) if len(pieces) > first else None
    if words is None or depth > _DEEPEST:
        pieces[first:] = [HOLE]
    else:
        pieces[first:] = [words(arguments("".join(pieces[first:]).replace(HOLE, ""))) or HOLE]


def _tidy(text: str) -> str:
    """One paragraph a line, a blank line before headings, no headings without text below them."""
    lines: list[tuple[int, str]] = []  # level of a heading, or 9, and the line
    for raw in text.split("\n"):
        line = raw.strip()
        if not line:
            continue
        if line[0] == "=" and (found := _HEADING.match(line)):
            lines.append((len(found.group(1)), found.group(2).strip()))
            continue
        if _FILE_LINE.match(line):
            continue
        line = line.lstrip("*#:; ")
        if line.strip("*#:;.,-–•·| "):
            lines.append((9, line))
    kept: list[str] = []
    following = 0  # level of the heading below, 9 once text was seen
    for level, line in reversed(lines):
        if level == 9:
            kept.append(line)
        elif following <= level or not line:
            continue  # nothing but headings of the same or a higher rank, or the end, comes below
        else:
            kept.append(f"\n{line}")
        following = level
    return "\n".join(reversed(kept)).strip()
