"""What comes out of a run: a model, a data set, labels, or an analysis, in one folder each.

Layout of a folder: `artifact.json` (kind, provenance, how to reopen it), the content
(`model.safetensors`, `tensors.safetensors` + `sheet.png`, `labels.jsonl`, `tables.json`),
`README.md` (the card), and `attachments/NAME/` for artifacts that come along.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.errors import CheckpointError, DataError

Kind = Literal["model", "dataset", "labels", "analysis"]


class Predictor:
    """A deployed model: the module with its settings, from raw input to answers.

    Subclasses live beside their task or method.

    Args:
        module: a Net or any module `predict` knows how to call.
        settings: plain JSON values that `predict` depends on (class names, tiling, rate ...).

    Attributes:
        reads: what `infer` takes: "images", "text", "jsonl", "arrays" ...
        writes: what it gives.
        options: names of `infer -o` options with their help.
    """

    reads: ClassVar[str] = "arrays"
    writes: ClassVar[str] = "jsonl"
    options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        self.module = module.eval()
        self.settings: dict[str, Any] = dict(settings or {})

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """Answers for raw inputs, one per input.

        Args:
            inputs: of the kind that `reads` names.
            options: see `options`.
        """
        raise NotImplementedError

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Read files or folders, predict, write; returns a summary for the terminal."""
        raise NotImplementedError

    @classmethod
    def restore(cls, module: nn.Module, settings: Mapping[str, Any]) -> Predictor:
        """The inverse of saving."""
        return cls(module, settings)


@dataclass
class Artifact:
    """The outcome of a run.

    Attributes:
        kind: model, dataset, labels or analysis.
        predictor: of a model.
        model: how to build the module again: {"id": ..., "options": ...}; without an id when
            it was handed in as a module, which then is needed for reopening too. "around" says
            what stands around it, see `around_of`.
        tensors: of a data set (or what an analysis keeps).
        records: of labels.
        tables: of an analysis: [{"title", "columns", "rows"}].
        sheet: a picture of the data set, PNG.
        meta: plain JSON values: provenance, classes, preprocessing.
        attachments: artifacts that come along, by name.
    """

    kind: Kind
    predictor: Predictor | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: Iterable[Mapping[str, Any]] = ()
    tables: list[dict[str, Any]] = field(default_factory=list)
    sheet: bytes | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    attachments: dict[str, Artifact] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The model's module.

        Raises:
            DataError: the artifact is not a model.
        """
        if self.predictor is None:
            raise DataError(f"an artifact of kind '{self.kind}' holds no model")
        return self.predictor.module

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """Answers of the model; see its predictor."""
        if self.predictor is None:
            raise DataError(f"an artifact of kind '{self.kind}' cannot predict")
        return self.predictor.predict(inputs, **options)

    def save(self, folder: Path) -> Path:
        """Write everything; the folder is whole once `artifact.json` is there."""
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"schema": 1, "kind": self.kind, "meta": self.meta}
        if self.predictor is not None:
            save_file(plain_state(self.predictor.module), folder / "model.safetensors")
            about["model"] = self.model
            about["predictor"] = {
                "class": f"{type(self.predictor).__module__}:{type(self.predictor).__qualname__}",
                "settings": self.predictor.settings,
            }
            net = self.predictor.module
            about["net"] = net_settings(net)
            config: Any = getattr(getattr(net, "module", net), "config", None)
            if hasattr(config, "to_json_file"):
                # Without it a Hugging Face model could be rebuilt only where its id is known.
                config.to_json_file(folder / "config.json", use_diff=False)
        if self.tensors:
            held = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
            save_file(held, folder / "tensors.safetensors")
        if self.kind == "labels":
            with open(folder / "labels.jsonl", "w", encoding="utf-8") as file:
                for record in self.records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.tables:
            (folder / "tables.json").write_text(json.dumps(self.tables, indent=1))
        if self.sheet is not None:
            (folder / "sheet.png").write_bytes(self.sheet)
        for name, attached in self.attachments.items():
            attached.save(folder / "attachments" / name)
        about["attachments"] = sorted(self.attachments)
        (folder / "README.md").write_text(self._readme(), encoding="utf-8")
        (folder / "artifact.json").write_text(json.dumps(about, indent=1, ensure_ascii=False))
        return folder

    def _readme(self) -> str:
        lines = [f"# {self.meta.get('title', 'A Stillhouse artifact')}", ""]
        lines.append(f"Kind: {self.kind}. Reopen it with `stillhouse.load(folder)`.")
        for key in ("method", "task", "data", "summary", "created"):
            if self.meta.get(key):
                lines.append(f"- {key}: {self.meta[key]}")
        figures = self.meta.get("figures")
        if figures:
            lines += ["", "| figure | value |", "|---|---|"]
            lines += [f"| {k} | {v:.6g} |" for k, v in figures.items()]
        return "\n".join(lines) + "\n"


def known_class(name: str) -> Any:
    """What "package.module:Class" names, if it is of this package or one that adds methods.

    An artifact names classes; importing whatever it names would let a folder run code.

    Raises:
        CheckpointError: another package, or no such name.
    """
    module_name, _, class_name = name.partition(":")
    known = {"stillhouse"}
    known |= {e.value.split(":")[0].split(".")[0] for e in entry_points(group="stillhouse.methods")}
    if module_name.split(".")[0] not in known:
        raise CheckpointError(
            f"the artifact's class '{name}' is not of a package that adds methods "
            f"({', '.join(sorted(known))})"
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"the artifact's class '{name}' is not there: {error}") from error


def around_of(module: nn.Module) -> dict[str, Any] | None:
    """How what stands around a model is built again: its class and arguments; None for a model.

    A module that keeps more than the recipe's model (a second head) says so by a method
    `around`, which gives the keyword arguments to build it around the model.
    """
    told = getattr(module, "around", None)
    if told is None:
        return None
    kind = type(module)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "settings": told()}


def put_around(module: nn.Module, around: Mapping[str, Any] | None) -> nn.Module:
    """The module inside what stood around it when it was saved; see `around_of`.

    Raises:
        CheckpointError: no such class, or it takes other arguments.
    """
    if not around:
        return module
    kind = known_class(str(around["class"]))
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "around")):
        raise CheckpointError(f"'{around['class']}' is nothing that stands around a model")
    if isinstance(module, kind):
        return module
    try:
        made: nn.Module = kind(module, **around["settings"])
    except TypeError as error:
        raise CheckpointError(f"'{around['class']}' cannot be built again: {error}") from error
    return made


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as safetensors takes it: own keys, contiguous, nothing shared.

    A Net gives the keys of the module inside it.
    """
    inner = getattr(module, "module", module)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in inner.state_dict().items():
        kept = value.detach().cpu().contiguous()
        if kept.numel() and kept.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.data_ptr())
        state[name] = kept
    return state


def net_settings(module: nn.Module) -> dict[str, Any]:
    """What a Net adds to its module, as plain values; empty for other modules."""
    if not hasattr(module, "answer"):
        return {}
    mean, std = getattr(module, "mean", None), getattr(module, "std", None)
    return {
        "answer": module.answer,
        "mean": None if mean is None else mean.flatten().tolist(),
        "std": None if std is None else std.flatten().tolist(),
    }


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `artifact.json`.

    Raises:
        CheckpointError: the folder is no artifact, or was not written to its end.
    """
    path = Path(folder) / "artifact.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} is not an artifact: artifact.json is missing"
            + (" (was the run stopped while writing it?)" if Path(folder).exists() else "")
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: absent or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file, one by one.

    Raises:
        CheckpointError: a line that is not JSON, by number.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise CheckpointError(f"{path}, line {number}: {error}") from error


def restore_weights(module: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` of an artifact into a module, strictly.

    Raises:
        CheckpointError: damaged, or keys or shapes differ.
    """
    inner = getattr(module, "module", module)
    state = read_tensors(Path(folder) / "model.safetensors")
    try:
        inner.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(inner).__name__}: {error}"
        ) from error
    with torch.no_grad():
        inner.eval()
