"""What all entries that yield a distilled data set share: settings, artifact, judge, report."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job, Last
from stillhouse.engine.step import Clip
from stillhouse.errors import RecipeError
from stillhouse.method import Method, MethodConfig
from stillhouse.parts.augment import DSA, LAYERED_TRAINING
from stillhouse.parts.distilled_set import Decode, DistilledSet
from stillhouse.parts.schedule import constant
from stillhouse.stages.fresh_nets import GIVEN, fresh_net
from stillhouse.stages.initial_set import (
    Init,
    RealImages,
    class_names,
    initial_images,
    preprocessing_of,
    set_of,
)
from stillhouse.stages.judge_distilled_set import (
    Judging,
    Label,
    Protocol,
    accuracies,
    judge_distilled_set,
)
from stillhouse.stages.tune import best_of

_PROTOCOL = "released evaluate_synset of Dataset Condensation"


class SetConfig(MethodConfig):
    """Settings that belong to the problem: a side of another entry takes them over."""

    shared: ClassVar[frozenset[str]] = frozenset(
        {
            "ipc", "space", "mean", "std", "augment", "judge_epochs", "judge_batch", "judge_lr",
            "judge_nets", "judge_protocol", "judge_augment", "against", "full_epochs", "full_batch",
            "cross", "cross_nets",
        }
    )  # fmt: skip

    ipc: int = Field(
        10,
        ge=1,
        description="images per class",
        json_schema_extra={"source": "papers: 1, 10, 50"},
    )
    space: Literal["mean_std", "zca", "none"] = Field(
        "mean_std",
        description="network-input space, in which the synthetic images live",
        json_schema_extra={"source": "mean_std in DM and DataDAM; zca in trajectory matching"},
    )
    mean: list[float] | None = Field(
        None,
        description="per channel, for mean_std; none: that of the data",
        json_schema_extra={"source": "released codes: per data set"},
    )
    std: list[float] | None = Field(
        None,
        description="per channel, for mean_std; none: that of the data",
        json_schema_extra={"source": "released codes: per data set"},
    )
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate",
        description="families of the differentiable augmentation, in matching and in judging, or "
        "none; without flip for digits: color_crop_cutout_scale_rotate",
        json_schema_extra={"source": "released code of DSA"},
    )
    judge_protocol: Literal["dc", "ncfm"] = Field(
        "dc",
        description="how the judge trains: dc, SGD with a tenth of the rate in the second half; "
        "ncfm, AdamW, the rate halved at every fifth, layered augmentation and CutMix",
        json_schema_extra={"source": "released codes of Dataset Condensation and of NCFM"},
    )
    judge_augment: str | None = Field(
        None,
        description="augmentation of the judge's trainings where it differs from that of "
        "matching; none: augment (dc), color_crop_flip_scale_rotate (ncfm)",
        json_schema_extra={"source": "released NCFM: other families than in matching"},
    )
    judge_epochs: int = Field(
        1000,
        ge=0,
        description="E of the judge's trainings (dc runs E + 1 epochs, as released)",
        json_schema_extra={"source": "released evaluate_synset: 1000 with augmentation"},
    )
    judge_batch: int = Field(
        256, ge=1, description="its batch", json_schema_extra={"source": _PROTOCOL}
    )
    judge_lr: float = Field(
        0.01, gt=0, description="its learning rate", json_schema_extra={"source": _PROTOCOL}
    )
    judge_nets: int = Field(
        5,
        ge=1,
        description="fresh networks that a set is judged on",
        json_schema_extra={"source": "released evaluate_synset: at least 5"},
    )
    plain_nets: int = Field(
        0,
        ge=0,
        description="networks per set trained without augmentation, for the augmentation-robust "
        "score; 0: not measured",
        json_schema_extra={"source": "DD-Ranking"},
    )
    against: list[Literal["random-real", "k-means", "full"]] = Field(
        ["random-real", "k-means", "full"],
        description="what the judge sets beside the distilled images",
        json_schema_extra={"source": "DC-BENCH, DD-Ranking"},
    )
    full_epochs: int = Field(
        50,
        ge=1,
        description="epochs of the training on the full data, which is shared",
        json_schema_extra={"source": "DC-BENCH trains the full data at its own length"},
    )
    full_batch: int = Field(
        64,
        ge=1,
        description="its batch",
        json_schema_extra={"source": "house setting: small batches for small data"},
    )
    cross: list[str] = Field(
        default_factory=list,
        description="ids of further architectures that are trained on the set, by model id",
        json_schema_extra={"source": "DC-BENCH, transfer across architectures"},
    )
    cross_nets: int = Field(
        1,
        ge=1,
        description="networks of each",
        json_schema_extra={"source": "DC-BENCH, transfer across architectures"},
    )
    hold_mb: int = Field(
        1024,
        ge=0,
        description="real images are preprocessed once and kept on the device up to this size",
        json_schema_extra={"source": "house setting"},
    )

    @field_validator("augment", "judge_augment")
    @classmethod
    def _known_families(cls, value: str | None) -> str | None:
        try:
            DSA(value or "none")
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return value

    def protocol(self) -> Protocol:
        """How the judge trains on a small set."""
        return self._protocol(self.judge_epochs, self.judge_batch)

    def full_protocol(self) -> Protocol:
        """How the judge trains on the full data."""
        return self._protocol(self.full_epochs, self.full_batch)

    def _protocol(self, epochs: int, batch: int) -> Protocol:
        if self.judge_protocol == "dc":
            augment = self.judge_augment or self.augment
            return Protocol(epochs=epochs, batch=batch, lr=self.judge_lr, augment=augment)
        augment = self.judge_augment or LAYERED_TRAINING
        return Protocol.ncfm(epochs=epochs, batch=batch, lr=self.judge_lr, augment=augment)


class SetDistillation(Method):
    """Base of methods and baselines that yield a distilled set: they write only `run`.

    Attributes:
        compares: its judge measures what `against` names; a baseline is itself compared.
    """

    Config: ClassVar[type[MethodConfig]] = SetConfig
    compares: ClassVar[bool] = True

    def real_images(self, job: Job) -> RealImages:
        """The training split by class, in network-input space."""
        config = self.config
        space = preprocessing_of(job, config.space, config.mean, config.std)
        return RealImages(
            job.splits["train"],
            len(class_names(job)),
            space,
            device=job.device,
            hold_bytes=config.hold_mb << 20,
        )

    def initial_set(
        self, job: Job, real: RealImages, init: Init, decode: Decode | None = None
    ) -> DistilledSet:
        """The set before distillation, as a stage; equal for all entries under one seed.

        Args:
            job: of the run.
            real: what is chosen from.
            init: see `initial_images`.
            decode: of raw images, when the images are mosaics.
        """
        ipc, factor = self.config.ipc, 1 if decode is None else decode.factor
        # One stream for all entries, so that a method, its baselines and the judge's random
        # images begin with the same pictures.
        images = job.once(
            "initial images",
            lambda: initial_images(real, ipc, init, job.rng("initial images"), factor=factor).cpu(),
        )
        return set_of(images, ipc, class_names(job), real.preprocessing, decode)

    def scanned_rate(
        self,
        job: Job,
        rates: list[float],
        distil: Callable[[Job, float], DistilledSet],
        nets: int,
    ) -> tuple[float, list[dict[str, float]]]:
        """The pixel learning rate with the best validation accuracy, and the table.

        Args:
            job: of the run.
            rates: tried; one alone is taken as it is.
            distil: a whole distillation with a rate, as stages of the job it is given.
            nets: fresh networks per point, trained by the judge's protocol.
        """
        if len(rates) == 1:
            return rates[0], []

        def measure(child: Job, rate: float) -> float:
            made = distil(child, rate)
            fresh = lambda number: fresh_net(job, number)  # noqa: E731
            found = accuracies(
                child, "scan", made, self.config.protocol(), fresh, nets=nets, split="val"
            )
            return sum(found) / len(found)

        return best_of(job, "scan", rates, measure)

    def artifact_of(self, job: Job, distilled: DistilledSet, **provenance: Any) -> Artifact:
        """A data-set artifact that `distilled_of` reads back."""
        about = {
            "method": self.card.id,
            "settings": self.config.model_dump(mode="json"),
            "seed": job.seed,
            "data": job.splits.edition,
            "data_fingerprint": job.splits["train"].fingerprint,
            **provenance,
        }
        distilled = distilled.replace(provenance={**distilled.provenance, **about})
        return Artifact(
            "dataset",
            tensors=distilled.tensors(),
            sheet=distilled.picture_sheet(),
            meta={"distilled": distilled.description()},
        )

    def judging(self, job: Job) -> Judging:
        """What the judge measures under the present settings."""
        config = self.config
        cross = {
            model.rpartition(":")[2].replace("/", "-"): _maker(job, model) for model in config.cross
        }
        return Judging(
            protocol=config.protocol(),
            nets=config.judge_nets,
            plain_nets=config.plain_nets if self.compares else 0,
            against=tuple(config.against) if self.compares else (),
            full=config.full_protocol(),
            cross=cross,
            cross_nets=config.cross_nets,
        )

    def judge(self, job: Job, artifact: Artifact) -> dict[str, float]:
        """Fresh networks trained on the set alone, and what it is compared with."""
        return judge_distilled_set(
            job,
            distilled_of(artifact),
            lambda number: fresh_net(job, number),
            self.judging(job),
            label=self.label(job, distilled_of(artifact)),
            share=self.share(job),
        )

    def label(self, job: Job, distilled: DistilledSet) -> Label | None:
        """What gives random real images labels of the set's own kind; needed for soft labels."""
        return None

    def match(self, job: Job, objective: Any, steps: int, optim: Any) -> None:
        """The stage "match": so many updates of the synthetic images, the last of which stay.

        Args:
            job: of the run.
            objective: has `order`, `distilled()` and `steps_done`.
            steps: iterations.
            optim: of what is learnt, at a constant rate.
        """
        job.fit(
            "match",
            objective,
            objective.order,
            steps=steps,
            optim=optim,
            schedule=constant(1.0),
            accumulate=1,
            clip=Clip(),
            keep=Last(),
            validate=self.evaluation(job, objective),
            validate_every=job.budget.validate_every,
            kind="synthesis",
        )

    def evaluation(self, job: Job, objective: Any) -> Callable[[], dict[str, float]]:
        """Figures of the set on validation data while it is being distilled.

        Args:
            job: of the stage "match"; the evaluations are children of it.
            objective: has `distilled()` and `steps_done`.
        """
        config: Any = self.config

        def evaluate() -> dict[str, float]:
            found = accuracies(
                job.child("match", f"evaluation-{objective.steps_done}"),
                "val",
                objective.distilled(),
                config.protocol(),
                lambda number: fresh_net(job, number),
                nets=config.evaluate_nets,
                split="val",
            )
            mean = sum(found) / len(found)
            spread = (sum((a - mean) ** 2 for a in found) / len(found)) ** 0.5
            return {"accuracy": mean, "accuracy_std": spread}

        return evaluate

    def share(self, job: Job) -> dict[str, Any] | None:
        """What a network trained on the full data depends on besides data, seed and protocol.

        None for a network that was handed in as an object, which has no name.
        """
        student = job.recipe.student
        if student is None or student.model == GIVEN:
            return None
        return {"student": student.model_dump(mode="json"), "version": __version__}

    def details(self, job: Job, artifact: Artifact) -> dict[str, Any]:
        """The picture sheet and how it was judged."""
        distilled = distilled_of(artifact)
        found: dict[str, Any] = {
            "images": [
                {
                    "title": f"The distilled set, {max(distilled.counts)} per class",
                    "png_base64": base64.b64encode(distilled.picture_sheet()).decode(),
                }
            ],
            "texts": [self._told(job, distilled)],
        }
        scan = distilled.provenance.get("scan")
        if scan:
            rows = [[f"{r['point']:g}", f"{r['measure']:.4f}"] for r in scan]
            found["tables"] = [
                {
                    "title": "Pixel learning rate, on validation data",
                    "columns": ["rate", "accuracy"],
                    "rows": rows,
                }
            ]
        return found

    def _told(self, job: Job, distilled: DistilledSet) -> dict[str, str]:
        protocol = self.config.protocol()
        stored = distilled.storage
        return {
            "title": "How the set was judged",
            "text": (
                f"{self.config.judge_nets} fresh networks, each trained on the set alone: "
                f"{protocol.told()}; the accuracy is that of the last epoch on "
                f"{job.splits.peek('test')} test images, mean and population deviation over the "
                f"networks. Stored: {len(distilled)} images, {stored['pixels']} bytes of pixels, "
                f"{stored['labels']} bytes of labels; {distilled.training_count} training "
                "images are decoded from them."
            ),
        }


def _maker(job: Job, model: str) -> Callable[[int], Any]:
    return lambda number: fresh_net(job, number, model)


def distilled_of(artifact: Artifact) -> DistilledSet:
    """The distilled set of a data-set artifact.

    Raises:
        RecipeError: the artifact holds none.
    """
    description: Mapping[str, Any] | None = artifact.meta.get("distilled")
    if description is None:
        raise RecipeError(f"an artifact of kind '{artifact.kind}' holds no distilled set")
    return DistilledSet.restore(artifact.tensors, description)
