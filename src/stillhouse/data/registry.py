"""Data sets by name: listing without importing, options checked, splits opened.

A name is that of a class in this folder, of an entry point of the group `stillhouse.data`
(another package's `DataSet` subclass), or `package.module:function` for a user's own function
that returns `Splits`. Neither torch nor pydantic is imported before something is opened.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.data.data_set import DataCard, DataSet
from stillhouse.errors import DataError, OptionError, RecipeError, nearest

if TYPE_CHECKING:
    from stillhouse.batch import Splits

GROUP = "stillhouse.data"
_FOLDER = Path(__file__).resolve().parent
_FACTS = frozenset(f.name for f in fields(DataCard)) - {"module", "cls"}


def list_data() -> list[DataCard]:
    """Every data set that can be named, sorted: the house's own and those of other packages."""
    return sorted([*_own_cards(), *_entry_point_cards()], key=lambda card: card.name)


def find_card(name: str) -> DataCard:
    """The facts of a data set.

    Raises:
        RecipeError: unknown; the nearest names are told.
    """
    cards = {card.name: card for card in list_data()}
    if name not in cards:
        raise RecipeError(
            f"unknown data set '{name}'{nearest(name, cards)} "
            "(your own: package.module:function that returns Splits)"
        )
    return cards[name]


def load_data(name: str) -> DataSet[Any]:
    """Import a data set's class and make it.

    Raises:
        RecipeError: unknown name.
        DataError: another package's entry point that cannot be used.
    """
    card = find_card(name)
    if card.cls:
        made = getattr(importlib.import_module(card.module), card.cls)()
    else:
        made = _from_entry_point(card)
    if not isinstance(made, DataSet):
        raise DataError(f"the data set '{name}' ({card.module}) is not a DataSet")
    return made


def resolve_options(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a data set with every default filled in, as a recipe records them.

    Raises:
        RecipeError: unknown data set.
        OptionError: unknown option, or a value that does not fit.
    """
    from stillhouse.data.options import checked_options

    if ":" in name:
        return _bound(name, _function(name), options or {})
    checked = checked_options(name, load_data(name).Options, options or {})
    resolved: dict[str, Any] = checked.model_dump(mode="json")
    return resolved


def open_data(name: str, *, seed: int = 0, options: Mapping[str, Any] | None = None) -> Splits:
    """Open a data set.

    Args:
        name: of a data set, or `package.module:function`. The function is called with the
            options, and with `seed` where it takes one, and returns `Splits`.
        seed: the run's seed: which rows are carved off for validation, which keep labels.
        options: see `resolve_options`.

    Returns:
        Splits with `edition`, and in `about` at least "name", "hash" and what the tasks of
        the data need. "val" has been carved from "train" unless the data brings its own or
        the option `val` is 0.

    Raises:
        RecipeError: unknown data set.
        OptionError: unknown option, or a value that does not fit.
        DataError: missing, damaged or unusable data.
    """
    from stillhouse.data.check import check_splits
    from stillhouse.data.options import ClassOptions, checked_options
    from stillhouse.data.splitting import keep_listed, narrowed, with_val

    if ":" in name:
        return _open_function(name, seed, options or {})
    data = load_data(name)
    checked = checked_options(name, data.Options, options or {})
    splits = data.open(checked, seed)
    _name_parts(splits, name)
    if getattr(checked, "label_list", None) is not None:
        splits = keep_listed(splits, checked.label_list, checked.val, seed=seed, name=name)
    else:
        splits = with_val(splits, checked.val, seed=seed, name=name)
        splits = _with_fewer_labels(splits, checked, seed, name)
    if isinstance(checked, ClassOptions) and (checked.few_shot or checked.drop_classes):
        splits = narrowed(
            splits,
            few_shot=checked.few_shot,
            drop_classes=checked.drop_classes,
            seed=seed,
            name=name,
        )
    check_splits(splits)
    return splits


def _with_fewer_labels(splits: Splits, options: Any, seed: int, name: str) -> Splits:
    """The splits with the labels that the options leave; all, where they say nothing."""
    from stillhouse.data.splitting import keep_per_class, withhold_labels

    rules = ("label_fraction", "labels_per_class")
    fraction, each = (getattr(options, rule, None) for rule in rules)
    if fraction is not None:
        return withhold_labels(splits, fraction, seed=seed, name=name)
    if each is not None:
        return keep_per_class(splits, each, seed=seed, name=name)
    return splits


def _name_parts(splits: Splits, name: str) -> None:
    """What every report shows of the data, where the data set did not say it."""
    splits.edition = splits.edition or name
    splits.about.setdefault("name", name)
    if "hash" not in splits.about:
        splits.about["hash"] = splits.fingerprint()


# The house's own, by ast -------------------------------------------------------------------


@cache
def _own_cards() -> tuple[DataCard, ...]:
    found = []
    for path in sorted(_FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "(DataSet" not in text:
            continue
        for node in ast.parse(text, filename=str(path)).body:
            if isinstance(node, ast.ClassDef) and _derives(node):
                facts = _facts(node)
                if facts.get("name"):
                    module = f"{__package__}.{path.stem}"
                    found.append(DataCard(module=module, cls=node.name, **facts))
    return tuple(found)


def _derives(node: ast.ClassDef) -> bool:
    for base in node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(named, ast.Name) and named.id == "DataSet":
            return True
    return False


def _facts(node: ast.ClassDef) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            name, value = item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
            name, value = item.target.id, item.value
        else:
            continue
        if name in _FACTS:
            try:
                facts[name] = ast.literal_eval(value)
            except ValueError:
                raise DataError(
                    f"{node.name}.{name} (line {item.lineno}) is not a literal; the facts of a "
                    "data set are read without importing its file"
                ) from None
    return facts


# Other packages' ---------------------------------------------------------------------------


def _entry_point_cards() -> list[DataCard]:
    return [
        DataCard(
            name=point.name,
            module=point.value,
            source=f"package {point.dist.name}" if point.dist is not None else "",
        )
        for point in importlib.metadata.entry_points(group=GROUP)
    ]


def _from_entry_point(card: DataCard) -> Any:
    points = [p for p in importlib.metadata.entry_points(group=GROUP) if p.name == card.name]
    try:
        loaded = points[0].load()
    except Exception as error:
        raise DataError(
            f"the data set '{card.name}' of {card.source or card.module} cannot be loaded: {error}"
        ) from error
    return loaded() if isinstance(loaded, type) else loaded


# A user's own function ---------------------------------------------------------------------


def _function(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    # A module beside the recipe is meant as often as an installed one. Last on the path, so
    # that it hides nothing.
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"data '{name}': cannot import the module '{module_name}': {error}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value)]
        raise RecipeError(
            f"data '{name}': '{module_name}' has no function '{attribute}'"
            f"{nearest(attribute, public)}"
        )
    return function  # type: ignore[no-any-return]


def _bound(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for `function`, defaults included; `val` is the registry's unless its own."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [
        key
        for key, p in parameters.items()
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} and key != "seed"
    ]
    if "seed" in options:
        raise OptionError({"seed": f"data '{name}': the seed is the recipe's; set 'seed' there"})
    unknown = [key for key in options if key not in {*named, "val"}]
    if unknown and not takes_any:
        hint = nearest(unknown[0], [*named, "val"])
        raise OptionError({unknown[0]: f"data '{name}' has no option '{unknown[0]}'{hint}"})
    filled = {
        key: parameters[key].default
        for key in named
        if parameters[key].default is not inspect.Parameter.empty
    }
    filled.update(options)
    lacking = [key for key in named if key not in filled]
    if lacking:
        raise OptionError({lacking[0]: f"data '{name}' needs the option '{lacking[0]}'"})
    return filled


def _open_function(name: str, seed: int, options: Mapping[str, Any]) -> Splits:
    from stillhouse.batch import Splits
    from stillhouse.data.check import check_splits
    from stillhouse.data.options import DataOptions, checked_options
    from stillhouse.data.splitting import with_val

    function = _function(name)
    parameters = inspect.signature(function).parameters
    arguments = _bound(name, function, options)
    own_val = "val" in parameters
    val = {} if own_val or "val" not in arguments else {"val": arguments.pop("val")}
    if "seed" in parameters:
        arguments["seed"] = seed
    splits = function(**arguments)
    if not isinstance(splits, Splits):
        raise DataError(f"data '{name}' returned {type(splits).__name__}; Splits is needed")
    _name_parts(splits, name)
    if not own_val:
        wanted = checked_options(name, DataOptions, val).val
        splits = with_val(splits, wanted, seed=seed, name=name)
    check_splits(splits)
    return splits
