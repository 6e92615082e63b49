from __future__ import annotations

import pathlib

import pytest

from stillhouse.data.roots import cache_folder, cache_root, find_file, locate, missing, search_path
from stillhouse.errors import DataError


@pytest.fixture
def two_roots(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    roots = [tmp_path / "first", tmp_path / "second"]
    for root in roots:
        root.mkdir()
    monkeypatch.setenv("STILLHOUSE_DATA", f"{roots[0]}:{roots[1]}")
    return roots


def test_roots_are_searched_in_order_and_the_cache_last(two_roots):
    assert search_path() == [*two_roots, cache_root() / "data"]
    for place in reversed(search_path()):
        (place / "set").mkdir(parents=True)
        (place / "set" / "a.bin").write_bytes(b"1")
        assert find_file(["set/a.bin"]) == place / "set" / "a.bin"


def test_an_earlier_root_wins_over_a_preferred_name(two_roots):
    (two_roots[0] / "second_choice").write_text("")
    (two_roots[1] / "first_choice").write_text("")
    assert find_file(["first_choice", "second_choice"]) == two_roots[0] / "second_choice"
    (two_roots[0] / "first_choice").write_text("")
    assert find_file(["first_choice", "second_choice"]) == two_roots[0] / "first_choice"


def test_missing_data_is_told_with_places_and_remedies(two_roots, monkeypatch):
    two_roots[1].rmdir()
    text = str(missing("toys", ["toys/t.npz"], get="ask nicely", tried="http://x: no route"))
    for part in ("'toys'", "toys/t.npz", str(two_roots[0]), f"{two_roots[1]} (no such folder)"):
        assert part in text
    assert "ask nicely" in text
    assert "no route" in text
    assert "set STILLHOUSE_DATA" in text
    monkeypatch.delenv("STILLHOUSE_DATA")
    assert "STILLHOUSE_DATA is not set" in str(missing("toys", ["t"]))


def test_cache_folder_is_made_below_the_cache_or_refused(tmp_path, monkeypatch):
    assert cache_folder("a", "b") == cache_root() / "a" / "b"
    assert cache_folder("a", "b").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set STILLHOUSE_CACHE"):
        cache_folder("a")


def test_own_files_are_found_as_given_and_below_roots(two_roots, tmp_path, monkeypatch):
    (two_roots[1] / "mine.csv").write_text("")
    assert locate("mine.csv", option="path") == two_roots[1] / "mine.csv"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("")
    assert locate("mine.csv", option="path").resolve() == tmp_path / "mine.csv"
    with pytest.raises(DataError, match=r"(?s)no file .*mine\.cvs.*'mine\.csv'"):
        locate("mine.cvs", option="path")
    with pytest.raises(DataError, match="not a folder"):
        locate("mine.csv", option="path", folder=True)
