"""LPLD: which boxes are distilled, how, and what the adaptation leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.detection import feature_distance
from stillhouse.models.detector_net import background_first, background_last
from stillhouse.parts.ema import EMA
from stillhouse.parts.strong_views import StrongView, blurred, hue_turned
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.teacher import Knowledge

Lpld: Any = catalogue.load("lpld")
lpld = __import__(Lpld.__module__, fromlist=["low_confidence"])


def tensors(case) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in case.items()}


def chosen(case, **settings):
    return lpld.low_confidence(
        case["proposals"], case["z_teacher"], case["t_deltas"], case["hpl_boxes"], **settings
    )


# ----------------------------------------------------------------------------- reference
@pytest.mark.parametrize("name", ["step0", "step1", "step2"])
def test_the_step_is_the_released_one(golden, name):
    case = tensors(golden("lpld").case(name))
    found = chosen(case)
    assert torch.equal(found.keep, case["keep"])
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.boxes.double(), case["decoded_ref"], **near)
    torch.testing.assert_close(found.overlap.double(), case["max_iou_ref"].double(), **near)
    torch.testing.assert_close(found.peak, case["q_max_ref"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.background, case["bg_prob_ref"], rtol=1e-9, atol=1e-9)
    weight = feature_distance(case["s_feat"].double(), case["t_feat"].double())
    torch.testing.assert_close(weight, case["weight_ref"], rtol=1e-6, atol=1e-6)
    assert bool(case["official_has_term"]) == (len(found.keep) > 0)
    if not len(found.keep):
        return
    keep, classes = found.keep, int(case["num_classes"])
    feature = case["s_feat"].double().requires_grad_(True)
    w = case["s_W"].double().requires_grad_(True)
    z = feature @ w.T + case["s_b"].double()
    torch.testing.assert_close(z.detach(), case["z_student"], rtol=1e-5, atol=1e-5)
    distance = feature_distance(feature, case["t_feat"].double())
    loss = lpld.low_loss(z[keep], case["z_teacher"][keep, :classes], distance[keep])
    loss.backward()
    value = loss.detach()
    torch.testing.assert_close(value, case["loss_ref"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(value.float(), case["loss_official"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        feature.grad.float(), case["g_student_feat_mean"], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(w.grad.float(), case["g_s_W"], rtol=1e-4, atol=1e-6)
    logits = case["z_student"].clone().requires_grad_(True)
    lpld.low_loss(
        logits[keep], case["z_teacher"][keep, :classes], case["weight_ref"][keep]
    ).backward()
    torch.testing.assert_close(logits.grad, case["g_z_student"], rtol=1e-6, atol=1e-6)


def test_the_divergence_is_the_released_one(golden):
    case = tensors(golden("lpld").case("kl"))
    student = case["student_logits"].requires_grad_(True)
    loss = lpld.low_loss(student, case["teacher_fg_logits"], case["weight"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student.grad, case["g_student"], rtol=1e-9, atol=1e-9)
    plain = lpld.low_loss(student.detach(), case["teacher_fg_logits"])
    torch.testing.assert_close(plain, case["loss_no_weight"], rtol=1e-9, atol=1e-9)


def test_probabilities_that_underflow_give_the_corrected_value(golden):
    case = tensors(golden("lpld").case("kl_extreme"))
    assert not torch.isfinite(case["loss_official_float32"])
    student = case["student_logits"].requires_grad_(True)
    loss = lpld.low_loss(student, case["teacher_fg_logits"])
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), case["loss_corrected"], rtol=1e-4, atol=0)
    assert torch.isfinite(student.grad).all()


def test_a_background_that_comes_first_gives_the_same_step(golden):
    vectors = golden("lpld")
    first, case = tensors(vectors.case("bg_first")), tensors(vectors.case("step0"))
    turned = {**case, "z_teacher": background_last(first["z_teacher"])}
    assert torch.equal(turned["z_teacher"], case["z_teacher"])
    assert torch.equal(background_first(case["z_student"]), first["z_student"])
    keep = chosen(turned).keep
    assert torch.equal(keep, case["keep"])
    z = background_last(first["z_student"])
    classes = int(case["num_classes"])
    loss = lpld.low_loss(z[keep], turned["z_teacher"][keep, :classes], case["weight_ref"][keep])
    torch.testing.assert_close(loss, case["loss_ref"].double(), rtol=1e-6, atol=1e-9)


class LinearAndNorm(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.l = nn.Linear(columns, rows)
        self.bn = nn.BatchNorm1d(rows)


@pytest.mark.parametrize("truncate", [True, False])
def test_the_average_moves_as_released(golden, truncate):
    case = tensors(golden("lpld").case("ema"))
    state = {
        role: {k.partition(".")[2]: v for k, v in case.items() if k.startswith(role + ".")}
        for role in ("student", "teacher0", "teacher1", "teacher2")
    }
    module = LinearAndNorm(*state["student"]["l.weight"].shape)
    module.load_state_dict(state["teacher0"])
    average = EMA(module, 0.75, when="epoch", truncate=truncate)
    module.load_state_dict(state["student"])
    for epoch in (1, 2):
        average.after_step(Clock(ends_epoch=False))  # within an epoch nothing moves
        average.after_step(Clock(ends_epoch=True))
        for name, value in average.module.state_dict().items():
            wanted = state[f"teacher{epoch}"][name]
            if name == "bn.num_batches_tracked" and not truncate:
                wanted = state["student"][name]
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_pseudo_labels_score_strictly_more_than_the_threshold(golden):
    case = tensors(golden("lpld").case("hpl"))
    config = Lpld.Config()
    boxes = torch.arange(4 * len(case["scores"])).reshape(-1, 4).float()
    found = [{"boxes": boxes, "scores": case["scores"], "labels": case["classes"]}]
    objective = lpld.LpldObjective.__new__(lpld.LpldObjective)
    nn.Module.__init__(objective)
    objective.config = config
    kept, labels = objective._confident(Batch(), None, found)
    assert torch.equal(kept[0], boxes[case["keep"]])
    assert torch.equal(labels[0], case["classes"][case["keep"]])


# ----------------------------------------------------------------------------- properties
def test_the_hand_value_of_the_sheet():
    student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    loss = lpld.low_loss(student, teacher, torch.ones(1))
    torch.testing.assert_close(loss, torch.tensor(0.0305314), rtol=0, atol=5e-8)


def test_it_is_linear_in_the_distance_and_nothing_without():
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 4, generator=rng), torch.randn(4, 3, generator=rng)
    weight = torch.rand(4, generator=rng)
    once = lpld.low_loss(student, teacher, weight)
    torch.testing.assert_close(lpld.low_loss(student, teacher, 3 * weight), 3 * once)
    assert lpld.low_loss(student, teacher, torch.zeros(4)) == 0
    learnt = weight.clone().requires_grad_(True)
    z = student.clone().requires_grad_(True)
    lpld.low_loss(z, teacher, learnt).backward()
    assert learnt.grad is None
    assert z.grad.abs().sum() > 0


def filters(peak=0.95, background=0.5, overlap=0.0):
    """One proposal of three classes with these figures, and a pseudo-label."""
    q = torch.tensor([peak, (1 - peak) / 2, (1 - peak) / 2], dtype=torch.float64)
    p = torch.cat([q * (1 - background), torch.tensor([background], dtype=torch.float64)])
    box = torch.tensor([[0.0, 0.0, 100.0, 100.0]], dtype=torch.float64)
    # a label inside the box with area `overlap` of it: their IoU is the share
    label = torch.tensor([[0.0, 0.0, 100.0 * overlap, 100.0]], dtype=torch.float64)
    return lpld.low_confidence(
        box, p.log()[None], torch.zeros(1, 12, dtype=torch.float64),
        label if overlap else label + torch.tensor([500.0, 0, 600, 0], dtype=torch.float64),
    )  # fmt: skip


def test_what_is_kept_at_the_borders():
    assert len(filters().keep) == 1
    assert len(filters(overlap=0.40).keep) == 1
    assert len(filters(overlap=0.41).keep) == 0
    assert len(filters(peak=0.901).keep) == 1
    assert len(filters(peak=0.89).keep) == 0
    assert len(filters(background=0.985).keep) == 1
    assert len(filters(background=0.995).keep) == 0


def test_without_the_class_filter_only_the_overlap_decides():
    logits = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    deltas, label = torch.zeros(2, 8), boxes[:1]
    assert lpld.low_confidence(boxes, logits, deltas, label).keep.tolist() == []
    assert lpld.low_confidence(boxes, logits, deltas, label, by_class=False).keep.tolist() == [1]
    none = label[:0]
    assert lpld.low_confidence(boxes, logits, deltas, none, by_class=False).keep.tolist() == []


def test_deltas_equal_for_all_classes_move_the_box_too():
    logits = torch.tensor([[5.0, 0.0, 0.0]])
    box, deltas = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[10.0, 0.0, 0.0, 0.0]])
    moved = lpld.low_confidence(box, logits, deltas, box).boxes
    torch.testing.assert_close(moved, torch.tensor([[10.0, 0.0, 20.0, 10.0]]))


@pytest.mark.parametrize("seed", range(6))
def test_a_strong_view_keeps_the_frame(seed):
    image = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(9))
    before = image.clone()
    view = StrongView()(image, torch.Generator().manual_seed(seed))
    again = StrongView()(image, torch.Generator().manual_seed(seed))
    assert view.shape == image.shape
    assert torch.equal(view, again)
    assert torch.equal(image, before)
    assert view.min() >= 0
    assert view.max() <= 1


def test_hue_and_saturation_are_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))
    for turn in (-0.3, 0.08, 0.5):
        torch.testing.assert_close(
            hue_turned(image, turn), functional.adjust_hue(image, turn), atol=2e-5, rtol=0
        )
    blurry = functional.gaussian_blur(image, [7, 7], [1.0, 1.0])
    torch.testing.assert_close(blurred(image, 1.0), blurry, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- a step
EVERYTHING = {"peak": 0.0, "background": 1.0, "overlap": 1.0}  # where there is a pseudo-label


def opened(tmp_path, **settings):
    """A detector that speaks, its objective, and a batch that is ready."""
    recipe = load_recipe({**Lpld.example(0), "settings": settings, "compare": []})
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    teacher = job.teacher()
    with torch.no_grad():  # nearly untrained, its scores are flat: make it sure of some boxes
        teacher.guest().module.module.roi_heads.box_predictor.cls_score.weight.mul_(60)
    objective = method.objective(job, job.student(), teacher).train()
    order = method.order(job)
    batch = order.read(torch.arange(4), job.views())
    return job, objective, teacher, batch


def prepared(objective, batch, clock=None):
    with torch.no_grad():
        return objective.prepare(batch, clock or Clock())


def found(objective, batch):
    torch.manual_seed(0)
    return objective(batch, Knowledge.none, Clock())


def test_without_a_pseudo_label_the_terms_are_the_detectors_alone(tmp_path):
    _, objective, _, batch = opened(tmp_path)
    ready = prepared(objective, batch)
    assert sum(map(len, ready["hpl_boxes"])) > 0
    for name in ("low_boxes", "low_logits", "low_features"):
        ready[name] = [own[:0] for own in ready[name]]
    assert objective.count(ready) == {"": 4, "low": 0}
    terms = found(objective, ready)
    torch.manual_seed(0)
    features = objective.student.features(ready["strong"])
    alone = objective.student.losses(features, ready["hpl_boxes"], ready["hpl_labels"])
    assert terms.keys() == alone.keys()
    assert all(torch.equal(terms[name], alone[name]) for name in alone)


def test_the_gradient_reaches_the_backbone_and_no_teacher(tmp_path):
    _, objective, teacher, batch = opened(tmp_path, **EVERYTHING)
    ready = prepared(objective, batch)
    assert objective.count(ready)["low"] > 0
    found(objective, ready)["low"].backward()
    first = objective.student.module.backbone.layers[0].weight
    assert first.grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.average.parameters())
    assert all(p.grad is None for p in teacher.guest().module.parameters())


def test_batches_are_averaged_over_kept_boxes(tmp_path):
    _, objective, _, batch = opened(tmp_path, **EVERYTHING)
    ready = prepared(objective, batch)
    objective.eval()
    whole = found(objective, ready)["low"].detach()
    total, boxes = 0.0, 0
    for part in ready.split(4):
        count = objective.count(part)["low"]
        if count:
            total += float(found(objective, part)["low"].detach()) * count
            boxes += count
    assert boxes == objective.count(ready)["low"]
    assert total / boxes == pytest.approx(float(whole), rel=1e-5)


def test_images_without_a_label_are_left_out_when_told(tmp_path):
    _, objective, _, batch = opened(tmp_path, skip_empty=True, threshold=0.999)
    ready = prepared(objective, batch)
    ready["hpl_boxes"] = [own[:0] for own in ready["hpl_boxes"]]
    ready["hpl_boxes"][2] = torch.tensor([[2.0, 2.0, 12.0, 12.0]])
    ready["hpl_labels"] = [torch.zeros(len(b), dtype=torch.int64) for b in ready["hpl_boxes"]]
    ready["trained"] = [len(own) > 0 for own in ready["hpl_boxes"]]
    for name in ("low_boxes", "low_logits", "low_features"):
        ready[name] = [own[:0] for own in ready[name]]
    assert objective.count(ready) == {"": 1, "low": 0}
    own = found(objective, ready)
    torch.manual_seed(0)
    features = objective.student.features(ready["strong"][2:3])
    alone = objective.student.losses(features, ready["hpl_boxes"][2:3], ready["hpl_labels"][2:3])
    for name, value in alone.items():
        torch.testing.assert_close(own[name], value)
    ready["trained"] = [False] * 4
    assert objective.count(ready) == {"": 0, "low": 0}  # the loop then refuses the step
    assert found(objective, ready) == {}


def test_the_strong_view_is_what_makes_a_distance(tmp_path):
    for strong, wanted in ((False, 0.0), (True, 1e-4)):
        _, objective, _, batch = opened(tmp_path / str(strong), strong=strong, **EVERYTHING)
        ready = prepared(objective, batch)
        found(objective.eval(), ready)
        distance = float(objective.notes["distance"])
        assert distance < 1e-6 if not strong else distance > wanted


def test_views_are_of_the_row_and_the_step_alone(tmp_path):
    _, objective, _, batch = opened(tmp_path)
    whole = prepared(objective, batch, Clock(step=3))["strong"]
    part = prepared(objective, batch.narrow(2, 3), Clock(step=3))["strong"]
    assert torch.equal(whole[2], part[0])
    other = prepared(objective, batch, Clock(step=4))["strong"]
    assert not torch.equal(whole[2], other[2])


def test_the_oracle_sees_the_true_boxes(tmp_path):
    _, objective, _, batch = opened(tmp_path, labels="true", low_weight=0.0)
    ready = prepared(objective, batch)
    for own, true in zip(ready["hpl_boxes"], batch["boxes"], strict=True):
        torch.testing.assert_close(own, true)  # images are not resized here
    assert sum(map(len, ready["low_boxes"])) == 0


def test_norms_stay_as_the_source_left_them(tmp_path):
    job, objective, _, _ = opened(tmp_path)
    norms = [m for m in objective.student.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    job.fit("student", objective, job.order("train"))
    assert norms
    assert all(torch.equal(a, m.running_mean) for a, m in zip(before, norms, strict=True))
    assert not any(m.weight.requires_grad for m in norms)
    moved = objective.student.module.backbone.layers[0].weight
    assert not torch.equal(moved, objective.average.module.module.backbone.layers[0].weight)


def test_every_variant_runs_and_deploys_what_it_says(tmp_path):
    for name in ("mean-teacher", "all-proposals", "no-distance", "oracle", "skip-empty"):
        recipe = load_recipe({**Lpld.example(0), "variant": name, "compare": []})
        job = open_job(recipe, tmp_path / name)
        open_method(recipe).run(job)
        job.log.close()
    _, objective, _, _ = opened(tmp_path / "deploy", deploy="student")
    assert objective.export() is objective.student
    _, objective, _, _ = opened(tmp_path / "average")
    assert objective.export() is objective.average.module
    assert Lpld.variants["official"].set == {"counters": "truncate"}


def detector(classes: int) -> nn.Module:
    """A tiny instance of torchvision's own class."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import (
        AnchorGenerator,
        FastRCNNPredictor,
        TwoMLPHead,
    )
    from torchvision.ops import MultiScaleRoIAlign

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    return FasterRCNN(
        backbone,
        None,
        min_size=48,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((12, 20),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(8 * 49, 16),
        box_predictor=FastRCNNPredictor(16, classes),
        rpn_post_nms_top_n_test=20,
    )


def test_torchvisions_own_class_handed_in_adapts(tmp_path):
    torch.manual_seed(1)
    source = detector(4)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    spec = {k: v for k, v in Lpld.example(0).items() if k not in {"teacher", "student"}}
    settings = {"threshold": 0.1, "deploy": "student", **EVERYTHING}
    recipe = load_recipe({**spec, "settings": settings, "compare": []})
    job = open_job(recipe, tmp_path, given=Given(student=source, teacher=source))
    artifact = open_method(recipe).run(job)
    after = artifact.module.module.state_dict()
    assert after.keys() == before.keys()  # torchvision's own: its checkpoint goes back to it
    assert all(torch.equal(before[k], v) for k, v in source.state_dict().items())
    assert not torch.equal(after["backbone.0.weight"], before["backbone.0.weight"])
    assert job.evaluate(artifact.module, "val")["ap50"] >= 0


@pytest.mark.slow
def test_a_checkpoint_of_torchvisions_builder_adapts(tmp_path):
    from stillhouse.models.loading import load_model

    name = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
    options = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 8,
               "rpn_post_nms_top_n_train": 16, "num_classes": 4}  # fmt: skip
    save_file(load_model(name, options=options).state_dict(), tmp_path / "own.safetensors")
    model = {"model": name, "options": options}
    recipe = load_recipe({
        **Lpld.example(0), "student": model, "compare": [],
        "teacher": {**model, "weights": str(tmp_path / "own.safetensors")},
        "settings": {"threshold": 0.1, **EVERYTHING},
        "budget": {"steps": 1, "batch": 1, "lr": 1e-3},
    })  # fmt: skip
    job = open_job(recipe, tmp_path / "run")
    artifact = open_method(recipe).run(job)
    assert artifact.model["id"] == name
    assert job.evaluate(artifact.module, "val")["ap50"] >= 0


# ----------------------------------------------------------------------------- bad input, kills
def test_what_cannot_adapt_is_told_before_training(tmp_path):
    spec = {**Lpld.example(0), "compare": []}
    small = {**spec["student"], "options": {**spec["student"]["options"], "hidden": 8}}
    with pytest.raises(ModelError, match=r"same network as the source.*\(8, .*\(16, "):
        run(load_recipe({**spec, "student": small}), folder=tmp_path / "a", progress=False)
    (tmp_path / "s").mkdir()
    alone = {key: value for key, value in spec.items() if key != "teacher"}
    with pytest.raises(RecipeError, match="needs a teacher"):
        run(load_recipe(alone), folder=tmp_path / "b", progress=False)
    with pytest.raises(RecipeError, match="threshold"):
        run(load_recipe({**spec, "settings": {"threshold": 1.5}}), folder=tmp_path / "c")
    assert not list(tmp_path.rglob("step-*"))


def test_killed_and_run_again_it_ends_the_same(tmp_path, kill_and_resume):
    spec = {**Lpld.example(0), "compare": [], "output": {"checkpoint_minutes": 1e-6}}
    recipe = load_recipe({**spec, "budget": {**spec["budget"], "steps": 9}})

    def train(folder):
        job = open_job(recipe, folder)
        artifact = open_method(recipe).run(job)
        save_file(plain_state(artifact.module), folder / "end.safetensors")

    train(tmp_path / "whole")
    folder = tmp_path / "killed"
    killed = kill_and_resume(lambda: train(folder), folder, kills=2)
    assert killed
    whole, again = (load_file(f / "end.safetensors") for f in (tmp_path / "whole", folder))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
