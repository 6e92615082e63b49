"""What comes out of a run: a model, a data set, labels, or an analysis, in one folder each.

Layout of a folder: `artifact.json` (kind, provenance, hashes, how to reopen it), the content
(`model.safetensors`, `tensors.safetensors` + `sheet.png`, `labels.jsonl`, `tables.json`),
`README.md` (the card), and `attachments/NAME/` for artifacts that come along.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpack_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from stillhouse.errors import CheckpointError, DataError
from stillhouse.writing import write_atomic

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

    def files(self) -> Mapping[str, bytes]:
        """Files that are written beside the weights for other programs; none by default."""
        return {}

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
            it was handed in as a module, which then is needed for reopening too. "altered" lists
            what a method changed in the built module, see `altered`.
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
        """Write everything; the folder is whole once `artifact.json` is there.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written.
        """
        (folder / "artifact.json").unlink(missing_ok=True)
        about: dict[str, Any] = {"schema": 1, "kind": self.kind, "meta": self.meta}
        files = about["sha256"] = {}

        def write(name: str, content: bytes) -> None:
            write_atomic(folder / name, content)
            files[name] = hashlib.sha256(content).hexdigest()

        if self.predictor is not None:
            write("model.safetensors", pack_tensors(plain_state(self.predictor.module)))
            about["model"] = self.model
            about["predictor"] = {
                "class": f"{type(self.predictor).__module__}:{type(self.predictor).__qualname__}",
                "settings": self.predictor.settings,
            }
            for name, content in self.predictor.files().items():
                write(name, content)
            net = self.predictor.module
            about["net"] = net_settings(net)
            config: Any = getattr(getattr(net, "module", net), "config", None)
            if hasattr(config, "to_json_file"):
                # Without it a Hugging Face model could be rebuilt only where its id is known.
                config.to_json_file(folder / "config.json", use_diff=False)
        if self.tensors:
            held = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
            write("tensors.safetensors", pack_tensors(held))
        if self.kind == "labels":
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            write("labels.jsonl", "".join(lines).encode())
        if self.tables:
            write("tables.json", json.dumps(self.tables, indent=1).encode())
        if self.sheet is not None:
            write("sheet.png", self.sheet)
        for name, attached in self.attachments.items():
            attached.save(folder / "attachments" / name)
        about["attachments"] = sorted(self.attachments)
        write_atomic(folder / "README.md", self._readme().encode())
        text = json.dumps(about, indent=1, ensure_ascii=False)
        write_atomic(folder / "artifact.json", text.encode())
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
    settings = {
        "answer": module.answer,
        "mean": None if mean is None else mean.flatten().tolist(),
        "std": None if std is None else std.flatten().tolist(),
    }
    if mean is not None and mean.ndim != 3:  # views of other than images
        settings["axes"] = mean.ndim - 1
    return settings


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
    except ValueError as error:  # no JSON, or no UTF-8
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or "kind" not in found:
        raise CheckpointError(f"{path} is no description of an artifact")
    return found


def read_file(path: Path, about: Mapping[str, Any]) -> bytes:
    """A file of an artifact, checked against the hash that its description holds.

    Args:
        path: of the file.
        about: the description; those of older versions hold no hashes.

    Raises:
        CheckpointError: absent or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    wanted = about.get("sha256", {}).get(path.name)
    if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
        raise CheckpointError(f"{path} is damaged: its content does not match its hash")
    return content


def read_tensors(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a safetensors file of an artifact; see `read_file`.

    Raises:
        CheckpointError: absent or damaged.
    """
    content = read_file(path, about)
    try:
        tensors: dict[str, Tensor] = unpack_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors


def read_records(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of a JSONL file of an artifact; see `read_file`.

    Raises:
        CheckpointError: absent or damaged; a line that is not JSON, by number.
    """
    found: list[dict[str, Any]] = []
    # Only line feeds end a line: texts may hold any other separator.
    for number, line in enumerate(read_file(path, about).split(b"\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number}: {error}") from error
    return found


def altered(module: nn.Module, model: Mapping[str, Any]) -> nn.Module:
    """A freshly built module, changed as the method that trained it had changed it.

    Args:
        module: as its id or its owner builds it.
        model: of an artifact. Its "altered" is a list of {"by": "package.module:function",
            "options": {...}}; each function (or class) is called with the module and the
            options, and returns the module with which it goes on.

    Raises:
        CheckpointError: a function of a package that adds no methods, that is not there, or
            that takes other options.
    """
    for change in model.get("altered", ()):
        by = trusted(str(change["by"]), "a change of the artifact's model")
        if isinstance(by, type) and isinstance(module, by):
            continue  # the owner handed in what already stands around the model
        try:
            module = by(module, **change.get("options", {}))
        except TypeError as error:
            raise CheckpointError(f"'{change['by']}' cannot be built again: {error}") from error
    return module


def alterations_of(module: nn.Module) -> list[dict[str, Any]]:
    """What stands around a model, for `altered`: its class and arguments; none for a model.

    A module that keeps more than the recipe's model (a second head) says so by a method
    `around`, which gives the keyword arguments to build it around the model.
    """
    told = getattr(module, "around", None)
    if told is None:
        return []
    kind = type(module)
    return [{"by": f"{kind.__module__}:{kind.__qualname__}", "options": told()}]


def trusted(name: str, what: str) -> Any:
    """What an artifact names in this package, or in one that adds methods to it.

    Importing whatever it names would let a folder run code.

    Args:
        name: "package.module:attribute".
        what: for the error.

    Raises:
        CheckpointError: another package, or no such thing in it.
    """
    module_name, _, attribute = name.partition(":")
    known = {"stillhouse"}
    known |= {e.value.split(":")[0].split(".")[0] for e in entry_points(group="stillhouse.methods")}
    if module_name.split(".")[0] not in known:
        raise CheckpointError(
            f"{what}, '{name}', is not of a package that adds methods ({', '.join(sorted(known))})"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{what}, '{name}', cannot be found: {error}") from error


def restore_weights(module: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` of an artifact into a module, strictly.

    Raises:
        CheckpointError: damaged, or keys or shapes differ.
    """
    inner = getattr(module, "module", module)
    state = read_tensors(Path(folder) / "model.safetensors", read_description(folder))
    try:
        inner.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(inner).__name__}: {error}"
        ) from error
    with torch.no_grad():
        inner.eval()
