"""Prompts, class vectors, few-shot caches, and the head made of text embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.heads import CosineHead, TextHead
from stillhouse.parts.text_classifier import cache_logits, class_vectors, prompts_of


def near(found, reference, tolerance):
    reference = torch.as_tensor(reference)
    worst = (found.double() - reference.double()).abs().max().item()
    assert worst <= tolerance * max(1.0, reference.abs().max().item())


def test_the_prompts_that_reach_the_tokenizer(golden):
    vectors = golden("dho")
    vectors.count("prompts")
    told = vectors.json["prompts"]
    assert prompts_of(told["classnames"], told["templates"]) == told["texts"]


def test_class_vectors_of_each_script(golden):
    g = golden("dho").case("text_classifier")
    embeddings = torch.as_tensor(g["embeddings"])
    near(class_vectors(embeddings).T, g["weights"], 1e-6)
    near(class_vectors(embeddings, "templates").T, g["weights_openclip"], 1e-6)
    near(class_vectors(embeddings, "none"), g["weights_head_init"], 1e-6)


def test_few_shot_and_zero_shot_logits(golden):
    vectors = golden("dho")
    cases = [name for name in vectors.cases() if name.startswith("tip")]
    for name in cases:
        g = vectors.case(name)
        features, keys, values, weights = (
            torch.as_tensor(g[k]).double()
            for k in ("features", "cache_keys", "cache_values", "clip_weights")
        )
        # the stored features are of unit length in float32 only
        zero_shot = TextHead(weights.T, normalise=False)(features)
        near(zero_shot, g["zero_shot"], 1e-11)
        added = cache_logits(features, keys, values, alpha=1.8, beta=3.2)
        near(zero_shot + added, g["logits"], 1e-11)
        single = TextHead(weights.T.float())(features.float())
        both = single + cache_logits(
            features.float(), keys.float(), values.float(), alpha=1.8, beta=3.2
        )
        near(both, g["logits"], 1e-5)


def test_a_cache_of_weight_nothing_leaves_zero_shot_logits():
    """Property 9 of the sheet of dho."""
    rng = torch.Generator().manual_seed(0)
    features, keys = (F.normalize(torch.randn(n, 6, generator=rng), dim=-1) for n in (4, 9))
    values = F.one_hot(torch.arange(9) % 3).float()
    assert not cache_logits(features, keys, values, alpha=0.0, beta=3.0).any()
    # a sample in the cache speaks for its class with full weight
    own = cache_logits(keys[:1], keys, values, alpha=1.0, beta=50.0)
    assert own.argmax().item() == 0


def test_what_does_not_fit_is_told():
    with pytest.raises(RecipeError, match=r"needs \{\} once"):
        prompts_of(["cat"], ["a photo"])
    with pytest.raises(RecipeError, match="at least one class"):
        prompts_of([], ["a {}"])
    with pytest.raises(ModelError, match="classes, templates, width"):
        class_vectors(torch.randn(3, 4))
    with pytest.raises(ModelError, match="do not fit"):
        cache_logits(torch.randn(2, 3), torch.randn(4, 5), torch.randn(4, 2), alpha=1.0, beta=1.0)


# ---- heads ----------------------------------------------------------------------------------


def test_a_text_head_only_sees_directions():
    rng = torch.Generator().manual_seed(0)
    head = TextHead(F.normalize(torch.randn(5, 8, generator=rng), dim=-1))
    features = torch.randn(7, 8, generator=rng)
    torch.testing.assert_close(head(features), head(3.0 * features))
    expected = 100 * F.cosine_similarity(features[:, None], head.matrix[None], dim=-1)
    torch.testing.assert_close(head(features), expected)
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["matrix"]


@pytest.mark.parametrize(("kind", "scale"), [("unit", 1 / 0.007), ("free", 100.0)])
def test_the_background_is_learnt_and_last(kind, scale):
    rng = torch.Generator().manual_seed(0)
    head = TextHead(
        torch.randn(4, 6, generator=rng), kind, scale, learn_scale=kind == "free", generator=rng
    )
    features = torch.randn(3, 6, generator=rng)
    with torch.no_grad():
        head.background.mul_(3.0)
    logits = head(features)
    assert logits.shape == (3, 5)
    vector = head.background if kind == "free" else F.normalize(head.background, dim=-1)
    expected = scale * F.normalize(features, dim=-1) @ vector.T
    torch.testing.assert_close(logits[:, 4:], expected)
    logits.sum().backward()
    assert head.background.grad.any()
    assert (head.log_scale is not None) == (kind == "free")
    if kind == "free":
        assert head.log_scale.item() == pytest.approx(math.log(100))
        assert head.log_scale.grad.any()


def test_classes_may_be_left_out_and_exchanged():
    head = TextHead(torch.eye(4), "unit", 1.0)
    logits = head(torch.ones(2, 4), torch.tensor([True, True, False, False]))
    assert torch.isinf(logits[:, 2:4]).all()
    assert torch.isfinite(logits[:, [0, 1, 4]]).all()
    assert (logits.softmax(-1)[:, 2:4] == 0).all()
    head.swap(torch.eye(4)[:2])
    assert head(torch.ones(2, 4)).shape == (2, 3)
    assert head.classes == 2
    with pytest.raises(ModelError, match="width must be the same"):
        head.swap(torch.eye(5))


def test_the_classifier_of_oadp(golden):
    g = golden("oadp").case("classifier")
    e, text, bg = (torch.as_tensor(g[k]) for k in ("e", "text", "bg"))
    base = torch.arange(len(text)) < int(g["n_base"])
    for when, allowed in (("train", base), ("test", None)):
        tau = float(g[f"tau_{when}"])
        head = TextHead(text, "unit", 1 / tau, normalise=False)
        with torch.no_grad():
            head.background.copy_(bg)
        near(head(e, allowed).softmax(-1), g[f"prob_{when}"], 1e-9)


def test_language_aware_heads(golden):
    vectors = golden("dho")
    embeddings = torch.as_tensor(vectors.case("text_classifier")["embeddings"]).double()
    weight = class_vectors(embeddings, "none")
    for name in ("language_heads", "language_heads_bias"):
        g = vectors.case(name)
        z = torch.as_tensor(vectors.case("language_heads")["z"]).double()
        head = CosineHead((weight.shape[1], weight.shape[0])).double()
        with torch.no_grad():
            head.net.weight.copy_(weight)
            bias = torch.as_tensor(g["bias"]).double() if "bias" in g else torch.zeros(len(weight))
            head.net.bias.copy_(bias)
        near(F.linear(z, head.net.weight, head.net.bias), g["ce"], 1e-6)
        near(head(z), g["kd"], 1e-6)
        # Property 8: blind to the length of the features.
        torch.testing.assert_close(head(5.0 * z), head(z))


def test_a_cosine_head_of_class_vectors_answers_as_the_zero_shot_classifier():
    """Property 7."""
    rng = torch.Generator().manual_seed(0)
    weights = F.normalize(torch.randn(6, 10, generator=rng), dim=-1)
    z = weights.repeat(3, 1) + 0.3 * torch.randn(18, 10, generator=rng)
    head = CosineHead((10, 6))
    with torch.no_grad():
        head.net.weight.copy_(weights)
        head.net.bias.zero_()
    zero_shot = TextHead(weights)(z)
    assert torch.equal(head(z).argmax(-1), zero_shot.argmax(-1))
    torch.testing.assert_close(head(z), zero_shot)


def test_bad_heads_are_told():
    with pytest.raises(ModelError, match="above 0"):
        CosineHead((3, 2), 0.0)
    with pytest.raises(ModelError, match="classes, width"):
        TextHead(torch.randn(3))
    with pytest.raises(ModelError, match="width 6"):
        TextHead(torch.randn(3, 6))(torch.randn(2, 5))
    with pytest.raises(RecipeError, match="did you mean 'free'"):
        TextHead(torch.randn(3, 6), "fre")
