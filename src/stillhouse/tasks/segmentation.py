"""Semantic segmentation: one class for every pixel."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch
from stillhouse.data.image_files import as_image, decode_image, png_targets
from stillhouse.errors import DataError, ModelError
from stillhouse.losses.chunked import wide
from stillhouse.losses.spatial import IGNORE, pixel_cross_entropy
from stillhouse.metrics.segmentation import SegmentationIoU, label_maps, near_borders
from stillhouse.net import Net, Output
from stillhouse.task import Metric, Task

# Weight of an auxiliary head's cross-entropy (mmsegmentation: auxiliary_head loss_weight 0.4).
AUXILIARY = 0.4
_SHOWN = 3  # scenes in the report
_LARGEST = 320  # px, longer side of a shown scene
_ERROR, _BAND = (220, 40, 40), (255, 200, 0)


class Segmentation(Task):
    """Label maps of images.

    Batches hold "x" (B, 3, H, W) in [0, 1] and `target` (B, H, W) whole numbers, where the
    label `ignore` (255) counts for nothing. Networks give `logits` (B, K, h, w), classes
    second, at the size of their own decoder; they are enlarged bilinearly where they meet
    labels. A second head may give `aux` likewise. Hugging Face outputs, torchvision's
    dictionaries ("out", "aux") and plain tensors are all taken.

    The loss is the mean over all pixels, ignored ones counting as 0 (as mmsegmentation's
    cross-entropy by default): so the mean of several pieces of a batch is that of the whole.

    `about` of the splits holds "classes", "input", "mean", "std", and "ignore"; "class_weights",
    where it is there, multiplies each pixel's loss by its class's number.
    """

    name: ClassVar[str] = "segmentation"
    main_metric: ClassVar[str] = "miou"
    evaluation_batch: ClassVar[int] = 16
    class_axis: ClassVar[int] = 1

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits.

        Raises:
            DataError: the data does not say them.
        """
        found = self.about.get("classes")
        if not found:
            raise DataError(
                f"the data '{self.splits.edition}' has no classes: segmentation needs their names "
                "or their number, and a label map (N, H, W) for each image"
            )
        return [str(c) for c in found]

    @property
    def ignore(self) -> int:
        """The label of pixels that count for nothing."""
        return int(self.about.get("ignore", IGNORE))

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a network; its own `mean` and `std`, when it has them, win over the data's."""
        mean = getattr(module, "input_mean", self.about.get("mean"))
        std = getattr(module, "input_std", self.about.get("std"))
        return Net(module, answer="logits", mean=mean, std=std, taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy at the labels' size, of the head and of an auxiliary one."""
        terms = {"task": self._cross_entropy(out["logits"], batch["target"])}
        if isinstance(out.get("aux"), Tensor):
            terms["aux"] = AUXILIARY * self._cross_entropy(out["aux"], batch["target"])
        return terms

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        given = self.about.get("class_weights")
        weight = None if given is None else wide(logits).new_tensor(given)
        return pixel_cross_entropy(logits, target, ignore=self.ignore, weight=weight).mean()

    def metrics(self) -> Mapping[str, Metric]:
        """mIoU, also near borders and away from them; see `metrics.segmentation`."""
        return {"segmentation": self._iou()}

    def _iou(self) -> SegmentationIoU:
        return SegmentationIoU(len(self.classes), self.classes, ignore=self.ignore)

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse data without label maps, and networks that give no map of its classes."""
        assert self.classes
        if not self.splits:
            return
        batch = self._sample()
        target, image = batch.get("target"), batch.view("x")
        if not isinstance(target, Tensor) or target.ndim != 3:
            shape = tuple(target.shape) if isinstance(target, Tensor) else "none"
            raise DataError(
                f"the data '{self.splits.edition}' has targets of shape {shape}; segmentation "
                "needs a label map (H, W) for each image"
            )
        if target.shape[-2:] != image.shape[-2:]:
            raise DataError(
                f"the data '{self.splits.edition}' has images of {tuple(image.shape[-2:])} and "
                f"label maps of {tuple(target.shape[-2:])}; they must be of one size"
            )
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net, batch.view(net.view))

    def _check_net(self, role: str, net: Net, view: Any) -> None:
        name = type(net.module).__name__
        try:
            out = net.tried(view)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
            raise ModelError(
                f"the {role} {name} cannot read the data '{self.splits.edition}' with images of "
                f"shape {shape}: {error}"
            ) from error
        logits = out.get("logits")
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"the {role} {name} gives {sorted(out)}, no logits: a segmentation network is "
                "needed"
            )
        if logits.ndim != 4:
            raise ModelError(
                f"the {role} {name} gives logits of shape {tuple(logits.shape)}; a map of class "
                "scores (B, classes, h, w) is needed"
            )
        if logits.shape[1] != len(self.classes):
            raise ModelError(
                f"the {role} {name} has {logits.shape[1]} outputs, the data "
                f"'{self.splits.edition}' {len(self.classes)} classes; give it a head of "
                f"{len(self.classes)} in the same order of classes"
            )

    def example_view(self, view: str = "x") -> Any:
        """One image of the training data."""
        return self._sample().view(view)[:1]

    def _sample(self) -> Batch:
        return self.first_rows(2)

    def predictor(self, net: Net) -> Predictor:
        """Images in, label maps out."""
        settings = {"classes": self.classes, "ignore": self.ignore}
        if "input" in self.about:
            settings["input"] = list(self.about["input"])
        return Segmenter(net, settings)

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """IoU by class and by distance from borders; scenes with their errors."""
        if artifact.predictor is None:
            return {}
        student, taught = self._iou(), None if teacher is None else self._iou()
        split = "test" if "test" in self.splits else "val"
        total, number = len(job.splits[split]), itertools.count()
        # Spread evenly over the split: neighbours in a film look alike.
        wanted = {total * k // _SHOWN for k in range(_SHOWN)}
        scenes: list[dict[str, str]] = []

        def show(out: Output, batch: Batch) -> None:
            target = batch["target"].long()
            size = (target.shape[1], target.shape[2])
            maps = [label_maps(out["logits"], size)]
            student.compare(maps[0], target)
            if teacher is not None and taught is not None:
                maps.append(label_maps(teacher(batch.view(teacher.view))["logits"], size))
                taught.compare(maps[1], target)
            for row, image in enumerate(batch.view("x")):
                if next(number) in wanted:
                    scenes.append(self._scene(image, target[row], [m[row] for m in maps]))

        job.walk(artifact.module, split, show)
        return {"tables": self._tables(student, taught), "images": scenes}

    def _tables(self, student: SegmentationIoU, taught: SegmentationIoU | None) -> list[Any]:
        sides = {"student": student} if taught is None else {"student": student, "teacher": taught}
        figures = {name: side.compute() for name, side in sides.items()}
        first = next(iter(figures.values()))
        distance = [[words, *(figures[s][key] for s in sides)] for key, words in _regions(first)]
        by_class = {name: side.by_class() for name, side in sides.items()}
        rows = []
        for number, name in enumerate(self.classes):
            cells: list[Any] = [name]
            for side in sides:
                cells += [_shown(v) for v in by_class[side][number][1:]]
            rows.append(cells)
        near = f"{student.widths[min(1, len(student.widths) - 1)]} px"
        columns = ["class"]
        for side in sides:
            columns += [f"{side}, IoU", f"{side}, IoU within {near} of a border"]
        return [
            {"title": "IoU near borders", "columns": ["where", *sides], "rows": distance},
            {"title": "IoU by class", "columns": columns, "rows": rows},
        ]

    def _scene(self, image: Tensor, target: Tensor, maps: Sequence[Tensor]) -> dict[str, str]:
        """Image, truth, maps and their errors side by side as one PNG."""
        told = "image, truth, student, its errors"
        if len(maps) > 1:
            told += ", teacher, its errors"
        panels = [_colours(image), coloured(target, self.ignore)]
        border = near_borders(target[None], 1, ignore=self.ignore)[0].cpu().numpy()
        for found in maps:
            panels.append(coloured(found))
            panels.append(_errors(image, found, target, border, self.ignore))
        return {
            "title": told,
            "caption": "errors are red, borders of the truth yellow where there is none",
            "png_base64": png_base64(_enlarged(np.concatenate(panels, axis=1), len(panels))),
        }


def _regions(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names of the figures that tell regions apart, and how they are said."""
    found = [("miou", "everywhere")]
    for key in figures:
        if key.startswith("trimap_miou_"):
            found.append((key, f"within {key.removeprefix('trimap_miou_').removesuffix('px')} px"))
    return [*found, ("body_miou", "farther from any border")]


def _shown(value: float) -> float | None:
    return None if value != value else value


# ---- pictures ------------------------------------------------------------------------------


def palette() -> NDArray[np.uint8]:
    """256 colours (256, 3), the customary ones of PASCAL VOC: bits of the number, spread."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            value = (numbers >> (3 * bit + channel)) & 1 if 3 * bit + channel < 8 else 0 * numbers
            colours[:, channel] |= (value << (7 - bit)).astype(np.uint8)
    return colours


def coloured(labels: Tensor, ignore: int | None = None) -> NDArray[np.uint8]:
    """A label map (H, W) in the palette's colours, class c in colour c + 1; ignored pixels grey."""
    numbers = labels.cpu().long().numpy()
    shown: NDArray[np.uint8] = palette()[(numbers + 1) % 256]
    if ignore is not None:
        shown[numbers == ignore] = 128
    return shown


def _colours(image: Tensor) -> NDArray[np.uint8]:
    levels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    if levels.shape[0] == 1:
        levels = levels.expand(3, -1, -1)
    found: NDArray[np.uint8] = levels[:3].permute(1, 2, 0).contiguous().numpy()
    return found


def _errors(
    image: Tensor, found: Tensor, target: Tensor, border: NDArray[np.bool_], ignore: int
) -> NDArray[np.uint8]:
    shown = _colours(image) // 2 + 60
    wrong = ((found != target) & (target != ignore)).cpu().numpy()
    shown[border] = _BAND
    shown[wrong] = _ERROR
    return shown


def _enlarged(picture: NDArray[np.uint8], panels: int) -> NDArray[np.uint8]:
    times = max(1, _LARGEST // max(picture.shape[0], picture.shape[1] // panels))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def png_base64(picture: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) or (H, W) as PNG, base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# ---- what is deployed ----------------------------------------------------------------------


class Segmenter(Predictor):
    """Gives label maps of images of any size."""

    reads: ClassVar[str] = "images: files or folders, any size"
    writes: ClassVar[str] = "a folder of PNG label maps, the pixel's value its class (or one PNG)"
    options: ClassVar[Mapping[str, str]] = {
        "size": "what the network sees: 'trained' (default), 'own' for the image's own size, or "
        "HEIGHTxWIDTH; label maps have the image's own size in any case",
        "overlay": "true: also write the image with its classes laid over it, as NAME.overlay.png",
    }

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Tensor]:
        """Label maps.

        Args:
            inputs: tensors (3, H, W), float in [0, 1] or uint8; arrays (H, W, 3) uint8; PIL
                images.
            options: `size`.

        Returns:
            Per input (H, W) uint8 class numbers (int16 beyond 256 classes), on the CPU.

        Raises:
            DataError: an input that is no image, or an option that does not fit.
        """
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        kind = torch.uint8 if len(self.settings.get("classes", ())) <= 256 else torch.int16
        answers = []
        for value in inputs:
            image = as_image(value)
            own = (int(image.shape[-2]), int(image.shape[-1]))
            seen = _resized(image, self._size(options.get("size", "trained"), own))
            with torch.inference_mode():
                logits = self.module(seen[None].to(device, non_blocking=True))["logits"]
                answers.append(label_maps(logits, own)[0].to(kind).cpu())
        return answers

    def _size(self, asked: Any, own: tuple[int, int]) -> tuple[int, int]:
        text = str(asked).lower()
        if text == "trained":
            known = self.settings.get("input")
            return own if known is None else (int(known[1]), int(known[2]))
        if text == "own":
            return own
        height, _, width = text.partition("x")
        if height.isdigit() and width.isdigit() and min(int(height), int(width)) > 0:
            return int(height), int(width)
        raise DataError(f"option 'size' is 'trained', 'own' or HEIGHTxWIDTH, not {asked!r}")

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write a label map for each image file.

        Raises:
            DataError: nothing to read, no output, or two inputs of one output name.
        """
        from stillhouse.data.cached import write_whole

        if output is None:
            raise DataError("say where the label maps go: -o FOLDER (or a .png for one image)")
        overlay = options.get("overlay", False) is True
        rows = []
        for source, target in png_targets(inputs, Path(output)):
            pixels = decode_image(source)
            labels = self.predict([pixels], **{k: v for k, v in options.items() if k == "size"})[0]
            write_whole(target, partial(_save_labels, labels.numpy()))
            if overlay:
                laid = (pixels.astype(np.uint16) + coloured(labels)) // 2
                beside = target.with_suffix(".overlay.png")
                write_whole(beside, partial(_save_picture, laid.astype(np.uint8)))
            rows.append({"input": str(source), "output": str(target), **self._shares(labels)})
        return {"inputs": len(rows), "output": str(output), "rows": rows}

    def _shares(self, labels: Tensor) -> dict[str, str]:
        """The three largest classes with their share of the pixels."""
        counts = torch.bincount(labels.flatten().long(), minlength=1)
        best = counts.topk(min(3, len(counts)))
        total = max(1, labels.numel())
        names = self.settings.get("classes", [])
        told = [
            f"{names[c] if c < len(names) else c} {100 * n / total:.0f} %"
            for n, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if n
        ]
        return {"classes": ", ".join(told)}


def _save_labels(labels: NDArray[Any], path: Path) -> None:
    """An indexed PNG: the values are the classes, the colours only for the eye."""
    from PIL import Image

    if labels.dtype == np.uint8:
        image = Image.fromarray(labels, mode="P")
        image.putpalette(np.roll(palette(), -1, axis=0).flatten().tolist())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    image.save(path, format="PNG")


def _save_picture(picture: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, format="PNG")


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    from torch.nn import functional as F

    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
