"""Time series brought to one length."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.parts.series import left_padded, resampled, windows


def test_resampled_as_released(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("comodo").case("resize").items()}
    for number in (0, 1):
        wanted = case[f"resized{number}"]
        found = resampled(case[f"x{number}"], wanted.shape[-1])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        both = resampled(case[f"x{number}"][None].expand(2, -1, -1), wanted.shape[-1])
        assert torch.equal(both[1], found)


def test_padded_on_the_left_as_released(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("comodo").case("leftpad").items()}
    least = case["mask"].shape[1]
    padded, mask = left_padded([case["x0"], case["x1"]], least)
    assert torch.equal(mask, case["mask"].long())
    torch.testing.assert_close(padded[..., -10:], case["padded_last10"], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.sum(-1), case["padded_sum"], rtol=0, atol=1e-5)


def test_the_longest_decides_where_it_is_longer_than_the_least():
    padded, mask = left_padded([torch.ones(1, 3), torch.ones(1, 7)], 4)
    assert padded.shape == (2, 1, 7)
    assert mask.sum(1).tolist() == [3, 7]
    assert padded[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_windows_of_a_recording():
    found = windows(torch.arange(10.0).view(1, 10), 4, 3)
    assert found[:, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_what_does_not_fit_is_told():
    with pytest.raises(DataError):
        resampled(torch.zeros(5), 3)
    with pytest.raises(DataError):
        left_padded([torch.zeros(2, 3), torch.zeros(3, 3)])
    with pytest.raises(DataError):
        left_padded([])
    with pytest.raises(DataError, match="do not fit"):
        windows(torch.zeros(1, 5), 6, 1)
