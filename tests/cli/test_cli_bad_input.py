"""Bad input at the command line: told in one message, with its place, before any training.

One test for each kind. What is finer (each way a store, journal or checkpoint can be damaged, each
answer an endpoint can give) is tested where it is built.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import web

ROWS = 60


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 6)).astype("float32"), np.arange(ROWS) % 3
    return {"train_x": x, "train_target": y, "test_x": x.copy(), "test_target": y.copy()}


def refused(call, recipe: Path | str, *words: str) -> str:
    """What `run` says when it refuses; nothing has been trained, and there is no traceback."""
    done = call("run", str(recipe), *words, "--folder", "r")
    assert done.code == 1, done.out + done.err
    _, _, said = done.err.partition("error: ")
    assert said, done.err
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err
    assert not list(Path().glob("r/stages/**/finished.state"))
    return f"error: {said}"


def own(call, small: Path, arrays: dict[str, Any]) -> str:
    np.savez("own.npz", **arrays)
    options = ["-o", "data.name=tensors", "-o", "data.options={path: own.npz}"]
    return refused(call, small, *options)


# ---- data ------------------------------------------------------------------------------------


def test_nan_in_data(call, small, arrays) -> None:
    arrays["train_x"][7, 2] = np.nan
    assert "own.npz, split 'train', view 'x', row 7: holds nan" in own(call, small, arrays)


def test_infinity_in_test_data(call, small, arrays) -> None:
    arrays["test_x"][7, 2] = np.inf
    assert "split 'test', view 'x', row 7: holds inf" in own(call, small, arrays)


def test_labels_out_of_range(call, small, arrays) -> None:
    arrays["train_target"][5] = -1
    assert "row 5: the label -1 is out of range; there are 3 classes" in own(call, small, arrays)


def test_labels_that_train_does_not_know(call, small, arrays) -> None:
    arrays["test_target"][5] = 9
    said = own(call, small, arrays)
    assert "split 'test', row 5: the label 9 is out of range" in said


def test_one_class(call, small, arrays) -> None:
    arrays["train_target"][:] = 0
    assert "all 60 labels are 0; at least two classes" in own(call, small, arrays)


def test_empty_data(call, small, arrays) -> None:
    assert "split 'train': it is empty" in own(call, small, {k: v[:0] for k, v in arrays.items()})


def test_targets_that_are_no_classes(call, small, arrays) -> None:
    arrays = {k: v.astype("float32") for k, v in arrays.items()}
    said = own(call, small, arrays)
    assert "classification needs a label for each row, a whole number" in said


def test_a_file_that_is_no_npz_does_not_ask_for_pickles(call, small) -> None:
    Path("own.npz").write_text("hello")
    said = refused(call, small, "-o", "data={name: tensors, options: {path: own.npz}}")
    assert "own.npz cannot be read as an npz file" in said
    assert "pickle" not in said


def test_a_missing_file_names_the_nearest_file(call, small, arrays) -> None:
    np.savez("mine.npz", **arrays)
    Path("mime.npz.d").mkdir()
    said = refused(call, small, "-o", "data={name: tensors, options: {path: mime.npz}}")
    assert "there is no file mime.npz" in said
    assert said.endswith("did you mean 'mine.npz'?\n")


# ---- the recipe ------------------------------------------------------------------------------


def test_options_of_data_are_told_with_their_line(call, small) -> None:
    text = small.read_text().replace("kind: vectors", "kind: vectors\n    rows: many")
    small.write_text(text)
    line = 1 + next(i for i, t in enumerate(text.splitlines()) if "many" in t)
    said = refused(call, "small.yaml")
    assert said == (
        f"error: small.yaml:{line}: data.options.rows: data option 'rows' of 'generated': must be "
        "a whole number, found the text 'many'\n"
    )


def test_options_of_a_network_are_told_with_their_line(call, small) -> None:
    given = yaml.safe_load(small.read_text())
    given["student"]["options"]["widths"] = "wide"
    small.write_text(yaml.safe_dump(given, sort_keys=False))
    lines = small.read_text().splitlines()
    said = refused(call, "small.yaml")
    assert said.startswith(f"error: small.yaml:{1 + lines.index('student:')}: student: ")
    assert "stillhouse:mlp cannot be built with these options: TypeError" in said


def test_a_figure_to_select_by_is_checked_before_the_teacher_is_trained(call, small) -> None:
    given = ["-o", "teacher.train={steps: 4}", "-o", "budget.select=best"]
    said = refused(call, small, *given, "-o", "budget.metric=acuracy")
    assert "budget.metric: validation gives no figure 'acuracy'; did you mean 'accuracy'?" in said


def test_no_validation_data_to_select_by(call, small, arrays) -> None:
    np.savez("own.npz", **arrays)
    data = "data={name: tensors, options: {path: own.npz, val: 0}}"
    said = refused(call, small, "-o", data, "-o", "budget.select=best")
    assert "budget.select: best needs validation data, and there is none" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hardware.devices=2000", "2000 processes on a machine of"),
        ("hardware.threads=100000", "hardware.threads: must be at most 1024, found 100000"),
        ("student.weights=nowhere.safetensors", "there are no weights 'nowhere.safetensors'"),
        ("student.model=nowhere:model", "names the module 'nowhere', which cannot be imported"),
    ],
)
def test_what_this_machine_cannot_do(call, small, override, words) -> None:
    assert words in refused(call, small, "-o", override)


def test_a_stage_to_redo_that_does_not_exist(call, small) -> None:
    said = refused(call, small, "--redo", "studnet")
    assert "--redo studnet: 'kd' has no such stage; did you mean 'student'" in said


def test_a_recipe_file_that_is_not_there(call) -> None:
    done = call("run", "nowhere/x.yaml")
    assert done.code == 1
    assert done.err == "error: there is no recipe file nowhere/x.yaml\n"


def test_a_teacher_that_knows_nothing_is_a_warning(call, small) -> None:
    words = "has neither weights nor train: it is freshly initialised and knows nothing"
    assert words in call("run", str(small), "--folder", "r").err
    assert words in call("run", str(small), "--dry-run").out
    taught = call("run", str(small), "-o", "teacher.train={steps: 2}", "--folder", "r2")
    assert "knows nothing" not in taught.err


# ---- teachers --------------------------------------------------------------------------------


def test_another_number_of_classes_and_other_classes(call, small, arrays) -> None:
    assert call("run", str(small), "--folder", "made").code == 0
    assert "has 7 outputs, the data" in refused(call, small, "-o", "student.options.classes=7")
    np.savez("own.npz", **{k: v for k, v in arrays.items() if k[-1] == "x"},
             train_target=np.arange(ROWS) % 4, test_target=np.arange(ROWS) % 4)  # fmt: skip
    said = refused(
        call, small, "-o", "teacher={artifact: made}", "-o", "data.name=tensors",
        "-o", "data.options={path: own.npz}",
    )  # fmt: skip
    assert "the teacher made was made for 4 classes of 'generated (simulated)'" in said
    assert "class 0 is 'class 0' there, '0' here" in said


def test_a_vocabulary_that_is_too_small(call, small) -> None:
    Path("words.py").write_text(
        "import torch\n"
        "class Words(torch.nn.Module):\n"
        "    def __init__(self, classes, known=64):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.EmbeddingBag(known, classes)\n"
        "    def forward(self, x):\n"
        "        return self.table(x)\n"
    )
    tokens = ["-o", "method=supervised", "-o", "teacher=null", "-o", "settings={}",
              "-o", "data.options.kind=tokens", "-o", "student.model=words:Words"]  # fmt: skip
    fits = call("run", str(small), *tokens, "-o", "student.options={known: 64}", "--folder", "a")
    assert fits.code == 0, fits.err
    said = refused(call, small, *tokens, "-o", "student.options={known: 63}")
    assert "the student Words cannot read the data" in said
    assert "token ids up to 63" in said


def test_a_store_of_another_teacher_or_other_data(call, small) -> None:
    stored = ["-o", "teacher.train={steps: 3}", "-o", "teacher.store=kept"]
    assert call("run", str(small), *stored, "--folder", "a").code == 0
    done = call("run", str(small), *stored, "-o", "teacher.train.steps=5", "--folder", "b")
    assert done.code == 1
    assert "the store kept was made by another teacher" in done.err
    other = ["-o", "data.options.rows=80"]
    for source in (["-o", "teacher={store: kept}"], stored):
        said = refused(call, small, *source, *other)
        assert "the store kept was made of other data" in said


def test_a_method_that_needs_more_than_a_store_or_an_endpoint_gives(call, small) -> None:
    said = refused(call, small, "-o", "teacher={endpoint: {base_url: 'http://127.0.0.1:9/v1'}}")
    assert "which an endpoint cannot give" in said


# ---- what lies on disk -----------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def test_a_damaged_stage_names_the_way_out_and_it_works(call, small) -> None:
    taught = [str(small), "-o", "teacher.train={steps: 4}", "--folder", "r"]
    first = call("run", *taught, "--json")
    assert first.code == 0, first.err
    cache = Path(os.environ["STILLHOUSE_CACHE"])
    (shared,) = (cache / "shared").glob("teacher-*")
    for stage, damage, file in (
        (Path("r/stages/student"), cut, "finished.state"),
        (Path("r/stages/student"), flip, "stamp.state"),
        (shared, flip, "finished.state"),
        (shared, cut, "stamp.state"),
    ):
        damage(stage / file)
        name = stage.name.partition("-")[0]
        done = call("run", *taught)
        assert done.code == 1
        assert "is damaged" in done.err or "not a state file" in done.err
        assert f"Run with --redo {name}" in done.err
        again = call("run", *taught, "--redo", name, "--json")
        assert again.code == 0, again.err
        assert accuracies(again.out) == accuracies(first.out)


def accuracies(told: str) -> dict[str, float]:
    sides = json.loads(told)["sides"]
    return {side: seeds["0"]["accuracy"] for side, seeds in sides.items()}


def test_damaged_records_of_a_run(call, small) -> None:
    words = [str(small), "-o", "compare=[supervised]", "--folder", "r"]
    assert call("run", *words).code == 0
    side = Path("r/sides/supervised/seed-0/side.json")
    cut(side)
    again = call("run", *words)
    assert again.code == 0, again.err
    assert json.loads(side.read_text())["figures"]
    Path("r/recipe.yaml").write_bytes(b"\xff\xfe")
    done = call("run", *words)
    assert done.code == 1
    assert "the record of it, which cannot be read" in done.err
    assert "--redo STAGE" in done.err
    assert call("run", *words, "--redo", "student").code == 0


def test_a_damaged_artifact(call, small) -> None:
    assert call("run", str(small), "--folder", "whole").code == 0
    np.save("one.npy", np.zeros(6, "float32"))
    assert call("infer", "whole", "one.npy").code == 0
    for name in ("artifact.json", "model.safetensors"):
        for damage in (cut, flip):
            shutil.rmtree("d", ignore_errors=True)
            shutil.copytree("whole", "d")
            damage(Path("d/artifact") / name)
            for words in (["infer", "d", "one.npy"], ["export", "d", "--to", "torch"]):
                done = call(*words)
                assert done.code == 1
                assert done.err.startswith("error: ")
                assert f"{name} is damaged" in done.err


def test_sides_of_another_recipe_are_not_taken_over(call, small) -> None:
    words = [str(small), "-o", "compare=[supervised]", "--folder", "r", "--json"]
    assert call("run", *words).code == 0
    changed = [*words, "-o", "budget.lr=0.000001", "-o", "budget.steps=1"]
    redone = call("run", *changed, "--redo", "student")
    assert redone.code == 0, redone.err
    fresh = call("run", *changed[:3], "--folder", "s", *changed[5:], "--json")
    assert fresh.code == 0, fresh.err
    assert accuracies(redone.out) == accuracies(fresh.out)


def test_a_full_disk(call, small, monkeypatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if "artifact" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    done = call("run", str(small), "--folder", "r")
    assert done.code == 1
    assert "the disk is full: r/artifact/" in done.err
    assert "make room and run the same command again" in done.err
    monkeypatch.undo()


def test_a_disk_that_fills_with_the_log(call, small, monkeypatch) -> None:
    from stillhouse.engine.log import RunLog

    def full(self: RunLog) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "flush", full)
    done = call("run", str(small), "--folder", "r")
    assert done.code == 1
    assert done.err.rstrip().splitlines()[-1].startswith("error: the disk is full: r cannot be")


def test_what_infer_cannot_read_or_write(call, small) -> None:
    assert call("run", str(small), "--folder", "r").code == 0
    np.save("one.npy", np.zeros(6, "float32"))
    np.save("seven.npy", np.zeros(7, "float32"))
    Path("bad.npy").write_text("hello")
    Path("bad.txt").write_bytes(b"\xff\xfe\xff")
    for words, said in (
        (["seven.npy"], "reads 6 numbers per sample, not 7"),
        (["bad.npy"], "bad.npy cannot be read as a .npy array of numbers"),
        (["bad.txt"], "bad.txt is no text in UTF-8"),
        (["one.npy", "-o", "top=many"], "'top' is a whole number of at least 1, found 'many'"),
        (["one.npy", "-o", "top=0"], "'top' is a whole number of at least 1, found 0"),
        (["one.npy", "-o", "/proc/none/out.jsonl"], "No such file or directory"),
    ):
        done = call("infer", "r", *words)
        assert done.code == 1
        assert done.err.startswith("error: ")
        assert said in done.err


# ---- endpoints -------------------------------------------------------------------------------

ENDPOINT = {
    "method": "llmlingua2",
    "data": {"name": "generated_prose", "options": {"texts": 8, "sentences": 2}},
    "student": {
        "model": "stillhouse:word-tagger",
        "options": {"width": 16, "heads": 2, "buckets": 64, "layers": 1, "length": 32},
    },
    "budget": {"steps": 2, "batch": 8, "lr": 0.01},
    "compare": [],
}


@pytest.fixture
def server() -> Iterator[Any]:
    """A server that gives every request the same answer; `server.answer` is set by the test."""
    held: Any = type("Held", (), {"answer": None, "url": "", "asked": 0})()

    async def reply(request: web.Request) -> web.Response:
        held.asked += 1
        await request.read()
        return await held.answer()

    async def serve(ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", reply)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        held.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(ready, stop)))
    thread.start()
    assert ready.wait(20)
    yield held
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


def answers(status: int = 200, text: str = "", seconds: float = 0.0, **headers: str) -> Any:
    async def answer() -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(status=status, text=text, headers=headers)

    return answer


def said_as(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answers(429, "slow down"), "HTTP 429"),
        (answers(500, "<html>oops</html>"), "HTTP 500"),
        (answers(200, "<html>not json</html>"), "the answer is not JSON"),
        (answers(200, "{}"), "the answer holds no message"),
        (answers(200, said_as("")), "empty answer"),
        (answers(200, said_as("late"), seconds=3.0), "no answer within 0.2 s"),
        (answers(401, "who are you?"), "HTTP 401 (the key is missing or wrong"),
        (answers(404, "no model"), "HTTP 404 (no such path or model"),
        (answers(400, "context too long"), "HTTP 400"),
    ],
    ids=["429", "500", "garbage", "no-message", "empty", "time-out", "401", "404", "400"],
)
def test_an_endpoint_that_gives_no_answer(call, tmp_path, server, answer, words) -> None:
    server.answer = answer
    endpoint = {"base_url": server.url, "model": "m", "attempts": 2, "timeout": 0.2}
    recipe = {**ENDPOINT, "teacher": {"endpoint": endpoint}}
    Path("asks.yaml").write_text(yaml.safe_dump(recipe))
    said = refused(call, "asks.yaml")
    assert words in said
    assert server.asked


def test_an_endpoint_that_refuses_connections(call) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    Path("asks.yaml").write_text(yaml.safe_dump({**ENDPOINT, "teacher": {"endpoint": endpoint}}))
    said = refused(call, "asks.yaml")
    assert "cannot connect to http://127.0.0.1:9/v1" in said
    assert "is the server running" in said


def test_a_key_that_is_not_set(call, server) -> None:
    endpoint = {"base_url": server.url, "model": "m", "key_env": "NO_SUCH_KEY"}
    Path("asks.yaml").write_text(yaml.safe_dump({**ENDPOINT, "teacher": {"endpoint": endpoint}}))
    said = refused(call, "asks.yaml")
    assert "the environment variable NO_SUCH_KEY is not set" in said
    assert not server.asked


def test_a_damaged_journal_names_its_line(call) -> None:
    serve = {"rule": "stillhouse.teachers.delete_rules:compress"}
    teacher = {"endpoint": {"model": "m", "serve": serve}}
    Path("asks.yaml").write_text(yaml.safe_dump({**ENDPOINT, "teacher": teacher}))
    assert call("run", "asks.yaml", "--folder", "first").code == 0
    (journal,) = Path(os.environ["STILLHOUSE_CACHE"], "journals").glob("*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:40] + b"?" + lines[2][41:]
    journal.write_bytes(b"".join(lines))
    said = refused(call, "asks.yaml")
    assert f"{journal.name}: line 3 is damaged" in said
    journal.write_bytes(b"".join([*lines[:2], *lines[3:], lines[2][:50]]))
    mended = call("run", "asks.yaml", "--folder", "second")
    assert mended.code == 0, mended.err


def test_what_holds_no_model_cannot_answer(call) -> None:
    from stillhouse.methods.datasets.datadam import DataDAM

    Path("set.yaml").write_text(yaml.safe_dump({**DataDAM.example(), "compare": []}))
    assert call("run", "set.yaml", "--folder", "r").code == 0
    for words in (["infer", "r", "set.yaml"], ["export", "r", "--to", "onnx"]):
        done = call(*words)
        assert done.code == 1
        assert "an artifact of kind 'dataset' holds no model" in done.err


def test_a_damaged_summary(call, small) -> None:
    assert call("run", str(small), "--folder", "r").code == 0
    cut(Path("r/run.json"))
    assert "run.json cannot be read" in call("report", "r").out
    done = call("report", "r", "--json")
    assert done.code == 1
    assert "run.json is damaged" in done.err
    assert call("run", "r/recipe.yaml", "--folder", "r").code == 0
    assert call("report", "r", "--json").code == 0


# ---- the plan --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "told", "stages"),
    [
        ("{train: {steps: 2}}", "model stillhouse:mlp", ["teacher", "student"]),
        ("{store: {dtype: float32}}", "its outputs stored (dense, float32)",
         ["capture", "student"]),
        ("{recipe: {method: supervised, student: {model: 'stillhouse:mlp'}}, model: null, "
         "options: {}}", "recipe supervised on the same data", ["teacher/student", "student"]),
    ],
)  # fmt: skip
def test_a_dry_run_resolves_the_teacher(call, small, teacher, told, stages) -> None:
    given = yaml.safe_load(small.read_text())
    given["teacher"] = {**given["teacher"], **yaml.safe_load(teacher)}
    small.write_text(yaml.safe_dump(given))
    done = call("run", str(small), "--dry-run", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)["plan"]
    assert told in plan["teacher"]
    assert [stage["name"] for stage in plan["stages"]] == stages
    ran = call("run", str(small), "--folder", "r", "--json")
    assert ran.code == 0, ran.err
    run = [s["name"] for s in json.loads(ran.out)["stages"] if s["kind"] != "judge"]
    assert run == stages
