"""A class-conditional UNet2DModel of diffusers, with the noise schedule of its scheduler.

Taken are networks that predict noise (prediction type "epsilon") in pixels, by class labels.
Text-to-image pipelines and latent ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import MissingExtra, ModelError
from stillhouse.parts.noise import NoiseSchedule

_TAKEN = "class-conditional UNet2DModel networks that predict noise in pixels are taken"
_LATENT = ("vae", "vqvae", "text_encoder", "tokenizer")


class DiffusersUNet(nn.Module):
    """A UNet2DModel called by image, time and class, as the other noise predictors are.

    Args:
        config: of the UNet2DModel, as its config.json has it. What it leaves out of
            `sample_size`, `in_channels`, `out_channels` and `num_class_embeds` comes from the
            data; one embedding more than there are classes stands for no class.
        scheduler: as scheduler_config.json has it; none: the default of DDPMScheduler, betas
            from 1e-4 to 0.02 in 1000 equal steps.
        folder: of a pipeline (unet/, scheduler/), or of a UNet2DModel with its
            scheduler_config.json beside it or in ../scheduler. Its weights are loaded.
        classes: number K of classes of the data.
        channels: image channels of the data.
        size: height and width of the data, or one number.
        label_dropout: share of rows that are shown without their class in training; nothing
            where there is no embedding for that.

    Attributes:
        null: the number that stands for no class; None where the network has none.
        schedule: of the noise.
        shape: (C, H, W) of an image.

    Raises:
        ModelError: another kind of network, pipeline or prediction; or classes that do not fit.
        MissingExtra: diffusers is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        folder: str | None = None,
        classes: int | None = None,
        channels: int = 3,
        size: int | Sequence[int] = 32,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        package = _diffusers()
        if folder is not None:
            if config is not None:
                raise ModelError("give either the config or the folder of a UNet2DModel, not both")
            unet, found = _opened(package, Path(folder))
            scheduler = scheduler or found
        else:
            given = {k: v for k, v in (config or {}).items() if not k.startswith("_")}
            given.setdefault("sample_size", size if isinstance(size, int) else list(size))
            given.setdefault("in_channels", channels)
            given.setdefault("out_channels", given["in_channels"])
            if classes is not None:
                given.setdefault("num_class_embeds", classes + 1)
            try:
                unet = package.UNet2DModel(**given)
            except (TypeError, ValueError) as error:
                raise ModelError(f"no UNet2DModel can be built of this config: {error}") from error
        self._take(unet, scheduler, classes, label_dropout)

    @classmethod
    def wrapping(
        cls,
        unet: nn.Module,
        scheduler: Any = None,
        *,
        classes: int | None = None,
        label_dropout: float = 0.1,
    ) -> DiffusersUNet:
        """Around a UNet2DModel that is at hand.

        Args:
            unet: of diffusers.
            scheduler: a scheduler of diffusers, its config, or None for DDPMScheduler's default.
            classes: of the data.
            label_dropout: see the class.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        if scheduler is not None and not isinstance(scheduler, Mapping):
            scheduler = dict(scheduler.config)
        made._take(unet, scheduler, classes, label_dropout)
        return made

    def _take(
        self,
        unet: Any,
        scheduler: Mapping[str, Any] | None,
        classes: int | None,
        label_dropout: float,
    ) -> None:
        config = dict(unet.config)
        if type(unet).__name__ != "UNet2DModel":
            raise ModelError(f"a {type(unet).__name__} is not taken: {_TAKEN}")
        embeddings = getattr(unet, "class_embedding", None)
        if not isinstance(embeddings, nn.Embedding):
            raise ModelError(
                "this UNet2DModel is not asked by class labels (num_class_embeds is "
                f"{config.get('num_class_embeds')}, class_embed_type "
                f"{config.get('class_embed_type')}): {_TAKEN}"
            )
        if config["out_channels"] != config["in_channels"]:
            raise ModelError(
                f"this UNet2DModel gives {config['out_channels']} channels for "
                f"{config['in_channels']}: a learned variance is not taken"
            )
        known = embeddings.num_embeddings
        self.classes = known if classes is None else classes
        if known not in (self.classes, self.classes + 1):
            raise ModelError(
                f"this UNet2DModel has {known} class embeddings, the data {self.classes} classes; "
                f"{self.classes} are needed, or {self.classes + 1} with one for no class"
            )
        self.null = self.classes if known > self.classes else None
        self.label_dropout = label_dropout if self.null is not None else 0.0
        side = config["sample_size"]
        if side is None:
            raise ModelError("this UNet2DModel does not say its sample_size")
        height, width = (side, side) if isinstance(side, int) else side
        self.shape = (int(config["in_channels"]), int(height), int(width))
        self.unet = unet
        self.scheduler = _plain(scheduler or dict(_diffusers().DDPMScheduler().config))
        self.schedule = schedule_of(self.scheduler)

    def rebuilt(self) -> dict[str, Any]:
        """How a recipe or an artifact builds it again: all that stands in its configs."""
        config = _plain(dict(self.unet.config))
        options = {"config": config, "scheduler": self.scheduler, "classes": self.classes}
        if self.label_dropout != 0.1:
            options["label_dropout"] = self.label_dropout
        return {"id": "stillhouse:diffusers-unet", "options": options}

    def save_folder(self, folder: Path) -> None:
        """What `DiffusersUNet(folder=...)` and diffusers itself open: unet/ and scheduler/."""
        self.unet.save_pretrained(folder / "unet")
        place = folder / "scheduler" / "scheduler_config.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        told = {"_class_name": "DDPMScheduler", **self.scheduler}
        place.write_text(json.dumps(told, indent=2), encoding="utf-8")

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The noise.

        Args:
            noisy: (B, C, H, W) in the network's range, [-1, 1] without noise.
            time: (B,) in [0, T).
            condition: (B,) classes.

        Returns:
            (B, C, H, W).
        """
        out: Tensor = self.unet(noisy, time, class_labels=condition, return_dict=False)[0]
        return out


def schedule_of(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule that a scheduler's config describes.

    Raises:
        ModelError: it does not predict noise, or has no betas.
    """
    kind = scheduler.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ModelError(
            f"the scheduler's prediction_type is '{kind}'; {_TAKEN} ('epsilon'), since the losses "
            "read a network's answer as noise"
        )
    made = _diffusers().DDPMScheduler.from_config(
        {
            k: v
            for k, v in scheduler.items()
            if k in {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
                     "trained_betas", "rescale_betas_zero_snr"}
        }
    )  # fmt: skip
    # In float64 from its betas: its own product is one of float32.
    return NoiseSchedule.of_betas(made.betas)


def _opened(package: Any, folder: Path) -> tuple[nn.Module, dict[str, Any] | None]:
    """The UNet2DModel and the scheduler's config of a folder.

    Raises:
        ModelError: no such folder, or what it holds is not taken.
    """
    index = _json(folder / "model_index.json")
    inside = [name for name in _LATENT if name in index]
    if inside:
        raise ModelError(
            f"{folder} is a {index.get('_class_name', 'pipeline')} with '{inside[0]}', which works "
            f"in latents or by texts: {_TAKEN}"
        )
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _json(place / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise ModelError(
            f"{place} holds a {config.get('_class_name', 'folder without config.json')}: {_TAKEN}"
        )
    beside = [place, folder / "scheduler", place.parent / "scheduler"]
    found = next(
        (_json(p / "scheduler_config.json") for p in beside if _json(p / "scheduler_config.json")),
        None,
    )
    if found is None:
        raise ModelError(
            f"{folder} has no scheduler_config.json (looked in {', '.join(map(str, beside))}), "
            "which says the noise schedule that the network was trained with"
        )
    try:
        unet = package.UNet2DModel.from_pretrained(str(place), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the UNet2DModel in {place} cannot be loaded: {error}") from error
    return unet.train(), found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON keeps it, without what diffusers notes for itself."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(config), default=list))
    return {k: v for k, v in kept.items() if not k.startswith("_")}


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "generative", "for a UNet2DModel") from error
    return diffusers


def is_unet2d(module: nn.Module) -> bool:
    """Whether a module is a UNet2DModel of diffusers, without importing that."""
    return any(
        kind.__name__ == "UNet2DModel" and kind.__module__.startswith("diffusers.")
        for kind in type(module).__mro__
    )
