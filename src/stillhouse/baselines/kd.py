r"""Knowledge distillation (Hinton, Vinyals, Dean 2015).

With student logits :math:`z`, teacher logits :math:`t`, labels :math:`y` and temperature
:math:`T`:

.. math::
    L = (1 - \alpha)\, CE(z, y) + \alpha\, T^2\, D(\sigma(t / T), \sigma(z / T))

where :math:`D` is the forward Kullback-Leibler divergence KL(teacher || student) by default.
It is the true divergence: below the cross-entropy of the paper by the teacher's entropy, which
has no gradient. The factor :math:`T^2` keeps the gradient's size when the temperature changes
(section 2.1 of the paper). Other directions and the Jensen-Shannon divergence are settings.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import TeacherError
from stillhouse.losses.logits import Direction, Tail, kl, topk_kl
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, TopK, Want

_DIRECTIONS: dict[str, Direction] = {
    "forward": "forward",
    "reverse": "reverse",
    "symmetric": "symmetric",
    "jsd": "js",
    "skewed-forward": "skewed_forward",
    "skewed-reverse": "skewed_reverse",
}


class KDObjective(Objective):
    """The weighted sum of the task's loss and the divergence from the teacher.

    Args:
        student: net with logits (B, K).
        task: whose loss the labels use.
        config: see `KD.Config`.
    """

    wants = (Want("logits"),)

    def __init__(self, student: Net, task: Task, config: KD.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `logits`."""
        out = self.student(batch.view("x"))
        alpha = self.config.alpha
        terms: dict[str, Tensor] = {}
        if alpha < 1:
            task = self._loss(out, batch)
            terms.update({name: (1 - alpha) * value for name, value in task.items()})
        if alpha > 0:
            found = self.divergence(out["logits"], knowledge["logits"], knowledge.valid)
            # One product, not two: on small steps each operation is felt.
            terms["logits"] = alpha * self.config.temperature**2 * found
        return terms

    def divergence(self, student: Tensor, teacher: Any, valid: Tensor | None = None) -> Tensor:
        """The divergence at the temperature, before the factor of the temperature squared.

        Args:
            student: (B, K) logits.
            teacher: (B, K) logits, or the classes that a store has kept.
            valid: (B,) rows on which the teacher has spoken; None for all.

        Returns:
            The mean over these rows.

        Raises:
            TeacherError: kept classes do not serve these settings.
        """
        config = self.config
        if isinstance(teacher, TopK):
            refuse_kept(config, teacher.temperature)
            # a store that forgot the rest says so by a rest of log 0, which adds nothing
            tail: Tail = "tail" if teacher.weights is None else "sample"
            return topk_kl(student, teacher, tail=tail, mask=valid, scale=False)
        return kl(
            student,
            teacher,
            temperature=config.temperature,
            direction=_DIRECTIONS[config.direction],
            beta=config.beta,
            skew=config.skew,
            mask=valid,
            scale=False,
        )


def refuse_kept(config: KD.Config, temperature: float) -> None:
    """Refuse a store of kept classes that does not serve the settings.

    Raises:
        TeacherError: it was taken at another temperature, which cannot be changed afterwards,
            or another direction needs all classes.
    """
    if config.direction != "forward":
        raise TeacherError(
            f"direction '{config.direction}' needs the teacher's probability of every class; the "
            "store keeps some: capture it with form: dense, or use direction: forward"
        )
    if temperature != config.temperature:
        raise TeacherError(
            f"the store keeps probabilities at temperature {temperature:g}, the method runs at "
            f"{config.temperature:g}: capture with store: {{temperature: {config.temperature:g}}}"
        )


class KD(StudentTraining):
    """Hinton's distillation: soft targets of the teacher beside the labels."""

    card = Card(
        id="kd",
        kind="baseline",
        title="Distilling the Knowledge in a Neural Network",
        summary="Soft targets of the teacher at a temperature, beside the labels.",
        paper="NIPS 2014 Deep Learning Workshop; arXiv 1503.02531",
        year=2015,
        authors=("Geoffrey Hinton", "Oriol Vinyals", "Jeff Dean"),
        links=("https://arxiv.org/abs/1503.02531",),
        room="baselines",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `kd`."""

        alpha: float = Field(
            0.9,
            ge=0,
            le=1,
            description="weight of the soft targets; the labels have 1 - alpha",
            json_schema_extra={"source": "paper, section 2: a much lower weight on hard targets"},
        )
        temperature: float = Field(
            4.0,
            gt=0,
            description="softens both distributions",
            json_schema_extra={"source": "common practice; the paper tries 1 to 20"},
        )
        direction: Literal[
            "forward", "reverse", "symmetric", "jsd", "skewed-forward", "skewed-reverse"
        ] = Field(
            "forward",
            description="forward is KL(teacher || student); reverse KL(student || teacher); "
            "the skewed ones compare with a mixture of both",
            json_schema_extra={"source": "paper: forward; GKD: jsd; DistiLLM: skewed"},
        )
        beta: float = Field(
            0.5,
            ge=0,
            le=1,
            description="of jsd: the teacher's share of the mixture, 0 equals forward, 1 reverse; "
            "of symmetric: the weight of the forward side",
            json_schema_extra={"source": "GKD (Agarwal et al. 2024), equation 1"},
        )
        skew: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="of the skewed directions: the own distribution's share of the mixture",
            json_schema_extra={"source": "DistiLLM (Ko et al. 2024): 0.1"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "reverse": Variant(set={"direction": "reverse"}, about="KL(student || teacher)"),
        "symmetric": Variant(set={"direction": "symmetric"}, about="both directions, half each"),
        "jsd": Variant(set={"direction": "jsd"}, about="Jensen-Shannon divergence"),
        "skewed-forward": Variant(
            set={"direction": "skewed-forward"}, about="KL(teacher || mixture), as in DistiLLM"
        ),
        "skewed-reverse": Variant(
            set={"direction": "skewed-reverse"}, about="KL(student || mixture), as in DistiLLM"
        ),
        "soft-only": Variant(set={"alpha": 1.0}, about="no labels at all"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "kd", "supervised"),
        Claim("beats label smoothing at equal steps", "accuracy", "kd", "label-smoothing"),
    ]

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels and soft targets.

        Raises:
            TeacherError: the recipe asks for a store that does not serve the settings.
        """
        store = getattr(getattr(job.recipe, "teacher", None), "store", None)
        if store is not None and store.form != "dense" and teacher is not None:
            refuse_kept(self.config, store.temperature)
        return KDObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not at alpha 0."""
        return bool(self.config.alpha > 0)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "kd",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
