"""SVG charts for the report: axes, points with intervals, and labels that keep out of each other's way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from .page import box, safe

__all__ = [
    "BOTTOM",
    "LEFT",
    "RIGHT",
    "TOP",
    "WIDTH",
    "Axis",
    "apart",
    "chart",
    "label_beside",
    "line",
    "linear_axis",
    "log_axis",
    "mark",
]

WIDTH, HEIGHT = 640, 340  # of a chart, and then its plot:
LEFT, RIGHT, TOP, BOTTOM = 52, 628, 12, 292


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values to pixels, from `low` at `start` to `high` at `end`."""

    start: float
    end: float
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def linear_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """Linear, from tick to tick."""
    low, high = min(known := list(values)), max(known)
    rough = max(high - low, 1e-3 * abs(high), 1e-6) / 7
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first = math.floor(low / step)
    ticks = [round(i * step, 9) for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
    return Axis(start, end, ticks[0], ticks[-1], ticks)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Wider than the values on both sides, so that labels have room."""
    low, high = max(min(values), 0.1), max(*values, 0.1)
    room = max(1.6, (high / low) ** 0.28)
    low, high = low / room, high * room
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    factors = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(start, end, low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def chart(label: str, x: Axis, y: Axis, names: tuple[str, str], body: Iterable[str]) -> str:
    """A plot with axes; `label` says in words what it shows, `names` what the axes are, `body` is SVG."""
    across, down = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts = [f'<text x="{x(tick)}" y="{BOTTOM + 18}" text-anchor="middle">{tick:g}</text>' for tick in x.ticks]
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{names[0]}</text>')
    parts.append(f'<text transform="translate(13 {down}) rotate(-90)" text-anchor="middle">{names[1]}</text>')
    head = f'<svg role="img" aria-label="{safe(label)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return box(f"chart: {names[1]}", f"{head}{''.join([*parts, *body])}</svg>")


def mark(title: str, a: float, b: float, ends: tuple[float | None, float | None], y: Axis, colour: int = 0) -> str:
    """A point with its interval."""
    bar = ""
    low, high = ends
    if low is not None and high is not None:
        bar = f'<line class="bar l{colour}" x1="{a}" x2="{a}" y1="{y(low)}" y2="{y(high)}"/>'
    return f'<g><title>{safe(title)}</title>{bar}<circle class="d{colour}" cx="{a}" cy="{b}" r="4.5"/></g>'


def apart(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of nearly the same x side by side, so that their intervals can be told apart."""
    moved = list(spots)
    order = sorted(range(len(spots)), key=lambda i: spots[i])
    while order:
        group = [i for i in order if spots[i][0] - spots[order[0]][0] < 6]
        order = order[len(group) :]
        for place, i in enumerate(group):
            moved[i] = (round(spots[i][0] + 9 * (place - (len(group) - 1) / 2), 1), spots[i][1])
    return moved


def label_beside(label: str, a: float, b: float, taken: list[tuple[float, float, float, float]]) -> str:
    """A label beside a point, where it covers no other if there is such a place."""
    wide = 7 * len(label)
    places = [(x, b + down) for down in (0, -13, 13, -26, 26, -39, 39) for x in (a + 10, a - 10 - wide)]
    free = [
        (x, y)
        for x, y in places
        if x > LEFT and x + wide < WIDTH and y - 8 > TOP and y + 4 < BOTTOM
        if not any(x < box[2] and box[0] < x + wide and y - 6 < box[3] and box[1] < y + 6 for box in taken)
    ]
    x, y = (free or places)[0]
    taken.append((x, y - 6, x + wide, y + 6))
    side, anchor = (x, "start") if x > a else (x + wide, "end")
    leader = f'<line class="leader" x1="{a}" y1="{b}" x2="{side:.1f}" y2="{y:.1f}"/>' if abs(y - b) > 13 else ""
    return f'{leader}<text class="label" x="{side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{safe(label)}</text>'


def line(points: Iterable[tuple[float, float]], colour: int = 0) -> str:
    """Points joined."""
    return f'<polyline class="l{colour}" points="{" ".join(f"{a},{b}" for a, b in points)}"/>'
