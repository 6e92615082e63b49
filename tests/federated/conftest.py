"""A federated method as an installed package would bring it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

METHOD = Path(__file__).resolve().parent / "method" / "fedavg_small.py"


@pytest.fixture(scope="session")
def install_method() -> Callable[[Path], Path]:
    """`install_method(folder)` makes the folder a place on Python's path that has the method."""

    def install(folder: Path) -> Path:
        named = folder / "fedavg_small-1.0.dist-info"
        named.mkdir(parents=True)
        shutil.copy(METHOD, folder)
        told = "Metadata-Version: 2.1\nName: fedavg-small\nVersion: 1.0\n"
        (named / "METADATA").write_text(told, encoding="utf-8")
        points = "[stillhouse.methods]\nfedavg-small = fedavg_small\n"
        (named / "entry_points.txt").write_text(points, encoding="utf-8")
        return folder

    return install
