"""`stillhouse methods` and `methods show`."""

from __future__ import annotations

import json

from stillhouse import catalogue
from stillhouse.cli import methods_show


def test_the_table_lists_every_entry_with_its_summary(call) -> None:
    done = call("methods")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split()[:2] == ["id", "kind"]
    known = catalogue.entries()
    assert len(lines) == len(known) + 1
    for name, entry in known.items():
        line = next(line for line in lines if line.split()[0] == name)
        assert line.endswith(entry.card["summary"])


def test_json_and_filters(call) -> None:
    listed = json.loads(call("methods", "--json").out)
    assert {entry["id"] for entry in listed} == set(catalogue.entries())
    kd = next(entry for entry in listed if entry["id"] == "kd")
    assert (kd["kind"], kd["needs"]) == ("baseline", ["logits"])
    chosen = json.loads(call("methods", "--json", "--yields", "dataset").out)
    assert all(entry["yields"] == "dataset" for entry in chosen)
    found = call("methods", "--json", "--room", "dense", "--yields", "labels")
    assert json.loads(found.out) == []


def test_show_tells_card_settings_with_help_and_source_claims_and_results(call) -> None:
    out = call("methods", "show", "kd").out
    assert "Distilling the Knowledge in a Neural Network" in out
    assert "needs of the teacher" in out
    assert "temperature: float = 4.0, > 0" in out
    assert "softens both distributions" in out
    assert "source: common practice" in out
    assert "reverse: KL(student || teacher) (direction: reverse)" in out
    assert "beats the student alone at equal steps (accuracy)" in out
    assert "Results" in out


def test_show_reads_recorded_results_and_says_when_they_are_stale(
    call, tmp_path, monkeypatch
) -> None:
    from stillhouse.bench.results import file_hash

    entry = catalogue.find("kd")
    text = entry.claims[0]["text"]
    stored = {
        "schema": 1,
        "method": "kd",
        "file_hash": file_hash(entry.file),
        "command": "stillhouse bench kd",
        "seeds": [0, 1],
        "data": [{"name": "digits", "edition": "digits (a copy)"}],
        "sides": {"kd": {"0": {"accuracy": 0.5}, "1": {"accuracy": 0.75, "more": 1}}},
        "claims": [{"text": text, "metric": "accuracy", "verdict": "supported"}],
        "note": "a note",
    }
    path = tmp_path / "kd.json"
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(methods_show, "results_folders", lambda: [tmp_path])
    out = call("methods", "show", "kd").out
    assert f"supported: {text}" in out
    assert "kd: accuracy 0.625" in out
    assert "digits (a copy)" in out
    assert "a note" in out
    assert "stale" not in out
    path.write_text(json.dumps({**stored, "file_hash": "another"}))
    assert "stale" in call("methods", "show", "kd").out
    shown = json.loads(call("methods", "show", "kd", "--json").out)
    assert shown["results"]["stale"] is True
    assert shown["config"][0]["name"] == "alpha"


def test_a_file_that_cannot_be_read_is_a_warning(call, monkeypatch) -> None:
    monkeypatch.setattr(catalogue, "problems", lambda: ("x.py: is not valid Python",))
    done = call("methods")
    assert done.code == 0
    assert "warning: x.py: is not valid Python" in done.err


def test_an_unknown_filter_names_the_nearest(call) -> None:
    done = call("methods", "--room", "imges")
    assert done.code == 1
    assert "--room imges: there is none of it; did you mean 'images'?" in done.err
