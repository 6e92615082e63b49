"""What a recipe may say about how data is read; every data set's options derive from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from stillhouse.errors import OptionError, nearest
from stillhouse.recipe import what_is_wrong

Augment = Literal["none", "crop", "flip", "crop+flip", "affine"]


class DataOptions(BaseModel):
    """Options of every data set."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    val: int | float | None = Field(
        None,
        description="rows (integer) or share (below 1) of train that are carved off for "
        "validation by the run's seed, 0 for none; only where the data has no val split of its "
        "own, and a tenth when not said",
    )

    @field_validator("val")
    @classmethod
    def _val_is_count_or_share(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value < 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a count of rows (integer >= 0) or a share in [0, 1)")
        return value


class ClassOptions(DataOptions):
    """Options of data whose rows have a class."""

    classes: int | list[int | str] | None = Field(
        None,
        description="keep only these classes, by name or number, renumbered in this order; "
        "an integer n keeps the first n",
    )
    modulo: int | None = Field(
        None,
        ge=2,
        description="join classes into so many: class y becomes y mod n, after all else is chosen "
        "by the original classes; which one it was stays known as the view 'subclass'",
    )
    subset: int | dict[str, int] | None = Field(
        None,
        description="rows to keep per official split ({train: 5000, test: 1000}; an integer "
        "means train), drawn by subset_seed, the same in every run; val is carved from them",
    )
    per_class: int | dict[str, int] | None = Field(
        None,
        description="rows to keep of every class, per official split (an integer means train)",
    )
    long_tail: float | None = Field(
        None,
        ge=1.0,
        description="imbalance ratio r of train: class c keeps n * r^(-c/(C-1)) rows, "
        "n = per_class or the rows of the smallest class",
    )
    subset_seed: int = Field(
        0, description="seed of subset, per_class and long_tail; not the run's seed"
    )
    label_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of train that keeps its labels, by the run's seed; the rest becomes "
        "the split 'unlabelled'",
    )
    labels_per_class: int | None = Field(
        None,
        ge=1,
        description="rows of every class of train that keep their labels (few-shot), by the "
        "run's seed; the rest becomes the split 'unlabelled'",
    )
    few_shot: int | float | None = Field(
        None,
        description="what students see of train: a share of its rows (below 1), or a count of "
        "rows of every class; drawn by the run's seed. Teachers are trained on all of it, which "
        "becomes the split 'full'",
    )
    drop_classes: list[int | str] = Field(
        default_factory=list,
        description="classes that students never see, by name or number; they keep their place "
        "in the head, in val and in test, and teachers are trained on them (split 'full')",
    )

    @field_validator("few_shot")
    @classmethod
    def _few_shot_is_count_or_share(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a count of rows (integer >= 1) or a share in (0, 1)")
        return value

    @model_validator(mode="after")
    def _labels_by_one_rule(self) -> ClassOptions:
        rules = ("label_fraction", "labels_per_class", "label_list")
        given = [rule for rule in rules if getattr(self, rule, None) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say who keeps a label; give one of them")
        return self

    @field_validator("classes")
    @classmethod
    def _at_least_two_classes(cls, value: int | list[int | str] | None) -> Any:
        if value is not None and (value if isinstance(value, int) else len(value)) < 2:
            raise ValueError("at least two classes are needed")
        return value

    @field_validator("subset", "per_class")
    @classmethod
    def _positive_counts(cls, value: int | dict[str, int] | None) -> Any:
        counts = value.values() if isinstance(value, dict) else [] if value is None else [value]
        if any(count < 1 for count in counts):
            raise ValueError("counts must be at least 1")
        return value


class OwnOptions(ClassOptions):
    """Options of the user's own labelled data."""

    path: str = Field(description="where the data is: as it stands, or below a data root")
    test: int | float | None = Field(
        None,
        description="rows (integer) or share (below 1) held out for the test by subset_seed; "
        "only where the data has no test split of its own, and a fifth when not said",
    )

    @field_validator("test")
    @classmethod
    def _test_is_count_or_share(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a count of rows (integer >= 1) or a share in (0, 1)")
        return value


class TextOptions(ClassOptions):
    """Options of labelled texts."""

    length: int = Field(32, ge=1, le=4096, description="hashed tokens per text, cut or padded")
    buckets: int = Field(
        8192, ge=16, le=1 << 24, description="number of hashed token ids (rows of an embedding)"
    )


class ImageOptions(ClassOptions):
    """Options of sets of small images that are kept in memory."""

    standard_augment: ClassVar[Augment] = "crop+flip"
    flips: ClassVar[bool] = True

    image_size: int | None = Field(
        None, ge=4, le=1024, description="height and width in pixels; None: as they are"
    )
    canvas: int | None = Field(
        None,
        ge=4,
        le=1024,
        description="height and width that images are centred in, with zeros around, after "
        "image_size; None: no border",
    )
    channels: Literal[1, 3] | None = Field(
        None, description="grey (1) or colour (3); None: as they are"
    )
    augment: Augment = Field(
        "none",
        description="of training reads: crop (random shift by up to an eighth of the size, "
        "zero padded), flip (left to right, half of the reads), affine (turned by up to 15 "
        "degrees, scaled by up to a fifth, sheared, shifted by up to a tenth); true: what is "
        "usual for the set",
    )

    @field_validator("augment", mode="before")
    @classmethod
    def _augment_by_switch(cls, value: Any) -> Any:
        if value is True:
            return cls.standard_augment
        return "none" if value is False or value is None else value

    @field_validator("augment")
    @classmethod
    def _no_flipped_digits(cls, value: Augment) -> Augment:
        if not cls.flips and "flip" in value:
            raise ValueError("a flipped digit is another sign; use 'crop' or 'none'")
        return value


Options = TypeVar("Options", bound=DataOptions)


def checked_options(name: str, model: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of data set `name`, typed, every default filled in.

    Raises:
        OptionError: an unknown option (the nearest are named), or a value that does not fit;
            every mistake is told at once.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        branches: dict[str, list[ErrorDetails]] = {}
        for entry in error.errors(include_url=False):
            branches.setdefault(str(entry["loc"][0]) if entry["loc"] else "", []).append(entry)
    raise OptionError({f: _sentence(name, model, f, told) for f, told in branches.items()})


def _sentence(
    name: str, model: type[BaseModel], field: str, entries: Sequence[ErrorDetails]
) -> str:
    """What is wrong with one option; a union reports once per member, with the same input."""
    kind = entries[0]["type"]
    if kind == "extra_forbidden":
        return f"the data set '{name}' has no option '{field}'{nearest(field, model.model_fields)}"
    if kind == "missing" and len(entries[0]["loc"]) == 1:
        about = model.model_fields[field].description or ""
        return f"the data set '{name}' needs the option '{field}': {about}"
    told = dict.fromkeys(what_is_wrong(entry, model) for entry in entries)
    whole, *others = told
    found = whole.partition(", found ")[2]
    if others and all(text.endswith(f", found {found}") for text in others):
        rights = [text.removesuffix(f", found {found}").removeprefix("must be ") for text in told]
        message = f"must be {' or '.join(rights)}, found {found}"
    else:
        message = "; or ".join(told)
    if kind == "value_error":
        message += f", found {entries[0]['input']!r}"
    return f"data option '{field}' of '{name}': {message}"
