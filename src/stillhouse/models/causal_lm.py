"""Causal language models: a small one from scratch, and the one way to call any of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, ModelError, nearest
from stillhouse.net import Net, in_eval_mode
from stillhouse.parts.text_sampler import cache_name, takes
from stillhouse.parts.text_tokens import TextTokens, load_tokenizer

_NUMBERS = itertools.count()


class CausalLM(nn.Module):
    """A GPT-2 of any size with fresh weights (Radford et al. 2019).

    Its state has the names of transformers' `GPT2LMHeadModel`, so that an artifact of it is
    opened by `AutoModelForCausalLM.from_pretrained` too.

    Args:
        vocabulary: number of token ids.
        layers: of the Transformer.
        width: of the hidden states.
        heads: of the attention; they divide `width`. None: one for every 32 of the width.
        length: most tokens of a row, the model's context.
        dropout: of embeddings and residual branches, in [0, 1).
        end: id that ends a text.

    Attributes:
        config: of transformers.

    Raises:
        ModelError: a setting out of range.
        MissingExtra: transformers is not installed.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int = 4,
        width: int = 192,
        heads: int | None = None,
        length: int = 256,
        dropout: float = 0.1,
        end: int | None = None,
    ) -> None:
        super().__init__()
        if heads is None:
            heads = max(1, width // 32)
        if min(vocabulary, layers, width, heads, length) < 1 or width % heads:
            raise ModelError(
                "a causal language model needs positive sizes, and heads that divide the width; "
                f"got vocabulary {vocabulary}, layers {layers}, width {width}, heads {heads}, "
                f"length {length}"
            )
        transformers = _transformers()
        self.config = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=0.0,  # else the fused attention is not taken
            activation_function="gelu_pytorch_tanh",  # GPT-2's own function, computed in one pass
            bos_token_id=end,
            eos_token_id=end,
            # Left out: rows are padded on the right, where no mask is needed and none is missed.
            pad_token_id=None,
        )
        self.config.architectures = ["GPT2LMHeadModel"]
        made = transformers.GPT2LMHeadModel(self.config)
        self.transformer: Any = made.transformer
        self._cache = cache_name(made)
        self.lm_head: nn.Linear = made.lm_head
        # Input and output embedding are one tensor, also after a deep copy or a move.
        self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> dict[str, Any]:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, all so far), True or 1 for what is no padding.
            position_ids: (B, L).
            past_key_values: of an earlier call with `use_cache`.
            use_cache: give keys and values back.
            logits_to_keep: of the last so many positions only; 0 for all.

        Returns:
            "logits" (B, L, V), and "past_key_values" with `use_cache`.
        """
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{self._cache: past_key_values},
        )
        hidden = out.last_hidden_state  # (B, L, D)
        found = {"logits": self.lm_head(hidden[:, -logits_to_keep:])}
        if use_cache:
            found["past_key_values"] = out[self._cache]
        return found

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def as_transformers(self) -> nn.Module:
        """The same model as one of transformers, with the same tensors."""
        made: nn.Module = _transformers().GPT2LMHeadModel(self.config)
        made.load_state_dict(self.state_dict(), assign=True)
        return made.train(self.training)


# As recipes call it.
causal_lm = CausalLM


class Vocabulary:
    """How many ids the models of a run share; one object for all of their nets.

    Heads are often padded beyond their tokenizer, differently within one family. What all have
    is the smallest, and every net answers about that many.

    Args:
        size: number of ids of the tokenizer.
    """

    def __init__(self, size: int) -> None:
        self._whole, self._of = size, dict[Hashable, int]()

    def __deepcopy__(self, memo: Any) -> Vocabulary:
        return self

    @property
    def size(self) -> int:
        """Number of ids that all models have."""
        return min(self._whole, *self._of.values()) if self._of else self._whole

    def narrow(self, size: int, who: Hashable = None) -> None:
        """A model has only so many."""
        self._of[who] = min(size, self._of.get(who, size))

    def forget(self, who: Hashable) -> None:
        """A model is none of them: it has a vocabulary of its own."""
        self._of.pop(who, None)


class LanguageNet(Net):
    """A causal language model that is called on rows of tokens.

    A tensor (B, L) is a batch padded on the right: what a token sees is before it, so nothing
    need be masked. A mapping may bring `attention_mask` and other arguments; of rows padded on
    the left, positions count from the first token that is none.

    Args:
        module: of transformers, or called alike: gives `logits` (B, L, V).
        shared: ids that all models of the run have; logits of others are left out. None: all.
        taps: see `Net`.

    Attributes:
        view: "tokens", unless the module says otherwise.
        tokens: what the model was trained on, where it comes with that.
        apart: it reads text by `tokens` and shares no ids with the models of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Vocabulary | None = None,
        taps: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(module, answer="logits", taps=taps)
        self.view = str(getattr(module, "reads", "tokens"))
        self.tokens: TextTokens | None = None
        self.apart = False
        self._number = next(_NUMBERS)
        self._shared: Vocabulary | None = None
        self._plain_head = False
        if shared is not None:
            self.share(shared)

    def share(self, vocabulary: Vocabulary) -> None:
        """Answer about the ids that the models of a run share, of which this is one."""
        self._shared = vocabulary
        size = head_size(self.module)
        if size is not None:
            vocabulary.narrow(size, self._number)

    def set_apart(self, tokens: TextTokens) -> None:
        """Read text by a tokenizer of its own, whatever the ids of the run's models are.

        Args:
            tokens: that of the model.
        """
        if self._shared is not None:
            self._shared.forget(self._number)
        self.tokens, self.apart = tokens, True
        self.share(Vocabulary(tokens.size))

    def reader(self, template: str | None = None) -> TextTokens | None:
        """How the model reads text: as it was trained, or by the tokenizer beside its weights.

        Args:
            template: of prompts, see `TextTokens`; None: as it was trained, or the prompt and a
                new line.

        Returns:
            None where the model comes with neither.
        """
        place = getattr(self.module, "tokenizer_at", None)
        if self.tokens is not None:
            told = self.tokens
            if template is None:
                return told
            return TextTokens(told.tokenizer, template=template, name=told.name)
        if place is None:
            return None
        form = "{prompt}\n" if template is None else template
        return TextTokens(load_tokenizer(str(place)), template=form, name=str(place))

    @property
    def vocabulary(self) -> int | None:
        """Number of ids that are answered about; None for as many as the module gives."""
        return None if self._shared is None else self._shared.size

    def _call(self, view: Any) -> Any:
        if isinstance(view, Tensor):
            # Models of transformers warn of rows that begin or end with padding without a mask.
            whole = (
                {}
                if isinstance(self.module, CausalLM)
                else {"attention_mask": torch.ones_like(view)}
            )
            out = self.module(input_ids=view, use_cache=False, **whole)
        else:
            out = self.module(**self._arguments(view))
        return self._sliced(out)

    def _arguments(self, view: Mapping[str, Any]) -> dict[str, Any]:
        given = {("input_ids" if k == "tokens" else k): v for k, v in view.items()}
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = mask.long()
            if "position_ids" not in given and takes(self.module, "position_ids"):
                given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        given.setdefault("use_cache", False)
        return given

    def _sliced(self, out: Any) -> Any:
        size = self.vocabulary
        if size is None or not isinstance(out, Mapping) or out["logits"].shape[-1] <= size:
            return out
        return {**out, "logits": out["logits"][..., :size]}

    def head_layer(self) -> nn.Linear:
        """The layer that turns hidden states into logits."""
        found = getattr(self.module, "get_output_embeddings", lambda: None)()
        return found if isinstance(found, nn.Linear) else super().head_layer()

    def hidden(self, view: Any) -> Tensor:
        """What the head takes, (B, L, D): for losses that project some tokens at a time.

        With `head_layer` and `losses.chunked.chunked` no tensor of the vocabulary's size is held.

        Raises:
            ModelError: the model does more between hidden states and logits than its head does.
        """
        given = self._arguments({"input_ids": view} if isinstance(view, Tensor) else view)
        if not self._plain_head:
            self._check_head(given)
        return self._states(given)

    def _states(self, given: Mapping[str, Any]) -> Tensor:
        whole: Any = getattr(self.module, "get_base_model", lambda: self.module)()
        body = whole.transformer if isinstance(whole, CausalLM) else whole.base_model
        found: Tensor = body(**given)["last_hidden_state"]
        return found

    def _check_head(self, given: Mapping[str, Any]) -> None:
        one: dict[str, Any] = {k: v[:1] if isinstance(v, Tensor) else v for k, v in given.items()}
        with in_eval_mode(self), torch.no_grad():
            wanted = self.module(**one)["logits"]
            found = self.head_layer()(self._states(one))
        if wanted.shape != found.shape or not torch.allclose(wanted, found, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(self.module).__name__} does more between hidden states and logits than its "
                "head does (a scale, a soft cap): losses in pieces do not fit it; take its logits"
            )
        self._plain_head = True


def head_size(module: nn.Module) -> int | None:
    """Number of logits of a causal language model, where it says so."""
    layer = getattr(module, "get_output_embeddings", lambda: None)()
    if isinstance(layer, nn.Linear):
        return int(layer.weight.shape[0])
    found = getattr(getattr(module, "config", None), "vocab_size", None)
    return int(found) if isinstance(found, int) else None


# Options of models of transformers -----------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen weights (Hu et al. 2022), by PEFT.

    Attributes:
        r: rank.
        alpha: the adapters' output is multiplied by alpha / r.
        targets: names of the linear layers that get one; None for PEFT's own choice for the
            kind of model.
        dropout: of the adapters' input.
    """

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0


def config_options(model: str, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with `layers` said in the configuration's own terms.

    Args:
        model: for messages.
        config: of the whole model.
        options: `layers`, the first so many of the model; others are left as they are.

    Raises:
        ModelError: the model has not so many layers.
    """
    found = dict(options)
    wanted = found.pop("layers", None)
    if wanted is None:
        return found
    there = getattr(config, "num_hidden_layers", None)
    if there is None:
        raise ModelError(f"{model} does not say how many layers it has: leave out layers")
    if not isinstance(wanted, int) or not 1 <= wanted <= there:
        raise ModelError(f"{model} has {there} layers; layers: {wanted} is no number up to that")
    found["num_hidden_layers"] = wanted
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        found["layer_types"] = list(kinds)[:wanted]
    return found


def data_options(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the data says of a model with fresh weights: its vocabulary and end token."""
    end = about.get("facts", {}).get("end")
    if "vocabulary" not in about or end is None:
        return {}
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    return {"vocab_size": about["vocabulary"], **ids}


def arranged(
    module: nn.Module, model: str, *, lora: Any = None, dtype: str | None = None
) -> nn.Module:
    """A model of transformers in another number format, and with adapters.

    Args:
        module: as loaded.
        model: for messages.
        lora: fields of `LoRA`; only the adapters are trained then, and what is exported is the
            model with them merged in.
        dtype: float32, bfloat16 or float16.

    Raises:
        ModelError: an unknown number format or field, or no layer of these names.
        MissingExtra: peft is not installed.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise ModelError(f"{model}: no dtype is called '{dtype}'{nearest(str(dtype), DTYPES)}")
        module.to(DTYPES[dtype])
    return module if lora is None else _with_adapters(module, model, _lora(model, lora))


def _lora(model: str, given: Any) -> LoRA:
    names = [field.name for field in fields(LoRA)]
    told = dict(given) if isinstance(given, Mapping) else {"": given}
    unknown = [key for key in told if key not in names]
    if unknown:
        raise ModelError(
            f"{model}: lora takes {', '.join(names)}, not '{unknown[0] or given}'"
            f"{nearest(str(unknown[0]), names)}"
        )
    targets = told.get("targets")
    if targets is not None:
        told["targets"] = (targets,) if isinstance(targets, str) else tuple(map(str, targets))
    made = LoRA(**told)
    if made.r < 1 or made.alpha <= 0 or not 0 <= made.dropout < 1:
        raise ModelError(f"{model}: lora needs r >= 1, alpha > 0 and dropout in [0, 1): {made}")
    return made


def _with_adapters(module: nn.Module, model: str, lora: LoRA) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "language", "for adapters (lora)") from error
    crosswise = any(type(m).__name__ == "Conv1D" for m in module.modules())  # GPT-2's layers
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=None if lora.targets is None else list(lora.targets),
        fan_in_fan_out=crosswise,
    )
    place = getattr(module, "tokenizer_at", None)
    try:
        made: Any = peft.get_peft_model(module, config)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2]
            for name, m in module.named_modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        }
        raise ModelError(
            f"{model}: no adapter can be placed with lora.targets {lora.targets}; its layers are "
            f"called {', '.join(sorted(linear))}"
        ) from error
    made.tokenizer_at = place
    made.training_options = ("lora",)
    made.train()
    return made  # type: ignore[no-any-return]


def merged(module: nn.Module) -> nn.Module:
    """The model with its adapters added to the weights, as a copy; itself without any."""
    if not hasattr(module, "merge_and_unload"):
        return module
    copied: Any = copy.deepcopy(module)
    plain: nn.Module = copied.merge_and_unload()
    plain.requires_grad_(True)
    return plain


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "language", "for causal language models") from error
    return transformers
