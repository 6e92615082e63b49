"""Which rows belong to which split: classes, subsets, long tails, validation, missing labels.

Everything here works on positions and labels, so that only the rows that are kept need to be
decoded. Chance comes from seeds alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Joined, Sample, Source, Splits, Subset, carve, read_rows
from stillhouse.clock import Views, generator
from stillhouse.data.options import ClassOptions
from stillhouse.data.roots import locate
from stillhouse.errors import DataError, RecipeError, nearest

# Official splits whose rows stand for one another are numbered in this order.
_ORDER = ("train", "val", "test")
_VAL = 0.1
_NAMED = 6  # joined classes that are all named
_TEST = 0.2


@dataclass(frozen=True)
class Chosen:
    """Rows of one official split that are kept.

    Attributes:
        rows: (n,) positions in the official split, ascending.
        ids: (n,) content ids, unique over all splits of the data set.
        labels: (n,) classes, renumbered.
        subclasses: (n,) which of the classes that were joined into one, numbered within it;
            None where none were.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    subclasses: Tensor | None = None

    def views(self) -> dict[str, Tensor]:
        """ "target", and "subclass" where classes were joined."""
        views = {"target": self.labels}
        if self.subclasses is not None:
            views["subclass"] = self.subclasses
        return views


@dataclass(frozen=True)
class Choice:
    """What is kept of a data set.

    Attributes:
        splits: by official split.
        classes: names of the classes that are kept, in their new order.
        told: one sentence on what was left out; empty when nothing was.
        subclasses: by class, names of the classes that were joined into it; empty when none
            were.
    """

    splits: Mapping[str, Chosen]
    classes: list[str]
    told: str
    subclasses: list[list[str]]

    def about(self) -> dict[str, Any]:
        """What tasks must know of it: "selection", "classes", "subclasses" where there are."""
        found: dict[str, Any] = {"selection": self.told, "classes": self.classes}
        if self.subclasses:
            found["subclasses"] = self.subclasses
        return found


def choose(
    labels: Mapping[str, Tensor], classes: Sequence[str], options: ClassOptions, *, name: str
) -> Choice:
    """Apply `classes`, `subset`, `per_class`, `long_tail` and `modulo` to the official splits.

    The order in which rows are taken is a fixed permutation per split (by `subset_seed`), so
    that a larger subset contains a smaller one, and is the same for every run's seed.

    Args:
        labels: (N,) int64 class numbers per official split.
        classes: names of all classes.
        options: what to keep.
        name: of the data set, for errors.

    Raises:
        RecipeError: unknown class or split.
        DataError: fewer rows than asked for.
    """
    kept = _kept_classes(options.classes, classes, name)
    renumbered = torch.full((len(classes),), -1, dtype=torch.int64)
    renumbered[torch.tensor(kept)] = torch.arange(len(kept))
    subset = _by_split(options.subset, labels, "subset", name)
    per_class = _by_split(options.per_class, labels, "per_class", name)
    chosen: dict[str, Chosen] = {}
    told = [f"classes {', '.join(classes[k] for k in kept)}"] if options.classes else []
    first_id = 0
    for role in sorted(labels, key=lambda r: (_ORDER.index(r) if r in _ORDER else 9, r)):
        own = renumbered[labels[role]]
        order = torch.randperm(len(own), generator=generator(options.subset_seed, "subset", role))
        order = order[own[order] >= 0]
        tail = options.long_tail if role == "train" else None
        if role in per_class or tail is not None:
            counts = _counts(own, kept, classes, per_class.get(role), tail, f"{name} {role}")
            order = _first_of_each(order, own[order], counts)
        if role in subset:
            if subset[role] > len(order):
                raise DataError(
                    f"data option 'subset': {subset[role]} rows are asked of {name} {role}, "
                    f"which has {len(order)}"
                )
            order = order[: subset[role]]
        rows = order.sort().values
        if len(rows) == 0:
            raise DataError(f"{name} {role} is empty")
        chosen[role] = Chosen(rows, rows + first_id, own[rows])
        if len(rows) < len(own):
            told.append(f"{len(rows):,} of {len(own):,} {role} rows")
        first_id += len(own)
    if options.long_tail is not None:
        told.append(f"long tail {options.long_tail:g}")
    if told and (subset or per_class or options.long_tail is not None):
        told.append(f"subset seed {options.subset_seed}")
    names = [classes[k] for k in kept]
    if options.modulo is None:
        return Choice(chosen, names, ", ".join(told), [])
    return _joined(chosen, names, told, options.modulo, name)


def _joined(
    chosen: Mapping[str, Chosen], names: Sequence[str], told: list[str], modulo: int, name: str
) -> Choice:
    """Class y becomes y mod n, and is the (y div n)-th subclass of it."""
    if modulo >= len(names):
        raise RecipeError(
            f"data option 'modulo': {name} has {len(names)} classes here; a number from 2 to "
            f"{len(names) - 1} joins some of them, {modulo} none"
        )
    splits = {
        role: Chosen(part.rows, part.ids, part.labels % modulo, part.labels // modulo)
        for role, part in chosen.items()
    }
    groups = [list(names[rest::modulo]) for rest in range(modulo)]
    told.append(f"classes modulo {modulo}")
    return Choice(splits, [_joint_name(group) for group in groups], ", ".join(told), groups)


def _joint_name(group: Sequence[str]) -> str:
    few = len(group) <= _NAMED
    return "/".join(group) if few else f"{group[0]} and {len(group) - 1} others"


def _kept_classes(
    wanted: int | Sequence[int | str] | None,
    classes: Sequence[str],
    name: str,
    option: str = "classes",
) -> list[int]:
    if wanted is None:
        return list(range(len(classes)))
    if isinstance(wanted, int):
        if wanted > len(classes):
            raise RecipeError(
                f"data option '{option}': {wanted} classes are asked of {name}, "
                f"which has {len(classes)}"
            )
        return list(range(wanted))
    kept = []
    for entry in wanted:
        if isinstance(entry, str) and entry in classes:
            kept.append(classes.index(entry))
        elif isinstance(entry, int) and 0 <= entry < len(classes):
            kept.append(entry)
        elif isinstance(entry, int):
            raise RecipeError(
                f"data option '{option}': {name} has classes 0 to {len(classes) - 1}, not {entry}"
            )
        else:
            raise RecipeError(
                f"data option '{option}': {name} has no class '{entry}'{nearest(entry, classes)}"
            )
    if len(set(kept)) < len(kept):
        raise RecipeError(f"data option '{option}': a class is named twice in {list(wanted)}")
    return kept


def _by_split(
    given: int | Mapping[str, int] | None, labels: Mapping[str, Tensor], option: str, name: str
) -> dict[str, int]:
    if given is None:
        return {}
    counts = {"train": given} if isinstance(given, int) else dict(given)
    for role in counts:
        if role not in labels:
            raise RecipeError(
                f"data option '{option}': {name} has no split '{role}'{nearest(role, labels)}"
                + (" (val is carved from train: use the option 'val')" if role == "val" else "")
            )
    return counts


def _counts(
    own: Tensor,
    kept: Sequence[int],
    classes: Sequence[str],
    per_class: int | None,
    tail: float | None,
    where: str,
) -> list[int]:
    """Rows to keep of each class."""
    there = torch.bincount(own[own >= 0], minlength=len(kept)).tolist()
    most = min(there) if per_class is None else per_class
    last = max(1, len(kept) - 1)
    wanted = [
        most if tail is None else max(1, round(most * tail ** (-c / last)))
        for c in range(len(kept))
    ]
    for number, (has, asked) in enumerate(zip(there, wanted, strict=True)):
        if has < asked:
            raise DataError(
                f"{where}: the class '{classes[kept[number]]}' has {has} rows, {asked} are asked"
            )
    return wanted


def _first_of_each(order: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of `order` that are among the first `counts[c]` of their class c."""
    keep = torch.zeros(len(order), dtype=torch.bool)
    for number, count in enumerate(counts):
        keep[(labels == number).nonzero().squeeze(1)[:count]] = True
    return order[keep]


# Validation --------------------------------------------------------------------------------


def with_val(splits: Splits, val: int | float | None, *, seed: int, name: str) -> Splits:
    """The splits with "val": their own, else carved off "train" by the run's seed.

    Labelled rows are carved class by class, so that every class keeps its share.

    Args:
        splits: as opened.
        val: a count of rows, or a share of train; 0 leaves "val" out; None is a tenth, or the
            data's own.
        seed: the run's.
        name: of the data set.

    Raises:
        RecipeError: rows are asked for and the data has a validation split.
        DataError: train is too small.
    """
    if "val" in splits:
        if val:
            raise RecipeError(
                f"data option 'val': {name} brings its own validation split of "
                f"{splits.peek('val')} rows; leave 'val' out"
            )
        return splits
    if val == 0 or "train" not in splits:
        return splits
    train = splits["train"]
    val = _VAL if val is None else val
    count = round(len(train) * val) if isinstance(val, float) else val
    if not 0 < count < len(train):
        raise DataError(f"data option 'val': cannot carve {count} of {len(train)} rows of {name}")
    labels = labels_of(train)
    rng = generator(seed, "val")
    if labels is None:
        rest, cut = carve(train, count, rng)
    else:
        held = torch.zeros(len(train), dtype=torch.bool)
        held[stratified(labels, count, rng)] = True
        rest, cut = Subset(train, (~held).nonzero()[:, 0]), Subset(train, held.nonzero()[:, 0])
    return _with(splits, train=rest, val=cut)


def stratified(labels: Tensor, count: int, rng: Generator) -> Tensor:
    """`count` random rows, spread over the classes as evenly as their sizes allow.

    Each class gives its share, rounded by largest remainder.

    Args:
        labels: (N,) int64.
        count: rows to draw, at most N.
        rng: the chance.

    Returns:
        (count,) positions, class by class.
    """
    values, sizes = torch.unique(labels, return_counts=True)
    shares = _shares(sizes, count)
    shuffled = torch.randperm(len(labels), generator=rng)
    picked = [
        shuffled[labels[shuffled] == value][: int(share)]
        for value, share in zip(values.tolist(), shares.tolist(), strict=True)
    ]
    return torch.cat(picked)


# Labels ------------------------------------------------------------------------------------


def withhold_labels(splits: Splits, fraction: float, *, seed: int, name: str) -> Splits:
    """Split "train" into rows with labels ("train") and without ("unlabelled").

    At least one row of each class keeps its label.

    Args:
        splits: with labelled "train".
        fraction: share that keeps labels, in (0, 1).
        seed: the run's.
        name: of the data set.

    Raises:
        DataError: train has no labels, or too few rows.
    """
    train = splits["train"]
    labels = labels_of(train)
    if labels is None:
        raise DataError(f"data option 'label_fraction': {name} train has no labels")
    count = round(len(train) * fraction)
    present = len(torch.unique(labels))
    if not present <= count < len(train):
        raise DataError(
            f"data option 'label_fraction': {fraction:g} of {len(train)} rows of {name} is "
            f"{count}; at least one row for each of {present} classes and fewer than all"
        )
    rng = generator(seed, "label_fraction")
    kept = torch.zeros(len(train), dtype=torch.bool)
    shuffled = torch.randperm(len(labels), generator=rng)
    kept[_first_of_each(shuffled, _dense(labels)[shuffled], [1] * present)] = True
    others = (~kept).nonzero()[:, 0]
    kept[others[stratified(labels[others], count - present, rng)]] = True
    return _divided(splits, kept)


def keep_per_class(splits: Splits, count: int, *, seed: int, name: str) -> Splits:
    """Split "train" as `withhold_labels` does, with `count` labelled rows of every class.

    A larger count contains the rows of a smaller one.

    Raises:
        DataError: train has no labels, a class has too few rows, or none is left unlabelled.
    """
    train = splits["train"]
    labels = labels_of(train)
    if labels is None:
        raise DataError(f"data option 'labels_per_class': {name} train has no labels")
    sizes = torch.bincount(labels)
    fewest = int(sizes[sizes > 0].min())
    if count > fewest or count * int((sizes > 0).sum()) >= len(train):
        raise DataError(
            f"data option 'labels_per_class': {count} labelled rows of every class are asked of "
            f"{name}, whose smallest class has {fewest} of {len(train)} train rows; some must "
            "stay unlabelled"
        )
    shuffled = torch.randperm(len(labels), generator=generator(seed, "labels_per_class"))
    wanted = [count] * len(sizes)
    kept = torch.zeros(len(train), dtype=torch.bool)
    kept[_first_of_each(shuffled, labels[shuffled], wanted)] = True
    return _divided(splits, kept)


def keep_listed(
    splits: Splits, path: str, val: int | float | None = None, *, seed: int, name: str
) -> Splits:
    """Split "train" as `withhold_labels` does, with the labelled rows that a file names.

    Args:
        splits: with labelled "train" whose rows have names (files); before "val" is carved.
        path: one name a line (the lists of ImageNet with 1 % and 10 % of its labels); or JSON
            with a list "train" of names or of [name, label, class] (few-shot splits of CoOp).
            A name may leave out leading folders.
        val: as for `with_val`; where the data brings none it is carved off the other rows.
        seed: the run's.
        name: of the data set.

    Raises:
        DataError: unreadable; a name that is no row of train, or of several; none is left.
    """
    train = splits["train"]
    names = _names_of(train)
    if names is None:
        raise DataError(f"data option 'label_list': the rows of {name} train have no names")
    by_file: dict[str, list[int]] = {}
    for row, own in enumerate(names):
        by_file.setdefault(own.rpartition("/")[2], []).append(row)
    kept = torch.zeros(len(train), dtype=torch.bool)
    for listed in _listed(path):
        rows = by_file.get(listed.rpartition("/")[2], [])
        found = [r for r in rows if f"/{names[r]}".endswith(f"/{listed}")]
        if len(found) != 1:
            what = f"is {len(found)} rows of" if found else "is no row of"
            near = nearest(listed, names) if not found else ""
            raise DataError(f"data option 'label_list': '{listed}' {what} {name} train{near}")
        kept[found[0]] = True
    if bool(kept.all()):
        raise DataError(f"data option 'label_list': {path} names every row; none is unlabelled")
    rest = _with(splits, train=Subset(train, (~kept).nonzero()[:, 0]))
    rest = with_val(rest, val, seed=seed, name=name)
    labelled = Subset(train, kept.nonzero()[:, 0])
    return _with(rest, train=labelled, unlabelled=Unlabelled(rest["train"]))


def _listed(path: str) -> list[str]:
    place = locate(path, option="label_list")
    try:
        text = place.read_text(encoding="utf-8")
        if place.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        entries = json.loads(text)["train"]
        return [str(e[0]) if isinstance(e, list) else str(e) for e in entries]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"data option 'label_list': {place} is neither lines of names nor JSON with a list "
            f"'train' ({type(error).__name__}: {error})"
        ) from error


def _names_of(source: Source) -> list[str] | None:
    if isinstance(source, Subset):
        inner = _names_of(source.source)
        return None if inner is None else [inner[row] for row in source.rows.tolist()]
    found = getattr(source, "names", None)
    return list(found) if isinstance(found, list) else None


def _divided(splits: Splits, kept: Tensor) -> Splits:
    """The splits with "train" cut into labelled rows and the others, without labels."""
    train = splits["train"]
    others = Unlabelled(Subset(train, (~kept).nonzero()[:, 0]))
    return _with(splits, train=Subset(train, kept.nonzero()[:, 0]), unlabelled=others)


# What students see -------------------------------------------------------------------------


def narrowed(
    splits: Splits,
    *,
    few_shot: int | float | None = None,
    drop_classes: Sequence[int | str] = (),
    seed: int,
    name: str,
) -> Splits:
    """The splits with "train" cut down to what students see, and all of it kept as "full".

    A smaller part is contained in a larger one of the same seed. `about["unseen"]` holds the
    numbers of the dropped classes. "val" and "test" stay whole.

    Args:
        splits: with labelled "train"; "full" is taken instead where it is there already.
        few_shot: share of the rows in (0, 1), or rows of every class; None for all.
        drop_classes: whose rows are left out, by name or number.
        seed: the run's.
        name: of the data set.

    Raises:
        RecipeError: an unknown class.
        DataError: no labels, too few rows, or fewer than two classes left.
    """
    full = splits["full"] if "full" in splits else splits["train"]
    labels = labels_of(full)
    if labels is None:
        raise DataError(f"few_shot and drop_classes: {name} train has no labels")
    names = [str(c) for c in splits.about.get("classes", range(int(labels.max()) + 1))]
    dropped = _kept_classes(drop_classes, names, name, "drop_classes") if drop_classes else []
    rows = (~torch.isin(labels, torch.tensor(dropped, dtype=torch.int64))).nonzero()[:, 0]
    if len(torch.unique(labels[rows])) < 2:
        raise DataError(f"data option 'drop_classes': fewer than two classes of {name} are left")
    if few_shot is not None:
        rows = rows[_few(labels[rows], few_shot, generator(seed, "few_shot"), names, name)]
    about = {k: v for k, v in splits.about.items() if k != "unseen"}
    if dropped:
        about["unseen"] = dropped
    told = [str(about["selection"])] if about.get("selection") else []
    told += [f"students see {len(rows):,} of {len(full):,} train rows"]
    told += [f"without {', '.join(names[k] for k in dropped)}"] if dropped else []
    about["selection"] = ", ".join(told)
    opened = splits.judging()
    sources = {role: opened[role] for role in opened}
    narrow = Subset(full, rows.sort().values)
    return Splits({**sources, "train": narrow, "full": full}, splits.edition, about)


def _few(
    labels: Tensor, few_shot: int | float, rng: Generator, names: Sequence[str], name: str
) -> Tensor:
    """Positions of the few rows, class by class."""
    shuffled = torch.randperm(len(labels), generator=rng)
    values, sizes = torch.unique(labels, return_counts=True)
    if isinstance(few_shot, int):
        for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
            if size < few_shot:
                raise DataError(
                    f"data option 'few_shot': {few_shot} rows of every class are asked, "
                    f"'{names[value]}' of {name} has {size}"
                )
        shares = [few_shot] * len(values)
    else:
        count = round(len(labels) * few_shot)
        if not len(values) <= count < len(labels):
            raise DataError(
                f"data option 'few_shot': {few_shot:g} of {len(labels)} rows of {name} is "
                f"{count}; at least one row for each of {len(values)} classes is needed"
            )
        shares = _shares(sizes, count).clamp(min=1).tolist()
    return torch.cat(
        [
            shuffled[labels[shuffled] == value][:share]
            for value, share in zip(values.tolist(), shares, strict=True)
        ]
    )


def _shares(sizes: Tensor, count: int) -> Tensor:
    """How `count` rows are spread over classes of these sizes, by largest remainder."""
    exact = sizes.double() * count / sizes.sum()
    shares = exact.floor().long()
    order = torch.argsort(exact - shares, descending=True, stable=True)
    shares[order[: count - int(shares.sum())]] += 1
    return shares


def _dense(labels: Tensor) -> Tensor:
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


class Unlabelled:
    """A source whose labels are not shown.

    Attributes:
        source: with the labels.
        rows: its positions, all of them.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rows = torch.arange(len(source))

    @property
    def fingerprint(self) -> str:
        """Of the source, marked as without labels."""
        return f"unlabelled-{self.source.fingerprint}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        sample = self.source[item]
        return {key: value for key, value in sample.items() if key != "target"}

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        find = getattr(self.source, "id_of", None)
        return int(find(index)) if find is not None else index

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """As the source reads, without `target`."""
        batch = read_rows(self.source, rows, views)
        batch.pop("target", None)
        return batch


def hold_out(labels: Tensor, share: int | float | None, *, seed: int, name: str) -> Tensor:
    """Which rows are test where the user's own data has no test split.

    Args:
        labels: (N,) int64.
        share: a count of rows, or a share; None is a fifth.
        seed: fixed, not the run's.
        name: of the data set.

    Returns:
        (N,) bool.

    Raises:
        DataError: nothing is left on one of the sides.
    """
    share = _TEST if share is None else share
    count = round(len(labels) * share) if isinstance(share, float) else share
    if not 0 < count < len(labels):
        raise DataError(
            f"data option 'test': cannot hold out {count} of {len(labels)} rows of {name} "
            "for the test"
        )
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[stratified(labels, count, generator(seed, "test"))] = True
    return held


def labels_of(source: Source) -> Tensor | None:
    """The labels of all rows, without reading any view that has to be decoded.

    A source tells them by an attribute `targets` (N,), as lazily read ones do, or holds them
    in memory (`TensorSource`); a `Subset` tells those of its rows, `Joined` those of its parts.

    Returns:
        (N,) int64, or None where the source has no labels or one row has several.
    """
    if isinstance(source, Subset):
        inner = labels_of(source.source)
        return None if inner is None else inner[source.rows]
    if isinstance(source, Joined):
        parts = [labels_of(part) for part in source.sources]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    found: Any = getattr(source, "targets", None)
    if found is None:
        found = getattr(source, "views", {}).get("target")
    if not isinstance(found, Tensor) or found.ndim != 1 or found.is_floating_point():
        return None
    return found.long()


def _with(splits: Splits, **sources: Source) -> Splits:
    """The splits with some replaced or added; "test" stays closed."""
    opened = splits.judging()
    merged = {role: opened[role] for role in opened}
    return Splits({**merged, **sources}, splits.edition, splits.about)
