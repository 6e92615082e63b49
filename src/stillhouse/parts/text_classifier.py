"""Classifiers made of words: prompts, class vectors from text embeddings, few-shot caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError

Normalise = Literal["both", "templates", "none"]


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The texts that stand for each class: every template with the class's name in it.

    Args:
        class_names: underscores become blanks.
        templates: each with one pair of braces, such as "a photo of a {}.".

    Returns:
        Per class one text per template.

    Raises:
        RecipeError: no classes, no templates, or a template that holds no name.
    """
    if not class_names or not templates:
        raise RecipeError("prompts need at least one class name and one template")
    for template in templates:
        if template.count("{}") != 1:
            raise RecipeError(f"the template '{template}' needs {{}} once, for the class's name")
    names = [name.replace("_", " ") for name in class_names]
    return [[template.replace("{}", name) for template in templates] for name in names]


def class_vectors(embeddings: Tensor, normalise: Normalise = "both") -> Tensor:
    """One vector per class from the embeddings of its texts.

    Args:
        embeddings: (classes, templates, width), as the text tower gives them.
        normalise: "both" brings each embedding and their mean to unit length (CLIP);
            "templates" only each embedding (the OpenCLIP teacher of DHO's VLM script; OADP);
            "none" is the plain mean (language-aware initialisation of a head).

    Returns:
        (classes, width).

    Raises:
        ModelError: another number of axes.
    """
    if embeddings.ndim != 3:
        raise ModelError(
            "text embeddings are (classes, templates, width), not "
            f"{tuple(embeddings.shape)} in shape"
        )
    each = embeddings if normalise == "none" else F.normalize(embeddings, dim=-1)
    mean = each.mean(1)
    return F.normalize(mean, dim=-1) if normalise == "both" else mean


def cache_logits(
    features: Tensor, keys: Tensor, values: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """What a few-shot cache adds to zero-shot logits: alpha exp(-beta (1 - f k)) @ values.

    Tip-Adapter (Zhang et al. 2022), as in erjui/DHO, train_others.py.

    Args:
        features: (N, width) of unit length.
        keys: (M, width) features of the M labelled samples, of unit length, or learnt.
        values: (M, classes) their one-hot labels.
        alpha: weight of the cache; 0 leaves the zero-shot logits.
        beta: sharpness, >= 0.

    Returns:
        (N, classes).

    Raises:
        ModelError: the shapes do not fit.
    """
    if keys.ndim != 2 or features.shape[-1] != keys.shape[1] or len(values) != len(keys):
        raise ModelError(
            f"features {tuple(features.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not fit: (N, width), (M, width) and (M, classes) are needed"
        )
    affinity = features @ keys.T
    found: Tensor = alpha * (torch.exp(beta * affinity - beta) @ values)
    return found
