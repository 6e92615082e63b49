"""A small Transformer that tags words: hashed words and their letters in, classes per word out."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.parts.text_reader import CodeReader
from stillhouse.parts.text_spans import split_words

_LETTERS = 256


class WordTagger(nn.Module):
    """Word-hash embedding and character CNN, Transformer layers, one linear layer.

    Positions enter as a learned bias per head on the attention, by distance, so that a model
    trained on short rows reads long ones; heads begin by looking at neighbours.

    Args:
        classes: per word.
        width: of the model.
        layers: Transformer layers.
        heads: of the attention; they divide `width`.
        buckets: hashed word ids.
        letters: of a word that the character CNN sees.
        reach: distances beyond which all positions count alike.
        length: most words of a row.
        dropout: in [0, 1).
        causal: a word sees itself and what stands to its left only.

    Attributes:
        reader: turns text into what `forward` takes.

    Raises:
        ModelError: a setting out of range.
    """

    def __init__(
        self,
        classes: int = 2,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        buckets: int = 16384,
        letters: int = 12,
        reach: int = 32,
        length: int = 128,
        dropout: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or min(classes, width, layers, letters, reach, length) < 1 or buckets < 3:
            raise ModelError(
                "a word tagger needs positive sizes, at least 3 buckets, and heads that divide "
                f"the width; got width {width}, heads {heads}, layers {layers}, buckets {buckets}"
            )
        self.causal = causal
        self.reader = WordReader(buckets, letters, length)
        self.words = nn.Embedding(buckets, width, padding_idx=0)
        self.letters = nn.Embedding(_LETTERS, 24, padding_idx=0)
        self.spelling = nn.Conv1d(24, width // 2, 3, padding=1)
        self.join = nn.Linear(width + width // 2, width)
        self.layers = nn.ModuleList(_Layer(width, heads, reach, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, codes: Tensor) -> Tensor:
        """Class scores of every word.

        Args:
            codes: (B, L, 1 + letters) int64 of `WordReader`; all zeros are padding.

        Returns:
            Logits (B, L, classes).
        """
        absent = codes[..., 0] == 0  # (B, L)
        x = self.dropout(self.join(torch.cat([self.words(codes[..., 0]), self._spelt(codes)], -1)))
        hidden = absent[:, None, None, :].expand(-1, 1, codes.shape[1], -1)  # (B, 1, L, L)
        if self.causal:
            ahead = torch.ones(codes.shape[1], codes.shape[1], device=codes.device).triu(1).bool()
            hidden = hidden | ahead
        for layer in self.layers:
            x = layer(x, hidden)
        logits: Tensor = self.classifier(self.norm(x))
        return logits

    def _spelt(self, codes: Tensor) -> Tensor:
        """(B, L, width / 2): maximum over a word's letters."""
        batch, length = codes.shape[:2]
        letters = self.letters(codes[..., 1:].flatten(0, 1)).transpose(1, 2)
        found = F.relu(self.spelling(letters)).amax(-1)
        return found.view(batch, length, -1)


class _Layer(nn.Module):
    """Pre-norm attention with a bias by distance, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Embedding(2 * reach + 1, heads)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.bias.weight.copy_(_neighbourly(heads, reach))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, L, D) and (B, 1, L, L) bool, True where attention is forbidden."""
        batch, length, width = x.shape
        parts = self.project(self.first(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        places = torch.arange(length, device=x.device)
        apart = (places[None] - places[:, None]).clamp(-self.reach, self.reach) + self.reach
        bias = self.bias(apart).permute(2, 0, 1)[None]  # (1, H, L, L)
        # A finite floor: a row of padding only would otherwise be NaN.
        bias = bias.masked_fill(hidden, torch.finfo(x.dtype).min / 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(x.dtype))
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        added: Tensor = x + self.dropout(self.inner(self.second(x)))
        return added


def _neighbourly(heads: int, reach: int) -> Tensor:
    """Biases (2 * reach + 1, heads) from which training begins.

    One head looks at the next word, one at the word before, the others at neighbourhoods of
    growing width (as ALiBi's slopes, Press et al. 2022, to both sides). From flat biases a
    small model needs several times as many steps to find its neighbours.
    """
    apart = torch.arange(-reach, reach + 1).float()
    kinds = [-2 * (apart - 1).abs(), -2 * (apart + 1).abs()] if heads > 1 else []
    kinds += [-apart.abs() * 2.0**-power for power in range(1, heads + 1)]
    return torch.stack(kinds[:heads], 1)


class WordReader(CodeReader):
    """Reads words as a hashed id and the codes of their first and last letters.

    The id ignores case; letters keep it. Ids are the same on every machine.

    Args:
        buckets: hashed ids, 0 (padding) included.
        letters: per word: the first two thirds and the last third, padded with 0.
        length: most words of a row.
    """

    def __init__(self, buckets: int, letters: int, length: int) -> None:
        self.buckets, self.letters = buckets, letters
        self._kept = lru_cache(1 << 16)(self._made)
        super().__init__(split_words, self.code, length)

    def code(self, word: str) -> Tensor:
        """(1 + letters,) int64."""
        return torch.tensor(self._kept(word))

    def _made(self, word: str) -> list[int]:
        digest = hashlib.blake2b(word.casefold().encode("utf-8", "replace"), digest_size=8)
        number = 1 + int.from_bytes(digest.digest(), "little") % (self.buckets - 1)
        tail = self.letters // 3
        shown = word
        if len(word) > self.letters:
            shown = word[: self.letters - tail] + word[len(word) - tail :]
        codes = [1 + ord(letter) % (_LETTERS - 1) for letter in shown]
        return [number, *codes, *([0] * (self.letters - len(codes)))]

    def __deepcopy__(self, memo: object) -> WordReader:
        return WordReader(self.buckets, self.letters, self.length)


# As recipes call it.
word_tagger = WordTagger
