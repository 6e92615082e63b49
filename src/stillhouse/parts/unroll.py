"""A short training as a value: the student's weights after some steps, with their graph.

Nothing here is a module that is trained: the network is a shape, its weights one flat vector
that is handed from step to step, so a loss on the last weights can be differentiated with
respect to what the student was trained on (pixels, labels) and by which learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from stillhouse.errors import ModelError, TrainingError, nearest
from stillhouse.parts.carry import carry

Rows = TypeVar("Rows")
Call = Callable[[Any], Any]
"""The network with the weights of one inner step: a view to its output."""


class FlatNet:
    """A network as a function of one flat vector of its parameters.

    The module is a shape only: its own weights are neither read nor changed, and it is no
    submodule of whoever holds this.

    Args:
        net: any module without state that moves in a forward.

    Attributes:
        names: of the parameters, in order.
        size: numbers in the vector P.

    Raises:
        ModelError: running statistics, which a vector of parameters would miss; dropout, whose
            noise would differ between the passes; or no parameters.
    """

    def __init__(self, net: nn.Module) -> None:
        refuse_moving_state(net)
        self.net = net
        found = dict(net.named_parameters())
        if not found:
            raise ModelError(f"{type(net).__name__} has no parameters to unroll")
        self.names = tuple(found)
        self.shapes = tuple(p.shape for p in found.values())
        self.sizes = [p.numel() for p in found.values()]
        self.size = sum(self.sizes)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a vector (P,) by parameter name.

        Raises:
            ModelError: a vector of another length.
        """
        if theta.shape != (self.size,):
            raise ModelError(
                f"{type(self.net).__name__} has {self.size} weights; the vector is "
                f"{tuple(theta.shape)}: it belongs to another network"
            )
        pieces = zip(self.names, torch.split(theta, self.sizes), self.shapes, strict=True)
        return {name: piece.view(shape) for name, piece, shape in pieces}

    def flatten(self, weights: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """One vector (P,) of named weights, or of weights in the order of `names`.

        Raises:
            ModelError: names or shapes that are not this network's.
        """
        if isinstance(weights, Mapping):
            named = _without_prefix(weights, self.names)
            missing = [n for n in self.names if n not in named]
            if missing or len(named) != len(self.names):
                odd = missing[0] if missing else next(n for n in named if n not in self.names)
                raise ModelError(
                    f"the weights do not belong to {type(self.net).__name__}: '{odd}'"
                    f"{nearest(odd, named if missing else self.names)}"
                )
            weights = [named[n] for n in self.names]
        shapes = tuple(w.shape for w in weights)
        if shapes != self.shapes:
            raise ModelError(
                f"the weights do not belong to {type(self.net).__name__}: their shapes begin with "
                f"{[tuple(s) for s in shapes[:3]]}, its own with "
                f"{[tuple(s) for s in self.shapes[:3]]}"
            )
        return torch.cat([w.detach().reshape(-1) for w in weights])

    def __call__(self, theta: Tensor, view: Any) -> Any:
        """The network's output on a view with the weights `theta`; differentiable in both."""
        return functional_call(self.net, self.named(theta), (view,), strict=True)

    def at(self, theta: Tensor) -> Call:
        """The network with fixed weights."""
        named = self.named(theta)
        return lambda view: functional_call(self.net, named, (view,), strict=True)


@dataclass
class Unrolled:
    """What an unrolled training leaves.

    Attributes:
        end: (P,) the weights after the last step.
        kept: the weights after some of the steps, by the number of steps made.
    """

    end: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)


def unroll(
    net: FlatNet | nn.Module,
    theta: Tensor,
    batches: Sequence[Rows],
    loss: Callable[[Call, Rows, int], Tensor],
    lr: Tensor | float,
    momentum: float = 0.0,
    keep: Collection[int] = (),
    *,
    graph: int | None = None,
) -> Unrolled:
    """SGD on `loss` from `theta`, one step for each of `batches`, with the graph of it all.

    `v_n = momentum v_{n-1} + g_n` with `v_0 = g_0`, `theta_{n+1} = theta_n - lr v_n`; no
    dampening, no weight decay. Sources: Cazenavette et al., CVPR 2022 (momentum 0); AST
    (momentum .9, intermediate weights, the truncated graph).

    Args:
        net: the network; a module is wrapped.
        theta: (P,) weights at the start. No gradient reaches them unless they require one.
        batches: one per step, handed to `loss`.
        loss: `loss(call, batch, n)` is the scalar that step n goes down, with `call` the
            network at the weights of that step.
        lr: learning rate; a tensor receives gradient.
        momentum: of the inner SGD.
        keep: numbers of steps after which the weights are kept beside the last.
        graph: the last so many steps are differentiated twice; in those before them the
            gradient is a constant, yet the weights still depend on the learning rate. None:
            all.

    Raises:
        ModelError: see `FlatNet`; weights of another length.
        TrainingError: no batches.
    """
    if not batches:
        raise TrainingError("an unrolled training needs one batch at least")
    flat = net if isinstance(net, FlatNet) else FlatNet(net)
    first = 0 if graph is None else max(0, len(batches) - graph)
    reached = Unrolled(theta)
    velocity: Tensor | None = None
    for number, batch in enumerate(batches):
        slope = gradient_at(flat, theta, batch, loss, number, whole=number >= first)
        velocity = slope if velocity is None or momentum == 0.0 else momentum * velocity + slope
        theta = theta - lr * velocity
        if number + 1 in keep:
            reached.kept[number + 1] = theta
    reached.end = theta
    return reached


def gradient_at(
    net: FlatNet,
    theta: Tensor,
    batch: Rows,
    loss: Callable[[Call, Rows, int], Tensor],
    number: int,
    *,
    whole: bool,
) -> Tensor:
    """The gradient (P,) of an inner loss with respect to the weights.

    Args:
        net: the network.
        theta: (P,) where it is taken.
        batch: see `unroll`.
        loss: see `unroll`.
        number: of the step.
        whole: with its own graph, also through `theta`; else a constant.
    """
    if whole and torch.is_grad_enabled():
        point = theta if theta.requires_grad else theta.detach().requires_grad_()
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(net.at(point), batch, number)
            (slope,) = torch.autograd.grad(value, point, create_graph=True)
        return slope
    with torch.enable_grad():
        point = theta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(net.at(point), batch, number), point)
    return slope.detach()


def matched_in_pieces(
    net: FlatNet | nn.Module,
    theta: Tensor,
    target: Tensor,
    batches: Sequence[Rows],
    loss: Callable[[Call, Rows, int], Tensor],
    lr: Tensor,
    inputs: Sequence[Tensor],
) -> Tensor:
    """The trajectory distance of an unrolled SGD in the memory of one step (TESLA).

    Since `theta_N = theta - lr G` with `G = sum_i g_i`, and `c = target - theta`, the distance
    `||c + lr G||^2 / ||c||^2` has, with the g_i taken at weights that are held constant, the
    gradient `d/dx [2 (lr c + lr^2 G) . g_i] / ||c||^2` with respect to what step i reads, one
    step at a time. What passes through the weights of later steps is dropped: exact for one
    step, an approximation beyond. The learning rate's gradient takes G as constant. Source: Cui
    et al., ICML 2023; released code `DATM_tesla.py`.

    Args:
        net: the network; a module is wrapped.
        theta: (P,) weights at the start; no gradient reaches them.
        target: (P,) weights to reach.
        batches: see `unroll`.
        loss: see `unroll`.
        lr: learning rate, 0-dim.
        inputs: what receives gradient beside `lr`: pixels, label logits.

    Returns:
        The distance, a scalar whose gradient is as above. Each gradient g_i is computed twice.
    """
    flat = net if isinstance(net, FlatNet) else FlatNet(net)
    theta, target, rate = theta.detach(), target.detach(), lr.detach()
    total, here = torch.zeros_like(theta), theta
    for number, batch in enumerate(batches):
        slope = gradient_at(flat, here, batch, loss, number, whole=False)
        total = total + slope
        here = here - rate * slope
    toward = target - theta
    whole = toward.square().sum()
    value = (here - target).square().sum() / whole
    direction = 2.0 * (rate * toward + rate.square() * total) / whole
    here = theta

    def piece(number: int, batch: Rows) -> dict[str, Tensor]:
        nonlocal here
        slope = gradient_at(flat, here, batch, loss, number, whole=True)
        here = here - rate * slope.detach()
        return {"match": (direction * slope).sum()}

    def of_rate() -> dict[str, Tensor]:
        return {"match": (theta - lr * total - target).square().sum() / whole}

    pieces = [_bound(piece, number, batch) for number, batch in enumerate(batches)]
    carried = carry([*pieces, of_rate], [*inputs, lr])["match"]
    # The pieces add up to another number than the distance; only their gradient is wanted.
    return value + (carried - carried.detach())


def chunks(count: int, size: int, steps: int, generator: Generator) -> list[Tensor]:
    """Row numbers of each inner step: a permutation in chunks, a new one when it is used up.

    The chunks of a permutation are taken from its end, so where `size` does not divide `count`
    the short one comes first (released code of trajectory matching).

    Args:
        count: rows in all.
        size: rows of a chunk; all rows at most.
        steps: how many chunks.
        generator: CPU generator; it moves on.
    """
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    while len(found) < steps:
        if not waiting:
            waiting = list(torch.split(torch.randperm(count, generator=generator), size))
        found.append(waiting.pop())
    return found


def refuse_moving_state(net: nn.Module) -> None:
    """Refuse a network whose forward changes it, or draws noise.

    Raises:
        ModelError: naming the layer, and what would do.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
            raise ModelError(
                f"'{name}' of {type(net).__name__} keeps running statistics, which a trajectory "
                "of parameters does not hold: use instance or group norm (stillhouse:convnet has "
                "norm: instance), or track_running_stats=False"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ModelError(
                f"'{name}' of {type(net).__name__} is dropout (p = {layer.p:g}), whose noise "
                "cannot be unrolled: set it to 0"
            )


def _without_prefix(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Weights under the network's own names: a Net adds "module." to those of its module."""
    wrapped = all(n.startswith("module.") for n in names)
    if wrapped and not any(k.startswith("module.") for k in weights):
        return {f"module.{k}": v for k, v in weights.items()}
    return dict(weights)


def _bound(
    piece: Callable[[int, Rows], dict[str, Tensor]], number: int, batch: Rows
) -> Callable[[], dict[str, Tensor]]:
    return lambda: piece(number, batch)
