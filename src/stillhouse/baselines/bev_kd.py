r"""Dense distillation between detectors in bird's-eye view: maps cell by cell, heads.

What methods that choose where to compare must beat. With maps F at a tap, a weight G over the
ground (1 everywhere, or the largest of the boxes' Gaussians) and, for the heads, probabilities p
and regression channels r:

.. math::
    L = L_{det}
      + w \frac{\sum G\, \mathrm{mean}_c (F^s - F^t)^2}{\sum G + \epsilon}
      + v \left( \frac{\sum G\, \mathrm{mean}_k (p^s - p^t)^2}{\sum G + \epsilon}
      + \frac{\sum G \max_k p^t\, \mathrm{mean}_c |r^s - r^t|}{\sum G + \epsilon} \right)

`whole-map` is FitNet on the map before the BEV encoder; `gaussian` the same inside the mask;
`x-ray` the usual terms of detectors as X-Ray distillation (CVPR 2024) uses them, on the map after
the encoder and the heads, inside the mask.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn, no_grad

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.losses.bev import heat_distance, masked_features, masked_mean
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import in_eval_mode
from stillhouse.objective import Count, Objective
from stillhouse.parts.centre_maps import gaussian_mask
from stillhouse.tasks.driving import GridNet, boxes_in_batch
from stillhouse.teacher import Knowledge, Want, to_device

HEAT, REGRESSION = Want("heat"), Want("regression")


class BevKDObjective(Objective):
    """The detection loss, the map's term and those of the heads.

    Args:
        student: detector with the tap.
        task: whose loss the boxes use.
        config: see `BevKD.Config`.
        projection: of the student's map to the teacher's width, or None.
    """

    student: GridNet

    def __init__(
        self, student: GridNet, task: Any, config: BevKD.Config, projection: nn.Module | None
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config, self.projection = config, projection
        self.tap = Want(f"tap:{config.tap}")
        wanted = [self.tap] if config.features else []
        self.wants = (*wanted, *((HEAT, REGRESSION) if config.heads else ()))
        if config.features:
            student.add_tap(config.tap)

    def mask(self, batch: Batch, maps: Tensor) -> Tensor | None:
        """The weight of each cell of a map, or None for all alike."""
        if self.config.mask == "none":
            return None
        grid = self.student.grid
        shown = batch["valid"] & grid.inside(batch["boxes"])
        return gaussian_mask(batch["boxes"], shown, grid.over(maps)).to(maps.dtype)

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """`task/heat`, `task/boxes`, `features`, `heads/heat`, `heads/boxes`."""
        config = self.config
        out = self.student(batch.view("x"))
        terms: dict[str, Tensor] = self._loss(out, batch)
        if config.features:
            ours = out["taps"][config.tap]
            if self.projection is not None:
                ours = self.projection(ours)
            theirs = knowledge.tensor(self.tap.key)
            terms["features"] = config.features * masked_features(
                ours, theirs, self.mask(batch, ours)
            )
        if config.heads:
            mask = self.mask(batch, out["heat"])
            theirs = knowledge.tensor(HEAT.key)
            terms["heads/heat"] = config.heads * heat_distance(out["heat"], theirs, mask)
            sure = theirs.sigmoid().amax(1)
            away = (out["regression"] - knowledge.tensor(REGRESSION.key)).abs().mean(1)
            terms["heads/boxes"] = config.heads * masked_mean(sure * away, mask, eps=1e-6)
        return terms

    def count(self, batch: Batch) -> Count:
        """Detection is a mean over boxes, masked terms over what the boxes cover."""
        boxes = boxes_in_batch(batch, self.student.grid)
        if self.config.mask == "none":
            return {"task": boxes, "": float(batch.size)}
        shown = batch["valid"] & self.student.grid.inside(batch["boxes"])
        return {"task": boxes, "": shown.sum()}


class BevKD(StudentTraining):
    """Maps and heads of two detectors compared cell by cell."""

    card = Card(
        id="bev-kd",
        kind="baseline",
        title="Dense distillation between detectors in bird's-eye view",
        summary="The student's BEV map is led to the teacher's, everywhere or where objects are.",
        paper="FitNets, ICLR 2015, on BEV maps; the terms of X-Ray, CVPR 2024",
        year=2015,
        room="baselines",
        task="driving",
        needs=("taps",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `bev-kd`."""

        tap: Literal["low", "high"] = Field(
            "low",
            description="the map before or after the BEV encoder",
            json_schema_extra={"source": "chosen here; X-Ray's sheet: high"},
        )
        mask: Literal["none", "gaussian"] = Field(
            "none",
            description="compare everywhere, or inside the boxes' Gaussians",
            json_schema_extra={"source": "common practice"},
        )
        features: float = Field(
            40.0,
            ge=0,
            description="weight w of the map's mean squared difference",
            json_schema_extra={"source": "chosen here on a validation split among 1, 10, 40"},
        )
        heads: float = Field(
            0.0,
            ge=0,
            description="weight v of the heads' terms",
            json_schema_extra={"source": "chosen here; 1 in X-Ray's terms"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "whole-map": Variant(set={}, about="FitNet on the whole low map"),
        "gaussian": Variant(set={"mask": "gaussian"}, about="the low map where objects are"),
        "x-ray": Variant(
            set={"tap": "high", "mask": "gaussian", "features": 1.0, "heads": 1.0},
            about="high map and heads where objects are",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "map", "bev-kd", "supervised"),
    ]

    def objective(self, job: Any, student: GridNet, teacher: Any) -> Objective:
        """The student, with a 1x1 projection where the maps' widths differ.

        Raises:
            ModelError: maps of different grids.
        """
        config = self.config
        objective = BevKDObjective(student, job.task, config, None)
        teacher.bind(objective.wants, job.task)
        ours, theirs = _maps(job, student, teacher, objective)
        for name in ours:
            if ours[name].shape[-2:] != theirs[name].shape[-2:]:
                raise ModelError(
                    f"'{name}' of student {tuple(ours[name].shape[1:])} and teacher "
                    f"{tuple(theirs[name].shape[1:])} lie on different grids and cannot be "
                    "compared cell by cell"
                )
        if config.features:
            widths = ours["map"].shape[1], theirs["map"].shape[1]
            if widths[0] != widths[1]:
                objective.projection = job.build(lambda: nn.Conv2d(*widths, 1), "projection")
        return objective

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny LiDAR detectors of different width on a few simulated frames."""
        small = {"width": 4, "widths": [4, 4, 4], "head_width": 4}
        return {
            "method": "bev-kd",
            "data": {
                "name": "driving_scenes",
                "options": {
                    "train": 4,
                    "held": 1,
                    "test": 2,
                    "beams": 8,
                    "azimuths": 48,
                    "sensors": ["lidar"],
                    "cell": 3.2,
                },
            },
            "teacher": {"model": "stillhouse:mini_bev", "options": {**small, "width": 6}},
            "student": {"model": "stillhouse:mini_bev", "options": small},
            "settings": {"mask": "gaussian", "heads": 1.0},
            "budget": {"steps": 4, "batch": 2, "lr": 0.01, "optimizer": "adamw"},
            "seed": seed,
        }


def _maps(
    job: Any, student: GridNet, teacher: Any, objective: BevKDObjective
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One frame through both: the maps that will be compared."""
    order = job.order("train", 1, shuffle=False)
    batch = order.read(order.epoch(0, lambda: job.rng("look"))[0], job.views()).to(job.device)
    to_device(teacher, job.device)
    with in_eval_mode(student), no_grad():
        out, known = student(batch.view("x")), teacher.knowledge(batch)
    config, ours, theirs = objective.config, {}, {}
    if config.features:
        ours["map"], theirs["map"] = out["taps"][config.tap], known.tensor(objective.tap.key)
    if config.heads:
        for name in ("heat", "regression"):
            ours[name], theirs[name] = out[name], known.tensor(name)
    return ours, theirs
