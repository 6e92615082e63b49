r"""Learning embedding linear projections (LELP; Loo, Iliopoulos, Hu, Vee 2024).

With few classes a teacher's softmax says little: of two classes, one number. Its embeddings
:math:`h \in R^D`, the input of the last linear layer :math:`(W, b)`, still hold structure inside
each class. LELP splits every class into S pseudo-subclasses along linear directions of them, and
the student learns the joint distribution over S C outputs with one cross-entropy.

Stage A, once, on the training inputs without augmentation. With R an orthonormal basis of the
rows of W (less their mean, for a softmax sees differences only):

.. math::
    \tilde h = h - R R^T h, \qquad
    V_c, e_c = \mathrm{PCA}_S \{\tilde h_i : \arg\max_k p_{ik} = c\}, \qquad
    U_c = V_c Q_c, \qquad s_c^2 = \tfrac1S \sum_j e_{cj}

with the class mean :math:`\mu_c` of :math:`\tilde h` and a random orthonormal :math:`Q_c`, without
which the first component alone would decide. Stage B, for every class c of every input:

.. math::
    a_{ics} = U_{cs}^T (\tilde h_i - \mu_c) / s_c, \qquad
    \pi_{ics} = \mathrm{softmax}_s(a_{ic\cdot} / \beta), \qquad
    t_{i(cs)} = p_{ic}\, \pi_{ics}, \quad p_i = \mathrm{softmax}((W h_i + b) / \tau)

Stage C, with the student's joint logits g; stage D predicts
:math:`P_{ic} = \sum_s \mathrm{softmax}(g_i)_{(cs)}`:

.. math::
    L = \alpha\, CE(P_i, y_i) - (1 - \alpha)\, \tau_s^2 \, \tfrac1N \sum_i \sum_{cs}
        t_{i(cs)} \log \mathrm{softmax}(g_i / \tau_s)_{(cs)}

S = 1 is knowledge distillation. Source: arXiv 2409.20449, sections 3.1-3.3. No code is published;
the algebra of centring and scaling, the grouping by the teacher's prediction and the student's
temperature are reconstructed, each an option. Controls of the same width are settings of `split`.

Any teacher with a linear last layer serves: a module (`stillhouse.distill(teacher, student, train,
method="lelp")`), its store, or exported embeddings, weight and bias (`from_arrays`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock, seed_of, uniform_of
from stillhouse.errors import DataError, ModelError, RecipeError, TeacherError
from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.heads import widen_net
from stillhouse.parts.matrices import (
    ClassPCA,
    Nullspace,
    class_pca,
    kmeans,
    nullspace,
    random_rotation,
)
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Teacher, Want

LOGITS, EMBEDDING, JOINT = Want("logits"), Want("tap:head:input"), "joint"
# Splits that are read off the teacher's embeddings; the others are controls.
_FITTED = ("pca", "random-projection", "kmeans")
# A head that is linear gives its own logits to this relative accuracy, from float16 too.
_LINEAR = 0.02


# ---- stage A: directions ------------------------------------------------------------------


def directions(
    pca: ClassPCA, rotations: Sequence[Tensor] | None, scale: str = "per_class"
) -> tuple[Tensor, Tensor]:
    """The directions of each class, rotated, and what their projections are divided by.

    Args:
        pca: of the embeddings in the null space.
        rotations: per class (used_c, used_c) orthonormal; None leaves the components as they
            are.
        scale: "per_class", the root of the mean variance of the directions; or
            "per_direction", each one's own standard deviation.

    Returns:
        U (C, D, S), columns without variance 0; scales (C, S), 1 where there is nothing to
        scale.
    """
    found, scales = torch.zeros_like(pca.directions), torch.ones_like(pca.values)
    for c, used in enumerate(pca.used.tolist()):
        if used == 0:
            continue
        turn = torch.eye(used) if rotations is None else rotations[c]
        turn = turn.to(pca.directions)
        found[c, :, :used] = pca.directions[c, :, :used] @ turn
        variances = pca.values[c, :used]
        own = (turn.square() * variances[:, None]).sum(0)
        scales[c, :used] = (variances.mean().expand(used) if scale == "per_class" else own).sqrt()
    return found, scales


@dataclass(frozen=True)
class Splitting:
    """What splits each class: affine functions of the embedding, one per subclass.

    Attributes:
        weight: (C, S, D).
        offset: (C, S).
        beta: subclass temperature of a softmax over them; 0 takes the largest alone.
    """

    weight: Tensor
    offset: Tensor
    beta: float

    @classmethod
    def along(
        cls, space: Nullspace, mean: Tensor, found: Tensor, scales: Tensor, beta: float
    ) -> Splitting:
        """Projections on directions U (C, D, S) about the class means (C, D), scaled (C, S)."""
        weight = space.apply(found.transpose(1, 2)) / scales[:, :, None]
        return cls(weight, (weight * mean[:, None, :]).sum(-1), beta)

    @classmethod
    def nearest(cls, centres: Sequence[Tensor], subclasses: int) -> Splitting:
        """The nearest of each class's centres (k_c, D), k_c <= S, in the null space."""
        weight = torch.zeros(len(centres), subclasses, centres[0].shape[1], dtype=torch.float64)
        # A centre that is not there is far from everything.
        offset = torch.full(weight.shape[:2], torch.finfo(torch.float32).max, dtype=torch.float64)
        for c, own in enumerate(centres):
            weight[c, : len(own)] = 2 * own.double()
            offset[c, : len(own)] = own.double().square().sum(-1)
        return cls(weight, offset, 0.0)

    def projections(self, embeddings: Tensor) -> Tensor:
        """A (N, C, S) of embeddings (N, D)."""
        flat = F.linear(embeddings, self.weight.to(embeddings).flatten(0, 1))
        found: Tensor = flat.view(-1, *self.offset.shape) - self.offset.to(embeddings)
        return found

    def shares(self, embeddings: Tensor) -> Tensor:
        """Pi (N, C, S) of embeddings (N, D): how each class is divided, sums of 1."""
        found = self.projections(embeddings)
        if self.beta == 0:
            return F.one_hot(found.argmax(-1), found.shape[-1]).to(embeddings.dtype)
        return (found / self.beta).softmax(-1)


def joint_targets(probabilities: Tensor, shares: Tensor) -> Tensor:
    """T (N, C * S) of class probabilities p (N, C) and shares pi (N, C, S)."""
    return (probabilities[:, :, None] * shares).flatten(1)


def entropy_ratio(shares: Tensor) -> float:
    """Mean entropy of the shares (N, C, S) relative to log S: 1 says nothing, 0 is hard."""
    if shares.shape[-1] == 1:
        return 0.0
    entropy = -torch.xlogy(shares, shares).sum(-1).mean()
    return float(entropy) / math.log(shares.shape[-1])


def purity(assigned: Tensor, hidden: Tensor, classes: Tensor) -> float:
    """The share of rows whose subclass (N,) is led by their hidden one (N,), class by class."""
    pairs = torch.stack([classes, assigned, hidden])
    sizes = (pairs.amax(1) + 1).tolist()
    counts = torch.zeros(sizes, dtype=torch.int64, device=pairs.device)
    counts.index_put_(tuple(pairs), torch.ones_like(assigned), accumulate=True)
    return float(counts.amax(-1).sum() / len(assigned))


def head_of(teacher: Teacher, embeddings: Tensor, logits: Tensor) -> Tensor:
    """The weight (C, D) of the teacher's last layer, checked against what the layer gave.

    Where no module is left (a bare store, exported arrays) it is recovered by least squares:
    logits are linear in the embeddings. What is found lies in the span of the embeddings; a
    row's part outside it has moved no logit.

    Args:
        teacher: who gave them.
        embeddings: (N, D).
        logits: (N, C).

    Raises:
        TeacherError: the logits are no linear function of the embeddings.
    """
    h, z = embeddings.double().cpu(), logits.double().cpu()
    z = z - z.mean(1, keepdim=True)
    layer = _last_layer(teacher)
    if layer is not None and layer.weight.shape == (z.shape[1], h.shape[1]):
        weight: Tensor = layer.weight.detach().double().cpu()
        bias = 0.0 if layer.bias is None else layer.bias.detach().double().cpu()
        given = h @ weight.T + bias
        if _close(given - given.mean(1, keepdim=True), z):
            return weight
    middle = h.mean(0)
    solved = torch.linalg.lstsq(h - middle, z - z.mean(0), rcond=1e-6, driver="gelsd").solution
    if not _close((h - middle) @ solved, z - z.mean(0)):
        raise TeacherError(
            "the teacher's logits are no linear function of what the tap 'head:input' gives: name "
            "the input of its last linear layer with teacher: {taps: {'head:input': "
            "'module.path:input'}}"
        )
    recovered: Tensor = solved.T
    return recovered


def _last_layer(teacher: Teacher) -> nn.Linear | None:
    find = getattr(teacher, "head_layer", None)
    try:
        layer: nn.Linear | None = None if find is None else find()
    except (ModelError, TeacherError):
        return None
    return layer


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).square().mean() <= (_LINEAR * wanted.std()) ** 2 + 1e-12)


def fit_splitting(
    embeddings: Tensor,
    groups: Tensor,
    weight: Tensor,
    config: LELP.Config,
    generators: Sequence[torch.Generator],
) -> dict[str, Any]:
    """Stage A.

    Args:
        embeddings: (N, D) of the training inputs.
        groups: (N,) the class of each.
        weight: (C, D) of the teacher's last layer.
        config: `split`, `subclasses`, `nullspace`, `rotate` and `scale` are read.
        generators: the chance of each class.

    Returns:
        "weight" (C, S, D), "offset" (C, S), "beta" of the splitting; what it was made of:
        "basis" (D, r), "mean" (C, D); figures: "outside" the row space is this share of the
        embeddings' variance, "explained" (C,) the subclasses' share of that within each class,
        "used" (C,) directions or clusters.

    Raises:
        RecipeError: more subclasses than the null space has dimensions.
    """
    h, count = embeddings.double(), config.subclasses
    centred = config.nullspace == "centred_rows"
    space = nullspace(weight.to(h.device), centred=centred)
    if config.nullspace == "none":
        space = Nullspace(space.basis[:, :0].double())
    classes, room = len(weight), h.shape[1] - space.rank
    if count > room and config.split != "kmeans":
        raise RecipeError(
            f"settings.subclasses: {count} directions are asked for, the teacher's embeddings have "
            f"{h.shape[1]} dimensions of which its last layer reads {space.rank}; at most {room}"
        )
    inner = space.apply(h)
    pca = class_pca(inner, groups, classes, count if config.split == "pca" else 1)
    variance = (h - h.mean(0)).square().sum()
    outside = float((inner - inner.mean(0)).square().sum() / variance) if variance > 0 else 0.0
    if config.split == "kmeans":
        made, explained, used = _clustered(inner, groups, pca, count, generators)
    else:
        if config.split == "random-projection":
            pca = _at_random(space, inner, groups, pca, count, generators)
        turns = [
            random_rotation(max(1, n), generator=rng)
            for n, rng in zip(pca.used.tolist(), generators, strict=True)
        ]
        rotated = turns if config.rotate and config.split == "pca" else None
        found, scales = directions(pca, rotated, config.scale)
        made = Splitting.along(space, pca.mean, found, scales, config.beta)
        explained, used = pca.values.sum(1) / pca.total.clamp_min(1e-300), pca.used
    return {
        "weight": made.weight,
        "offset": made.offset,
        "beta": made.beta,
        "basis": space.basis,
        "mean": pca.mean,
        "outside": outside,
        "explained": explained,
        "used": used,
    }


def _clustered(
    inner: Tensor,
    groups: Tensor,
    pca: ClassPCA,
    count: int,
    generators: Sequence[torch.Generator],
) -> tuple[Splitting, Tensor, Tensor]:
    centres, explained, used = [], torch.zeros_like(pca.total), torch.zeros_like(pca.used)
    for c, rng in enumerate(generators):
        own = inner[groups == c]
        used[c] = min(count, len(own))
        if len(own) == 0:
            centres.append(inner.new_zeros(0, inner.shape[1]))
            continue
        found = kmeans(own, int(used[c]), generator=rng)
        centres.append(found.centres)
        explained[c] = 1 - found.inertia / len(own) / max(float(pca.total[c]), 1e-300)
    return Splitting.nearest(centres, count), explained, used


def _at_random(
    space: Nullspace,
    inner: Tensor,
    groups: Tensor,
    pca: ClassPCA,
    count: int,
    generators: Sequence[torch.Generator],
) -> ClassPCA:
    """Random orthonormal directions of the null space in the place of principal components."""
    width, shape = inner.shape[1], (len(pca.mean), count)
    found, values = inner.new_zeros(len(pca.mean), width, count), inner.new_zeros(shape)
    for c, rng in enumerate(generators):
        drawn = torch.randn(count, width, generator=rng, dtype=torch.float64).to(inner.device)
        found[c] = torch.linalg.qr(space.apply(drawn).T).Q
        own = (inner[groups == c] - pca.mean[c]) @ found[c]
        values[c] = own.square().mean(0) if len(own) else 0.0
    used = torch.full_like(pca.used, count)
    used[pca.count < 2] = 0
    return ClassPCA(pca.mean, found, values, used, pca.count, pca.total)


# ---- stages B and C: what the student learns ----------------------------------------------


class LELPObjective(Objective):
    """The cross-entropy of the student's joint logits against the teacher's split classes.

    Args:
        student: net with a `WideHead`, whose joint logits (N, C * S) are tapped as "joint".
        task: whose loss the labels use, on the folded logits.
        config: see `LELP.Config`; `subclasses` is the S of the head.
        splitting: of the classes, as stage A found it; None for the controls.
        seed: of the control `split: random`.
    """

    student: Net
    weight: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        student: Net,
        task: Task,
        config: LELP.Config,
        splitting: Splitting | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config
        self.seed = seed
        self.beta = config.beta if splitting is None else splitting.beta
        self.wants = wants_of(config)
        kept = torch.promote_types(next(student.parameters()).dtype, torch.float32)
        for name in ("weight", "offset"):
            value = None if splitting is None else getattr(splitting, name).to(kept)
            self.register_buffer(name, value)

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `subclasses`."""
        out = self.student(batch.view("x"))
        alpha = self.config.alpha
        terms: dict[str, Tensor] = {}
        if alpha > 0:
            terms = {name: alpha * value for name, value in self._loss(out, batch).items()}
        if alpha < 1:
            found = soft_cross_entropy(
                out["taps"][JOINT],
                self.targets(batch, knowledge),
                temperature=self.config.of_student,
                scale=True,
                mask=knowledge.valid,
            )
            terms["subclasses"] = (1 - alpha) * found
        return terms

    def targets(self, batch: Batch, knowledge: Knowledge) -> Tensor:
        """T (N, C * S) of a batch; no gradient."""
        with torch.no_grad():
            logits = wide(knowledge.tensor(LOGITS.key))
            probabilities = (logits / self.config.temperature).softmax(-1)
            return joint_targets(probabilities, self._shares(batch, knowledge, probabilities))

    def _shares(self, batch: Batch, knowledge: Knowledge, probabilities: Tensor) -> Tensor:
        """Pi (N, C, S)."""
        config, shape = self.config, (*probabilities.shape, self.config.subclasses)
        if self.weight is not None and self.offset is not None:
            embeddings = wide(knowledge.tensor(EMBEDDING.key))
            return Splitting(self.weight, self.offset, self.beta).shares(embeddings)
        if config.split == "random":
            drawn = _normal(self.seed, batch["id"], shape[1] * shape[2])
            return (drawn.to(probabilities).view(shape) / config.beta).softmax(-1)
        even = torch.full(shape, 1.0 / shape[2]).to(probabilities)
        if config.split == "oracle":
            own = F.one_hot(batch["subclass"], shape[2]).to(even)
            rows = torch.arange(len(own), device=own.device)
            even[rows, batch["target"]] = own
        return even


def _normal(seed: int, ids: Tensor, count: int) -> Tensor:
    """(N, count) standard normal numbers that are a function of seed and sample alone."""
    uniform = uniform_of(seed_of(seed, "random split"), ids, 0, count)
    normal: Tensor = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return normal


def wants_of(config: LELP.Config) -> tuple[Want, ...]:
    """Logits; and the embeddings where they are split."""
    return (LOGITS, EMBEDDING) if config.split in _FITTED else (LOGITS,)


class LELP(StudentTraining):
    """Splits each class along directions of the teacher's embeddings; the student learns both."""

    card = Card(
        id="lelp",
        title="Linear Projections of Teacher Embeddings for Few-Class Distillation",
        summary="Classes are split into pseudo-subclasses along directions of the teacher's "
        "embeddings.",
        paper="arXiv 2409.20449",
        year=2024,
        authors=("Noel Loo", "Fotis Iliopoulos", "Wei Hu", "Erik Vee"),
        links=("https://arxiv.org/abs/2409.20449",),
        room="images",
        needs=("logits", "taps"),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("capture?", "capture"),
            ("directions?", "closed"),
            ("student", "train"),
        ),
        reconstructed=True,
    )

    class Config(MethodConfig):
        """Settings of `lelp`."""

        # Distillation beside it is run at the temperature that the recipe names.
        shared: ClassVar[frozenset[str]] = frozenset({"temperature"})

        alpha: float = Field(
            0.0,
            ge=0,
            le=1,
            description="weight of the labels; the subclasses have 1 - alpha",
            json_schema_extra={"source": "paper: 0 in all experiments, labels are not used"},
        )
        subclasses: int = Field(
            8,
            ge=1,
            description="S, outputs per class; 1 is knowledge distillation. `split: oracle` takes "
            "the number in the data",
            json_schema_extra={"source": "chosen here; the paper searches a grid"},
        )
        beta: float = Field(
            1.0,
            gt=0,
            description="subclass temperature, on projections of unit variance: small ones leave "
            "one subclass, large ones divide every class evenly",
            json_schema_extra={"source": "chosen here; grid 0.25 to 4"},
        )
        temperature: float = Field(
            1.0,
            gt=0,
            description="of the teacher's class probabilities",
            json_schema_extra={"source": "chosen here: 1 for a calibrated teacher; grid 1, 2, 4"},
        )
        student_temperature: float | None = Field(
            None,
            gt=0,
            description="of the student's joint logits, whose loss is multiplied by its square; "
            "none: as the teacher's",
            json_schema_extra={"source": "chosen here: as in Hinton's distillation"},
        )
        split: Literal["pca", "random-projection", "kmeans", "uniform", "random", "oracle"] = Field(
            "pca",
            description="what splits a class: principal components; random directions; the nearest "
            "of S cluster centres; nothing (S even shares); chance, by sample, as unequal as the "
            "projections; or the true subclasses, where the data know them",
            json_schema_extra={"source": "paper: pca; the others are its ablations and controls"},
        )
        nullspace: Literal["centred_rows", "rows", "none"] = Field(
            "centred_rows",
            description="what is taken out of the embeddings first: the rows of the last layer "
            "less their mean, the rows, or nothing",
            json_schema_extra={"source": "paper, 3.2: the null space; centring chosen here"},
        )
        rotate: bool = Field(
            True,
            description="turn the components at random, so that all directions have the same "
            "variance in expectation",
            json_schema_extra={"source": "paper, 3.2"},
        )
        scale: Literal["per_class", "per_direction"] = Field(
            "per_class",
            description="projections are divided by one number per class, or each by its own "
            "standard deviation",
            json_schema_extra={"source": "reconstructed"},
        )
        grouping: Literal["predicted", "labels"] = Field(
            "predicted",
            description="whose classes the embeddings are grouped by: the teacher's predictions or "
            "the labels",
            json_schema_extra={"source": "chosen here; the paper says class-conditional"},
        )

        @property
        def of_student(self) -> float:
            """The student's temperature."""
            own = self.student_temperature
            return self.temperature if own is None else own

    variants: ClassVar[dict[str, Variant]] = {
        "one": Variant(set={"subclasses": 1}, about="S = 1: knowledge distillation at this tau"),
        "uniform": Variant(
            set={"split": "uniform"}, about="a head of S C outputs without structure"
        ),
        "random": Variant(set={"split": "random"}, about="a random split of each sample"),
        "random-projection": Variant(
            set={"split": "random-projection"}, about="random directions of the null space"
        ),
        "kmeans": Variant(
            set={"split": "kmeans"}, about="S clusters per class, each sample in the nearest"
        ),
        "oracle": Variant(set={"split": "oracle"}, about="the true subclasses"),
        "no-nullspace": Variant(set={"nullspace": "none"}, about="PCA of the embeddings as such"),
        "no-rotation": Variant(set={"rotate": False}, about="the principal components as such"),
        "per-direction": Variant(
            set={"scale": "per_direction"}, about="every direction of unit variance"
        ),
        "by-labels": Variant(set={"grouping": "labels"}, about="grouped by the labels"),
        "s2": Variant(set={"subclasses": 2}, about="two subclasses per class"),
        "s4": Variant(set={"subclasses": 4}, about="four subclasses per class"),
        "s16": Variant(set={"subclasses": 16}, about="sixteen subclasses per class"),
        "sharp": Variant(set={"beta": 0.25}, about="nearly hard subclasses"),
        "flat": Variant(set={"beta": 4.0}, about="nearly even subclasses"),
        "with-labels": Variant(set={"alpha": 0.5}, about="half of the loss are labels"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "lelp", "supervised"),
        Claim("beats knowledge distillation without labels", "accuracy", "lelp", "kd/soft-only"),
        Claim("beats distillation at its own temperature (S = 1)", "accuracy", "lelp", "lelp/one"),
        Claim(
            "the structure helps, not the wide head: beats even splits",
            "accuracy",
            "lelp",
            "lelp/uniform",
        ),
        Claim("beats random splits", "accuracy", "lelp", "lelp/random"),
        Claim("beats k-means splits", "accuracy", "lelp", "lelp/kmeans"),
        Claim(
            "principal components beat random directions",
            "accuracy",
            "lelp",
            "lelp/random-projection",
        ),
        Claim("falls below the true subclasses", "accuracy", "lelp", "lelp/oracle", "lower"),
        Claim("the null space helps", "accuracy", "lelp", "lelp/no-nullspace"),
        Claim("the rotation helps", "accuracy", "lelp", "lelp/no-rotation"),
        Claim("two subclasses per class say less", "accuracy", "lelp", "lelp/s2"),
        Claim("nearly even subclasses say less", "accuracy", "lelp", "lelp/flat"),
        Claim("nearly hard subclasses say less", "accuracy", "lelp", "lelp/sharp"),
        Claim("beats regression of the embeddings", "accuracy", "lelp", "fitnet/soft-only"),
        Claim("beats their relations", "accuracy", "lelp", "rkd/soft-only"),
    ]

    def wants_teacher(self) -> bool:
        """Not at alpha 1."""
        return bool(self.config.alpha < 1)

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Stage A, and the student with its wide head.

        Raises:
            ModelError: the student's last linear layer has not one output per class.
            TeacherError: the teacher does not give its embeddings.
            DataError: the data do not know the subclasses that are asked for.
            RecipeError: more subclasses than the embeddings have room for.
        """
        config, splitting = self._settled(job.task), None
        self.found: dict[str, Any] = {}
        if teacher is not None and config.split in _FITTED:
            self.found = self._directions(job, teacher, config)
            splitting = Splitting(*(self.found[name] for name in ("weight", "offset", "beta")))
        self.head = self._widen(job, student, config.subclasses)
        made = LELPObjective(student, job.task, config, splitting, job.seed)
        return made.to(job.device)

    def _settled(self, task: Task) -> LELP.Config:
        """The settings, with the data's own number of subclasses for the oracle."""
        config: LELP.Config = self.config
        if config.split != "oracle":
            return config
        groups = task.about.get("subclasses")
        if not groups:
            raise DataError(
                f"split 'oracle' needs the true subclasses, which '{task.splits.edition}' does not "
                "tell: join classes with data: {options: {modulo: 2}}"
            )
        return config.model_copy(update={"subclasses": max(len(group) for group in groups)})

    def _widen(self, job: Any, student: Net, subclasses: int) -> str:
        layer, classes = student.head_layer(), len(job.task.about.get("classes", ()))
        if classes and layer.out_features != classes:
            raise ModelError(
                f"the last linear layer '{student.head()}' of {type(student.module).__name__} has "
                f"{layer.out_features} outputs, the data {classes} classes: name its head with "
                "student: {taps: {'head:input': 'module.path:input'}}"
            )
        found: list[str] = []

        def make() -> Net:
            found.append(widen_net(student, subclasses, JOINT))
            return student

        job.build(make, "wide-head")
        return found[0]

    # ---- stage A on a job ---------------------------------------------------------------

    def _directions(self, job: Any, teacher: Teacher, config: LELP.Config) -> dict[str, Any]:
        """The splitting and its figures, computed once."""
        teacher.bind(wants_of(config), job.task)
        move = getattr(teacher, "to", None)
        if move is not None:
            move(job.device)
        found: dict[str, Any] = job.once("directions", lambda: self._fitted(job, teacher, config))
        short = (found["used"] < config.subclasses).nonzero().flatten().tolist()
        if short:
            job.log.write(
                "warning",
                text=f"class {short[0]} has {int(found['used'][short[0]])} directions of its own, "
                f"fewer than the {config.subclasses} subclasses; the rest carry nothing"
                + (f" (so do {len(short) - 1} more classes)" if len(short) > 1 else ""),
            )
        return found

    def _fitted(self, job: Any, teacher: Teacher, config: LELP.Config) -> dict[str, Any]:
        asked = _asked(_training_rows(job), teacher)
        h, logits = asked["embeddings"], asked["logits"]
        if h.ndim != 2:
            raise TeacherError(
                f"the teacher's embeddings are {tuple(h.shape[1:])} per input; one vector is "
                "needed: name the input of its last linear layer with teacher: {taps: "
                "{'head:input': 'module.path:input'}}"
            )
        predicted = logits.argmax(1)
        groups = predicted if config.grouping == "predicted" else asked["target"]
        weight = head_of(teacher, h, logits)
        chance = [job.rng("directions", c) for c in range(logits.shape[1])]
        found = fit_splitting(h, groups, weight, config, chance)
        splitting = Splitting(found["weight"], found["offset"], found["beta"])
        shares = torch.cat([splitting.shares(part) for part in torch.split(h.double(), 1024)])
        found["entropy"] = entropy_ratio(shares)
        if "subclass" in asked:
            own = shares[torch.arange(len(h)), predicted].argmax(-1)
            found["purity"] = purity(own, asked["subclass"], asked["target"])
        return found

    def run(self, job: Any) -> Artifact:
        """Teacher, directions, student; the folding head goes along."""
        teacher = job.teacher() if self.wants_teacher() else None
        objective = self.objective(job, job.student(), teacher)
        assert isinstance(objective, LELPObjective)
        job.fit("student", objective, job.order("train"), teacher=teacher)
        artifact: Artifact = job.model_artifact(objective.export())
        count = objective.config.subclasses
        change = {"head": self.head, "subclasses": count}
        artifact.model["altered"] = [{"by": "stillhouse.parts.heads:widen", "options": change}]
        artifact.meta["subclasses"] = self._figures(count)
        if self.found:
            artifact.attachments["directions"] = self._kept(objective.config, job.seed)
        return artifact

    def _figures(self, subclasses: int) -> dict[str, float]:
        """What is known of the splits, as plain numbers."""
        found = self.found
        figures = {"subclasses": float(subclasses)}
        if found:
            figures["subclass_entropy"] = float(found["entropy"])
            figures["outside_row_space"] = float(found["outside"])
            figures["explained_variance"] = float(found["explained"].mean())
            if "purity" in found:
                figures["subclass_purity"] = float(found["purity"])
        return figures

    def _kept(self, config: LELP.Config, seed: int) -> Artifact:
        """Stage A as it was, so that another student can be taught by the same targets."""
        tensors = {k: v for k, v in self.found.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in self.found.items() if not isinstance(v, Tensor)}
        meta = {"settings": config.model_dump(mode="json"), "seed": seed, **numbers}
        return Artifact("analysis", tensors=tensors, meta=meta)

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The task's figures, and those of the splits."""
        return {**super().judge(job, artifact), **artifact.meta["subclasses"]}

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """What the report shows of the splits."""
        found = artifact.meta["subclasses"]
        texts = {
            "subclasses": "outputs per class",
            "outside_row_space": "share of the embeddings' variance that the last layer does not "
            "read",
            "explained_variance": "share of it within a class that the splits follow (mean of the "
            "classes)",
            "subclass_entropy": "mean entropy of the splits relative to log S (0.3 to 0.8 is "
            "useful; 1 is plain distillation)",
            "subclass_purity": "training rows whose subclass is led by their true one",
        }
        rows: list[list[Any]] = [[text, found[key]] for key, text in texts.items() if key in found]
        attached = artifact.attachments.get("directions")
        if attached is not None:
            names = job.task.about.get("classes", ())
            for name, share in zip(names, attached.tensors["explained"].tolist(), strict=False):
                rows.append([f"share followed within the class '{name}'", share])
        return {"tables": [{"title": "Subclasses", "columns": ["figure", "value"], "rows": rows}]}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "lelp",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "settings": {"subclasses": 3},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }


# ---- asking the teacher about the training inputs -------------------------------------------


def _training_rows(job: Any) -> Iterable[Batch]:
    """The training inputs in order, without augmentation; of stored draws the first.

    A store of augmented views keeps no plain ones.
    """
    store = getattr(getattr(job.recipe, "teacher", None), "store", None)
    drawn = store is not None and bool(store.draws)
    order = job.order("train", job.task.evaluation_batch, shuffle=False, augment=drawn)
    for rows in order.epoch(0, lambda: job.rng("directions")):
        yield order.read(rows, job.views()).to(job.device)


def _asked(batches: Iterable[Batch], teacher: Teacher) -> dict[str, Tensor]:
    """Embeddings (N, D), logits (N, C), and what labels there are, on the CPU."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        with torch.inference_mode():
            knowledge = teacher.knowledge(batch)
        answers = {"embeddings": EMBEDDING.key, "logits": LOGITS.key}
        found = {name: knowledge.tensor(key) for name, key in answers.items()}
        found |= {k: batch[k] for k in ("target", "subclass") if isinstance(batch.get(k), Tensor)}
        said = slice(None) if knowledge.valid is None else knowledge.valid
        for name, value in found.items():
            parts.setdefault(name, []).append(value[said].cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def from_arrays(embeddings: Tensor, weight: Tensor, bias: Tensor | None = None) -> Teacher:
    """A teacher of which only exported arrays are left.

    Args:
        embeddings: (N, D), that of the sample of content id i in row i.
        weight: (C, D) of the last layer.
        bias: (C,).

    Returns:
        It gives embeddings and logits of the stored samples; for `stillhouse.distill`.
    """
    from stillhouse.teachers.function import Callable

    logits = F.linear(embeddings, weight, bias)

    def answer(batch: Batch) -> dict[str, Tensor]:
        rows = batch["id"].to(embeddings.device)
        return {LOGITS.key: logits[rows], EMBEDDING.key: embeddings[rows]}

    digest = hashlib.sha256()
    for array in (embeddings, logits):
        digest.update(array.detach().cpu().contiguous().numpy().tobytes())
    return Callable(
        answer,
        fields=[LOGITS.key, EMBEDDING.key],
        fingerprint=digest.hexdigest(),
        name="exported arrays",
    )
