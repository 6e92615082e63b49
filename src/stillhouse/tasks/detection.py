"""Detection: boxes around objects, and what they are."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch, Sample
from stillhouse.data.box_source import boxed_batch
from stillhouse.errors import DataError, ModelError
from stillhouse.metrics.detection import Detections
from stillhouse.models.detector_net import DetectorNet, Features, targets_of
from stillhouse.net import Net, Output, in_eval_mode
from stillhouse.task import Metric, Task

_SHOWN = 4  # images whose boxes are drawn in a report
_SCORE = 0.5  # least score of a box that is drawn
TRUE, FOUND, BEFORE = (255, 255, 255), (64, 220, 90), (255, 140, 0)


class Detection(Task):
    """Boxes with classes.

    Batches hold "x": (B, 3, H, W) in [0, 1] or a list of images of any size; "boxes": a list of
    (n, 4) left, top, right, bottom in pixels; `target`: a list of (n,) classes from 0; where
    given "ignored" and "crowd": lists of (n,) bool. `about` of the splits holds "categories"
    (names), and may hold "novel" (names judged apart) and "sizes" (where small ends and large
    begins, px).
    """

    name: ClassVar[str] = "detection"
    main_metric: ClassVar[str] = "ap50"
    evaluation_batch: ClassVar[int] = 16

    @property
    def categories(self) -> list[str]:
        """Names of the classes.

        Raises:
            DataError: the data names none.
        """
        found = self.about.get("categories")
        if not found:
            raise DataError(
                f"the data '{self.splits.edition}' names no categories: it is not for detection"
            )
        return [str(name) for name in found]

    def collate(self, samples: list[Sample]) -> Batch:
        """Images are stacked where their sizes agree; boxes stay lists."""
        return boxed_batch(samples)

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """A two-stage detector in its pieces; it normalises by itself."""
        return module if isinstance(module, DetectorNet) else DetectorNet(module, taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of both stages on the true boxes: `task/rpn_class`, `task/box` ..."""
        features: Features = out["features"]
        boxes, labels = targets_of(batch)
        found = out["losses"](features.to_input([b.to(features.images.tensors) for b in boxes]),
                              labels)  # fmt: skip
        return {f"task/{name}": value for name, value in found.items()}

    def metrics(self) -> Mapping[str, Metric]:
        """Average precision, by size and class group, and misses: `metrics.detection`."""
        return {"detections": self.figures()}

    def figures(self) -> Detections:
        """A fresh metric of this data."""
        names = self.categories
        novel = [names.index(str(name)) for name in self.about.get("novel", ())]
        sizes = self.about.get("sizes", (32.0, 96.0))
        return Detections(len(names), sizes=sizes, novel=novel)

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse models of other categories, or that cannot read the images."""
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net)

    def _check_net(self, role: str, net: Net) -> None:
        kind = type(net.module).__name__
        if not isinstance(net, DetectorNet):
            raise ModelError(f"the {role} {kind} is no detector")
        wanted = len(self.categories)
        batch = self._sample()
        try:
            with in_eval_mode(net), torch.no_grad():
                features = net.features(batch.view("x"))
                proposals = net.propose(features)
                boxes = [own[:2] for own in proposals]
                found = net.roi(features, boxes)[1].shape[1] - 1
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            shape = tuple(batch.view("x")[0].shape)
            raise ModelError(
                f"the {role} {kind} cannot read images of shape {shape}: {error}"
            ) from error
        if found != wanted:
            raise ModelError(
                f"the {role} {kind} knows {found} categories beside the background, the data "
                f"'{self.splits.edition}' has {wanted}: {', '.join(self.categories[:6])}"
                f"{' ...' if wanted > 6 else ''} (torchvision's num_classes counts the background "
                "too)"
            )

    def example_view(self, view: str = "x") -> Any:
        """One image."""
        return self._sample().view(view)[:1]

    def _sample(self) -> Batch:
        return self.first_rows()

    def predictor(self, net: Net) -> Predictor:
        """Images in, detections out."""
        return Detector(net, {"categories": self.categories})

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Boxes drawn on test images, and average precision class by class."""
        if artifact.predictor is None:
            return {}
        split = "test" if "test" in self.splits else "val"
        nets = {"model": artifact.module}
        if isinstance(teacher, DetectorNet) and teacher is not artifact.module:
            nets["teacher"] = teacher
        figures = {role: self.figures() for role in nets}
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        drawn: dict[str, list[dict[str, Tensor]]] = {role: [] for role in nets}

        def walk(role: str) -> None:
            def take(out: Output, batch: Batch) -> None:
                figures[role].update(out, batch)
                for i in range(min(len(batch["target"]), _SHOWN - len(drawn[role]))):
                    if role == "model":
                        shown.append((batch.view("x")[i], batch["boxes"][i], batch["target"][i]))
                    names = ("boxes", "scores", "labels")
                    drawn[role].append({name: out[name][i].detach().cpu() for name in names})

            job.walk(nets[role], split, take)

        for role in nets:
            walk(role)
        rows = [
            [name, *(figures[role].by_class()[k] for role in nets)]
            for k, name in enumerate(self.categories)
        ]
        table = {
            "title": "Average precision (AP50) class by class",
            "columns": ["class", *(f"{role} AP50" for role in nets)],
            "rows": rows,
        }
        images = [
            {
                "title": f"Image {i + 1}: true boxes white"
                + (", teacher orange" if "teacher" in nets else "")
                + ", model green",
                "png_base64": drawn_boxes(
                    image,
                    [(boxes, labels, TRUE)]
                    + ([_confident(drawn["teacher"][i], BEFORE)] if "teacher" in nets else [])
                    + [_confident(drawn["model"][i], FOUND)],
                    self.categories,
                ),
            }
            for i, (image, boxes, labels) in enumerate(shown)
        ]
        return {"tables": [table], "images": images}


Layer = tuple[Tensor, Tensor, tuple[int, int, int]]


def _confident(found: Mapping[str, Tensor], colour: tuple[int, int, int]) -> Layer:
    sure = found["scores"] >= _SCORE
    return found["boxes"][sure], found["labels"][sure], colour


def drawn_boxes(image: Tensor, layers: Sequence[Layer], names: Sequence[str]) -> str:
    """Panels of an image side by side, one with the boxes of each layer; a PNG, base64.

    Args:
        image: (3, H, W) in [0, 1].
        layers: boxes (n, 4) in pixels, labels (n,) and colour of each panel.
        names: of the classes.
    """
    from PIL import Image, ImageDraw

    scale = max(1, 224 // max(image.shape[-2:]))
    pixels = (image.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    plain = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    size = (plain.width * scale, plain.height * scale)
    whole = Image.new("RGB", ((size[0] + 4) * len(layers) - 4, size[1]), (255, 255, 255))
    for number, (boxes, labels, colour) in enumerate(layers):
        panel = plain.resize(size, Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(panel)
        for box, label in zip((boxes.cpu() * scale).tolist(), labels.tolist(), strict=True):
            pen.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=colour)
            pen.text((box[0] + 2, box[1]), names[int(label)], fill=colour)
        whole.paste(panel, (number * (size[0] + 4), 0))
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Detector(Predictor):
    """Finds objects in images: files, folders, arrays or tensors."""

    reads: ClassVar[str] = "images: files or folders, any size, greyscale or colour"
    writes: ClassVar[str] = (
        "detections as COCO's results JSON (-o FILE.json), or a folder with detections.json and "
        "the images with their boxes drawn"
    )
    options: ClassVar[Mapping[str, str]] = {
        "score": "least score of a detection (default 0.05)",
        "limit": "most detections of an image (default: the detector's own)",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        if not isinstance(module, DetectorNet):
            module = DetectorNet(module.module if isinstance(module, Net) else module)
        super().__init__(module, settings)

    @property
    def categories(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.settings.get("categories", ())]

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Detections in each image.

        Args:
            inputs: tensors (3, H, W) float in [0, 1] or uint8, arrays (H, W, 3) uint8, or PIL
                images.
            options: `score`, `limit`.

        Returns:
            Per image `boxes` (n, 4), `scores` (n,), `labels` (n,) and `names`, best first.

        Raises:
            DataError: an input that is no image, or an option that does not fit.
        """
        least = _number(options, "score", 0.05)
        limit = _number(options, "limit", 0) or None
        net = self.module
        assert isinstance(net, DetectorNet)
        answers = []
        for value in inputs:
            with torch.inference_mode():
                features = net.features([_image(value)])
                proposals = net.propose(features)
                _, logits, deltas = net.roi(features, proposals)
                most = None if limit is None else int(limit)
                found = net.decode(features, proposals, logits, deltas, score=least, limit=most)[0]
                found["boxes"] = features.to_image([found["boxes"]])[0]
            labels = found["labels"].tolist()
            answers.append({**found, "names": [self._name(label) for label in labels]})
        return answers

    def _name(self, label: int) -> str:
        names = self.categories
        return names[label] if label < len(names) else str(label)

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Find objects in files and folders; write COCO's results.

        Each record holds `image_id` (a running number), `file_name`, `category_id` (from 1),
        `category`, `bbox` (left, top, width, height) and `score`.

        Raises:
            DataError: nothing to read, no output, or an image that cannot be read.
        """
        from stillhouse.data.cached import write_whole
        from stillhouse.data.image_files import as_tensor, decode_image

        if output is None:
            raise DataError("say where the detections go: -o FILE.json, or a folder for pictures")
        files = _files(inputs)
        pictures = output.suffix != ".json"
        records: list[dict[str, Any]] = []
        for number, path in enumerate(files, 1):
            image = as_tensor(decode_image(path))
            found = self.predict([image], **dict(options))[0]
            records += coco_records(found, number, path.name)
            if pictures:
                sure = _confident(found, FOUND)
                drawing = base64.b64decode(drawn_boxes(image, [sure], self.categories))
                write_whole(output / f"{path.stem}.png", _writer(drawing))
        target = output / "detections.json" if pictures else output
        write_whole(target, _writer(json.dumps(records, indent=1).encode()))
        return {"images": len(files), "detections": len(records), "output": str(output)}


def _writer(content: bytes) -> Any:
    return lambda beside: beside.write_bytes(content)


def coco_records(found: Mapping[str, Any], image_id: int, name: str) -> list[dict[str, Any]]:
    """Detections of an image as COCO's results."""
    records = []
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(),
               found["names"], strict=True)  # fmt: skip
    for (left, top, right, bottom), score, label, category in rows:
        records.append(
            {
                "image_id": image_id,
                "file_name": name,
                "category_id": int(label) + 1,
                "category": category,
                "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
                "score": round(float(score), 6),
            }
        )
    return records


def _files(inputs: Sequence[Path]) -> list[Path]:
    from stillhouse.data.image_files import ImageFiles

    files: list[Path] = []
    for place in map(Path, inputs):
        if place.is_dir():
            files += [place / name for name in ImageFiles.find(place).names]
        elif place.is_file():
            files.append(place)
        else:
            raise DataError(f"there is no file or folder '{place}'")
    if not files:
        raise DataError("no image to look at: give files or folders")
    return files


def _image(value: Any) -> Tensor:
    """An input as (3, H, W) in [0, 1]."""
    if not isinstance(value, Tensor):
        import numpy as np

        if hasattr(value, "convert"):
            value = value.convert("RGB")
        array = np.asarray(value)
        if array.ndim == 2:
            array = np.repeat(array[:, :, None], 3, axis=2)
        if array.ndim != 3 or array.shape[2] != 3:
            raise DataError(f"an array of shape {array.shape} is no image (H, W, 3)")
        value = torch.from_numpy(np.array(array)).permute(2, 0, 1)
    if value.ndim != 3 or value.shape[0] not in {1, 3}:
        raise DataError(f"a tensor of shape {tuple(value.shape)} is no image (3, H, W)")
    image = value.float() / 255.0 if value.dtype == torch.uint8 else value.float()
    colour: Tensor = image.expand(3, -1, -1)
    return colour


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    try:
        found = float(options.get(name, default))
    except (TypeError, ValueError):
        raise DataError(f"the option '{name}' must be a number, not {options[name]!r}") from None
    if found < 0:
        raise DataError(f"the option '{name}' must be at least 0, not {found}")
    return found
