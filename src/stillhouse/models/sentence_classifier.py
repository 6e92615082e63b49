"""A linear classifier on the sentence vectors of a frozen pretrained encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.loading import encoder_tokenizer, load_model

# Texts of like length are encoded together, so that little padding is computed.
_BLOCK = 16


class SentenceClassifier(nn.Module):
    """Text to class scores: a frozen encoder, mean over tokens, unit length, one linear layer.

    The pooling is that of Sentence-BERT (Reimers and Gurevych 2019, section 3, MEAN). Vectors
    are scaled to a length of sqrt(width), so that a fresh linear layer sees entries of unit
    size. The encoder stays in eval mode and gets no gradient, whatever is asked of the module.

    Args:
        classes: number of classes.
        encoder: hub id or folder of a Hugging Face encoder with its tokenizer.
        length: most word pieces of a text; longer ones are cut.
        pretrained: load the encoder's published weights; False draws them anew.

    Attributes:
        reads: the view of a batch this model is called on: the raw texts.

    Raises:
        ModelError: the encoder is not found, or a setting is out of range.
        MissingExtra: transformers is not installed.
    """

    reads = "text"

    def __init__(
        self,
        classes: int,
        encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
        length: int = 64,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if classes < 1 or length < 3:
            raise ModelError(
                "a sentence classifier needs at least one class and a length of 3 word pieces, "
                f"got classes={classes}, length={length}"
            )
        self.encoder = load_model(
            f"hf:{encoder}",
            options={"task": "encoder"},
            weights="pretrained" if pretrained else None,
        )
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(False)
        self.tokenizer = encoder_tokenizer(encoder)
        self.length = length
        config: Any = self.encoder.config
        self.width = int(config.hidden_size)
        self.classifier = nn.Linear(self.width, classes)
        self.train()

    def train(self, mode: bool = True) -> SentenceClassifier:
        """Set the mode; the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def features(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts.

        Args:
            texts: B strings.

        Returns:
            (B, width), each of length sqrt(width).
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        blocks = [order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK)]
        sorted_vectors = torch.cat([self._block([texts[i] for i in block]) for block in blocks])
        places = torch.tensor(order, device=sorted_vectors.device).argsort()
        return sorted_vectors.index_select(0, places)

    def _block(self, texts: list[str]) -> Tensor:
        pieces = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        device = self.classifier.weight.device
        inputs = {name: value.to(device, non_blocking=True) for name, value in pieces.items()}
        with torch.no_grad():
            states = self.encoder(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        unit: Tensor = F.normalize(mean, dim=-1)
        return unit * math.sqrt(self.width)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Class scores.

        Args:
            texts: B strings.

        Returns:
            Logits (B, classes).
        """
        logits: Tensor = self.classifier(self.features(texts))
        return logits
