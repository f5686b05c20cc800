"""The marks of bold and italic in wikitext, two and three apostrophes, told apart from apostrophes."""

import re

_APOSTROPHES = re.compile(r"'{2,}")


def without_marks(line: str) -> str:
    """A line without the marks of bold and italic, by MediaWiki's rules: what does not pair is an apostrophe."""
    if "''" not in line:
        return line
    runs = list(_APOSTROPHES.finditer(line))
    lengths = [run.end() - run.start() for run in runs]
    left = [1 if n == 4 else max(0, n - 5) for n in lengths]
    marks = [3 if n == 4 else min(n, 5) for n in lengths]
    bold, italic = sum(n in (3, 5) for n in marks), sum(n in (2, 5) for n in marks)
    candidates = [i for i, n in enumerate(marks) if n == 3]
    if bold % 2 and italic % 2 and candidates:
        # one of the bold marks is an apostrophe and italic: the one behind a word of one letter
        left[min(candidates, key=lambda i: (_rank(line, runs[i].start()), i))] += 1
    parts, at = [], 0
    for run, extra in zip(runs, left, strict=True):
        parts += [line[at : run.start()], "'" * extra]
        at = run.end()
    return "".join([*parts, line[at:]])


def _rank(line: str, start: int) -> int:
    """Which unpaired bold mark is an apostrophe first: after one letter, after a longer word, after a space."""
    before = line[max(0, start - 2) : start]
    if not before or before[-1] == " ":
        return 2
    return 0 if len(before) == 2 and before[0] == " " else 1
