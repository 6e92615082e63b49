"""Fresh random networks of the recipe's architecture, as many as a method asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stillhouse.engine.job import Job
from stillhouse.errors import ModelError, RecipeError
from stillhouse.models.loading import load_model
from stillhouse.net import Net

GIVEN = "given"


def network_factory(job: Job) -> Callable[[], nn.Module]:
    """Builds the recipe's student anew, with freshly drawn weights, each time it is called.

    All draws come from torch's default CPU generator. A module that was handed in as an
    object is copied and every layer of it drawn anew by its own `reset_parameters`.

    Raises:
        RecipeError: the recipe names no student, or weights for it, which would make all
            networks equal.
        ModelError: a handed-in module with parameters that no `reset_parameters` draws.
    """
    spec = job.recipe.student
    if spec is None:
        raise RecipeError(
            "distilled data needs a network: add student: {model: stillhouse:convnet}"
        )
    if spec.weights is not None:
        raise RecipeError(
            "distilled data is matched and judged on freshly initialised networks; "
            "remove student.weights"
        )
    if spec.model == GIVEN:
        template = copy.deepcopy(job.student("template").module)
        redraw(template)
        return lambda: redraw(copy.deepcopy(template))
    about, options, model = job.task.about, spec.options, spec.model
    return lambda: load_model(model, options=options, about=about)


def fresh_net(job: Job, number: int, model: str | None = None) -> Net:
    """Fresh network number i for judging; it reads network-input space.

    Args:
        job: whose seed and path it is a function of.
        number: of the network.
        model: an id in place of the recipe's student.
    """
    if model is None:
        make = network_factory(job)
    else:
        about = job.task.about

        def make() -> nn.Module:
            return load_model(model, about=about)

    # Not the task's wrapper: it would normalise images that are normalised already.
    return Net(job.build(make, "fresh net", model or "student", number))


def tapped_net(module: nn.Module, taps: Mapping[str, str]) -> Net:
    """A net with the taps of the recipe, else those that its architecture names itself.

    Args:
        module: when it has an attribute `taps` (name to path), that is the default.
        taps: alias to module path; those but "embed" are layers, in order.

    Returns:
        A Net whose alias "embed" is the last feature (the head's input unless mapped).
    """
    own: Any = getattr(module, "taps", {})
    chosen = dict(taps) or (dict(own) if isinstance(own, Mapping) else {})
    if "embed" not in chosen:
        net = Net(module, taps=chosen)
        net.add_tap("embed", f"{net.head()}:input")
        return net
    return Net(module, taps=chosen)


def layers_of(net: Net) -> list[str]:
    """The aliases of a tapped net that are layers, in order.

    Raises:
        ModelError: there are none.
    """
    found = [alias for alias in net.taps if alias not in {"embed", "head:input"}]
    if not found:
        raise ModelError(
            f"{type(net.module).__name__} names no layers to match; tap the activations whose "
            "attention counts, in order: student: {taps: {layer1: module.path, ...}}"
        )
    return found


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a sample's output depends on the other samples in train mode."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(m, kinds) for m in module.modules())


@torch.no_grad()
def redraw(module: nn.Module) -> nn.Module:
    """Draws all weights of a module anew, in place, by its layers' `reset_parameters`.

    Raises:
        ModelError: a parameter that belongs to no layer with `reset_parameters`.
    """
    drawn: set[int] = set()
    for layer in module.modules():
        reset: Any = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(p) for p in layer.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in drawn:
            raise ModelError(
                f"'{name}' of {type(module).__name__} cannot be drawn anew: its layer has no "
                "reset_parameters; name the network by a factory, package.module:function"
            )
    return module
