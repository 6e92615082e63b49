"""Local Hugging Face models as speakers: a causal language model that chats, an encoder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.clock import seed_of
from stillhouse.errors import MissingExtra, ModelError
from stillhouse.teacher import Reply, Request


class LocalSpeaker:
    """A causal language model with its chat template, in this process.

    Answers are a function of (request, draw): greedy at temperature 0, else sampled with a
    generator seeded by the request's key.

    Args:
        model: a causal language model: `model(input_ids, past_key_values=..., use_cache=True)`
            returns `logits` and `past_key_values`.
        tokenizer: its tokenizer; a chat template is used when it has one.
        name: enters the fingerprint.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "local") -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fingerprint = f"local:{name}"
        self._ends = _end_ids(model, tokenizer)

    @classmethod
    def load(cls, path: str, *, device: str = "cpu") -> LocalSpeaker:
        """Load a model folder or hub id; a folder with one GGUF file is read from that.

        Raises:
            MissingExtra: transformers (or gguf, for a GGUF file) is not installed.
            ModelError: it cannot be loaded.
        """
        transformers = _transformers()
        path = _place(path)
        extra = _gguf(path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **extra)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, **extra
            )
        except ImportError as error:
            raise MissingExtra("gguf", "language", f"to read {path}: {error}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load a causal language model from {path}: {error}") from error
        return cls(model.to(device), tokenizer, name=path)

    async def ask(self, request: Request, draw: int = 0) -> Reply:
        """Answer in a thread; calls one after another."""
        return await asyncio.to_thread(self.answer, request, draw)

    @torch.no_grad()
    def answer(self, request: Request, draw: int = 0) -> Reply:
        """Answer a chat request.

        Args:
            request: `temperature`, `top_p`, `max_tokens` and `logprobs` are honoured.
            draw: another draw is another sample.
        """
        start = time.perf_counter()
        prompt = self._prompt(request.messages).to(self.model.device)  # (1, L)
        rng = torch.Generator().manual_seed(seed_of(request.key(draw)))
        ids: list[int] = []
        told: list[dict[str, Any]] = []
        past, step, reason = None, prompt, "length"
        while len(ids) < request.max_tokens:
            out = self.model(input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[0, -1].float().cpu()  # (V,)
            chosen = _sample(logits, request.temperature, request.top_p, rng)
            if chosen in self._ends:
                reason = "stop"
                break
            ids.append(chosen)
            if request.logprobs is not None:
                told.append(self._told(logits, chosen, request.logprobs))
            step = torch.tensor([[chosen]], device=prompt.device)
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Reply(
            text=text,
            finish_reason=reason,
            logprobs=told if request.logprobs is not None else None,
            usage={"prompt_tokens": prompt.shape[1], "completion_tokens": len(ids)},
            latency=time.perf_counter() - start,
        )

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        turns = [dict(message) for message in messages]
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            ids = self.tokenizer(text + "\nassistant:").input_ids
        return torch.tensor([ids])

    def _told(self, logits: Tensor, chosen: int, count: int) -> dict[str, Any]:
        """Log-probabilities of one token in the form of the API."""
        logp = logits.log_softmax(-1)
        top = logp.topk(min(count, len(logp))) if count else None
        best = zip(top.values.tolist(), top.indices.tolist()) if top is not None else ()
        return {
            "token": self.tokenizer.decode([chosen]),
            "logprob": float(logp[chosen]),
            "top_logprobs": [
                {"token": self.tokenizer.decode([i]), "logprob": value} for value, i in best
            ],
        }


def _sample(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    chance = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = chance.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        chance[places[outside]] = 0.0
    return int(torch.multinomial(chance, 1, generator=rng))


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = set(named) if isinstance(named, list) else {named}
    return frozenset(i for i in ends | {tokenizer.eos_token_id} if i is not None)


class LocalEncoder:
    """A sentence encoder: mean of the last hidden states over real tokens, unit length.

    Args:
        model: gives `last_hidden_state` (B, L, D).
        tokenizer: its tokenizer.
        normalise: scale vectors to unit length.
    """

    def __init__(self, model: Any, tokenizer: Any, *, normalise: bool = True) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.normalise = normalise

    @classmethod
    def load(cls, path: str, *, device: str = "cpu") -> LocalEncoder:
        """Load an encoder folder or hub id.

        Raises:
            MissingExtra: transformers is not installed.
            ModelError: it cannot be loaded.
        """
        transformers = _transformers()
        path = _place(path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load an encoder from {path}: {error}") from error
        return cls(model.to(device), tokenizer)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch: int = 32) -> Tensor:
        """Vectors of texts: (N, D) float32 on the CPU, in order."""
        parts = [self._part(texts[i : i + batch]) for i in range(0, len(texts), batch)]
        return torch.cat(parts)

    def _part(self, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=512, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(**inputs).last_hidden_state.float()  # (B, L, D)
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        return (torch.nn.functional.normalize(mean, dim=-1) if self.normalise else mean).cpu()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "language", "to load a text model") from error
    return transformers


def _place(name: str) -> str:
    """A folder as it stands; else the model of that hub id on this machine, else the id."""
    from stillhouse.models.loading import find_folder

    return name if Path(name).is_dir() else str(find_folder(name) or name)


def _gguf(path: str) -> dict[str, str]:
    """The argument that makes transformers read the folder's only GGUF file."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return {}
    found = sorted(folder.glob("*.gguf"))
    return {"gguf_file": found[0].name} if len(found) == 1 else {}
