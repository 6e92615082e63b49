from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, Shuffled, Splits, TensorSource
from stillhouse.errors import ModelError, RecipeError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.methods.images.dhkd import DHKD, DHKDObjective
from stillhouse.metrics.head_geometry import head_geometry
from stillhouse.opening import open_artifact
from stillhouse.parts.gradient import Project
from stillhouse.parts.heads import ExtraHead
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Knowledge
from stillhouse.teachers.function import Callable


def recipe(**changes: Any):
    spec = {**DHKD.example(0), "compare": [], **changes}
    if "settings" in changes:
        spec["settings"] = {"measure_every": 0, **changes["settings"]}
    return load_recipe(spec)


def trained(chosen: Any, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job), job
    finally:
        job.log.close()


def weights(chosen: Any, folder: Path) -> dict[str, Tensor]:
    return plain_state(trained(chosen, folder)[0].module)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Student(nn.Module):
    """Features and a head: the small net of the reference vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 6)
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.backbone(x)))


def numbers(rows: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, t = (torch.randn(rows, n, generator=rng, dtype=torch.float64) for n in (5, 8))
    return x, torch.randint(8, (rows,), generator=rng), 3 * t


def splits(x: Tensor, y: Tensor) -> Splits:
    source = TensorSource({"x": x, "target": y})
    return Splits({"train": source, "val": source}, "vectors", {"classes": list(range(8))})


def objective(settings: dict[str, Any], student: nn.Module | None = None) -> DHKDObjective:
    torch.manual_seed(0)
    x, y, _ = numbers()
    task = Classification(splits(x, y))
    net = task.net((student or Student()).double())
    config = DHKD.Config(**{"measure_every": 0, **settings})
    extra = None
    if config.heads == "dual":
        extra = ExtraHead(net.head_layer(), config.extra_head, dropout=config.dropout)
    return DHKDObjective(net, task, config, extra)


def terms(made: DHKDObjective, epoch: int = 0, step: int = 0) -> dict[str, Tensor]:
    from stillhouse.clock import Clock

    x, y, t = numbers()
    return made(Batch(x=x, target=y), Knowledge({"logits": t}), Clock(epoch=epoch, step=step))


# ---- the two terms ---------------------------------------------------------------------------


def test_hand_values():
    """Property 1 of the sheet."""
    f2 = torch.tensor([[2, -1, 0.5], [0, 1, 3]], dtype=torch.float64)
    known = Knowledge({"logits": torch.tensor([[1, 0, 0.5], [0, 2, 1]], dtype=torch.float64)})
    norm = objective({}).distance(f2, known).item()
    binary = objective({"loss": "binary"}).distance(f2, known).item()
    assert norm == pytest.approx(0.4258078, abs=5e-8)
    assert binary == pytest.approx(0.3802128, abs=5e-8)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_labels_go_to_the_main_head_and_logits_to_the_auxiliary_one(kind):
    """Property 9: neither head hears of the other's loss; the backbone hears of both."""
    made = objective({"extra_head": kind})
    found = terms(made)
    main, extra = list(made.student.module.fc.parameters()), list(made.extra.parameters())
    shared = list(made.student.module.backbone.parameters())

    def reached(loss: Tensor, params: list[Tensor]) -> set[bool]:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        return {g is not None for g in grads}

    assert reached(found["task"], main) == {True}
    assert reached(found["task"], extra) == {False}
    assert reached(found["logits"], main) == {False}
    assert reached(found["logits"], extra) == {True}
    assert reached(found["task"], shared) == reached(found["logits"], shared) == {True}


def test_the_values_of_both_terms():
    made = objective({"gamma": 0.5, "alpha": 0.1})
    x, y, t = numbers()
    features = torch.relu(made.student.module.backbone(x))
    f2 = made.extra(features)
    found = terms(made)
    expected = 4 / 10 * ((f2 - t) / 4).cosh().log().sum()
    assert torch.allclose(found["task"], 0.5 * F.cross_entropy(made.student.module.fc(features), y))
    assert torch.allclose(found["logits"], 0.1 * expected)


def test_the_official_total(golden):
    g = golden("dhkd").case("total")
    f1, f2, t = (torch.as_tensor(g[k]).double() for k in ("f1", "f2", "t"))
    for form in ("stable", "official"):
        made = objective({"alpha": 0.1, "form": form})
        ce = F.cross_entropy(f1, torch.as_tensor(g["y"]))
        total = ce + 0.1 * made.distance(f2, Knowledge({"logits": t}))
        assert total.item() == pytest.approx(float(g["total"]), rel=1e-7)


def test_one_head_carries_both_losses_where_asked():
    made = objective({"heads": "single", "loss": "binary"})
    assert made.extra is None
    found = terms(made)
    head = made.student.module.fc.weight
    assert torch.autograd.grad(found["logits"], head)[0].abs().sum() > 0


@pytest.mark.parametrize("loss", ["norm", "binary", "kd", "mse"])
def test_every_loss_on_the_auxiliary_head_is_zero_for_equal_logits(loss):
    made = objective({"loss": loss})
    _, _, t = numbers()
    known = Knowledge({"logits": t})
    assert made.distance(t, known).item() == 0
    assert made.distance(t + torch.randn_like(t), known).item() > 0
    level = made.distance(t + 3.0, known).item()
    assert (level < 1e-12) == (loss == "kd")  # property 6: only the softmax is blind to a level


def test_switched_off_the_teacher_is_followed_no_longer():
    made = objective({"switch_off_epoch": 2})
    assert terms(made, epoch=1)["logits"].item() > 0
    after = terms(made, epoch=2)
    assert after["logits"].item() == 0
    grads = torch.autograd.grad(after["logits"], list(made.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    reached = torch.autograd.grad(terms(made, epoch=2)["logits"], list(made.extra.parameters()))
    assert all(g is not None for g in reached)


# ---- whole steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["step_linear_conflict", "step_nonlinear"])
def test_three_official_steps_through_the_engine(golden, case, tmp_path):
    g = golden("dhkd").case(case)
    linear = case == "step_linear_conflict"
    student = Student().double()
    put(student.state_dict(), g, "before_")
    x, y = torch.as_tensor(g["x"]).double(), torch.as_tensor(g["y"])
    answers = torch.as_tensor(g["teacher_logits"]).double()
    teacher = Callable(lambda b: {"logits": answers[b["id"]]}, fields=["logits"], fingerprint="v")
    kind = "linear" if linear else "nonlinear"
    chosen = recipe(
        data={"name": "given"},
        student={"model": "given"},
        teacher=None,
        settings={"alpha": 1.0 if linear else 0.5, "extra_head": kind, "dropout": 0.0},
        budget={
            "steps": 3, "batch": 10, "lr": 0.05, "optimizer": "sgd", "momentum": 0.9,
            "weight_decay": 5e-4, "schedule": "constant",
        },
        hardware={"precision": "64-true"},
    )  # fmt: skip
    given = Given(student=student, teacher=teacher, splits=splits(x, y))
    chosen = chosen.model_copy(update={"settings": {**chosen.settings, "hidden": 200}})
    job = open_job(chosen, tmp_path, given=given)
    method = open_method(chosen)
    made = method.objective(job, job.student(), teacher)
    put(made.extra.state_dict(), g, "before_fc2_")
    job.fit("student", made, job.order("train"), teacher=job.teacher(), **method.training(job))
    job.log.close()
    for name, value in named(made).items():
        reference = torch.as_tensor(g[f"after3_{name}"])
        worst = (value.double() - reference).abs().max().item()
        assert worst <= 1e-9 * max(1.0, reference.abs().max().item()), name


def put(state: dict[str, Tensor], g: dict[str, Any], prefix: str) -> None:
    for name, value in state.items():
        if "num_batches" not in name:
            value.copy_(torch.as_tensor(g[prefix + key(name, g, prefix)]))


def key(name: str, g: dict[str, Any], prefix: str) -> str:
    plain = name.replace(".", "_")
    return plain if prefix + plain in g else plain.removeprefix("net_")


def named(made: DHKDObjective) -> dict[str, Tensor]:
    found = dict(made.student.module.state_dict())
    linear = made.extra.kind == "linear"
    for name, value in made.extra.state_dict().items():
        found["fc2." + (name.removeprefix("net.") if linear else name)] = value
    return {k.replace(".", "_"): v for k, v in found.items() if "num_batches" not in k}


def test_without_a_conflict_alignment_changes_nothing(tmp_path, monkeypatch):
    """Property 8."""
    seen = []
    real = Project.component
    monkeypatch.setattr(Project, "component", lambda *a: seen.append(real(*a)) or seen[-1])
    settings = {"alpha": 1e-3, "loss": "kd"}
    aligned = weights(recipe(settings=settings), tmp_path / "aligned")
    calm = all(share.item() == 0 for share in seen)
    plain = weights(recipe(settings={**settings, "align": "none"}), tmp_path / "plain")
    assert len(seen) == 4
    assert calm == all(torch.allclose(aligned[k], plain[k], atol=1e-7) for k in plain)


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_a_forced_conflict_is_projected(scope):
    """Property 12, on the gradients of a real net."""
    made = objective({"align": scope})
    params = list(made.parameters())
    loss = terms(made)["task"]
    g0 = torch.autograd.grad(loss, params, allow_unused=True)
    shared = {id(p) for p in made.student.module.backbone.parameters()}
    g1 = [-2 * g if id(p) in shared else None for p, g in zip(params, g0, strict=True)]
    merged = Project(("task",), ("logits",), scope)(lambda *sets: [g0, g1], params)
    left = product = square = head = 0.0
    for p, m, keep in zip(params, merged, g0, strict=True):
        if keep is None:
            continue
        square += keep.square().sum().item()
        if id(p) in shared:
            left += ((m - keep) * keep).sum().item()
            product += -2 * keep.square().sum().item()
        else:
            head += keep.square().sum().item()
    expected = 0.0 if scope == "shared" else product / square * head
    assert left == pytest.approx(expected, abs=1e-12)


def test_alpha_zero_trains_exactly_as_the_labels_alone(tmp_path):
    """Property 10: no head, no teacher, the same weights bit for bit."""
    alone = recipe(method="supervised", teacher=None)
    alone = alone.model_copy(update={"settings": {}})
    without = recipe(settings={"alpha": 0.0})
    assert same(weights(without, tmp_path / "dhkd"), weights(alone, tmp_path / "alone"))
    assert not open_method(without).wants_teacher()


def test_the_saved_student_has_no_auxiliary_head(tmp_path):
    """Property 11: predictions bit for bit those of the trained student."""
    chosen = recipe()
    job = open_job(chosen, tmp_path)
    method = open_method(chosen)
    made = method.objective(job, job.student(), job.teacher())
    job.fit("student", made, job.order("train"), teacher=job.teacher(), **method.training(job))
    x = job.splits["val"].views["x"]
    with torch.no_grad():
        before = made.student(x)["logits"]
    job.model_artifact(made.export()).save(tmp_path / "artifact")
    job.log.close()
    reopened = open_artifact(tmp_path / "artifact").module
    with torch.no_grad():
        assert torch.equal(reopened(x)["logits"], before)
    assert not [name for name, _ in reopened.named_parameters() if "extra" in name]
    assert any("extra" in name for name, _ in made.named_parameters())


def test_two_backward_passes_move_running_statistics_once(tmp_path):
    class Normed(Student):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    x, y, t = numbers()
    teacher = Callable(lambda b: {"logits": t[b["id"]].float()}, fingerprint="t")
    chosen = recipe(
        data={"name": "given"}, student={"model": "given"}, teacher=None,
        settings={"measure_every": 1}, budget={"steps": 3, "batch": 10, "lr": 0.01},
    )  # fmt: skip
    given = Given(Normed(), teacher, splits(x.float(), y))
    artifact, _ = trained(chosen, tmp_path, given)
    assert artifact.module.module.norm.num_batches_tracked == 3


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        settings={"extra_head": "nonlinear", "dropout": 0.3, "measure_every": 3, "hidden": 8},
        student={"model": "stillhouse:mlp", "options": {"widths": [8], "dropout": 0.3}},
        budget={"steps": 40, "batch": 16, "lr": 0.05},
        output={"checkpoint_minutes": 0},
    )
    whole, _ = trained(chosen, tmp_path / "whole")
    kills = kill_and_resume(lambda: trained(chosen, tmp_path / "cut"), tmp_path / "cut")
    assert kills >= 1
    again, _ = trained(chosen, tmp_path / "cut")
    assert same(plain_state(whole.module), plain_state(again.module))
    assert whole.meta["heads"] == again.meta["heads"]


def test_a_float32_store_serves_as_the_module_does(tmp_path):
    budget = {"steps": 100, "batch": 16, "lr": 0.01, "optimizer": "sgd"}
    plain = DHKD.example(0)["teacher"]
    live = weights(recipe(budget=budget), tmp_path / "live")
    kept = {**plain, "store": {"dtype": "float32"}}
    stored = weights(recipe(budget=budget, teacher=kept), tmp_path / "kept")
    assert max((live[k] - stored[k]).abs().max().item() for k in live) < 1e-4


def test_micro_batches_give_the_same_step(tmp_path):
    budget = {"steps": 20, "batch": 16, "lr": 0.01, "optimizer": "sgd"}
    one = weights(recipe(settings={}, budget=budget), tmp_path / "one")
    four = weights(recipe(settings={}, budget={**budget, "accumulate": 4}), tmp_path / "four")
    assert max((one[k] - four[k]).abs().max().item() for k in one) < 1e-5


# ---- diagnostics -----------------------------------------------------------------------------


def test_cosines_are_those_of_the_two_gradients():
    made = objective({"heads": "single", "loss": "binary", "measure_every": 5})
    found = terms(made, step=5)
    made.settle(True)
    head = list(made.student.module.fc.parameters())
    backbone = list(made.student.module.backbone.parameters())
    expected = []
    for params in (backbone, head):
        a, b = (
            torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)])
            for v in (found["task"], found["logits"])
        )
        expected.append(F.cosine_similarity(a, b, 0).item())
    told = made.diagnostics()
    assert told["cosine_backbone"] == pytest.approx(expected[0], rel=1e-5)
    assert told["cosine_head"] == pytest.approx(expected[1], rel=1e-5)
    terms(made, step=6)
    made.settle(True)
    assert made.diagnostics()["cosine_backbone"] == told["cosine_backbone"]
    assert told["head_cosine"] == head_geometry(made.student.module.fc.weight)["head_cosine"]


def test_an_auxiliary_head_shares_no_head():
    made = objective({"measure_every": 1})
    terms(made)
    made.settle(True)
    assert "cosine_head" not in made.diagnostics()
    assert "cosine_backbone" in made.diagnostics()


def test_measuring_changes_no_weight(tmp_path):
    loud = recipe(settings={"measure_every": 1})
    quiet = recipe(settings={"measure_every": 0})
    assert same(weights(loud, tmp_path / "loud"), weights(quiet, tmp_path / "quiet"))


def test_the_report_shows_the_heads(tmp_path):
    result = run(recipe(), folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    assert {"accuracy", "head_cosine", "head_norm_spread", "cosine_backbone"} <= set(figures)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "centred rows of the main head" in page


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", DHKD.variants)
def test_every_variant_trains(variant, tmp_path):
    chosen = recipe(variant=variant, settings={})
    artifact, job = trained(chosen, tmp_path)
    assert [stage["name"] for stage in job.stages] == ["student"]
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())


def test_the_official_variant_differs_in_the_clamp_only():
    assert DHKD.variants["official"].set == {"form": "official", "align": "all"}
    made = objective({"form": "official"})
    far = torch.full((1, 8), 100.0, dtype=torch.float64, requires_grad=True)
    known = Knowledge({"logits": torch.zeros(1, 8, dtype=torch.float64)})
    assert not torch.autograd.grad(made.distance(far, known), far)[0].any()
    assert torch.autograd.grad(objective({}).distance(far, known), far)[0].all()


def test_alignment_is_handed_to_the_loop_only_where_it_does_something(tmp_path):
    def gradient(**settings: Any) -> Any:
        chosen = recipe(settings=settings)
        return open_method(chosen).training(None).get("gradient")

    assert gradient().scope == "all"
    assert gradient(align="shared").scope == "shared"
    assert gradient(align="none") is None
    assert gradient(alpha=0.0) is None


def test_bad_settings_are_told():
    for settings, words in (
        ({"gamma": 0.0, "alpha": 0.0}, "nothing would be learnt"),
        ({"gamma": 0.0}, "heads: single"),
        ({"loss": "norms"}, "norm"),
        ({"temperature": 0.0}, "temperature"),
        ({"extra_head": "non-linear"}, "nonlinear"),
    ):
        with pytest.raises(RecipeError, match=words):
            open_method(recipe(settings=settings))


def test_a_teacher_of_other_classes_is_told_before_training(tmp_path):
    wide = {"model": "torch.nn:Linear", "options": {"in_features": 6, "out_features": 7}}
    with pytest.raises(ModelError, match=r"7 outputs.*4 classes"):
        trained(recipe(teacher=wide), tmp_path)
    assert not list(tmp_path.rglob("step-*"))


def test_a_store_of_some_classes_is_told(tmp_path):
    kept = {**DHKD.example(0)["teacher"], "store": {"form": "topk", "k": 2}}
    with pytest.raises(TeacherError, match="form: dense"):
        trained(recipe(teacher=kept), tmp_path)


def test_a_head_that_is_not_the_last_layer_is_told(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(6, 3), nn.Conv1d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(x).unsqueeze(-1)).squeeze(-1)

    chosen = recipe(student={"model": "given"})
    with pytest.raises(ModelError, match="'fc' of Odd has 3 outputs, the data 4 classes"):
        trained(chosen, tmp_path, Given(student=Odd()))


def test_the_head_may_be_named_by_a_tap():
    class Two(Student):
        def __init__(self) -> None:
            super().__init__()
            self.top = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.relu(self.backbone(x)))

    x, y, _ = numbers()
    net = Classification(splits(x, y)).net(Two(), {"head:input": "top:input"})
    assert net.head() == "top"
    assert net.head_layer() is net.module.top


# ---- real classes ----------------------------------------------------------------------------

IMAGES = {"name": "generated", "options": {"kind": "images", "shape": [3, 32, 32], "rows": 16}}
TOKENS = {"name": "generated", "options": {"kind": "tokens", "rows": 16}}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_VIT = {
    "model": "hf:vit",
    "options": {
        **TINY, "task": "image-classification", "intermediate_size": 16, "image_size": 32,
        "patch_size": 16,
    },
}  # fmt: skip
TINY_BERT = {
    "model": "hf:bert",
    "options": {
        **TINY, "task": "sequence-classification", "intermediate_size": 16, "vocab_size": 64,
    },
}  # fmt: skip
STUDENTS = {
    "timm, head fc": (IMAGES, {"model": "timm:resnet10t"}),
    "timm, head head": (IMAGES, {"model": "timm:test_vit", "options": {"img_size": 32}}),
    "torchvision, head fc": (IMAGES, {"model": "torchvision:shufflenet_v2_x0_5"}),
    "torchvision, head classifier.3": (IMAGES, {"model": "torchvision:mobilenet_v3_small"}),
    "hf vit": (IMAGES, TINY_VIT),
    "hf bert": (TOKENS, TINY_BERT),
    "ours, head linear": (IMAGES, {"model": "stillhouse:resnet8"}),
    "ours, text": (TOKENS, {"model": "stillhouse:text_cnn"}),
}


@pytest.mark.parametrize("student", STUDENTS)
def test_real_classes_plug_in(student, tmp_path):
    data, spec = STUDENTS[student]
    teacher = TINY_VIT if data is IMAGES else TINY_BERT
    chosen = recipe(
        data=data,
        student=spec,
        teacher=teacher,
        settings={"extra_head": "nonlinear", "measure_every": 1},
        budget={"steps": 2, "batch": 8, "lr": 0.001},
    )
    artifact, _ = trained(chosen, tmp_path)
    assert abs(artifact.meta["heads"]["cosine_backbone"]) <= 1
    artifact.save(tmp_path / "artifact")
    assert same(
        plain_state(artifact.module), plain_state(open_artifact(tmp_path / "artifact").module)
    )


def test_an_order_that_is_not_shuffled_serves_too(tmp_path):
    """The objective alone, in a loop of one's own."""
    made = objective({})
    x, y, t = numbers()
    source = TensorSource({"x": x, "target": y})
    teacher = Callable(lambda b: {"logits": t[b["id"]]}, fingerprint="t")
    optimiser = torch.optim.Adam(made.parameters(), lr=0.05)
    order = Shuffled(source, 5, shuffle=False)
    losses = []
    for _ in range(30):
        for rows in order.epoch(0, torch.Generator):
            batch = source.read(rows, None)
            loss = sum(made.terms(batch, teacher).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
