"""Curves of losses and scores as an SVG: against tokens, and against time."""

import html
import math
from collections.abc import Sequence

from pipeline.results.compare import Outcome
from pipeline.training.metrics import SCORES

Points = Sequence[tuple[float, float]]
_COLOURS = tuple("#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22".split())
_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 380, 280, 60, 40, 55
_MOST_POINTS = 500
_HOURS_FROM_SECONDS = 3 * 3600


def picture(outcomes: Sequence[Outcome]) -> str:
    """Held-out losses of the runs (training losses where there are none) against tokens and against time.

    Losses stand on a logarithmic axis. Below them stand the scores that were measured while training, if any were.
    """
    held_out = all(len(outcome.validation) > 1 for outcome in outcomes)
    losses = [outcome.validation if held_out else outcome.training for outcome in outcomes]
    rows = [("Held-out loss" if held_out else "Training loss", losses)]
    scored = [name for name in SCORES if any(len(outcome.scored.get(name, ())) > 1 for outcome in outcomes)]
    rows += [(SCORES[name].capitalize(), [outcome.scored.get(name, []) for outcome in outcomes]) for name in scored]
    panels = []
    longest = max((seconds for curves in losses for _, seconds, _ in curves), default=0.0)
    unit, seconds_each = ("hours", 3600) if longest > _HOURS_FROM_SECONDS else ("minutes", 60)
    for row, (what, curves) in enumerate(rows):
        over_tokens = [[(tokens / 1e6, value) for tokens, _, value in curve] for curve in curves]
        over_time = [[(seconds / seconds_each, value) for _, seconds, value in curve] for curve in curves]
        panels.append(_panel(f"{what} against tokens", "million tokens", over_tokens, row, 0))
        panels.append(_panel(f"{what} against time", unit, over_time, row, 1))
    bottom = len(rows) * (_TOP + _HEIGHT + _BELOW)
    names = "".join(
        f'<rect x="{_LEFT}" y="{bottom + 18 * n}" width="12" height="12" fill="{_colour(n)}"/>'
        f'<text x="{_LEFT + 18}" y="{bottom + 11 + 18 * n}">{html.escape(outcome.name)}</text>'
        for n, outcome in enumerate(outcomes)
    )
    width, height = 2 * (_LEFT + _WIDTH) + 40, bottom + 20 + 18 * len(outcomes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}{names}</svg>\n'
    )


def _panel(title: str, unit: str, curves: Sequence[Points], row: int, column: int) -> str:
    """One pair of axes with a line for each curve; losses, in the first row, stand on a logarithmic axis."""
    logarithmic = row == 0
    height, value = (math.log10, (10.0).__pow__) if logarithmic else (float, float)
    finite = [[(x, y) for x, y in curve if math.isfinite(y) and (y > 0 or not logarithmic)] for curve in curves]
    curves = [_thinned([(x, height(y)) for x, y in curve]) for curve in finite]
    points = [point for curve in curves for point in curve]
    left, top = _LEFT + column * (_WIDTH + _LEFT + 10), _TOP + row * (_TOP + _HEIGHT + _BELOW)
    parts = [f'<text x="{left}" y="{top - 18}" font-size="14" font-weight="bold">{title}</text>']
    if not points:
        return "".join([*parts, f'<text x="{left}" y="{top + 20}">no finite number is on record</text>'])
    right_x = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = low - 0.02 - 0.03 * (high - low), high + 0.02 + 0.03 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + _WIDTH * x / right_x, top + _HEIGHT * (high - y) / (high - low)

    for mark in _ticks(value(low), value(high), logarithmic):
        _, y = place(0, height(mark))
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:,.10g}</text>')
    for mark in _ticks(0, right_x):
        x, _ = place(mark, low)
        parts.append(f'<text x="{x:.1f}" y="{top + _HEIGHT + 18}" text-anchor="middle">{mark:,.10g}</text>')
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{top + _HEIGHT + 36}" text-anchor="middle">{unit}</text>')
    for n, curve in enumerate(curves):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(n)}" stroke-width="1.8"/>')
    return "".join(parts)


def _ticks(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """Round numbers between two: at most eight apart by the same, or by about the same factor over decades."""
    if logarithmic and high > 10 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        return [mark for power in powers for digit in digits if low <= (mark := digit * 10.0**power) <= high]
    tenth = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = next(step for step in (tenth, 2 * tenth, 5 * tenth, 10 * tenth) if (high - low) / step <= 7)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(points: Points) -> Points:
    """At most so many points as a picture shows, the last one among them."""
    every = max(1, len(points) // _MOST_POINTS)
    return [*points[::every], *points[-1:]]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
