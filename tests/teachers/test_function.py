"""A function as a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.errors import ModelError, TeacherError
from stillhouse.teacher import Teacher, Want
from stillhouse.teachers.function import Callable, import_callable


def double(batch: Batch) -> dict[str, torch.Tensor]:
    return {"embedding": batch["x"] * 2.0, "extra": batch["x"].sum(1)}


def batch() -> Batch:
    return Batch(id=torch.arange(3), x=torch.arange(6.0).view(3, 2).requires_grad_())


def test_it_gives_what_is_wanted_without_gradient():
    teacher = Callable(double, fields=["embedding", "extra"], fingerprint="1")
    assert isinstance(teacher, Teacher)
    teacher.bind([Want("embedding")], None)
    known = teacher.knowledge(batch())
    assert set(known) == {"embedding"}
    assert torch.equal(known["embedding"], batch()["x"].detach() * 2)
    assert not known.tensor("embedding").requires_grad


def test_its_fingerprint_is_the_users():
    one, other = (Callable(double, fingerprint=text) for text in ("1", "2"))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == Callable(double, fingerprint="1").fingerprint
    with pytest.raises(TeacherError, match="needs a fingerprint"):
        Callable(double, fingerprint="")


def test_what_it_cannot_give_is_told():
    teacher = Callable(double, fields=["embedding"], fingerprint="1")
    with pytest.raises(TeacherError, match="'embeding'; did you mean 'embedding'"):
        teacher.bind([Want("embeding")], None)
    with pytest.raises(TeacherError, match="needs 'weights'"):
        teacher.bind([Want("weights")], None)
    with pytest.raises(TeacherError, match="no module"):
        teacher.guest()
    late = Callable(double, fingerprint="1")
    late.bind([Want("logits")], None)
    with pytest.raises(TeacherError, match="did not give 'logits'"):
        late.knowledge(batch())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda b: b["x"], "returned Tensor; a mapping"),
        (lambda b: {"logits": [1, 2]}, "gave list as 'logits'"),
        (lambda b: {"logits": b["x"][:2]}, r"shape \(2, 2\) for a batch of 3 rows"),
    ],
)
def test_bad_answers_are_told(answer, told: str):
    with pytest.raises(TeacherError, match=told):
        Callable(answer, fingerprint="1").knowledge(batch())


def test_a_recipe_names_a_function_or_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_teacher.py").write_text(
        "def answer(batch):\n    return {'scores': batch['x'] + 1}\n"
        "def factory():\n    return answer\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    direct = import_callable("own_teacher:answer")
    made = import_callable("own_teacher:factory", fingerprint="7")
    for teacher in (direct, made):
        assert torch.equal(teacher.knowledge(batch())["scores"], batch()["x"].detach() + 1)
    assert direct.fingerprint != made.fingerprint
    assert sys.path == path
    with pytest.raises(ModelError, match="no function 'anser'; did you mean 'answer'"):
        import_callable("own_teacher:anser")
    with pytest.raises(ModelError, match="cannot be imported"):
        import_callable("no_such_module:answer")


def test_a_function_of_texts_gives_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_encoder.py").write_text(
        "def embed(texts):\n    return [[float(len(text)), 1.0] for text in texts]\n"
        "def make():\n    return embed\n"
        "def broken(texts):\n    raise OSError('the index is gone')\n"
        "def broken_batch(batch):\n    raise OSError('the index is gone')\n"
    )
    monkeypatch.chdir(tmp_path)
    read = Batch(id=torch.arange(2), text=["abc", "de"])
    for name in ("embed", "make"):
        teacher = import_callable(f"own_encoder:{name}")
        teacher.bind([Want("embedding")], None)
        assert teacher.knowledge(read).tensor("embedding").tolist() == [[3, 1], [2, 1]]
    for name in ("broken", "broken_batch"):
        with pytest.raises(TeacherError, match=rf"{name} failed with OSError: the index is gone"):
            import_callable(f"own_encoder:{name}").knowledge(read)
