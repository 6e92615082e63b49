from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import TrainingError
from stillhouse.losses.distributions import dm
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.parts.augment import DSA
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.net_pool import NetPool
from stillhouse.parts.pixel_matching import PixelMatching
from stillhouse.teacher import Knowledge

REAL = torch.randn(3, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
    own = REAL[label][: 9 - 2 * label]  # classes differ in size
    return own[torch.randperm(len(own), generator=generator)[:count]]


class Means(PixelMatching):
    def distances(self, synthetic, real, synthetic_counts, real_counts):
        counts = {"synthetic_counts": synthetic_counts, "real_counts": real_counts}
        self.seen = counts
        return {"mmd": dm(synthetic["taps"]["embed"], real["taps"]["embed"], **counts)}


def matching(norm: str = "instance", counts=(2, 2, 2), **settings) -> Means:
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    images = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    start = DistilledSet(images, labels, ("a", "b", "c"))

    def make() -> Net:
        net = ConvNet(3, 3, 8, width=4, depth=2, norm=norm)
        return Net(net, taps=net.taps)

    given = {"batch_real": 8, "augment": DSA("color_crop_cutout", siamese=True)} | settings
    return Means(start, NetPool(make), draw, batch_statistics=norm == "batch", **given)


def batch(*labels: int) -> Batch:
    return Batch(id=torch.tensor(labels or (0, 1, 2)))


def gradient(objective: Means, rows: Batch, step: int = 0) -> torch.Tensor:
    objective.scratch = {}
    objective.pixels.grad = None
    terms = objective(rows, Knowledge.none, Clock(step=step))
    sum(terms.values()).backward()
    return objective.pixels.grad


def test_class_chunks_give_the_gradient_of_the_whole():
    whole = gradient(matching(class_chunk=0), batch())
    for chunk in (1, 2):
        torch.testing.assert_close(
            gradient(matching(class_chunk=chunk), batch()), whole, rtol=1e-6, atol=1e-7
        )


def test_some_classes_weigh_as_their_share_of_all():
    whole = gradient(matching(), batch())
    parts = gradient(matching(), batch(0)) / 3 + gradient(matching(), batch(2, 1)) * 2 / 3
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


def test_small_classes_give_all_they_have_and_unequal_sets_pass():
    objective = matching(class_chunk=0, counts=(1, 3, 2))
    gradient(objective, batch())
    assert objective.seen == {"synthetic_counts": [1, 3, 2], "real_counts": [8, 7, 5]}


def test_forward_is_a_function_of_the_clock_and_changes_no_state():
    objective = matching()
    state = objective.pixels.detach().clone()
    before = torch.get_rng_state()
    first = objective(batch(), Knowledge.none, Clock(step=3))["mmd"]
    objective.scratch = {}
    again = objective(batch(), Knowledge.none, Clock(step=3))["mmd"]
    objective.scratch = {}
    other = objective(batch(), Knowledge.none, Clock(step=4))["mmd"]
    assert first == again
    assert first != other
    assert torch.equal(objective.pixels, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_pixels_are_parameters_and_networks_get_no_gradient():
    objective = matching()
    assert [name for name, _ in objective.named_parameters()] == ["pixels"]
    assert list(objective.state_dict()) == ["pixels"]
    gradient(objective, batch())
    net = objective.scratch["net"]
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert objective.start.images is not objective.pixels
    assert not torch.equal(objective.pixels.grad, torch.zeros_like(objective.pixels))


def test_networks_with_batch_statistics_see_all_classes_at_once():
    objective = matching("batch", class_chunk=1)
    assert objective.batchwide
    gradient(objective, batch())
    assert len(objective.seen["real_counts"]) == 3
    with pytest.raises(TrainingError, match="all 3 classes"):
        objective(batch(0, 1), Knowledge.none, Clock())


def test_the_set_that_comes_out_holds_the_present_pixels():
    objective = matching()
    with torch.no_grad():
        objective.pixels.add_(1.0)
    objective.after_step(Clock(step=6))
    made = objective.distilled()
    assert torch.equal(made.images, objective.pixels)
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert objective.steps_done == 7
    assert objective.notes["pixel_max"] == objective.pixels.max()
