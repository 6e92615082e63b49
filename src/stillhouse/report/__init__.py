"""One run's report: a self-contained HTML page, and the same on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.report.html import write
    from stillhouse.report.terminal import show

__all__ = ["show", "write"]


def __getattr__(name: str) -> Any:
    if name == "write":
        from stillhouse.report.html import write

        return write
    if name == "show":
        from stillhouse.report.terminal import show

        return show
    raise AttributeError(f"module 'stillhouse.report' has no attribute '{name}'")
