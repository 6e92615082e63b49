"""An image classifier made of a CLIP model and words: zero-shot teacher, or student to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import MissingExtra, ModelError, nearest
from stillhouse.models.loading import find_folder, find_weights, load_model, read_weights
from stillhouse.net import in_eval_mode
from stillhouse.parts.heads import TextHead
from stillhouse.parts.text_classifier import Normalise, cache_logits, class_vectors, prompts_of

# What OpenAI's CLIP models were trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEADS = ("zero-shot", "linear")
_BLOCK = 256  # texts encoded at once


class CLIPClassifier(nn.Module):
    """The image tower of a two-tower model, and class vectors of its own text tower.

    "zero-shot": logits are 100 times the cosine between an image and the vectors of the
    classes' prompts (Radford et al. 2021); a few-shot cache (Tip-Adapter) may add to them.
    "linear": a linear layer on the image features as they are, which begins as the plain mean of
    the prompts' embeddings with bias 0 (language-aware initialisation of DHO's students).
    The text tower is left out once the vectors are made.

    Args:
        class_names: names of the classes, in the order of the logits; the data's.
        clip: hub id or folder of a Hugging Face model with `get_image_features` and
            `get_text_features` and its tokenizer.
        templates: prompts with {} for the class's name.
        head: "zero-shot" or "linear".
        normalise: of the class vectors of "zero-shot", see `class_vectors`.
        pretrained: load the published weights; False draws them anew.
        size: height and width images are brought to (bilinear); the model's own when None.
        cache: safetensors file with "keys" (M, width) and "values" (M, classes).
        cache_alpha: weight of the cache.
        cache_beta: its sharpness.

    Attributes:
        input_mean: per channel, as the model wants its images.
        input_std: likewise.

    Raises:
        ModelError: no such model or file, or one that has not two towers.
        MissingExtra: transformers is not installed.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(
        self,
        class_names: Sequence[str],
        clip: str = "openai/clip-vit-base-patch16",
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        head: Literal["zero-shot", "linear"] = "zero-shot",
        normalise: Normalise = "both",
        pretrained: bool = True,
        size: int | None = None,
        cache: str | None = None,
        cache_alpha: float = 1.0,
        cache_beta: float = 5.5,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ModelError(f"a CLIP classifier has no head '{head}'{nearest(head, HEADS)}")
        whole = load_model(
            f"hf:{clip}",
            options={"task": "encoder"},
            weights="pretrained" if pretrained else None,
        )
        if not (hasattr(whole, "get_image_features") and hasattr(whole, "get_text_features")):
            raise ModelError(
                f"hf:{clip} is a {type(whole).__name__}, which has not an image and a text tower"
            )
        texts = prompts_of(class_names, templates)
        embeddings = _encoded(whole, _tokenizer(clip), texts)
        self.size = size or _own_size(whole)
        self.tower = whole
        # Words are not asked again: of a large model this is a third of the memory.
        for name in ("text_model", "text_projection"):
            if hasattr(whole, name):
                delattr(whole, name)
        self.classifier: nn.Linear | TextHead
        if head == "zero-shot":
            self.classifier = TextHead(class_vectors(embeddings, normalise))
        else:
            self.classifier = _linear(class_vectors(embeddings, "none"))
        self._take_cache(cache, head, self.classifier)
        self.cache_alpha, self.cache_beta = cache_alpha, cache_beta
        self.input_mean = list(getattr(whole, "input_mean", MEAN))
        self.input_std = list(getattr(whole, "input_std", STD))

    def _take_cache(self, cache: str | None, head: str, classifier: nn.Module) -> None:
        self.register_buffer("keys", None)
        self.register_buffer("values", None)
        if cache is None:
            return
        if head != "zero-shot":
            raise ModelError("a few-shot cache adds to zero-shot logits: leave out head: linear")
        path = find_weights(cache)
        kept = read_weights(path)
        lacking = [name for name in ("keys", "values") if name not in kept]
        if lacking:
            raise ModelError(f"the cache {path} has no tensor '{lacking[0]}'")
        self.keys, self.values = kept["keys"].float(), kept["values"].float()
        assert isinstance(classifier, TextHead)
        # told here, before any training, when they do not belong to this model or its classes
        cache_logits(classifier.matrix, self.keys, self.values, alpha=1.0, beta=1.0)
        if self.values.shape[1] != classifier.classes:
            raise ModelError(
                f"the cache {path} knows {self.values.shape[1]} classes, the prompts are for "
                f"{classifier.classes}"
            )

    def features(self, images: Tensor) -> Tensor:
        """Projected image features (B, width), not normalised.

        Args:
            images: (B, 3, H, W) normalised; grey ones (B, 1, H, W) are repeated.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return _pooled(self.tower.get_image_features(pixel_values=images))  # type: ignore[operator]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"logits" (B, classes), "embedding" (B, width)} of images (B, C, H, W)."""
        found = self.features(images)
        logits = self.classifier(found)
        if self.keys is not None and self.values is not None:
            logits = logits + cache_logits(
                F.normalize(found, dim=-1),
                self.keys,
                self.values,
                alpha=self.cache_alpha,
                beta=self.cache_beta,
            )
        return {"logits": logits, "embedding": found}


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer


def _pooled(out: Any) -> Tensor:
    """The features, which transformers returns bare or in an output's field."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def _encoded(model: Any, tokenizer: Any, texts: Sequence[Sequence[str]]) -> Tensor:
    """(classes, templates, width) embeddings of the texts, as the text tower gives them."""
    flat = [text for own in texts for text in own]
    parts = []
    with in_eval_mode(model), torch.no_grad():
        for start in range(0, len(flat), _BLOCK):
            given = tokenizer(
                flat[start : start + _BLOCK], padding=True, truncation=True, return_tensors="pt"
            )
            known = {k: v for k, v in given.items() if k in {"input_ids", "attention_mask"}}
            parts.append(_pooled(model.get_text_features(**known)).float())
    return torch.cat(parts).view(len(texts), len(texts[0]), -1)


def _own_size(model: Any) -> int:
    side = getattr(getattr(model.config, "vision_config", None), "image_size", 224)
    return int(side if isinstance(side, int) else side[0])


def _tokenizer(clip: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language", "to read prompts") from error
    given = Path(clip).expanduser()
    place = given if (given / "config.json").is_file() else find_folder(clip) or clip
    try:
        return AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError) as error:
        raise ModelError(f"the model '{clip}' has no tokenizer at {place}: {error}") from error
