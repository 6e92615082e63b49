from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.metrics import cost
from stillhouse.net import Net


class Attention(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


def test_shared_parameters_count_once_and_buffers_not():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert cost.parameters(net) == 20 + 8
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert cost.parameters(tied) == 16
    assert cost.state_bytes(tied) == 64
    assert cost.state_bytes(net.half()) == (20 + 8 + 8) * 2 + 8  # running statistics, a counter


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        (nn.Linear(10, 20), (torch.randn(3, 10),), 3 * 200),
        (nn.Conv2d(3, 8, 3, padding=1), (torch.randn(1, 3, 8, 8),), 3 * 8 * 9 * 64),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), (torch.randn(2, 4, 8, 8),), 2 * 8 * 9 * 64),
        (nn.LSTM(8, 16, batch_first=True), (torch.randn(1, 5, 8),), 5 * (8 + 16) * 16 * 4),
        (Attention(), (torch.randn(1, 2, 5, 8),), 2 * 2 * 5 * 5 * 8),
        (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            (torch.randn(1, 5, 16),),
            5 * 16 * 16 * 4 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32,
        ),
    ],
    ids=["linear", "conv", "depthwise", "lstm", "attention", "transformer"],
)
def test_macs_by_hand(module, args, expected):
    module.train()
    fast = torch.backends.mha.get_fastpath_enabled()
    assert cost.macs(module, *args) == expected
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_macs_leave_modes_and_statistics_as_they_were():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    net.train()
    net[2].eval()
    before = net[1].running_mean.clone()
    cost.macs(net, torch.randn(3, 4))
    assert [m.training for m in net] == [True, True, False]
    assert torch.equal(net[1].running_mean, before)


def test_rows_of_any_view():
    assert cost.rows_of(torch.arange(3), 5).tolist() == [0, 1, 2, 0, 1]
    assert cost.rows_of(["a", "b"], 3) == ["a", "b", "a"]
    made = cost.rows_of({"ids": torch.zeros(2, 7), "mask": torch.ones(2, 7)}, 4)
    assert {k: tuple(v.shape) for k, v in made.items()} == {"ids": (4, 7), "mask": (4, 7)}
    for empty in (torch.zeros(0, 3), [], torch.tensor(1.0), 3):
        with pytest.raises(ModelError):
            cost.rows_of(empty, 2)


def test_percentiles():
    assert cost.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert cost.percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert cost.percentile([7.0], 0.95) == 7.0
    with pytest.raises(ModelError):
        cost.percentile([], 0.5)


def test_timings_interleave_and_tell_slow_from_fast():
    order = []
    calls = [
        lambda: (order.append("slow"), time.sleep(0.004)),
        lambda: order.append("fast"),
    ]
    slow, fast = cost.timings(calls, "cpu", seconds=0.05, warm=1, least=3, most=5)
    assert order[:4] == ["slow", "fast", "slow", "fast"]
    assert len(slow) == len(fast) <= 5
    assert min(slow) >= 4.0 > cost.percentile(fast, 0.5)


def test_measure_compares_models(tmp_path):
    big = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    small = Net(nn.Linear(64, 10))
    big.train()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 123)
    view = torch.randn(4, 64)
    found = cost.measure(
        {"teacher": (big, view), "student": (small, view)}, seconds=0.05, disk={"student": file}
    )
    assert big.training
    assert found["teacher"]["parameters"] == 64 * 256 + 256 + 2570
    assert found["student"]["macs"] == 640
    assert found["student"]["bytes"] == 123
    assert found["teacher"]["bytes"] == 4 * found["teacher"]["parameters"]
    for entry in found.values():
        assert list(entry["latency_ms"]) == ["1", "32"]
        assert 0 < entry["latency_ms"]["1"]["p50"] <= entry["latency_ms"]["1"]["p95"]
        p50 = entry["latency_ms"]["32"]["p50"]
        assert entry["throughput"] == pytest.approx(32 / p50 * 1000)


def test_views_of_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b.transpose(1, 2)

    view = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 5, 4)}
    for module in (Two(), Net(Two())):
        found = cost.measure({"m": (module, view)}, batches=(2,), seconds=0.01)
        assert found["m"]["macs"] == 3 * 4 * 5


def test_disk_and_memory(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"12")
    assert cost.bytes_on_disk(tmp_path) == 5
    assert cost.bytes_on_disk(tmp_path / "y") == 2
    with pytest.raises(ModelError, match="gone"):
        cost.bytes_on_disk(tmp_path / "gone")
    peak = cost.peak_memory_mb("cpu")
    assert peak is None or peak > 10


def test_live_tensors_are_counted_while_they_live():
    x = torch.randn(1000, 256, requires_grad=True)
    block = x.numel() * 4
    with cost.LiveTensors() as live:
        y = x * 2
        z = y.sin()  # keeps y for its backward
        assert live.now == 2 * block
        y.view(-1).add_(0.0)  # a view and a change in place live where y does
        assert live.now == 2 * block
        del y, z
        assert live.now == 0
        kept = (x * 2).exp()
    assert live.peak == 2 * block
    assert live.now == block
    del kept
    assert live.now == 0


def test_live_tensors_see_the_backward():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    peaks = []
    for rows in (100, 200):
        with cost.LiveTensors() as live:
            net(torch.randn(rows, 64)).sum().backward()
        peaks.append(live.peak)
        net.zero_grad()
    gradients = sum(p.numel() for p in net.parameters()) * 4
    assert peaks[0] > gradients
    assert peaks[1] - peaks[0] > 100 * 64 * 4 * 3
