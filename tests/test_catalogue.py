"""The catalogue: what a file says without being run, other packages, the remembered scan."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse import catalogue
from stillhouse.bench.results import number_of
from stillhouse.errors import MissingExtra, RecipeError

TOY = '''
"""Toy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant

SIDES = ("toy", "supervised")


class Base(MethodConfig):
    """Shared settings."""

    mode: Literal["a", "b"] = "a"


class Toy(StudentTraining):
    """Does nothing.

    At length.
    """

    card = Card(
        "toy", "A toy", summary="It stands " "for others.", needs=("logits",),
        stages=(("student", "train"),),
    )

    class Config(Base):
        """Settings."""

        alpha: float = Field(
            0.5, gt=0, le=1, description="a weight", json_schema_extra={"source": "[code]"}
        )
        names: list[str] = Field(default_factory=list)
        needed: int
        LIMIT: ClassVar[int] = 3

    variants: ClassVar[dict[str, Variant]] = {
        "strong": Variant({"alpha": 1.0}, "all of it", budget={"steps": 3})
    }
    claims: ClassVar[list[Claim]] = [Claim("is no worse", "accuracy", *(), ours="toy", than="kd")]
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that adds a method; importing it is an error."""
    site = tmp_path / "site"
    inner = site / "toys" / "inner"
    inner.mkdir(parents=True)
    (site / "toys" / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "toy.py").write_text(TOY)
    info = site / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stillhouse.methods]\ntoy = toys.inner.toy:Toy\n")
    monkeypatch.syspath_prepend(str(site))
    catalogue.scan.cache_clear()
    yield inner / "toy.py"
    catalogue.scan.cache_clear()


def rescan() -> catalogue.Found:
    catalogue.scan.cache_clear()
    return catalogue.scan()


def test_every_own_file_with_a_card_is_an_entry_with_a_unique_id() -> None:
    found = rescan()
    assert found.problems == ()
    for entry in found.entries.values():
        assert entry.file.is_file()
        assert entry.card["summary"]
        assert entry.kind in {"method", "baseline"}
        assert "_" not in entry.id


def test_what_is_read_equals_what_is_imported() -> None:
    for entry in rescan().entries.values():
        kind = catalogue.load(entry.id)
        assert kind.card.id == entry.id
        assert kind.__name__ == entry.name
        for name, value in entry.card.items():
            stored = getattr(kind.card, name)
            assert json.loads(json.dumps(stored)) == value
        assert {setting["name"] for setting in entry.config} == set(kind.Config.model_fields)
        for setting in entry.config:
            field = kind.Config.model_fields[setting["name"]]
            assert setting.get("help", "") == (field.description or "")
        assert {claim["text"] for claim in entry.claims} == {c.text for c in kind.claims}
        for name, variant in kind.variants.items():
            assert entry.variants[name].get("set", {}) == json.loads(json.dumps(dict(variant.set)))


def test_every_setting_has_help_and_source() -> None:
    for entry in rescan().entries.values():
        for setting in entry.config:
            assert setting.get("help"), f"{entry.id}.{setting['name']} has no description"
            assert setting.get("source"), f"{entry.id}.{setting['name']} has no source"


def test_claims_and_variants_name_sides_that_exist() -> None:
    known = rescan().entries
    for entry in known.values():
        for claim in entry.claims:
            for side in (claim["ours"], claim["than"]):
                if number_of(side) is not None:
                    continue  # a figure that is to be reached
                name, _, variant = side.partition("/")
                assert name == "teacher" or name in known, f"{entry.id}: {side}"
                assert not variant or variant in known[name].variants, f"{entry.id}: {side}"


def test_another_package_is_read_without_importing_it(package: Path) -> None:
    entry = rescan().entries["toy"]
    assert "toys" not in sys.modules
    assert (entry.module, entry.file, entry.name) == ("toys.inner.toy", package, "Toy")
    assert entry.card["title"] == "A toy"
    assert entry.card["summary"] == "It stands for others."
    assert entry.about.startswith("Does nothing.")
    assert entry.trains_student
    assert list(entry.config) == [
        {"name": "mode", "type": "Literal['a', 'b']", "default": "a"},
        {
            "name": "alpha",
            "type": "float",
            "default": 0.5,
            "range": "> 0, <= 1",
            "help": "a weight",
            "source": "[code]",
        },
        {"name": "names", "type": "list[str]", "default": []},
        {"name": "needed", "type": "int", "required": True},
    ]
    assert entry.variants == {
        "strong": {"set": {"alpha": 1.0}, "about": "all of it", "budget": {"steps": 3}}
    }
    assert entry.claims == (
        {"text": "is no worse", "metric": "accuracy", "ours": "toy", "than": "kd"},
    )


def test_the_scan_is_remembered_and_follows_changes(package: Path) -> None:
    first = rescan()
    memory = next(Path(os.environ["STILLHOUSE_CACHE"]).glob("catalogue-*.json"))
    assert str(package) in memory.read_text()
    assert rescan() == first
    package.write_text(TOY.replace("A toy", "Another toy"))
    os.utime(package, ns=(1, 1))
    assert rescan().entries["toy"].card["title"] == "Another toy"
    memory.write_text("{broken")
    assert rescan().entries["toy"].card["title"] == "Another toy"
    (package.parents[2] / "toys-1.0.dist-info" / "entry_points.txt").unlink()
    (package.parents[2] / "toys-1.0.dist-info").touch()
    os.utime(package.parents[2], ns=(2, 2))
    importlib.invalidate_caches()
    assert "toy" not in rescan().entries


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"A toy"', '"A " + name()', "write title as a literal"),
        ('"toy", "A toy"', '"toy"', "the card of Toy has no title"),
        ('"toy", "A toy"', '"kd", "A toy"', "the id 'kd' is taken by"),
        ('summary="It stands " "for others."', 'summary=""', "has no summary"),
        ("class Toy", "class class", "is not valid Python (line"),
    ],
)
def test_a_file_that_cannot_be_shown_is_a_problem_not_a_failure(
    package: Path, old: str, new: str, words: str
) -> None:
    package.write_text(TOY.replace(old, new))
    found = rescan()
    assert "toy" not in found.entries
    assert "kd" in found.entries
    assert len(found.problems) == 1
    assert str(package) in found.problems[0]
    assert words in found.problems[0]


def test_an_unknown_id_is_told_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown method 'supervized'; did you mean 'supervised'"):
        catalogue.find("supervized")


def test_a_missing_package_is_named_with_its_extra(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package.parents[1] / "__init__.py").write_text("")
    (package.parent / "__init__.py").write_text("")
    package.write_text(TOY.replace("\nfrom pydantic", "\nimport timm_of_no_one\nfrom pydantic"))
    rescan()
    monkeypatch.setattr(catalogue, "extras", lambda: {"images": ("timm_of_no_one",)})
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[images\]'"):
        catalogue.load("toy")
    monkeypatch.setattr(catalogue, "extras", dict)
    with pytest.raises(RecipeError, match="cannot be imported: No module named 'timm_of_no_one'"):
        catalogue.load("toy")


def test_listing_imports_neither_torch_nor_pydantic() -> None:
    code = """
        import sys
        from stillhouse import catalogue
        heavy = {"torch", "pydantic", "numpy", "rich"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
