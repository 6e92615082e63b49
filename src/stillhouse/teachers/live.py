"""A frozen module that is asked anew for every batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.batch import Batch, RowView
from stillhouse.errors import ModelError, TeacherError, nearest
from stillhouse.net import Net, Output
from stillhouse.teacher import Frozen, Knowledge, Value, Want, answered

# Wants that are not a field of the answer, but access to the module itself.
ACCESS = frozenset({"fresh", "input_grad", "weights"})

TAP = "tap:"


class Live:
    """A teacher that is a module: eval mode, no gradient, its weights never touched.

    It is no `nn.Module`, so it is not trained, saved or wrapped with the student. Answers are
    made under `no_grad`; capture and judging put `torch.inference_mode` around the call, which
    training must not (its tensors cannot enter a graph).

    Args:
        net: the teacher's net; frozen in place.
        name: for messages and store headers; the module's class by default.
        rows: most rows of one forward; larger batches are asked in pieces. None: no limit.
        settings: whatever else its answers depend on; part of the fingerprint.

    Attributes:
        net: the frozen net.
        provides: everything a module can give.
    """

    provides = frozenset({"logits", "scores", "vector", "taps", "fresh", "input_grad", "weights"})

    def __init__(
        self,
        net: Net,
        *,
        name: str = "",
        rows: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if rows is not None and rows < 1:
            raise TeacherError(f"a teacher needs at least one row per forward, not {rows}")
        self.net = net
        self.name = name or type(net.module).__name__
        self.rows = rows
        self.settings = dict(settings or {})
        self._guest = Frozen(net)
        self._wants: tuple[Want, ...] = ()
        self._by_view: dict[str, list[tuple[str, Want]]] = {}
        self._hashed: tuple[Any, str] = ((), "")

    # -- identity ----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """A hash of weights, preprocessing and settings; follows the weights if they change."""
        parts = [self._weights(), self.preprocessing, self.net.answer, self.settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def preprocessing(self) -> str:
        """A hash of what the net does to a view before the module sees it."""
        values = [
            None if v is None else v.flatten().tolist() for v in (self.net.mean, self.net.std)
        ]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _weights(self) -> str:
        state = self.net.module.state_dict()
        # hashing a large teacher takes seconds, telling that nothing was written to it does not
        seen = tuple((name, v.data_ptr(), v._version) for name, v in state.items())
        if self._hashed[0] != seen:
            self._hashed = (seen, weights_hash(self.net.module, state))
        return self._hashed[1]

    # -- what is asked -----------------------------------------------------------------------

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check every want by asking once, on a row or two of the task's data.

        Args:
            wants: taps are caught from here on.
            task: its `check` compares class counts; None skips what needs data.

        Raises:
            TeacherError: a field that the net does not give.
            ModelError: a tap that names no module, another number of classes.
        """
        self.net.eval()
        for want in wants:
            if want.field.startswith(TAP):
                self._tap(want)
        self._wants = tuple(w for w in wants if w.field not in ACCESS)
        self._by_view = _by_view(self._wants)
        has_data = task is not None and len(getattr(task, "splits", ())) > 0
        if has_data and any(w.field == "logits" for w in wants):
            task.check(None, self.net)
        example = None
        if has_data and hasattr(task, "example_view"):
            example = task.example_view(*([] if self.net.view == "x" else [self.net.view]))
        if example is not None:
            self._refuse_lacking(self._ask(_moved(example, self._device())))

    def _tap(self, want: Want) -> None:
        alias = want.field.removeprefix(TAP)
        if alias in self.net.taps:
            return
        own = getattr(self.net.module, "taps", None)
        path = own.get(alias) if isinstance(own, Mapping) else None
        try:
            self.net.add_tap(alias, path)
        except ModelError as error:
            if want.optional:
                return
            known = {*self.net.taps, *(own if isinstance(own, Mapping) else ())}
            hint = nearest(alias, known) if known else ""
            raise TeacherError(f"the teacher {self.name}: {error}{hint}") from error

    def _refuse_lacking(self, out: Output) -> None:
        known = _fields(out)
        for want in self._wants:
            if want.field not in known and not want.optional:
                raise TeacherError(
                    f"the teacher {self.name} does not give '{want.field}'"
                    f"{nearest(want.field, known)}"
                )

    def _device(self) -> torch.device:
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def knowledge(self, batch: Batch) -> Knowledge:
        """What was asked for in `bind`; everything about the view "x" without it.

        One forward per view, whatever the number of fields. What is wanted on the view "x" is
        answered from the view that the net reads.

        Raises:
            TeacherError: a wanted field is not given.
        """
        return answered(self._wants, batch, self._answer)

    def _answer(self, batch: Batch, wants: Sequence[Want]) -> Knowledge:
        values: dict[str, Value] = {}
        if not wants:
            return Knowledge(_fields(self._ask(batch.view(self.net.view))))
        views = self._by_view if wants is self._wants else _by_view(wants)
        for view, asked in views.items():
            out = self._ask(batch.view(self.net.view if view == "x" else view))
            for key, want in asked:
                value = _field(out, want.field)
                if value is not None:
                    values[key] = value
                elif not want.optional:
                    fields = _fields(out)
                    raise TeacherError(
                        f"the teacher {self.name} does not give '{want.field}' on the view "
                        f"'{view}'{nearest(want.field, fields)}"
                    )
        return Knowledge(values)

    def _ask(self, view: Any) -> Output:
        if self.net.training:
            self.net.eval()
        if self.rows is None or not isinstance(view, Tensor) or len(view) <= self.rows:
            out: Output = self._guest.quiet(view)
            return out
        return _joined([self._guest.quiet(piece) for piece in torch.split(view, self.rows)])

    def guest(self) -> Frozen:
        """The net itself, for answers to fresh input, gradients in its input, its weights."""
        return self._guest

    def head_layer(self) -> nn.Linear:
        """The last linear layer, for methods that read its weights.

        Raises:
            ModelError: the net has none.
        """
        return self.net.head_layer()

    def to(self, device: torch.device | str) -> Live:
        """Move the module."""
        self._guest.to(device)
        return self


def _by_view(wants: Sequence[Want]) -> dict[str, list[tuple[str, Want]]]:
    found: dict[str, list[tuple[str, Want]]] = {}
    for want in wants:
        found.setdefault(want.view, []).append((want.key, want))
    return found


def weights_hash(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> str:
    """A hash of a module's class and every tensor of its state, on whatever device.

    Args:
        module: any.
        state: its state dict, when it is at hand.
    """
    digest = hashlib.blake2b(type(module).__qualname__.encode(), digest_size=32)
    for name, value in (module.state_dict() if state is None else state).items():
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _field(out: Output, name: str) -> Tensor | None:
    """One field of an answer, by the names that `_fields` gives."""
    if name.startswith(TAP):
        found = out.get("taps", {}).get(name.removeprefix(TAP))
    else:
        found = out.get(name)
    return found if isinstance(found, Tensor) else None


def _fields(out: Output) -> dict[str, Value]:
    fields: dict[str, Value] = {
        k: v for k, v in out.items() if k != "taps" and isinstance(v, Tensor)
    }
    fields.update({TAP + alias: value for alias, value in out.get("taps", {}).items()})
    return fields


def _joined(pieces: Sequence[Output]) -> Output:
    first = pieces[0]
    return {
        key: _joined([p[key] for p in pieces])
        if isinstance(value, Mapping)
        else torch.cat([p[key] for p in pieces])
        for key, value in first.items()
        if isinstance(value, (Tensor, Mapping))
    }


def _moved(view: Any, device: torch.device) -> Any:
    if isinstance(view, (Tensor, RowView)):
        return view.to(device)
    if isinstance(view, Mapping):
        return {k: _moved(v, device) for k, v in view.items()}
    return view
