from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.batch import read_rows
from stillhouse.data.registry import open_data
from stillhouse.engine.loop import Stage
from stillhouse.errors import DataError, Interrupted, ModelError, RecipeError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.models.causal_lm import CausalLM, LanguageNet
from stillhouse.opening import open_artifact
from stillhouse.parts.text_tokens import TextTokens, word_tokenizer
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.tasks import open_task
from stillhouse.tasks.text_generation import TextGeneration, asked_once

transformers = pytest.importorskip("transformers")
SMALL = {"layers": 1, "width": 16, "heads": 2, "dropout": 0.0}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def task() -> TextGeneration:
    made = open_task("text-generation", open_data("generated_prompts"))
    assert isinstance(made, TextGeneration)
    return made


def own(task: TextGeneration, size: int = 0, length: int = 48) -> CausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalLM(size or task.tokens.size, **SMALL, length=length, end=task.tokens.end)


def recipe(method: str = "word-kd", **changes: Any):
    told: dict[str, Any] = {
        "method": method,
        "task": "text-generation",
        "data": {"name": "generated_prompts", "options": {"prompts": 12}},
        "student": {"model": "stillhouse:causal_lm", "options": SMALL},
        "budget": {"steps": 4, "batch": 8, "lr": 0.01},
        "seed": 0,
    }
    if method == "word-kd":
        train = {"steps": 3, "batch": 8, "lr": 0.01}
        told["teacher"] = {"model": "stillhouse:causal_lm", "options": SMALL, "train": train}
    return load_recipe({**told, **changes})


def test_the_loss_is_the_mean_over_all_response_tokens(task: TextGeneration) -> None:
    batch = read_rows(task.splits["train"], torch.arange(5), None)
    logits = torch.randn(*batch["tokens"].shape, task.tokens.size)
    total, count = torch.zeros(()), 0
    for row in range(5):
        for place in range(1, batch["tokens"].shape[1]):
            if batch["response_mask"][row, place]:
                total += F.cross_entropy(logits[row, place - 1], batch["tokens"][row, place])
                count += 1
    found = task.loss({"logits": logits}, batch)["task"]
    assert float(found) == pytest.approx(float(total / count), rel=1e-5)
    assert int(task.count(batch)) == count == int(task.items(batch).sum())


def test_figures_of_a_split_are_those_of_its_tokens(task: TextGeneration) -> None:
    source = task.splits["val"]
    whole = read_rows(source, torch.arange(len(source)), None)
    logits = torch.randn(*whole["tokens"].shape, task.tokens.size)
    metric = task.metrics()["tokens"]
    for start in range(0, len(source), 5):
        part = whole.narrow(start, min(start + 5, len(source)))
        metric.update({"logits": logits[start : start + 5]}, part)
    figures = metric.compute()
    wanted = float(task.loss({"logits": logits}, whole)["task"])
    assert figures["loss"] == pytest.approx(wanted, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(torch.tensor(wanted).exp().item(), rel=1e-4)


def test_micro_batches_give_the_one_batch(tmp_path: Path) -> None:
    weights = []
    for pieces in (1, 4):
        changes = {"budget": {"steps": 3, "batch": 8, "lr": 0.01, "accumulate": pieces}}
        job = open_job(recipe("supervised", **changes), tmp_path / str(pieces))
        weights.append(plain_state(open_method(job.recipe).run(job).module))
        job.log.close()
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def test_every_prompt_is_asked_once(task: TextGeneration) -> None:
    source = asked_once(task.splits["val"])
    texts = read_rows(source, torch.arange(len(source)), None)["prompt"]
    assert len(texts) == len(set(texts)) == 12
    assert len(task.splits["val"]) == 24


def test_answers_do_not_depend_on_the_batch(task: TextGeneration) -> None:
    net = task.net(own(task))
    batch = read_rows(task.splits["val"], torch.arange(8), None)
    sampler = task.sampler(6)
    together = task.generate(net, batch, sampler, seed=5)
    apart = [task.generate(net, batch.narrow(n, n + 1), sampler, seed=5)[0] for n in range(8)]
    assert together == apart
    assert task.generate(net, batch, sampler, seed=6) != together


def test_a_run_is_judged_by_what_it_says(tmp_path: Path) -> None:
    result = run(recipe(compare=["supervised"]), folder=tmp_path / "run", progress=False)
    figures = json.loads((tmp_path / "run" / "run.json").read_text())
    text = json.dumps(figures)
    for name in ("rouge_l", "bleu", "repetition", "sampled_rouge_l", "perplexity"):
        assert f'"{name}"' in text
    report = (tmp_path / "run" / "report.html").read_text()
    assert "What is said to prompts of the test" in report
    assert "thing[" in report
    prompts = ["thing[cell], colour[red], place[north]", "thing[comet]"]
    reopened = open_artifact(tmp_path / "run")
    assert reopened.predict(prompts) == result.artifact.predict(prompts)
    sampled = reopened.predict(prompts, temperature=1.0, seed=3, max_new=5)
    assert sampled == result.artifact.predict(prompts, temperature=1.0, seed=3, max_new=5)
    with pytest.raises(RecipeError, match="no option 'heat'"):
        reopened.predict(prompts, heat=1)


def test_prompts_of_files_are_answered(tmp_path: Path, task: TextGeneration) -> None:
    writer = task.predictor(task.net(own(task)))
    (tmp_path / "a.txt").write_text("thing[cell]\n\ncolour[red]\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "place[north]"}\n')
    told = writer.infer([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out.jsonl", {})
    assert told["inputs"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["thing[cell]", "colour[red]", "place[north]"]
    assert [row["text"] for row in rows] == writer.predict([row["prompt"] for row in rows])
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="line 1"):
        writer.infer([tmp_path / "b.jsonl"], None, {})


@pytest.mark.parametrize("method", ["word-kd", "supervised"])
def test_stopped_anywhere_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        job = open_job(recipe(method), folder)
        try:
            return plain_state(open_method(job.recipe).run(job).module)
        finally:
            job.log.close()

    wanted = weights(tmp_path / "whole")
    due, calls = Stage.due, {"n": 0}

    def ask(self: Stage, now: float) -> bool:
        calls["n"] += 1
        if calls["n"] == 3:
            self.stop.asked = 15
        return due(self, now)

    monkeypatch.setattr(Stage, "due", ask)
    with pytest.raises(Interrupted):
        weights(tmp_path / "cut")
    monkeypatch.setattr(Stage, "due", due)
    found = weights(tmp_path / "cut")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("teacher", "student", "extra"),
    [
        ("gpt2", "llama", {}),
        ("llama", "opt", {"layers": 1}),
        ("opt", "gpt2", {"lora": {"r": 2}}),
        ("llama", "llama", {"lora": {"r": 2, "targets": ["q_proj"]}, "dtype": "bfloat16"}),
    ],
)
def test_models_of_transformers_teach_and_learn(
    tmp_path: Path, teacher: str, student: str, extra: dict[str, Any]
) -> None:
    if "lora" in extra:
        pytest.importorskip("peft")
    train = {"steps": 2, "batch": 8, "lr": 0.01}
    told = recipe(
        teacher={"model": f"hf:{teacher}", "options": TINY[teacher], "train": train},
        student={"model": f"hf:{student}", "options": {**TINY[student], **extra}},
        budget={"steps": 2, "batch": 8, "lr": 0.01},
    )
    result = run(told, folder=tmp_path / "run", progress=False)
    reopened = open_artifact(tmp_path / "run")
    prompt = "thing[cell], colour[red], place[north]"
    assert reopened.predict([prompt]) == result.artifact.predict([prompt])
    # Adapters are merged: what comes out is the plain model, which transformers opens too.
    folder = tmp_path / "run" / "artifact"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert set(theirs.state_dict()) >= set(plain_state(reopened.module))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = reopened.predictor.tokens
    assert tokenizer(prompt).input_ids == text.tokenizer(prompt).input_ids
    rows = torch.tensor([text.prompt(prompt)])
    with torch.no_grad():
        ours, other = reopened.module(rows)["logits"], theirs(input_ids=rows).logits
    atol = 1e-5 if "dtype" not in extra else 2e-2
    assert torch.allclose(ours.float(), other.float(), atol=atol)


def test_an_artifact_teaches_and_must_know_the_same_words(tmp_path: Path) -> None:
    run(recipe("supervised"), folder=tmp_path / "first", progress=False)
    told = recipe(teacher={"artifact": str(tmp_path / "first")})
    assert run(told, folder=tmp_path / "second", progress=False).sides
    other = recipe(
        teacher={"artifact": str(tmp_path / "first")},
        data={"name": "generated_prompts", "options": {"prompts": 12, "references": 3}},
    )
    job = open_job(other, tmp_path / "third")
    with pytest.raises((ModelError, TeacherError), match=r"another tokenizer|cuts text otherwise"):
        job.teacher()


def test_a_model_with_another_tokenizer_beside_it_is_refused(
    tmp_path: Path, task: TextGeneration
) -> None:
    folder = tmp_path / "model"
    sizes = {**TINY["gpt2"], "vocab_size": 80, "bos_token_id": 1, "eos_token_id": 1}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    told = recipe(
        teacher={"model": f"hf:{folder}", "weights": "pretrained"},
        data={"name": "generated_prompts", "options": {"prompts": 12}},
    )
    other = TextTokens(word_tokenizer(["entirely other words", "and other ids"]))
    for name, content in other.files().items():
        (folder / name).write_bytes(content)
    job = open_job(told, tmp_path / "run")
    with pytest.raises(ModelError, match="has another tokenizer than the data"):
        job.teacher()
    # The data's own tokenizer beside a head that is padded to 80 is accepted, and cut.
    for name, content in job.task.tokens.files().items():  # type: ignore[attr-defined]
        (folder / name).write_bytes(content)
    again = open_job(told, tmp_path / "again")
    teacher = again.teacher()
    batch = read_rows(again.splits["train"], torch.arange(3), None)
    size = again.task.tokens.size  # type: ignore[attr-defined]
    assert teacher.knowledge(batch)["logits"].shape[-1] == size < 80


def test_models_that_cannot_read_the_rows_are_refused(task: TextGeneration) -> None:
    with pytest.raises(ModelError, match="token ids and the data uses id"):
        task.check(LanguageNet(own(task, size=8)), None)
    task = TextGeneration(task.splits)  # the small head has narrowed what its models share
    with pytest.raises(ModelError, match="reads rows of 10 tokens"):
        task.check(None, task.net(own(task, length=10)))
    with pytest.raises(ModelError, match="cannot read rows of tokens"):
        task.check(task.net(torch.nn.Linear(3, 3)), None)
    images = open_data("generated", options={"kind": "vectors"})
    with pytest.raises(DataError, match="prompts and responses"):
        open_task("text-generation", images)


def test_kd_counts_response_positions_only(tmp_path: Path) -> None:
    job = open_job(recipe(), tmp_path / "run")
    method = open_method(job.recipe)
    teacher = job.teacher()
    objective = method.objective(job, job.student(), teacher)
    teacher.bind(objective.wants, job.task)
    objective.eval()
    batch = read_rows(job.splits["train"], torch.arange(6), None)
    wanted = objective.terms(batch, teacher)
    wide = {
        name: torch.nn.functional.pad(batch[name], (0, 3))
        for name in ("tokens", "attention_mask", "response_mask")
    }
    from stillhouse.batch import Batch

    found = objective.terms(Batch({**batch, **wide}), teacher)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5), name
    assert int(objective.count(batch)) == int(batch["response_mask"].sum())
