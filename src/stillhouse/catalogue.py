"""What methods and baselines there are, found by reading their files, not by importing them.

Each file in `methods/` and `baselines/` holds a class with a literal `card = Card(...)`; other
packages name such modules under the entry-point group `stillhouse.methods`. Neither torch nor
pydantic is imported here: listing must be quick, and must work where torch does not.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

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
    memory = _Memory()
    found: dict[str, Entry] = {}
    wrong: list[str] = []
    for module, path in [*_own_modules(), *memory.foreign()]:
        made = memory.read(module, path)
        if isinstance(made, str):
            wrong.append(f"{path}: {made}")
            continue
        for entry in made:
            other = found.get(entry.id)
            if other is not None and other.path != entry.path:
                wrong.append(f"{path}: the id '{entry.id}' is taken by {other.path}")
                continue
            found[entry.id] = entry
    memory.save()
    return Found(dict(sorted(found.items())), tuple(wrong))


def _own_modules() -> Iterator[tuple[str, Path]]:
    """(module, file) of the house's own rooms."""
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            if path.name != "__init__.py":
                parts = path.relative_to(PACKAGE).with_suffix("").parts
                yield ".".join(("stillhouse", *parts)), path


class _Memory:
    """What scans have found, by file, time of change and size; kept in the cache folder.

    Reading 60 files takes a quarter of a second, looking up all packages' entry points 60 ms;
    a start that remembers both takes 2 ms.
    """

    def __init__(self) -> None:
        folders = [folder for folder in sys.path if folder]
        root = os.environ.get("STILLHOUSE_CACHE") or "~/.cache/stillhouse"
        place = crc32(json.dumps([str(PACKAGE), folders]).encode())
        # One file for each environment, so that two of them do not overwrite each other's.
        self.path = Path(root).expanduser() / f"catalogue-{place:08x}.json"
        self.stamp = [_FORMAT, _stamp(PACKAGE / "card_reader.py"), _stamp(PACKAGE / "method.py")]
        self.installed = [_stamp(Path(folder)) for folder in folders]
        self.files: dict[str, Any] = {}
        self.points: dict[str, Any] = {}
        self.used: dict[str, Any] = {}
        self.changed = False
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["stamp"] == self.stamp:
                self.files, self.points = dict(stored["files"]), dict(stored["foreign"])

    def foreign(self) -> list[tuple[str, Path]]:
        """(module, file) of other packages' entries, looked up anew after an installation."""
        if self.points.get("stamp") != self.installed:
            from stillhouse.card_reader import file_of, foreign_modules

            found = {module: file_of(module) for module in foreign_modules(GROUP)}
            places = [[module, str(path)] for module, path in found.items() if path is not None]
            self.points = {"stamp": self.installed, "places": places}
            self.changed = True
        return [(module, Path(path)) for module, path in self.points["places"]]

    def read(self, module: str, path: Path) -> list[Entry] | str:
        """The entries of a file, or what is wrong with it."""
        known = self.files.get(module)
        if known is None or any(_stamp(Path(p)) != stamp for p, stamp in known["stamps"]):
            from stillhouse.card_reader import UnreadableError, entries_in

            try:
                made, seen = entries_in(module, path)
            except UnreadableError as error:
                return str(error)
            stamps = [[str(p), _stamp(p)] for p in sorted(seen)]
            # Entries pass through JSON either way, so that both ways give the same.
            known = json.loads(json.dumps({"stamps": stamps, "entries": made}))
            self.changed = True
        self.used[module] = known
        return [_restored(given) for given in known["entries"]]

    def save(self) -> None:
        """Write what is new; a cache that cannot be written only costs time."""
        if not self.changed and self.used.keys() == self.files.keys():
            return
        kept = {"stamp": self.stamp, "foreign": self.points, "files": self.used}
        aside = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(kept), encoding="utf-8")
            aside.replace(self.path)


def _restored(given: Mapping[str, Any]) -> Entry:
    return Entry(**{**given, "config": tuple(given["config"]), "claims": tuple(given["claims"])})


def _stamp(path: Path) -> list[int]:
    """Changes when a file is written, or something is added to a folder."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_mtime_ns, stat.st_size]


# Names of other rooms ----------------------------------------------------------------------


def task_names() -> tuple[str, ...]:
    """Tasks: the files in `tasks/`, with hyphens."""
    files = (PACKAGE / "tasks").glob("[a-z]*.py")
    return tuple(sorted(path.stem.replace("_", "-") for path in files))


def data_names() -> tuple[str, ...]:
    """Data sets: the literal `name` of the classes in `data/`, and other packages' entry points."""
    import importlib.metadata

    from stillhouse.card_reader import class_names

    named = {point.name for point in importlib.metadata.entry_points(group=DATA_GROUP)}
    return tuple(sorted({*named, *class_names(PACKAGE / "data")}))
