"""Representation: an encoder of time series or other views, judged by a probe on its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.batch import Batch, Sample, Shuffled, stack
from stillhouse.clock import Views, generator
from stillhouse.errors import DataError
from stillhouse.losses.chunked import wide
from stillhouse.losses.contrastive import supcon
from stillhouse.metrics.probe import Separation, few_labels, probed
from stillhouse.net import Net, Output, in_eval_mode
from stillhouse.parts.series import left_padded
from stillhouse.task import Metric
from stillhouse.tasks.embedding import Embedding

# Shortest length of padded recordings (COMODO's collation for MOMENT).
_LEAST = 512
_CONTRAST = 0.1


class Representation(Embedding):
    """One vector per row, "embedding" (B, D), whose worth a classifier fitted on it shows.

    Views are series (C, T) or whatever the models read; a batch may hold several, recorded at
    the same time, one for each sensor or modality. `target` (B,) is read by the probe and by
    supervised sides only. `about` holds "classes", and in "views" for each view "mean" and
    "std" per channel.

    The probe is an SVM with RBF kernel on the rows of "train" (those that have labels), see
    `metrics/probe.py`.
    """

    name: ClassVar[str] = "representation"
    main_metric: ClassVar[str] = "accuracy"

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        found = self.about.get("classes")
        if not found:
            raise DataError(
                f"the data '{self.splits.edition}' has no classes, by which a probe could judge "
                "the features: a view 'target' of whole numbers is needed"
            )
        return [str(c) for c in found]

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap an encoder; its views are normalised by the data's figures for each channel."""
        about = self.about.get("views", {})
        own = about.get(getattr(module, "reads", "x"), about.get("x", {}))
        mean = getattr(module, "input_mean", own.get("mean"))
        std = getattr(module, "input_std", own.get("std"))
        return Net(module, answer="embedding", mean=mean, std=std, taps=taps, axes=1)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the model's own logits; without any, contrast of its vectors.

        An encoder without a head is trained by the supervised contrastive loss at temperature
        0.1 (Khosla et al. 2020), so that every encoder has a supervised side.

        Raises:
            DataError: the rows have no labels.
        """
        if "target" not in batch:
            raise DataError(f"the rows of '{self.splits.edition}' have no labels to learn from")
        target: Tensor = batch["target"]
        if "logits" in out:
            return {"task": F.cross_entropy(wide(out["logits"]), target)}
        vectors = out["embedding"]
        if len(target) < 2:
            return {"task": wide(vectors).sum() * 0.0}
        loss = supcon(vectors, target, temperature=_CONTRAST, base_temperature=_CONTRAST)
        return {"task": loss}

    def metrics(self) -> Mapping[str, Metric]:
        """How far classes lie apart; the figure while training."""
        return {"separation": Separation(len(self.classes))}

    def collate(self, samples: list[Sample]) -> Batch:
        """Join samples; recordings of different length are padded on the left.

        Such a view becomes a nested batch of `series` (B, C, T) and `mask` (B, T), which the
        model is called with by name.
        """
        batch = stack(samples)
        for name, value in batch.items():
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                series, mask = left_padded(value, _LEAST)
                batch[name] = Batch(series=series, mask=mask)
        return batch

    def judge(self, job: Any, model: nn.Module, split: str = "test") -> dict[str, float]:
        """The probe, fitted on the features of "train".

        Returns:
            "accuracy" and so on of `probed`; "accuracy_10" of probes that know ten labels of
            every class only, where there are more.
        """
        train = self.features(job, model, "train")
        asked = self.features(job, model, split)
        figures, few = probed(*train, *asked), few_labels(*train, *asked)
        return figures if few is None else {**figures, "accuracy_10": few}

    def features(self, job: Any, model: nn.Module, split: str) -> tuple[Tensor, Tensor]:
        """Vectors and labels of a split, in its order.

        Every process reads all rows, so that all fit the same probe.

        Returns:
            ((n, D), (n,)).
        """
        order = Shuffled(
            self.splits[split],
            self.evaluation_batch,
            shuffle=False,
            augment=False,
            collate=self.collate,
        )
        vectors, labels = [], []
        view = getattr(model, "view", "x")
        with in_eval_mode(model), torch.inference_mode(), job.hardware.autocast():
            for rows in order.epoch(0, lambda: generator(0)):
                batch = order.read(rows, Views(0)).to(job.device)
                vectors.append(model(batch.view(view))["embedding"].float().cpu())
                if "target" not in batch:
                    raise DataError(f"the split '{split}' has no labels for a probe")
                labels.append(batch["target"].cpu())
        return torch.cat(vectors), torch.cat(labels)

    def _check_net(self, role: str, net: Net, view: Any) -> None:
        if self.classes:
            super()._check_net(role, net, view)
