"""NCFM against the released code, and what its paper says that can be checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from stillhouse import catalogue
from stillhouse.batch import Batch, ByClass
from stillhouse.clock import Clock, Views
from stillhouse.engine.loop import Stage
from stillhouse.errors import CheckpointError, DataError, Interrupted, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.distributions import cf_distance, dm
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.methods.datasets import ncfm
from stillhouse.methods.datasets.ncfm import CharacteristicMatching, SampleNet, relabelled
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.distilled_set import Decode, DistilledSet, MeanStd
from stillhouse.parts.mosaic import mosaic
from stillhouse.parts.net_pool import NetPool
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.set_distillation import distilled_of
from stillhouse.teacher import Knowledge

NCFM: Any = catalogue.load("ncfm")
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def tensors(case) -> dict[str, torch.Tensor]:
    """A case in float64, integers as they are."""
    found = {k: torch.from_numpy(v) for k, v in case.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def convnet_of(case, channels: int, size: int) -> ConvNet:
    """The released ConvNet's weights, which stand by kind, in ours, which stand by block."""
    weights, depth = {}, 0
    for key, value in case.items():
        if not key.startswith("w."):
            continue
        name = key[5:]
        if name.startswith("classifier"):
            weights[name] = value
            continue
        _, kind, block, what = name.split(".")
        depth = max(depth, int(block) + 1)
        weights[f"features.{4 * int(block) + (kind == 'norm')}.{what}"] = value
    width, classes = len(case["w.01.layers.conv.0.bias"]), len(weights["classifier.bias"])
    net = ConvNet(channels, classes, size, width=width, depth=depth).double()
    net.load_state_dict(weights)
    return net


class OnePool:
    """A pool of one network that serves as the blended and as the trained one."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.net = Net(module.requires_grad_(False), taps=module.taps)

    def __len__(self) -> int:
        return 1

    def blend(self, index: int, share: float) -> Net:
        return self.net

    def load(self, index: int) -> Net:
        return self.net


def objective_of(
    net, pixels, real, per_class, space=None, ipc=1, **settings
) -> CharacteristicMatching:
    """The objective on given raw pixels, real images by class, one network, no augmentation."""
    classes = len(pixels) // ipc
    start = DistilledSet(
        torch.zeros_like(pixels),
        torch.arange(classes).repeat_interleave(ipc),
        tuple(map(str, range(classes))),
        preprocessing=space,
    )
    given = {"ipc": ipc, "batch_real": per_class, "augment": "none", "factor": 1, **settings}
    config = NCFM.Config(**given)
    width = net.embed_width
    found = CharacteristicMatching(
        start, OnePool(net), lambda c, n, g: real[c][:n], config, widths=[width]
    )
    found.pixels.data = pixels.detach().clone()
    return found.to(pixels.dtype)


def stepped(
    objective: CharacteristicMatching, index: int, step: int = 0
) -> dict[str, torch.Tensor]:
    """The terms of step `index` of an iteration."""
    order = objective.order
    objective.scratch = {}
    clock = Clock(step=step, begins_epoch=index == 0, ends_epoch=index == len(order) - 1)
    batch = order.read(order.epoch(0, torch.Generator)[index], Views(0))
    objective.prepare(batch, clock)
    return objective(batch, Knowledge.none, clock)


def with_frequencies(objective, drawn):
    """Frequencies from a list in place of the clock's, one tensor per class."""
    objective.frequencies = lambda features, layer, label, clock: drawn[label].to(features)
    return objective


# ----------------------------------------------------------------------------- reference
def test_matching_through_a_network_is_the_released_loss(golden):
    case = tensors(golden("ncfm").case("match_loss"))
    size = case["syn"].shape[2]
    net = convnet_of(case, case["syn"].shape[1], size)
    torch.testing.assert_close(net.embedding(case["syn"]).detach(), case["feat_syn"], **CLOSE)
    torch.testing.assert_close(net(case["syn"]).detach(), case["logits_syn"], **CLOSE)
    count = len(case["syn"])
    objective = objective_of(net, case["syn"], [case["real"]], len(case["real"]), ipc=count)
    with_frequencies(objective, [case["t"]])
    terms = stepped(objective, 0)
    torch.testing.assert_close(terms["cf"].detach(), case["loss"], **CLOSE)
    terms["cf"].backward()
    torch.testing.assert_close(objective.pixels.grad, case["grad_syn"], **CLOSE)
    assert not any(p.grad is not None for p in net.parameters())


def test_calibration_is_the_released_loss(golden):
    case, net_case = tensors(golden("ncfm").case("calib_loss")), golden("ncfm").case("match_loss")
    shared = tensors(net_case)
    net = convnet_of(shared, shared["syn"].shape[1], shared["syn"].shape[2])
    labels, images = case["labels"], shared["syn"]
    classes = len(shared["logits_syn"][0])
    # A class's calibration is a mean over its images: each image is put in its own class.
    total, grad = 0.0, torch.zeros_like(images)
    for row, label in enumerate(labels.tolist()):
        pixels = images[row : row + 1].expand(classes, -1, -1, -1)
        objective = objective_of(net, pixels, [images] * classes, 1)
        term = stepped(objective, classes + label)["calibrate"]
        term.backward()
        total = total + term.detach() / len(labels)
        grad[row] = objective.pixels.grad[label] / len(labels)
    torch.testing.assert_close(total, case["loss"], **CLOSE)
    torch.testing.assert_close(grad, case["grad_syn"], **CLOSE)


@pytest.mark.parametrize("metric", ["mmd", "ncfm"])
def test_several_layers_are_summed_as_released(golden, metric):
    case = tensors(golden("ncfm").case(f"multilayer_{metric}"))
    syn = case["syn"].requires_grad_()

    settings = {"distance": "mean" if metric == "mmd" else "cf"}
    net = ConvNet(1, 2, 8, width=4, depth=1).double()
    objective = objective_of(net, torch.zeros(1, 1, 8, 8).double(), [syn], 1, **settings)
    objective.layers = ["first", "second"]
    drawn = {"first": case.get("t.0"), "second": case.get("t.1")}
    objective.frequencies = lambda features, layer, label, clock: drawn[layer]
    cut = {"first": slice(0, 5), "second": slice(3, 11)}
    sides = [{"taps": {k: x[:, s] for k, s in cut.items()}} for x in (syn, case["real"])]
    counts = ([len(syn)], [len(case["real"])])
    if metric == "ncfm":  # the stored widths say which columns a layer has
        first, second = case["t.0"].shape[1], case["t.1"].shape[1]
        cut = {"first": slice(0, first), "second": slice(3, 3 + second)}
        sides = [{"taps": {k: x[:, s] for k, s in cut.items()}} for x in (syn, case["real"])]
    term = objective.distances_of([0], *sides, *counts, Clock())["cf"]
    torch.testing.assert_close(term.detach(), case["loss"], **CLOSE)
    term.backward()
    torch.testing.assert_close(syn.grad, case["grad_syn"], **CLOSE)


def test_an_iteration_makes_the_released_steps(golden):
    case = tensors(golden("ncfm").case("per_class_steps"))
    before = case["images_before"]
    channels, size = before.shape[1], before.shape[2]
    space = MeanStd((0.5,) * channels, (0.25,) * channels)
    net = convnet_of(case, channels, size)
    real = [space.transform(images) for images in case["real"]]
    objective = objective_of(net, before, real, len(real[0]), space, factor=2)
    with_frequencies(objective, case["t"])
    optimizer = AdamW([objective.pixels], lr=0.01, weight_decay=5e-4)
    totals = {"cf": 0.0, "calibrate": 0.0}
    for index in range(len(objective.order)):
        terms = stepped(objective, index)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        for name, value in terms.items():
            totals[name] = totals[name] + value.detach()
        if index == objective.classes - 1:
            torch.testing.assert_close(
                objective.pixels.detach(), case["images_after_match"], rtol=0, atol=1e-8
            )
    torch.testing.assert_close(totals["cf"], case["match_total"], rtol=1e-8, atol=0)
    torch.testing.assert_close(totals["calibrate"], case["calib_total"], rtol=1e-8, atol=0)
    torch.testing.assert_close(
        objective.pixels.detach(), case["images_after_calib"], rtol=0, atol=1e-8
    )


def sampler_weights(case, prefix: str, suffix: str = "") -> dict[str, torch.Tensor]:
    """Released names `t_layers_list.i.x` as ours, `layers.i.x`."""
    found = {}
    for key, value in case.items():
        if key.startswith(prefix) and key.endswith(suffix or ("weight", "bias")):
            name = key[len(prefix) + 3 :].removesuffix(suffix)
            found[name.replace("t_layers_list", "layers")] = value.double()
    return found


@pytest.mark.parametrize("learns", [True, False])
def test_both_players_step_on_one_graph(golden, learns):
    """Corrected, the sampler climbs; as released, its gradients cancel and it stays."""
    stored = golden("ncfm")
    case, given = tensors(stored.case("minmax_step")), tensors(stored.case("per_class_steps"))
    before = given["images_before"]
    channels, size = before.shape[1], before.shape[2]
    space = MeanStd((0.5,) * channels, (0.25,) * channels)
    net = convnet_of(given, channels, size)
    real = [space.transform(images) for images in given["real"]]
    noise = case["noise"]
    objective = objective_of(
        net, before, real, len(real[0]), space, factor=2, sampling_net="repeat",
        num_freqs=ncfm.DRAWS * len(noise), sampler_learns=learns,
    )  # fmt: skip
    objective.sampler.load_state_dict(
        {**objective.sampler.state_dict(), **sampler_weights(case, "before.w.")}
    )
    objective.normal = lambda features, rows, clock, *stream: noise
    terms = stepped(objective, 0)
    torch.testing.assert_close(terms["cf"].detach(), case["loss"], rtol=1e-7, atol=0)
    pixels = SGD([objective.pixels], lr=0.05, momentum=0.5)
    sampler = SGD(objective.sampler.parameters(), lr=0.1, momentum=0.5)
    terms["cf"].backward()
    pixels.step(), sampler.step()
    torch.testing.assert_close(objective.pixels.detach(), case["images_after"], rtol=0, atol=1e-7)
    found = objective.sampler.state_dict()
    if learns:
        expected = sampler_weights(case, "after.w.", "_corrected")
    else:
        expected = sampler_weights(case, "before.w.")
        released = sampler_weights(case, "after.w.")
        assert all(torch.equal(expected[k], v) for k, v in released.items())
    assert len(expected) == 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)


def test_the_released_sampler_repeats_its_rows(golden):
    stored = golden("ncfm")
    case = tensors(stored.case("samplenet_repeat"))
    net = SampleNet(case["noise"].shape[1], "repeat").double()
    net.load_state_dict({**net.state_dict(), **sampler_weights(case, "w.")})
    found = net(case["noise"])
    torch.testing.assert_close(found.detach(), case["t"], **CLOSE)
    assert len(found.detach().round(decimals=9).unique(dim=0)) == int(case["n_distinct"])
    # The paper's reading of it, with the running statistics this pass has left.
    mixture = tensors(stored.case("samplenet_scale_mixture"))
    for name, value in mixture.items():
        if name.startswith("bn."):
            own = net.state_dict()[name[3:].replace("t_layers_list", "layers")]
            torch.testing.assert_close(own, value, **CLOSE)
    net.kind = "scale_mixture"
    net.eval()
    found = net(mixture["noise"], mixture["eps"]).detach()
    torch.testing.assert_close(found, mixture["t"], **CLOSE)
    draws = len(mixture["eps"]) // len(mixture["noise"])
    torch.testing.assert_close(
        found / mixture["eps"], mixture["scale"].repeat_interleave(draws, 0), rtol=1e-6, atol=1e-9
    )


def test_where_the_teacher_errs_the_label_stands(golden):
    case = tensors(golden("ncfm").case("soft_label"))
    logits, labels = case["teacher_logits"], case["labels"]
    for form in ("corrected", "official"):
        found = relabelled(logits, labels, form=form)
        torch.testing.assert_close(found.softmax(1), case[f"targets_{form}"], **CLOSE)
        loss = soft_cross_entropy(case["student_logits"], found, from_logits=True)
        torch.testing.assert_close(loss, case[f"loss_{form}"], **CLOSE)


# ----------------------------------------------------------------------------- properties
def small(seed: int = 0, classes: int = 3, ipc: int = 2, **settings):
    """Three classes of 8x8 in float64: two mosaics and five real images each."""
    torch.manual_seed(seed)
    net = ConvNet(3, classes, 8, width=4, depth=2).double()
    pixels = torch.rand(classes * ipc, 3, 8, 8).double()
    real = torch.randn(classes, 5, 3, 8, 8).double()
    space = MeanStd((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    given = {"factor": 2, "num_freqs": 32, **settings}
    return objective_of(net, pixels, real, 5, space, ipc, **given)


def test_networks_and_real_images_get_no_gradient():
    objective = small()
    real = torch.randn(3, 5, 3, 8, 8).double().requires_grad_()
    objective.draw_real = lambda c, n, g: real[c][:n]
    net = objective.pool.net
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for index in range(len(objective.order)):
        sum(stepped(objective, index).values()).backward()
    assert real.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert objective.pixels.grad.abs().sum() > 0


def test_a_step_moves_one_class_and_phases_follow_each_other():
    objective = small()
    assert [len(rows) for rows in objective.order.epoch(0, torch.Generator)] == [1] * 6
    names = []
    for index in range(6):
        objective.pixels.grad = None
        terms = stepped(objective, index)
        names += list(terms)
        sum(terms.values()).backward()
        moved = objective.pixels.grad.flatten(1).abs().sum(1) > 0
        assert moved.nonzero().flatten().tolist() == [2 * (index % 3), 2 * (index % 3) + 1]
    assert names == ["cf"] * 3 + ["calibrate"] * 3


def test_summed_is_the_sum_of_the_classes_and_chunks_change_nothing():
    expected = {"cf": 0.0, "calibrate": 0.0}
    one = small(sampling_net="scale_mixture", step="per_class", sampler_learns=True)
    one.sampler.eval()
    drawn = {c: torch.randn(32, one.pool.net.module.embed_width).double() for c in range(3)}
    for index in range(6):
        for name, value in stepped(with_frequencies(one, drawn), index).items():
            expected[name] = expected[name] + value.detach()
    grads = []
    for chunk in (0, 1, 2):
        whole = with_frequencies(small(step="summed", class_chunk=chunk), drawn)
        assert len(whole.order) == 2
        terms = {**stepped(whole, 0), **stepped(whole, 1)}
        for name, value in terms.items():
            torch.testing.assert_close(value.detach(), expected[name])
        sum(terms.values()).backward()
        grads.append(whole.pixels.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize("chunk", [0, 1])
def test_the_sampler_climbs_exactly_what_the_images_descend(chunk):
    """Its gradient is the negative of the loss's, in one graph, in chunks, and in its own turn."""
    settings = {"sampling_net": "scale_mixture", "step": "summed", "class_chunk": chunk}
    objective = small(**settings)
    stepped(objective, 0)["cf"].backward()
    plain = small(**settings, sampler_learns=True)
    plain.sampler.load_state_dict(objective.sampler.state_dict())
    plain.sampler.train()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ncfm.Reversed, "apply", staticmethod(lambda value: value))
        stepped(plain, 0)["cf"].backward()
    for (name, ours), theirs in zip(
        objective.sampler.named_parameters(), plain.sampler.parameters(), strict=True
    ):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, -theirs.grad)
    torch.testing.assert_close(objective.pixels.grad, plain.pixels.grad)

    turns = small(**settings, players="in_turn")
    assert turns.turns == ("sampler", "pixels")
    batch = turns.order.read(torch.arange(3), Views(0))
    loss = {}
    for turn in turns.turns:
        clock = Clock(turn=turn)
        turns.scratch = {}
        turns.prepare(batch, clock)
        loss.update(turns(batch, Knowledge.none, clock))
        if turn == "sampler":
            loss["adversary"].backward()
            for ours, theirs in zip(
                objective.sampler.parameters(), turns.sampler.parameters(), strict=True
            ):
                torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(loss["adversary"].detach(), -loss["cf"].detach())
    later = turns.order.read(torch.arange(3, 6), Views(0))
    assert turns(later, Knowledge.none, Clock(turn="sampler")) == {}


def test_identical_images_leave_the_floor_and_no_gradient():
    objective = small(factor=1)
    objective.draw_real = lambda c, n, g: objective.shown(
        objective.pixels[2 * c : 2 * c + 2]
    ).detach()
    term = stepped(objective, 0)["cf"]
    assert term.item() == pytest.approx(300 * (0.5e-12) ** 0.5, rel=1e-3)
    term.backward()
    assert torch.isfinite(objective.pixels.grad).all()


def test_both_sides_see_one_transform():
    settings = {"augment": "color_crop_cutout_flip_scale_rotate", "factor": 1, "ipc": 1}
    objective = small(**settings)
    objective.draw_real = lambda c, n, g: objective.shown(objective.pixels[c : c + 1]).detach()
    for step in range(5):
        assert stepped(objective, step % 3, step)["cf"].item() < 1e-3


def test_alpha_and_beta_are_settings_and_several_layers_sum():
    values = {
        name: stepped(small(**settings), 0)["cf"].item()
        for name, settings in {
            "half": {}, "phase": {"alpha": 0.001, "beta": 0.999}, "scaled": {"scale": 600.0},
            "mean": {"distance": "mean"}, "fewer": {"num_freqs": 16},
        }.items()
    }  # fmt: skip
    assert len(set(values.values())) == 5
    assert values["scaled"] == pytest.approx(2 * values["half"])
    objective = small(factor=1, distance="mean")
    net = objective.pool.net
    seen = [objective.shown(objective.pixels[:2]), objective.draw_real(0, 5, None)]
    ours, theirs = (net.module.embedding(x) for x in seen)
    expected = dm(ours, theirs, synthetic_counts=2, real_counts=5)
    torch.testing.assert_close(stepped(objective, 0)["cf"], expected)
    several = small(factor=1, distance="mean")
    several.layers = ["act0", "embed"]
    assert stepped(several, 0)["cf"] > expected


def test_pixels_are_clamped_when_an_iteration_begins():
    objective = small()
    objective.pixels.data.mul_(3.0).sub_(1.0)
    objective.before_step(Clock(begins_epoch=False))
    assert objective.pixels.max() > 1
    assert objective.distilled().pixels().max() <= 1
    objective.before_step(Clock(begins_epoch=True))
    assert objective.pixels.min() >= 0
    assert objective.pixels.max() <= 1


def test_the_set_that_is_kept_shows_what_was_optimised():
    """Stored in network-input space it decodes to the same training images, odd sides too."""
    torch.manual_seed(0)
    space = MeanStd((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    net = ConvNet(3, 2, 9, width=4, depth=1).double()
    pixels = torch.rand(2, 3, 9, 9).double()
    objective = objective_of(net, pixels, torch.zeros(2, 1, 3, 9, 9), 1, space, factor=2)
    kept = objective.distilled().replace(decode=Decode(2).normalised(space))
    shown = kept.training_images()[0].double()
    torch.testing.assert_close(shown, objective.shown(pixels), rtol=0, atol=1e-5)


def test_the_plateau_halves_the_rate_after_iterations_without_progress(tmp_path):
    job_recipe = load_recipe(
        example(settings={"plateau_patience": 1, "lr_img": 1e-12}, budget={"steps": 6})
    )
    job = open_job(job_recipe, tmp_path)
    method = open_method(job_recipe)
    seen = []
    inner = ncfm.Plateau.see

    def see(self, figure):
        inner(self, figure)
        seen.append((figure, float(self.scale)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ncfm.Plateau, "see", see)
        method.run(job)
    assert len(seen) == 6
    best, waited, scale = float("inf"), 0, 1.0
    for figure, found in seen:
        if figure < best * (1 - 1e-4):
            best, waited = figure, 0
        else:
            waited += 1
            if waited > 1:
                scale, waited = scale / 2, 0
        assert found == scale


def test_the_official_variants_are_the_released_settings():
    official = NCFM.Config(**NCFM.variants["official"].set)
    assert official.sampling_net == "off"
    assert (official.num_freqs, official.real_sampling) == (4096, "first")
    assert (official.alpha, official.beta, official.scale) == (0.5, 0.5, 300.0)
    assert (official.pool_nets, official.pool_epochs, official.batch_real) == (20, 60, 1024)
    assert official.protocol().told().startswith("2000 epochs (AdamW, learning rate 0.001")
    assert NCFM.variants["official"].budget["steps"] == 20000
    released = NCFM.Config(**NCFM.variants["official-sampler"].set)
    assert (released.sampling_net, released.num_freqs) == ("repeat", 64)
    assert not released.sampler_learns


# -------------------------------------------------------------------------------- runs
def example(**changes: Any) -> dict[str, Any]:
    found = NCFM.example(0)
    found["settings"] = {**found["settings"], **changes.pop("settings", {})}
    return {**found, "compare": [], **changes}


def made(folder, **changes: Any) -> DistilledSet:
    recipe = load_recipe(example(**changes))
    job = open_job(recipe, folder)
    try:
        return distilled_of(open_method(recipe).run(job))
    finally:
        job.log.close()


def test_networks_lie_between_start_and_end_and_change_by_iteration(tmp_path):
    recipe = load_recipe(example())
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    real = method.real_images(job)
    pool = method.pool(job, real)
    assert len(pool) == 2
    assert not same_weights(pool.blend(0, 1.0), pool.blend(0, 0.0))
    objective = method.matching(job, method.first_set(job, real), real, pool)
    seen = []
    for epoch in range(3):
        for step in range(2):
            clock = job.clock("x")
            clock.epoch, clock.step = epoch, 8 * epoch + step
            objective.prepare(Batch(id=torch.arange(1)), clock)
            seen.append((objective._nets["blend"], objective._nets["final"]))
    assert seen[0][0] is seen[1][0]
    assert not same_weights(seen[0][0], seen[2][0])
    ends = [pool.load(i) for i in range(2)]
    assert all(any(same_weights(final, end) for end in ends) for _, final in seen)
    assert not any(p.requires_grad for p in seen[0][0].parameters())
    for blend, share in (("start", 1.0), ("end", 0.0)):
        fixed = method.matching(job.child(blend), method_start(real), real, pool, blend=blend)
        fixed.prepare(Batch(id=torch.arange(1)), job.clock("x"))
        assert any(same_weights(fixed._nets["blend"], pool.blend(i, share)) for i in range(2))


def method_start(real) -> DistilledSet:
    images = torch.zeros(4, 3, 8, 8)
    return DistilledSet(images, torch.arange(4), tuple("abcd"), preprocessing=real.preprocessing)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_condensing_lowers_the_distance_from_unseen_images(tmp_path):
    found = made(
        tmp_path,
        settings={"lr_img": 0.02, "batch_real": 8, "init": "noise", "costs": []},
        budget={"steps": 40},
    )
    held = found.provenance["held_out"]
    assert held["end"] < 0.8 * held["start"]


@pytest.mark.parametrize("init", ["mix", "random", "noise"])
def test_every_initialisation_is_moved(init, tmp_path):
    settings = {"init": init, "costs": []}
    still = made(tmp_path / "a", settings={**settings, "lr_img": 1e-30, "weight_decay_img": 0.0})
    moved = made(tmp_path / "b", settings=settings)
    assert not torch.equal(still.images, moved.images)
    assert moved.training_count == 4 * len(moved)
    raw = moved.pixels()
    assert raw.min() >= 0
    assert raw.max() <= 1


def test_a_set_is_loaded_and_a_wrong_one_is_told(tmp_path):
    first = made(tmp_path / "a", settings={"costs": []})
    first.save(tmp_path / "set")
    settings = {"init": "load", "init_folder": str(tmp_path / "set"), "costs": []}
    still = {"lr_img": 1e-30, "weight_decay_img": 0.0}
    again = made(tmp_path / "b", settings={**settings, **still})
    torch.testing.assert_close(again.images, first.images, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="per class"):
        made(tmp_path / "c", settings={**settings, "ipc": 2})
    with pytest.raises(RecipeError, match="init_folder"):
        made(tmp_path / "d", settings={"init": "load"})


def test_the_released_loader_gives_the_first_images_of_a_class(tmp_path):
    still = {"lr_img": 1e-30, "weight_decay_img": 0.0, "costs": []}
    recipe = load_recipe(example(settings={"real_sampling": "first", **still}))
    job, method = open_job(recipe, tmp_path), open_method(recipe)
    real = method.real_images(job)
    start = method.first_set(job, real)
    for label, rows in enumerate(real.rows):
        torch.testing.assert_close(start.images[label], mosaic(real.take(rows[:4]), 2)[0])
    draw = method._drawer(real, "first")
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        assert torch.equal(draw(1, 3, rng), real.take(real.rows[1][:3]))
    drawn = [method._drawer(real, "random")(1, 3, torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert not torch.equal(*drawn)


SETTINGS = {
    "sampler": {"sampling_net": "scale_mixture"},
    "in turn": {"sampling_net": "scale_mixture", "players": "in_turn"},
    "official sampler": dict(NCFM.variants["official-sampler"].set),
    "summed": {"step": "summed", "sampling_net": "repeat"},
    "sgd, two calibrations": {"optimizer_img": "sgd", "iter_calib": 2},
    "no calibration": {"calib_weight": 0.0},
    "means": {"distance": "mean", "layers": ["act0", "embed"]},
    "multi": {"decode_type": "multi"},
    "bound": {"decode_type": "bound", "decode_bound": 6, "ipc": 2},
    "soft labels": {"soft_labels": True, "hard_last": 1},
    "other judge": {"judge_protocol": "dc", "judge_lr": 0.01},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_runs_and_is_judged(name, tmp_path):
    recipe = load_recipe(example(settings={**SETTINGS[name], "costs": []}))
    result = run(recipe, folder=tmp_path, progress=False)
    figures = result.sides["distilled"]["0"]
    assert {"accuracy", "random_real", "random_mosaic", "lrs", "full_data"} <= set(figures)
    found = distilled_of(open_artifact(tmp_path))
    assert torch.isfinite(found.images).all()
    if name == "soft labels":
        assert len(found.label_logits) == found.training_count == 16
        assert "accuracy_hard" in figures
    if name == "bound":
        # Two images of a class, room for six: one is cut in four, one stays whole.
        assert found.decode.sources(2).tolist() == [0, 0, 0, 0, 1]


def test_the_sampler_moves_only_when_it_learns(tmp_path):
    for learns in (True, False):
        settings = {"sampling_net": "scale_mixture", "sampler_learns": learns, "costs": []}
        recipe = load_recipe(example(settings={**settings, "sampler_lr": 0.1}))
        job, method = open_job(recipe, tmp_path / str(learns)), open_method(recipe)
        kept = []
        inner = method.matching

        def matching(*given, kept=kept, inner=inner, **changes):
            objective = inner(*given, **changes)
            kept.append(
                (objective, {k: v.clone() for k, v in objective.sampler.state_dict().items()})
            )
            return objective

        method.matching = matching
        method.run(job)
        objective, before = kept[0]
        after = objective.sampler.state_dict()
        weights = ["layers.0.weight", "layers.3.weight", "layers.6.weight"]
        assert all(torch.equal(before[k], after[k]) != learns for k in weights)
        assert not torch.equal(before["layers.1.running_mean"], after["layers.1.running_mean"])


@pytest.mark.parametrize("settings", [SETTINGS["sampler"], SETTINGS["in turn"]])
def test_stopped_in_the_middle_of_an_iteration_it_ends_the_same(settings, tmp_path, monkeypatch):
    """Sampler, its momentum and running statistics, the plateau and the networks go on."""
    changes = {"settings": {**settings, "plateau_patience": 0, "costs": [], "lr_img": 0.01}}
    changes["budget"] = {"steps": 4}
    whole = made(tmp_path / "whole", **changes)
    due, calls = Stage.due, {"n": 0}

    def ask(self, now):
        if self.name == "match":
            calls["n"] += 1
            if calls["n"] in (5, 19):
                self.stop.asked = 15
        return due(self, now)

    monkeypatch.setattr(Stage, "due", ask)
    stops = 0
    for _ in range(3):
        try:
            found = made(tmp_path / "cut", **changes)
        except Interrupted:
            stops += 1
    assert stops == 2
    assert torch.equal(found.images, whole.images)


def test_the_report_tells_costs_and_the_distance(tmp_path):
    settings = {"costs": ["iteration", "released"]}
    result = run(load_recipe(example(settings=settings)), folder=tmp_path, progress=False)
    figures = result.sides["distilled"]["0"]
    assert figures["iteration_mb"] > 0
    assert figures["released_mb"] > figures["iteration_mb"]
    assert figures["iteration_seconds"] > 0
    text = (tmp_path / "report.html").read_text()
    assert "What an iteration costs" in text
    assert "Distance from unseen real images" in text
    assert "AdamW, learning rate 0.001" in text


def test_the_pool_is_shared_between_runs_and_may_be_given(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    settings = {"costs": []}
    recipe = load_recipe(example(settings=settings))
    job, method = open_job(recipe, tmp_path / "a"), open_method(recipe)
    pool = method.pool(job, method.real_images(job))
    lines = []
    other = load_recipe(example(settings={**settings, "alpha": 0.9}))
    job = open_job(other, tmp_path / "b")
    open_method(other).run(job)
    job.log.close()
    lines = [json.loads(x) for x in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    states = {x["stage"]: x["state"] for x in lines if x["event"] == "stage"}
    assert states["pool/0/phase-0"] == states["pool/1/phase-0"] == "reloaded"

    files = []
    for number in range(2):
        pair = []
        for what, net in (("start", pool.blend(number, 1.0)), ("end", pool.load(number))):
            path = tmp_path / f"{what}{number}.safetensors"
            save_file({k: v.contiguous() for k, v in net.module.state_dict().items()}, path)
            pair.append(str(path))
        files.append(pair)
    given = made(tmp_path / "c", settings={**settings, "pool_files": files})
    trained = made(tmp_path / "d", settings=settings)
    assert torch.equal(given.images, trained.images)
    narrow = {"model": "stillhouse:convnet", "options": {"width": 5, "depth": 2}}
    with pytest.raises(CheckpointError, match="does not fit"):
        made(tmp_path / "e", student=narrow, settings={**settings, "pool_files": files})
    missing = [[str(tmp_path / "missing.safetensors")] * 2]
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        made(tmp_path / "f", settings={**settings, "pool_files": missing})


def test_bad_settings_are_told_before_anything_runs(tmp_path):
    for settings, told in (
        ({"alpha": -1.0}, "alpha"),
        ({"sampling_net": "on"}, "sampling_net"),
        ({"augment": "color_crop_cutoff"}, "cutout"),
    ):
        with pytest.raises(RecipeError, match=told):
            open_method(load_recipe(example(settings=settings)))
    with pytest.raises(RecipeError, match=r"multiple of 16"):
        made(tmp_path / "a", settings={"sampling_net": "repeat", "num_freqs": 40})
    with pytest.raises(RecipeError, match="one layer"):
        made(tmp_path / "b", settings={"sampling_net": "repeat", "layers": ["act0", "embed"]})
    with pytest.raises(RecipeError, match="no tap 'act7'"):
        made(tmp_path / "c", settings={"layers": ["act7"]})
    with pytest.raises(DataError, match="real images; 40 per class"):
        made(tmp_path / "d", settings={"ipc": 10})
    with pytest.raises(DataError, match="whitened"):
        made(tmp_path / "e", settings={"space": "zca"})
    with pytest.raises(RecipeError, match=r"budget\.ema"):
        made(tmp_path / "f", budget={"steps": 2, "ema": 0.9})


def hugging_face_resnet(classes: int = 4) -> torch.nn.Module:
    """A tiny random Hugging Face image classifier."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
        layer_type="basic", num_labels=classes,
    )  # fmt: skip
    return ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("package", "model", "taps", "settings"),
    [
        ("torchvision", "torchvision:resnet18", {"layer2": "layer2", "layer3": "layer3"},
         {"layers": ["layer2", "layer3"]}),
        ("timm", "timm:resnet10t", {}, {"sampling_net": "off"}),
        ("transformers", f"{__name__}:hugging_face_resnet", {"embed": "resnet.pooler"}, {}),
    ],
)  # fmt: skip
def test_networks_of_other_libraries_plug_in(package, model, taps, settings, tmp_path):
    """With batch norm: the pool's networks are blended with their statistics."""
    pytest.importorskip(package)
    found = made(
        tmp_path,
        data={"name": "generated", "options": {"kind": "images", "shape": [3, 32, 32], "rows": 32}},
        student={"model": model, "taps": taps},
        budget={"steps": 1},
        settings={"batch_real": 2, "pool_nets": 1, "costs": [], **settings},
    )
    assert found.images.shape == (4, 3, 32, 32)
    assert torch.isfinite(found.images).all()


def test_an_image_folder_is_distilled(tmp_path):
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(12, 12, 3, generator=rng) * 255).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    data = {
        "name": "image_folder",
        "options": {"path": str(tmp_path / "data"), "image_size": 12, "val": 0},
    }
    found = made(tmp_path / "run", data=data, settings={"costs": []}, budget={"steps": 1})
    assert found.classes == ("cat", "dog")
    assert found.images.shape == (2, 3, 12, 12)


def test_two_processes_equal_one(one_and_two_processes):
    """Summed steps: each process has some classes; judged with CutMix across both."""
    found = one_and_two_processes("ncfm")
    torch.testing.assert_close(found[0]["images"], found[1]["images"], rtol=0, atol=1e-5)
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_a_pool_without_starts_cannot_be_blended():
    net = ConvNet(3, 2, 8, width=4, depth=1)
    with pytest.raises(Exception, match="starts"):
        NetPool(lambda: ConvNet(3, 2, 8, width=4, depth=1), [net.state_dict()]).blend(0, 0.5)


def test_unit_length_is_what_the_frequencies_fit():
    """Un-normalised features wrap around: the distance no longer tells near from far."""
    torch.manual_seed(0)
    near, far = torch.randn(400, 64) + 0.05, torch.randn(400, 64) + 1.0
    real, t = torch.randn(400, 64), torch.randn(512, 64)

    def distance(a, b):
        return cf_distance(a, b, t).item()

    long = distance(20 * far, 20 * real) / distance(20 * near, 20 * real)
    unit = distance(F.normalize(far), F.normalize(real)) / distance(
        F.normalize(near), F.normalize(real)
    )
    assert long < 1.2
    assert unit > 3


def test_the_order_is_phases_of_classes():
    order = ByClass(3, 2)
    read = [order.read(rows, Views(0)) for rows in order.epoch(0, torch.Generator)]
    assert [(int(b["id"]), int(b["phase"])) for b in read] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1),
    ]  # fmt: skip
