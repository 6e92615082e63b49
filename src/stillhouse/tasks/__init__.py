"""What a batch is, how a model is called on it, how it is judged: one file per task.

A task is found by its file's name; there is no list to keep.
"""

from __future__ import annotations

import importlib
import pkgutil

from stillhouse.batch import Splits
from stillhouse.errors import RecipeError, nearest
from stillhouse.task import Task


def task_names() -> list[str]:
    """Names of all tasks, with hyphens."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def open_task(name: str, splits: Splits) -> Task:
    """The task of that name over the given data.

    Raises:
        RecipeError: no such task; the nearest are named.
    """
    if name.replace("_", "-") not in task_names():
        raise RecipeError(f"unknown task '{name}'{nearest(name, task_names())}")
    module = importlib.import_module(f"stillhouse.tasks.{name.replace('-', '_')}")
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    for value in own:
        if isinstance(value, type) and issubclass(value, Task):
            return value(splits)
    raise RecipeError(f"the module of the task '{name}' defines no Task")
