"""What a stored record holds: the fields of a teacher's answer, and the form of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.clock import seed_of, uniform_of
from stillhouse.errors import TeacherError, nearest
from stillhouse.teacher import TopK, Value

FORMS = ("dense", "topk", "truncate", "sample")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
}
VALUE_DTYPES = ("float32", "float16", "bfloat16", "int8")
_GROUP = 64  # numbers at least that share one scale of int8: two scales cost 4 bytes of 68


class Column(NamedTuple):
    """One tensor of a record: where it lies and how it is read."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one record's part."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Field:
    """One value of the teacher, and the form in which it is kept.

    Attributes:
        name: the key of `Knowledge` under which it is found ("logits", "weak:logits",
            "tap:low", ...).
        shape: of one sample's dense value, classes last; `()` for one number.
        form: "dense"; "topk" (the k largest log-probabilities and the log of the missing
            mass); "truncate" (the same without the missing mass: biased, for comparison);
            "sample" (k classes drawn from the probabilities, unbiased).
        dtype: of dense values: float32, float16, bfloat16 or int8. int8 keeps codes from -127
            to 127 with a scale and a zero point in float16, value = zero + scale * code, for
            each group of numbers: the last dimensions of the shape that together hold at least
            64 (a token's vector, a channel's map), else the whole record. What comes back is
            off by half a scale at most: (largest - smallest of the group) / 508, and the
            rounding of zero and scale. Log-probabilities are always float16.
        k: classes kept by the forms other than dense. The default of 16 with the tail's mass
            lifts the cosine with the exact gradient from 0.62 to 0.96 on flat logits.
        temperature: at which the probabilities are taken, forms other than dense.
        proposal: power of the probabilities that "sample" draws from. 1 draws from the
            teacher itself; the weights make up for any other (self-normalised importance
            sampling, Sparse Logit Sampling, ACL 2025).
        seed: of the sampling.
    """

    name: str
    shape: tuple[int, ...]
    form: str = "dense"
    dtype: str = "float16"
    k: int = 16
    temperature: float = 1.0
    proposal: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise TeacherError(
                f"a store keeps '{self.name}' in no form '{self.form}'{nearest(self.form, FORMS)}"
            )
        if self.dtype not in VALUE_DTYPES:
            raise TeacherError(
                f"a store keeps '{self.name}' in no dtype '{self.dtype}'"
                f"{nearest(self.dtype, VALUE_DTYPES)}"
            )
        if self.form == "dense":
            return
        if not self.shape or self.k < 1:
            raise TeacherError(
                f"form '{self.form}' of '{self.name}' needs classes last and k of at least 1; "
                f"the shape is {self.shape}, k is {self.k}"
            )
        if self.form != "sample" and self.k >= self.classes:
            raise TeacherError(
                f"form '{self.form}' with k = {self.k} of '{self.name}' leaves nothing out of "
                f"{self.classes} classes: use form: dense, or a smaller k"
            )
        if self.temperature <= 0:
            raise TeacherError(f"the temperature of '{self.name}' must be above 0")

    @property
    def classes(self) -> int:
        """Size of the last dimension."""
        return self.shape[-1]

    def columns(self) -> list[Column]:
        """The tensors that a record holds for this field."""
        if self.form == "dense":
            value = Column("value", self.dtype, self.shape)
            if self.dtype != "int8":
                return [value]
            groups = self._groups()
            return [Column("scale", "float16", groups), Column("zero", "float16", groups), value]
        lead = self.shape[:-1]
        ids = Column("ids", "int16" if self.classes <= 1 << 16 else "int32", (*lead, self.k))
        rest = [Column("rest", "float16", lead)] if self.form == "topk" else []
        return [ids, Column("logp", "float16", (*lead, self.k)), *rest]

    def _groups(self) -> tuple[int, ...]:
        """The leading dimensions whose every index has a scale of its own in int8."""
        for at in range(len(self.shape) - 1, 0, -1):
            if math.prod(self.shape[at:]) >= _GROUP:
                return self.shape[:at]
        return ()

    def encode(self, value: Tensor, ids: Tensor, draw: int | Tensor) -> dict[str, Tensor]:
        """The columns of a batch of dense values.

        Args:
            value: (B, *shape) on any device; reduced there, so that little is moved.
            ids: (B,) sample ids, which with the draw seed the sampling.
            draw: augmentation number, one or (B,).

        Raises:
            TeacherError: the shape differs, or there is NaN or infinity.
        """
        if tuple(value.shape[1:]) != self.shape:
            raise TeacherError(
                f"the teacher gave '{self.name}' of shape {tuple(value.shape[1:])} per sample, "
                f"the store was made for {self.shape}"
            )
        _refuse_nan(self.name, value, ids)
        if self.form == "dense":
            return self._encode_dense(value)
        logp = torch.log_softmax(value.float() / self.temperature, dim=-1)
        if self.form == "sample":
            chosen = self._sample(logp, ids, draw)
            return {"ids": chosen, "logp": logp.gather(-1, chosen)}
        top = logp.topk(self.k, dim=-1)
        found = {"ids": top.indices, "logp": top.values}
        if self.form == "topk":
            found["rest"] = logp.scatter(-1, top.indices, -math.inf).logsumexp(-1)
        return found

    def _encode_dense(self, value: Tensor) -> dict[str, Tensor]:
        if self.dtype == "int8":
            return self._encode_int8(value)
        kept = value.to(DTYPES[self.dtype])
        if self.dtype != "float16" or _all_finite(kept):
            return {"value": kept}
        grown = torch.isinf(kept) & torch.isfinite(value)
        if bool(grown.any()):
            raise TeacherError(
                f"'{self.name}' reaches {float(value[grown][0]):.3g}, more than float16 "
                "holds (65504): store it as float32 or bfloat16"
            )
        return {"value": kept}

    def _encode_int8(self, value: Tensor) -> dict[str, Tensor]:
        group = value.float().reshape(len(value), *self._groups(), -1)
        low, high = group.aminmax(dim=-1)
        if not _all_finite(low) and bool(torch.isinf(low).any()):
            raise TeacherError(f"'{self.name}' holds minus infinity, which int8 cannot keep")
        zero = (low / 2 + high / 2).to(torch.float16)
        middle = zero.float()
        # Measured from the rounded zero, and rounded up: no code leaves the range.
        scale = _half_above(torch.maximum(high - middle, middle - low) / 127.0)
        if bool((torch.isinf(zero) | torch.isinf(scale)).any()):
            raise TeacherError(
                f"'{self.name}' reaches from {float(low.min()):.3g} to {float(high.max()):.3g}, "
                "more than int8 with a float16 scale and zero point holds: store it as float32 "
                "or bfloat16"
            )
        step = scale.float()
        step = torch.where(step > 0, step, 1.0).unsqueeze(-1)
        code = ((group - middle.unsqueeze(-1)) / step).round_().clamp_(-127, 127)
        return {"scale": scale, "zero": zero, "value": code.to(torch.int8).reshape(value.shape)}

    def _sample(self, logp: Tensor, ids: Tensor, draw: int | Tensor) -> Tensor:
        lead = math.prod(self.shape[:-1])
        seed = seed_of(self.seed, "store", self.name)
        uniform = uniform_of(seed, ids, draw, lead * self.k).to(logp.device)
        # float32 sums lose the rare classes of a large vocabulary
        wide = torch.float32 if logp.device.type == "mps" else torch.float64
        mass = torch.softmax(logp * self.proposal, dim=-1).to(wide).cumsum(-1)
        points = uniform.reshape(*logp.shape[:-1], self.k).to(wide) * mass[..., -1:]
        return torch.searchsorted(mass, points, right=True).clamp_max(self.classes - 1)

    def decode(self, columns: Mapping[str, Tensor]) -> Value:
        """A batch's value from its columns, float32 (ids int64), on their device."""
        if self.form == "dense":
            value = columns["value"].float()
            if self.dtype != "int8":
                return value
            zero, scale = (columns[n].float().unsqueeze(-1) for n in ("zero", "scale"))
            group = value.reshape(*scale.shape[:-1], -1)
            return torch.addcmul(zero, group, scale).reshape(value.shape)
        ids = columns["ids"].long()
        if columns["ids"].dtype == torch.int16:
            ids = ids & 0xFFFF  # kept as unsigned, which few kernels know
        logp = columns["logp"].float()
        if self.form == "sample":
            weights = torch.softmax(logp * (1.0 - self.proposal), dim=-1)
            rest = torch.full_like(logp[..., 0], -math.inf)
            return TopK(ids, logp, rest, self.temperature, weights)
        if self.form == "topk":
            return TopK(ids, logp, columns["rest"].float(), self.temperature)
        rest = torch.full_like(logp[..., 0], -math.inf)
        return TopK(ids, logp, rest, self.temperature)


def _half_above(value: Tensor) -> Tensor:
    """The least float16 that is not below `value` >= 0; infinity above 65504."""
    half = value.to(torch.float16)
    # The bits of non-negative floats are in the order of their values.
    bits = half.view(torch.int16)
    return torch.where(half.float() < value, bits + 1, bits).view(torch.float16)


def _all_finite(value: Tensor) -> bool:
    """Whether one look at the sum shows it; False may also mean that the sum overflowed."""
    return math.isfinite(value.sum(dtype=torch.float32).item())


def _refuse_nan(name: str, value: Tensor, ids: Tensor) -> None:
    if _all_finite(value):
        return
    # minus infinity is an answer: a class that is ruled out
    wrong = (torch.isnan(value) | (value == math.inf)).reshape(len(value), -1).any(1)
    if bool(wrong.any()):
        bad = ids[wrong.to(ids.device)].tolist()
        raise TeacherError(
            f"the teacher gave NaN or infinity in '{name}' for {len(bad)} samples (ids {bad[:5]}"
            f"{', ...' if len(bad) > 5 else ''}); nothing of this batch is stored"
        )


class Place(NamedTuple):
    """A column of a field, and the byte of the record at which it begins."""

    field: Field
    column: Column
    offset: int


def lay_out(fields: Sequence[Field]) -> tuple[list[Place], int]:
    """Where each column lies in a record, and the record's stride."""
    pairs = [(f, c) for f in fields for c in f.columns()]
    # widest first: every column is then aligned without padding between
    pairs.sort(key=lambda pair: -DTYPES[pair[1].dtype].itemsize)
    places, offset = [], 0
    for owner, column in pairs:
        places.append(Place(owner, column, offset))
        offset += column.bytes
    widest = max(DTYPES[c.dtype].itemsize for _, c in pairs)
    return places, -(-offset // widest) * widest


def key_of(*parts: Sequence[str | int] | Tensor) -> Tensor:
    """64-bit ids of tuples, such as (query, passage) or (id, view).

    Args:
        parts: columns of equal length; strings and integers.

    Returns:
        (N,) int64, non-negative; equal tuples have equal ids.
    """
    columns = [p.tolist() if isinstance(p, Tensor) else list(p) for p in parts]
    return torch.tensor([seed_of(*row) for row in zip(*columns, strict=True)], dtype=torch.int64)
