from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.models.causal_lm import CausalLM, LanguageNet
from stillhouse.parts.text_sampler import TextSampler, drawn
from stillhouse.parts.token_rows import joined, moved_right, padded

transformers = pytest.importorskip("transformers")
VOCABULARY, END = 50, 2


def model(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _model(kind)
        for parameter in made.parameters():  # sharp answers, of which greedy search has no ties
            if parameter.ndim > 1:
                parameter.data.mul_(4)
    return made


def _model(kind: str) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": END, "eos_token_id": END}
    if kind == "own":
        return CausalLM(VOCABULARY, layers=2, width=32, heads=2, length=64, end=END)
    if kind == "gpt2":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    elif kind == "llama":
        own = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        }
    else:
        own = {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        }
    config = transformers.AutoConfig.for_model(kind, **sizes, **own)
    return transformers.AutoModelForCausalLM.from_config(config)


def rows(width: int = 0, padding: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    made = [torch.randint(3, VOCABULARY, (n,), generator=rng) for n in (3, 9, 5, 1)]
    return padded(made, left=True, width=width, padding=padding)


KINDS = ["own", "gpt2", "llama", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_padding_nor_on_its_neighbours(kind: str) -> None:
    net = LanguageNet(model(kind))
    chance = torch.rand(4, 12, generator=torch.Generator().manual_seed(3))
    sample = TextSampler(12, end=END)
    ids, mask = sample(net, *rows(), chance)
    again, mask_again = sample(net, *rows(width=15, padding=7), chance)
    assert torch.equal(ids, again)
    assert torch.equal(mask, mask_again)
    tokens, there = rows()
    for row in range(4):
        one, said = sample(net, *moved(tokens, there, row), chance[row : row + 1])
        assert one[0][said[0]].tolist() == ids[row][mask[row]].tolist()


def moved(tokens: Tensor, mask: Tensor, row: int) -> tuple[Tensor, Tensor]:
    kept = tokens[row][mask[row]][None]
    return kept, torch.ones_like(kept).bool()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_one_pass(kind: str) -> None:
    net = LanguageNet(model(kind)).eval()
    tokens, mask = rows()
    ids, said = TextSampler(12, end=END, temperature=0)(net, tokens, mask)
    made = joined(tokens, mask, ids, said)
    with torch.no_grad():
        logits = net(made["tokens"])["logits"]
        masked = net({k: made[k] for k in ("tokens", "attention_mask")})["logits"]
        left = net({"tokens": tokens, "attention_mask": mask})["logits"]
        right, there = moved_right(tokens, mask)
        assert torch.allclose(net(right)["logits"][there], left[mask], atol=1e-5)
        projected = net.head_layer()(net.hidden(made["tokens"]))
    assert torch.allclose(logits[made["attention_mask"]], masked[made["attention_mask"]], atol=1e-5)
    assert torch.allclose(projected, logits, atol=1e-5)
    at = torch.cat([made["response_mask"][:, 1:], torch.zeros(4, 1).bool()], 1)
    assert logits.argmax(-1)[at].tolist() == made["tokens"][made["response_mask"]].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_greedy_is_that_of_transformers(kind: str) -> None:
    module = model(kind).eval()
    tokens, mask = rows()
    ids, said = TextSampler(12, end=END, temperature=0)(module, tokens, mask)
    theirs = module.generate(  # type: ignore[operator]
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
    )[:, tokens.shape[1] :]
    assert torch.equal(ids, theirs)
    assert ids[~said].eq(0).all()


def test_modes_and_settings_come_back_also_after_an_error() -> None:
    module = model("gpt2").train()
    module.transformer.h[0].eval()  # type: ignore[union-attr, index, operator]
    module.config.use_cache = False  # type: ignore[union-attr]
    modes = [m.training for m in module.modules()]
    before = torch.random.get_rng_state()
    sample = TextSampler(4, end=END)
    ids, _ = sample(LanguageNet(module), *rows(), torch.Generator().manual_seed(0))
    assert not ids.requires_grad
    assert [m.training for m in module.modules()] == modes
    assert module.config.use_cache is False  # type: ignore[union-attr]
    assert torch.equal(before, torch.random.get_rng_state())

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    module.forward = failing  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="memory"):
        sample(module, *rows(), torch.Generator().manual_seed(0))
    assert [m.training for m in module.modules()] == modes
    assert module.config.use_cache is False  # type: ignore[union-attr]


def test_a_generator_is_all_the_chance_there_is() -> None:
    net = LanguageNet(model("own"))
    sample = TextSampler(8, end=END)
    first, again, other = (
        sample(net, *rows(), torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_rows_end_with_their_end_token() -> None:
    net = LanguageNet(model("own"))
    net.module.lm_head.weight.data[END] *= 0  # type: ignore[union-attr, operator, index]
    tokens, mask = rows()
    ids, said = TextSampler(10, end=range(2, 20), padding=9)(
        net, tokens, mask, torch.Generator().manual_seed(0)
    )
    for row, kept in zip(ids, said, strict=True):
        length = int(kept.sum())
        assert bool(kept[:length].all())
        own = row[:length].tolist()
        assert all(token >= 20 for token in own[:-1])
        assert own[-1] < 20 or length == 10
        assert row[length:].eq(9).all()
    assert int(said.sum(1).min()) < ids.shape[1]  # at least one has ended before the longest


class Fixed(nn.Module):
    """Whatever is asked, the same distribution."""

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.p = torch.tensor(p)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any, use_cache: bool
    ) -> dict[str, Any]:
        return {
            "logits": self.p.log().expand(*input_ids.shape, len(self.p)),
            "past_key_values": None,
        }


P = [0.5, 0.25, 0.15, 0.1, 0.0]


def shares(**settings: Any) -> Tensor:
    sample = TextSampler(1, end=4, **settings)
    ones = torch.ones(20_000, 1, dtype=torch.int64)
    ids, _ = sample(Fixed(P), ones, ones.bool(), torch.Generator().manual_seed(0))
    return torch.bincount(ids[:, 0], minlength=5) / len(ids)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.5}, [1.0, 0, 0, 0, 0]),
        ({"top_p": 0.85, "top_k": 3}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345, 0]),
    ],
)
def test_what_is_drawn_from(settings: dict[str, Any], expected: list[float]) -> None:
    assert torch.allclose(shares(**settings), torch.tensor(expected), atol=0.012)


def test_the_ends_of_the_distribution() -> None:
    p = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    least, most = torch.zeros(1), torch.tensor([1.0 - 2.0**-24])
    assert drawn(p, least).tolist() == [1]
    assert drawn(p, most).tolist() == [2]
    assert drawn(torch.full((1, 1000), 1e-9), most).tolist() == [999]


def test_the_context_is_a_limit() -> None:
    net = LanguageNet(CausalLM(VOCABULARY, layers=1, width=8, heads=1, length=12, end=END))
    ids, _ = TextSampler(30, end=-1, temperature=0)(net, *rows())
    assert ids.shape[1] == 3
    long = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(ModelError, match="context 12"):
        TextSampler(3, end=END, temperature=0)(net, long, long.bool())


def test_what_cannot_be_is_refused() -> None:
    net = LanguageNet(model("own"))
    tokens, mask = rows()
    for settings in ({"top_p": 0.0}, {"top_k": -1}, {"temperature": -1.0}):
        with pytest.raises(RecipeError, match="sampling needs"):
            TextSampler(3, end=END, **settings)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="generator"):
        TextSampler(3, end=END)(net, tokens, mask)
    with pytest.raises(ModelError, match="padded on the left"):
        TextSampler(3, end=END, temperature=0)(net, *moved_right(tokens, mask))
    with pytest.raises(ModelError, match="uniform numbers"):
        TextSampler(3, end=END)(net, tokens, mask, torch.rand(4, 2))
