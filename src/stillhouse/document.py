"""YAML read safely, with the line of every value, so that errors can point at it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from stillhouse.errors import RecipeError

Location = tuple[str | int, ...]

MOST_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2: `1e-3` is a number, `no` is a word."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_HEX = re.compile(r"^0(?:x[0-9a-fA-F_]+|o[0-7_]+|b[01_]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)
_DIGITS = list("-+0123456789")
for _tag, _pattern, _first in (
    ("bool", _BOOL, list("tTfF")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INT, _DIGITS),
    ("int", _HEX, ["0"]),
    ("float", _FLOAT, [*_DIGITS, "."]),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def _whole_number(loader: _Loader, node: ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if _HEX.match(text) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


@dataclass
class Origin:
    """Where each value of a document was written.

    Two origins are always equal: where a value stood is no part of what it says.

    Attributes:
        name: the file, or what the document is called when it has none.
        places: location of a value to its place, such as "kd.yaml:12" or an override.
    """

    name: str = field(default="recipe", compare=False)
    places: dict[Location, str] = field(default_factory=dict, compare=False, repr=False)

    def at(self, location: Location) -> str:
        """The place of a value, or of the nearest enclosing one that is known."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.places:
                return self.places[location[:end]]
        return self.name

    def order(self, location: Location) -> tuple[int, str]:
        """A key that sorts locations as they stand in the document."""
        place = self.at(location)
        line = place.rpartition(":")[2]
        return (int(line) if line.isdigit() else 0, place)

    def inside(self, location: Location) -> Origin:
        """The origin of a part of the document."""
        size = len(location)
        places = {k[size:]: v for k, v in self.places.items() if k[:size] == location}
        return Origin(self.name, places)

    def moved(self, old: Location, new: Location) -> None:
        """Let values that stood under `old` be found under `new` too."""
        found = {k: v for k, v in self.places.items() if k[: len(old)] == old}
        for location, place in found.items():
            self.places.setdefault(new + location[len(old) :], place)


def dotted(location: Sequence[str | int]) -> str:
    """A location as it is written in an override: `teacher.taps.low`."""
    return ".".join(str(part) for part in location)


def parse(text: str, name: str) -> tuple[Any, Origin]:
    """The document in `text` and the line of each of its values.

    Args:
        text: YAML; anchors, aliases and merges are allowed.
        name: of the file, for messages.

    Raises:
        RecipeError: not YAML, a duplicate key, a key that is no text, a number that is not
            finite, or a tag that the safe loader does not know; with the line.
    """
    origin = Origin(name, {(): name})
    unreadable = _Loader.NON_PRINTABLE.search(text)
    if unreadable is not None:
        line = text.count("\n", 0, unreadable.start()) + 1
        raise RecipeError(
            f"{name}:{line}: the character {unreadable.group()!r} is not allowed in YAML"
        )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, origin
        return _Reader(loader, origin).value(node, ()), origin
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_marked(error, name)) from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply") from None
    finally:
        loader.dispose()


def parse_value(text: str, name: str) -> Any:
    """The value that `text` stands for in YAML: number, flag, null, list, mapping or text.

    Raises:
        RecipeError: not YAML, or not finite; `name` is named.
    """
    try:
        return parse(text, name)[0]
    except RecipeError as error:
        # A value of one line needs no line number.
        raise RecipeError(str(error).replace(f"{name}:1: ", f"{name}: ", 1)) from None


def _marked(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}" if mark is not None else name
    problem = (error.problem or error.context or "not valid YAML").replace("\n", " ")
    context = f" ({error.context})" if error.context and error.problem else ""
    hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
    return f"{place}: not valid YAML: {problem}{context}{hint}"


class _Reader:
    """Turns composed nodes into values and notes their lines."""

    def __init__(self, loader: _Loader, origin: Origin) -> None:
        self.loader = loader
        self.origin = origin
        self.count = 0
        self.open: list[Node] = []

    def place(self, node: Node) -> str:
        return f"{self.origin.name}:{node.start_mark.line + 1}"

    def value(self, node: Node, location: Location) -> Any:
        self.count += 1
        if self.count > MOST_NODES:
            raise RecipeError(f"{self.place(node)}: the document unfolds to too many values")
        if node in self.open:
            raise RecipeError(f"{self.place(node)}: an anchor refers to itself")
        self.origin.places.setdefault(location, self.place(node))
        self.open.append(node)
        try:
            if isinstance(node, MappingNode) and node.tag.endswith(":map"):
                return self.mapping(node, location)
            if isinstance(node, SequenceNode) and node.tag.endswith(":seq"):
                return [self.value(n, (*location, i)) for i, n in enumerate(node.value)]
            return self.scalar(node)
        finally:
            self.open.pop()

    def mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        own = [(key, value) for key, value in node.value if not key.tag.endswith(":merge")]
        self.refuse_duplicates(own)
        self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        # Merged keys come first, so that the mapping's own values win.
        for key_node, value_node in node.value:
            key = self.key(key_node)
            self.origin.places[(*location, key)] = self.place(key_node)
            result[key] = self.value(value_node, (*location, key))
        return result

    def refuse_duplicates(self, pairs: list[tuple[Node, Node]]) -> None:
        seen: dict[str, Node] = {}
        for key_node, _ in pairs:
            key = self.key(key_node)
            if key in seen:
                raise RecipeError(
                    f"{self.place(key_node)}: '{key}' is written twice "
                    f"(first in line {seen[key].start_mark.line + 1}); keep one"
                )
            seen[key] = key_node

    def key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise RecipeError(f"{self.place(node)}: a name is expected before the colon")
        return str(node.value)

    def scalar(self, node: Node) -> Any:
        found = self.loader.construct_object(node, deep=True)
        if isinstance(found, float) and not math.isfinite(found):
            raise RecipeError(f"{self.place(node)}: numbers must be finite, found {node.value!r}")
        return found


def not_finite(value: Any, location: Location = ()) -> Iterator[Location]:
    """The locations of all numbers in a nested value that are NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield location
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from not_finite(inner, (*location, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from not_finite(inner, (*location, index))
