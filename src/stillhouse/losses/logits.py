"""Divergences between the class scores of a student and those of a teacher.

Every function takes logits with classes last, `(..., classes)`, whatever the leading
dimensions mean (samples, tokens, pixels); student first, then teacher, then target, all
settings by keyword. One *item* is one position of the leading dimensions. `mask` has the
leading shape (bool, or weights >= 0); `reduction` is "mean" (over the valid items, 0 when
there is none), "sum", or "none" (one value per item, 0 where masked). A masked item neither
counts nor sends a gradient, not even when its logits are NaN.

Half precision is widened to float32 inside; float32 and float64 stay what they are. Nothing
is detached: a teacher without gradient is the caller's business, and targets may be learnt.
Classes that both sides rule out with minus infinity (a padded vocabulary) contribute nothing.

Over large vocabularies the softmax divergences are computed some rows at a time (`row_blocks`),
which costs no memory beyond one gradient per input. The logits themselves are a separate
matter: any of these losses with reduction "none" may be handed to `chunked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.losses.chunked import chunked as chunked
from stillhouse.losses.chunked import wide
from stillhouse.losses.row_blocks import block_of, by_rows, eager

Reduction = Literal["mean", "sum", "none"]
Direction = Literal["forward", "reverse", "symmetric", "js", "skewed_forward", "skewed_reverse"]
Tail = Literal["tail", "truncate", "sample"]

DIRECTIONS = ("forward", "reverse", "symmetric", "js", "skewed_forward", "skewed_reverse")
TAILS = ("tail", "truncate", "sample")


class SparseDistribution(Protocol):
    """What `topk_kl` reads of a stored teacher distribution.

    Attributes:
        ids: (..., k) int64 classes.
        logp: (..., k) log-probabilities of these classes at `temperature`.
        rest: (...) log of the probability mass that is missing.
        temperature: at which the probabilities were taken.
        weights: (..., k) importance weights when the classes were sampled, else None.
    """

    @property
    def ids(self) -> Tensor:
        """Kept classes."""
        ...

    @property
    def logp(self) -> Tensor:
        """Their log-probabilities."""
        ...

    @property
    def rest(self) -> Tensor:
        """Log of the missing mass."""
        ...

    @property
    def temperature(self) -> float:
        """Of the stored probabilities."""
        ...

    @property
    def weights(self) -> Tensor | None:
        """Importance weights of sampled classes."""
        ...


# ------------------------------------------------------------------- softmax divergences


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    skew: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale: bool = True,
) -> Tensor:
    """Kullback-Leibler divergence between tempered distributions, in a chosen direction.

    With p the teacher's and q the student's softmax at `temperature`:

    - "forward": KL(p || q) (Hinton et al. 2015, section 2, without the constant entropy);
    - "reverse": KL(q || p) (MiniLLM, Gu et al. 2024);
    - "symmetric": beta KL(p || q) + (1 - beta) KL(q || p);
    - "js": the generalised Jensen-Shannon divergence, see `jsd`;
    - "skewed_forward": KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al. 2024, eq. 3);
    - "skewed_reverse": KL(q || (1 - skew) p + skew q) (same).

    DistiLLM's released `lam` is 1 - beta for the symmetric and the JS form. Its forward
    forms are cross-entropies; these are true divergences (same gradient, 0 for equal models).

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0; one number, or one per item with the leading shape.
        direction: see above.
        beta: in [0, 1], weight of the teacher's side for "symmetric" and "js".
        skew: in [0, 1), share of the own distribution in the mixture.
        mask: leading shape.
        reduction: "mean", "sum" or "none".
        scale: multiply each item by its temperature squared, which keeps the size of the
            gradient when the temperature changes (Hinton et al. 2015, section 2).

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ, or a single class (its softmax is constant).
        RecipeError: an unknown direction or a setting out of range.
    """
    if direction not in DIRECTIONS:
        raise RecipeError(f"unknown direction '{direction}'{nearest(direction, DIRECTIONS)}")
    _within("beta", beta, 0.0, 1.0)
    if not 0.0 <= skew < 1.0:
        raise RecipeError(f"skew must lie in [0, 1), not {skew}")
    _check_pair(student_logits, teacher_logits)

    if direction == "forward" and mask is None and reduction == "mean":
        whole = _mean_forward(student_logits, teacher_logits, temperature)
        if whole is not None:
            return _scaled(whole, temperature, scale)

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(
            _tempered(wide(student), temperature).log_softmax(-1),
            _tempered(wide(teacher), temperature).log_softmax(-1),
            direction,
            beta,
            skew,
        )

    items = _in_blocks(rows, temperature, student_logits, teacher_logits, mask=mask)
    return _reduce(_scaled(items, temperature, scale), mask, reduction)


def _divergence(
    log_q: Tensor, log_p: Tensor, direction: Direction, beta: float, skew: float
) -> Tensor:
    """The divergence of log-probabilities (..., classes), per item; see `kl`."""
    if direction == "forward":
        return _expected(log_p, log_p - log_q)
    if direction == "reverse":
        return _expected(log_q, log_q - log_p)
    if direction == "symmetric":
        forward = _expected(log_p, log_p - log_q)
        return beta * forward + (1.0 - beta) * _expected(log_q, log_q - log_p)
    if direction == "js":
        return _generalised_js(log_p, log_q, beta)
    if direction == "skewed_forward":
        return _expected(log_p, -_mixture_ratios(log_p, log_q, skew)[0])
    return _expected(log_q, -_mixture_ratios(log_p, log_q, 1.0 - skew)[1])


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2024, eq. 1).

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, p the teacher's
    and q the student's distribution. Divided by beta (1 - beta) it tends to the forward and
    the reverse KL at the two ends; as in the released GKD code, beta = 0 *is* the forward
    and beta = 1 the reverse KL. Equal models give exactly 0 at any beta.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        beta: in [0, 1], the teacher's share of the mixture.
        temperature: > 0; one number, or one per item.
        mask: leading shape.
        reduction: "mean", "sum" or "none".
        scale: multiply by the temperature squared.

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ, or a single class.
        RecipeError: `beta` out of range.
    """
    return kl(
        student_logits,
        teacher_logits,
        temperature=temperature,
        direction="js",
        beta=beta,
        mask=mask,
        reduction=reduction,
        scale=scale,
    )


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Total variation distance, half the L1 distance of the two distributions, in [0, 1].

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0; one number, or one per item.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ, or a single class.
    """
    _check_pair(student_logits, teacher_logits)

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        q = _tempered(wide(student), temperature).softmax(-1)
        p = _tempered(wide(teacher), temperature).softmax(-1)
        return 0.5 * (p - q).abs().sum(-1)

    items = _in_blocks(rows, temperature, student_logits, teacher_logits, mask=mask)
    return _reduce(items, mask, reduction)


def soft_cross_entropy(
    student_logits: Tensor,
    targets: Tensor,
    *,
    from_logits: bool = False,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale: bool = False,
) -> Tensor:
    """Cross-entropy against soft labels, given as probabilities or as label logits.

    The form in which distilled data sets keep their labels and in which Distiller (He et
    al. 2022) writes its prediction loss; it exceeds the forward KL by the targets' entropy.

    Args:
        student_logits: (..., classes).
        targets: (..., classes); probabilities, or logits when `from_logits`. A gradient
            reaches them when they require one.
        from_logits: turn the targets into probabilities at the same temperature.
        temperature: > 0; one number, or one per item. Probabilities are taken as they are.
        mask: leading shape.
        reduction: "mean", "sum" or "none".
        scale: multiply by the temperature squared.

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ, or a single class.
    """
    _check_pair(student_logits, targets)
    log_q = _log_softmax(student_logits, temperature, mask)
    if from_logits:
        p = _log_softmax(targets, temperature, mask).exp()
    else:
        p = wide(_without(targets, mask))
    items = -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)
    return _reduce(_scaled(items, temperature, scale), mask, reduction)


def label_smoothing_cross_entropy(
    student_logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy against (1 - smoothing) one-hot + smoothing uniform.

    Szegedy et al. 2016, section 7: the uniform part is spread over all classes.

    Args:
        student_logits: (..., classes).
        target: leading shape, int64 class numbers. Masked items may hold any number.
        smoothing: in [0, 1]; 0 is the ordinary cross-entropy.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: the target has not the leading shape of the logits.
        RecipeError: `smoothing` out of range.
    """
    _within("smoothing", smoothing, 0.0, 1.0)
    if target.shape != student_logits.shape[:-1]:
        raise ModelError(
            f"targets of shape {tuple(target.shape)} do not fit logits of shape "
            f"{tuple(student_logits.shape)}: expected {tuple(student_logits.shape[:-1])}"
        )
    log_q = _log_softmax(student_logits, 1.0, mask)
    if mask is not None:
        target = target.masked_fill(mask == 0, 0)
    items = -log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if smoothing:
        items = (1.0 - smoothing) * items - smoothing * log_q.mean(-1)
    return _reduce(items, mask, reduction)


def topk_kl(
    student_logits: Tensor,
    teacher: SparseDistribution,
    *,
    tail: Tail = "tail",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale: bool = True,
) -> Tensor:
    """Forward KL from a teacher distribution of which only some classes were kept.

    The student is taken at the temperature at which the teacher was stored: kept
    probabilities cannot be re-tempered. With S the kept classes and q the student:

    - "tail": sum over S of p log(p / q), plus one bucket for all other classes,
      rest log(rest / (1 - sum over S of q)). Equal models give 0; at k = 16 the gradient's
      cosine with the exact one rose from 0.62 to 0.96 (measured, vocabulary 32,000).
    - "truncate": the teacher is renormalised over S and the rest forgotten; biased.
    - "sample": the classes were drawn from the teacher; the sum of weights (log p - log q)
      is an unbiased estimate (Sparse Logit Sampling, ACL 2025). Without weights all k
      entries weigh 1 / k.

    Entries whose log-probability is minus infinity are padding and contribute nothing.

    Args:
        student_logits: (..., classes).
        teacher: kept classes with the same leading shape.
        tail: how the missing mass is treated.
        mask: leading shape.
        reduction: "mean", "sum" or "none".
        scale: multiply by the teacher's temperature squared.

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: leading shapes differ, or a single class.
        RecipeError: an unknown tail policy.
    """
    if tail not in TAILS:
        raise RecipeError(f"unknown tail policy '{tail}'{nearest(tail, TAILS)}")
    _check_classes(student_logits)
    if teacher.ids.shape[:-1] != student_logits.shape[:-1]:
        raise ModelError(
            f"kept classes of shape {tuple(teacher.ids.shape)} do not fit student logits of "
            f"shape {tuple(student_logits.shape)}: the leading dimensions must be equal"
        )
    temperature = float(teacher.temperature)
    stored = [_without(teacher.logp, mask)]
    if tail == "tail":
        stored.append(_without(teacher.rest.unsqueeze(-1), mask))
    elif tail == "sample" and teacher.weights is not None:
        stored.append(teacher.weights)

    def rows(student: Tensor, ids: Tensor, log_p: Tensor, *more: Tensor) -> Tensor:
        log_q = _tempered(wide(student), temperature).log_softmax(-1)
        log_p = wide(log_p).to(log_q.dtype)
        kept_q = log_q.gather(-1, ids)
        if tail == "sample":
            return _sampled(log_p, kept_q, more[0] if more else None)
        if tail == "truncate":
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            return _expected(log_p, log_p - kept_q)
        rest_q = _missing_mass(log_q, ids, padding=log_p == -math.inf)
        both_p = torch.cat([log_p, wide(more[0]).to(log_q.dtype)], -1)
        return _expected(both_p, both_p - torch.cat([kept_q, rest_q.unsqueeze(-1)], -1))

    items = by_rows(rows, _without(student_logits, mask), teacher.ids, *stored)
    return _reduce(_scaled(items, temperature, scale), mask, reduction)


def sorted_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of the largest probabilities, whatever classes they belong to.

    sum over r <= k of |p_(r) - q_(r)| with p_(r), q_(r) the r-th largest probability of each
    side. Which class stands at which rank is not compared, so the vocabularies may differ; of the
    smaller one the missing classes have probability 0. Universal Logit Distillation (Boizard et
    al. 2024, section 3) sums over all classes: the Wasserstein-1 distance where moving a unit of
    probability from any class to any other costs the same. Here the heads are clipped at k and
    not renormalised.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., other classes), equal leading shape.
        k: largest probabilities of each side that are compared, >= 1.
        temperature: > 0; one number, or one per item.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none"; in [0, 2].

    Raises:
        ModelError: leading shapes differ, or a single class.
        RecipeError: `k` below 1.
    """
    if k < 1:
        raise RecipeError(f"k must be at least 1, not {k}")
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ModelError(
            f"student logits of shape {tuple(student_logits.shape)} and teacher logits of shape "
            f"{tuple(teacher_logits.shape)} must be equal in all but the classes"
        )
    _check_classes(student_logits)
    _check_classes(teacher_logits)

    def head(logits: Tensor) -> Tensor:
        p = _tempered(wide(logits), temperature).softmax(-1)
        largest = p.topk(min(k, p.shape[-1]), dim=-1).values
        return F.pad(largest, (0, k - largest.shape[-1]))

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return (head(teacher) - head(student)).abs().sum(-1)

    items = _in_blocks(rows, temperature, student_logits, teacher_logits, mask=mask)
    return _reduce(items, mask, reduction)


# ------------------------------------------------------------------- sigmoid divergences


def binary_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    form: Literal["stable", "official"] = "stable",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """BinaryKL: KL between the per-class sigmoids, summed over classes (DHKD, section 3).

    temperature^2 * sum over classes of KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(
    s / T))). "mean" is over samples only: dividing by the classes too would make the weight
    of the published recipes a hundred times too small.

    The released code clamps both sigmoids to [1e-8, 1 - 1e-8], which in float32 gives an
    infinite value with zero gradient far out; "official" reproduces that, "stable" works on
    log-sigmoids and is finite everywhere.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0.
        form: "stable" or "official".
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ.
        RecipeError: an unknown form.
    """
    s, t = _wide_pair(student_logits, teacher_logits, mask)
    s, t = s / temperature, t / temperature
    if _is_official(form):
        q, p = _clamped(s.sigmoid()), _clamped(t.sigmoid())
        classes = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    else:
        p = t.sigmoid()
        classes = p * (F.logsigmoid(t) - F.logsigmoid(s))
        classes = classes + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return _reduce(temperature**2 * classes.sum(-1), mask, reduction)


def binary_kl_norm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    form: Literal["stable", "official"] = "stable",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """BinaryKL-Norm: the difference of logits against zero, summed over classes (DHKD).

    KL(Bernoulli(1/2) || Bernoulli(sigmoid((s - t) / T))) * T^2, whose closed form
    T^2 log cosh((s - t) / (2 T)) (reconstructed; exact algebra) is used: near 0 it is
    (s - t)^2 / 8, far out linear with slope T / 2, and it never saturates. The gradient is
    T / 2 tanh((s - t) / (2 T)) per item.

    "official" is the released form with sigmoids clamped to [1e-8, 1 - 1e-8]: beyond about
    18 temperatures its gradient vanishes, and in float32 a positive difference beyond about
    16.6 temperatures gives an infinite value.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0.
        form: "stable" or "official".
        mask: leading shape.
        reduction: "mean" (over items, classes are summed), "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ.
        RecipeError: an unknown form.
    """
    s, t = _wide_pair(student_logits, teacher_logits, mask)
    difference = (s - t) / temperature
    if _is_official(form):
        d = _clamped(difference.sigmoid())
        classes = 0.5 * (0.5 / d).log() + 0.5 * (0.5 / (1 - d)).log()
    else:
        classes = _log_cosh(difference / 2)
    return _reduce(temperature**2 * classes.sum(-1), mask, reduction)


# ------------------------------------------------------------------- squared differences


def mse_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference of tempered logits, mean over classes (Ba and Caruana 2014).

    Also right for a single output (regression), where every softmax loss is constant.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0; one number, or one per item. Both sides are divided by it, as in
            Distiller; there is no factor of its square.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ.
    """
    s, t = _wide_pair(student_logits, teacher_logits, mask)
    items = _tempered(s - t, temperature).square().mean(-1)
    return _reduce(items, mask, reduction)


def mse_probabilities(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference of the two softmax distributions, mean over classes.

    The form used for token tagging by the teacher-student line ProKD builds on.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), same shape.
        temperature: > 0; one number, or one per item.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes differ, or a single class.
    """
    _check_pair(student_logits, teacher_logits)
    log_q = _log_softmax(student_logits, temperature, mask)
    log_p = _log_softmax(teacher_logits, temperature, mask)
    return _reduce((log_q.exp() - log_p.exp()).square().mean(-1), mask, reduction)


# ------------------------------------------------------------------------- shared pieces


def _without(x: Tensor, mask: Tensor | None) -> Tensor:
    """Masked items set to 0, so that whatever they held reaches neither value nor gradient."""
    return x if mask is None else x.masked_fill((mask == 0).unsqueeze(-1), 0.0)


def _check_classes(logits: Tensor) -> None:
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ModelError(
            f"logits of shape {tuple(logits.shape)} have fewer than two classes: their softmax "
            "is constant and sends no gradient; for a single output use mse_logits"
        )


def _check_pair(student: Tensor, teacher: Tensor, least: int = 2) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"student logits of shape {tuple(student.shape)} and teacher logits of shape "
            f"{tuple(teacher.shape)} must be equal in shape, classes last and in one order"
        )
    if least > 1:
        _check_classes(student)


def _wide_pair(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_pair(student, teacher, least=1)
    return wide(_without(student, mask)), wide(_without(teacher, mask))


def _in_blocks(
    rows: Callable[..., Tensor],
    temperature: float | Tensor,
    *logits: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`rows(*logits)` per item, some rows at a time unless every item has its temperature."""
    logits = tuple(_without(x, mask) for x in logits)
    if isinstance(temperature, Tensor):
        return rows(*logits)
    return by_rows(rows, *logits)


def _tempered(x: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return x / (temperature.unsqueeze(-1) if temperature.ndim else temperature).to(x.dtype)
    if temperature <= 0:
        raise RecipeError(f"temperature must be above 0, not {temperature}")
    return x if temperature == 1 else x / temperature


def _log_softmax(logits: Tensor, temperature: float | Tensor, mask: Tensor | None) -> Tensor:
    return _tempered(wide(_without(logits, mask)), temperature).log_softmax(-1)


def _scaled(items: Tensor, temperature: float | Tensor, scale: bool) -> Tensor:
    if not scale:
        return items
    if isinstance(temperature, Tensor):
        return items * temperature.to(items.dtype).square()
    return items if temperature == 1 else items * temperature**2


def _reduce(items: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if mask is not None:
        if mask.shape != items.shape:
            raise ModelError(
                f"a mask of shape {tuple(mask.shape)} does not fit items of shape "
                f"{tuple(items.shape)}"
            )
        weight = mask.to(items.dtype)
        items = items * weight
    if reduction == "none":
        return items
    if reduction == "sum":
        return items.sum()
    if reduction != "mean":
        raise RecipeError(f"unknown reduction '{reduction}'; known: mean, none, sum")
    if mask is None:
        return items.mean() if items.numel() else items.sum()
    # a mask of zeros gives 0 / tiny = 0, with a finite gradient
    return items.sum() / weight.sum().clamp(min=torch.finfo(items.dtype).tiny)


def _mean_forward(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> Tensor | None:
    """The mean forward KL in one sum over items and classes; None where that cannot be known.

    Some operations and their gradients less than item by item, which steps of a millisecond
    feel. A class of weight 0 makes the sum NaN, as NaN itself does: then item by item.
    """
    items = student_logits.numel() // max(1, student_logits.shape[-1])
    if isinstance(temperature, Tensor) or items > block_of(student_logits):
        return None
    if not _may_look(student_logits):
        return None
    log_q = _log_softmax(student_logits, temperature, None)
    log_p = _log_softmax(teacher_logits, temperature, None)
    whole = (log_p.exp() * (log_p - log_q)).sum()
    try:
        known = not math.isnan(whole.item())
    except RuntimeError:  # inside a transform of functions
        return None
    return whole / items if known else None


def _may_look(value: Tensor) -> bool:
    """Whether a number may be read: elsewhere than on the CPU that waits for the device."""
    return value.device.type == "cpu" and value.numel() > 0 and not torch.compiler.is_compiling()


def _expected(log_weight: Tensor, values: Tensor) -> Tensor:
    """Sum of exp(log_weight) values over classes; classes of weight 0 contribute nothing."""
    if not _all_positive(log_weight):
        values = values.masked_fill(log_weight == -math.inf, 0.0)
    return (log_weight.exp() * values).sum(-1)


def _all_positive(log_weight: Tensor) -> bool:
    """Whether no weight is known to be 0, where to look costs less than to mask.

    On the CPU a look is a third of the masking and its backward. Elsewhere it would wait for
    the device, and transforms of functions forbid it: there it is not known.
    """
    if not _may_look(log_weight):
        return False
    try:
        return log_weight.detach().min().item() > -math.inf
    except RuntimeError:
        return False


def _mixture_ratios(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(log(m / p), log(m / q)) for m = share p + (1 - share) q, exactly 0 where p = q.

    Written with expm1 of the difference: adding logarithms of shares would leave rounding
    errors where the two are equal.
    """
    both_absent = (log_p == -math.inf) & (log_q == -math.inf)
    difference = (log_q - log_p).masked_fill(both_absent, 0.0)
    student_larger = difference >= 0
    size = torch.where(student_larger, difference, -difference)
    zero = size.new_zeros(())
    larger_share = torch.where(student_larger, zero + share, zero + (1.0 - share))
    common = torch.log1p(larger_share * torch.expm1(-size))
    over_p = torch.where(student_larger, size, zero) + common
    over_q = torch.where(student_larger, zero, size) + common
    return over_p, over_q


def _generalised_js(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return _expected(log_p, log_p - log_q)
    if beta == 1.0:
        return _expected(log_q, log_q - log_p)
    if eager():
        items: Tensor = _JensenShannon.apply(log_p, log_q, beta)
        return items
    return _mixed_js(log_p, log_q, beta)


def _mixed_js(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """`_JensenShannon` written in operations that every transform knows."""
    over_p, over_q = _mixture_ratios(log_p, log_q, beta)
    return beta * _expected(log_p, -over_p) + (1.0 - beta) * _expected(log_q, -over_q)


class _JensenShannon(torch.autograd.Function):
    """The generalised JS divergence with its gradient in closed form.

    With m = beta p + (1 - beta) q, the derivative in log q is (1 - beta) q log(q / m): the terms
    through m cancel; in log p likewise. log(m / p) = log1p((1 - beta) expm1(log q - log p)) is
    exactly 0 where both are equal. Beyond a ratio of e^80 the rarer one adds nothing.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
        # not a number where both rule a class out: they agree there
        gap = (log_q - log_p).nan_to_num_(0.0, 80.0, -80.0).clamp_(-80.0, 80.0)
        over_p = torch.expm1(gap).mul_(1.0 - beta).log1p_()
        over_q = torch.sub(over_p, gap, out=gap)
        of_p = over_p.mul_(log_p.exp()).mul_(-beta)
        of_q = over_q.mul_(log_q.exp()).mul_(beta - 1.0)
        ctx.beta, ctx.slopes = beta, (of_p, of_q)
        ctx.save_for_backward(log_p, log_q)
        return of_p.sum(-1) + of_q.sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_p, log_q = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            items = _mixed_js(log_p, log_q, ctx.beta)
            asked = [x for x, n in zip((log_p, log_q), needed) if n]
            found = iter(torch.autograd.grad(items, asked, grad, create_graph=True))
            return (*(next(found) if n else None for n in needed), None)
        wide_grad = grad.unsqueeze(-1)
        return (*(s * wide_grad if n else None for s, n in zip(ctx.slopes, needed)), None)


def _sampled(log_p: Tensor, log_q: Tensor, weights: Tensor | None) -> Tensor:
    share = 1.0 / log_p.shape[-1] if weights is None else weights.to(log_p.dtype)
    return (share * (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def _missing_mass(log_q: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
    """Log of the student's mass outside `ids`, summed directly: 1 - sum would lose digits."""
    kept = torch.zeros_like(log_q, dtype=torch.int8)
    kept.scatter_reduce_(-1, ids, (~padding).to(torch.int8), "amax")
    everything = kept.all(-1, keepdim=True)
    # where nothing is missing, any finite value: its weight is 0
    others = log_q.masked_fill(kept.bool() & ~everything, -math.inf)
    return others.logsumexp(-1)


def _log_cosh(x: Tensor) -> Tensor:
    """The logarithm of cosh, accurate to the last digits near 0 and linear far out."""
    small = x.abs() < 1.0
    near = 0.5 * torch.log1p(torch.sinh(x.clamp(-1.0, 1.0)).square())
    size = x.abs()
    far = size + F.softplus(-2.0 * size) - math.log(2.0)
    return torch.where(small, near, far)


def _clamped(probability: Tensor) -> Tensor:
    return probability.clamp(1e-8, 1.0 - 1e-8)


def _is_official(form: str) -> bool:
    if form not in ("stable", "official"):
        raise RecipeError(f"unknown form '{form}'{nearest(form, ('stable', 'official'))}")
    return form == "official"


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RecipeError(f"{name} must lie in [{low:g}, {high:g}], not {value}")
