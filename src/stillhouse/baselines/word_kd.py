r"""Distillation word by word: soft targets of a language model at every response token.

.. math::
    L = (1 - \alpha)\, CE(z, y) + \alpha\, T^2\, \frac{1}{N} \sum_i KL(\sigma(t_i / T) \,\|\,
    \sigma(z_i / T))

over the N response tokens of the batch, with student and teacher logits :math:`z_i, t_i` for token
i of a given response (Kim and Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, section
3.1). Prompts and padding do not count. A store may keep the likeliest tokens alone, the rest of
the mass as one number (`teacher: {store: {form: topk}}`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, TeacherError
from stillhouse.losses.logits import Tail, kl, topk_kl
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, TopK, Want


class WordKDObjective(Objective):
    """The task's loss, and the divergence at every response token.

    Args:
        student: net with logits (B, L, V).
        task: says which positions of the logits count (`Task.items`).
        config: see `WordKD.Config`.

    Raises:
        ModelError: the task counts no positions: it is not one of tokens.
    """

    wants = (Want("logits"),)

    def __init__(self, student: Net, task: Task, config: WordKD.Config) -> None:
        if type(task).items is Task.items:
            raise ModelError(
                f"word-kd compares answers token by token, and {task.name} has no tokens: take kd, "
                "or data of the task text-generation (e2e_nlg, prompt_responses)"
            )
        super().__init__(student)
        self._view = student.view
        self._task_loss, self._items = task.loss, task.items
        self.config = config

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `logits`."""
        out = self.student(batch.view(self._view))
        alpha, terms = self.config.alpha, dict[str, Tensor]()
        if alpha < 1:
            task = self._task_loss(out, batch)
            terms.update({name: (1 - alpha) * value for name, value in task.items()})
        if alpha > 0:
            items = self._items(batch)
            assert items is not None
            valid = knowledge.valid
            if valid is not None:
                valid = valid[:, None].expand_as(items)[items]
            found = self.divergence(out["logits"][items], _of(knowledge["logits"], items), valid)
            terms["logits"] = alpha * self.config.temperature**2 * found
        return terms

    def divergence(self, student: Tensor, teacher: Any, valid: Tensor | None = None) -> Tensor:
        """The mean KL(teacher || student) at the temperature, before its factor T squared.

        Args:
            student: (N, V) logits of response tokens.
            teacher: (N, V) logits, or the tokens that a store has kept of each.
            valid: (N,) tokens on which the teacher has spoken; None for all.
        """
        if isinstance(teacher, TopK):
            # a store that forgot the rest says so by a rest of log 0, which adds nothing
            tail: Tail = "tail" if teacher.weights is None else "sample"
            return topk_kl(student, teacher, tail=tail, mask=valid, scale=False)
        return kl(student, teacher, temperature=self.config.temperature, mask=valid, scale=False)

    def count(self, batch: Batch) -> int | Tensor:
        """Response tokens."""
        items = self._items(batch)
        assert items is not None
        return items.sum()


def _of(teacher: Any, items: Tensor) -> Any:
    """What was said at the positions that count, one below another."""
    if not isinstance(teacher, TopK):
        return teacher[items]
    weights = None if teacher.weights is None else teacher.weights[items]
    kept = (teacher.ids[items], teacher.logp[items], teacher.rest[items])
    return TopK(*kept, teacher.temperature, weights)


class WordKD(StudentTraining):
    """Soft targets of a language model at every response token, beside the text."""

    card = Card(
        id="word-kd",
        kind="baseline",
        title="Word-level knowledge distillation",
        summary="Soft targets of a language model at every response token, beside the text.",
        paper="section 3.1 of Sequence-Level Knowledge Distillation, EMNLP 2016",
        year=2016,
        authors=("Yoon Kim", "Alexander M. Rush"),
        links=("https://arxiv.org/abs/1606.07947",),
        room="baselines",
        task="text-generation",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `word-kd`."""

        alpha: float = Field(
            0.5,
            ge=0,
            le=1,
            description="weight of the soft targets; the text has 1 - alpha",
            json_schema_extra={"source": "paper, section 5: mixtures of both"},
        )
        temperature: float = Field(
            1.0,
            gt=0,
            description="softens both distributions",
            json_schema_extra={"source": "paper: 1"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "soft-only": Variant(set={"alpha": 1.0}, about="no text of the data at all"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "rouge_l", "word-kd", "supervised"),
    ]

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Text and soft targets.

        Raises:
            TeacherError: a store of the likeliest tokens was asked for at another temperature.
        """
        store: Any = getattr(getattr(job.recipe, "teacher", None), "store", None)
        told = self.config.temperature
        thin = store is not None and store.form != "dense"
        if teacher is not None and thin and store.temperature != told:
            raise TeacherError(
                f"the store keeps probabilities at temperature {store.temperature:g}, the "
                f"method runs at {told:g}: capture with store: {{temperature: {told:g}}}"
            )
        return WordKDObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not at alpha 0."""
        return bool(self.config.alpha > 0)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny language models on generated sentences."""
        model = "stillhouse:causal_lm"
        return {
            "method": "word-kd",
            "data": {"name": "generated_prompts", "options": {"prompts": 8}},
            "teacher": {"model": model, "options": {"layers": 1, "width": 16, "heads": 2}},
            "student": {"model": model, "options": {"layers": 1, "width": 8, "heads": 1}},
            "budget": {"steps": 4, "batch": 4, "lr": 0.01},
            "seed": seed,
        }
