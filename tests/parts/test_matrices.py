from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError, ModelError
from stillhouse.parts.matrices import (
    ZCA,
    class_pca,
    k_centre,
    kmeans,
    nullspace,
    random_rotation,
    signed,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_zca_reproduces_the_reference(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("dd_common").case("zca").items()}
    zca = ZCA.fit(case["train"])
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(zca.mean, case["mean"], **close)
    torch.testing.assert_close(zca.matrix, case["matrix"], **close)
    torch.testing.assert_close(zca.transform(case["train"]), case["train_z"], **close)
    torch.testing.assert_close(zca.transform(case["test"]), case["test_z"], **close)
    torch.testing.assert_close(zca.inverse(case["test_z"]), case["test_back"], **close)
    torch.testing.assert_close(case["test_back"], case["test"], **close)
    small = ZCA.fit(case["train"].float())
    assert small.matrix.dtype == torch.float32
    torch.testing.assert_close(small.matrix.double(), case["matrix"], rtol=1e-4, atol=1e-4)


def test_whitened_covariance_has_eigenvalues_s_over_s_plus_eps():
    x = torch.randn(500, 2, 3, 3, generator=generator()).double() * 0.3
    zca = ZCA.fit(x)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T))
    white = torch.linalg.eigvalsh(torch.cov(zca.transform(x).flatten(1).T))
    torch.testing.assert_close(white, spectrum / (spectrum + 0.1))
    torch.testing.assert_close(zca.inverse(zca.transform(x)), x, rtol=0, atol=1e-10)


def test_zca_with_fewer_samples_than_dimensions_stays_finite_and_invertible():
    x = torch.rand(6, 3, 4, 4, generator=generator())
    zca = ZCA.fit(x)
    other = torch.rand(2, 3, 4, 4, generator=generator(1))
    torch.testing.assert_close(zca.inverse(zca.transform(other)), other, rtol=0, atol=1e-4)


def test_zca_state_round_trips_and_foreign_sizes_are_refused():
    zca = ZCA.fit(torch.rand(10, 3, 2, 2, generator=generator()))
    again = ZCA.from_tensors(zca.tensors())
    assert torch.equal(again.matrix, zca.matrix)
    with pytest.raises(DataError, match="12 values; these have 27"):
        zca.transform(torch.rand(1, 3, 3, 3))
    with pytest.raises(DataError, match="at least 2"):
        ZCA.fit(torch.rand(1, 3))
    with pytest.raises(DataError, match="not finite"):
        ZCA.fit(torch.tensor([[1.0], [float("nan")]]))


def test_kmeans_finds_separate_groups_and_is_a_function_of_the_generator():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = (centres[:, None] + torch.randn(3, 20, 2, generator=generator())).reshape(60, 2)
    before = torch.get_rng_state()
    found = kmeans(x, 3, generator=generator(4))
    again = kmeans(x, 3, generator=generator(4))
    assert torch.equal(found.labels, again.labels)
    assert torch.equal(torch.get_rng_state(), before)
    groups = found.labels.reshape(3, 20)
    assert all(len(row.unique()) == 1 for row in groups)
    assert len(groups[:, 0].unique()) == 3
    expected = x.reshape(3, 20, 2).mean(1)
    torch.testing.assert_close(found.centres[groups[:, 0]], expected)


def test_nearest_samples_are_members_of_their_cluster_nearest_to_the_centre():
    x = torch.randn(50, 4, generator=generator(2))
    found = kmeans(x, 7, generator=generator())
    rows = found.nearest_samples(x)
    assert len(rows.unique()) == 7
    for c, row in enumerate(rows.tolist()):
        assert found.labels[row] == c
        members = x[found.labels == c]
        least = (members - found.centres[c]).square().sum(1).min()
        torch.testing.assert_close((x[row] - found.centres[c]).square().sum(), least)


def test_kmeans_with_coinciding_samples_leaves_no_cluster_empty():
    x = torch.cat([torch.zeros(8, 2), torch.ones(2, 2)])
    found = kmeans(x, 4, generator=generator())
    assert torch.bincount(found.labels, minlength=4).min() > 0
    assert torch.isfinite(found.centres).all()
    assert len(found.nearest_samples(x).unique()) == 4
    with pytest.raises(DataError, match=r"1\.\.10"):
        kmeans(x, 11, generator=generator())


def test_k_centre_takes_the_farthest_each_time():
    x = torch.tensor([[0.0], [1.0], [9.0], [10.0], [10.0]])
    chosen = k_centre(x, 5, generator=generator())
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4]
    for seed in range(5):
        first, second = k_centre(x, 2, generator=generator(seed)).tolist()
        distance = (x - x[first]).abs().squeeze(1)
        assert distance[second] == distance.max()
    with pytest.raises(DataError, match="k-centre"):
        k_centre(x, 0, generator=generator())


def test_the_null_space_is_what_a_layer_does_not_see():
    weight = torch.randn(3, 7, generator=generator())
    x = torch.randn(20, 7, generator=generator(1))
    for centred, rank in ((True, 2), (False, 3)):
        space = nullspace(weight, centred=centred)
        rows = weight - weight.mean(0) if centred else weight
        assert space.rank == rank
        assert (space.apply(x) @ rows.T).abs().max() < 1e-5
        projector = space.projector()
        torch.testing.assert_close(x.double() @ projector, space.apply(x.double()))
        torch.testing.assert_close(projector @ projector, projector)
        assert torch.trace(projector) == pytest.approx(7 - rank)
        assert space.apply(x).dtype == torch.float32
        torch.testing.assert_close(space.apply(x[0]), space.apply(x)[0])
    torch.testing.assert_close(
        nullspace(weight).apply(x).softmax(-1), nullspace(weight + 5).apply(x).softmax(-1)
    )


def test_dependent_rows_count_once_and_equal_rows_not_at_all():
    row = torch.randn(1, 5, generator=generator())
    assert nullspace(torch.cat([row, 2 * row, -row])).rank == 1
    assert nullspace(torch.cat([row, row, row])).rank == 0
    assert nullspace(torch.cat([row, row]), centred=False).rank == 1
    assert nullspace(torch.zeros(2, 5)).rank == 0
    with pytest.raises(ModelError, match="finite matrix"):
        nullspace(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ModelError, match="reads 5 numbers per sample, these have 4"):
        nullspace(row).apply(torch.zeros(2, 4))


@pytest.mark.parametrize("rows", [200, 12])
def test_components_of_each_class_are_those_of_its_covariance(rows):
    """Many samples (a covariance is decomposed) and few (the samples are)."""
    scale = torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02])
    x = torch.randn(rows, 8, generator=generator()).double() * scale + 5
    groups = torch.arange(rows) % 2
    found = class_pca(x, groups, 3, 3)
    assert found.count.tolist() == [rows // 2, rows // 2, 0]
    for c in range(2):
        own = x[groups == c]
        centred = own - own.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(own))
        torch.testing.assert_close(found.mean[c], own.mean(0))
        torch.testing.assert_close(found.values[c], values.flip(0)[:3])
        torch.testing.assert_close(found.directions[c], signed(vectors.flip(1)[:, :3]))
        torch.testing.assert_close(found.total[c], values.sum())
    assert found.used.tolist() == [3, 3, 0]
    assert found.directions[2].abs().sum() == found.total[2] == 0


def test_directions_without_variance_are_not_used():
    x = torch.randn(50, 6, generator=generator())
    x[:, 2:] = 0.0
    found = class_pca(x, torch.zeros(50, dtype=torch.int64), 1, 4)
    assert found.used.tolist() == [2]
    assert found.values[0, 2:].abs().sum() == found.directions[0, :, 2:].abs().sum() == 0
    same = class_pca(torch.ones(9, 3), torch.zeros(9, dtype=torch.int64), 1, 2)
    assert same.used.tolist() == [0]
    three = class_pca(torch.randn(3, 9), torch.zeros(3, dtype=torch.int64), 1, 5)
    assert three.used.tolist() == [2]


def test_class_components_refuse_what_does_not_belong_together():
    x, groups = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(DataError, match=r"lie in 0..2; there are 2"):
        class_pca(x, groups, 2, 1)
    with pytest.raises(DataError, match="one class each"):
        class_pca(x, groups[:4], 3, 1)
    x[3, 1] = float("inf")
    with pytest.raises(DataError, match="sample 3 holds values that are not finite"):
        class_pca(x, groups, 3, 1)


def test_rotations_are_orthonormal_and_spread_over_the_whole_group():
    rng, turns = generator(), []
    for _ in range(400):
        turn = random_rotation(3, generator=rng)
        torch.testing.assert_close(turn.T @ turn, torch.eye(3, dtype=torch.float64))
        turns.append(turn)
    # every entry has mean 0 and mean square 1 / size when the group is covered evenly
    mean, square = torch.stack(turns).mean(0), torch.stack(turns).square().mean(0)
    assert mean.abs().max() < 0.12
    assert (square - 1 / 3).abs().max() < 0.08
    assert torch.equal(
        random_rotation(4, generator=generator(3)), random_rotation(4, generator=generator(3))
    )
    assert random_rotation(1, generator=rng).abs().item() == pytest.approx(1.0)
