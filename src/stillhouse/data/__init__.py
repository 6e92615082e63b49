"""Real data sets: where they come from, how they are checked, how they are read.

One file per data set, with a subclass of `DataSet` whose facts are literals (found without
importing the file). Nothing else has to be touched to add one.
"""

from __future__ import annotations

from stillhouse.data.data_set import DataCard, DataSet
from stillhouse.data.registry import find_card, list_data, load_data, open_data, resolve_options

__all__ = [
    "DataCard",
    "DataSet",
    "find_card",
    "list_data",
    "load_data",
    "open_data",
    "resolve_options",
]
