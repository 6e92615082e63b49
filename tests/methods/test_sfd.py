from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.engine.loop import Stage
from stillhouse.engine.step import Clip
from stillhouse.errors import Interrupted, ModelError, StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.losses.score import noise_prediction
from stillhouse.models.mini_unet import MiniUNet, time_embedding
from stillhouse.opening import open_artifact
from stillhouse.parts.ema import EMA
from stillhouse.parts.noise import NoiseSchedule, ddim, one_step
from stillhouse.parts.override import chosen_override, random_override
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.image_generation import NoiseNet
from stillhouse.teacher import Frozen, Knowledge

Sfd: Any = catalogue.load("sfd")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


class ClosedForm(nn.Module):
    """tanh(conv2d(x, W) + E[c] (1 + t / 1000)); the last row of E stands for no class."""

    def __init__(self, weight: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.W, self.E = nn.Parameter(weight.clone()), nn.Parameter(rows.clone())
        self.classes = self.null = len(rows) - 1

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        scale = (1 + time.to(noisy.dtype) / 1000)[:, None]
        shift = (self.E[condition] * scale)[:, :, None, None]
        return torch.tanh(F.conv2d(noisy, self.W, padding=1) + shift)


class Recorded:
    """A clock whose draws are given, by stream."""

    def __init__(self, draws: Mapping[str, Tensor], turn: str = "main", step: int = 0) -> None:
        self.draws, self.turn, self.step, self.progress = draws, turn, step, 1.0

    def draw(self, stream: str, batch: Any, fn: Any) -> Tensor:
        return self.draws[stream]

    def randn(self, stream: str, batch: Any, *shape: int) -> Tensor:
        return self.draws[stream]

    def rand(self, stream: str, batch: Any, *shape: int) -> Tensor:
        return self.draws[stream]


def doubles(case: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {k: torch.from_numpy(v) for k, v in case.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def inputs_of(golden) -> dict[str, Tensor]:
    return doubles(golden("sfd").case("inputs"))


def net_of(given: Mapping[str, Tensor], who: str) -> NoiseNet:
    return NoiseNet(ClosedForm(given[f"{who}_W"], given[f"{who}_E"]))


def objective_of(
    teacher: NoiseNet, score: NoiseNet, generator: NoiseNet, shape=(2, 4, 4), *, decay=0.9,
    forget: int | None = 0, classifier: Any = None, **settings: Any,
):  # fmt: skip
    config = Sfd.Config(**{"override_class": 1, **settings})
    module = __import__(Sfd.__module__, fromlist=["SfdObjective"])
    return module.SfdObjective(
        Frozen(teacher), score, generator, config, shape, teacher.module.classes,
        forget=forget, decay=decay, classifier=classifier,
    )  # fmt: skip


def terms_of(objective, turn: str, rows: int = 6, step: int = 0, seed: int = 0):
    clock = Clock(seed=seed, turn=turn, step=step, total=10)
    return objective(Batch(id=torch.arange(rows)), Knowledge.none, clock)


def closed(seed: int, classes: int = 4, channels: int = 2) -> NoiseNet:
    rng = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(channels, channels, 3, 3, generator=rng, dtype=torch.float64)
    rows = torch.randn(classes + 1, channels, generator=rng, dtype=torch.float64)
    return NoiseNet(ClosedForm(weight, rows))


def three(classes: int = 4, **settings: Any):
    return objective_of(*(closed(s, classes) for s in (1, 2, 3)), **settings)


# ----------------------------------------------------------------------------- reference
def test_the_schedule_is_the_released_one(golden):
    case = doubles(golden("sfd").case("schedule"))
    made = NoiseSchedule.linear()
    for name in ("abar", "a", "b", "sigma"):
        torch.testing.assert_close(getattr(made, name)(case["t"]), case[name], **EXACT)


@pytest.mark.parametrize(
    ("name", "guidance", "dropped"),
    [("fake_loss", 0.0, False), ("fake_loss_dropped", 0.0, True), ("fake_loss_guided", 1.5, False)],
)
def test_the_loss_of_the_fake_score_is_the_released_one(golden, name, guidance, dropped):
    given, case = inputs_of(golden), doubles(golden("sfd").case(name))
    rows = len(given["labels"])
    hidden = torch.ones(rows, dtype=torch.float64)
    hidden[1::2] = 0.0 if dropped else 1.0
    objective = objective_of(
        *(net_of(given, who) for who in ("teacher", "fake", "gen")),
        forget=None, score_guidance=guidance, score_label_dropout=0.5 if dropped else 0.0,
    )  # fmt: skip
    objective._generated = lambda drawn: given["x0"]
    streams = {"labels": given["labels"], "noise": given["x0"], "added": given["eps"],
               "times": given["t"], "hidden": hidden}  # fmt: skip
    clock = Recorded({f"score/remain/{k}": v for k, v in streams.items()}, "score")
    batch = Batch(id=torch.arange(rows))
    loss = objective(batch, Knowledge.none, clock)["score/remain"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
    score = objective.score.module
    torch.testing.assert_close(score.W.grad, case["grad_W"], **EXACT)
    torch.testing.assert_close(score.E.grad, case["grad_E"], **EXACT)
    labels = torch.where(hidden < 0.5, score.null, given["labels"])
    x_t = objective.schedule.add_noise(given["x0"], given["eps"], given["t"])
    found = objective.score.noise(x_t, given["t"], labels, guidance)
    each = noise_prediction(found, given["eps"], reduction="none")
    torch.testing.assert_close(each.detach(), case["per_sample"], **EXACT)


GENERATOR_CASES = {
    "gen_remain_a1": {"alpha": 1.0},
    "gen_remain_a12": {"alpha": 1.2},
    "gen_forget_a12": {"alpha": 1.2},
    "gen_diffinst": {"alpha": 1.2, "diff_instruct": True},
    "gen_guided": {"alpha": 1.0, "guidance": 2.0},
}


def pair_loss(objective, given, teacher_labels, fake_labels, x0):
    """The generator's turn on given images: the forget branch with any pair of labels."""
    objective._generated = lambda drawn: x0
    objective.override = lambda fake, batch, clock: teacher_labels
    objective.drawn = lambda turn, branch, batch, clock: objective_drawn(given, fake_labels)
    clock = Recorded({}, "generator")
    return objective(Batch(id=torch.arange(len(x0))), Knowledge.none, clock)["sid/forget"]


def objective_drawn(given, labels):
    module = __import__(Sfd.__module__, fromlist=["Drawn"])
    return module.Drawn(labels, labels, given["x0"], given["eps"], given["t"])


@pytest.mark.parametrize("name", GENERATOR_CASES)
def test_the_loss_of_the_generator_is_the_released_one(golden, name):
    given, case = inputs_of(golden), doubles(golden("sfd").case(name))
    objective = objective_of(
        *(net_of(given, who) for who in ("teacher", "fake", "gen")),
        remain_weight=0.0, forget_weight=1.0, **GENERATOR_CASES[name],
    )  # fmt: skip
    x0 = given["x0"].clone().requires_grad_()
    loss = pair_loss(objective, given, case["teacher_labels"], case["fake_labels"], x0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], **CLOSE)
    torch.testing.assert_close(x0.grad, case["grad_x0"], **CLOSE)
    x_t = objective.schedule.add_noise(given["x0"], given["eps"], given["t"])
    guidance = objective.config.guidance
    p = objective._teacher.module.x0(x_t, given["t"], case["teacher_labels"], guidance)
    s = objective.score.x0(x_t, given["t"], case["fake_labels"], guidance)
    from stillhouse.losses.score import diff_instruct, sample_weight, score_identity

    torch.testing.assert_close(sample_weight(p, given["x0"]), case["omega"], **CLOSE)
    if objective.config.diff_instruct:
        each = diff_instruct(given["x0"], p, s, reduction="none")
    else:
        alpha = objective.config.alpha
        each = score_identity(given["x0"], p, s, alpha=alpha, reduction="none")
    torch.testing.assert_close(each.detach(), case["per_sample"], **CLOSE)


def test_a_teacher_that_sees_the_image_itself_gives_a_finite_loss(golden):
    from stillhouse.losses.score import score_identity

    given, case = inputs_of(golden), doubles(golden("sfd").case("gen_perfect"))
    schedule, score = NoiseSchedule.linear(), net_of(given, "fake")
    x_t = schedule.add_noise(given["x0"], given["eps"], given["t"])
    p = schedule.x0_of(x_t, given["eps"], given["t"])
    s = score.x0(x_t, given["t"], given["labels"])
    each = score_identity(given["x0"], p, s, alpha=1.2, reduction="none")
    torch.testing.assert_close(each.detach(), case["per_sample"], **CLOSE)


def test_a_classifier_chooses_the_override(golden):
    given, case = inputs_of(golden), doubles(golden("sfd").case("gen_classifier_override"))
    rows = len(given["x0"])
    seen = {}

    class Classifier(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            seen["images"] = images
            return {"logits": case["classifier_scores"]}

    nets = [net_of(given, who) for who in ("teacher", "fake", "gen")]
    objective = objective_of(
        *nets, override="classifier", remain_weight=0.0, forget_weight=1.0, alpha=1.2,
        classifier=Frozen(Classifier()),
    )  # fmt: skip
    objective._generated = lambda drawn: given["x0"]
    objective.drawn = lambda *a: objective_drawn(given, torch.zeros(rows, dtype=torch.long))
    batch = Batch(id=torch.arange(rows))
    loss = objective(batch, Knowledge.none, Recorded({}, "generator"))["sid/forget"]
    torch.testing.assert_close(loss.detach(), case["per_sample"].mean(), **CLOSE)
    torch.testing.assert_close(seen["images"].double(), case["classifier_input"], **CLOSE)
    assert torch.equal(chosen_override(case["classifier_scores"], 0), case["chosen"])


def test_the_random_override_leaves_out_the_forgotten_class_only(golden):
    counts = golden("sfd").case("random_override_official_10")["counts"]
    assert counts[0] == 0
    assert (counts[1:] > 0).all()
    for classes in (2, 3, 10, 17):
        for forget in (0, classes // 2, classes - 1):
            rng = torch.Generator().manual_seed(classes)
            drawn = random_override(100 * classes, classes, forget, rng)
            found = drawn.bincount(minlength=classes)
            assert found[forget] == 0
            assert all(found[c] > 0 for c in range(classes) if c != forget)


def test_the_generator_is_the_released_one(golden):
    given, case = inputs_of(golden), doubles(golden("sfd").case("generator"))
    net = net_of(given, "gen")
    made = one_step(net.predict(case["labels"]), case["noise"], net.schedule, 440)
    torch.testing.assert_close(made.detach(), case["out"], rtol=1e-9, atol=1e-9)


def test_the_average_is_the_released_one(golden):
    case = doubles(golden("sfd").case("ema"))
    rows = nn.Embedding.from_pretrained(case["start_E"].clone(), freeze=False)
    average = EMA(rows, 0.9)
    for number in range(3):
        with torch.no_grad():
            rows.weight.copy_(case[f"E.{number}"])
        average.update()
        torch.testing.assert_close(
            average.module.weight.detach(), case[f"shadow.{number}"], **EXACT
        )


def test_the_multi_step_sampler_is_the_released_one(golden):
    given, case = inputs_of(golden), doubles(golden("sfd").case("ddim"))
    net, trace = net_of(given, "teacher"), []
    with torch.no_grad():
        made = ddim(
            net.predict(case["labels"], 1.5), case["x_T"], net.schedule, [0, 250, 500, 750],
            trace=trace,
        )  # fmt: skip
    torch.testing.assert_close(made, case["x_final"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.stack(trace), case["x0_preds"], rtol=1e-8, atol=1e-8)


def test_the_time_embedding_is_the_released_one(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("sfd").case("timestep_embedding").items()}
    for width in (8, 7):
        found = time_embedding(case["t"], width)
        torch.testing.assert_close(found, case[f"emb{width}"], rtol=1e-5, atol=1e-5)


def test_two_whole_iterations_are_the_released_ones(golden):
    given, case = inputs_of(golden), doubles(golden("sfd").case("iterations"))
    objective = objective_of(
        *(net_of(given, who) for who in ("teacher", "fake", "gen")),
        forget_weight=0.01, alpha=1.2, decay=0.99,
    )  # fmt: skip
    players = {"score": objective.score, "generator": objective.generator}
    adam = {
        name: torch.optim.Adam(net.parameters(), lr=lr, betas=Sfd.Config().betas, eps=1e-8)
        for (name, net), lr in zip(players.items(), (0.003, 0.001), strict=True)
    }
    relative = {"rtol": 1e-5, "atol": 1e-7}
    for q in range(2):
        draws: dict[str, Tensor] = {}
        for place, (turn, branch) in enumerate(
            (t, b) for t in ("score", "generator") for b in ("remain", "forget")
        ):
            for ours, theirs in (("noise", "noise"), ("added", "eps"), ("times", "t")):
                draws[f"{turn}/{branch}/{ours}"] = case[f"{theirs}.{q}"][place]
            draws[f"{turn}/{branch}/labels"] = case[f"labels.{q}"]
        batch, losses = Batch(id=torch.arange(len(case[f"labels.{q}"]))), []
        for turn, net in players.items():
            terms = objective(batch, Knowledge.none, Recorded(draws, turn, q))
            params = list(net.parameters())
            for parameter in params:
                parameter.grad = None
            torch.autograd.backward(sum(terms.values()), inputs=params)
            losses += [t.detach() / w for t, w in zip(terms.values(), (1, 0.01), strict=True)]
            if turn == "generator":
                unclipped = case[f"gen_grad_W_unclipped.{q}"]
                torch.testing.assert_close(net.module.W.grad, unclipped, **relative)
            Clip(value=1.0).apply(params)
            adam[turn].step()
        objective.after_step(Clock(step=q))
        torch.testing.assert_close(torch.stack(losses), case[f"losses.{q}"], **relative)
        held = {"fake": objective.score, "gen": objective.generator,
                "ema": objective.average.module}  # fmt: skip
        for name, net in held.items():
            for part in ("W", "E"):
                found = getattr(net.module, part).detach()
                torch.testing.assert_close(found, case[f"{name}_{part}.{q}"], **relative)


# ----------------------------------------------------------------------------- properties
def test_equal_scores_give_no_loss_and_no_gradient_other_conditions_do():
    same = closed(1)
    objective = objective_of(same, copy.deepcopy(same), closed(3), forget_weight=1.0)
    terms = terms_of(objective, "generator")
    params = list(objective.generator.parameters())
    torch.autograd.backward(terms["sid/remain"], inputs=params, retain_graph=True)
    assert float(terms["sid/remain"].detach()) == 0.0
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-12 for p in params)
    torch.autograd.backward(terms["sid/forget"], inputs=params)
    assert float(terms["sid/forget"].detach()) != 0.0
    assert max(float(p.grad.abs().max()) for p in params) > 1e-6


def test_without_forgetting_it_is_sid_and_the_class_is_never_asked_for():
    without = three(forget_weight=0.0)
    asked: set[int] = set()
    for net in (without.score, without.generator, without._teacher.module):
        inner = net.module.forward

        def forward(noisy, time, condition, inner=inner):
            asked.update(condition.tolist())
            return inner(noisy, time, condition)

        net.module.forward = forward
    for turn in without.turns:
        for step in range(20):
            assert list(terms_of(without, turn, step=step)) == [
                f"{'score' if turn == 'score' else 'sid'}/remain"
            ]
    assert asked == {1, 2, 3}
    both = three(forget_weight=0.5)
    for turn in without.turns:
        kind = "score" if turn == "score" else "sid"
        one, other = terms_of(without, turn), terms_of(both, turn)
        torch.testing.assert_close(one[f"{kind}/remain"], other[f"{kind}/remain"])


def test_all_classes_are_distilled_where_none_is_to_be_forgotten():
    objective = three(forget=None)
    batch = Batch(id=torch.arange(200))
    drawn = objective.drawn("score", "remain", batch, Clock())
    assert set(drawn.labels.tolist()) == {0, 1, 2, 3}
    assert not objective.forgetting


def test_the_teacher_stays_and_the_generator_moves():
    objective = three(forget_weight=0.1)
    teacher = objective._teacher.module
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    start = {n: p.detach().clone() for n, p in objective.named_parameters()}
    for turn in objective.turns:
        own = [p for n, p in objective.named_parameters() if n.startswith(turn)]
        torch.autograd.backward(sum(terms_of(objective, turn).values()), inputs=own)
        assert all(float(p.grad.abs().max()) > 0 for p in own)
        torch.optim.SGD(own, lr=0.1).step()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    moved = {n for n, p in objective.named_parameters() if not torch.equal(start[n], p)}
    assert moved == {n for n in start if not n.startswith("average.")}
    held = {id(p) for p in objective.parameters()}
    assert not held & {id(p) for p in teacher.parameters()}


def test_the_score_turn_leaves_the_generator_alone():
    objective = three()
    sum(terms_of(objective, "score").values()).backward()
    assert all(p.grad is None for p in objective.generator.parameters())


@pytest.mark.parametrize("branch", ["remain", "forget"])
def test_times_lie_in_their_window(branch):
    objective = three(t_min=38, t_max=41)
    batch = Batch(id=torch.arange(300))
    drawn = objective.drawn("score", branch, batch, Clock(step=9, total=10))
    assert set(drawn.times.tolist()) == {38, 39, 40}
    warm = three(t_min=38, t_max=41, forget_warmup=0.5)
    early = warm.drawn("score", branch, batch, Clock(step=4, total=10)).times
    late = warm.drawn("score", branch, batch, Clock(step=5, total=10)).times
    assert set(late.tolist()) == {38, 39, 40}
    if branch == "forget":
        assert int(early.min()) < 38
        assert int(early.min()) >= 20
        assert 41 < int(early.max()) < 980
    else:
        assert set(early.tolist()) == {38, 39, 40}


def test_labels_are_those_of_the_classes_that_stay():
    objective = three(classes=5, forget=3, override_class=4)
    drawn = objective.drawn("score", "remain", Batch(id=torch.arange(300)), Clock())
    assert set(drawn.labels.tolist()) == {0, 1, 2, 4}
    forgotten = objective.drawn("score", "forget", Batch(id=torch.arange(3)), Clock())
    assert forgotten.labels.tolist() == [3, 3, 3]


@pytest.mark.parametrize("override", ["random", "classifier-sample"])
def test_drawn_overrides_cover_every_other_class(override):
    class Even(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": torch.zeros(len(images), 4)}

    objective = three(override=override, forget=2, override_class=None,
                      classifier=Frozen(Even()))  # fmt: skip
    batch = Batch(id=torch.arange(400))
    chosen = objective.override(torch.zeros(400, 2, 4, 4), batch, Clock())
    assert set(chosen.tolist()) == {0, 1, 3}


def test_the_terms_of_the_forgotten_class_come_every_few_iterations():
    objective = three(forget_every=3)
    found = ["score/forget" in terms_of(objective, "score", step=s) for s in range(6)]
    assert found == [True, False, False, True, False, False]


def test_averages_of_rate_zero_copy_and_of_one_stay():
    for rate, moves in ((0.0, True), (1.0, False)):
        objective = three(decay=rate)
        before = objective.average.module.module.W.detach().clone()
        with torch.no_grad():
            objective.generator.module.W.add_(1.0)
        objective.after_step(Clock())
        expected = objective.generator.module.W if moves else before
        assert torch.equal(objective.average.module.module.W, expected)


def test_dropout_is_off_in_the_fake_score_while_the_generator_moves():
    nets = [NoiseNet(MiniUNet(classes=3, size=4, width=8, multipliers=[1])) for _ in range(3)]
    objective = objective_of(*nets, shape=(1, 4, 4)).train()
    modes: dict[str, list[bool]] = {"score": [], "generator": [], "teacher": []}
    players = {"score": objective.score, "generator": objective.generator,
               "teacher": objective._teacher.module}  # fmt: skip
    for name, net in players.items():
        net.register_forward_pre_hook(lambda m, a, name=name: modes[name].append(m.training))
    terms_of(objective, "score")
    assert (modes["score"], modes["generator"]) == ([True], [True])
    terms_of(objective, "generator")
    assert modes == {"score": [True, False], "generator": [True, True], "teacher": [False]}
    assert objective.score.training
    assert not objective.average.training


def test_the_export_is_the_averaged_generator_in_one_step():
    objective = three(t_init=300)
    net = objective.export()
    assert net is objective.average.module
    assert (net.sampler.steps, net.sampler.time, net.sampler.calls) == (0, 300, 1)


# ----------------------------------------------------------------------------- runs
def example(**changes: Any):
    given = Sfd.example(0)
    for key, value in changes.items():
        merged = isinstance(value, dict) and key in given
        given[key] = {**given[key], **value} if merged else value
    return load_recipe(given)


def execute(recipe, folder: Path, given: Given | None = None):
    job = open_job(recipe, folder, given=given)
    try:
        return job, open_method(recipe).run(job)
    finally:
        job.log.close()


def weights_of(artifact) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in artifact.module.state_dict().items()}


@pytest.mark.parametrize("mode", ["joint", "two-stage"])
def test_killed_and_resumed_both_players_end_the_same(mode, tmp_path, monkeypatch):
    settings = {"mode": mode, "forget_every": 2}
    recipe = example(settings=settings, output={"checkpoint_minutes": 0})
    _, whole = execute(recipe, tmp_path / "whole")
    expected, stopped = weights_of(whole), 0
    for stop_at in (2, 3) if mode == "joint" else (2, 7):
        calls, due = {"n": 0}, Stage.due

        def ask(self, now, calls=calls, stop_at=stop_at, due=due):
            calls["n"] += 1
            if calls["n"] == stop_at:
                self.stop.asked = 15
            return due(self, now)

        folder = tmp_path / str(stop_at)
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "due", ask)
            try:
                _, found = execute(recipe, folder)
            except Interrupted:
                stopped += 1
                patch.setattr(Stage, "due", due)
                _, found = execute(recipe, folder)
        again = weights_of(found)
        assert all(torch.equal(expected[k], again[k]) for k in expected)
    assert stopped == 2


def test_whole_and_micro_batches_are_equal(tmp_path):
    options = {"width": 4, "multipliers": [1], "dropout": 0.0}
    found = []
    for accumulate in (1, 2):
        recipe = example(
            teacher={"options": options},
            budget={"accumulate": accumulate},
            hardware={"precision": "64-true"},
        )
        found.append(weights_of(execute(recipe, tmp_path / str(accumulate))[1]))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_two_processes_equal_one(one_and_two_processes):
    found = one_and_two_processes("sfd")
    figures = [end.pop("figures") for end in found]
    # The classifier that judges has BatchNorm, which sees the rows of its own process.
    assert all(bool(((f >= 0) & (f <= 1)).all()) for f in figures)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6)


def test_the_artifact_holds_the_generator_alone_and_draws_again(tmp_path):
    result = run(example(), folder=tmp_path, progress=False)
    artifact = open_artifact(tmp_path)
    images = artifact.predict(["class 1", 2], seed=3)
    assert [tuple(i.shape) for i in images] == [(1, 4, 4)] * 2
    assert all(0 <= float(i.min()) <= float(i.max()) <= 1 for i in images)
    again = result.artifact.predict(["class 1", 2], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    about = json.loads((tmp_path / "artifact" / "artifact.json").read_text())
    assert about["attachments"] == []
    assert about["meta"]["unlearning"]["forgotten"] == "class 0"
    own = sum(v.numel() for v in artifact.module.module.state_dict().values())
    assert own == sum(p.numel() for p in MiniUNet(4, 1, 4, 4, [1]).parameters())
    page = (tmp_path / "report.html").read_text()
    assert "must not be shipped" in page
    figures = result.sides["distilled"]["0"]
    assert figures["nfe"] == 1.0
    assert figures["teacher_nfe"] == 2.0
    assert {"ua", "accuracy", "frechet", "leak", "entropy", "override_share"} <= set(figures)
    with pytest.raises(StillhouseError, match="class 1"):
        artifact.predict(["clas 1"])


def test_images_are_written_for_class_names(tmp_path):
    from stillhouse.launch import infer

    run(example(), folder=tmp_path / "run", progress=False)
    (tmp_path / "wanted.txt").write_text("class 3\nclass 1\n")
    told = infer(tmp_path / "run", [tmp_path / "wanted.txt"], tmp_path / "out", {"each": 2})
    assert told["images"] == 4
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_two_stages_take_over_and_the_parity_teacher_is_the_fake_score(tmp_path):
    settings = {"mode": "two-stage", "sid_steps": 3}
    job, artifact = execute(example(settings=settings), tmp_path / "a")
    assert [s["name"] for s in job.stages if s["kind"] == "train"] == ["teacher", "sid", "forget"]
    assert [s["steps"] for s in job.stages if s["name"] == "sid"] == [3]
    parity = example(settings={**settings, "teacher_from": "score"})
    _, other = execute(parity, tmp_path / "b")
    ours, theirs = weights_of(artifact), weights_of(other)
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)


def test_only_distilled_it_forgets_nothing_and_reads_every_class(tmp_path):
    job, artifact = execute(example(settings={"mode": "sid"}), tmp_path)
    assert "sid" in {s["name"] for s in job.stages}
    assert artifact.meta["unlearning"]["forgotten"] is None


def test_no_image_is_read_after_the_teacher(tmp_path, monkeypatch):
    recipe = example()
    execute(recipe, tmp_path / "first")
    from stillhouse.batch import TensorSource

    def refuse(self, *args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr(TensorSource, "read", refuse)
    monkeypatch.setattr(TensorSource, "__getitem__", refuse)
    execute(recipe, tmp_path / "second")


def test_the_attack_that_teaches_it_again_is_reported(tmp_path):
    result = run(example(settings={"relearn_steps": 4}), folder=tmp_path, progress=False)
    tables = result.summary["details"]["tables"]
    attack = next(t for t in tables if "again" in t["title"])
    assert [row[0] for row in attack["rows"]] == [
        "unlearned generator", "teacher, which knows it", "network that never saw it",
    ]  # fmt: skip
    assert all(len(row) == 6 for row in attack["rows"])
    conditions = next(t for t in tables if "condition" in t["title"])
    assert [row[0] for row in conditions["rows"]][-1] == "no class"
    titles = [image["title"] for image in result.summary["details"]["images"]]
    assert titles[0].startswith("Before")
    assert titles[1].startswith("After")


def test_a_class_chosen_by_a_classifier_while_it_runs(tmp_path):
    job, _ = execute(example(settings={"override": "classifier"}), tmp_path)
    assert "classifier" in {s["name"] for s in job.stages}


# ----------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {"forget": 4}}, "class 4 of 4"),
        ({"settings": {"override_class": 9}}, "class 9 of 4"),
        ({"settings": {"forget": 2, "override_class": 2}}, "class to forget"),
        ({"settings": {"t_min": 700, "t_max": 600}}, "below t_max"),
        ({"settings": {"t_max": 2000}}, "1000 times"),
        ({"settings": {"remain_weight": 0.0, "forget_weight": 0.0}}, "nothing to learn"),
        ({"settings": {"remain_weight": 0.0, "forget_every": 2}}, "without any term"),
        ({"budget": {"steps": None, "epochs": 3}}, "no epochs"),
        ({"data": {"options": {"kind": "vectors"}}}, "needs images"),
        ({"settings": {"alfa": 1.0}}, "alpha"),
    ],
)
def test_what_cannot_be_is_told_before_training(changes, told, tmp_path):
    with pytest.raises(StillhouseError, match=told):
        run(example(**changes), folder=tmp_path, progress=False)
    assert not list(tmp_path.rglob("forget/step-*"))


def test_a_teacher_of_another_size_is_told_with_both_shapes(tmp_path):
    other = {"options": {"width": 4, "multipliers": [1], "size": 6}}
    with pytest.raises(ModelError, match=r"\(1, 6, 6\).*\(1, 4, 4\)"):
        run(example(teacher=other), folder=tmp_path, progress=False)


def test_the_defaults_are_the_released_ones():
    config, official = Sfd.Config(), Sfd.variants["official"]
    assert (config.alpha, config.forget_weight, config.lr, config.score_lr) == (
        1.2, 0.01, 1e-5, 1e-5,
    )  # fmt: skip
    assert (config.t_init, config.t_min, config.t_max, config.betas) == (440, 38, 712, (0.0, 0.999))
    assert config.override_of(10) == 1
    assert official.set["teacher_from"] == "score"
    assert official.set["ema"] == 0.9999
    assert official.budget == {"steps": 50000, "batch": 128}
    assert config.teacher_from == "pretrained"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "float64")]
)
def test_a_whole_run_in_another_precision(precision, dtype, tmp_path):
    spec = {**Sfd.example(0), "compare": [], "hardware": {"precision": precision}}
    result = run(load_recipe(spec), folder=tmp_path, progress=False)
    kept = list(result.artifact.module.parameters())
    assert {value.dtype for value in kept} == {getattr(torch, dtype)}
    assert all(bool(value.isfinite().all()) for value in kept)
