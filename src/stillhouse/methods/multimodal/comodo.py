r"""COMODO: a wearable's encoder learns from a camera's, without labels, through a queue.

Clips of two modalities are recorded at the same time. A frozen teacher sees one of them (video),
the student the other (accelerometer and gyroscope). The student does not regress the teacher's
vector; it learns where its clip lies among many clips of the teacher.

Stage "embed": every clip is embedded once by the teacher and a projector that is random and never
trained, :math:`z^v = \mathrm{unit}(\mathrm{MLP}_T(h))`, MLP = Linear, BatchNorm, GELU, Linear; in
eval mode its BatchNorm is the identity (but for eps).

Stage "queue": N clips of the training data are drawn; their vectors, in the data's order, are the
first queue Q. They are not trained on in epoch 0 and join the training from epoch 1 on.

Stage "student": for a batch of B clips, with :math:`z^x = \mathrm{unit}(\mathrm{MLP}_S(f(x)))` and
:math:`Q^+ = [Q; z^v_1 .. z^v_B]` (constant),

.. math::
    L = -\frac{1}{B} \sum_b \sum_j P_{bj} \log p_{bj}, \quad
    P_b = \mathrm{softmax}_j(z^v_b Q^+_j / \tau_T), \quad
    p_b = \mathrm{softmax}_j(z^x_b Q^+_j / \tau_S);

then the oldest B rows leave the queue, which so holds vectors of the teacher only. MLP_S leaves at
the end. The encoder's features are judged by an SVM (task "representation").

Where paper and released code (Breezelled/COMODO) differ, and what stands here:

- Anchors of a clip: N + 1 in the paper (the queue and its own vector), N + B in the code (the
  whole batch is appended first). Here N + B. Older copies of a clip stay in the queue as well.
- The student's temperature is the LOWER one (.05 against .1), contrary to SEED, from which the
  loss comes; variant "seed-temperatures" has SEED's order.
- The code counts the steps of its schedule wrongly, adding the number of queued CLIPS to that of
  BATCHES, so that the warm-up is far too long and the rate never reaches 0: setting
  `faithful_schedule`, variant "official". By default the true number is taken.
- The code seeds MLP_T anew with each run and does not name it in its cache of vectors. Here its
  seed is a setting of its own, and its weights are part of the store's fingerprint.

Under several processes or micro-batches the anchors are those of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Source, Without, read_rows, together
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.losses.contrastive import anchor_cross_entropy
from stillhouse.method import Card, Claim, Method, MethodConfig, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.across import whole_batch
from stillhouse.parts.projector import Projector
from stillhouse.parts.ring import Ring
from stillhouse.parts.schedule import Schedule, warmup_linear
from stillhouse.recipe import StoreSpec
from stillhouse.stages.capture import Captured
from stillhouse.stages.vector_widths import LEARNED, student_width, teacher_width
from stillhouse.teacher import Knowledge, Teacher
from stillhouse.teachers.projected import EMBEDDING, Answered, Projected

ANCHOR = "anchor"


class COMODOObjective(Objective):
    """The student's similarities to the teacher's vectors, against the teacher's own.

    Batches hold the student's view and "anchor" (B, D), the teacher's unit vectors.

    Args:
        student: net with embedding (B, E).
        projector: MLP_S, from E to D; None when the features are compared themselves.
        queue: (N, D) first rows of the queue, oldest first.
        config: see `COMODO.Config`.

    Attributes:
        queue: the ring of the teacher's vectors.
        reads: the view that the student reads.
    """

    def __init__(
        self, student: Net, projector: Projector | None, queue: Tensor, config: COMODO.Config
    ) -> None:
        super().__init__(student)
        self.projector = projector
        self.queue = Ring(len(queue), {"vector": queue})
        self.config = config
        self.reads = student.view

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """The vectors of the global batch are anchors of this step, and then enter the queue."""
        anchors = whole_batch(batch.view(ANCHOR), batch.of, clock)
        self.scratch["anchors"] = anchors
        self.queue.propose(vector=anchors)
        return batch

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `match`, a mean over rows."""
        if batch.size == 0:  # a last batch that is smaller than the number of processes
            return {}
        ours, theirs = self.embed(batch.view(self.reads)), batch.view(ANCHOR)
        if self.config.loss == "l2":
            # The mean is over all numbers, as in the released L2 baseline.
            return {"match": F.mse_loss(F.normalize(ours, dim=-1), theirs.to(ours.dtype))}
        anchors = torch.cat([self.queue.slots(), self.scratch.get("anchors", theirs)])
        loss = anchor_cross_entropy(
            ours,
            theirs,
            anchors,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature,
        )
        return {"match": loss}

    def embed(self, view: Any) -> Tensor:
        """The student's vectors in the teacher's space, (B, D), not yet of unit length."""
        features = self.student(view)["embedding"]
        return wide(features if self.projector is None else self.projector(features))


class COMODO(Method):
    """Label-free distillation from one modality into another through a queue of anchors."""

    card = Card(
        id="comodo",
        title=(
            "COMODO: Cross-Modal Video-to-IMU Distillation for Efficient Egocentric Human "
            "Activity Recognition"
        ),
        summary="Another modality's encoder teaches, without labels, by similarities to a queue.",
        paper="arXiv 2503.07259",
        year=2025,
        authors=(
            "Baiyu Chen",
            "Wilson Wongso",
            "Zechen Li",
            "Yonchanok Khaokaew",
            "Hao Xue",
            "Flora Salim",
        ),
        links=("https://arxiv.org/abs/2503.07259", "https://github.com/Breezelled/COMODO"),
        room="multimodal",
        task="representation",
        needs=("vector",),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("capture?", "capture"),
            ("embed?", "capture"),
            ("queue", "closed"),
            ("student", "train"),
        ),
    )

    class Config(MethodConfig):
        """Settings of `comodo`."""

        queue: int = Field(
            16384,
            ge=1,
            description="N, anchors in the queue; fewer than the training rows, and no fewer "
            "than a batch",
            json_schema_extra={
                "source": "code, train.py default (Ego4D); 1024 EgoExo4D, 2048 UESTC-MMEA"
            },
        )
        queue_seed: int = Field(
            16349,
            ge=0,
            lt=2**32,
            description="of the choice of the first rows in the queue",
            json_schema_extra={"source": "code, train.py"},
        )
        teacher_temperature: float = Field(
            0.1,
            gt=0,
            description="tau_T, of the teacher's similarities",
            json_schema_extra={"source": "code, train.py"},
        )
        student_temperature: float = Field(
            0.05,
            gt=0,
            description="tau_S, of the student's: lower than the teacher's",
            json_schema_extra={"source": "code, train.py"},
        )
        projector: bool = Field(
            True,
            description="compare in the space of the projectors; false: the features themselves, "
            "which must be as wide as the teacher's",
            json_schema_extra={"source": "code, model_util.py"},
        )
        hidden: int = Field(
            2048,
            ge=1,
            description="hidden width of both projectors",
            json_schema_extra={"source": "code, model_util.py"},
        )
        width: int = Field(
            128,
            ge=1,
            description="D, width of the space they map into",
            json_schema_extra={"source": "code, model_util.py"},
        )
        projector_seed: int = Field(
            42,
            ge=0,
            lt=2**32,
            description="of the teacher's random projector, equal in all runs",
            json_schema_extra={"source": "code: the run's seed, 42; a setting here, see above"},
        )
        loss: Literal["match", "l2"] = Field(
            "match",
            description="match: similarities to the anchors; l2: the mean square difference of "
            "the two unit vectors",
            json_schema_extra={"source": "code, loss.py: COMODOLoss and the baseline L2"},
        )
        schedule: Literal["linear", "budget"] = Field(
            "linear",
            description="of the learning rate: linear warm-up and decay; budget: as the recipe's "
            "budget says",
            json_schema_extra={"source": "code, train.py"},
        )
        warmup: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="share of the steps that the rate rises",
            json_schema_extra={"source": "code, train.py"},
        )
        faithful_schedule: bool = Field(
            False,
            description="the released count of steps, which adds clips to batches",
            json_schema_extra={"source": "code, train.py"},
        )
        cache: bool = Field(
            True,
            description="embed every clip once; false asks the teacher at every step, for views "
            "that are augmented without end",
            json_schema_extra={"source": "code: cached"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={"queue": 16384, "faithful_schedule": True},
            about="settings and schedule of the released code",
            budget={"lr": 3e-4, "batch": 128, "epochs": 20, "optimizer": "adamw"},
        ),
        "official-schedule": Variant(
            set={"faithful_schedule": True}, about="only the released count of steps"
        ),
        "l2": Variant(set={"loss": "l2"}, about="regression onto the same vectors"),
        "seed-temperatures": Variant(
            set={"teacher_temperature": 0.05, "student_temperature": 0.1},
            about="the teacher's distribution is the sharper one, as in SEED",
        ),
        "queue-64": Variant(set={"queue": 64}, about="a queue of 64 anchors"),
        "no-projector": Variant(
            set={"projector": False}, about="features of equal width, compared themselves"
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the untrained encoder", "accuracy", "comodo", "random-encoder"),
        Claim("beats regression onto the same vectors", "accuracy", "comodo", "comodo/l2"),
        Claim("beats InfoNCE", "accuracy", "comodo", "infonce"),
        Claim(
            "the size of the queue hardly matters (64 anchors against the recipe's)",
            "accuracy",
            "comodo",
            "comodo/queue-64",
            expect="equal",
            margin=0.02,
        ),
        Claim(
            "the sharper distribution belongs to the student, not to the teacher",
            "accuracy",
            "comodo",
            "comodo/seed-temperatures",
        ),
        Claim(
            "comes within two points of training with the labels",
            "accuracy",
            "comodo",
            "supervised",
            margin=-0.02,
        ),
        Claim(
            "the teacher's own modality is the upper line",
            "accuracy",
            "comodo",
            "teacher",
            expect="lower",
        ),
    ]

    def run(self, job: Any) -> Artifact:
        """Embed, fill the queue, train the student."""
        self.check(job)
        teacher, student = self.projected(job, job.teacher()), job.student()
        clips = self.embedded(job, teacher)
        queued = self.first_queue(job, clips)
        objective = self.objective(job, student, queued["vectors"])
        order = Without(self.order(job, clips), {0: queued["rows"]})
        job.fit(
            "student",
            objective,
            order,
            schedule=self.schedule(job, order),
            validate=self.zero_shot(job, teacher, objective),
        )
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def check(self, job: Any) -> None:
        """Before any training: does the queue fit the data, the schedule the budget?

        Raises:
            RecipeError: the queue is as large as the data, or smaller than a batch; the released
                schedule without a number of epochs.
        """
        size, whole, batch = self.config.queue, len(self.clips(job)), job.budget.batch
        if not batch <= size <= whole - 1:
            raise RecipeError(
                f"a queue of {size} does not fit {whole} training rows in batches of {batch}: its "
                f"rows wait in epoch 0, so it holds at most {whole - 1}, and no fewer than a "
                "batch (settings: {queue: ...})"
            )
        if self.config.faithful_schedule and job.budget.epochs is None:
            raise RecipeError("the released schedule counts epochs: give budget: {epochs: ...}")

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """What was compared with what, for the report."""
        channels = job.task.about.get("channels", {})
        rows: list[list[Any]] = [
            ["clips learned from, without labels", len(self.clips(job))],
            ["of them in the first queue", self.config.queue],
            ["anchors of a clip", self.config.queue + job.budget.batch],
        ]
        if isinstance(channels, dict):
            rows += [[f"view {view}", ", ".join(names)] for view, names in channels.items()]
        return {"tables": [{"title": "Clips and anchors", "columns": ["what", ""], "rows": rows}]}

    # ---- A: the teacher's vectors -----------------------------------------------------------

    def projected(self, job: Any, teacher: Teacher) -> Projected:
        """The teacher behind the frozen random projector."""
        if not self.config.projector:
            return Projected(teacher, None)
        projector = Projector(
            teacher_width(job, teacher),
            self.config.width,
            "mlp",
            hidden=self.config.hidden,
            trainable=False,
            seed=self.config.projector_seed,
        )
        return Projected(teacher, projector.to(job.device))

    def clips(self, job: Any) -> Source:
        """What is learned from: all training rows, also those without labels."""
        return together(job.splits, self._roles(job))

    def _roles(self, job: Any) -> list[str]:
        return [role for role in LEARNED if role in job.splits]

    def embedded(self, job: Any, teacher: Projected) -> Answered:
        """The clips with the teacher's vectors, each computed once."""
        answers: Teacher = teacher
        if self.config.cache:
            spec = StoreSpec(dtype="float32", draws=self._draws(job))
            answers = Captured(job.child("embed"), teacher, spec, self._roles(job))
        answers.bind([EMBEDDING], job.task)
        answers.to(job.device)  # type: ignore[attr-defined]
        return Answered(
            self.clips(job), answers, ANCHOR, collate=job.task.collate, device=job.device
        )

    def _draws(self, job: Any) -> int | None:
        store = getattr(job.recipe.teacher, "store", None)
        return None if store is None else store.draws

    # ---- B: the queue -----------------------------------------------------------------------

    def first_queue(self, job: Any, clips: Answered) -> dict[str, Tensor]:
        """{"rows": (N,) positions that wait until epoch 1, "vectors": (N, D)}."""

        def made() -> dict[str, Tensor]:
            rows = queue_rows(len(clips), self.config.queue, self.config.queue_seed)
            blocks = [
                clips.read(block, None)[ANCHOR].float().cpu() for block in torch.split(rows, 256)
            ]
            return {"rows": rows, "vectors": torch.cat(blocks)}

        found: dict[str, Tensor] = job.once("queue", made)
        return found

    # ---- C: the student ---------------------------------------------------------------------

    def objective(self, job: Any, student: Net, queue: Tensor) -> COMODOObjective:
        """The loss on a student, with its projector.

        Raises:
            ModelError: without projectors the widths differ.
        """
        width, wanted = student_width(job, student), queue.shape[1]
        projector = None
        if self.config.projector:
            made = job.build(
                lambda: Projector(width, wanted, "mlp", hidden=self.config.hidden), "projector"
            )
            assert isinstance(made, Projector)
            projector = made
        elif width != wanted:
            raise ModelError(
                f"without projectors the student's features ({width}) must be as wide as the "
                f"teacher's ({wanted}); set projector: true"
            )
        return COMODOObjective(student, projector, queue.to(job.device), self.config)

    def order(self, job: Any, clips: Answered) -> Any:
        """The clips in a new order each epoch."""
        order = job.order("train")
        order.source = clips
        reads = getattr(clips.teacher, "reads", None)
        if reads is not None:
            reads(_Read(clips.source, order), job.views().seed)
        return order

    def schedule(self, job: Any, order: Without) -> Schedule | None:
        """The rate's linear rise and fall, over the true or the released number of steps."""
        if self.config.schedule == "budget":
            return None
        budget = job.budget
        epochs = budget.epochs or 1
        total = budget.steps or order.steps_in(epochs)
        if self.config.faithful_schedule:
            total = released_steps(order.steps_in(1), self.config.queue, epochs)
        return warmup_linear(int(self.config.warmup * total), total)

    def zero_shot(
        self, job: Any, teacher: Projected, objective: COMODOObjective
    ) -> Callable[[], dict[str, float]] | None:
        """What the paper watches while training; None without labelled validation rows.

        A clip's class is that of the nearest anchor: the teacher's vector of the first
        validation clip of each class.
        """
        if "val" not in job.splits or not job.task.about.get("classes"):
            return None

        def watched() -> dict[str, float]:
            figures: dict[str, float] = job.evaluate(objective.export(), "val")
            figures["zero_shot"] = _zero_shot(job, teacher, objective)
            return figures

        return watched

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny series CNNs, each on its own of two generated sensors."""
        options = {"channels": 3, "widths": [4], "kernel": 3}
        return {
            "method": "comodo",
            "data": {"name": "generated", "options": {"kind": "series"}},
            "teacher": {"model": "stillhouse:series_cnn", "options": {**options, "reads": "other"}},
            "student": {"model": "stillhouse:series_cnn", "options": options},
            "settings": {"queue": 16, "hidden": 16, "width": 8},
            "budget": {"epochs": 2, "batch": 16, "lr": 0.003},
            "seed": seed,
        }


class _Read:
    """How an order reads its data, for the check of a store: the data without the answers."""

    def __init__(self, source: Source, order: Any) -> None:
        self.source, self.draws, self.augment = source, order.draws, order.augment


def queue_rows(count: int, size: int, seed: int = 16349) -> Tensor:
    """The positions whose vectors fill the queue, ascending (released train.py).

    Numpy's legacy generator draws them without replacement, so they are those of the released
    code for the same numbers.

    Args:
        count: n, training rows.
        size: N, at most n.
        seed: of the draw.

    Returns:
        (N,) int64.
    """
    drawn = np.random.RandomState(seed).choice(count, size, replace=False)
    return torch.from_numpy(np.sort(drawn).astype(np.int64))


def released_steps(first: int, queue: int, epochs: int) -> int:
    """Steps as the released train.py counts them: len + (len + N) (epochs - 1).

    Args:
        first: batches of epoch 0.
        queue: N, rows that join in epoch 1.
        epochs: of the training.
    """
    return first + (first + queue) * (epochs - 1)


def nearest_anchor(student: Tensor, anchors: Tensor) -> Tensor:
    """The anchor with the largest cosine to each vector.

    Args:
        student: (B, D).
        anchors: (K, D), one for each class.

    Returns:
        (B,) int64 in [0, K).
    """
    cosine = F.normalize(wide(student), dim=-1) @ F.normalize(wide(anchors), dim=-1).T
    return cosine.argmax(1)


def _zero_shot(job: Any, teacher: Projected, objective: COMODOObjective) -> float:
    """The share of validation clips whose nearest anchor is that of their class."""
    source, task = job.splits["val"], job.task
    first: dict[int, Tensor] = {}
    teacher.bind([EMBEDDING], task)
    order = job.order("val", task.evaluation_batch, shuffle=False, augment=False)
    batches = [
        read_rows(source, rows, None, task.collate).to(job.device)
        for rows in order.epoch(0, lambda: torch.Generator())
    ]
    for batch in batches:
        vectors = teacher.knowledge(batch).tensor("embedding")
        for row, label in enumerate(batch["target"].tolist()):
            first.setdefault(label, vectors[row])
    labels = sorted(first)
    anchors = torch.stack([first[label] for label in labels])
    numbers = torch.tensor(labels, device=job.device)
    training, right, seen = objective.training, 0, 0
    objective.eval()
    with torch.no_grad():
        for batch in batches:
            found = nearest_anchor(objective.embed(batch.view(objective.reads)), anchors)
            right += int((numbers[found] == batch["target"]).sum())
            seen += batch.size
    objective.train(training)
    return right / seen
