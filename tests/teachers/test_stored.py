"""A stored teacher: the same knowledge as the module's, and refusals before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.batch import Batch, Shuffled, Splits, TensorSource
from stillhouse.clock import Views
from stillhouse.engine.records import Field
from stillhouse.engine.store import Store
from stillhouse.errors import TeacherError
from stillhouse.models.small_cnn import SmallCNN
from stillhouse.net import Net
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Teacher, TopK, Want
from stillhouse.teachers.function import Callable
from stillhouse.teachers.live import Live
from stillhouse.teachers.stored import Stored, augments

WANTS = (Want("logits"), Want("tap:stage1"))
FIELDS = (Field("logits", (4,), dtype="float32"), Field("tap:stage1", (4, 8, 8), dtype="float32"))


def flip(batch: Batch, views: Views) -> Batch:
    turned = views.uniform(batch["id"], "flip", 1)[:, 0] < 0.5
    batch["x"] = torch.where(turned[:, None, None, None], batch["x"].flip(-1), batch["x"])
    return batch


def data(augment=None, classes: int = 4) -> Splits:
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    views = {"x": images, "target": torch.arange(20) % classes}
    names = [str(c) for c in range(classes)]
    source = TensorSource(views, augment=augment, name="toys")
    return Splits({"train": source}, "toys", {"classes": names})


def live() -> Live:
    torch.manual_seed(0)
    return Live(Net(SmallCNN(4, 3, (4, 8))))


def batch(splits: Splits, rows: torch.Tensor) -> Batch:
    return splits["train"].read(rows, None)


def written(path: Path, splits: Splits, fields=FIELDS, rows: int = 20, **more) -> Stored:
    teacher = live()
    wants = [w for w in WANTS if any(f.name == w.key for f in fields)]
    teacher.bind(wants, Classification(splits))
    settings = {"teacher": teacher.fingerprint, "data": splits["train"].fingerprint, **more}
    with Store.create(path, fields, 20, **settings) as store:
        ids = torch.arange(rows)
        known = teacher.knowledge(batch(splits, ids))
        for draw in range(max(1, store.draws)):
            store.write(ids, {k: known.tensor(k) for k in known}, draw)
    return Stored(path)


def test_module_store_and_function_give_equal_knowledge(tmp_path: Path):
    splits = data()
    task = Classification(splits)
    module, stored = live(), written(tmp_path, splits)

    def answer(batch: Batch) -> dict[str, torch.Tensor]:
        out = module.net(batch["x"])
        return {"logits": out["logits"], "tap:stage1": out["taps"]["stage1"]}

    function = Callable(answer, fields=["logits", "tap:stage1"], fingerprint="net")
    rows = torch.tensor([3, 17, 0, 3])
    known = []
    for teacher in (module, stored, function):
        assert isinstance(teacher, Teacher)
        teacher.bind(WANTS, task)
        known.append(teacher.knowledge(batch(splits, rows)))
    for other in known[1:]:
        assert set(other) == set(known[0]) == {"logits", "tap:stage1"}
        assert other.valid is None
        for key in known[0]:
            assert other.tensor(key).dtype == torch.float32
            assert torch.allclose(known[0].tensor(key), other.tensor(key), atol=1e-5)
        assert torch.allclose(known[0].tap["stage1"], other.tap["stage1"], atol=1e-5)


def test_it_says_what_it_provides(tmp_path: Path):
    stored = written(tmp_path, data())
    assert stored.provides == {"logits", "taps"}
    assert stored.fingerprint == Stored(tmp_path).fingerprint


def test_kept_classes_come_as_topk(tmp_path: Path):
    splits = data()
    stored = written(tmp_path, splits, (Field("logits", (4,), form="topk", k=2),))
    stored.bind([Want("logits")], Classification(splits))
    assert isinstance(stored.knowledge(batch(splits, torch.arange(3)))["logits"], TopK)


@pytest.mark.parametrize("access", ["fresh", "input_grad", "weights"])
def test_methods_that_need_the_module_are_refused(tmp_path: Path, access: str):
    stored = written(tmp_path, data())
    with pytest.raises(TeacherError, match=f"'{access}'.*give the teacher as a model"):
        stored.bind([Want(access)], None)
    with pytest.raises(TeacherError, match="no module"):
        stored.guest()


def test_lacking_fields_other_classes_and_other_data_are_refused(tmp_path: Path):
    splits = data()
    stored = written(tmp_path, splits)
    with pytest.raises(TeacherError, match="keeps no 'tap:stage2'; did you mean 'tap:stage1'"):
        stored.bind([Want("tap:stage2")], Classification(splits))
    stored.bind([Want("embedding", optional=True)], Classification(splits))
    with pytest.raises(TeacherError, match="holds logits of 4 classes, the data 'toys' has 5"):
        stored.bind([Want("logits")], Classification(data(classes=5)))
    other = data()
    other["train"].views["x"][0] += 1.0
    with pytest.raises(TeacherError, match="made of other data"):
        stored.bind([Want("logits")], Classification(other))


def test_an_unfinished_store_is_refused_or_masked(tmp_path: Path):
    splits = data()
    written(tmp_path, splits, rows=12)
    with pytest.raises(TeacherError, match="not finished: 12 of 20 records"):
        Stored(tmp_path).bind(WANTS, Classification(splits))
    masked = Stored(tmp_path, missing="mask")
    masked.bind(WANTS, Classification(splits))
    known = masked.knowledge(batch(splits, torch.tensor([11, 12])))
    assert known.valid is not None
    assert known.valid.tolist() == [True, False]
    with pytest.raises(TeacherError, match="did you mean 'mask'"):
        Stored(tmp_path, missing="masked")


def test_random_augmentation_is_told_from_none():
    assert augments(data(flip)["train"])
    assert not augments(data()["train"])


def test_augmented_reading_needs_finite_captured_draws(tmp_path: Path):
    splits = data(flip)
    plain = written(tmp_path / "plain", splits)
    source = splits["train"]
    with pytest.raises(TeacherError, match=r"new augmentation .* in every epoch"):
        plain.reads(Shuffled(source, 4), 7)
    with pytest.raises(TeacherError, match="holds samples as they are, the run reads 2 augm"):
        plain.reads(Shuffled(source, 4, draws=2), 7)
    plain.reads(Shuffled(source, 4, augment=False), 7)

    drawn = written(tmp_path / "drawn", splits, draws=2, views=7)
    drawn.reads(Shuffled(source, 4, draws=2), 7)
    with pytest.raises(TeacherError, match=r"seed is 7, the run's is 8"):
        drawn.reads(Shuffled(source, 4, draws=2), 8)
    with pytest.raises(TeacherError, match="holds 2 augmentations of each sample, the run reads 3"):
        drawn.reads(Shuffled(source, 4, draws=3), 7)
    with pytest.raises(TeacherError, match="the run reads samples as they are"):
        drawn.reads(Shuffled(source, 4, augment=False), 7)
