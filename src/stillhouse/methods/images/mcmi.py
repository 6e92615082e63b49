r"""Maximum conditional mutual information (MCMI; Ye et al., ICLR 2024): a teacher that teaches.

A teacher helps its student in so far as its output estimates the Bayes distribution
:math:`P(y \mid x)`. Trained by the cross-entropy alone it chases the label and squeezes out what
tells the images of one class apart. How much of that is left is the conditional mutual
information: with :math:`P_x = \sigma(f(x))` and :math:`Q^y` the mean of :math:`P_x` over class
:math:`y`,

.. math::
    I(X; \hat Y \mid Y) = E_x\, KL(P_x \,\|\, Q^{y(x)}).

So a trained teacher is tuned for a few more epochs to keep its likelihood high and to raise it:

.. math::
    L = E\, \big[-\log P_x[y]\big] - \lambda\, E\, KL(P_x \,\|\, Q^{y})

with the :math:`Q^y` frozen at the values of the teacher before. The student is then distilled by
any method, unchanged; here by Hinton's at :math:`T = 4`.

With frozen means the second term exceeds the CMI by the divergence of the present means from
them, which has no bound: too large a :math:`\lambda` runs away. So the tuning ends, and goes back
to its last good state, when the validation accuracy sinks too far (`floor`).

Paper and released code (iclr2024mcmi/ICLRMCMI at d12f354):

- The code takes the means in train mode over the augmented data, which moves the running
  statistics of BatchNorm; `centroid_mode: eval` leaves them alone. A class without samples has
  NaN there; here its row is uniform.
- The code keeps the state that is best on the *test* set; here it is the last, or the best on the
  validation split.
- The code's update of the means during tuning is switched off; `centroid_decay` offers it.
- The code removes the rows of dropped classes from each batch of the student; here they are
  removed from its data before batches are cut (data option `drop_classes`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Order, Splits
from stillhouse.clock import Clock, generator
from stillhouse.data.splitting import narrowed
from stillhouse.engine.checkpoint import read_state
from stillhouse.engine.job import Above, Best, Each, Job, Last
from stillhouse.engine.step import seed_device
from stillhouse.errors import DataError, ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import kl
from stillhouse.losses.mutual_information import cmi
from stillhouse.method import Card, Claim, Method, MethodConfig, Variant
from stillhouse.metrics.mutual_information import CMI
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.running import RunningMean, sums_by_key
from stillhouse.parts.schedule import Schedule
from stillhouse.recipe import BudgetSpec
from stillhouse.stages.supervised import Supervised, train_supervised
from stillhouse.stages.tune import best_of
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Teacher, Want
from stillhouse.teachers.live import weights_hash

MOST_SHOWN = 20
METERED = (1.0, 2.0, 4.0, 8.0, 16.0)


class Seen(BaseModel):
    """What a further student sees of the training data; see the data options of these names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    few_shot: int | float | None = Field(None, gt=0)
    drop_classes: list[int | str] = Field(default_factory=list)


# ---- stage 1: class means ----------------------------------------------------------------------


def class_centroids(
    net: Net, batches: Iterable[Mapping[str, Any]], classes: int, *, mode: str = "train"
) -> tuple[Tensor, list[int]]:
    """The mean output of every class over one pass, each sample weighing the same.

    Args:
        net: in mode "train" its BatchNorm layers use batch statistics and move their running
            ones, as in the released code; in mode "eval" it is left as it was.
        batches: with the net's view and `target`; of any sizes.
        classes: number of classes C.
        mode: "train" or "eval".

    Returns:
        `(Q, empty)`: (C, C) rows that sum to 1, without gradient, and the classes without
        samples, whose row is uniform.

    Raises:
        ModelError: the net gives another number of classes.
    """
    training = net.training
    net.train(mode == "train")
    bank: RunningMean | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                logits = net(batch[net.view])["logits"]
                if logits.shape[-1] != classes:
                    raise ModelError(
                        f"the teacher gives {logits.shape[-1]} outputs, the data has {classes} "
                        "classes"
                    )
                if bank is None:
                    bank = _accumulator(classes, logits.device)
                bank.take(*sums_by_key(logits.to(bank.value).softmax(-1), batch["target"], classes))
    finally:
        net.train(training)
    if bank is None:
        raise DataError("no batch: class means need data")
    means = torch.where(bank.present[:, None], bank.value, 1.0 / classes)
    empty = (~bank.present).nonzero()[:, 0].tolist()
    return means / means.sum(-1, keepdim=True), empty


def _accumulator(classes: int, device: torch.device) -> RunningMean:
    # float64 where there is one, so that the cut into batches does not show.
    wide = torch.float32 if device.type == "mps" else torch.float64
    return RunningMean(classes, (classes,), None, dtype=wide).to(device)


# ---- stage 2: tuning ---------------------------------------------------------------------------


class TeacherObjective(Objective):
    """Cross-entropy minus a weight times what keeps the outputs of a class apart.

    Args:
        student: the teacher, which is what learns here; logits (B, C).
        weight: lambda; 0 leaves the cross-entropy alone.
        regulariser: "cmi" raises the conditional mutual information, "entropy" only the entropy
            of every output (is it only that?).
        centroids: (C, C) class means Q, for "cmi".
        decay: of a running update of Q by the batches' own rows; None: Q is frozen.
        smoothing: of the labels.
    """

    bank: RunningMean | None

    def __init__(
        self,
        student: Net,
        *,
        weight: float = 0.15,
        regulariser: Literal["cmi", "entropy"] = "cmi",
        centroids: Tensor | None = None,
        decay: float | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(student)
        self._view = student.view
        self.weight, self.regulariser, self.smoothing = weight, regulariser, smoothing
        self.decay = decay
        self.bank = None
        if centroids is not None:
            classes = len(centroids)
            self.bank = RunningMean(classes, (classes,), decay if decay is not None else 1.0)
            self.bank.fill(centroids)
            self.bank.to(device=centroids.device)

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and, with a weight, `cmi` or `entropy`."""
        out, target = self.student(batch.view(self._view)), batch["target"]
        logits: Tensor = out["logits"]
        terms = {"task": F.cross_entropy(wide(logits), target, label_smoothing=self.smoothing)}
        if self.weight > 0:
            raised = self._raised(logits, target)
            self.note(self.regulariser, raised)
            terms[self.regulariser] = -self.weight * raised
        return terms

    def _raised(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.regulariser == "entropy":
            log_p = logits.float().log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1).mean()
        assert self.bank is not None
        if self.decay is not None:
            outputs = logits.detach().to(self.bank.value).softmax(-1)
            self.bank.propose(*sums_by_key(outputs, target, len(self.bank.value)))
        return cmi(logits, self.bank.value, target)


# ---- stage 3: the student ----------------------------------------------------------------------


class StudentObjective(Objective):
    """Hinton's distillation as the released code weighs it: r CE + a T^2 KL.

    Args:
        student: net with logits (B, C).
        task: whose loss the labels use.
        temperature: T.
        label_weight: r.
        logit_weight: a.
    """

    wants = (Want("logits"),)

    def __init__(
        self,
        student: Net,
        task: Task,
        *,
        temperature: float = 4.0,
        label_weight: float = 0.1,
        logit_weight: float = 0.9,
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.temperature = temperature
        self.label_weight, self.logit_weight = label_weight, logit_weight

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `logits`."""
        out = self.student(batch.view("x"))
        terms: dict[str, Tensor] = {}
        if self.label_weight > 0:
            task = self._loss(out, batch)
            terms.update({name: self.label_weight * value for name, value in task.items()})
        if self.logit_weight > 0:
            found = kl(
                out["logits"],
                knowledge.tensor("logits"),
                temperature=self.temperature,
                mask=knowledge.valid,
                scale=False,
            )
            terms["logits"] = self.logit_weight * self.temperature**2 * found
        return terms


# ---- the method --------------------------------------------------------------------------------


class MCMI(Method):
    """Tunes a teacher for conditional mutual information, then distils it.

    The teacher is the recipe's; a recipe that names only a student tunes that one, after training
    it by the budget. What comes out is the student, with the teacher attached; the teacher itself
    where there is no student, so that `teacher: {method: mcmi, ...}` serves every method.
    """

    card = Card(
        id="mcmi",
        title="Bayes Conditional Distribution Estimation for Knowledge Distillation Based on "
        "Conditional Mutual Information",
        summary="The teacher is tuned to keep apart what it says of the images of one class.",
        paper="ICLR 2024; arXiv 2401.08732",
        year=2024,
        authors=("Linfeng Ye", "Shayan Mohajer Hamidi", "Renhao Tan", "En-Hui Yang"),
        links=("https://arxiv.org/abs/2401.08732", "https://github.com/iclr2024mcmi/ICLRMCMI"),
        room="images",
        needs=("logits", "weights"),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("before?", "closed"),
            ("centroids?", "closed"),
            ("auto?", "train"),
            ("tune?", "train"),
            ("early-teacher?", "train"),
            ("early-stop?", "closed"),
            ("smoothed-teacher?", "train"),
            ("meter", "closed"),
            ("temperature?", "train"),
            ("capture?", "capture"),
            ("student?", "train"),
            ("students?", "train"),
        ),
    )

    class Config(MethodConfig):
        """Settings of `mcmi`."""

        teaches: Literal["mcmi", "mll", "early-stopped", "label-smoothing", "entropy"] = Field(
            "mcmi",
            description="which teacher is used: mcmi, or what it is compared with: mll (before "
            "tuning), early-stopped (as accurate on validation data as the mcmi teacher), "
            "label-smoothing (trained from the start on smoothed labels), entropy (tuned for the "
            "entropy of its outputs instead)",
            json_schema_extra={"source": "sheet: baselines"},
        )
        cmi_weight: float | Literal["auto"] = Field(
            0.15,
            description="lambda, >= 0; auto: the largest of auto_weights whose loss of validation "
            "log-likelihood stays within auto_budget",
            json_schema_extra={"source": "code: 0.15 (fst.txt), 0.1 to 0.25 (CMP.sh)"},
        )
        auto_weights: list[float] = Field(
            default_factory=lambda: [0.05, 0.1, 0.15, 0.25, 0.5],
            description="for cmi_weight: auto, in rising order",
            json_schema_extra={"source": "chosen here"},
        )
        auto_budget: float = Field(
            0.05,
            gt=0,
            description="for cmi_weight: auto: how far the mean log-likelihood on validation data "
            "may fall below that of the tuning without CMI, in nats",
            json_schema_extra={"source": "chosen here"},
        )
        entropy_weight: float = Field(
            0.15,
            ge=0,
            description="for teaches: entropy",
            json_schema_extra={"source": "chosen here: as cmi_weight"},
        )
        smoothing: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="for teaches: label-smoothing",
            json_schema_extra={"source": "Szegedy et al. 2016"},
        )
        tune_epochs: int = Field(
            20,
            ge=1,
            description="of tuning",
            json_schema_extra={"source": "code: FineTuneTeacher.py"},
        )
        tune_lr: float = Field(
            0.05,
            gt=0,
            description="learning rate of tuning at its highest",
            json_schema_extra={"source": "code: 0.05; 0.005 for MobileNetV2 and ShuffleNets"},
        )
        tune_batch: int = Field(
            64, ge=1, description="rows a step of tuning", json_schema_extra={"source": "code: 64"}
        )
        tune_momentum: float = Field(
            0.9,
            ge=0,
            lt=1,
            description="of SGD while tuning",
            json_schema_extra={"source": "code: 0.9"},
        )
        tune_weight_decay: float = Field(
            5e-4, ge=0, description="while tuning", json_schema_extra={"source": "code: 5e-4"}
        )
        keep: Literal["last", "best"] = Field(
            "last",
            description="the state of the tuning that is kept; best is by validation accuracy",
            json_schema_extra={"source": "chosen here; the code takes the best on the test set"},
        )
        floor: float | None = Field(
            0.1,
            gt=0,
            lt=1,
            description="how far validation accuracy may fall below that before tuning; where it "
            "stays below, the tuning ends and goes back to its last state above. None: no floor",
            json_schema_extra={"source": "chosen here: 10 points"},
        )
        patience: int = Field(
            3,
            ge=1,
            description="epochs in a row below the floor that end the tuning: at the published "
            "learning rate the first ones dip, with any weight",
            json_schema_extra={"source": "chosen here"},
        )
        centroid_mode: Literal["train", "eval"] = Field(
            "train",
            description="of BatchNorm and dropout while class means are taken; train moves the "
            "running statistics",
            json_schema_extra={"source": "code: train"},
        )
        centroid_decay: float | None = Field(
            None,
            ge=0,
            le=1,
            description="of a running update of the class means by the batches of the tuning; "
            "None: frozen",
            json_schema_extra={"source": "code: 0.9999, but its call is commented out"},
        )
        temperature: float | Literal["best"] = Field(
            4.0,
            description="of the student's distillation, > 0; best: of temperatures, by the "
            "student's validation accuracy",
            json_schema_extra={"source": "code: 4"},
        )
        temperatures: list[float] = Field(
            default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0],
            description="for temperature: best",
            json_schema_extra={"source": "sheet: baselines"},
        )
        label_weight: float = Field(
            0.1,
            ge=0,
            description="of the labels in the student's loss (r)",
            json_schema_extra={"source": "code: 0.1"},
        )
        logit_weight: float = Field(
            0.9,
            ge=0,
            description="of the teacher in the student's loss (a)",
            json_schema_extra={"source": "code: 0.9"},
        )
        students: dict[str, Seen] = Field(
            default_factory=dict,
            description="further students of the same teacher, by name: what each sees of the "
            "training data ({few_shot: 0.2}, {drop_classes: [6]}, {}); their figures are "
            "NAME_accuracy and so on",
            json_schema_extra={"source": "sheet: the few-shot and zero-shot protocols"},
        )

        @model_validator(mode="after")
        def _in_range(self) -> MCMI.Config:
            for name in ("cmi_weight", "temperature"):
                value = getattr(self, name)
                least = 0.0 if name == "cmi_weight" else math.ulp(0.0)
                if not isinstance(value, str) and not value >= least:
                    raise ValueError(f"{name} must be {'at least' if not least else 'above'} 0")
            if not self.auto_weights or sorted(self.auto_weights) != self.auto_weights:
                raise ValueError("auto_weights must be some weights in rising order")
            if min(self.auto_weights) <= 0 or not self.temperatures or min(self.temperatures) <= 0:
                raise ValueError("auto_weights and temperatures must be above 0")
            if self.label_weight == 0 and self.logit_weight == 0:
                raise ValueError("label_weight and logit_weight are both 0: nothing to learn")
            strange = [name for name in self.students if not name.isidentifier()]
            if strange:
                raise ValueError(f"students: '{strange[0]}' is no name of letters and digits")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={
                "cmi_weight": 0.15, "tune_epochs": 20, "tune_lr": 0.05, "tune_batch": 64,
                "tune_momentum": 0.9, "tune_weight_decay": 5e-4, "centroid_mode": "train",
                "centroid_decay": None, "floor": None, "keep": "last", "temperature": 4.0,
                "label_weight": 0.1, "logit_weight": 0.9,
            },
            about="the released few-shot settings, without the choice on the test set",
        ),
        "zero-shot": Variant(set={"cmi_weight": 0.25}, about="as shown for dropped classes"),
        "mll": Variant(set={"teaches": "mll"}, about="the teacher before tuning"),
        "control": Variant(set={"cmi_weight": 0.0}, about="lambda 0: tuned by cross-entropy alone"),
        "best-temperature": Variant(
            set={"temperature": "best"}, about="the student's temperature chosen on validation"
        ),
        "mll-best-temperature": Variant(
            set={"teaches": "mll", "temperature": "best"},
            about="the teacher before tuning, at its own best temperature",
        ),
        "early-stopped": Variant(
            set={"teaches": "early-stopped"},
            about="the snapshot of the first training that is as accurate as the tuned teacher",
        ),
        "label-smoothing": Variant(
            set={"teaches": "label-smoothing"}, about="a teacher trained on smoothed labels"
        ),
        "entropy": Variant(
            set={"teaches": "entropy"}, about="tuned for the entropy of its outputs instead"
        ),
        "eval-centroids": Variant(
            set={"centroid_mode": "eval"}, about="class means in eval mode"
        ),
        "auto": Variant(
            set={"cmi_weight": "auto"}, about="lambda by a budget of validation log-likelihood"
        ),
    }  # fmt: skip
    claims: ClassVar[list[Claim]] = [
        Claim(
            "few-shot: its student beats that of the same teacher before tuning",
            "accuracy",
            "mcmi",
            "kd",
        ),
        Claim("few-shot: it beats the same tuning without CMI", "accuracy", "mcmi", "mcmi/control"),
        Claim(
            "few-shot: it beats an early-stopped teacher of its own accuracy",
            "accuracy",
            "mcmi",
            "mcmi/early-stopped",
        ),
        Claim(
            "few-shot: it beats the teacher before tuning at that one's best temperature",
            "accuracy",
            "mcmi",
            "mcmi/mll-best-temperature",
        ),
        Claim(
            "few-shot: it beats a label-smoothed teacher",
            "accuracy",
            "mcmi",
            "mcmi/label-smoothing",
        ),
        Claim(
            "few-shot: it beats tuning for entropy, so it is not only that",
            "accuracy",
            "mcmi",
            "mcmi/entropy",
        ),
        Claim("its teacher's CMI is higher", "cmi", "mcmi", "mcmi/mll"),
        Claim(
            "its teacher is less accurate itself", "teacher_accuracy", "mcmi", "mcmi/mll", "lower"
        ),
        Claim(
            "the gain is larger for few samples than for all",
            "few_shot_loss",
            "mcmi",
            "mcmi/mll",
            "lower",
        ),
        Claim(
            "zero-shot: its student knows a class that only the teacher saw better",
            "dropped_unseen_accuracy",
            "mcmi",
            "mcmi/mll",
        ),
    ]

    # ---- run -------------------------------------------------------------------------------

    def run(self, job: Job) -> Artifact:
        """A trained teacher, its class means, the tuning; then the student."""
        self._refuse_early(job)
        told: dict[str, Any] = {"teaches": self.config.teaches}
        net = self._teacher(job, told)
        told.update(self._measured(job, net, "meter", told.pop("centroids", None)))
        role = "teacher" if job.has("teacher") else "student"
        taught: Artifact = job.model_artifact(net, role)
        taught.meta["mcmi"] = told
        if role == "student" or not job.has("student"):
            return taught
        teacher = job.teaching(net)
        student, told["temperature"] = self._distilled(job, teacher)
        artifact: Artifact = job.model_artifact(student)
        artifact.attachments["teacher"] = taught
        for name, seen in self.config.students.items():
            further = self._further(job, name, seen, net, told["temperature"])
            artifact.attachments[name] = job.model_artifact(further)
        artifact.meta["mcmi"] = told
        return artifact

    def _refuse_early(self, job: Job) -> None:
        config = self.config
        tunes = config.teaches in {"mcmi", "entropy", "early-stopped"}
        needing = {
            "floor": tunes and config.floor is not None and config.keep == "last",
            "keep: best": tunes and config.keep == "best",
            "cmi_weight: auto": config.cmi_weight == "auto",
            "teaches: early-stopped": config.teaches == "early-stopped",
            "temperature: best": config.temperature == "best",
        }
        wanting = [name for name, needed in needing.items() if needed]
        if wanting and "val" not in job.splits:
            raise RecipeError(
                f"mcmi: {wanting[0]} needs a validation split: set data.options.val, "
                + ("or settings.floor: null" if wanting == ["floor"] else "or leave it out")
            )
        if config.centroid_decay is not None and job.hardware.world > 1:
            raise RecipeError("mcmi: centroid_decay needs one process; leave it out or devices: 1")
        if config.teaches in {"early-stopped", "label-smoothing"}:
            self._first_budget(job)

    # ---- which teacher ---------------------------------------------------------------------

    def _teacher(self, job: Job, told: dict[str, Any]) -> Net:
        teaches = self.config.teaches
        if teaches == "label-smoothing":
            return self._smoothed(job)
        net = self._trained(job)
        if teaches == "mll":
            return net
        tuned = self._tuned(job, net, told)
        return self._early_stopped(job, tuned, told) if teaches == "early-stopped" else tuned

    def _trained(self, job: Job) -> Net:
        """Stage 0: the teacher that the recipe brings or trains by cross-entropy."""
        if job.has("teacher"):
            return job.trainable_teacher()
        net = job.student()
        job.task.check(net, None)
        share = self._share(job, net, "teacher", budget=job.budget.model_dump())
        train_supervised(job, "teacher", net, split=job.teacher_split, share=share)
        return net

    def _untrained(self, job: Job) -> Net:
        if job.has("teacher"):
            return job.trainable_teacher(trained=False)
        return job.student()

    def _first_budget(self, job: Job) -> Any:
        """The budget of the teacher's first training.

        Raises:
            RecipeError: it is trained elsewhere, so there is nothing to compare with.
        """
        if not job.has("teacher"):
            return job.budget
        budget = getattr(job.recipe.teacher, "train", None)
        if budget is None:
            raise RecipeError(
                f"mcmi: teaches: {self.config.teaches} trains a teacher from its first step; the "
                "recipe says nothing of that: add teacher: {train: {...}}"
            )
        return budget

    def _share(self, job: Job, net: Net, stage: str, **depends: Any) -> dict[str, Any]:
        """All that a stage of the teacher depends on: sides of a comparison then share it."""
        validation = job.splits["val"].fingerprint if "val" in job.splits else ""
        return {
            "method": f"mcmi/{stage}",
            "path": job.path,
            "teacher": [weights_hash(net.module), *(_digest(v) for v in (net.mean, net.std))],
            "data": job.splits[job.teacher_split].fingerprint,
            "val": validation,
            "seed": job.seed,
            "precision": job.hardware.precision,
            "version": __version__,
            **depends,
        }

    def _smoothed(self, job: Job) -> Net:
        net, budget = self._untrained(job), self._first_budget(job)
        objective = TeacherObjective(net, weight=0.0, smoothing=self.config.smoothing)
        depends = {"smoothing": self.config.smoothing, "budget": budget.model_dump()}
        self._first_fit(job, "smoothed-teacher", net, objective, budget, Last(), depends)
        return net

    def _first_fit(
        self,
        job: Job,
        name: str,
        net: Net,
        objective: Objective,
        budget: Any,
        keep: Last | Each,
        depends: Mapping[str, Any],
    ) -> list[Path]:
        """A training from the first step on, with the budget of the teacher's first training."""
        order = job.order(job.teacher_split, budget.batch, draws=None)
        share = self._share(job, net, name, **depends)
        fit = job.budgeted(budget).fit(name, objective, order, keep=keep, share=share)
        return fit.snapshots

    def _early_stopped(self, job: Job, tuned: Net, told: dict[str, Any]) -> Net:
        """The epoch of a first training whose validation accuracy is nearest the tuned one's."""
        net, budget = self._untrained(job), self._first_budget(job)
        snapshots = self._first_fit(
            job,
            "early-teacher",
            net,
            Supervised(net, job.task),
            budget,
            Each(1),
            {"budget": budget.model_dump()},
        )

        def choose() -> dict[str, Any]:
            target = job.evaluate(tuned, "val")["accuracy"]
            found = []
            for path in snapshots[1:]:
                net.module.load_state_dict(read_state(path))
                found.append(job.evaluate(net, "val")["accuracy"])
            apart = [abs(accuracy - target) for accuracy in found]
            nearest = apart.index(min(apart))
            return {"epoch": nearest + 1, "accuracy": found[nearest], "target": target}

        chosen = job.once("early-stop", choose, everywhere=True)
        net.module.load_state_dict(read_state(snapshots[chosen["epoch"]]))
        for name in ("centroids", "stopped", "before", "weight", "auto"):
            told.pop(name, None)  # of the tuned teacher, which only gave the accuracy to match
        told["early_stop"] = chosen
        return net

    # ---- stages 1 and 2 --------------------------------------------------------------------

    def _tuned(self, job: Job, net: Net, told: dict[str, Any]) -> Net:
        if self.config.teaches == "entropy":
            self._tune(job, net, self.config.entropy_weight, None, told)
            return net
        told["before"] = self._measured(job, net, "before")["figures"]
        made = self._centroids(job, net)
        told["centroids"] = centroids = made["centroids"].to(job.device)
        weight = self.config.cmi_weight
        if weight == "auto":
            return self._tuned_by_budget(job, net, centroids, told)
        self._tune(job, net, float(weight), centroids, told)
        return net

    def _centroids(self, job: Job, net: Net) -> dict[str, Any]:
        """Class means, once; what the pass moved in the net is put back from the stage."""
        order = job.order(job.teacher_split, self.config.tune_batch, draws=None)
        classes, mode = len(job.task.about["classes"]), self.config.centroid_mode
        clock = job.clock("centroids")

        def measure() -> dict[str, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(clock.seed_for("noise"))
                seed_device(job.device, clock.seed_for("noise"))
                read = _read_once(job, order, clock)
                means, empty = class_centroids(net, read, classes, mode=mode)
            state = {k: v for k, v in net.named_buffers() if mode == "train"}
            return {"centroids": means.float(), "empty": empty, "buffers": state}

        share = self._share(job, net, "centroids", mode=mode, batch=self.config.tune_batch)
        made: dict[str, Any] = job.once("centroids", measure, share=share)
        if made["empty"]:
            names = ", ".join(str(job.task.about["classes"][k]) for k in made["empty"])
            text = f"no training rows of {names}: their class means are taken as uniform"
            job.log.write("warning", text=text)
        own = dict(net.named_buffers())
        with torch.no_grad():
            for name, value in made["buffers"].items():
                own[name].copy_(value)
        return made

    def _tune(
        self, job: Job, net: Net, weight: float, centroids: Tensor | None, told: dict[str, Any]
    ) -> None:
        """Stage 2, in place."""
        config = self.config
        budget = BudgetSpec(
            epochs=config.tune_epochs,
            batch=config.tune_batch,
            lr=config.tune_lr,
            optimizer="sgd",
            momentum=config.tune_momentum,
            weight_decay=config.tune_weight_decay,
        )
        regulariser: Literal["cmi", "entropy"] = "entropy" if centroids is None else "cmi"
        keep: Last | Best | Above = Best("accuracy") if config.keep == "best" else Last()
        if config.keep == "last" and config.floor is not None:
            before = job.evaluate(net, "val")["accuracy"]
            keep = Above(before - config.floor, "accuracy", patience=config.patience)
        share = self._share(
            job,
            net,
            "tune",
            budget=budget.model_dump(),
            keep=repr(keep),
            weight=weight,
            regulariser=regulariser,
            centroids=_digest(centroids),
            decay=config.centroid_decay,
        )
        objective = TeacherObjective(
            net,
            weight=weight,
            regulariser=regulariser,
            centroids=centroids,
            decay=config.centroid_decay,
        )
        fit = job.budgeted(budget).fit(
            "tune",
            objective,
            job.order(job.teacher_split, config.tune_batch, draws=None),
            schedule=per_epoch_cosine(config.tune_epochs),
            keep=keep,
            share=share,
        )
        told["weight"] = weight
        if fit.stopped:
            told["stopped"] = fit.stopped

    def _tuned_by_budget(self, job: Job, net: Net, centroids: Tensor, told: dict[str, Any]) -> Net:
        """lambda: auto. Weights are raised until too much likelihood is lost."""
        start = {k: v.clone() for k, v in net.state_dict().items()}
        found: list[dict[str, float]] = []
        kept = start
        for number, weight in enumerate([0.0, *self.config.auto_weights]):
            net.load_state_dict(start)
            child = job.child("auto", f"weight-{number}")
            own: dict[str, Any] = {}
            self._tune(child, net, weight, centroids, own)

            def likelihood(child: Job = child) -> float:
                return -float(child.evaluate(net, "val")["nll"])

            value = float(child.once("likelihood", likelihood, everywhere=True))
            found.append({"weight": weight, "log_likelihood": value})
            spent = found[0]["log_likelihood"] - value
            if weight > 0 and (spent > self.config.auto_budget or own.get("stopped")):
                break
            kept = {k: v.clone() for k, v in net.state_dict().items()}
            told["weight"] = weight
        net.load_state_dict(kept)
        told["auto"] = found
        return net

    # ---- the report ------------------------------------------------------------------------

    def _measured(
        self, job: Job, net: Net, name: str, centroids: Tensor | None = None
    ) -> dict[str, Any]:
        """CMI and likelihood of a teacher on all training rows, as they are: a stage."""
        classes = len(job.task.about["classes"])

        def measure() -> dict[str, Any]:
            meter = CMI(classes, METERED, frozen=centroids)
            job.walk(net, job.teacher_split, meter.update)
            if job.hardware.world > 1:
                meter.take(job.hardware.total(meter.totals().to(job.device)))
            return {"figures": meter.compute(), "means": meter.centroids().tolist()}

        made: dict[str, Any] = job.once(name, measure, everywhere=True)
        return {"figures": dict(made["figures"]), "means": [list(row) for row in made["means"]]}

    # ---- stage 3 ---------------------------------------------------------------------------

    def _distilled(self, job: Job, teacher: Teacher) -> tuple[nn.Module, float]:
        """The recipe's student, at the given temperature or the best one."""
        temperature = self.config.temperature
        if temperature == "best":
            child = job.child("temperature")

            def measure(point: Job, value: float) -> float:
                net = self._student(point, teacher, value)
                return float(point.evaluate(net, "val")[job.task.main_metric])

            temperature, _ = best_of(child, "scan", self.config.temperatures, measure)
        return self._student(job, teacher, float(temperature)), float(temperature)

    def _student(self, job: Job, teacher: Teacher, temperature: float) -> nn.Module:
        student = job.student()
        job.task.check(student, None)
        objective = StudentObjective(
            student,
            job.task,
            temperature=temperature,
            label_weight=self.config.label_weight,
            logit_weight=self.config.logit_weight,
        )
        job.fit("student", objective, job.order("train"), teacher=teacher)
        return objective.export()

    def _further(self, job: Job, name: str, seen: Seen, net: Net, temperature: float) -> nn.Module:
        """A further student, on the part of the data that it is to see."""
        child = job.child("students", name)
        child.task = type(job.task)(self._seen_splits(job, name, seen))
        # Asked anew, for where its answers are stored, these are those on other rows.
        return self._student(child, child.teaching(net), temperature)

    def _seen_splits(self, job: Job, name: str, seen: Seen) -> Splits:
        return narrowed(
            job.splits,
            few_shot=seen.few_shot,
            drop_classes=seen.drop_classes,
            seed=job.seed,
            name=f"{job.splits.edition}, student '{name}'",
        )

    # ---- judging ---------------------------------------------------------------------------

    def judge(self, job: Job, artifact: Artifact) -> dict[str, float]:
        """Figures of the student, of its teacher, and of further students."""
        figures = dict(job.task.judge(job, artifact.module, "test"))
        told = artifact.meta["mcmi"]["figures"]
        figures.update({k: v for k, v in told.items() if k in _TOLD})
        if "weight" in artifact.meta["mcmi"]:
            figures["tuning_stopped"] = float("stopped" in artifact.meta["mcmi"])
        taught = artifact.attachments.get("teacher")
        if taught is None:
            return figures
        own = job.evaluate(taught.module, "test")
        figures["teacher_accuracy"], figures["teacher_nll"] = own["accuracy"], own["nll"]
        figures["temperature"] = artifact.meta["mcmi"]["temperature"]
        for name, seen in self.config.students.items():
            child = job.child("students", name)
            child.task = type(job.task)(self._seen_splits(job, name, seen).judging())
            found = child.evaluate(artifact.attachments[name].module, "test")
            wanted = ("accuracy", "unseen_accuracy", "seen_accuracy")
            figures.update({f"{name}_{k}": found[k] for k in wanted if k in found})
        if "full_accuracy" in figures:
            # What the student loses for seeing few: a gain that shrinks with more data shows here.
            figures["few_shot_loss"] = figures["full_accuracy"] - figures["accuracy"]
        return figures

    def details(self, job: Job, artifact: Artifact) -> dict[str, Any]:
        """What the report shows of the teacher."""
        told = artifact.meta["mcmi"]
        rows: list[list[Any]] = [["which teacher", told["teaches"]]]
        if "weight" in told:
            rows.append(["weight (lambda)", told["weight"]])
        rows += [
            [text, told["figures"][name]] for name, text in _TOLD.items() if name in told["figures"]
        ]
        if "stopped" in told:
            rows.append(["the tuning ended early", told["stopped"]])
        if "early_stop" in told:
            rows += [[f"early stop: {k}", v] for k, v in told["early_stop"].items()]
        tables = [{"title": "Teacher", "columns": ["figure", "value"], "rows": rows}]
        tables.append(self._by_temperature(told))
        if "auto" in told:
            columns = ["weight", "log_likelihood"]
            rows = [[row[c] for c in columns] for row in told["auto"]]
            tables.append({"title": "Choice of the weight", "columns": columns, "rows": rows})
        classes = [str(c) for c in job.task.about["classes"]]
        if len(classes) <= MOST_SHOWN:
            rows = [[name, *row] for name, row in zip(classes, told["means"], strict=True)]
            tables.append(
                {
                    "title": "Mean output of the teacher by class",
                    "columns": ["class", *classes],
                    "rows": rows,
                    "caption": "Rows are classes of the training data, at temperature 1.",
                }
            )
        return {"tables": tables}

    def _by_temperature(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """CMI over temperatures, and before the tuning where there was one."""
        sides = {"CMI (nats)": told["figures"]}
        if "before" in told:
            sides = {"before tuning": told["before"], **sides}
        rows = [
            [t, *(side["cmi" if t == 1 else f"cmi_t{t:g}"] for side in sides.values())]
            for t in METERED
        ]
        title = "Conditional mutual information by temperature"
        return {"title": title, "columns": ["temperature", *sides], "rows": rows}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "mcmi",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {
                "model": "stillhouse:mlp",
                "options": {"widths": [16]},
                "train": {"steps": 8, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            },
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "settings": {"tune_epochs": 2, "tune_batch": 16, "tune_lr": 0.01},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }


_TOLD = {
    "cmi": "CMI on the training rows, temperature 1 (nats)",
    "cmi_t4": "CMI on the training rows, temperature 4 (nats)",
    "log_likelihood": "mean log-likelihood of the training rows (nats)",
    "cmi_frozen": "what the tuning has seen: mean KL from the frozen means (nats)",
    "mean_shift": "of it, the shift of the class means (nats)",
}


def _digest(value: Tensor | None) -> str:
    """A hash of a tensor's numbers."""
    if value is None:
        return ""
    return hashlib.sha256(value.detach().cpu().double().numpy().tobytes()).hexdigest()


def per_epoch_cosine(epochs: int) -> Schedule:
    """A factor of the learning rate: half a cosine to 0 that moves once an epoch."""
    return lambda clock: 0.5 * (1.0 + math.cos(math.pi * clock.epoch / epochs))


def _read_once(job: Job, order: Order, clock: Clock) -> Iterable[Batch]:
    """One augmented pass over an order, on the job's device."""
    for rows in order.epoch(0, lambda: generator(clock.seed_for("order"))):
        yield order.read(rows, job.views()).to(job.device)
