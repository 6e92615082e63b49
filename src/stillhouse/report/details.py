"""How a student answers: agreement, calibration, confusion; pictures, tables and texts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.report.charts import Matrix, reliability
from stillhouse.report.charts import confusion as confusion_chart
from stillhouse.report.content import Calibrated, Grid, Picture, words
from stillhouse.report.figures import number
from stillhouse.report.reading import RunRecord, number_of, rows_of

MOST_IMAGE_BYTES = 8_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


def agreement(run: RunRecord) -> list[Grid]:
    """Tables of agreement with the teacher, one or one for each named model."""
    found = run.part("details", "agreement")
    nested = {k: v for k, v in found.items() if isinstance(v, dict)}
    plain = {k: v for k, v in found.items() if number_of(v) is not None}
    grids = []
    if plain:
        nested = {"": plain, **nested}
    for name, figures in nested.items():
        rows = [[_fidelity(str(k)), number(number_of(v))] for k, v in figures.items()]
        if rows:
            grids.append(Grid(str(name), ["", "value"], rows))
    return grids


_FIDELITY = {
    "agreement": "same class as the teacher, share of inputs",
    "teacher_kl": "mean KL(teacher ‖ student), nats",
}


def _fidelity(name: str) -> str:
    return _FIDELITY.get(name, words(name))


def calibration(run: RunRecord) -> list[Calibrated]:
    """Reliability diagrams, one or one for each named model."""
    found = run.part("details", "calibration")
    given = {"student": found} if "bins" in found else found
    shown = []
    for name, told in given.items():
        if not isinstance(told, dict):
            continue
        bins = [
            {k: v for k, v in ((str(k), number_of(v)) for k, v in b.items()) if v is not None}
            for b in rows_of(told.get("bins"))
        ]
        bars = reliability(bins)
        figures = [
            (words(k), number(number_of(told[k]))) for k in ("ece", "nll", "brier") if k in told
        ]
        if bars:
            shown.append(Calibrated(str(name), bars, figures))
    return shown


def confusion(run: RunRecord) -> Matrix | None:
    """The confusion matrix, or None when there is none that makes sense."""
    found = run.part("details", "confusion")
    matrix, labels = found.get("matrix"), found.get("labels")
    if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
        return None
    rows = [[number_of(value) for value in row] for row in matrix]
    if any(value is None or value < 0 for row in rows for value in row):
        return None
    known = [[float(value or 0.0) for value in row] for row in rows]
    return confusion_chart([str(x) for x in labels] if isinstance(labels, list) else [], known)


def pictures(run: RunRecord) -> list[Picture]:
    """The pictures of the run; one that cannot be shown is named in `run.troubles`."""
    found = []
    for told in run.items("details", "images"):
        data = _png(run.folder, told)
        title = str(told.get("title", ""))
        if data is None:
            run.troubles.append(f"the picture '{title}' is no PNG inside the run folder")
        else:
            width, small = _shown_width(data)
            found.append(Picture(title, data, str(told.get("caption", "")), width, small))
    return found


def _png(folder: Path, told: Mapping[str, Any]) -> str | None:
    """A PNG as base64: given as such, or a file of the run folder and nowhere else."""
    try:
        if isinstance(told.get("png_base64"), str):
            data = base64.b64decode(told["png_base64"], validate=True)
        else:
            place = (folder / str(told.get("path", ""))).resolve()
            if not place.is_relative_to(folder.resolve()) or not place.is_file():
                return None
            if place.stat().st_size > MOST_IMAGE_BYTES:
                return None
            data = place.read_bytes()
    except (binascii.Error, ValueError, OSError):
        return None
    if not data.startswith(_PNG) or len(data) > MOST_IMAGE_BYTES:
        return None
    return base64.b64encode(data).decode()


def _shown_width(data: str) -> tuple[int, bool]:
    """The width to show a PNG at, and whether it is enlarged (a whole number of times)."""
    own = int.from_bytes(base64.b64decode(data[:32])[16:20], "big")
    times = max(1, min(8, 320 // max(1, own)))
    return own * times, times > 1


def tables(run: RunRecord) -> list[Grid]:
    """Tables that the method or task adds."""
    grids = []
    for told in run.items("details", "tables"):
        columns, rows = told.get("columns"), told.get("rows")
        if isinstance(rows, list) and rows:
            head = [str(c) for c in columns] if isinstance(columns, list) else []
            cells = [[_cell(v) for v in r] for r in map(_as_row, rows)]
            grids.append(
                Grid(str(told.get("title", "")), head, cells, str(told.get("caption", "")))
            )
    return grids


def _as_row(row: Any) -> Sequence[Any]:
    if isinstance(row, dict):
        return list(row.values())
    return row if isinstance(row, list) else [row]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def texts(run: RunRecord) -> list[tuple[str, str]]:
    """(title, text) that the method or task adds."""
    found = run.part("details").get("texts")
    kept = []
    for told in found if isinstance(found, list) else []:
        if isinstance(told, dict):
            body = str(told.get("text", told.get("body", "")))
            kept.append((str(told.get("title", "")), body))
        elif isinstance(told, str):
            kept.append(("", told))
    return [text for text in kept if any(text)]
