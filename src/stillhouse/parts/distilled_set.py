"""The product of data-set distillation: a few images that stand for a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stillhouse.errors import CheckpointError, DataError
from stillhouse.parts.matrices import ZCA
from stillhouse.writing import write_atomic

TENSORS = "distilled.safetensors"
DESCRIPTION = "distilled.json"
_VERSION = 1


@dataclass(frozen=True)
class MeanStd:
    """Channel normalisation of images in [0, 1].

    Attributes:
        mean: one number per channel.
        std: one positive number per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise DataError(
                f"normalisation needs as many means as positive deviations, got "
                f"mean {self.mean}, std {self.std}"
            )

    def transform(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to network-input space."""
        return (images - self._column(self.mean, images)) / self._column(self.std, images)

    def inverse(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in network-input space back to [0, 1] (or beyond it)."""
        return images * self._column(self.std, images) + self._column(self.mean, images)

    def _column(self, values: Sequence[float], images: Tensor) -> Tensor:
        if images.shape[1] != len(values):
            raise DataError(
                f"normalisation of {len(values)} channels on images of {images.shape[1]}"
            )
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]


Preprocessing = MeanStd | ZCA


@dataclass(frozen=True)
class Decode:
    """How stored images become training images.

    With `factor` f a stored image is a mosaic of f x f tiles; each is cut out and brought to
    the full side (Kim et al., IDC, ICML 2022; used by NCFM). A side that f does not divide is
    padded at the right and bottom with `pad` first.

    Attributes:
        factor: tiles per side; 1 leaves the images as they are.
        upsample: interpolation mode.
        pad: value of the padding, in the images' own space; one, or one per channel.
        kind: "single", the factor alone; "multi", the factors 1 ... f one after the other;
            "bound", the largest factor for as many images as `bound` training images allow,
            then the next smaller one for those left (as released).
        bound: of "bound": most training images of one call, as far as whole images go.

    Raises:
        DataError: a factor below 1 or an unknown kind.
    """

    factor: int = 1
    upsample: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    pad: float | tuple[float, ...] = 0.5
    kind: Literal["single", "multi", "bound"] = "single"
    bound: int = 128

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise DataError(f"decode factor must be at least 1, got {self.factor}")
        if self.kind not in ("single", "multi", "bound"):
            raise DataError(f"decode kind must be single, multi or bound, got '{self.kind}'")
        if isinstance(self.pad, list):  # as JSON gives it back
            object.__setattr__(self, "pad", tuple(self.pad))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to training images, tile-major: all of tile (0, 0) first.

        There are f * f * B for "single"; `sources` says of which image each is a tile.
        """
        if self.factor == 1:
            return images
        return torch.cat([self._cut(images[rows], factor) for rows, factor in self._plan(images)])

    def sources(self, count: int) -> Tensor:
        """The stored image, among `count`, of which each training image is a tile; int64."""
        rows = torch.arange(count)
        if self.factor == 1:
            return rows
        return torch.cat([rows[part].repeat(factor**2) for part, factor in self._plan(rows)])

    def _plan(self, images: Tensor) -> list[tuple[slice, int]]:
        """Which images are cut by which factor, in order."""
        count = len(images)
        if self.kind == "single":
            return [(slice(0, count), self.factor)]
        if self.kind == "multi":
            return [(slice(0, count), factor) for factor in range(1, self.factor + 1)]
        plan, done, made = [], 0, 0
        for factor in range(self.factor, 0, -1):
            left = count - done
            room = self.bound - made - left
            number = left if factor == 1 else max(0, min(room // factor**2, left))
            if number:
                plan.append((slice(done, done + number), factor))
            done, made = done + number, made + number * factor**2
        return plan

    def _cut(self, images: Tensor, factor: int) -> Tensor:
        if factor == 1:
            return images
        height, width = images.shape[2:]
        rows = self._padded(images, factor).chunk(factor, dim=2)
        tiles = torch.cat([tile for row in rows for tile in row.chunk(factor, dim=3)])
        corners = None if self.upsample == "nearest" else False
        return F.interpolate(tiles, size=(height, width), mode=self.upsample, align_corners=corners)

    def _padded(self, images: Tensor, factor: int) -> Tensor:
        height, width = images.shape[2:]
        down, right = -height % factor, -width % factor
        if not down and not right:
            return images
        if isinstance(self.pad, tuple):
            pad = torch.tensor(self.pad, dtype=images.dtype, device=images.device)[:, None, None]
            return F.pad(images - pad, (0, right, 0, down)) + pad
        return F.pad(images, (0, right, 0, down), value=self.pad)

    def normalised(self, preprocessing: Preprocessing | None) -> Decode:
        """The same decoding of images that `preprocessing` has brought to another space.

        Interpolation commutes with a channel's scale and shift, so only the padding changes.

        Raises:
            DataError: padding is needed for whitened images, whose channels have no one value.
        """
        if preprocessing is None or self.factor == 1:
            return self
        if not isinstance(preprocessing, MeanStd):
            raise DataError("mosaics are kept in normalised or raw space, not in whitened space")
        pads = self.pad if isinstance(self.pad, tuple) else (self.pad,) * len(preprocessing.mean)
        raw = torch.tensor(pads, dtype=torch.float64).reshape(1, -1, 1, 1)
        return dataclasses.replace(self, pad=tuple(preprocessing.transform(raw).flatten().tolist()))


@dataclass(frozen=True)
class DistilledSet:
    """A distilled data set: everything a stranger needs to train on it.

    Attributes:
        images: (N, C, H, W) float32 in network-input space (normalised or whitened), class
            by class: all images of class 0 first.
        labels: (N,) int64 hard labels, never falling.
        classes: names of the K classes.
        label_logits: (N, K) float32, one row per stored image; or (M, K), one per training
            image after decoding, in its order; or None. The softmax is taken in the loss.
        lr: learning rate that was learned with the images, if one was.
        preprocessing: from [0, 1] to network-input space, with its inverse; None if the
            network sees [0, 1].
        decode: how stored images become training images.
        relabel: how labels are made anew in training (teacher, per-epoch store), if they are.
        provenance: method, settings, seed, initialisation, data; plain JSON values.

    Raises:
        DataError: shapes that do not fit each other, labels out of range or not in class
            order, values that are not finite.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    label_logits: Tensor | None = None
    lr: float | None = None
    preprocessing: Preprocessing | None = None
    decode: Decode = field(default_factory=Decode)
    relabel: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images, labels, count = self.images, self.labels, len(self.classes)
        if images.ndim != 4 or len(images) == 0:
            raise DataError(f"distilled images must be (N, C, H, W), got {tuple(images.shape)}")
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise DataError(
                f"distilled labels must be ({len(images)},) int64, got "
                f"{tuple(labels.shape)} {labels.dtype}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= count:
            raise DataError(
                f"distilled labels must lie in 0..{count - 1}, got "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        if bool((labels[1:] < labels[:-1]).any()):
            raise DataError("distilled images must stand class by class: labels may not fall")
        if not torch.isfinite(images).all():
            raise DataError("distilled images hold values that are not finite")
        logits = self.label_logits
        if logits is None:
            return
        rows = {len(images), self.training_count}
        if logits.ndim != 2 or len(logits) not in rows or logits.shape[1] != count:
            told = " or ".join(f"({n}, {count})" for n in sorted(rows))
            raise DataError(f"label logits must be {told}, got {tuple(logits.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def counts(self) -> list[int]:
        """Stored images per class."""
        return [int(n) for n in torch.bincount(self.labels, minlength=len(self.classes))]

    @property
    def storage(self) -> dict[str, int]:
        """Storage in bytes: of pixels, of labels (hard labels, and logits when there)."""
        labels = self.labels.numel() * self.labels.element_size()
        if self.label_logits is not None:
            labels += self.label_logits.numel() * self.label_logits.element_size()
        return {"pixels": self.images.numel() * self.images.element_size(), "labels": labels}

    def training_images(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decoded images, hard labels and label logits, row by row.

        Returns:
            `(images, labels, label_logits)`; with a decode factor f there are f * f times as
            many rows as stored images, tile-major, no longer class by class.
        """
        sources = self.decode.sources(len(self)).to(self.labels.device)
        logits = self.label_logits
        if logits is not None and len(logits) != len(sources):
            logits = logits[sources]
        return self.decode(self.images), self.labels[sources], logits

    @property
    def training_count(self) -> int:
        """Number of training images after decoding."""
        return len(self.decode.sources(len(self)))

    def pixels(self) -> Tensor:
        """Stored images (N, C, H, W) brought back to [0, 1]; what lies beyond is clipped."""
        raw = self.images.detach().float()
        back = raw if self.preprocessing is None else self.preprocessing.inverse(raw)
        return back.clamp(0.0, 1.0)

    def replace(self, **changes: Any) -> DistilledSet:
        """The same set with some attributes changed, checked again."""
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ on disk
    def save(self, folder: Path | str) -> Path:
        """Writes `distilled.safetensors` and `distilled.json` into `folder`; returns it.

        Each file is written beside and renamed; the description holds the hash of the
        tensors and is written last, so a set that was cut short is told when read.
        """
        from safetensors.torch import save

        target = Path(folder)
        content = save({k: v.detach().cpu().contiguous() for k, v in self.tensors().items()})
        description = {"sha256": hashlib.sha256(content).hexdigest(), **self.description()}
        write_atomic(target / TENSORS, content)
        write_atomic(target / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        return target

    @classmethod
    def load(cls, folder: Path | str) -> DistilledSet:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, or of a later version.
        """
        from safetensors.torch import load

        source = Path(folder)
        try:
            description = json.loads((source / DESCRIPTION).read_text())
            content = (source / TENSORS).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"no distilled set in {source}: {error.filename} is missing"
            ) from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{source / DESCRIPTION} is damaged: {error}") from None
        if hashlib.sha256(content).hexdigest() != description.get("sha256"):
            raise CheckpointError(f"{source / TENSORS} is damaged: its hash is not the stated one")
        return cls.restore(load(content), description)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name."""
        tensors = {"images": self.images, "labels": self.labels}
        if self.label_logits is not None:
            tensors["label_logits"] = self.label_logits
        if isinstance(self.preprocessing, ZCA):
            tensors |= {f"zca.{k}": v for k, v in self.preprocessing.tensors().items()}
        return tensors

    def description(self) -> dict[str, Any]:
        """Everything that is no tensor, as plain JSON values."""
        return {
            "version": _VERSION,
            "classes": list(self.classes),
            "lr": self.lr,
            "preprocessing": self._preprocessing_name(),
            "decode": dataclasses.asdict(self.decode),
            "relabel": None if self.relabel is None else dict(self.relabel),
            "provenance": dict(self.provenance),
            "storage": self.storage,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> DistilledSet:
        """The set that gave these `tensors()` and this `description()`.

        Raises:
            CheckpointError: of a later version.
        """
        if description.get("version", 0) > _VERSION:
            raise CheckpointError(
                "the distilled set was written by a later version of stillhouse "
                f"(format {description['version']}, known: {_VERSION})"
            )
        return cls(
            images=tensors["images"],
            labels=tensors["labels"],
            classes=tuple(description["classes"]),
            label_logits=tensors.get("label_logits"),
            lr=description["lr"],
            preprocessing=_preprocessing(description["preprocessing"], tensors),
            decode=Decode(**description["decode"]),
            relabel=description["relabel"],
            provenance=description["provenance"],
        )

    def _preprocessing_name(self) -> dict[str, Any] | None:
        match self.preprocessing:
            case None:
                return None
            case MeanStd(mean=mean, std=std):
                return {"kind": "mean_std", "mean": list(mean), "std": list(std)}
            case _:
                return {"kind": "zca"}

    # ------------------------------------------------------------------ other forms
    def tensor_dataset(self) -> TensorDataset:
        """Decoded images with their hard labels, and logits when there, for any data loader."""
        images, labels, logits = self.training_images()
        rows = (images, labels) if logits is None else (images, labels, logits)
        return TensorDataset(*(t.detach().clone() for t in rows))

    def export_image_folder(self, folder: Path | str) -> Path:
        """Writes one PNG per stored image under a folder per class; returns the root.

        The layout torchvision's ImageFolder and the Hugging Face loader read. Eight bits and
        the clip to [0, 1] lose a little: train on the tensors where exactness counts.
        """
        from PIL import Image

        root = Path(folder)
        digits = len(str(len(self.classes) - 1))
        pictures = _to_bytes(self.pixels())
        within = [0] * len(self.classes)
        for picture, label in zip(pictures, self.labels.tolist(), strict=True):
            name = _safe(self.classes[label])
            place = root / f"{label:0{digits}d}_{name}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
                place / f"{within[label]:04d}.png"
            )
            within[label] += 1
        return root

    def picture_array(self, *, per_class: int = 10, gap: int = 2, side: int = 48) -> np.ndarray:
        """A sheet of pictures, one row per class.

        Args:
            per_class: most images per row.
            gap: white pixels between pictures.
            side: small pictures are enlarged (by whole pixels) to about this side.

        Returns:
            (height, width, 3) uint8.
        """
        pictures = _to_bytes(self.pixels())
        zoom = max(1, side // max(pictures.shape[1:3]))
        pictures = pictures.repeat(zoom, axis=1).repeat(zoom, axis=2)
        if pictures.shape[-1] == 1:
            pictures = pictures.repeat(3, axis=-1)
        elif pictures.shape[-1] != 3:
            raise DataError(f"a picture needs 1 or 3 channels, these have {pictures.shape[-1]}")
        labels = self.labels.cpu().numpy()
        rows = [pictures[labels == c][:per_class] for c in range(len(self.classes))]
        rows = [row for row in rows if len(row)]
        high, wide = pictures.shape[1:3]
        columns = max(len(row) for row in rows)
        sheet = np.full(
            (len(rows) * (high + gap) - gap, columns * (wide + gap) - gap, 3), 255, np.uint8
        )
        for r, row in enumerate(rows):
            for c, picture in enumerate(row):
                top, left = r * (high + gap), c * (wide + gap)
                sheet[top : top + high, left : left + wide] = picture
        return sheet

    def picture_sheet(self, *, per_class: int = 10) -> bytes:
        """`picture_array` as a PNG file's content."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.picture_array(per_class=per_class)).save(buffer, format="PNG")
        return buffer.getvalue()


def _to_bytes(pixels: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] to (N, H, W, C) uint8."""
    scaled = (pixels * 255.0).round().to(torch.uint8)
    array: np.ndarray = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return array


def _safe(name: str) -> str:
    """A class name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name) or "class"


def _preprocessing(
    description: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> Preprocessing | None:
    if description is None:
        return None
    if description["kind"] == "zca":
        stored = {k.removeprefix("zca."): v for k, v in tensors.items() if k.startswith("zca.")}
        return ZCA.from_tensors(stored)
    return MeanStd(tuple(description["mean"]), tuple(description["std"]))
