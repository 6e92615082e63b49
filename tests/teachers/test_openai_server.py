from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from stillhouse.engine.journal import Journal
from stillhouse.errors import TeacherError
from stillhouse.parts.requests import chat, enclose
from stillhouse.teachers.endpoint import Endpoint
from stillhouse.teachers.local_server import LocalServer, arguments
from stillhouse.teachers.local_speaker import LocalEncoder, LocalSpeaker
from stillhouse.teachers.openai_server import Faults

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "openai_server.py"


@pytest.fixture(autouse=True)
def _rules_are_importable(monkeypatch, request):
    root = str(request.config.rootpath)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def post(url: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def say(text: str, **settings) -> dict:
    return {"messages": [{"role": "user", "content": text}], **settings}


def test_the_tool_runs_alone_from_a_checkout_and_serves_the_deleting_rule():
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--options", '{"violations": 0}'],
        stdout=subprocess.PIPE,
        text=True,
        env=alone,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        url = line.split()[-1]
        status, reply = post(url + "/chat/completions", say(enclose("the red cat")))
        assert status == 200
        assert reply["choices"][0]["message"]["content"] == "red cat"
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["total_tokens"] == 5 + 2
        with urllib.request.urlopen(url + "/models") as models:
            assert "delete_rules" in json.load(models)["data"][0]["id"]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_bad_requests_are_told():
    with LocalServer() as server:
        status, reply = post(server.url + "/chat/completions", b"{")
        assert (status, "not a JSON object" in reply["error"]["message"]) == (400, True)
        status, reply = post(server.url + "/chat/completions", {"model": "m"})
        assert (status, "messages" in reply["error"]["message"]) == (400, True)
        status, reply = post(server.url + "/embeddings", {"input": ["a"]})
        assert (status, "--encoder" in reply["error"]["message"]) == (400, True)


def test_rules_may_be_async():
    with LocalServer(rule="tests.teachers.rules:slow") as server:
        _, reply = post(server.url + "/chat/completions", say("x"))
    assert reply["choices"][0]["message"]["content"] == "async x"


def test_a_journal_is_replayed(tmp_path):
    asked = [chat(f"q {i}", seed=5) for i in range(3)]
    with LocalServer(rule="tests.teachers.rules:seed") as server, Journal(tmp_path / "a") as first:
        Endpoint(server.url).label([(q, d) for q in asked for d in (0, 1)], first)
        recorded = {entry["key"]: entry["text"] for entry in first}
    with LocalServer(replay=tmp_path / "a") as server, Journal(tmp_path / "b") as again:
        endpoint = Endpoint(server.url, model="another name")
        endpoint.label(asked, again)
        assert {entry["text"] for entry in again} == {recorded[q.key()] for q in asked} == {"5"}
        with pytest.raises(TeacherError, match=r"HTTP 404.*no recorded answer"):
            endpoint.label([chat("unknown")], again)


def test_faults_are_a_function_of_request_and_count():
    faults = Faults({"500": 0.3, "empty": 0.2}, seed=1)
    kinds = [faults.kind(f"k{i}", 1) for i in range(2000)]
    assert kinds == [faults.kind(f"k{i}", 1) for i in range(2000)]
    assert kinds != [faults.kind(f"k{i}", 2) for i in range(2000)]
    assert kinds.count("500") == pytest.approx(600, abs=70)
    assert kinds.count("empty") == pytest.approx(400, abs=70)
    assert Faults({}, always="garbage").kind("k", 1) == "garbage"


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(TeacherError, match=r"no such function"), LocalServer(rule="nowhere:x"):
        pass
    with pytest.raises(TeacherError, match=r"add up"), LocalServer(**{"500": 0.7, "429": 0.7}):
        pass
    (tmp_path / "r").write_text('{"text": 1}\n')
    with pytest.raises(TeacherError, match=r"line 1"), LocalServer(replay=tmp_path / "r"):
        pass
    with pytest.raises(TeacherError, match=r"not set"), LocalServer(key_env="STILLHOUSE_NONE"):
        pass


def test_the_server_ends_with_its_block_and_with_a_killed_parent():
    with LocalServer() as server:
        url = server.url
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url + "/models")
    fork = multiprocessing.get_context("fork")
    heard, said = fork.Pipe(duplex=False)

    def parent() -> None:
        with LocalServer() as inner:
            said.send(inner.url)
            time.sleep(60)

    process = fork.Process(target=parent)
    process.start()
    url = heard.recv()
    urllib.request.urlopen(url + "/models").close()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.time() + 10
    while time.time() < deadline:
        try:
            urllib.request.urlopen(url + "/models").close()
        except (urllib.error.URLError, ConnectionError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server outlived its parent")


def test_settings_become_arguments():
    given = arguments({"rule": "a:b", "options": {"x": 1}, "500": 0.5, "log": None, "flag": True})
    assert given == ["--with-parent", "--rule", "a:b", "--options", '{"x": 1}', "--500", "0.5",
                     "--flag"]  # fmt: skip


# Local models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A tiny language model and a tiny encoder from random configs, saved like real ones."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<pad>", "</s>", "system", "user", "assistant", "a", "b", "c", ":"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": len(words)}  # fmt: skip
    folder = tmp_path_factory.mktemp("models")
    lm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, bos_token_id=None, eos_token_id=2, pad_token_id=1)
    )
    encoder = transformers.BertModel(transformers.BertConfig(**size, pad_token_id=1))
    for name, model in (("lm", lm), ("encoder", encoder)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("lm", "encoder")}


def test_a_local_model_gives_what_generate_gives(tiny):
    speaker = LocalSpeaker.load(tiny["lm"])
    asked = chat("a b c", max_tokens=8, logprobs=3)
    reply = speaker.answer(asked)
    text = speaker.tokenizer.apply_chat_template(
        [dict(m) for m in asked.messages], tokenize=False, add_generation_prompt=True
    )
    ids = speaker.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    whole = speaker.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    new = whole[0, ids.shape[1] :]
    assert reply.text == speaker.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert reply.usage["prompt_tokens"] == ids.shape[1]
    assert reply.finish_reason == ("stop" if 2 in new else "length")
    with torch.no_grad():
        logp = speaker.model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    for place, told in enumerate(reply.logprobs):
        assert told["logprob"] == pytest.approx(logp[place, new[place]].item(), abs=1e-4)
        assert len(told["top_logprobs"]) == 3


def test_samples_are_a_function_of_request_and_draw(tiny):
    speaker = LocalSpeaker.load(tiny["lm"])
    asked = chat("a b c", max_tokens=12, temperature=1.5, top_p=0.9)
    drawn = [speaker.answer(asked, draw).text for draw in range(4)]
    assert drawn == [speaker.answer(asked, draw).text for draw in range(4)]
    assert len(set(drawn)) > 1


def test_a_model_and_an_encoder_behind_the_endpoint(tiny, tmp_path):
    asked = chat("a b c", max_tokens=6, logprobs=2)
    alone = LocalSpeaker.load(tiny["lm"]).answer(asked)
    with LocalServer(model=tiny["lm"]) as server, Journal(tmp_path / "j") as journal:
        Endpoint(server.url).label([asked], journal)
        reply = journal.reply(asked.key())
    assert reply.text == alone.text
    assert reply.finish_reason == alone.finish_reason
    assert [t["logprob"] for t in reply.logprobs] == pytest.approx(
        [t["logprob"] for t in alone.logprobs], abs=1e-5
    )

    texts = [f"a b {w}" for w in "abcabc"]
    vectors = LocalEncoder.load(tiny["encoder"]).embed(texts)

    async def embed(url: str) -> torch.Tensor:
        async with Endpoint(url) as endpoint:
            return await endpoint.embed(texts, batch=4)

    with LocalServer(encoder=tiny["encoder"]) as server:
        remote = asyncio.run(embed(server.url))
    assert remote.shape == vectors.shape == (6, 16)
    torch.testing.assert_close(remote, vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(6))
