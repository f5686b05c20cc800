"""The scaling curve as an SVG: seconds of a step by what they go to, for each number of devices."""

from __future__ import annotations

import html

from pipeline.planning.plan import Plan

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 380, 70, 60, 320
_COLOURS = {
    "teacher": "#4477aa",
    "student": "#66ccee",
    "loss": "#228833",
    "backward": "#ccbb44",
    "launches": "#bbbbbb",
    "update": "#aa3377",
    "wire": "#ee6677",
    "host": "#000000",
}


def picture(plan: Plan) -> str:
    """Stacked bars, one for each number of devices that can share the global batch."""
    points = [point for point in plan.curve if point.step is not None]
    most = max(point.step.total for point in points)
    wide = (_WIDTH - _LEFT - 20) / len(points)
    lines = []
    for number, point in enumerate(points):
        x, y = _LEFT + number * wide + 0.15 * wide, float(_BOTTOM)
        for name, seconds in point.step.seconds.items():
            tall = seconds / most * (_BOTTOM - _TOP)
            y -= tall
            if tall > 0:
                lines.append(_box(x, y, 0.7 * wide, tall, _COLOURS[name]))
        lines.append(_text(x + 0.35 * wide, y - 5, _short(point.step.total), "middle"))
        lines.append(_text(x + 0.35 * wide, _BOTTOM + 16, str(point.ranks), "middle"))
    used = [name for name in _COLOURS if any(point.step.seconds.get(name) for point in points)]
    for number, name in enumerate(used):
        x = _LEFT + number * 88
        lines += [_box(x, 350, 10, 10, _COLOURS[name]), _text(x + 14, 359, name)]
    lines.append(f'<line x1="{_LEFT}" y1="{_BOTTOM}" x2="{_WIDTH - 20}" y2="{_BOTTOM}" stroke="#333"/>')
    recipe = plan.students[0].recipe
    title = (
        f"A step of {recipe.optimizer.global_batch_samples} x {recipe.data.seq_tokens} tokens on "
        f"{plan.machines.rates.name}, by number of devices ({plan.chosen.name}; predicted)"
    )
    lines.append(_text(_LEFT, 28, title, size=14))
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{html.escape(words)}</text>'
