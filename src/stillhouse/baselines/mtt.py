"""Matching training trajectories (Cazenavette et al., CVPR 2022), what DATM and its kin go beyond.

A student that begins at an expert's weights and makes N steps of plain SGD on the synthetic set
should end where the expert was M epochs later. Hard labels, random real images at the beginning,
one early window of start epochs for every set size, a learned learning rate.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from stillhouse.method import Card, Claim
from stillhouse.parts.schedule import constant
from stillhouse.stages.initial_set import Init
from stillhouse.stages.trajectory_distillation import (
    TrajectoryConfig,
    TrajectoryDistillation,
    Window,
)


class MTT(TrajectoryDistillation):
    """Expert trajectories are matched from an early window, with hard labels."""

    card = Card(
        id="mtt",
        kind="baseline",
        title="Dataset Distillation by Matching Training Trajectories",
        summary="A tiny data set on which a network trains along the path of experts trained on "
        "the real data.",
        paper="CVPR 2022; arXiv 2203.11932",
        year=2022,
        authors=(
            "George Cazenavette",
            "Tongzhou Wang",
            "Antonio Torralba",
            "Alexei A. Efros",
            "Jun-Yan Zhu",
        ),
        links=(
            "https://arxiv.org/abs/2203.11932",
            "https://github.com/GeorgeCazenavette/mtt-distillation",
        ),
        room="baselines",
        yields="dataset",
        stages=(
            ("whitening?", "closed"),
            ("moments?", "closed"),
            ("experts?", "train"),
            ("initial images", "closed"),
            ("match", "synthesis"),
            ("buffer", "closed"),
            ("judge", "judge"),
        ),
    )
    compares: ClassVar[bool] = False

    class Config(TrajectoryConfig):
        """Settings of `mtt`. Iterations are `budget.steps`, 5000 by default."""

        start: Literal["real", "noise"] = Field(
            "real",
            description="first images: random real ones, or noise",
            json_schema_extra={"source": "released README; its argparse default is noise"},
        )
        max_start: int | None = Field(
            None,
            ge=1,
            description="students begin at epochs 0 to this one, exclusive; none: two fifths of "
            "the experts' epochs",
            json_schema_extra={"source": "20 of 50 epochs for CIFAR-10 with 10; argparse 25"},
        )

    claims: ClassVar[list[Claim]] = [
        Claim("beats random real images", "accuracy", "mtt", "random-real"),
        Claim("beats distribution matching", "accuracy", "mtt", "dm"),
    ]

    def window(self, steps: int) -> Window:
        """One window for the whole run, and no threshold."""
        epochs = self.config.expert_epochs
        if self.trajectories is not None:
            epochs = self.trajectories.epochs
        upper = self.config.max_start or max(1, min(2 * epochs // 5, epochs - self.config.span + 1))
        return Window(0, constant(upper), steps)

    def init(self) -> Init:
        """As the settings say."""
        found: Init = self.config.start
        return found

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated images of 8x8, a ConvNet of depth 2 and width 4, two experts."""
        return {
            "method": "mtt",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
            "settings": {
                "ipc": 1,
                "experts": 2,
                "expert_epochs": 3,
                "expert_batch": 16,
                "inner_steps": 2,
                "span": 1,
                "max_start": 2,
                "judge_epochs": 4,
                "judge_nets": 1,
                "full_epochs": 1,
            },
            "budget": {"steps": 4},
            "seed": seed,
        }
