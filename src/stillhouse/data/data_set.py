"""What a data set is to the registry: literal facts, typed options, a way to open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from stillhouse.batch import Splits
    from stillhouse.data.options import DataOptions

OptionsType = TypeVar("OptionsType", bound="DataOptions")


@dataclass(frozen=True)
class DataCard:
    """The facts of a data set, read from its file without importing it.

    Attributes:
        name: as a recipe says it.
        module: the file's import name, or `module:Class` of another package.
        cls: the class in it.
        title: one line on what it is.
        tasks: kinds of task it serves.
        licence: of the data, or that none is stated.
        source: where it comes from.
        files: names below a data root, in order of preference; one of them is enough.
        editions: sha256 of the content to the name of the edition, for known copies.
        edition: where there is only one (embedded or built data).
        rows: rows per official split of the best known edition.
        get: how to come by it where it cannot be downloaded.
    """

    name: str
    module: str
    cls: str = ""
    title: str = ""
    tasks: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    files: tuple[str, ...] = ()
    editions: Mapping[str, str] = field(default_factory=dict)
    edition: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    get: str = ""


class DataSet(Generic[OptionsType]):
    """One data set. Subclasses live in `data/`, one file each, and fill in the facts.

    The facts are literals, so that they are found without importing the file; their meaning
    is told at `DataCard`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ()
    licence: ClassVar[str] = ""
    source: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ()
    editions: ClassVar[Mapping[str, str]] = {}
    edition: ClassVar[str] = ""
    rows: ClassVar[Mapping[str, int]] = {}
    get: ClassVar[str] = ""

    Options: type[OptionsType]

    def open(self, options: OptionsType, seed: int) -> Splits:
        """Read the data.

        Args:
            options: validated, every default filled in.
            seed: the run's seed, for what may differ between runs.

        Returns:
            Its splits, with `edition` and in `about` what tasks need ("classes", "input",
            "mean", "std", "hash", ...). Without "val", the registry carves one off train.

        Raises:
            DataError: missing, damaged or unusable data.
        """
        raise NotImplementedError

    def edition_of(self, digest: str, stored: str = "") -> str:
        """The name of an edition: known by its hash, else what the file says, else its hash."""
        return self.editions.get(digest) or stored or f"own copy {digest[:12]}"
