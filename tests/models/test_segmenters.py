from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model

ABOUT = {"classes": ["a", "b", "c"], "input": [3, 24, 40]}


@pytest.mark.parametrize("size", [(24, 40), (90, 120), (33, 47)])
def test_logits_at_a_quarter_of_the_image(size):
    for name, options in (
        ("stillhouse:small_segmenter", {"widths": [4, 6, 8]}),
        ("stillhouse:small_segmenter", {"widths": [4, 6]}),
        ("stillhouse:deeplab", {"width": 0.25, "decoder_channels": 8, "low_channels": 4}),
    ):
        model = load_model(name, options=options, about=ABOUT).eval()
        with torch.no_grad():
            found = model(torch.randn(1, 3, *size))
        assert found.shape == (1, 3, -(-size[0] // 4), -(-size[1] // 4))


def test_the_number_of_image_channels_is_not_that_of_the_decoder():
    model = load_model("stillhouse:deeplab", about=ABOUT)
    assert model.classifier.in_channels == 96
    assert model.classifier.out_channels == 3


@pytest.mark.parametrize(("stride", "size"), [(32, (2, 2)), (16, (4, 4)), (8, (8, 8))])
def test_dilation_keeps_the_size_and_the_weights(stride, size):
    torch.manual_seed(0)
    plain = load_model("stillhouse:deeplab", options={"width": 0.25, "output_stride": 32})
    model = load_model("stillhouse:deeplab", options={"width": 0.25, "output_stride": stride})
    model.load_state_dict(plain.state_dict())
    model.eval(), plain.eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.deep(model.low(x)).shape[-2:] == size
    # on a constant image dilation changes nothing but at the rim
    flat = torch.ones(1, 3, 256, 256)
    with torch.no_grad():
        middle = [m.deep(m.low(flat)) for m in (model, plain)]
    centre = [f[0, :, f.shape[2] // 2, f.shape[3] // 2] for f in middle]
    torch.testing.assert_close(centre[0], centre[1], rtol=1e-3, atol=1e-4)


def test_a_second_head_and_one_image_at_a_time():
    model = load_model(
        "stillhouse:deeplab", options={"width": 0.25, "auxiliary": True}, about=ABOUT
    )
    found = model.train()(torch.randn(2, 3, 32, 32))
    assert set(found) == {"logits", "aux"}
    assert found["aux"].shape == (2, 3, 2, 2)


def test_the_first_blocks_of_the_backbone_are_a_network_of_their_own():
    options = {"width": 0.5, "decoder_channels": 8, "low_channels": 4}
    whole = load_model("stillhouse:deeplab", options=options)
    model = load_model("stillhouse:deeplab", options={**options, "blocks": 7}).eval()
    assert len(model.deep) == 3
    backbone = {k: v for k, v in whole.state_dict().items() if k.startswith(("low.", "deep."))}
    kept = {k: v for k, v in backbone.items() if k in model.state_dict()}
    assert all(v.shape == model.state_dict()[k].shape for k, v in kept.items())
    assert set(kept) == {k for k in model.state_dict() if k.startswith(("low.", "deep."))}
    x = torch.randn(2, 3, 64, 64)
    assert model.deep(model.low(x)).shape == (2, 16, 8, 8)  # 32 channels at half the width
    assert model(x).shape[-2:] == (16, 16)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())


def test_what_cannot_be_built_is_told():
    with pytest.raises(ModelError, match="5 to 18 blocks can be kept, not 4"):
        load_model("stillhouse:deeplab", options={"blocks": 4})
    with pytest.raises(ModelError, match="8, 16 or 32, not 4"):
        load_model("stillhouse:deeplab", options={"output_stride": 4})
    with pytest.raises(ModelError, match="at least two blocks"):
        load_model("stillhouse:small_segmenter", options={"widths": [4]})


def test_hugging_face_and_torchvision_segmenters_load_without_a_download(monkeypatch):
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    about = {**ABOUT, "ignore": 255}
    tiny = {
        "num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8],
        "patch_sizes": [7], "strides": [4], "num_attention_heads": [1], "mlp_ratios": [2],
        "decoder_hidden_size": 8,
    }  # fmt: skip
    model = load_model("hf:segformer", options=tiny, about=about)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3, 8, 8)
    model = load_model("torchvision:lraspp_mobilenet_v3_large", about=about).eval()
    assert model(torch.randn(1, 3, 32, 32))["out"].shape == (1, 3, 32, 32)
