r"""Dual-head knowledge distillation (DHKD; Yang et al., KDD 2025).

A softmax hides the common level of the logits; a loss on the logits themselves carries more.
But the cross-entropy and such a loss fight in one linear classifier, while they agree in the
backbone. So each gets a head of its own on the same features :math:`z = B(x)`: the main head
:math:`f_1` learns the labels :math:`y` only, the auxiliary head :math:`f_2` the teacher's logits
:math:`t` only, and is thrown away at export.

.. math::
    L = \gamma\, CE(f_1(z), y) + \alpha\, \frac{\tau^2}{N} \sum_{n,k}
        \log\cosh\frac{f_2(z)_{nk} - t_{nk}}{2 \tau}

The second term is BinaryKL-Norm in closed form (reconstructed; exact algebra, and equal to the
released form inside its clamp). With gradient alignment the gradient :math:`g_1` of the second
term is projected where it opposes :math:`g_0` of the first: where
:math:`\langle g_1, g_0 \rangle < 0`, :math:`g_1 \leftarrow g_1 -
\frac{\langle g_1, g_0 \rangle}{\|g_0\|^2} g_0`; then the step is made with :math:`g_0 + g_1`.

Sources: arXiv 2411.08937 and penghui-yang/DHKD at 7976c69. That each of the normalisation, the
alignment and the non-linear head adds something is inferred (reconstructed): variants measure it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.losses.logits import binary_kl, binary_kl_norm, kl, mse_logits
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.metrics.head_geometry import head_geometry
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.gradient import Project, cosine
from stillhouse.parts.heads import ExtraHead
from stillhouse.parts.schedule import constant, switch_off
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want

TASK, LOGITS = "task", "logits"


class DHKDObjective(Objective):
    """Labels on the main head, the teacher's logits on the auxiliary head.

    Args:
        student: net with logits (N, K) and a last linear layer.
        task: whose loss the labels use; its terms are named "task" or "task/...".
        config: see `DHKD.Config`.
        extra: the auxiliary head; None when one head carries both losses.

    Attributes:
        cosines: running sums of the cosine between the gradients of the two losses, and how
            many were taken: (backbone, shared head, count). A diagnostic.
    """

    wants = (Want("logits"),)
    student: Net
    extra: ExtraHead | None
    cosines: Tensor

    def __init__(
        self, student: Net, task: Task, config: DHKD.Config, extra: ExtraHead | None = None
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config
        self.extra = extra
        if extra is not None:
            student.add_tap("head:input")
        self.alpha = constant(config.alpha)
        if config.switch_off_epoch is not None:
            self.alpha = switch_off(config.switch_off_epoch, config.alpha)
        self.register_buffer("cosines", torch.zeros(3))

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `logits`."""
        out = self.student(batch.view("x"))
        terms: dict[str, Tensor] = {}
        if self.config.gamma > 0:
            found = self._loss(out, batch)
            terms = {name: self.config.gamma * value for name, value in found.items()}
        if self.config.alpha > 0:
            terms[LOGITS] = self._distil(out, knowledge, self.alpha(clock))
        if self._measures(clock) and terms.keys() > {LOGITS}:
            self._measure(terms)
        return terms

    def _distil(self, out: dict[str, Any], knowledge: Knowledge, alpha: float) -> Tensor:
        logits = out["logits"] if self.extra is None else self.extra(out["taps"]["head:input"])
        if alpha == 0:
            # Switched off, the term stays and reaches the auxiliary head, which then only
            # decays; a wrap over several processes would miss the head otherwise.
            zero: Tensor = logits.sum() * 0.0
            return zero
        return alpha * self.distance(logits, knowledge)

    def distance(self, student: Tensor, knowledge: Knowledge) -> Tensor:
        """How far logits (N, K) are from the teacher's, by `config.loss`; mean over rows."""
        config, mask = self.config, knowledge.valid
        teacher, temperature = knowledge.tensor("logits"), config.temperature
        if config.loss == "norm":
            return binary_kl_norm(
                student, teacher, temperature=temperature, form=config.form, mask=mask
            )
        if config.loss == "binary":
            return binary_kl(student, teacher, temperature=temperature, form=config.form, mask=mask)
        if config.loss == "kd":
            return kl(student, teacher, temperature=temperature, mask=mask)
        return mse_logits(student, teacher, mask=mask)

    # ---- the diagnostic: do the two losses pull the same way? -----------------------------

    def _measures(self, clock: Clock) -> bool:
        every = self.config.measure_every
        due = every > 0 and clock.step % every == 0 and self.alpha(clock) > 0
        return due and torch.is_grad_enabled()

    def _measure(self, terms: dict[str, Tensor]) -> None:
        """Cosines between the gradients of labels and logits, in the backbone and the head."""
        head = list(self.student.head_layer().parameters())
        shared = {id(p) for p in head}
        backbone = [p for p in self.student.parameters() if p.requires_grad and id(p) not in shared]
        labels = torch.stack([v for k, v in terms.items() if k != LOGITS]).sum()
        values = []
        for name, params in (("backbone", backbone), ("head", head)):
            pair = [
                torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                for loss in (labels, terms[LOGITS])
            ]
            found = cosine(*pair)
            if found is None:  # an auxiliary head leaves the main head to the labels
                values.append(self.cosines.new_zeros(()))
                continue
            self.note(f"cosine/{name}", found)
            values.append(found.to(self.cosines))
        self.propose(cosines=self.cosines + torch.stack([*values, torch.ones_like(values[0])]))

    def diagnostics(self) -> dict[str, float]:
        """Geometry of the main head, and the mean cosines over the training."""
        found = head_geometry(self.student.head_layer().weight)
        backbone, head, count = self.cosines.tolist()
        if count:
            found["cosine_backbone"] = backbone / count
            if self.extra is None:
                found["cosine_head"] = head / count
        return found


class DHKD(StudentTraining):
    """Two heads on one backbone: labels on one, the teacher's logits on the other."""

    card = Card(
        id="dhkd",
        title="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an "
        "Auxiliary Head",
        summary="An auxiliary head learns the teacher's logits, the main head only the labels.",
        paper="KDD 2025 (V.2), pp. 3530-3541; arXiv 2411.08937",
        year=2025,
        authors=("Penghui Yang", "Chen-Chen Zong", "Sheng-Jun Huang", "Lei Feng", "Bo An"),
        links=("https://arxiv.org/abs/2411.08937", "https://github.com/penghui-yang/DHKD"),
        room="images",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
        reconstructed=True,
    )

    class Config(MethodConfig):
        """Settings of `dhkd`."""

        gamma: float = Field(
            1.0,
            ge=0,
            description="weight of the labels",
            json_schema_extra={"source": "code: 1 in all published runs"},
        )
        alpha: float = Field(
            1.0,
            ge=0,
            description="weight of the teacher's logits; the loss sums over classes",
            json_schema_extra={"source": "code: 1 (CIFAR-100), 0.1 (ImageNet)"},
        )
        temperature: float = Field(
            2.0,
            gt=0,
            description="of the logit loss; for binary losses the gradient per logit is at most "
            "half of it",
            json_schema_extra={"source": "code: 2; 4 for loss: kd"},
        )
        loss: Literal["norm", "binary", "kd", "mse"] = Field(
            "norm",
            description="norm is BinaryKL-Norm, binary BinaryKL, kd the softmax divergence, mse "
            "the mean squared difference of logits",
            json_schema_extra={"source": "paper: norm"},
        )
        heads: Literal["dual", "single"] = Field(
            "dual",
            description="single puts both losses on one head: the failure the paper starts from",
            json_schema_extra={"source": "paper: dual"},
        )
        extra_head: Literal["linear", "nonlinear"] = Field(
            "linear",
            description="the auxiliary head; nonlinear (Linear, Dropout, BatchNorm, ReLU, Linear) "
            "where the architectures differ",
            json_schema_extra={"source": "code, README; the rule from the paper by a review"},
        )
        hidden: int = Field(
            200,
            ge=1,
            description="width of the non-linear auxiliary head",
            json_schema_extra={"source": "code: models/classifier.py"},
        )
        dropout: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="in the non-linear auxiliary head",
            json_schema_extra={"source": "code: models/classifier.py"},
        )
        align: Literal["all", "shared", "none"] = Field(
            "all",
            description="gradient alignment: inner product and norm over all parameters, or over "
            "those that both losses reach; none switches it off",
            json_schema_extra={"source": "code: all on CIFAR-100, none on ImageNet"},
        )
        switch_off_epoch: int | None = Field(
            None,
            ge=0,
            description="from this epoch on (counted from 0) the teacher is no longer followed",
            json_schema_extra={"source": "code: 50 of 100 on ImageNet, never on CIFAR-100"},
        )
        form: Literal["stable", "official"] = Field(
            "stable",
            description="official clamps the sigmoids as released: no gradient, or in float32 an "
            "infinite loss, for very large differences",
            json_schema_extra={"source": "sheet: stable; code: official"},
        )
        measure_every: int = Field(
            25,
            ge=0,
            description="steps between measurements of the cosine between the two losses' "
            "gradients; 0 never",
            json_schema_extra={"source": "ours: the diagnostic of the paper's analysis"},
        )

        @model_validator(mode="after")
        def _something_to_learn(self) -> DHKD.Config:
            if self.gamma == 0 and self.alpha == 0:
                raise ValueError("gamma and alpha are both 0, so nothing would be learnt")
            if self.gamma == 0 and self.heads == "dual":
                raise ValueError("gamma 0 leaves the main head untrained: use heads: single")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={"form": "official", "align": "all"}, about="the released CIFAR-100 settings"
        ),
        "imagenet": Variant(
            set={"alpha": 0.1, "align": "none", "switch_off_epoch": 50},
            about="the released ImageNet settings, for 100 epochs",
        ),
        "no-alignment": Variant(set={"align": "none"}, about="the gradients are simply added"),
        "shared-alignment": Variant(
            set={"align": "shared"}, about="projection within what both losses reach"
        ),
        "nonlinear": Variant(set={"extra_head": "nonlinear"}, about="non-linear auxiliary head"),
        "published-weights": Variant(
            set={"gamma": 1.0, "alpha": 1.0}, about="both losses weigh 1, as on CIFAR-100"
        ),
        "single-binary": Variant(
            set={"heads": "single", "loss": "binary", "align": "none"},
            about="CE + BinaryKL on one head, at the recipe's own weight",
        ),
        "single-norm": Variant(
            set={"heads": "single", "align": "none"},
            about="CE + BinaryKL-Norm on one head, at the recipe's own weight",
        ),
        "single-binary-published": Variant(
            set={"gamma": 1.0, "alpha": 1.0, "heads": "single", "loss": "binary", "align": "none"},
            about="CE + BinaryKL on one head, both weighing 1: the motivating failure",
        ),
        "single-norm-published": Variant(
            set={"gamma": 1.0, "alpha": 1.0, "heads": "single", "align": "none"},
            about="CE + BinaryKL-Norm on one head, both weighing 1",
        ),
        "binary-only": Variant(
            set={"gamma": 0.0, "heads": "single", "loss": "binary", "align": "none"},
            about="BinaryKL alone, without labels",
        ),
        "dual-kd": Variant(
            set={"loss": "kd", "temperature": 4.0, "align": "none"},
            about="softmax distillation on the auxiliary head",
        ),
        "dual-mse": Variant(
            set={"loss": "mse", "align": "none"},
            about="mean squared difference of logits on the auxiliary head",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "dhkd", "supervised"),
        Claim("beats knowledge distillation", "accuracy", "dhkd", "kd"),
        Claim(
            "cross-entropy and BinaryKL on one head fall below cross-entropy alone",
            "accuracy",
            "dhkd/single-binary",
            "supervised",
            "lower",
        ),
        Claim(
            "cross-entropy and BinaryKL on one head fall below BinaryKL alone",
            "accuracy",
            "dhkd/single-binary",
            "dhkd/binary-only",
            "lower",
        ),
        Claim(
            "the auxiliary head is what makes the logit loss work",
            "accuracy",
            "dhkd",
            "dhkd/single-norm",
        ),
        Claim("gradient alignment adds to it", "accuracy", "dhkd", "dhkd/no-alignment"),
        Claim(
            "BinaryKL-Norm beats the softmax loss on the auxiliary head",
            "accuracy",
            "dhkd",
            "dhkd/dual-kd",
        ),
        Claim(
            "BinaryKL-Norm beats squared differences on the auxiliary head",
            "accuracy",
            "dhkd",
            "dhkd/dual-mse",
        ),
        # Formulated after a first bench at the recipe's weight, on whose seeds they are measured:
        # exploratory until they are shown on other seeds or data.
        Claim(
            "post hoc: at the published weights, CE + BinaryKL on one head fall below CE alone",
            "accuracy",
            "dhkd/single-binary-published",
            "supervised",
            "lower",
        ),
        Claim(
            "post hoc: at the published weights, the auxiliary head makes the logit loss work",
            "accuracy",
            "dhkd/published-weights",
            "dhkd/single-norm-published",
        ),
        Claim(
            "post hoc: two heads beat one with BinaryKL", "accuracy", "dhkd", "dhkd/single-binary"
        ),
    ]

    def wants_teacher(self) -> bool:
        """Not at alpha 0."""
        return bool(self.config.alpha > 0)

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Two heads, unless one is to carry both losses or the teacher has no weight.

        Raises:
            ModelError: the student's last linear layer has not one output per class.
        """
        extra = None
        if self.config.heads == "dual" and self.config.alpha > 0:
            extra = job.build(lambda: self._head(student, job.task), "extra-head")
        return DHKDObjective(student, job.task, self.config, extra)

    def _head(self, student: Net, task: Task) -> ExtraHead:
        layer = student.head_layer()
        classes = len(task.about.get("classes", ())) or layer.out_features
        if layer.out_features != classes:
            raise ModelError(
                f"the last linear layer '{student.head()}' of {type(student.module).__name__} has "
                f"{layer.out_features} outputs, the data {classes} classes: name its head with "
                "student: {taps: {'head:input': 'module.path:input'}}"
            )
        config = self.config
        return ExtraHead(layer, config.extra_head, hidden=config.hidden, dropout=config.dropout)

    def training(self, job: Any) -> dict[str, Any]:
        """The projection of conflicting gradients, unless it is switched off."""
        config = self.config
        if config.align == "none" or config.alpha == 0 or config.gamma == 0:
            return {}
        return {"gradient": Project((TASK,), (LOGITS,), config.align)}

    def run(self, job: Any) -> Artifact:
        """The training, and what its heads looked like."""
        teacher = job.teacher() if self.wants_teacher() else None
        objective = self.objective(job, job.student(), teacher)
        assert isinstance(objective, DHKDObjective)
        job.fit("student", objective, job.order("train"), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(objective.export())
        artifact.meta["heads"] = objective.diagnostics()
        return artifact

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The task's figures, and those of the main head."""
        return {**super().judge(job, artifact), **artifact.meta["heads"]}

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """What the report shows of the heads."""
        found = artifact.meta["heads"]
        classes = len(job.task.about["classes"])
        rows = [
            ["mean cosine of centred rows of the main head", found["head_cosine"]],
            ["the same of a simplex", -1.0 / (classes - 1)],
            ["spread of these cosines (simplex: 0)", found["head_cosine_spread"]],
            ["spread of the rows' norms (simplex: 0)", found["head_norm_spread"]],
        ]
        for place, text in (("backbone", "the backbone"), ("head", "the shared head")):
            if f"cosine_{place}" in found:
                rows.append(
                    [
                        f"mean cosine between the two losses' gradients in {text}",
                        found[f"cosine_{place}"],
                    ]
                )
        return {"tables": [{"title": "Heads", "columns": ["figure", "value"], "rows": rows}]}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "dhkd",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "settings": {"extra_head": "nonlinear", "hidden": 8, "measure_every": 2},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
