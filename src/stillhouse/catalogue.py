"""What methods and baselines there are, found by reading their files, not by importing them.

Each file in `methods/` and `baselines/` holds a class with a literal `card = Card(...)`; other
packages name such modules under the entry-point group `stillhouse.methods`. Neither torch nor
pydantic is imported here: listing must be quick, and must work where torch does not.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import MissingExtra, RecipeError, nearest

if TYPE_CHECKING:
    from stillhouse.method import Method

PACKAGE = Path(__file__).resolve().parent
GROUP = "stillhouse.methods"
DATA_GROUP = "stillhouse.data"
ROOMS = ("methods", "baselines")
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One method or baseline, as its file says.

    Attributes:
        id: as recipes name it.
        module: to import.
        name: of the class in it.
        path: of the file.
        card: the arguments of its `Card`.
        about: the class's docstring.
        config: settings: name, type, default, range, help and source of each.
        variants: named settings: set, budget, about.
        claims: what a bench is to support or refute.
    """

    id: str
    module: str
    name: str
    path: str
    card: Mapping[str, Any]
    about: str = ""
    config: tuple[Mapping[str, Any], ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: tuple[Mapping[str, Any], ...] = ()

    @property
    def file(self) -> Path:
        """Its file."""
        return Path(self.path)

    @property
    def kind(self) -> str:
        """Which of the two it is: method or baseline."""
        return str(self.card.get("kind", "method"))

    @property
    def trains_student(self) -> bool:
        """It trains a student with what a teacher knows, so that a student alone compares."""
        stages = [tuple(stage) for stage in self.card.get("stages", ())]
        wanted = self.card.get("yields", "model") == "model" and bool(self.card.get("needs"))
        return wanted and ("student", "train") in stages


@dataclass(frozen=True)
class Found:
    """What a scan found: entries by id, and files that could not be read."""

    entries: Mapping[str, Entry]
    problems: tuple[str, ...] = ()


def entries() -> Mapping[str, Entry]:
    """All methods and baselines by id."""
    return scan().entries


def problems() -> tuple[str, ...]:
    """Files that look like an entry and cannot be shown as one, with the reason."""
    return scan().problems


def find(name: str) -> Entry:
    """The entry with an id.

    Raises:
        RecipeError: there is none; the nearest are named.
    """
    known = entries()
    if name not in known:
        raise RecipeError(f"unknown method '{name}'{nearest(name, known)}")
    return known[name]


def load(name: str) -> type[Method]:
    """Import the class of an entry.

    Raises:
        RecipeError: no such entry, or its file cannot be imported.
        MissingExtra: a package that it needs is not installed.
    """
    entry = find(name)
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = extra_of(missing)
        if extra is None:
            raise RecipeError(f"'{name}' ({entry.path}) cannot be imported: {error}") from error
        raise MissingExtra(missing, extra, f"'{name}' needs it") from error
    found: type[Method] = getattr(module, entry.name)
    return found


def shared_settings(name: str, other: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of one entry that another entry takes over when the two are compared.

    Args:
        name: of the entry the settings belong to.
        other: of the entry it is compared with.
        settings: as its recipe gives them.
    """
    both = load(name).Config.shared & load(other).Config.shared
    return {key: value for key, value in settings.items() if key in both}


def extra_of(package: str) -> str | None:
    """The extra of this package that brings an importable `package`, if any does."""
    for extra, names in extras().items():
        if package in names:
            return extra
    return None


@cache
def extras() -> Mapping[str, tuple[str, ...]]:
    """Extras and the importable packages they bring, from the installed metadata."""
    import importlib.metadata
    import re

    spelt = {"mlflow-skinny": "mlflow", "pillow": "PIL", "scikit-learn": "sklearn"}
    found: dict[str, list[str]] = {}
    with suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("stillhouse") or ():
            extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
            name = re.match(r"[\w.-]+", requirement)
            if extra and name and name[0] != "stillhouse" and extra[1] not in {"test", "all"}:
                found.setdefault(extra[1], []).append(
                    spelt.get(name[0].lower(), name[0].replace("-", "_"))
                )
    return {extra: tuple(names) for extra, names in found.items()}


# Scanning ----------------------------------------------------------------------------------


@cache
def scan() -> Found:
    """Read every file that may hold an entry; remembered in the cache until a file changes."""
    remembered = _Memory()
    found: dict[str, Entry] = {}
    wrong: list[str] = []
    for module, path in _modules(remembered.foreign()):
        try:
            made = remembered.read(module, path)
        except _UnreadableError as problem:
            wrong.append(f"{path}: {problem}")
            continue
        for entry in made:
            other = found.get(entry.id)
            if other is not None and other.path != entry.path:
                wrong.append(f"{path}: the id '{entry.id}' is taken by {other.path}")
                continue
            found[entry.id] = entry
    remembered.save()
    return Found(dict(sorted(found.items())), tuple(wrong))


class _UnreadableError(Exception):
    """A file that holds no well-formed entry; the message says why."""


def _modules(foreign: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(module, file) of the house's own rooms, then of other packages."""
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            if path.name != "__init__.py":
                parts = path.relative_to(PACKAGE).with_suffix("").parts
                yield ".".join(("stillhouse", *parts)), path
    for module in foreign:
        path_ = _file_of(module)
        if path_ is not None:
            yield module, path_


def _foreign() -> list[str]:
    """Modules named by other packages' entry points."""
    import importlib.metadata

    points = importlib.metadata.entry_points(group=GROUP)
    return sorted({point.value.partition(":")[0].strip() for point in points})


def _installed_stamp() -> list[Any]:
    """Changes whenever a package is installed or removed; reading all metadata takes long."""
    folders = [Path(folder) for folder in sys.path if folder]
    return [[str(f), f.stat().st_mtime_ns] for f in folders if f.is_dir()]


def _file_of(module: str) -> Path | None:
    """The file of a module, without importing it or the packages around it."""
    import importlib.util

    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.has_location else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


class _Memory:
    """What scans have found, by file, time of change and size; kept in the cache folder."""

    def __init__(self) -> None:
        root = os.environ.get("STILLHOUSE_CACHE") or "~/.cache/stillhouse"
        self.path = Path(root).expanduser() / "catalogue.json"
        self.stamp = [_FORMAT, *_stamp(Path(__file__)), *_stamp(PACKAGE / "method.py")]
        self.old: dict[str, Any] = {}
        self.new: dict[str, Any] = {}
        self.points: dict[str, Any] = {}
        self.looked = False
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["stamp"] == self.stamp:
                self.old, self.points = dict(stored["files"]), dict(stored["foreign"])

    def foreign(self) -> list[str]:
        """Modules of other packages, looked up anew when something was installed."""
        stamp = _installed_stamp()
        if self.points.get("stamp") != stamp:
            self.points = {"stamp": stamp, "modules": _foreign()}
            self.looked = True
        return list(self.points["modules"])

    def read(self, module: str, path: Path) -> list[Entry]:
        key, stamp = f"{module}={path}", _stamp(path)
        known = self.old.get(key)
        if known is not None and known["stamp"] == stamp:
            self.new[key] = known
            return [_restored(given) for given in known["entries"]]
        made = _entries_in(module, path)
        # Entries pass through JSON either way, so that both ways give the same.
        kept = json.loads(json.dumps([asdict(entry) for entry in made]))
        self.new[key] = {"stamp": stamp, "entries": kept}
        return [_restored(given) for given in kept]

    def save(self) -> None:
        """Write what is new; a cache that cannot be written only costs time."""
        if self.new == self.old and not self.looked:
            return
        kept = {"stamp": self.stamp, "foreign": self.points, "files": self.new}
        aside = self.path.with_name(f".catalogue-{os.getpid()}.json")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(kept), encoding="utf-8")
            aside.replace(self.path)


def _restored(given: Mapping[str, Any]) -> Entry:
    return Entry(**{**given, "config": tuple(given["config"]), "claims": tuple(given["claims"])})


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_size]


# Reading a file ----------------------------------------------------------------------------


def _entries_in(module: str, path: Path) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
        if "Card(" not in text:
            return []
        tree = _tree(path)
    except (OSError, UnicodeDecodeError) as error:
        raise _UnreadableError(f"cannot be read ({error})") from None
    except SyntaxError as error:
        raise _UnreadableError(f"is not valid Python (line {error.lineno}: {error.msg})") from None
    made = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            card = _assigned(node, "card")
            if isinstance(card, ast.Call) and _name(card.func) == "Card":
                made.append(_entry(module, path, tree, node, card))
    return made


def _entry(
    module: str, path: Path, tree: ast.Module, node: ast.ClassDef, written: ast.Call
) -> Entry:
    constants = _constants(tree)
    card = _arguments(written, constants)
    for name in ("id", "title", "summary"):
        if not isinstance(card.get(name), str) or not card[name]:
            raise _UnreadableError(f"line {written.lineno}: the card of {node.name} has no {name}")
    vague = [name for name, value in card.items() if isinstance(value, _Expression)]
    if vague:
        raise _UnreadableError(
            f"line {written.lineno}: the card of {node.name} is read without being run; "
            f"write {', '.join(vague)} as a literal"
        )
    source = _Source(path, tree)
    variants = _literal(source.attribute(node, "variants"), constants) or {}
    claims = _literal(source.attribute(node, "claims"), constants) or ()
    config = source.inner_class(node, "Config")
    return Entry(
        id=card["id"],
        module=module,
        name=node.name,
        path=str(path),
        card=card,
        about=ast.get_docstring(node) or "",
        config=tuple(config.fields() if config is not None else ()),
        variants=variants if isinstance(variants, dict) else {},
        claims=tuple(claims) if isinstance(claims, list | tuple) else (),
    )


class _Expression(str):
    """The text of an expression whose value is not known without running it."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def _order(name: str) -> tuple[str, ...]:
    """The order of arguments of a dataclass in `method.py`: Card, Claim, Variant."""
    for node in _tree(PACKAGE / "method.py").body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return tuple(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    return ()


def _assigned(node: ast.ClassDef | ast.Module, name: str) -> ast.expr | None:
    """What is assigned to a name in a class body."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and _name(item.target) == name:
            return item.value
        if isinstance(item, ast.Assign) and any(_name(t) == name for t in item.targets):
            return item.value
    return None


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for item in tree.body:
        if isinstance(item, ast.Assign) and len(item.targets) == 1:
            found[_name(item.targets[0])] = item.value
        elif isinstance(item, ast.AnnAssign) and item.value is not None:
            found[_name(item.target)] = item.value
    return found


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _arguments(call: ast.Call, constants: Mapping[str, ast.expr]) -> dict[str, Any]:
    """The arguments of a call by name."""
    values = dict(zip(_order(_name(call.func)), call.args))
    values.update({k.arg: k.value for k in call.keywords if k.arg is not None})
    return {name: _literal(value, constants) for name, value in values.items()}


def _literal(node: ast.expr | None, constants: Mapping[str, ast.expr]) -> Any:
    """The value of an expression of literals; else its text, as an `_Expression`."""
    if node is None:
        return None
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        keys = [_literal(key, constants) for key in node.keys]
        return {str(k): _literal(v, constants) for k, v in zip(keys, node.values)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, constants) for item in node.elts]
    if isinstance(node, ast.Call) and _name(node.func) in {"Claim", "Variant", "dict"}:
        return _arguments(node, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        rest = {k: v for k, v in constants.items() if k != node.id}
        return _literal(constants[node.id], rest)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _Expression(ast.unparse(node))


@dataclass(frozen=True)
class _Source:
    """A parsed file, in which classes and their bases are looked up."""

    path: Path
    tree: ast.Module

    def find(self, name: str) -> tuple[_Source, ast.ClassDef] | None:
        """A class by name: here, or in the file of this package it is imported from."""
        for item in self.tree.body:
            if isinstance(item, ast.ClassDef) and item.name == name:
                return self, item
            if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("stillhouse"):
                for alias in item.names:
                    if (alias.asname or alias.name) == name:
                        path = _file_of(str(item.module))
                        return None if path is None else _Source(path, _tree(path)).find(alias.name)
        return None

    def bases(self, node: ast.ClassDef) -> Iterator[tuple[_Source, ast.ClassDef]]:
        """The class's bases as far as they can be found, nearest first."""
        for base in node.bases:
            found = self.find(_name(base))
            if found is not None:
                yield found

    def attribute(self, node: ast.ClassDef, name: str) -> ast.expr | None:
        """What is assigned to a class attribute, here or in a base."""
        value = _assigned(node, name)
        if value is not None:
            return value
        for source, base in self.bases(node):
            value = source.attribute(base, name)
            if value is not None:
                return value
        return None

    def inner_class(self, node: ast.ClassDef, name: str) -> _Settings | None:
        """The class `name` inside a class, or the one that an attribute of that name names."""
        for item in node.body:
            if isinstance(item, ast.ClassDef) and item.name == name:
                return _Settings(self, item)
        value = _assigned(node, name)
        if value is not None:
            found = self.find(_name(value))
            return None if found is None else _Settings(*found)
        for source, base in self.bases(node):
            inner = source.inner_class(base, name)
            if inner is not None:
                return inner
        return None


@dataclass(frozen=True)
class _Settings:
    """A class of settings, read field by field."""

    source: _Source
    node: ast.ClassDef

    def fields(self) -> list[dict[str, Any]]:
        """Fields of the bases first, each replaced where it is declared anew."""
        found: dict[str, dict[str, Any]] = {}
        for source, base in self.source.bases(self.node):
            found.update({f["name"]: f for f in _Settings(source, base).fields()})
        constants = _constants(self.source.tree)
        for item in self.node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                name = item.target.id
                if not name.startswith("_") and "ClassVar" not in ast.unparse(item.annotation):
                    found[name] = _setting(name, item, constants)
        return list(found.values())


def _setting(name: str, item: ast.AnnAssign, constants: Mapping[str, ast.expr]) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": name, "type": ast.unparse(item.annotation)}
    value = item.value
    if not (isinstance(value, ast.Call) and _name(value.func) == "Field"):
        if value is None:
            shown["required"] = True
        else:
            shown["default"] = _literal(value, constants)
        return shown
    given = {k.arg: k.value for k in value.keywords if k.arg is not None}
    default = value.args[0] if value.args else given.get("default")
    if isinstance(default, ast.Constant) and default.value is ...:
        default = None
    if default is not None:
        shown["default"] = _literal(default, constants)
    elif "default_factory" in given:
        made = ast.unparse(given["default_factory"])
        shown["default"] = {"list": [], "dict": {}, "tuple": []}.get(made, f"{made}()")
    else:
        shown["required"] = True
    bounds = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    ranges = [f"{sign} {_literal(given[k], constants)}" for k, sign in bounds.items() if k in given]
    if ranges:
        shown["range"] = ", ".join(ranges)
    if "description" in given:
        shown["help"] = str(_literal(given["description"], constants))
    extra = _literal(given.get("json_schema_extra"), constants)
    if isinstance(extra, dict) and "source" in extra:
        shown["source"] = str(extra["source"])
    return shown


# Names of other rooms ----------------------------------------------------------------------


def task_names() -> tuple[str, ...]:
    """Tasks: the files in `tasks/`, with hyphens."""
    files = (PACKAGE / "tasks").glob("[a-z]*.py")
    return tuple(sorted(path.stem.replace("_", "-") for path in files))


def data_names() -> tuple[str, ...]:
    """Data sets: the literal `name` of the classes in `data/`, and other packages' entry points."""
    import importlib.metadata

    found = {point.name for point in importlib.metadata.entry_points(group=DATA_GROUP)}
    for path in sorted((PACKAGE / "data").glob("*.py")):
        try:
            tree = _tree(path)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in tree.body:
            value = _assigned(node, "name") if isinstance(node, ast.ClassDef) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.add(value.value)
    return tuple(sorted(found - {""}))
