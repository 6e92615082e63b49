from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.sentence_classifier import SentenceClassifier


def test_texts_to_logits(encoder):
    net = SentenceClassifier(3, encoder=encoder)
    assert net(["a cat sits", "dog"]).shape == (2, 3)
    assert net.reads == "text"


def test_vectors_have_one_length_and_padding_changes_nothing(encoder):
    net = SentenceClassifier(3, encoder=encoder)
    alone = net.features(["dog runs"])
    beside = net.features(["dog runs", "a cat sits a cat sits"])
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
    assert torch.allclose(beside.norm(dim=1), torch.full((2,), 4.0))
    assert not torch.allclose(beside[0], beside[1], atol=1e-2)


def test_the_encoder_is_the_published_one_and_stays_frozen(encoder):
    from transformers import AutoModel

    net = SentenceClassifier(3, encoder=encoder)
    published = AutoModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(published[k], v) for k, v in net.encoder.state_dict().items())
    net.train()
    assert not net.encoder.training
    assert net.classifier.training
    net(["a cat", "a dog"]).sum().backward()
    reached = {n for n, p in net.named_parameters() if p.grad is not None}
    assert reached == {"classifier.weight", "classifier.bias"}
    again = net(["a cat", "a dog"])
    assert torch.equal(again, net(["a cat", "a dog"]))


def test_long_texts_are_cut(encoder):
    net = SentenceClassifier(3, encoder=encoder, length=5)
    assert torch.equal(net(["a cat sits dog dog"]), net(["a cat sits cat cat cat"]))


def test_bad_input_is_told(encoder, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    with pytest.raises(ModelError, match="at least one class"):
        SentenceClassifier(0, encoder=encoder)
    with pytest.raises(ModelError, match="all-MiniLM-L6-v3"):
        SentenceClassifier(3, encoder="sentence-transformers/all-MiniLM-L6-v3")
