"""Streams: several sources read side by side in one step."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import (
    Batch,
    Joined,
    Splits,
    StreamRows,
    Streams,
    Subset,
    TensorSource,
    read_block,
    together,
)
from stillhouse.clock import Clock, Views, generator
from stillhouse.data.splitting import Unlabelled
from stillhouse.errors import DataError, TeacherError
from stillhouse.stages.capture import ids_of, splits_of
from stillhouse.teacher import Knowledge, Want, answered

LABELLED, UNLABELLED = 10, 33


def source(rows: int, first: int = 0, **views) -> TensorSource:
    return TensorSource(
        {"x": torch.arange(rows).float()[:, None], **views}, ids=torch.arange(first, first + rows)
    )


def shifted(batch: Batch, views: Views) -> Batch:
    return Batch(batch, x=batch["x"] + views.uniform(batch["id"], "shift", 1))


def streams(drive: str = "unlabelled", **settings) -> Streams:
    few = source(LABELLED, target=torch.arange(LABELLED))
    many = source(UNLABELLED, 100)
    return Streams({"labelled": (few, 4), "unlabelled": (many, 8)}, drive=drive, **settings)


def epoch(order: Streams, number: int = 0) -> list[StreamRows]:
    return list(order.epoch(number, lambda: generator("order", number)))


def test_one_stream_drives_and_the_others_are_cycled():
    order = streams()
    steps = epoch(order)
    assert len(order) == len(steps) == 5
    read = torch.cat([step.rows["unlabelled"] for step in steps])
    assert sorted(read.tolist()) == list(range(UNLABELLED))
    sizes = [len(step.rows["unlabelled"]) for step in steps]
    assert max(sizes) - min(sizes) <= 1
    # a pass through ten rows in batches of four is three steps; then it begins anew
    assert [step.passes["labelled"] for step in steps] == [0, 0, 0, 1, 1]
    first = torch.cat([step.rows["labelled"] for step in steps[:3]])
    assert sorted(first.tolist()) == list(range(LABELLED))
    assert [len(step.rows["labelled"]) for step in steps] == [4, 3, 3, 4, 3]


def test_zipped_streams_end_with_the_shortest():
    assert len(streams("zip")) == len(epoch(streams("zip"))) == 3
    assert len(streams("labelled")) == 3
    assert len(streams("zip", drop_last=True)) == 2


def test_full_batches_alone_where_asked():
    order = streams(drop_last=True)
    assert len(order) == 4
    for step in epoch(order):
        assert {name: len(rows) for name, rows in step.rows.items()} == {
            "labelled": 4,
            "unlabelled": 8,
        }


def test_what_is_read_is_a_function_of_epoch_and_generator():
    one, again, other = epoch(streams()), epoch(streams()), epoch(streams(), 1)
    for a, b in zip(one, again, strict=True):
        assert all(torch.equal(a.rows[name], b.rows[name]) for name in a.rows)
    assert not all(
        torch.equal(a.rows["unlabelled"], b.rows["unlabelled"])
        for a, b in zip(one, other, strict=True)
    )
    # passes go on counting: a cycled stream never repeats an augmentation
    assert [step.passes["labelled"] for step in other] == [2, 2, 2, 3, 3]
    assert {step.passes["unlabelled"] for step in other} == {1}


def test_a_cycled_stream_gets_new_augmentations_in_every_pass():
    few = TensorSource({"x": torch.zeros(4, 1)}, augment=shifted)
    order = Streams({"labelled": (few, 4), "unlabelled": (source(12), 4)})
    seen = [order.read(step, Views(7))["labelled"] for step in epoch(order)]
    by_id = [batch["x"][batch["id"].argsort()] for batch in seen]
    assert not torch.equal(by_id[0], by_id[1])
    assert [batch["draw"] for batch in seen] == [0, 1, 2]
    finite = Streams({"labelled": (few, 4), "unlabelled": (source(12), 4)}, draws=2)
    seen = [finite.read(step, Views(7))["labelled"] for step in epoch(finite)]
    by_id = [batch["x"][batch["id"].argsort()] for batch in seen]
    assert torch.equal(by_id[0], by_id[2])
    assert not torch.equal(by_id[0], by_id[1])


def test_blocks_of_processes_put_together_are_the_step():
    order = streams()
    for rows in epoch(order):
        whole = read_block(order, rows, Views(0))
        parts = [read_block(order, rows, Views(0), rank, 3) for rank in range(3)]
        for name in ("labelled", "unlabelled"):
            joined = torch.cat([part.view(f"{name}/x") for part in parts])
            assert torch.equal(joined, whole.view(f"{name}/x"))
            assert all(part[name].of == whole[name].size for part in parts)
            places = torch.cat([part[name].rows for part in parts])
            assert places.tolist() == list(range(whole[name].size))


def test_draws_are_made_for_the_global_batch_of_each_stream():
    order = streams()
    rows, clock = epoch(order)[0], Clock(seed=1)
    whole = read_block(order, rows, Views(0))["unlabelled"]
    parts = [read_block(order, rows, Views(0), rank, 2)["unlabelled"] for rank in range(2)]
    for draw in (
        lambda batch: clock.randn("noise", batch, 2),
        lambda batch: clock.randint("time", batch, 3, 7),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))
    drawn = torch.cat([Clock(seed=i).randint("time", whole, 3, 7) for i in range(50)])
    assert set(drawn.tolist()) == {3, 4, 5, 6}


def test_micro_batches_share_every_stream():
    order = streams()
    batch = read_block(order, epoch(order)[1], Views(0))
    pieces = batch.split(2)
    assert len(pieces) == 2
    for name in ("labelled", "unlabelled"):
        joined = torch.cat([piece.view(f"{name}/x") for piece in pieces])
        assert torch.equal(joined, batch.view(f"{name}/x"))
    many = batch.split(5)
    assert sum(piece.size for piece in many) == batch.size == 3 + batch["unlabelled"].size
    assert any(piece["labelled"].size == 0 for piece in many)
    assert len(batch.split(50)) <= batch.size


def test_a_batch_of_streams_has_no_rows_of_its_own():
    order = streams()
    batch = read_block(order, epoch(order)[0], Views(0))
    assert set(batch.streams) == {"labelled", "unlabelled"}
    assert batch["labelled"].streams == {}
    for ask in (lambda: batch.rows, lambda: batch.of, lambda: batch.select(torch.tensor([0]))):
        with pytest.raises(DataError, match="take one of them: 'labelled', 'unlabelled'"):
            ask()
    moved = batch.to("meta")
    assert moved.view("unlabelled/x").device.type == "meta"


def test_what_cannot_be_read_is_told():
    with pytest.raises(DataError, match=r"'unlabeled'.*did you mean 'unlabelled'"):
        streams("unlabeled")
    with pytest.raises(DataError, match="do not fill a batch of 4"):
        Streams({"a": (source(3), 4), "b": (source(9), 4)}, drive="b", drop_last=True)
    order = Streams({"a": (source(1), 4), "b": (source(9), 4)}, drive="b")
    with pytest.raises(DataError, match=r"stream 'a' reads 1 rows.*2 processes"):
        read_block(order, epoch(order)[0], Views(0), 0, 2)


# ---- joined sources --------------------------------------------------------------------------


def test_joined_sources_keep_ids_and_the_views_they_share():
    labelled, rest = (
        source(4, target=torch.arange(4)),
        Unlabelled(Subset(source(9), torch.arange(4, 9))),
    )
    joined = Joined([labelled, rest])
    assert len(joined) == 9
    assert ids_of(joined).tolist() == list(range(9))
    assert [joined.id_of(k) for k in (0, 3, 4, 8)] == [0, 3, 4, 8]
    rows = torch.tensor([8, 0, 5, 3])
    batch = joined.read(rows, None)
    assert batch["id"].tolist() == batch["x"][:, 0].tolist() == [8, 0, 5, 3]
    assert "target" not in batch
    assert "target" in joined.read(torch.tensor([1]), None)
    assert joined[5, None]["x"].item() == 5
    assert Joined([rest, labelled]).fingerprint != joined.fingerprint
    with pytest.raises(DataError, match="nothing to join"):
        Joined([])


def test_splits_of_streams():
    wants = [Want("logits", "labelled/x"), Want("logits", "unlabelled/x"), Want("logits")]
    assert splits_of(wants) == ["train", "unlabelled"]
    splits = Splits({"train": source(3), "unlabelled": source(5, 3)})
    assert len(together(splits, ("train", "unlabelled"))) == 8
    assert together(splits, ("train",)) is splits["train"]


# ---- what a teacher says ---------------------------------------------------------------------


def test_a_teacher_hears_each_stream_as_a_plain_batch():
    asked = []

    def answer(batch, wants):
        asked.append((batch.size, [want.key for want in wants]))
        return Knowledge({"logits": batch["x"]}, torch.ones(batch.size, dtype=torch.bool))

    batch = Batch(labelled=Batch(x=torch.zeros(2, 3)), unlabelled=Batch(x=torch.ones(5, 3)))
    wants = (Want("logits", "labelled/x"), Want("logits", "unlabelled/x"))
    said = answered(wants, batch, answer)
    assert asked == [(2, ["logits"]), (5, ["logits"])]
    assert torch.equal(said.tensor("unlabelled/x:logits"), torch.ones(5, 3))
    assert said.stream("unlabelled").valid.tolist() == [True] * 5
    assert [want.key for want in wants] == list(said)
    with pytest.raises(TeacherError, match="did you mean 'unlabelled'"):
        said.stream("unlabeled")
    with pytest.raises(TeacherError, match="take one of them"):
        said.narrow(0, 1)
    plain = answered((Want("logits"),), batch["labelled"], answer)
    assert torch.equal(plain.tensor("logits"), torch.zeros(2, 3))
