"""DAC-KL between two vocabularies (experimental): losses, runs, and what is refused."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse import catalogue
from stillhouse.batch import read_block
from stillhouse.clock import Clock, Views
from stillhouse.errors import ModelError, RecipeError, StillhouseError, VocabularyError
from stillhouse.launch import open_job, run
from stillhouse.losses.logits import sorted_distance
from stillhouse.parts.text_tokens import TextTokens, bpe_tokenizer
from stillhouse.parts.token_rows import predicting
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.teacher import Knowledge

transformers = pytest.importorskip("transformers")
DACKL: Any = catalogue.load("dackl")
BPE = {"prompts": 8, "tokenizer": "bpe", "merges": 30, "length": 64, "prompt_length": 48}


def spec_of(**settings: Any) -> dict[str, Any]:
    """The example, its teacher trained on byte pairs of the same sentences."""
    spec = {**DACKL.example(0), "variant": "text-level", "compare": []}
    spec["settings"] = {**spec["settings"], **settings}
    spec["settings"].pop("hidden")
    train = {"steps": 3, "batch": 4, "lr": 0.01}
    data = {"name": "generated_prompts", "options": BPE}
    spec["teacher"] = {**spec["teacher"], "train": {**train, "data": data}}
    return spec


def opened(folder: Path, **settings: Any):
    """Job, objective and a batch, before any step."""
    recipe = load_recipe(spec_of(**settings))
    job, method = open_job(recipe, folder), open_method(recipe)
    teacher = method._teacher(job)
    objective = method.objective(job, job.student(), teacher)
    order = method.order(job)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))[0]
    return objective, read_block(order, rows, Views(0))


def terms_of(objective, batch, clock=None):
    with torch.no_grad():
        prepared = objective.prepare(batch, clock or Clock())
    return prepared, objective(prepared, Knowledge.none, clock or Clock())


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STILLHOUSE_CACHE", str(folder / "cache"))
        objective, batch = opened(folder / "job", text="given", w_sft=0.5)
    objective.eval()  # no dropout, so that the same rows give the same terms
    return objective, batch


def test_places_of_given_text_meet_and_are_counted(given):
    objective, batch = given
    assert not objective.writes
    assert [want.field for want in objective.wants] == ["fresh"]
    prepared, terms = terms_of(objective, batch)
    at = prepared["aligned"] >= 0
    # words of this data are boundaries of byte pairs too, so every place meets one
    assert torch.equal(at, predicting(batch["response_mask"]))
    assert set(terms) == {"sft", "dac"}
    counts = objective.count(prepared)
    assert int(counts["dac"]) == int(at.sum())
    logits = objective.student(batch["tokens"])["logits"]
    said = objective.reader.logits(prepared["theirs"])
    rows = [
        sorted_distance(logits[b, i], said[b, j], k=objective.config.k)
        for b in range(batch.size)
        for i, j in enumerate(prepared["aligned"][b].tolist())
        if j >= 0
    ]
    torch.testing.assert_close(terms["dac"], torch.stack(rows).mean())
    sums = objective._made[-1]["texts"].sum(0)
    assert sums.tolist() == [1, 0, 0, 0, 0]  # a step on given text is counted


def test_the_gradient_reaches_the_student_alone(given):
    objective, batch = given
    objective.zero_grad()
    _, terms = terms_of(objective, batch)
    terms["dac"].backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    teacher = objective.reader.net
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    held = {id(p) for p in objective.parameters()}
    assert not held & {id(p) for p in teacher.parameters()}
    assert objective.student.vocabulary == objective.task.tokens.size != teacher.vocabulary


def test_micro_batches_give_the_step_of_the_whole(given):
    objective, batch = given
    with torch.no_grad():
        prepared = objective.prepare(batch, Clock())

    def slopes(pieces):
        counts = [objective.count(piece) for piece in pieces]
        whole = {k: sum(c[k] for c in counts) for k in ("sft", "dac")}
        objective.zero_grad()
        for piece, count in zip(pieces, counts, strict=True):
            terms = objective(piece, Knowledge.none, Clock())
            sum(v * (count[k] / whole[k]) for k, v in terms.items()).backward()
        return [p.grad.clone() for p in objective.student.parameters()]

    for one, other in zip(slopes([prepared]), slopes(prepared.split(2)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_replayed_text_is_read_under_its_own_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    objective, batch = opened(tmp_path / "job", init_threshold=1.0, capacity=4)
    objective.eval()
    first, _ = terms_of(objective, batch)
    assert first["prompt"] == batch["prompt"]
    for part in objective.parts():
        part.settle(True)
    second, terms = terms_of(objective, batch, Clock(step=99, total=100))
    of_text = {
        tuple(row[mask].tolist()): prompt
        for row, mask, prompt in zip(first["tokens"], first["attention_mask"], first["prompt"])
    }
    for row, mask, prompt in zip(second["tokens"], second["attention_mask"], second["prompt"]):
        assert of_text[tuple(row[mask].tolist())] == prompt
    assert torch.equal(second["truth"]["tokens"], batch["tokens"])
    assert math.isfinite(terms["dac"].item())


# ----------------------------------------------------------------------------- whole runs
def test_killed_and_started_again_it_ends_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    spec = spec_of(init_threshold=0.7, capacity=8)
    spec["budget"].update(steps=16)
    spec["output"] = {"checkpoint_minutes": 0.0001}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec))
    result = run(load_recipe(spec), folder=tmp_path / "whole", progress=False)
    whole, sides = result.artifact, result.sides
    # the teacher speaks for itself, by its own tokens, and has no loss by ours
    (figures,) = sides["teacher"].values()
    assert "rouge_l" in figures
    assert "loss" not in figures
    report = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "Experimental" in report
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "stillhouse", "run", str(path), "--folder", str(cut)],
        env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 240
    states: list[Path] = []
    while not states and process.poll() is None and time.monotonic() < until:
        found = (cut / "stages" / "student").glob("step-*")
        states = [s for s in found if int("".join(c for c in s.name if c.isdigit()) or 0) >= 4]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states
    assert not (cut / "artifact").exists()
    again = run(load_recipe(spec), folder=cut, progress=False).artifact
    one, other = (artifact.module.state_dict() for artifact in (whole, again))
    assert all(torch.equal(one[k], other[k]) for k in one)
    for name in ("texts", "bands", "threshold", "corrections"):
        assert whole.meta[name] == again.meta[name]
    sums = [sum(column) for column in zip(*whole.meta["texts"])]
    assert sums[0] == 16
    assert sums[1] > 0
    assert sums[2] > 0
    assert sums[4] > 0


def llama(folder: Path, merges: int = 30, context: int = 96) -> Path:
    """A tiny Llama with a tokenizer beside its weights, as a hub folder has it."""
    texts = ["In the valley there is a red comet.", "thing[comet], colour[red], place[valley]"]
    tokens = TextTokens(bpe_tokenizer(texts, merges=merges), template="{prompt}\n")
    config = transformers.LlamaConfig(
        vocab_size=tokens.size + 6, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=context, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name, content in tokens.files().items():
        (folder / name).write_bytes(content)
    return folder


def gpt2(vocabulary: int):
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_a_released_llama_teaches_a_gpt2_of_words(tmp_path):
    """Its tokenizer lies beside its weights; its smaller vocabulary narrows nobody's."""
    spec = spec_of(init_threshold=1.0)
    folder = llama(tmp_path / "llama", merges=0)
    spec["teacher"] = {"model": f"hf:{folder}", "weights": "pretrained"}
    spec["student"] = {"model": "given"}
    spec["budget"]["steps"] = 2
    words = open_job(load_recipe(spec), tmp_path / "job").task.tokens.size
    result = run(
        load_recipe(spec), folder=tmp_path / "run", given=Given(student=gpt2(words)), progress=False
    )
    figures = next(iter(next(iter(result.sides.values())).values()))
    assert math.isfinite(figures["loss"])
    # An untrained teacher says no whole word, so nothing is corrected; places meet all the same.
    assert sum(row[1] for row in result.artifact.meta["texts"]) == 2
    assert sum(row[0] for row in result.artifact.meta["bands"]) > 0


def test_the_teachers_responses_can_be_learnt_across_vocabularies(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    spec = spec_of(w_dac=0.0, responses="teacher", text="given", scrg_rounds=0, sft_epochs=0)
    spec["budget"]["steps"] = 2
    result = run(load_recipe(spec), folder=tmp_path / "run", progress=False)
    assert result.sides["teacher"]


# ----------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"w_span": 1.0}, "set w_span: 0"),
        ({"divergence": "dac"}, "set divergence: sorted"),
        ({"divergence": "forward"}, "divergence: forward compares the same ids"),
        ({"chunk": 8}, "set chunk: 0"),
        ({"features": "full"}, "leave out features"),
        ({"quantile_scale": "linear"}, "leave out quantile_scale"),
        ({"alignment": "tokens"}, "alignment: text too"),
        ({"alignment": "tokens", "divergence": "dac", "teacher_template": "chat"}, "only"),
    ],
)
def test_settings_that_need_one_vocabulary_are_told(settings, told):
    with pytest.raises(RecipeError, match=told):
        open_method(load_recipe(spec_of(**settings)))


def test_on_tokens_another_vocabulary_is_refused_and_the_way_out_named(tmp_path):
    spec = spec_of()
    del spec["variant"]
    with pytest.raises(VocabularyError, match=r"another tokenizer.*text-level"):
        run(load_recipe(spec), folder=tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").rglob("step-*"))


def test_a_store_cannot_speak_of_other_tokens(tmp_path):
    spec = spec_of()
    spec["teacher"]["store"] = True
    with pytest.raises(RecipeError, match="leave out store"):
        run(load_recipe(spec), folder=tmp_path / "kept", progress=False)
    spec["teacher"] = {"store": str(tmp_path)}
    with pytest.raises(RecipeError, match="leave out store"):
        run(load_recipe(spec), folder=tmp_path / "alone", progress=False)
    assert not list(tmp_path.rglob("step-*"))


def test_a_teacher_that_cannot_read_the_texts_is_told(tmp_path):
    spec = spec_of()
    short = llama(tmp_path / "short", context=24)
    spec["teacher"] = {"model": f"hf:{short}", "weights": "pretrained"}
    with pytest.raises(ModelError, match="reads rows of 24 tokens"):
        run(load_recipe(spec), folder=tmp_path / "a", progress=False)
    bare = llama(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    spec["teacher"] = {"model": f"hf:{bare}", "weights": "pretrained"}
    with pytest.raises(StillhouseError, match="tokenizer"):
        run(load_recipe(spec), folder=tmp_path / "b", progress=False)
    assert not list(tmp_path.rglob("step-*"))
