from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Splits, Subset, TensorSource, read_rows
from stillhouse.clock import Views, generator
from stillhouse.data.augment_images import AugmentImages
from stillhouse.data.options import ClassOptions
from stillhouse.data.splitting import (
    choose,
    hold_out,
    keep_listed,
    keep_per_class,
    labels_of,
    stratified,
    with_val,
    withhold_labels,
)
from stillhouse.errors import DataError, RecipeError

NAMES = ["ant", "bee", "cat", "dog"]
LABELS = {
    "train": torch.arange(400) % 4,
    "test": torch.arange(40).flip(0) % 4,
}


def chosen(**options):
    return choose(LABELS, NAMES, ClassOptions(**options), name="zoo")


def labelled(labels: torch.Tensor, **more) -> Splits:
    source = TensorSource(
        {"x": torch.arange(len(labels)).float()[:, None], "target": labels},
        ids=torch.arange(len(labels)) + 1000,
        **more,
    )
    return Splits({"train": source, "test": source}, "zoo", {"classes": NAMES})


def test_without_options_everything_is_kept_and_ids_are_unique():
    choice = chosen()
    assert choice.classes == NAMES
    assert choice.told == ""
    for role, labels in LABELS.items():
        assert torch.equal(choice.splits[role].labels, labels)
    ids = torch.cat([c.ids for c in choice.splits.values()])
    assert len(ids.unique()) == 440


def test_classes_are_renumbered_in_the_given_order():
    choice = chosen(classes=["dog", 0])
    assert choice.classes == ["dog", "ant"]
    train = choice.splits["train"]
    assert torch.equal(LABELS["train"][train.rows], torch.tensor([3, 0])[train.labels])
    assert len(train.rows) == 200
    assert chosen(classes=3).classes == NAMES[:3]


def test_ids_of_a_row_do_not_depend_on_what_else_is_kept():
    every, some = chosen(), chosen(classes=["bee", "cat"], subset={"train": 30, "test": 5})
    for role in LABELS:
        kept = some.splits[role]
        assert torch.equal(kept.ids, every.splits[role].ids[kept.rows])


def test_subsets_are_nested_fixed_and_seeded():
    small, large = chosen(subset=20).splits["train"].rows, chosen(subset=90).splits["train"].rows
    assert len(small) == 20
    assert set(small.tolist()) <= set(large.tolist())
    assert torch.equal(small, chosen(subset={"train": 20}).splits["train"].rows)
    assert not torch.equal(small, chosen(subset=20, subset_seed=1).splits["train"].rows)
    assert len(chosen(subset=20).splits["test"].rows) == 40
    assert "20 of 400 train rows" in chosen(subset=20).told
    assert "subset seed 0" in chosen(subset=20).told


def test_per_class_keeps_as_many_of_each():
    choice = chosen(per_class={"train": 7, "test": 2})
    assert torch.bincount(choice.splits["train"].labels).tolist() == [7] * 4
    assert torch.bincount(choice.splits["test"].labels).tolist() == [2] * 4


def test_long_tail_follows_the_profile_in_train_only():
    # n_c = n_max r^(-c/(C-1)), r = 8, n_max = 64: 64, 32, 16, 8
    choice = chosen(per_class=64, long_tail=8)
    assert torch.bincount(choice.splits["train"].labels).tolist() == [64, 32, 16, 8]
    assert len(choice.splits["test"].rows) == 40
    assert torch.bincount(chosen(long_tail=100).splits["train"].labels).tolist()[0] == 100


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["cta", "dog"]}, RecipeError, "no class 'cta'; did you mean 'cat'"),
        ({"classes": [1, 9]}, RecipeError, "classes 0 to 3, not 9"),
        ({"classes": [1, "bee"]}, RecipeError, "named twice"),
        ({"classes": 5}, RecipeError, "5 classes are asked"),
        ({"subset": {"tain": 3}}, RecipeError, "no split 'tain'; did you mean 'train'"),
        ({"subset": {"val": 3}}, RecipeError, "use the option 'val'"),
        ({"subset": 401}, DataError, "401 rows are asked of zoo train, which has 400"),
        ({"per_class": 101}, DataError, "zoo train: the class 'ant' has 100 rows, 101 are asked"),
    ],
)
def test_impossible_choices_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        chosen(**options)


def test_stratified_gives_each_class_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    rows = stratified(labels, 10, generator("a"))
    assert torch.bincount(labels[rows]).tolist() == [5, 3, 2]
    assert len(rows.unique()) == 10
    for count in (0, 1, 7, 99, 100):
        assert len(stratified(labels, count, generator("a")).unique()) == count
    assert not torch.equal(rows, stratified(labels, 10, generator("b")))


def test_val_is_carved_by_seed_class_by_class():
    splits = labelled(LABELS["train"])
    first = with_val(splits, 0.1, seed=3, name="zoo")
    again = with_val(splits, 40, seed=3, name="zoo")
    other = with_val(splits, 40, seed=4, name="zoo")
    assert (first.peek("train"), first.peek("val")) == (360, 40)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    ids = {
        r: set(read_rows(first[r], torch.arange(len(first[r])), None)["id"].tolist())
        for r in ("train", "val")
    }
    assert not ids["train"] & ids["val"]
    assert ids["train"] | ids["val"] == set(range(1000, 1400))
    labels = labels_of(first["val"])
    assert labels is not None
    assert torch.bincount(labels).tolist() == [10] * 4


def test_val_reads_without_augmentation_train_with():
    x = torch.rand(40, 1, 8, 8)
    source = TensorSource(
        {"x": x, "target": torch.arange(40) % 4}, augment=AugmentImages(padding=2)
    )
    splits = with_val(Splits({"train": source}), 8, seed=0, name="zoo")
    read = splits["val"].read(torch.arange(8), None)
    assert torch.equal(read["x"], x[read["id"]])
    read = splits["train"].read(torch.arange(32), Views(0))
    assert not torch.equal(read["x"], x[read["id"]])


def test_own_val_is_kept_and_none_is_none():
    splits = labelled(LABELS["train"])
    assert "val" not in with_val(splits, 0, seed=0, name="zoo")
    assert with_val(splits, None, seed=0, name="zoo").peek("val") == 40
    own = Splits({"train": splits["train"], "val": Subset(splits["train"], torch.arange(5))})
    assert with_val(own, None, seed=0, name="zoo").peek("val") == 5
    assert with_val(own, 0, seed=0, name="zoo").peek("val") == 5
    with pytest.raises(RecipeError, match="zoo brings its own validation split of 5 rows"):
        with_val(own, 10, seed=0, name="zoo")
    with pytest.raises(DataError, match="cannot carve 400 of 400"):
        with_val(splits, 400, seed=0, name="zoo")


def test_val_of_unlabelled_data_is_carved_too():
    splits = Splits({"train": TensorSource({"x": torch.rand(30, 2)})})
    carved = with_val(splits, None, seed=0, name="zoo")
    assert (carved.peek("train"), carved.peek("val")) == (27, 3)


def test_test_stays_closed():
    carved = with_val(labelled(LABELS["train"]), None, seed=0, name="zoo")
    with pytest.raises(DataError, match="opens only"):
        carved["test"]


def test_withheld_labels_are_not_in_the_batch():
    splits = withhold_labels(labelled(LABELS["train"]), 0.05, seed=1, name="zoo")
    assert (splits.peek("train"), splits.peek("unlabelled")) == (20, 380)
    labels = labels_of(splits["train"])
    assert labels is not None
    assert torch.bincount(labels).tolist() == [5] * 4
    batch = read_rows(splits["unlabelled"], torch.arange(380), Views(0))
    assert "target" not in batch
    assert "target" not in splits["unlabelled"][0, None]
    kept = read_rows(splits["train"], torch.arange(20), None)["id"]
    assert not set(kept.tolist()) & set(batch["id"].tolist())
    assert labels_of(splits["unlabelled"]) is None
    assert (
        splits.fingerprint()
        != withhold_labels(labelled(LABELS["train"]), 0.05, seed=2, name="zoo").fingerprint()
    )


def test_every_class_keeps_a_label_where_that_is_possible():
    rare = torch.cat([torch.zeros(300), torch.ones(2), torch.full((1,), 3)]).long()
    splits = withhold_labels(labelled(rare), 0.02, seed=0, name="zoo")
    labels = labels_of(splits["train"])
    assert labels is not None
    assert set(labels.tolist()) == {0, 1, 3}
    with pytest.raises(DataError, match="at least one row for each of 3 classes"):
        withhold_labels(labelled(rare), 0.005, seed=0, name="zoo")


def test_hold_out_is_fixed_and_leaves_something():
    held = hold_out(LABELS["train"], None, seed=0, name="zoo")
    assert int(held.sum()) == 80
    assert torch.equal(held, hold_out(LABELS["train"], 80, seed=0, name="zoo"))
    with pytest.raises(DataError, match="option 'test'"):
        hold_out(LABELS["train"], 400, seed=0, name="zoo")


def test_labels_are_told_through_subsets_and_only_when_they_are_classes():
    source = TensorSource({"x": torch.rand(6, 2), "target": torch.arange(6)})
    inner = Subset(Subset(source, torch.tensor([5, 3, 1])), torch.tensor([2, 0]))
    found = labels_of(inner)
    assert found is not None
    assert found.tolist() == [1, 5]
    assert labels_of(TensorSource({"x": torch.rand(6, 2)})) is None
    assert labels_of(TensorSource({"x": torch.rand(6, 2), "target": torch.rand(6)})) is None
    assert (
        labels_of(TensorSource({"x": torch.rand(6, 2), "target": torch.ones(6, 2).long()})) is None
    )


def test_a_few_labels_of_every_class():
    splits = keep_per_class(labelled(LABELS["train"]), 3, seed=1, name="zoo")
    assert (splits.peek("train"), splits.peek("unlabelled")) == (12, 388)
    found = labels_of(splits["train"])
    assert found is not None
    assert torch.bincount(found).tolist() == [3] * 4
    few = set(ids(splits["train"]))
    more = set(ids(keep_per_class(labelled(LABELS["train"]), 7, seed=1, name="zoo")["train"]))
    assert few < more
    assert set(ids(splits["unlabelled"])) == set(range(1000, 1400)) - few
    assert "target" not in read_rows(splits["unlabelled"], torch.arange(5), Views(0))
    other = keep_per_class(labelled(LABELS["train"]), 3, seed=2, name="zoo")
    assert set(ids(other["train"])) != few
    for count in (100, 101):
        with pytest.raises(DataError, match=f"{count} labelled rows of every class"):
            keep_per_class(labelled(LABELS["train"]), count, seed=1, name="zoo")


def ids(source) -> list[int]:
    return read_rows(source, torch.arange(len(source)), None)["id"].tolist()


@pytest.mark.parametrize("form", ["lines", "json", "names"])
def test_labels_by_a_list(form, tmp_path):
    source = TensorSource({"x": torch.rand(6, 2), "target": torch.arange(6) % 2})
    source.names = ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png",
                    "train/dog/3.png", "train/dog/4.png", "train/cat/5.png"]  # fmt: skip
    splits = Splits({"train": Subset(source, torch.arange(1, 6))})
    place = tmp_path / ("list.txt" if form == "lines" else "list.json")
    told = {
        "lines": "cat/2.png\n\n3.png\n",
        "json": '{"train": [["cat/2.png", 0, "cat"], ["dog/3.png", 1, "dog"]], "val": []}',
        "names": '{"train": ["train/cat/2.png", "3.png"]}',
    }
    place.write_text(told[form])
    divided = keep_listed(splits, str(place), 0, seed=0, name="pets")
    assert ids(divided["train"]) == [1, 3]
    assert ids(divided["unlabelled"]) == [2, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/9.png", "'cat/9.png' is no row of pets train"),
        ("1.png", "'1.png' is 2 rows of pets train"),
        ("cat/1.png\ndog/1.png", "names every row"),
    ],
)
def test_lists_that_do_not_fit_are_told(text, message, tmp_path):
    source = TensorSource({"x": torch.rand(2, 2), "target": torch.arange(2)})
    source.names = ["cat/1.png", "dog/1.png"]
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        keep_listed(Splits({"train": source}), str(tmp_path / "list.txt"), 0, seed=0, name="pets")
    (tmp_path / "list.json").write_text('{"training": []}')
    with pytest.raises(DataError, match="list 'train'"):
        keep_listed(Splits({"train": source}), str(tmp_path / "list.json"), 0, seed=0, name="pets")
    bare = Splits({"train": TensorSource({"x": torch.rand(2, 2)})})
    with pytest.raises(DataError, match="have no names"):
        keep_listed(bare, str(tmp_path / "list.txt"), 0, seed=0, name="pets")
