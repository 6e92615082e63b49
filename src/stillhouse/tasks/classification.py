"""Classification of images, vectors or token sequences into one of K classes."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import Predictor
from stillhouse.errors import DataError, MissingExtra, ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.metrics.calibration import Calibration
from stillhouse.metrics.classification import Accuracy, Confusion
from stillhouse.metrics.unseen import Unseen
from stillhouse.net import Net, Output
from stillhouse.task import Metric, Task


class Classification(Task):
    """One label per sample.

    Batches hold "x" (images (B, C, H, W) in [0, 1], vectors (B, D) or token ids (B, L)) and
    `target` (B,) int64. `about` of the splits holds "classes", and for images "mean", "std".
    """

    name: ClassVar[str] = "classification"
    main_metric: ClassVar[str] = "accuracy"

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        found = self.about.get("classes")
        if not found:
            raise DataError(
                f"the data '{self.splits.edition}' has no classes: classification needs a label "
                "for each row, a whole number from 0 upwards (a view 'target' of shape (N,))"
            )
        return [str(c) for c in found]

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a classifier; its own `mean` and `std`, when it has them, win over the data's."""
        mean = getattr(module, "input_mean", self.about.get("mean"))
        std = getattr(module, "input_std", self.about.get("std"))
        return Net(module, answer="logits", mean=mean, std=std, taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy, the mean over rows."""
        return {"task": F.cross_entropy(wide(out["logits"]), batch["target"])}

    def metrics(self) -> Mapping[str, Metric]:
        """Accuracy, the confusion matrix' macro F1, calibration; what students never saw."""
        classes, unseen = self.classes, self.about.get("unseen")
        found: dict[str, Metric] = {
            "accuracy": Accuracy((1, 5) if len(classes) > 10 else (1,)),
            "confusion": Confusion(len(classes), classes),
            "calibration": Calibration(),
        }
        if unseen:
            found["unseen"] = Unseen(unseen)
        return found

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse data without classes, and models whose number of outputs is another."""
        assert self.classes
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net, self._sample(net.view))

    def example_view(self, view: str = "x") -> Any:
        """One row of the training data."""
        return self._sample(view)[:1]

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Confusion and calibration of the student, its agreement with the teacher."""
        if artifact.predictor is None:
            return {}
        from stillhouse.metrics.agreement import Agreement

        confusion, calibration = Confusion(len(self.classes), self.classes), Calibration()
        agreement = Agreement()

        def compare(out: Output, batch: Any) -> None:
            confusion.update(out, batch)
            calibration.update(out, batch)
            if teacher is not None:
                agreement.compare(out["logits"], teacher(batch.view(teacher.view))["logits"])

        job.walk(artifact.module, "test" if "test" in self.splits else "val", compare)
        found: dict[str, Any] = {
            "confusion": confusion.record(),
            "calibration": calibration.record(),
        }
        if teacher is not None:
            found["agreement"] = agreement.compute()
        return found

    def _sample(self, view: str) -> Any:
        return self.first_rows(2).view(view)

    def _check_net(self, role: str, net: Net, view: Any) -> None:
        view, ids = self._with_last_id(view)
        try:
            out = net.tried(view)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
            raise ModelError(
                f"the {role} {type(net.module).__name__} cannot read the data "
                f"'{self.splits.edition}' with views of shape {shape}{ids}: {error}"
            ) from error
        if "logits" not in out:
            raise ModelError(
                f"the {role} {type(net.module).__name__} gives {sorted(out)}, no logits: "
                "a classifier is needed"
            )
        width = out["logits"].shape[-1]
        if width != len(self.classes):
            raise ModelError(
                f"the {role} {type(net.module).__name__} has {width} outputs, the data "
                f"'{self.splits.edition}' {len(self.classes)} classes; give it a head of "
                f"{len(self.classes)} in the same order of classes"
            )

    def _with_last_id(self, view: Any) -> tuple[Any, str]:
        """Rows of tokens with the last id of the data's vocabulary among them."""
        size = self.about.get("vocabulary")
        if size is None or not isinstance(view, Tensor) or view.is_floating_point():
            return view, ""
        view, last = view.clone(), int(size) - 1
        view.view(-1)[-1] = last
        return view, f" and token ids up to {last}"

    def predictor(self, net: Net) -> Predictor:
        """Class names with probabilities."""
        settings: dict[str, Any] = {"classes": self.classes}
        for key in ("input", "tokens"):
            if key in self.about:
                settings[key] = self.about[key]
        return Classifier(net, settings)


class Classifier(Predictor):
    """Gives the classes of images, texts or arrays with their probabilities."""

    reads: ClassVar[str] = "images, .npy arrays, or text lines"
    writes: ClassVar[str] = "jsonl or csv"
    options: ClassVar[Mapping[str, str]] = {
        "top": "how many classes to give per input (default 1)",
        "batch": "inputs at a time (default 64)",
    }

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Classes of raw inputs.

        Args:
            inputs: tensors shaped as in training without the batch, in [0, 1] for images; or
                PIL images; or strings for a model of texts.
            options: `top` and `batch`.

        Raises:
            RecipeError: an option that is no count.

        Returns:
            Per input {"class", "probability", "top": [[class, probability], ...]}.
        """
        top, size = _count(options, "top", 1), _count(options, "batch", 64)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        answers: list[dict[str, Any]] = []
        for start in range(0, len(inputs), size):
            views = torch.stack([self._tensor(x) for x in inputs[start : start + size]])
            with torch.inference_mode():
                logits = self.module(views.to(device, non_blocking=True))["logits"].float()
            best = logits.softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
            for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = [self.settings["classes"][c] for c in classes]
                answers.append(
                    {
                        "class": names[0],
                        "probability": values[0],
                        "top": [list(pair) for pair in zip(names, values, strict=True)],
                    }
                )
        return answers

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.float() / 255.0 if value.dtype == torch.uint8 else value
        if isinstance(value, str):
            return self._tokens(value)
        if hasattr(value, "resize") and hasattr(value, "mode"):
            return self._image(value)
        return torch.as_tensor(value, dtype=torch.float32)

    def _tokens(self, text: str) -> Tensor:
        settings = self.settings.get("tokens")
        if not settings:
            raise DataError("this classifier reads images or arrays, not text")
        from stillhouse.data.hash_tokens import HashTokens

        return HashTokens(**settings)(text)

    def _image(self, image: Any) -> Tensor:
        import numpy as np

        shape = self.settings.get("input") or [3, image.height, image.width]
        channels, height, width = shape
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height))
        array = torch.from_numpy(np.asarray(image).copy()).float() / 255.0
        return array[None] if array.ndim == 2 else array.permute(2, 0, 1)

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Classify image files, folders of them, .npy arrays, or the lines of text files."""
        names, values = [], []
        for path in _files(inputs):
            for name, value in _read(path):
                names.append(name)
                values.append(value)
        if not values:
            raise DataError("nothing to read: no image, .npy or text file was found")
        rows = [
            {"input": name, **answer}
            for name, answer in zip(names, self.predict(values, **dict(options)), strict=True)
        ]
        if output is not None:
            _write(rows, Path(output))
        return {"inputs": len(rows), "output": str(output) if output else None, "rows": rows}


def _count(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"the option '{name}' is a whole number of at least 1, found {value!r}")
    return value


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def _files(inputs: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"{path} does not exist")
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [p for p in found if p.suffix.lower() in IMAGES | {".npy", ".txt"}]


def _read(path: Path) -> list[tuple[str, Any]]:
    if path.suffix.lower() == ".npy":
        import numpy as np

        try:
            return [(str(path), np.load(path, allow_pickle=False))]
        except (OSError, ValueError, EOFError) as error:
            # For whatever it does not know numpy says that pickles may be allowed; they may not.
            raise DataError(f"{path} cannot be read as a .npy array of numbers") from error
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no text in UTF-8: {error}") from error
        return [(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pillow", "images", "to read images") from error
    try:
        with Image.open(path) as image:
            image.load()
            return [(str(path), image.copy())]
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(["input", "class", "probability"])
            writer.writerows([r["input"], r["class"], r["probability"]] for r in rows)
        else:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
