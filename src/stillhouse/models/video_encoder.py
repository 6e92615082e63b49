"""A pretrained video transformer as an encoder of clips: one vector a clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import ModelError


class VideoEncoder(nn.Module):
    """TimeSformer, VideoMAE and the like of transformers, with their tokens pooled.

    The vector is the mean over all tokens, or the first token where the checkpoint's own
    settings say `use_mean_pooling: false` (COMODO, released model_util.py).

    Args:
        model: gives "last_hidden_state" (B, L, D) for `pixel_values`.
        reads: the batch's view that the model reads.

    Attributes:
        pooled: the mean is taken.
    """

    def __init__(self, model: nn.Module, *, reads: str = "video") -> None:
        super().__init__()
        self.model = model
        self.reads = reads
        self.pooled = bool(getattr(getattr(model, "config", None), "use_mean_pooling", True))

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """One vector a clip.

        Args:
            clip: (B, frames, 3, H, W), normalised as the checkpoint asks.

        Returns:
            {"embedding": (B, D)}.

        Raises:
            ModelError: no clips, or a model without hidden states.
        """
        if clip.ndim != 5:
            raise ModelError(
                f"a video encoder reads clips (B, frames, 3, H, W), not {tuple(clip.shape)}"
            )
        out: Any = self.model(pixel_values=clip)
        states = getattr(out, "last_hidden_state", None)
        if not isinstance(states, Tensor):
            raise ModelError(f"{type(self.model).__name__} gives no last_hidden_state")
        return {"embedding": states.mean(1) if self.pooled else states[:, 0]}


def video_encoder(
    checkpoint: str,
    reads: str = "video",
    pretrained: bool = True,
    options: Mapping[str, Any] | None = None,
) -> VideoEncoder:
    """A video encoder by its Hugging Face id or folder.

    Args:
        checkpoint: such as facebook/timesformer-base-finetuned-k400 or
            MCG-NJU/videomae-base-finetuned-kinetics, or a folder.
        reads: the batch's view that the model reads.
        pretrained: with its published weights; else freshly initialised.
        options: of its configuration.
    """
    from stillhouse.models.loading import load_model

    model = load_model(
        f"hf:{checkpoint}",
        options={"task": "encoder", **(options or {})},
        weights="pretrained" if pretrained else None,
    )
    return VideoEncoder(model, reads=reads)
