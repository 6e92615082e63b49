"""Image generation by class: a noise predictor, and what a classifier makes of its images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stillhouse._version import __version__
from stillhouse.artifact import Predictor
from stillhouse.batch import Batch, Shuffled
from stillhouse.clock import Clock, Views, generator
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError, ModelError, RecipeError, nearest
from stillhouse.losses.score import guided, noise_prediction
from stillhouse.metrics.generation import forgotten, frechet_distance, recognised
from stillhouse.models.diffusers_unet import DiffusersUNet, is_unet2d
from stillhouse.models.small_cnn import SmallCNN
from stillhouse.net import Net, Output, in_eval_mode
from stillhouse.objective import Objective
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.noise import NoiseSchedule, Predict, Sampler
from stillhouse.task import Metric, Task
from stillhouse.teacher import Knowledge

# Of the classifier that judges: its blocks, epochs and most steps, batch and learning rate.
_WIDTHS, _EPOCHS, _MOST, _BATCH, _RATE = (32, 64), 25, 1500, 64, 3e-3

# What only a classifier that has seen the forgotten class can say.
UNTOLD = frozenset({"ua", "forgotten_probability", "leak"})


class NoiseNet(Net):
    """A network that predicts noise, asked by noisy images, times and classes.

    A module may say `schedule` (a NoiseSchedule; else the linear one of 1000 times), `classes`,
    `null` (the number that stands for no class) and `shape` (C, H, W).

    Attributes:
        sampler: how images are drawn from it.
        guidance: of that drawing, see `noise`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sampler: Sampler | None = None,
        guidance: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(module, **{"answer": "noise", **settings})
        self.sampler = sampler or Sampler()
        self.guidance = guidance

    def forward(self, view: Any) -> Output:
        """`noise`: (B, C, H, W) for {"noisy", "time", "condition"}.

        A bare tensor is asked about as without noise and of no class (or the first): what is
        measured of speed needs no more.
        """
        if isinstance(view, Tensor):
            zero = torch.zeros(len(view), device=view.device)
            condition = torch.full_like(zero, self.null or 0, dtype=torch.long)
            view = {"noisy": view, "time": zero, "condition": condition}
        if self.takes is not None:
            view = {**view, "noisy": view["noisy"].to(self.takes)}
        return super().forward(view)

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the noise that it knows."""
        found = getattr(self.module, "schedule", None)
        return found if isinstance(found, NoiseSchedule) else NoiseSchedule.linear()

    @property
    def null(self) -> int | None:
        """The number that stands for no class."""
        found = getattr(self.module, "null", None)
        return None if found is None else int(found)

    def noise(
        self, noisy: Tensor, times: Tensor, condition: Tensor, guidance: float = 0.0
    ) -> Tensor:
        """The predicted noise (B, C, H, W).

        Args:
            noisy: (B, C, H, W).
            times: (B,); handed on as real numbers.
            condition: (B,) classes.
            guidance: 0 asks by the class alone, see `losses.score.guided`.

        Raises:
            ModelError: guidance of a network that knows no "no class".
        """
        view = {"noisy": noisy, "time": times.float(), "condition": condition}
        asked: Tensor = self(view)[self.answer]
        if guidance == 0:
            return asked
        if self.null is None:
            raise ModelError(
                f"guidance {guidance:g} needs a network that was also trained without classes; "
                f"this {type(self.module).__name__} has no embedding for that"
            )
        none = torch.full_like(condition, self.null)
        return guided(asked, self(view | {"condition": none})[self.answer], guidance)

    def predict(self, condition: Tensor, guidance: float = 0.0) -> Predict:
        """`noise` for given classes, as samplers ask it."""
        return lambda noisy, times: self.noise(noisy, times, condition, guidance)

    def x0(self, noisy: Tensor, times: Tensor, condition: Tensor, guidance: float = 0.0) -> Tensor:
        """The clean images that it sees in noisy ones."""
        found = self.noise(noisy, times, condition, guidance)
        return self.schedule.x0_of(noisy, found, times)


def to_range(images: Tensor) -> Tensor:
    """Images in [0, 1] as networks of this task have them, in [-1, 1]."""
    return images * 2.0 - 1.0


def to_images(x0: Tensor) -> Tensor:
    """What a network made, as images in [0, 1]."""
    return ((x0 + 1.0) / 2.0).clamp(0.0, 1.0)


@torch.no_grad()
def draw_images(
    net: NoiseNet,
    condition: Tensor,
    shape: Sequence[int],
    rng: Generator,
    *,
    batch: int = 256,
) -> Tensor:
    """Images of the given classes, by the net's own sampler, in eval mode.

    Args:
        net: on any device.
        condition: (n,) classes.
        shape: (C, H, W).
        rng: of the noise that they begin with.
        batch: images at once.

    Returns:
        (n, C, H, W) in [0, 1], on the CPU.
    """
    place = next(net.parameters())
    noise = torch.randn(len(condition), *shape, generator=rng)
    parts = zip(torch.split(noise, batch), torch.split(condition, batch), strict=True)
    made = []
    with in_eval_mode(net):
        for part, asked in parts:
            start = part.to(place.device, place.dtype)
            predict = net.predict(asked.to(place.device), net.guidance)
            made.append(to_images(net.sampler(predict, start, net.schedule)).float().cpu())
    return torch.cat(made)


class Denoising(Objective):
    """The training of a noise predictor: squared error summed over an image (Ho et al. 2020).

    Args:
        student: trained in place. Its module's `label_dropout` is the share of rows that it is
            shown without their class, where it has a number for that.
    """

    def __init__(self, student: NoiseNet) -> None:
        super().__init__(student)
        self.dropout = float(getattr(student.module, "label_dropout", 0.0))

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `noise`."""
        net: NoiseNet = self.student  # type: ignore[assignment]
        x0 = to_range(batch.view("x")).to(next(net.parameters()).dtype)
        schedule, labels = net.schedule, batch["target"]
        times = clock.randint("times", batch, 0, len(schedule))
        noise = clock.randn("noise", batch, *x0.shape[1:]).to(x0)
        if self.dropout > 0 and net.null is not None:
            hidden = clock.rand("label dropout", batch) < self.dropout
            labels = torch.where(hidden, torch.full_like(labels, net.null), labels)
        found = net.noise(schedule.add_noise(x0, noise, times), times, labels)
        return {"noise": noise_prediction(found, noise)}


class _Recognition(Objective):
    """The training of the classifier that judges."""

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy on real images."""
        x = batch.view("x").to(next(self.student.parameters()).dtype)
        return {"task": F.cross_entropy(self.student(x)["logits"], batch["target"])}


# Of each run, by the path of the job: a report asks once more for what the judge has used.
_JUDGES: WeakKeyDictionary[Any, dict[tuple[str, ...], Net]] = WeakKeyDictionary()


def independent_classifier(job: Any) -> Net:
    """A classifier of real images of every class, made without any generator; a shared stage.

    Args:
        job: its path says whose: one that a method asks while it runs is another than the one
            that judges.

    Returns:
        A Net of "logits" (n, K), with a tap "features" (n, D) before its last layer.
    """
    known = _JUDGES.setdefault(job.family, {})
    if job.path not in known:
        known[job.path] = _trained_classifier(job)
    return known[job.path]


def _trained_classifier(job: Any) -> Net:
    task, split = job.task, job.teacher_split
    channels = int(task.shape[0])
    module = job.build(lambda: SmallCNN(len(task.classes), channels, _WIDTHS), "classifier")
    net = Net(module)
    share = {
        "path": job.path,
        "data": job.splits[split].fingerprint,
        "classes": task.classes,
        "settings": [_WIDTHS, _EPOCHS, _MOST, _BATCH, _RATE],
        "seed": job.seed,
        "version": __version__,
    }
    order = Shuffled(job.splits[split], _BATCH, collate=task.collate)
    job.fit(
        "classifier",
        _Recognition(net),
        order,
        steps=min(_EPOCHS * len(order), _MOST),
        optim=partial(torch.optim.Adam, lr=_RATE),
        schedule=lambda clock: 1.0 - clock.progress,
        share=share,
    )
    net.add_tap("features", "classifier:input")
    net.requires_grad_(False)
    return net


def seen_classes(job: Any) -> set[int]:
    """The classes of which the classifier that judges sees images; all where no source tells."""
    labels = labels_of(job.splits[job.teacher_split])
    return set(range(len(job.task.classes)) if labels is None else labels.tolist())


class Judged:
    """What an independent classifier makes of images.

    Attributes:
        probabilities: (n, K).
        features: (n, D), the input of its last layer.
    """

    def __init__(self, net: Net, images: Tensor) -> None:
        place = next(net.parameters())
        net.eval()
        found, features = [], []
        with torch.inference_mode():
            for part in torch.split(images, 512):
                out = net(part.to(place.device, place.dtype))
                found.append(out["logits"].float().softmax(1).cpu())
                features.append(out["taps"]["features"].float().cpu())
        self.probabilities, self.features = torch.cat(found), torch.cat(features)


class ImageGeneration(Task):
    """Images by class.

    Batches hold "x" (B, C, H, W) in [0, 1] and `target` (B,). `about` holds "classes" and "input"
    (C, H, W). Models are noise predictors, see `NoiseNet`.
    """

    name: ClassVar[str] = "image-generation"
    main_metric: ClassVar[str] = "accuracy"
    samples: ClassVar[int] = 100  # images of each class that are judged

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        found = self.about.get("classes") or ()
        return [str(name) for name in (range(found) if isinstance(found, int) else found)]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(int(n) for n in self.about.get("input", ()))

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> NoiseNet:
        """Wrap a noise predictor; a bare UNet2DModel of diffusers is wrapped first."""
        if is_unet2d(module):
            scheduler = getattr(module, "scheduler", None)
            classes = len(self.classes) or None
            module = DiffusersUNet.wrapping(module, scheduler, classes=classes)
        return NoiseNet(module, taps=taps)

    def objective(self, net: Net) -> Objective:
        """Denoising of the training images."""
        if not isinstance(net, NoiseNet):
            raise ModelError(f"a {type(net).__name__} is no noise predictor")
        return Denoising(net)

    def loss(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The squared error of predicted noise; the batch says what was added as "noise"."""
        return {"noise": noise_prediction(out["noise"], batch["noise"])}

    def metrics(self) -> Mapping[str, Metric]:
        """There are none by row.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "images that are drawn have no figure by row, so no state can be chosen by validation: "
            "leave out budget.select and validate_every"
        )

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse data that are no images of classes, and models of others."""
        if len(self.shape) != 3 or len(self.classes) < 2:
            raise RecipeError(
                f"image generation needs images (C, H, W) of classes; '{self.splits.edition}' has "
                f"input {self.about.get('input')} and {len(self.classes)} classes"
            )
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net)

    def _check_net(self, role: str, net: Net) -> None:
        name = f"the {role} {type(net.module).__name__}"
        shape = getattr(net.module, "shape", None)
        if shape is not None and tuple(shape) != self.shape:
            raise ModelError(
                f"{name} draws images of shape {tuple(shape)}, the data '{self.splits.edition}' "
                f"has {self.shape}: set data.options image_size, canvas or channels, or another "
                "model"
            )
        classes = getattr(net.module, "classes", None)
        if classes is not None and int(classes) != len(self.classes):
            raise ModelError(
                f"{name} knows {classes} classes, the data '{self.splits.edition}' has "
                f"{len(self.classes)}"
            )
        place = next(net.parameters(), torch.zeros(1))
        view = {k: v.to(place.device) for k, v in self.example_view().items()}
        view["noisy"] = view["noisy"].to(place.dtype)
        try:
            out = net.tried(view)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(
                f"{name} cannot be called as a noise predictor (noisy {self.shape}, time, "
                f"condition): {error}"
            ) from error
        if "noise" not in out or tuple(out["noise"].shape[1:]) != self.shape:
            found = {k: tuple(v.shape) for k, v in out.items() if isinstance(v, Tensor)}
            raise ModelError(f"{name} gives {found}, where noise of shape {self.shape} is needed")

    def example_view(self, view: str = "x") -> Any:
        """One noisy image with its time and class."""
        return {
            "noisy": torch.zeros(1, *self.shape),
            "time": torch.zeros(1),
            "condition": torch.zeros(1, dtype=torch.long),
        }

    def predictor(self, net: Net) -> Predictor:
        """Draws images by class names."""
        sampler = net.sampler if isinstance(net, NoiseNet) else Sampler()
        return ImagePredictor(
            net,
            {
                "classes": self.classes,
                "input": list(self.shape),
                "sampler": asdict(sampler),
                "guidance": float(getattr(net, "guidance", 0.0)),
            },
        )

    # ---- judging -----------------------------------------------------------------------

    def judge(self, job: Any, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Figures over all classes; see `audited`."""
        return self.audited(job, model, split)

    def audited(
        self,
        job: Any,
        model: nn.Module,
        split: str = "test",
        *,
        forget: int | None = None,
        override: int | None = None,
    ) -> dict[str, float]:
        """What an independent classifier says of images that a model draws, and what they cost.

        Every model gets the same noise at one seed.

        Args:
            job: stages of it train the classifier once.
            model: a NoiseNet.
            split: real images that were held out, for the distances.
            forget: a class that should be gone; without it all classes count.
            override: the class that took its place; "override_share" is the share of its images
                that are taken for that one.

        Returns:
            "accuracy" (of the classes that stay), "frechet" (of their images and held-out ones,
            in the classifier's features), "classifier_accuracy" (on held-out images), "nfe",
            "seconds_per_1000"; with `forget` also what `metrics.generation.forgotten` gives and
            "forgotten_frechet": the distance of the forgotten class's images from held-out ones
            of the others, which is large for noise. Where the data has no image of that class,
            the classifier can take nothing for it, and `UNTOLD` is left out.
        """
        if not isinstance(model, NoiseNet):
            raise ModelError(f"a {type(model).__name__} draws no images")
        classifier = independent_classifier(job.child("audit"))
        condition = torch.arange(len(self.classes)).repeat_interleave(self.samples)
        began = time.perf_counter()
        images = draw_images(model, condition, self.shape, job.rng("drawn"))
        taken = time.perf_counter() - began
        made = Judged(classifier, images)
        real, target = self._real(job, split)
        held = Judged(classifier, real)
        right = (held.probabilities.argmax(1) == target).float().mean()
        if forget is None:
            figures = recognised(made.probabilities, condition)
            ours, theirs = made.features, held.features
        else:
            figures = forgotten(made.probabilities, condition, forget)
            if forget not in seen_classes(job):
                figures = {k: v for k, v in figures.items() if k not in UNTOLD}
            ours, theirs = made.features[condition != forget], held.features[target != forget]
            gone = made.features[condition == forget]
            figures["forgotten_frechet"] = frechet_distance(gone, theirs)
            if override is not None:
                own = made.probabilities[condition == forget].argmax(1)
                figures["override_share"] = float((own == override).float().mean())
        return {
            **figures,
            "frechet": frechet_distance(ours, theirs),
            "classifier_accuracy": float(right),
            "nfe": float(model.sampler.calls * (2 if model.guidance else 1)),
            "seconds_per_1000": 1000.0 * taken / len(images),
        }

    def _real(self, job: Any, split: str) -> tuple[Tensor, Tensor]:
        order = Shuffled(job.splits[split], 512, shuffle=False, augment=False, collate=self.collate)
        images, targets = [], []
        for rows in order.epoch(0, lambda: generator(0)):
            batch = order.read(rows, Views(0))
            images.append(batch.view("x").cpu())
            targets.append(batch["target"].cpu())
        return torch.cat(images), torch.cat(targets)

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Sheets of pictures, one row for each class: the teacher's, and the model's."""
        if artifact.predictor is None or not isinstance(artifact.module, NoiseNet):
            return {}
        import base64

        own = artifact.module
        sheets = [(f"{_how(own.sampler)} by what came out", own)]
        if isinstance(teacher, NoiseNet):
            sheets.insert(0, (f"Before: the teacher, {_how(teacher.sampler)}", teacher))
            sheets[1] = (f"After: {_how(own.sampler)} by what came out", own)
        images = []
        for title, net in sheets:
            png = picture_sheet(net, self.classes, self.shape, job.rng("sheet"))
            images.append({"title": title, "png_base64": base64.b64encode(png).decode()})
        return {"images": images}


def _how(sampler: Sampler) -> str:
    return "one call" if sampler.calls == 1 else f"{sampler.calls} steps"


def picture_sheet(
    net: NoiseNet, classes: Sequence[str], shape: Sequence[int], rng: Generator, *, each: int = 10
) -> bytes:
    """A PNG of drawn images, one row for each class, from top to bottom in their order."""
    condition = torch.arange(len(classes)).repeat_interleave(each)
    images = draw_images(net, condition, shape, rng)
    return DistilledSet(images, condition, tuple(classes)).picture_sheet(per_class=each)


class ImagePredictor(Predictor):
    """Draws images for class names.

    `infer` reads text files with a class name on each line and writes a PNG for each line.
    """

    reads: ClassVar[str] = "text"
    writes: ClassVar[str] = "images"
    options: ClassVar[Mapping[str, str]] = {
        "seed": "of the noise that images begin with (0)",
        "each": "images drawn for every line (1)",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        settings = dict(settings or {})
        sampler = Sampler(**settings.get("sampler", {}))
        guidance = float(settings.get("guidance", 0.0))
        if not isinstance(module, NoiseNet):
            inner = module.module if isinstance(module, Net) else module
            module = NoiseNet(inner)
        module.sampler, module.guidance = sampler, guidance
        super().__init__(module, settings)

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """Images (C, H, W) in [0, 1] of the classes named (or numbered) in `inputs`.

        Raises:
            DataError: an unknown class; the nearest is named.
        """
        seed, each = (_whole(options, k, d) for k, d in (("seed", 0), ("each", 1)))
        asked = [self._class(given) for given in inputs for _ in range(each)]
        if not asked:
            return []
        net: NoiseNet = self.module  # type: ignore[assignment]
        rng = generator("infer", seed)
        return list(draw_images(net, torch.tensor(asked), self.settings["input"], rng))

    def _class(self, given: Any) -> int:
        names = list(self.settings["classes"])
        if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(names):
            return given
        if str(given) not in names:
            raise DataError(f"there is no class '{given}'{nearest(str(given), names)}")
        return names.index(str(given))

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Draw an image for every line of text files.

        Raises:
            DataError: no output folder, an unreadable file, or an unknown class.
        """
        from PIL import Image

        if output is None:
            raise DataError("say where the images go: -o FOLDER")
        lines = [line for path in inputs for line in _lines(Path(path))]
        made = self.predict(lines, **dict(options))
        each = len(made) // max(1, len(lines))
        Path(output).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, image in enumerate(made):
            name = "".join(c if c.isalnum() else "-" for c in lines[number // each])
            target = Path(output) / f"{number:05d}-{name}.png"
            levels = (image * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(target)
            rows.append({"class": lines[number // each], "output": str(target)})
        return {"inputs": len(lines), "images": len(made), "output": str(output), "rows": rows}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as text with a class on each line: {error}"
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _whole(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"option '{name}' must be a whole number >= 0, not {value!r}")
    return value
