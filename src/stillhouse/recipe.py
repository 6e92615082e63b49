"""What a run is told: a typed document, read from YAML, checked, and written back complete.

A recipe is data, task, teacher, student, method and its settings, budget, seed and hardware.
`load_recipe` reads one from a file, a method id or a mapping; every refusal names the file
and line, what stands there, what would be right, and the nearest name.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Strict,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from stillhouse import catalogue
from stillhouse.document import Location, Origin, dotted, not_finite, parse, parse_value
from stillhouse.errors import RecipeError, StillhouseError, nearest

Text = Annotated[str, Strict(), StringConstraints(min_length=1)]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
NotNegative = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(gt=0, lt=1)]
Reference = Annotated[str, Strict(), StringConstraints(pattern=r"^[\w.]+:[\w.]+$")]
Name = TypeVar("Name", bound=BaseModel)

# Stands for a model or data that was handed in as an object, by people with their own code.
GIVEN = "given"

# What may differ between a run and its resumption without changing what it computes.
FREE = (
    "output",
    "hardware.workers",
    "teacher.endpoint.base_url",
    "teacher.endpoint.key_env",
    "teacher.endpoint.key_header",
    "teacher.endpoint.concurrency",
    "teacher.endpoint.rate",
    "teacher.endpoint.burst",
    "teacher.endpoint.timeout",
    "teacher.endpoint.attempts",
    "teacher.endpoint.price",
)


class Section(BaseModel):
    """A part of a recipe: unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DataSpec(Section):
    """Which data, and how it is read."""

    name: Text = Field(
        description="data set, as `stillhouse doctor` lists them, or package.module:function"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of that data set: sizes, subsets, views, long tail"
    )


class ModelSpec(Section):
    """Which network, by id."""

    model: Text = Field(
        description="timm:ID, hf:ID, torchvision:ID, stillhouse:ID, package.module:factory "
        "or a local folder"
    )
    weights: Text | None = Field(
        default=None,
        description="file, folder or hub name of the weights; none: freshly initialised",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the model's constructor"
    )
    taps: dict[str, Text] = Field(
        default_factory=dict,
        description="the method's alias to the module's path; `path:input` taps what goes in",
    )


class BudgetSpec(Section):
    """How long, with which optimiser, and which state is kept."""

    EXCLUSIVE: ClassVar[tuple[str, str]] = ("epochs", "steps")

    epochs: Count | None = Field(
        default=None,
        description="passes over the training data (10 when steps are not given either)",
    )
    steps: Count | None = Field(default=None, description="updates, instead of epochs")
    batch: Count = Field(default=64, description="rows of the global batch, over all processes")
    lr: Positive = Field(default=1e-3, description="learning rate at its highest")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adamw", description="optimiser")
    momentum: Annotated[float, Strict(), Field(ge=0, lt=1)] = Field(
        default=0.9, description="of sgd; Adam's first beta"
    )
    nesterov: Flag = Field(default=False, description="Nesterov momentum for sgd")
    weight_decay: NotNegative = Field(default=0.01, description="decoupled for adamw")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field(
        default="cosine", description="of the learning rate after the warm-up"
    )
    milestones: list[Share] = Field(
        default_factory=list,
        description="for schedule step: where the rate is multiplied by gamma, as shares of the "
        "training in (0, 1)",
    )
    gamma: Positive = Field(
        default=0.1, description="for schedule step: the factor at each milestone"
    )
    warmup: Annotated[int, Strict(), Field(ge=0)] = Field(
        default=0, description="steps of linear warm-up"
    )
    clip: Positive | None = Field(default=None, description="largest norm of the whole gradient")
    accumulate: Count = Field(default=1, description="micro-batches that a batch is split into")
    validate_every: Count | None = Field(
        default=None,
        description="in epochs or steps, as the budget counts; none: each epoch, or ten times",
    )
    select: Literal["last", "best", "latest-best"] = Field(
        default="last",
        description="the state that is kept: the last, or the best on validation data (of equal "
        "ones the first, or the latest)",
    )
    metric: Text | None = Field(
        default=None, description="what best is measured by; none: the task's main metric"
    )
    patience: Count | None = Field(
        default=None,
        description="validations in a row that do not reach the best figure, after which a "
        "training that selects by it ends; none: it goes on",
    )
    ema: Share | None = Field(
        default=None,
        description="decay of an exponential moving average of the weights, which is kept",
    )

    @model_validator(mode="after")
    def _one_length(self) -> BudgetSpec:
        if self.epochs is not None and self.steps is not None:
            raise PydanticCustomError(
                "exclusive", "both epochs and steps are given; give exactly one of them"
            )
        if self.patience is not None and self.select == "last":
            raise PydanticCustomError(
                "patience", "patience waits for a better figure: set select: best or latest-best"
            )
        if self.schedule == "step" and not self.milestones:
            raise PydanticCustomError(
                "milestones", "schedule: step needs milestones, such as milestones: [0.5, 0.75]"
            )
        if self.epochs is None and self.steps is None:
            # Filled in, not given: `exclude_unset` must not take it for the user's word.
            self.__dict__["epochs"] = 10
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records that were made before there was patience keep their hash.
        written: dict[str, Any] = write(self)
        if self.patience is None:
            written.pop("patience", None)
        return written


class TrainSpec(BudgetSpec):
    """How a teacher is trained before it teaches."""

    data: DataSpec | None = Field(
        default=None,
        description="data of the teacher's own, which it is also normalised by; none: the run's",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_data(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("data"), str):
            return {**given, "data": {"name": given["data"]}}
        return given


class StoreSpec(Section):
    """A teacher's outputs on disk: computed once, read in every epoch after."""

    path: Text | None = Field(
        default=None,
        description="folder of the store; none: in the cache, under what it depends on",
    )
    form: Literal["dense", "topk", "truncate", "sample"] = Field(
        default="dense",
        description="dense: all values; topk: the k largest with the missing mass; truncate: the "
        "k largest without it; sample: k classes drawn, with importance weights",
    )
    k: Count = Field(default=16, description="classes kept per row by topk, truncate and sample")
    temperature: Positive = Field(default=1.0, description="at which probabilities are kept")
    dtype: Literal["float16", "float32", "bfloat16", "int8"] = Field(
        default="float16",
        description="numbers on disk; int8: a byte each, with a scale and a zero point per vector "
        "(a quarter of float32), off by 1/508 of the vector's range at most",
    )
    draws: Count | None = Field(
        default=None, description="augmented views stored per sample; none: only the plain one"
    )
    batch: Count = Field(default=64, description="rows per question while capturing")


class ServeSpec(Section):
    """An OpenAI-compatible server that the run starts on the loopback and stops again."""

    rule: Text | None = Field(default=None, description="answers by package.module:function")
    replay: Text | None = Field(default=None, description="answers from this JSONL file")
    model: Text | None = Field(default=None, description="answers by a local causal language model")
    encoder: Text | None = Field(default=None, description="answers embeddings by a local encoder")
    fail: Annotated[float, Strict(), Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of requests that fail, to try the client"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further server options")

    @model_validator(mode="after")
    def _one_mind(self) -> ServeSpec:
        _exactly_one(self, ("rule", "replay", "model", "encoder"), "a way to answer")
        return self


class PriceSpec(Section):
    """What tokens cost, for the account of a run."""

    prompt: NotNegative = Field(default=0.0, description="per million prompt tokens")
    completion: NotNegative = Field(default=0.0, description="per million completion tokens")
    currency: Text = Field(default="USD", description="shown beside the sum")


class EndpointSpec(Section):
    """A model behind an OpenAI-compatible HTTP endpoint."""

    base_url: Annotated[str, Strict(), StringConstraints(pattern=r"^https?://\S+$")] | None = Field(
        default=None, description="such as http://127.0.0.1:8000/v1"
    )
    model: Text = Field(default="default", description="the model's name at the endpoint")
    key_env: Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z_]\w*$")] | None = Field(
        default=None, description="environment variable that holds the key; keys are never written"
    )
    key_header: Text = Field(
        default="Authorization",
        description="header of the key; Authorization sends it as a bearer token",
    )
    query: dict[str, Text] = Field(
        default_factory=dict, description="fields added to the URL, such as api-version"
    )
    concurrency: Count = Field(default=32, description="requests in flight at most")
    rate: Positive | None = Field(default=None, description="requests per second at most")
    burst: Count = Field(default=1, description="requests that may go at once under a rate")
    timeout: Positive = Field(default=120.0, description="seconds for one try of a request")
    attempts: Count = Field(default=12, description="tries of one request before it is given up")
    accept_empty: Flag = Field(
        default=False, description="an empty answer is an answer, not a failure"
    )
    price: PriceSpec = Field(default_factory=PriceSpec, description="for the cost account")
    serve: ServeSpec | None = Field(
        default=None, description="start a local server for the run instead of giving base_url"
    )

    @model_validator(mode="after")
    def _one_address(self) -> EndpointSpec:
        _exactly_one(self, ("base_url", "serve"), "an address")
        return self


class TeacherSpec(Section):
    """Where knowledge comes from: exactly one source, live, stored, remote or to be made."""

    SOURCES: ClassVar[tuple[str, ...]] = ("model", "artifact", "endpoint", "callable", "recipe")

    model: Text | None = Field(default=None, description="a live network, by id as for the student")
    weights: Text | None = Field(default=None, description="of that network")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of its constructor"
    )
    taps: dict[str, Text] = Field(
        default_factory=dict, description="the method's alias to the module's path"
    )
    artifact: Text | None = Field(default=None, description="folder of a model that a run has left")
    endpoint: EndpointSpec | None = Field(default=None, description="a model behind HTTP")
    callable: Reference | None = Field(
        default=None,
        description="package.module:function from a batch to its knowledge, or, where its "
        "parameter is called `texts`, from strings to vectors",
    )
    recipe: Recipe | None = Field(
        default=None, description="another recipe, run first; data, task, seed, hardware as here"
    )
    store: StoreSpec | None = Field(
        default=None,
        description="keep the teacher's outputs on disk (true, a folder, or settings); alone: "
        "the folder of a store made before",
    )
    train: TrainSpec | None = Field(
        default=None, description="train the teacher first, as a stage, with this budget"
    )
    fingerprint: Text | None = Field(
        default=None,
        description="stands for the content of a callable or endpoint in stores and journals",
    )

    @property
    def source(self) -> str:
        """Which one is given: model, artifact, endpoint, callable, recipe or store."""
        given = [name for name in self.SOURCES if getattr(self, name) is not None]
        return given[0] if given else "store"

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if "method" in given:
            if "recipe" in given:
                raise PydanticCustomError(
                    "exclusive", "gives both a method and a recipe; put the method in the recipe"
                )
            given = {"recipe": given}
        if "store" in given:
            given = {**given, "store": _store(given["store"])}
        return given

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSpec:
        names = self.SOURCES
        if all(getattr(self, name) is None for name in names) and self.store is not None:
            if self.store.path is None:
                raise PydanticCustomError(
                    "source", "a store without a teacher needs the folder of one made before"
                )
        else:
            _exactly_one(self, names, "a source of knowledge")
        for name in ("weights", "train", "options"):
            if getattr(self, name) and self.model is None:
                raise PydanticCustomError(
                    "source",
                    "{name} belongs to a teacher given as model, not as {source}",
                    {"name": name, "source": self.source},
                )
        return self


class HardwareSpec(Section):
    """Where it computes."""

    accelerator: Text = Field(
        default="auto", description="auto, cpu, cuda, mps ... as Fabric names them"
    )
    devices: Count = Field(default=1, description="processes on each machine")
    nodes: Count = Field(default=1, description="machines")
    strategy: Literal["auto", "flat", "ddp", "fsdp"] = Field(
        default="auto", description="how several processes share the work"
    )
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] = Field(
        default="32-true", description="of parameters and arithmetic"
    )
    threads: Annotated[int, Strict(), Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads; none: as torch chooses"
    )
    workers: Annotated[int, Strict(), Field(ge=0)] = Field(
        default=0, description="processes that read data ahead"
    )
    compile: Flag = Field(default=False, description="torch.compile the networks")
    channels_last: Flag = Field(
        default=False, description="keep images and convolutions with the channels last"
    )


class OutputSpec(Section):
    """What is left behind, and how often."""

    folder: Text | None = Field(default=None, description="run folder; none: runs/METHOD-DATA")
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="beside log.jsonl, which is always written"
    )
    log_every: Count = Field(default=20, description="steps between lines of the log")
    checkpoint_minutes: NotNegative = Field(
        default=1.0, description="between checkpoints; 0: each step"
    )
    keep: Annotated[int, Strict(), Field(ge=2)] = Field(
        default=2,
        description="checkpoints kept per stage; an older one serves when the last is damaged",
    )


class Recipe(Section):
    """What a run is told."""

    method: Text = Field(description="id of a method or baseline, as `stillhouse methods` lists")
    variant: Text | None = Field(
        default=None, description="named settings of the method; those given in settings win"
    )
    task: Text | None = Field(default=None, description="kind of problem; none: the method's own")
    data: DataSpec = Field(description="data set, by name")
    teacher: TeacherSpec | None = Field(default=None, description="where knowledge comes from")
    student: ModelSpec | None = Field(default=None, description="network that is trained")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="of the method; see `stillhouse methods show ID`"
    )
    budget: BudgetSpec = Field(
        default_factory=lambda: BudgetSpec(), description="of the main training"
    )
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = Field(
        default=0, description="everything random is a function of it"
    )
    seeds: Count = Field(default=1, description="how many seeds the run shows, from seed upwards")
    compare: list[Text] = Field(
        default_factory=list,
        description="entries run beside the method on the same data, such as supervised "
        "(the default of student trainings)",
    )
    sides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="settings of what this method is compared with, by the side's name, such as "
        "`dm/mosaic: {lr_img: 10}`: what its own tuning found",
    )
    hardware: HardwareSpec = Field(
        default_factory=lambda: HardwareSpec(), description="where it computes"
    )
    output: OutputSpec = Field(
        default_factory=lambda: OutputSpec(), description="what is left behind"
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = _unfolded(given)
        teacher = given.get("teacher")
        if isinstance(teacher, dict) and isinstance(teacher.get("recipe"), dict):
            given["teacher"] = {**teacher, "recipe": _inherited(given, teacher["recipe"])}
        return given

    def where(self, field: str) -> str:
        """The place where a field was written: "kd.yaml:12", or the nearest one around it.

        Args:
            field: dotted, such as "teacher.taps.low".
        """
        return self._origin.at(tuple(field.split(".")))

    def refusal(self, field: str, message: str) -> RecipeError:
        """An error about one field, with its place, to be raised by who finds it."""
        return RecipeError(self.placed(field, message))

    def placed(self, field: str, message: str) -> str:
        """A message about one field behind its place and name: "kd.yaml:12: data: ..."."""
        return f"{self.where(field)}: {field}: {message}"


def _exactly_one(section: Section, names: Sequence[str], what: str) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) == 1:
        return
    choice = ", ".join(names[:-1]) + f" or {names[-1]}"
    found = "gives " + " and ".join(given) if given else f"has no {what.removeprefix('a ')}"
    raise PydanticCustomError(
        "exclusive", "{found}; give exactly one of {choice}", {"found": found, "choice": choice}
    )


def _store(given: Any) -> Any:
    if given is True:
        return {}
    if given is False:
        return None
    return {"path": given} if isinstance(given, str) else given


_SHORT = {"data": "name", "student": "model", "teacher": "model"}


def _unfolded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Short forms (`student: timm:resnet18`) written out."""
    result = dict(given)
    for section, field in _SHORT.items():
        if isinstance(result.get(section), str):
            result[section] = {field: result[section]}
    teacher = result.get("teacher")
    if isinstance(teacher, dict) and "method" in teacher and "recipe" not in teacher:
        result["teacher"] = {"recipe": teacher}
    return result


_INHERITED = ("data", "task", "seed", "hardware")


def _inherited(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's own recipe with what it leaves unsaid taken from the outer one."""
    return {name: outer[name] for name in _INHERITED if name in outer} | dict(inner)


# Reading -----------------------------------------------------------------------------------


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """Read, complete and check a recipe.

    Args:
        source: a YAML file, the id of a method that has a recipe, or a mapping.
        overrides: `a.b=value`, the value in YAML; later ones win. Setting `budget.steps`
            unsets `budget.epochs`, and the other way round.

    Returns:
        The recipe with task, variant and comparisons resolved.

    Raises:
        RecipeError: one message with a line for each thing that is wrong: place, field, what
            was found, what would be right, the nearest name.
    """
    if isinstance(source, Recipe):
        given, origin = source.model_dump(exclude_unset=True), source._origin
    elif isinstance(source, Mapping):
        given, origin = dict(source), Origin("recipe")
    else:
        given, origin = _read(Path(_find(source)))
    given = _unfolded(given)
    for override in overrides:
        _apply(given, override, origin)
    for location in not_finite(given):
        raise RecipeError(f"{origin.at(location)}: {dotted(location)}: numbers must be finite")
    given = _nested_recipes(given, origin)
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, origin)) from None
    recipe._origin = origin
    return _completed(recipe)


def recipe_folders() -> list[Path]:
    """Folders that hold the methods' recipes: the checkout's, else the installed package's."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "recipes"
    folders = [checkout] if (package.parents[1] / "pyproject.toml").is_file() else []
    return [f for f in [*folders, package / "_shipped" / "recipes"] if f.is_dir()]


def recipe_ids() -> dict[str, Path]:
    """Recipes that can be run by their id, and their files."""
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    for entry in catalogue.entries().values():
        beside = entry.file.parent / f"{entry.id}.yaml"
        if entry.id not in found and beside.is_file():
            found[entry.id] = beside
    return found


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    known = recipe_ids()
    name = str(source)
    if name in known:
        return known[name]
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give a recipe file or the id of a method")
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        folder = path.parent if path.parent.is_dir() else Path()
        beside = [p.name for p in folder.glob("*.y*ml")]
        hint = nearest(path.name, beside) if beside else ""
        raise RecipeError(f"there is no recipe file {path}{hint}")
    if name in catalogue.entries():
        raise RecipeError(
            f"'{name}' has no recipe of its own (recipes/{name}.yaml); write a recipe file with "
            f"'method: {name}', data, and what else it needs (stillhouse methods show {name})"
        )
    options = {*known, *catalogue.entries()}
    raise RecipeError(f"no recipe file and no method is called '{name}'{nearest(name, options)}")


def _read(path: Path) -> tuple[dict[str, Any], Origin]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    given, origin = parse(text, _shown(path))
    if given is None:
        raise RecipeError(f"{_shown(path)} is empty; a recipe begins with 'method: ...'")
    if not isinstance(given, dict):
        raise RecipeError(
            f"{_shown(path)}: a recipe is a mapping of fields ('method: ...'), found {_kind(given)}"
        )
    return given, origin


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _apply(given: dict[str, Any], override: str, origin: Origin) -> None:
    """Set what `a.b=value` says, in place."""
    field, equals, text = override.partition("=")
    keys = field.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"-o {override}: an override is written a.b=value")
    value = parse_value(text, f"-o {override}")
    at: Any = given
    for depth, key in enumerate(keys[:-1]):
        at = _stepped(at, key, dotted(keys[: depth + 1]), override, short=depth == 0)
    last = keys[-1]
    if isinstance(at, list):
        at[_index(at, last, override)] = value
    else:
        at[last] = value
        pair = BudgetSpec.EXCLUSIVE
        if last in pair and keys[-2:-1] in (["budget"], ["train"]) and value is not None:
            at.pop(pair[1 - pair.index(last)], None)
    location = tuple(int(k) if k.isdigit() else k for k in keys)
    stale = [k for k in origin.places if k[: len(location)] == location]
    for key_ in stale:
        del origin.places[key_]
    origin.places[location] = f"-o {override}"


def _stepped(at: Any, key: str, so_far: str, override: str, *, short: bool) -> Any:
    if isinstance(at, list):
        return at[_index(at, key, override)]
    inner = at.get(key)
    if inner is None:
        inner = {}
    elif isinstance(inner, str) and short and key in _SHORT:
        inner = {_SHORT[key]: inner}
    elif isinstance(inner, dict):
        # The source may be a mapping of the caller's, which stays as it is.
        inner = dict(inner)
    elif isinstance(inner, list):
        inner = list(inner)
    else:
        raise RecipeError(f"-o {override}: {so_far} is {inner!r}, which has no fields to set")
    at[key] = inner
    return inner


def _index(at: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(at):
        raise RecipeError(f"-o {override}: '{key}' is no position in a list of {len(at)}")
    return int(key)


def _nested_recipes(given: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Teachers' recipes that are named by file or id, read; short forms moved."""
    origin.moved(("teacher",), ("teacher", "recipe"))
    teacher = given.get("teacher")
    if not isinstance(teacher, dict) or not isinstance(teacher.get("recipe"), str):
        return given
    named = teacher["recipe"]
    try:
        inner = _read(_find(named))[0]
    except StillhouseError as error:
        place = origin.at(("teacher", "recipe"))
        raise RecipeError(f"{place}: teacher.recipe: {error}") from None
    return {**given, "teacher": {**teacher, "recipe": _unfolded(inner)}}


# Completing --------------------------------------------------------------------------------


def _completed(recipe: Recipe) -> Recipe:
    """The recipe with names checked, its variant spelt out, task and comparisons filled."""
    wrong = [*_unknown_names(recipe)]
    if wrong:
        raise RecipeError("\n".join(wrong))
    entry = catalogue.find(recipe.method)
    if recipe.variant is not None:
        _spell_variant(recipe, entry)
    if recipe.task is None:
        recipe.task = str(entry.card.get("task") or "classification")
    if "compare" not in recipe.model_fields_set and entry.trains_student:
        recipe.compare = [name for name in ("supervised",) if name in catalogue.entries()]
    teacher = recipe.teacher
    if teacher is not None and teacher.recipe is not None:
        inner = teacher.recipe
        inner._origin = recipe._origin.inside(("teacher", "recipe"))
        # A teacher is not compared with anything: the outer run compares its student.
        inner.compare = []
        teacher.recipe = _completed(inner)
    return recipe


def _unknown_names(recipe: Recipe) -> Iterable[str]:
    known = catalogue.entries()
    if recipe.method not in known:
        yield _place(recipe, "method", f"unknown method '{recipe.method}'", recipe.method, known)
    for index, side in enumerate(recipe.compare):
        name, _, variant = side.partition("/")
        if name not in known:
            yield _place(recipe, f"compare.{index}", f"unknown entry '{name}'", name, known)
        elif variant and variant not in known[name].variants:
            what = f"'{name}' has no variant '{variant}'"
            yield _place(recipe, f"compare.{index}", what, variant, known[name].variants)
    for side in recipe.sides:
        name, _, variant = side.partition("/")
        if name not in known:
            yield _place(recipe, f"sides.{side}", f"unknown entry '{name}'", name, known)
        elif side == recipe.method:
            what = f"the settings of '{name}' itself stand under `settings`"
            yield f"{recipe.where(f'sides.{side}')}: sides.{side}: {what}"
        elif variant and variant not in known[name].variants:
            what = f"'{name}' has no variant '{variant}'"
            yield _place(recipe, f"sides.{side}", what, variant, known[name].variants)
    tasks, sets = catalogue.task_names(), catalogue.data_names()
    task, data = recipe.task, recipe.data.name
    if task is not None and ":" not in task and task not in tasks:
        yield _place(recipe, "task", f"unknown task '{task}'", task, tasks)
    if data != GIVEN and ":" not in data and data not in sets:
        yield _place(recipe, "data.name", f"unknown data set '{data}'", data, sets)
    train = recipe.teacher.train if recipe.teacher is not None else None
    own = train.data.name if train is not None and train.data is not None else data
    if own != data and ":" not in own and own not in sets:
        yield _place(recipe, "teacher.train.data.name", f"unknown data set '{own}'", own, sets)


def _place(recipe: Recipe, field: str, what: str, name: str, known: Iterable[str]) -> str:
    return f"{recipe.where(field)}: {field}: {what}{nearest(name, known)}"


def _spell_variant(recipe: Recipe, entry: catalogue.Entry) -> None:
    variants = entry.variants
    name = str(recipe.variant)
    if name not in variants:
        raise RecipeError(
            _place(recipe, "variant", f"'{entry.id}' has no variant '{name}'", name, variants)
        )
    chosen = variants[name]
    recipe.settings = {**chosen.get("set", {}), **recipe.settings}
    given = recipe.budget.model_dump(exclude_unset=True, exclude_none=True)
    pair = BudgetSpec.EXCLUSIVE
    held = {*given, *(pair if {*pair} & {*given} else ())}
    own = {k: v for k, v in chosen.get("budget", {}).items() if k not in held}
    recipe.budget = BudgetSpec.model_validate({**own, **given})


def settings_of(
    recipe: Recipe, config: type[Name], within: tuple[str, ...] = ("settings",)
) -> Name:
    """The method's settings, validated by its `Config`, with the recipe's lines in errors.

    Args:
        recipe: whose settings.
        config: of its method.
        within: where the user wrote them; of a side of a comparison ("sides", NAME).

    Raises:
        RecipeError: unknown setting, wrong type or range.
    """
    try:
        return config.model_validate(recipe.settings)
    except ValidationError as error:
        text = explain(error, config, recipe._origin, within)
        raise RecipeError(text) from None


# Writing and comparing ---------------------------------------------------------------------


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back equal."""
    text: str = yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )
    return text


def differences(old: Recipe, new: Recipe, *, free: Sequence[str] = FREE) -> list[str]:
    """Dotted names of the fields in which two recipes differ.

    Args:
        old: the recipe in a run folder.
        new: the one that was given now.
        free: fields (or sections) that may differ without changing what is computed.
    """
    found = sorted(_differing(old.model_dump(mode="json"), new.model_dump(mode="json"), ()))
    names = [dotted(location) for location in found]
    return [n for n in names if not any(n == f or n.startswith(f + ".") for f in free)]


def _differing(old: Any, new: Any, at: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {*old, *new}:
            yield from _differing(old.get(key), new.get(key), (*at, str(key)))
    elif old != new:
        yield at


# Explaining --------------------------------------------------------------------------------


def explain(
    error: ValidationError,
    model: type[BaseModel],
    origin: Origin,
    under: Location = (),
) -> str:
    """A validation error of pydantic in the house's words, one line for each thing wrong.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        origin: where the document's values stand.
        under: the location of the model in the document.
    """
    lines: list[str] = []
    details = error.errors(include_url=False)
    for detail in sorted(details, key=lambda d: origin.order((*under, *d["loc"]))):
        location = (*under, *detail["loc"])
        what = what_is_wrong(detail, model)
        name = dotted(location)
        line = f"{origin.at(location)}: {name}: {what}" if name else f"{origin.name}: {what}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def what_is_wrong(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One mistake in the house's words, without its place.

    Args:
        detail: one entry of pydantic's `ValidationError.errors()`.
        model: the model that was validated, for the names of its fields.
    """
    kind, context = detail["type"], detail.get("ctx", {})
    found = _kind(detail["input"])
    if kind == "extra_forbidden":
        *parent, name = detail["loc"]
        fields = _fields_at(model, tuple(parent))
        if "key_env" in fields and re.search("key|token|secret|password", str(name), re.I):
            return "keys are not written down; name their environment variable with key_env"
        return f"unknown field{nearest(str(name), fields)}"
    if kind == "missing":
        *parent, name = detail["loc"]
        info = _fields_at(model, tuple(parent)).get(str(name), "")
        return "is missing" + (f" ({info})" if info else "")
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, found {found}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context.get(key)}, found {found}"
    if kind in {"literal_error", "enum"}:
        return f"must be {context.get('expected')}, found {found}{_nearest_literal(detail)}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        pattern = str(context["pattern"])
        return f"found {found}, which does not have the form {_FORMS.get(pattern, pattern)}"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind in {"exclusive", "source", "milestones"}:
        return detail["msg"]
    return f"{detail['msg']}, found {found}"


_FORMS = {
    r"^[\w.]+:[\w.]+$": "package.module:function",
    r"^https?://\S+$": "http://host:port/v1",
    r"^[A-Za-z_]\w*$": "of an environment variable's name (the key itself is never written)",
}


def _nearest_literal(detail: ErrorDetails) -> str:
    expected = str(detail.get("ctx", {}).get("expected", ""))
    options = [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]
    hint = nearest(str(detail["input"]), options)
    return hint if "did you mean" in hint else ""


def _kind(value: Any) -> str:
    """A value in words, short; texts are quoted."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, Mapping):
        return "a mapping with " + (", ".join(map(str, list(value)[:4])) or "no fields")
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value)[:60]


def _fields_at(model: type[BaseModel], location: Location) -> dict[str, str]:
    """Names and help of the fields that a model knows at a location."""
    at: Any = model
    for part in location:
        if isinstance(at, type) and issubclass(at, BaseModel):
            field = at.model_fields.get(str(part))
            if field is None:
                return {}
            at = _model_in(field.annotation)
        else:
            return {}
    if not (isinstance(at, type) and issubclass(at, BaseModel)):
        return {}
    return {name: field.description or "" for name, field in at.model_fields.items()}


def _model_in(annotation: Any) -> Any:
    """The model inside `Model | None` or `Annotated[Model, ...]`."""
    if get_origin(annotation) is Annotated:
        return _model_in(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return next((m for m in map(_model_in, inner) if isinstance(m, type)), annotation)
    return annotation


TeacherSpec.model_rebuild()
