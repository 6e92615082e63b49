"""How the gradients of one step become the gradient that is applied.

A gradient rule acts on the *whole* gradient of a step, after all micro-batches and ranks
have been summed: a projection inside each micro-batch would be another algorithm. It asks
for gradients by sets of term names and gets, per set, one list aligned with the parameters,
with None where that set does not reach a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import RecipeError

Terms = tuple[str, ...]
"""Term names; "features" also stands for every "features/..."."""

GradientList = list[Tensor | None]
Grads = Callable[..., Sequence[Sequence[Tensor | None]]]
"""`grads(*sets)`: one list per set of terms (None: all terms), aligned with the parameters."""


class Sum:
    """The plain gradient of the sum of all terms."""

    def __call__(self, grads: Grads, params: Sequence[Tensor]) -> GradientList:
        """The gradient of each parameter.

        Args:
            grads: see `Grads`.
            params: the parameters that move.
        """
        (whole,) = grads(None)
        return list(whole)

    def __repr__(self) -> str:
        return "Sum()"


class Project:
    """One-sided projection of conflicting gradients (DHKD, gradient alignment).

    With g_keep and g_turn the gradients of two sets of terms: where <g_turn, g_keep> < 0,
    g_turn loses its component along g_keep; g_keep is never changed; the result is their
    sum. Reconstructed from the released optimiser wrapper of DHKD (penghui-yang/DHKD,
    helper/optimizer.py); PCGrad (Yu et al. 2020, algorithm 1) turns both sides.

    Scope "all" takes inner product and norm over all parameters, as released. Parameters
    that only g_keep reaches (its own head) enter the norm, so that in a conflict their
    gradient grows by the factor 1 + |<g_turn, g_keep>| / ||g_keep||^2 while the shared part
    stays slightly in conflict. Scope "shared" looks at, and changes, only the parameters
    that both reach; there the product is 0 afterwards.

    Args:
        keep: terms whose gradient stays.
        turn: terms whose gradient gives way.
        scope: "all" or "shared".

    Raises:
        RecipeError: a set is empty, or the scope unknown.
    """

    def __init__(self, keep: Terms, turn: Terms, scope: Literal["all", "shared"] = "all") -> None:
        if not keep or not turn:
            raise RecipeError(f"Project needs terms on both sides, got keep={keep}, turn={turn}")
        if scope not in ("all", "shared"):
            raise RecipeError(f"the scope of Project is 'all' or 'shared', not '{scope}'")
        self.keep = tuple(keep)
        self.turn = tuple(turn)
        self.scope = scope

    def __call__(self, grads: Grads, params: Sequence[Tensor]) -> GradientList:
        """The gradient of each parameter, after projection.

        Args:
            grads: see `Grads`; every term must be in one of the two sets.
            params: the parameters that move.
        """
        keep, turn = grads(self.keep, self.turn)
        share = self.component(keep, turn)
        return [self._merge(k, t, share) for k, t in zip(keep, turn, strict=True)]

    def component(
        self, keep: Sequence[Tensor | None], turn: Sequence[Tensor | None]
    ) -> Tensor | None:
        """What multiple of g_keep is taken off g_turn: at most 0, and 0 without a conflict.

        Returns:
            A scalar tensor (nothing is read back from the device), or None when the two
            sets share no parameter.
        """
        product = inner(keep, turn)
        if product is None:
            return None
        if self.scope == "shared":
            keep = [k if t is not None else None for k, t in zip(keep, turn, strict=True)]
        square = inner(keep, keep)
        assert square is not None, "a product exists, so g_keep reaches a parameter"
        # without a conflict the quotient may be 0 / 0 and is not used
        return torch.where(product < 0, product / square, torch.zeros_like(product))

    def _merge(
        self, keep: Tensor | None, turn: Tensor | None, share: Tensor | None
    ) -> Tensor | None:
        if keep is None:
            return turn
        alone = turn is None
        if share is not None and not (alone and self.scope == "shared"):
            keep = keep * (1 - share).to(keep.dtype)
        return keep if turn is None else keep + turn

    def __repr__(self) -> str:
        return f"Project(keep={self.keep}, turn={self.turn}, scope='{self.scope}')"


class Sharpness:
    """Two gradients a step, so that training ends where the loss is flat (SAM, ASAM, GSAM).

    With g the gradient at the parameters w, and all norms and products over all parameters
    together:

    1. `e = rho g / (||g|| + 1e-12)`, or, adaptive, `e = rho w^2 g / (|| |w| g || + 1e-12)`;
    2. g+ is the gradient at w + e of the same step (same rows, same augmentation and noise);
    3. the component of g that is orthogonal to g+, `g_perp = g - cos ||g|| g+ / (||g+|| + 1e-12)`
       with `cos = <g, g+> / (||g|| ||g+|| + 1e-12)`;
    4. the gradient of the step is `g+ - alpha g_perp`, at w again.

    Sources: Foret et al., ICLR 2021 (SAM); Kwon et al., ICML 2021 (ASAM); Zhuang et al., ICLR
    2022 (GSAM); the form is that of FTD (Du et al., CVPR 2023), released code
    `buffer/gsam/gsam.py`. With alpha 0 it is (A)SAM, with rho 0 the plain gradient whatever
    alpha is. Weights that are 0 are not perturbed in the adaptive form. Running statistics of
    normalisation layers move in the first pass only (the loop sees to that), and terms are
    logged from the first. A step costs two.

    Args:
        rho: size of the perturbation; .01 goes with the adaptive form, .05-.1 with the other.
        alpha: weight of the orthogonal component that is taken off.
        adaptive: relative to the size of each weight (ASAM).
        form: "gsam", or "penalty": the gradient of `L(w) + alpha (L(w + e) - L(w))` with e held
            constant, `(1 - alpha) g + alpha g+` (reconstructed from FTD's objective; SAM for
            alpha 1).

    Raises:
        RecipeError: a negative rho, or an unknown form.
    """

    def __init__(
        self,
        rho: float = 0.01,
        alpha: float = 0.3,
        adaptive: bool = True,
        form: Literal["gsam", "penalty"] = "gsam",
    ) -> None:
        if rho < 0:
            raise RecipeError(f"the perturbation of Sharpness must be at least 0, not {rho}")
        if form not in ("gsam", "penalty"):
            raise RecipeError(f"the form of Sharpness is 'gsam' or 'penalty', not '{form}'")
        self.rho, self.alpha, self.adaptive, self.form = rho, alpha, adaptive, form

    @torch.no_grad()
    def __call__(self, grads: Grads, params: Sequence[Tensor]) -> GradientList:
        """The gradient of each parameter.

        Args:
            grads: see `Grads`; called twice.
            params: the parameters that move; perturbed for the second pass, and back again bit
                for bit.
        """
        with torch.enable_grad():
            (clean,) = grads(None)
        kept = [p.detach().clone() for p in params]
        try:
            for parameter, step in zip(params, self.perturbation(clean, params), strict=True):
                if step is not None:
                    parameter.add_(step)
            with torch.enable_grad():
                (sharp,) = grads(None)
        finally:
            for parameter, value in zip(params, kept, strict=True):
                parameter.copy_(value)
        return self.combined(clean, sharp)

    def perturbation(
        self, grad: Sequence[Tensor | None], params: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """What is added to each parameter before the second pass; None where no gradient is."""
        scaled = grad
        if self.adaptive:
            scaled = [None if g is None else p.abs() * g for g, p in zip(grad, params, strict=True)]
        square = inner(scaled, scaled)
        if square is None:
            return [None] * len(grad)
        factor = self.rho / (square.sqrt() + 1e-12)
        if self.adaptive:
            return [
                None if s is None else factor.to(s.dtype) * p.abs() * s
                for s, p in zip(scaled, params, strict=True)
            ]
        return [None if g is None else factor.to(g.dtype) * g for g in grad]

    def combined(
        self, clean: Sequence[Tensor | None], sharp: Sequence[Tensor | None]
    ) -> GradientList:
        """The gradient of the step from that at the parameters and that beside them."""
        if self.form == "penalty":
            # w g + (1 - w) 0 where one side is missing: no gradient counts as zero.
            parts = ((1.0 - self.alpha, clean), (self.alpha, sharp))
            return _weighted(parts)
        product = inner(clean, sharp)
        if product is None:
            return list(sharp)
        ours, theirs = inner(clean, clean), inner(sharp, sharp)
        assert ours is not None
        assert theirs is not None
        length, other = ours.sqrt(), theirs.sqrt()
        cosine = product / (length * other + 1e-12)
        along = cosine * length / (other + 1e-12)
        # g+ - alpha (g - along g+)
        return _weighted(((-self.alpha, clean), (1.0 + self.alpha * along, sharp)))

    def __repr__(self) -> str:
        return (
            f"Sharpness(rho={self.rho}, alpha={self.alpha}, adaptive={self.adaptive}, "
            f"form='{self.form}')"
        )


def _weighted(
    parts: Sequence[tuple[float | Tensor, Sequence[Tensor | None]]],
) -> GradientList:
    """Sum of weighted gradients by parameter; None where none of them reaches it."""
    found: GradientList = []
    for entries in zip(*(grads for _, grads in parts), strict=True):
        reached = [
            (weight.to(g.dtype) if isinstance(weight, Tensor) else weight) * g
            for (weight, _), g in zip(parts, entries, strict=True)
            if g is not None
        ]
        total: Tensor | None = None
        for piece in reached:
            total = piece if total is None else total + piece
        found.append(total)
    return found


def inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """Inner product of two gradients, over the parameters that both reach.

    Summed parameter by parameter, so that no flattened copy of the model is made; at least
    in float32.

    Args:
        left: gradients aligned with `right`, None where unreached.
        right: as `left`.

    Returns:
        A scalar tensor, or None when they have no parameter in common.
    """
    products = [
        torch.dot(_flat(a), _flat(b))
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack([p.to(products[0].device) for p in products]).sum() if products else None


def cosine(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """Cosine of the angle between two gradients, over the parameters that both reach.

    Args:
        left: gradients aligned with `right`, None where unreached.
        right: as `left`.

    Returns:
        A scalar tensor in [-1, 1], 0 when one of them vanishes; None without a common
        parameter.
    """
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    product = inner([a for a, _ in both], [b for _, b in both])
    if product is None:
        return None
    lengths = [inner(side, side) for side in zip(*both, strict=True)]
    size = lengths[0].sqrt() * lengths[1].sqrt()  # type: ignore[union-attr]
    return torch.where(size > 0, product / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)


def _flat(x: Tensor) -> Tensor:
    x = x.reshape(-1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
