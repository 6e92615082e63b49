from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch

from stillhouse import catalogue
from stillhouse.batch import read_rows
from stillhouse.data import find_card, list_data, load_data, open_data, resolve_options
from stillhouse.errors import DataError, RecipeError

OURS = {
    "cifar10", "clinc150", "digit_pairs", "digits", "fashion_mnist", "image_folder", "mnist5k",
    "tensors", "text_files",
}  # fmt: skip


def test_listing_needs_neither_torch_nor_pydantic():
    code = """
    import sys
    from stillhouse.data import list_data
    assert len(list_data()) > 8
    print([m for m in ("torch", "pydantic", "numpy") if m in sys.modules])
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(pathlib.Path(catalogue.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_cards_tell_what_the_classes_say():
    cards = {card.name: card for card in list_data()}
    assert cards.keys() >= OURS
    for name, card in cards.items():
        data = load_data(name)
        assert type(data).__name__ == card.cls
        for fact in ("name", "title", "tasks", "licence", "source", "files", "editions", "get"):
            assert getattr(data, fact) == getattr(card, fact), (name, fact)
        assert card.title
        assert card.licence
        assert card.tasks


def test_the_catalogue_names_the_same_data_sets():
    assert {card.name for card in list_data()} <= set(catalogue.data_names())


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(RecipeError, match="unknown data set 'cifar_10'; did you mean 'cifar10'"):
        find_card("cifar_10")
    with pytest.raises(RecipeError, match="fashion_mnist"):
        open_data("fashionmnist", seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clases": 3}, "'digits' has no option 'clases'; did you mean 'classes'"),
        (
            {"per_class": "x"},
            "data option 'per_class' of 'digits': must be a whole number or a mapping of fields, "
            "found the text 'x'",
        ),
        ({"subset": 0}, "'subset' of 'digits': counts must be at least 1"),
        ({"val": 1.5}, "'val' of 'digits': a count of rows .* or a share"),
        ({"val": -1}, "a count of rows"),
        ({"classes": ["3"]}, "at least two classes"),
        ({"augment": "flip"}, "'augment' of 'digits': a flipped digit"),
        ({"augment": "twirl"}, "'augment' of 'digits': .*'crop\\+flip'"),
        ({"label_fraction": 1.0}, "less than 1"),
        ({"image_size": 2}, "must be at least 4, found 2"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(RecipeError, match=message):
        resolve_options("digits", options)


def test_every_mistake_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        resolve_options("digits", {"clases": 3, "subset": -1})
    assert "clases" in str(caught.value)
    assert "subset" in str(caught.value)


def test_options_resolve_to_what_opens_the_same_data():
    given = {"per_class": {"train": 20}, "val": 0.25, "augment": True}
    resolved = resolve_options("digits", given)
    assert resolved["augment"] == "crop"
    assert resolved["subset_seed"] == 0
    first, again = (open_data("digits", seed=2, options=o) for o in (given, resolved))
    assert first.fingerprint() == again.fingerprint()
    assert (first.peek("train"), first.peek("val")) == (150, 50)


def test_augmentation_by_switch():
    assert resolve_options("cifar10", {"augment": True})["augment"] == "crop+flip"
    assert resolve_options("cifar10", {"augment": False})["augment"] == "none"
    assert resolve_options("cifar10")["augment"] == "none"


# Users' own functions ----------------------------------------------------------------------

MODULE = """
import torch
from stillhouse.batch import Splits, TensorSource

def make(rows=40, *, width: int, seed=0):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return Splits({"train": TensorSource({"x": x, "target": torch.arange(rows) % 2})})

def wrong():
    return [1, 2]

def spoilt():
    x = torch.zeros(40, 2)
    x[30, 1] = float("nan")
    return Splits({"train": TensorSource({"x": x})})
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_own_data", None)


def test_a_function_beside_the_recipe_is_a_data_set(own_module):
    before = list(sys.path)
    name = "my_own_data:make"
    splits = open_data(name, seed=5, options={"width": 3})
    assert sys.path == before
    assert (splits.peek("train"), splits.peek("val")) == (36, 4)
    assert splits.edition == name
    assert splits.about["name"] == name
    assert len(splits.about["hash"]) == 32
    other = open_data(name, seed=6, options={"width": 3, "val": 0})
    assert "val" not in other
    assert splits.about["hash"] != other.about["hash"]
    assert read_rows(splits["train"], torch.arange(2), None)["x"].shape == (2, 3)
    assert resolve_options(name, {"width": 3}) == {"rows": 40, "width": 3}


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("my_own_data:mak", {}, RecipeError, "no function 'mak'; did you mean 'make'"),
        ("no_such_module:make", {}, RecipeError, "cannot import the module 'no_such_module'"),
        ("my_own_data:make", {"widht": 3}, RecipeError, "no option 'widht'; did you mean 'width'"),
        ("my_own_data:make", {}, RecipeError, "needs the option 'width'"),
        ("my_own_data:make", {"width": 2, "seed": 1}, RecipeError, "the seed is the recipe's"),
        ("my_own_data:make", {"width": 2, "val": 2.5}, RecipeError, "'val'"),
        ("my_own_data:wrong", {}, DataError, "returned list; Splits is needed"),
        ("my_own_data:spoilt", {"val": 0}, DataError, "split 'train', view 'x', row 30: holds nan"),
    ],
)
def test_bad_functions_are_told(own_module, name, options, error, message):
    with pytest.raises(error, match=message):
        open_data(name, seed=0, options=options)


# Other packages ----------------------------------------------------------------------------

PACKAGE = """
from stillhouse.data import DataSet
from stillhouse.data.options import DataOptions

class Toys(DataSet[DataOptions]):
    name = "toys"
    Options = DataOptions

    def open(self, options, seed):
        import torch
        from stillhouse.batch import Splits, TensorSource
        return Splits({"train": TensorSource({"x": torch.rand(20, 2)})}, "toys")
"""


def test_entry_points_add_data_sets(tmp_path, monkeypatch):
    (tmp_path / "toy_shop.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        importlib.metadata.EntryPoint("toys", "toy_shop:Toys", "stillhouse.data"),
        importlib.metadata.EntryPoint("broken", "toy_shop:Absent", "stillhouse.data"),
    ]
    found = importlib.metadata.entry_points

    def entry_points(**query):
        return points if query.get("group") == "stillhouse.data" else found(**query)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert find_card("toys").module == "toy_shop:Toys"
    assert open_data("toys", seed=0).peek("val") == 2
    with pytest.raises(DataError, match=r"'broken'.*cannot be loaded"):
        load_data("broken")
