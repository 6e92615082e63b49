"""Reads cards, settings, variants and claims from source text, without running it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


class UnreadableError(Exception):
    """A file that holds no well-formed entry; the message says why."""


def foreign_modules(group: str) -> list[str]:
    """Modules named by other packages' entry points."""
    points = importlib.metadata.entry_points(group=group)
    return sorted({point.value.partition(":")[0].strip() for point in points})


def file_of(module: str) -> Path | None:
    """The file of a module, without importing it or the packages around it."""
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


def entries_in(module: str, path: Path) -> tuple[list[dict[str, Any]], set[Path]]:
    """The entries that a file defines, as fields of `catalogue.Entry`.

    Args:
        module: as which the file is imported.
        path: of the file.

    Returns:
        The entries, and every file that was read for them: bases may stand elsewhere.

    Raises:
        UnreadableError: an entry is not well formed, or the file is not Python.
    """
    seen = {path}
    try:
        if "Card(" not in path.read_text(encoding="utf-8"):
            return [], seen
        source = _Source(path, _tree(path), seen)
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"cannot be read ({error})") from None
    except SyntaxError as error:
        raise UnreadableError(f"is not valid Python (line {error.lineno}: {error.msg})") from None
    made = []
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef):
            card = _assigned(node, "card")
            if isinstance(card, ast.Call) and _name(card.func) == "Card":
                made.append(_entry(module, source, node, card))
    return made, seen


def _entry(module: str, source: _Source, node: ast.ClassDef, written: ast.Call) -> dict[str, Any]:
    constants = _constants(source.tree)
    card = _arguments(written, constants)
    for name in ("id", "title", "summary"):
        if not isinstance(card.get(name), str) or not card[name]:
            raise UnreadableError(f"line {written.lineno}: the card of {node.name} has no {name}")
    vague = [name for name, value in card.items() if isinstance(value, _Expression)]
    if vague:
        raise UnreadableError(
            f"line {written.lineno}: the card of {node.name} is read without being run; "
            f"write {', '.join(vague)} as a literal"
        )
    variants = _literal(source.attribute(node, "variants"), constants) or {}
    claims = _literal(source.attribute(node, "claims"), constants) or ()
    config = source.inner_class(node, "Config")
    return {
        "id": card["id"],
        "module": module,
        "name": node.name,
        "path": str(source.path),
        "card": card,
        "about": ast.get_docstring(node) or "",
        "config": config.fields() if config is not None else [],
        "variants": variants if isinstance(variants, dict) else {},
        "claims": claims if isinstance(claims, list) else [],
    }


class _Expression(str):
    """The text of an expression whose value is not known without running it."""


def _tree(path: Path) -> ast.Module:
    stat = path.stat()
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed(path: Path, changed: int, size: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def class_names(folder: Path) -> Iterator[str]:
    """The literal `name` of every class in a folder's files."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = _tree(path)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in tree.body:
            value = _assigned(node, "name") if isinstance(node, ast.ClassDef) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
                yield value.value


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
    seen: set[Path]

    def find(self, name: str) -> tuple[_Source, ast.ClassDef] | None:
        """A class by name: here, or in the file of this package it is imported from."""
        for item in self.tree.body:
            if isinstance(item, ast.ClassDef) and item.name == name:
                return self, item
            if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("stillhouse"):
                for alias in item.names:
                    if (alias.asname or alias.name) == name:
                        return self._elsewhere(str(item.module), alias.name)
        return None

    def _elsewhere(self, module: str, name: str) -> tuple[_Source, ast.ClassDef] | None:
        path = file_of(module)
        if path is None:
            return None
        self.seen.add(path)
        return _Source(path, _tree(path), self.seen).find(name)

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
