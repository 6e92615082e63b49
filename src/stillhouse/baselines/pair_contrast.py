r"""InfoNCE: a text is nearer to what belongs to it than to what belongs to others in the batch.

.. math::
    L = -\frac{1}{B} \sum_i \log \frac{\exp(\cos(y_i, p_i) / \tau)}
        {\sum_j \exp(\cos(y_i, p_j) / \tau)}

What belongs to a text, :math:`p_i`, is the student's own vector of a random part of its words (a
pseudo pair: no teacher is asked), or the teacher's vector of the text, which is how pynife distils.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock, uniform_of
from stillhouse.errors import RecipeError
from stillhouse.losses.contrastive import infonce
from stillhouse.method import Card, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.stages.judge_vectors import judge_vectors, tables
from stillhouse.stages.vectors import ComparedConfig, distinct, remembered
from stillhouse.teacher import Knowledge, Want

_WORD = re.compile(r"\S+")


class PairContrastObjective(Objective):
    """The term `contrast`.

    Args:
        student: net with embedding (B, D).
        config: see `PairContrast.Config`.
    """

    batchwide = True
    student: Net

    def __init__(self, student: Net, config: PairContrast.Config) -> None:
        super().__init__(student)
        self.config = config
        self._view = student.view
        self.wants = (Want("embedding"),) if config.pairs == "teacher" else ()

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The mean over rows."""
        whole = batch.view(self._view)
        ours = self.student(whole)["embedding"]
        if self.config.pairs == "words":
            part = part_of(whole, batch["id"], clock.seed_for("part"), self.config.keep)
            theirs = self.student(part)["embedding"]
        else:
            theirs = knowledge.tensor("embedding").detach()
        return {"contrast": infonce(ours, theirs, temperature=self.config.temperature)}


def part_of(view: Any, ids: Tensor, seed: int, keep: float) -> Any:
    """A random part of each row: some words of a text, some numbers of a vector.

    Args:
        view: B strings, or (B, ...) numbers, of which the others become 0.
        ids: (B,) of the rows; the draw is a function of them and `seed`.
        seed: of the step.
        keep: chance of each word.
    """
    if isinstance(view, Tensor):
        flat = view.flatten(1)
        kept = uniform_of(seed, ids, 0, flat.shape[1]).to(view.device) < keep
        return (flat * kept).reshape(view.shape)
    words = [_WORD.findall(text) for text in view]
    chance = uniform_of(seed, ids, 0, max(1, *map(len, words)))
    found = []
    for text, row, drawn in zip(view, words, chance.tolist(), strict=True):
        part = [word for word, value in zip(row, drawn) if value < keep]
        found.append(" ".join(part) or text)
    return found


class PairContrast(StudentTraining):
    """Contrast within a batch: an encoder trained its own way."""

    card = Card(
        id="pair-contrast",
        kind="baseline",
        title="Representation Learning with Contrastive Predictive Coding",
        summary="Contrast within a batch, of pseudo pairs or of the teacher's vectors.",
        paper="arXiv 1807.03748 (the loss)",
        year=2018,
        authors=("Aaron van den Oord", "Yazhe Li", "Oriol Vinyals"),
        links=("https://arxiv.org/abs/1807.03748", "https://github.com/stephantul/pynife"),
        room="baselines",
        task="embedding",
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(ComparedConfig):
        """Settings of `pair-contrast`."""

        pairs: Literal["words", "teacher"] = Field(
            "words",
            description="what belongs to a text: a random part of its words, or the teacher's "
            "vector",
            json_schema_extra={"source": "chosen here; pynife: teacher"},
        )
        temperature: float = Field(
            0.05,
            gt=0,
            description="of the cosines",
            json_schema_extra={"source": "as usual with sentence encoders (scale 20)"},
        )
        keep: float = Field(
            0.5,
            gt=0,
            lt=1,
            description="chance of a word to be in the part",
            json_schema_extra={"source": "chosen here"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "teacher": Variant(set={"pairs": "teacher"}, about="contrast of the teacher's vectors")
    }

    def wants_teacher(self) -> bool:
        """Only where the pairs are made of its vectors."""
        return bool(self.config.pairs == "teacher")

    def run(self, job: Any) -> Artifact:
        """The teacher's vectors, where they are asked for; then the student."""
        job = distinct(job)
        objective = self.objective(job, job.student(), None)
        teacher = remembered(job, self.config.cache) if self.wants_teacher() else None
        job.fit("student", objective, self.order(job), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def objective(self, job: Any, student: Net, teacher: Any) -> Objective:
        """The contrast of a batch.

        Raises:
            RecipeError: several processes, each of which would see a part of the batch.
        """
        if job.hardware.world > 1:
            raise RecipeError(
                "pair-contrast compares all rows of a batch; in "
                f"{job.hardware.world} processes each would see its own alone: run it in one "
                "(hardware: {devices: 1})"
            )
        return PairContrastObjective(student, self.config)

    def training(self, job: Any) -> dict[str, Any]:
        """The cycles of the learning rate, if there are any."""
        given: dict[str, Any] = self.config.training()
        return given

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The student alone, and beside the teacher where the recipe names one."""
        teacher = job.teacher() if job.has("teacher") else None
        return judge_vectors(job, artifact.module, teacher, widths=self.config.widths)

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Tables of the modes of use and of shortened vectors."""
        return {"tables": tables(artifact.meta["figures"], self.config.widths)}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny perceptron on generated vectors, judged on pairs of them."""
        return {
            "method": "pair-contrast",
            "task": "embedding",
            "data": {"name": "generated", "options": {"kind": "vectors", "pairs": True}},
            "student": {
                "model": "stillhouse:mlp",
                "options": {"widths": [8], "inputs": 6, "classes": 5},
            },
            "settings": {"widths": [2, 4]},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
