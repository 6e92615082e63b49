"""What both sides of E10 train: one student, from the same weights, on the same vectors."""

from __future__ import annotations

import time

import torch
from e5_case import LENGTH, WIDTH, encoder

from stillhouse.models.sentence_embedder import SentenceEmbedder

BATCH, EPOCHS, RATE = 64, 6, 1e-3
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def student() -> SentenceEmbedder:
    """Two layers, 128 wide, a linear layer to the teacher's width, unit length."""
    torch.manual_seed(0)
    return SentenceEmbedder(encoder(), WIDTH, LENGTH, pretrained=False, config=CONFIG)


class Marks:
    """When each epoch began; the last one, whose end has no mark, is not timed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.perf_counter())

    def figures(self) -> dict[str, float]:
        """Seconds of the first epoch, of the quickest of the others, of all of them."""
        epochs = [b - a for a, b in zip(self.times, self.times[1:])]
        return {"first": epochs[0], "epoch": min(epochs[1:]), "whole": sum(epochs)}
