from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

import stillhouse.errors
from stillhouse.data.hash_tokens import EMPTY, PAD, HashTokens
from stillhouse.errors import DataError

SOURCE = str(pathlib.Path(stillhouse.errors.__file__).parents[1])


def test_shape_padding_and_cutting():
    tokens = HashTokens(buckets=100, length=4)
    ids = tokens(["one two", "a b c d e f"])
    assert ids.shape == (2, 4)
    assert ids.dtype == torch.int64
    assert (ids[0, 2:] == PAD).all()
    assert (ids[1] > EMPTY).all()
    assert torch.equal(tokens("one two"), ids[0])
    assert tokens([]).shape == (0, 4)


def test_ids_do_not_depend_on_the_process():
    code = "from stillhouse.data.hash_tokens import HashTokens; print(HashTokens()('good morning'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(HashTokens()("good morning"))


def test_case_and_unicode_forms_do_not_matter_words_do():
    tokens = HashTokens()
    assert torch.equal(tokens("Straße CAFÉ"), tokens("strasse cafe\u0301"))
    assert not torch.equal(tokens("pay bill"), tokens("bill pay"))
    assert tokens.words("don't stop, it's 3pm!") == ["don't", "stop", ",", "it's", "3pm", "!"]


def test_ids_stay_in_range_and_spread():
    tokens = HashTokens(buckets=50, length=1)
    ids = tokens([f"word{i}" for i in range(2000)])
    assert int(ids.min()) >= 2
    assert int(ids.max()) <= 49
    assert len(ids.unique()) == 48


def test_an_empty_text_is_not_all_padding():
    assert HashTokens(length=3)(" \n ").tolist() == [EMPTY, PAD, PAD]


def test_settings_make_it_again_and_tell_it_apart():
    tokens = HashTokens(64, 5)
    again = HashTokens(**tokens.settings())
    assert again.fingerprint == tokens.fingerprint
    assert torch.equal(again("some words"), tokens("some words"))
    assert HashTokens(64, 6).fingerprint != tokens.fingerprint


@pytest.mark.parametrize(("buckets", "length"), [(2, 4), (10, 0)])
def test_impossible_settings_are_refused(buckets, length):
    with pytest.raises(DataError, match="buckets"):
        HashTokens(buckets, length)
