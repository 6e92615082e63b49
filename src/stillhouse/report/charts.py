"""Charts as numbers: scales, ticks and paths, which the templates draw as SVG.

All charts share one small drawing area, so that text keeps its size on a phone; a wide
screen shows several beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stillhouse.metrics.statistics import Interval
from stillhouse.report.reading import Points, finite

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 36
MOST_POINTS = 400


@dataclass(frozen=True)
class Scale:
    """From values to places along an axis.

    Attributes:
        low: value at `start`.
        high: value at `end`, above `low`.
        start: place of `low`.
        end: place of `high`.
        log: logarithmic; both ends are above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    place: float
    label: str


@dataclass(frozen=True)
class Drawn:
    """One line of a chart.

    Attributes:
        name: for the legend.
        path: SVG path data; broken where values are not finite.
        dots: points that stand alone, which a path would not show.
        last: the last finite value.
        number: of its colour, from 0.
    """

    name: str
    path: str
    dots: list[tuple[float, float]]
    last: float
    number: int


@dataclass
class Chart:
    """Lines over one axis.

    Attributes:
        title: what is shown.
        x_label: of the horizontal axis.
        lines: drawn.
        x_ticks: horizontal.
        y_ticks: vertical.
        log: the vertical axis is logarithmic.
    """

    title: str
    x_label: str
    lines: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    log: bool = False


def line_chart(
    title: str, lines: Mapping[str, Points], *, x_label: str = "step", log: bool | None = None
) -> Chart | None:
    """A chart of named lines; None when no line has a finite point.

    Args:
        title: what is shown.
        lines: name to (x, value), x ascending; at most `MOST_POINTS` of each are drawn.
        x_label: of the horizontal axis.
        log: a logarithmic vertical axis; None: when all values are positive and span more
            than a factor of 200.
    """
    known = {name: points for name, points in lines.items() if finite(points)}
    if not known:
        return None
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in finite(points)]
    if log is None:
        log = min(ys) > 0 and max(ys) / min(ys) > 200
    x_scale = Scale(*_widened(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    low, high = _log_range(min(ys), max(ys)) if log else _padded(min(ys), max(ys))
    y_scale = Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    drawn = [
        _drawn(name, thinned(points), x_scale, y_scale, number)
        for number, (name, points) in enumerate(known.items())
    ]
    x_ticks = [Tick(x_scale(v), tick_label(v, xs_step)) for v, xs_step in _ticks(x_scale, 5)]
    y_ticks = [Tick(y_scale(v), tick_label(v, step)) for v, step in _ticks(y_scale, 5)]
    return Chart(title, x_label, drawn, x_ticks, y_ticks, log)


def _drawn(name: str, points: Points, x_scale: Scale, y_scale: Scale, number: int) -> Drawn:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x_scale(x), y_scale(y)))
        elif runs[-1]:
            runs.append([])
    path = " ".join("M" + " L".join(f"{x:g} {y:g}" for x, y in run) for run in runs if len(run) > 1)
    dots = [run[0] for run in runs if len(run) == 1]
    return Drawn(name, path, dots, finite(points)[-1][1], number)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: of each stretch the lowest and the highest, so no peak is lost.

    First and last are kept, and gaps (values that are not finite) stay gaps.
    """
    if len(points) <= most:
        return list(points)
    buckets = max(1, (most - 2) // 3)
    inner = points[1:-1]
    kept = [points[0]]
    for bucket in range(buckets):
        part = inner[len(inner) * bucket // buckets : len(inner) * (bucket + 1) // buckets]
        known = finite(part)
        chosen = {min(known, key=_value), max(known, key=_value)} if known else set()
        gap = [point for point in part if not math.isfinite(point[1])][:1]
        kept += sorted([*chosen, *gap], key=lambda point: point[0])
    return [*kept, points[-1]]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    room = abs(low) * 0.05 or 0.5
    return low - room, high + room


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _widened(low, high)
    room = 0.06 * (high - low)
    # A quantity that is never negative gets no negative axis.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _log_range(low: float, high: float) -> tuple[float, float]:
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)


def _ticks(scale: Scale, count: int) -> list[tuple[float, float]]:
    """(value, step) of round values within a scale."""
    if scale.log:
        low, high = round(math.log10(scale.low)), round(math.log10(scale.high))
        every = max(1, math.ceil((high - low) / count))
        return [(10.0**e, 0.0) for e in range(low, high + 1, every)]
    step = nice_step((scale.high - scale.low) / count)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [(n * step, step) for n in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10):
        if factor * power >= rough * (1 - 1e-9):
            break
    return factor * power


def tick_label(value: float, step: float) -> str:
    """A tick's value with the places its step needs; letters for thousands and millions."""
    if step == 0.0:
        return f"{value:g}"
    if abs(value) < step / 1000:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit and step >= unit / 10:
            return f"{value / unit:g}{letter}"
    if abs(value) >= 1e6 or step < 1e-4:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-")
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{places}f}"


# ---- other drawings ----------------------------------------------------------------------


@dataclass
class Row:
    """One side of a strip: its seeds as dots, its mean, its interval.

    Attributes:
        name: to be shown.
        role: for the colour: teacher, alone, distilled or other.
        y: place of the row.
        mean: place of the mean.
        dots: places of the seeds.
        low: place of the interval's lower end, None without one.
        high: of its upper end.
    """

    name: str
    role: str
    y: float
    mean: float
    dots: list[float]
    low: float | None = None
    high: float | None = None


@dataclass
class Strip:
    """Sides below each other on one axis."""

    title: str
    rows: list[Row]
    ticks: list[Tick]
    height: float
    label: str = ""


def strip(
    title: str, sides: Sequence[tuple[str, str, Sequence[float], Interval]], label: str = ""
) -> Strip | None:
    """A strip of dots for each side.

    Args:
        title: what is shown.
        sides: (name, role, values over seeds, their interval).
        label: of the axis.
    """
    known = [side for side in sides if side[2]]
    values = [v for _, _, seeds, found in known for v in (*seeds, *_ends(found))]
    if not values:
        return None
    scale = Scale(*_padded(min(values), max(values)), 14, WIDTH - 14)
    rows = []
    for number, (name, role, seeds, found) in enumerate(known):
        row = Row(name, role, 28 + 46 * number, scale(found.mean), [scale(v) for v in seeds])
        if _ends(found):
            row.low, row.high = map(scale, _ends(found))
        rows.append(row)
    ticks = [Tick(scale(v), tick_label(v, step)) for v, step in _ticks(scale, 5)]
    return Strip(title, rows, ticks, 28 + 46 * len(rows), label)


def _ends(found: Interval) -> list[float]:
    if not found.known or found.low is None or found.high is None:
        return []
    return [found.low, found.high]


@dataclass
class Bar:
    """One bin of a reliability diagram, in places of a unit square drawn as 100 x 100."""

    x: float
    width: float
    accuracy: float
    confidence: float
    count: int
    share: float


def reliability(bins: Sequence[Mapping[str, float]]) -> list[Bar]:
    """Bars of a reliability diagram; bins that say nonsense are left out."""
    total = sum(b.get("count", 0) for b in bins)
    bars = []
    for found in bins:
        values = [found.get(k) for k in ("low", "high", "accuracy", "confidence", "count")]
        if any(v is None or not math.isfinite(v) for v in values) or total <= 0:
            continue
        low, high, accuracy, confidence, count = (float(v) for v in values if v is not None)
        if not (0 <= low < high <= 1 and 0 <= accuracy <= 1 and 0 <= confidence <= 1):
            continue
        bars.append(
            Bar(
                round(100 * low, 2),
                round(100 * (high - low), 2),
                round(100 * accuracy, 2),
                round(100 * confidence, 2),
                int(count),
                count / total,
            )
        )
    return bars


@dataclass
class Cell:
    """One cell of a confusion matrix: its place, count, and share of its row."""

    row: int
    column: int
    count: int
    share: float


@dataclass
class Matrix:
    """A confusion matrix to draw.

    Attributes:
        labels: of the classes.
        cells: those with a count; all others are empty.
        counts: small enough for the numbers to be written in.
        confused: the pairs most often confused: (true, answered, count, share of the true).
        rows: number of samples.
    """

    labels: list[str]
    cells: list[Cell]
    counts: bool
    confused: list[tuple[str, str, int, float]] = field(default_factory=list)
    rows: int = 0


def confusion(labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Matrix | None:
    """A confusion matrix to draw; None when it is empty or not square.

    Args:
        labels: of the classes; numbered where they do not fit the matrix.
        matrix: rows are true classes, columns what was answered.
    """
    size = len(matrix)
    if size < 2 or any(len(row) != size for row in matrix):
        return None
    if len(labels) != size:
        labels = [str(i) for i in range(size)]
    cells, pairs = [], []
    for r, row in enumerate(matrix):
        total = sum(row)
        for c, count in enumerate(row):
            if count > 0:
                share = count / total
                cells.append(Cell(r, c, int(count), share))
                if r != c:
                    pairs.append((labels[r], labels[c], int(count), share))
    if not cells:
        return None
    pairs.sort(key=lambda pair: (-pair[2], -pair[3]))
    rows = int(sum(cell.count for cell in cells))
    return Matrix(list(labels), cells, size <= 12, pairs[:8], rows)
