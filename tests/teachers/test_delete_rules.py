from __future__ import annotations

import re

import pytest

from stillhouse.parts.text_spans import align, split_words
from stillhouse.teachers.delete_rules import compress, keep_flags, shorten


def kept(text: str) -> str:
    return shorten(text)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("the cat sat", "cat sat"),
        ("The Beatles sang a song", "The Beatles sang song"),  # article before a capital stays
        ("born in 1990 in winter", "born in 1990 winter"),
        ("it was founded", "founded"),
        ("it was blue", "was blue"),
        ("He quickly ran home", "ran home"),
        ("a plan (which failed) worked", "plan worked"),
        ("a plan (of 1990) worked", "plan (of 1990) worked"),
        ("Einstein met Bohr; Einstein left.", "met Bohr; Einstein left."),
        ("her family, only 3 cm", "family, only 3 cm"),
    ],
)
def test_rules(text, short):
    assert kept(text) == short


def test_the_same_word_stays_or_goes_by_what_is_to_its_right():
    flags = {}
    for text in ("in the house", "in the House", "was born", "was tall", "was asked"):
        words = text.split()
        flags[text] = keep_flags(words)[-2]
    assert flags == {
        "in the house": False,
        "in the House": True,
        "was born": True,
        "was tall": True,
        "was asked": False,
    }


def test_without_violations_words_are_only_deleted():
    text = "In 1998 the band (from Leeds) recorded a very good album; it was released in May."
    source = [w.text for w in split_words(text)]
    short = [w.text for w in split_words(kept(text))]
    assert 0 < len(short) < len(source)
    rest = iter(source)
    assert all(word in rest for word in short)
    found = align(source, short)
    assert (found.variation_rate, found.alignment_gap) == (0, 0)


def test_violations_come_in_bursts_at_the_rate_asked_for():
    texts = [
        f"Passage {i} tells how seven brave sailors crossed some wide ocean while singing songs."
        for i in range(600)
    ]
    plain = [split_words(shorten(t)) for t in texts]
    noisy = [split_words(shorten(t, violations=0.05, burst=0.4)) for t in texts]
    rates = [
        align([w.text for w in split_words(t)], [w.text for w in n]) for t, n in zip(texts, noisy)
    ]
    broken = [a.variation_rate > 0 or a.alignment_gap > 0 for a in rates]
    assert 0.06 < sum(broken) / len(texts) < 0.19
    changed = sum(a != b for p, n in zip(plain, noisy) for a, b in zip(p, n))
    assert changed > 0
    assert any(a.variation_rate > 0 for a in rates)
    assert any(a.alignment_gap > 0 for a in rates)
    assert noisy == [split_words(shorten(t, violations=0.05, burst=0.4)) for t in texts]
    assert noisy != [split_words(shorten(t, violations=0.05, seed=1)) for t in texts]


def test_a_request_is_answered_for_the_text_in_its_tags():
    message = {"role": "user", "content": "Shorten this.\n<text>\nthe red cat\n</text>"}
    assert compress([message], {}, violations=0.0) == "red cat"
    assert compress([{"role": "user", "content": "the red cat"}], {}, violations=0.0) == "red cat"
    assert not re.search(r"\s", compress([], {}))
