from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.spatial import (
    class_edges,
    kl_pixels,
    kl_space,
    mean_of_rows,
    ohem,
    pixel_cross_entropy,
    resized_to,
    soft_trimap,
)

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def halves() -> torch.Tensor:
    """(1, 4, 4): the left half class 0, the right half class 1."""
    return torch.tensor([[[0, 0, 1, 1]] * 4])


def case_of(golden, slug, name):
    return {k: torch.from_numpy(v) for k, v in golden(slug).case(name).items()}


# ------------------------------------------------------------------------------ the mask
def test_the_border_of_two_halves():
    edges = class_edges(halves(), 2, 1)
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(1, 2, 4, 4)
    assert torch.equal(edges, expected)
    mask, valid = soft_trimap(halves(), 2, (2, 2), radius=1)
    assert torch.equal(mask, torch.full((1, 2, 2, 2), 0.5))
    assert torch.equal(valid, torch.ones(1, 1, 2, 2))


def test_the_band_lies_on_both_sides_and_is_2r_wide():
    labels = torch.zeros(1, 9, 40, dtype=torch.long)
    labels[..., 20:] = 1
    for radius in (0, 1, 3, 7):
        edges = class_edges(labels, 2, radius)
        assert edges[0, 0, 4].sum() == 2 * radius
        assert edges[0, 0, 4, 20 - radius : 20 + radius].sum() == 2 * radius


def test_image_borders_are_no_edges_and_uniform_images_have_none():
    assert class_edges(torch.full((2, 7, 5), 3), 4, 3).sum() == 0
    edges = class_edges(halves(), 2, 1)
    assert edges[..., 0].sum() == 0
    assert edges[..., -1].sum() == 0


def test_masks_are_per_class():
    labels = torch.zeros(1, 12, 30, dtype=torch.long)
    labels[..., 10:20], labels[..., 20:] = 1, 2
    edges = class_edges(labels, 3, 2)
    first, second = edges[0, 0, 6], edges[0, 2, 6]
    assert first[8:12].all()
    assert second[8:12].sum() == 0  # the border of 0 and 1 is none of class 2
    assert edges[0, 1, 6, [9, 10, 19, 20]].all()


def test_a_wide_radius_covers_everything_of_present_classes():
    mask, _ = soft_trimap(halves(), 3, (2, 2), radius=9)
    assert torch.equal(mask[:, :2], torch.ones(1, 2, 2, 2))
    assert mask[:, 2].sum() == 0


def test_ignored_pixels_are_no_edge_and_what_they_cut_off_may_be_left_out():
    labels = torch.zeros(1, 6, 10, dtype=torch.long)
    labels[..., 6:] = 255
    edges = class_edges(labels, 2, 2)
    assert edges[..., 6:].sum() == 0
    assert edges[0, 0, :, 4:6].all()  # the inner band stays, as in the port
    assert class_edges(labels, 2, 2, erase_ignored_band=True).sum() == 0
    labels[..., :2] = 1  # a true border is kept
    kept = class_edges(labels, 2, 1, erase_ignored_band=True)
    assert kept[0, 0, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_every_kind_of_whole_number_is_a_label():
    expected = class_edges(halves(), 2, 1)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(class_edges(halves().to(kind), 2, 1), expected)


def test_label_maps_that_cannot_be_are_told():
    with pytest.raises(ModelError, match="holds the class 7; there are 2 classes"):
        class_edges(torch.full((1, 4, 4), 7), 2, 1)
    with pytest.raises(ModelError, match=r"must be \(B, H, W\), got \(4, 4\)"):
        class_edges(halves()[0], 2, 1)
    with pytest.raises(RecipeError, match="at least 0, not -1"):
        class_edges(halves(), 2, -1)


# ------------------------------------------------------------------- distributions on maps
def test_channel_and_pixel_divergences_of_the_references(golden):
    case = case_of(golden, "bpkd", "baselines")
    pair, tau = (case["z_student"], case["z_teacher"]), float(case["tau"])
    torch.testing.assert_close(
        kl_space(*pair, temperature=tau), case["cwd_per_sample_mean"], **EXACT
    )
    torch.testing.assert_close(kl_pixels(*pair, temperature=tau), case["pixel_kd_mean"], **EXACT)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("cwd_channel", kl_space), ("cwd_channel_T1", kl_space), ("cwd_spatial", kl_pixels)],
)
def test_the_released_criterion_of_transkd(golden, name, loss):
    maps, case = case_of(golden, "transkd", "cwd"), case_of(golden, "transkd", name)
    student = maps["fs"].requires_grad_()
    found = loss(student, maps["ft"], temperature=float(case["tau"]))
    found.backward()
    torch.testing.assert_close(found.detach(), case["loss"], **EXACT)
    torch.testing.assert_close(student.grad, case["g"], **EXACT)


def test_equal_maps_are_at_distance_0_and_constants_do_not_count():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    other = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert kl_space(maps, maps) == 0
    assert kl_pixels(maps, maps) == 0
    per_channel, per_pixel = torch.randn(2, 3, 1, 1), torch.randn(2, 1, 4, 5)
    torch.testing.assert_close(kl_space(maps + per_channel, other), kl_space(maps, other))
    torch.testing.assert_close(kl_pixels(maps + per_pixel, other), kl_pixels(maps, other))
    assert kl_space(maps + per_pixel, other) != kl_space(maps, other)


def test_weights_of_positions_are_those_of_a_mean():
    maps, other = torch.randn(2, 2, 3, 4, 5).double()
    mask = torch.zeros(2, 4, 5)
    mask[0, 1, 2], mask[1, 3, 0] = 1.0, 3.0
    each = kl_pixels(maps, other, reduction="none")
    expected = (each[0, 1, 2] + 3 * each[1, 3, 0]) / 4
    torch.testing.assert_close(kl_pixels(maps, other, mask=mask), expected)


def test_maps_of_other_shapes_are_told():
    with pytest.raises(ModelError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\)"):
        kl_space(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


def test_resizing_is_bilinear_without_aligned_corners():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    assert resized_to(ramp, (2, 4)) is ramp
    assert resized_to(ramp, (2, 8))[0, 0, 0, :3].tolist() == [0.0, 0.25, 0.75]


# ------------------------------------------------------------------------- supervision
def test_hard_pixels_of_the_reference(golden):
    case = case_of(golden, "p2seg", "ohem")
    logits = case["logits"].requires_grad_()
    losses = pixel_cross_entropy(logits, case["labels"])
    found = ohem(losses, share=0.2)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(case["loss"]), abs=1e-6)
    torch.testing.assert_close(logits.grad, case["g"], rtol=0, atol=1e-6)


def test_the_hardest_share():
    assert ohem(torch.arange(1.0, 11.0), share=0.2) == 9.5
    assert ohem(torch.arange(1.0, 11.0), share=1.0) == 5.5
    assert ohem(torch.tensor([3.0, 1.0]), share=0.01) == 3.0
    with pytest.raises(RecipeError, match=r"\(0, 1\], not 0"):
        ohem(torch.ones(3), share=0.0)


def test_cross_entropy_is_taken_at_the_labels_size_and_ignores():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 8, 10))
    labels[:, :2] = 255
    found = pixel_cross_entropy(logits.requires_grad_(), labels)
    assert found.shape == (2, 8, 10)
    assert found[:, :2].abs().sum() == 0
    large = resized_to(logits, (8, 10))
    expected = torch.nn.functional.cross_entropy(large, labels, ignore_index=255)
    torch.testing.assert_close(found.sum() / (labels != 255).sum(), expected)
    with pytest.raises(ModelError, match=r"\(B, C, h, w\) and \(B, H, W\) are needed"):
        pixel_cross_entropy(logits, labels[0])


def test_rows_without_a_teacher_count_as_0():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    found = mean_of_rows(values, torch.tensor([True, False, True]))
    found.backward()
    assert found == 4 / 3
    assert values.grad.tolist() == pytest.approx([1 / 3, 0, 1 / 3])


@pytest.mark.parametrize("classes", [2, 61, 62, 63, 150])
def test_edges_are_dilation_minus_erosion_for_any_number_of_classes(classes):
    rng = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (2, 5, 6), generator=rng)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(3, 2)
    labels[torch.rand(labels.shape, generator=rng) < 0.1] = 255
    valid = (labels != 255).unsqueeze(1)
    region = ((labels.unsqueeze(1) == torch.arange(classes).view(1, -1, 1, 1)) & valid).float()
    for radius in (1, 3, 8):
        for erase in (False, True):
            outside = (1 - region) * (valid if erase else 1)
            dilated, hollow = (
                torch.nn.functional.max_pool2d(m, 2 * radius + 1, 1, radius)
                for m in (region, outside)
            )
            expected = (dilated - (1 - hollow)) * valid
            found = class_edges(labels, classes, radius, erase_ignored_band=erase)
            assert torch.equal(found, expected)
