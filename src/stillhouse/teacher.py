"""Where knowledge comes from: what a teacher is asked, what it answers, who may answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stillhouse.errors import TeacherError, nearest

if TYPE_CHECKING:
    from stillhouse.batch import Batch


class TopK(NamedTuple):
    """The k largest log-probabilities of each row, and the mass that is missing.

    Attributes:
        ids: (..., k) int64 classes.
        logp: (..., k) log-probabilities at `temperature`.
        rest: (...) log of the missing probability mass.
        temperature: at which the probabilities were taken.
        weights: (..., k) importance weights when the classes were sampled, else None.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor
    temperature: float = 1.0
    weights: Tensor | None = None


class Ragged(NamedTuple):
    """Rows of different length: `values[offsets[i]:offsets[i + 1]]` belongs to row i."""

    values: Tensor
    offsets: Tensor


Value = Tensor | TopK | Ragged | list[str]


class Want(NamedTuple):
    """One thing a method asks of a teacher.

    Attributes:
        field: "logits", "embedding", "tap:low", ...
        view: the batch's view it is computed on.
        who: the teacher's role when there are several.
        optional: a teacher that lacks it is accepted.
    """

    field: str
    view: str = "x"
    who: str = "teacher"
    optional: bool = False

    @property
    def key(self) -> str:
        """The name under which the answer is found: `[who.][view:]field`."""
        view = "" if self.view == "x" else f"{self.view}:"
        who = "" if self.who == "teacher" else f"{self.who}."
        return f"{who}{view}{self.field}"

    @property
    def stream(self) -> str:
        """The stream whose rows are asked about ("unlabelled" of "unlabelled/x"), or ""."""
        return self.view.rpartition("/")[0]

    @property
    def within(self) -> Want:
        """The same want as seen from inside its stream."""
        return self._replace(view=self.view.rpartition("/")[2])


class Knowledge(Mapping[str, Value]):
    """What a teacher said about a batch.

    Keys are `[who.][view:]field` such as "logits" or "weak:logits"; taps are keys
    "tap:<alias>" and also found in `tap`.

    Attributes:
        valid: (B,) bool, the teacher has spoken on this row; None when on all.
    """

    none: Knowledge

    def __init__(self, values: Mapping[str, Value], valid: Tensor | None = None) -> None:
        self._values = dict(values)
        self.valid = valid
        self._streams: dict[str, Knowledge] = {}

    @classmethod
    def of_streams(cls, streams: Mapping[str, Knowledge]) -> Knowledge:
        """What was said about each stream of a batch.

        Values are found under `streams` keys ("unlabelled/x:logits") and by `stream`, which
        also says on which rows of the stream the teacher has spoken.
        """
        values = {
            f"{name}/{key if ':' in key else 'x:' + key}": value
            for name, said in streams.items()
            for key, value in said.items()
        }
        joined = cls(values)
        joined._streams = dict(streams)
        return joined

    def stream(self, name: str) -> Knowledge:
        """What the teacher said about one stream, under the keys of a plain batch.

        Raises:
            TeacherError: it was not asked about that stream.
        """
        if name not in self._streams:
            raise TeacherError(
                f"the teacher was not asked about the stream '{name}'{nearest(name, self._streams)}"
            )
        return self._streams[name]

    @property
    def tap(self) -> dict[str, Value]:
        """Tapped values by alias."""
        return {k[4:]: v for k, v in self._values.items() if k.startswith("tap:")}

    def __getitem__(self, key: str) -> Value:
        if key not in self._values:
            raise TeacherError(f"the teacher did not give '{key}'{nearest(key, self._values)}")
        return self._values[key]

    def tensor(self, key: str) -> Tensor:
        """The dense tensor under `key`.

        Raises:
            TeacherError: absent, or stored in a form that is not dense.
        """
        value = self[key]
        if not isinstance(value, Tensor):
            raise TeacherError(
                f"the teacher's '{key}' comes as {type(value).__name__}, where a dense tensor "
                "is needed: capture it with form: dense"
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def narrow(self, start: int, stop: int) -> Knowledge:
        """Rows [start, stop)."""
        if self._streams:
            raise TeacherError("knowledge about streams has no rows of its own: take one of them")
        cut = {k: _narrow(v, start, stop) for k, v in self._values.items()}
        return Knowledge(cut, None if self.valid is None else self.valid[start:stop])


def _narrow(value: Value, start: int, stop: int) -> Value:
    if isinstance(value, TopK):
        weights = None if value.weights is None else value.weights[start:stop]
        return TopK(
            value.ids[start:stop],
            value.logp[start:stop],
            value.rest[start:stop],
            value.temperature,
            weights,
        )
    if isinstance(value, Ragged):
        first, last = int(value.offsets[start]), int(value.offsets[stop])
        return Ragged(value.values[first:last], value.offsets[start : stop + 1] - first)
    return value[start:stop]


Knowledge.none = Knowledge({})


def answered(
    wants: Sequence[Want], batch: Batch, answer: Callable[[Batch, Sequence[Want]], Knowledge]
) -> Knowledge:
    """What a teacher says about a batch, stream by stream where it is one of streams.

    Args:
        wants: views may lie in streams ("unlabelled/x").
        batch: plain, or of streams.
        answer: gives what is wanted of a plain batch; it never hears of streams.
    """
    if not any("/" in want.view for want in wants):
        return answer(batch, wants)
    by_stream: dict[str, list[Want]] = {}
    for want in wants:
        by_stream.setdefault(want.stream, []).append(want.within)
    return Knowledge.of_streams(
        {name: answer(batch.view(name), own) for name, own in by_stream.items()}
    )


class Frozen:
    """A module that is called, but is no one's child: never trained, saved or wrapped.

    It is not an `nn.Module`, so it is invisible to `parameters()`, `state_dict()`, `train()`
    and DDP. Calling it is differentiable in its input.

    Args:
        module: set to eval mode, its parameters without gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; gradients flow to its input."""
        return self.module(*args, **kwargs)

    def quiet(self, *args: Any, **kwargs: Any) -> Any:
        """Call under `no_grad`."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def to(self, device: torch.device | str) -> Frozen:
        """Move the module; the engine does this once."""
        self.module.to(device)
        return self


@runtime_checkable
class Teacher(Protocol):
    """Whatever knowledge comes from: a live module, a store of outputs, a function.

    Attributes:
        provides: capabilities among text logprobs vector scores logits taps fresh
            input_grad weights.
        fingerprint: of weights, preprocessing and settings.
    """

    @property
    def provides(self) -> frozenset[str]:
        """What it can give."""
        ...

    @property
    def fingerprint(self) -> str:
        """What it is."""
        ...

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check at start-up that every want can be met.

        Raises:
            TeacherError: what is missing, and the nearest name.
        """
        ...

    def knowledge(self, batch: Batch) -> Knowledge:
        """Answers for a batch: eval mode, no gradient."""
        ...

    def guest(self) -> Frozen:
        """The module itself, for fresh answers, input gradients or weights."""
        ...


def to_device(teacher: Teacher, device: torch.device) -> None:
    """Move a teacher that lies on a device; a store, a function or an endpoint lies on none."""
    move = getattr(teacher, "to", None)
    if move is not None:
        move(device)


@dataclass(frozen=True)
class Request:
    """One question to a speaker, in the form of a chat completion.

    Attributes:
        messages: role and content of each turn.
        model: the model's name at the endpoint.
        temperature: of sampling, >= 0.
        top_p: nucleus, in (0, 1].
        max_tokens: longest answer.
        seed: asked of the server when given.
        logprobs: number of top log-probabilities to return per token, None for none.
        response_format: as the API defines it.
        extra: further fields sent as they are.
        record: what the request is about; part of the key, not sent.
    """

    messages: tuple[Mapping[str, str], ...]
    model: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    record: str = ""

    def canonical(self) -> dict[str, Any]:
        """The body that is sent, without fields that are not set."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(m) for m in self.messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.logprobs is not None:
            body["logprobs"] = True
            body["top_logprobs"] = self.logprobs
        if self.response_format is not None:
            body["response_format"] = dict(self.response_format)
        body.update(self.extra)
        return body

    def key(self, draw: int = 0) -> str:
        """sha256 of the canonical request, the record it is about, and the draw."""
        text = json.dumps([self.canonical(), self.record, draw], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """One answer of a speaker.

    Attributes:
        text: the answer.
        finish_reason: "stop", "length", "content_filter" ...
        logprobs: per token, as the API gives them.
        usage: token counts.
        raw: the whole reply.
        latency: seconds from sending to receipt.
    """

    text: str
    finish_reason: str = "stop"
    logprobs: Any = None
    usage: Mapping[str, int] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    latency: float = 0.0


class Speaker(Protocol):
    """Anything that answers in text: endpoint, local causal LM, function, replay."""

    @property
    def fingerprint(self) -> str:
        """What it is."""
        ...

    async def ask(self, request: Request, draw: int = 0) -> Reply:
        """The answer to `request`; different draws are different answers."""
        ...
