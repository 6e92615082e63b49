from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.text_cnn import HashEmbedding, TextCNN, text_cnn


def tokens(*rows: list[int]) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def test_logits_and_taps():
    net = text_cnn(7)
    assert net(tokens([3, 4, 5], [6])).shape == (2, 7)
    assert net(tokens([3])).shape == (1, 7)
    assert set(net.taps.values()) <= {name for name, _ in net.named_modules()}


def test_padding_changes_nothing():
    net = TextCNN(5).eval()
    short = tokens([11, 12, 13])
    long = torch.nn.functional.pad(short, (0, 9))
    assert torch.allclose(net(short), net(long), atol=1e-6)


def test_an_empty_text_is_answered_by_the_bias():
    net = TextCNN(5).eval()
    assert torch.allclose(net(tokens([0, 0]))[0], net.classifier.bias)


def test_the_order_of_words_matters():
    net = TextCNN(5).eval()
    assert not torch.allclose(net(tokens([1, 2, 3, 4])), net(tokens([4, 3, 2, 1])))
    bag = TextCNN(5, kernels=(1,)).eval()
    assert torch.allclose(bag(tokens([1, 2, 3, 4])), bag(tokens([4, 3, 2, 1])), atol=1e-6)


def test_any_int64_is_a_token():
    embedding = HashEmbedding(8, buckets=16)
    extreme = torch.tensor([1, -1, 2**63 - 1, -(2**63), 2**31 - 1, 2**40])
    rows = embedding.rows(extreme)
    assert rows.shape == (6, 2)
    assert rows.min() >= 0
    assert rows.max() < 16
    assert embedding(extreme).isfinite().all()


def test_tokens_hardly_collide_in_all_hashes():
    rows = HashEmbedding(4, buckets=1024, hashes=2).rows(torch.arange(1, 5001))
    distinct = len({tuple(row) for row in rows.tolist()})
    assert distinct > 4970
    # one hash alone has far fewer rows than there are tokens
    assert len(set(rows[:, 0].tolist())) <= 1024
    counts = torch.bincount(rows[:, 0], minlength=1024)
    assert counts.max() < 8 * counts.float().mean()


def test_hashes_are_not_state():
    assert set(HashEmbedding(4).state_dict()) == {"table.weight", "importance.weight"}


def test_it_learns_words():
    torch.manual_seed(0)
    net = TextCNN(3, width=16, filters=16, dropout=0.0)
    x = torch.randint(10, 500, (60, 6))
    y = torch.arange(60) % 3
    x[torch.arange(60), torch.arange(60) % 6] = 1000 + y
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (net.eval()(x).argmax(1) == y).float().mean() == 1.0


def test_bad_settings_are_told():
    with pytest.raises(ModelError, match="odd"):
        TextCNN(3, kernels=(2,))
    with pytest.raises(ModelError, match="dropout"):
        TextCNN(3, dropout=1.0)
    with pytest.raises(ModelError, match="hashes"):
        HashEmbedding(4, hashes=9)
