"""Recordings of several sensors as windows in memory: which channels form which view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.batch import Batch, Source, Splits, TensorSource
from stillhouse.clock import Views
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import ClassOptions
from stillhouse.data.splitting import choose
from stillhouse.errors import DataError, OptionError, nearest


class SeriesOptions(ClassOptions):
    """Options of labelled windows of sensor recordings."""

    views: dict[str, list[str]] = Field(
        default_factory=dict,
        description="name of each view to its sensors or channels, such as {x: [body_gyro], "
        "other: [total_acc]}; the student reads x; none: all channels are x",
    )
    part: Literal["all", "pretrain", "rest"] = Field(
        "all",
        description="of the training recordings: pretrain, those set aside for teachers (the "
        "first of them, so other people); rest, the others",
    )
    pretrain: float = Field(
        0.4, gt=0.0, lt=1.0, description="share of the training rows that pretrain holds"
    )
    crop: int | None = Field(
        None,
        ge=4,
        description="points that every window is cut to: at random in training reads, the same "
        "for all views; else the middle",
    )

    @field_validator("views")
    @classmethod
    def _needs_x(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        if value and ("x" not in value or not all(value.values())):
            raise ValueError("views, each with a channel or more, and one of them called x")
        taken = {"id", "draw", "rows", "of", "target", "weight", "mask"} & set(value)
        if taken:
            raise ValueError(f"other names of views than {', '.join(sorted(taken))}")
        return value


class Crop:
    """The same cut of every view: at random where there is a chance, else the middle.

    Args:
        length: points that stay.
        views: names of the views, all of equal length.
    """

    def __init__(self, length: int, views: Sequence[str]) -> None:
        self.length, self.views = length, tuple(views)
        self.fingerprint = f"crop {length} of {self.views}"

    def __call__(self, batch: Batch, views: Views | None) -> Batch:
        """Cut, with one draw for all views of a row."""
        whole = batch[self.views[0]].shape[-1]
        spare = whole - self.length
        starts = torch.full((len(batch["id"]),), spare // 2)
        if views is not None:
            drawn = views.uniform(batch["id"], "crop", 1)[:, 0]
            starts = (drawn * (spare + 1)).long().clamp(max=spare)
        places = starts[:, None, None] + torch.arange(self.length)
        for name in self.views:
            series = batch[name]
            batch[name] = series.gather(2, places.expand(-1, series.shape[1], -1))
        return batch


class CroppedSource(TensorSource):
    """Windows that are cut on every reading; see `Crop`."""

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The rows, cut at random when there is a chance, in the middle without."""
        batch = self._gather(rows)
        assert self.augment is not None
        return self.augment(batch, views)  # type: ignore[arg-type]


class MiddleSource(CroppedSource):
    """Windows whose middle is read, whatever the chance: for validation and test."""

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The middle of the rows."""
        return super().read(rows, None)


def series_splits(
    data: DataSet[Any],
    official: Mapping[str, tuple[Tensor, Tensor]],
    options: SeriesOptions,
    *,
    channels: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    digest: str,
    edition: str,
    pretrain: Tensor,
) -> Splits:
    """The splits of a set of windows, with their views.

    Args:
        data: whose windows they are.
        official: split to ((N, C, T) float32, (N,) int64 labels); "train", "val", "test".
        options: which views, which part, which rows.
        channels: names of the C channels.
        groups: name of a sensor to its channels.
        classes: names of the classes.
        digest: sha256 of the content.
        edition: of the data.
        pretrain: (N,) bool, rows of train that are set aside for teachers.

    Raises:
        OptionError: an unknown sensor or channel.
        DataError: a crop that is longer than the windows; no row left.
    """
    wanted = options.views or {"x": list(channels)}
    places = {view: _places(view, names, channels, groups) for view, names in wanted.items()}
    length = next(iter(official.values()))[0].shape[2]
    if options.crop is not None and options.crop > length:
        raise DataError(
            f"data option 'crop': {options.crop} points are asked of windows of {length} in "
            f"{data.name}"
        )
    kept = dict(official)
    if options.part != "all":
        own = pretrain if options.part == "pretrain" else ~pretrain
        series, labels = official["train"]
        kept["train"] = (series[own], labels[own])
    choice = choose(
        {role: labels for role, (_, labels) in kept.items()}, classes, options, name=data.name
    )
    sources: dict[str, Source] = {}
    for role, chosen in choice.splits.items():
        series = kept[role][0].index_select(0, chosen.rows)
        views: dict[str, Any] = {v: series[:, own].contiguous() for v, own in places.items()}
        views.update(chosen.views())
        kind, cut = TensorSource, None
        if options.crop is not None:
            kind = CroppedSource if role == "train" else MiddleSource
            cut = Crop(options.crop, list(places))
        sources[role] = kind(
            views,
            augment=cut,
            ids=chosen.ids,
            name=f"{data.name}/{role}/{options.part}",
        )
    about: dict[str, Any] = {"name": data.name, "hash": digest, **choice.about()}
    train = kept["train"][0].index_select(0, choice.splits["train"].rows)
    about["views"] = {v: channel_moments(train[:, own]) for v, own in places.items()}
    about["channels"] = {v: [channels[k] for k in own] for v, own in places.items()}
    about["input"] = [len(places["x"]), options.crop or length]
    if options.part != "all":
        about["selection"] = f"{about['selection']} {options.part} of the train rows".strip()
    about.update(licence=data.licence, source=data.source)
    return Splits(sources, edition, about)


def _places(
    view: str, names: Sequence[str], channels: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> list[int]:
    found: list[int] = []
    for name in names:
        known = groups.get(name, [name] if name in channels else [])
        if not known:
            told = nearest(name, [*groups, *channels])
            raise OptionError({"views": f"the view '{view}' names the sensor '{name}'{told}"})
        found += [list(channels).index(channel) for channel in known]
    return found


def channel_moments(series: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel (N, C, T)."""
    wide = series.double()
    spread = wide.std(dim=(0, 2), correction=0).clamp(min=1e-6)
    return {"mean": wide.mean(dim=(0, 2)).tolist(), "std": spread.tolist()}
