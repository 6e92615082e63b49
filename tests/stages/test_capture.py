"""Capture: a teacher asked once, the training the same, a kill costs one block."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.artifact import plain_state
from stillhouse.batch import Subset, TensorSource
from stillhouse.engine.store import Store
from stillhouse.errors import CheckpointError, DataError, RecipeError, TeacherError
from stillhouse.launch import open_job
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.capture import ids_of
from stillhouse.teacher import Want
from stillhouse.teachers.live import Live


def recipe(store: Any = None, **changes: Any):
    teacher: dict[str, Any] = {"model": "stillhouse:mlp", "options": {"widths": [16]}}
    if store is not None:
        teacher["store"] = store
    whole = {
        "method": "kd",
        "data": {"name": "generated", "options": {"kind": "vectors", "rows": 200}},
        "teacher": teacher,
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "budget": {"steps": 100, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
        "compare": [],
        **changes,
    }
    return load_recipe(whole)


def images(store: Any = None, **changes: Any):
    data = {"name": "digits", "options": {"subset": 120, "augment": "crop"}}
    models = {
        "teacher": {"model": "stillhouse:small_cnn", "options": {"widths": [4, 8]}},
        "student": {"model": "stillhouse:small_cnn", "options": {"widths": [4]}},
    }
    if store is not None:
        models["teacher"]["store"] = store
    return recipe(None, **{"data": data, **models, **changes})


def trained(chosen, folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    job = open_job(chosen, folder)
    try:
        artifact = open_method(chosen).run(job)
    finally:
        job.log.close()
    return plain_state(artifact.module), job


def stores() -> list[Path]:
    return sorted((Path(os.environ["STILLHOUSE_CACHE"]) / "stores").glob("*"))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].float() - other[k].float()).abs().max()) for k in one)


def test_kd_from_a_float32_store_equals_kd_live(tmp_path: Path):
    live, _ = trained(recipe(), tmp_path / "live")
    kept, job = trained(recipe({"dtype": "float32"}), tmp_path / "kept")
    assert distance(live, kept) < 1e-4
    assert [s["kind"] for s in job.stages] == ["capture", "train"]
    (path,) = stores()
    store = Store.open(path)
    assert store.complete
    assert store.header.edition == job.splits.edition
    assert store.stride == 4 * 4


def test_kd_from_a_float16_store_stays_near(tmp_path: Path):
    live, _ = trained(recipe(), tmp_path / "live")
    kept, _ = trained(recipe(True), tmp_path / "kept")
    assert 0 < distance(live, kept) < 1e-2


def test_kd_from_an_int8_store_stays_near(tmp_path: Path):
    live, _ = trained(recipe(), tmp_path / "live")
    kept, _ = trained(recipe({"dtype": "int8"}), tmp_path / "kept")
    assert 0 < distance(live, kept) < 2e-2
    store = Store.open(stores()[0])
    assert store.fields["logits"].dtype == "int8"
    assert store.stride == 4 * 1 + 2 + 2


def test_augmented_views_are_captured_draw_by_draw(tmp_path: Path):
    budget = {"steps": 40, "batch": 32, "lr": 0.05, "optimizer": "sgd"}
    finite = {"dtype": "float32", "draws": 3}
    kept, _ = trained(images(finite, budget=budget), tmp_path / "kept")
    store = Store.open(stores()[0])
    assert store.draws == 3
    values = [store.read(store.ids, d)[0]["logits"] for d in range(3)]
    assert not torch.allclose(values[0], values[1])
    # the same augmentations, the teacher asked live
    chosen = images(finite, budget=budget)
    other = open_job(chosen, tmp_path / "live")
    method = open_method(chosen)
    net = other.models._net(other, chosen.teacher, "teacher")
    teacher = Live(net)
    student = other.student()
    objective = method.objective(other, student, teacher)
    other.fit("student", objective, other.order("train"), teacher=teacher)
    other.log.close()
    assert distance(plain_state(objective.export()), kept) < 1e-4


def test_random_augmentation_without_draws_is_refused_before_asking(tmp_path: Path):
    with pytest.raises(TeacherError, match=r"augmented anew in every epoch.*draws: 4"):
        trained(images(True), tmp_path)
    assert stores() == []


def test_a_second_run_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained(recipe(True), tmp_path / "one")
    asked: list[int] = []
    real = Live.knowledge
    monkeypatch.setattr(Live, "knowledge", lambda self, b: asked.append(b.size) or real(self, b))
    _, job = trained(recipe(True), tmp_path / "two")
    assert sum(asked) == 1  # the one row that tells the shapes
    assert [s["kind"] for s in job.stages] == ["train"]


def test_the_teacher_is_asked_in_inference_mode_in_batches_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, bool]] = []
    real = Live.knowledge

    def seen(self: Live, batch: Any) -> Any:
        asked.append((batch.size, torch.is_inference_mode_enabled()))
        return real(self, batch)

    monkeypatch.setattr(Live, "knowledge", seen)
    trained(recipe({"batch": 48}), tmp_path)
    assert asked[1:] == [(48, True)] * 4 + [(8, True)]


def test_a_source_that_misstates_its_ids_is_refused(tmp_path: Path):
    job = open_job(recipe(True), tmp_path)
    source = job.splits["train"]
    teacher = job.teacher()

    def shifted(rows: torch.Tensor, views: Any) -> Any:
        batch = type(source).read(source, rows, views)
        batch["id"] = batch["id"] + 1
        return batch

    source.read = shifted
    with pytest.raises(DataError, match="reads other sample ids than it declares"):
        teacher.bind((Want("logits"),), job.task)
    job.log.close()


def test_killed_captures_go_on_and_end_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = recipe({"path": str(tmp_path / "store"), "batch": 4})
    whole, _ = trained(recipe({"path": str(tmp_path / "whole"), "batch": 4}), tmp_path / "uncut")

    def capture_slowly() -> None:
        torch.set_num_threads(1)
        real = Live.knowledge

        def slow(self: Live, batch: Any) -> Any:
            time.sleep(0.004)
            return real(self, batch)

        Live.knowledge = slow  # type: ignore[method-assign]
        monkeypatch.setattr("stillhouse.engine.store.FLUSH_SECONDS", 0.0)
        trained(chosen, tmp_path / "cut")

    seen = [0]
    for kill in range(30):
        child = os.fork()
        if child == 0:
            try:
                capture_slowly()
            finally:
                os._exit(0)
        time.sleep(0.03 + 0.01 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "store" / "header.json").exists():
            store = Store.open(tmp_path / "store")
            store.verify()
            seen.append(store.finished)
            if store.complete:
                break
    assert seen == sorted(seen)
    assert any(0 < count < 200 for count in seen)
    resumed, _ = trained(chosen, tmp_path / "cut")
    assert distance(whole, resumed) == 0.0
    first, second = (tmp_path / n / "records-00000.bin" for n in ("whole", "store"))
    assert first.read_bytes() == second.read_bytes()


def test_damaged_records_are_asked_again(tmp_path: Path):
    chosen = recipe({"path": str(tmp_path / "store")})
    one, _ = trained(chosen, tmp_path / "run")
    path = tmp_path / "store" / "records-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"\x01\x02\x03")
    with pytest.raises(CheckpointError, match="checksum"):
        Store.open(tmp_path / "store").verify()
    two, _ = trained(chosen, tmp_path / "again")
    assert path.read_bytes() == whole
    assert distance(one, two) == 0.0


def test_a_store_of_another_teacher_data_or_form_is_refused(tmp_path: Path):
    store = {"path": str(tmp_path / "store")}
    trained(recipe(store), tmp_path / "run")
    with pytest.raises(TeacherError, match="made by another teacher"):
        trained(recipe(store, seed=1), tmp_path / "seed")
    rows = {"name": "generated", "options": {"kind": "vectors", "rows": 201}}
    with pytest.raises(TeacherError, match="made of other data"):
        trained(recipe(store, data=rows), tmp_path / "data")
    with pytest.raises(TeacherError, match=r"keeps logits \(4,\) \(dense, float16\)"):
        trained(recipe({**store, "form": "topk", "k": 2, "temperature": 4.0}), tmp_path / "form")


def test_other_preprocessing_is_told_as_such(tmp_path: Path):
    store = {"path": str(tmp_path / "store")}
    data = {"name": "digits", "options": {"subset": 60}}
    options = {"widths": [4, 8], "input_mean": [0.1], "input_std": [0.2]}
    trained(images(store, data=data), tmp_path / "run")
    teacher = {"model": "stillhouse:small_cnn", "options": options, "store": store}
    with pytest.raises(TeacherError, match="other preprocessing"):
        trained(images(data=data, teacher=teacher), tmp_path / "other")


def test_a_store_alone_is_a_teacher(tmp_path: Path):
    store = {"path": str(tmp_path / "store"), "dtype": "float32"}
    one, _ = trained(recipe(store), tmp_path / "run")
    alone = recipe(teacher={"store": str(tmp_path / "store")})
    two, job = trained(alone, tmp_path / "alone")
    assert distance(one, two) == 0.0
    assert [s["kind"] for s in job.stages] == ["train"]


def test_kept_classes_train(tmp_path: Path):
    kept, _ = trained(
        recipe({"form": "topk", "k": 3, "temperature": 4.0}, settings={"temperature": 4.0}),
        tmp_path / "run",
    )
    live, _ = trained(recipe(settings={"temperature": 4.0}), tmp_path / "live")
    # three of four classes and the mass of the fourth: the same distribution, in float16
    assert distance(kept, live) < 1e-2


def test_a_full_disk_is_told_before_the_teacher_is_asked_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"no room .* needs 1,600 bytes, 100 are free"):
        trained(recipe(True), tmp_path)


@pytest.mark.slow
def test_two_processes_capture_and_train_as_one(
    tmp_path: Path, in_processes: Callable[[Path, Path, int], str]
):
    for n in (1, 2):
        told = in_processes(Path(__file__).parent / "capture_body.py", tmp_path / str(n), n)
        assert f"world {n}" in told
    one, two = (Store.open(tmp_path / str(n) / "store") for n in (1, 2))
    assert one.complete
    assert two.complete
    assert len(list((tmp_path / "2" / "store").glob("done-*.a"))) == 2
    two.verify()
    rows = one.ids
    both = [s.read(rows)[0]["logits"] for s in (one, two)]
    assert torch.allclose(*both, atol=1e-6)
    ends = [load_file(tmp_path / str(n) / "end.safetensors") for n in (1, 2)]
    assert distance(*ends) < 1e-5


def test_ids_of_subsets_are_those_of_the_source():
    source = TensorSource({"x": torch.zeros(6, 1)}, ids=torch.tensor([9, 8, 7, 6, 5, 4]))
    assert ids_of(source).tolist() == [9, 8, 7, 6, 5, 4]
    assert ids_of(Subset(source, torch.tensor([4, 1]))).tolist() == [5, 8]

    class Plain:
        def __len__(self) -> int:
            return 3

    assert ids_of(Plain()).tolist() == [0, 1, 2]


def test_bad_store_settings_are_told():
    with pytest.raises(RecipeError, match="topk"):
        recipe({"form": "top"})


def test_streams_are_kept_in_one_store(tmp_path):
    """What two streams read of a teacher is asked once, whichever stream a sample is in."""
    data = {"name": "generated", "options": {"kind": "vectors", "rows": 40, "labels_per_class": 2}}
    spec = recipe({"dtype": "float32"}, data=data, method="dho", budget={"steps": 2, "batch": 8})
    job = open_job(spec, tmp_path)
    teacher = job.teacher()
    wants = (Want("logits", "labelled/x"), Want("logits", "unlabelled/x"))
    teacher.bind(wants, job.task)
    count = job.splits.peek("train") + job.splits.peek("unlabelled")
    assert len(teacher.stored.store) == count
    order = open_method(spec).order(job)
    teacher.reads(order, job.views().seed)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))[0]
    batch = order.read(rows, job.views())
    said, live = teacher.knowledge(batch), teacher.teacher.net
    for name in ("labelled", "unlabelled"):
        with torch.no_grad():
            expected = live(batch.view(f"{name}/x"))["logits"]
        torch.testing.assert_close(said.stream(name).tensor("logits"), expected)
    job.log.close()
    # the same store serves a method that reads no streams
    plain = open_job(spec, tmp_path / "again").teacher()
    plain.bind(wants, job.task)
    assert plain.stored.store.path == teacher.stored.store.path
