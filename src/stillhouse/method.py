"""One paper is one method: a card, a typed configuration, claims, and a `run` to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from stillhouse.errors import RecipeError

if TYPE_CHECKING:
    from stillhouse.artifact import Artifact
    from stillhouse.objective import Objective


@dataclass(frozen=True)
class Card:
    """What a catalogue shows of an entry. Written as a literal: it is read without import.

    Attributes:
        id: as recipes name it; hyphens.
        title: the paper's title.
        summary: one sentence for the table of methods.
        paper: where it appeared.
        year: of publication.
        authors: of the paper.
        links: paper and code.
        room: what is distilled (images, datasets, dense, language ...).
        task: the task it runs on by default.
        needs: capabilities asked of the teacher.
        yields: model, dataset, labels or analysis.
        stages: (name, kind) of each stage, in order; kinds: train, capture, label, closed,
            synthesis, judge. A name ending in "?" runs only under some settings.
        kind: "method" or "baseline".
        reconstructed: parts of the algorithm are inferred, as its docstring says.
    """

    id: str
    title: str
    summary: str
    paper: str = ""
    year: int = 0
    authors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    room: str = ""
    task: str = "classification"
    needs: tuple[str, ...] = ()
    yields: Literal["model", "dataset", "labels", "analysis"] = "model"
    stages: tuple[tuple[str, str], ...] = ()
    kind: Literal["method", "baseline"] = "method"
    reconstructed: bool = False


@dataclass(frozen=True)
class Claim:
    """A statement that a bench can support or refute.

    Attributes:
        text: in words.
        metric: the figure compared.
        ours: the side that should win: a method, baseline or "id/variant".
        than: the side it is compared with, in the same form, or "teacher"; or a number in
            quotes, which the figure is compared with.
        expect: "higher", "lower" or "equal" (within the margin).
        margin: the least difference that counts, in the metric's unit.
        than_metric: the figure of `than`, where it is another one ("" for the same).
    """

    text: str
    metric: str
    ours: str
    than: str
    expect: Literal["higher", "lower", "equal"] = "higher"
    margin: float = 0.0
    than_metric: str = ""


@dataclass(frozen=True)
class Variant:
    """Named settings of a method: an ablation, or "official" for the released behaviour.

    Attributes:
        set: settings that differ from the defaults.
        about: what it stands for.
        budget: fields of the budget that differ.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict)


class MethodConfig(BaseModel):
    """Base of a method's settings; every field carries its help and its source.

    Attributes:
        shared: names of settings that belong to the problem rather than to the method. In a
            comparison the other side takes them over, where it has them too.
    """

    shared: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class Method:
    """One paper. Subclasses write `run` so that it reads like the paper's algorithm.

    Args:
        config: the validated settings.
    """

    card: ClassVar[Card]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    variants: ClassVar[Mapping[str, Variant]] = {}
    claims: ClassVar[Sequence[Claim]] = ()
    # Whether `judge` gives the teacher's figures too, as "teacher_NAME": it is not asked again.
    judges_teacher: ClassVar[bool] = False

    def __init__(self, config: MethodConfig | None = None) -> None:
        self.config: Any = self.Config() if config is None else config

    def run(self, job: Any) -> Artifact:
        """Do it: stages of `job`, then the artifact."""
        raise NotImplementedError

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """Figures of the artifact on the test split; probes and fresh trainings go here."""
        figures: dict[str, float] = job.task.judge(job, artifact.module, "test")
        return figures

    def check_teacher(self, job: Any, net: Any) -> None:
        """Refuse a network that cannot teach this method, before it is trained or asked.

        Args:
            job: of the run.
            net: the teacher's. One whose logits are asked for must know the task's classes; others
                are checked by what is wanted of them.
        """
        if "logits" in self.card.needs:
            job.task.check(None, net)

    def teacher(self, job: Any, artifact: Artifact) -> Any:
        """Who teaches when this run is the teacher of another recipe.

        Returns:
            A Teacher that answers as the artifact's module does, but cheaper; None: the module
            itself, asked live.
        """
        return None

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Further sections of the report: {"tables": [...], "images": [...], ...}."""
        return {}

    def forecast(self, job: Any) -> dict[str, Any]:
        """What a dry run adds to its plan, such as the price of labelling; does nothing."""
        return {}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """The smallest recipe of its kind, on generated tensors; runs in under 2 seconds."""
        raise RecipeError(f"'{cls.card.id}' has no example recipe")


class StudentTraining(Method):
    """A method that is one training of a student: it writes only its objective."""

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """The objective that trains `student` (a Net)."""
        raise NotImplementedError

    def wants_teacher(self) -> bool:
        """Whether the run needs a teacher under the present settings."""
        return bool(self.card.needs)

    def run(self, job: Any) -> Artifact:
        """Teacher (given, or trained as a stage), then one training of the student."""
        teacher = job.teacher() if self.wants_teacher() else None
        student = job.student()
        objective = self.objective(job, student, teacher)
        job.fit("student", objective, self.order(job), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def order(self, job: Any) -> Any:
        """What is read, in which order: the training split."""
        return job.order("train")

    def training(self, job: Any) -> dict[str, Any]:
        """Further arguments of `job.fit`, such as the gradient."""
        return {}
