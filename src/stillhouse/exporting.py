"""Take a model that a run has left to another library, and check that it answers the same.

Forms: ONNX (with normalisation inside), a plain PyTorch state dict, a Hugging Face folder, a
timm folder, a sentence-transformers folder, a diffusers folder. Each is read back and compared
before it counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.artifact import Artifact, plain_state
from stillhouse.errors import MissingExtra, ModelError, RecipeError, nearest
from stillhouse.models.loading import is_hugging_face
from stillhouse.models.sentence_embedder import SentenceEmbedder
from stillhouse.models.sentence_transformer import SentenceTransformerNet
from stillhouse.net import Net
from stillhouse.opening import open_artifact

# Largest difference between the answers here and there, relative to the largest answer.
TOLERANCE = 1e-4
_SIDE = 24
_WORDS = ("Some words of different length.", "A few others, to see what comes out of them.")


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        artifact: the opened artifact.
        net: its network with call rule and normalisation.
        module: the network itself.
        view: two rows of what it reads.
    """

    artifact: Artifact
    net: nn.Module
    module: nn.Module
    view: Any

    @property
    def name(self) -> str:
        """What the model is, for messages."""
        given = self.artifact.model.get("id", "handed in as an object")
        return f"{type(self.module).__name__} ({given})"


def export_artifact(
    folder: Path | str,
    to: str,
    output: Path | str | None = None,
    *,
    shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write the model of an artifact in another library's form, read it back, and compare.

    Args:
        folder: of the artifact, or of the run that made it.
        to: "onnx", "torch", "hf", "timm", "sentence-transformers" or "diffusers".
        output: folder to write into, or a file that ends in .onnx; `FOLDER/export/FORM` when
            not given.
        shape: of one input, without the batch, where the artifact does not say it.

    Returns:
        form, place, files, and the largest relative difference between the answers.

    Raises:
        RecipeError: unknown form; the artifact holds no model.
        ModelError: the model cannot take that form, or answers differently in it.
        MissingExtra: a package is not installed.
    """
    if to not in FORMS:
        raise RecipeError(f"unknown form '{to}'{nearest(to, FORMS)}")
    source = open_source(Path(folder), shape)
    place = Path(output) if output is not None else Path(folder) / "export" / to
    single = to == "onnx" and place.suffix == ".onnx"
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside the place, then moved: what was exported before stays until this one is whole.
    aside = place.with_name(f".{place.name}-{os.getpid()}")
    aside.mkdir()
    try:
        told = FORMS[to](source, aside)
        if single:
            (aside / "model.onnx").replace(place)
        else:
            shutil.copytree(aside, place, dirs_exist_ok=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = (
        [place.name]
        if single
        else sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    )
    return {"form": to, "place": str(place), "files": files, "model": source.name, **told}


def open_source(folder: Path, shape: Sequence[int] | None = None) -> Source:
    """The model of an artifact, in eval mode on the CPU.

    Raises:
        RecipeError: it holds no model.
        ModelError: it is not known what the model reads, and no shape is given.
    """
    artifact = open_artifact(folder)
    if artifact.predictor is None:
        inside = [n for n, a in artifact.attachments.items() if a.predictor is not None]
        hint = f"; it carries one: {folder}/attachments/{inside[0]}" if inside else ""
        raise RecipeError(f"an artifact of kind '{artifact.kind}' holds no model to export{hint}")
    net = artifact.module.cpu().eval()
    module = net.module if isinstance(net, Net) else net
    return Source(artifact, net, module, example_view(artifact, module, shape))


def example_view(artifact: Artifact, module: nn.Module, shape: Sequence[int] | None = None) -> Any:
    """Two rows of what a model reads: from itself, its reader, its settings, or its data.

    A model of several inputs says them by a method `example_view`, which takes a generator.

    Raises:
        ModelError: none of them says it.
    """
    draw = torch.Generator().manual_seed(0)
    predictor = artifact.predictor
    settings = predictor.settings if predictor is not None else {}
    about = artifact.meta.get("about", {})
    reads = settings.get("input", about.get("input"))
    if shape is not None:
        return torch.rand(2, *shape, generator=draw)
    if settings.get("reads") == "text":
        return list(_WORDS)
    own: Any = getattr(module, "example_view", None)
    if own is not None:
        return own(draw)
    if "sampler" in settings and isinstance(reads, list | tuple):  # a predictor of noise
        noisy, labels = torch.randn(2, *reads, generator=draw), torch.tensor([0, 1])
        return {"noisy": noisy, "time": torch.tensor([10.0, 400.0]), "condition": labels}
    reader: Any = getattr(module, "reader", None)
    if reader is not None:
        return reader.join([reader.row(reader.read(text).codes) for text in _WORDS])
    if is_hugging_face(module):
        return _hugging_face_view(module, reads, draw)
    if isinstance(reads, list | tuple):
        return torch.rand(2, *reads, generator=draw)
    if isinstance(reads, Mapping) and "length" in reads and "vocabulary" in about:
        size = (2, int(reads["length"]))
        return torch.randint(1, int(about["vocabulary"]), size, generator=draw)
    if "scale" in settings:
        colours = next(p for p in module.parameters() if p.ndim == 4).shape[1]
        return torch.rand(2, colours, _SIDE, _SIDE, generator=draw)
    raise ModelError(
        f"the artifact does not say what {type(module).__name__} reads; give the shape of one "
        "input without the batch, such as --shape 3,32,32"
    )


def _hugging_face_view(module: Any, reads: Any, draw: torch.Generator) -> Any:
    config = module.config
    if module.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 32)
        height, width = (side, side) if isinstance(side, int) else side
        chosen = reads if isinstance(reads, list | tuple) else (3, height, width)
        return torch.rand(2, *chosen, generator=draw)
    ids = torch.randint(1, int(config.vocab_size), (2, 8), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Comparing ---------------------------------------------------------------------------------


def answers(net: nn.Module, view: Any) -> dict[str, Tensor]:
    """The tensors that a network gives for a view, by name."""
    with torch.inference_mode():
        out = net(view)
    if isinstance(out, Tensor):
        return {"output": out}
    return {name: value for name, value in out.items() if isinstance(value, Tensor)}


def compared(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> float:
    """The largest difference between answers, relative to the largest answer.

    Raises:
        ModelError: names or shapes differ, or the difference is above `TOLERANCE`.
    """
    worst = 0.0
    for name, own in ours.items():
        other = theirs.get(name)
        if other is None or other.shape != own.shape:
            got = "nothing" if other is None else tuple(other.shape)
            raise ModelError(f"{what} gives {got} for '{name}', the model {tuple(own.shape)}")
        scale = max(1e-6, float(own.abs().max()))
        difference = float((own.double() - other.double()).abs().max()) / scale
        # NaN compares as neither larger nor smaller: it must not pass for no difference.
        worst = difference if difference != difference else max(worst, difference)
        if not worst <= TOLERANCE:
            break
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{what} answers differently: largest relative difference {worst:.2g}, "
            f"at most {TOLERANCE:g} is accepted; nothing was kept"
        )
    return worst


# Forms -------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """A network called on positional tensors, giving a tuple: what a graph can hold."""

    def __init__(self, net: nn.Module, names: Sequence[str] | None, outputs: Sequence[str]) -> None:
        super().__init__()
        self.net, self.names, self.outputs = net, names, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs in order."""
        view = tensors[0] if self.names is None else dict(zip(self.names, tensors))
        out = self.net(view)
        return (out,) if isinstance(out, Tensor) else tuple(out[name] for name in self.outputs)


def to_onnx(source: Source, folder: Path) -> dict[str, Any]:
    """`model.onnx`, one file, batch (and where the model allows it, size or length) free."""
    onnxruntime = _needed("onnxruntime", "export")
    _needed("onnx", "export")
    _needed("onnxscript", "export")
    if isinstance(source.module, SentenceEmbedder):
        source.module.tokenizer.save_pretrained(folder)
        source = _on_pieces(source, source.module)
    elif isinstance(source.view, list):
        raise ModelError(f"--to onnx needs a model of numbers, and {source.name} reads raw texts")
    named = isinstance(source.view, Mapping)
    tensors = dict(source.view) if named else {"x": source.view}
    expected = answers(source.net, source.view)
    if not expected:
        raise ModelError(
            f"{source.name} gives no tensor but lists (of each image's detections, say), which "
            "one graph with fixed outputs cannot hold; export it as torch"
        )
    flat = _Flat(source.net, list(tensors) if named else None, list(expected)).eval()
    axes = _axes_of(source.module, tensors)
    free = free_axes(source.net, source.view, axes)
    path = folder / "model.onnx"
    named_axes = [{a: n for a, n in own.items() if n in free} for own in axes.values()]
    _write_onnx(flat, tensors, path, list(expected), named_axes, source.name)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(view: Any) -> dict[str, Tensor]:
        given = view if named else {"x": view}
        feed = {i.name: given[i.name].numpy() for i in session.get_inputs()}
        return dict(zip(expected, map(torch.from_numpy, session.run(None, feed)), strict=True))

    worst = compared(expected, run(source.view), "the ONNX model")
    for name in free:
        larger = _doubled(source.view, name, axes)
        told = f"the ONNX model, at twice the {name},"
        worst = max(worst, compared(answers(source.net, larger), run(larger), told))
    inputs = {i.name: [str(size) for size in i.shape] for i in session.get_inputs()}
    return {"inputs": inputs, "outputs": list(expected), "largest_difference": worst}


class _OnPieces(nn.Module):
    """A sentence embedder behind its tokenizer: word pieces to vectors."""

    def __init__(self, embedder: SentenceEmbedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, view: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors of `input_ids` and `attention_mask`, under the name that is usual for them."""
        return {
            "sentence_embedding": self.embedder.embed(view["input_ids"], view["attention_mask"])
        }


def _on_pieces(source: Source, module: SentenceEmbedder) -> Source:
    """The same model as it is called after its tokenizer, which a graph cannot hold."""
    given = module.tokenizer(
        list(_WORDS), padding=True, truncation=True, max_length=module.length, return_tensors="pt"
    )
    view = {name: given[name] for name in ("input_ids", "attention_mask")}
    return Source(source.artifact, _OnPieces(module).eval(), module, view)


def _write_onnx(
    flat: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    outputs: list[str],
    axes: Sequence[Mapping[int, str]],
    name: str,
) -> None:
    auto = torch.export.Dim.AUTO
    try:
        with _quiet():
            torch.onnx.export(
                flat,
                tuple(tensors.values()),
                str(path),
                input_names=list(tensors),
                output_names=outputs,
                dynamic_shapes=(tuple(dict.fromkeys(own, auto) for own in axes),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name} cannot be written as ONNX: {reason}") from error
    _name_axes(path, axes)


def _axes_of(module: nn.Module | None, view: Any) -> dict[str, dict[int, str]]:
    """Of each input the axes that may be free and their names: a model may say its own."""
    said: Any = getattr(module, "free_axes", {})
    named = view if isinstance(view, Mapping) else {"x": view}
    return {name: dict(said.get(name) or _axes(tensor)) for name, tensor in named.items()}


def _axes(tensor: Tensor) -> dict[int, str]:
    """Axes of an input that may be free, and their names: never channels or features."""
    if tensor.ndim == 4:
        return {0: "batch", 2: "height", 3: "width"}
    if tensor.ndim >= 2 and not tensor.is_floating_point():
        return {0: "batch", 1: "length"}
    return {0: "batch"}


def free_axes(
    net: nn.Module, view: Any, axes: Mapping[str, Mapping[int, str]] | None = None
) -> list[str]:
    """Names of the axes that a network takes at any size, found by doubling them.

    Args:
        net: called on the view.
        view: a tensor, or tensors by name.
        axes: of each input (a lone one is "x"), which axes may be free; those of images and
            words when not given.
    """
    axes = _axes_of(None, view) if axes is None else axes
    found = []
    for name in dict.fromkeys(name for own in axes.values() for name in own.values()):
        try:
            answers(net, _doubled(view, name, axes))
        except Exception:  # whatever a network raises, it does not take this size
            continue
        found.append(name)
    return found


def _doubled(view: Any, name: str, axes: Mapping[str, Mapping[int, str]]) -> Any:
    """A view with one axis twice as long, in every input that has it."""

    def longer(key: str, tensor: Tensor) -> Tensor:
        axis = next((a for a, called in axes[key].items() if called == name), None)
        return tensor if axis is None else torch.cat([tensor, tensor], axis)

    if isinstance(view, Mapping):
        return {key: longer(key, value) for key, value in view.items()}
    return longer("x", view)


def _name_axes(path: Path, axes: Sequence[Mapping[int, str]]) -> None:
    """Let the free axes of a graph bear names in place of the tracer's numbers."""
    import onnx

    model = onnx.load(str(path))
    names: dict[str, str] = {}
    for value, own in zip(model.graph.input, axes):
        for axis, name in own.items():
            symbol = value.type.tensor_type.shape.dim[axis].dim_param
            if symbol:
                names.setdefault(symbol, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, which are about its own insides."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def to_torch(source: Source, folder: Path) -> dict[str, Any]:
    """`model.safetensors`, `model.json` (how to build it) and a note with the code to load it."""
    state = plain_state(source.net)
    save_file(state, folder / "model.safetensors")
    about = {
        "model": source.artifact.model,
        "class": f"{type(source.module).__module__}.{type(source.module).__qualname__}",
        "mean": _numbers(getattr(source.net, "mean", None)),
        "std": _numbers(getattr(source.net, "std", None)),
        "settings": source.artifact.predictor.settings if source.artifact.predictor else {},
    }
    (folder / "model.json").write_text(json.dumps(about, indent=1, ensure_ascii=False))
    (folder / "README.md").write_text(_torch_note(source, about), encoding="utf-8")
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    whole = {name: value.detach().cpu() for name, value in source.module.state_dict().items()}
    worst = compared(
        {k: v for k, v in whole.items() if v.numel()}, stored, "the state dict read back"
    )
    return {"tensors": len(state), "largest_difference": worst}


def _torch_note(source: Source, about: Mapping[str, Any]) -> str:
    model = source.artifact.model
    lines = [f"# {source.artifact.meta.get('title', 'A distilled model')}", ""]
    lines += [f"Weights of a plain `{about['class']}`.", "", "```python"]
    lines += ["from safetensors.torch import load_file"]
    if model.get("id"):
        lines += [
            "from stillhouse.models.loading import load_model",
            "",
            f"model = load_model({model['id']!r}, options={model.get('options', {})!r},",
            f"                   about={_shape_facts(source)!r})",
        ]
    else:
        lines += ["", f"model = ...  # build your {type(source.module).__name__} here"]
    if model.get("altered"):
        lines += [
            "from stillhouse.artifact import altered",
            f"model = altered(model, {{'altered': {model['altered']!r}}})",
        ]
    lines += ['model.load_state_dict(load_file("model.safetensors"))', "model.eval()", "```"]
    if about["mean"] is not None:
        lines += [
            "",
            f"Inputs are normalised before the call: `(x - mean) / std` per channel with mean "
            f"{about['mean']} and std {about['std']}.",
        ]
    return "\n".join(lines) + "\n"


def _shape_facts(source: Source) -> dict[str, Any]:
    """What of the data decides a model's shape."""
    about = source.artifact.meta.get("about", {})
    shaping = ("classes", "categories", "facts", "input", "scale", "channels")
    return {k: about[k] for k in shaping if k in about}


def to_hugging_face(source: Source, folder: Path) -> dict[str, Any]:
    """What `from_pretrained` opens: configuration, weights, and the tokenizer where known."""
    # Some of our own models are those of transformers by another name.
    module: Any = getattr(source.module, "as_transformers", lambda: source.module)()
    if not is_hugging_face(module):
        raise ModelError(
            f"--to hf needs a Hugging Face model, and this is {source.name}; "
            "--to onnx and --to torch take any model"
        )
    _needed("transformers", "language")
    classes = _classes(source)
    if classes and getattr(module.config, "num_labels", None) == len(classes):
        module.config.id2label = dict(enumerate(classes))
        module.config.label2id = {name: index for index, name in enumerate(classes)}
    module.save_pretrained(folder)
    tokenizer = _tokenizer(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    again = type(module).from_pretrained(folder).eval()
    view = source.view if isinstance(source.view, Mapping) else _as_keywords(module, source.view)
    worst = compared(_hf_answers(module, view), _hf_answers(again, view), "the folder read back")
    return {
        "class": type(module).__name__,
        "tokenizer": type(tokenizer).__name__ if tokenizer is not None else "none was known",
        "largest_difference": worst,
    }


def _as_keywords(module: Any, view: Tensor) -> dict[str, Tensor]:
    return {str(module.main_input_name): view}


def _hf_answers(module: nn.Module, view: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        out = module(**view)
    return {name: value for name, value in out.items() if isinstance(value, Tensor)}


def _tokenizer(source: Source) -> Any:
    """The tokenizer of the model: its reader's, or that of the place it came from."""
    for holder in (source.module, source.artifact.predictor):
        found = getattr(getattr(holder, "reader", None), "tokenizer", None)
        if found is not None:
            return found
    name = str(source.artifact.model.get("id", "")).removeprefix("hf:")
    if not name:
        return None
    import transformers

    from stillhouse.models.loading import find_folder

    place = Path(name) if Path(name).is_dir() else find_folder(name)
    if place is None:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError, KeyError):
        return None


def to_timm(source: Source, folder: Path) -> dict[str, Any]:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""
    module: Any = source.module
    configured = getattr(module, "pretrained_cfg", None)
    if not type(module).__module__.startswith("timm.") or not configured:
        raise ModelError(
            f"--to timm needs a timm model, and this is {source.name}; "
            "--to onnx and --to torch take any model"
        )
    timm = _needed("timm", "images")
    shown: dict[str, Any] = {"num_classes": module.num_classes, "pretrained_cfg": {}}
    for key, value in (("mean", source.net), ("std", source.net)):
        found = _numbers(getattr(value, key, None))
        if found is not None:
            shown["pretrained_cfg"][key] = found
    classes = _classes(source)
    if classes:
        shown["pretrained_cfg"]["label_names"] = classes
    shown["pretrained_cfg"]["input_size"] = list(source.view.shape[1:])
    options = dict(source.artifact.model.get("options", {}))
    timm.models.save_for_hf(
        module, str(folder), model_config=shown, model_args=options, safe_serialization=True
    )
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    worst = compared(answers(module, source.view), answers(again, source.view), "the timm model")
    return {"architecture": configured.get("architecture", ""), "largest_difference": worst}


def to_sentence_transformers(source: Source, folder: Path) -> dict[str, Any]:
    """What `SentenceTransformer(FOLDER)` opens: encoder, pooling, and scaling where it is set."""
    module: Any = source.module
    if isinstance(module, SentenceTransformerNet):
        return _st_as_it_is(source, module, folder)
    if isinstance(module, SentenceEmbedder):
        return _st_of_embedder(source, module, folder)
    if not is_hugging_face(module) or module.base_model is not module:
        raise ModelError(
            "--to sentence-transformers needs a Hugging Face encoder without a head, or a model of "
            f"texts, and this is {source.name}"
        )
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"the tokenizer of {source.name} is not known, and sentences need one")
    settings = source.artifact.predictor.settings if source.artifact.predictor else {}
    pooling = str(settings.get("pooling", "mean"))
    normalise = bool(settings.get("normalise"))
    _write_st(folder, module, tokenizer, pooling=pooling, normalise=normalise)
    ours = _pooled(module, tokenizer, pooling, normalise)
    worst = compared({"embedding": ours}, _st_answers(folder), "the sentence encoder")
    return {"pooling": pooling, "largest_difference": worst}


def _prefixes(source: Source) -> dict[str, str]:
    """What the data put before queries and documents, by the names of sentence-transformers."""
    settings = source.artifact.predictor.settings if source.artifact.predictor else {}
    return {str(kind): str(text) for kind, text in settings.get("prefixes", {}).items()}


def _st_as_it_is(source: Source, module: Any, folder: Path) -> dict[str, Any]:
    prefixes = _prefixes(source)
    if prefixes:
        module.model.prompts = {**(getattr(module.model, "prompts", None) or {}), **prefixes}
    module.model.save(str(folder))
    ours = answers(source.net, list(_WORDS))
    # A folder does not say where vectors are cut: that is an argument of `SentenceTransformer`.
    cut = getattr(module.model, "truncate_dim", None)
    theirs = _st_answers(folder) if cut is None else _st_answers(folder, truncate_dim=cut)
    worst = compared(ours, theirs, "the sentence encoder")
    return {"modules": [type(m).__name__ for m in module.model], "largest_difference": worst}


def _st_of_embedder(source: Source, module: Any, folder: Path) -> dict[str, Any]:
    linear = module.projection if isinstance(module.projection, nn.Linear) else None
    _write_st(
        folder,
        module.encoder,
        module.tokenizer,
        pooling="mean",
        normalise=module.normalise,
        linear=linear,
        length=module.length,
        prompts=_prefixes(source),
    )
    ours = answers(source.net, list(_WORDS))
    worst = compared(ours, _st_answers(folder), "the sentence encoder")
    return {"pooling": "mean", "width": module.width, "largest_difference": worst}


def _write_st(
    folder: Path,
    module: Any,
    tokenizer: Any,
    *,
    pooling: str,
    normalise: bool,
    linear: nn.Linear | None = None,
    length: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """Encoder, pooling, a linear layer and scaling where there are any; prompts by kind."""
    package = _needed("sentence_transformers", "language")
    parts: Any = package.sentence_transformer.modules
    encoder = folder / "encoder"
    module.save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    options = {} if length is None else {"max_seq_length": length}
    built: list[nn.Module] = [parts.Transformer(str(encoder), **options)]
    built.append(parts.Pooling(int(module.config.hidden_size), pooling_mode=pooling))
    if linear is not None:
        dense = parts.Dense(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            activation_function=nn.Identity(),
        )
        dense.linear.load_state_dict(linear.state_dict())
        built.append(dense)
    if normalise:
        built.append(parts.Normalize())
    known = {"prompts": dict(prompts)} if prompts else {}
    package.SentenceTransformer(modules=built, device="cpu", **known).save(str(folder))
    shutil.rmtree(encoder)


def _st_answers(folder: Path, **options: Any) -> dict[str, Tensor]:
    """What the folder gives when it is read back by that library alone."""
    again = _needed("sentence_transformers", "language").SentenceTransformer(
        str(folder), device="cpu", **options
    )
    return {"embedding": again.encode(list(_WORDS), convert_to_tensor=True).cpu()}


def _pooled(module: nn.Module, tokenizer: Any, pooling: str, normalise: bool) -> Tensor:
    """Embeddings as they are defined: what the folder read back is compared with."""
    given = tokenizer(list(_WORDS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = module(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    if pooling == "cls":
        made = hidden[:, 0]
    elif pooling == "mean":
        made = (hidden * mask).sum(1) / mask.sum(1)
    else:
        raise ModelError(f"the pooling '{pooling}' is not one of mean and cls")
    return torch.nn.functional.normalize(made, dim=-1) if normalise else made


def to_diffusers(source: Source, folder: Path) -> dict[str, Any]:
    """`unet/` and `scheduler/` as diffusers opens them, and a note on how images are drawn."""
    from stillhouse.models.diffusers_unet import DiffusersUNet

    module = source.module
    if not isinstance(module, DiffusersUNet):
        raise ModelError(
            f"--to diffusers needs a UNet2DModel of diffusers, and this is {source.name}; "
            "--to torch takes any model"
        )
    module.save_folder(folder)
    settings = source.artifact.predictor.settings if source.artifact.predictor else {}
    (folder / "stillhouse.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False))
    (folder / "README.md").write_text(_diffusers_note(source, settings), encoding="utf-8")
    read = DiffusersUNet(folder=str(folder), classes=module.classes).eval()
    again = Net(read, answer="noise")
    ours, theirs = answers(source.net, source.view), answers(again, source.view)
    worst = compared(ours, theirs, "the folder read back")
    return {"class": "UNet2DModel", "largest_difference": worst}


def _diffusers_note(source: Source, settings: Mapping[str, Any]) -> str:
    sampler = settings.get("sampler", {})
    lines = [f"# {source.artifact.meta.get('title', 'A noise predictor')}", ""]
    if sampler.get("steps") == 0:
        time = sampler["time"]
        lines += [
            f"A generator of one step, asked at time {time}; it is no model for many steps.", "",
            "```python",
            "import torch",
            "from diffusers import DDPMScheduler, UNet2DModel", "",
            'unet = UNet2DModel.from_pretrained("unet").eval()',
            'kept = DDPMScheduler.from_pretrained("scheduler").alphas_cumprod'
            f"[{time}]",
            "noise = torch.randn(len(labels), *shape)  # labels: (B,) classes",
            "with torch.no_grad():",
            f"    found = unet((1 - kept).sqrt() * noise, {time}, class_labels=labels).sample",
            "images = ((1 / kept - 1).sqrt() * (noise - found) / 2 + 0.5).clamp(0, 1)",
            "```",
        ]  # fmt: skip
    else:
        lines.append(f"Judged with {sampler.get('steps', 50)} steps of DDIM.")
    classes = ", ".join(str(c) for c in settings.get("classes", ()))
    return "\n".join([*lines, "", f"Classes, from 0: {classes}"]) + "\n"


FORMS: dict[str, Callable[[Source, Path], dict[str, Any]]] = {
    "onnx": to_onnx,
    "torch": to_torch,
    "hf": to_hugging_face,
    "timm": to_timm,
    "sentence-transformers": to_sentence_transformers,
    "diffusers": to_diffusers,
}


def _classes(source: Source) -> list[str]:
    settings = source.artifact.predictor.settings if source.artifact.predictor else {}
    return [str(name) for name in settings.get("classes", ())]


def _numbers(value: Tensor | None) -> list[float] | None:
    return None if value is None else [float(v) for v in value.flatten()]


def _needed(package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(package, extra, "to export") from error
