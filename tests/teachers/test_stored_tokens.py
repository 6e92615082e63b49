from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, read_rows
from stillhouse.errors import Interrupted, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.losses.logits import kl
from stillhouse.parts.token_rows import joined, padded, predicting, prompts
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.capture_tokens import CapturedTokens
from stillhouse.teacher import Frozen, Knowledge, TopK, Want
from stillhouse.teachers.cascade import Cascade
from stillhouse.teachers.live import Live
from stillhouse.teachers.stored_tokens import StoredTokens, dense_logits

pytest.importorskip("transformers")
SMALL = {"layers": 1, "width": 16, "heads": 2, "dropout": 0.0}


def recipe(**store: Any):
    teacher: dict[str, Any] = {
        "model": "stillhouse:causal_lm",
        "options": SMALL,
        "train": {"steps": 3, "batch": 8, "lr": 0.01},
    }
    if store:
        teacher["store"] = store
    return load_recipe(
        {
            "method": "word-kd",
            "task": "text-generation",
            "data": {"name": "generated_prompts", "options": {"prompts": 12}},
            "teacher": teacher,
            "student": {"model": "stillhouse:causal_lm", "options": {**SMALL, "width": 8}},
            "settings": {"temperature": 1.0},
            "budget": {"steps": 4, "batch": 8, "lr": 0.01},
            "seed": 0,
        }
    )


def job_of(folder: Path, **store: Any):
    return open_job(recipe(**store), folder)


def whole(job: Any, split: str = "train") -> Batch:
    source = job.splits[split]
    return read_rows(source, torch.arange(len(source)), None)


def live_of(job: Any) -> Live:
    made = job.student()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return Live(made)


def fresh(batch: Batch, seed: int = 0) -> Batch:
    """The same prompts with other responses."""
    asked, mask = prompts(batch)
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randint(4, 20, (int(n),), generator=rng) for n in range(2, 2 + batch.size)]
    return joined(asked, mask, *padded(made[: batch.size]), like=batch)


class Spec:
    def __init__(self, **given: Any) -> None:
        self.path, self.form, self.k, self.temperature = None, "topk", 6, 1.0
        self.dtype, self.draws, self.batch = "float16", None, 5
        self.__dict__.update(given)


def captured(job: Any, live: Live, *wants: Want, **spec: Any) -> CapturedTokens:
    made = CapturedTokens(job, live, Spec(**spec))
    made.bind(wants or (Want("logits"),), job.task)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def test_what_is_kept_is_what_the_teacher_says(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run")
    live = live_of(job)
    batch = whole(job)
    at = predicting(batch["response_mask"])
    wanted = live.knowledge(batch).tensor("logits")[at].log_softmax(-1)
    stored = captured(job, live).answers
    assert isinstance(stored, StoredTokens)
    found = stored.knowledge(batch)["logits"]
    assert isinstance(found, TopK)
    top = wanted.topk(6, -1)
    assert torch.allclose(found.logp[at], top.values, atol=2e-3)
    assert torch.allclose(wanted.gather(-1, found.ids[at]), top.values, atol=1e-5)
    mass = found.logp[at].exp().sum(-1) + found.rest[at].exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=2e-3)
    assert bool((found.rest[~at] == 0).all())  # nothing is said elsewhere
    # Fewer records than tokens: references of one prompt begin alike, and each has one beginning.
    assert len(stored.store) < int(at.sum())


def test_padding_and_order_do_not_matter(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run")
    stored = captured(job, live_of(job), form="dense", dtype="float32").answers
    batch = whole(job)
    dense = stored.knowledge(batch).tensor("logits")
    few = read_rows(job.splits["train"], torch.tensor([7, 2]), None)
    again = stored.knowledge(few).tensor("logits")
    length = few["tokens"].shape[1]
    assert torch.equal(again, dense[[7, 2], :length])


def test_texts_that_are_not_kept_are_told_or_marked(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run")
    stored = captured(job, live_of(job)).answers
    other = fresh(whole(job).select(torch.arange(3)))
    with pytest.raises(TeacherError, match="lacks"):
        stored.knowledge(other)
    marked = StoredTokens(stored.store.path, missing="mask")
    assert marked.knowledge(other).valid.tolist() == [False] * 3
    assert marked.knowledge(whole(job)).valid is None


def test_a_cascade_asks_live_about_new_texts_alone(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run")
    live = live_of(job)
    made = captured(job, live, Want("logits"), Want("fresh"), form="dense", dtype="float32")
    cascade = made.answers
    assert isinstance(cascade, Cascade)
    old, new = whole(job).select(torch.arange(6)), fresh(whole(job).select(torch.arange(6, 10)))
    width = max(old["tokens"].shape[1], new["tokens"].shape[1])

    def wide(batch: Batch, name: str) -> torch.Tensor:
        value = batch[name]
        return torch.nn.functional.pad(value, (0, width - value.shape[1]))

    views = ("tokens", "attention_mask", "response_mask")
    mixed = Batch(
        id=torch.arange(10), **{v: torch.cat([wide(old, v), wide(new, v)]) for v in views}
    )
    order = torch.tensor([9, 0, 6, 1, 2, 7, 3, 8, 4, 5])
    mixed = Batch({k: v[order] for k, v in mixed.items()})
    asked: list[int] = []
    answer = live.knowledge
    live.knowledge = lambda b: (asked.append(b.size), answer(b))[1]  # type: ignore[assignment, func-returns-value]
    found = made.knowledge(mixed).tensor("logits")
    assert asked == [4]
    assert (cascade.read, cascade.asked) == (6, 4)
    at = predicting(mixed["response_mask"])
    wanted = answer(mixed).tensor("logits")
    assert torch.allclose(found[at], wanted[at], atol=1e-5)
    # Rows that are new keep the live logits exactly, everywhere.
    own = order >= 6
    assert torch.allclose(found[own], answer(mixed.select(own)).tensor("logits"), atol=0)
    assert torch.equal(made.knowledge(new).tensor("logits"), answer(new).tensor("logits"))
    assert isinstance(made.guest(), Frozen)


def test_kept_classes_become_dense_with_their_mass() -> None:
    logits = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0)) * 2
    logp = logits.log_softmax(-1)
    top = logp.topk(4, -1)
    rest = logp.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    dense = dense_logits(TopK(top.indices, top.values, rest), 12)
    assert torch.allclose(dense.exp().sum(-1), torch.ones(5, 3), atol=1e-5)
    assert torch.allclose(dense.gather(-1, top.indices), top.values)
    assert torch.equal(dense.argmax(-1), logits.argmax(-1))
    assert float(kl(dense, dense)) == pytest.approx(0.0, abs=1e-7)
    assert torch.isfinite(
        dense_logits(TopK(top.indices, top.values, torch.full_like(rest, -torch.inf)), 12)
    ).all()
    assert dense_logits(logits, 12) is logits


def test_a_method_that_only_reads_is_refused_other_fields(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run")
    made = CapturedTokens(job, live_of(job), Spec())
    with pytest.raises(TeacherError, match="wants 'embedding'"):
        made.bind([Want("embedding")], job.task)
    with pytest.raises(TeacherError, match="not augmented"):
        CapturedTokens(job, live_of(job), Spec(draws=2))
    stored = captured(job, live_of(job)).answers
    with pytest.raises(TeacherError, match=r"leave out teacher\.store"):
        stored.bind([Want("fresh")], job.task)
    job.task.vocabulary.narrow(job.task.vocabulary.size - 1)  # as a smaller model would
    with pytest.raises(TeacherError, match="tokens"):
        stored.bind([Want("logits")], job.task)


def objective_of(folder: Path, **store: Any):
    """A training by its recipe, and its first batch."""
    made = recipe(**store)
    job = open_job(made, folder)
    method = open_method(made)
    teacher = job.teacher()
    objective = method.objective(job, job.student(), teacher)
    teacher.bind(objective.wants, job.task)
    return job, objective, teacher


@pytest.mark.parametrize("form", ["dense", "topk"])
def test_kd_reads_the_store_as_it_reads_the_teacher(tmp_path: Path, form: str) -> None:
    _, objective, live = objective_of(tmp_path / "live")
    job, _, stored = objective_of(tmp_path / "kept", form=form, k=32, dtype="float32")
    batch = whole(job)
    one, two = (
        {name: term.item() for name, term in objective.terms(batch, teacher).items()}
        for teacher in (live, stored)
    )
    assert two["task"] == pytest.approx(one["task"], rel=1e-6)
    assert two["logits"] == pytest.approx(one["logits"], rel=2e-2)


def test_a_killed_capture_goes_on_and_ends_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path / "one")
    live = live_of(job)
    wanted = captured(job, live, path=str(tmp_path / "a")).answers.knowledge(whole(job))["logits"]
    calls = {"n": 0}
    answer = live.knowledge

    def failing(batch: Batch) -> Knowledge:
        calls["n"] += 1
        if calls["n"] == 3:
            raise Interrupted("killed")
        return answer(batch)

    second = job_of(tmp_path / "two")
    live.knowledge = failing  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        captured(second, live, path=str(tmp_path / "b"))
    live.knowledge = answer  # type: ignore[method-assign]
    found = captured(job_of(tmp_path / "three"), live, path=str(tmp_path / "b")).answers
    again = found.knowledge(whole(job))["logits"]
    assert torch.equal(again.ids, wanted.ids)
    assert torch.equal(again.logp, wanted.logp)


def test_a_run_with_a_store_ends_and_is_not_captured_twice(tmp_path: Path) -> None:
    first = run(recipe(form="topk", k=8), folder=tmp_path / "a", progress=False)
    assert any(s["kind"] == "capture" and s["items"] for s in first.summary["stages"])
    second = run(recipe(form="topk", k=8), folder=tmp_path / "b", progress=False)
    assert not any(s.get("items") for s in second.summary["stages"] if s["kind"] == "capture")
    weights = [plain_state(result.artifact.module) for result in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
