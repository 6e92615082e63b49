"""`stillhouse doctor`."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli import doctor


def findings(call) -> list[dict[str, Any]]:
    return json.loads(call("doctor", "--json").out)


def test_a_sound_machine_is_told_topic_by_topic(call) -> None:
    done = call("doctor")
    assert done.code == 0, done.out
    topics = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert topics == ["Python", "torch", "extras", "devices", "cache", "data", "weights"]


def test_data_sets_and_roots(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [f["text"] for f in findings(call) if f["topic"] == "data"]
    assert any(text.startswith("digits") for text in told)
    assert any("STILLHOUSE_DATA is not set" in text for text in told)
    monkeypatch.setenv("STILLHOUSE_DATA", f"{tmp_path}{os.pathsep}{tmp_path / 'nowhere'}")
    roots = {f["text"]: f["state"] for f in findings(call) if "STILLHOUSE_DATA" in f["text"]}
    assert roots == {
        f"STILLHOUSE_DATA: {tmp_path}": "ok",
        f"STILLHOUSE_DATA names {tmp_path / 'nowhere'}, which is no folder": "warning",
    }


def test_real_data_is_found(call, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_DATA", str(data_root))
    found = {f["text"].split(":")[0]: f["state"] for f in findings(call) if f["topic"] == "data"}
    assert found["cifar10"] == found["fashion_mnist"] == "ok"


def test_a_cache_that_cannot_be_written_is_an_error(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file" / "cache"))
    done = call("doctor")
    assert done.code == 1
    assert "cannot be written" in done.out
    assert "set STILLHOUSE_CACHE" in done.out


def test_little_space_is_a_warning(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 60)
    monkeypatch.setattr(doctor, "LEAST_SHM", 1 << 60)
    states = [(f["state"], f["text"]) for f in findings(call)]
    assert any(state == "warning" and "GiB free" in text for state, text in states)
    if Path("/dev/shm").is_dir():
        assert any(state == "warning" and "bus error" in text for state, text in states)


@pytest.mark.parametrize(
    ("torch_version", "wanted"),
    [("2.0.1", "0.15"), ("2.6.0+cpu", "0.21"), ("2.14.1+cu130", "0.29"), ("3.0", "?")],
)
def test_the_torchvision_that_belongs_to_a_torch(torch_version: str, wanted: str) -> None:
    assert doctor.matching_torchvision(torch_version) == wanted


def test_a_pair_that_does_not_fit_is_named(call, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    real = builtins.__import__

    def broken(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    told = list(doctor.check_torch())[-1]
    assert told.state == "error"
    assert "operator torchvision::nms does not exist" in told.text
    assert "pip install 'torchvision==0." in told.remedy


def test_a_missing_extra_is_told_with_its_command(call, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = {"images": ("timm_of_no_one",), "here": ("json",)}
    monkeypatch.setattr(doctor.catalogue, "extras", lambda: extras)
    told = {f.text: (f.state, f.remedy) for f in doctor.check_extras()}
    assert told == {
        "images: timm_of_no_one not installed (optional)": (
            "note",
            "pip install 'stillhouse[images]'",
        ),
        "here: json": ("ok", ""),
    }


def test_weights_in_the_cache_are_listed(call) -> None:
    assert any("make models" in f["remedy"] for f in findings(call) if f["topic"] == "weights")
    folder = Path(os.environ["STILLHOUSE_CACHE"]) / "models" / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    told = [f["text"] for f in findings(call) if f["topic"] == "weights"]
    assert len(told) == 1
    assert told[0].endswith("models: org/name")
