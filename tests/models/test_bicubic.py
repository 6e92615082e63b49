from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.bicubic import Bicubic, bicubic


def test_enlarges_as_the_reference_does(golden) -> None:
    case = golden("imdn").case("bicubic_up")
    image = torch.from_numpy(case["lr"]).permute(2, 0, 1)[None].double() / 255
    made = bicubic(int(case["scale"]))(image)[0].permute(1, 2, 0) * 255
    np.testing.assert_allclose(made, case["up"], atol=1e-9)


def test_scale_one_changes_nothing_and_none_is_refused() -> None:
    image = torch.rand(1, 3, 5, 4)
    assert Bicubic(1)(image) is image
    with pytest.raises(ModelError, match="at least 1"):
        Bicubic(0)


def test_works_again_after_inference_mode() -> None:
    image = torch.rand(1, 3, 13, 11)
    with torch.inference_mode():
        Bicubic(3)(image)
    wanted = image.clone().requires_grad_()
    Bicubic(3)(wanted).sum().backward()
    assert torch.isfinite(wanted.grad).all()
