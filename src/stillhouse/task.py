"""What a batch is, how a model is called on it, how it is judged: the contract of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stillhouse.batch import Batch, Sample, Splits, read_rows, stack
from stillhouse.errors import RecipeError
from stillhouse.net import Net, Output

if TYPE_CHECKING:
    from stillhouse.artifact import Predictor
    from stillhouse.objective import Objective


class Metric(Protocol):
    """A figure over a split, gathered batch by batch.

    Attributes:
        higher_is_better: the sense of the first figure of `compute`.
    """

    higher_is_better: bool

    def update(self, out: Output, batch: Batch) -> None:
        """Take one batch in."""
        ...

    def totals(self) -> Tensor:
        """The sums kept so far, as one tensor that may be added over processes."""
        ...

    def take(self, totals: Tensor) -> None:
        """Replace the sums by those of all processes."""
        ...

    def compute(self) -> dict[str, float]:
        """The figures by name."""
        ...


class Task:
    """One kind of problem. Subclasses live in `tasks/`, one file each.

    Attributes:
        name: as a recipe says it.
        main_metric: the figure by which models are chosen and claims are judged.
        higher_is_better: the sense of `main_metric`.
        evaluation_batch: rows read at once while a split is judged.
        ragged: rows differ in length, so a store keeps what a teacher says of them by position.
        class_axis: where the classes lie in the logits: last, or second in maps (B, K, h, w).
    """

    name: ClassVar[str] = ""
    main_metric: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    evaluation_batch: ClassVar[int] = 256
    class_axis: ClassVar[int] = -1
    ragged: ClassVar[bool] = False

    def __init__(self, splits: Splits) -> None:
        self.splits = splits
        self.about: dict[str, Any] = splits.about

    def __deepcopy__(self, memo: Any) -> Task:
        # An objective that is copied (averages, shards) holds its task, never a second one.
        return self

    def collate(self, samples: list[Sample]) -> Batch:
        """Join samples of sources without a batched fast path."""
        return stack(samples)

    def first_rows(self, count: int = 1) -> Batch:
        """So many rows of the training data, or of what there is, by which models are tried."""
        split = "train" if "train" in self.splits else next(iter(self.splits))
        source = (self.splits.judging() if split == "test" else self.splits)[split]
        return read_rows(source, torch.arange(min(count, len(source))), None, self.collate)

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a model for this task: normalisation, call rule, taps."""
        raise NotImplementedError

    def loss(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The plain supervised terms."""
        raise NotImplementedError

    def objective(self, net: Net) -> Objective | None:
        """What the plain supervised training of a net is, where `loss` of its output is not all.

        For tasks whose training draws something for every batch, such as noise. None: `loss`.
        """
        return None

    def count(self, batch: Batch) -> int | Tensor:
        """What the terms of `loss` are means over: rows, unless some carry no label."""
        return batch.size

    def items(self, batch: Batch) -> Tensor | None:
        """Which positions of the logits count, bool of their leading shape; None for all."""
        return None

    def metrics(self) -> Mapping[str, Metric]:
        """Fresh metrics for one pass over a split."""
        raise NotImplementedError

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse, before any training, models or data that do not fit each other."""

    def predictor(self, net: Net) -> Predictor:
        """What is deployed: the module with what it takes to use it on raw input."""
        raise RecipeError(f"the task '{self.name}' has no predictor")

    def judge(self, job: Any, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Figures of a model on a split; the default runs `metrics` over it."""
        return dict(job.evaluate(model, split))

    def example_view(self, view: str = "x") -> Any:
        """One row of a view as a model reads it, for measuring size and speed; or None."""
        return None

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Sections of the report that every method of the task shares; `test` is open."""
        return {}

    def views(self) -> Sequence[str]:
        """Names of the views a model may be called on."""
        return ("x",)
