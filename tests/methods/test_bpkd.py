from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stillhouse as still
from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError, StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.losses.spatial import kl_space, resized_to, soft_trimap
from stillhouse.methods.dense.bpkd import BPKD, BPKDObjective, body_loss, edge_loss
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.segmentation import AUXILIARY
from stillhouse.teacher import Knowledge

CASES = ["c0_split", "c1_checker", "c2_uniform", "c3_blobs", "c4_allignore", "c5_blobs"]
CLOSE = {"rtol": 1e-6, "atol": 1e-9}
GRADIENT = {"rtol": 1e-6, "atol": 1e-7}


def recipe(**changes: Any):
    given = {**BPKD.example(), "compare": []}
    for key, value in changes.items():
        inner = given.get(key)
        merged = isinstance(inner, dict) and isinstance(value, dict) and key != "budget"
        given[key] = {**inner, **value} if merged else value
    return load_recipe(given)


def trained(chosen, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job)
    finally:
        job.log.close()


def weights(chosen, folder: Path, given: Given | None = None) -> dict[str, torch.Tensor]:
    return plain_state(trained(chosen, folder, given).module)


def objective_of(task, student: nn.Module, **settings: Any) -> BPKDObjective:
    return BPKDObjective(task.net(student), task, BPKD.Config(**settings))


class Given0(nn.Module):
    """Gives logits that are its parameter, whatever the image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


# ----------------------------------------------------------------------------- reference
@pytest.mark.parametrize("name", CASES)
def test_edges_bodies_and_gradients_of_the_reference(golden, name):
    case = {k: torch.from_numpy(v) for k, v in golden("bpkd").case(name).items()}
    student = case["z_student"].double()
    size = (student.shape[2], student.shape[3])
    teacher = resized_to(case["z_teacher"].double(), size)
    if case["z_teacher_resized"].numel():
        torch.testing.assert_close(teacher, case["z_teacher_resized"].double(), rtol=0, atol=1e-6)
    radius = int(case["edge_width"]) // 2
    mask, valid = soft_trimap(case["labels"], student.shape[1], size, radius=radius)
    torch.testing.assert_close(mask, case["M"], rtol=0, atol=1e-6)
    torch.testing.assert_close(valid, case["V"], rtol=0, atol=1e-6)
    mask, valid = mask.double(), valid.double()
    at = {"temperature": float(case["tau"])}
    edge = partial(edge_loss, alpha=float(case["alpha"]), **at)
    found = {
        "edge_nonzero_count": partial(edge, teacher=teacher, mask=mask),
        "edge_soft_sum": partial(edge, teacher=teacher, mask=mask, denominator="soft"),
        "body": partial(body_loss, teacher=teacher, mask=mask, valid=valid, **at),
    }
    for term, loss in found.items():
        leaf = student.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        torch.testing.assert_close(value.detach(), case[term], **CLOSE)
        torch.testing.assert_close(leaf.grad, case[f"g_{term}"].double(), **GRADIENT)
    # without the validity
    raw = case["M_pooled_raw"].double()
    bare = edge(student, teacher, raw, denominator="soft")
    torch.testing.assert_close(bare, case["edge_soft_sum_no_V"], **CLOSE)
    torch.testing.assert_close(body_loss(student, teacher, raw, **at), case["body_no_V"], **CLOSE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", ["nonzero", "soft"])
def test_the_objective_adds_them_up_as_the_reference_does(golden, name, count, tmp_path):
    case = {k: torch.from_numpy(v) for k, v in golden("bpkd").case(name).items()}
    task = open_job(recipe(), tmp_path).task
    logits = case["z_student"].double()
    made = objective_of(
        task,
        Given0(logits),
        radius=int(case["edge_width"]) // 2,
        temperature=float(case["tau"]),
        alpha=float(case["alpha"]),
        edge_denominator=count,
    )
    batch = Batch(x=torch.zeros(len(logits), 3, 4, 4), target=case["labels"])
    terms = made(batch, Knowledge({"logits": case["z_teacher"].double()}), Clock())
    distilled = (terms["edge"] + terms["body"]).detach()
    key = "total_20_50_nonzero_count" if count == "nonzero" else "total_20_50_soft_sum"
    torch.testing.assert_close(distilled, case[key], **CLOSE)


def test_the_hand_case(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("bpkd").case("closed_form").items()}
    mask, _ = soft_trimap(case["labels"], 2, (2, 2), radius=1)
    assert torch.equal(mask, case["M"])
    pair, mask = (case["z_student"], case["z_teacher"]), mask.double()
    at = {"temperature": 1.0, "alpha": 2.0}
    assert float(edge_loss(*pair, mask, **at)) == pytest.approx(0.2483955, abs=1e-7)
    soft = edge_loss(*pair, mask, denominator="soft", **at)
    assert float(soft) == pytest.approx(0.4967910, abs=1e-7)
    body = body_loss(*pair, mask, temperature=1.0)
    assert float(body) == pytest.approx(float(case["body"]), abs=1e-7)
    assert float(body) == pytest.approx(0.1412439, abs=1e-7)


# ----------------------------------------------------------------------------- properties
def maps(seed: int = 0, classes: int = 3, size: int = 6) -> tuple[torch.Tensor, ...]:
    """Logits of both sides and a label map with borders, float64."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, classes, size, size, generator=rng).double()
    labels = torch.zeros(2, 4 * size, 4 * size, dtype=torch.long)
    labels[:, 5:15, 7:] = 1
    return student, teacher, labels


def masked(labels: torch.Tensor, logits: torch.Tensor, radius: int = 2):
    found = soft_trimap(labels, logits.shape[1], tuple(logits.shape[2:]), radius=radius)
    return [m.double() for m in found]


def test_identical_logits_are_at_distance_0():
    student, _, labels = maps()
    mask, valid = masked(labels, student)
    leaf = student.clone().requires_grad_()
    total = edge_loss(leaf, student, mask) + body_loss(leaf, student, mask, valid)
    total.backward()
    assert total == 0
    assert leaf.grad.abs().max() < 1e-15


def test_a_constant_over_classes_counts_only_where_masks_differ():
    student, teacher, labels = maps()
    mask, _ = masked(labels, student)
    shifted = student + 1.5
    assert edge_loss(shifted, teacher, mask) != edge_loss(student, teacher, mask)
    same = mask.amax(1, keepdim=True).expand_as(mask)
    torch.testing.assert_close(edge_loss(shifted, teacher, same), edge_loss(student, teacher, same))


def test_a_uniform_image_is_all_body_and_that_is_channel_wise_distillation():
    student, teacher, labels = maps()
    mask, valid = masked(torch.full_like(labels, 2), student)
    assert mask.sum() == 0
    assert edge_loss(student, teacher, mask) == 0
    torch.testing.assert_close(
        body_loss(student, teacher, mask, valid), kl_space(student, teacher, temperature=4.0)
    )


def test_an_edge_that_covers_everything_leaves_no_body():
    student, teacher, labels = maps()
    mask, valid = masked(labels, student, radius=60)
    assert torch.equal(mask[:, :2], torch.ones_like(mask[:, :2]))
    two = [x[:, :2] for x in (student, teacher, mask)]
    assert body_loss(*two, valid) == 0


def test_a_channels_constant_counts_in_the_body_only_behind_a_mask():
    student, teacher, labels = maps()
    mask, valid = masked(labels, student)
    constant = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1)
    bare = torch.zeros_like(mask)
    torch.testing.assert_close(
        body_loss(student + constant, teacher, bare), body_loss(student, teacher, bare)
    )
    assert body_loss(student + constant, teacher, mask, valid) != body_loss(
        student, teacher, mask, valid
    )


def test_absent_classes_and_ignored_images_give_0_and_no_nan():
    student, teacher, labels = maps()
    for denominator in ("nonzero", "soft"):
        mask, valid = masked(labels, student)
        weighted = edge_loss(student, teacher, mask, alpha=[0, 0, 9.0], denominator=denominator)
        assert weighted == 0  # class 2 does not occur
        mask, valid = masked(torch.full_like(labels, 255), student)
        leaf = student.clone().requires_grad_()
        edge = edge_loss(leaf, teacher, mask, denominator=denominator)
        body = body_loss(leaf, teacher, mask, valid)
        (edge + body).backward()
        assert edge == 0
        assert body == 0
        assert leaf.grad.abs().sum() == 0


def test_gradients_are_finite_for_large_logits_and_none_reaches_the_teacher(tmp_path):
    task = open_job(recipe(), tmp_path).task
    student, teacher, labels = maps()
    module = Given0(student.float() * 1e3)
    made = objective_of(task, module)
    told = (teacher.float() * 1e3).requires_grad_()
    batch = Batch(x=torch.zeros(2, 3, 4, 4), target=labels)
    terms = made(batch, Knowledge({"logits": told}), Clock())
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert torch.isfinite(module.logits.grad).all()
    assert module.logits.grad.abs().sum() > 0
    assert told.grad is None


def test_alpha_weighs_class_by_class():
    student, teacher, labels = maps()
    mask, _ = masked(labels, student)
    one = [edge_loss(student, teacher, mask, alpha=[float(c == k) for c in range(3)])
           for k in range(3)]  # fmt: skip
    torch.testing.assert_close(
        edge_loss(student, teacher, mask, alpha=[1.0, 3.0, 5.0]), one[0] + 3 * one[1] + 5 * one[2]
    )
    with pytest.raises(ModelError, match="alpha has 2 numbers, the logits 3 classes"):
        edge_loss(student, teacher, mask, alpha=[1.0, 2.0])
    with pytest.raises(ModelError, match="the edge mask is per class"):
        edge_loss(student, teacher, mask[:, :1])


def test_half_precision_is_widened():
    student, teacher, labels = maps()
    mask, valid = masked(labels, student)
    low = [x.bfloat16() for x in (student, teacher)]
    wide = [x.float() for x in low]
    assert edge_loss(*low, mask).dtype == torch.float32
    torch.testing.assert_close(edge_loss(*low, mask), edge_loss(*wide, mask))
    torch.testing.assert_close(body_loss(*low, mask, valid), body_loss(*wide, mask, valid))


# ----------------------------------------------------------------------------- the objective
def test_settings_choose_the_terms(tmp_path):
    job = open_job(recipe(), tmp_path)
    batch = read_rows(job.splits["train"], torch.arange(4), None)
    teacher = job.teacher()
    student = job.student()

    def terms(**settings: Any) -> dict[str, torch.Tensor]:
        made = BPKDObjective(student, job.task, BPKD.Config(radius=1, **settings))
        teacher.bind(made.wants, job.task)
        return made(batch, teacher.knowledge(batch), Clock())

    student.eval()
    whole = terms()
    assert list(whole) == ["task", "edge", "body"]
    assert list(terms(**BPKD.variants["body-only"].set)) == ["task", "body"]
    assert list(terms(**BPKD.variants["edge-only"].set)) == ["task", "edge"]
    assert list(terms(edge_weight=0, body_weight=0)) == ["task"]
    torch.testing.assert_close(terms(edge_weight=25.0)["edge"] * 2, whole["edge"])
    torch.testing.assert_close(terms(alpha=[2.0, 2.0, 2.0])["edge"], whole["edge"])
    assert terms(**BPKD.variants["soft-count"].set)["edge"] > whole["edge"]
    assert terms(per_class_mean=True)["edge"] < whole["edge"]
    shared = terms(**BPKD.variants["shared-mask"].set)
    assert shared["edge"] != whole["edge"]
    assert shared["body"] != whole["body"]
    torch.testing.assert_close(shared["task"], whole["task"])


def test_a_shared_mask_sums_over_classes_that_have_an_edge(tmp_path):
    task = open_job(recipe(), tmp_path).task
    student, teacher, labels = maps()
    made = objective_of(task, Given0(student), shared_mask=True, edge_weight=1, body_weight=0)
    batch = Batch(x=torch.zeros(2, 3, 4, 4), target=labels)
    found = made(batch, Knowledge({"logits": teacher}), Clock())["edge"].detach()
    mask, _ = masked(labels, student, radius=3)
    union = mask.amax(1, keepdim=True).expand_as(mask)
    one = edge_loss(student, teacher, union, alpha=[2.0, 0.0, 0.0])
    torch.testing.assert_close(found, 2 * one)  # classes 0 and 1 have edges, 2 has none


def test_rows_on_which_the_teacher_is_silent_send_no_gradient(tmp_path):
    task = open_job(recipe(), tmp_path).task
    student, teacher, labels = maps()
    module = Given0(student)
    said = Knowledge({"logits": teacher}, valid=torch.tensor([True, False]))
    terms = objective_of(task, module)(Batch(x=torch.zeros(2, 3, 4, 4), target=labels), said,
                                       Clock())  # fmt: skip
    (terms["edge"] + terms["body"]).backward()
    assert module.logits.grad[0].abs().sum() > 0
    assert module.logits.grad[1].abs().sum() == 0


def test_a_teacher_of_another_size_is_resized_and_of_other_classes_refused(tmp_path):
    task = open_job(recipe(), tmp_path).task
    student, teacher, labels = maps()
    small = torch.nn.functional.avg_pool2d(teacher, 2)
    batch = Batch(x=torch.zeros(2, 3, 4, 4), target=labels)
    made = objective_of(task, Given0(student))
    found = made(batch, Knowledge({"logits": small}), Clock())
    expected = made(batch, Knowledge({"logits": resized_to(small, (6, 6))}), Clock())
    torch.testing.assert_close(found["edge"], expected["edge"])
    with pytest.raises(ModelError, match="the same classes"):
        made(batch, Knowledge({"logits": teacher[:, :2]}), Clock())


def test_the_preset_is_told():
    method = open_method(recipe(settings={"radius": 3}))
    assert "preset: paper" in method.preset()
    light = open_method(recipe(variant="light", settings={}))
    assert "preset: light" in light.preset()
    assert (light.config.body_weight, light.config.edge_weight) == (10, 20)
    assert light.config.temperature == 2
    assert "none of the two" in open_method(recipe(settings={"edge_weight": 1})).preset()


# ------------------------------------------------------------------------------- the run
def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        data={"options": {"augment": "scale+flip"}},
        budget={"steps": 30, "batch": 4, "lr": 0.05},
        output={"checkpoint_minutes": 0},
    )
    whole = weights(chosen, tmp_path / "whole")
    kills = kill_and_resume(lambda: trained(chosen, tmp_path / "cut"), tmp_path / "cut")
    assert kills >= 1
    again = weights(chosen, tmp_path / "cut")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


class Plain(nn.Module):
    """No normalisation: what a piece of a batch gives does not depend on the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).tanh())


def plain_pair() -> Given:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Given(student=Plain(4), teacher=Plain(8))


def test_micro_batches_give_the_same_step(tmp_path):
    budget = {"steps": 20, "batch": 8, "lr": 0.01, "optimizer": "sgd"}
    one = weights(recipe(budget=budget), tmp_path / "one", plain_pair())
    four = weights(recipe(budget={**budget, "accumulate": 4}), tmp_path / "four", plain_pair())
    assert max((one[k] - four[k]).abs().max().item() for k in one) < 1e-5


def test_a_float32_store_serves_as_the_module_does(tmp_path):
    budget = {"steps": 60, "batch": 4, "lr": 0.01, "optimizer": "sgd"}
    plain = BPKD.example()["teacher"]
    data = {"options": {"augment": "flip"}}
    drawn = {"store": {"dtype": "float32", "draws": 2}}
    live = weights(recipe(budget=budget), tmp_path / "live")
    kept = {**plain, "store": {"dtype": "float32"}}
    stored = weights(recipe(budget=budget, teacher=kept), tmp_path / "kept")
    assert max((live[k] - stored[k]).abs().max().item() for k in live) < 1e-4
    augmented = weights(recipe(budget=budget, data=data, teacher={**plain, **drawn}),
                        tmp_path / "drawn")  # fmt: skip
    assert any(not torch.equal(augmented[k], stored[k]) for k in stored)


def test_a_teacher_trained_with_other_class_weights_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    teacher = {**BPKD.example()["teacher"], "train": {"steps": 3, "batch": 4, "lr": 0.05}}
    states = []
    for run_name, class_weights in (("a", None), ("b", [1.0, 5.0, 5.0]), ("c", [1.0, 5.0, 5.0])):
        data = {"options": {} if class_weights is None else {"class_weights": class_weights}}
        job = open_job(recipe(teacher=teacher, data=data), tmp_path / run_name)
        states.append(plain_state(job.teacher().net))
    same = [all(torch.equal(one[k], states[1][k]) for k in one) for one in states]
    assert same == [False, True, True]


def test_a_store_of_some_classes_is_refused(tmp_path):
    teacher = {**BPKD.example()["teacher"], "store": {"form": "topk", "k": 2}}
    with pytest.raises(StillhouseError, match="form: dense"):
        trained(recipe(teacher=teacher), tmp_path)


def test_alpha_of_another_length_is_refused_before_training(tmp_path):
    with pytest.raises(RecipeError, match="alpha has 2 numbers, the data 3 classes"):
        trained(recipe(settings={"alpha": [1.0, 2.0]}), tmp_path)
    with pytest.raises(RecipeError, match="alpha: one number >= 0"):
        open_method(recipe(settings={"alpha": -1.0}))


def test_a_method_of_plain_logits_is_refused_for_maps(tmp_path):
    spec = {**BPKD.example(), "method": "kd", "task": "segmentation", "settings": {}, "compare": []}
    with pytest.raises(RecipeError, match=r"maps with classes second: use bpkd or cwd or pixel-kd"):
        run(load_recipe(spec), folder=tmp_path, progress=False)


@pytest.mark.parametrize("name", ["supervised", "cwd", "pixel-kd"])
def test_the_sides_of_a_comparison_begin_and_read_alike(name, tmp_path):
    own = recipe()
    other = load_recipe({**BPKD.example(), "method": name, "task": "segmentation", "settings": {},
                         "compare": []})  # fmt: skip
    first = plain_state(open_job(own, tmp_path / "a").student())
    second = plain_state(open_job(other, tmp_path / "b").student())
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_report_pictures_tables_and_prediction(tmp_path):
    chosen = recipe(data={"options": {"side": 24, "rows": 8}})
    result = run(chosen, folder=tmp_path / "run", progress=False)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["details"]
    assert [table["title"] for table in told["tables"]] == ["IoU near borders", "IoU by class"]
    rows = [row[0] for row in told["tables"][0]["rows"]]
    assert rows == ["everywhere", "within 1 px", "within 2 px", "within 3 px", "within 5 px",
                    "farther from any border"]  # fmt: skip
    assert len(told["images"]) == 3 + 2
    assert "preset" in told["texts"][0]["text"]
    figures = next(iter(next(iter(result.sides.values())).values()))
    assert {"miou", "trimap_miou_2px", "body_miou"} <= set(figures)
    again = open_artifact(tmp_path / "run")
    (labels,) = again.predict([torch.rand(3, 31, 47)])
    assert labels.shape == (31, 47)
    assert labels.dtype == torch.uint8
    assert int(labels.max()) < 3


# ------------------------------------------------------------------------ models that exist
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}  # fmt: skip


def test_segformers_of_hugging_face_teach_and_learn(tmp_path):
    pytest.importorskip("transformers")
    smaller = {**SEGFORMER, "hidden_sizes": [4, 8], "decoder_hidden_size": 8}
    chosen = recipe(
        data={"options": {"side": 32}},
        teacher={"model": "hf:segformer", "options": SEGFORMER},
        student={"model": "hf:segformer", "options": smaller},
    )
    job = open_job(chosen, tmp_path / "look")
    student = job.student()
    assert type(student.module).__name__ == "SegformerForSemanticSegmentation"
    assert student(job.task.example_view())["logits"].shape == (1, 3, 8, 8)  # a quarter
    result = run(chosen, folder=tmp_path / "run", progress=False)
    (labels,) = open_artifact(tmp_path / "run").predict([torch.rand(3, 40, 24)])
    assert labels.shape == (40, 24)
    assert result.artifact.module.module.config.num_labels == 3


def test_deeplab_of_torchvision_teaches_and_its_second_head_is_trained(tmp_path):
    pytest.importorskip("torchvision")
    chosen = recipe(
        data={"options": {"side": 32, "rows": 4}},
        teacher={"model": "torchvision:deeplabv3_mobilenet_v3_large"},
        student={
            "model": "torchvision:deeplabv3_mobilenet_v3_large",
            "options": {"aux_loss": True},
        },
        budget={"steps": 2, "batch": 4, "lr": 0.01},
    )
    job = open_job(chosen, tmp_path / "look")
    batch = read_rows(job.splits["train"], torch.arange(2), None)
    out = job.student()(batch.view("x"))
    assert set(out) == {"logits", "aux"}
    terms = job.task.loss(out, batch)
    alone = job.task.loss({"logits": out["aux"]}, batch)["task"]
    torch.testing.assert_close(terms["aux"], AUXILIARY * alone)
    artifact = trained(chosen, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["event"] == "step"]
    assert set(steps[-1]["terms"]) == {"task", "aux", "edge", "body"}
    artifact.save(tmp_path / "kept")
    assert open_artifact(tmp_path / "kept").module is not None


def test_lraspp_of_torchvision_learns_from_a_segformer_in_three_lines(tmp_path):
    """The Python door, as the README shows it: plain modules of two libraries."""
    torchvision = pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(num_labels=3, **SEGFORMER)
        )
        student = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        )
    teacher = still.teacher(module)
    made = still.objective("bpkd", student, teacher=teacher, classes=3, edge_weight=5.0)
    batch = Batch(x=torch.rand(2, 3, 32, 32), target=torch.randint(0, 3, (2, 32, 32)))
    terms = made.terms(batch, teacher)
    sum(terms.values()).backward()
    assert set(terms) == {"task", "edge", "body"}
    assert all(p.grad is None for p in module.parameters())
    assert made.export().module is student


def test_networks_that_give_no_maps_are_told(tmp_path):
    student = {"model": "stillhouse:small_cnn", "options": {"widths": [4]}}
    with pytest.raises(ModelError, match=r"logits of shape \(2, 3\); a map of class scores"):
        run(recipe(student=student), folder=tmp_path, progress=False)
    fewer = {"model": "stillhouse:small_segmenter", "options": {"widths": [4, 4], "classes": 2}}
    with pytest.raises(ModelError, match=r"has 2 outputs, the data .* 3 classes"):
        run(recipe(student=fewer), folder=tmp_path / "b", progress=False)


def test_the_demonstration_names_what_exists(data_root):
    for path in sorted(Path(__file__).parents[2].glob("recipes/bpkd*.yaml")):
        chosen = load_recipe(path)
        assert catalogue.find(chosen.method).card["task"] == "segmentation"
        assert chosen.hardware.threads == 1
