"""How figures are written for people: few digits, equal places, true units."""

from __future__ import annotations

import math

from stillhouse.metrics.statistics import Interval

NONE = "–"


def number(value: float | None) -> str:
    """A figure with four significant digits; a dash when there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def with_interval(found: Interval) -> str:
    """`mean ± half of the 95% interval`; the mean alone without an interval.

    Both are rounded alike, to the second significant digit of the half.
    """
    half = found.half
    if not found.count or not math.isfinite(found.mean):
        return NONE
    if half is None or not math.isfinite(half):
        return number(found.mean)
    if half == 0:
        return f"{number(found.mean)} ± 0"
    places = max(0, min(8, 1 - math.floor(math.log10(half))))
    return f"{found.mean:,.{places}f} ± {half:,.{places}f}"


def count(value: float | None) -> str:
    """A large count with a letter: 1.23 k, 45.6 M, 7.89 G."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 2.6 kB, 14.3 MB."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.0f} B" if abs(value) < 1000 else f"{count(value)}B"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.42 s, 38 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share(value: float | None) -> str:
    """A share of one as whole per cent, "under 1 %" where that is so."""
    if value is None or not math.isfinite(value):
        return NONE
    if 0 < value < 0.01:
        return "under 1 %"
    return f"{100 * value:.0f} %"
