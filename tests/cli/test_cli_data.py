"""`stillhouse data`: what can be named, and what one of them may be told."""

from __future__ import annotations

import json
import subprocess
import sys

from stillhouse.data.registry import list_data


def test_the_table_lists_every_data_set_and_what_is_not_here(call, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "empty"))
    lines = call("data").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [card.name for card in list_data()]
    told = {line.split()[0]: line for line in lines}
    assert "not here" in told["cifar10"]
    assert "not here" not in told["digits"]
    assert "not here" not in told["image_folder"]


def test_those_of_a_task(call) -> None:
    found = json.loads(call("data", "--task", "text-generation", "--json").out)
    assert {"e2e_nlg", "prompt_responses"} <= {card["name"] for card in found}
    assert all("text-generation" in card["tasks"] for card in found)
    done = call("data", "--task", "text-generaton")
    assert done.code == 1
    assert "did you mean 'text-generation'" in done.err


def test_options_are_told_with_default_range_and_help(call) -> None:
    out = call("data", "image_folder").out
    assert "path: str = required" in out
    assert "where the data is" in out
    own = call("data", "embedding_files").out
    assert "val_share: float = 0.2, >= 0, < 1" in own
    assert 'text: str = "text"' in own
    assert own.index("documents:") < own.index("val:")  # its own options come first
    told = json.loads(call("data", "embedding_files", "--json").out)["options"]
    assert next(o for o in told if o["name"] == "limit")["range"] == ">= 2"


def test_where_it_is_or_how_to_get_it(call, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "empty"))
    assert "how to get it" in call("data", "e2e_nlg").out
    place = tmp_path / "root" / "e2e_nlg" / "devset.csv.gz"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path / "root"))
    assert str(place) in call("data", "e2e_nlg").out


def test_an_unknown_name_is_told_with_the_nearest(call) -> None:
    done = call("data", "cifr10")
    assert done.code == 1
    assert "did you mean 'cifar10'" in done.err


def test_every_data_set_tells_its_options(call) -> None:
    for card in list_data():
        assert call("data", card.name).code == 0, card.name


def test_the_list_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; sys.argv = ['stillhouse', 'data']\n"
        "from stillhouse.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'pydantic'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cifar10" in done.stdout
    assert "slow" not in done.stderr
