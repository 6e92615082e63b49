r"""Gaussian diffusion: the noise schedule, noise and clean image by each other, samplers.

A schedule is the cumulative product :math:`\bar\alpha_t = \prod_{i \le t} (1 - \beta_i)` at the
index :math:`t` itself, in losses and samplers alike; :math:`\bar\alpha_{-1} = 1`. With
:math:`a_t = \sqrt{\bar\alpha_t}` and :math:`b_t = \sqrt{1 - \bar\alpha_t}`

.. math::
    x_t = a_t x_0 + b_t \epsilon, \qquad \hat x_0 = (x_t - b_t \hat\epsilon) / a_t .

A predictor of noise is any function of (noisy samples, times); what it is conditioned on is its
own affair, so that classes, texts and vectors are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.losses.score import guided

Predict = Callable[[Tensor, Tensor], Tensor]


class NoiseSchedule:
    """How much noise there is at each of T times.

    Args:
        alphas_cumprod: (T,), falling, in [0, 1); kept in float64.

    Raises:
        ModelError: not one number for each time, outside [0, 1], or rising.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        kept = alphas_cumprod.detach().double().cpu()
        if kept.ndim != 1 or not len(kept):
            raise ModelError(f"a noise schedule has shape (T,), not {tuple(kept.shape)}")
        within = bool(((kept >= 0) & (kept <= 1)).all())
        if not within or bool((kept.diff() > 0).any()):
            raise ModelError("a noise schedule falls from 1 towards 0 and stays in [0, 1]")
        # The last entry stands for index -1: no noise.
        self._table = torch.cat([kept, torch.ones(1, dtype=torch.float64)])
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def of_betas(cls, betas: Tensor) -> NoiseSchedule:
        """The schedule whose t-th step keeps the share 1 - betas[t] of the variance."""
        return cls(torch.cumprod(1.0 - betas.double(), 0))

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> NoiseSchedule:
        """Betas in equal steps (Ho et al. 2020)."""
        return cls.of_betas(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, first: float = 0.00085, last: float = 0.012
    ) -> NoiseSchedule:
        """Betas that are squares of equal steps (latent diffusion)."""
        roots = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64)
        return cls.of_betas(roots**2)

    def __len__(self) -> int:
        return len(self._table) - 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64."""
        return self._table[:-1]

    def abar(self, times: Tensor | int) -> Tensor:
        """The kept share of variance; 1 at index -1.

        Args:
            times: whole numbers of any shape in [-1, T).

        Returns:
            float64, of the same shape and on the same device.

        Raises:
            ModelError: a time outside.
        """
        index = torch.as_tensor(times)
        # Elsewhere reading values would wait for the device; there indexing itself refuses.
        if index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < -1 or high >= len(self):
                raise ModelError(f"times run from -1 to {len(self) - 1}, got {low} to {high}")
        return self._on(index.device)[index.long()]

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            # Apple's devices have no float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._tables[device] = self._table.to(device, dtype)
        return self._tables[device]

    def a(self, times: Tensor | int) -> Tensor:
        """The signal's factor, float64."""
        return self.abar(times).sqrt()

    def b(self, times: Tensor | int) -> Tensor:
        """The noise's factor, float64."""
        return (1.0 - self.abar(times)).sqrt()

    def sigma(self, times: Tensor | int) -> Tensor:
        """Noise to signal, b / a, float64."""
        return (1.0 / self.abar(times) - 1.0).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor | int) -> Tensor:
        """x_t of clean samples (B, ...) at times (B,)."""
        a, b = self._factors(times, x0)
        return a * x0 + b * noise

    def x0_of(self, x_t: Tensor, noise: Tensor, times: Tensor | int) -> Tensor:
        """The clean samples that noisy ones (B, ...) and their noise stand for."""
        a, b = self._factors(times, x_t)
        return (x_t - b * noise) / a

    def noise_of(self, x_t: Tensor, x0: Tensor, times: Tensor | int) -> Tensor:
        """The noise in noisy samples (B, ...) whose clean ones are known."""
        a, b = self._factors(times, x_t)
        return (x_t - a * x0) / b

    def _factors(self, times: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(times, device=like.device)
        column = (-1, *[1] * (like.ndim - 1)) if index.ndim else ()
        a, b = (f(index).view(column).to(like) for f in (self.a, self.b))
        return a, b


def even_times(steps: int, count: int) -> list[int]:
    """`count` times of [0, steps) at equal distances, from 0 upwards."""
    if not 1 <= count <= steps:
        raise ModelError(f"a sampler takes between 1 and {steps} steps, not {count}")
    return [steps * i // count for i in range(count)]


def with_guidance(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """A predictor with guidance: (1 + scale) e_c - scale e_null; at 0 one network call."""
    if scale == 0:
        return conditional
    return lambda x, t: guided(conditional(x, t), unconditional(x, t), scale)


def ddim(
    predict: Predict,
    x_last: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int],
    *,
    clamp: float | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta 0) from pure noise to clean samples.

    Args:
        predict: noise in samples (B, ...) at times (B,).
        x_last: (B, ...) standard normal.
        schedule: of the predictor.
        times: rising; passed through backwards, one call of the predictor each.
        clamp: largest magnitude of the predicted clean samples at each step; None: as they are.
        trace: is given the predicted clean samples of each step.

    Returns:
        (B, ...): the last prediction of clean samples, since no noise is left at index -1.
    """
    x, descending = x_last, [*sorted(times, reverse=True), -1]
    for now, after in pairwise(descending):
        index = torch.full((len(x),), now, device=x.device)
        noise = predict(x, index)
        x0 = schedule.x0_of(x, noise, now)
        if clamp is not None:
            x0 = x0.clamp(-clamp, clamp)
            noise = schedule.noise_of(x, x0, now)
        if trace is not None:
            trace.append(x0)
        x = schedule.add_noise(x0, noise, after)
    return x


def one_step(predict: Predict, noise: Tensor, schedule: NoiseSchedule, time: int) -> Tensor:
    r"""A generator in one call: :math:`G(n) = \sigma (n - e(b n, t))`.

    The input has no signal part and the deviation b, not 1.

    Args:
        predict: noise in samples (B, ...) at times (B,); its parameters are the generator's.
        noise: (B, ...) standard normal.
        schedule: of the predictor.
        time: the one at which it is asked.
    """
    index = torch.full((len(noise),), time, device=noise.device)
    found = predict(schedule.b(time).to(noise) * noise, index)
    return schedule.sigma(time).to(noise) * (noise - found)


@dataclass(frozen=True)
class Sampler:
    """How clean samples are drawn from a predictor of noise.

    Attributes:
        steps: of DDIM, at equal distances; 0: one call at `time`, as `one_step`.
        time: of that one call.
        clamp: see `ddim`; nothing else is done to samples.
    """

    steps: int = 50
    time: int = 440
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or self.time < 0:
            raise ModelError(f"a sampler needs steps and time >= 0, not {self.steps}, {self.time}")

    @property
    def calls(self) -> int:
        """Calls of the predictor for one batch."""
        return max(1, self.steps)

    def __call__(self, predict: Predict, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Samples (B, ...) from standard normal noise of the same shape."""
        if self.steps == 0:
            return one_step(predict, noise, schedule, self.time)
        times = even_times(len(schedule), self.steps)
        return ddim(predict, noise, schedule, times, clamp=self.clamp)
