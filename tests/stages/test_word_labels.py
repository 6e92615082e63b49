from __future__ import annotations

import pytest

from stillhouse.launch import open_job
from stillhouse.losses.sequence import IGNORED
from stillhouse.parts.text_spans import count_tokens, split_words
from stillhouse.recipe import load_recipe
from stillhouse.stages.word_labels import (
    Shortening,
    align_words,
    ask_to_shorten,
    asked,
    cut_texts,
    filter_words,
    judge_scores,
    judged_words,
    label_words,
    question,
    texts_of,
)

TEXT = "The first sentence stands here. The second one is longer than the first, is it not?\nThird."


def open_recipe(tmp_path, **options):
    serve = {"rule": "stillhouse.teachers.delete_rules:compress", "options": {"options": options}}
    spec = load_recipe(
        {
            "method": "random-deletion",
            "data": "generated_prose",
            "teacher": {"endpoint": {"model": "rules", "serve": serve}},
        }
    )
    return open_job(spec, tmp_path / "run")


def test_chunks_are_parts_of_their_document_at_their_place():
    texts = [TEXT, "  ", "Short."]
    for limit in (3, 8, 14, 512):
        chunks = cut_texts(texts, Shortening(chunk=limit))
        for part in chunks:
            end = part.start + len(part.text)
            assert texts[part.document][part.start : end] == part.text == part.text.strip()
            assert count_tokens(part.text) <= limit
        words = [w.text for p in chunks if p.document == 0 for w in split_words(p.text)]
        if limit >= 8:
            assert words == [w.text for w in split_words(TEXT)]
    assert cut_texts(texts, Shortening(chunk=14))[0].text.endswith("here.")
    assert {p.document for p in chunks} == {0, 2}


def test_requests_carry_the_instruction_the_text_and_the_settings():
    request = question("some text", Shortening(temperature=0.7, seed=3, max_tokens=9))
    assert request.messages[-1]["content"].endswith("<text>\nsome text\n</text>")
    assert request.canonical() | {"messages": 0} == {
        "model": "", "messages": 0, "temperature": 0.7, "top_p": 1.0, "max_tokens": 9, "seed": 3,
    }  # fmt: skip
    assert question("a", Shortening()).key() != question("a", Shortening(temperature=0.4)).key()


def test_commas_inherit_are_left_out_or_aligned():
    source, short = "cats, dogs, birds", "cats, birds"
    inherit = label_words(source, short, Shortening())
    assert [w.text for w in inherit[0]] == ["cats", ",", "dogs", ",", "birds"]
    assert inherit[1] == [1, 1, 0, 0, 1]
    assert inherit[2].compression_rate == pytest.approx(2 / 3)
    assert label_words(source, short, Shortening(commas="drop"))[1] == [1, IGNORED, 0, IGNORED, 1]
    assert label_words(source, short, Shortening(commas="align"))[1] == [1, 1, 0, 0, 1]
    assert label_words(",a", "a", Shortening())[1] == [0, 1]
    assert label_words("cat", "cats", Shortening())[1] == [0]
    assert label_words("cat", "cats", Shortening(lemmas=True))[1] == [1]


def test_limit_and_shard_choose_chunks():
    chunks = cut_texts([f"text number {i}" for i in range(30)], Shortening())
    assert asked(chunks, Shortening(limit=7)) == chunks[:7]
    parts = [asked(chunks, Shortening(shard=f"{i}/3")) for i in range(3)]
    assert sorted(c for part in parts for c in part) == sorted(chunks)


def test_labels_follow_the_rules_of_a_faithful_teacher(tmp_path):
    job = open_recipe(tmp_path, violations=0.0)
    how = Shortening()
    texts, entities = texts_of(job.splits["train"])
    assert len(texts) == len(entities) == 24
    chunks = cut_texts(texts, how)
    ask_to_shorten(job, "compress", chunks, how)
    labelled = align_words(job, "align", chunks, how)
    assert len(labelled) == 24
    for one in labelled:
        kept = [w.text for w, y in zip(one.words, one.labels) if y == 1]
        assert kept == [w.text for w in split_words(one.shortened)]
        assert (one.rates["variation"], one.rates["gap"]) == (0, 0)
    assert filter_words(labelled).kept == list(range(24))
    assert filter_words(labelled, keep_ties=False).kept == []


def test_the_filter_finds_the_violations(tmp_path):
    job = open_recipe(tmp_path, violations=0.05, burst=0.5)
    how = Shortening()
    chunks = cut_texts(texts_of(job.splits["train"])[0], how)
    ask_to_shorten(job, "compress", chunks, how)
    labelled = align_words(job, "align", chunks, how)
    broken = {i for i, one in enumerate(labelled) if one.rates["variation"] or one.rates["gap"] > 0}
    assert 0 < len(broken) < 8
    assert set(filter_words(labelled).kept) == set(range(24)) - broken


def test_answers_that_were_cut_off_are_left_out(tmp_path):
    job = open_recipe(tmp_path, violations=0.0)
    how = Shortening(max_tokens=11)
    chunks = cut_texts(texts_of(job.splits["train"])[0], how)
    figures = ask_to_shorten(job, "compress", chunks, how)
    labelled = align_words(job, "align", chunks, how)
    assert figures["flagged"]["length"] > 0
    assert 0 < len(labelled) < len(chunks)
    assert all(len(one.shortened.split()) <= 11 for one in labelled)


def test_scores_that_know_the_labels_are_judged_perfect(tmp_path):
    job = open_recipe(tmp_path, violations=0.0).judging()
    labelled, entities = judged_words(job, Shortening(commas="drop", lemmas=True))
    assert len(labelled) == 12
    assert all(
        one.chunk.text[a:b].isalpha() for one, own in zip(labelled, entities) for a, b in own
    )
    truth = {one.chunk.text: [float(y) for y in one.labels] for one in labelled}
    perfect = judge_scores(labelled, entities, lambda texts: [truth[t] for t in texts])
    assert perfect["auc"] == 1.0
    assert perfect["f1"] > 0.9  # each text keeps the overall share, not its own
    assert perfect["teacher_numbers"] == 1.0
    wrong = judge_scores(labelled, entities, lambda texts: [[-y for y in truth[t]] for t in texts])
    assert wrong["auc"] == 0.0
    assert wrong["cloze"] < perfect["cloze"]
    assert wrong["rate"] == perfect["rate"]
