from __future__ import annotations

import pytest
import torch

from stillhouse.engine.checkpoint import write_state
from stillhouse.errors import CheckpointError, DataError, ModelError
from stillhouse.models.convnet import ConvNet
from stillhouse.parts.unroll import FlatNet
from stillhouse.stages.experts import convert_released, open_trajectories


def shape():
    return FlatNet(ConvNet(3, 2, 8, width=4, depth=1))


def written(folder, experts=2, snapshots=4, dtype=torch.float32):
    """Experts whose weights are all e + t / 10."""
    net = ConvNet(3, 2, 8, width=4, depth=1)
    for expert in range(experts):
        for epoch in range(snapshots):
            state = {
                k: torch.full_like(v, expert + epoch / 10).to(dtype)
                for k, v in net.state_dict().items()
            }
            write_state(folder / f"expert-{expert}" / f"epoch-{epoch:06d}.state", state)
    return folder


@pytest.mark.parametrize("hold", [0, 1 << 20])
def test_segments_are_copies_of_the_right_snapshots(tmp_path, hold):
    found = open_trajectories(written(tmp_path), shape(), hold_bytes=hold)
    assert (len(found), found.epochs) == (2, 3)
    begin, target = found.segment(1, 1, 2)
    assert begin.shape == (shape().size,)
    torch.testing.assert_close(begin, torch.full_like(begin, 1.1))
    torch.testing.assert_close(target, torch.full_like(begin, 1.3))
    begin.zero_()
    torch.testing.assert_close(found.at(1, 1), torch.full_like(begin, 1.1))
    assert not torch.equal(found.at(0, 0), found.at(0, 3))


def test_half_precision_takes_half_the_disk_and_reads_as_float32(tmp_path):
    whole = open_trajectories(written(tmp_path / "a"), shape())
    half = open_trajectories(written(tmp_path / "b", dtype=torch.float16), shape())
    assert half.at(0, 1).dtype == torch.float32
    torch.testing.assert_close(half.at(1, 2), whole.at(1, 2), rtol=1e-3, atol=1e-3)
    weights = shape().size * 8
    assert whole.bytes - half.bytes == pytest.approx(weights * 2, rel=0.01)


def test_steps_are_the_norms_of_the_moves(tmp_path):
    found = open_trajectories(written(tmp_path), shape())
    size = shape().size ** 0.5
    torch.testing.assert_close(found.steps(), torch.full((2, 3), 0.1 * size))
    torch.testing.assert_close(found.steps(2), torch.full((2, 2), 0.2 * size))


def test_experts_are_read_as_a_source(tmp_path):
    found = open_trajectories(written(tmp_path), shape())
    batch = found.read(torch.tensor([1, 0]), None)
    assert batch["id"].tolist() == [1, 0]
    assert found[1, None] == {"expert": 1, "epochs": 3}
    other = open_trajectories(written(tmp_path / "other", experts=1), shape())
    assert found.fingerprint != other.fingerprint


def test_what_does_not_fit_is_told(tmp_path):
    found = open_trajectories(written(tmp_path / "a"), shape())
    with pytest.raises(DataError, match="no epoch 4"):
        found.segment(0, 2, 2)
    with pytest.raises(ModelError, match="do not belong"):
        open_trajectories(tmp_path / "a", FlatNet(ConvNet(3, 2, 8, width=8, depth=1)))
    with pytest.raises(DataError, match="no experts"):
        open_trajectories(tmp_path / "empty", shape())
    written(tmp_path / "a" / "longer", experts=1, snapshots=6)
    with pytest.raises(DataError, match=r"\[4, 6\]"):
        open_trajectories(tmp_path / "a", shape())
    with pytest.raises(DataError, match="no epoch"):
        open_trajectories(written(tmp_path / "b", snapshots=1), shape())
    file = tmp_path / "c" / "expert-0" / "epoch-000000.state"
    written(tmp_path / "c")
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(CheckpointError, match="damaged"):
        open_trajectories(tmp_path / "c", shape())


def test_released_buffers_are_converted_without_running_code(tmp_path):
    net = ConvNet(3, 2, 8, width=4, depth=1)
    buffer = [
        [[torch.full_like(p, e + t / 10) for p in net.parameters()] for t in range(4)]
        for e in range(2)
    ]
    torch.save(buffer[:1], tmp_path / "replay_buffer_0.pt")
    torch.save(buffer[1:], tmp_path / "replay_buffer_10.pt")
    assert convert_released(tmp_path, tmp_path / "ours") == 2
    found = open_trajectories(tmp_path / "ours", shape())
    torch.testing.assert_close(found.at(1, 3), torch.full((shape().size,), 1.3))
    (tmp_path / "other").mkdir()
    torch.save(buffer, tmp_path / "other" / "replay_buffer_0.pt")
    with pytest.raises(DataError, match="convert_released"):
        open_trajectories(tmp_path / "other", shape())
    torch.save({"a": 1}, tmp_path / "replay_buffer_1.pt")
    with pytest.raises(CheckpointError, match="no replay buffer"):
        convert_released(tmp_path / "replay_buffer_1.pt", tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds no"):
        convert_released(tmp_path / "ours", tmp_path / "x")

    class Bad:
        def __reduce__(self):
            return (print, ("run",))

    torch.save([Bad()], tmp_path / "replay_buffer_2.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_released(tmp_path / "replay_buffer_2.pt", tmp_path / "x")
