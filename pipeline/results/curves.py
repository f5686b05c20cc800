"""Curves of losses as an SVG: against tokens, and against time."""

import html
import math
from collections.abc import Sequence

from pipeline.results.compare import Outcome

Points = Sequence[tuple[float, float]]
_COLOURS = tuple("#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22".split())
_WIDTH, _HEIGHT, _LEFT, _TOP = 380, 280, 60, 40
_MOST_POINTS = 500


def picture(outcomes: Sequence[Outcome]) -> str:
    """Held-out losses of the runs (training losses where there are none) against tokens and against hours.

    Losses stand on a logarithmic axis.
    """
    held_out = all(len(outcome.validation) > 1 for outcome in outcomes)
    curves = [outcome.validation if held_out else outcome.training for outcome in outcomes]
    what = "Held-out loss" if held_out else "Training loss"
    panels = [
        _panel(f"{what} against tokens", "million tokens", [[(t / 1e6, loss) for t, _, loss in c] for c in curves], 0),
        _panel(f"{what} against time", "hours", [[(s / 3600, loss) for _, s, loss in c] for c in curves], 1),
    ]
    names = "".join(
        f'<rect x="{_LEFT}" y="{_TOP + _HEIGHT + 55 + 18 * n}" width="12" height="12" fill="{_colour(n)}"/>'
        f'<text x="{_LEFT + 18}" y="{_TOP + _HEIGHT + 66 + 18 * n}">{html.escape(outcome.name)}</text>'
        for n, outcome in enumerate(outcomes)
    )
    width, height = 2 * (_LEFT + _WIDTH) + 40, _TOP + _HEIGHT + 75 + 18 * len(outcomes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}{names}</svg>\n'
    )


def _panel(title: str, unit: str, curves: Sequence[Points], number: int) -> str:
    """One pair of axes with a line for each curve."""
    curves = [_thinned([(x, math.log10(y)) for x, y in curve if y > 0 and math.isfinite(y)]) for curve in curves]
    points = [point for curve in curves for point in curve]
    left = _LEFT + number * (_WIDTH + _LEFT + 10)
    parts = [f'<text x="{left}" y="22" font-size="14" font-weight="bold">{title}</text>']
    if not points:
        return "".join([*parts, f'<text x="{left}" y="{_TOP + 20}">no finite loss is on record</text>'])
    right_x = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = low - 0.02 - 0.03 * (high - low), high + 0.02 + 0.03 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + _WIDTH * x / right_x, _TOP + _HEIGHT * (high - y) / (high - low)

    for step in range(5):
        x, y = place(right_x * step / 4, low + (high - low) * step / 4)
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10 ** (low + (high - low) * step / 4):.3g}</text>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{right_x * step / 4:.3g}</text>'
        )
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">{unit}</text>')
    for n, curve in enumerate(curves):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(n)}" stroke-width="1.8"/>')
    return "".join(parts)


def _thinned(points: Points) -> Points:
    """At most so many points as a picture shows, the last one among them."""
    every = max(1, len(points) // _MOST_POINTS)
    return [*points[::every], *points[-1:]]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
