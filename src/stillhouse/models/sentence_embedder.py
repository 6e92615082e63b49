"""A sentence encoder: tokens to states, mean over real tokens, a linear layer, unit length."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.loading import encoder_tokenizer, load_model
from stillhouse.parts.pooling import masked_mean

# On the CPU texts of like length are encoded together, since padding is computed there like text;
# not while training, where each block would make a gradient of the whole table of words.
_BLOCK = 16
_REMEMBERED = 200_000


class SentenceEmbedder(nn.Module):
    """Texts to vectors: a Hugging Face encoder, masked mean, optional projection, unit length.

    The pooling is that of Sentence-BERT (Reimers and Gurevych 2019, section 3, MEAN). With
    `width` a linear layer maps the mean into the space of a teacher of that width, as students
    of embedding distillation have it. Word pieces of a text are found once and remembered.

    Args:
        encoder: hub id or folder of a Hugging Face encoder with its tokenizer.
        width: of the vectors; None: that of the encoder, without a linear layer.
        length: most word pieces of a text; longer ones are cut, at the latest where the encoder
            reads no further.
        pretrained: load the encoder's published weights; False draws them anew.
        normalise: scale vectors to unit length.
        config: fields of the encoder's configuration that differ from the published one
            (num_hidden_layers, hidden_size, ...); for `pretrained: false`.

    Attributes:
        reads: the view of a batch this model is called on: the raw texts.

    Raises:
        ModelError: the encoder is not found, or a setting is out of range.
        MissingExtra: transformers is not installed.
    """

    reads = "text"

    def __init__(
        self,
        encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
        width: int | None = None,
        length: int = 128,
        pretrained: bool = True,
        normalise: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if length < 3 or (width is not None and width < 1):
            raise ModelError(
                "a sentence embedder needs a length of 3 word pieces and a width of 1 at least, "
                f"got length={length}, width={width}"
            )
        if pretrained and config:
            raise ModelError(
                f"published weights do not fit another configuration ({', '.join(config)}): "
                "say pretrained: false, or leave out config"
            )
        self.encoder = load_model(
            f"hf:{encoder}",
            options={"task": "encoder", **(config or {})},
            weights="pretrained" if pretrained else None,
        )
        # A pooler is a head on the first token, which no vector here goes through.
        if isinstance(getattr(self.encoder, "pooler", None), nn.Module):
            setattr(self.encoder, "pooler", None)  # noqa: B010 - None is a value it may have
        self.tokenizer = encoder_tokenizer(encoder)
        settings: Any = self.encoder.config
        self.projection = nn.Linear(int(settings.hidden_size), width) if width else nn.Identity()
        # Both say it, and not every model does: RoBERTa has two positions that no piece can take.
        most = (
            getattr(settings, "max_position_embeddings", None),
            getattr(self.tokenizer, "model_max_length", None),
        )
        self.length = min([length, *(n for n in most if isinstance(n, int) and n > 0)])
        self.normalise = normalise
        self.width = width or int(settings.hidden_size)
        self._pad = int(getattr(self.tokenizer, "pad_token_id", None) or 0)
        self._known: dict[str, array[int]] = {}

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts.

        Args:
            texts: B strings.

        Returns:
            (B, width).
        """
        pieces = self._pieces(texts)
        device = next(self.encoder.parameters()).device
        if device.type != "cpu" or len(pieces) <= _BLOCK or torch.is_grad_enabled():
            return self._vectors(pieces, device)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        blocks = [order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK)]
        sorted_vectors = torch.cat(
            [self._vectors([pieces[i] for i in block], device) for block in blocks]
        )
        return sorted_vectors.index_select(0, torch.tensor(order).argsort())

    def _pieces(self, texts: Sequence[str]) -> list[array[int]]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            if len(self._known) + len(new) > _REMEMBERED:
                self._known = {}
                new = list(dict.fromkeys(texts))
            found = self.tokenizer(new, truncation=True, max_length=self.length)["input_ids"]
            self._known.update(zip(new, (array("i", row) for row in found), strict=True))
        return [self._known[text] for text in texts]

    def _vectors(self, pieces: Sequence[array[int]], device: torch.device) -> Tensor:
        longest = max(len(row) for row in pieces)
        ids = torch.full((len(pieces), longest), self._pad)
        lengths = torch.tensor([len(row) for row in pieces])
        for number, row in enumerate(pieces):
            ids[number, : len(row)] = torch.frombuffer(row, dtype=torch.int32)
        mask = torch.arange(longest) < lengths[:, None]
        return self.embed(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors of word pieces.

        Args:
            ids: (B, L) int64.
            mask: (B, L), true or 1 at real pieces.

        Returns:
            (B, width).
        """
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        vectors: Tensor = self.projection(masked_mean(states, mask))
        return F.normalize(vectors, dim=-1) if self.normalise else vectors
