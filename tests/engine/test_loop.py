"""The loop: resume is exact, micro-batches equal one batch, proposals, guards."""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.batch import Shuffled, Splits, Subset, TensorSource
from stillhouse.clock import Views
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.job import Above, Best, Each, Family, Job
from stillhouse.engine.log import RunLog
from stillhouse.engine.loop import Stage
from stillhouse.errors import CheckpointError, Interrupted, RecipeError, TrainingError
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.schedule import cosine
from stillhouse.task import Task


class Regression(Task):
    name = "regression"
    main_metric = "error"
    higher_is_better = False

    def net(self, module, taps=None):
        return Net(module, answer="y", taps=taps)

    def metrics(self):
        return {"error": MeanError()}


class MeanError:
    higher_is_better = False

    def __init__(self):
        self.sum = torch.zeros(2, dtype=torch.float64)

    def update(self, out, batch):
        self.sum += torch.tensor(
            [float((out["y"] - batch["target"]).square().sum()), len(batch["target"])]
        )

    def totals(self):
        return self.sum

    def take(self, totals):
        self.sum = totals

    def compute(self):
        return {"error": float(self.sum[0] / self.sum[1])}


class Fit(Objective):
    """A regression with dropout, a running mean as proposal and noise by the clock."""

    def __init__(self, student, noise=0.0, poison=-1):
        super().__init__(student)
        self.noise, self.poison = noise, poison
        self.register_buffer("seen", torch.zeros(()))
        self.steps_seen = 0

    def forward(self, batch, knowledge, clock):
        x = batch.view("x") + self.noise * clock.randn("noise", batch, batch.view("x").shape[1])
        y = self.student(x)["y"]
        self.propose(seen=0.9 * self.seen + 0.1 * x.mean())
        loss = F.mse_loss(y, batch["target"])
        if clock.step == self.poison:
            loss = loss * float("nan")
        return {"task": loss, "size": 0.01 * y.square().mean()}


def data(rows=96):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=rng)
    return TensorSource({"x": x, "target": x[:, :2].sin()}, name="toy")


def recipe(**budget):
    values = {
        "steps": None,
        "epochs": 3,
        "batch": 16,
        "lr": 0.05,
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "milestones": [],
        "gamma": 0.1,
        "warmup": 2,
        "clip": None,
        "accumulate": 1,
        "validate_every": None,
        "select": "last",
        "metric": None,
        "ema": None,
    }
    values.update(budget)
    output = types.SimpleNamespace(checkpoint_minutes=1.0, keep=2, log_every=5)
    return types.SimpleNamespace(
        budget=types.SimpleNamespace(**values),
        output=output,
        hardware=types.SimpleNamespace(workers=0),
    )


def make_job(folder: Path, seed=0, **budget):
    source = data()
    splits = Splits({"train": source, "val": data(32)}, "toy")
    return Job(
        recipe(**budget), Regression(splits), folder, seed=seed, hardware=Hardware(
            accelerator="cpu"), log=RunLog(folder), models=None, cache=folder / "cache",
    )  # fmt: skip


def student(job, dropout=0.0):
    def make():
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2)
        )

    return job.task.net(job.build(make, "student"))


def train(job, dropout=0.2, noise=0.1, **fit):
    objective = Fit(student(job, dropout), noise)
    done = job.fit("student", objective, job.order("train"), **fit)
    return {k: v.clone() for k, v in objective.state_dict().items()}, done


class Killer(Fit):
    """Asks the run to stop at a step, as a signal would."""

    def __init__(self, student, noise, at, job):
        super().__init__(student, noise)
        self.at, self.job = at, job

    def after_step(self, clock):
        if clock.step == self.at:
            self.job.stop.asked = 15


@pytest.mark.parametrize("settings", [{}, {"select": "best"}, {"ema": 0.9}, {"accumulate": 4}])
def test_resume_is_bit_for_bit(tmp_path, settings):
    whole, done = train(make_job(tmp_path / "whole", **settings))
    for at in (0, 4, 5, 11):
        folder = tmp_path / f"cut{at}"
        job = make_job(folder, **settings)
        with pytest.raises(Interrupted):
            job.fit("student", Killer(student(job, 0.2), 0.1, at, job), job.order("train"))
        resumed, again = train(make_job(folder, **settings))
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)
        assert again.scores == done.scores
        assert again.best_step == done.best_step


def test_finished_stage_is_read_back_not_run(tmp_path):
    first, _ = train(make_job(tmp_path))
    job = make_job(tmp_path)
    objective = Fit(student(job, 0.2), 0.1)
    objective.forward = None  # would raise if it were called
    job.fit("student", objective, job.order("train"))
    assert all(torch.equal(first[k], v) for k, v in objective.state_dict().items())
    assert not objective.training


@pytest.mark.parametrize("pieces", [2, 4, 5])
def test_micro_batches_equal_one_batch(tmp_path, pieces):
    def run(folder, accumulate):
        job = make_job(folder, accumulate=accumulate)
        net = job.task.net(job.build(lambda: nn.Linear(6, 2), "student"))
        objective = Fit(net, 0.1)
        job.fit("student", objective, job.order("train"), clip=0.5)
        return objective.student.state_dict()

    one, many = run(tmp_path / "one", 1), run(tmp_path / "many", pieces)
    for key in one:
        assert torch.allclose(one[key], many[key], atol=1e-6), key


def test_damaged_checkpoint_falls_back_and_ends_equal(tmp_path):
    whole, _ = train(make_job(tmp_path / "whole"))
    folder = tmp_path / "cut"
    for at in (4, 9):
        job = make_job(folder)
        with pytest.raises(Interrupted):
            job.fit("student", Killer(student(job, 0.2), 0.1, at, job), job.order("train"))
    files = sorted((folder / "stages" / "student").glob("step-*.state"))
    assert len(files) == 2
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)
    resumed, _ = train(make_job(folder))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert "damaged" in (folder / "log.jsonl").read_text()
    job = make_job(tmp_path / "all-bad")
    with pytest.raises(Interrupted):
        job.fit("student", Killer(student(job, 0.2), 0.1, 4, job), job.order("train"))
    for path in (tmp_path / "all-bad" / "stages" / "student").glob("step-*.state"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="every checkpoint"):
        train(make_job(tmp_path / "all-bad"))


def test_not_finite_names_the_term_and_keeps_the_checkpoint(tmp_path):
    job = make_job(tmp_path)
    job.recipe.output.checkpoint_minutes = 0
    objective = Fit(student(job), poison=7)
    with pytest.raises(TrainingError, match=r"'task'.*step 7"):
        job.fit("student", objective, job.order("train"))
    assert list((tmp_path / "stages" / "student").glob("step-*7.state"))


def test_changed_stage_is_refused_with_its_field(tmp_path):
    train(make_job(tmp_path))
    with pytest.raises(CheckpointError, match="steps: 18 -> 24"):
        train(make_job(tmp_path, epochs=4))


def test_a_name_used_twice_is_refused(tmp_path):
    job = make_job(tmp_path)
    train(job)
    with pytest.raises(RecipeError, match="begun twice"):
        train(job)
    child = job.child("round", 1)
    train(child)


def test_best_keeps_the_best_validation_state(tmp_path):
    job = make_job(tmp_path, select="best", epochs=4, lr=0.3)
    objective = Fit(student(job))
    done = job.fit("student", objective, job.order("train"))
    assert job.evaluate(objective.export(), "val")["error"] == pytest.approx(done.scores["error"])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len([line for line in lines if "validation" in line]) == 4


def test_snapshots_differ_and_begin_with_the_initial_state(tmp_path):
    from stillhouse.engine.checkpoint import read_state

    job = make_job(tmp_path)
    objective = Fit(student(job))
    before = objective.student.module[0].weight.detach().clone()
    done = job.fit("student", objective, job.order("train"), keep=Each(1))
    assert len(done.snapshots) == 4
    states = [read_state(path)["0.weight"] for path in done.snapshots]
    assert torch.equal(states[0], before)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(states))
    assert torch.equal(states[-1], objective.student.module[0].weight)


def test_seeds_differ_and_repeat(tmp_path):
    a, _ = train(make_job(tmp_path / "a", seed=1))
    b, _ = train(make_job(tmp_path / "b", seed=1))
    c, _ = train(make_job(tmp_path / "c", seed=2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_once_returns_what_it_reads_back(tmp_path):
    calls = []

    def value():
        calls.append(1)
        return {"t": torch.arange(3), "x": 0.1, "names": ["a", "b"], "pair": (1, None)}

    first = make_job(tmp_path).once("closed", value)
    second = make_job(tmp_path).once("closed", value)
    assert len(calls) == 1
    assert torch.equal(first["t"], second["t"])
    assert first["x"] == second["x"] == 0.1
    assert second["pair"] == (1, None)


def test_shared_stage_is_made_once(tmp_path):
    share = {"data": "toy", "seed": 0}
    a = make_job(tmp_path)
    a.fit("teacher", Fit(student(a)), a.order("train"), share=share)
    b = make_job(tmp_path / "other")
    b.cache = a.cache
    objective = Fit(student(b))
    objective.forward = None
    b.fit("teacher", objective, b.order("train"), share=share)


def test_optimisers_by_pattern_move_every_parameter_once(tmp_path):
    job = make_job(tmp_path)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    with pytest.raises(RecipeError, match="no optimiser moves"):
        job.fit("a", Fit(student(job)), job.order("train"), optim={"student.module.0.*": sgd})
    with pytest.raises(RecipeError, match="matched by two"):
        job.fit("b", Fit(student(job)), job.order("train"), optim={"*": sgd, "student.*": sgd})
    with pytest.raises(RecipeError, match="matches no parameter"):
        job.fit("c", Fit(student(job)), job.order("train"), optim={"*": sgd, "nobody": sgd})


def test_redo_runs_the_stage_and_what_follows(tmp_path):

    first = make_job(tmp_path)
    assert [first.once(n, lambda: 1) for n in "abc"] == [1, 1, 1]
    again = make_job(tmp_path)
    again.family = Family(("b",))
    assert [again.once(n, lambda: 2) for n in "abc"] == [1, 2, 2]


def test_schedule_reaches_the_rate(tmp_path):
    job = make_job(tmp_path)
    rates = []

    class Watch(Fit):
        def before_step(self, clock):
            rates.append(cosine()(clock))

    job.fit("student", Watch(student(job)), job.order("train"))
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)


def test_two_turns_move_their_own_parameters(tmp_path):
    class Players(Objective):
        turns = ("critic", "maker")

        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(6, 1)
            self.maker = nn.Linear(6, 6)
            self.student = self.maker
            self.seen = []

        def forward(self, batch, knowledge, clock):
            score = self.critic(self.maker(batch.view("x"))).mean()
            return {f"{clock.turn}/score": score if clock.turn == "critic" else -score}

        def after_backward(self, terms, clock):
            moved = {n.split(".")[0] for n, p in self.named_parameters() if p.grad is not None}
            self.seen.append((clock.turn, moved))
            for parameter in self.parameters():
                parameter.grad = None
            return True

    job = make_job(tmp_path, steps=2, epochs=None)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    objective = Players()
    job.fit("play", objective, job.order("train"), optim={"critic.*": sgd, "maker.*": sgd})
    assert objective.seen[:2] == [("critic", {"critic"}), ("maker", {"maker"})]


def test_refused_step_changes_nothing(tmp_path):
    class Refuses(Fit):
        def after_backward(self, terms, clock):
            return False

    job = make_job(tmp_path, steps=3, epochs=None)
    net = job.task.net(job.build(lambda: nn.Linear(6, 2), "student"))
    objective = Refuses(net)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    job.fit("student", objective, job.order("train"))
    assert all(torch.equal(before[k], v) for k, v in objective.state_dict().items())


def test_what_prepare_proposes_is_kept_after_steps_that_proposed_nothing(tmp_path):
    class Late(Fit):
        def prepare(self, batch, clock):
            if clock.step >= 2:
                self.propose(seen=torch.tensor(float(clock.step)))
            return batch

        def forward(self, batch, knowledge, clock):
            y = self.student(batch.view("x"))["y"]
            return {"task": F.mse_loss(y, batch["target"])}

        def after_backward(self, terms, clock):
            return clock.step < 2

    job = make_job(tmp_path, steps=3, epochs=None)
    objective = Late(job.task.net(job.build(lambda: nn.Linear(6, 2), "student")))
    job.fit("student", objective, job.order("train"))
    assert objective.seen == 2.0  # the step was refused, what prepare proposed was not


def test_small_steps_are_read_together_and_change_nothing(tmp_path):
    class Singly(TensorSource):
        reads = 0

        def read(self, rows, views):
            Singly.reads += 1
            return super().read(rows, views)

    def run(folder, source):
        job = make_job(folder)
        objective = Fit(student(job, 0.2), 0.1)
        job.fit("student", objective, Shuffled(source, 20))
        return objective.state_dict()

    toy = data()
    singly = Singly(toy.views, name="toy")
    assert (Shuffled(toy, 20).together, Shuffled(singly, 20).together) == (409, 1)
    one, other = run(tmp_path / "a", toy), run(tmp_path / "b", singly)
    assert Singly.reads == 15  # three epochs of five steps, the last of 16 rows
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_only_readings_row_by_row_are_made_together():
    toy = data()
    assert Shuffled(Subset(toy, torch.arange(50)), 16).together > 1
    augmented = TensorSource(toy.views, augment=lambda batch, views: batch)
    assert Shuffled(augmented, 16).together == 1
    images = TensorSource({"x": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)})
    assert images.row_bytes == 4 * 3 * 32 * 32
    assert Shuffled(images, 4).together == 5
    order = Shuffled(TensorSource({"x": torch.arange(9), "name": [str(i) for i in range(9)]}), 4)
    steps = order.epoch(0, lambda: torch.Generator().manual_seed(0))
    for rows, batch in zip(steps, order.read_together(steps, Views(0)), strict=True):
        alone = order.read(rows, Views(0))
        assert torch.equal(batch["x"], alone["x"])
        assert (batch["name"], batch["draw"]) == (alone["name"], alone["draw"])


def test_a_term_over_nothing_is_dropped(tmp_path):
    class Sometimes(Fit):
        def count(self, batch):
            return {"": batch.size, "size": 0}

        def forward(self, batch, knowledge, clock):
            terms = super().forward(batch, knowledge, clock)
            terms["size"] = terms["size"] * float("nan")
            return terms

    job = make_job(tmp_path, steps=3, epochs=None)
    job.fit("student", Sometimes(student(job)), job.order("train"))


def test_forward_twice_proposes_once(tmp_path):
    job = make_job(tmp_path, steps=1, epochs=None)
    objective = Fit(student(job))
    batch = job.order("train").read(torch.arange(8), Views(0))
    clock = job.clock("x")
    state = {
        k: v.clone()
        for k, v in objective.state_dict().items()
        if "running" not in k and "tracked" not in k
    }
    objective.forward(batch, None, clock)
    objective.forward(batch, None, clock)
    assert all(torch.equal(objective.state_dict()[k], v) for k, v in state.items())
    assert len(objective._made) == 1


def test_source_is_reread_in_the_same_order_by_workers(tmp_path):
    whole, _ = train(make_job(tmp_path / "a"))
    job = make_job(tmp_path / "b")
    job.recipe.hardware.workers = 3
    ahead, _ = train(job)
    assert all(torch.equal(whole[k], ahead[k]) for k in whole)


def test_order_knows_no_empty_source():
    from stillhouse.errors import DataError

    with pytest.raises(DataError, match="empty"):
        TensorSource({"x": torch.zeros(0, 3)})
    with pytest.raises(DataError, match="batch size"):
        Shuffled(data(), 0)


def test_best_without_validation_split_is_refused(tmp_path):
    job = make_job(tmp_path)
    job.task.splits = Splits({"train": data()}, "toy")
    with pytest.raises(RecipeError, match="validation split"):
        job.fit("student", Fit(student(job)), job.order("train"), keep=Best())


# ---- a floor under a figure -------------------------------------------------------------------


def scores(values):
    """A validation that tells these figures one after another."""
    told = iter(values)
    return lambda: {"error": next(told)}


def test_it_ends_where_the_figure_sinks_and_keeps_the_state_before(tmp_path):
    whole, _ = train(make_job(tmp_path / "two", epochs=3), steps=12, validate_every=6)
    job = make_job(tmp_path / "floor", epochs=3)
    kept, done = train(
        job, keep=Above(1.0, "error"), validate=scores([0.5, 0.9, 1.5, 0.1]), validate_every=6,
        steps=24,
    )  # fmt: skip
    assert done.steps == 18
    assert done.best_step == 12
    assert "error 1.5 at step 18 is beyond the floor of 1; the state of step 12" in done.stopped
    assert done.scores == {"error": 0.9}
    assert kept.keys() == whole.keys()
    again, reloaded = train(
        make_job(tmp_path / "floor", epochs=3), keep=Above(1.0, "error"), steps=24,
        validate_every=6,
    )  # fmt: skip
    assert all(torch.equal(kept[k], again[k]) for k in kept)
    assert (reloaded.stopped, reloaded.steps) == (done.stopped, 18)
    log = (tmp_path / "floor" / "log.jsonl").read_text()
    assert "beyond the floor" in log


def test_a_dip_is_passed_over_unless_the_training_ends_in_it(tmp_path):
    keep = Above(1.0, "error", patience=2)
    told = [0.5, 1.5, 0.6, 1.5, 1.6, 0.1]
    _, done = train(
        make_job(tmp_path / "two"), keep=keep, validate=scores(told), validate_every=3, steps=18
    )
    assert (done.steps, done.best_step) == (15, 9)
    _, short = train(
        make_job(tmp_path / "end"), keep=keep, validate=scores(told), validate_every=3, steps=12
    )
    assert (short.steps, short.best_step) == (12, 9)
    assert "step 12 is beyond the floor" in short.stopped
    _, over = train(
        make_job(tmp_path / "over"), keep=keep, validate=scores(told), validate_every=3, steps=9
    )
    assert (over.steps, over.best_step, over.stopped) == (9, 9, "")


def test_where_it_never_sinks_it_is_as_without(tmp_path):
    plain, _ = train(make_job(tmp_path / "plain"))
    floor, done = train(make_job(tmp_path / "floor"), keep=Above(1e9))
    assert done.stopped == ""
    assert done.steps == done.best_step == 18
    assert all(torch.equal(plain[k], floor[k]) for k in plain)


def test_where_nothing_is_above_it_the_initial_state_is_kept(tmp_path):
    job = make_job(tmp_path)
    kept, done = train(job, keep=Above(-1.0))
    assert done.best_step == 0
    assert done.steps == 6
    first = make_job(tmp_path / "fresh").build(lambda: torch.nn.Linear(6, 16), "student")
    assert torch.equal(kept["student.module.0.weight"], first.weight)


def test_stopped_on_the_way_it_ends_the_same(tmp_path, monkeypatch):
    def run(folder):
        return train(make_job(folder), keep=Above(0.42), validate_every=2)

    # Turned round, so that learning is what makes the figure sink.
    monkeypatch.setattr(Regression, "higher_is_better", True)

    whole, done = run(tmp_path / "whole")
    assert 0 < done.best_step < done.steps < 18
    calls = {"n": 0}
    due = Stage.due

    def ask(self, now):
        calls["n"] += 1
        if calls["n"] == 3:
            self.stop.asked = 15
        return due(self, now)

    monkeypatch.setattr(Stage, "due", ask)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    monkeypatch.setattr(Stage, "due", due)
    again, ended = run(tmp_path / "cut")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert (ended.stopped, ended.steps, ended.best_step) == (
        done.stopped,
        done.steps,
        done.best_step,
    )


def test_it_needs_validation_data(tmp_path):
    job = make_job(tmp_path)
    job.splits._sources.pop("val")
    with pytest.raises(RecipeError, match=r"floor.*data\.options\.val"):
        train(job, keep=Above(1.0))


def test_a_stage_that_was_refused_before_its_first_step_may_begin_differently(tmp_path):
    job = make_job(tmp_path)
    job.stage("student", "train", stamp={"steps": 1})
    again = make_job(tmp_path)
    stage = again.stage("student", "train", stamp={"steps": 2})
    stage.save(1, {"x": 1})
    with pytest.raises(CheckpointError, match=r"steps: 2 -> 3.*--redo student"):
        make_job(tmp_path).stage("student", "train", stamp={"steps": 3})


def test_redo_of_a_shared_stage_makes_it_again_and_only_when_it_is_named(tmp_path):
    made = []

    def value():
        made.append(len(made))
        return len(made)

    def run(*redo):
        job = make_job(tmp_path)
        job.family = Family(redo)
        first = job.once("first", lambda: 0)
        return first, job.once("expert", value, share={"of": "this"})

    assert run() == (0, 1)
    assert run() == (0, 1)
    assert run("first") == (0, 1)
    assert run("expert") == (0, 2)
    assert run() == (0, 2)
