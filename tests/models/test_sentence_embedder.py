from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import find_folder
from stillhouse.models.sentence_embedder import SentenceEmbedder

TEXTS = ["a cat sits", "dog", "a dog runs a cat sits", "cat"]


def test_unit_vectors_of_the_width_that_is_asked_for(encoder):
    net = SentenceEmbedder(encoder, width=6).eval()
    vectors = net(TEXTS)
    assert vectors.shape == (4, 6)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    assert SentenceEmbedder(encoder)(TEXTS).shape == (4, 16)
    longer = SentenceEmbedder(encoder, normalise=False).eval()(TEXTS)
    plain = SentenceEmbedder(encoder).eval()(TEXTS)
    assert torch.allclose(torch.nn.functional.normalize(longer, dim=1), plain, atol=1e-6)


def test_company_and_order_change_nothing(encoder):
    net = SentenceEmbedder(encoder, width=6).eval()
    many = TEXTS * 12  # several blocks
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        alone = torch.cat([net([text]) for text in TEXTS])
        assert torch.allclose(net([many[i] for i in order]), alone.repeat(12, 1)[order], atol=1e-5)


def test_training_sees_the_vectors_of_judging(encoder):
    net = SentenceEmbedder(encoder, width=6).eval()
    many = TEXTS * 12
    trained = net(many)
    with torch.no_grad():
        assert torch.allclose(net(many), trained, atol=1e-5)
    trained.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_words_are_cut_once(encoder, monkeypatch):
    net = SentenceEmbedder(encoder, length=5).eval()
    calls = []
    tokenizer = net.tokenizer
    net.tokenizer = lambda texts, **k: calls.append(list(texts)) or tokenizer(texts, **k)
    first = net(["a cat", "dog", "dog"])
    assert torch.equal(first, net(["a cat", "dog", "dog"]))
    net(["dog", "runs"])
    assert calls == [["a cat", "dog"], ["runs"]]
    assert torch.equal(net(["a cat sits a dog"]), net(["a cat sits dog dog"]))  # cut to 5 pieces
    monkeypatch.setattr("stillhouse.models.sentence_embedder._REMEMBERED", 2)
    assert torch.equal(net(["cat", "a cat"])[1:], net(["a cat"]))


def test_bad_settings_are_told(encoder):
    with pytest.raises(ModelError, match="length=2"):
        SentenceEmbedder(encoder, length=2)
    with pytest.raises(ModelError, match=r"hidden_size.*pretrained: false"):
        SentenceEmbedder(encoder, config={"hidden_size": 8})
    small = SentenceEmbedder(encoder, pretrained=False, config={"num_hidden_layers": 3})
    assert len(small.encoder.encoder.layer) == 3


def test_the_real_encoder_gives_what_its_authors_library_gives(real_models):
    if find_folder("sentence-transformers/all-MiniLM-L6-v2") is None:
        pytest.skip("the real encoder is not on this machine (make models)")
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(find_folder("sentence-transformers/all-MiniLM-L6-v2")), device="cpu"
    )
    texts = ["A plane is taking off.", "Un avion.", "x " * 90]
    with torch.inference_mode():
        ours = SentenceEmbedder(length=256).eval()(texts)
    expected = theirs.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_text_is_cut_where_the_encoder_reads_no_further(encoder):
    net = SentenceEmbedder(encoder, length=600).eval()
    assert net.length == 32
    assert torch.allclose(net(["a cat " * 90]), net(["a cat " * 400]))
