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
    narrowed,
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


def test_classes_joined_by_their_remainder_keep_what_they_were():
    from stillhouse.data.options import ClassOptions
    from stillhouse.data.splitting import choose

    labels = {"train": torch.arange(70) % 7, "test": torch.arange(14) % 7}
    names = list("abcdefg")
    options = ClassOptions(classes=5, per_class={"train": 6}, modulo=2)
    found = choose(labels, names, options, name="letters")
    part = found.splits["train"]
    assert found.classes == ["a/c/e", "b/d"]
    assert found.subclasses == found.about()["subclasses"] == [["a", "c", "e"], ["b", "d"]]
    original = labels["train"][part.rows]
    assert torch.equal(part.labels, original % 2)
    assert torch.equal(part.subclasses, original // 2)
    assert torch.bincount(original).tolist() == [6] * 5  # counted before they are joined
    assert set(part.views()) == {"target", "subclass"}
    assert "classes modulo 2" in found.told
    plain = choose(labels, names, ClassOptions(), name="letters")
    assert set(plain.splits["train"].views()) == {"target"}
    assert "subclasses" not in plain.about()
    many = choose({"train": torch.arange(20)}, list("abcdefghijklmnopqrst"),
                  ClassOptions(modulo=2), name="letters")  # fmt: skip
    assert many.classes == ["a and 9 others", "b and 9 others"]
    with pytest.raises(RecipeError, match="a number from 2 to 6 joins some of them, 7 none"):
        choose(labels, names, ClassOptions(modulo=7), name="letters")


def test_joined_classes_reach_the_batch_of_every_kind_of_source(tmp_path, data_root):
    from PIL import Image

    from stillhouse.batch import read_rows
    from stillhouse.data import open_data

    for name in "abc":
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 2 * i, ord(name))).save(tmp_path / name / f"{i}.png")
    folder = {"path": str(tmp_path), "image_size": 8, "modulo": 2}
    cases = {
        "image_folder": (folder, 3),
        "mnist5k": ({"modulo": 2, "per_class": {"train": 5, "test": 5}}, 10),
        "clinc150": ({"modulo": 4, "per_class": {"train": 3, "test": 2, "val": 2}}, 150),
    }
    for name, (options, kinds) in cases.items():
        splits = open_data(name, seed=0, options=options)
        batch = read_rows(splits["train"], torch.arange(splits.peek("train")), None)
        modulo = options["modulo"]
        original = batch["subclass"] * modulo + batch["target"]
        assert len(original.unique()) == kinds
        assert batch["target"].max() == modulo - 1
        groups = splits.about["subclasses"]
        assert len(groups) == len(splits.about["classes"]) == modulo
        assert int(batch["subclass"].max()) == max(map(len, groups)) - 1


# What students see -------------------------------------------------------------------------


def rows_of(splits: Splits, role: str) -> torch.Tensor:
    source = splits[role]
    return read_rows(source, torch.arange(len(source)), None)["id"]


def test_few_shot_cuts_train_and_keeps_all_of_it_for_teachers():
    whole = labelled(LABELS["train"])
    few = narrowed(whole, few_shot=0.05, seed=3, name="zoo")
    assert len(few["train"]) == 20
    assert torch.bincount(labels_of(few["train"])).tolist() == [5] * 4
    assert torch.equal(rows_of(few, "full"), rows_of(whole, "train"))
    assert few.of_teachers()["train"] is few["full"]
    assert "full" not in few.of_teachers()
    assert whole.of_teachers() is whole
    assert "students see 20 of 400" in few.about["selection"]
    assert "unseen" not in few.about
    with pytest.raises(DataError, match="judged"):
        few["test"]
    assert len(few.judging().of_teachers()["test"]) == 400


def test_fewer_are_among_more_and_the_seed_chooses():
    whole = labelled(LABELS["train"])

    def ids(few_shot, seed=0):
        found = narrowed(whole, few_shot=few_shot, seed=seed, name="zoo")
        return set(rows_of(found, "train").tolist())

    assert ids(0.02) < ids(0.1) < ids(0.5)
    assert ids(3) < ids(9)
    assert len(ids(3)) == 12
    assert ids(0.1) != ids(0.1, seed=1)
    assert ids(0.1) == ids(0.1)


def test_dropped_classes_are_not_seen_and_keep_their_place():
    """No sample of them reaches a student; the classes, and so its outputs, are all there."""
    whole = labelled(LABELS["train"])
    some = narrowed(whole, drop_classes=["bee", 3], seed=0, name="zoo")
    assert sorted(labels_of(some["train"]).unique().tolist()) == [0, 2]
    assert len(some["train"]) == 200
    assert some.about["classes"] == NAMES
    assert some.about["unseen"] == [1, 3]
    assert len(labels_of(some["full"]).unique()) == 4
    assert "without bee, dog" in some.about["selection"]
    both = narrowed(some, few_shot=4, drop_classes=[0], seed=0, name="zoo")
    assert torch.bincount(labels_of(both["train"])).tolist() == [0, 4, 4, 4]
    assert both.about["unseen"] == [0]


def test_what_students_see_is_refused_where_it_cannot_be():
    whole = labelled(LABELS["train"])
    for settings, error, words in (
        ({"drop_classes": ["bird"]}, RecipeError, "no class 'bird'"),
        ({"drop_classes": ["ant", "bee", "cat"]}, DataError, "fewer than two classes"),
        ({"few_shot": 0.001}, DataError, "at least one row for each of 4"),
        ({"few_shot": 101}, DataError, "'ant' of zoo has 100"),
    ):
        with pytest.raises(error, match=words):
            narrowed(whole, seed=0, name="zoo", **settings)
    plain = Splits({"train": TensorSource({"x": torch.zeros(4, 1)})}, "zoo")
    with pytest.raises(DataError, match="no labels"):
        narrowed(plain, few_shot=0.5, seed=0, name="zoo")
    for value in (0, 1.0, -2):
        with pytest.raises(ValueError, match="few_shot"):
            ClassOptions(few_shot=value)


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
