"""What stands for words in wikitext: templates, under the names that they have in many wikis, and variants of a script.

Other templates leave holes, which are closed.
"""

import re
from collections.abc import Callable

HOLE = "\x02"  # where something stood that is no text
_STOPS = frozenset(",.;:!?)]")  # with no space before them


class Arguments(list[str]):
    """The arguments of a template that have no name, in their order; `named` holds the others."""

    def __init__(self) -> None:
        super().__init__()
        self.named: dict[str, str] = {}


Words = Callable[[Arguments], str]
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


def arguments(inner: str) -> Arguments:
    """The arguments of a template, given what stands between its braces; `1=` and so on count as without a name."""
    head, *rest = inner.split("|")
    if ":" in head:
        rest.insert(0, head.partition(":")[2])
    values = Arguments()
    for argument in rest:
        named = _NAMED.match(argument)
        if named is None:
            values.append(argument.strip())
        elif named.group(1) in _TEXT_NAMES:
            values.append(argument[named.end() :].strip())
        else:
            values.named[named.group(1)] = argument[named.end() :].strip()
    return values


_SCRIPT = r"(?:zh|sr|kk|ku|uz|tg|gan|iu|shi|crh)(?:-[a-z]+){0,2}\s*:"
_VARIANT = re.compile(rf"\s*{_SCRIPT}(.*?)(?:;\s*(?:(?={_SCRIPT})|$)|$)", re.DOTALL)  # up to the next script


def first_variant(inner: str) -> str:
    """What stands between `-{` and `}-` -> the text of its first script; "" for rules that show nothing."""
    flags, bar, rules = inner.partition("|")
    if not bar or ":" in flags:
        flags, rules = "", inner
    if not {"H", "T", "-"}.isdisjoint(flag.strip() for flag in flags.split(";")):
        return ""
    found = _VARIANT.match(rules)
    return (found.group(1) if found else rules).strip()


def close_holes(text: str) -> str:
    """What a reader would not miss where something is left out: no space before a stop, no two spaces, no ", ,"."""
    first, *rest = text.split(HOLE)
    made = [first.rstrip(" ")]
    before, space = first.rstrip(" ")[-1:], first.endswith(" ")
    for part in rest:
        body = part.lstrip(" ")
        space = space or len(body) < len(part)
        if not body:  # another hole follows
            continue
        if body[0] in _STOPS:
            space = body[0] == ")" and before == "("  # not to be taken for a call such as print()
            if body[0] in ",." and body[0] == before:
                body = body[1:]
        elif before == "(":
            space = False
        made.append(" " if space else "")
        made.append(body.rstrip(" "))
        space, before = body.endswith(" "), body.rstrip(" ")[-1:] or before
    return "".join(made)


def _first(values: Arguments) -> str:
    return values[0] if values else ""


def _second(values: Arguments) -> str:
    return values[1] if len(values) > 1 else ""


def _last(values: Arguments) -> str:
    return values[-1] if values else ""


_BETWEEN = {"-": "–", "–": "–", "to": " to ", "to(-)": " to ", "and": " and ", "and(-)": " and ", "or": " or "}
_BETWEEN |= {",": ", ", ", and": ", and ", ", or": ", or ", "*": " × ", "xx": " × ", "to about": " to about "}
_BETWEEN |= {"x": " × ", "×": " × ", "by": " by ", "by(x)": " × ", "+/-": " ± ", "±": " ± "}
_POWERS = {"e3": "thousand", "e6": "million", "e9": "billion", "e12": "trillion"}
# smaller units that are counted along with a larger one
_PARTS = frozenset("ft|in foot|in foot|inch st|lb lb|oz mi|yd mi|ft yd|ft".split())
_UNITS = {"F": "°F", "C": "°C", "sqmi": "sq mi", "sqkm": "km²", "km2": "km²", "m2": "m²", "km3": "km³", "m3": "m³"}


def _quantity(values: Arguments) -> str:
    """5|km -> 5 km; 5|-|10|km -> 5–10 km; 6|ft|2|in -> 6 ft 2 in; what it is converted to is left out."""
    at = 1  # of a word between numbers, or the unit
    while len(values) > at + 1 and values[at] in _BETWEEN:
        at += 2
    text = "".join(_BETWEEN[value] if i % 2 else value for i, value in enumerate(values[:at]))
    if len(values) <= at:
        return text
    unit = values[at]
    for power, word in _POWERS.items():
        if unit.startswith(power):
            text, unit = f"{text} {word}", unit.removeprefix(power)
    text = f"{text} {_UNITS.get(unit, unit)}"
    while len(values) > at + 2 and f"{values[at]}|{values[at + 2]}" in _PARTS:
        text = f"{text} {values[at + 1]} {values[at + 2]}"
        at += 2
    return text


def _fraction(values: Arguments) -> str:
    if len(values) == 3:
        return f"{values[0]} {values[1]}/{values[2]}"
    return "/".join(values) if len(values) == 2 else f"1/{_first(values)}"


def _joined(values: list[str]) -> str:
    return " ".join(filter(None, values))


_MONTHS = "January February March April May June July August September October November December".split()
_MONTH_NAMES = {str(number): name for number, name in enumerate(_MONTHS, 1)}


def _as_of(values: Arguments) -> str:
    """2015|6|30 -> As of 30 June 2015."""
    named = values.named
    if named.get("alt"):
        return named["alt"]
    year, month, day, *_ = [*values, "", "", ""]
    month = _MONTH_NAMES.get(month.lstrip("0"), month)
    date = _joined([day, month, year])
    if day and named.get("df", "").upper() == "US":
        date = f"{month} {day}, {year}"
    if named.get("bare") or not date:
        return date
    words = "Since" if named.get("since") else "As of"
    return f"{words.lower() if named.get('lc') else words} {date}"


_POSITIVE = re.compile(r"\((\d*\+)\)")
_NEGATIVE = re.compile(r"\((\d*)[-−]\)|(?<=\S)-(?=\s|$)")
_BONDS = (("->", "→"), ("<-", "←"), ("\\d", "="), ("\\t", "≡"), ("\\s", "–"))


def _chemical(values: Arguments) -> str:
    """H|2|O -> H2O; SO4(2-) -> SO42−, as it reads without raised letters."""
    text = _NEGATIVE.sub(r"\1−", _POSITIVE.sub(r"\1", "".join(values)))
    for written, shown in _BONDS:
        text = text.replace(written, shown)
    return text


def _constant(text: str) -> Words:
    return lambda values: text


def _prefixed(text: str) -> Words:
    return lambda values: f"{text}{_joined(values)}" if values else ""


def _in_brackets(values: Arguments) -> str:
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
    **dict.fromkeys(("chem", "chem2"), _chemical),
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
    **dict.fromkeys(("as of", "since"), _as_of),
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
