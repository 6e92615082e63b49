"""Reopen an artifact that a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.artifact import (
    Artifact,
    Predictor,
    altered,
    read_description,
    read_file,
    read_records,
    read_tensors,
    restore_weights,
    trusted,
)
from stillhouse.errors import CheckpointError
from stillhouse.models.loading import load_model
from stillhouse.net import Net


def open_artifact(folder: Path | str, module: nn.Module | None = None) -> Artifact:
    """Reopen an artifact.

    Args:
        folder: of the artifact, or of the run that made it.
        module: the model to load the weights into; needed when the model was handed to the
            run as an object, for then only its weights were kept.

    Raises:
        CheckpointError: no artifact, damaged, or the weights do not fit.
    """
    folder = Path(folder)
    if not (folder / "artifact.json").exists() and (folder / "artifact").is_dir():
        folder = folder / "artifact"
    about = read_description(folder)
    artifact = Artifact(about["kind"], model=about.get("model", {}), meta=about.get("meta", {}))
    if (folder / "tensors.safetensors").exists():
        held = read_tensors(folder / "tensors.safetensors", about)
        # Copies of their own: the file's bytes may lie at odd addresses, where kernels may add
        # in another order.
        artifact.tensors = {name: value.clone() for name, value in held.items()}
    if (folder / "labels.jsonl").exists():
        artifact.records = read_records(folder / "labels.jsonl", about)
    if (folder / "sheet.png").exists():
        artifact.sheet = read_file(folder / "sheet.png", about)
    if "predictor" in about:
        artifact.predictor = _predictor(folder, about, module)
    for name in about.get("attachments", ()):
        artifact.attachments[name] = open_artifact(folder / "attachments" / name)
    return artifact


def _predictor(folder: Path, about: dict[str, Any], module: nn.Module | None) -> Predictor:
    model = about.get("model") or {}
    if module is None:
        if not model.get("id"):
            raise CheckpointError(
                f"{folder} holds the weights of a model that was handed in as an object; "
                "give it: stillhouse.load(folder, module=your_model)"
            )
        name = str(model["id"])
        if name.startswith("hf:") and (folder / "config.json").exists():
            name = f"hf:{folder}"
        module = load_model(
            name,
            options=model.get("options", {}),
            weights=None,
            about=about.get("meta", {}).get("about", {}),
        )
    module = altered(module, model)
    restore_weights(module, folder)
    kind = predictor_class(about["predictor"]["class"])
    return kind.restore(as_net(module, about.get("net") or {}), about["predictor"]["settings"])


def as_net(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """The module as the Net it was."""
    return Net(module, **settings) if settings and not isinstance(module, Net) else module


def predictor_class(name: str) -> type[Predictor]:
    """The class of a predictor, from this package or one that adds methods to it.

    An artifact names a class; only packages that are known to the catalogue are accepted.

    Raises:
        CheckpointError: another package, or no predictor.
    """
    found = trusted(name, "the artifact's predictor")
    if not (isinstance(found, type) and issubclass(found, Predictor)):
        raise CheckpointError(f"'{name}' is no predictor")
    return found
