"""Curves of one number, as coordinates in a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]  # step and value
WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 10, 192  # of the plot in it
MOST = 600  # points of a curve that are drawn


@dataclass
class Line:
    """The curve of a run."""

    run: int  # its number among the runs of the page, from 0
    last: float
    best: tuple[float, float]  # lowest and highest
    paths: list[str] = field(default_factory=list)  # 'x,y x,y ...', cut where it is not finite


@dataclass
class Chart:
    """All curves of one number.

    Attributes:
        name, unit: What is drawn over what, 'iteration' or 'epoch'.
        averaged: So many values are one point, more than 1 where a curve is long.
        x_range, y_range: What the borders of the plot stand for.
        x_ticks, y_ticks: Places in the picture and their labels.
    """

    name: str
    unit: str
    lines: list[Line]
    averaged: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def draw_chart(name: str, unit: str, curves: Sequence[list[Point]]) -> Chart | None:
    """Draw the curves of all runs, empty where one has none; None if no value is finite."""
    averaged = max(math.ceil(len(points) / MOST) for points in curves)
    shown = [thin_out(points, averaged) for points in curves]
    finite = [point for points in shown for point in points if math.isfinite(point[1])]
    if not finite:
        return None
    x_range, y_range = (_widen(values) for values in zip(*finite, strict=True))

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_range[0]) / (x_range[1] - x_range[0]) * (RIGHT - LEFT)
        y = BOTTOM - (point[1] - y_range[0]) / (y_range[1] - y_range[0]) * (BOTTOM - TOP)
        return round(x, 2), round(y, 2)

    lines = []
    for run, points in enumerate(shown):
        values = [value for _, value in curves[run] if math.isfinite(value)]
        if values:
            line = Line(run, curves[run][-1][1], (min(values), max(values)))
            pieces = [map(place, piece) for piece in split_at_gaps(points)]
            line.paths = [' '.join(f'{x:.2f},{y:.2f}' for x, y in piece) for piece in pieces]
            lines.append(line)
    x_ticks = [(place((x, y_range[0]))[0], _label(x)) for x in _ticks(x_range, 5)]
    y_ticks = [(place((x_range[0], y))[1], _label(y)) for y in _ticks(y_range, 4)]
    return Chart(name, unit, lines, averaged, x_range, y_range, x_ticks, y_ticks)


def thin_out(points: list[Point], count: int) -> list[Point]:
    """Make one point, at the last step, of each ``count`` points: their mean."""
    groups = [points[i : i + count] for i in range(0, len(points), count)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def split_at_gaps(points: list[Point]) -> list[list[Point]]:
    """Cut a curve where it is not finite."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _widen(values: tuple[float, ...]) -> tuple[float, float]:
    """Lowest and highest, apart from each other."""
    low, high = min(values), max(values)
    margin = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else (abs(low) / 10 or 1.0)
    return low - margin, high + margin


def _ticks(limits: tuple[float, float], count: int) -> list[float]:
    steps = MaxNLocator(count).tick_values(*limits)
    return [float(step) for step in steps if limits[0] <= step <= limits[1]]


def _label(number: float) -> str:
    if abs(number) >= 10_000:
        return f'{number / 1000:g}k'
    small = 0 < abs(number) < 0.001
    return f'{number:.1e}'.replace('e-0', 'e-') if small else f'{number:.4g}'
