from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import CheckpointError, ModelError
from stillhouse.models.imdn import (
    IMDN,
    IMDN_AS,
    IMDN_RTC,
    IMDN_RTE,
    ChannelAttention,
    DistillationBlock,
    PlainBlock,
    describe_published,
    deviation,
    load_published,
    no_split_width,
    parameter_count,
    read_weights,
)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(
    case: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return {k[2:]: torch.from_numpy(v).to(dtype) for k, v in case.items() if k.startswith("w.")}


# Reference vectors -------------------------------------------------------------------------


def test_parameter_counts_are_those_of_the_released_networks(golden) -> None:
    vectors = golden("imdn")
    networks = {
        "IMDN_x2": IMDN(scale=2),
        "IMDN_x3": IMDN(scale=3),
        "IMDN_x4": IMDN(scale=4),
        "IMDN_AS": IMDN_AS(),
        "IMDN_RTC": IMDN_RTC(),
        "IMDN_RTE": IMDN_RTE(),
        "IMDB_64": DistillationBlock(64),
        "IMDN_nf32_x2": IMDN(32, 6, 2),
    }
    assert {k: parameter_count(v) for k, v in networks.items()} == vectors.json["param_counts"]
    vectors.count("param_counts")


def test_parameter_counts_of_the_sheet() -> None:
    counts = [parameter_count(IMDN(scale=s)) for s in (2, 3, 4)]
    assert counts == [694_404, 703_059, 715_176]
    assert parameter_count(DistillationBlock(64)) == 104_020
    assert parameter_count(IMDN_AS()) == 752_104
    assert parameter_count(IMDN(32, 4, 2)) == 122_100


def test_ablation_sizes_are_those_of_the_paper() -> None:
    rows = [
        (IMDN(64, 4, 4, attention="none", collect=False, split=False), 510),
        (IMDN(64, 4, 4, attention="none", collect=False), 480),
        (IMDN(64, 4, 4, collect=False), 482),
        (IMDN(64, 4, 4), 499),
    ]
    assert [round(parameter_count(net) / 1000) for net, _ in rows] == [k for _, k in rows]


def test_attention_matches(golden) -> None:
    case = golden("imdn").case("cca")
    layer = ChannelAttention(32)
    layer.load_state_dict(weights_of(case))
    x = torch.from_numpy(case["x"])
    mean, spread = deviation(x)
    np.testing.assert_allclose(spread, case["std"], atol=1e-6)
    np.testing.assert_allclose(layer.squeeze(x), case["squeeze"], atol=1e-6)
    np.testing.assert_allclose(spread + mean, case["squeeze"], atol=1e-6)
    np.testing.assert_allclose(layer(x).detach(), case["y_f64"], atol=1e-5)


def test_attention_gradient_matches(golden) -> None:
    vectors = golden("imdn")
    layer = ChannelAttention(32)
    layer.load_state_dict(weights_of(vectors.case("cca")))
    case = vectors.case("cca_grad")
    x = torch.from_numpy(case["x"]).requires_grad_()
    y = layer(x)
    (y * torch.from_numpy(case["gy"])).sum().backward()
    np.testing.assert_allclose(y.detach(), case["y"], atol=1e-5)
    np.testing.assert_allclose(x.grad, case["gx"], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_matches(golden, dtype: torch.dtype) -> None:
    case = golden("imdn").case("imdb")
    block = DistillationBlock(16).to(dtype)
    block.load_state_dict(weights_of(case, dtype))
    x = torch.from_numpy(case["x"]).to(dtype).requires_grad_()
    y = block(x)
    (y * torch.from_numpy(case["gy"]).to(dtype)).sum().backward()
    np.testing.assert_allclose(y.detach(), case["y_f64"], atol=1e-5)
    np.testing.assert_allclose(x.grad, case["gx"], atol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_network_matches(golden, dtype: torch.dtype, close: float) -> None:
    case = golden("imdn").case("net_x2")
    state = weights_of(case, dtype)
    net = describe_published(state).build().to(dtype)
    load_published(state, net)
    lr = torch.from_numpy(case["lr"]).to(dtype).requires_grad_()
    sr = net(lr)
    np.testing.assert_allclose(sr.detach(), case["sr_f64"], atol=close, rtol=0)
    loss = (sr - torch.from_numpy(case["hr"]).to(dtype)).abs().mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(case["l1_f64"]), abs=1e-6)
    np.testing.assert_allclose(lr.grad, case["g_lr"], atol=1e-6)
    for name, value in case.items():
        if name.startswith("g."):
            grad = net.get_parameter(name[2:]).grad
            np.testing.assert_allclose(grad, value, atol=1e-6)


def test_any_scale_network_matches(golden) -> None:
    vectors = golden("imdn")
    state = weights_of(vectors.case("net_x2"))
    body = {k: v for k, v in state.items() if not k.startswith(("fea_conv", "upsampler"))}
    case = vectors.case("as")
    net = load_published({**body, **weights_of(case)})
    assert isinstance(net, IMDN_AS)
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(case["x"])), case["y"], atol=1e-5)


def test_published_weights_restore_a_real_image(golden_weights: Path) -> None:
    net = load_published(golden_weights / "imdn_x2.safetensors")
    assert isinstance(net, IMDN)
    assert (net.channels, net.blocks, net.scale) == (64, 6, 2)
    with np.load(golden_weights / "imdn_x2_io.npz", allow_pickle=False) as pair:
        lr, sr, hr = pair["lr"], pair["sr"], pair["hr"]
    with torch.no_grad():
        made = net(torch.from_numpy(lr).permute(2, 0, 1)[None].float() / 255)
    np.testing.assert_allclose(made, sr, atol=1e-5)
    assert made.shape[2:] == hr.shape[:2]


# Properties --------------------------------------------------------------------------------


def test_squeeze_of_a_small_map() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 16, 2, 2)
    squeezed = ChannelAttention(16).squeeze(x)
    torch.testing.assert_close(squeezed, torch.full((1, 16, 1, 1), 2.5 + 1.25**0.5))
    assert float(squeezed[0, 0]) == pytest.approx(3.6180340, abs=1e-6)
    assert float(ChannelAttention(16, "mean").squeeze(x)[0, 0]) == 2.5


def test_block_with_zero_fusion_is_the_identity() -> None:
    block = seeded(DistillationBlock(16))
    nn.init.zeros_(block.c5.weight)
    nn.init.zeros_(block.c5.bias)
    x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(block(x), x)


def test_network_with_zero_body_is_its_tail_on_its_head() -> None:
    net = seeded(IMDN(16, 3, 2))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".c5." in name or name.startswith(("c.", "LR_conv.")):
                parameter.zero_()
    lr = images(1, 3, 7, 5)
    expected = nn.functional.pixel_shuffle(net.upsampler[0](net.fea_conv(lr)), 2)
    torch.testing.assert_close(net(lr), expected)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_grows_by_the_scale_for_odd_sides(scale: int) -> None:
    assert IMDN(16, 2, scale)(images(2, 3, 7, 11)).shape == (2, 3, 7 * scale, 11 * scale)


def test_any_scale_network_keeps_the_size() -> None:
    assert IMDN_AS(16, 2)(images(1, 3, 12, 20)).shape == (1, 3, 12, 20)


def test_real_time_networks_double_the_size() -> None:
    assert IMDN_RTC()(images(1, 3, 7, 9)).shape == (1, 3, 14, 18)
    net = IMDN_RTE()
    assert net.scale == 2
    assert net(images(1, 3, 8, 10)).shape == (1, 3, 16, 20)


def test_translation_moves_the_result_only_without_attention() -> None:
    def gap(attention: str) -> float:
        # Wide enough that the content's receptive field never meets a border; the far edge
        # leaves the picture when it moves, and that is all the attention needs to see it.
        net = seeded(IMDN(16, 1, 2, attention=attention)).double()
        lr = images(1, 3, 32, 40).double()
        moved = torch.cat([lr[..., 3:], 1 - lr[..., :3]], dim=-1)
        with torch.no_grad():
            first, second = net(lr), net(moved)
        inner = (slice(None), slice(None), slice(20, -20))
        return float((first[*inner, 26:56] - second[*inner, 20:50]).abs().max())

    assert gap("none") < 1e-12
    assert gap("contrast") > 1e-7
    assert gap("mean") > 1e-8


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradient_is_finite_on_a_constant_patch(value: float) -> None:
    net = IMDN(16, 2, 2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".c4." in name:
                parameter.zero_()
    lr = torch.full((2, 3, 12, 12), value, requires_grad=True)
    net(lr).abs().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert torch.isfinite(lr.grad).all()


def test_deviation_equals_the_plain_form() -> None:
    x = torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(2)).double()
    _, spread = deviation(x)
    expected = x.var(dim=(2, 3), keepdim=True, unbiased=False).sqrt()
    torch.testing.assert_close(spread, expected)
    half = deviation(x.half())[1]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected, atol=2e-3, rtol=0)


def test_only_the_sent_on_channels_may_be_permuted() -> None:
    block = seeded(DistillationBlock(16)).double()
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    expected = block(x)

    sent_on = copy.deepcopy(block)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        sent_on.c1.weight[4:] = block.c1.weight[4:][order]
        sent_on.c1.bias[4:] = block.c1.bias[4:][order]
        sent_on.c2.weight.copy_(block.c2.weight[:, order])
    torch.testing.assert_close(sent_on(x), expected)

    kept = copy.deepcopy(block)
    with torch.no_grad():
        kept.c1.weight[:4] = block.c1.weight[:4].flip(0)
        kept.c1.bias[:4] = block.c1.bias[:4].flip(0)
    assert float((kept(x) - expected).abs().max()) > 1e-4


def test_no_activation_after_fourth_and_fusion() -> None:
    block = seeded(DistillationBlock(16))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    joined = block.distil(x)
    # A leaky activation would shrink the negative half of c4's share twentyfold.
    last = joined[:, 12:]
    assert float(last.min()) < -0.3 * float(last.max())
    kept = joined[:, :12]
    assert float(kept.min()) > -0.3 * float(kept.max())


# Ablations ---------------------------------------------------------------------------------


def test_plain_network_is_at_least_as_large() -> None:
    for channels, blocks, scale in ((64, 6, 4), (32, 4, 2), (16, 2, 3)):
        width = no_split_width(channels, blocks, scale)
        plain = IMDN(width, blocks, scale, split=False)
        assert parameter_count(plain) >= parameter_count(IMDN(channels, blocks, scale))
        assert isinstance(plain.IMDB1, PlainBlock)
        assert plain(images(1, 3, 9, 8)).shape == (1, 3, 9 * scale, 8 * scale)


def test_ablations_leave_out_what_they_name() -> None:
    assert not hasattr(IMDN(16, 2, 2, collect=False), "c")
    assert not hasattr(IMDN(16, 2, 2, attention="none").IMDB1, "cca")
    torch.manual_seed(0)
    contrast, mean = seeded(IMDN(16, 2, 2)), seeded(IMDN(16, 2, 2, attention="mean"))
    assert parameter_count(contrast) == parameter_count(mean)
    lr = images(1, 3, 9, 8)
    assert not torch.allclose(contrast(lr), mean(lr))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IMDN(18, 2, 2), "must be 18"),
        (lambda: IMDN(16, 0, 2), "blocks must be at least 1"),
        (lambda: IMDN(16, 2, 2, attention="contrst"), "did you mean 'contrast'"),
        (lambda: IMDN_RTE(3), "even scale"),
        (lambda: IMDN(16, 1, 2)(torch.zeros(3, 8, 8)), r"got \(3, 8, 8\)"),
        (lambda: IMDN(16, 1, 2)(torch.zeros(1, 1, 8, 8)), r"\(B, 3, H, W\)"),
        (lambda: IMDN_AS(16, 1)(torch.zeros(1, 3, 10, 8)), "divisible by 4, got 10x8"),
    ],
)
def test_bad_networks_and_inputs_are_told(make, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()


def test_network_compiles_without_breaks() -> None:
    net = seeded(IMDN(16, 2, 2)).eval()
    lr = images(1, 3, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(lr), net(lr))


# Checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: IMDN(16, 3, 3),
        lambda: IMDN(16, 3, 2, attention="none", collect=False),
        lambda: IMDN_AS(16, 2),
        lambda: IMDN_RTC(),
        lambda: IMDN_RTE(),
    ],
)
def test_checkpoints_come_back_as_the_network_they_are(tmp_path: Path, make, suffix: str) -> None:
    from safetensors.torch import save_file

    net = seeded(make())
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    file = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    again = load_published(file)
    assert type(again) is type(net)
    assert again.scale == net.scale
    lr = images(1, 3, 8, 8)
    assert torch.equal(again(lr), net(lr))


def test_published_names_are_used() -> None:
    names = set(IMDN(16, 2, 2).state_dict())
    expected = {"fea_conv.weight", "LR_conv.bias", "c.0.weight", "upsampler.0.weight"}
    expected |= {f"IMDB{b}.c{c}.weight" for b in (1, 2) for c in range(1, 6)}
    expected |= {f"IMDB2.cca.conv_du.{i}.bias" for i in (0, 2)}
    assert expected <= names
    assert {"fea_conv.0.weight", "fea_conv.2.bias"} <= set(IMDN_AS(16, 2).state_dict())


def test_nested_state_dicts_are_found() -> None:
    state = IMDN(16, 1, 2).state_dict()
    assert set(read_weights({"epoch": 3, "state_dict": state})) == set(state)


def test_another_scale_starts_from_all_but_the_tail() -> None:
    two = seeded(IMDN(16, 2, 2), seed=1)
    three = seeded(IMDN(16, 2, 3), seed=2)
    tail = {k: v.clone() for k, v in three.upsampler.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"enlarge by 2, the network by 3.*start=True"):
        load_published(two.state_dict(), three)
    load_published(two.state_dict(), three, start=True)
    for name, value in three.state_dict().items():
        if name.startswith("upsampler."):
            assert torch.equal(value, tail[name.removeprefix("upsampler.")])
        else:
            assert torch.equal(value, two.state_dict()[name])


def test_mismatch_is_told_by_name() -> None:
    state = dict(IMDN(16, 2, 2).state_dict())
    with pytest.raises(CheckpointError, match=r"missing \(IMDB3\.c1\.bias") as caught:
        load_published(state, IMDN(16, 3, 2))
    assert "c.0.weight (16, 32, 1, 1) instead of (16, 48, 1, 1)" in str(caught.value)
    state["IMDB1.c9.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 unknown \(IMDB1\.c9\.weight\)"):
        load_published(state)


def test_failed_loading_leaves_the_network_as_it_was() -> None:
    net = seeded(IMDN(16, 2, 2), seed=1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = dict(seeded(IMDN(16, 2, 2), seed=2).state_dict())
    del bad["c.0.bias"]
    with pytest.raises(CheckpointError):
        load_published(bad, net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"head.0.weight": torch.zeros(4, 3, 3, 3)}, "of no IMDN network"),
        ({"upsampler.0.weight": torch.zeros(11, 4, 3, 3)}, "tail of 11 channels"),
        ({"state_dict": {}}, "no state dict"),
        ({"a": 3}, "'a' is a int"),
    ],
)
def test_foreign_weights_are_refused(state, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_published(state)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        load_published(tmp_path / "absent.pth")
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"bad{suffix}"
        file.write_text(json.dumps({"no": "weights"}))
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            load_published(file)
