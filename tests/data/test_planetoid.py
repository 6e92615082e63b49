"""Planetoid: what the files hold, its own readers, what a pickle may do, written again."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data import open_data
from stillhouse.data.node_splits import inductive_split, random_parts, splits_of_graph
from stillhouse.data.planetoid import SUFFIXES, read_planetoid, write_planetoid
from stillhouse.errors import DataError, OptionError, RecipeError
from stillhouse.parts.graph import Graph

SIZES = {
    "cora": (2708, 1433, 7, 10556, 140),
    "citeseer": (3327, 3703, 6, 9104, 120),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_files_hold_what_the_literature_says(data_root, name):
    raw = read_planetoid(data_root / "planetoid", name)
    nodes, features, classes, edges, train = SIZES[name]
    assert raw.features.shape == (nodes, features)
    assert raw.edges.shape == (2, edges)
    assert (raw.classes, len(raw.train), len(raw.val), len(raw.test)) == (classes, train, 500, 1000)
    counts = torch.bincount(raw.labels[raw.train], minlength=classes)
    assert counts.tolist() == [20] * classes
    assert (raw.labels == -100).sum() == (15 if name == "citeseer" else 0)
    assert (raw.labels[raw.test] >= 0).all()


@pytest.mark.parametrize("name", SIZES)
def test_pyg_reads_the_same(data_root, name):
    pytest.importorskip("torch_geometric")
    from torch_geometric.io import read_planetoid_data

    data = read_planetoid_data(str(data_root / "planetoid"), name)
    raw = read_planetoid(data_root / "planetoid", name)
    x = data.x.to_dense() if data.x.layout != torch.strided else data.x
    torch.testing.assert_close(raw.features.dense(), x)
    order = torch.argsort(data.edge_index[0] * len(x) + data.edge_index[1])
    assert torch.equal(raw.edges, data.edge_index[:, order])
    for role in ("train", "val", "test"):
        nodes = data[f"{role}_mask"].nonzero()[:, 0]
        assert torch.equal(getattr(raw, role), nodes)
        assert torch.equal(raw.labels[nodes], data.y[nodes])


@pytest.mark.parametrize("name", SIZES)
def test_what_is_written_reads_the_same(data_root, tmp_path, name):
    raw = read_planetoid(data_root / "planetoid", name)
    order = write_planetoid(
        tmp_path, name, Graph(raw.features, raw.edges), raw.labels, raw.classes,
        raw.train, raw.val, raw.test,
    )  # fmt: skip
    assert torch.equal(order, torch.arange(len(raw.labels)))
    again = read_planetoid(tmp_path, name)
    assert torch.equal(again.features.dense(), raw.features.dense())
    for key in ("labels", "edges", "train", "val", "test"):
        assert torch.equal(getattr(again, key), getattr(raw, key)), key


def test_any_graph_can_be_written_and_pyg_reads_it(tmp_path):
    splits = open_data("generated-graph").judging()
    graph, test = splits["train"].graph, splits["test"]
    labels = torch.arange(graph.nodes) % 3
    train, val = torch.arange(5, 25), torch.tensor([1, 30, 3])
    order = write_planetoid(tmp_path, "own", graph, labels, 3, train, val, test.ids)
    raw = read_planetoid(tmp_path, "own")
    torch.testing.assert_close(raw.features.dense(), graph.dense()[order])
    assert torch.equal(raw.labels, labels[order])
    assert torch.equal(order[raw.train], train)
    assert set(order[raw.test].tolist()) == set(test.ids.tolist())
    back = order[raw.edges]
    assert {tuple(e) for e in back.T.tolist()} == {tuple(e) for e in graph.edges.T.tolist()}


def raw_copy(source: Path, target: Path, name: str = "cora") -> Path:
    target.mkdir()
    for suffix in SUFFIXES:
        (target / f"ind.{name}.{suffix}").write_bytes(
            (source / f"ind.{name}.{suffix}").read_bytes()
        )
    return target


class _Bad:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_that_calls_something_else_is_refused(data_root, tmp_path, capsys):
    folder = raw_copy(data_root / "planetoid", tmp_path / "raw")
    (folder / "ind.cora.graph").write_bytes(pickle.dumps(_Bad()))
    with pytest.raises(DataError, match=r"ind\.cora\.graph.*print"):
        read_planetoid(folder, "cora")
    assert "harm" not in capsys.readouterr().out


def test_damaged_files_are_told(data_root, tmp_path):
    folder = raw_copy(data_root / "planetoid", tmp_path / "raw")
    whole = (folder / "ind.cora.allx").read_bytes()
    (folder / "ind.cora.allx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"ind\.cora\.allx"):
        read_planetoid(folder, "cora")
    (folder / "ind.cora.allx").write_bytes(whole)
    (folder / "ind.cora.test.index").write_text("1708\n1708\n")
    with pytest.raises(DataError, match="twice"):
        read_planetoid(folder, "cora")
    (folder / "ind.cora.test.index").unlink()
    with pytest.raises(DataError, match=r"test\.index"):
        read_planetoid(folder, "cora")


def test_the_editions_are_known(data_root):
    for name in SIZES:
        splits = open_data("planetoid", options={"graph": name})
        assert splits.edition == f"{name} (public split)"
        rows = splits["train"].graph.dense().sum(1)
        assert ((rows - 1).abs() < 1e-5).sum() + (rows == 0).sum() == len(rows)


def test_transductive_training_sees_labels_of_training_nodes_only(data_root):
    splits = open_data("planetoid", options={"graph": "cora"})
    train = splits["train"]
    assert len(train) == 2708
    assert (train.targets >= 0).nonzero()[:, 0].tolist() == list(range(140))
    with pytest.raises(DataError, match="opens only"):
        splits["test"]


@pytest.mark.parametrize("keep_rest", [False, True])
def test_inductive_training_sees_nothing_of_hidden_nodes(data_root, keep_rest):
    options = {"graph": "cora", "setting": "inductive", "keep_rest": keep_rest}
    splits = open_data("planetoid", seed=3, options=options)
    opened = splits.judging()
    hidden, seen = set(opened["test"].ids.tolist()), opened["train"]
    assert len(hidden) == 200
    assert not hidden & set(seen.ids.tolist())
    assert not hidden & set(opened["val"].ids.tolist())
    assert len(seen) == (2708 - 200 if keep_rest else 140 + 500 + 800)
    assert seen.graph.nodes == len(seen)
    assert opened["val"].graph is seen.graph
    assert opened["test"].graph.nodes == 2708
    # features and edges are those of the observed nodes, under their new numbers
    whole = opened["test"].graph
    assert torch.equal(seen.graph.dense(), whole.dense()[seen.ids])
    among = {tuple(e) for e in whole.edges.T.tolist()}
    assert {tuple(e) for e in seen.ids[seen.graph.edges].T.tolist()} == {
        (u, v) for u, v in among if u in set(seen.ids.tolist()) and v in set(seen.ids.tolist())
    }
    assert (seen.targets >= 0).sum() == 140
    other = open_data("planetoid", seed=4, options=options).judging()
    assert set(other["test"].ids.tolist()) != hidden
    same = open_data("planetoid", seed=3, options=options).judging()
    assert set(same["test"].ids.tolist()) == hidden


def test_the_inductive_split_is_built_as_released(golden):
    case = {
        k: torch.from_numpy(np.asarray(v))
        for k, v in golden("ffg2m").case("inductive_split").items()
    }
    train, val, test = torch.arange(6), torch.arange(6, 10), torch.arange(10, 35)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(2022))
    split = inductive_split(train, val, test, 0.2, order)
    assert torch.equal(split.hidden, case["idx_test_ind"])
    assert torch.equal(split.observed, case["idx_obs"])
    assert torch.equal(split.train, case["obs_idx_train"])
    assert torch.equal(split.val, case["obs_idx_val"])
    assert torch.equal(split.test, case["obs_idx_test"])


def test_a_graph_object_of_pyg_gives_splits():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data

    rng = torch.Generator().manual_seed(0)
    masks = {f"{r}_mask": torch.arange(30) % 3 == n for n, r in enumerate(("train", "val", "test"))}
    data = Data(
        x=torch.rand(30, 4, generator=rng),
        edge_index=torch.randint(0, 30, (2, 50), generator=rng),
        y=torch.arange(30) % 2, **masks,
    )  # fmt: skip
    splits = splits_of_graph(data).judging()
    assert splits["val"].ids.tolist() == list(range(1, 30, 3))
    assert splits.about["classes"] == ["0", "1"]
    edges = splits["train"].graph.edges
    assert (edges[0] != edges[1]).all()
    assert {tuple(e) for e in edges.T.tolist()} == {tuple(e) for e in edges.flip(0).T.tolist()}
    drawn = splits_of_graph(
        Data(x=data.x, edge_index=data.edge_index, y=data.y), per_class=3, val=5, test=7
    ).judging()
    assert (drawn["train"].targets >= 0).sum() == 6
    assert (len(drawn["val"]), len(drawn["test"])) == (5, 7)
    batch = read_rows(drawn["val"], torch.tensor([4, 0]), None)
    assert batch["x"].numbers.tolist() == batch["id"].tolist()
    data.edge_index = data.edge_index + 29
    with pytest.raises(DataError, match="names node"):
        splits_of_graph(data)
    with pytest.raises(DataError, match="'y'"):
        splits_of_graph(Data(x=data.x, edge_index=data.edge_index))


def test_strange_splits_and_options_are_told():
    labels = torch.arange(20) % 2
    with pytest.raises(DataError, match="labelled nodes"):
        random_parts(labels, per_class=11, val=1, test=1, seed=0)
    with pytest.raises(DataError, match="beside train"):
        random_parts(labels, per_class=5, val=9, test=2, seed=0)
    with pytest.raises((OptionError, RecipeError), match="graph"):
        open_data("planetoid", options={"graph": "corra"})
    with pytest.raises((OptionError, RecipeError), match="hidden"):
        open_data("planetoid", options={"hiden": 0.2})


def test_own_files(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "mine"
    folder.mkdir()
    np.save(folder / "features.npy", rng.random((40, 5), dtype=np.float32))
    (folder / "edges.csv").write_text(
        "# from,to\n" + "".join(f"{n},{(n + 1) % 40}\n" for n in range(40))
    )
    (folder / "labels.txt").write_text("".join(("red\n", "blue\n", "\n")[n % 3] for n in range(40)))
    options = {"path": str(folder), "per_class": 4, "val_nodes": 5, "test_nodes": 6}
    splits = open_data("graph", options=options).judging()
    assert splits.about["classes"] == ["blue", "red"]
    assert splits["train"].graph.edges.shape == (2, 80)
    assert (splits["train"].targets >= 0).sum() == 8
    (folder / "split.json").write_text('{"train": [0, 1], "val": [3], "test": [4, 6]}')
    assert open_data("graph", options=options).judging()["test"].ids.tolist() == [4, 6]
    (folder / "edges.csv").write_text("0,40\n")
    with pytest.raises(DataError, match="names node 40"):
        open_data("graph", options=options)
    (folder / "edges.csv").unlink()
    with pytest.raises(DataError, match="no edges"):
        open_data("graph", options=options)
    with pytest.raises(DataError, match="there is no"):
        open_data("graph", options={"path": "nowhere"})


def test_one_npz(tmp_path):
    masks = {f"{r}_mask": np.arange(30) % 3 == n for n, r in enumerate(("train", "val", "test"))}
    ends = np.stack([np.arange(29), np.arange(1, 30)])
    np.savez(
        tmp_path / "g.npz", x=np.eye(30, 4), y=np.arange(30) // 3 % 2, edge_index=ends, **masks
    )
    splits = open_data("graph", options={"path": str(tmp_path / "g.npz"), "setting": "inductive"})
    opened = splits.judging()
    assert len(opened["train"]) == 30 - len(opened["test"])
