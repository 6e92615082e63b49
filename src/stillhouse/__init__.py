"""Distillation in one library: models, data sets, labels.

Names are imported when they are first used, so that `import stillhouse` stays light:

    import stillhouse as still
    result = still.distill(teacher, student, train_loader, val_loader, method="dhkd")
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stillhouse._version import __version__

if TYPE_CHECKING:
    from stillhouse.api import distill, load, objective, run, teacher
    from stillhouse.errors import StillhouseError
    from stillhouse.recipe import Recipe, load_recipe

_HOMES = {
    "distill": "stillhouse.api",
    "load": "stillhouse.api",
    "run": "stillhouse.api",
    "Recipe": "stillhouse.recipe",
    "load_recipe": "stillhouse.recipe",
    "StillhouseError": "stillhouse.errors",
}
# Functions of the public interface that are called like the module which holds their contract.
_ALSO_CALLED = ("objective", "teacher")

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


class _Callable(ModuleType):
    """A module that is also the function of its name: `still.teacher(module)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from stillhouse import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package. Importing a submodule binds its name here, whoever imports it first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ALSO_CALLED and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    import importlib

    if name in _ALSO_CALLED:
        return importlib.import_module(f"stillhouse.{name}")
    home = _HOMES.get(name)
    if home is None:
        from stillhouse.errors import nearest

        hint = nearest(name, __all__)
        raise AttributeError(f"module 'stillhouse' has no attribute '{name}'{hint}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
