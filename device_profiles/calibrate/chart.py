"""Line charts as SVG without a plotting library, which boards do not have. Readable in light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

import msgspec

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 76, 196, 64, 62
# Distinguishable with color blindness, and readable on white and black.
COLORS = ("#2f7fd1", "#d9730d", "#1a9e75", "#b95fc7", "#c9a200")
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 }
.paper { fill: #ffffff }
.grid { stroke: #d8dee4; stroke-width: 1 }
.axis { stroke: #57606a; stroke-width: 1 }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round }
.modeled { stroke-dasharray: 6 5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .paper { fill: #0d1117 }
  .grid { stroke: #30363d }
  .axis { stroke: #8b949e }
}"""


class ChartLine(msgspec.Struct, frozen=True):
    """One line of a chart.

    Attributes:
        name: legend entry.
        points: (x, y), at least one, x > 0.
        modeled: draw it dashed and without markers.
    """

    name: str
    points: Sequence[tuple[float, float]]
    modeled: bool = False


def line_chart(title: str, x_label: str, y_label: str, curves: Sequence[ChartLine]) -> str:
    """An SVG document; the x axis is logarithmic with a tick at every x, the y axis linear from 0."""
    xs = sorted({x for curve in curves for x, _ in curve.points})
    step = _step(max(y for curve in curves for _, y in curve.points))
    top = step * math.ceil(max(y for curve in curves for _, y in curve.points) / step)
    first, last = math.log2(xs[0]), math.log2(xs[-1])

    def x_pixel(x: float) -> float:
        share = (math.log2(x) - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_pixel(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
    ]
    for count in range(round(top / step) + 1):
        y = y_pixel(count * step)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{y + 4.5:.1f}" text-anchor="end">{count * step:.6g}</text>')
    for x in xs:
        parts.append(
            f'<line class="axis" x1="{x_pixel(x):.1f}" y1="{bottom}" x2="{x_pixel(x):.1f}" y2="{bottom + 5}"/>'
        )
        parts.append(f'<text x="{x_pixel(x):.1f}" y="{bottom + 21}" text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(22 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        dashed = " modeled" if curve.modeled else ""
        path = " ".join(f"{x_pixel(x):.1f},{y_pixel(y):.1f}" for x, y in curve.points)
        stroke = f'class="curve{dashed}" stroke="{color}"'
        parts.append(f'<polyline {stroke} points="{path}"/>')
        if not curve.modeled:
            parts += [
                f'<circle cx="{x_pixel(x):.1f}" cy="{y_pixel(y):.1f}" r="3.6" fill="{color}"/>' for x, y in curve.points
            ]
        row = TOP + 14 + 24 * number
        parts.append(f'<line {stroke} x1="{right + 20}" y1="{row}" x2="{right + 48}" y2="{row}"/>')
        parts.append(f'<text x="{right + 56}" y="{row + 4.5}">{escape(curve.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _step(maximum: float) -> float:
    """A round distance between grid lines, for about five lines."""
    unit = 10.0 ** math.floor(math.log10(maximum / 5))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= maximum / 5)
