from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, Splits, TensorSource, read_block
from stillhouse.clock import Clock, Views, generator
from stillhouse.data.registry import open_data
from stillhouse.data.series import Crop, CroppedSource
from stillhouse.errors import ModelError, RecipeError, StillhouseError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.methods.multimodal.comodo import (
    ANCHOR,
    COMODO,
    COMODOObjective,
    nearest_anchor,
    queue_rows,
    released_steps,
)
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.schedule import warmup_linear
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.teacher import Knowledge
from stillhouse.teachers.function import Callable


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in case.items()}


def bare(queue: Tensor, **settings: Any) -> COMODOObjective:
    """The objective on features that are given themselves."""
    student = Net(nn.Identity(), answer="embedding")
    return COMODOObjective(student, None, queue, COMODO.Config(queue=len(queue), **settings))


def stepped(objective: COMODOObjective, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of one batch; the queue moves as at the end of a step."""
    batch = Batch(x=student, **{ANCHOR: teacher})
    objective.scratch = {}
    objective.queue.begin_slot(-1)
    with torch.no_grad():
        batch = objective.prepare(batch, Clock())
    loss = objective(batch, Knowledge.none, Clock())["match"]
    objective.queue.settle(True)
    return loss


def recipe(**changes: Any):
    spec = {**COMODO.example(0), "compare": [], **changes}
    if "settings" in changes:
        spec["settings"] = {**COMODO.example(0)["settings"], **changes["settings"]}
    return load_recipe(spec)


def trained(chosen: Any, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job), job
    finally:
        job.log.close()


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "t", "s"), [("loss_t0", 0.1, 0.05), ("loss_t1", 1.0, 0.5)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_loss_and_its_queue_over_several_batches_are_the_released_ones(
    golden, name, t, s, dtype, near
):
    case = tensors(golden("comodo").case(name))
    objective = bare(case["queue0"].to(dtype), teacher_temperature=t, student_temperature=s)
    steps = sorted({key.split("_")[0] for key in case if key[0] == "s" and key[1].isdigit()})
    assert steps
    for step in steps:
        student = case[f"{step}_student_raw"].to(dtype).requires_grad_()
        loss = stepped(objective, student, case[f"{step}_z_v"].to(dtype))
        loss.backward()
        wanted = case[f"{step}_loss"].to(dtype)
        torch.testing.assert_close(loss.detach(), wanted, rtol=near, atol=0)
        torch.testing.assert_close(
            student.grad, case[f"{step}_grad_student_raw"].to(dtype), rtol=near, atol=near * 1e-1
        )
        after = case[f"{step}_queue_after"].to(dtype)
        assert torch.equal(objective.queue.last(), after)


def test_the_teachers_distribution_is_the_released_one(golden):
    for name, temperature in (("loss_t0", 0.1), ("loss_t1", 1.0)):
        case = {k: v.double() for k, v in tensors(golden("comodo").case(name)).items()}
        anchors = torch.cat([case["queue0"], case["s0_z_v"]])
        p = (case["s0_z_v"] @ anchors.T / temperature).softmax(1)
        torch.testing.assert_close(p, case["s0_teacher_prob"], rtol=1e-9, atol=1e-12)
        entropy = -(p * p.log()).sum(1).mean()
        torch.testing.assert_close(entropy, case["s0_entropy"], rtol=1e-9, atol=0)
        assert case["s0_loss"] > case["s0_entropy"]


def test_the_regression_is_the_released_baseline(golden):
    case = {k: v.double() for k, v in tensors(golden("comodo").case("l2")).items()}
    objective = bare(torch.zeros(8, case["teacher"].shape[1]).double(), loss="l2")
    student = case["student"].requires_grad_()
    loss = stepped(objective, student, case["teacher"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, case["grad_student"], rtol=1e-9, atol=1e-12)


def test_the_first_rows_of_the_queue_are_the_released_ones(golden):
    wanted = torch.from_numpy(golden("comodo").case("queue_init")["indices"]).long()
    assert torch.equal(queue_rows(50, len(wanted)), wanted)


def test_the_rate_over_the_released_and_over_the_true_steps(golden):
    case = golden("comodo").case("schedule")
    count, size, batch, epochs, lr = 50, 8, 7, 4, 3e-4
    first, later = math.ceil((count - size) / batch), math.ceil(count / batch)
    true = first + (epochs - 1) * later
    for kind, total in (("official", released_steps(first, size, epochs)), ("corrected", true)):
        assert total == case[f"total_{kind}"]
        warm = int(0.1 * total)
        schedule = warmup_linear(warm, total)
        rates = [lr * schedule(Clock(step=step, total=true)) for step in range(true)]
        assert rates == pytest.approx(case[f"lr_{kind}"], rel=1e-9)
        after = lr * schedule(Clock(step=true, total=true))
        assert after == pytest.approx(float(case[f"lr_after_{kind}"]), rel=1e-9, abs=1e-12)
    assert int(0.1 * released_steps(first, size, epochs)) == case["warmup_official"]


def test_the_class_of_the_nearest_anchor(golden):
    case = tensors(golden("comodo").case("zero_shot"))
    found = nearest_anchor(case["student"], case["anchors"])
    assert torch.equal(found, case["pred"].long())


# ---- properties --------------------------------------------------------------------------------


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator(seed)).double(), dim=-1)


def test_the_least_loss_is_the_entropy_and_has_no_gradient():
    queue, teacher = unit(12, 6), unit(4, 6, seed=1)
    objective = bare(queue, teacher_temperature=0.3, student_temperature=0.3)
    student = teacher.clone().requires_grad_()
    loss = stepped(objective, student, teacher)
    p = (teacher @ torch.cat([queue, teacher]).T / 0.3).softmax(1)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum(1).mean())
    loss.backward()
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("t", "s", "same", "other"), [(1.0, 0.5, 1.069348, 1.928820), (0.1, 0.05, 0.693601, 19.999546)]
)
def test_by_hand(t, s, same, other):
    teacher = torch.tensor([[1.0, 0.0]]).double()
    for student, wanted in (([1.0, 0.0], same), ([0.0, 1.0], other)):
        objective = bare(torch.eye(2).double(), teacher_temperature=t, student_temperature=s)
        loss = stepped(objective, torch.tensor([student]).double(), teacher)
        assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_the_queue_holds_the_last_rows_of_all_batches():
    first = unit(10, 4)
    objective, seen = bare(first), [first]
    for number, size in enumerate((3, 3, 3, 1, 10, 7)):
        teacher = unit(size, 4, seed=number + 1)
        stepped(objective, torch.randn(size, 4).double(), teacher)
        seen.append(teacher)
        assert torch.equal(objective.queue.last(), torch.cat(seen)[-10:])
        assert len(objective.queue) == 10


def test_only_the_student_gets_a_gradient():
    queue, teacher = unit(6, 4), unit(3, 4, seed=1).requires_grad_()
    objective = bare(queue)
    student = torch.randn(3, 4).double().requires_grad_()
    stepped(objective, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert not any(b.requires_grad for b in objective.buffers())


def test_the_order_of_the_queue_does_not_matter():
    queue, teacher, student = unit(20, 4), unit(5, 4, seed=1), torch.randn(5, 4).double()
    mixed = queue[torch.randperm(20, generator=generator(3))]
    one, other = (stepped(bare(rows), student, teacher) for rows in (queue, mixed))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_epoch_0_leaves_out_what_the_queue_was_filled_with(tmp_path):
    chosen = recipe(settings={"queue": 20}, budget={"epochs": 3, "batch": 16, "lr": 1e-3})
    _, job = trained(chosen, tmp_path)
    train = next(s for s in job.stages if s["name"] == "student")
    # 64 rows: 44 in epoch 0, all in the others
    assert train["steps"] == 3 + 4 + 4


def test_the_rate_ends_at_nothing_unless_the_released_count_is_asked_for(tmp_path):
    def last_rate(**settings: Any) -> float:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        chosen = recipe(
            settings={"queue": 20, **settings},
            budget={"epochs": 3, "batch": 16, "lr": 1.0e-3},
            output={"log_every": 1},
        )
        trained(chosen, folder)
        return [line["lr"] for line in logged(folder, "step")][-1]

    warm = int(0.1 * 11)
    assert last_rate() == pytest.approx(1e-3 / (11 - warm))  # the step after it would have 0
    total = released_steps(3, 20, 3)
    assert last_rate(faithful_schedule=True) == pytest.approx(
        1e-3 * (total - 10) / (total - int(0.1 * total))
    )


def test_without_the_projector_the_features_themselves_are_compared(tmp_path):
    chosen = recipe(settings={"projector": False})
    job = open_job(chosen, tmp_path)
    method = open_method(chosen)
    clips = method.embedded(job, method.projected(job, job.teacher()))
    queued = method.first_queue(job, clips)
    assert queued["vectors"].shape == (16, 12)  # 3 channels of 4
    objective = method.objective(job, job.student(), queued["vectors"])
    assert objective.projector is None
    with_it = open_method(recipe())
    vectors = torch.zeros(16, with_it.config.width)
    assert with_it.objective(job, job.student(), vectors).projector is not None
    with pytest.raises(ModelError, match="as wide as"):
        method.objective(job, job.student(), torch.zeros(16, 5))


def test_the_teachers_projector_is_frozen_and_is_part_of_the_store(tmp_path):
    found = {}
    for seed in (1, 2):
        chosen = recipe(settings={"projector_seed": seed})
        job = open_job(chosen, tmp_path / str(seed))
        method = open_method(chosen)
        teacher = method.projected(job, job.teacher())
        before = plain_state(teacher.projector.module)
        before = {k: v.clone() for k, v in before.items()}
        clips = method.embedded(job, teacher)
        found[seed] = (teacher.fingerprint, clips.fingerprint, clips.read(torch.arange(8), None))
        after = plain_state(teacher.projector.module)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not any(p.requires_grad for p in teacher.projector.module.parameters())
        assert not teacher.projector.module.train().training
    assert found[1][0] != found[2][0]
    assert found[1][1] != found[2][1]
    vectors = [found[seed][2][ANCHOR] for seed in (1, 2)]
    assert not torch.allclose(*vectors)
    for rows in vectors:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))


def test_a_last_batch_of_one_clip_is_learned_from_too(tmp_path):
    data = {"name": "generated", "options": {"kind": "series", "rows": 65}}
    artifact, job = trained(recipe(data=data), tmp_path)
    # 49 rows in epoch 0, whose fourth batch is one row; 65 in the other
    assert next(s for s in job.stages if s["name"] == "student")["steps"] == 4 + 5
    assert all(bool(v.isfinite().all()) for v in plain_state(artifact.module).values())


def test_every_clip_is_embedded_once(tmp_path):
    asked: list[int] = []

    def answer(batch: Batch) -> dict[str, Tensor]:
        asked.extend(batch["id"].tolist())
        return {"embedding": batch.view("other").flatten(1)}

    teacher = Callable(answer, fields=["embedding"], fingerprint="flat")
    chosen = recipe(budget={"epochs": 4, "batch": 16, "lr": 1e-3})
    artifact, job = trained(chosen, tmp_path, Given(teacher=teacher))
    counts = torch.bincount(torch.tensor(asked), minlength=64)
    # once for the store, beside a row or two for the width and the checks
    assert counts[8:].tolist() == [1] * 56
    assert artifact.kind == "model"
    assert job.stages[0]["name"] == "embed/capture"


def test_asked_at_every_step_it_learns_the_same(tmp_path):
    kept, _ = trained(recipe(), tmp_path / "kept")
    live, job = trained(recipe(settings={"cache": False}), tmp_path / "live")
    assert "embed/capture" not in [s["name"] for s in job.stages]
    one, other = plain_state(kept.module), plain_state(live.module)
    assert max((one[k].double() - other[k].double()).abs().max() for k in one) < 1e-5


def test_a_smaller_loss_after_training(tmp_path):
    chosen = recipe(budget={"epochs": 30, "batch": 16, "lr": 0.01}, output={"log_every": 1})
    trained(chosen, tmp_path)
    losses = [line["loss"] for line in logged(tmp_path, "step")]
    # an untrained teacher sees hardly any difference: most of the loss is its entropy
    assert sum(losses[-8:]) < sum(losses[:8]) - 8 * 0.2


def test_what_is_watched_while_it_trains(tmp_path):
    chosen = recipe(budget={"epochs": 20, "batch": 16, "lr": 0.01, "validate_every": 10})
    teacher = Callable(
        lambda batch: {"embedding": batch.view("other").flatten(1)},
        fields=["embedding"],
        fingerprint="flat",
    )
    trained(chosen, tmp_path, Given(teacher=teacher))
    seen = [line.get("scores", line) for line in logged(tmp_path, "validation")]
    assert len(seen) == 2
    for scores in seen:
        assert 0.0 <= scores["zero_shot"] <= 1.0
        assert 0.0 <= scores["separation"] <= 1.0
    assert seen[-1]["zero_shot"] > 0.5  # four classes


def test_rows_without_labels_are_learned_from_too(tmp_path):
    data = {"name": "generated", "options": {"kind": "series", "labels_per_class": 2}}
    chosen = recipe(data=data, budget={"epochs": 2, "batch": 16, "lr": 1e-3})
    result = run(chosen, folder=tmp_path / "run", progress=False)
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    train = next(s for s in stages if s["name"] == "student")
    assert train["steps"] == 3 + 4  # of 64 rows, 8 of them with labels
    assert result.sides["distilled"]["0"]["probe_c"] == 1e5  # too few rows for a search


def cropped_splits() -> Splits:
    """Two sensors that record the same, cut at random, with one draw for both."""
    sources, rng = {}, generator("cropped")
    for split, rows in (("train", 32), ("val", 8), ("test", 8)):
        x = torch.randn(rows, 3, 24, generator=rng)
        views = {"x": x, "other": x.clone(), "target": torch.arange(rows) % 2}
        sources[split] = CroppedSource(views, augment=Crop(16, ["x", "other"]), name=split)
    return Splits(sources, "cropped", {"classes": ["a", "b"], "input": [3, 16]})


def test_the_teacher_sees_the_same_cut(tmp_path):
    answers = {"fields": ["embedding"], "fingerprint": "flat"}
    teacher = Callable(lambda batch: {"embedding": batch.view("other").flatten(1)}, **answers)
    spec = {**COMODO.example(0), "data": "given", "compare": []}
    spec["teacher"] = {"model": "given", "store": {"draws": 2}}
    spec["settings"] = {"queue": 8, "projector": False}
    spec["budget"] = {"epochs": 1, "batch": 8, "lr": 1e-3}
    given = Given(splits=cropped_splits(), teacher=teacher)
    job = open_job(load_recipe(spec), tmp_path / "a", given=given)
    method = open_method(job.recipe)
    clips = method.embedded(job, method.projected(job, job.teacher()))
    order = method.order(job, clips)
    seen = []
    for epoch in range(4):
        batch = order.read(torch.arange(8), Views(job.views().seed, epoch))
        cut = F.normalize(batch["x"].flatten(1), dim=1)
        torch.testing.assert_close(batch[ANCHOR], cut, rtol=0, atol=2e-3)  # float16 in between
        seen.append(batch["x"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    job.log.close()


def test_views_that_are_cut_without_end_cannot_be_kept(tmp_path):
    teacher = Callable(
        lambda batch: {"embedding": batch.view("other").flatten(1)},
        fields=["embedding"],
        fingerprint="flat",
    )
    spec = {**COMODO.example(0), "data": "given", "compare": [], "teacher": {"model": "given"}}
    spec["budget"] = {"epochs": 1, "batch": 8, "lr": 1e-3}
    given = Given(splits=cropped_splits(), teacher=teacher)
    with pytest.raises(TeacherError, match="augmented anew"):
        trained(load_recipe(spec), tmp_path / "a", given)
    spec["settings"] = {**spec["settings"], "cache": False}
    trained(load_recipe(spec), tmp_path / "b", given)


# ---- micro-batches, processes, kills -------------------------------------------------------------


class NoBatchNorm(nn.Module):
    """Features without statistics over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 12)

    def forward(self, series: Tensor) -> Tensor:
        return self.layer(series.flatten(1)).tanh()


class OtherSensor(NoBatchNorm):
    reads = "other"


def plain_run(folder: Path, **budget: Any):
    """Without BatchNorm: the features themselves are compared."""
    torch.manual_seed(0)
    given = Given(student=NoBatchNorm(), teacher=OtherSensor())
    spec = {**COMODO.example(0), "student": {"model": "given"}, "teacher": {"model": "given"}}
    spec["settings"] = {"queue": 21, "projector": False}
    spec["budget"] = {"epochs": 3, "batch": 14, "lr": 0.01, "optimizer": "sgd", **budget}
    chosen = load_recipe({**spec, "compare": []})
    job = open_job(chosen, folder, given=given)
    method = open_method(chosen)
    clips = method.embedded(job, method.projected(job, job.teacher()))
    queued = method.first_queue(job, clips)
    objective = method.objective(job, job.student(), queued["vectors"])
    from stillhouse.batch import Without

    order = Without(method.order(job, clips), {0: queued["rows"]})
    job.fit("student", objective, order, schedule=method.schedule(job, order))
    job.log.close()
    return objective


def test_micro_batches_give_the_batchs_queue_and_weights(tmp_path):
    whole, parts = plain_run(tmp_path / "1"), plain_run(tmp_path / "3", accumulate=3)
    assert torch.equal(whole.queue.last(), parts.queue.last())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[name], rtol=0, atol=1e-6)


def test_two_processes_equal_one(one_and_two_processes):
    found = one_and_two_processes("comodo")
    assert torch.equal(found[0]["place"], found[1]["place"])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-5)


def test_killed_and_resumed_it_ends_the_same(kill_and_resume, tmp_path):
    def chosen():
        return recipe(
            budget={"epochs": 30, "batch": 16, "lr": 1e-3},
            output={"checkpoint_minutes": 1e-4},
        )

    whole, _ = trained(chosen(), tmp_path / "whole")
    folder = tmp_path / "killed"
    killed = kill_and_resume(lambda: trained(chosen(), folder), folder)
    assert killed >= 1
    again, _ = trained(chosen(), folder)
    one, other = plain_state(whole.module), plain_state(again.module)
    assert all(torch.equal(one[k], other[k]) for k in one)


# ---- models and data of one's own --------------------------------------------------------------


def own_splits() -> Splits:
    """Clips of video (frames, 3, 32, 32) and of a sensor (6, 40), recorded together."""
    sources, rng = {}, generator("own")
    for split, rows in (("train", 24), ("val", 8), ("test", 8)):
        target = torch.arange(rows) % 2
        video = torch.rand(rows, 4, 3, 32, 32, generator=rng) * 0.2 + 0.6 * target.view(
            -1, 1, 1, 1, 1
        )
        turns = torch.arange(40) / 40 * (2 + 6 * target.view(-1, 1, 1))
        x = torch.sin(2 * torch.pi * turns) + 0.1 * torch.randn(rows, 6, 40, generator=rng)
        sources[split] = TensorSource({"x": x, "video": video, "target": target}, name=split)
    return Splits(sources, "own clips", {"classes": ["sit", "walk"], "input": [6, 40]})


def video_teacher(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from stillhouse.models.video_encoder import VideoEncoder

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 32, "patch_size": 16, "num_frames": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "videomae":
        model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes))
    else:
        model = transformers.TimesformerModel(transformers.TimesformerConfig(**sizes))
    return VideoEncoder(model, reads="video")


def series_student(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "gru":

        class Recurrent(nn.Module):
            """A plain module of one's own: the last state of a GRU."""

            def __init__(self) -> None:
                super().__init__()
                self.gru = nn.GRU(6, 8, batch_first=True)

            def forward(self, series: Tensor) -> Tensor:
                return self.gru(series.transpose(1, 2))[1][-1]

        return Recurrent()
    transformers = pytest.importorskip("transformers")

    class Patches(nn.Module):
        """A transformer over patches of each channel, as in transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.PatchTSTModel(
                transformers.PatchTSTConfig(
                    num_input_channels=6, context_length=40, patch_length=8, patch_stride=8,
                    d_model=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                )
            )  # fmt: skip

        def forward(self, series: Tensor) -> Tensor:
            states = self.model(past_values=series.transpose(1, 2)).last_hidden_state
            return states.mean(2).flatten(1)  # mean over patches, channels side by side

    return Patches()


@pytest.mark.parametrize(("teacher", "student"), [("videomae", "gru"), ("timesformer", "patchtst")])
def test_real_model_classes_from_tiny_configs(teacher, student, tmp_path):
    spec = {
        "method": "comodo",
        "data": "given",
        "teacher": {"model": "given"},
        "student": {"model": "given"},
        "settings": {"queue": 12, "hidden": 8, "width": 4},
        "budget": {"epochs": 2, "batch": 8, "lr": 0.01},
        "seed": 0,
    }
    given = Given(series_student(student), video_teacher(teacher), own_splits())
    before = plain_state(given.teacher)
    before = {k: v.clone() for k, v in before.items()}
    result = run(load_recipe(spec), folder=tmp_path, progress=False, given=given)
    assert 0.0 <= result.sides["distilled"]["0"]["accuracy"] <= 1.0
    assert result.artifact.predict([torch.randn(6, 40)])[0].shape == ({"gru": 8}.get(student, 48),)
    assert all(torch.equal(before[k], v) for k, v in plain_state(given.teacher).items())
    start = plain_state(series_student(student))
    end = plain_state(result.artifact.module)
    assert any(not torch.equal(start[k], end[k]) for k in start)


class Recordings:
    """Recordings of different length, read one by one."""

    def __init__(self, rows: int) -> None:
        self.rows, self.fingerprint = rows, f"recordings {rows}"
        self.targets = torch.arange(rows) % 2

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, item):
        index, length = item[0], 20 + 3 * (item[0] % 5)
        rng = generator("recording", index)
        x = torch.randn(2, length, generator=rng) + 2.0 * (index % 2)
        return {"x": x, "other": torch.randn(3, length, generator=rng), "target": index % 2}


@pytest.mark.parametrize("length", [0, 32])
def test_recordings_of_different_length(length, tmp_path):
    splits = Splits(
        {"train": Recordings(24), "val": Recordings(6), "test": Recordings(8)},
        "recordings", {"classes": ["a", "b"]},
    )  # fmt: skip
    options = {"widths": [4], "kernel": 3, "length": length}
    spec = {
        "method": "comodo",
        "data": "given",
        "teacher": {
            "model": "stillhouse:series_cnn",
            "options": {**options, "channels": 3, "reads": "other"},
        },
        "student": {"model": "stillhouse:series_cnn", "options": {**options, "channels": 2}},
        "settings": {"queue": 12, "hidden": 8, "width": 4},
        "budget": {"epochs": 1, "batch": 6, "lr": 0.01},
    }  # fmt: skip
    result = run(load_recipe(spec), folder=tmp_path, progress=False, given=Given(splits=splits))
    assert result.sides["distilled"]["0"]["accuracy"] > 0.5


def test_the_artifact_gives_vectors(tmp_path):
    about = {"mean": [5.0, -2.0, 0.5], "std": [2.0, 0.5, 1.0]}
    data = {"name": "generated", "options": {"kind": "series"}}
    given = Given(splits=open_data(**data))
    given.splits.about["views"] = {"x": about}
    result = run(recipe(), folder=tmp_path / "run", progress=False, given=given)
    artifact = open_artifact(tmp_path / "run")
    rows = [torch.randn(3, 16), torch.randn(3, 16).numpy()]
    vectors = artifact.predict(rows)
    # raw values go in: they are normalised channel by channel, as in training
    before = result.artifact.predict(rows)
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))
    assert artifact.module.mean.shape == (3, 1)
    network = artifact.module.module.eval()
    scaled = (rows[0] - torch.tensor(about["mean"])[:, None]) / torch.tensor(about["std"])[:, None]
    torch.testing.assert_close(network(scaled[None])["embedding"][0], vectors[0])
    assert [tuple(v.shape) for v in vectors] == [(12,), (12,)]
    assert not any("projector" in name for name in plain_state(artifact.module))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64, 16384])
def test_a_queue_that_does_not_fit_is_told(size, tmp_path):
    with pytest.raises(RecipeError, match="does not fit 64 training rows in batches of 16"):
        trained(recipe(settings={"queue": size}), tmp_path)
    assert not list((tmp_path / "stages").rglob("*.state"))  # told before anything is done


def test_a_released_schedule_counts_epochs(tmp_path):
    chosen = recipe(
        settings={"faithful_schedule": True}, budget={"steps": 4, "batch": 16, "lr": 1e-3}
    )
    with pytest.raises(RecipeError, match="counts epochs"):
        trained(chosen, tmp_path)


def test_a_view_that_is_not_there_is_told(tmp_path):
    options = {**COMODO.example()["teacher"]["options"], "reads": "othr"}
    spec = {"model": "stillhouse:series_cnn", "options": options}
    with pytest.raises(StillhouseError, match="other"):
        trained(recipe(teacher=spec), tmp_path)


def test_a_teacher_without_vectors_is_told(tmp_path):
    teacher = Callable(
        lambda batch: {"logits": torch.zeros(batch.size, 3)}, fields=["logits"], fingerprint="x"
    )
    with pytest.raises(TeacherError, match="embedding"):
        trained(recipe(), tmp_path, Given(teacher=teacher))


@pytest.mark.parametrize("variant", COMODO.variants)
def test_every_variant_trains(variant, tmp_path):
    settings = {"queue": 20} if open_method(recipe(variant=variant)).config.queue > 20 else {}
    artifact, _ = trained(
        recipe(variant=variant, settings=settings, budget={"epochs": 1, "batch": 16, "lr": 1e-3}),
        tmp_path,
    )
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())


def test_official_is_the_released_call():
    config = COMODO.Config(**COMODO.variants["official"].set)
    assert (config.teacher_temperature, config.student_temperature) == (0.1, 0.05)
    assert (config.queue, config.hidden, config.width) == (16384, 2048, 128)
    assert config.faithful_schedule
    assert COMODO.variants["official"].budget["lr"] == 3e-4


# ---- real data ---------------------------------------------------------------------------------


def test_the_demonstration_reads_real_data(data_root, tmp_path):
    chosen = load_recipe(
        "recipes/comodo.yaml" if Path("recipes/comodo.yaml").exists() else "comodo",
        ["teacher.train.epochs=1", "budget.epochs=1", "compare=[]"],
    )
    job = open_job(chosen, tmp_path)
    method = open_method(chosen)
    teacher = method.projected(job, job.teacher())
    clips = method.embedded(job, teacher)
    batch = read_block(job.order("train"), torch.arange(4), Views(0))
    assert batch["x"].shape == (4, 3, 128)
    assert batch["other"].shape == (4, 3, 128)
    assert clips.read(torch.arange(4), None)[ANCHOR].shape == (4, 128)
    job.log.close()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "float64")]
)
def test_a_whole_run_in_another_precision(precision, dtype, tmp_path):
    spec = {**COMODO.example(0), "compare": [], "hardware": {"precision": precision}}
    result = run(load_recipe(spec), folder=tmp_path, progress=False)
    kept = list(result.artifact.module.parameters())
    assert {value.dtype for value in kept} == {getattr(torch, dtype)}
    assert all(bool(value.isfinite().all()) for value in kept)
