"""Templates of wikitext that stand for words, under the names that they have in many wikis."""

import re
from collections.abc import Callable

Words = Callable[[list[str]], str]
"""The arguments of a template -> what a reader sees; "" where that is nothing."""

_NAMED = re.compile(r"\s*([^=|<>\[\]{}\n]{1,40}?)\s*=")
_TEXT_NAMES = frozenset(("1", "2", "3", "text", "quote", "texte", "cita"))


def words_of(inner: str) -> Words | None:
    """How a template is read, given what stands between its braces (its first piece is enough); None: not at all."""
    name = inner.partition("|")[0].replace("_", " ").strip().lower()
    words = _TEXT_TEMPLATES.get(name)
    if words is None and ":" in name:
        words = _TEXT_TEMPLATES.get(f"{name.partition(':')[0]}:")
    if words is None and name.startswith(("lang-", "script/")):
        words = _first
    return words


def arguments(inner: str) -> list[str]:
    """The arguments of a template that have no name, in their order; `1=` and so on count as such."""
    head, *rest = inner.split("|")
    if ":" in head:
        rest.insert(0, head.partition(":")[2])
    values: list[str] = []
    for argument in rest:
        named = _NAMED.match(argument)
        if named is None:
            values.append(argument.strip())
        elif named.group(1) in _TEXT_NAMES:
            values.append(argument[named.end() :].strip())
    return values


def _first(values: list[str]) -> str:
    return values[0] if values else ""


def _second(values: list[str]) -> str:
    return values[1] if len(values) > 1 else ""


def _last(values: list[str]) -> str:
    return values[-1] if values else ""


_BETWEEN = {"-": "–", "–": "–", "to": " to ", "to(-)": " to ", "and": " and ", "and(-)": " and ", "or": " or "}
_BETWEEN |= {"x": " × ", "×": " × ", "by": " by ", "by(x)": " × ", "+/-": " ± ", "±": " ± "}
_POWERS = {"e3": "thousand", "e6": "million", "e9": "billion", "e12": "trillion"}
_UNITS = {"F": "°F", "C": "°C", "sqmi": "sq mi", "sqkm": "km²", "km2": "km²", "m2": "m²", "km3": "km³", "m3": "m³"}


def _quantity(values: list[str]) -> str:
    """5|km -> 5 km; 5|-|10|km -> 5–10 km; what it is converted to is left out."""
    text = _first(values)
    rest = values[1:]
    while len(rest) > 1 and rest[0] in _BETWEEN:
        text += _BETWEEN[rest[0]] + rest[1]
        rest = rest[2:]
    if not rest:
        return text
    unit = rest[0]
    for power, word in _POWERS.items():
        if unit.startswith(power):
            text, unit = f"{text} {word}", unit.removeprefix(power)
    return f"{text} {_UNITS.get(unit, unit)}"


def _fraction(values: list[str]) -> str:
    if len(values) == 3:
        return f"{values[0]} {values[1]}/{values[2]}"
    return "/".join(values) if len(values) == 2 else f"1/{_first(values)}"


def _joined(values: list[str]) -> str:
    return " ".join(filter(None, values))


def _constant(text: str) -> Words:
    return lambda values: text


def _prefixed(text: str) -> Words:
    return lambda values: f"{text}{_joined(values)}" if values else ""


def _in_brackets(values: list[str]) -> str:
    return f"⟨{values[0]}⟩" if values and values[0] else ""


# Templates that are words, under the names that they have in many wikis; all others leave a hole, which is closed.
_TEXT_TEMPLATES: dict[str, Words] = {
    # text of another language or script: the text
    **dict.fromkeys(("lang", "langx", "langue", "langr", "rtl-lang", "wikt-lang", "script"), _second),
    **dict.fromkeys(("transl", "transliteration", "translit", "tlit", "xlit"), _last),
    **dict.fromkeys(("angbr", "angle bracket", "grapheme"), _in_brackets),
    **dict.fromkeys(("polytonic", "unicode", "hebrew", "arabic", "bigjap", "nihongo", "nihongo2", "zh-full"), _first),
    # quantities: as they are given
    **dict.fromkeys(("convert", "cvt", "conv", "unité", "unidad", "unit", "unità", "măsură"), _quantity),
    **dict.fromkeys(("val", "nb", "nombre", "formatnum:", "formatnum", "num", "number", "gaps", "mvar"), _first),
    **dict.fromkeys(("frac", "sfrac", "fraction", "fract"), _fraction),
    **dict.fromkeys(("us$", "usd"), _prefixed("US$")),
    **dict.fromkeys(("£", "gbp"), _prefixed("£")),
    **dict.fromkeys(("€", "eur", "euro"), _prefixed("€")),
    # words that a template only sets in some way
    **dict.fromkeys(
        "nowrap nobr nobreak nwr j small smaller big larger large em strong tt sc smallcaps sup sub math uc: lc: "
        "ucfirst: lcfirst: abbr abbreviation tooltip linktext ill link-interwiki bold italic underline highlight "
        "visible keypress key code2".split(),
        _first,
    ),
    **dict.fromkeys(("nowrap begin", "nowrap end", "wbr", "shy"), _constant("\u200b")),
    **dict.fromkeys(("not a typo", "sic", "as written", "proper name"), _joined),
    **dict.fromkeys(("interlanguage link", "lien", "ill-wd", "illm"), _first),
    # quotations
    **dict.fromkeys(("quote", "blockquote", "cquote", "quotation", "citation bloc", "cita", "zitat", "bq"), _first),
    # dates
    **dict.fromkeys(("as of", "since"), _prefixed("As of ")),
    **dict.fromkeys(("circa", "c.", "ca.", "c"), _prefixed("c. ")),
    **dict.fromkeys(("date", "dates", "date-", "dts", "fecha"), _joined),
    # characters
    **dict.fromkeys(("nbsp", "space", "spaces", "thinsp", "hair space", "nnbsp"), _constant(" ")),
    **dict.fromkeys(("snd", "spnd", "spaced ndash", "spaced en dash", "-", "dash"), _constant(" – ")),
    **dict.fromkeys(("ndash", "en dash", "endash"), _constant("–")),
    **dict.fromkeys(("mdash", "em dash", "emdash"), _constant("—")),
    **dict.fromkeys(("·", "•", "middot", "bull", "dot", "dotsep"), _constant(" · ")),
    **dict.fromkeys(("'", "`", "apostrophe"), _constant("'")),
    **dict.fromkeys(("'s", "`s"), _constant("'s")),
    **dict.fromkeys(("okina", "ʻ"), _constant("ʻ")),
    "=": _constant("="),
    "pi": _constant("π"),
}
