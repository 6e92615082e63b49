from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, Splits, Streams, TensorSource
from stillhouse.clock import Clock
from stillhouse.data.splitting import Unlabelled
from stillhouse.errors import ModelError, RecipeError, TeacherError
from stillhouse.exporting import export_artifact
from stillhouse.launch import open_job, run
from stillhouse.methods.images.dho import DHO, DHOObjective, TwoHeadClassifier
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.mixing import mix_probabilities
from stillhouse.parts.two_heads import TwoHeads
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Knowledge
from stillhouse.teachers.function import Callable
from stillhouse.teachers.headed import Headed
from stillhouse.teachers.live import Live

CLASSES = 6


def recipe(**changes: Any):
    spec = {**DHO.example(0), "compare": [], **changes}
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
    """Features and a head."""

    def __init__(self, classes: int = CLASSES, norm: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.fc = nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.backbone(x))))


def numbers(labelled: int = 4, unlabelled: int = 9) -> tuple[Batch, Knowledge]:
    rng = torch.Generator().manual_seed(0)

    def draw(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=rng, dtype=torch.float64)

    target = torch.randint(CLASSES, (labelled,), generator=rng)
    batch = Batch(
        labelled=Batch(x=draw(labelled, 5), target=target), unlabelled=Batch(x=draw(unlabelled, 5))
    )
    said = {
        name: Knowledge({"logits": 2 * draw(rows, CLASSES)})
        for name, rows in (("labelled", labelled), ("unlabelled", unlabelled))
    }
    return batch, Knowledge.of_streams(said)


def objective(settings: dict[str, Any] | None = None, norm: bool = False) -> DHOObjective:
    batch, _ = numbers()
    source = TensorSource(dict(batch["labelled"]))
    splits = Splits({"train": source}, "vectors", {"classes": list(range(CLASSES))})
    task = Classification(splits)
    config = DHO.Config(**{"measure_every": 0, **(settings or {})})
    torch.manual_seed(0)
    net = task.net(Student(norm=norm).double())
    if config.heads == "dual":
        heads = TwoHeads(net.module, "fc", config.kd_head, config.scale)
        net = Net(heads.double(), head="net.module.fc")
    return DHOObjective(net, task, config)


def heads_of(made: DHOObjective) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    two = made.student.module
    return (
        two.backbone(),
        list(two.net.module.fc.parameters()),
        list(two.second.parameters()),
    )


def gradient(loss: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True))


# ---- the loss --------------------------------------------------------------------------------


class Said(nn.Module):
    """A student that gives stored logits of both heads, row by row."""

    def __init__(self, ce: Tensor, kd: Tensor) -> None:
        super().__init__()
        self.ce, self.kd = nn.Parameter(ce), nn.Parameter(kd)
        self.head = nn.Linear(1, ce.shape[1])

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        kd = self.kd[rows.long()]
        ce = torch.cat([self.ce, kd[len(self.ce) :]])[: len(rows)]
        return {"ce": ce, "kd": kd, "logits": kd}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_official_loss_and_its_gradients(golden, dtype):
    vectors = golden("dho")
    cases = [name for name in vectors.cases() if name.startswith("loss")]
    assert len(cases) >= 2
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    suffix = "" if dtype == torch.float64 else "_f32"
    for name in cases:
        g = vectors.case(name)
        t_l, t_u, ce_l, kd_l, kd_u = (
            torch.as_tensor(g[k]).to(dtype) for k in ("t_l", "t_u", "ce_l", "kd_l", "kd_u")
        )
        y, few, many = torch.as_tensor(g["y"]), len(ce_l), len(kd_u)
        # the weight of the labels is not stored by itself: solve for it
        ce, kd = float(g["ce"]), float(g["kd_labelled"]) + float(g["kd_unlabelled"])
        balance = round((float(g["total"]) - kd) / (ce - kd), 6)
        said = Knowledge.of_streams(
            {"labelled": Knowledge({"logits": t_l}), "unlabelled": Knowledge({"logits": t_u})}
        )
        rows = torch.arange(few + many, dtype=dtype)
        batch = Batch(labelled=Batch(x=rows[:few], target=y), unlabelled=Batch(x=rows[few:]))
        for settings, total in (
            ({"balance": balance}, g["total"]),
            ({"weighting": "sum"}, g["total_sum"]),
        ):
            made = objective(settings)
            student = Said(ce_l.clone(), torch.cat([kd_l, kd_u]))
            made.student = Net(student, head="head")
            made.dual = True
            found = made(batch, said, Clock())
            config = made.config
            loss = torch.stack(list(found.values())).sum()
            parts = {
                "ce": found["ce"] / config.ce_weight,
                "kd_labelled": found["kd_labelled"] / config.kd_weight,
                "kd_unlabelled": found["kd_unlabelled"] / config.kd_weight,
            }
            for term, value in parts.items():
                assert value.item() == pytest.approx(float(g[term + suffix]), rel=tolerance)
            assert loss.item() == pytest.approx(float(total), rel=tolerance)
            if config.weighting == "sum":
                continue
            loss.backward()
            grads = {"ce_l": student.ce.grad, "kd_l": student.kd.grad[:few]}
            grads["kd_u"] = student.kd.grad[few:]
            for term, value in grads.items():
                reference = torch.as_tensor(g[f"grad_{term}{suffix}"])
                worst = (value - reference).abs().max() / reference.abs().max()
                assert worst <= 10 * tolerance, (name, term)


def test_the_two_divergences_are_added_and_not_pooled():
    made = objective()
    batch, said = numbers()
    found = made(batch, said, Clock())
    whole = made.student(torch.cat([batch.view("labelled/x"), batch.view("unlabelled/x")]))
    for name, rows in (("labelled", slice(0, 4)), ("unlabelled", slice(4, None))):
        p, q = said.stream(name).tensor("logits") / 2, whole["kd"][rows] / 2
        expected = 4 * F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(found[f"kd_{name}"], 0.5 * expected)
    expected = F.cross_entropy(whole["ce"][:4], batch.view("labelled/target"))
    torch.testing.assert_close(found["ce"], 0.5 * expected)


def test_each_signal_reaches_its_own_head_alone():
    """Properties 3 and 5: the backbone hears of everything."""
    made = objective()
    batch, said = numbers()
    found = made(batch, said, Clock())
    backbone, first, second = heads_of(made)
    for name, value in found.items():
        assert all(g is not None and g.any() for g in gradient(value, backbone))
        assert all((g is not None) == (name == "ce") for g in gradient(value, first))
        assert all((g is not None) == (name != "ce") for g in gradient(value, second))

    def grads(changed: Batch) -> tuple[list[Tensor], list[Tensor]]:
        loss = torch.stack(list(made(changed, said, Clock()).values())).sum()
        return gradient(loss, first), gradient(loss, second)

    plain = grads(batch)
    images = Batch(batch, unlabelled=Batch(x=batch.view("unlabelled/x") + 1))
    labels = Batch(labelled=Batch(batch["labelled"]), unlabelled=batch["unlabelled"])
    labels["labelled"]["target"] = (labels.view("labelled/target") + 1) % CLASSES
    for a, b in zip(plain[0], grads(images)[0], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(plain[1], grads(labels)[1], strict=True):
        torch.testing.assert_close(a, b)


def test_one_head_hears_only_what_has_weight():
    batch, said = numbers()
    assert set(objective({"heads": "single", "balance": 1.0})(batch, said, Clock())) == {"ce"}
    taught = objective({"heads": "single", "balance": 0.0})(batch, said, Clock())
    assert set(taught) == {"kd_labelled", "kd_unlabelled"}
    assert objective({"heads": "single", "balance": 1.0}).wants == ()
    assert {w.view for w in objective({"kd_labelled": False}).wants} == {"unlabelled/x"}


def test_a_head_that_agrees_with_the_teacher_is_left_alone():
    """Property 4."""
    made = objective()
    batch, _ = numbers()
    with torch.no_grad():
        known = {n: made.student(batch.view(f"{n}/x"))["kd"] for n in ("labelled", "unlabelled")}
    said = Knowledge.of_streams({n: Knowledge({"logits": v}) for n, v in known.items()})
    found = made(batch, said, Clock())
    assert found["kd_labelled"].item() == pytest.approx(0, abs=1e-12)
    assert found["kd_unlabelled"].item() == pytest.approx(0, abs=1e-12)
    assert found["ce"].item() > 0


def test_at_high_temperatures_the_gradient_loses_it():
    """Property 10."""
    rng = torch.Generator().manual_seed(0)
    kd, t = (torch.randn(3, CLASSES, generator=rng, dtype=torch.float64) for _ in range(2))
    kd.requires_grad_(True)
    expected = ((kd - kd.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))) / CLASSES / 3
    for temperature in (1e3, 1e4):
        made = objective({"temperature": temperature})
        found = torch.autograd.grad(made.distance(kd, Knowledge({"logits": t})), kd)[0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-2, atol=1e-4)


def test_rows_on_which_the_teacher_is_silent_do_not_count():
    made = objective()
    _, said = numbers()
    logits = said.stream("unlabelled").tensor("logits")
    silent = logits.clone()
    silent[3:] = math.nan
    student = torch.randn_like(logits)
    valid = torch.arange(9) < 3
    found = made.distance(student, Knowledge({"logits": silent}, valid))
    torch.testing.assert_close(found, made.distance(student[:3], Knowledge({"logits": logits[:3]})))


def test_hard_targets_are_the_teachers_first_choice():
    made = objective({"heads": "single", "targets": "hard", "kd_labelled": False})
    batch, said = numbers()
    found = made(batch, said, Clock())
    out = made.student(batch.view("unlabelled/x"))["logits"]
    chosen = said.stream("unlabelled").tensor("logits").argmax(-1)
    torch.testing.assert_close(found["kd_unlabelled"], 0.5 * F.cross_entropy(out, chosen))
    assert set(found) == {"ce", "kd_unlabelled"}


def test_joint_and_separate_passes_differ_only_through_batchnorm():
    batch, said = numbers()
    plain = [objective({"passes": p})(batch, said, Clock()) for p in ("joint", "separate")]
    for name in plain[0]:
        torch.testing.assert_close(plain[0][name], plain[1][name])
    made = {p: objective({"passes": p}, norm=True) for p in ("joint", "separate")}
    normed = {p: m(batch, said, Clock()) for p, m in made.items()}
    assert not torch.allclose(normed["joint"]["ce"], normed["separate"]["ce"])
    seen = {p: m.student.module.net.module.norm.num_batches_tracked for p, m in made.items()}
    assert seen == {"joint": 1, "separate": 2}


def test_a_piece_without_labelled_rows_lacks_their_terms():
    made = objective()
    batch, said = numbers()
    piece = Batch(
        labelled=batch["labelled"].narrow(0, 0), unlabelled=batch["unlabelled"].narrow(0, 3)
    )
    known = Knowledge.of_streams(
        {
            "labelled": said.stream("labelled").narrow(0, 0),
            "unlabelled": said.stream("unlabelled").narrow(0, 3),
        }
    )
    assert set(made(piece, known, Clock())) == {"kd_unlabelled"}
    assert made.count(piece) == {"ce": 0, "kd_labelled": 0, "kd_unlabelled": 3}


# ---- the conflict ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["dual", "single"])
def test_the_probe_measures_the_cosine_in_the_backbone(heads):
    made = objective({"heads": heads, "measure_every": 5})
    batch, said = numbers()
    found = made(batch, said, Clock(step=5))
    made.probe.settle(True)
    params = made.backbone()
    assert {p.shape for p in params} == {(7, 5), (7,)}
    taught = found["kd_labelled"] + found["kd_unlabelled"]
    a, b = (torch.cat([g.flatten() for g in gradient(v, params)]) for v in (found["ce"], taught))
    assert made.probe.mean() == pytest.approx(F.cosine_similarity(a, b, 0).item(), rel=1e-5)
    assert made.notes["conflict"].item() == pytest.approx(made.probe.mean(), rel=1e-5)
    made(batch, said, Clock(step=6))
    made.probe.settle(True)
    assert made.probe.sums[1] == 1


def test_measuring_changes_no_weight(tmp_path):
    loud, quiet = (recipe(settings={"measure_every": n}) for n in (1, 0))
    assert same(weights(loud, tmp_path / "loud"), weights(quiet, tmp_path / "quiet"))


# ---- two heads kept --------------------------------------------------------------------------


def test_the_saved_student_answers_by_the_mix_of_both_heads(tmp_path):
    artifact, job = trained(recipe(), tmp_path)
    artifact.save(tmp_path / "artifact")
    reopened = open_artifact(tmp_path / "artifact")
    assert isinstance(reopened.predictor, TwoHeadClassifier)
    x = job.splits["val"].views["x"]
    with torch.no_grad():
        out, again = artifact.module(x), reopened.module(x)
    assert all(torch.equal(out[k], again[k]) for k in ("logits", "ce", "kd"))
    told = artifact.meta["dho"]
    mixed = mix_probabilities(out["ce"], out["kd"], alpha=told["alpha"], beta=told["beta"])
    torch.testing.assert_close(out["logits"].softmax(-1), mixed)
    assert reopened.predictor.heads.mix.tolist() == pytest.approx([told["alpha"], told["beta"]])


def test_the_mix_is_the_best_of_the_validation_data(tmp_path):
    artifact, job = trained(recipe(), tmp_path)
    told = artifact.meta["dho"]
    best = max(max(line) for line in told["shares"])
    assert told["val_accuracy"] == best
    assert job.evaluate(artifact.module, "val")["accuracy"] == pytest.approx(best)
    assert [s["name"] for s in job.stages] == ["student", "outputs", "mix"]


def test_a_given_mix_is_not_searched(tmp_path):
    artifact, job = trained(recipe(variant="ce-head", settings={}), tmp_path / "both")
    assert [s["name"] for s in job.stages] == ["student"]
    x = job.splits["val"].views["x"]
    with torch.no_grad():
        out = artifact.module(x)
    torch.testing.assert_close(out["logits"].softmax(-1), out["ce"].softmax(-1))
    half, _ = trained(recipe(settings={"beta": 2.0}), tmp_path / "half")
    assert half.meta["dho"]["beta"] == 2.0
    assert len(half.meta["dho"]["shares"]) == 1
    without = recipe(data={"name": f"{__name__}:few", "options": {"val": 0}})
    found, _ = trained(without, tmp_path / "without")
    assert (found.meta["dho"]["alpha"], found.meta["dho"]["beta"]) == (0.5, 0.5)


def few() -> Splits:
    """Labelled and unlabelled vectors, without validation data."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=rng), torch.arange(40) % 4
    labelled = TensorSource({"x": x[:8], "target": y[:8]}, ids=torch.arange(8))
    rest = TensorSource({"x": x[8:], "target": y[8:]}, ids=torch.arange(8, 40))
    about = {"classes": ["a", "b", "c", "d"], "input": [6]}
    sources = {"train": labelled, "unlabelled": Unlabelled(rest), "test": rest}
    return Splits(sources, "few", about)


def test_the_mix_may_be_chosen_anew_without_training(tmp_path):
    artifact, job = trained(recipe(), tmp_path)
    predictor = artifact.predictor
    before = {k: v.clone() for k, v in plain_state(artifact.module).items()}
    source = job.splits["val"]
    rows, labels = list(source.views["x"]), source.views["target"].tolist()
    labelled = predictor.predict(rows, alpha=1.0)
    with torch.no_grad():
        out = artifact.module(source.views["x"])
    names = job.splits.about["classes"]
    assert [a["class"] for a in labelled] == [names[k] for k in out["ce"].argmax(-1)]
    assert torch.equal(predictor.heads.mix, before["mix"])
    wrong = [(label + 1) % len(names) for label in labels]
    found = predictor.tune(rows, wrong)
    assert predictor.heads.mix.tolist() == pytest.approx([found.alpha, found.beta])
    share = sum(a["class"] == names[k] for a, k in zip(predictor.predict(rows), wrong)) / len(rows)
    assert share == pytest.approx(found.accuracy)
    after = plain_state(artifact.module)
    assert all(torch.equal(before[k], after[k]) for k in before if k != "mix")


def test_both_heads_leave_as_one_onnx_model(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run(recipe(), folder=tmp_path / "run", progress=False)
    told = export_artifact(tmp_path / "run", "onnx", tmp_path / "model.onnx")
    assert told["outputs"] == ["logits", "ce", "kd"]
    assert told["largest_difference"] < 1e-4


def test_two_heads_teach_in_turn(tmp_path):
    run(recipe(), folder=tmp_path / "first", progress=False)
    taught = recipe(method="kd", teacher={"artifact": str(tmp_path / "first")}, settings={})
    taught = taught.model_copy(update={"settings": {}})
    artifact, _ = trained(taught, tmp_path / "second")
    assert "second" not in "".join(plain_state(artifact.module))


def test_a_student_of_two_heads_goes_on_with_both(tmp_path):
    first = run(recipe(), folder=tmp_path / "first", progress=False).artifact
    given = {"model": str(tmp_path / "first")}
    chosen = recipe(student=given, settings={}, budget={"steps": 1, "batch": 8, "lr": 1e-12})
    result = run(chosen, folder=tmp_path / "second", progress=False)
    before, after = plain_state(first.module), plain_state(result.artifact.module)
    assert before.keys() == after.keys()
    assert max((before[k] - after[k]).abs().max().item() for k in before if k != "mix") < 1e-6
    again = plain_state(open_artifact(tmp_path / "second").module)
    assert same(after, again)
    with pytest.raises(ModelError, match="heads: dual"):
        trained(recipe(student=given, settings={"heads": "single"}), tmp_path / "third")


def test_the_state_with_the_best_mix_is_kept(tmp_path):
    budget = {"steps": 30, "batch": 8, "lr": 0.05, "optimizer": "sgd"}
    chosen = recipe(budget={**budget, "select": "best", "validate_every": 5})
    artifact, job = trained(chosen, tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    assert "accuracy_ce" in log
    assert "accuracy_kd" in log
    assert job.evaluate(artifact.module, "val")["accuracy"] == pytest.approx(
        artifact.meta["dho"]["val_accuracy"]
    )


def test_the_report_shows_three_accuracies_and_the_map(tmp_path):
    result = run(recipe(), folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    assert {"accuracy", "accuracy_ce", "accuracy_kd", "alpha", "beta", "conflict"} <= set(figures)
    assert "accuracy" in result.sides["teacher"]["0"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "by alpha (rows) and beta (columns)" in page
    assert "Validation accuracy over the mix" in page
    assert "labels&#x27; head" in page or "labels&#39; head" in page or "labels' head" in page


# ---- how it reads ----------------------------------------------------------------------------


def test_steps_are_those_of_the_unlabelled_stream_unless_zipped(tmp_path):
    """Property 12: 3 labelled and 40 unlabelled batches make 40 steps, or 3."""
    streams = {
        "labelled": (TensorSource({"x": torch.zeros(6, 1)}), 2),
        "unlabelled": (TensorSource({"x": torch.zeros(80, 1)}), 2),
    }
    assert len(Streams(streams)) == 40
    assert len(Streams(streams, drive="zip")) == 3
    job = open_job(recipe(), tmp_path)
    order = open_method(recipe()).order(job)
    assert len(order) == -(-job.splits.peek("unlabelled") // 8)
    zipped = open_method(recipe(settings={"drive": "zip"})).order(job)
    assert len(zipped) == -(-job.splits.peek("train") // 8)
    wide = open_method(recipe(settings={"unlabelled_batch": 13})).order(job)
    assert len(wide) == -(-job.splits.peek("unlabelled") // 13)
    job.log.close()


def test_student_and_teacher_normalise_one_view_differently(tmp_path):
    """Both see the same pixels; what each does to them is its own affair."""
    data = {
        "name": "generated",
        "options": {"kind": "images", "shape": [1, 8, 8], "labels_per_class": 3},
    }
    seen: dict[str, Tensor] = {}

    class Eye(nn.Module):
        def __init__(self, who: str, mean: float) -> None:
            super().__init__()
            self.fc, self.who = nn.Linear(64, 4), who
            self.input_mean, self.input_std = [mean], [2.0]

        def forward(self, x: Tensor) -> Tensor:
            seen[self.who] = x.detach()
            return self.fc(x.flatten(1))

    chosen = recipe(
        data=data, student={"model": "given"}, teacher=None,
        settings={}, budget={"steps": 1, "batch": 8},
    )  # fmt: skip
    job = open_job(chosen, tmp_path, given=Given(Eye("student", 0.5), Eye("teacher", 0.1)))
    method = open_method(chosen)
    made = method.objective(job, job.student(), job.teacher())
    teacher = job.teacher()
    teacher.bind(made.wants, job.task)
    order = method.order(job)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))[0]
    batch = order.read(rows, job.views())
    made.terms(batch, teacher)
    pixels = torch.cat([batch.view("labelled/x"), batch.view("unlabelled/x")])
    torch.testing.assert_close(seen["student"], (pixels - 0.5) / 2)
    torch.testing.assert_close(seen["teacher"], (batch.view("unlabelled/x") - 0.1) / 2)
    job.log.close()


def test_the_teacher_stays_frozen_and_its_choice_in_half_precision(tmp_path):
    """Property 11."""
    chosen = recipe()
    job = open_job(chosen, tmp_path)
    teacher = job.teacher()
    module = teacher.guest().module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    x = job.splits["val"].views["x"]
    with torch.no_grad():
        full = module(x)["logits"]
        clear = full.topk(2).values.diff().abs()[:, 0] > 0.1
        half = module.bfloat16()(x.bfloat16())["logits"]
    assert torch.equal(full.argmax(-1)[clear], half.argmax(-1)[clear])
    job.log.close()


def test_cached_logits_serve_as_the_teacher_does(tmp_path):
    budget = {"steps": 40, "batch": 8, "lr": 0.01, "optimizer": "sgd"}
    plain = DHO.example(0)["teacher"]
    live = weights(recipe(budget=budget), tmp_path / "live")
    kept = {**plain, "store": {"dtype": "float32"}}
    stored = weights(recipe(budget=budget, teacher=kept), tmp_path / "kept")
    assert max((live[k] - stored[k]).abs().max().item() for k in live) < 1e-4


def test_a_probe_on_features_captured_once_teaches_both_streams(tmp_path):
    """The teacher of the CIFAR-10 recipes: its body is not run again while the student learns."""
    probe = {
        "method": "linear-probe",
        "student": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
        "budget": {"steps": 4, "batch": 8, "lr": 0.05},
    }
    budget = {"steps": 10, "batch": 8, "lr": 0.01, "optimizer": "sgd"}
    chosen = recipe(teacher=probe, budget=budget)
    job = open_job(chosen, tmp_path)
    teacher, count = job.teacher(), []
    assert isinstance(teacher, Headed)
    body = next(m for m in teacher.net.module.modules() if isinstance(m, nn.Linear))
    method = open_method(chosen)
    made, order = method.objective(job, job.student(), teacher), method.order(job)
    batch = order.read(order.epoch(0, lambda: torch.Generator().manual_seed(0))[0], job.views())
    teacher.bind(made.wants, job.task)
    body.register_forward_hook(lambda *_: count.append(1))
    said = teacher.knowledge(batch)
    assert not count
    for name in ("labelled", "unlabelled"):
        with torch.no_grad():
            live = teacher.net(batch.view(f"{name}/x"))["logits"]
        torch.testing.assert_close(said.stream(name).tensor("logits"), live)
    job.fit("student", made, order, teacher=teacher)
    assert len(count) == 4  # two for the comparison above, two in bind
    job.log.close()


def test_a_function_of_images_may_teach(tmp_path):
    budget = {"steps": 10, "batch": 8, "lr": 0.01, "optimizer": "sgd"}
    chosen = recipe(budget=budget)
    job = open_job(chosen, tmp_path / "one")
    net = job.teacher().guest()
    function = Callable(
        lambda b: {"logits": net.quiet(b["x"])["logits"]}, fields=["logits"], fingerprint="t"
    )
    job.log.close()
    live = weights(chosen, tmp_path / "live")
    given, _ = trained(
        recipe(budget=budget, teacher=None), tmp_path / "fn", Given(teacher=function)
    )
    assert same(live, plain_state(given.module))


# ---- exactness -------------------------------------------------------------------------------


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        settings={"measure_every": 3},
        student={"model": "stillhouse:mlp", "options": {"widths": [8], "dropout": 0.3}},
        budget={"steps": 40, "batch": 8, "lr": 0.05},
        output={"checkpoint_minutes": 0},
    )
    whole, _ = trained(chosen, tmp_path / "whole")
    kills = kill_and_resume(lambda: trained(chosen, tmp_path / "cut"), tmp_path / "cut")
    assert kills >= 1
    again, _ = trained(chosen, tmp_path / "cut")
    assert same(plain_state(whole.module), plain_state(again.module))
    assert whole.meta["dho"] == again.meta["dho"]


def test_micro_batches_give_the_same_step(tmp_path):
    budget = {"steps": 20, "batch": 7, "lr": 0.01, "optimizer": "sgd"}
    settings = {"unlabelled_batch": 13}
    one = weights(recipe(settings=settings, budget=budget), tmp_path / "one")
    three = weights(recipe(settings=settings, budget={**budget, "accumulate": 3}), tmp_path / "3")
    assert max((one[k] - three[k]).abs().max().item() for k in one) < 1e-5


def test_two_processes_equal_one(one_and_two_processes):
    found = one_and_two_processes("dho")
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-5)


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", DHO.variants)
def test_every_variant_trains(variant, tmp_path):
    settings = {"warmup": 2.0} if "vlm" in variant else {}
    chosen = recipe(variant=variant, settings=settings)
    artifact, job = trained(chosen, tmp_path)
    assert job.stages[0]["name"] == "student"
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())
    dual = isinstance(artifact.module.module, TwoHeads)
    assert dual == (open_method(chosen).config.heads == "dual")


@pytest.mark.parametrize(
    ("case", "schedule"), [("lr_small_students", "warmup-linear"), ("lr_vlm", "chained")]
)
def test_the_official_learning_rates(golden, case, schedule):
    g = golden("dho").case(case)
    steps = len(g.get("lr", g.get("lr_official")))
    rate, warmup = (1e-3, 0.1) if case == "lr_small_students" else (5e-5, 12.0)
    wanted = {schedule: g.get("lr", g.get("lr_official"))}
    if "lr_corrected" in g:
        wanted["warmup-cosine"] = g["lr_corrected"]
    for name, reference in wanted.items():
        method = open_method(recipe(settings={"schedule": name, "warmup": warmup}))
        plan = method.training(None)["schedule"]
        rates = [rate * plan(Clock(step=step, total=steps)) for step in range(steps)]
        assert rates == pytest.approx(reference.tolist(), abs=1e-12)


def test_the_schedule_reaches_the_optimiser(tmp_path):
    chosen = recipe(
        settings={"schedule": "warmup-linear", "warmup": 0.25},
        budget={"steps": 8, "batch": 8, "lr": 0.08, "optimizer": "sgd"},
        output={"log_every": 1},
    )
    trained(chosen, tmp_path)
    import json

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line.get("lr") is not None]
    expected = [0.0, 0.04, *[0.08 * (8 - step) / 6 for step in range(2, 8)]]
    assert rates[:8] == pytest.approx(expected)


def test_bad_settings_are_told():
    for settings, words in (
        ({"balance": 1.0}, "heads: single"),
        ({"balance": 1.5}, "balance"),
        ({"drive": "labeled"}, "unlabelled"),
        ({"beta": 0.0}, "beta"),
        ({"alfa": 0.5}, "alpha"),
    ):
        with pytest.raises(RecipeError, match=words):
            open_method(recipe(settings=settings))


def test_data_without_unlabelled_rows_is_told_before_training(tmp_path):
    with pytest.raises(RecipeError, match=r"no split 'unlabelled'.*labels_per_class"):
        trained(recipe(data={"name": "generated"}), tmp_path)
    assert not list(tmp_path.rglob("step-*"))


def test_a_teacher_of_other_classes_is_told_before_training(tmp_path):
    wide = {"model": "torch.nn:Linear", "options": {"in_features": 6, "out_features": 7}}
    with pytest.raises(ModelError, match=r"7 outputs.*4 classes"):
        trained(recipe(teacher=wide), tmp_path)
    assert not list(tmp_path.rglob("step-*"))


def test_a_store_of_some_classes_is_told(tmp_path):
    kept = {**DHO.example(0)["teacher"], "store": {"form": "topk", "k": 2}}
    with pytest.raises(TeacherError, match="form: dense"):
        trained(recipe(teacher=kept), tmp_path)


def test_a_head_that_is_not_the_last_layer_is_told(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(6, 3), nn.Conv1d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(x).unsqueeze(-1)).squeeze(-1)

    with pytest.raises(ModelError, match="'fc' of Odd has 3 outputs, the data 4 classes"):
        trained(recipe(student={"model": "given"}), tmp_path, Given(student=Odd()))


# ---- real classes ----------------------------------------------------------------------------

IMAGES = {
    "name": "generated",
    "options": {"kind": "images", "shape": [3, 28, 28], "labels_per_class": 2, "rows": 24},
}
SHORT = {"steps": 2, "batch": 6, "lr": 0.01}


@pytest.fixture
def clip_folder(tmp_path):
    """A CLIP model of Hugging Face's own class with random weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "<eos>", "a", "photo", "of", "class", ".", "0", "1", "2", "3"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="<eos>"
    )
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 12, "max_position_embeddings": 12, "eos_token_id": 2,
                     "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "clip"
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "model": f"hf:{folder}",
        "weights": "pretrained",
        "options": {"task": "zero-shot-image-classification", **options},
    }


def test_a_clip_model_teaches_by_its_prompts(clip_folder, tmp_path):
    import transformers

    templates = ["a photo of a {}.", "{}"]
    chosen = recipe(
        data=IMAGES, teacher=clip(clip_folder, templates=templates), budget=SHORT, settings={},
        student={"model": "stillhouse:small_cnn", "options": {"widths": [4]}},
    )  # fmt: skip
    artifact, job = trained(chosen, tmp_path / "run")
    assert isinstance(artifact.module.module, TwoHeads)
    net = job.teacher().net
    assert type(net.module.tower) is transformers.CLIPModel
    assert not any(p.requires_grad for p in net.parameters())
    # by hand: cosine of image and mean prompt, times 100
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    images = job.splits["val"].views["x"][:5]
    vectors = []
    for name in job.splits.about["classes"]:
        given = tokenizer([t.format(name) for t in templates], padding=True, return_tensors="pt")
        given.pop("token_type_ids", None)
        with torch.no_grad():
            own = model.get_text_features(**given).pooler_output
        vectors.append(F.normalize(F.normalize(own, dim=-1).mean(0), dim=-1))
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (net.module.input_mean, net.module.input_std)
    )
    with torch.no_grad():
        features = model.get_image_features(pixel_values=(images - mean) / std).pooler_output
        expected = 100 * F.normalize(features, dim=-1) @ torch.stack(vectors).T
        torch.testing.assert_close(net(images)["logits"], expected, rtol=1e-4, atol=1e-3)


def test_a_clip_student_begins_as_its_own_words_say(clip_folder, tmp_path):
    """Property 7: language-aware initialisation of both heads, cosine on the second."""
    chosen = recipe(
        data=IMAGES, teacher=clip(clip_folder), student=clip(clip_folder, head="linear"),
        variant="vlm", budget=SHORT, settings={},
    )  # fmt: skip
    job = open_job(chosen, tmp_path / "job")
    made = open_method(chosen).objective(job, job.student(), None)
    made.eval()
    images = job.splits["val"].views["x"]
    teacher = job.teacher().net
    with torch.no_grad():
        out, zero_shot = made.student(images), teacher(images)["logits"]
    unit = F.normalize(made.student.module.net.module.classifier.weight, dim=-1)
    # the plain mean has the direction of the teacher's vectors where there is one template
    torch.testing.assert_close(unit, teacher.module.classifier.matrix)
    scaled = out["kd"] / made.student.module.second.net.weight.norm(dim=-1)
    torch.testing.assert_close(scaled, zero_shot, rtol=1e-3, atol=1e-2)
    assert torch.equal(
        made.student.module.second.net.weight, made.student.module.net.module.classifier.weight
    )
    job.log.close()
    artifact, _ = trained(chosen, tmp_path / "run")
    artifact.save(tmp_path / "artifact")
    again = open_artifact(tmp_path / "artifact").module
    with torch.no_grad():
        torch.testing.assert_close(again(images)["logits"], artifact.module(images)["logits"])


def test_a_few_shot_cache_adds_to_the_prompts(clip_folder, tmp_path):
    from safetensors.torch import save_file

    from stillhouse.models.loading import load_model

    rng = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(8, 12, generator=rng), dim=-1)
    values = F.one_hot(torch.arange(8) % 4).float()
    save_file({"keys": keys, "values": values}, tmp_path / "cache.safetensors")
    about = {"classes": ["class 0", "class 1", "class 2", "class 3"], "input": [3, 28, 28]}
    options = {"task": "zero-shot-image-classification"}
    cached = {**options, "cache": str(tmp_path / "cache.safetensors"), "cache_alpha": 2.0}
    models = [
        load_model(f"hf:{clip_folder}", options=o, weights="pretrained", about=about).eval()
        for o in (options, cached)
    ]
    images = torch.rand(3, 3, 20, 20, generator=rng)  # brought to 28 pixels
    with torch.no_grad():
        plain, added = (model(images) for model in models)
    features = F.normalize(plain["embedding"], dim=-1)
    expected = plain["logits"] + 2.0 * torch.exp(-5.5 * (1 - features @ keys.T)) @ values
    torch.testing.assert_close(added["logits"], expected)
    about = {**about, "classes": about["classes"][:3]}
    with pytest.raises(ModelError, match="knows 4 classes, the prompts are for 3"):
        load_model(f"hf:{clip_folder}", options=cached, weights="pretrained", about=about)


@pytest.mark.parametrize("source", ["timm", "torchvision", "hf"])
def test_real_students(source, tmp_path):
    if source == "timm":
        pytest.importorskip("timm")
        student = {"model": "timm:test_resnet"}
    elif source == "torchvision":
        pytest.importorskip("torchvision")
        student = {"model": "torchvision:mobilenet_v2", "options": {"width_mult": 0.25}}
    else:
        pytest.importorskip("transformers")
        student = {
            "model": "hf:vit",
            "options": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 16, "image_size": 28, "patch_size": 14,
            },
        }  # fmt: skip
    chosen = recipe(
        data=IMAGES, student=student, budget=SHORT, settings={},
        teacher={"model": "stillhouse:small_cnn", "options": {"widths": [4]}},
    )  # fmt: skip
    result = run(chosen, folder=tmp_path / "run", progress=False)
    again = open_artifact(tmp_path / "run").module
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        first, second = result.artifact.module(images), again(images)
    assert first["logits"].shape == first["kd"].shape == (2, 4)
    torch.testing.assert_close(first["logits"], second["logits"])


def test_a_student_handed_in_as_an_object_is_reopened_with_it(tmp_path):
    x, y = torch.randn(30, 5), torch.arange(30) % CLASSES
    about = {"classes": list(range(CLASSES)), "input": [5]}
    source = TensorSource({"x": x, "target": y})
    splits = Splits(
        {"train": source, "val": source, "test": source, "unlabelled": source}, "v", about
    )
    chosen = recipe(
        data={"name": "given"}, student={"model": "given"}, teacher=None, settings={},
        budget={"steps": 2, "batch": 6, "lr": 0.01},
    )  # fmt: skip
    given = Given(Student(), Student(), splits)
    artifact, _ = trained(chosen, tmp_path / "run", given)
    artifact.save(tmp_path / "artifact")
    again = open_artifact(tmp_path / "artifact", Student()).module
    with torch.no_grad():
        torch.testing.assert_close(again(x)["logits"], artifact.module(x)["logits"])


# ---- the demonstration -----------------------------------------------------------------------


def test_the_demonstration_runs_on_real_digits(data_root, tmp_path):
    """Its recipe with two updates of each training."""
    chosen = load_recipe(
        "dho",
        [
            "budget.steps=2",
            "teacher.train.steps=2",
            "compare=[]",
            "data.options.subset={train: 700}",
            "teacher.store.draws=2",
        ],
    )
    result = run(chosen, folder=tmp_path / "run", progress=False)
    assert set(result.sides) == {"distilled", "teacher"}
    assert isinstance(result.artifact.predictor, TwoHeadClassifier)
    # all sides read one store, of sixteen views of both streams
    teacher = open_job(chosen, tmp_path / "again").teacher()
    assert isinstance(teacher.teacher, Live)
    # normalised by the digits it was trained on, not by MNIST
    assert teacher.teacher.net.mean.item() == pytest.approx(0.1558, abs=1e-3)
