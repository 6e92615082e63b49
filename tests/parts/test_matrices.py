from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.parts.matrices import ZCA, k_centre, kmeans


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
