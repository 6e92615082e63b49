r"""UniDistill: distillation between detectors of different sensors, in bird's-eye view.

Zhou et al., CVPR 2023. Detectors of any sensor end alike: sensor encoder -> BEV map (low) ->
BEV encoder -> BEV map (high) -> dense head. Teacher and student are compared at nine points of
each ground-truth box only (4 corners, 4 middles of edges, centre), so that background and the
size of objects do not matter. With :math:`f, g \in R^{n \times 9 \times C}` the low and high
features of the n boxes at these points, :math:`R = \hat g \hat g^T` (rows divided by their norm
:math:`+ \epsilon`), G the Gaussian mask of the boxes, m the largest class probability, r the
regression channels, :math:`\epsilon = 10^{-4}`:

.. math::
    L_{fea} &= \frac{1}{n + \epsilon} \sum_{boxes} \mathrm{mean}_{9, C} |f^s - f^t| \\
    L_{rel} &= \frac{1}{n + \epsilon} \sum_{boxes} \mathrm{mean}_{9 \times 9} |R^s - R^t| \\
    L_{res} &= \frac{\sum G |m^s - m^t|}{\sum G + \epsilon}
             + \frac{\sum G\, \mathrm{mean}_c |r^s - r^t|}{\sum G + \epsilon} \\
    L &= L_{det} + a L_{fea} + b L_{rel} + c L_{res}

The path (which sensors teach which) sets (a, b, c), the clamp of probabilities and, for
camera -> LiDAR only, one-layer adapters on the student's side that are thrown away at export.

Where paper and released code differ (each a setting; "official" is the released form):

- The code exchanges x and y before sampling: `transpose_points` (here False).
- The code softens the teacher's heat map only, which it keeps here: `teacher_temperature` 2.
- The paper's adapters are commented out in the code: `adapters`.
- The code counts the first row of an empty frame as a box; here boxes have a mask, and those
  whose centre is beyond either detector's range are dropped. Without a box the three terms are
  left out and the detection loss still counts.
- The code keeps the teacher in train mode; here it is in eval mode.
- Where the widths of the low maps differ, a 1x1 projection stands on the student's side before
  the feature term (chosen here; the released pair has equal widths).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn, no_grad

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.bev import box_response, class_response
from stillhouse.losses.features import absolute_by_item
from stillhouse.losses.relations import gram
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.objective import Count, Objective
from stillhouse.parts.bev_grid import Grid, sample_maps
from stillhouse.parts.boxes import nine_points
from stillhouse.parts.centre_maps import gaussian_mask
from stillhouse.tasks.driving import GridNet, boxes_in_batch
from stillhouse.teacher import Knowledge, Want

LOW, HIGH = Want("tap:low"), Want("tap:high")
HEAT, REGRESSION = Want("heat"), Want("regression")
POINTS = 9


class Path(NamedTuple):
    """What the path sets: weights (a, b, c), the clamp, and whether there are adapters."""

    feature: float
    relation: float
    response: float
    clamp: float
    adapters: bool


PATHS = {
    "lidar-camera": Path(100.0, 40.0, 10.0, 1e-4, False),
    "fusion-camera": Path(10.0, 5.0, 10.0, 1e-3, False),
    "camera-lidar": Path(10.0, 5.0, 1.0, 1e-4, True),
    "fusion-lidar": Path(10.0, 1.0, 10.0, 1e-4, False),
}


def at_nine_points(
    maps: Tensor, boxes: Tensor, valid: Tensor, grid: Grid, *, transpose_points: bool = False
) -> Tensor:
    """Features of maps (B, C, H, W) at the nine points of the valid boxes: (n, 9, C).

    Args:
        maps: over the range of `grid`, of any resolution.
        boxes: (B, M, >= 7).
        valid: (B, M) bool.
        grid: whose range the maps cover.
        transpose_points: as released; see `sample_maps`.
    """
    points = nine_points(boxes.to(maps.dtype)).flatten(1, 2)
    found = sample_maps(maps, points, grid, transpose_points=transpose_points)
    return found.reshape(*boxes.shape[:2], POINTS, maps.shape[1])[valid]


class Adapter(nn.Sequential):
    """One layer that keeps width and size: convolution 3x3, BatchNorm, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


class UniDistillObjective(Objective):
    """The detection loss and the three terms of distillation.

    Args:
        student: detector with the taps "low" and "high".
        task: whose loss the boxes use.
        config: settings.
        path: what the path sets, the settings' own values put in.
        teacher_grid: ground that the teacher's maps cover.
        head_grid: cells of both detectors' heads.
        adapters: of the low and the high map, or None.
        projection: of the student's low map to the teacher's width, or None.
    """

    wants = (LOW, HIGH, HEAT, REGRESSION)
    student: GridNet

    def __init__(
        self,
        student: GridNet,
        task: Any,
        config: UniDistill.Config,
        path: Path,
        teacher_grid: Grid,
        head_grid: Grid,
        adapters: tuple[nn.Module, nn.Module] | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config, self.path = config, path
        self.teacher_grid, self.head_grid = teacher_grid, head_grid
        self.adapt_low: nn.Module | None = adapters[0] if adapters and path.feature else None
        self.adapt_high: nn.Module | None = adapters[1] if adapters and path.relation else None
        self.projection = projection if path.feature else None
        for alias in ("low", "high"):
            student.add_tap(alias)

    def shared_boxes(self, batch: Batch) -> Tensor:
        """(B, M) bool: the valid boxes whose centre is inside both detectors' ranges."""
        boxes = batch["boxes"]
        valid: Tensor = batch["valid"]
        return valid & self.student.grid.inside(boxes) & self.teacher_grid.inside(boxes)

    def mask(self, batch: Batch, valid: Tensor) -> Tensor:
        """G (B, H, W) in the cells of the heads."""
        config = self.config
        return gaussian_mask(
            batch["boxes"],
            valid,
            self.head_grid,
            min_overlap=config.min_overlap,
            min_radius=config.min_radius,
        )

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """`task/heat`, `task/boxes`, `feature`, `relation`, `response/class`, `response/box`."""
        out = self.student(batch.view("x"))
        terms: dict[str, Tensor] = self._loss(out, batch)
        path, valid = self.path, self.shared_boxes(batch)
        if path.feature:
            low = out["taps"]["low"]
            terms["feature"] = path.feature * self.feature(low, knowledge, batch, valid)
        if path.relation:
            high = out["taps"]["high"]
            terms["relation"] = path.relation * self.relation(high, knowledge, batch, valid)
        if path.response:
            mask = self.mask(batch, valid).to(out["heat"].dtype)
            for name, value in self.response(out, knowledge, mask).items():
                terms[f"response/{name}"] = path.response * value
        return terms

    def _nine(self, maps: Tensor, batch: Batch, valid: Tensor, grid: Grid) -> Tensor:
        swap = self.config.transpose_points
        return at_nine_points(maps, batch["boxes"], valid, grid, transpose_points=swap)

    def feature(self, low: Tensor, knowledge: Knowledge, batch: Batch, valid: Tensor) -> Tensor:
        """L_fea, unweighted."""
        if self.adapt_low is not None:
            low = self.adapt_low(low)
        if self.projection is not None:
            low = self.projection(low)
        ours = self._nine(low, batch, valid, self.student.grid)
        theirs = self._nine(knowledge.tensor(LOW.key), batch, valid, self.teacher_grid)
        return absolute_by_item(ours, theirs, eps=self.config.eps)

    def relation(self, high: Tensor, knowledge: Knowledge, batch: Batch, valid: Tensor) -> Tensor:
        """L_rel, unweighted; the widths may differ."""
        eps = self.config.eps
        if self.adapt_high is not None:
            high = self.adapt_high(high)
        ours = self._nine(high, batch, valid, self.student.grid)
        theirs = self._nine(knowledge.tensor(HIGH.key), batch, valid, self.teacher_grid)
        return absolute_by_item(gram(ours, eps=eps), gram(theirs, eps=eps), eps=eps)

    def response(
        self, out: dict[str, Any], knowledge: Knowledge, mask: Tensor
    ) -> dict[str, Tensor]:
        """L_cls and L_reg, unweighted."""
        config = self.config
        return {
            "class": class_response(
                out["heat"],
                knowledge.tensor(HEAT.key),
                mask,
                teacher_temperature=config.teacher_temperature,
                clamp=self.path.clamp,
                eps=config.eps,
            ),
            "box": box_response(
                out["regression"], knowledge.tensor(REGRESSION.key), mask, eps=config.eps
            ),
        }

    def count(self, batch: Batch) -> Count:
        """Detection is a mean over boxes, points over shared boxes, responses over the mask."""
        shared = self.shared_boxes(batch)
        counts: dict[str, Tensor | float] = {
            "task": boxes_in_batch(batch, self.student.grid),
            "feature": shared.sum(),
            "relation": shared.sum(),
            "": float(batch.size),
        }
        if self.path.response:
            counts["response"] = self.mask(batch, shared).sum()
        return counts


class UniDistill(StudentTraining):
    """Nine points a box, their relations, and responses, between detectors of any sensors."""

    card = Card(
        id="unidistill",
        title=(
            "UniDistill: A Universal Cross-Modality Knowledge Distillation Framework for 3D "
            "Object Detection in Bird's-Eye View"
        ),
        summary="A detector of one sensor teaches one of another at nine points of each box.",
        paper="CVPR 2023; arXiv 2303.15083",
        year=2023,
        authors=(
            "Shengchao Zhou",
            "Weizhou Liu",
            "Chen Hu",
            "Shuchang Zhou",
            "Chao Ma",
        ),
        links=(
            "https://arxiv.org/abs/2303.15083",
            "https://github.com/megvii-research/CVPR2023-UniDistill",
        ),
        room="driving",
        task="driving",
        needs=("taps",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `unidistill`."""

        path: Literal[
            "auto", "lidar-camera", "fusion-camera", "camera-lidar", "fusion-lidar", "none"
        ] = Field(
            "auto",
            description="teacher's and student's sensors: sets weights, clamp and adapters; auto "
            "asks the models; none leaves all of them to the settings below",
            json_schema_extra={"source": "paper, section 4; code: one file for each path"},
        )
        feature: float | None = Field(
            None,
            ge=0,
            description="weight a of the low features at nine points; the path's when not given",
            json_schema_extra={"source": "code: 100, 10, 10, 10 in the order of the paths"},
        )
        relation: float | None = Field(
            None,
            ge=0,
            description="weight b of the relations of the high features; the path's",
            json_schema_extra={"source": "code: 40, 5, 5, 1"},
        )
        response: float | None = Field(
            None,
            ge=0,
            description="weight c of the head's responses; the path's",
            json_schema_extra={"source": "code: 10, 10, 1, 10"},
        )
        strength: float = Field(
            1.0,
            ge=0,
            description="factor on the three weights, for detectors whose losses have another size",
            json_schema_extra={"source": "chosen here; 1 is the released pair's"},
        )
        adapters: Literal["path", "on", "off"] = Field(
            "path",
            description="one layer on the student's side before features and relations",
            json_schema_extra={"source": "paper: camera-lidar only; commented out in the code"},
        )
        clamp: float | None = Field(
            None,
            gt=0,
            lt=0.5,
            description="probabilities of the class response are kept in [clamp, 1 - clamp]",
            json_schema_extra={"source": "code: 1e-4, 1e-3 for fusion-camera"},
        )
        teacher_temperature: float = Field(
            2.0,
            gt=0,
            description="softens the teacher's heat map only, so equals differ; 1 is symmetrical",
            json_schema_extra={"source": "code"},
        )
        min_overlap: float = Field(
            0.7,
            gt=0,
            lt=1,
            description="of the Gaussian's radius",
            json_schema_extra={"source": "code"},
        )
        min_radius: int = Field(
            0,
            ge=0,
            description="least radius of the Gaussian in cells",
            json_schema_extra={"source": "code"},
        )
        eps: float = Field(
            1e-4,
            gt=0,
            description="of the norms and denominators",
            json_schema_extra={"source": "code"},
        )
        transpose_points: bool = Field(
            False,
            description="exchange x and y before sampling; only to compare with the release",
            json_schema_extra={"source": "code, where it is a mistake"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={"transpose_points": True, "adapters": "off"},
            about="as released: x and y exchanged, no adapters",
        ),
        "feature-only": Variant(
            set={"relation": 0.0, "response": 0.0}, about="low features at nine points alone"
        ),
        "relation-only": Variant(
            set={"feature": 0.0, "response": 0.0}, about="relations of high features alone"
        ),
        "response-only": Variant(
            set={"feature": 0.0, "relation": 0.0}, about="responses of the head alone"
        ),
        "points-only": Variant(
            set={"response": 0.0}, about="features and relations at nine points, no responses"
        ),
        "no-adapters": Variant(set={"adapters": "off"}, about="camera-lidar without adapters"),
        "symmetric": Variant(
            set={"teacher_temperature": 1.0}, about="heat maps of both sides taken alike"
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim(
            "finds more than the student alone at equal steps", "map", "unidistill", "supervised"
        ),
        Claim(
            "places what it finds better than the student alone",
            "translation_error",
            "unidistill",
            "supervised",
            expect="lower",
        ),
        Claim(
            "nine points beat the whole map (features, relations; no responses on either side)",
            "map",
            "unidistill/points-only",
            "bev-kd/whole-map",
        ),
        Claim(
            "nine points beat a Gaussian mask (no responses on either side)",
            "map",
            "unidistill/points-only",
            "bev-kd/gaussian",
        ),
        Claim(
            "all three terms beat the responses alone",
            "map",
            "unidistill",
            "unidistill/response-only",
        ),
        Claim("beats the losses of X-Ray on the same pair", "map", "unidistill", "bev-kd/x-ray"),
    ]

    def path(self, student: Any, teacher: Any) -> Path:
        """Weights, clamp and adapters: the path's, where the settings say nothing.

        Args:
            student: the net that is trained.
            teacher: the net that teaches; None where only its outputs are known.

        Raises:
            RecipeError: the models do not say their sensors, or the path is none of the four.
        """
        config, name = self.config, self.config.path
        if name == "auto":
            pair = (_sensors(teacher), _sensors(student))
            name = "-".join(pair)
            if name not in PATHS:
                known = ", ".join(PATHS)
                raise RecipeError(
                    f"the path '{name}' (teacher-student) is none of {known}: name the sensors in "
                    "the models' options or set settings.path ('none' with the weights feature, "
                    "relation, response, and adapters)"
                )
        base = PATHS.get(name, Path(0.0, 0.0, 0.0, 1e-4, False))
        weights = [
            config.strength * (given if given is not None else own)
            for given, own in zip(
                (config.feature, config.relation, config.response), base[:3], strict=True
            )
        ]
        if not any(weights):
            raise RecipeError("every weight of unidistill is 0: that is the student alone")
        clamp = base.clamp if config.clamp is None else config.clamp
        adapters = base.adapters if config.adapters == "path" else config.adapters == "on"
        return Path(weights[0], weights[1], weights[2], clamp, adapters)

    def objective(self, job: Any, student: GridNet, teacher: Any) -> Objective:
        """The student with what its path puts beside it.

        Raises:
            ModelError: head maps of teacher and student that cannot be compared.
        """
        # Stored outputs have no net, but the run knows whose they are.
        net = getattr(teacher, "net", None) or getattr(job.models, "teacher_net", None)
        path = self.path(student, net)
        for alias in ("low", "high"):
            student.add_tap(alias)
        teacher.bind(UniDistillObjective.wants, job.task)
        ours, theirs = _looked_at(job, student, teacher)
        if path.response:
            _check_heads(ours, theirs)
        adapters = None
        if path.adapters:
            low, high = (ours[alias].shape[1] for alias in ("low", "high"))
            adapters = (
                job.build(lambda: Adapter(low), "adapter", "low"),
                job.build(lambda: Adapter(high), "adapter", "high"),
            )
        widths = (ours["low"].shape[1], theirs["low"].shape[1])
        projection = None
        if widths[0] != widths[1]:
            projection = job.build(lambda: nn.Conv2d(*widths, 1), "projection")
        return UniDistillObjective(
            student,
            job.task,
            self.config,
            path,
            net.grid if isinstance(net, GridNet) else job.task.grid,
            student.grid.over(ours["heat"]),
            adapters,
            projection,
        )

    def details(self, job: Any, artifact: Any) -> dict[str, Any]:
        """The path, and what it sets."""
        net = getattr(job.models, "teacher_net", None)
        path = self.path(artifact.module, net)
        rows = [
            ["teacher reads", _sensors(net)],
            ["student reads", _sensors(artifact.module)],
            ["weight of the features at nine points", path.feature],
            ["weight of their relations", path.relation],
            ["weight of the responses", path.response],
            ["adapters", "yes" if path.adapters else "no"],
        ]
        return {"tables": [{"title": "Path", "columns": ["", "value"], "rows": rows}]}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny detectors on a few simulated frames: cameras teach a LiDAR, with adapters."""
        small = {"width": 4, "widths": [4, 4, 4], "head_width": 4, "image_width": 8}
        return {
            "method": "unidistill",
            "data": {
                "name": "driving_scenes",
                "options": {
                    "train": 4,
                    "held": 1,
                    "test": 2,
                    "beams": 8,
                    "azimuths": 48,
                    "cameras": 2,
                    "image": [16, 24],
                    "cell": 3.2,
                },
            },
            "teacher": {
                "model": "stillhouse:mini_bev",
                "options": {**small, "sensors": ["camera"], "depths": [2.0, 24.0, 6]},
            },
            "student": {"model": "stillhouse:mini_bev", "options": small},
            "budget": {"steps": 4, "batch": 2, "lr": 0.01, "optimizer": "adamw"},
            "seed": seed,
        }


def _sensors(net: Any) -> str:
    """ "lidar", "camera" or "fusion", as a detector says of itself; "unknown" where it does not."""
    named = set(getattr(getattr(net, "module", None), "sensors", ()))
    if named == {"lidar", "camera"}:
        return "fusion"
    return named.pop() if len(named) == 1 else "unknown"


def _looked_at(job: Any, student: GridNet, teacher: Any) -> tuple[dict[str, Tensor], ...]:
    """One frame through both: what passes at the taps and comes out of the heads."""
    order = job.order("train", 1, shuffle=False)
    batch = order.read(order.epoch(0, lambda: job.rng("look"))[0], job.views()).to(job.device)
    move = getattr(teacher, "to", None)
    if move is not None:
        move(job.device)
    training = student.training
    student.eval()
    with no_grad():
        out = student(batch.view("x"))
        known = teacher.knowledge(batch)
    student.train(training)
    ours = {**out["taps"], "heat": out["heat"], "regression": out["regression"]}
    theirs = {
        "low": known.tensor(LOW.key),
        "high": known.tensor(HIGH.key),
        "heat": known.tensor(HEAT.key),
        "regression": known.tensor(REGRESSION.key),
    }
    return ours, theirs


def _check_heads(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, what in (("heat", "heat maps"), ("regression", "regression maps")):
        a, b = ours[name].shape, theirs[name].shape
        if a[-2:] != b[-2:] or (name == "regression" and a[1] != b[1]):
            raise ModelError(
                f"the {what} of student {tuple(a[1:])} and teacher {tuple(b[1:])} cannot be "
                "compared: the response terms need heads of one grid with the same branches; set "
                "settings.response to 0 to do without them"
            )
