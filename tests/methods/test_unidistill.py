from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.baselines.bev_kd import BevKDObjective
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.data.registry import open_data
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.bev import box_response, class_response
from stillhouse.losses.features import absolute_by_item
from stillhouse.losses.relations import gram
from stillhouse.methods.driving.unidistill import (
    PATHS,
    Adapter,
    UniDistillObjective,
    at_nine_points,
)
from stillhouse.opening import open_artifact
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.boxes import ground_corners, nine_points
from stillhouse.parts.centre_maps import gaussian_mask, gaussian_radius
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks import open_task
from stillhouse.tasks.driving import GridNet
from stillhouse.teacher import Knowledge

UniDistill: Any = catalogue.load("unidistill")
BevKD: Any = catalogue.load("bev-kd")
SMALL = {"width": 4, "widths": [4, 4, 4], "head_width": 4, "image_width": 8}
# The vectors' ground: 20 m a side in cells of a metre.
GRID = Grid((-10.0, -10.0, -5.0, 10.0, 10.0, 3.0), (1.0, 1.0))
EPS = 1e-4


def tensors(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    found = {k: torch.from_numpy(np.asarray(v)) for k, v in case.items()}
    return {k: v if v.dtype == torch.bool else v.double() for k, v in found.items()}


def shared(boxes: Tensor, valid: Tensor) -> Tensor:
    return valid & GRID.inside(boxes)


def feature_loss(student, teacher, boxes, valid, **settings):
    ours, theirs = (
        at_nine_points(m, boxes, shared(boxes, valid), GRID, **settings) for m in (student, teacher)
    )
    return absolute_by_item(ours, theirs, eps=EPS)


def relation_loss(student, teacher, boxes, valid, **settings):
    ours, theirs = (
        gram(at_nine_points(m, boxes, shared(boxes, valid), GRID, **settings), eps=EPS)
        for m in (student, teacher)
    )
    return absolute_by_item(ours, theirs, eps=EPS)


def heads(case: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Logits and regression channels of all tasks of a side of the case `response`."""
    tasks = sorted(k for k in case if k.startswith(side) and k.endswith("_hm"))
    return (
        torch.cat([case[k] for k in tasks], 1),
        torch.cat([case[k.replace("_hm", "_reg")] for k in tasks], 1),
    )


def padding(boxes: Tensor) -> Tensor:
    return boxes.abs().sum(-1) > 0


# ----------------------------------------------------------------------------- reference
def test_geometry_is_the_released_one(golden):
    vectors = golden("unidistill")
    case = tensors(vectors.case("geometry"))
    valid = case["valid"]
    found = ground_corners(case["boxes"])
    for ours, theirs in zip(found[valid], case["corners"][valid], strict=True):
        assert torch.cdist(ours[None], theirs[None]).min(-1).values.max() < 1e-10
    torch.testing.assert_close(
        nine_points(case["boxes"])[valid], case["nine"][valid], rtol=0, atol=1e-10
    )
    cells = GRID.cells(case["nine"])
    torch.testing.assert_close(cells[valid], case["nine_cells"][valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "loss"), [("feature", feature_loss), ("relation", relation_loss)])
def test_points_give_the_reference_losses_and_gradients(golden, name, loss):
    vectors = golden("unidistill")
    place, case = tensors(vectors.case("geometry")), tensors(vectors.case(name))
    for form, swap in (("corrected", False), ("official", True)):
        student = case["student"].clone().requires_grad_()
        found = loss(
            student, case["teacher"], place["boxes"], place["valid"], transpose_points=swap
        )
        assert abs(float(found.detach() - case[f"loss_{form}"])) < 1e-7
        found.backward()
        wanted = case[f"grad_student_{form}"]
        torch.testing.assert_close(student.grad, wanted, rtol=1e-5, atol=1e-8)


def test_the_release_samples_at_the_mirror_position(golden):
    case = tensors(golden("unidistill").case("asymmetry"))
    teacher = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    teacher[0, 0, 5, 18] = 1
    valid = torch.ones(1, 1, dtype=torch.bool)
    for form, swap in (("corrected", False), ("official", True)):
        found = feature_loss(
            torch.zeros_like(teacher), teacher, case["box"], valid, transpose_points=swap
        )
        assert abs(float(found - case[f"loss_{form}"])) < 1e-7
    assert case["loss_corrected"] > 0 == case["loss_official"]


def test_the_radius_is_the_released_one(golden):
    case = tensors(golden("unidistill").case("gaussian_radius"))
    length, width = case["sizes"].unbind(-1)
    for overlap in (0.7, 0.5):
        found = gaussian_radius(length, width, overlap)
        wanted = case[f"radius0{round(overlap * 10)}"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_responses_are_the_released_ones(golden):
    case = tensors(golden("unidistill").case("response"))
    boxes = case["boxes"]
    mask = gaussian_mask(boxes, padding(boxes), GRID).double()
    torch.testing.assert_close(mask, case["mask"], rtol=0, atol=1e-6)
    case["s0_hm"].requires_grad_()
    case["s0_reg"].requires_grad_()
    (heat, reg), (heat_t, reg_t) = heads(case, "s"), heads(case, "t")
    settings = {"clamp": 1e-4, "eps": EPS}
    cls = class_response(heat, heat_t, mask, teacher_temperature=2.0, **settings)
    box = box_response(reg, reg_t, mask, eps=EPS)
    assert abs(float(cls.detach() - case["loss_cls"])) < 1e-6
    assert abs(float(box.detach() - case["loss_reg"])) < 1e-6
    (grad_hm,) = torch.autograd.grad(cls, case["s0_hm"], retain_graph=True)
    (grad_reg,) = torch.autograd.grad(box, case["s0_reg"])
    torch.testing.assert_close(grad_hm, case["grad_cls_s0_hm"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_reg[:1], case["grad_reg_s0"], rtol=1e-5, atol=1e-7)
    even = class_response(heat, heat_t, mask, teacher_temperature=1.0, **settings)
    assert abs(float(even.detach() - case["loss_cls_symmetric"])) < 1e-6
    wide = class_response(heat, heat_t, mask, clamp=1e-3, eps=EPS)
    assert abs(float(wide.detach() - case["loss_cls_clamp1e3"])) < 1e-6
    own = class_response(heat, heat, mask, **settings)
    assert abs(float(own.detach() - case["loss_cls_self"])) < 1e-6
    assert class_response(heat, heat, mask, teacher_temperature=1.0, **settings) == 0


def test_the_four_paths_weigh_the_terms_as_released(golden):
    vectors = golden("unidistill")
    totals = tensors(vectors.case("totals"))["totals"]
    feature = tensors(vectors.case("feature"))["loss_corrected"]
    relation = tensors(vectors.case("relation"))["loss_corrected"]
    case = tensors(vectors.case("response"))
    response = case["loss_cls"] + case["loss_reg"]
    for path, total in zip(PATHS.values(), totals, strict=True):
        found = path.feature * feature + path.relation * relation + path.response * response
        assert abs(float(found - total)) < 1e-7
    vectors.count("shared_boxes")


def test_boxes_outside_and_empty_batches_do_not_count(golden):
    vectors = golden("unidistill")
    case = tensors(vectors.case("empty_and_outside"))
    maps = {name: tensors(vectors.case(name)) for name in ("feature", "relation")}
    losses = {"feature": feature_loss, "relation": relation_loss}
    for name, loss in losses.items():
        student, teacher = (maps[name][side] for side in ("student", "teacher"))
        student.requires_grad_()
        found = loss(student, teacher, case["boxes"], case["valid"])
        assert abs(float(found.detach() - case[f"{name}_drop"])) < 1e-7
        nothing = loss(student, teacher, case["boxes"], torch.zeros_like(case["valid"]))
        assert float(nothing.detach()) == float(case["loss_empty"]) == 0
        nothing.backward()
        assert torch.isfinite(student.grad).all()


# ----------------------------------------------------------------------------- properties
BOXES = torch.tensor(
    [
        [[-3.2, 4.1, 0.0, 4.0, 2.0, 1.5, 0.3], [5.0, -6.3, 0.0, 0.8, 0.7, 1.7, -1.0]],
        [[1.7, 2.2, 0.0, 7.0, 2.5, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
    ]
).double()
VALID = torch.tensor([[True, True], [True, False]])


class Student(nn.Module):
    """Maps as parameters: what passes at the taps and comes out of the head."""

    def __init__(self, low=6, high=5, seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        shapes = {"low": (2, low, 20, 20), "high": (2, high, 10, 10)}
        head = {"hm": 3, "reg": 2, "height": 1, "dim": 3, "rot": 2}
        shapes.update({f"head_{k}": (2, w, 10, 10) for k, w in head.items()})
        self.maps = nn.ParameterDict(
            {k: nn.Parameter(torch.randn(s, generator=rng).double()) for k, s in shapes.items()}
        )
        self.low, self.high = nn.Identity(), nn.Identity()
        self.taps = {"low": "low", "high": "high"}

    def forward(self, points):
        self.low(self.maps["low"])
        self.high(self.maps["high"])
        return {"head": [{k[5:]: v for k, v in self.maps.items() if k.startswith("head_")}]}


class PlainTask:
    """A task without a loss of its own."""

    def loss(self, out, batch):
        return {}


def batch_of(boxes=BOXES, valid=VALID):
    return Batch(
        id=torch.arange(len(boxes)),
        x=Batch(points=torch.zeros(len(boxes), 1, 4)),
        boxes=boxes,
        labels=torch.zeros(boxes.shape[:2], dtype=torch.int64),
        valid=valid,
    )


def objective_of(student, path=None, teacher_grid=GRID, **settings):
    config = UniDistill.Config(**settings)
    net = GridNet(student, grid=GRID)
    path = path or PATHS["lidar-camera"]
    adapters = (Adapter(6).double(), Adapter(5).double()) if path.adapters else None
    return UniDistillObjective(
        net, PlainTask(), config, path, teacher_grid, GRID.strided(2), adapters
    )


def known(teacher):
    net = GridNet(teacher, grid=GRID, taps=teacher.taps)
    with torch.no_grad():
        out = net(batch_of()["x"])
    said = {f"tap:{k}": v for k, v in out["taps"].items()}
    return Knowledge({**said, "heat": out["heat"], "regression": out["regression"]})


def terms_of(objective, teacher, batch=None):
    return objective(batch or batch_of(), known(teacher), Clock())


def test_equals_agree_but_for_the_one_sided_temperature():
    terms = terms_of(objective_of(Student()), Student())
    assert terms["feature"] == terms["relation"] == terms["response/box"] == 0
    assert terms["response/class"] > 0
    even = terms_of(objective_of(Student(), teacher_temperature=1.0), Student())
    assert all(value == 0 for value in even.values())


def test_the_objective_weighs_the_terms_by_its_path():
    student, teacher = Student(), Student(seed=1)
    found = {
        name: {k: v.detach() for k, v in terms_of(objective_of(student, path), teacher).items()}
        for name, path in PATHS.items()
    }
    one, *_ = found.values()
    assert one["feature"] / found["fusion-lidar"]["feature"] == pytest.approx(10.0)
    assert one["relation"] / found["fusion-lidar"]["relation"] == pytest.approx(40.0)
    assert one["response/box"] / found["camera-lidar"]["response/box"] == pytest.approx(10.0)
    nine = [at_nine_points(m, BOXES, VALID, GRID) for m in (
        student.maps["low"].data, teacher.maps["low"].data
    )]  # fmt: skip
    assert float(one["feature"]) == pytest.approx(100 * float(absolute_by_item(*nine)))


def test_relations_ignore_the_size_of_features():
    one, larger, teacher = Student(), Student(), Student(seed=1)
    larger.maps["high"].data *= 31.0
    a, b = (terms_of(objective_of(s), teacher)["relation"] for s in (one, larger))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
    other = Student(high=9, seed=2)  # nor do widths matter
    assert terms_of(objective_of(one), other)["relation"] > 0


def test_every_box_once_more_changes_nothing():
    twice = batch_of(BOXES.repeat(1, 2, 1), VALID.repeat(1, 2))
    objective, teacher = objective_of(Student()), Student(seed=1)
    a, b = terms_of(objective, teacher), terms_of(objective, teacher, twice)
    for name in ("feature", "relation"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=0)


def test_the_size_of_a_box_does_not_matter():
    # The same difference everywhere: a large and a small box weigh the same.
    student, teacher = Student(), Student()
    teacher.maps["low"].data = student.maps["low"].data + 1.0
    objective = objective_of(student, path=PATHS["fusion-lidar"])
    for side in (0.5, 6.0):
        box = BOXES[:, :1].clone()
        box[..., 3:5] = side
        found = terms_of(objective, teacher, batch_of(box, VALID[:, :1]))["feature"]
        assert float(found.detach()) == pytest.approx(10.0, rel=1e-3)


def test_responses_count_only_inside_the_mask():
    objective, teacher = objective_of(Student()), Student(seed=1)
    batch = batch_of()
    mask = objective.mask(batch, objective.shared_boxes(batch))
    assert (mask == 1).sum() == 3  # one centre cell a box
    before = terms_of(objective, teacher)
    maps = objective.student.module.maps
    away, centre = (mask == 0).nonzero()[0], (mask == 1).nonzero()[0]
    for place, changes in ((away, False), (centre, True)):
        row, y, x = place.tolist()
        for name in ("head_hm", "head_dim"):
            maps[name].data[row, :, y, x] += 3.0
        after = terms_of(objective, teacher)
        for name in ("response/class", "response/box"):
            assert bool(after[name] != before[name]) == changes


def test_no_gradient_reaches_the_teacher_and_every_adapter_is_trained():
    teacher = Student(seed=1)
    objective = objective_of(Student(), path=PATHS["camera-lidar"])
    sum(terms_of(objective, teacher).values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in objective.parameters())
    names = {n.split(".")[0] for n, _ in objective.named_parameters()}
    assert names == {"student", "adapt_low", "adapt_high"}
    assert len(list(objective.export().parameters())) == len(list(Student().parameters()))


@pytest.mark.parametrize("name", PATHS)
def test_adapters_exist_for_cameras_teaching_a_lidar_only(name):
    path = UniDistill(UniDistill.Config(path=name)).path(None, None)
    assert path.adapters == (name == "camera-lidar")
    assert (path.clamp == 1e-3) == (name == "fusion-camera")
    forced = UniDistill(UniDistill.Config(path=name, adapters="off", strength=0.5))
    assert not forced.path(None, None).adapters
    assert forced.path(None, None).feature == 0.5 * path.feature
    official = UniDistill.variants["official"].set
    assert UniDistill.Config(**official).transpose_points
    assert not UniDistill(UniDistill.Config(path=name, **official)).path(None, None).adapters


def test_a_batch_without_shared_boxes_leaves_the_terms_out():
    batch = batch_of(valid=torch.zeros_like(VALID))
    objective, teacher = objective_of(Student()), Student(seed=1)
    terms = terms_of(objective, teacher, batch)
    assert all(value == 0 for value in terms.values())
    counts = objective.count(batch)
    assert counts["feature"] == counts["relation"] == counts["response"] == 0
    assert counts["task"] == 1
    # A box beyond the teacher's range is not shared, whatever the student sees.
    narrow = Grid((-1.0, -1.0, -5.0, 1.0, 1.0, 3.0), (0.1, 0.1))
    assert objective_of(Student(), teacher_grid=narrow).count(batch_of())["feature"] == 0


def test_teacher_and_student_grids_may_differ_where_points_are_sampled():
    student, teacher = Student(low=1), Student(low=1)
    coarse, fine = torch.arange(20).double() + 0.5, (torch.arange(40).double() + 0.5) / 2
    student.maps["low"].data = coarse.expand(2, 1, 20, 20).clone()
    teacher.maps["low"].data = fine.expand(2, 1, 40, 40).clone()
    assert terms_of(objective_of(student), teacher)["feature"].abs() < 1e-9


def test_micro_batches_add_up_to_the_batch():
    objective, teacher = objective_of(Student(), path=PATHS["fusion-lidar"]), Student(seed=1)
    batch, whole = batch_of(), known(teacher)
    terms, counts = objective(batch, whole, Clock()), objective.count(batch)
    maps = objective.student.module.maps
    held = {k: v.data for k, v in maps.items()}
    found = dict.fromkeys(terms, 0.0)
    for row in range(2):
        for name, value in held.items():
            maps[name].data = value[row : row + 1]
        part, said = batch.narrow(row, row + 1), whole.narrow(row, row + 1)
        own = objective.count(part)
        for name, value in objective(part, said, Clock()).items():
            key = name.split("/")[0]
            found[name] += float(value.detach() * own[key] / counts[key])
    for name, value in terms.items():
        assert found[name] == pytest.approx(float(value.detach()), rel=2e-4)


# ----------------------------------------------------------------------------- runs
def recipe(
    teacher=("camera",), student=("lidar",), method="unidistill", teacher_spec=None, **changes
):
    spec = UniDistill.example(0)
    spec["teacher"].update(teacher_spec or {})
    spec["teacher"]["options"] = {**SMALL, "sensors": list(teacher), "depths": [2.0, 24.0, 6]}
    spec["student"]["options"] = {**SMALL, "sensors": list(student), "depths": [2.0, 24.0, 6]}
    return load_recipe({**spec, "method": method, "task": "driving", "compare": [], **changes})


PAIRS = {
    "lidar-camera": (("lidar",), ("camera",)),
    "fusion-camera": (("lidar", "camera"), ("camera",)),
    "camera-lidar": (("camera",), ("lidar",)),
    "fusion-lidar": (("lidar", "camera"), ("lidar",)),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_path_is_found_from_the_models_and_runs(name, tmp_path):
    result = run(recipe(*PAIRS[name]), folder=tmp_path, progress=False)
    figures = result.sides["distilled"]["0"]
    assert {"map", "translation_error", "map_few_points"} <= set(figures)
    page = (tmp_path / "report.html").read_text()
    for words in ("from above", "from the cameras", "weight of their relations"):
        assert words in page
    reopened = open_artifact(tmp_path)
    source = open_data("driving_scenes", options=UniDistill.example(0)["data"]["options"])
    view = source["val"].read(torch.arange(1), None)["x"]
    frame = {k: v[0].numpy() for k, v in view.items() if k != "point_count"}
    assert isinstance(reopened.predict([frame], score=0.0)[0], list)


class ForeignTeacher(nn.Module):
    """A detector of another code base: named modules, one dictionary in, nests out."""

    sensors = ("camera",)

    def __init__(self, width=3):
        super().__init__()
        self.img_view_transformer = nn.Conv2d(3, width, 1)
        self.bev_backbone = nn.Conv2d(width, 7, 3, 2, 1)
        widths = {"heatmap": 3, "reg": 2, "height": 1, "dim": 3, "rot": 2}
        self.pts_bbox_head = nn.ModuleDict({k: nn.Conv2d(7, w, 1) for k, w in widths.items()})

    def forward(self, batch_dict):
        seen = nn.functional.adaptive_avg_pool2d(batch_dict["images"].mean(1), (16, 16))
        high = self.bev_backbone(self.img_view_transformer(seen))
        return ([{name: layer(high) for name, layer in self.pts_bbox_head.items()}],)


def test_a_foreign_teacher_plugs_in_by_aliases(tmp_path):
    taps = {"low": "img_view_transformer", "high": "bev_backbone"}
    chosen = recipe()
    job = open_job(chosen, tmp_path, given=Given(teacher=foreign_net(job_task(chosen), taps)))
    teacher, student = job.teacher(), job.student()
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    objective = UniDistill().objective(job, student, teacher)
    assert objective.projection.weight.shape[:2] == (3, 4)  # 4 channels led to the teacher's 3
    job.fit("student", objective, job.order("train"), teacher=teacher)
    assert all(torch.equal(before[k], v) for k, v in teacher.net.state_dict().items())
    assert not [n for n, _ in objective.export().named_parameters() if "projection" in n]


def job_task(chosen):
    return open_task("driving", open_data(chosen.data.name, options=chosen.data.options))


def foreign_net(task, taps):
    torch.manual_seed(0)
    return task.net(ForeignTeacher(), taps)


def test_from_a_store_as_from_the_teacher(tmp_path):
    options = {**UniDistill.example(0)["data"]["options"], "mirror": False, "turn": 0.0}
    ends = []
    for name, more in (("live", {}), ("stored", {"store": {"dtype": "float32"}})):
        chosen = recipe(data={"name": "driving_scenes", "options": options}, teacher_spec=more)
        job = open_job(chosen, tmp_path / name)
        ends.append(plain_state(open_method(chosen).run(job).module))
        assert ("capture" in {stage["name"] for stage in job.stages}) == bool(more)
    assert max((ends[0][k] - ends[1][k]).abs().max().item() for k in ends[0]) < 1e-4


def test_what_does_not_fit_is_told_before_training(tmp_path):
    with pytest.raises(RecipeError, match=r"'lidar-lidar'.*settings\.path"):
        run(recipe(("lidar",), ("lidar",)), folder=tmp_path / "a", progress=False)
    with pytest.raises(RecipeError, match="every weight"):
        run(recipe(settings={"strength": 0.0}), folder=tmp_path / "b", progress=False)
    with pytest.raises(RecipeError, match=r"feture.*feature"):
        open_method(recipe(settings={"feture": 0.0}))
    unlike = recipe()
    unlike.teacher.options["velocity"] = True
    with pytest.raises(ModelError, match=r"regression maps.*settings\.response"):
        run(unlike, folder=tmp_path / "c", progress=False)
    unlike.settings = {"response": 0.0}
    assert run(unlike, folder=tmp_path / "d", progress=False).sides


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        budget={"steps": 14, "batch": 2, "lr": 0.01, "optimizer": "adamw"},
        output={"checkpoint_minutes": 0},
    )

    def trained(folder):
        job = open_job(chosen, folder)
        try:
            return plain_state(open_method(chosen).run(job).module)
        finally:
            job.log.close()

    whole = trained(tmp_path / "whole")
    assert kill_and_resume(lambda: trained(tmp_path / "cut"), tmp_path / "cut", 2) >= 1
    again = trained(tmp_path / "cut")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_the_loss_falls_on_a_real_frame(data_root, tmp_path):
    data = {"name": "nuscenes_frames", "options": {"cell": 3.2, "image": [32, 64]}}
    budget = {"steps": 20, "batch": 1, "lr": 0.01, "optimizer": "adamw"}
    chosen = recipe(("lidar",), ("camera",), data=data, budget=budget)
    job = open_job(chosen, tmp_path)
    teacher, student = job.teacher(), job.student()
    objective = UniDistill().objective(job, student, teacher)
    batch = job.order("train").read(torch.arange(1), job.views())
    before = objective.terms(batch, teacher)
    assert set(before) == {
        "task/heat", "task/boxes", "feature", "relation", "response/class", "response/box",
    }  # fmt: skip
    job.fit("student", objective, job.order("train"), teacher=teacher)
    after = objective.train().terms(batch, teacher)
    assert sum(after.values()) < 0.7 * sum(before.values())


# ----------------------------------------------------------------------------- what it beats
@pytest.mark.parametrize("variant", BevKD.variants)
def test_dense_distillation_runs_between_sensors(variant, tmp_path):
    chosen = recipe(method="bev-kd", variant=variant, settings={})
    job = open_job(chosen, tmp_path)
    teacher, student = job.teacher(), job.student()
    objective = open_method(chosen).objective(job, student, teacher)
    batch = job.order("train").read(torch.arange(2), job.views())
    terms = objective.terms(batch, teacher)
    wanted = {"features"} | ({"heads/heat", "heads/boxes"} if variant == "x-ray" else set())
    assert set(terms) == {"task/heat", "task/boxes", *wanted}
    assert all(torch.isfinite(v) and v > 0 for v in terms.values())


def test_masked_maps_ignore_what_is_beside_the_boxes():
    student, teacher = Student(), Student(seed=1)
    net = GridNet(student, grid=GRID)
    row, y, x = (gaussian_mask(BOXES, VALID, GRID) == 0).nonzero()[0].tolist()
    for mask, same in (("gaussian", True), ("none", False)):
        objective = BevKDObjective(net, PlainTask(), BevKD.Config(mask=mask, heads=1.0), None)
        before = objective(batch_of(), known(teacher), Clock())
        student.maps["low"].data[row, :, y, x] += 2.0
        after = objective(batch_of(), known(teacher), Clock())
        assert bool(before["features"] == after["features"]) == same
