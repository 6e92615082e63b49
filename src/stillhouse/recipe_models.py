"""What a recipe names, built: student, teacher of every source, and the artifact of a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse import catalogue
from stillhouse._version import __version__
from stillhouse.artifact import Artifact, alterations_of
from stillhouse.batch import Splits
from stillhouse.data.registry import open_data
from stillhouse.engine.job import Job
from stillhouse.errors import (
    ModelError,
    RecipeError,
    TeacherError,
)
from stillhouse.method import Method
from stillhouse.models.loading import load_model
from stillhouse.net import Net
from stillhouse.recipe import (
    ModelSpec,
    Recipe,
    StoreSpec,
    TeacherSpec,
    settings_of,
)
from stillhouse.tasks import open_task
from stillhouse.teacher import Teacher
from stillhouse.teachers.live import Live


def open_method(recipe: Recipe) -> Method:
    """The recipe's method with its settings validated.

    Raises:
        RecipeError: unknown method or setting, wrong type or range.
    """
    kind = catalogue.load(recipe.method)
    return kind(settings_of(recipe, kind.Config))


@dataclass
class Given:
    """Models and data handed in as objects, by people with their own code.

    A recipe names them `given`.

    Attributes:
        student: a module; copied for every side and seed, so that all begin equal.
        teacher: a module or a Teacher.
        splits: the data.
        connect: gives a federated run its transport: `connect(job) -> Transport`, see
            `stages.federation`; None: all clients in this process.
    """

    student: nn.Module | None = None
    teacher: Any = None
    splits: Splits | None = None
    connect: Any = None


class RecipeModels:
    """Builds what a recipe names: see `engine.job.Models`.

    Args:
        recipe: of the run.
        given: modules handed in as objects.

    Attributes:
        teacher_net: the network that teaches, once `teacher` has been called and it is one.
    """

    def __init__(self, recipe: Recipe, given: Given) -> None:
        self.recipe, self.given = recipe, given
        self.teacher_net: Net | None = None
        self._built: dict[str, dict[str, Any]] = {}
        self._teachers: dict[str, Teacher] = {}

    def has(self, role: str) -> bool:
        """Whether there is a "student" or "teacher", in the recipe or handed in."""
        named = (getattr(self.recipe, role, None), getattr(self.given, role, None))
        return any(value is not None for value in named)

    def student(self, job: Job, role: str) -> Net:
        """The recipe's student, initialised by the seed (equal for every side)."""
        spec = self.recipe.student
        if self.given.student is not None:
            module = copy.deepcopy(self.given.student).to(job.device)
            return self._arranged(job.task.net(module, spec.taps if spec else {}))
        if spec is None:
            raise RecipeError("the recipe names no student; add student: {model: ...}")
        return self._net(job, spec, role)

    def _net(self, job: Job, spec: ModelSpec | TeacherSpec, role: str) -> Net:
        assert spec.model is not None
        name = spec.model

        def make() -> nn.Module:
            return load_model(
                name, options=spec.options, weights=spec.weights, about=job.task.about
            )

        try:
            return self._arranged(job.task.net(job.build(make, role), spec.taps))
        except ModelError as error:
            section = "student" if spec is self.recipe.student else "teacher"
            raise ModelError(self.recipe.placed(section, str(error))) from error

    def _arranged(self, net: Net) -> Net:
        """The net laid out and compiled as the recipe's hardware says; its state keeps its keys."""
        if self.recipe.hardware.channels_last:
            net.module.to(memory_format=torch.channels_last)
        if self.recipe.hardware.compile:
            net.module.compile()
        own = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
        net.takes = None if own == torch.float32 else own
        return net

    def teacher(
        self, job: Job, role: str, otherwise: Callable[[Job], Net] | None = None
    ) -> Teacher:
        """The recipe's teacher, made ready once per job path."""
        key = "/".join((*job.path, role))
        if key not in self._teachers:
            self._teachers[key] = self._teacher(job, role, otherwise)
        return self._teachers[key]

    def _teacher(self, job: Job, role: str, otherwise: Callable[[Job], Net] | None) -> Teacher:
        spec = self.recipe.teacher
        if spec is not None and spec.store is not None and spec.source != "store":
            from stillhouse.stages.capture import refuse_other_data

            refuse_other_data(job, spec.store)
        if self.given.teacher is not None:
            teacher = self._handed_in(job, self.given.teacher)
        elif spec is not None:
            teacher = self._from_spec(job, spec, role)
        elif otherwise is not None:
            return self._live(job, otherwise(job))
        else:
            raise RecipeError(
                f"'{self.recipe.method}' needs a teacher and the recipe names none; "
                "add teacher: {model: ..., weights: ...} or another source of knowledge"
            )
        if spec is not None and spec.store is not None and spec.source != "store":
            teacher = _kept(job, teacher, spec.store)
        return teacher

    def _handed_in(self, job: Job, given: nn.Module | Teacher) -> Teacher:
        if not isinstance(given, nn.Module):
            if callable(given) and not hasattr(given, "knowledge"):
                from stillhouse.teachers.text_vectors import TextVectors

                return TextVectors(given)
            return given
        net = given if isinstance(given, Net) else job.task.net(given, {})
        self._check_teacher(job, net.to(job.device))
        return self._live(job, self._arranged(net))

    def _from_spec(self, job: Job, spec: TeacherSpec, role: str) -> Teacher:
        if spec.source == "model":
            home = self._home(job, spec)
            net = self._net(home, spec, role)
            self._check_teacher(job, net)
            if spec.train is not None:
                self._train(home, net, spec)
            elif knows_nothing(spec, net):
                job.log.write("warning", text=KNOWS_NOTHING.format(model=spec.model))
            return self._live(job, net)
        if spec.source == "artifact":
            return self._live(job, self._opened(job, spec))
        if spec.source == "recipe":
            return self._nested(job, spec)
        if spec.source == "store":
            from stillhouse.teachers.stored import Stored
            from stillhouse.teachers.stored_tokens import StoredTokens

            assert spec.store is not None
            kind = StoredTokens if job.task.ragged else Stored
            return kind(Path(str(spec.store.path)))
        if spec.source == "callable":
            from stillhouse.teachers.function import import_callable

            return import_callable(str(spec.callable), fingerprint=spec.fingerprint)
        if "vector" in catalogue.find(self.recipe.method).card.get("needs", ()):
            return self._vectors(spec)
        raise TeacherError(
            f"'{self.recipe.method}' asks for logits or features, which an endpoint cannot give "
            "inside a training: label first, or give the teacher as a model or a store"
        )

    def _vectors(self, spec: TeacherSpec) -> Teacher:
        """An encoder behind an endpoint; its local server runs while it is asked."""
        from stillhouse.stages.label import speaker_name, speaking
        from stillhouse.teachers.text_vectors import EndpointVectors

        assert spec.endpoint is not None
        return EndpointVectors(
            lambda: speaking(self.recipe),
            fingerprint=speaker_name(self.recipe),
            name=f"endpoint {spec.endpoint.model}",
        )

    def _opened(self, job: Job, spec: TeacherSpec) -> Net:
        from stillhouse.opening import open_artifact

        artifact = open_artifact(Path(str(spec.artifact)))
        module = artifact.module
        if not isinstance(module, Net):
            raise TeacherError(f"the artifact {spec.artifact} holds no model of this task")
        self._check_classes(job, artifact, str(spec.artifact))
        self._check_teacher(job, module.to(job.device))
        self._built["teacher"] = artifact.model
        return module

    def _home(self, job: Job, spec: TeacherSpec) -> Job:
        """The job on the data that the teacher is trained on: its own, where it has any."""
        if spec.train is None or spec.train.data is None:
            return job
        own = spec.train.data
        splits = open_data(own.name, seed=job.seed, options=own.options)
        return Job(
            job.recipe,
            open_task(job.task.name, splits),
            job.folder,
            seed=job.seed,
            hardware=job.hardware,
            log=job.log,
            models=self,
            cache=job.cache,
            path=job.path,
            stop=job.stop,
            family=job.family,
        )

    def _check_teacher(self, job: Job, net: Net) -> None:
        """The method says what a teacher must be; see `Method.check_teacher`."""
        open_method(self.recipe).check_teacher(job, net)

    def trainable_teacher(self, job: Job, role: str, trained: bool) -> Net:
        """The recipe's teacher as a network of the method's own; see `Job.trainable_teacher`."""
        given, spec = self.given.teacher, self.recipe.teacher
        if given is not None:
            module = given.net if isinstance(given, Live) else given
            if not isinstance(module, nn.Module):
                raise self._no_net("object that answers")
            # What was handed in stays as it is.
            module = copy.deepcopy(module)
            net = module if isinstance(module, Net) else job.task.net(module, {})
            net = self._arranged(net.to(job.device))
        elif spec is None:
            raise RecipeError(
                f"'{self.recipe.method}' trains the teacher and the recipe names none; "
                "add teacher: {model: ..., train: {...}}"
            )
        elif spec.source == "model":
            net = self._net(job, spec, role)
            self._check_teacher(job, net)
            if trained and spec.train is not None:
                self._train(job, net, spec)
        elif spec.source == "artifact":
            net = self._opened(job, spec)
        elif spec.source == "recipe":
            _, _, net, artifact = self._run_nested(job, spec)
            self._built["teacher"] = artifact.model
        else:
            raise self._no_net(spec.source)
        self._check_teacher(job, net)
        if not any(p.requires_grad for p in net.parameters()):
            net.requires_grad_(True)  # it was frozen as a teacher before
        return net

    def _no_net(self, what: str) -> TeacherError:
        return TeacherError(
            f"'{self.recipe.method}' trains the teacher itself, which is no network as {what}: "
            "give teacher: {model: ...}, an artifact or another recipe"
        )

    def teaching(self, job: Job, net: Net) -> Teacher:
        """A network made in this run as its teacher; see `Job.teaching`."""
        teacher, spec = self._live(job, net), self.recipe.teacher
        if spec is not None and spec.store is not None and spec.source != "store":
            return _kept(job, teacher, spec.store)
        return teacher

    def _check_classes(self, job: Job, artifact: Artifact, where: str) -> None:
        """As many classes are not enough: they must be the same, in the same order."""
        taught = list(artifact.meta.get("about", {}).get("classes") or ())
        wanted = [str(name) for name in job.task.about.get("classes") or ()]
        if taught and wanted and taught != wanted:
            at = next((i for i, (a, b) in enumerate(zip(taught, wanted)) if a != b), None)
            first = ""
            if at is not None:
                first = f"; class {at} is '{taught[at]}' there, '{wanted[at]}' here"
            raise TeacherError(
                f"the teacher {where} was made for {len(taught)} classes of "
                f"'{artifact.meta.get('data', 'other data')}', the run reads {len(wanted)} of "
                f"'{job.splits.edition}'{first}"
            )

    def _live(self, job: Job, net: Net) -> Teacher:
        self.teacher_net = net
        return Live(net)

    def _train(self, job: Job, net: Net, spec: TeacherSpec) -> None:
        from stillhouse.stages.supervised import train_supervised

        share = {
            "path": job.path,  # the initial weights are drawn by it
            "model": spec.model,
            "options": spec.options,
            "weights": spec.weights,
            "budget": spec.train.model_dump(exclude={"data"}) if spec.train else None,
            "data": job.splits[job.teacher_split].fingerprint,
            "seed": job.seed,
            "version": __version__,
        }
        if (weights := job.task.about.get("class_weights")) is not None:
            share["class_weights"] = weights
        train_supervised(
            job, "teacher", net, split=job.teacher_split, budget=spec.train, share=share
        )

    def _nested(self, job: Job, spec: TeacherSpec) -> Teacher:
        method, child, net, artifact = self._run_nested(job, spec)
        live = self._live(job, net)
        own: Teacher | None = method.teacher(child, artifact)
        return own or live

    def _run_nested(self, job: Job, spec: TeacherSpec) -> tuple[Method, Job, Net, Artifact]:
        """The teacher's own recipe, run as a child on what teachers are trained on."""
        assert spec.recipe is not None
        inner = spec.recipe.model_copy(update={"seed": job.seed})
        models = RecipeModels(inner, Given(splits=self.given.splits))
        whole = job.splits.of_teachers()
        child = Job(
            inner,
            job.task if whole is job.splits else type(job.task)(whole),
            job.folder,
            seed=job.seed,
            hardware=job.hardware,
            log=job.log,
            models=models,
            cache=job.cache,
            path=(*job.path, "teacher"),
            stop=job.stop,
            family=job.family,
        )
        method = open_method(inner)
        artifact = method.run(child)
        net = artifact.module
        if not isinstance(net, Net):
            raise TeacherError(f"'{inner.method}' yields no model that could teach")
        return method, child, net, artifact

    def artifact(self, job: Job, module: nn.Module, role: str = "student") -> Artifact:
        """A model artifact with the task's predictor and the way to build it again."""
        net = module if isinstance(module, Net) else job.task.net(module)
        spec: ModelSpec | TeacherSpec | None = self.recipe.student
        given: Any = self.given.student
        if role == "teacher":
            spec, given = self.recipe.teacher, self.given.teacher
        model = self._built.get(role, {})
        if given is None and spec is not None and spec.model is not None:
            # What served the training alone is not in the model that comes out.
            gone = getattr(net.module, "training_options", ())
            options = {key: value for key, value in spec.options.items() if key not in gone}
            model = {"id": spec.model, "options": options, "taps": spec.taps}
        changes = alterations_of(net.module)
        if changes:
            model = {**model, "altered": [*model.get("altered", ()), *changes]}
        return Artifact(
            "model",
            predictor=job.task.predictor(net),
            model=model,
            meta={
                "about": plain_about(job.task.about),
                "task": job.task.name,
                "data": job.splits.edition,
            },
        )


def _kept(job: Job, teacher: Teacher, spec: StoreSpec) -> Teacher:
    """The teacher whose answers are kept on disk: a record a row, or a token of one."""
    if job.task.ragged:
        from stillhouse.stages.capture_tokens import CapturedTokens

        return CapturedTokens(job, teacher, spec)
    from stillhouse.stages.capture import captured

    return captured(job, teacher, spec)


KNOWS_NOTHING = (
    "the teacher {model} has neither weights nor train: it is freshly initialised and knows nothing"
)


def knows_nothing(spec: TeacherSpec, net: Net) -> bool:
    """Whether a teacher would be asked as the seed has left it.

    A folder brings its weights, and so does an option that names a file or folder that is there.
    """
    if spec.train is not None or spec.weights is not None or spec.model is None:
        return False
    if any(_is_there(name, value) for name, value in spec.options.items()):
        return False
    parameters = any(True for _ in net.parameters())
    return parameters and not Path(spec.model).expanduser().is_dir()


def _is_there(name: str, value: Any) -> bool:
    """Whether an option names a file or folder; a mere word does by its own name only."""
    if not isinstance(value, str) or not ("/" in value or name in {"folder", "weights", "path"}):
        return False
    try:
        return bool(value) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such home
        return False


def plain_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of the data's description can be written as JSON."""
    kept: dict[str, Any] = {}
    for key, value in about.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        kept[key] = value
    return kept
