"""Wikitext to running text, in one walk over its delimiters.

What stays is what a reader would call text: paragraphs, headings, list items, the words of links, and templates that
stand for words (`templates`). Other templates, tables, references, formulas, galleries, files, categories, comments
and switches such as `__TOC__` go, and so do headings under which nothing is left.

As in MediaWiki, the end of a tag such as `<ref>` is the next closing one whatever lies between, and braces and brackets
pair up by themselves: apostrophes that do not pair never hide the end of a table or a reference. What is never closed
loses its delimiter alone; its text stays. Every walk is linear in the text.
"""

import html
import re

from data_prep.readers.apostrophes import without_marks
from data_prep.readers.templates import arguments, words_of

ENGLISH_NAMES = frozenset({"media", "file", "image", "category"})

# Tags whose content is no text, up to the next closing one.
_DROPPED_TAGS = (
    "ref references gallery math chem timeline score syntaxhighlight source templatedata imagemap hiero graph mapframe "
    "maplink section indicator inputbox categorytree templatestyles style script ce code pre".split()
)
_DELIMITERS = re.compile(
    r"\{\{+|\}\}+|\[\[|\]\]+|\n[ \t:*#]*\{\||\n[ \t]*\|\}(?!\})|<table\b[^<>]*>|</table\s*>"
    rf"|<(?P<tag>nowiki|{'|'.join(_DROPPED_TAGS)})\b[^<>]*>",
    re.IGNORECASE,
)
_CLOSING = {tag: re.compile(rf"</{tag}\s*>", re.IGNORECASE) for tag in ("nowiki", *_DROPPED_TAGS)}
_BREAKS = re.compile(r"</?(?:br|hr|p|div|li|dt|dd|tr|blockquote|poem|center)\b[^<>]*>", re.IGNORECASE)
_TAGS = re.compile(
    r"</?(?:b|i|u|s|small|big|sub|sup|span|font|em|strong|cite|q|abbr|acronym|var|kbd|samp|tt|ul|ol|dl|ins|del|strike"
    r"|h[1-6]|ruby|rb|rt|rp|rtc|bdi|bdo|wbr|time|data|mark|caption|td|th|thead|tbody|tfoot|table|noinclude|includeonly"
    rf"|onlyinclude|nowiki|{'|'.join(_DROPPED_TAGS)})\b[^<>]*>",
    re.IGNORECASE,
)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]<>]*(?:[ \t]+([^\[\]\n]*))?\]", re.IGNORECASE)
_BARE_ADDRESS = re.compile(
    r"\b(?:https?|ftp)://(?:[^\s\[\]<>\"|{}().,;:!?']|\([^\s()\[\]<>\"|{}]*\)|[.,;:!?'](?=[\w/~%&#=+-]))*",
    re.IGNORECASE,
)
_SWITCH = re.compile(r"__(?![a-z])[^\W_]+(?:_[^\W_]+)*__")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?$|simple$")  # of a link to the same article, shown beside the text
_SISTER = re.compile(r"wikt(?:ionary)?$|commons$|species$|[a-z]+:?(?:wikt|commons)$")
_HEADING = re.compile(r"(={1,6})(.+?)\1\s*$")
_ROW = re.compile(r"\{\||[|!]|(?:\[\[)?(?:File|Image):", re.IGNORECASE)  # of a table or gallery that was never closed
_HOLE = "\x02"  # where a template stood that is no text
_STOPS = frozenset(",.;:!?)]")  # with no space before them
_SEAM = "\x03"  # where a tag was cut out, so that marks of bold and italic on either side stay two
_AFTER_OPENING = re.compile(r"\((?:\s*[;,])+\s*")
_EMPTY_PARENTHESES = re.compile(r"\((?:[\s,;:]|see)*\)")
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
    text = "\n".join(map(without_marks, text.split("\n")))
    text = _TAGS.sub("", _BREAKS.sub("\n", _SWITCH.sub("", text))).replace(_SEAM, "")
    text = _EXTERNAL.sub(lambda found: found.group(1) or _HOLE, text)
    if "://" in text:
        text = _BARE_ADDRESS.sub(_HOLE, text)
    text = _SPACES.sub(" ", html.unescape(text))
    if _HOLE in text:
        text = _close_holes(text)
    text = _AFTER_OPENING.sub("(", text)
    if _EMPTY_PARENTHESES.search(text):
        text = _WITH_SPACE_BEFORE.sub("", text)
    return _tidy(text)


def _close_holes(text: str) -> str:
    """What a reader would not miss where something is left out: no space before a stop, no two spaces, no ", ,"."""
    first, *rest = text.split(_HOLE)
    made = [first.rstrip(" ")]
    before, space = first.rstrip(" ")[-1:], first.endswith(" ")
    for part in rest:
        body = part.lstrip(" ")
        space = space or len(body) < len(part)
        if not body:  # another hole follows
            continue
        if body[0] in _STOPS:
            space = False
            if body[0] in ",." and body[0] == before:
                body = body[1:]
        elif before == "(":
            space = False
        made.append(" " if space else "")
        made.append(body.rstrip(" "))
        space, before = body.endswith(" "), body.rstrip(" ")[-1:] or before
    return "".join(made)


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
        self.places: dict[str, list[int]] = {"{{": [], "{{{": [], "[[": [], "{|": [], "<table": []}

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
    match = _DELIMITERS.search(text)
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
            _close_braces(walk, len(token))
        elif head == "\n":
            pieces.append("\n")
            if token[-1] == "|":
                walk.begin("{|")
            elif (first := walk.end("{|")) is not None:
                del pieces[first:]
        elif (tag := match.group("tag")) is not None:
            at = _skip_tag(text, token, tag.lower(), end, unclosed, pieces)
        elif token[1] != "/":
            walk.begin("<table")
        elif (first := walk.end("<table")) is not None:
            del pieces[first:]
        match = _DELIMITERS.search(text, at)
    pieces.append(text[at:])
    return pieces


def _skip_tag(text: str, token: str, tag: str, end: int, unclosed: set[str], pieces: list[str]) -> int:
    """Where text goes on behind an opening tag and what belongs to it."""
    mark = _SEAM if tag in ("ref", "references") else _HOLE
    if token.endswith("/>"):
        pieces.append(mark)
        return end
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


def _close_braces(walk: _Walk, count: int) -> None:
    pieces = walk.pieces
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


def _close_link(pieces: list[str], first: int, depth: int, dropped: frozenset[str]) -> None:
    if depth > _DEEPEST or len(pieces) == first:
        return
    inner = pieces[first] if len(pieces) == first + 1 else "".join(pieces[first:])
    title, bar, words = inner.partition("|")
    prefix, colon, rest = title.partition(":")
    if colon:
        prefix = prefix.strip().casefold()
        hidden = _LANGUAGE.match(prefix) or (not bar and _SISTER.match(prefix))
        if prefix in dropped or (prefix and not rest.startswith(" ") and hidden):
            del pieces[first:]
            return
    pieces[first:] = [words if bar else title.strip().lstrip(":")]


def _close_template(pieces: list[str], first: int, depth: int) -> None:
    words = words_of(pieces[first]) if len(pieces) > first else None
    if words is None or depth > _DEEPEST:
        pieces[first:] = [_HOLE]
    else:
        pieces[first:] = [words(arguments("".join(pieces[first:]).replace(_HOLE, ""))) or _HOLE]


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
        if _ROW.match(line):
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
