"""DAC-KL and the revision of sequence, token and span: reference vectors, properties, runs."""

from __future__ import annotations

import copy
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
from torch import nn

from stillhouse import catalogue
from stillhouse.batch import Batch, read_block
from stillhouse.clock import Clock, Views
from stillhouse.errors import ModelError, RecipeError, StillhouseError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.losses.clipped_kl import (
    band_features,
    clipped_kl,
    keep_set,
    mass_penalty,
    quantile_limits,
)
from stillhouse.losses.logits import kl, total_variation
from stillhouse.losses.spans import DISTANCES, pairs_of, span_product
from stillhouse.opening import open_artifact
from stillhouse.parts.adaptive_replay import AdaptiveThreshold, choose_branch, fresh_share
from stillhouse.parts.band import quantiles
from stillhouse.parts.disputed_token import corrected_prefix, disputed_token
from stillhouse.parts.own_text import Replay
from stillhouse.parts.token_rows import next_tokens, predicting
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.teacher import Knowledge, TopK
from stillhouse.teachers.live import Live

DACKL: Any = catalogue.load("dackl")
DOUBLE = {"rtol": 1e-6, "atol": 1e-8}
FLOAT = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def tensors(case, dtype=torch.float64) -> dict[str, torch.Tensor]:
    found = {k: torch.from_numpy(v) for k, v in case.items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------- reference
def test_baseline_token_losses_are_those_of_distillm(golden):
    case = tensors(golden("dackl").case("distillm"), torch.float32)
    mask = case["labels"] != -100
    teacher = case["logits_t"]
    entropy = masked_mean(-(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1), mask.float())
    forms = {
        "forward_kl": ({"direction": "forward"}, 1.0),
        "reverse_kl": ({"direction": "reverse"}, 0.0),
        "symmetric_kl": ({"direction": "symmetric", "beta": 0.1}, 0.1),
        "js_distance": ({"direction": "js", "beta": 0.1}, 0.0),
        "skewed_forward_kl": ({"direction": "skewed_forward", "skew": 0.1}, 1.0),
        "skewed_reverse_kl": ({"direction": "skewed_reverse", "skew": 0.1}, 0.0),
        "tv_distance": (None, 0.0),
    }
    for name, (settings, entropies) in forms.items():
        student = case["logits_s"].clone().requires_grad_()
        if settings is None:
            found = total_variation(student, teacher, mask=mask)
        else:
            found = kl(student, teacher, mask=mask, **settings)
        # The released forward forms are cross-entropies, above the divergence by the entropy.
        whole = found.detach() + entropies * entropy
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(whole, case[f"{name}_official"], **close)
        (slope,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(slope, case[f"grad_{name}"], **close)
    for name, direction in (("forward_kl", "forward"), ("skewed_forward_kl", "skewed_forward")):
        found = kl(case["logits_s"], teacher, mask=mask, direction=direction, skew=0.1)
        torch.testing.assert_close(found, case[f"{name}_true"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["logrank", "linear"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, DOUBLE), (torch.float32, FLOAT)])
def test_the_clipped_divergence_is_the_reference(golden, scale, dtype, close):
    case = tensors(golden("dackl").case(f"dac_{scale}"), dtype)
    mask, teacher, target = case["mask"].to(dtype), case["logits_t"], case["target"]
    p = teacher.softmax(-1)
    descending = p.sort(-1, descending=True).values
    limits = quantile_limits(descending, case["l"], case["u"], scale=scale)
    torch.testing.assert_close(limits.low, case["t_l"], **close)
    torch.testing.assert_close(limits.high, case["t_u"], **close)
    assert torch.equal(keep_set(p, limits, target), case["keep"])

    def inputs():
        return [case[name].clone().requires_grad_() for name in ("logits_s", "l", "u")]

    def of(given, **settings):
        return clipped_kl(given[0], teacher, target, given[1], given[2], scale=scale, **settings)

    given = inputs()
    found = of(given)
    assert torch.equal(found.size, case["set_size"])
    torch.testing.assert_close(found.loss.detach(), case["token_loss"], **close)
    torch.testing.assert_close(found.mass.detach(), case["kept_mass"], **close)
    loss = masked_mean(found.loss, mask)
    torch.testing.assert_close(loss.detach(), case["loss"], **close)
    for slope, name in zip(torch.autograd.grad(loss, given), ("s", "l", "u"), strict=True):
        torch.testing.assert_close(slope, case[f"grad_{name}"], **close)
    given = inputs()
    penalty = masked_mean(mass_penalty(of(given).mass, 0.9), mask)
    torch.testing.assert_close(penalty.detach(), case["penalty"], **close)
    for slope, name in zip(torch.autograd.grad(penalty, given[1:]), ("l", "u"), strict=True):
        torch.testing.assert_close(slope, case[f"grad_{name}_penalty"], **close)
    raw = masked_mean(of(inputs(), renorm="none").loss, mask)
    torch.testing.assert_close(raw.detach(), case["loss_norenorm"], **close)


@pytest.mark.parametrize("scale", ["logrank", "linear"])
def test_everything_kept_is_the_masked_divergence(golden, scale):
    case = tensors(golden("dackl").case("dac_all_kept"))
    zero = torch.zeros_like(case["mask"], dtype=torch.float64)
    found = clipped_kl(
        case["logits_s"], case["logits_t"], case["target"], zero, zero + 1, scale=scale
    )
    mask = case["mask"].double()
    torch.testing.assert_close(masked_mean(found.loss, mask), case["loss"], **DOUBLE)
    plain = kl(case["logits_s"], case["logits_t"], mask=mask)
    torch.testing.assert_close(plain, case["loss"], **DOUBLE)


def test_features_and_quantiles_of_the_sub_network(golden):
    case = tensors(golden("dackl").case("features"))
    k = (case["features"].shape[-1] - 2) // 2
    found = band_features(case["logits_s"], case["logits_t"], k)
    torch.testing.assert_close(found, case["features"], **DOUBLE)
    torch.testing.assert_close(torch.stack(quantiles(case["ab"]), -1), case["lu"], **DOUBLE)


def test_one_correction_is_the_reference(golden):
    case = tensors(golden("dackl").case("scrg"))
    found = disputed_token(case["logits_s"], case["logits_t"], case["y"], case["mask"])
    assert torch.equal(found.teacher_token, case["teacher_token"])
    assert torch.equal(found.candidates, case["candidates"])
    assert torch.equal(found.position, case["j"])
    mask = case["mask"].bool()
    torch.testing.assert_close(found.divergence[mask], case["d"][mask], **DOUBLE)
    prefix = corrected_prefix(case["y"], case["mask"], found, end=1)
    assert torch.equal(prefix.tokens, case["prefix"])
    disputed = case["j"] >= 0
    assert torch.equal(prefix.stops[disputed], case["stops"][disputed])


def test_the_span_loss_is_the_reference(golden):
    case = tensors(golden("dackl").case("span"))
    assert len(pairs_of(case["intervals"])) == int(case["n_pairs"])
    for distance in DISTANCES:
        student = case["logits_s"].clone().requires_grad_()
        found = span_product(student, case["logits_t"], case["intervals"], distance=distance)
        torch.testing.assert_close(found.detach(), case[f"loss_{distance}"], **DOUBLE)
        (slope,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(slope, case[f"grad_{distance}"], **DOUBLE)


def test_the_total_is_the_reference(golden):
    vectors = golden("dackl")
    case, span, total = (tensors(vectors.case(name)) for name in ("dac_logrank", "span", "total"))
    # An objective is given these logits: the first position is the prompt, nothing is masked
    # but what the reference masks.
    student, mask = case["logits_s"], case["mask"].bool()
    entropy = torch.nn.functional.cross_entropy(student[mask], case["target"][mask])
    torch.testing.assert_close(entropy, total["ce"], **DOUBLE)
    dac = clipped_kl(student, case["logits_t"], case["target"], case["l"], case["u"])
    products = span_product(span["logits_s"], span["logits_t"], span["intervals"])
    for weights, name in (((1, 1, 1), "total_1_1_1"), ((0.5, 2, 3), "total_05_2_3")):
        parts = (entropy, masked_mean(dac.loss, case["mask"].double()), products)
        whole = sum(w * part for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(whole, total[name], **DOUBLE)


def test_the_threshold_and_the_branches_are_the_reference(golden):
    vectors = golden("dackl")
    case = vectors.case("phi")
    for name in (key for key in case if key.startswith("val")):
        number = name.removeprefix("val")
        for start in (0.0, 0.5):
            phi = AdaptiveThreshold(start, margin=0.1)
            phi.observe(float(case[name][0]))
            found = [phi.observe(float(loss)) for loss in case[name][1:]]
            expected = case[f"phi{number}_init{'5' if start else '0'}"]
            assert found == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)
    case = vectors.case("branch")
    names = {"sample": 0, "replay": 1, "truth": 2}
    for r, phi, step, full, rho, branch in zip(
        *(case[k] for k in ("r", "phi", "step", "buffer_full", "rho", "branch")), strict=True
    ):
        assert fresh_share(float(phi), int(step), 100) == pytest.approx(float(rho))
        chosen = choose_branch(float(r), float(phi), int(step), 100, full=bool(full))
        assert names[chosen] == branch


def test_the_buffer_is_the_reference(golden):
    case = golden("dackl").case("buffer")
    capacity = case["contents"].shape[1]
    replay, arrived = Replay(capacity, 3), 0
    for size, content in zip(case["push_sizes"], case["contents"], strict=True):
        numbers = torch.arange(arrived, arrived + int(size))
        arrived += int(size)
        tokens = torch.stack([numbers, numbers, numbers], 1)
        there = torch.ones_like(tokens, dtype=torch.bool)
        rows = {"tokens": tokens, "attention_mask": there, "response_mask": there}
        replay.push(**replay.kept(rows))
        held = replay.last(field="tokens")[:, 0].tolist()
        assert held == [n for n in content.tolist() if n >= 0]
        assert replay.full == (-1 not in content.tolist())


# ----------------------------------------------------------------------------- a small world
def opened(tmp_path: Path, **settings: Any):
    """Job, objective, teacher and a batch of the example, with settings on top."""
    spec = DACKL.example(0)
    spec["settings"] = {**spec["settings"], **settings}
    recipe = load_recipe({**spec, "compare": []})
    job, method = open_job(recipe, tmp_path), open_method(recipe)
    teacher = job.teacher() if method.wants_teacher() else None
    student = job.student()
    objective = method.objective(job, student, teacher)
    if teacher is not None:
        teacher.bind(objective.wants, job.task)
    order = method.order(job)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))[0]
    return job, objective, teacher, read_block(order, rows, Views(0))


def terms_of(objective, batch, teacher, clock=None):
    asked = teacher if objective.wants and not objective.pieces else None
    return objective.terms(batch, asked, clock or Clock())


def widened(batch: Batch, more: int) -> Batch:
    """The rows with further columns of padding, full of a real token."""
    found = Batch(batch)
    for name, fill in (("tokens", 5), ("attention_mask", False), ("response_mask", False)):
        value = batch[name]
        found[name] = torch.cat([value, torch.full_like(value[:, :1], fill).expand(-1, more)], 1)
    return found


GIVEN = {"text": "given", "init_threshold": 0.0}


# ----------------------------------------------------------------------------- properties
@pytest.mark.parametrize("scale", ["logrank", "linear"])
def test_a_student_that_is_its_teacher_has_nothing_to_match(tmp_path, scale):
    _, objective, _, batch = opened(tmp_path, quantile_scale=scale, mass_weight=0.0, **GIVEN)
    twin = copy.deepcopy(objective.student)
    teacher = Live(twin)
    teacher.bind(objective.wants, objective.task)
    objective.eval()
    with torch.no_grad():
        objective.band.outer.bias.copy_(torch.tensor([-0.5, 0.7]))
    terms = terms_of(objective, batch, teacher)
    assert abs(terms["dac"].item()) < 1e-6
    assert abs(terms["span"].item()) < 1e-12
    assert terms["sft"] > 0.1


def test_gradients_reach_student_and_band_and_no_teacher(tmp_path):
    _, objective, teacher, batch = opened(tmp_path, **GIVEN)
    terms = terms_of(objective, batch, teacher)
    terms["dac"].backward()
    assert objective.band.outer.weight.grad.abs().sum() > 0
    assert objective.band.outer.bias.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.guest().module.parameters())
    reached = [p.grad is not None for p in objective.student.parameters()]
    assert all(reached)


def test_the_band_learns_through_its_gates_alone(tmp_path):
    """Features are detached: to the student the quantiles are numbers."""
    _, objective, teacher, batch = opened(tmp_path, **GIVEN)
    logits = teacher.net(batch["tokens"])["logits"].detach()[0]
    ours = (0.5 * logits.flip(-1)).requires_grad_()
    target = next_tokens(batch["tokens"])[0]
    lower, upper = objective.quantiles(ours, logits)
    assert torch.autograd.grad(lower.sum() + upper.sum(), ours, allow_unused=True) == (None,)
    learnt = objective.token_loss(ours, logits, target).sum()
    fixed = clipped_kl(ours, logits, target, lower.detach(), upper.detach()).loss.sum()
    slopes = [torch.autograd.grad(x, ours)[0] for x in (learnt, fixed)]
    torch.testing.assert_close(*slopes)


def test_padding_changes_no_loss(tmp_path):
    _, objective, teacher, batch = opened(tmp_path, **GIVEN)
    objective.eval()
    narrow, wide = (terms_of(objective, rows, teacher) for rows in (batch, widened(batch, 3)))
    for name, value in narrow.items():
        torch.testing.assert_close(wide[name], value, rtol=1e-5, atol=1e-7)


def test_terms_follow_their_weights_and_zero_is_not_computed(tmp_path):
    weights = {"w_sft": 0.5, "w_dac": 2.0, "w_span": 3.0}
    found = {}
    for name, settings in (("plain", {}), ("weighted", weights)):
        _, objective, teacher, batch = opened(tmp_path / name, **GIVEN, **settings)
        objective.eval()
        found[name] = terms_of(objective, batch, teacher)
    for weight, name in zip(weights.values(), ("sft", "dac", "span"), strict=True):
        torch.testing.assert_close(found["weighted"][name], weight * found["plain"][name])
    _, objective, _, batch = opened(tmp_path / "sft", **DACKL.variants["sft"].set)
    assert list(terms_of(objective, batch, None)) == ["sft"]
    assert objective.wants == ()
    _, objective, teacher, batch = opened(tmp_path / "kd", **DACKL.variants["kd"].set)
    assert list(terms_of(objective, batch, teacher)) == ["sft", "dac"]
    assert objective.band is None


@pytest.mark.parametrize("text", ["given", "own"])
@pytest.mark.parametrize("divergence", ["dac", "forward", "total-variation"])
def test_logits_made_in_pieces_give_the_same_step(tmp_path, text, divergence):
    """A vocabulary is never held for more than `chunk` tokens; values and slopes are equal."""
    results = []
    for chunk in (0, 5):
        _, objective, teacher, batch = opened(
            tmp_path / str(chunk), chunk=chunk, text=text, divergence=divergence
        )
        objective.eval()
        terms = terms_of(objective, batch, teacher)
        sum(terms.values()).backward()
        slopes = [p.grad for p in objective.parameters() if p.grad is not None]
        results.append([*terms.values(), *slopes])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_micro_batches_give_the_step_of_the_whole(tmp_path):
    _, objective, teacher, batch = opened(tmp_path, init_threshold=1.0)
    objective.eval()
    with torch.no_grad():
        batch = objective.prepare(batch, Clock())
    assert "truth" in batch

    def slopes(pieces):
        counts = [{k: float(v) for k, v in objective.count(piece).items()} for piece in pieces]
        whole = {k: sum(c[k] for c in counts) for k in counts[0]}
        objective.zero_grad()
        for piece, count in zip(pieces, counts, strict=True):
            terms = objective(piece, teacher.knowledge(piece), Clock())
            loss = sum(v * (count[k] / whole[k]) for k, v in terms.items() if count[k])
            loss.backward()
        return [p.grad.clone() for p in objective.parameters()]

    for one, other in zip(slopes([batch]), slopes(batch.split(3)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------- own text
class Fixed(nn.Module):
    """Logits by position, whatever is read: the token at place i + 1 is `said[i]`."""

    def __init__(self, said: list[int], classes: int, sure: float = 30.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.said, self.classes, self.sure = torch.tensor(said), classes, sure

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=False):  # fmt: skip
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if position_ids is not None:
            places = position_ids
        said = self.said[places.clamp_max(len(self.said) - 1)]
        logits = self.sure * nn.functional.one_hot(said, self.classes).float()
        return {"logits": logits + 0 * self.weight, "past_key_values": past_key_values}


def fixed_world(tmp_path, said: list[int], teacher_said: list[int]):
    """Student and teacher that say given tokens after a prompt of two."""
    job, objective, _, _ = opened(tmp_path, text="own", max_new=6)
    task = job.task
    classes = task.tokens.size
    student, teacher = (task.net(Fixed([0, *tokens], classes)) for tokens in (said, teacher_said))
    config = objective.config
    made = type(objective)(student, task, config, teacher=Live(teacher), band=objective.band)
    tokens = torch.tensor([[7, 8, 9, task.tokens.end], [7, 9, 9, task.tokens.end]])
    there = torch.ones_like(tokens, dtype=torch.bool)
    answer = there & (torch.arange(4) >= 2)
    batch = Batch(id=torch.arange(2), tokens=tokens, attention_mask=there, response_mask=answer)
    return made, batch, task


def test_one_token_is_the_teachers_and_the_student_goes_on(tmp_path):
    said, end = [4, 5, 6, 10, 11, 12], 1
    objective, batch, task = fixed_world(tmp_path / "a", said, [4, 5, 6, 8, 11, 12])
    assert task.tokens.end == end
    with torch.no_grad():
        rows, corrected = objective._write(batch, Clock())
    assert corrected == 2
    assert rows["tokens"].tolist() == [
        [7, 8, 4, 5, 6, 8, 11, 12], [7, 9, 4, 5, 6, 8, 11, 12]
    ]  # fmt: skip
    assert rows["response_mask"].sum(1).tolist() == [6, 6]
    objective, batch, _ = fixed_world(tmp_path / "b", said, said)
    with torch.no_grad():
        rows, corrected = objective._write(batch, Clock())
    assert corrected == 0
    assert rows["tokens"][:, 2:].tolist() == [said, said]


def test_a_text_ends_where_the_teacher_ends_it(tmp_path):
    objective, batch, task = fixed_world(tmp_path, [4, 5, 6, 10, 11, 12], [4, 5, 1, 10, 11, 12])
    with torch.no_grad():
        rows, _ = objective._write(batch, Clock())
    assert rows["tokens"].tolist() == [[7, 8, 4, 5, 1], [7, 9, 4, 5, 1]]
    assert rows["response_mask"].sum(1).tolist() == [3, 3]
    assert task.tokens.text(rows["tokens"][0], rows["response_mask"][0])


def test_only_one_token_is_the_teachers(tmp_path):
    """The rest is the student's, however much the teacher disagrees."""
    objective, batch, _ = fixed_world(tmp_path, [4, 5, 6, 10, 11, 12], [9, 9, 9, 9, 9, 9])
    with torch.no_grad():
        rows, _ = objective._write(batch, Clock())
    for row in rows["tokens"][:, 2:].tolist():
        assert row.count(9) == 1


def test_own_text_is_learned_from_and_given_text_keeps_its_loss(tmp_path):
    """The cross-entropy is never that of generated text."""
    _, objective, teacher, batch = opened(tmp_path, init_threshold=1.0)
    objective.eval()
    clock = Clock()
    terms = terms_of(objective, batch, teacher, clock)
    expected = objective.task.loss(objective.student(batch["tokens"]), batch)["task"]
    torch.testing.assert_close(terms["sft"], expected)
    with torch.no_grad():
        prepared = objective.prepare(batch, clock)
    assert torch.equal(prepared["truth"]["tokens"], batch["tokens"])
    width = min(prepared["tokens"].shape[1], batch["tokens"].shape[1])
    assert not torch.equal(prepared["tokens"][:, :width], batch["tokens"][:, :width])
    for row in range(batch.size):
        prompt = (batch["attention_mask"] & ~batch["response_mask"])[row]
        count = int(prompt.sum())
        assert torch.equal(prepared["tokens"][row, :count], batch["tokens"][row, :count])
        assert not prepared["response_mask"][row, :count].any()
    again = objective.prepare(batch, clock)
    assert torch.equal(again["tokens"], prepared["tokens"])


def test_sampling_leaves_the_student_in_its_mode(tmp_path):
    _, objective, teacher, batch = opened(tmp_path, init_threshold=1.0)
    objective.train()
    terms_of(objective, batch, teacher)
    assert all(module.training for module in objective.student.modules())


def test_replayed_text_is_what_was_kept(tmp_path):
    _, objective, _, batch = opened(tmp_path, init_threshold=1.0, capacity=4)
    objective.eval()
    with torch.no_grad():
        first = objective.prepare(batch, Clock())
    for part in objective.parts():
        part.settle(True)
    assert objective.replay.full
    # at the end of a training nothing is fresh any more
    with torch.no_grad():
        second = objective.prepare(batch, Clock(step=99, total=100))
    kept = {tuple(row[m].tolist()) for row, m in zip(first["tokens"], first["attention_mask"])}
    drawn = {tuple(row[m].tolist()) for row, m in zip(second["tokens"], second["attention_mask"])}
    assert drawn == kept
    assert torch.equal(
        second["response_mask"].sum(1).sort().values, first["response_mask"].sum(1).sort().values
    )
    assert objective.texts.sum(0).tolist()[:3] == [1, 1, 0]


def test_pairs_lie_within_phrases_of_the_response(tmp_path):
    _, objective, _, batch = opened(tmp_path, **GIVEN)
    tokens = objective.task.tokens
    found = objective.pairs(batch)
    for row in range(batch.size):
        for k in found[row].nonzero()[:, 0].tolist():
            assert predicting(batch["response_mask"])[row, k : k + 2].all()
        ids = batch["tokens"][row][batch["response_mask"][row]]
        text = tokens.text(ids)
        spans = [text[a:b].split() for a, b in objective.chunker(text)]
        assert int(found[row].sum()) == sum(len(words) - 1 for words in spans)
    everything = type(objective)(
        objective.student, objective.task, objective.config, teacher=None,
        chunker=lambda text: [(0, len(text))],
    ).pairs(batch)  # fmt: skip
    # one pair less than tokens, the end token apart
    expected = batch["response_mask"].sum(1) - 2
    assert torch.equal(everything.sum(1), expected)


# ----------------------------------------------------------------------------- settings
@pytest.mark.parametrize("variant", sorted(DACKL.variants))
def test_every_variant_runs(tmp_path, variant):
    spec = DACKL.example(0)
    chosen = DACKL.variants[variant].set
    spec["settings"] = {**spec["settings"], "top_k_classes": 3, **chosen}
    spec["budget"]["steps"] = 2
    result = run(load_recipe({**spec, "compare": []}), folder=tmp_path, progress=False)
    assert math.isfinite(result.artifact.meta["threshold"])
    figures = next(iter(next(iter(result.sides.values())).values()))
    assert math.isfinite(figures["loss"])
    if variant == "fixed-top-k":
        tokens, _, size, _ = (sum(column) for column in zip(*result.artifact.meta["bands"]))
        assert 3 <= size / tokens <= 4  # and the target, where it is not among them


def test_settings_out_of_range_are_told():
    settings = {"w_sft": 0, "w_dac": 0, "w_span": 0}
    with pytest.raises(RecipeError, match="nothing would be learnt"):
        open_method(load_recipe({**DACKL.example(0), "settings": settings}))
    with pytest.raises(RecipeError, match="init_threshold"):
        open_method(load_recipe({**DACKL.example(0), "settings": {"init_threshold": 1.5}}))


def test_a_store_alone_cannot_speak_of_text_just_written(tmp_path):
    class Store:
        provides = frozenset({"logits"})

        def guest(self):
            raise TeacherError("the store is no module: give the teacher as a model")

    job, objective, _, _ = opened(tmp_path)
    with pytest.raises(TeacherError, match="no module"):
        type(objective)(job.student("other"), job.task, objective.config, teacher=Store())
    given = type(objective.config)(**{**objective.config.model_dump(), **GIVEN})
    made = type(objective)(job.student("third"), job.task, given, teacher=Store())
    assert [want.field for want in made.wants] == ["logits"]


def kept_of(logits: torch.Tensor, k: int) -> TopK:
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(k, -1)
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    return TopK(ids, values, rest)


@pytest.mark.parametrize("chunk", [0, 4])
def test_kept_classes_serve_where_the_band_lies_within_them(tmp_path, chunk):
    _, objective, teacher, batch = opened(tmp_path, k=4, chunk=chunk, **GIVEN)
    with torch.no_grad():  # a narrow band: about the root of the vocabulary
        objective.band.outer.bias.copy_(torch.tensor([0.0, 4.0]))
    objective.eval()
    batch = objective.prepare(batch, Clock())
    logits = 3 * teacher.net(batch["tokens"])["logits"].detach()
    objective.pieces = False  # as with a store
    dense = objective(batch, Knowledge({"logits": logits}), Clock())
    stored = objective(batch, Knowledge({"logits": kept_of(logits, logits.shape[-1] - 8)}), Clock())
    torch.testing.assert_close(stored["dac"], dense["dac"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(stored["span"], dense["span"], rtol=1e-2, atol=1e-5)
    with pytest.raises(ModelError, match="set k to 2"):
        objective(batch, Knowledge({"logits": kept_of(logits, 2)}), Clock())


# ----------------------------------------------------------------------------- real classes
def small_llama(vocabulary: int, layers: int = 1, width: int = 16, seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def with_models(tmp_path: Path, student, teacher, **changes: Any):
    spec = {**DACKL.example(0), "compare": [], **changes}
    spec["student"] = {"model": "given"}
    spec["teacher"] = {"model": "given"}
    spec["budget"] = {**spec["budget"], "steps": 3}
    given = Given(student=student, teacher=teacher)
    return run(load_recipe(spec), folder=tmp_path, given=given, progress=False)


def words_of_the_example(tmp_path: Path) -> int:
    return opened(tmp_path / "words", **GIVEN)[0].task.tokens.size


@pytest.mark.parametrize("chunk", [0, 6])
def test_llamas_with_heads_padded_differently_are_sliced_to_what_both_have(tmp_path, chunk):
    size = words_of_the_example(tmp_path)
    student, teacher = small_llama(size + 3), small_llama(size + 12, layers=2, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    settings = {**DACKL.example(0)["settings"], "chunk": chunk}
    result = with_models(tmp_path / "run", student, teacher, settings=settings)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    (kind,) = {type(m).__name__ for m in [result.artifact.module.module]}
    assert kind == "LlamaForCausalLM"
    assert sum(row[4] for row in result.artifact.meta["texts"]) > 0


def test_a_vocabulary_too_small_for_the_data_is_refused(tmp_path):
    size = words_of_the_example(tmp_path)
    student, teacher = small_llama(size), small_llama(size - 6)
    with pytest.raises(ModelError, match="made for another tokenizer"):
        with_models(tmp_path / "run", student, teacher)
    assert not list((tmp_path / "run").rglob("step-*"))


def test_models_of_another_tokenizer_are_refused(tmp_path):
    """Two artifacts of other words: the ids of the teacher mean other strings."""
    other = DACKL.example(0)
    other["data"] = {"name": "generated_prompts", "options": {"prompts": 24, "least": 2}}
    run(load_recipe({**other, "compare": []}), folder=tmp_path / "other", progress=False)
    spec = {**DACKL.example(0), "compare": [], "teacher": {"artifact": str(tmp_path / "other")}}
    with pytest.raises(StillhouseError, match=r"another tokenizer|token ids"):
        run(load_recipe(spec), folder=tmp_path / "run", progress=False)


def test_only_the_adapters_of_a_lora_student_are_trained(tmp_path):
    pytest.importorskip("peft")
    size = words_of_the_example(tmp_path)
    folder = tmp_path / "llama"
    small_llama(size).save_pretrained(folder)
    spec = {**DACKL.example(0), "compare": []}
    spec["student"] = {
        "model": f"hf:{folder}", "weights": "pretrained",
        "options": {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}},
    }  # fmt: skip
    recipe = load_recipe(spec)
    job, method = open_job(recipe, tmp_path / "job"), open_method(recipe)
    teacher = job.teacher()
    objective = method.objective(job, job.student(), teacher)
    teacher.bind(objective.wants, job.task)
    trained = [n for n, p in objective.named_parameters() if p.requires_grad]
    assert all(n.startswith("band.") or "lora_" in n for n in trained)
    result = run(recipe, folder=tmp_path / "run", progress=False)
    weights = result.artifact.module.module.state_dict()
    start = small_llama(size).state_dict()
    moved = {k for k in start if not torch.equal(start[k], weights[k])}
    assert moved == {k for k in start if "q_proj" in k or "v_proj" in k}


def test_a_store_of_given_text_beside_the_model_gives_the_same_training(tmp_path, monkeypatch):
    """A cascade: given text from the store, text just written from the model."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    results = []
    for store in (None, {"form": "dense", "dtype": "float32"}):
        spec = {**DACKL.example(0), "compare": []}
        spec["settings"] = {**spec["settings"], "init_threshold": 0.5}
        spec["budget"] = {**spec["budget"], "steps": 8}
        if store:
            spec["teacher"] = {**spec["teacher"], "store": store}
        result = run(load_recipe(spec), folder=tmp_path / str(bool(store)), progress=False)
        results.append(result.artifact)
    texts = [sum(column) for column in zip(*results[0].meta["texts"])]
    assert texts[1] > 0
    assert texts[0] - texts[1] - texts[2] > 0  # steps on given text
    one, other = (a.module.state_dict() for a in results)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- runs
def test_killed_and_started_again_it_ends_bit_for_bit(tmp_path, monkeypatch):
    """Buffer, threshold and sub-network included."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    spec = DACKL.example(0)
    spec["settings"].update(init_threshold=0.7, capacity=8)
    spec["budget"].update(steps=40)
    spec.update(compare=[], output={"checkpoint_minutes": 0.0001})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec))
    whole = run(load_recipe(spec), folder=tmp_path / "whole", progress=False).artifact
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "stillhouse", "run", str(path), "--folder", str(cut)],
        env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 240
    states: list[Path] = []
    while not states and process.poll() is None and time.monotonic() < until:
        states = [s for s in (cut / "stages" / "student").glob("step-*") if _step(s) >= 12]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states
    assert not (cut / "artifact").exists()
    again = run(load_recipe(spec), folder=cut, progress=False).artifact
    one, other = (artifact.module.state_dict() for artifact in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    for name in ("texts", "bands", "threshold", "corrections"):
        assert whole.meta[name] == again.meta[name]
    assert sum(row[2] for row in whole.meta["texts"]) > 0  # some text was replayed


def _step(state: Path) -> int:
    return int("".join(c for c in state.name if c.isdigit()) or 0)


def test_the_state_holds_buffer_and_threshold_and_no_teacher(tmp_path):
    _, objective, _, batch = opened(tmp_path, init_threshold=1.0)
    with torch.no_grad():
        objective.prepare(batch, Clock())
    for part in objective.parts():
        part.settle(True)
    objective.after_validation({"loss": 1.0}, Clock())
    state = objective.state_dict()
    assert int(state["replay.filled"]) == batch.size
    assert float(state["phi.previous"]) == 1.0
    assert state["replay.rows_tokens"].dtype == torch.int64
    held = sum(p.numel() for p in objective.parameters())
    own = sum(p.numel() for part in (objective.student, objective.band) for p in part.parameters())
    assert held == own
    assert not any("guest" in key or "teacher" in key for key in state)


def test_the_artifact_is_the_plain_student(tmp_path):
    result = run(load_recipe({**DACKL.example(0), "compare": []}), folder=tmp_path, progress=False)
    reopened = open_artifact(tmp_path)
    said = reopened.predict(["thing[comet], colour[red], place[valley]"])
    assert len(said) == 1
    keys = reopened.predictor.module.state_dict()
    assert not any("band" in key or "replay" in key for key in keys)
    assert "corrections" in result.artifact.meta
