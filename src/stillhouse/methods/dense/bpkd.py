r"""BPKD: boundary privileged knowledge distillation for semantic segmentation (WACV 2024).

Small networks fail mostly at class borders. A soft mask per class, made from the labels, splits
the logit maps into edge and body, which are distilled by different criteria; no parameters and
no features are added. With student and teacher logits :math:`z^S, z^T` (B, C, h, w) before they
are enlarged, the edge mask M of `losses.spatial.soft_trimap` and the validity V (1 but for
ignored pixels), temperature :math:`\tau`:

Edge: masked logits, a softmax over the classes at each position, averaged class by class so that
thin classes count,

.. math::
    k(i) = \tau^2 \sum_c p^T_c \log \frac{p^T_c}{p^S_c}, \qquad
    p = \mathrm{softmax}_c(z M / \tau), \qquad
    L_E = \frac1B \sum_b \sum_c \alpha_c \frac{\sum_i k(i) M_{c,i}}{\max(n_c, 1)}

where :math:`n_c` counts the positions with :math:`M_{c,i} > 0`. Body: each class's softmax over
the positions, a constraint on shape as in CWD,

.. math::
    L_B = \frac{\tau^2}{B C} \sum_b \sum_c \sum_i q^T \log \frac{q^T}{q^S}, \qquad
    q = \mathrm{softmax}_i(z (1 - M) V / \tau)

.. math::
    L = L_{seg} + \lambda_B L_B + \lambda_E L_E

The mask multiplies logits, not probabilities: what is masked out has logit 0 and still takes
probability. Away from edges both sides are uniform over classes and k is 0.

What is known and what is not: training code was never released. The order of operations is that
of the framework figure; formula details follow a third-party re-implementation whose comments
cite the paper's equations. Its denominator is the count of non-zero positions (the default); a
second port divides by the sum of the mask (`edge_denominator: soft`), which is larger by
1 / mean(mask). The weights (20, 50) at temperature 4 are said to be the paper's; the same
author's runnable ADE20K configuration has (10, 20) at temperature 2 (variant `light`). L_E sums
over classes: weights that fit 19 to 150 classes may be strong for few, see `per_class_mean`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.losses.spatial import (
    IGNORE,
    kl_pixels,
    kl_space,
    mean_of_rows,
    resized_to,
    soft_trimap,
)
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want

Denominator = Literal["nonzero", "soft"]


# ------------------------------------------------------------------------------ the losses


def edge_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float | Sequence[float] | Tensor = 2.0,
    denominator: Denominator = "nonzero",
    counted: Tensor | None = None,
    per_class_mean: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """L_E: the divergence between masked class distributions, averaged within each class's edge.

    Args:
        student: (B, C, h, w) logits.
        teacher: the same shape.
        mask: (B, C, h, w) in [0, 1], how much of a position is edge of a class.
        temperature: tau > 0; its square is within the result.
        alpha: weight of each class, one number or C.
        denominator: "nonzero", the count of positions with a mask above 0; "soft", the mask's
            sum (1 where it is 0).
        counted: (B, C) bool, classes whose edges are summed; all by default.
        per_class_mean: divide by the number of classes that have an edge (at least 1).
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar, or (B,).

    Raises:
        ModelError: shapes differ, or alpha has another number of classes.
    """
    if mask.shape != student.shape:
        raise ModelError(
            f"a mask of {tuple(mask.shape)} does not fit logits of {tuple(student.shape)}: the "
            "edge mask is per class"
        )
    student, teacher = wide(student), wide(teacher)
    mask = mask.to(student.dtype)
    weights = torch.as_tensor(alpha, dtype=student.dtype, device=student.device)
    if weights.ndim > 1 or weights.numel() not in {1, student.shape[1]}:
        raise ModelError(
            f"alpha has {weights.numel()} numbers, the logits {student.shape[1]} classes; give "
            "one number or one per class"
        )
    each = kl_pixels(student * mask, teacher * mask, temperature=temperature, reduction="none")
    mass = (each.unsqueeze(1) * mask).sum((2, 3))
    present = (mask > 0).sum((2, 3))
    if denominator == "nonzero":
        size = present.clamp_min(1).to(mass.dtype)
    else:
        total = mask.sum((2, 3))
        size = total.masked_fill(total == 0, 1.0)
    by_class = weights * mass / size
    if counted is not None:
        by_class = by_class * counted
    found = by_class.sum(1)
    if per_class_mean:
        seen = present > 0 if counted is None else (present > 0) & counted
        found = found / seen.sum(1).clamp_min(1)
    return found.mean() if reduction == "mean" else found


def body_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    valid: Tensor | float = 1.0,
    *,
    temperature: float = 4.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """L_B: each class's distribution over the positions of its body.

    Args:
        student: (B, C, h, w) logits.
        teacher: the same shape.
        mask: the edge mask (B, C, h, w).
        valid: (B, 1, h, w), the share of each position that is not ignored.
        temperature: tau > 0; its square is within the result.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar, or (B,).

    Raises:
        ModelError: shapes differ.
    """
    student, teacher = wide(student), wide(teacher)
    body = ((1.0 - mask) * valid).to(student.dtype)
    found = kl_space(student * body, teacher * body, temperature=temperature, reduction="none")
    return found.mean() if reduction == "mean" else found.mean(1)


# --------------------------------------------------------------------------- the objective


@torch.no_grad()
def edge_masks(
    labels: Tensor, logits: Tensor, config: BPKD.Config, ignore: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Edge mask and validity at the logits' size, and which classes' edges are summed.

    Args:
        labels: (B, H, W), as augmented.
        logits: (B, C, h, w) of the student.
        config: radius and kind of the mask.
        ignore: the label that counts for nothing.

    Returns:
        M (B, C, h, w), V (B, 1, h, w), and (B, C) bool with `shared_mask`, else None.
    """
    mask, valid = soft_trimap(
        labels,
        logits.shape[1],
        (logits.shape[2], logits.shape[3]),
        radius=config.radius,
        ignore=ignore,
        erase_ignored_band=config.erase_ignored_band,
    )
    mask, valid = mask.to(logits.dtype), valid.to(logits.dtype)
    if not config.shared_mask:
        return mask, valid, None
    # One map for all classes; still only classes that have an edge are summed over, so that the
    # weights mean the same.
    counted = (mask > 0).flatten(2).any(2)
    return mask.amax(1, keepdim=True).expand_as(mask), valid, counted


class BPKDObjective(Objective):
    """The task's loss, the edges and the bodies.

    Args:
        student: net with `logits` (B, C, h, w), before they are enlarged.
        task: whose loss the labels use; its `about` names the label that is ignored.
        config: see `BPKD.Config`.
    """

    def __init__(self, student: Net, task: Task, config: BPKD.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self._ignore = int(task.about.get("ignore", IGNORE))
        self.config = config
        distilled = config.edge_weight > 0 or config.body_weight > 0
        self.wants = (Want("logits"),) if distilled else ()

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms of the task, `edge` and `body`."""
        config = self.config
        out = self.student(batch.view("x"))
        terms = self._loss(out, batch)
        if not self.wants:
            return terms
        student = wide(out["logits"])
        teacher = self._teacher(knowledge, student)
        mask, valid, counted = edge_masks(batch["target"], student, config, self._ignore)
        if config.edge_weight > 0:
            edge = edge_loss(
                student,
                teacher,
                mask,
                temperature=config.temperature,
                alpha=config.alpha,
                denominator=config.edge_denominator,
                counted=counted,
                per_class_mean=config.per_class_mean,
                reduction="none",
            )
            terms["edge"] = config.edge_weight * mean_of_rows(edge, knowledge.valid)
        if config.body_weight > 0:
            body = body_loss(
                student, teacher, mask, valid, temperature=config.temperature, reduction="none"
            )
            terms["body"] = config.body_weight * mean_of_rows(body, knowledge.valid)
        return terms

    @staticmethod
    def _teacher(knowledge: Knowledge, student: Tensor) -> Tensor:
        """The teacher's logits at the student's size, without a gradient.

        Raises:
            ModelError: another number of classes.
        """
        found = knowledge.tensor("logits").detach().to(student.dtype)
        if found.ndim != 4 or found.shape[1] != student.shape[1]:
            raise ModelError(
                f"the teacher's logits {tuple(found.shape)} and the student's "
                f"{tuple(student.shape)} must be (B, C, h, w) of the same classes in one order"
            )
        return resized_to(found, (student.shape[2], student.shape[3]))


class BPKD(StudentTraining):
    """Distils class borders and class bodies by different criteria."""

    card = Card(
        id="bpkd",
        title="BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation",
        summary="Distils the borders of classes pixel by pixel, their bodies by shape.",
        paper="WACV 2024; arXiv 2306.08075",
        year=2024,
        authors=("Liyang Liu", "Zihan Wang", "Minh Hieu Phan", "Bowen Zhang", "Jinchao Ge",
                 "Yifan Liu"),
        links=("https://arxiv.org/abs/2306.08075", "https://github.com/AkideLiu/BPKD"),
        room="dense",
        task="segmentation",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
        reconstructed=True,
    )  # fmt: skip

    class Config(MethodConfig):
        """Settings of `bpkd`; the defaults are the preset `paper`."""

        body_weight: float = Field(
            20.0,
            ge=0,
            description="lambda_B, weight of the bodies' term",
            json_schema_extra={"source": "third-party port, said to be the paper's; light: 10"},
        )
        edge_weight: float = Field(
            50.0,
            ge=0,
            description="lambda_E, weight of the edges' term",
            json_schema_extra={"source": "third-party port, said to be the paper's; light: 20"},
        )
        temperature: float = Field(
            4.0,
            gt=0,
            description="softens the distributions over classes and over space",
            json_schema_extra={"source": "third-party port, said to be the paper's; light: 2"},
        )
        alpha: float | list[float] = Field(
            2.0,
            description="weight of each class's edge: one number, or one per class",
            json_schema_extra={"source": "third-party port: 2 for every class"},
        )
        radius: int = Field(
            3,
            ge=0,
            le=64,
            description="pixels of the label map on both sides of a border that are edge",
            json_schema_extra={"source": "third-party port, for images of 512 pixels and more"},
        )
        edge_denominator: Literal["nonzero", "soft"] = Field(
            "nonzero",
            description="what a class's edge is averaged over: positions with any edge, or the "
            "sum of the soft mask",
            json_schema_extra={"source": "figure: 'Sum / mask pixels'; two ports differ"},
        )
        erase_ignored_band: bool = Field(
            False,
            description="the rim of a class beside an ignored region is no edge of it",
            json_schema_extra={"source": "our addition; the port keeps the inner band"},
        )
        per_class_mean: bool = Field(
            False,
            description="divide the edges' term by the number of classes that have an edge",
            json_schema_extra={"source": "our addition, for data of few or very many classes"},
        )
        shared_mask: bool = Field(
            False,
            description="one edge map for all classes instead of one per class",
            json_schema_extra={"source": "an ablation; the method's mask is per class"},
        )
        shared: ClassVar[frozenset[str]] = frozenset({"radius"})

        @model_validator(mode="after")
        def _alpha_not_negative(self) -> BPKD.Config:
            numbers = self.alpha if isinstance(self.alpha, list) else [self.alpha]
            if not numbers or min(numbers) < 0:
                raise ValueError("alpha: one number >= 0, or one per class")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "paper": Variant(
            set={"body_weight": 20.0, "edge_weight": 50.0, "temperature": 4.0},
            about="the preset that is said to be the paper's: the defaults, whatever a recipe says",
        ),
        "light": Variant(
            set={"body_weight": 10.0, "edge_weight": 20.0, "temperature": 2.0},
            about="the third-party author's runnable ADE20K configuration, multiplied out",
        ),
        "body-only": Variant(set={"edge_weight": 0.0}, about="without the edges' term"),
        "edge-only": Variant(set={"body_weight": 0.0}, about="without the bodies' term"),
        "shared-mask": Variant(
            set={"shared_mask": True}, about="one edge map for all classes: another method"
        ),
        "soft-count": Variant(
            set={"edge_denominator": "soft"}, about="edges averaged over the mask's sum"
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "miou", "bpkd", "supervised"),
        Claim(
            "beats the student alone within 2 px of class borders",
            "trimap_miou_2px",
            "bpkd",
            "supervised",
        ),
        Claim("beats channel-wise distillation", "miou", "bpkd", "cwd"),
        Claim(
            "beats channel-wise distillation within 2 px of class borders",
            "trimap_miou_2px",
            "bpkd",
            "cwd",
        ),
        Claim("beats distillation pixel by pixel", "miou", "bpkd", "pixel-kd"),
        Claim("edges and bodies are better than bodies alone", "miou", "bpkd", "bpkd/body-only"),
        Claim("edges and bodies are better than edges alone", "miou", "bpkd", "bpkd/edge-only"),
        Claim(
            "an edge map per class is better than a shared one within 2 px of class borders",
            "trimap_miou_2px",
            "bpkd",
            "bpkd/shared-mask",
        ),
    ]

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels, edges and bodies.

        Raises:
            RecipeError: alpha has another number of classes than the data.
        """
        classes = job.task.about.get("classes")
        alpha = self.config.alpha
        if isinstance(alpha, list) and classes and len(alpha) not in {1, len(classes)}:
            raise RecipeError(
                f"alpha has {len(alpha)} numbers, the data {len(classes)} classes; give one "
                "number or one per class"
            )
        return BPKDObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not where both weights are 0."""
        return bool(self.config.edge_weight > 0 or self.config.body_weight > 0)

    # ---- the report ----------------------------------------------------------------------

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Which preset was used, and what is edge: masks of two scenes at the logits' size."""
        texts = [{"title": "Weights of edges and bodies", "text": self.preset()}]
        source = job.splits["test" if "test" in job.splits else "val"]
        rows = torch.arange(min(2, len(source)))
        batch = read_rows(source, rows, None, job.task.collate).to(job.device)
        with torch.inference_mode():
            logits = wide(artifact.module(batch.view("x"))["logits"])
        mask, valid, _ = edge_masks(
            batch["target"], logits, self.config, int(job.task.about.get("ignore", IGNORE))
        )
        images = [self._picture(mask[row], valid[row]) for row in range(len(rows))]
        return {"texts": texts, "images": images}

    def preset(self) -> str:
        """The weights in words."""
        config = self.config
        weights = (config.body_weight, config.edge_weight, config.temperature)
        known = {(20.0, 50.0, 4.0): "paper", (10.0, 20.0, 2.0): "light"}
        named = known.get(weights, "none of the two that are known")
        return (
            f"preset: {named}; body weight {weights[0]:g}, edge weight {weights[1]:g}, temperature "
            f"{weights[2]:g}, alpha {config.alpha}, radius {config.radius} px, edges averaged over "
            f"{'positions' if config.edge_denominator == 'nonzero' else 'the mask'}. The training "
            "code of the paper was never released; the weights are those of a third-party port."
        )

    @staticmethod
    def _picture(mask: Tensor, valid: Tensor) -> dict[str, str]:
        """How many classes' edge, and how much valid body, is at each position."""
        from stillhouse.tasks.segmentation import png_base64

        edge = mask.amax(0).clamp(0, 1)
        body = ((1.0 - mask.amax(0)) * valid[0]).clamp(0, 1)
        shown = torch.cat([edge, body.new_ones(len(edge), 1), body], dim=1)
        grey = (shown * 255).round().to(torch.uint8).cpu().numpy()
        return {
            "title": "edge of any class (left), body of all (right)",
            "caption": "soft masks at the size of the student's logits",
            "png_base64": png_base64(grey.repeat(4, axis=0).repeat(4, axis=1)),
        }

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny networks on generated scenes."""
        return {
            "method": "bpkd",
            "data": {"name": "generated-scenes"},
            "teacher": {"model": "stillhouse:small_segmenter", "options": {"widths": [6, 8, 8]}},
            "student": {"model": "stillhouse:small_segmenter", "options": {"widths": [4, 4]}},
            "settings": {"radius": 1},
            "budget": {"steps": 4, "batch": 4, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
