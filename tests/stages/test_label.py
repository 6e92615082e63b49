from __future__ import annotations

import json

import pytest

from stillhouse.engine.journal import Journal
from stillhouse.errors import CheckpointError, Interrupted, RecipeError, TeacherError
from stillhouse.launch import open_job
from stillhouse.parts.requests import chat
from stillhouse.recipe import load_recipe
from stillhouse.stages import label as labelling

RULE = "stillhouse.teachers.delete_rules:compress"


def recipe(tmp_path, **endpoint):
    rules = {"violations": 0.0}
    serve = {"rule": RULE, "options": {"log": str(tmp_path / "log"), "options": rules}}
    endpoint = {"model": "rules", "serve": serve, **endpoint}
    teacher = {"endpoint": {k: v for k, v in endpoint.items() if v is not None}}
    return load_recipe({"method": "random-deletion", "data": "generated_prose", "teacher": teacher})


def job_in(folder, spec):
    return open_job(spec, folder)


def questions(count: int):
    return [chat(f"the text {i}") for i in range(count)]


def sent(tmp_path) -> int:
    path = tmp_path / "log"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_answers_are_shared_between_runs_and_asked_for_once(tmp_path):
    spec = recipe(tmp_path)
    job = job_in(tmp_path / "a", spec)
    figures = labelling.label(job, "ask", lambda: questions(5))
    assert (figures["answered"], figures["remembered"], sent(tmp_path)) == (5, 0, 5)
    with labelling.replies(job) as journal:
        entry = labelling.answer_in(journal, questions(1)[0])
        assert entry["text"] == "text 0"
        with pytest.raises(CheckpointError, match="--redo"):
            labelling.answer_in(journal, chat("never asked"))
    other = job_in(tmp_path / "b", spec)
    figures = labelling.label(other, "ask", lambda: questions(7))
    assert (figures["answered"], figures["remembered"], sent(tmp_path)) == (2, 5, 7)
    again = job_in(tmp_path / "a", spec)

    def never():
        raise AssertionError("a finished stage asks nothing")

    assert labelling.label(again, "ask", never)["answered"] == 5


def test_limit_shard_and_dry_run(tmp_path):
    job = job_in(tmp_path / "a", recipe(tmp_path, price={"prompt": 1e6, "completion": 0}))
    plan = labelling.dry_run(job, questions(6), limit=4)
    assert (plan.requests, plan.remembered) == (4, 0)
    assert plan.cost > 0
    assert sent(tmp_path) == 0
    labelling.label(job, "few", lambda: questions(6), limit=4)
    assert sent(tmp_path) == 4
    labelling.label(job, "part", lambda: questions(6), shard="0/1")
    assert sent(tmp_path) == 6
    assert labelling.dry_run(job, questions(6)).remembered == 6


def test_what_answers_tells_journals_apart(tmp_path):
    def name(**endpoint):
        return labelling.speaker_name(recipe(tmp_path, **endpoint))

    here = {"serve": None, "base_url": "http://127.0.0.1:1/v1"}
    names = [
        name(),
        name(serve={"rule": RULE, "options": {"options": {"violations": 0.5}}}),
        name(serve={"rule": "tests.teachers.rules:upper"}),
        name(**here),
        name(**here, model="other"),
        name(**here, model=None),
        name(serve=None, base_url="http://127.0.0.1:2/v1", model=None),
    ]
    assert len(set(names)) == len(names)
    # A server that has a name may move.
    assert name(**here) == name(serve=None, base_url="http://127.0.0.1:2/v1")
    # What changes no answer: failures and delays of the server, and how we ask.
    assert name() == name(concurrency=3, timeout=5.0)
    assert name(serve={"rule": RULE}) == name(
        serve={"rule": RULE, "fail": 0.5, "options": {"latency": 1.0}}
    )


def test_a_teacher_that_does_not_speak_is_refused(tmp_path):
    spec = load_recipe(
        {"method": "random-deletion", "data": "generated_prose", "teacher": "stillhouse:mlp"}
    )
    with pytest.raises(RecipeError, match=r"asks its teacher in words.*as model"):
        labelling.endpoint_of(spec)
    spec = load_recipe({"method": "random-deletion", "data": "generated_prose"})
    with pytest.raises(RecipeError, match="names no teacher"):
        labelling.endpoint_of(spec)


def test_requests_without_an_answer_are_told_and_asked_again(tmp_path):
    rules = {"violations": 0.0}
    log = str(tmp_path / "log")
    faulty = {"rule": RULE, "options": {"log": log, "500": 0.6, "options": rules}}
    job = job_in(tmp_path / "a", recipe(tmp_path, attempts=1, serve=faulty))
    with pytest.raises(TeacherError, match=r"no usable answer|in a row"):
        labelling.label(job, "ask", lambda: questions(12))
    kept = len(Journal(labelling.journal_path(job), write=False))
    assert 0 < kept < 12
    before = sent(tmp_path)
    sound = job_in(tmp_path / "b", recipe(tmp_path))
    figures = labelling.label(sound, "ask", lambda: questions(12))
    assert figures["answered"] == 12 - kept == sent(tmp_path) - before


def test_a_signal_stops_the_asking_and_nothing_is_lost(tmp_path):
    slow = {"rule": RULE, "options": {"log": str(tmp_path / "log"), "latency": 0.05}}
    spec = recipe(tmp_path, serve=slow, concurrency=1)
    job = job_in(tmp_path / "a", spec)

    def asked():
        for number, question in enumerate(questions(30)):
            if number == 10:
                job.stop.asked = 15
            yield question

    with pytest.raises(Interrupted, match="ask"):
        labelling.label(job, "ask", asked)
    kept = len(Journal(labelling.journal_path(job), write=False))
    assert 5 <= kept <= 11
    figures = labelling.label(job_in(tmp_path / "a", spec), "ask", lambda: questions(30))
    assert figures["answered"] == 30 - kept
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len([e for e in log if e["status"] == 200]) <= 31
