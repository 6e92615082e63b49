from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stillhouse.batch import Splits
from stillhouse.data import open_data
from stillhouse.data.image_files import decode_image
from stillhouse.errors import DataError, ModelError
from stillhouse.launch import open_job
from stillhouse.metrics.super_resolution import compare
from stillhouse.models.bicubic import Bicubic
from stillhouse.models.imdn import IMDN, IMDN_AS, IMDN_RTE
from stillhouse.parts.degrade import imresize
from stillhouse.parts.tiling import adaptive_crops
from stillhouse.recipe import load_recipe
from stillhouse.tasks import open_task
from stillhouse.tasks.super_resolution import RestorationNet, SuperResolution, SuperResolver


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = imresize(coarse, size=(max(2, height // 4), max(2, width // 4)))
    return imresize(small, size=(height, width))


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "hr"
    place.mkdir()
    for number, size in enumerate([(64, 56), (48, 72), (61, 50), (52, 52)]):
        Image.fromarray(picture(*size, seed=number)).save(place / f"{number}.png")
    return place


def task_of(folder: Path, **options: object) -> SuperResolution:
    given = {"images": str(folder), "patch": 32, "held_out": 1, "held_out_test": 2, **options}
    task = open_task("super-resolution", open_data("photographs", options=given))
    assert isinstance(task, SuperResolution)
    return task


# Nets for images of any size ---------------------------------------------------------------


def test_lists_of_images_are_restored_one_by_one() -> None:
    net = RestorationNet(Bicubic(2)).eval()
    images = [tensor(picture(20, 31)), tensor(picture(17, 12))]
    made = net(images)["image"]
    assert [tuple(m.shape) for m in made] == [(3, 40, 62), (3, 34, 24)]
    assert torch.equal(made[1], Bicubic(2)(images[1][None])[0])


def test_sides_that_do_not_fit_go_through_adaptive_cropping_when_judged() -> None:
    torch.manual_seed(0)
    module = IMDN_AS(8, 1)
    net = RestorationNet(module).eval()
    image = tensor(picture(67, 81))[None]
    with torch.no_grad():
        made = net(image)["image"]
        assert torch.equal(made, adaptive_crops(module, image))
        whole = tensor(picture(64, 80))[None]
        assert torch.equal(net(whole)["image"], module(whole))
    net.train()
    with pytest.raises(ModelError, match="divisible by 4"):
        net(image)


def test_networks_that_enlarge_are_padded() -> None:
    net = RestorationNet(IMDN_RTE()).eval()
    with torch.no_grad():
        assert net(tensor(picture(21, 33))[None])["image"].shape == (1, 3, 42, 66)


def test_taps_still_work_on_patches() -> None:
    net = RestorationNet(IMDN(8, 2, 2), taps={"low": "IMDB1"})
    out = net(torch.rand(2, 3, 8, 8))
    assert out["image"].shape == (2, 3, 16, 16)
    assert out["taps"]["low"].shape == (2, 8, 8, 8)


# The task ----------------------------------------------------------------------------------


def test_loss_is_the_mean_absolute_error() -> None:
    task = SuperResolution.__new__(SuperResolution)
    out = {"image": torch.full((2, 3, 4, 4), 0.25)}
    target = torch.zeros(2, 3, 4, 4)
    target[0] = 1.0
    loss = SuperResolution.loss(task, out, {"target": target})
    assert float(loss["task"]) == pytest.approx((0.75 + 0.25) / 2)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (IMDN(8, 1, 3), r"makes \(1, 3, 48, 48\) of \(1, 3, 16, 16\).*wants \(1, 3, 32, 32\)"),
        (nn.Linear(5, 5), r"cannot read images of shape \(1, 3, 16, 16\)"),
        (IMDN(8, 1, 2, colours=1), "cannot enlarge by 2"),
    ],
)
def test_networks_that_do_not_fit_are_refused(folder: Path, module: nn.Module, words: str) -> None:
    task = task_of(folder)
    with pytest.raises(ModelError, match=words):
        task.check(task.net(module), None)
    with pytest.raises(ModelError, match="teacher"):
        task.check(None, task.net(module))


def test_fitting_networks_pass_and_keep_their_mode(folder: Path) -> None:
    task = task_of(folder)
    net = task.net(IMDN(8, 1, 2))
    task.check(net, None)
    assert net.training
    assert task.example_view().shape == (1, 3, 16, 16)


def test_example_is_a_patch_also_where_there_are_only_whole_images(folder: Path) -> None:
    splits = task_of(folder, patch=32, held_out_test=3, held_out=0).splits
    alone = Splits({"test": splits.judging()["test"]}, "whole", splits.about)
    task = SuperResolution(alone)
    assert max(task.example_view().shape[2:]) <= 32
    task.check(task.net(IMDN(8, 1, 2)), None)
    with pytest.raises(ModelError, match="give network and data the same scale"):
        task.check(task.net(IMDN(8, 1, 3)), None)


def judged(folder: Path, module: nn.Module, tmp_path: Path, split: str) -> dict[str, float]:
    options = {"images": str(folder), "patch": 32, "held_out": 1, "held_out_test": 2}
    recipe = load_recipe(
        {
            "method": "bicubic",
            "task": "super-resolution",
            "data": {"name": "photographs", "options": options},
            "budget": {"steps": 1},
        }
    )
    job = open_job(recipe, tmp_path / "run").judging()
    return job.task.judge(job, job.task.net(module), split)


def test_judging_is_the_mean_over_whole_images(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = IMDN(8, 1, 2).eval()
    figures = judged(folder, module, tmp_path, "test")
    test = task_of(folder).splits.judging()["test"]
    expected = []
    with torch.no_grad():
        for index in range(2):
            sample = test[index, None]
            sr = module(sample["x"][None])[0]
            up = Bicubic(2)(sample["x"])
            own = compare(sr, sample["target"], 2)
            own["psnr_y_8bit"] = compare(sr, sample["target"], 2, quantize_y=True)["psnr_y"]
            own["gain_y"] = own["psnr_y"] - compare(up, sample["target"], 2)["psnr_y"]
            expected.append(own)
    assert set(figures) == set(expected[0])
    for name, value in figures.items():
        assert value == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-4)


def test_bicubic_gains_nothing_on_itself(folder: Path, tmp_path: Path) -> None:
    figures = judged(folder, Bicubic(2), tmp_path, "val")
    assert figures["gain_y"] == 0.0
    assert figures["psnr_y"] > 20


def test_details_show_strips_and_figures(folder: Path, tmp_path: Path) -> None:
    options = {"images": str(folder), "patch": 32, "held_out_test": 3}
    recipe = load_recipe(
        {
            "method": "bicubic",
            "data": {"name": "photographs", "options": options},
            "budget": {"steps": 1},
        }
    )
    job = open_job(recipe, tmp_path / "run").judging()
    artifact = job.model_artifact(job.task.net(Bicubic(2)))
    found = job.task.details(job, artifact, None)
    assert len(found["tables"][0]["rows"]) == 3
    assert all(row[1] == row[2] for row in found["tables"][0]["rows"])
    shown = Image.open(io.BytesIO(base64.b64decode(found["images"][0]["png_base64"])))
    height, width = job.splits["test"][0, None]["target"].shape[1:]
    assert shown.size == (4 * width, height)


# The predictor -----------------------------------------------------------------------------


def resolver(**settings: object) -> SuperResolver:
    torch.manual_seed(0)
    told = {"scale": 2, "factor": 2.0, "enlarge": False, **settings}
    return SuperResolver(RestorationNet(IMDN(8, 1, 2)), told)


def test_predicts_any_kind_of_image_alike() -> None:
    predictor = resolver()
    pixels = picture(19, 23)
    kinds = [
        pixels,
        tensor(pixels),
        torch.from_numpy(np.array(pixels)).permute(2, 0, 1),
        Image.fromarray(pixels),
    ]
    first, *others = predictor.predict(kinds)
    assert first.shape == (3, 38, 46)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert all(torch.equal(first, other) for other in others)
    grey = pixels[:, :, 0]
    (made,) = predictor.predict([grey])
    assert torch.equal(made, predictor.predict([np.repeat(grey[:, :, None], 3, 2)])[0])


def test_tiles_change_little_and_bound_the_input() -> None:
    predictor = resolver()
    pixels = picture(70, 90)
    (whole,) = predictor.predict([pixels], tile=0)
    seen = []
    hook = predictor.module.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[-2:])
    )
    (parts,) = predictor.predict([pixels], tile="40", overlap="8")
    hook.remove()
    assert parts.shape == whole.shape
    assert max(max(shape) for shape in seen) <= 40
    # Only the attention's statistics differ between a tile and the whole.
    assert float((parts - whole).abs().mean()) < 0.02


@pytest.mark.parametrize(("height", "width"), [(101, 97), (33, 50), (64, 64)])
def test_any_scale_network_takes_any_size_and_factor(height: int, width: int) -> None:
    told = {"scale": 1, "factor": 1.0, "enlarge": True}
    predictor = SuperResolver(RestorationNet(IMDN_AS(8, 1)), told)
    pixels = picture(height, width)
    assert predictor.predict([pixels])[0].shape == (3, height, width)
    sizes = (round(height * 1.7), round(width * 1.7))
    assert predictor.predict([pixels], factor="1.7")[0].shape == (3, *sizes)
    assert predictor.predict([pixels], size="111x90")[0].shape == (3, 111, 90)


def test_infers_a_folder_into_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "more").mkdir(parents=True)
    Image.fromarray(picture(20, 24)).save(source / "a.jpg", quality=95)
    Image.fromarray(picture(15, 17)[:, :, 0]).save(source / "more" / "b.png")
    predictor = resolver()
    told = predictor.infer([source], tmp_path / "out", {})
    assert told["inputs"] == 2
    made = decode_image(tmp_path / "out" / "a.png")
    assert made.shape == (40, 48, 3)
    expected = predictor.predict([decode_image(source / "a.jpg")])[0]
    np.testing.assert_array_equal(made, (expected * 255).round().permute(1, 2, 0).numpy())
    assert decode_image(tmp_path / "out" / "more" / "b.png").shape == (30, 34, 3)


def test_infers_one_file_into_one_file(tmp_path: Path) -> None:
    Image.fromarray(picture(9, 8)).save(tmp_path / "a.png")
    resolver().infer([tmp_path / "a.png"], tmp_path / "b.png", {})
    assert decode_image(tmp_path / "b.png").shape == (18, 16, 3)


def test_bad_inputs_and_options_are_told(tmp_path: Path) -> None:
    predictor = resolver()
    with pytest.raises(DataError, match="for networks whose input is enlarged first"):
        predictor.predict([picture(9, 9)], factor=3)
    with pytest.raises(DataError, match="'tile' must be a whole number, not 'big'"):
        predictor.predict([picture(9, 9)], tile="big")
    with pytest.raises(DataError, match="more than 64"):
        predictor.predict([picture(90, 90)], tile=40)
    with pytest.raises(DataError, match=r"\(2, 9, 9\)"):
        predictor.predict([torch.zeros(2, 9, 9)])
    with pytest.raises(DataError, match="float64"):
        predictor.predict([np.zeros((9, 9, 3))])
    enlarging = SuperResolver(RestorationNet(IMDN_AS(8, 1)), {"enlarge": True})
    with pytest.raises(DataError, match="either 'factor' or 'size'"):
        enlarging.predict([picture(9, 9)], factor=2, size="9x9")
    with pytest.raises(DataError, match="HEIGHTxWIDTH, not '9'"):
        enlarging.predict([picture(9, 9)], size="9")
    with pytest.raises(DataError, match="between 1 and 64"):
        enlarging.predict([picture(9, 9)], factor=0.5)

    for name in ("a.jpg", "a.png", "c.png"):
        Image.fromarray(picture(9, 8)).save(tmp_path / name)
    with pytest.raises(DataError, match=r"would both become .*a\.png"):
        predictor.infer([tmp_path], tmp_path / "out", {})
    with pytest.raises(DataError, match="2 images do not fit in one file"):
        predictor.infer([tmp_path / "a.png", tmp_path / "c.png"], tmp_path / "o.png", {})
    with pytest.raises(DataError, match="say where the images go"):
        predictor.infer([tmp_path], None, {})
    with pytest.raises(DataError, match="does not exist"):
        predictor.infer([tmp_path / "absent"], tmp_path / "out", {})
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
        predictor.infer([tmp_path / "bad.png"], tmp_path / "out", {})
