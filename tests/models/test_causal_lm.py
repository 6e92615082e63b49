from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.losses.chunked import chunked
from stillhouse.losses.logits import kl
from stillhouse.models.causal_lm import CausalLM, LanguageNet, Vocabulary, merged
from stillhouse.models.loading import load_model

transformers = pytest.importorskip("transformers")
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ROWS = torch.tensor([[5, 6, 7, 8], [9, 5, 4, 1]])
ABOUT = {
    "vocabulary": 40,
    "facts": {"end": 1, "padding": 0},
    "tokenizer": {"name": "words"},
    "input": {"length": 24},
}


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**LLAMA, **changes})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = LanguageNet(module).eval()(ROWS)["logits"]
    return found


def test_a_gpt2_of_any_size_fills_itself_in_from_the_data() -> None:
    module = load_model("stillhouse:causal_lm", options={"layers": 2, "width": 32}, about=ABOUT)
    assert isinstance(module, CausalLM)
    assert (module.config.vocab_size, module.config.n_positions) == (40, 24)
    assert (module.config.n_layer, module.config.n_embd, module.config.n_head) == (2, 32, 1)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert logits(module).shape == (2, 4, 40)
    with pytest.raises(ModelError, match="divide the width"):
        CausalLM(40, width=30, heads=4)


def test_its_state_is_that_of_transformers() -> None:
    module = CausalLM(40, layers=2, width=32, length=24, end=1)
    theirs = transformers.GPT2LMHeadModel(module.config)
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(logits(theirs), logits(module))


def test_the_teacher_sheet_has_two_million_parameters() -> None:
    module = CausalLM(1100, layers=4, width=192, length=96)
    assert 1.9e6 < sum(p.numel() for p in module.parameters()) < 2.2e6


def test_the_first_layers_of_a_pretrained_model(tmp_path: Path) -> None:
    place = folder_of(tmp_path)
    whole = load_model(f"hf:{place}", options={"task": "causal-lm"}, weights="pretrained")
    cut = load_model(f"hf:{place}", options={"layers": 2}, weights="pretrained", about=ABOUT)
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 2
    for name, value in cut.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
    whole.model.layers = whole.model.layers[:2]
    whole.config.num_hidden_layers = 2
    assert torch.equal(logits(cut), logits(whole))
    for wrong in (0, 4, "two"):
        with pytest.raises(ModelError, match="has 3 layers"):
            load_model(f"hf:{place}", options={"layers": wrong}, weights="pretrained", about=ABOUT)
    with pytest.raises(ModelError, match="did you mean 'layers'"):
        load_model(f"hf:{place}", options={"layer": 2}, weights="pretrained", about=ABOUT)


def test_models_whose_layers_are_of_kinds_are_cut_too(tmp_path: Path) -> None:
    sizes = {k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=3, layer_types=kinds, **window)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    cut = load_model(
        f"hf:{tmp_path / 'qwen'}", options={"layers": 2}, weights="pretrained", about=ABOUT
    )
    assert cut.config.layer_types == kinds[:2]
    assert logits(cut).shape == (2, 4, 40)


def test_fresh_models_take_the_datas_vocabulary() -> None:
    sizes = {k: v for k, v in LLAMA.items() if k not in {"vocab_size", "bos_token_id"}}
    module = load_model("hf:llama", options=sizes, about=ABOUT)
    assert module.config.vocab_size == 40
    assert module.config.eos_token_id == 1
    assert type(module).__name__ == "LlamaForCausalLM"


def test_number_formats(tmp_path: Path) -> None:
    place = f"hf:{folder_of(tmp_path)}"
    half = load_model(place, options={"dtype": "bfloat16"}, weights="pretrained", about=ABOUT)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert logits(half).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        load_model(place, options={"dtype": "bfloat"}, weights="pretrained", about=ABOUT)


def adapted(tmp_path: Path, **lora: Any) -> nn.Module:
    pytest.importorskip("peft")
    place = f"hf:{folder_of(tmp_path)}"
    return load_model(place, options={"lora": lora}, weights="pretrained", about=ABOUT)


def test_only_adapters_are_trained_and_merging_keeps_the_answers(tmp_path: Path) -> None:
    module = adapted(tmp_path, r=2, alpha=4, targets=["q_proj", "v_proj"])
    plain = load_model(
        f"hf:{folder_of(tmp_path)}", options={"task": "causal-lm"}, weights="pretrained"
    )
    assert torch.equal(logits(module), logits(plain))  # a fresh adapter adds nothing
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 3 * 2 * 2
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in module.named_parameters():
            if name in trained:
                nn.init.normal_(parameter, std=0.5)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    made = merged(module)
    assert set(made.state_dict()) == set(plain.state_dict())
    assert torch.allclose(logits(made), logits(module), atol=1e-5)
    assert not torch.allclose(logits(made), logits(plain), atol=1e-2)
    assert all(p.requires_grad for p in made.parameters())
    # The module that was trained is as it was: a run may go on with it.
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert merged(plain) is plain


def test_bad_adapters_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="q_proj"):
        adapted(tmp_path, targets=["query"])
    with pytest.raises(ModelError, match="did you mean 'targets'"):
        adapted(tmp_path, target=["q_proj"])
    with pytest.raises(ModelError, match="r >= 1"):
        adapted(tmp_path, r=0)


def test_padded_heads_are_answered_about_in_common() -> None:
    shared = Vocabulary(38)
    teacher = LanguageNet(CausalLM(48, layers=1, width=8, heads=1), shared=shared)
    assert teacher(ROWS)["logits"].shape[-1] == 38
    student = LanguageNet(CausalLM(36, layers=1, width=8, heads=1), shared=shared)
    assert student(ROWS)["logits"].shape == teacher(ROWS)["logits"].shape == (2, 4, 36)
    whole = teacher.module(ROWS)["logits"]
    assert torch.equal(teacher.eval()(ROWS)["logits"], teacher.module(ROWS)["logits"][..., :36])
    assert whole.shape[-1] == 48


@pytest.mark.parametrize("kind", ["own", "llama", "lora"])
def test_losses_in_pieces_are_those_of_all_logits(tmp_path: Path, kind: str) -> None:
    if kind == "own":
        module: nn.Module = CausalLM(40, layers=1, width=16, heads=2, dropout=0.0)
    elif kind == "llama":
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    else:
        module = adapted(tmp_path, r=2)
    net = LanguageNet(module)
    other = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    dense = kl(net(ROWS)["logits"], other, mask=mask)
    dense.backward()
    wanted = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    pieces = chunked(
        lambda z, t: kl(z, t, reduction="none"),
        net.hidden(ROWS),
        net.head_layer(),
        other,
        mask=mask,
        chunk_size=2,
    )
    pieces.backward()
    assert float(pieces.detach()) == pytest.approx(float(dense.detach()), rel=1e-5)
    for name, parameter in net.named_parameters():
        if name in wanted:
            assert torch.allclose(parameter.grad, wanted[name], atol=1e-6), name


def test_a_model_that_scales_its_logits_is_refused_in_pieces() -> None:
    class Scaled(transformers.LlamaForCausalLM):  # type: ignore[name-defined, misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 30
            return out

    with pytest.raises(ModelError, match="in pieces do not fit"):
        LanguageNet(Scaled(transformers.LlamaConfig(**LLAMA))).hidden(ROWS)
