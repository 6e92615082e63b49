"""CONTRIBUTING.md followed to the letter: its files, in a copy of the house, do what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEP = re.compile(r"\*\*\d\.\*\* `([^`]+)`[^\n]*\n\n```\w+\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the files of the guide added, and nothing else changed."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "methods").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_contract.py"):
        shutil.copy(ROOT / name, folder / name)
    steps = STEP.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [Path(name).name for name, _ in steps] == [
        "logit_match.py",
        "logit-match.yaml",
        "test_logit_match.py",
    ]
    for name, text in steps:
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def called(house: Path, *words: str) -> str:
    """What a command writes; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(house / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=house,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stillhouse(house: Path, *words: str) -> str:
    return called(house, "-c", "from stillhouse.cli.main import main; main()", *words)


def test_the_method_is_found_and_shown(house: Path) -> None:
    shown = stillhouse(house, "methods", "show", "logit-match")
    assert "weight: float = 0.1, >= 0" in shown
    assert "source: chosen here" in shown
    assert "logit-match" in stillhouse(house, "methods")


def test_its_test_and_the_contract_pass(house: Path) -> None:
    told = called(house, "-m", "pytest", "-q", "-k", "logit-match or logit_match")
    assert re.search(r"\b\d{1,2} passed", told)
    assert int(re.search(r"(\d+) passed", told)[1]) > 5


def test_it_is_clean(house: Path) -> None:
    added = ("src/stillhouse/methods/images/logit_match.py", "tests/methods/test_logit_match.py")
    called(house, "-m", "ruff", "check", *added)
    called(house, "-m", "ruff", "format", "--check", *added)


@pytest.mark.slow
def test_its_types_are_complete(house: Path) -> None:
    called(house, "-m", "mypy", "--strict", "src/stillhouse/methods/images/logit_match.py")


@pytest.mark.slow
def test_its_recipe_runs_on_real_data(house: Path) -> None:
    told = stillhouse(house, "run", "logit-match")
    assert "accuracy" in told
    folder = house / "runs" / "logit-match-digits"
    assert (folder / "report.html").is_file()
    assert (folder / "artifact" / "artifact.json").is_file()
    stronger = ("-o", "settings.weight=0.5", "--folder", "runs/stronger")
    stillhouse(house, "run", "logit-match", *stronger)
    assert "weight: 0.5" in (house / "runs" / "stronger" / "recipe.yaml").read_text()


def test_what_makes_it_whole_is_understood(house: Path) -> None:
    """The claim and the variant of the guide, put into the method's class."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    claims = re.search(r"```python\n(  claims: .*?\n  \])\n", guide, re.S)[1]
    variants = re.search(r"`(variants = \{.*?\})`", guide)[1]
    file = house / "src/stillhouse/methods/images/logit_match.py"
    before = file.read_text(encoding="utf-8")
    body = textwrap.indent(textwrap.dedent(claims) + "\n" + variants, "    ")
    text = before.replace("    class Config(", body + "\n\n    class Config(")
    text = text.replace("import Any\n", "import Any, ClassVar\n", 1)
    text = text.replace("import Card, ", "import Card, Claim, Variant, ", 1)
    file.write_text(text, encoding="utf-8")
    try:
        shown = stillhouse(house, "methods", "show", "logit-match")
        assert "beats the student alone at equal steps" in shown
        assert "labels-only" in shown
        plan = stillhouse(house, "run", "logit-match", "-o", "variant=labels-only", "--dry-run")
        assert re.search(r"weight +0\n", plan)
    finally:
        file.write_text(before, encoding="utf-8")
