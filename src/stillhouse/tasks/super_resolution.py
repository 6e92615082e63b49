"""Super-resolution: an image to the same image in more pixels."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch
from stillhouse.data.image_files import as_image, decode_image, png_targets
from stillhouse.errors import DataError, ModelError
from stillhouse.metrics.super_resolution import Fidelity, to_grey_levels
from stillhouse.models.bicubic import Bicubic
from stillhouse.net import Net, Output
from stillhouse.parts.degrade import imresize
from stillhouse.parts.tiling import any_size
from stillhouse.task import Metric, Task

_SIDE = 32


class RestorationNet(Net):
    """A network from image to image, for images of any size while it is judged or deployed.

    A module may say `multiple` (its input sides must be divisible by this; 1 when it does not
    say) and `scale` (output size / input size). In eval mode sides that do not fit go through
    adaptive cropping or padding, and a list of images is restored one by one; taps need a
    tensor of fitting sides.
    """

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__(module, **{"answer": "image", **settings})

    @property
    def multiple(self) -> int:
        """What the sides of the input must be divisible by."""
        return int(getattr(self.module, "multiple", 1))

    def forward(self, view: Any) -> Output:
        """`image`: (B, 3, sH, sW), or a list of (3, sH, sW) for a list of images."""
        if isinstance(view, list):
            place = self._device()
            return {"image": [self.restore(image[None].to(place))[0] for image in view]}
        if self.training or self.taps or not self._odd(view):
            return super().forward(view)
        return {"image": self.restore(view)}

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _odd(self, view: Any) -> bool:
        return isinstance(view, Tensor) and any(side % self.multiple for side in view.shape[-2:])

    def restore(self, image: Tensor, *, tile: int = 0, overlap: int = 32) -> Tensor:
        """The restored images of (B, 3, H, W), of any size.

        Args:
            image: in [0, 1].
            tile: longest side of a tile in input pixels; 0 runs the image whole.
            overlap: context of a tile in input pixels.

        Returns:
            (B, 3, sH, sW), not clamped.
        """

        def call(part: Tensor) -> Tensor:
            answer: Tensor = super(RestorationNet, self).forward(part)[self.answer]
            return answer

        scale = getattr(self.module, "scale", None)
        return any_size(
            call, image, multiple=self.multiple, scale=scale, tile=tile, overlap=overlap
        )


class SuperResolution(Task):
    """One high-resolution image per low-resolution one.

    Batches hold "x" and `target`: images (B, 3, h, w) and (B, 3, s h, s w) in [0, 1], or lists
    of whole images. `about` of the splits holds "scale" (s), "factor" (the enlargement that is
    asked for) and "enlarge" (the input is enlarged first, so s is 1).
    """

    name: ClassVar[str] = "super-resolution"
    main_metric: ClassVar[str] = "psnr_y"
    # Whole images of different size: read few at a time.
    evaluation_batch: ClassVar[int] = 8

    @property
    def scale(self) -> int:
        """Output size / input size of the network."""
        found = self.about.get("scale")
        if found is None:
            raise DataError(f"the data '{self.splits.edition}' does not say its scale")
        return int(found)

    @property
    def border(self) -> int:
        """Pixels that are cut off each border when judging: the enlargement, rounded up."""
        return math.ceil(float(self.about.get("factor", self.scale)))

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a network from image to image; no normalisation is added."""
        return RestorationNet(module, taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """L1, the mean over all elements."""
        return {"task": (out["image"].float() - batch["target"]).abs().mean()}

    def metrics(self) -> Mapping[str, Metric]:
        """Y-PSNR and RGB-PSNR in dB, SSIM; see `metrics.super_resolution`."""
        return {"fidelity": Fidelity(self.scale, border=self.border)}

    def judge(self, job: Any, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Figures on whole images, beside bicubic enlargement.

        Returns:
            The means over images of `psnr_y`, `ssim_y`, `psnr_rgb`, `psnr_y_8bit`, and
            `gain_y`: `psnr_y` above that of bicubic enlargement, in dB.
        """
        found: dict[str, float] = dict(job.evaluate(model, split))
        plain = RestorationNet(Bicubic(self.scale)).to(job.device)
        bicubic = job.evaluate(plain, split)["psnr_y"]
        return {**found, "gain_y": found["psnr_y"] - bicubic}

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse networks whose output has not the size of the target."""
        batch = self._sample()
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net, batch)

    def example_view(self, view: str = "x") -> Any:
        """One low-resolution patch, of 32 px a side at most."""
        return self._sample().view(view)[:1]

    def predictor(self, net: Net) -> Predictor:
        """Images in, images out."""
        settings = {
            "scale": self.scale,
            "factor": float(self.about.get("factor", self.scale)),
            "enlarge": bool(self.about.get("enlarge", False)),
        }
        return SuperResolver(net, settings)

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Strips of input, bicubic, restored and true crops, and figures image by image."""
        if artifact.predictor is None:
            return {}
        fidelity = Fidelity(self.scale, border=self.border)
        rows: list[list[Any]] = []
        strips: list[dict[str, str]] = []

        def show(out: Output, batch: Any) -> None:
            for image, made, true in zip(
                batch.view("x"), out["image"], batch["target"], strict=True
            ):
                figures = fidelity.add(made, true)
                enlarged = Bicubic(self.scale)(image)
                before = Fidelity(self.scale, border=self.border).add(enlarged, true)
                number = len(rows) + 1
                rows.append([number, before["psnr_y"], figures["psnr_y"], figures["ssim_y"]])
                if len(strips) < 3:
                    strips.append(
                        {
                            "title": f"Image {number}: input, bicubic, restored, true",
                            "png_base64": _strip(image, enlarged, made, true),
                        }
                    )

        job.walk(artifact.module, "test" if "test" in self.splits else "val", show)
        table = {
            "title": "Image by image",
            "columns": ["image", "bicubic Y-PSNR, dB", "Y-PSNR, dB", "SSIM"],
            "rows": rows,
        }
        return {"tables": [table], "images": strips}

    def _sample(self) -> Batch:
        """One pair, cut to `_SIDE`: whole images would make measuring size and speed slow."""
        pair = self.first_rows()
        side, scale = _SIDE, self.scale
        pair["x"] = pair["x"][..., :side, :side]
        pair["target"] = pair["target"][..., : side * scale, : side * scale]
        return pair

    def _check_net(self, role: str, net: Net, batch: Batch) -> None:
        view, target = batch.view("x"), batch["target"]
        name = type(net.module).__name__
        try:
            out = net.tried(view)
        except ModelError as error:
            raise ModelError(
                f"the {role} {name} cannot enlarge by {self.scale}: {error}"
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the {role} {name} cannot read images of shape {tuple(view.shape)}: {error}"
            ) from error
        image = out.get("image")
        if not isinstance(image, Tensor):
            raise ModelError(f"the {role} {name} gives {sorted(out)}, no image")
        if image.shape != target.shape:
            raise ModelError(
                f"the {role} {name} makes {tuple(image.shape)} of {tuple(view.shape)}, the data "
                f"'{self.splits.edition}' wants {tuple(target.shape)} (scale {self.scale}); give "
                "network and data the same scale"
            )


def _strip(low: Tensor, enlarged: Tensor, made: Tensor, true: Tensor, side: int = 160) -> str:
    """Four crops of the middle side by side as a PNG, base64."""
    repeat = max(1, true.shape[-1] // low.shape[-1])
    nearest = low.repeat_interleave(repeat, -1).repeat_interleave(repeat, -2)
    height, width = (min(side, length) for length in true.shape[-2:])
    top, left = (
        (length - size) // 2 for length, size in zip(true.shape[-2:], (height, width), strict=True)
    )
    crops = [
        to_grey_levels(image)[:, top : top + height, left : left + width].to(torch.uint8).cpu()
        for image in (nearest, enlarged, made, true)
    ]
    from PIL import Image

    pixels = torch.cat(crops, dim=2).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class SuperResolver(Predictor):
    """Enlarges images of any size: files, folders, arrays or tensors."""

    reads: ClassVar[str] = "images: files or folders, any size, greyscale or colour"
    writes: ClassVar[str] = "a folder of PNG files (or one PNG file for one input)"
    options: ClassVar[Mapping[str, str]] = {
        "tile": "longest side of a tile in input pixels, 0 for whole images (default 512)",
        "overlap": "context around a tile in input pixels (default 32)",
        "factor": "enlargement, any number >= 1: for networks whose input is enlarged first",
        "size": "output size HEIGHTxWIDTH, for the same networks",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        if not isinstance(module, RestorationNet):
            module = RestorationNet(module.module if isinstance(module, Net) else module)
        super().__init__(module, settings)

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Tensor]:
        """Restored images.

        Args:
            inputs: tensors (3, H, W) or (1, H, W), float in [0, 1] or uint8; arrays (H, W) or
                (H, W, 3) uint8; PIL images.
            options: `tile`, `overlap`, `factor`, `size`.

        Returns:
            Per input a float32 tensor (3, H', W') in [0, 1], on the model's device.

        Raises:
            DataError: an input that is no image, or an option that does not fit.
        """
        tile, overlap = _whole(options, "tile", 512), _whole(options, "overlap", 32)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        assert isinstance(self.module, RestorationNet)
        answers = []
        for value in inputs:
            image = self._enlarged(as_image(value), options)
            with torch.inference_mode():
                made = self.module.restore(
                    image[None].to(device, non_blocking=True), tile=tile, overlap=overlap
                )
            answers.append(made[0].float().clamp(0.0, 1.0))
        return answers

    def _enlarged(self, image: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The input as the network takes it: enlarged first where it keeps the size."""
        asked = [name for name in ("factor", "size") if name in options]
        if not self.settings.get("enlarge"):
            if asked:
                raise DataError(
                    f"this network enlarges by {self.settings.get('scale')} and nothing else; "
                    f"'{asked[0]}' is for networks whose input is enlarged first (IMDN_AS)"
                )
            return image
        if len(asked) == 2:
            raise DataError("give either 'factor' or 'size', not both")
        if "size" in options:
            size = _size(str(options["size"]))
        else:
            factor = _number(options.get("factor", self.settings.get("factor", 1.0)))
            size = (round(image.shape[1] * factor), round(image.shape[2] * factor))
        # Rounded to 8 bits as the pairs it was trained on.
        levels = (image * 255.0).round().to(torch.uint8)
        return imresize(levels, size=size).float().div_(255.0)

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Enlarge files and folders, and write a PNG for each.

        Raises:
            DataError: nothing to read, no output, two inputs with one output name, or an
                image that cannot be read (those before it are written).
        """
        from stillhouse.data.cached import write_whole

        if output is None:
            raise DataError("say where the images go: -o FOLDER (or a .png for one image)")
        jobs = png_targets(inputs, Path(output))
        rows = []
        for source, target in jobs:
            pixels = decode_image(source)
            made = self.predict([pixels], **dict(options))[0]
            levels = to_grey_levels(made).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            write_whole(target, partial(_save_png, levels))
            rows.append(
                {
                    "input": str(source),
                    "output": str(target),
                    "size": f"{pixels.shape[0]}x{pixels.shape[1]}",
                    "restored": f"{levels.shape[0]}x{levels.shape[1]}",
                }
            )
        return {"inputs": len(rows), "output": str(output), "rows": rows}


def _save_png(levels: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(levels).save(path, format="PNG")


def _whole(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    try:
        found = int(value)
    except (TypeError, ValueError):
        raise DataError(f"option '{name}' must be a whole number, not {value!r}") from None
    if found < 0:
        raise DataError(f"option '{name}' must not be negative, got {found}")
    return found


def _number(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise DataError(f"option 'factor' must be a number, not {value!r}") from None
    if not (1.0 <= found <= 64.0):
        raise DataError(f"option 'factor' must lie between 1 and 64, got {found:g}")
    return found


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) > 0 and int(width) > 0):
        raise DataError(f"option 'size' is written HEIGHTxWIDTH, not '{text}'")
    return int(height), int(width)
