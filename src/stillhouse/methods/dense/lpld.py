r"""LPLD: low-confidence pseudo-label distillation for source-free detection (ECCV 2024).

A detector trained elsewhere (the source) adapts to images without labels. Student and averaged
teacher begin as it. The teacher looks at an image as it is; its detections above a threshold
(high-confidence pseudo-labels, HPL) train the student, which sees a strongly changed view, by the
usual losses. What falls below the threshold is small, rare or far from the source, and would be
forgotten; so of the teacher's proposals :math:`P` that overlap no HPL, those are distilled whose
distribution over objects is peaked although background may still win:

.. math::
    q_i &= \mathrm{softmax}(z^T_{i,\,1..C}), \qquad b_i = \mathrm{softmax}(z^T_i)_{bg} \\
    K &= \{i : \max_h \mathrm{IoU}(\mathrm{box}_i, h) \le 0.4,\;
         \max_c q_{ic} \ge 0.9,\; b_i \le 0.99\} \\
    L_{low} &= \frac{1}{10\,|K|} \sum_{i \in K} (1 - \cos(f^S_i, f^T_i))\,
         \mathrm{KL}([q_i, 10^{-9}] \,\|\, \mathrm{softmax}(z^S_i))

where :math:`f` are the pooled region features (the distance is larger where a box holds an
object; it takes no gradient) and :math:`\mathrm{box}_i` is the proposal moved by the teacher's
deltas of its best class, or the proposal itself where that is background. Once an epoch
:math:`\theta_T \leftarrow 0.75\,\theta_T + 0.25\,\theta_S` over the whole state.

Paper and released code (github.com/junia3/LPLD at 61192a0): the factor 1/10, the pad and the
filters are the code's. The code takes the logarithm of a softmax, which underflows to NaN;
here `log_softmax`. It averages counters of BatchNorm and cuts them (`counters: truncate`); here
they are copied. It handles the first image of a batch only; here all, averaged over kept boxes.
The teacher's logits take no gradient here; there they do, to no effect. Images without any HPL
train on nothing but background in the code; `skip_empty` leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock, generator
from stillhouse.errors import ModelError, TeacherError
from stillhouse.losses.detection import BACKGROUND_PAD, feature_distance, foreground_kl
from stillhouse.losses.logits import kl
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.models.detector_net import DetectorNet, Features, frozen_norms, targets_of
from stillhouse.objective import Count, Objective
from stillhouse.parts.boxes import decode, iou
from stillhouse.parts.ema import EMA
from stillhouse.parts.strong_views import StrongView
from stillhouse.teacher import Knowledge


@dataclass(frozen=True)
class LowConfidence:
    """Which of an image's proposals are distilled, and why.

    Attributes:
        keep: (M,) int64, their positions.
        boxes: (N, 4) all proposals where the teacher moves them.
        overlap: (N,) with the nearest pseudo-label; 0 where there is none.
        peak: (N,) the largest probability among objects.
        background: (N,) its probability among everything.
    """

    keep: Tensor
    boxes: Tensor
    overlap: Tensor
    peak: Tensor
    background: Tensor


def low_confidence(
    proposals: Tensor,
    logits: Tensor,
    deltas: Tensor,
    confident: Tensor,
    *,
    overlap: float = 0.4,
    peak: float = 0.9,
    background: float = 0.99,
    by_class: bool = True,
) -> LowConfidence:
    """Choose an image's low-confidence pseudo-labels.

    Args:
        proposals: (N, 4) of the teacher.
        logits: (N, C + 1) of the teacher, background last.
        deltas: (N, 4 C) of the teacher, or (N, 4) equal for all classes.
        confident: (H, 4) boxes of the high-confidence pseudo-labels; none chooses nothing.
        overlap: largest intersection over union with one of them.
        peak: least largest probability among objects.
        background: largest probability of background.
        by_class: apply the last two; False keeps whatever does not overlap.
    """
    classes = logits.shape[1] - 1
    q = logits[:, :classes].softmax(1)
    nothing = logits.softmax(1)[:, classes]
    best = logits.argmax(1)
    objects = best < classes
    own = deltas.reshape(len(deltas), -1, 4)
    place = best.clamp(max=own.shape[1] - 1) if own.shape[1] > 1 else torch.zeros_like(best)
    moved = decode(own[torch.arange(len(own), device=own.device), place], proposals)
    boxes = torch.where(objects[:, None], moved, proposals.to(moved))
    near = boxes.new_zeros(len(boxes))
    if len(confident) and len(boxes):
        near = iou(boxes, confident.to(boxes)).max(1).values
    kept = near <= overlap
    if by_class:
        kept = kept & (q.max(1).values >= peak) & (nothing <= background)
    if len(confident) == 0:
        kept = torch.zeros_like(kept)
    return LowConfidence(kept.nonzero()[:, 0], boxes, near, q.max(1).values, nothing)


def low_loss(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, factor: float = 0.1
) -> Tensor:
    """The distillation term: a tenth of the mean weighted divergence.

    Args:
        student: (M, C + 1) logits, background last.
        teacher: (M, C) foreground logits.
        weight: (M,), or None for 1; takes no gradient.
        factor: 1/10 in the released code.
    """
    divergence = foreground_kl(student, teacher, pad=BACKGROUND_PAD)
    if weight is not None:
        divergence = divergence * weight.detach().to(divergence)
    return factor * divergence.mean()


class LpldObjective(Objective):
    """Self-training of a detector by an average of itself, with low-confidence distillation.

    `prepare` makes the strong view and asks the averaged teacher, once a step, for both kinds of
    pseudo-labels; `forward` trains the student on them.

    Args:
        student: begins as the source detector.
        config: the settings.
    """

    student: DetectorNet

    def __init__(self, student: DetectorNet, config: Lpld.Config) -> None:
        super().__init__(student)
        self.config = config
        if config.freeze_norms:
            frozen_norms(student)
        self.average = EMA(
            student, config.keep, when="epoch", truncate=config.counters == "truncate"
        )
        self.strengthen = StrongView() if config.strong else None

    def train(self, mode: bool = True) -> LpldObjective:
        """The student's batch normalisations stay as the source left them."""
        super().train(mode)
        if self.config.freeze_norms:
            frozen_norms(self.student)
        return self

    # ---- once a step: views and pseudo-labels, no gradient -------------------------------------

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """The batch with its strong view and its pseudo-labels."""
        c = self.config
        made = Batch(batch, strong=self._strong(batch, clock))
        teacher = self.average.module
        assert isinstance(teacher, DetectorNet)
        features = teacher.features(batch.view("x"))
        proposals = teacher.propose(features)
        feature, logits, deltas = teacher.roi(features, proposals)
        made["hpl_boxes"], made["hpl_labels"] = self._confident(
            batch, features, teacher.decode(features, proposals, logits, deltas, score=0.05)
        )
        sizes = [len(own) for own in proposals]
        made["low_boxes"], made["low_logits"], made["low_features"] = [], [], []
        rows = zip(
            proposals,
            torch.split(logits, sizes),
            torch.split(deltas, sizes),
            torch.split(feature, sizes),
            made["hpl_boxes"],
            strict=True,
        )
        for boxes, z, moves, f, confident in rows:
            keep = self._low(boxes, z, moves, confident)
            made["low_boxes"].append(boxes[keep])
            made["low_logits"].append(z[keep])
            made["low_features"].append(f[keep])
        images = max(1, len(sizes))
        self.note("hpl", sum(map(len, made["hpl_boxes"])) / images)
        self.note("low", sum(map(len, made["low_boxes"])) / images)
        if c.skip_empty:
            made["trained"] = [len(own) > 0 for own in made["hpl_boxes"]]
        return made

    def _strong(self, batch: Batch, clock: Clock) -> list[Tensor]:
        """The images changed in colour, blurred, partly erased; of the same size."""
        images = batch.view("x")
        if self.strengthen is None:
            return list(images)
        seed = clock.seed_for("strong")
        numbers = batch.rows.tolist()
        return [
            self.strengthen(image, generator(seed, number))
            for image, number in zip(images, numbers, strict=True)
        ]

    def _confident(
        self, batch: Batch, features: Features, found: Sequence[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """High-confidence pseudo-labels in the resized images; the true boxes for the oracle."""
        if self.config.labels == "true":
            boxes, labels = targets_of(batch)
            place = features.images.tensors
            return features.to_input([b.to(place) for b in boxes]), labels
        sure = [each["scores"] > self.config.threshold for each in found]
        boxes = [each["boxes"][k] for each, k in zip(found, sure, strict=True)]
        return boxes, [each["labels"][k] for each, k in zip(found, sure, strict=True)]

    def _low(self, boxes: Tensor, logits: Tensor, deltas: Tensor, confident: Tensor) -> Tensor:
        c = self.config
        if c.low_weight == 0:
            return torch.zeros(0, dtype=torch.int64, device=boxes.device)
        if c.distil == "all":
            return torch.arange(len(boxes), device=boxes.device)
        chosen = low_confidence(
            boxes,
            logits,
            deltas,
            confident,
            overlap=c.overlap,
            peak=c.peak,
            background=c.background,
            by_class=c.class_filter,
        )
        return chosen.keep

    # ---- the loss ------------------------------------------------------------------------------

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The detector's four terms on the pseudo-labels, and `low` where any is kept."""
        student = self.student
        features = student.features(batch["strong"])
        terms: dict[str, Tensor] = {}
        rows = [i for i, use in enumerate(batch.get("trained", [True] * len(features))) if use]
        if rows:
            chosen = features if len(rows) == len(features) else features.select(rows)
            terms.update(
                student.losses(
                    chosen,
                    [batch["hpl_boxes"][i] for i in rows],
                    [batch["hpl_labels"][i] for i in rows],
                )
            )
        if sum(map(len, batch["low_boxes"])):
            terms["low"] = self._low_term(student, features, batch)
        return terms

    def _low_term(self, student: DetectorNet, features: Features, batch: Batch) -> Tensor:
        c = self.config
        feature, logits, _ = student.roi(features, batch["low_boxes"])
        z = torch.cat(batch["low_logits"])
        weight = None
        if c.distance:
            weight = feature_distance(feature, torch.cat(batch["low_features"])).detach()
            self.note("distance", weight.mean())
        if c.distil == "all":
            return c.low_weight * kl(logits, z)
        return low_loss(logits, z[:, :-1], weight, factor=c.low_weight)

    def count(self, batch: Batch) -> Count:
        """Detection terms are means over images, `low` over the boxes that are kept."""
        trained = batch.get("trained")
        rows = batch.size if trained is None else sum(trained)
        return {"": rows, "low": sum(map(len, batch["low_boxes"]))}

    def after_step(self, clock: Clock) -> None:
        """The average moves at the end of an epoch."""
        self.average.after_step(clock)

    def export(self) -> nn.Module:
        """The average or the student, as the settings say."""
        if self.config.deploy == "average":
            averaged: nn.Module = self.average.module
            return averaged
        return super().export()


class Lpld(StudentTraining):
    """Adapts a detector to unlabelled images by an average of itself."""

    card = Card(
        id="lpld",
        title="Enhancing Source-Free Domain Adaptive Object Detection with Low-confidence "
        "Pseudo Label Distillation",
        summary="A detector adapts to unlabelled images; boxes its teacher doubts are distilled.",
        paper="ECCV 2024; arXiv 2407.13524",
        year=2024,
        authors=("Ilhoon Yoon", "Hyeongjun Kwon", "Jin Kim", "Junyoung Park", "Hyunsung Jang",
                 "Kwanghoon Sohn"),
        links=("https://arxiv.org/abs/2407.13524", "https://github.com/junia3/LPLD"),
        room="dense",
        task="detection",
        needs=("weights",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )  # fmt: skip

    class Config(MethodConfig):
        """Settings of `lpld`."""

        threshold: float = Field(
            0.7,
            ge=0,
            lt=1,
            description="score above which a detection of the teacher is a pseudo-label",
            json_schema_extra={"source": "released code: tools/train_main.py"},
        )
        overlap: float = Field(
            0.4,
            ge=0,
            le=1,
            description="largest overlap of a low-confidence box with a pseudo-label",
            json_schema_extra={"source": "released code: student_sfda_rcnn.py"},
        )
        peak: float = Field(
            0.9,
            ge=0,
            le=1,
            description="least largest probability among objects; void with one category",
            json_schema_extra={"source": "released code"},
        )
        background: float = Field(
            0.99,
            ge=0,
            le=1,
            description="largest probability of background",
            json_schema_extra={"source": "released code"},
        )
        class_filter: bool = Field(
            True,
            description="apply `peak` and `background`",
            json_schema_extra={"source": "paper; false is its ablation"},
        )
        distance: bool = Field(
            True,
            description="weight each box by the distance of student's and teacher's features",
            json_schema_extra={"source": "paper; false is its ablation"},
        )
        low_weight: float = Field(
            0.1,
            ge=0,
            description="weight of the distillation; 0 is plain mean-teacher self-training",
            json_schema_extra={"source": "released code: the factor 1/10 inside the term"},
        )
        distil: Literal["low", "all"] = Field(
            "low",
            description="low: the paper's; all: every proposal, background included, unfiltered",
            json_schema_extra={"source": "our addition, as a comparison"},
        )
        keep: float = Field(
            0.75,
            ge=0,
            le=1,
            description="share of itself that the average keeps at the end of an epoch",
            json_schema_extra={"source": "released code"},
        )
        counters: Literal["copy", "truncate"] = Field(
            "copy",
            description="counters of BatchNorm in the average: copied, or averaged and cut",
            json_schema_extra={"source": "released code truncates; copying is our choice"},
        )
        freeze_norms: bool = Field(
            True,
            description="batch normalisations keep the source's statistics and weights",
            json_schema_extra={"source": "released code: FrozenBN"},
        )
        strong: bool = Field(
            True,
            description="the student sees a strongly changed view; without it the distance is 0 "
            "until the student has moved",
            json_schema_extra={"source": "released code: detection_utils.py"},
        )
        skip_empty: bool = Field(
            False,
            description="images without a pseudo-label do not train the detector's losses; else "
            "all of them is background",
            json_schema_extra={"source": "released code trains on them; true is our addition"},
        )
        labels: Literal["teacher", "true"] = Field(
            "teacher",
            description="whose boxes train the student; true is the oracle, with labels",
            json_schema_extra={"source": "our addition: the upper bound of a comparison"},
        )
        deploy: Literal["average", "student"] = Field(
            "average",
            description="which of the two is the artifact",
            json_schema_extra={"source": "the paper does not say which it reports"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "mean-teacher": Variant(set={"low_weight": 0.0}, about="pseudo-labels above 0.7 alone"),
        "low-threshold": Variant(
            set={"low_weight": 0.0, "threshold": 0.3}, about="pseudo-labels above 0.3 alone"
        ),
        "no-distance": Variant(set={"distance": False}, about="every box has weight 1"),
        "no-filter": Variant(set={"class_filter": False}, about="whatever overlaps no label"),
        "all-proposals": Variant(
            set={"distil": "all", "distance": False}, about="soft labels of every proposal"
        ),
        "oracle": Variant(
            set={"labels": "true", "low_weight": 0.0}, about="true boxes of the target"
        ),
        "skip-empty": Variant(
            set={"skip_empty": True}, about="images without pseudo-label are left out"
        ),
        "official": Variant(
            set={"counters": "truncate"},
            budget={
                "epochs": 10,
                "steps": None,
                "batch": 1,
                "optimizer": "sgd",
                "lr": 1e-3,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "schedule": "constant",
            },
            about="the released schedule and average",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("self-training helps over the source detector", "ap50", "lpld/mean-teacher",
              "teacher"),
        Claim("adapts better than the source detector", "ap50", "lpld", "teacher"),
        Claim("at least as good as plain mean-teacher self-training", "ap50", "lpld",
              "lpld/mean-teacher", margin=-0.005),
        Claim("misses fewer small objects than plain self-training", "missed_small", "lpld",
              "lpld/mean-teacher", expect="lower"),
        Claim("better than taking doubtful boxes as hard labels", "ap50", "lpld",
              "lpld/low-threshold"),
        Claim("better than soft labels of every proposal", "ap50", "lpld", "lpld/all-proposals"),
        Claim("the class filter helps", "ap50", "lpld", "lpld/no-filter"),
        Claim("the distance helps", "ap50", "lpld", "lpld/no-distance"),
        Claim("true labels remain better", "ap50", "lpld/oracle", "lpld"),
    ]  # fmt: skip

    def objective(self, job: Any, student: Any, teacher: Any) -> LpldObjective:
        """The student, begun as the source detector, and its average.

        Raises:
            ModelError: student and source differ.
            TeacherError: a teacher that only answers.
        """
        if teacher is None or "weights" not in teacher.provides:
            raise TeacherError(
                "lpld adapts the source detector itself: give teacher: {model: ..., weights: ...}, "
                "train it, or name an artifact; a store or an endpoint has no weights"
            )
        if not isinstance(student, DetectorNet):
            raise ModelError(f"a {type(student.module).__name__} is no detector")
        begin_as(student, teacher.guest().module)
        if not any(p.requires_grad for p in student.parameters()):
            student.requires_grad_(True)  # one object was handed in as both, and frozen as teacher
        return LpldObjective(student, self.config)

    def run(self, job: Any) -> Artifact:
        """The source detector (given, or trained as a stage), then its adaptation."""
        teacher = job.teacher()
        student = job.student()
        self._objective = self.objective(job, student, teacher)
        job.fit("student", self._objective, self.order(job))
        artifact: Artifact = job.model_artifact(self._objective.export())
        return artifact

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Student and average beside each other, on validation data."""
        if "val" not in job.splits:
            return {}
        pair = {"student": self._objective.student, "average": self._objective.average.module}
        names = ("ap50", "ap50_small", "recall", "missed_small")
        rows = []
        for role, net in pair.items():
            figures = job.evaluate(net, "val")
            rows.append([role, *(figures[name] for name in names)])
        title = "Student and averaged teacher on validation data"
        return {"tables": [{"title": title, "columns": ["which", *names], "rows": rows}]}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny detector on small scenes."""
        model = {
            "model": "stillhouse:small-faster-rcnn",
            "options": {"channels": 8, "hidden": 16, "size": 32, "anchors": [12], "ratios": [1.0]},
        }
        scenes = {"train": 4, "held_out": 2, "test": 2, "side": 32, "objects": [1, 2],
                  "glyph": [10, 16], "digits": [0, 1, 2]}  # fmt: skip
        return {
            "method": "lpld",
            "task": "detection",
            "data": {"name": "glyph-scenes", "options": {**scenes, "corruption": "fog"}},
            "teacher": {
                **model,
                "train": {"steps": 3, "batch": 2, "lr": 1e-3,
                          "data": {"name": "glyph-scenes", "options": scenes}},
            },
            "student": model,
            "budget": {"steps": 4, "batch": 2, "lr": 1e-3, "optimizer": "sgd"},
            "seed": seed,
        }  # fmt: skip


def begin_as(student: nn.Module, source: nn.Module) -> None:
    """Give the student the source's weights.

    Raises:
        ModelError: they are not the same network; the first difference is named.
    """
    own, other = student.state_dict(), source.state_dict()
    for name, value in own.items():
        if name not in other or other[name].shape != value.shape:
            found = tuple(other[name].shape) if name in other else "absent"
            raise ModelError(
                f"the student must be the same network as the source detector: '{name}' is "
                f"{tuple(value.shape)} in the student and {found} in the source"
            )
    lacking = sorted(other.keys() - own.keys())
    if lacking:
        raise ModelError(
            f"the student must be the same network as the source detector: it lacks '{lacking[0]}'"
        )
    student.load_state_dict(other)
