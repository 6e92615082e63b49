"""Encoders of time series and of video clips."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model
from stillhouse.models.series_cnn import SeriesCNN
from stillhouse.models.video_encoder import VideoEncoder


def test_channels_are_encoded_apart():
    model = SeriesCNN(4, [8, 6], kernel=3).eval()
    series = torch.randn(5, 4, 32)
    vectors = model(series)["embedding"]
    assert vectors.shape == (5, 24)
    swapped = model(series[:, [1, 0, 2, 3]])["embedding"]
    torch.testing.assert_close(swapped[:, :6], vectors[:, 6:12])
    torch.testing.assert_close(swapped[:, 12:], vectors[:, 12:])
    mean = SeriesCNN(4, [8, 6], kernel=3, reduction="mean").eval()
    mean.load_state_dict(model.state_dict())
    torch.testing.assert_close(mean(series)["embedding"], vectors.view(5, 4, 6).mean(1))


def test_padding_does_not_reach_the_features():
    model = SeriesCNN(2, [8, 8, 4], kernel=3).eval()
    recording = torch.randn(1, 2, 16)
    mask = torch.ones(1, 16, dtype=torch.int64)
    found = []
    for padding in (8, 48):
        padded = torch.cat([torch.zeros(1, 2, padding), recording], -1)
        ones = torch.cat([torch.zeros(1, padding, dtype=torch.int64), mask], 1)
        found.append(model(padded, ones)["embedding"])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(model(recording, mask)["embedding"], model(recording)["embedding"])


def test_recordings_are_resampled_without_their_padding():
    model = SeriesCNN(2, [4], kernel=3, length=32).eval()
    recording = torch.randn(1, 2, 20)
    padded = torch.cat([torch.zeros(1, 2, 12), recording], -1)
    mask = torch.cat([torch.zeros(1, 12), torch.ones(1, 20)], 1).long()
    torch.testing.assert_close(model(padded, mask)["embedding"], model(recording)["embedding"])


def test_a_head_gives_logits_and_the_data_the_channels():
    about = {"classes": ["a", "b"], "input": [5, 40]}
    model = load_model("stillhouse:series_cnn", options={"labels": 2}, about=about)
    out = model(torch.randn(3, 5, 40))
    assert out["logits"].shape == (3, 2)
    assert model.channels == 5
    assert "logits" not in load_model("stillhouse:series_cnn", about=about)(torch.randn(3, 5, 40))


@pytest.mark.parametrize(
    "options",
    [{"channels": 0}, {"kernel": 4}, {"widths": []}, {"reduction": "sum"}, {"length": -1}],
)
def test_settings_out_of_range_are_told(options):
    with pytest.raises(ModelError):
        SeriesCNN(**{"channels": 3, **options})


def test_other_channels_are_told():
    with pytest.raises(ModelError, match="reads"):
        SeriesCNN(3, [4])(torch.randn(2, 4, 8))


class Tokens(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)() if config else None
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values):
        states = pixel_values.flatten(2)[:, :, :4] * self.weight
        return type("Out", (), {"last_hidden_state": states})()


def test_tokens_are_pooled_as_the_checkpoint_says():
    clip = torch.randn(2, 4, 3, 8, 8)
    states = clip.flatten(2)[:, :, :4]
    torch.testing.assert_close(VideoEncoder(Tokens())(clip)["embedding"], states.mean(1))
    mean = VideoEncoder(Tokens(use_mean_pooling=True))(clip)["embedding"]
    torch.testing.assert_close(mean, states.mean(1))
    first = VideoEncoder(Tokens(use_mean_pooling=False))(clip)["embedding"]
    torch.testing.assert_close(first, states[:, 0])
    assert VideoEncoder(Tokens()).reads == "video"
    with pytest.raises(ModelError, match="clips"):
        VideoEncoder(Tokens())(clip[0])
    with pytest.raises(ModelError, match="last_hidden_state"):
        VideoEncoder(NoStates())(clip)


class NoStates(nn.Module):
    def forward(self, pixel_values):
        return pixel_values
