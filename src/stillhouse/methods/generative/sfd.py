r"""SFD: score forgetting distillation (Chen et al., ICLR 2025).

A pretrained class-conditional diffusion model becomes a generator of one step that no longer draws
one class, without any real image. Three networks e(x_t, t, c) predict noise and begin with the
pretrained weights: the teacher phi (frozen), the fake score psi, which follows the generator's own
images, and the generator theta,

.. math::
    G(n, c) = \sigma_{init} (n - \theta(b_{init} n, t_{init}, c)), \qquad
    f(x_t, t, c) = (x_t - b_t e(x_t, t, c)) / a_t .

An iteration has two turns, with c drawn from the classes that stay and c_f the one to forget:

.. math::
    \psi &: \; w_r \sum (\epsilon - \psi(x_t, t, c))^2 \text{ on } G(n, c)
        + w_f \sum (\epsilon - \psi(x_t, t, c_f))^2 \text{ on } G(n, c_f) \\
    \theta &: \; w_r \, \ell(c, c) + w_f \, \ell(c_o, c_f), \quad
    \ell(c_{teacher}, c_{fake}) = \frac{1}{\omega} \sum (p - s) [ (p - x_0) - \alpha (p - s) ]

with p = f_phi(x_t, t, c_teacher), s = f_psi(x_t, t, c_fake), omega the detached mean of |p - x_0|.
Sums over an image's elements, means over images. The forget term is least where G(., c_f) draws
from what the teacher knows as c_o, the override class. Gradients reach theta through x_0 and
through the input of both networks; detached, this is Diff-Instruct (a variant).

Where this differs from the released code: labels are drawn, its loop reads the real images' labels
(their images it does not use either); in two stages the teacher stays the pretrained model, while
the released code loads it from the place of the fake score (`teacher_from: score`); the random
override draws from the other classes evenly for any number of them; the average begins with the
initial weights as released, but its decay follows the number of steps unless it is given, since
0.9999 keeps an initial network that is no one-step generator.

Only the generator is unlearned: the teacher still knows the class, and is not in the artifact.

Text-to-image models (the paper's second part) are not supported: `UNet2DConditionModel` and
pipelines with text encoders are refused by `models/diffusers_unet.py`, which says what is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Draws
from stillhouse.clock import Clock
from stillhouse.engine.checkpoint import read_state
from stillhouse.engine.job import Each
from stillhouse.engine.step import Clip
from stillhouse.errors import RecipeError
from stillhouse.losses.score import diff_instruct, noise_prediction, score_identity
from stillhouse.method import Card, Claim, Method, MethodConfig, Variant
from stillhouse.objective import Objective
from stillhouse.parts.ema import EMA
from stillhouse.parts.noise import Sampler, one_step
from stillhouse.parts.override import chosen_override, random_override
from stillhouse.stages.audit import (
    checked_budget,
    checked_class,
    conditioning_table,
    drawing_artifact,
    judged_forgetting,
    judged_once,
    noise_predictor,
    retrained,
)
from stillhouse.tasks.image_generation import (
    Judged,
    NoiseNet,
    draw_images,
    independent_classifier,
    to_images,
)
from stillhouse.teacher import Frozen, Knowledge


class Drawn(NamedTuple):
    """What a turn draws: labels (n,), generator noise and added noise (n, C, H, W), times (n,).

    `shown` are the labels as the fake score sees them: some without their class, where asked.
    """

    labels: Tensor
    shown: Tensor
    noise: Tensor
    added: Tensor
    times: Tensor


class SfdObjective(Objective):
    """Fake score and generator, one after the other.

    Args:
        teacher: phi, a NoiseNet in a Frozen.
        score: psi, trained.
        generator: theta, trained.
        config: see `Sfd.Config`.
        shape: (C, H, W).
        classes: K.
        forget: the class to forget; None distils all classes (SiD).
        decay: of the generator's average.
        classifier: gives logits of images in [0, 1], for an override that it chooses.
    """

    turns = ("score", "generator")

    def __init__(
        self,
        teacher: Frozen,
        score: NoiseNet,
        generator: NoiseNet,
        config: Sfd.Config,
        shape: Sequence[int],
        classes: int,
        *,
        forget: int | None,
        decay: float,
        classifier: Frozen | None = None,
    ) -> None:
        super().__init__()
        self.score, self.generator = score, generator
        self.average = EMA(generator, decay)
        self._teacher, self._classifier = teacher, classifier
        self.config, self.shape = config, tuple(shape)
        # With weight 0 the class is never asked for: plain SiD on the others.
        self.forgetting = forget is not None and config.forget_weight > 0
        self.forget = -1 if forget is None else forget
        self.classes = classes
        self.staying = [c for c in range(classes) if c != forget]
        self.schedule = generator.schedule

    def guests(self) -> Iterator[Frozen]:
        """The teacher, and the classifier that chooses."""
        yield self._teacher
        if self._classifier is not None:
            yield self._classifier

    # ---- what is drawn -----------------------------------------------------------------

    def drawn(self, turn: str, branch: str, batch: Batch, clock: Clock) -> Drawn:
        """All chance of one branch ("remain", "forget") in one turn."""
        name = f"{turn}/{branch}"
        if branch == "remain":
            staying = torch.tensor(self.staying)

            def label(rows: int, rng: Generator) -> Tensor:
                return staying[torch.randint(0, len(staying), (rows,), generator=rng)]

            labels = clock.draw(f"{name}/labels", batch, label)
        else:
            labels = torch.full((batch.size,), self.forget, device=batch.device)
        low, high = self._window(branch, clock)
        dtype = next(self.generator.parameters()).dtype
        return Drawn(
            labels,
            self._shown(name, labels, batch, clock),
            clock.randn(f"{name}/noise", batch, *self.shape).to(dtype),
            clock.randn(f"{name}/added", batch, *self.shape).to(dtype),
            clock.draw(
                f"{name}/times",
                batch,
                lambda rows, rng: torch.randint(low, high, (rows,), generator=rng),
            ),
        )

    def _shown(self, name: str, labels: Tensor, batch: Batch, clock: Clock) -> Tensor:
        share, null = self.config.score_label_dropout, self.score.null
        if share == 0 or null is None:
            return labels
        hidden = clock.rand(f"{name}/hidden", batch) < share
        return torch.where(hidden, torch.full_like(labels, null), labels)

    def _window(self, branch: str, clock: Clock) -> tuple[int, int]:
        """Times in [low, high); wide for the forgotten class while it is warmed up."""
        if branch == "forget" and clock.progress < self.config.forget_warmup:
            steps = len(self.schedule)
            return int(0.02 * steps), int(0.98 * steps)
        return self.config.t_min, self.config.t_max

    def override(self, fake_x0: Tensor, batch: Batch, clock: Clock) -> Tensor:
        """The classes that the teacher is asked by in place of the forgotten one.

        Args:
            fake_x0: what the fake score sees in the forgotten class's images (n, C, H, W).
            batch: whose rows they are.
            clock: of the draws.
        """
        config, rows = self.config, len(fake_x0)
        if config.override == "fixed":
            return torch.full((rows,), config.override_of(self.classes), device=fake_x0.device)
        if config.override == "random":
            return clock.draw(
                "override",
                batch,
                lambda n, rng: random_override(n, self.classes, self.forget, rng),
            )
        assert self._classifier is not None
        scores: Tensor = self._classifier.quiet(to_images(fake_x0.detach()))["logits"]
        drawn = config.override == "classifier-sample"
        uniform = clock.rand("override", batch) if drawn else None
        return chosen_override(scores, self.forget, uniform)

    # ---- the two turns -----------------------------------------------------------------

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """Terms `score/*` in the score's turn, `sid/*` in the generator's; all in "main"."""
        terms: dict[str, Tensor] = {}
        if clock.turn != "generator":
            terms.update(self._score_turn(batch, clock))
        if clock.turn != "score":
            terms.update(self._generator_turn(batch, clock))
        return terms

    def _branches(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Drawn]:
        config = self.config
        found = {}
        if config.remain_weight > 0:
            found["remain"] = self.drawn(turn, "remain", batch, clock)
        if self.forgetting and clock.step % config.forget_every == 0:
            found["forget"] = self.drawn(turn, "forget", batch, clock)
        return found

    def _weight(self, branch: str) -> float:
        config = self.config
        return config.remain_weight if branch == "remain" else config.forget_weight

    def _generated(self, drawn: Drawn) -> Tensor:
        predict = self.generator.predict(drawn.labels)
        return one_step(predict, drawn.noise, self.schedule, self.config.t_init)

    def _score_turn(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """I. The fake score learns to denoise what the generator draws now."""
        branches = self._branches("score", batch, clock)
        if not branches:
            return {}
        drawn = _joined(branches.values())
        with torch.no_grad():
            x0 = self._generated(drawn)
        x_t = self.schedule.add_noise(x0, drawn.added, drawn.times)
        found = self.score.noise(x_t, drawn.times, drawn.shown, self.config.score_guidance)
        each = noise_prediction(found, drawn.added, reduction="none")
        return self._terms("score", branches, each)

    def _generator_turn(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """II. The generator is moved so that both scores agree on what it draws."""
        branches = self._branches("generator", batch, clock)
        if not branches:
            return {}
        config, drawn = self.config, _joined(branches.values())
        x0 = self._generated(drawn)
        x_t = self.schedule.add_noise(x0, drawn.added, drawn.times)
        through = not config.diff_instruct
        with _resting(self.score), torch.set_grad_enabled(through and torch.is_grad_enabled()):
            fake = self.score.x0(x_t, drawn.times, drawn.labels, config.guidance)
            asked = drawn.labels
            if "forget" in branches:
                rows = len(branches["forget"].labels)
                chosen = self.override(fake[-rows:], batch, clock)
                asked = torch.cat([asked[:-rows], chosen.to(asked)])
            phi: NoiseNet = self._teacher.module  # type: ignore[assignment]
            true = phi.x0(x_t, drawn.times, asked, config.guidance)
        if config.diff_instruct:
            each = diff_instruct(x0, true, fake, reduction="none")
        else:
            each = score_identity(x0, true, fake, alpha=config.alpha, reduction="none")
        return self._terms("sid", branches, each)

    def _terms(self, kind: str, branches: dict[str, Drawn], each: Tensor) -> dict[str, Tensor]:
        sizes = [len(drawn.labels) for drawn in branches.values()]
        return {
            f"{kind}/{branch}": self._weight(branch) * part.mean()
            for branch, part in zip(branches, torch.split(each, sizes), strict=True)
        }

    def after_step(self, clock: Clock) -> None:
        """The average follows the generator."""
        self.average.after_step(clock)

    def export(self) -> nn.Module:
        """The averaged generator alone."""
        net: NoiseNet = self.average.module  # type: ignore[assignment]
        net.sampler = Sampler(steps=0, time=self.config.t_init)
        return net


def _joined(parts: Any) -> Drawn:
    return Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))


@contextmanager
def _resting(net: nn.Module) -> Iterator[None]:
    """Inside the block the net is in eval mode."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


class Sfd(Method):
    """A generator of one step, distilled without data, that no longer draws one class."""

    judges_teacher = True

    card = Card(
        id="sfd",
        title="Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in "
        "Diffusion Models",
        summary="A diffusion model becomes a one-step generator that forgets a class: its scores "
        "there are pulled to those of another class; no data is read.",
        paper="ICLR 2025; arXiv 2409.11219",
        year=2025,
        authors=("Tianqi Chen", "Shujian Zhang", "Mingyuan Zhou"),
        links=(
            "https://arxiv.org/abs/2409.11219",
            "https://github.com/tqch/score-forgetting-distillation",
        ),
        room="generative",
        task="image-generation",
        needs=("fresh", "input_grad", "weights"),
        yields="model",
        stages=(
            ("teacher?", "train"),
            ("classifier?", "train"),
            ("sid?", "train"),
            ("forget?", "train"),
            ("retrained?", "train"),
            ("relearn?", "train"),
            ("judge", "judge"),
            ("teacher-audit?", "judge"),
        ),
    )

    class Config(MethodConfig):
        """Settings of `sfd`. Iterations and batch are those of the budget."""

        shared = frozenset({"forget", "override_class"})

        forget: int = Field(
            0,
            ge=0,
            description="the class c_f to forget, by its number",
            json_schema_extra={"source": "code: README, config"},
        )
        override: Literal["fixed", "random", "classifier", "classifier-sample"] = Field(
            "fixed",
            description="the class c_o that takes its place: fixed (override_class); random, "
            "another one for each image; classifier, the one that a classifier of real images "
            "sees in the image, or classifier-sample, drawn by its probabilities",
            json_schema_extra={"source": "code: label_to_override; null, rand, amax"},
        )
        override_class: int | None = Field(
            None,
            ge=0,
            description="for override: fixed; none: the class after c_f",
            json_schema_extra={"source": "code: 1 for c_f 0"},
        )
        mode: Literal["joint", "two-stage", "sid"] = Field(
            "joint",
            description="joint: forget while distilling, from the pretrained weights; two-stage: "
            "distil all classes first; sid: only that, which forgets nothing",
            json_schema_extra={"source": "code: both; sid is the control"},
        )
        teacher_from: Literal["pretrained", "score"] = Field(
            "pretrained",
            description="for two-stage: the teacher of the second stage; score: the first stage's "
            "fake score, as released",
            json_schema_extra={"source": "sheet, trap 8; code: score"},
        )
        remain_weight: float = Field(
            1.0,
            ge=0,
            description="w_r, of the classes that stay, in both turns",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        forget_weight: float = Field(
            0.01,
            ge=0,
            description="w_f, of the class to forget, in both turns; 0 never asks for it. Its "
            "batch is whole, while the others share theirs",
            json_schema_extra={"source": "code: DDPM/configs, for 50,000 iterations"},
        )
        forget_every: int = Field(
            1,
            ge=1,
            description="iterations between those that have the terms of the class to forget",
            json_schema_extra={"source": "our addition, for short runs"},
        )
        forget_warmup: float = Field(
            0.0,
            ge=0,
            le=1,
            description="first share of the iterations in which the forgotten class's times are "
            "drawn from [.02 T, .98 T)",
            json_schema_extra={"source": "code: forget_warmup"},
        )
        alpha: float = Field(
            1.2,
            description="of the score identity loss; 1 is the safe setting for small problems",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        diff_instruct: bool = Field(
            False,
            description="no gradient through the score networks (Diff-Instruct); alpha is unused",
            json_schema_extra={"source": "code: use_diffinst"},
        )
        t_init: int = Field(
            440,
            ge=0,
            description="time at which the generator is asked",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        t_min: int = Field(
            38,
            ge=0,
            description="first time of the losses",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        t_max: int = Field(
            712,
            ge=1,
            description="the time before which the times of the losses end",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        lr: float = Field(
            1e-5,
            gt=0,
            description="Adam's rate for the generator",
            json_schema_extra={"source": "code: every config; for 50,000 iterations"},
        )
        score_lr: float = Field(
            1e-5,
            gt=0,
            description="Adam's rate for the fake score",
            json_schema_extra={"source": "code: SFD on CIFAR-10; 3e-5 on STL-10"},
        )
        sid_score_lr: float | None = Field(
            None,
            gt=0,
            description="the same while all classes are distilled (two-stage, sid); none: score_lr",
            json_schema_extra={"source": "code: 3e-5"},
        )
        sid_steps: int | None = Field(
            None,
            ge=1,
            description="iterations of the first of two stages; none: those of the budget",
            json_schema_extra={"source": "our setting"},
        )
        betas: tuple[float, float] = Field(
            (0.0, 0.999),
            description="of Adam, for both networks; no weight decay",
            json_schema_extra={"source": "code: DDPM/configs"},
        )
        clip: float | None = Field(
            1.0,
            gt=0,
            description="largest magnitude of each number of a gradient",
            json_schema_extra={"source": "code"},
        )
        ema: float | None = Field(
            None,
            ge=0,
            le=1,
            description="decay of the generator's average, which is exported; none: 1 - 10 / "
            "iterations (at least 0)",
            json_schema_extra={"source": "code: .9999; sheet, trap 14"},
        )
        guidance: float = Field(
            0.0,
            ge=0,
            description="of teacher and fake score in the generator's turn, (1 + g) e_c - g e_null",
            json_schema_extra={"source": "code: cond_scale 0 for classes"},
        )
        score_guidance: float = Field(
            0.0,
            ge=0,
            description="of the fake score while it is trained",
            json_schema_extra={"source": "code: cond_scale 0 for classes"},
        )
        score_label_dropout: float = Field(
            0.0,
            ge=0,
            le=1,
            description="share of images that the fake score is shown without their class",
            json_schema_extra={"source": "code: argument of the loss, unused there"},
        )
        teacher_steps: int = Field(
            50,
            ge=1,
            description="of DDIM, by which the teacher is judged beside",
            json_schema_extra={"source": "sheet: baselines"},
        )
        relearn_steps: int = Field(
            0,
            ge=0,
            description="iterations of an attack that teaches the class again, with the teacher's "
            "help, for the report; 0: none",
            json_schema_extra={"source": "our addition; sheet, trap 15"},
        )

        @model_validator(mode="after")
        def _sound(self) -> Sfd.Config:
            if self.t_min >= self.t_max:
                raise ValueError(f"t_min {self.t_min} must be below t_max {self.t_max}")
            if self.override_class == self.forget:
                raise ValueError(f"override_class is the class to forget, {self.forget}")
            if self.remain_weight == 0 and self.forget_weight == 0:
                raise ValueError("remain_weight and forget_weight are both 0: nothing to learn")
            if self.remain_weight == 0 and self.forget_every > 1:
                raise ValueError("forget_every leaves iterations without any term: set 1")
            if self.mode == "sid" and self.remain_weight == 0:
                raise ValueError("mode sid distils with remain_weight, which is 0")
            return self

        def override_of(self, classes: int) -> int:
            """c_o of `override: fixed`."""
            if self.override_class is None:
                return (self.forget + 1) % classes
            return self.override_class

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={
                "override": "fixed", "forget_weight": 0.01, "alpha": 1.2, "lr": 1e-5,
                "score_lr": 1e-5, "sid_score_lr": 3e-5, "ema": 0.9999, "teacher_from": "score",
                "t_init": 440, "t_min": 38, "t_max": 712, "forget_every": 1,
            },
            budget={"steps": 50000, "batch": 128},
            about="the released CIFAR-10 run; two-stage takes its teacher from the fake score",
        ),
        "sid": Variant(set={"mode": "sid"}, about="control: one step, all classes, no forgetting"),
        "two-stage": Variant(set={"mode": "two-stage"}, about="distil all classes, then forget"),
        "random": Variant(set={"override": "random"}, about="a random other class for each image"),
        "classifier": Variant(
            set={"override": "classifier"}, about="the class that a classifier sees instead"
        ),
        "alpha-1": Variant(set={"alpha": 1.0}, about="alpha 1"),
        "alpha-1.2": Variant(set={"alpha": 1.2}, about="alpha 1.2, as released"),
        "diff-instruct": Variant(
            set={"diff_instruct": True}, about="no gradient through the score networks"
        ),
        "weak": Variant(set={"forget_weight": 0.01}, about="w_f .01, as released"),
        "remain-only": Variant(
            set={"forget_weight": 0.0}, about="w_f 0: the others distilled, c_f never asked for"
        ),
    }  # fmt: skip
    claims: ClassVar[list[Claim]] = [
        Claim("nine in ten of the class's images are another's", "ua", "sfd", "0.9"),
        Claim(
            "the same distillation without forgetting keeps the class",
            "ua",
            "sfd",
            "sfd/sid",
            margin=0.5,
        ),
        Claim(
            "the other classes are drawn as well as without forgetting, within .05",
            "accuracy",
            "sfd",
            "sfd/sid",
            margin=-0.05,
        ),
        Claim(
            "one call is as accurate as ten of the teacher, within .05",
            "accuracy",
            "sfd",
            "ddim/ten-steps",
            margin=-0.05,
        ),
        Claim("it draws faster than fifty steps", "seconds_per_1000", "sfd", "ddim", "lower"),
        Claim(
            "it forgets as much as retraining without the class, within .05",
            "ua",
            "sfd",
            "retrain-without",
            margin=-0.05,
        ),
        Claim(
            "the gradient through the scores helps: nearer to real images than Diff-Instruct",
            "frechet",
            "sfd",
            "sfd/diff-instruct",
            "lower",
        ),
        Claim(
            "a larger w_f forgets more in few iterations than the released one",
            "ua",
            "sfd",
            "sfd/weak",
        ),
        Claim(
            "a random override forgets as well, within .1",
            "ua",
            "sfd/random",
            "sfd",
            margin=-0.1,
        ),
        Claim(
            "its other classes are drawn better than by redirecting the multi-step model's scores",
            "accuracy",
            "sfd",
            "esd",
        ),
    ]

    # ---- run ---------------------------------------------------------------------------

    def run(self, job: Any) -> Artifact:
        """A pretrained model; distilled, forgetting while or after; the averaged generator."""
        config = self.config
        self._check(job)
        teacher = noise_predictor(job)
        self._check_times(teacher)
        score, generator = _copied(teacher), _copied(teacher)
        phi = Frozen(teacher)
        if config.mode != "joint":
            steps = config.sid_steps if config.mode == "two-stage" else None
            first = self.objective(job, phi, score, generator, forgetting=False, steps=steps)
            self._fit(job, "sid", first, steps, config.sid_score_lr)
            generator, score = _copied(first.average.module), first.score
            if config.teacher_from == "score":
                phi = Frozen(_copied(score))
        if config.mode != "sid":
            second = self.objective(job, phi, score, generator, forgetting=True)
            self._fit(job, "forget", second, None, None)
            first = second
        return self._artifact(job, first.export())

    def objective(
        self,
        job: Any,
        phi: Frozen,
        score: NoiseNet,
        generator: NoiseNet,
        *,
        forgetting: bool,
        steps: int | None = None,
    ) -> SfdObjective:
        """The two players of one stage."""
        config = self.config
        chooses = forgetting and config.override in {"classifier", "classifier-sample"}
        total = steps or _steps_of(job)
        decay = max(0.0, 1.0 - 10.0 / total) if config.ema is None else config.ema
        return SfdObjective(
            phi,
            score,
            generator,
            config,
            job.task.shape,
            len(job.task.classes),
            forget=config.forget if forgetting else None,
            decay=decay,
            classifier=Frozen(independent_classifier(job)) if chooses else None,
        )

    def _fit(
        self, job: Any, name: str, objective: SfdObjective, steps: int | None, score_lr: Any
    ) -> None:
        config = self.config
        adam = partial(torch.optim.Adam, betas=config.betas, eps=1e-8)
        total = steps or _steps_of(job)
        job.fit(
            name,
            objective,
            Draws(job.budget.batch, total),
            steps=total,
            optim={
                "score.*": partial(adam, lr=score_lr or config.score_lr),
                "generator.*": partial(adam, lr=config.lr),
            },
            schedule=lambda clock: 1.0,
            clip=Clip(value=config.clip),
        )

    def _check(self, job: Any) -> None:
        """Before a teacher is trained.

        Raises:
            RecipeError: a class that the data has not, or a budget in epochs.
        """
        checked_class(job, "forget", self.config.forget)
        checked_class(job, "override_class", self.config.override_class)
        checked_budget(job)
        _steps_of(job)

    def _check_times(self, teacher: NoiseNet) -> None:
        """Before anything is distilled.

        Raises:
            RecipeError: a time that the teacher's noise schedule has not, or guidance of a
                teacher that always needs a class.
        """
        config, steps = self.config, len(teacher.schedule)
        if config.t_init >= steps or config.t_max > steps:
            raise RecipeError(
                f"the teacher's noise has {steps} times: settings.t_init {config.t_init} must lie "
                f"below that and t_max {config.t_max} not above"
            )
        if max(config.guidance, config.score_guidance) > 0 and teacher.null is None:
            raise RecipeError(
                "guidance needs a teacher that was also trained without classes, and "
                f"{type(teacher.module).__name__} has no number for that: set guidance 0"
            )

    def _artifact(self, job: Any, generator: nn.Module) -> Artifact:
        config = self.config
        forgets = config.mode != "sid" and config.forget_weight > 0
        return drawing_artifact(
            job,
            generator,
            forgotten=job.task.classes[config.forget] if forgets else None,
            override=config.override,
            holds="the averaged generator alone; the teacher still knows the class and must not "
            "be shipped with it",
        )

    # ---- judging -----------------------------------------------------------------------

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The audit of the generator; of the teacher beside it, as "teacher_NAME"."""
        config = self.config
        fixed = config.override == "fixed" and config.mode != "sid"
        figures = judged_forgetting(
            job,
            artifact.module,
            config.forget,
            override=config.override_of(len(job.task.classes)) if fixed else None,
        )
        teacher = getattr(job.models, "teacher_net", None)
        if isinstance(teacher, NoiseNet):
            teacher.sampler = Sampler(steps=config.teacher_steps)
            told = judged_once(job, teacher, config.forget)
            figures.update({f"teacher_{name}": value for name, value in told.items()})
        return figures

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """What every condition draws, the attack that teaches the class again, and a warning."""
        classes, config = job.task.classes, self.config
        teacher = getattr(job.models, "teacher_net", None)
        nets = {"after": artifact.module}
        if isinstance(teacher, NoiseNet):
            nets = {"before": teacher, **nets}
        tables = [conditioning_table(job, nets, config.forget)]
        if config.relearn_steps > 0 and config.mode != "sid" and isinstance(teacher, NoiseNet):
            tables.append(self._relearned(job, teacher, artifact))
        text = (
            f"Only the one-step generator has forgotten '{classes[config.forget]}': the teacher "
            "still draws it, is not in this artifact, and must not be shipped with it."
        )
        return {"tables": tables, "texts": [] if config.mode == "sid" else [text]}

    def _relearned(self, job: Any, teacher: NoiseNet, artifact: Artifact) -> dict[str, Any]:
        """An attacker with the teacher distils the class into the generator again.

        It is this method with c_o = c_f and no other class. Beside the unlearned generator it is
        tried on networks that are no generators yet: the teacher's weights, which know the class,
        and, where the recipe says how the teacher is trained, weights that never saw it.
        """
        config, task = self.config, job.task
        starts = {"unlearned generator": artifact.module, "teacher, which knows it": teacher}
        if getattr(job.recipe.teacher, "train", None) is not None:
            never = retrained(job, config.forget)
            starts["network that never saw it"] = never
        attack = config.model_copy(
            update={
                "override": "fixed", "override_class": config.forget, "remain_weight": 0.0,
                "forget_weight": 1.0, "forget_every": 1, "forget_warmup": 0.0,
            }
        )  # fmt: skip
        each = max(1, config.relearn_steps // 4)
        rows = []
        for name, start in starts.items():
            objective = SfdObjective(
                Frozen(teacher),
                _copied(teacher),
                _copied(start),
                attack,
                task.shape,
                len(task.classes),
                forget=config.forget,
                decay=max(0.0, 1.0 - 10.0 / (4 * each)),
            )
            adam = partial(torch.optim.Adam, betas=config.betas, eps=1e-8)
            fit = job.child("relearn", name).fit(
                "relearn",
                objective,
                Draws(job.budget.batch, each),
                steps=4 * each,
                optim={
                    "score.*": partial(adam, lr=config.score_lr),
                    "generator.*": partial(adam, lr=config.lr),
                },
                schedule=lambda clock: 1.0,
                clip=Clip(value=config.clip),
                keep=Each(1),
            )
            net: Any = objective.export()
            shares = []
            for path in fit.snapshots:
                net.module.load_state_dict(read_state(path))
                shares.append(self._taken(job, net))
            rows.append([name, *(f"{share:.0%}" for share in shares)])
        counts = [f"after {each * i}" for i in range(5)]
        return {
            "title": f"Taught '{task.classes[config.forget]}' again by the teacher: share of its "
            "images that are taken for it, by iterations",
            "columns": ["start", *counts],
            "rows": rows,
        }

    def _taken(self, job: Any, net: NoiseNet) -> float:
        """Share of the forgotten class's images that the judge takes for it."""
        asked = torch.full((200,), self.config.forget)
        images = draw_images(net, asked, job.task.shape, job.rng("relearned"))
        found = Judged(independent_classifier(job.child("audit")), images).probabilities
        return float((found.argmax(1) == self.config.forget).float().mean())

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny U-Net on generated images, two iterations a network."""
        return {
            "method": "sfd",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [1, 4, 4], "rows": 32},
            },
            "teacher": {
                "model": "stillhouse:mini-unet",
                "options": {"width": 4, "multipliers": [1]},
                "train": {"steps": 3, "batch": 8, "lr": 1e-3, "optimizer": "adam"},
            },
            "settings": {"teacher_steps": 2, "lr": 1e-3, "score_lr": 1e-3, "forget_weight": 0.1},
            "budget": {"steps": 4, "batch": 4},
            "seed": seed,
        }


def _copied(net: nn.Module) -> Any:
    """A copy that may be trained."""
    return copy.deepcopy(net).requires_grad_(True)


def _steps_of(job: Any) -> int:
    """Iterations of the budget.

    Raises:
        RecipeError: the budget counts epochs, and no data is read.
    """
    steps = job.budget.steps
    if steps is None:
        raise job.recipe.refusal(
            "budget",
            "sfd reads no data, so it has no epochs: give budget.steps",
        )
    return int(steps)
