from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import random
import signal
import struct
import time
from itertools import pairwise

import pytest

from stillhouse.engine.journal import Journal, Price
from stillhouse.errors import RecipeError, TeacherError
from stillhouse.parts.requests import chat
from stillhouse.teacher import Reply, Request
from stillhouse.teachers.asking import (
    Bucket,
    Patience,
    TryAgain,
    ask_all,
    ask_speaker,
    parse_shard,
    select,
)
from stillhouse.teachers.endpoint import Endpoint, read_embeddings, read_reply
from stillhouse.teachers.local_server import LocalServer

QUICK = Patience(first=0.01, longest=0.05)
UPPER = "tests.teachers.rules:upper"


@pytest.fixture(autouse=True)
def _rules_are_importable(monkeypatch, request):
    root = str(request.config.rootpath)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def questions(count: int) -> list[Request]:
    return [chat(f"question {i}", model="m", temperature=0.3) for i in range(count)]


def log_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path) -> set[str]:
    with Journal(path, write=False) as journal:
        return {entry["text"] for entry in journal}


def expected(count: int) -> set[str]:
    return {f"QUESTION {i}" for i in range(count)}


# A sound server --------------------------------------------------------------------------


def test_answers_are_written_and_never_asked_for_again(tmp_path):
    log, path = tmp_path / "log", tmp_path / "journal"
    with LocalServer(rule=UPPER, log=log, latency=0.01) as server:
        endpoint = Endpoint(server.url, concurrency=5)
        with Journal(path) as journal:
            seen = []
            tally = endpoint.label(questions(40), journal, progress=lambda t: seen.append(t))
            again = endpoint.label(questions(50), journal)
    assert tally.answered == 40
    assert tally.attempts == 40
    assert len(seen) == 40
    assert (again.remembered, again.answered) == (40, 10)
    assert answers(path) == expected(50)
    sent = log_of(log)
    assert len(sent) == 50
    assert max(entry["in_flight"] for entry in sent) <= 5
    assert max(entry["in_flight"] for entry in sent) >= 3


def test_the_journal_keeps_the_raw_reply_and_the_account(tmp_path):
    price = Price(prompt=1.0, completion=2.0)
    with LocalServer(rule=UPPER) as server, Journal(tmp_path / "j") as journal:
        endpoint = Endpoint(server.url, price=price)
        endpoint.label(questions(3), journal)
        entry = next(iter(journal))
        assert entry["raw"]["choices"][0]["message"]["content"] == entry["text"]
        assert entry["request"]["temperature"] == 0.3
        account = journal.account(price)
    assert account.prompt_tokens == 6
    assert account.completion_tokens == 6
    assert account.cost == pytest.approx(18e-6)


def test_draws_are_separate_answers_with_seeds_of_their_own(tmp_path):
    asked = chat("x", seed=7)
    log = tmp_path / "log"
    with (
        LocalServer(rule="tests.teachers.rules:seed", log=log) as server,
        Journal(tmp_path / "j") as journal,
    ):
        Endpoint(server.url).label([(asked, d) for d in range(3)], journal)
        texts = {journal.reply(asked.key(d)).text for d in range(3)}
    assert texts == {"7", "8", "9"}


def test_one_question_twice_in_a_list_is_sent_once(tmp_path):
    log = tmp_path / "log"
    with (
        LocalServer(rule=UPPER, log=log, latency=0.05) as server,
        Journal(tmp_path / "j") as journal,
    ):
        Endpoint(server.url).label(questions(2) * 5, journal)
    assert len(log_of(log)) == 2


def test_shards_cover_every_question_once_and_limit_counts(tmp_path):
    asked = questions(60)
    parts = [{r.key(d) for r, d in select(asked, shard=(i, 4))} for i in range(4)]
    assert sum(len(part) for part in parts) == 60
    assert set.union(*parts) == {q.key() for q in asked}
    assert min(len(part) for part in parts) > 4
    assert len(list(select(asked, limit=7))) == 7
    assert parse_shard("2/4") == (2, 4)
    for bad in ("4/4", "x", "1", "-1/3", "1/0"):
        with pytest.raises(RecipeError, match="i/n"):
            parse_shard(bad)


def test_a_dry_run_counts_and_prices_without_sending(tmp_path):
    asked = [chat("word " * 10, max_tokens=100) for _ in range(1)] + questions(4)
    endpoint = Endpoint("http://127.0.0.1:9/v1", price=Price(1e6, 2e6))
    with Journal(tmp_path / "j") as journal:
        journal.put_reply(asked[1], 0, Reply("x"))
        plan = endpoint.estimate(
            asked, journal=journal, limit=3, count=lambda t: len(t.split()), expected=lambda r: 5
        )
    assert (plan.requests, plan.remembered) == (2, 1)
    assert plan.prompt_tokens == 10 + 4 + 2 + 4
    assert plan.completion_tokens == 100 + 1024
    assert plan.cost == 20 + 2 * 10
    assert plan.most == 20 + 2 * 1124


def test_ask_alone(tmp_path):
    async def talk(url: str) -> list[Reply]:
        async with Endpoint(url, concurrency=2) as endpoint:
            return await asyncio.gather(*(endpoint.ask(q) for q in questions(6)))

    log = tmp_path / "log"
    with LocalServer(rule=UPPER, log=log, latency=0.03) as server:
        replies = asyncio.run(talk(server.url))
    assert {r.text for r in replies} == expected(6)
    assert all(r.latency >= 0.03 for r in replies)
    assert max(entry["in_flight"] for entry in log_of(log)) == 2


def test_long_answers_are_flagged(tmp_path):
    long = chat("one two three four five", max_tokens=3)
    with LocalServer(rule=UPPER) as server, Journal(tmp_path / "j") as journal:
        tally = Endpoint(server.url).label([long], journal)
        reply = journal.reply(long.key())
    assert reply.finish_reason == "length"
    assert reply.text == "ONE TWO THREE"
    assert tally.flagged == {"length": 1}


# Failing servers -------------------------------------------------------------------------


def test_thirty_per_cent_failures_lose_nothing(tmp_path):
    log, path = tmp_path / "log", tmp_path / "journal"
    faults = {"429": 0.06, "500": 0.06, "drop": 0.06, "garbage": 0.06, "empty": 0.06}
    with (
        LocalServer(rule=UPPER, log=log, latency=0.002, seed=3, **faults) as server,
        Journal(path) as journal,
    ):
        endpoint = Endpoint(server.url, concurrency=8, patience=QUICK)
        tally = endpoint.label(questions(300), journal)
    assert tally.failures == 0
    assert tally.answered == 300
    assert answers(path) == expected(300)
    kinds = {entry["fault"] for entry in log_of(log)}
    assert kinds == {None, "429", "500", "drop", "garbage", "empty"}
    assert tally.attempts == len(log_of(log)) > 360
    assert len(tally.retries) >= 5
    good = [entry["key"] for entry in log_of(log) if entry["fault"] is None]
    assert len(good) == len(set(good)) == 300


def test_retry_after_is_obeyed(tmp_path):
    log = tmp_path / "log"
    with (
        LocalServer(rule=UPPER, log=log, retry_after=0.4, seed=1, **{"429": 0.5}) as server,
        Journal(tmp_path / "j") as journal,
    ):
        Endpoint(server.url, patience=QUICK).label(questions(8), journal)
    times: dict[str, list[dict]] = {}
    for entry in log_of(log):
        times.setdefault(entry["key"], []).append(entry)
    waits = [
        later["time"] - first["time"]
        for entries in times.values()
        for first, later in pairwise(entries)
    ]
    assert waits
    assert min(waits) >= 0.4


def test_silence_ends_in_a_time_out_and_another_try(tmp_path):
    log = tmp_path / "log"
    with (
        LocalServer(30, rule=UPPER, log=log, hang=30, seed=2, timeout=0.3) as server,
        Journal(tmp_path / "j") as journal,
    ):
        endpoint = Endpoint(server.url, timeout=0.3, patience=QUICK)
        tally = endpoint.label(questions(10), journal)
    assert tally.answered == 10
    assert tally.retries["no answer within 0.3 s"] > 0


def test_a_refused_connection_is_told_soon(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", patience=QUICK)
    start = time.perf_counter()
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(TeacherError, match=r"cannot connect to http://127.0.0.1:9/v1"):
            endpoint.label(questions(100), journal)
        assert len(journal) == 0
    assert time.perf_counter() - start < 5

    async def once() -> None:
        async with endpoint:
            await endpoint.ask(questions(1)[0])

    with pytest.raises(TeacherError, match="after 4 tries"):
        asyncio.run(once())


@pytest.mark.parametrize(
    ("kind", "words"),
    [("500", "HTTP 500"), ("garbage", "not JSON"), ("empty", "empty answer")],
)
def test_a_server_that_never_answers_stops_the_run(tmp_path, kind, words):
    patience = Patience(attempts=3, first=0.01, longest=0.02)
    with (
        LocalServer(rule=UPPER, always=kind, log=tmp_path / "log") as server,
        Journal(tmp_path / "j") as journal,
        pytest.raises(TeacherError, match=f"in a row.*{words}"),
    ):
        Endpoint(server.url, patience=patience, concurrency=4).label(questions(1000), journal)
    assert len(log_of(tmp_path / "log")) < 200


def test_empty_answers_may_be_accepted(tmp_path):
    with (
        LocalServer(rule=UPPER, always="empty") as server,
        Journal(tmp_path / "j") as journal,
    ):
        tally = Endpoint(server.url, accept_empty=True).label(questions(3), journal)
        assert tally.answered == 3
        assert {entry["text"] for entry in journal} == {""}


def test_a_hopeless_request_is_listed_and_the_others_are_kept(tmp_path):
    async def attempt(request: Request, draw: int) -> Reply:
        if "question 5" in request.messages[-1]["content"]:
            raise TryAgain("will not")
        return Reply("ok")

    asked = questions(10)
    with Journal(tmp_path / "j") as journal:
        tally = asyncio.run(
            ask_all(attempt, asked, journal, patience=Patience(attempts=3, first=0.001))
        )
        assert tally.answered == 9
        assert tally.failed == {asked[5].key(): "will not"}
        assert tally.retries == {"will not": 3}
        assert len(journal) == 9


def test_permanent_refusals_stop_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_TEST_KEY", "secret-right")
    with LocalServer(rule=UPPER, key_env="STILLHOUSE_TEST_KEY") as server:
        with Journal(tmp_path / "a") as journal:
            right = Endpoint(server.url, key_env="STILLHOUSE_TEST_KEY")
            assert right.label(questions(2), journal).answered == 2
            gateway = Endpoint(server.url, key_env="STILLHOUSE_TEST_KEY", key_header="api-key")
            assert gateway.label(questions(4), journal).answered == 2
        monkeypatch.setenv("STILLHOUSE_TEST_KEY", "secret-wrong")
        wrong = Endpoint(server.url, key_env="STILLHOUSE_TEST_KEY")
        with (
            Journal(tmp_path / "b") as journal,
            pytest.raises(TeacherError, match=r"HTTP 401.*key_env") as told,
        ):
            wrong.label(questions(2), journal)
        path = Endpoint(server.url.removesuffix("/v1"), key_env="STILLHOUSE_TEST_KEY")
        with (
            Journal(tmp_path / "c") as journal,
            pytest.raises(TeacherError, match=r"HTTP 404.*/v1"),
        ):
            path.label(questions(1), journal)
    assert "secret" not in str(told.value) + repr(wrong) + repr(vars(Journal))
    for name in "abc":
        assert "secret" not in (tmp_path / name).read_text()


def test_a_bad_request_stops_with_what_the_server_said(tmp_path):
    nothing = Request(messages=())
    with (
        LocalServer(rule=UPPER) as server,
        Journal(tmp_path / "j") as journal,
        pytest.raises(TeacherError, match=r"HTTP 400.*'messages' is empty"),
    ):
        Endpoint(server.url).label([nothing], journal)


def test_a_key_that_is_not_set_is_told_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_TEST_KEY", raising=False)
    with pytest.raises(TeacherError, match=r"STILLHOUSE_TEST_KEY is not set"):
        Endpoint("http://127.0.0.1:9/v1", key_env="STILLHOUSE_TEST_KEY")


def test_bad_settings_are_told():
    with pytest.raises(RecipeError, match=r"http:// or https://"):
        Endpoint("localhost:8000")
    with pytest.raises(RecipeError, match="at least 1"):
        Endpoint("http://x/v1", concurrency=0)
    with pytest.raises(RecipeError, match="above 0"):
        Endpoint("http://x/v1", rate=0)


# Killed and begun again ------------------------------------------------------------------


def work(url: str, path: str, said) -> None:
    """The whole labelling run, in a process of its own."""
    with Journal(path, fsync_every=16) as journal:
        said.send(len(journal.uncertain))
        patience = Patience(first=0.01, longest=0.05)
        endpoint = Endpoint(url, concurrency=8, patience=patience)
        said.send(endpoint.label(questions(200), journal).answered)


def test_kill_minus_nine_and_resume_sends_what_is_missing(tmp_path):
    """Ten kills at random moments, against a server that fails a tenth of the time."""
    log, path = tmp_path / "log", tmp_path / "journal"
    draw = random.Random(0)
    told = kept = 0
    fork = multiprocessing.get_context("fork")  # an import of torch each time would take long
    with LocalServer(
        rule=UPPER, log=log, latency=0.05, seed=5, **{"500": 0.05, "drop": 0.05}
    ) as server:
        for _ in range(10):
            heard, said = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(server.url, str(path), said))
            process.start()
            told += heard.recv()
            time.sleep(draw.uniform(0.0, 0.25))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            with Journal(path, write=False) as journal:
                assert len(journal) >= kept
                kept = len(journal)
        assert 0 < kept < 200
        heard, said = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(server.url, str(path), said))
        process.start()
        told += heard.recv()
        assert heard.recv() == 200 - kept
        process.join()
    assert answers(path) == expected(200)
    good = [e["key"] for e in log_of(log) if e["fault"] is None]
    assert len(set(good)) == 200
    # Only what was in flight at a kill may be answered twice, and the restarts said so.
    assert len(good) - 200 <= told <= 10 * 8


# Parts -----------------------------------------------------------------------------------


def test_delays_grow_are_bounded_and_repeat():
    patience = Patience(quick=0.1, first=1.0, longest=10.0)
    waits = [patience.delay("k", n, None) for n in range(1, 8)]
    assert waits == [patience.delay("k", n, None) for n in range(1, 8)]
    for n, wait in enumerate(waits, 1):
        most = 0.1 if n == 1 else min(10.0, 2.0 ** (n - 1))
        assert most / 2 <= wait <= most
    assert patience.delay("other", 1, None) != waits[0]
    assert patience.delay("k", 1, 30.0) == 30.0


def test_the_bucket_limits_the_rate():
    async def drain(rate: float, burst: int, count: int) -> float:
        bucket = Bucket(rate, burst)
        start = time.perf_counter()
        await asyncio.gather(*(bucket.take() for _ in range(count)))
        return time.perf_counter() - start

    assert asyncio.run(drain(100, 1, 21)) == pytest.approx(0.2, abs=0.05)
    assert asyncio.run(drain(100, 11, 21)) == pytest.approx(0.1, abs=0.05)


def test_any_speaker_can_be_asked_through_a_journal(tmp_path):
    class Parrot:
        fingerprint = "parrot"

        async def ask(self, request: Request, draw: int = 0) -> Reply:
            return Reply(request.messages[-1]["content"].upper())

    with Journal(tmp_path / "j") as journal:
        tally = ask_speaker(Parrot(), questions(5), journal, concurrency=2)
    assert tally.answered == 5
    assert answers(tmp_path / "j") == expected(5)


@pytest.mark.parametrize(
    "raw",
    [{}, {"choices": []}, {"choices": [{}]}, {"choices": 3}, {"choices": [{"message": None}]},
     {"choices": [{"message": {"content": ["x"]}}]}],
)  # fmt: skip
def test_replies_without_a_message_are_tried_again(raw):
    with pytest.raises(TryAgain):
        read_reply(raw)


def test_refusals_count_as_filtered():
    raw = {"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]}
    assert read_reply(raw).finish_reason == "content_filter"


def test_embeddings_are_put_in_order_and_counted():
    raw = {"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]}
    assert read_embeddings(raw, 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(TeacherError, match="asked for 3"):
        read_embeddings(raw, 3)
    with pytest.raises(TeacherError, match="cannot be read"):
        read_embeddings({"data": [{"index": 0}]}, 1)


def test_progress_can_stop_the_asking_while_nothing_answers(tmp_path):
    class Stop(Exception):
        pass

    async def silent(request: Request, draw: int) -> Reply:
        await asyncio.sleep(60)
        raise AssertionError

    def stop(tally: object) -> None:
        raise Stop

    asked = questions(3)
    with Journal(tmp_path / "j") as journal, pytest.raises(Stop):
        asyncio.run(ask_all(silent, asked, journal, concurrency=2, progress=stop))
    with Journal(tmp_path / "j") as journal:
        assert set(journal.uncertain) == {asked[0].key(), asked[1].key()}


def test_embeddings_in_base64_are_numbers():
    row = base64.b64encode(struct.pack("<2f", 0.5, -2.0)).decode()
    assert read_embeddings({"data": [{"index": 0, "embedding": row}]}, 1).tolist() == [[0.5, -2.0]]
    with pytest.raises(TeacherError, match="cannot be read"):
        read_embeddings({"data": [{"index": 0, "embedding": row[:6]}]}, 1)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"index": 0, "embedding": [1, 2]}, {"index": 0, "embedding": [3, 4]}], "indices are not"),
        ([{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [3, 4]}], "cannot be read"),
        ([{"index": 0, "embedding": []}, {"index": 1, "embedding": []}], r"got shape \(2, 0\)"),
        ([{"index": 0, "embedding": [1, float("nan")]}], "NaN or infinity"),
        ([{"index": 0, "embedding": [1, None]}], "cannot be read"),
        ([{"index": 0, "vector": [1]}], "no field 'embedding'"),
    ],
)
def test_embeddings_that_are_none_are_told(rows, told):
    with pytest.raises(TeacherError, match=told):
        read_embeddings({"data": rows}, len(rows))


def test_embeddings_without_an_index_stand_as_they_came():
    raw = {"data": [{"embedding": [3, 4]}, {"embedding": [1, 2]}]}
    assert read_embeddings(raw, 2).tolist() == [[3, 4], [1, 2]]


def test_embeddings_of_another_width_in_another_request_are_told(monkeypatch):
    async def answered(self, path, body):
        width = len(body["input"])
        rows = [{"index": i, "embedding": [0.5] * width} for i in range(width)]
        return {"data": rows}

    monkeypatch.setattr(Endpoint, "_post", answered)

    async def ask():
        async with Endpoint("http://127.0.0.1:1/v1") as endpoint:
            return await endpoint.embed(["a", "b", "c"], batch=2)

    with pytest.raises(TeacherError, match=r"different width: \[1, 2\]"):
        asyncio.run(ask())
