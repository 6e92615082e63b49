"""The fair judge of distilled data: fresh networks trained on it alone.

The protocol is that of released codes (`evaluate_synset` of Dataset Condensation and Matching
Training Trajectories; that of NCFM); what they take silently is not taken here: the accuracy is
that of the LAST epoch, every network is fresh, and nothing is chosen by the test split. Beside
the set stand random real images of the same number, real images near k-means centres, and
the full data, under the same labels, augmentation and protocol; and the scores of DD-Ranking.
A set of mosaics stands beside mosaics of random real images too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from stillhouse.batch import Batch, Shuffled, Source, TensorSource
from stillhouse.clock import Clock
from stillhouse.engine.job import Job, Last
from stillhouse.engine.step import Clip
from stillhouse.errors import RecipeError
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.metrics.dd_ranking import augmentation_robust_score, label_robust_score
from stillhouse.net import Net, Output
from stillhouse.objective import Objective
from stillhouse.parts.across import whole_batch
from stillhouse.parts.augment import DSA, FULL, LAYERED_TRAINING
from stillhouse.parts.cutmix import CutMix
from stillhouse.parts.distilled_set import Decode, DistilledSet, Preprocessing
from stillhouse.parts.matrices import kmeans
from stillhouse.parts.mosaic import mosaic
from stillhouse.parts.schedule import Schedule, constant, steps
from stillhouse.stages.initial_set import RealImages, initial_images
from stillhouse.teacher import Knowledge

Fresh = Callable[[int], Net]
Label = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Protocol:
    """How a fresh network is trained on a set.

    The defaults are those of the Dataset Condensation code: SGD; E + 1 epochs are run; after
    the epoch of number E // 2 + 1 (from 0) the learning rate is multiplied by 0.1 and the
    optimiser made anew, so its momentum is lost. `Protocol.ncfm` is that of the NCFM code.

    Attributes:
        epochs: E.
        batch: rows of a batch.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of the optimiser.
        augment: strategy of the differentiable augmentation, per sample, or "none".
        align_corners: of its resampling.
        mode: of the augmentation, see `DSA`.
        update: rule of the optimiser, "sgd" or "adamw".
        milestones: shares of E after which the rate is multiplied by `gamma`, in E epochs of
            one optimiser; None: the tenth and the new optimiser described above.
        gamma: see `milestones`.
        cutmix: probability that a batch is mixed.
        hard_last: last epochs in which soft labels give way to hard ones.
    """

    epochs: int = 1000
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: str = FULL
    align_corners: bool = False
    mode: Literal["one", "all", "layered"] = "one"
    update: Literal["sgd", "adamw"] = "sgd"
    milestones: tuple[float, ...] | None = None
    gamma: float = 0.1
    cutmix: float = 0.0
    hard_last: int = 0

    @classmethod
    def ncfm(cls, **changes: Any) -> Protocol:
        """The evaluation of the released NCFM: AdamW, the rate halved at every fifth, CutMix."""
        given: dict[str, Any] = {
            "epochs": 2000,
            "batch": 128,
            "lr": 1e-3,
            "weight_decay": 1e-2,  # torch's default of AdamW
            "augment": LAYERED_TRAINING,
            "mode": "layered",
            "update": "adamw",
            "milestones": (0.2, 0.4, 0.6, 0.8),
            "gamma": 0.5,
            "cutmix": 0.5,
        }
        return cls(**{**given, **changes})

    def phases(self) -> list[tuple[int, float]]:
        """(epochs, learning rate) of each optimiser, in order."""
        if self.milestones is not None:
            return [(self.epochs, self.lr)] if self.epochs > 0 else []
        whole = self.epochs + 1
        first = min(whole, self.epochs // 2 + 2)
        planned = [(first, self.lr), (whole - first, self.lr * 0.1)]
        return [(epochs, lr) for epochs, lr in planned if epochs > 0]

    def schedule(self) -> Schedule:
        """The factor of the learning rate within an optimiser's life."""
        if self.milestones is None:
            return constant(1.0)
        return steps([int(share * self.epochs) for share in self.milestones], self.gamma)

    def optimizer(self, lr: float) -> Callable[[Any], Optimizer]:
        """A factory of the optimiser of one phase."""
        if self.update == "adamw":
            return lambda params: AdamW(params, lr=lr, weight_decay=self.weight_decay)
        return lambda params: SGD(
            params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def told(self) -> str:
        """The protocol in words."""
        augmented = "no augmentation" if self.augment == "none" else self.augment
        momentum = "" if self.update == "adamw" else f"momentum {self.momentum:g}, "
        name = "AdamW" if self.update == "adamw" else "SGD"
        falls = f"a tenth of the rate after epoch {self.epochs // 2 + 1}"
        if self.milestones is not None:
            shares = ", ".join(f"{share:g}" for share in self.milestones)
            falls = f"the rate times {self.gamma:g} after {shares} of the epochs"
        mixed = f", CutMix with probability {self.cutmix:g}" if self.cutmix else ""
        return (
            f"{sum(epochs for epochs, _ in self.phases())} epochs ({name}, learning rate "
            f"{self.lr:g}, {momentum}weight decay {self.weight_decay:g}, batch {self.batch}, "
            f"{falls}, {augmented}{mixed})"
        )


class SetTraining(Objective):
    """Cross-entropy of a network on a set, with differentiable augmentation.

    Args:
        net: trained in place; reads network-input space.
        protocol: whose augmentation is used.
        preprocessing: brings the rows to network-input space, when they are real images in
            [0, 1]; None for a distilled set, whose images are there already.

    Rows with `label_logits` are learnt softly:
    `-(1/B) sum softmax(label_logits) log_softmax(z)`, without temperature. A batch that CutMix
    mixes counts the labels of both images by their shares.
    """

    def __init__(
        self, net: Net, protocol: Protocol, preprocessing: Preprocessing | None = None
    ) -> None:
        super().__init__(net)
        self.preprocessing = preprocessing
        self.dsa = DSA(protocol.augment, align_corners=protocol.align_corners, mode=protocol.mode)
        self.cutmix = CutMix(protocol.cutmix)
        self.batchwide = protocol.cutmix > 0
        self.soft_epochs = protocol.epochs - protocol.hard_last

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `task`, a mean over rows."""
        images = batch.view("x")
        if self.preprocessing is not None:
            images = self.preprocessing.transform(images)
        images = self.dsa(images, clock.rng("augment"), rows=batch.rows, of=batch.of)
        size = (images.shape[2], images.shape[3])
        mix = self.cutmix.draw(batch.of, size, clock.rng("cutmix"))
        own = self._labels(batch, clock)
        if mix is None:
            return {"task": self._loss(self.student(images), own)}
        # Partners may lie with other processes.
        mine = replace(mix, partner=mix.partner[batch.rows])
        images = mine.images(images, whole_batch(images, batch.of, clock))
        others = whole_batch(own, batch.of, clock)[mine.partner.to(own.device)]
        out = self.student(images)
        share = mix.box.share
        return {"task": share * self._loss(out, own) + (1.0 - share) * self._loss(out, others)}

    def _labels(self, batch: Batch, clock: Clock) -> Tensor:
        if "label_logits" in batch and clock.epoch < self.soft_epochs:
            logits: Tensor = batch["label_logits"]
            return logits
        labels: Tensor = batch["target"]
        return labels

    def _loss(self, out: Output, labels: Tensor) -> Tensor:
        logits = out["logits"].float()
        if labels.is_floating_point():
            return soft_cross_entropy(logits, labels, from_logits=True)
        return F.cross_entropy(logits, labels)


class Ready(nn.Module):
    """A network that reads images in [0, 1]: preprocessing, then the network."""

    def __init__(self, net: Net, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.net, self.preprocessing = net, preprocessing

    def forward(self, view: Tensor) -> Output:
        """The network's output."""
        ready = view if self.preprocessing is None else self.preprocessing.transform(view)
        return self.net(ready)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Judging:
    """What is measured.

    Attributes:
        protocol: of every training on a small set.
        nets: fresh networks per set.
        plain_nets: of the trainings without augmentation for ARS; 0 leaves ARS out.
        against: comparisons among "random-real", "k-means" and "full".
        full: protocol on the full data.
        cross: name to maker of fresh networks of other architectures.
        cross_nets: of each.
    """

    protocol: Protocol = Protocol()
    nets: int = 5
    plain_nets: int = 0
    against: tuple[str, ...] = ("random-real", "k-means", "full")
    full: Protocol = Protocol(epochs=50)
    cross: Mapping[str, Fresh] | None = None
    cross_nets: int = 1

    def __post_init__(self) -> None:
        if self.nets < 1:
            raise RecipeError(f"a set is judged by 1 network at least, not {self.nets}")


def train_on(
    job: Job,
    net: Net,
    rows: Source,
    protocol: Protocol,
    *,
    preprocessing: Preprocessing | None = None,
    share: Mapping[str, Any] | None = None,
    kind: str = "judge",
) -> None:
    """Train a network by the protocol, as stages of `job` (one per optimiser).

    Args:
        job: a child of its own.
        net: trained in place.
        rows: with "x", "target" and perhaps "label_logits".
        protocol: epochs, batch, optimiser, augmentation.
        preprocessing: of rows that are real images in [0, 1].
        share: everything the result depends on; the stages then lie in the cache.
        kind: of the stages.
    """
    objective = SetTraining(net, protocol, preprocessing)
    for number, (epochs, lr) in enumerate(protocol.phases()):
        job.fit(
            f"phase-{number}",
            objective,
            Shuffled(rows, protocol.batch, augment=False, collate=job.task.collate),
            epochs=epochs,
            optim=protocol.optimizer(lr),
            schedule=protocol.schedule(),
            accumulate=1,
            clip=Clip(),
            validate=dict,
            validate_every=None,
            keep=Last(),
            ema=0.0,
            share=None if share is None else {**share, "phase": number},
            kind=kind,
        )


def accuracies(
    job: Job,
    name: str,
    distilled: DistilledSet,
    protocol: Protocol,
    fresh: Fresh,
    *,
    nets: int,
    soft: bool = True,
    split: str = "test",
) -> list[float]:
    """Accuracy on a split of each of `nets` fresh networks trained on a set alone.

    Args:
        job: its stages begin with `name`.
        name: of the set.
        distilled: what is trained on.
        protocol: how; the set's own learning rate, when it has one, replaces the protocol's.
        fresh: network number i, equal for every set, so that comparisons are paired.
        nets: how many.
        soft: use the label logits, when there are any; else the hard labels.
        split: that is judged on; "test" is open to judges only.

    Returns:
        One fraction per network, of the last epoch.
    """
    images, labels, logits = distilled.training_images()
    views = {"x": images.detach(), "target": labels}
    if soft and logits is not None:
        views["label_logits"] = logits.detach()
    if distilled.lr is not None:
        protocol = replace(protocol, lr=distilled.lr)
    rows = TensorSource(views, name=name)
    found = []
    for number in range(nets):
        child = job.child(name, f"net-{number}")
        net = fresh(number)
        train_on(child, net, rows, protocol)
        found.append(_accuracy(child, net, distilled.preprocessing, split))
    return found


def _accuracy(job: Job, net: Net, preprocessing: Preprocessing | None, split: str) -> float:
    ready = Ready(net, preprocessing)
    metric = job.task.main_metric
    evaluate = lambda: job.evaluate(ready, split)[metric]  # noqa: E731
    return float(job.once(split, evaluate, kind="judge", everywhere=True))


def judge_distilled_set(
    job: Job,
    distilled: DistilledSet,
    fresh: Fresh,
    judging: Judging,
    *,
    label: Label | None = None,
    share: Mapping[str, Any] | None = None,
    split: str = "test",
) -> dict[str, float]:
    """All figures of a distilled set.

    Args:
        job: with the split open.
        distilled: the set.
        fresh: makes network number i.
        judging: what is measured.
        label: gives label logits (n, K) for images in network-input space, when the method's
            labels come from a teacher; random real images then get the same kind of labels.
        share: what the network depends on besides data, protocol and seed (its recipe); the
            training on the full data then lies in the cache.
        split: that is judged on.

    Returns:
        Fractions: `accuracy` (mean over networks, own labels), `accuracy_std` (population),
        `accuracy_hard` when own labels are soft, `random_real`, `random_mosaic` for a set of
        mosaics, `k_means`, `full_data`,
        `accuracy_<architecture>`, `hlr`, `ior`, `lrs`, `ars` as far as what they need is
        measured; counts and bytes of storage.
    """
    own = accuracies(job, "own", distilled, judging.protocol, fresh, nets=judging.nets, split=split)
    figures = {"accuracy": _mean(own), "accuracy_std": _std(own)}
    hard = own
    if distilled.label_logits is not None:
        hard = accuracies(
            job, "hard", distilled, judging.protocol, fresh,
            nets=judging.nets, soft=False, split=split,
        )  # fmt: skip
        figures["accuracy_hard"] = _mean(hard)
    figures |= _compared(job, distilled, own, hard, fresh, judging, label, share, split)
    for name, other in (judging.cross or {}).items():
        found = accuracies(
            job, f"cross-{name}", distilled, judging.protocol, other,
            nets=judging.cross_nets, split=split,
        )  # fmt: skip
        figures[f"accuracy_{name}"] = _mean(found)
    return figures | counts_of(distilled)


def counts_of(distilled: DistilledSet) -> dict[str, float]:
    """Stored and training images, and bytes of pixels and labels."""
    stored = distilled.storage
    return {
        "images": float(len(distilled)),
        "training_images": float(distilled.training_count),
        "pixel_bytes": float(stored["pixels"]),
        "label_bytes": float(stored["labels"]),
    }


def _compared(
    job: Job,
    distilled: DistilledSet,
    own: Sequence[float],
    hard: Sequence[float],
    fresh: Fresh,
    judging: Judging,
    label: Label | None,
    share: Mapping[str, Any] | None,
    split: str,
) -> dict[str, float]:
    against, protocol = set(judging.against), judging.protocol
    figures: dict[str, float] = {}
    full: float | None = None
    if against & {"full", "k-means"}:
        net = full_data_net(job, fresh, judging.full, distilled.preprocessing, share)
        full = _accuracy(job.child("full"), net, distilled.preprocessing, split)
        figures["full_data"] = full
    real = None
    if against & {"random-real", "k-means"}:
        real = RealImages(
            job.splits["train"], len(distilled.classes), distilled.preprocessing, device=job.device
        )
    if "k-means" in against:
        assert real is not None
        images = k_means_images(job, real, net, distilled.counts)
        chosen = _same_labels(distilled, images, label)
        found = accuracies(job, "k-means", chosen, protocol, fresh, nets=judging.nets, split=split)
        figures["k_means"] = _mean(found)
    if "random-real" in against:
        assert real is not None
        figures |= _against_random(
            job, distilled, real, own, hard, full, fresh, judging, label, split
        )
    return figures


def _against_random(
    job: Job,
    distilled: DistilledSet,
    real: RealImages,
    own: Sequence[float],
    hard: Sequence[float],
    full: float | None,
    fresh: Fresh,
    judging: Judging,
    label: Label | None,
    split: str,
) -> dict[str, float]:
    # As many random images as the set TRAINS on would be another comparison; storage decides.
    images = random_images(job, real, distilled.counts)
    chosen = _same_labels(distilled, images, label)
    protocol = judging.protocol
    found = accuracies(job, "random-real", chosen, protocol, fresh, nets=judging.nets, split=split)
    figures = {"random_real": _mean(found), "ior": _mean(own) - _mean(found)}
    if full is not None:
        scores = label_robust_score(
            full_hard=full, synthetic_hard=hard, synthetic_own=own, random_own=found
        )
        figures |= {"hlr": scores.hlr.mean, "lrs": scores.lrs.mean, "lrs_std": scores.lrs.std}
    if distilled.decode.factor > 1:
        mixed = random_images(job, real, distilled.counts, distilled.decode.factor)
        tiled = _same_labels(distilled, mixed, label, distilled.decode)
        seen = accuracies(
            job, "random-mosaic", tiled, protocol, fresh, nets=judging.nets, split=split
        )
        figures["random_mosaic"] = _mean(seen)
    if judging.plain_nets:
        plain = replace(protocol, augment="none")
        count = judging.plain_nets
        without = [
            accuracies(job, f"{name}-plain", one, plain, fresh, nets=count, split=split)
            for name, one in (("own", distilled), ("random-real", chosen))
        ]
        score = augmentation_robust_score(
            synthetic_augmented=_mean(own),
            random_augmented=_mean(found),
            synthetic_plain=_mean(without[0]),
            random_plain=_mean(without[1]),
        )
        figures |= {"accuracy_plain": _mean(without[0]), "random_real_plain": _mean(without[1])}
        figures["ars"] = score.mean
    return figures


def full_data_net(
    job: Job,
    fresh: Fresh,
    protocol: Protocol,
    preprocessing: Preprocessing | None,
    share: Mapping[str, Any] | None,
) -> Net:
    """Network number 0 trained on the full data, in the cache when `share` is given."""
    source = job.splits["train"]
    key = None
    if share is not None:
        key = {
            **share,
            "what": "full-data net",
            "protocol": asdict(protocol),
            "preprocessing": repr(preprocessing),
            "data": source.fingerprint,
            "seed": job.seed,
        }
    net = fresh(0)
    train_on(job.child("full"), net, source, protocol, preprocessing=preprocessing, share=key)
    return net


def k_means_images(job: Job, real: RealImages, net: Net, counts: Sequence[int]) -> Tensor:
    """Real images nearest to the k-means centres of each class in a network's embedding.

    Args:
        job: of the run.
        real: what is chosen from.
        net: trained; its head's input is the embedding.
        counts: images per class.

    Returns:
        (sum of counts, C, H, W), class by class.
    """
    rows = job.once("k-means-rows", lambda: _k_means_rows(job, real, net, counts), kind="judge")
    return real.take(rows)


@torch.no_grad()
def _k_means_rows(job: Job, real: RealImages, net: Net, counts: Sequence[int]) -> Tensor:
    if "head:input" not in net.taps:
        net.add_tap("head:input")
    chosen = []
    for number, (rows, count) in enumerate(zip(real.rows, counts, strict=True)):
        blocks = torch.split(rows, 512)
        embedded = torch.cat([net(real.take(b))["taps"]["head:input"].flatten(1) for b in blocks])
        clusters = kmeans(embedded, count, generator=job.rng("k-means", number))
        chosen.append(rows[clusters.nearest_samples(embedded).cpu()])
    return torch.cat(chosen)


def random_images(job: Job, real: RealImages, counts: Sequence[int], factor: int = 1) -> Tensor:
    """Random real images, the same that real initialisation begins with.

    Args:
        job: of the run; the draw is a function of its seed.
        real: what is drawn from.
        counts: images per class.
        factor: each is a mosaic of factor^2 real images.
    """
    rng = job.rng("initial images")
    if len(set(counts)) == 1:
        return initial_images(real, counts[0], "real", rng, factor=factor)
    drawn = [real.draw(c, count * factor**2, rng) for c, count in enumerate(counts)]
    return torch.cat([mosaic(images, factor) for images in drawn])


def _same_labels(
    distilled: DistilledSet, images: Tensor, label: Label | None, decode: Decode | None = None
) -> DistilledSet:
    """Real images in the place of the distilled ones, labelled in the same manner."""
    images, decode = images.float(), decode or Decode()
    logits = None
    if distilled.label_logits is not None:
        if label is None:
            raise RecipeError(
                "the set has soft labels; random real images need the same, so give the judge "
                "a function that labels images"
            )
        logits = label(decode(images)).detach().float().cpu()
    return distilled.replace(
        images=images.detach().cpu(), label_logits=logits, relabel=None, decode=decode
    )


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _std(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std(correction=0))
