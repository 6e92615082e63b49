"""Errors written for the person who must mend what they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class StillhouseError(Exception):
    """Something the user can put right; the command line prints it without a traceback."""


class RecipeError(StillhouseError):
    """A recipe says something that cannot be: unknown name, wrong type, value out of range."""


class OptionError(RecipeError):
    """Options of a data set that cannot be.

    Attributes:
        wrong: option to what is wrong with it; "" for the options as a whole.
    """

    def __init__(self, wrong: Mapping[str, str]) -> None:
        super().__init__("\n".join(wrong.values()))
        self.wrong = dict(wrong)


class DataError(StillhouseError):
    """Data that is missing, empty, damaged, or does not fit the task."""


class ModelError(StillhouseError):
    """A model that cannot be found, built, or does not fit its role."""


class VocabularyError(ModelError):
    """A language model whose token ids stand for other text than those of the data."""


class TeacherError(StillhouseError):
    """A teacher that cannot give what a method wants, or a store or endpoint that fails."""


class CheckpointError(StillhouseError):
    """A checkpoint, store or journal that is damaged, or belongs to another run."""


class RunFolderError(StillhouseError):
    """A run folder that is in use, or holds another recipe's run."""


class TrainingError(StillhouseError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class FederationError(StillhouseError):
    """A client that cannot be reached, does not answer, or belongs to another run."""


class MissingExtra(StillhouseError):
    """A package that an extra brings is not installed."""

    def __init__(self, package: str, extra: str, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(
            f"the package '{package}' is not installed{reason}; "
            f"install it with: pip install 'stillhouse[{extra}]'"
        )
        self.package = package
        self.extra = extra


class Interrupted(StillhouseError):
    """The run was asked to stop (SIGINT or SIGTERM); its state has been saved.

    Attributes:
        signal: the number of the signal that asked.
    """

    signal: int = 2


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence part that names the known names nearest to `name`.

    Args:
        name: what was asked for.
        known: all names that exist.
        count: how many to name at most.

    Returns:
        `"; did you mean 'a' or 'b'?"`, or `"; known: a, b, c"` when nothing is near.
    """
    import difflib  # needed for mistakes only, and 4 ms of every start

    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{option}'" for option in close) + "?"
    if not options:
        return "; none are known"
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"; known: {shown}"
