r"""Dual-head optimisation (DHO; Kang, Lee, Jang, Hwang 2025): few labels and a teacher's opinion.

A vision-language teacher has soft labels :math:`t(x)` for every image, the data set has hard ones
for few. Where they disagree, the two signals pull one classifier in opposite directions. So the
student :math:`g` keeps two heads on its features :math:`z`: :math:`f_{ce}` learns the labels
:math:`y` of the labelled images :math:`x_l`, :math:`f_{kd}` the teacher, on labelled and unlabelled
images :math:`x_u`. The backbone hears of both.

.. math::
    L = \lambda\, CE(f_{ce}(z_l), y)
      + (1 - \lambda) \left( T^2 KL(\sigma(t(x_l)/T)\,\|\,\sigma(f_{kd}(z_l)/T))
      + T^2 KL(\sigma(t(x_u)/T)\,\|\,\sigma(f_{kd}(z_u)/T)) \right)

The two divergences are means over their own batch, and are added. After training both heads stay:

.. math::
    p = \alpha\, \sigma(f_{ce}(z)) + (1 - \alpha)\, \sigma(f_{kd}(z) / \beta)

with :math:`\alpha, \beta` searched on the stored logits of validation data. :math:`\beta < 1`
sharpens a head that was trained at :math:`T = 2`.

Sources: arXiv 2505.07675 and erjui/DHO at 846de75. Where released code differs from what is done
here: its scripts for small students zip the two loaders, so that an epoch ends with the few
labelled images, and run both batches through BatchNorm apart (variant `official`); ours is driven
by the unlabelled images, cycles the labelled ones (as its ImageNet scripts do) and joins both
batches in one pass. Its script from one VLM to another adds the three terms with weight 1,
measures the second head by cosines, starts both heads from text embeddings, and multiplies warm-up
and cosine so that the rate rises again at the end (variant `official-vlm`). Its ImageNet few-shot
script chooses alpha, beta and the epoch on the test set, which is not offered.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Streams
from stillhouse.clock import Clock
from stillhouse.errors import DataError, ModelError, RecipeError
from stillhouse.losses.logits import kl, soft_cross_entropy
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.conflict import ConflictProbe
from stillhouse.parts.mixing import ALPHAS, BETAS, Mix, search_mix
from stillhouse.parts.schedule import chained_warmup_cosine, warmup_cosine, warmup_linear
from stillhouse.parts.two_heads import TwoHeads
from stillhouse.stages.tune import outputs_of
from stillhouse.task import Task
from stillhouse.tasks.classification import Classifier
from stillhouse.teacher import Knowledge, Want

CE, KD_LABELLED, KD_UNLABELLED = "ce", "kd_labelled", "kd_unlabelled"
LABELLED, UNLABELLED = "labelled", "unlabelled"
SCHEDULES = {
    "warmup-linear": warmup_linear,
    "warmup-cosine": warmup_cosine,
    "chained": chained_warmup_cosine,
}


class DHOObjective(Objective):
    """Labels on one head, the teacher on the other; labelled and unlabelled images in one step.

    Args:
        student: net that gives "ce" and "kd" (a `TwoHeads` inside), or "logits" when one head
            carries both losses.
        task: whose loss the labels use.
        config: see `DHO.Config`.

    Attributes:
        probe: of the cosine between the two losses' gradients in the backbone.
    """

    student: Net

    def __init__(self, student: Net, task: Task, config: DHO.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config
        self.dual = isinstance(student.module, TwoHeads)
        self.probe = ConflictProbe(config.measure_every)
        asked = [UNLABELLED, *([LABELLED] if config.kd_labelled else [])]
        wanted = asked if config.kd_weight > 0 else []
        self.wants = tuple(Want("logits", f"{stream}/x") for stream in sorted(wanted))

    def count(self, batch: Batch) -> dict[str, int]:
        """Each term is a mean over its own stream."""
        labelled, unlabelled = batch.view(LABELLED).size, batch.view(UNLABELLED).size
        return {CE: labelled, KD_LABELLED: labelled, KD_UNLABELLED: unlabelled}

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `ce`, `kd_labelled` and `kd_unlabelled`, weighted."""
        config = self.config
        labelled, unlabelled = batch.view(LABELLED), batch.view(UNLABELLED)
        asks = config.kd_weight > 0
        out_l, out_u = self._answers(labelled, unlabelled if asks else unlabelled.narrow(0, 0))
        terms: dict[str, Tensor] = {}
        if config.ce_weight > 0 and out_l is not None:
            found = self._loss({"logits": out_l["ce" if self.dual else "logits"]}, labelled)
            terms = {_named(name): config.ce_weight * value for name, value in found.items()}
        if asks and config.kd_labelled and out_l is not None:
            terms[KD_LABELLED] = self._distil(out_l, knowledge.stream(LABELLED))
        if asks and out_u is not None:
            terms[KD_UNLABELLED] = self._distil(out_u, knowledge.stream(UNLABELLED))
        if self.probe.due(clock):
            self._measure(terms)
        return terms

    def _answers(
        self, labelled: Batch, unlabelled: Batch
    ) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """The student on both streams: in one pass, or one after the other; None without rows."""
        batches = [part if part.size > 0 else None for part in (labelled, unlabelled)]
        views = [part.view(self.student.view) for part in batches if part is not None]
        if self.config.passes == "joint" and len(views) == 2:
            out = self.student(_one_view(views))
            size = labelled.size
            parts = [_rows(out, slice(0, size)), _rows(out, slice(size, None))]
        else:
            parts = [self.student(view) for view in views]
        left = iter(parts)
        first, second = (None if part is None else next(left) for part in batches)
        return first, second

    def _distil(self, out: Mapping[str, Tensor], said: Knowledge) -> Tensor:
        return self.config.kd_weight * self.distance(out["kd" if self.dual else "logits"], said)

    def distance(self, student: Tensor, said: Knowledge) -> Tensor:
        """How far logits (N, K) are from the teacher; the mean over rows."""
        teacher = said.tensor("logits")
        if self.config.targets == "hard":
            labels = F.one_hot(teacher.argmax(-1), teacher.shape[-1]).to(student.dtype)
            return soft_cross_entropy(student, labels, mask=said.valid)
        return kl(student, teacher, temperature=self.config.temperature, mask=said.valid)

    def _measure(self, terms: Mapping[str, Tensor]) -> None:
        taught = [terms[name] for name in (KD_LABELLED, KD_UNLABELLED) if name in terms]
        told = [value for name, value in terms.items() if name.partition("/")[0] == CE]
        if not taught or not told:
            return
        found = self.probe.measure(
            torch.stack(told).sum(), torch.stack(taught).sum(), self.backbone()
        )
        if found is not None:
            self.note("conflict", found)

    def backbone(self) -> list[Tensor]:
        """The trainable parameters below the head or heads."""
        if isinstance(self.student.module, TwoHeads):
            return list(self.student.module.backbone())
        head = {id(p) for p in self.student.head_layer().parameters()}
        return [p for p in self.student.parameters() if p.requires_grad and id(p) not in head]


def _named(name: str) -> str:
    return CE if name == "task" else f"{CE}/{name}"


def _one_view(views: Sequence[Any]) -> Any:
    """Two views under one another: tensors, lists, or mappings of them."""
    first, second = views
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: _one_view((first[key], second[key])) for key in first}
    if isinstance(first, list):
        return [*first, *second]
    raise DataError(f"views of {type(first).__name__} cannot be joined: use passes: separate")


def _rows(out: Mapping[str, Any], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in out.items() if isinstance(value, Tensor)}


class TwoHeadClassifier(Classifier):
    """A classifier of two heads, whose mix may be chosen anew without training."""

    options: ClassVar[Mapping[str, str]] = {
        **Classifier.options,
        "alpha": "share of the head that learnt the labels, 0 to 1 (default: as tuned)",
        "beta": "temperature of the head that learnt the teacher, above 0 (default: as tuned)",
    }

    @property
    def heads(self) -> TwoHeads:
        """The two heads and their mix."""
        found = self.module.module
        assert isinstance(found, TwoHeads)
        return found

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """As `Classifier.predict`, with `alpha` and `beta` for this call."""
        tuned = self.heads.mix.tolist()
        alpha, beta = (float(options.pop(k, v)) for k, v in zip(("alpha", "beta"), tuned))
        self.heads.set_mix(alpha, beta)
        try:
            return super().predict(inputs, **options)
        finally:
            self.heads.set_mix(*tuned)

    def tune(self, inputs: Sequence[Any], labels: Sequence[int]) -> Mix:
        """Choose alpha and beta on other validation data, from now on; nothing is trained.

        Args:
            inputs: as `predict` takes them.
            labels: class numbers, one per input.

        Returns:
            The mix that was found.
        """
        kept: dict[str, list[Tensor]] = {"ce": [], "kd": []}
        device = self.heads.mix.device
        with torch.inference_mode():
            for start in range(0, len(inputs), 64):
                views = [self._tensor(x) for x in inputs[start : start + 64]]
                out = self.module(torch.stack(views).to(device))
                for name, parts in kept.items():
                    parts.append(out[name].float().cpu())
        first, second = (torch.cat(kept[name]) for name in ("ce", "kd"))
        found = search_mix(first, second, torch.as_tensor(labels))
        self.heads.set_mix(found.alpha, found.beta)
        return found


class DHO(StudentTraining):
    """Two heads for two teachers: the few labels, and a model that has an opinion on everything."""

    card = Card(
        id="dho",
        title="Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language "
        "Models via Dual-Head Optimization",
        summary="Few labels train one head, a broad teacher the other; both answer, mixed.",
        paper="arXiv 2505.07675",
        year=2025,
        authors=("Seongjae Kang", "Dong Bok Lee", "Hyungjoon Jang", "Sung Ju Hwang"),
        links=("https://arxiv.org/abs/2505.07675", "https://github.com/erjui/DHO"),
        room="images",
        needs=("logits",),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("capture?", "capture"),
            ("student", "train"),
            ("outputs?", "capture"),
            ("mix?", "closed"),
        ),
    )

    class Config(MethodConfig):
        """Settings of `dho`."""

        balance: float = Field(
            0.5,
            ge=0,
            le=1,
            description="lambda: weight of the labels; the teacher has 1 - lambda",
            json_schema_extra={"source": "code: 0.5; paper: lambda L_CE + (1 - lambda) L_KD"},
        )
        weighting: Literal["convex", "sum"] = Field(
            "convex",
            description="sum gives all three terms weight 1: the direction of lambda 0.5, twice "
            "the size",
            json_schema_extra={"source": "code: convex in train_others.py, sum from VLM to VLM"},
        )
        temperature: float = Field(
            2.0,
            gt=0,
            description="of the divergence from the teacher, multiplied by its square",
            json_schema_extra={"source": "code: 2"},
        )
        heads: Literal["dual", "single"] = Field(
            "dual",
            description="single puts both losses on one head: what the paper argues against",
            json_schema_extra={"source": "paper: dual"},
        )
        targets: Literal["soft", "hard"] = Field(
            "soft",
            description="hard takes the teacher's first choice as label (pseudo-labels)",
            json_schema_extra={"source": "paper: soft; sheet: hard as a baseline"},
        )
        kd_labelled: bool = Field(
            True,
            description="the teacher is followed on labelled images too",
            json_schema_extra={"source": "code: yes"},
        )
        kd_head: Literal["linear", "cosine"] = Field(
            "linear",
            description="cosine: scale * (W normalize(z) + b), as a CLIP teacher's classifier",
            json_schema_extra={"source": "code: linear; cosine from VLM to VLM"},
        )
        scale: float = Field(
            100.0,
            gt=0,
            description="factor of a cosine head",
            json_schema_extra={"source": "code: train_imgnet_semi.py, 100"},
        )
        kd_init: Literal["fresh", "copy"] = Field(
            "fresh",
            description="copy: the second head begins as the student's own, with text embeddings "
            "where that is made of them (language-aware initialisation)",
            json_schema_extra={"source": "code: fresh; text embeddings from VLM to VLM"},
        )
        passes: Literal["joint", "separate"] = Field(
            "joint",
            description="whether labelled and unlabelled images go through BatchNorm together",
            json_schema_extra={"source": "code: separate in train_others.py, joint on ImageNet"},
        )
        drive: Literal["unlabelled", "labelled", "zip"] = Field(
            "unlabelled",
            description="which stream an epoch goes through once, the other being cycled; zip "
            "ends it with the shorter one",
            json_schema_extra={"source": "code: zip in train_others.py, unlabelled on ImageNet"},
        )
        unlabelled_batch: int | None = Field(
            None,
            ge=1,
            description="unlabelled rows of a step; none: as many as labelled (budget.batch)",
            json_schema_extra={"source": "code: 64 + 64"},
        )
        schedule: Literal["budget", "warmup-linear", "warmup-cosine", "chained"] = Field(
            "budget",
            description="of the learning rate: the budget's, or one of the released scripts', of "
            "which chained multiplies warm-up and cosine",
            json_schema_extra={"source": "code: warmup-linear (small students), chained (VLM)"},
        )
        warmup: float = Field(
            0.1,
            ge=0,
            description="of these schedules: steps (1 and more) or share of the training",
            json_schema_extra={"source": "code: 10 % (small students), 5000 steps (VLM)"},
        )
        alpha: float | None = Field(
            None,
            ge=0,
            le=1,
            description="share of the labels' head in the mix; none: searched on validation data, "
            "0.5 without any",
            json_schema_extra={"source": "code: searched; 0.5 in train_imgnet_semi.py"},
        )
        beta: float | None = Field(
            None,
            gt=0,
            description="temperature of the teacher's head in the mix; none: searched on "
            "validation data, 0.5 without any",
            json_schema_extra={"source": "code: searched; 0.5 in train_imgnet_semi.py"},
        )
        measure_every: int = Field(
            25,
            ge=0,
            description="steps between measurements of the cosine between the two losses' "
            "gradients in the backbone; 0 never",
            json_schema_extra={"source": "ours: the diagnostic of the paper's analysis"},
        )

        @property
        def ce_weight(self) -> float:
            """Of the labels' term."""
            return 1.0 if self.weighting == "sum" else self.balance

        @property
        def kd_weight(self) -> float:
            """Of each of the teacher's terms."""
            return 1.0 if self.weighting == "sum" else 1.0 - self.balance

        @model_validator(mode="after")
        def _both_heads_learn(self) -> DHO.Config:
            if self.heads == "dual" and not (self.ce_weight > 0 and self.kd_weight > 0):
                raise ValueError(
                    f"balance {self.balance:g} leaves one of two heads untrained: use heads: single"
                )
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={"drive": "zip", "passes": "separate", "schedule": "warmup-linear", "warmup": 0.1},
            about="the released script for small students (train_others.py)",
        ),
        "official-vlm": Variant(
            set={
                "weighting": "sum",
                "kd_head": "cosine",
                "kd_init": "copy",
                "schedule": "chained",
                "warmup": 5000.0,
                "alpha": 0.5,
                "beta": 0.5,
            },
            about="the released script from VLM to VLM (train_imgnet_semi.py)",
        ),
        "vlm": Variant(
            set={
                "weighting": "sum",
                "kd_head": "cosine",
                "kd_init": "copy",
                "schedule": "warmup-cosine",
            },
            about="from VLM to VLM, warm-up before the cosine, mix searched",
        ),
        "single-head": Variant(
            set={"heads": "single"}, about="labels and teacher on one head: the conflict"
        ),
        "single-head-labels": Variant(
            set={"heads": "single", "balance": 0.8},
            about="labels and teacher on one head, the labels weighing four times as much",
        ),
        "single-pseudo": Variant(
            set={"heads": "single", "targets": "hard", "kd_labelled": False},
            about="one head; the teacher's first choice as label of unlabelled images",
        ),
        "labels-only": Variant(
            set={"heads": "single", "balance": 1.0}, about="cross-entropy on the few labels alone"
        ),
        "teacher-only": Variant(
            set={"heads": "single", "balance": 0.0},
            about="the teacher on all images, without labels",
        ),
        "ce-head": Variant(set={"alpha": 1.0, "beta": 1.0}, about="only the labels' head answers"),
        "kd-head": Variant(
            set={"alpha": 0.0, "beta": 1.0}, about="only the teacher's head answers"
        ),
        "untuned": Variant(set={"alpha": 0.5, "beta": 0.5}, about="the mix without a search"),
        "no-labelled-kd": Variant(
            set={"kd_labelled": False}, about="the teacher on unlabelled images alone"
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("two heads beat one with both losses", "accuracy", "dho", "dho/single-head"),
        Claim(
            "two heads beat one that weighs the labels more",
            "accuracy",
            "dho",
            "dho/single-head-labels",
        ),
        Claim("beats the few labels alone", "accuracy", "dho", "dho/labels-only"),
        Claim("beats the teacher's opinion alone", "accuracy", "dho", "dho/teacher-only"),
        Claim(
            "one head with both losses beats the few labels alone",
            "accuracy",
            "dho/single-head",
            "dho/labels-only",
        ),
        Claim(
            "one head with both losses beats the teacher's opinion alone",
            "accuracy",
            "dho/single-head",
            "dho/teacher-only",
        ),
        Claim(
            "beats one head with labels and pseudo-labels", "accuracy", "dho", "dho/single-pseudo"
        ),
        Claim("the mix beats the labels' head", "accuracy", "dho", "dho/ce-head"),
        Claim("the mix beats the teacher's head", "accuracy", "dho", "dho/kd-head"),
        Claim("the student passes its teacher", "accuracy", "dho", "teacher"),
        Claim(
            "the two losses' gradients conflict less in the backbone of two heads",
            "conflict",
            "dho",
            "dho/single-head",
        ),
    ]

    # ---- training --------------------------------------------------------------------------

    def wants_teacher(self) -> bool:
        """Not where the labels have all the weight."""
        return bool(self.config.kd_weight > 0)

    def order(self, job: Any) -> Streams:
        """Labelled and unlabelled images side by side.

        Raises:
            RecipeError: the data has no unlabelled split.
        """
        if UNLABELLED not in job.splits:
            raise RecipeError(
                f"'dho' reads labelled and unlabelled images, and the data '{job.splits.edition}' "
                "has no split 'unlabelled': say how many keep their labels (data: {options: "
                "{labels_per_class: 5}} or label_fraction)"
            )
        size = job.budget.batch
        found: Streams = job.streams(
            {
                LABELLED: ("train", size),
                UNLABELLED: (UNLABELLED, self.config.unlabelled_batch or size),
            },
            drive=self.config.drive,
        )
        return found

    def objective(self, job: Any, student: Net, teacher: Any) -> DHOObjective:
        """The student with its second head, unless one is to carry both losses.

        Raises:
            ModelError: the student's last linear layer has not one output per class.
        """
        keeps = isinstance(student.module, TwoHeads)
        if self.config.heads == "single" and keeps:
            raise ModelError(
                "the student keeps two heads already: use heads: dual to go on with it"
            )
        if self.config.heads == "dual" and not keeps:
            student = self._with_second_head(job, student)
        return DHOObjective(student, job.task, self.config)

    def _with_second_head(self, job: Any, student: Net) -> Net:
        layer, config = student.head_layer(), self.config
        classes = len(job.task.about.get("classes", ())) or layer.out_features
        if layer.out_features != classes:
            raise ModelError(
                f"the last linear layer '{student.head()}' of {type(student.module).__name__} has "
                f"{layer.out_features} outputs, the data {classes} classes: name its head with "
                "student: {taps: {'head:input': 'module.path:input'}}"
            )
        copy = config.kd_init == "copy"
        heads = job.build(
            lambda: TwoHeads(
                student.module, student.head(), config.kd_head, config.scale, copy=copy
            ),
            "second-head",
        )
        mean, std = (
            None if v is None else v.flatten().tolist() for v in (student.mean, student.std)
        )
        return Net(heads, mean=mean, std=std, head=f"net.module.{student.head()}")

    def training(self, job: Any) -> dict[str, Any]:
        """The schedule of the released scripts, where one is asked for."""
        config = self.config
        if config.schedule == "budget":
            return {}
        return {"schedule": SCHEDULES[config.schedule](config.warmup)}

    def run(self, job: Any) -> Artifact:
        """Train both heads, then choose their mix on validation data."""
        order = self.order(job)
        teacher = job.teacher() if self.wants_teacher() else None
        objective = self.objective(job, job.student(), teacher)
        net = objective.student
        job.fit(
            "student",
            objective,
            order,
            teacher=teacher,
            validate=self._validation(job, net),
            **self.training(job),
        )
        found = self._choose_mix(job, net)
        artifact: Artifact = job.model_artifact(objective.export())
        artifact.meta["dho"] = {**found, "conflict": objective.probe.mean()}
        if objective.dual and isinstance(artifact.predictor, Classifier):
            # The same net and settings; alpha and beta may be said anew.
            artifact.predictor = TwoHeadClassifier(net, artifact.predictor.settings)
        return artifact

    # ---- the mix ---------------------------------------------------------------------------

    def _grid(self) -> dict[str, Sequence[float]]:
        """The points that are tried: one, where the settings fix it."""
        alpha, beta = self.config.alpha, self.config.beta
        return {
            "alphas": ALPHAS if alpha is None else (alpha,),
            "betas": BETAS if beta is None else (beta,),
        }

    def _searches(self, job: Any) -> bool:
        fixed = self.config.alpha is not None and self.config.beta is not None
        return self.config.heads == "dual" and not fixed and "val" in job.splits

    def _validation(self, job: Any, net: Net) -> Any:
        """Figures of a state with the mix that is best for it, as it would be deployed."""
        if not self._searches(job):
            return None

        def validate() -> dict[str, float]:
            out = outputs_of(job, net, "val", ("ce", "kd"))
            found = search_mix(out["ce"], out["kd"], out["target"], **self._grid())
            return {
                "accuracy": found.accuracy,
                "accuracy_ce": _accuracy(out["ce"], out["target"]),
                "accuracy_kd": _accuracy(out["kd"], out["target"]),
            }

        return validate

    def _choose_mix(self, job: Any, net: Net) -> dict[str, Any]:
        """Set alpha and beta; searched on outputs that are stored once, as a stage."""
        heads, config = net.module, self.config
        if not isinstance(heads, TwoHeads):
            return {}
        fixed = [0.5 if value is None else value for value in (config.alpha, config.beta)]
        if not self._searches(job):
            heads.set_mix(*fixed)
            return {"alpha": fixed[0], "beta": fixed[1]}
        out = job.once(
            "outputs",
            lambda: outputs_of(job, net, "val", ("ce", "kd")),
            kind="capture",
            everywhere=True,
        )

        def search() -> dict[str, Any]:
            return vars(search_mix(out["ce"], out["kd"], out["target"], **self._grid()))

        found = job.once("mix", search)
        heads.set_mix(found["alpha"], found["beta"])
        rows = len(out["target"])
        shares = [[count / rows for count in line] for line in found["counts"].tolist()]
        return {
            "alpha": found["alpha"],
            "beta": found["beta"],
            "val_accuracy": found["accuracy"],
            "grid": {name: list(points) for name, points in self._grid().items()},
            "shares": shares,
        }

    # ---- judging ---------------------------------------------------------------------------

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The task's figures of the mix, each head's accuracy, the mix and the conflict."""
        figures = super().judge(job, artifact)
        told = artifact.meta["dho"]
        figures.update(
            {k: told[k] for k in ("alpha", "beta", "conflict") if told.get(k) is not None}
        )
        net = artifact.module
        if isinstance(net, Net) and isinstance(net.module, TwoHeads):
            out = outputs_of(job, net, "test", ("ce", "kd"))
            for name in ("ce", "kd"):
                figures[f"accuracy_{name}"] = _accuracy(out[name], out["target"])
        return figures

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """What the report shows of the heads and of the search."""
        told, net = artifact.meta["dho"], artifact.module
        rows: list[list[Any]] = []
        if isinstance(net, Net) and isinstance(net.module, TwoHeads):
            out = outputs_of(job, net, "test", ("logits", "ce", "kd"))
            named = {"logits": "the mix", "ce": "the labels' head", "kd": "the teacher's head"}
            rows = [
                [f"accuracy of {t}", _accuracy(out[n], out["target"])] for n, t in named.items()
            ]
            own = sum(p.numel() for p in net.module.second.parameters())
            rest = sum(p.numel() for p in net.parameters()) - own
            rows += [
                ["alpha, share of the labels' head", told["alpha"]],
                ["beta, temperature of the teacher's head", told["beta"]],
                ["parameters of the second head, share of the others'", own / rest],
            ]
        if told.get("conflict") is not None:
            rows.append(["mean cosine of the two losses' gradients, backbone", told["conflict"]])
        tables = [{"title": "Heads", "columns": ["figure", "value"], "rows": rows}]
        found: dict[str, Any] = {"tables": tables}
        if "shares" in told:
            tables.append(_map_of(told))
            found["images"] = _pictures_of(told)
        return found

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors, three labels a class."""
        return {
            "method": "dho",
            "data": {
                "name": "generated",
                "options": {"kind": "vectors", "labels_per_class": 3},
            },
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "settings": {"measure_every": 2},
            "budget": {"steps": 4, "batch": 8, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(-1) == target).double().mean())


def _map_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Validation accuracy at every point of the grid, in percent."""
    grid = told["grid"]
    lines = zip(grid["alphas"], zip(*told["shares"], strict=True), strict=True)
    return {
        "title": "Accuracy on validation data by alpha (rows) and beta (columns), percent",
        "columns": ["alpha", *(f"{beta:g}" for beta in grid["betas"])],
        "rows": [[f"{alpha:g}", *(f"{100 * v:.1f}" for v in line)] for alpha, line in lines],
    }


CELL = 14  # pixels of one point of the grid


def _pictures_of(told: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same as a picture, dark where it is best; none without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return []
    shares = torch.tensor(told["shares"])
    low, high = float(shares.min()), float(shares.max())
    depth = (shares - low) / max(high - low, 1e-6)
    # from white to a dark blue
    colours = 255.0 - depth[..., None] * torch.tensor([247.0, 206.0, 148.0])
    cells = colours.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    made = io.BytesIO()
    Image.fromarray(cells.round().to(torch.uint8).numpy()).save(made, "PNG")
    grid = told["grid"]
    return [
        {
            "title": "Validation accuracy over the mix",
            "caption": f"left to right alpha {grid['alphas'][0]:g} to {grid['alphas'][-1]:g}, top "
            f"to bottom beta {grid['betas'][0]:g} to {grid['betas'][-1]:g}; white "
            f"{100 * low:.1f} %, dark {100 * high:.1f} %",
            "png_base64": base64.b64encode(made.getvalue()).decode(),
        }
    ]
