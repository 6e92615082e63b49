"""One wrapper for every model on either side: call rule, normalisation, taps, head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, nearest

Output = dict[str, Any]


def find_head(module: nn.Module) -> str:
    """The path of the last linear layer: what turns features into logits.

    The usual names (fc, classifier, head, linear, score) are tried first, then the last
    `nn.Linear` in order of registration.

    Raises:
        ModelError: the module holds no linear layer.
    """
    linear: list[str] = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{type(module).__name__} has no linear layer that could be its head; "
            "name it with taps: {head: module.path}"
        )
    for stem in ("fc", "classifier", "head", "linear", "score"):
        own = [name for name in linear if name == stem or name.startswith(stem + ".")]
        if own:
            return own[-1]
    return linear[-1]


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A module in eval mode; afterwards each part in its own mode, also where something failed."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Not train(): parts may be frozen in eval mode inside of a module that trains.
        for part, training in modes:
            part.training = training


class Net(nn.Module):
    """A model with one way to call it, whatever it is.

    Args:
        module: any module. Called with the view when that is a tensor or a list, with the
            view's entries as keyword arguments when it is a mapping.
        answer: the name of a single tensor that `module` returns ("logits", "image", ...).
            Mappings and Hugging Face outputs keep their own names, torchvision's "out" apart.
        mean: per channel, subtracted from float views (C, H, W) before the call.
        std: per channel, divided by.
        axes: of a view after its channels: 2 of images, 1 of time series (C, T).
        taps: alias to module path. `path` is a module's output, `path:input` its first
            input, `path@1` the output of its second call in one forward.
            The alias "head:input" stands for the head's input unless it is mapped; mapped to
            `path:input`, it says that the head is at `path`.

    Raises:
        ModelError: a path that does not exist; the nearest are named.

    Attributes:
        view: the name of the batch's view that the model reads: the module's own attribute
            `reads`, "x" when it has none. So a teacher may read another view than the student.
        takes: dtype that float tensors are brought to before the call; None leaves them. A run
            sets it where parameters are no float32.

    Inside a run the state dict's keys are `module.*`.
    """

    mean: Tensor | None
    std: Tensor | None
    takes: torch.dtype | None = None

    def __init__(
        self,
        module: nn.Module,
        *,
        answer: str = "logits",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        taps: Mapping[str, str] | None = None,
        head: str | None = None,
        axes: int = 2,
    ) -> None:
        super().__init__()
        self.module = module
        self.answer = answer
        self.view = str(getattr(module, "reads", "x"))
        shape = (-1, *[1] * axes)
        self.register_buffer(
            "mean", None if mean is None else torch.tensor(mean).view(shape), persistent=False
        )
        self.register_buffer(
            "std", None if std is None else torch.tensor(std).view(shape), persistent=False
        )
        self._head = head
        self.taps: dict[str, str] = {}
        self._caught: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._armed = False
        self._checked = False
        for alias, path in (taps or {}).items():
            self.add_tap(alias, path)

    def head(self) -> str:
        """The path of the last linear layer within `module`."""
        if self._head is None:
            mapped, _, side = self.taps.get("head:input", "").partition(":")
            named = mapped.partition("@")[0] if side == "input" else ""
            self._head = named or find_head(self.module)
        return self._head

    def head_layer(self) -> nn.Linear:
        """The last linear layer itself."""
        layer = self.module.get_submodule(self.head())
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"the head '{self.head()}' is a {type(layer).__name__}, not a Linear")
        return layer

    def place_head(self, head: nn.Module, *, linear: str = "") -> None:
        """Put another module in the place of the last linear layer; taps of the old one follow.

        Args:
            head: takes what the old layer took.
            linear: path within `head` of what is now the last linear layer; "" when it is
                `head` itself.
        """
        path = self.head()
        self.module.set_submodule(path, head)
        self._head = f"{path}.{linear}" if linear else path
        for alias, tapped in list(self.taps.items()):
            if tapped.partition(":")[0].partition("@")[0] == path:
                del self.taps[alias]  # its hook went with the old layer
                self.add_tap(alias, tapped)

    def add_tap(self, alias: str, path: str | None = None) -> None:
        """Catch what passes at `path` under the name `alias`, from the next forward on.

        Raises:
            ModelError: no such module; or the alias is taken by another path.
        """
        if path is None:
            if alias != "head:input":
                raise ModelError(
                    f"the tap '{alias}' is not mapped to a module; add it to the recipe: "
                    f"taps: {{{alias}: module.path}}"
                )
            path = f"{self.head()}:input"
        if alias in self.taps:
            if self.taps[alias] != path:
                raise ModelError(f"the tap '{alias}' already stands for '{self.taps[alias]}'")
            return
        place, _, side = path.partition(":")
        name, _, call = place.partition("@")
        names = dict(self.module.named_modules())
        if name not in names:
            raise ModelError(
                f"the tap '{alias}' names the module '{name}', which "
                f"{type(self.module).__name__} does not have{nearest(name, names)}"
            )
        if side not in {"", "input", "output"}:
            raise ModelError(f"the tap path '{path}' ends in ':{side}'; use ':input' or ':output'")
        wanted = int(call) if call else -1
        if side == "input":
            names[name].register_forward_pre_hook(partial(self._catch_input, alias, wanted))
        else:
            names[name].register_forward_hook(partial(self._catch_output, alias, wanted))
        self.taps[alias] = path

    # The hooks are partials of bound methods: a deep copy of the net (EMA, client, unrolled
    # student) then catches into the copy, which closures would not.
    def _catch_input(self, alias: str, wanted: int, module: nn.Module, args: Any) -> None:
        if self._armed:
            self._keep(alias, wanted, args)

    def _catch_output(
        self, alias: str, wanted: int, module: nn.Module, args: Any, out: Any
    ) -> None:
        if self._armed:
            self._keep(alias, wanted, out)

    def _keep(self, alias: str, wanted: int, value: Any) -> None:
        call = self._calls.get(alias, 0)
        self._calls[alias] = call + 1
        if wanted in {-1, call}:
            self._caught[alias] = first_tensor(value, alias)

    def forward(self, view: Any) -> Output:
        """Call the model on one view.

        Args:
            view: a tensor (B, ...), a list, or a mapping of keyword arguments.

        Returns:
            A plain dict: `answer` or the model's own names, and `taps` by alias when there
            are any.

        Raises:
            ModelError: a tapped module did not run, ran several times without `@`, or gives
                values without a gradient while training (reentrant checkpointing).
        """
        mean = self._buffers["mean"]  # a module's own way to its buffers is slow
        if mean is not None and isinstance(view, Tensor):
            view = (view - mean) / (1.0 if self.std is None else self.std)
        if self.takes is not None and isinstance(view, Tensor) and view.is_floating_point():
            view = view.to(self.takes)
        if not self.taps:
            return self._named(self._call(view))
        self._caught, self._calls, self._armed = {}, {}, True
        try:
            out = self._named(self._call(view))
        finally:
            self._armed = False
        caught, self._caught = self._caught, {}
        if not self._checked:
            self._check(caught)
        out["taps"] = caught
        return out

    def tried(self, view: Any) -> Output:
        """What the model gives for a view: in eval mode, without gradient, on its own device."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        with in_eval_mode(self), torch.no_grad():
            out: Output = self(view.to(device) if hasattr(view, "to") else view)
        return out

    def _call(self, view: Any) -> Any:
        # A tensor is asked for first: the test for a mapping is slow.
        if not isinstance(view, Tensor) and isinstance(view, Mapping):
            return self.module(**view)
        return self.module(view)

    def _named(self, out: Any) -> Output:
        if isinstance(out, Tensor):
            return {self.answer: out}
        if isinstance(out, Mapping):
            named = dict(out)
            if "out" in named and self.answer not in named:
                # torchvision's name for what a segmentation network gives.
                named[self.answer] = named.pop("out")
            return named
        if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
            return {self.answer: out[0]}
        raise ModelError(
            f"{type(self.module).__name__} returned {type(out).__name__}; a tensor, a mapping "
            "or a tuple that begins with a tensor is needed"
        )

    def _check(self, caught: Mapping[str, Tensor]) -> None:
        for alias, path in self.taps.items():
            if alias not in caught:
                raise ModelError(f"the tapped module '{path}' ({alias}) did not run in forward")
            if self._calls[alias] > 1 and "@" not in path:
                raise ModelError(
                    f"the tapped module '{path}' ({alias}) ran {self._calls[alias]} times in one "
                    f"forward; choose a call with '{path.partition(':')[0]}@0', '@1', ..."
                )
            if self._lost_gradient(caught[alias], path):
                raise ModelError(
                    f"the tap '{alias}' at '{path}' carries no gradient although its module is "
                    "trained; under activation checkpointing use use_reentrant=False"
                )
        self._checked = not torch.is_grad_enabled() or self.training

    def _lost_gradient(self, value: Tensor, path: str) -> bool:
        if not (self.training and torch.is_grad_enabled()) or value.requires_grad:
            return False
        if path.endswith(":input") or not value.is_floating_point():
            return False
        module = self.module.get_submodule(path.partition(":")[0].partition("@")[0])
        return any(p.requires_grad for p in module.parameters())


def first_tensor(value: Any, what: str) -> Tensor:
    """The tensor a module passes on: itself, the first of a tuple, or an output's main field.

    Raises:
        ModelError: there is none.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        for key in ("last_hidden_state", "logits", *value):
            if isinstance(value.get(key), Tensor):
                found: Tensor = value[key]
                return found
    if isinstance(value, (tuple, list)):
        for entry in value:
            if isinstance(entry, Tensor):
                return entry
    raise ModelError(f"the tap '{what}' caught {type(value).__name__}, which holds no tensor")
