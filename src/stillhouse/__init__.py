"""Distillation in one library: models, data sets, labels.

Names are imported when they are first used, so that `import stillhouse` stays light:

    import stillhouse as still
    result = still.distill(teacher, student, train_loader, val_loader, method="dhkd")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillhouse._version import __version__

if TYPE_CHECKING:
    from stillhouse.api import distill, load, objective, run, teacher
    from stillhouse.errors import StillhouseError
    from stillhouse.recipe import Recipe, load_recipe

_HOMES = {
    "distill": "stillhouse.api",
    "load": "stillhouse.api",
    "objective": "stillhouse.api",
    "run": "stillhouse.api",
    "teacher": "stillhouse.api",
    "Recipe": "stillhouse.recipe",
    "load_recipe": "stillhouse.recipe",
    "StillhouseError": "stillhouse.errors",
}

__all__ = [
    "Recipe",
    "StillhouseError",
    "__version__",
    "distill",
    "load",
    "load_recipe",
    "objective",
    "run",
    "teacher",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        from stillhouse.errors import nearest

        raise AttributeError(
            f"module 'stillhouse' has no attribute '{name}'{nearest(name, _HOMES)}"
        )
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
