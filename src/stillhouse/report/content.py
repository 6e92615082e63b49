"""What a report is made of: plain figures and words, for the page and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from stillhouse.report.charts import Bar, Chart, Matrix, Strip

_CAPITALS = "ece nll f1 psnr ssim auc kl iou em y rgb ior hlr lrs ars"
_SPELT = {"brier": "Brier", "miou": "mIoU", "map": "mAP", "top1": "top-1", "top5": "top-5"}
_SPELT |= {word: word.upper() for word in _CAPITALS.split()}


@dataclass
class Column:
    """One side of the final table."""

    key: str
    name: str
    role: str


@dataclass
class Grid:
    """A table: headings, and rows whose first cell names them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Tile:
    """A figure worth being seen first."""

    value: str
    label: str
    detail: str = ""


@dataclass
class Group:
    """Charts that belong together."""

    title: str
    charts: list[Chart]
    detail: str = ""


@dataclass
class Time:
    """A stage's time, as shares of the longest stage for its bar."""

    name: str
    kind: str
    seconds: float
    width: float
    teacher: float
    detail: str


@dataclass
class Calibrated:
    """A reliability diagram with its figures."""

    name: str
    bars: list[Bar]
    figures: list[tuple[str, str]]


@dataclass
class Picture:
    """A PNG picture as data: base64.

    Attributes:
        title: above it.
        data: base64.
        caption: below it.
        width: at which it is shown, in pixels.
        small: it is enlarged, and its pixels are to stay visible.
    """

    title: str
    data: str
    caption: str = ""
    width: int = 0
    small: bool = False


@dataclass
class Report:
    """All that a report says; an empty section is not shown."""

    title: str
    method: str
    status: str
    finished: bool
    about: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    strip: Strip | None = None
    columns: list[Column] = field(default_factory=list)
    results: list[tuple[str, list[str]]] = field(default_factory=list)
    results_note: str = ""
    findings: list[str] = field(default_factory=list)
    curves: list[Group] = field(default_factory=list)
    curves_left: int = 0
    agreement: list[Grid] = field(default_factory=list)
    calibration: list[Calibrated] = field(default_factory=list)
    confusion: Matrix | None = None
    pictures: list[Picture] = field(default_factory=list)
    sizes: Grid | None = None
    times: list[Time] = field(default_factory=list)
    time_notes: list[str] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""


def words(name: str) -> str:
    """A figure's name for people: macro_f1 becomes macro F1."""
    return " ".join(_SPELT.get(part, part) for part in name.split("_"))
