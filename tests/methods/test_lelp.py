from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.clock import Clock
from stillhouse.errors import DataError, ModelError, RecipeError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.methods.images.lelp import (
    LELP,
    LELPObjective,
    Splitting,
    directions,
    entropy_ratio,
    fit_splitting,
    from_arrays,
    head_of,
    joint_targets,
    purity,
)
from stillhouse.opening import open_artifact
from stillhouse.parts.heads import WideHead, widen_net
from stillhouse.parts.matrices import class_pca, nullspace, random_rotation
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Knowledge
from stillhouse.teachers.live import Live


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v) for k, v in case.items()}


def recipe(**changes: Any):
    return load_recipe({**LELP.example(0), "compare": [], **changes})


def trained(chosen: Any, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        method = open_method(chosen)
        return method.run(job), job, method
    finally:
        job.log.close()


class Student(nn.Module):
    """Features and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.backbone(x)))


def task(classes: int = 2, **more: Tensor) -> Classification:
    rng = generator()
    x, y = torch.randn(12, 5, generator=rng), torch.arange(12) % classes
    source = TensorSource({"x": x, "target": y, **more})
    return Classification(Splits({"train": source}, "v", {"classes": [*range(classes)]}))


def objective(
    settings: dict[str, Any], splitting: Splitting | None = None, classes: int = 2, S: int = 3
) -> LELPObjective:
    torch.manual_seed(0)
    opened = task(classes)
    net = opened.net(Student(classes))
    config = LELP.Config(**{"subclasses": S, "split": "uniform", **settings})
    widen_net(net, config.subclasses, "joint")
    return LELPObjective(net, opened, config, splitting)


def splitting(S: int = 3, D: int = 4, classes: int = 2, beta: float = 1.0) -> Splitting:
    rng = generator(1)
    return Splitting(
        torch.randn(classes, S, D, generator=rng), torch.randn(classes, S, generator=rng), beta
    )


def knowledge(rows: int = 12, D: int = 4, classes: int = 2) -> Knowledge:
    rng = generator(2)
    return Knowledge(
        {
            "logits": torch.randn(rows, classes, generator=rng),
            "tap:head:input": torch.randn(rows, D, generator=rng),
        }
    )


def batch(rows: int = 12, classes: int = 2) -> Batch:
    rng = generator(3)
    x = torch.randn(rows, 5, generator=rng)
    return Batch(id=torch.arange(rows), x=x, target=torch.arange(rows) % classes)


# ---- stage A and B against the reference ------------------------------------------------------


@pytest.mark.parametrize(("case", "centred"), [("stage_0", True), ("stage_1", False)])
def test_directions_and_targets_of_the_reference(golden, case, centred):
    g = arrays(golden("lelp").case(case))
    tau, beta = (1.0, 1.0) if centred else (2.0, 0.5)
    h, w, b = (g[k].double() for k in ("h", "w", "b"))
    close = {"rtol": 1e-8, "atol": 1e-8}
    space = nullspace(w, centred=centred)
    assert space.rank == int(g["rank"])
    torch.testing.assert_close(space.projector(), g["null_projector"], **close)
    inner = space.apply(h)
    torch.testing.assert_close(inner, g["h_tilde"], **close)
    probabilities = ((h @ w.T + b) / tau).softmax(-1)
    torch.testing.assert_close(probabilities, g["p"], **close)
    classes, S = g["eigenvalues"].shape
    pca = class_pca(inner, g["pred"], classes, S)
    torch.testing.assert_close(pca.mean, g["mu"], **close)
    torch.testing.assert_close(pca.values, g["eigenvalues"], **close)
    torch.testing.assert_close(pca.directions, g["v"], **close)
    projector = pca.directions @ pca.directions.transpose(1, 2)
    torch.testing.assert_close(projector, g["subspace_projector"], **close)
    torch.testing.assert_close(pca.values.sum(1) / pca.total, g["explained"], **close)
    found, scales = directions(pca, list(g["q"]))
    torch.testing.assert_close(found, g["u"], **close)
    torch.testing.assert_close(scales, g["scale"][:, None].expand_as(scales), **close)
    made = Splitting.along(space, pca.mean, found, scales, beta)
    torch.testing.assert_close(made.projections(h), g["a"], **close)
    shares = made.shares(h)
    torch.testing.assert_close(shares, g["pi"], **close)
    torch.testing.assert_close(
        joint_targets(probabilities, shares), g["targets"].flatten(1), **close
    )
    assert entropy_ratio(shares) == pytest.approx(float(g["mean_entropy_ratio"]), abs=1e-8)
    own = directions(pca, list(g["q"]), "per_direction")
    single = Splitting.along(space, pca.mean, *own, beta)
    torch.testing.assert_close(single.projections(h), g["a_per_direction"], **close)
    # what a student sees, in float32 and through the objective
    settings = {"temperature": tau, "beta": beta, "split": "pca"}
    asked = objective(settings, made, classes, S)
    known = Knowledge({"logits": (h @ w.T + b).float(), "tap:head:input": h.float()})
    targets = asked.targets(batch(len(h), classes), known)
    torch.testing.assert_close(targets.double(), g["targets"].flatten(1), rtol=0, atol=1e-4)


def test_groups_may_be_labels(golden):
    case = golden("lelp")
    g, h = arrays(case.case("groups_by_label")), arrays(case.case("stage_0"))["h"].double()
    w = arrays(case.case("stage_0"))["w"].double()
    classes, S = g["eigenvalues"].shape
    pca = class_pca(nullspace(w).apply(h), g["labels"], classes, S)
    torch.testing.assert_close(pca.mean, g["mu"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pca.values, g["eigenvalues"], rtol=1e-8, atol=1e-8)
    projector = pca.directions @ pca.directions.transpose(1, 2)
    torch.testing.assert_close(projector, g["subspace_projector"], rtol=1e-8, atol=1e-8)


def test_a_class_of_few_samples_uses_the_directions_it_has(golden):
    g = arrays(golden("lelp").case("few_samples"))
    h, close = g["h"].double(), {"rtol": 1e-8, "atol": 1e-8}
    classes, S = g["eigenvalues"].shape
    pca = class_pca(h, g["groups"], classes, S)
    assert torch.equal(pca.used, g["directions_used"])
    for found, wanted in ((pca.mean, "mu"), (pca.values, "eigenvalues"), (pca.directions, "v")):
        torch.testing.assert_close(found, g[wanted], **close)
    rotations = [g[f"q_class{c}"] for c in range(classes)]
    found, scales = directions(pca, rotations)
    torch.testing.assert_close(found, g["u"], **close)
    for c, used in enumerate(pca.used.tolist()):
        assert scales[c, 0].item() == pytest.approx(float(g["scale"][c]))
        assert found[c, :, used:].abs().sum() == 0
    made = Splitting.along(nothing(h.shape[1]), pca.mean, found, scales, 0.7)
    torch.testing.assert_close(made.projections(h), g["a"], **close)
    torch.testing.assert_close(made.shares(h), g["pi"], **close)


def nothing(width: int):
    """The null space of a layer that reads nothing."""
    return nullspace(torch.zeros(2, width, dtype=torch.float64))


@pytest.mark.parametrize(("case", "alpha", "tau"), [("loss0", 0.0, 1.0), ("loss1", 0.5, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_student_s_loss(golden, case, alpha, tau, dtype):
    g = arrays(golden("lelp").case(case))
    joint = g["g"].to(dtype).requires_grad_()
    classes = g["class_prob"].shape[1]
    S = joint.shape[1] // classes
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    lelp = soft_cross_entropy(joint, g["targets"].to(dtype), temperature=tau, scale=True)
    folded = WideHead.fold(joint, S)
    ce = Classification.loss(None, {"logits": folded}, {"target": g["y"]})["task"]
    total = alpha * ce + (1 - alpha) * lelp
    for value, wanted in ((lelp, "lelp"), (ce, "ce"), (total, "total")):
        assert value.item() == pytest.approx(float(g[wanted]), rel=tolerance)
    for value, wanted in ((lelp, "grad_lelp"), (total, "grad_total")):
        (grad,) = torch.autograd.grad(value, joint, retain_graph=True)
        scale = g[wanted].abs().max()
        assert (grad.double() - g[wanted]).abs().max() <= tolerance * scale
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(folded.softmax(-1).double(), g["class_prob"], **near)
    assert torch.equal(folded.argmax(-1), g["class_pred"])


def test_the_loss_is_least_where_the_student_gives_the_targets(golden):
    g = arrays(golden("lelp").case("minimum"))
    targets = joint_targets(g["p"], g["pi"])
    torch.testing.assert_close(targets, g["targets"], rtol=1e-8, atol=1e-8)
    even = torch.full_like(g["pi"], 1 / g["pi"].shape[-1])
    torch.testing.assert_close(joint_targets(g["p"], even), g["targets_uniform"])
    joint = targets.log().requires_grad_()
    least = soft_cross_entropy(joint, targets)
    assert least.item() == pytest.approx(float(g["entropy"]), abs=1e-8)
    assert torch.autograd.grad(least, joint)[0].abs().max() < 1e-8
    assert soft_cross_entropy(joint + torch.randn_like(joint), targets) > least


def test_classes_are_folded_by_sums_not_by_the_largest_output(golden):
    g = arrays(golden("lelp").case("folding"))
    classes = g["class_prob"].shape[1]
    S = g["g"].shape[1] // classes
    folded = WideHead.fold(g["g"].double(), S)
    torch.testing.assert_close(folded.softmax(-1), g["class_prob"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded.log_softmax(-1), g["class_log_prob"], rtol=1e-9, atol=1e-9)
    assert torch.equal(folded.argmax(-1), g["pred"])
    assert torch.equal(g["g"].argmax(-1) // S, g["pred_by_single_max"])


# ---- the sheet's properties -------------------------------------------------------------------


def test_hand_value():
    """Property 11 of the sheet."""
    w = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64)
    h = torch.tensor([[2, 1, 0], [2, -1, 0], [2, 0, 0.5], [2, 0, -0.5]], dtype=torch.float64)
    space = nullspace(w)
    pca = class_pca(space.apply(h), torch.zeros(4, dtype=torch.int64), 2, 2)
    torch.testing.assert_close(pca.values[0], torch.tensor([0.5, 0.125], dtype=torch.float64))
    assert pca.used.tolist() == [2, 0]
    turn = torch.tensor([[1.0, -1], [1, 1]], dtype=torch.float64) / math.sqrt(2)
    found, scales = directions(pca, [turn, torch.eye(1)])
    assert scales[0].square().tolist() == pytest.approx([0.3125, 0.3125])
    made = Splitting.along(space, pca.mean, found, scales, 1.0)
    a, shares = made.projections(h)[0, 0], made.shares(h)[0, 0]
    assert a.tolist() == pytest.approx([1.264911, -1.264911], abs=1e-6)
    assert shares.tolist() == pytest.approx([0.926206, 0.073794], abs=1e-6)
    p = (h @ w.T).softmax(-1)
    assert p[0, 0].item() == pytest.approx(0.982014, abs=1e-6)
    targets = joint_targets(p, made.shares(h))[0]
    assert targets[:2].tolist() == pytest.approx([0.909547, 0.072467], abs=1e-6)


@pytest.mark.parametrize("split", ["pca", "uniform", "random"])
def test_subclass_targets_sum_to_the_teacher_s_probabilities(split):
    """Property 1, for every split."""
    made = objective({"split": split, "temperature": 2.0}, splitting() if split == "pca" else None)
    targets = made.targets(batch(), knowledge()).view(12, 2, 3)
    wanted = (knowledge().tensor("logits") / 2).softmax(-1)
    torch.testing.assert_close(targets.sum(-1), wanted, rtol=0, atol=1e-6)
    assert not targets.requires_grad
    if split == "uniform":
        torch.testing.assert_close(targets, wanted[..., None].expand(-1, -1, 3) / 3)


def test_one_subclass_is_distillation_in_value_and_gradient():
    """Property 2: with the teacher's constant entropy, and the same gradient everywhere."""
    made = objective({"subclasses": 1, "split": "pca", "temperature": 3.0}, splitting(S=1))
    term = made(batch(), knowledge(), Clock())["subclasses"]
    logits = made.student(batch()["x"])["logits"]
    p = (knowledge().tensor("logits") / 3).softmax(-1)
    kd = -9 * (p * (logits / 3).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(term, kd)
    params = list(made.parameters())
    for one, other in zip(torch.autograd.grad(term, params), torch.autograd.grad(kd, params)):
        torch.testing.assert_close(one, other)


def test_a_large_beta_divides_evenly_and_a_small_one_leaves_one_subclass():
    """Property 3, and the trap of a saturated softmax."""
    known = knowledge()
    p = known.tensor("logits").softmax(-1)
    flat = objective({"split": "pca"}, splitting(beta=1e6)).targets(batch(), known)
    torch.testing.assert_close(flat, p.repeat_interleave(3, 1) / 3, rtol=1e-4, atol=1e-5)
    sharp = splitting(beta=1e-3).shares(known.tensor("tap:head:input"))
    assert entropy_ratio(sharp) < 0.05
    assert entropy_ratio(splitting(beta=1e6).shares(known.tensor("tap:head:input"))) > 0.999


def fitted(h: Tensor, w: Tensor, seed: int = 0, **settings: Any) -> dict[str, Any]:
    config = LELP.Config(**settings)
    groups = (h.double() @ w.double().T).argmax(1)
    rngs = [generator(seed + c) for c in range(len(w))]
    return fit_splitting(h, groups, w, config, rngs)


def made_of(found: dict[str, Any]) -> Splitting:
    return Splitting(found["weight"], found["offset"], found["beta"])


@pytest.mark.parametrize("split", ["pca", "kmeans", "random-projection"])
def test_what_the_logits_carry_does_not_move_the_splits(split):
    """Property 4."""
    rng = generator()
    h, w = torch.randn(80, 7, generator=rng), torch.randn(3, 7, generator=rng)
    space = nullspace(w)
    centred = (w - w.mean(0)).double()
    assert (space.apply(h.double()) @ centred.T).abs().max() < 1e-5
    made = made_of(fitted(h, w, split=split, subclasses=3))
    shift = torch.randn(80, 3, generator=rng).double() @ centred
    torch.testing.assert_close(made.shares(h.double() + shift), made.shares(h.double()))
    other = made_of(fitted(h, w, split=split, subclasses=3, nullspace="none"))
    assert (other.projections(h.double() + shift) - other.projections(h.double())).abs().max() > 0.1


def test_the_rotation_keeps_the_variance_and_evens_it_out():
    """Properties 5 and 6."""
    h = torch.randn(200, 6, generator=generator()).double() * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0])
    pca = class_pca(h, torch.zeros(200, dtype=torch.int64), 1, 4)
    plain, _ = directions(pca, None)
    total, mean = pca.values.sum(), torch.zeros(4, dtype=torch.float64)
    rng = generator(1)
    for _ in range(500):
        turned, scales = directions(pca, [random_rotation(4, generator=rng)])
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(turned[0].T @ turned[0], eye)
        variances = ((h - pca.mean) @ turned[0]).square().mean(0)
        torch.testing.assert_close(variances.sum(), total)
        mean += variances / 500
    assert scales[0, 0] ** 2 == pytest.approx(float(total / 4))
    assert ((mean - total / 4).abs() / (total / 4)).max() < 0.1
    assert (((h - pca.mean) @ plain[0]).square().mean(0) - pca.values[0]).abs().max() < 1e-10


def test_separate_groups_along_directions_are_told_apart():
    """Property 7: groups at the corners of a simplex in the null space."""
    rng, S = generator(), 4
    basis = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q
    hidden = torch.arange(400) % S
    h = 6 * basis[hidden + 2] + 0.3 * torch.randn(400, 12, generator=rng)
    h = h + torch.where(torch.arange(400) < 200, 3.0, -3.0)[:, None] * basis[0]
    w = torch.stack([basis[0], -basis[0]])
    found = fitted(h, w, subclasses=3, rotate=False, beta=0.05)
    made = made_of(found)
    classes = (h @ w.T).argmax(1)
    assigned = made.shares(h.double())[torch.arange(400), classes].argmax(-1)
    assert found["outside"] > 0.5
    # Four groups on three axes: PCA's largest axis parts them as far as it can, k-means wholly.
    assert purity(assigned, hidden, classes) > 0.6
    parted = made_of(fitted(h, w, subclasses=S, split="kmeans"))
    own = parted.shares(h.double())[torch.arange(400), classes].argmax(-1)
    assert purity(own, hidden, classes) > 0.99


def test_axes_of_different_groups_are_told_apart_by_their_projections():
    """Property 7 as the sheet puts it: each group spreads along an axis of its own."""
    rng, S = generator(), 3
    hidden = torch.arange(600) % S
    h = torch.zeros(600, 6)
    h[torch.arange(600), hidden] = 3 + torch.rand(600, generator=rng)
    h = h + 0.02 * torch.randn(600, 6, generator=rng)
    found = torch.zeros(1, 6, S, dtype=torch.float64)
    found[0, :S] = torch.eye(S)
    made = Splitting.along(
        nothing(6), h.mean(0, keepdim=True).double(), found, torch.ones(1, S).double(), 0.05
    )
    assigned = made.shares(h.double())[:, 0].argmax(-1)
    assert purity(assigned, hidden, torch.zeros_like(hidden)) > 0.9


def test_temperatures_move_their_own_split_only():
    """Property 12."""
    known, made = knowledge(), splitting()

    def shares(tau: float, beta: float) -> tuple[Tensor, Tensor]:
        own = Splitting(made.weight, made.offset, beta)
        targets = objective({"split": "pca", "temperature": tau}, own).targets(batch(), known)
        joint = targets.view(12, 2, 3)
        p = joint.sum(-1)
        return p, joint / p[..., None]

    p, pi = shares(1, 1)
    p_other, pi_same = shares(3, 1)
    p_same, pi_other = shares(1, 0.3)
    torch.testing.assert_close(pi, pi_same)
    torch.testing.assert_close(p, p_same)
    assert (p - p_other).abs().max() > 0.05
    assert (pi - pi_other).abs().max() > 0.05


def test_terms_are_weighted_and_the_labels_use_the_folded_logits():
    known, rows = knowledge(), batch()
    both = objective({"alpha": 0.25, "split": "pca"}, splitting())
    alone = objective({"split": "pca"}, splitting())
    terms, only = both(rows, known, Clock()), alone(rows, known, Clock())
    assert set(terms) == {"task", "subclasses"}
    assert set(only) == {"subclasses"}
    joint = both.student(rows["x"])["taps"]["joint"]
    p = joint.softmax(-1).view(12, 2, 3).sum(-1)
    torch.testing.assert_close(terms["task"], 0.25 * F.nll_loss(p.log(), rows["target"]))
    torch.testing.assert_close(terms["subclasses"], 0.75 * only["subclasses"])
    assert set(objective({"alpha": 1.0})(rows, Knowledge.none, Clock())) == {"task"}


def test_rows_on_which_the_teacher_is_silent_do_not_count():
    made, rows, known = objective({"split": "pca"}, splitting()), batch(), knowledge()
    silent = Knowledge(dict(known), torch.arange(12) < 5)
    few = Knowledge({k: v[:5] for k, v in known.items()})
    torch.testing.assert_close(
        made(rows, silent, Clock())["subclasses"],
        made(rows.narrow(0, 5), few, Clock())["subclasses"],
    )


def test_a_random_split_depends_on_the_sample_alone():
    made = objective({"split": "random"})
    whole = made.targets(batch(), knowledge())
    part = made.targets(batch().narrow(4, 9), knowledge().narrow(4, 9))
    torch.testing.assert_close(whole[4:9], part)
    pi = whole.view(12, 2, 3) / whole.view(12, 2, 3).sum(-1, keepdim=True)
    assert pi.std(0).min() > 0.02  # samples differ


def test_the_oracle_splits_the_own_class_by_the_truth_and_the_others_evenly():
    made, rows = objective({"split": "oracle"}), batch()
    rows["subclass"] = torch.arange(12) % 3
    joint = made.targets(rows, knowledge()).view(12, 2, 3)
    p = knowledge().tensor("logits").softmax(-1)
    for i in range(12):
        own, sub = int(rows["target"][i]), int(rows["subclass"][i])
        assert joint[i, own, sub] == p[i, own]
        assert joint[i, own].sum() == p[i, own]
        torch.testing.assert_close(joint[i, 1 - own], (p[i, 1 - own] / 3).expand(3))


def test_kmeans_takes_the_nearest_centre_of_every_class():
    rng = generator()
    h, w = torch.randn(60, 5, generator=rng), torch.randn(2, 5, generator=rng)
    made = made_of(fitted(h, w, split="kmeans", subclasses=4))
    inner = nullspace(w).apply(h.double())
    centres = made.weight / 2
    for c in range(2):
        nearest = torch.cdist(inner, centres[c]).argmin(1)
        assert torch.equal(made.shares(h.double())[:, c].argmax(-1), nearest)
    few = Splitting.nearest([torch.zeros(1, 5), torch.ones(0, 5)], 3)
    assert few.shares(h)[:, 0].argmax(-1).eq(0).all()
    assert torch.isfinite(few.shares(h)).all()


def test_stage_a_is_a_function_of_the_seed_and_of_what_it_is_given():
    """Property 9."""
    h, w = torch.randn(90, 6, generator=generator()), torch.randn(2, 6, generator=generator(1))
    for split in ("pca", "random-projection", "kmeans"):
        one, again, other = (fitted(h, w, seed=s, split=split, subclasses=3) for s in (0, 0, 7))
        assert torch.equal(one["weight"], again["weight"])
        if split != "kmeans":
            assert not torch.allclose(one["weight"], other["weight"])
    plain = [fitted(h, w, seed=s, subclasses=3, rotate=False)["weight"] for s in (0, 7)]
    assert torch.equal(*plain)


def test_too_many_directions_are_refused_and_few_samples_are_padded():
    h, w = torch.randn(40, 6, generator=generator()), torch.randn(2, 6, generator=generator(1))
    with pytest.raises(
        RecipeError, match="6 dimensions of which its last layer reads 1; at most 5"
    ):
        fitted(h, w, subclasses=6)
    few = fitted(h[:6], w, subclasses=5)
    assert (few["used"] < 5).all()
    shares = made_of(few).shares(h.double())
    assert torch.isfinite(shares).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(40, 2, dtype=torch.float64))


# ---- whose last layer -------------------------------------------------------------------------


def test_the_layer_is_taken_from_the_module_and_recovered_from_arrays():
    torch.manual_seed(0)
    module = Student(3).eval()
    x = torch.randn(200, 5)
    h = torch.relu(module.backbone(x)).detach()
    z = module.fc(h).detach()
    live = Live(Classification(task(3).splits).net(module))
    assert torch.equal(head_of(live, h, z), module.fc.weight.detach().double())
    arrays_only = from_arrays(h, module.fc.weight.detach(), module.fc.bias.detach())
    found = head_of(arrays_only, h, z)
    spaces = [nullspace(w).apply(h.double()) for w in (found, module.fc.weight.detach().double())]
    torch.testing.assert_close(*spaces, rtol=1e-4, atol=1e-4)
    half = head_of(arrays_only, h.half().float(), z.half().float())
    torch.testing.assert_close(nullspace(half).apply(h.double()), spaces[1], rtol=0, atol=0.02)
    with pytest.raises(TeacherError, match="no linear function of what the tap 'head:input'"):
        head_of(live, x, z)


# ---- whole runs -------------------------------------------------------------------------------


def test_the_artifact_is_a_folding_classifier_with_its_directions(tmp_path):
    result = run(recipe(), folder=tmp_path, progress=False)
    found = open_artifact(tmp_path)
    x = torch.randn(9, 6)
    logits = found.module(x)["logits"]
    assert logits.shape == (9, 4)
    torch.testing.assert_close(logits, result.artifact.module(x)["logits"])
    head = found.module.module.head
    assert isinstance(head, WideHead)
    assert head.wide.out_features == 12
    kept = found.attachments["directions"]
    assert kept.tensors["weight"].shape == (4, 3, 16)
    assert kept.meta["settings"]["subclasses"] == 3
    figures = result.sides["distilled"]["0"]
    assert 0 < figures["subclass_entropy"] < 1
    assert 0 < figures["explained_variance"] <= 1
    assert found.predict([x[0]])[0]["class"].startswith("class")


def test_an_artifact_names_no_foreign_code(tmp_path):
    import json

    run(recipe(), folder=tmp_path, progress=False)
    path = tmp_path / "artifact" / "artifact.json"
    about = json.loads(path.read_text())
    about["model"]["altered"][0]["by"] = "os:system"
    path.write_text(json.dumps(about))
    from stillhouse.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"'os:system', is not of a package that adds"):
        open_artifact(tmp_path)


def test_it_leaves_as_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from stillhouse.exporting import export_artifact

    run(recipe(), folder=tmp_path, progress=False)
    assert export_artifact(tmp_path, "onnx")["largest_difference"] < 1e-4
    told = export_artifact(tmp_path, "torch")
    note = (Path(told["place"]) / "README.md").read_text()
    assert "altered(model" in note


def test_killed_anywhere_it_ends_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        budget={"steps": 60, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
        output={"checkpoint_minutes": 0.0002},
    )
    whole = trained(chosen, tmp_path / "whole")[0]

    def train() -> None:
        trained(chosen, tmp_path / "cut")

    assert kill_and_resume(train, tmp_path / "cut") > 0
    again = trained(chosen, tmp_path / "cut")[0]
    before, after = plain_state(whole.module), plain_state(again.module)
    assert all(torch.equal(before[k], after[k]) for k in before)
    kept = again.attachments["directions"].tensors
    assert all(torch.equal(v, kept[k]) for k, v in whole.attachments["directions"].tensors.items())


@pytest.mark.parametrize("split", ["pca", "kmeans", "random-projection", "uniform", "random"])
def test_a_store_teaches_as_the_teacher_itself(tmp_path, split):
    teacher = {"model": "stillhouse:mlp", "options": {"widths": [16]}}
    settings = {"subclasses": 3, "split": split}
    live = trained(recipe(settings=settings, teacher=teacher), tmp_path / "live")[0]
    kept = {**teacher, "store": {"dtype": "float32"}}
    stored, job, _ = trained(recipe(settings=settings, teacher=kept), tmp_path / "stored")
    assert "capture" in [stage["name"] for stage in job.stages]
    one, other = plain_state(live.module), plain_state(stored.module)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


def test_a_linear_probe_teaches_from_the_vectors_it_stored(tmp_path):
    """The text recipes' teacher: neither stage A nor a step runs the encoder."""
    budget = {"steps": 3, "batch": 16, "lr": 0.05, "optimizer": "sgd"}
    probe = {"method": "linear-probe", "budget": budget,
             "student": {"model": "stillhouse:mlp", "options": {"widths": [16]}}}  # fmt: skip
    chosen = recipe(teacher=probe, settings={"subclasses": 3})
    job = open_job(chosen, tmp_path)
    teacher = job.teacher()
    net = teacher.net

    def poisoned(*_: Any) -> None:
        raise AssertionError("the body was run")

    made = open_method(chosen)
    teacher.bind(made.objective(job, job.student(), teacher).wants, job.task)
    rows = job.order("train").read(torch.arange(7), job.views())
    known = teacher.knowledge(rows)
    wanted = net(rows["x"])
    torch.testing.assert_close(known.tensor("logits"), wanted["logits"])
    torch.testing.assert_close(known.tensor("tap:head:input"), wanted["taps"]["head:input"])
    net.module.layers[0].register_forward_pre_hook(poisoned)
    assert torch.equal(teacher.knowledge(rows).tensor("logits"), known.tensor("logits"))
    names = [stage["name"] for stage in job.stages]
    assert names == ["teacher/capture", "teacher/head", "directions"]
    job.log.close()


def test_a_hugging_face_student_is_reopened_with_its_wide_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=4, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    tokens = {"name": "generated", "options": {"kind": "tokens"}}
    chosen = recipe(
        data=tokens,
        teacher={"model": "stillhouse:text_cnn", "options": {"width": 8, "filters": 6}},
        student={
            "model": f"hf:{tmp_path / 'bert'}",
            "options": {"task": "sequence-classification"},
        },
    )
    result = run(chosen, folder=tmp_path / "run", progress=False)
    again = open_artifact(tmp_path / "run").module
    ids = torch.randint(1, 60, (3, 12), generator=generator())
    found = again(ids)["logits"]
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, result.artifact.module(ids)["logits"])


def test_exported_arrays_are_enough(tmp_path):
    """The second entry point: embeddings, weight and bias, no module."""
    from stillhouse import distill

    torch.manual_seed(0)
    h, x = torch.randn(64, 10), torch.randn(64, 5)
    w, b = torch.randn(2, 10), torch.randn(2)
    y = (h @ w.T + b).argmax(1)
    data = TensorSource({"x": x, "target": y})
    result = distill(
        from_arrays(h, w, b), Student(), data, data, classes=2, method="lelp", compare=(),
        settings={"subclasses": 4}, folder=tmp_path, progress=False, steps=6, lr=0.05,
    )  # fmt: skip
    space = nullspace(w.double())
    found = result.artifact.attachments["directions"].tensors["weight"]
    torch.testing.assert_close(space.apply(found), found, rtol=1e-4, atol=1e-5)
    reopened = open_artifact(tmp_path, module=Student())
    torch.testing.assert_close(reopened.module(x)["logits"], result.artifact.module(x)["logits"])


def test_the_oracle_needs_data_that_know_their_subclasses(tmp_path):
    with pytest.raises(DataError, match="join classes with data"):
        trained(recipe(settings={"split": "oracle"}), tmp_path)


def test_a_student_with_another_number_of_classes_is_refused(tmp_path):
    given = Given(student=Student(3), splits=task(2).splits)
    chosen = recipe(student={"model": "given"}, teacher={"model": "given"}, data={"name": "given"})
    given.teacher = Student(2)
    with pytest.raises(ModelError, match="has 3 outputs, the data 2 classes"):
        trained(chosen, tmp_path, given)


def test_a_teacher_that_gives_no_embeddings_is_refused(tmp_path):
    from stillhouse.teachers.function import Callable

    teacher = Callable(
        lambda b: {"logits": torch.zeros(b.size, 2)}, fields=["logits"], fingerprint="v"
    )
    given = Given(student=Student(2), teacher=teacher, splits=task(2).splits)
    chosen = recipe(student={"model": "given"}, teacher=None, data={"name": "given"})
    with pytest.raises(TeacherError, match="tap:head:input"):
        trained(chosen, tmp_path, given)


def test_few_samples_are_told_in_the_log(tmp_path):
    spec = {"name": "generated", "options": {"kind": "vectors", "rows": 12}}
    trained(recipe(data=spec, settings={"subclasses": 5}), tmp_path)
    assert "fewer than the 5 subclasses" in (tmp_path / "log.jsonl").read_text()


# ---- real classes -----------------------------------------------------------------------------


def images() -> Splits:
    rng = generator()
    source = TensorSource(
        {"x": torch.rand(24, 3, 32, 32, generator=rng), "target": torch.arange(24) % 2}
    )
    return Splits({"train": source, "val": source}, "images", {"classes": ["a", "b"]})


def texts() -> Splits:
    rng = generator()
    ids = torch.randint(3, 90, (24, 9), generator=rng)
    source = TensorSource({"x": ids, "target": torch.arange(24) % 2})
    return Splits({"train": source, "val": source}, "texts", {"classes": ["a", "b"]})


def timm_pair():
    timm = pytest.importorskip("timm")
    teacher = timm.create_model("resnet10t", num_classes=2)
    return [teacher, timm.create_model("mobilenetv3_small_050", num_classes=2)]


def torchvision_pair():
    models = pytest.importorskip("torchvision.models")
    teacher = models.resnet18(num_classes=2)
    return [teacher, models.mobilenet_v3_small(num_classes=2)]


def hf_image_pair():
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_labels=2,
    )  # fmt: skip
    teacher = transformers.ViTForImageClassification(vit)
    convnext = transformers.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=2, image_size=32
    )
    return [teacher, transformers.ConvNextForImageClassification(convnext)]


def hf_text_pair():
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig(
        vocab_size=100, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=2,
    )  # fmt: skip
    distil = transformers.DistilBertConfig(
        vocab_size=100, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=2
    )
    return [
        transformers.BertForSequenceClassification(bert),
        transformers.DistilBertForSequenceClassification(distil),
    ]


def hf_albert_roberta_pair():
    transformers = pytest.importorskip("transformers")
    albert = transformers.AlbertConfig(
        vocab_size=100, embedding_size=8, hidden_size=24, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=2,
    )  # fmt: skip
    roberta = transformers.RobertaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=2, max_position_embeddings=40,
    )  # fmt: skip
    return [
        transformers.AlbertForSequenceClassification(albert),
        transformers.RobertaForSequenceClassification(roberta),
    ]


@pytest.mark.parametrize(
    ("pair", "splits"),
    [
        (timm_pair, images),
        (torchvision_pair, images),
        (hf_image_pair, images),
        (hf_text_pair, texts),
        (hf_albert_roberta_pair, texts),
    ],
)
def test_real_classes_teach_and_learn(tmp_path, pair, splits):
    torch.manual_seed(0)
    teacher, student = pair()
    given = Given(student=student, teacher=teacher, splits=splits())
    chosen = recipe(
        student={"model": "given"},
        teacher={"model": "given"},
        data={"name": "given"},
        settings={"subclasses": 3},
        budget={"steps": 2, "batch": 8, "lr": 0.01, "optimizer": "sgd"},
    )
    artifact, job, method = trained(chosen, tmp_path, given)
    view = job.splits["val"].read(torch.arange(5), None)["x"]
    out = artifact.module(view)
    assert out["logits"].shape == (5, 2)
    joint = out["taps"]["joint"]
    assert joint.shape == (5, 6)
    torch.testing.assert_close(out["logits"], joint.view(5, 2, 3).logsumexp(-1))
    weight = teacher.get_submodule(Live(job.task.net(teacher)).net.head()).weight
    found = artifact.attachments["directions"].tensors["weight"].double()
    centred = (weight - weight.mean(0)).detach().double()
    assert (found @ centred.T).abs().max() < 1e-4 * found.abs().max()
    before = dict(student.named_parameters())
    after = dict(artifact.module.module.named_parameters())
    moved = [n for n in before if n in after and not torch.equal(before[n], after[n])]
    assert moved  # the copy was trained, the head's place taken
    assert f"{method.head}.wide.weight" in after
