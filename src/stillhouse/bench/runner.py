"""Benching: a method, what its claims compare it with, and every seed, each run resumable."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from stillhouse import catalogue
from stillhouse.bench import results as recorded
from stillhouse.bench.results import Results, file_hash, judged, kept_from, stamp_of
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.errors import CheckpointError, RecipeError, StillhouseError, nearest
from stillhouse.method import Claim, Method
from stillhouse.metrics.statistics import (
    FAST_SECONDS,
    LEAST_SEEDS,
    LEAST_SEEDS_WHEN_FAST,
    required_seeds,
)
from stillhouse.recipe import Recipe, load_recipe, recipe_ids

SCORE = "score.json"
# What a recipe says that a side's figures do not depend on, or that the bench itself sets.
_APART = ("output", "seed", "seeds", "compare", "sides")


class RunSide(Protocol):
    """Runs one side for one seed in a folder, going on where a killed run was."""

    def __call__(
        self, recipe: Recipe, side: str, seed: int, folder: Path
    ) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Side:
    """One contestant.

    Attributes:
        name: "id", "id/variant" or "teacher".
        stamp: hash of all its figures depend on: its file and the recipe.
        folder: of its runs, one below for each seed.
    """

    name: str
    stamp: str
    folder: Path

    def run_folder(self, seed: int) -> Path:
        """Where the run of one seed lies."""
        return self.folder / f"seed-{seed}"


def run(
    method_id: str,
    *,
    seeds: int | None = None,
    sides: Sequence[str] | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Sequence[str] = (),
    folder: Path | str | None = None,
    results_folder: Path | str | None = None,
    note: str = "",
    say: Callable[[str], None] | None = None,
    run_side: RunSide | None = None,
) -> Results:
    """Bench a method by the rules: same data, models, weights, steps and seeds for all sides.

    Seeds are the outer loop, so that load on the machine meets all sides alike. After each
    finished run the results file is written. A run that is finished is not run again; one
    that was killed goes on.

    Args:
        method_id: the method whose claims are judged.
        seeds: number of seeds 0..n-1, fixed before the run. None: 3, or 5 when after the
            first seed some side took less than two minutes (time alone decides, no figure).
        sides: contestants beside the method; None for those that its claims name.
        recipe: a recipe, its file or its id; the method's own by default.
        overrides: of the recipe, "a.b=value".
        folder: of the runs; `runs/bench/<id>` by default.
        results_folder: where `<id>.json` is written; `results` by default.
        note: what a reader of the results must know.
        say: where progress is told, one line at a time; standard error by default.
        run_side: runs one side; that of `stillhouse.launch` by default.

    Returns:
        The results as written.

    Raises:
        RecipeError: unknown method, side or variant; fewer than one seed.
        CheckpointError: a results file that is damaged.
    """
    chosen = _as_recipe(method_id, recipe, overrides)
    entry = catalogue.find(method_id)
    method: type[Method] = catalogue.load(method_id)
    if seeds is not None and seeds < 1:
        raise RecipeError(f"a bench needs one seed at least, not {seeds}")
    claims = list(method.claims)
    names = side_names(method_id, claims, sides)
    from stillhouse.launch import check_sides

    check_sides(chosen, [name for name in {*names, *chosen.sides} if name != recorded.TEACHER])
    home = Path(folder) if folder is not None else Path("runs") / "bench" / method_id
    contest = [_side(name, chosen, home) for name in names]
    path = Path(results_folder or "results") / f"{method_id}.json"
    bench = _Bench(
        chosen,
        method_id,
        contest,
        claims,
        path,
        say or _say,
        run_side or _launched(),
        seeds is None,
    )
    fresh = Results(
        method_id,
        file_hash(entry.file),
        command=command_of(method_id, seeds, sides, recipe, overrides),
        seeds=list(range(seeds or LEAST_SEEDS)),
        note=note,
        stamps={side.name: side.stamp for side in contest},
    )
    fresh.data, fresh.versions, fresh.hardware = surroundings(chosen)
    if path.is_file():
        kept_from(recorded.read(path), fresh)
    return bench.run(fresh)


def side_names(method_id: str, claims: Sequence[Claim], sides: Sequence[str] | None) -> list[str]:
    """The contestants, the method first, each once.

    Args:
        method_id: always among them.
        claims: whose sides are taken when `sides` is None.
        sides: as the user names them: "id", "id/variant", "/variant" of the method itself,
            "teacher".

    Raises:
        RecipeError: an unknown side or variant; the nearest is named.
    """
    if sides is None:
        named = [side for claim in claims for side in (claim.ours, claim.than)]
        named = [side for side in named if recorded.number_of(side) is None]
    else:
        named = [method_id + side if side.startswith("/") else side for side in sides]
    names = list(dict.fromkeys([method_id, *named]))
    for name in names:
        if name == recorded.TEACHER:
            continue
        entry_id, _, variant = name.partition("/")
        known = catalogue.entries()
        if entry_id not in known:
            raise RecipeError(f"unknown side '{name}'{nearest(entry_id, known)}")
        if variant and variant not in known[entry_id].variants:
            offered = known[entry_id].variants
            raise RecipeError(f"'{entry_id}' has no variant '{variant}'{nearest(variant, offered)}")
    return names


def command_of(
    method_id: str,
    seeds: int | None,
    sides: Sequence[str] | None,
    recipe: Any,
    overrides: Sequence[str],
) -> str:
    """The command line that repeats a bench."""
    import shlex

    words = ["stillhouse", "bench", method_id]
    if seeds is not None:
        words += ["--seeds", str(seeds)]
    if sides is not None:
        words += ["--sides", ",".join(sides)]
    if isinstance(recipe, (str, Path)):
        words += ["--recipe", str(recipe)]
    elif recipe is not None:
        words += ["--recipe", "RECIPE.yaml"]
    for override in overrides:
        words += ["-o", override]
    return shlex.join(words)


def _as_recipe(method_id: str, recipe: Any, overrides: Sequence[str]) -> Recipe:
    chosen = load_recipe(_default(method_id) if recipe is None else recipe, overrides)
    if chosen.method != method_id:
        raise RecipeError(f"the recipe is one of '{chosen.method}', not of '{method_id}'")
    return chosen


def _default(method_id: str) -> str:
    """The method's recipe for comparisons, `<id>-bench`, where it has one; else its own."""
    own = f"{method_id}-bench"
    return own if own in recipe_ids() else method_id


def _side(name: str, recipe: Recipe, home: Path) -> Side:
    said = recipe.model_dump(mode="json")
    for key in _APART:
        said.pop(key, None)
    entry_id = recipe.method if name == recorded.TEACHER else name.partition("/")[0]
    if entry_id != recipe.method:
        # Another entry has settings of its own: tuning ours must not run it again.
        for key in ("method", "variant"):
            said.pop(key, None)
        said["settings"] = catalogue.shared_settings(recipe.method, entry_id, recipe.settings)
    if name in recipe.sides:
        said["own"] = recipe.sides[name]
    stamp = stamp_of([name, said, file_hash(catalogue.find(entry_id).file)])
    slug = re.sub(r"[^\w.-]+", "--", name)
    return Side(name, stamp, home / f"{slug}-{stamp[:8]}")


def surroundings(recipe: Recipe) -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """Data (name, edition, hash), versions and hardware of the runs of a recipe."""
    from stillhouse import launch
    from stillhouse.data.registry import open_data
    from stillhouse.recipe_models import Given
    from stillhouse.summary import versions

    splits = {recipe.data.name: launch.open_splits(recipe, Given())}
    train = recipe.teacher.train if recipe.teacher is not None else None
    if train is not None and train.data is not None:
        own = train.data
        splits[own.name] = open_data(own.name, seed=recipe.seed, options=own.options)
    data = [
        {"name": name, "edition": read.edition, "hash": str(read.about.get("hash", ""))}
        for name, read in splits.items()
    ]
    return data, versions(), launch.open_hardware(recipe).describe()


def _launched() -> RunSide:
    from stillhouse.launch import run_side

    found: RunSide = run_side
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Bench:
    """One bench while it runs."""

    def __init__(
        self,
        recipe: Recipe,
        method_id: str,
        sides: Sequence[Side],
        claims: Sequence[Claim],
        path: Path,
        say: Callable[[str], None],
        run_side: RunSide,
        may_grow: bool,
    ) -> None:
        self.recipe, self.method_id, self.sides, self.claims = recipe, method_id, sides, claims
        self.path, self.say, self.run_side, self.may_grow = path, say, run_side, may_grow

    def run(self, results: Results) -> Results:
        """All seeds of all sides; the results are written after each."""
        self.say(
            f"bench {self.method_id}: {', '.join(s.name for s in self.sides)}; "
            f"seeds {results.seeds}; runs in {self.sides[0].folder.parent}"
        )
        index = 0
        while index < len(results.seeds):
            seed = results.seeds[index]
            for side in self.sides:
                self._one(results, side, seed)
            if index == 0 and self.may_grow:
                self._grow(results)
            index += 1
        self._write(results)
        return results

    def _grow(self, results: Results) -> None:
        """Five seeds where some side is fast. No figure but time is looked at."""
        taken = {
            side.name: list(results.values(side.name, "seconds").values())
            for side in self.sides
            if side.name != recorded.TEACHER
        }
        if len(results.seeds) < required_seeds(taken):
            results.grow(range(LEAST_SEEDS_WHEN_FAST))
            self.say(f"a side takes under {FAST_SECONDS:.0f} s: {len(results.seeds)} seeds")

    def _one(self, results: Results, side: Side, seed: int) -> None:
        folder = side.run_folder(seed)
        place = f"seed {seed} · {side.name}"
        figures = read_score(folder, side.stamp)
        if figures is None:
            self.say(f"{place}: running")
            try:
                figures = dict(self.run_side(self.recipe, side.name, seed, folder))
            except StillhouseError as error:
                raise type(error)(*_placed(error, f"{place} ({folder})")) from error
            write_score(folder, side, seed, figures)
        results.record(side.name, seed, figures)
        self._write(results)
        self.say(f"{place}: {_short(figures)}")

    def _write(self, results: Results) -> None:
        results.claims = judged(results, self.claims)
        results.date = datetime.now(UTC).isoformat(timespec="seconds")
        recorded.write(results, self.path)


def _placed(error: StillhouseError, place: str) -> tuple[Any, ...]:
    # Errors whose constructor takes something else than a message keep their own arguments.
    if len(error.args) == 1 and type(error).__init__ is Exception.__init__:
        return (f"{place}: {error}",)
    return error.args


def _short(figures: Mapping[str, float]) -> str:
    shown = [f"{k} {v:.4g}" for k, v in figures.items() if k not in recorded.COST][:4]
    seconds = figures.get("seconds")
    if seconds is not None and math.isfinite(seconds):
        shown.append(f"{seconds:.0f} s")
    return ", ".join(shown)


def write_score(folder: Path, side: Side, seed: int, figures: Mapping[str, float]) -> None:
    """Mark a run as finished, with its figures."""
    known = {k: float(v) if math.isfinite(v) else None for k, v in figures.items()}
    text = json.dumps(
        {"schema": 1, "side": side.name, "seed": seed, "stamp": side.stamp, "figures": known}
    )
    write_atomic(folder / SCORE, text.encode())


def read_score(folder: Path, stamp: str) -> dict[str, float] | None:
    """The figures of a finished run, or None.

    Raises:
        CheckpointError: the score there belongs to other settings, or is damaged.
    """
    path = folder / SCORE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["stamp"] != stamp:
            raise CheckpointError(f"'{path}' belongs to other settings; choose another --folder")
        figures = found["figures"].items()
        return {str(k): math.nan if v is None else float(v) for k, v in figures}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the score '{path}' is damaged ({error}); remove it to judge this run again"
        ) from error
