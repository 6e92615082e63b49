from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from stillhouse.engine.journal import Journal, Price
from stillhouse.errors import CheckpointError, RunFolderError
from stillhouse.teacher import Reply, Request


def key(number: int) -> str:
    return f"{number:064x}"


def request(text: str, **settings) -> Request:
    return Request(messages=({"role": "user", "content": text},), **settings)


def filled(path, count: int = 3) -> None:
    with Journal(path) as journal:
        for i in range(count):
            journal.put(key(i), {"value": i})


def test_entries_come_back_in_key_order(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    with Journal(path) as journal:
        for i in (5, 1, 3):
            journal.put(key(i), {"value": i, "text": "é\n☃\ud800"})
        assert key(5) in journal
        assert key(2) not in journal
        assert [e["value"] for e in journal] == [1, 3, 5]
    with Journal(path, write=False) as again:
        assert len(again) == 3
        assert [e["value"] for e in again] == [1, 3, 5]
        assert again[key(1)]["text"] == "é\n☃\ud800"
        with pytest.raises(CheckpointError, match="reading only"):
            again.put(key(9), {})


def test_the_first_answer_stands(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.put(key(1), {"value": "first"})
        journal.put(key(1), {"value": "second"})
        assert journal[key(1)]["value"] == "first"
        assert len(journal) == 1
    assert len((tmp_path / "j").read_bytes().splitlines()) == 1


def test_a_line_is_on_disk_before_put_returns(tmp_path):
    with Journal(tmp_path / "j", fsync_every=1000) as journal:
        journal.put(key(1), {"value": 1})
        assert json.loads((tmp_path / "j").read_text())["value"] == 1


@pytest.mark.parametrize("cut", [1, 5, 40, 60])
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path, cut):
    path = tmp_path / "j"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path) as journal:
        assert journal.torn
        assert journal.keys() == [key(0), key(1)]
        journal.put(key(2), {"value": 2})
    with Journal(path) as journal:
        assert not journal.torn
        assert len(journal) == 3
    assert path.read_bytes() == whole


def test_a_damaged_middle_line_is_told_with_its_number(tmp_path):
    path = tmp_path / "j"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"value": 1', b'"value": 7')
    path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=r"line 2 is damaged.*delete line 2"):
        Journal(path)
    del lines[1]
    path.write_bytes(b"".join(lines))
    with Journal(path) as journal:
        assert journal.keys() == [key(0), key(2)]


def test_a_second_writer_is_refused_and_named(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.put(key(1), {"value": 1})
        with pytest.raises(RunFolderError, match=rf"another process \(id {os.getpid()}\)"):
            Journal(path)
        with Journal(path, write=False) as reader:
            assert len(reader) == 1
    Journal(path).close()


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.put(key(0), {"value": 0})
        write = os.write

        def full(handle: int, data: bytes) -> int:
            if len(data) > 8:
                return write(handle, data[:8])  # half a line gets through
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", lambda h, d: full(h, d[:16]))
        with pytest.raises(CheckpointError, match="No space left"):
            journal.put(key(1), {"value": 1})
        monkeypatch.setattr(os, "write", write)
        journal.put(key(2), {"value": 2})
    with Journal(path) as journal:
        assert journal.keys() == [key(0), key(2)]


def test_replies_and_their_account(tmp_path):
    ask = request("Hi", seed=3)
    reply = Reply(
        "Ho", "length", usage={"prompt_tokens": 10, "completion_tokens": 4},
        raw={"id": "x"}, latency=0.5,
    )  # fmt: skip
    with Journal(tmp_path / "j") as journal:
        journal.put_reply(ask, 0, reply, attempts=3)
        journal.put_reply(ask, 1, reply)
    with Journal(tmp_path / "j") as journal:
        assert journal.reply(ask.key()) == reply
        assert journal[ask.key(1)]["draw"] == 1
        account = journal.account(Price(prompt=1e6, completion=2e6))
        assert account.answers == 2
        assert account.attempts == 4
        assert account.prompt_tokens == 20
        assert account.completion_tokens == 8
        assert account.cost == 20 + 16
        assert account.seconds == 1.0


def test_marks_of_a_killed_process_are_told_once(tmp_path):
    script = f"""
        import os, signal
        from stillhouse.engine.journal import Journal
        journal = Journal({str(tmp_path / "j")!r})
        with journal.sending("{key(1)}"):
            journal.put("{key(1)}", {{"value": 1}})
        first, second = journal.sending("{key(2)}"), journal.sending("{key(3)}")
        first.__enter__(), second.__enter__()
        journal.put("{key(3)}", {{"value": 3}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert run.returncode == -signal.SIGKILL
    with Journal(tmp_path / "j") as journal:
        assert journal.keys() == [key(1), key(3)]
        assert journal.uncertain == (key(2),)
    with Journal(tmp_path / "j") as journal:
        assert journal.uncertain == ()


def test_a_failure_clears_its_mark_an_interrupt_leaves_it(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(ValueError, match="x"), journal.sending(key(1)):
        raise ValueError("x")
    with pytest.raises(KeyboardInterrupt), journal.sending(key(2)):
        raise KeyboardInterrupt
    journal.close()
    with Journal(tmp_path / "j") as again:
        assert again.uncertain == (key(2),)


def test_slots_are_reused(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for i in range(100):
            with journal.sending(key(i)):
                pass
        assert (tmp_path / "j.flight").stat().st_size == 64


def test_a_bad_key_is_refused(tmp_path):
    with Journal(tmp_path / "j") as journal, pytest.raises(CheckpointError, match="64"):
        journal.put("short", {})


def test_job_map_can_fill_it(tmp_path):
    from stillhouse.launch import open_job
    from stillhouse.recipe import load_recipe

    spec = load_recipe({"method": "random-deletion", "data": "generated_prose"})
    calls = []

    def square(number: int) -> dict[str, int]:
        calls.append(number)
        return {"value": number * number}

    items = [(key(i), i) for i in range(6)]
    for _ in range(2):
        job = open_job(spec, tmp_path / "run")
        with Journal(tmp_path / "j") as journal:
            job.map("squares", items, square, into=journal)
            assert [entry["value"] for entry in journal] == [0, 1, 4, 9, 16, 25]
    assert calls == [0, 1, 2, 3, 4, 5]
    # A power cut may leave the stage's own files empty: what was asked for is in the journal.
    files = sorted(tmp_path.glob("run/stages/squares/*.state"))
    assert [file.name for file in files] == ["finished.state", "stamp.state"]
    for file in files:
        file.write_bytes(b"")
    with Journal(tmp_path / "j") as journal:
        open_job(spec, tmp_path / "run").map("squares", items, square, into=journal)
    assert calls == [0, 1, 2, 3, 4, 5]
    assert all(file.stat().st_size for file in files)


def test_synchronising_keeps_nobody_waiting_and_its_failure_is_told(tmp_path, monkeypatch):
    import os
    import threading

    began, go, threads = threading.Event(), threading.Event(), []

    def slow(handle: int) -> None:
        threads.append(threading.current_thread())
        began.set()
        assert go.wait(20)

    monkeypatch.setattr(os, "fsync", slow)
    journal = Journal(tmp_path / "j", fsync_every=2)
    for number in range(7):  # the disk is busy from the second line on, and nobody waits
        journal.put(f"{number:064d}", {"n": number})
    assert began.wait(20)
    assert len(journal) == 7
    go.set()
    journal.flush()
    assert threads[0] is not threading.main_thread()
    assert len(threads) == 2  # and the flush itself, for the lines since

    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    journal.put("a" * 64, {})
    journal.put("b" * 64, {})
    with pytest.raises(OSError, match="Input/output"):
        journal.flush()
    journal.close()
    assert len(Journal(tmp_path / "j")) == 9
