"""Score against size and against speed, as an SVG."""

import html
import math
from collections.abc import Sequence

from pipeline.evaluation.results import Results

_COLOURS = ("#2563eb", "#dc2626", "#6b7280", "#059669", "#d97706", "#7c3aed", "#0891b2")
_WIDTH, _HEIGHT = 380, 260
_LEFT, _TOP = 60, 50


def draw(results: Results) -> str:
    """Two panels side by side: the mean score of the tasks over the number of parameters, and over the speed."""
    names = list(results.models)
    scores = [100 * results.average(name) for name in names]
    tasks = [line.task for line in results.headlines()]
    title = html.escape(f"{'Mean score' if len(tasks) > 1 else 'Score'} on {', '.join(tasks)} (%)")
    panels = [
        ("parameters (millions)", [results.models[name]["parameters"] / 1e6 for name in names]),
        ("forward tokens/s on this machine", [results.models[name]["forward_tokens_per_second"] for name in names]),
    ]
    drawn = "".join(
        _panel(title, values, scores, names, _LEFT + number * (_WIDTH + 80))
        for number, (title, values) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH + 180}" height="{_HEIGHT + 120}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="24" font-size="14" font-weight="bold">{title}</text>'
        f"{drawn}</svg>\n"
    )


def _panel(title: str, values: Sequence[float], scores: Sequence[float], names: Sequence[str], left: float) -> str:
    low, high = math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15
    bottom, top = math.floor(min(scores) - 1), math.ceil(max(scores) + 1)

    def x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * _WIDTH

    def y(score: float) -> float:
        return _TOP + (top - score) / (top - bottom) * _HEIGHT

    parts = [
        f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#9ca3af"/>',
        f'<text x="{left + _WIDTH / 2}" y="{_TOP + _HEIGHT + 45}" text-anchor="middle">{html.escape(title)}</text>',
    ]
    step = next(step for step in (1, 2, 5, 10, 20) if (top - bottom) / step <= 6)
    for tick in range(-(-bottom // step) * step, top + 1, step):
        parts.append(
            f'<line x1="{left}" y1="{y(tick):.1f}" x2="{left + _WIDTH}" y2="{y(tick):.1f}" stroke="#e5e7eb"/>'
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for value in _ticks(min(values), max(values)):
        parts.append(
            f'<text x="{x(value):.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{value:,g}</text>'
            f'<path d="M{x(value):.1f} {_TOP + _HEIGHT}v5" stroke="#9ca3af"/>'
        )
    for number, (value, score, name) in enumerate(zip(values, scores, names, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        side, gap = ("end", -9) if x(value) > left + 0.6 * _WIDTH else ("start", 9)
        parts.append(
            f'<circle cx="{x(value):.1f}" cy="{y(score):.1f}" r="6" fill="{colour}"/>'
            f'<text x="{x(value) + gap:.1f}" y="{y(score) + 4:.1f}" text-anchor="{side}" fill="{colour}">'
            f"{html.escape(name)} {score:.1f}</text>"
        )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Values with one digit that lie in a range, or its ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [
        digit * 10**power for power in powers for digit in (1, 2, 5) if low * 0.75 <= digit * 10**power <= high * 1.3
    ]
    return found or [low, high]
