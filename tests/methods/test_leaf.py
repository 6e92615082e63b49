"""LEAF: the reference vectors, the sheet's properties, teachers of every kind, real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse as still
from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.clock import Clock
from stillhouse.data.cranfield import first_of_each, sent_texts
from stillhouse.errors import ModelError, RecipeError, TeacherError
from stillhouse.exporting import export_artifact
from stillhouse.launch import open_job, run
from stillhouse.losses.contrastive import infonce
from stillhouse.losses.features import vector_distance
from stillhouse.losses.relations import similarity_matrix
from stillhouse.methods.retrieval.leaf import Leaf, LeafObjective
from stillhouse.metrics.ranking import ndcg, order_of
from stillhouse.models.sentence_embedder import SentenceEmbedder
from stillhouse.models.sentence_transformer import SentenceTransformerNet
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.pooling import masked_mean
from stillhouse.parts.schedule import cycles
from stillhouse.parts.vector_codes import ByteRange, hamming, rescored, signs, truncate
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.stages.judge_vectors import judge_vectors
from stillhouse.teacher import Knowledge, Want
from stillhouse.teachers.text_vectors import TextVectors, known_vectors

LOSSES = ("l2sq", "l2", "mse", "cos")


def double(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array).double()


def close(found: Any, wanted: Any, rel: float = 1e-9) -> None:
    found, wanted = (torch.as_tensor(v, dtype=torch.float64) for v in (found, wanted))
    assert found.shape == wanted.shape
    scale = max(1e-12, float(wanted.abs().max()))
    assert float((found - wanted).abs().max()) <= rel * scale


# ---- reference vectors -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_four_losses(golden, dtype):
    g = golden("leaf").case("loss_unit")
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    teacher = torch.as_tensor(g["teacher"]).to(dtype).requires_grad_()
    close(F.normalize(torch.as_tensor(g["student_raw"]).to(dtype), dim=-1), g["student_unit"], rel)
    for loss in LOSSES:
        raw = torch.as_tensor(g["student_raw"]).to(dtype).requires_grad_()
        value = objective_value(F.normalize(raw, dim=-1), teacher, loss)
        close(value.detach(), g[loss], rel)
        value.backward()
        close(raw.grad, g[f"grad_{loss}"], rel * 3)
    assert teacher.grad is None


def objective_value(student: Tensor, teacher: Tensor, loss: str, width: int | None = None):
    """The term of the objective for vectors as they are."""
    made = LeafObjective(Net(nn.Identity(), answer="embedding"), loss, width)
    batch = Batch(x=student, id=torch.arange(len(student)))
    return made(batch, Knowledge({"embedding": teacher}), Clock())["embed"]


def test_a_teacher_of_inner_products_is_not_normalised(golden):
    g = golden("leaf").case("loss_dot_teacher")
    raw = double(g["student_raw"]).requires_grad_()
    value = objective_value(raw, double(g["teacher"]), "l2sq")
    close(value.detach(), g["l2sq"])
    value.backward()
    close(raw.grad, g["grad_l2sq"])
    close(objective_value(raw, double(g["teacher"]), "l2").detach(), g["l2"])


def test_a_narrower_student_learns_the_first_coordinates(golden):
    g = golden("leaf").case("prefix_teacher")
    student = double(g["student"]).requires_grad_()
    value = objective_value(student, double(g["teacher"]), "cos", student.shape[1])
    close(value.detach(), g["loss"])
    value.backward()
    close(student.grad, g["grad_student"])


@pytest.mark.parametrize(("case", "tau"), [("inbatch_tau0p07", 0.07), ("inbatch_tau0p2", 0.2)])
def test_contrast_in_the_batch(golden, case, tau):
    g = golden("leaf").case(case)
    student = double(g["student"]).requires_grad_()
    value = infonce(student, double(g["teacher"]), temperature=tau)
    close(value.detach(), g["loss"])
    value.backward()
    close(student.grad, g["grad_student"])


def test_pooling_head_and_loss(golden):
    """Property 5: padded positions hold 1000 and have neither effect nor gradient."""
    g = golden("leaf").case("student_head")
    hidden, weight, bias = (double(g[k]).requires_grad_() for k in ("hidden", "W", "b"))
    pooled = masked_mean(hidden, torch.as_tensor(g["mask"]))
    vectors = F.normalize(F.linear(pooled, weight, bias), dim=-1)
    value = objective_value(vectors, double(g["teacher"]), "l2sq")
    close(pooled.detach(), g["pooled"])
    close(vectors.detach(), g["embedding"])
    close(value.detach(), g["loss"])
    value.backward()
    for name, leaf in (("hidden", hidden), ("W", weight), ("b", bias)):
        close(leaf.grad, g[f"grad_{name}"])
    padded = torch.cat([hidden, torch.full_like(hidden[:, :2], 1e3)], 1)
    mask = torch.cat(
        [torch.as_tensor(g["mask"]), torch.zeros(len(hidden), 2, dtype=torch.int32)], 1
    )
    close(masked_mean(padded, mask).detach(), g["pooled"])


def test_the_learning_rate_of_every_step(golden):
    """Property 6, through the schedule that the training gets."""
    g = golden("leaf").case("lr_3x10x4")
    made = open_method(load_recipe(Leaf.example()))
    schedule = made.training(None)["schedule"]
    rate = [1e-4 * schedule(Clock(step=i, total=120)) for i in range(120)]
    close(rate, g["lr"])
    for start in (0, 40, 80):
        assert rate[start] == 1e-4
        assert rate[start + 39] == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize(("count", "total"), [(3, 7), (3, 100), (4, 10), (1, 5), (3, 2), (5, 5)])
def test_cycles_share_out_any_number_of_steps(count, total):
    schedule = cycles(count, 0.25)
    rate = [schedule(Clock(step=i, total=total)) for i in range(total)]
    tops = [i for i, value in enumerate(rate) if value == 1.0]
    assert tops[0] == 0
    assert len(tops) == min(count, total)
    lengths = np.diff([*tops, total])
    assert lengths.max() - lengths.min() <= 1
    for start, length in zip(tops, lengths, strict=True):
        if length > 1:
            assert rate[start + length - 1] == 0.25
            assert np.allclose(np.diff(rate[start : start + length]), -0.75 / (length - 1))


def scores(queries: Tensor, documents: Tensor) -> Tensor:
    return queries @ documents.T


def each_ndcg(queries: Tensor, documents: Tensor, rel: Tensor) -> Tensor:
    return ndcg(rel.gather(1, order_of(scores(queries, documents))), rel, 10)


def test_asymmetric_scores_see_a_rotation_and_relations_do_not(golden):
    """Property 4."""
    g = golden("leaf").case("asymmetric")
    names = ("teacher_docs", "teacher_queries", "student_docs", "student_queries")
    td, tq, sd, sq = (double(g[k]) for k in names)
    rel, turn = torch.as_tensor(g["rel"]), double(g["rotation"])
    close(each_ndcg(tq, td, rel), g["ndcg10_teacher"])
    close(each_ndcg(sq, sd, rel), g["ndcg10_standard"])
    close(each_ndcg(sq, td, rel), g["ndcg10_asymmetric"])
    close(each_ndcg(sq @ turn, sd @ turn, rel), g["ndcg10_standard_rotated"])
    close(each_ndcg(sq @ turn, td, rel), g["ndcg10_asymmetric_rotated"])
    for docs, end in ((sd, ""), (sd @ turn, "_rotated")):
        close(objective_value(docs, td, "l2sq"), g[f"l2sq_docs{end}"])
        close(similarity_matrix(docs, td, normalised=True), g[f"relational_docs{end}"])
    assert float(g["l2sq_docs_rotated"]) > float(g["l2sq_docs"])


def test_truncation(golden):
    """Property 8."""
    g = golden("leaf").case("mrl")
    docs, queries = double(g["docs"]), double(g["queries"])
    for name in [k for k in g if k.startswith("scores_m")]:
        width = int(name.removeprefix("scores_m"))
        short = truncate(docs, width)
        assert torch.allclose(short.norm(dim=-1), torch.ones(len(docs), dtype=torch.float64))
        close(truncate(queries, width) @ short.T, g[name])
    close(truncate(F.normalize(docs, dim=-1), docs.shape[1]), F.normalize(docs, dim=-1))
    with pytest.raises(ModelError, match="17 coordinates cannot be kept of vectors that have 16"):
        truncate(docs, docs.shape[1] + 1)


def test_bytes_are_rounded_and_clipped(golden):
    """Property 9."""
    g = golden("leaf").case("int8")
    span = ByteRange.of(double(g["calibration_docs"]))
    x, inside = double(g["x"]), torch.as_tensor(g["inside"]).bool()
    close(span.step, g["step"])
    codes, wanted = span.codes(x).long(), torch.as_tensor(g["codes"]).long()
    place = (x - span.low) / span.step
    unclear = ((place - place.floor()) - 0.5).abs() < 1e-6
    assert torch.equal(codes[~unclear], wanted[~unclear])
    close(span.values(wanted.to(torch.uint8)), g["dequantised"])
    error = (span.values(span.codes(x)) - x).abs()
    assert bool((error[inside] <= (span.step / 2 + 1e-12).expand_as(x)[inside]).all())
    assert not bool(inside.all())
    flat = ByteRange.of(torch.ones(3, 2))
    assert torch.equal(flat.values(flat.codes(torch.ones(3, 2))), torch.ones(3, 2))


def test_bits(golden):
    g = golden("leaf").case("binary")
    docs, queries = double(g["docs"]), double(g["queries"])
    assert torch.equal(hamming(signs(queries), signs(docs)), torch.as_tensor(g["hamming"]).long())
    close(rescored(queries, signs(docs)), g["rescored"])
    whole = hamming(signs(queries), signs(-queries)).diagonal()
    assert whole.tolist() == [docs.shape[1]] * len(queries)


class Counting:
    """A black box: texts to vectors by their letters, and what it was asked."""

    def __init__(self, width: int = 12, unit: bool = True) -> None:
        self.asked: list[str] = []
        self.width, self.unit = width, unit

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        made = np.stack([self.vector(text) for text in texts])
        return made / np.linalg.norm(made, axis=1, keepdims=True) if self.unit else made

    def vector(self, text: str) -> np.ndarray:
        counts = np.zeros((128, self.width))
        for letter in text:
            counts[ord(letter) % 128] += np.random.default_rng(ord(letter)).normal(size=self.width)
        return counts.sum(0) + 0.01


def test_what_is_sent_and_how_often(golden, tmp_path):
    """Property 10, with the reference texts: once per distinct text, in order."""
    vectors = golden("leaf")
    cases = vectors.json["cache_keys"]
    vectors.count("cache_keys")
    texts, kinds = ([item[k] for item in cases["items"]] for k in ("text", "kind"))
    sent = sent_texts(texts, kinds, cases["prefix"])
    assert sent == cases["sent"]
    assert [sent[i] for i in first_of_each(sent)] == cases["unique_sent"]
    teacher = Counting()
    split = TensorSource({"text": sent})
    trained(tmp_path, teacher=named(teacher), splits=Splits({"train": split}, "texts"))
    assert teacher.asked == cases["unique_sent"]
    assert len(teacher.asked) == cases["teacher_calls"]


# ---- trainings of tiny real classes ----------------------------------------------------------

LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
LETTERS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
PROSE = {"name": "generated_prose", "options": {"texts": 40, "sentences": 1, "pairs": True}}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> str:
    """A tiny BERT with its tokenizer, as a hub folder."""
    return str(encoder_at(tmp_path_factory.mktemp("models") / "encoder"))


def encoder_at(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizerFast(vocab={w: n for n, w in enumerate(LETTERS)})
    config = transformers.BertConfig(
        vocab_size=len(LETTERS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def named(function: Any, name: str = "letters") -> TextVectors:
    return TextVectors(function, fingerprint=name, name=name)


class Bag(nn.Module):
    """A student of texts without any library: hashed letters, a linear layer."""

    reads = "text"

    def __init__(self, width: int = 12, normalise: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.letters, self.out = nn.Embedding(128, 16), nn.Linear(16, width)
        self.normalise = normalise

    def forward(self, texts: list[str]) -> Tensor:
        rows = [self.letters(torch.tensor([ord(c) % 128 for c in t or " "])).mean(0) for t in texts]
        vectors = self.out(torch.stack(rows))
        return F.normalize(vectors, dim=-1) if self.normalise else vectors


def trained(
    folder: Path,
    *,
    teacher: Any,
    splits: Splits | None = None,
    student: nn.Module | None = None,
    **changes: Any,
):
    """The artifact of a short training of handed-in objects."""
    spec = {
        "method": "leaf",
        "data": PROSE,
        "teacher": None,
        "student": {"model": "given"},
        "budget": {"steps": 6, "batch": 4, "lr": 0.02},
        "settings": {"widths": [4, 8]},
        "compare": [],
        **changes,
    }
    chosen = load_recipe({k: v for k, v in spec.items() if v is not None})
    given = Given(student=student or Bag(), teacher=teacher, splits=splits)
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job), job
    finally:
        job.log.close()


def state(found: Any) -> dict[str, Tensor]:
    return plain_state(found[0].module)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


def embedder(encoder: str, **options: Any) -> dict[str, Any]:
    return {
        "model": "stillhouse:sentence_embedder",
        "options": {"encoder": encoder, "length": 64, **options},
    }


def text_recipe(encoder: str, teacher: dict[str, Any], **changes: Any):
    student = {"width": 16, "pretrained": False, "config": {"hidden_dropout_prob": 0.0}}
    return load_recipe(
        {
            "method": "leaf",
            "data": PROSE,
            "teacher": teacher,
            "student": embedder(encoder, **student),
            "settings": {"widths": [4, 8, 16]},
            "budget": {"steps": 100, "batch": 8, "lr": 0.01, "optimizer": "sgd"},
            "compare": [],
            **changes,
        }
    )


def test_module_store_array_function_and_endpoint_give_one_student(tiny_bert, tmp_path):
    """100 steps; the endpoint is asked once about each text, as its own log says."""
    live = embedder(tiny_bert)
    log = tmp_path / "server.jsonl"
    served = {"endpoint": {"serve": {"encoder": tiny_bert, "options": {"log": str(log)}}}}
    found = {}
    for name, teacher in {
        "module": live,
        "store": {**live, "store": {"dtype": "float32", "path": str(tmp_path / "s")}},
        "endpoint": served,
    }.items():
        result = run(text_recipe(tiny_bert, teacher), folder=tmp_path / name, progress=False)
        found[name] = plain_state(result.artifact.module)
        assert {"spearman", "asymmetric_spearman", "teacher_spearman"} <= set(
            result.sides["distilled"]["0"]
        )
    sent = requests(log)
    assert len(sent) == 2  # 40 texts to learn from and 20 to judge on, in one request each
    assert all(entry["times"] == 1 and entry["status"] == 200 for entry in sent)
    module = SentenceEmbedder(tiny_bert, length=64).eval()

    def encode(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return module(texts)

    recipe = text_recipe(tiny_bert, live)
    train = open_job(recipe, tmp_path / "look").splits["train"].views["text"]
    memory = tmp_path / "vectors.npy"
    np.save(memory, encode(train).numpy())
    mapped = known_vectors(train, np.load(memory, mmap_mode="r"))
    for name, teacher in {"function": named(encode), "array": mapped}.items():
        changed = recipe.model_copy(update={"teacher": None})
        job = open_job(changed, tmp_path / name, given=Given(teacher=teacher))
        found[name] = plain_state(open_method(changed).run(job).module)
        job.log.close()
    for name, other in found.items():
        assert apart(found["module"], other) < 1e-4, name


def requests(log: Path) -> list[dict[str, Any]]:
    """The server's own record of what it was sent."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_failing_endpoint_is_asked_again_only_where_it_failed(tiny_bert, tmp_path):
    log = tmp_path / "server.jsonl"
    serve = {"encoder": tiny_bert, "fail": 0.4, "options": {"log": str(log), "seed": 3}}
    teacher = {"endpoint": {"serve": serve}, "store": {"dtype": "float32", "batch": 8}}
    recipe = text_recipe(tiny_bert, teacher, budget={"steps": 2, "batch": 8})
    run(recipe, folder=tmp_path / "one", progress=False)
    sent = requests(log)
    assert len(sent) > len({entry["key"] for entry in sent})
    for entry in sent:
        again = [e for e in sent if e["key"] == entry["key"] and not e["fault"]]
        assert len(again) == 1
    # another run, another seed: everything is known
    run(recipe.model_copy(update={"seed": 1}), folder=tmp_path / "two", progress=False)
    assert requests(log) == sent


def test_a_killed_capture_asks_no_answered_text_again(tmp_path):
    class Failing(Counting):
        remote = True

        def __call__(self, texts: list[str]) -> np.ndarray:
            if len(self.asked) >= 64 and not self.asked_before:
                raise KeyboardInterrupt
            return super().__call__(texts)

        asked_before: tuple[str, ...] = ()

    black_box = Failing()
    teacher = named(black_box)
    teacher.remote = True
    splits, spec = many(), {"batch": 32, "dtype": "float32"}
    changes = {"teacher": {"model": "given", "store": spec}, "splits": splits}
    with pytest.raises(KeyboardInterrupt):
        held(tmp_path, teacher, **changes)
    black_box.asked_before = tuple(black_box.asked)
    held(tmp_path, teacher, **changes)
    assert black_box.asked == splits["train"].views["text"]


def held(folder: Path, answering: Any, **changes: Any) -> Any:
    """A training whose recipe says how the answers are kept."""
    spec = changes.pop("teacher")
    chosen = load_recipe(
        {
            "method": "leaf",
            "data": PROSE,
            "teacher": spec,
            "student": {"model": "given"},
            "budget": {"steps": 2, "batch": 4},
            "compare": [],
        }
    )
    given = Given(student=Bag(), teacher=answering, splits=changes["splits"])
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job)
    finally:
        job.log.close()


@pytest.mark.parametrize(("cache", "near"), [("float16", 2e-3), ("int8", 0.05)])
def test_a_shorter_cache_gives_nearly_the_same_student(cache, near, tmp_path):
    whole = state(trained(tmp_path / "a", teacher=named(Counting())))
    short = state(trained(tmp_path / "b", teacher=named(Counting()), settings={"cache": cache}))
    assert 0 < apart(whole, short) < near


def test_rows_of_one_and_a_batch_of_one(tmp_path):
    """Property 10: batch size 1."""
    budget = {"steps": 5, "batch": 1, "lr": 0.02}
    artifact, _ = trained(tmp_path, teacher=named(Counting()), budget=budget)
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())


def test_the_loss_falls_and_equal_vectors_are_at_0(tmp_path):
    """Property 1."""
    made = LeafObjective(Net(Bag(), answer="embedding"))
    texts = ["a wing", "heat", "flow"]
    batch = Batch(text=texts, id=torch.arange(3))
    with torch.no_grad():
        same = made.student(texts)["embedding"]
    assert made(batch, Knowledge({"embedding": same}), Clock())["embed"].item() == 0
    before, _ = trained(tmp_path / "a", teacher=named(Counting()), budget={"steps": 1, "lr": 1e-6})
    after, _ = trained(
        tmp_path / "b", teacher=named(Counting()), budget={"steps": 150, "batch": 8, "lr": 0.02}
    )
    texts = ["Ada was the first to describe a comet in 1815.", "Euler", "an island"]
    wanted = torch.as_tensor(Counting()(texts)).float()
    far = [(torch.stack(a.predict(texts)) - wanted).square().sum(1).mean() for a in (before, after)]
    assert far[1] < 0.5 * far[0]


def test_hand_values_and_relations_of_the_losses():
    """Properties 2 and 3."""
    y, t = F.normalize(torch.tensor([[3.0, 4.0]]), dim=-1), torch.tensor([[1.0, 0.0]])
    found = {loss: vector_distance(y, t, loss).item() for loss in LOSSES}
    assert found == pytest.approx({"l2sq": 0.8, "l2": 0.894427, "mse": 0.4, "cos": 0.4}, abs=1e-6)
    rng = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(9, 40, generator=rng), dim=-1) for _ in "ab")
    square = vector_distance(a, b, "l2sq")
    assert torch.allclose(square, 2 * vector_distance(a, b, "cos"), atol=1e-6)
    assert torch.allclose(square, 40 * vector_distance(a, b, "mse"), atol=1e-5)


def collection(prefix: str = "") -> Splits:
    """Documents, queries and pairs of a few words each, with a training split."""
    from stillhouse.data.cranfield import Collection, judged_source

    words = ["wing", "heat", "flow", "shock", "plate", "gas"]
    documents = [
        (f"d{i}", w, f"{w} {words[(i + 1) % 6]} {words[(i * i) % 6]}") for i, w in enumerate(words)
    ]
    queries = [(f"q{i}", words[i]) for i in range(4)]
    grades = {f"q{i}": {f"d{i}": 1, f"d{(i + 5) % 6}": 1} for i in range(4)}
    pairs = [(w, f"{w} {v}", float(i)) for i, (w, v) in enumerate(zip(words, words[2:]))]
    judged = judged_source(Collection(documents, queries, grades), queries, pairs, "few", prefix)
    texts = [text for _, _, text in documents] + [f"{prefix}{text}" for _, text in queries]
    kinds = torch.tensor([0] * 6 + [1] * 4)
    return Splits({"train": TensorSource({"text": texts, "kind": kinds}), "test": judged}, "few")


def test_a_student_that_is_its_teacher_is_judged_as_the_teacher_is(tmp_path):
    """Property 7."""
    student = Bag()

    def encode(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return student(texts)

    splits = collection()
    _, job = trained(tmp_path, teacher=named(encode), splits=splits, student=student)
    net = job.task.net(student)
    figures = judge_vectors(job.judging(), net, named(encode), widths=[4, 8])
    for name in ("ndcg@10", "mrr@10", "map", "spearman", "ndcg@10_4", "ndcg@10_int8"):
        assert figures[f"teacher_{name}"] == figures[f"asymmetric_{name}"] == figures[name]
    assert figures["cosine"] == pytest.approx(1, abs=1e-6)
    assert figures["retention"] == figures["asymmetric_retention"] == 1
    assert figures["curve_agreement"] == pytest.approx(1)
    assert job.evaluate(net, splits.judging()["test"])["ndcg@10"] == figures["ndcg@10"]


def test_plain_texts_are_judged_by_how_near_the_vectors_are(tmp_path):
    student = Bag()

    def encode(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return -student(texts)

    plain = Splits({role: TensorSource({"text": ["a wing", "heat"]}, name=role)
                    for role in ("train", "test")}, "plain")  # fmt: skip
    artifact, job = trained(tmp_path, teacher=named(encode), splits=plain, student=Bag())
    figures = judge_vectors(job.judging(), job.task.net(student), named(encode))
    assert figures == pytest.approx({"cosine": -1.0})
    artifact.meta["figures"] = figures
    assert Leaf().details(job, artifact) == {"tables": []}


def test_a_turned_student_is_as_good_alone_and_lost_beside_its_teacher(tmp_path):
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3))).Q
    student, turned = Bag(), Bag()
    with torch.no_grad():
        turned.out.weight.copy_(turn @ turned.out.weight)
        turned.out.bias.copy_(turn @ turned.out.bias)

    def encode(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return student(texts)

    _, job = trained(tmp_path, teacher=named(encode), splits=collection(), student=student)
    figures = judge_vectors(job.judging(), job.task.net(turned), named(encode), widths=[])
    assert figures["ndcg@10"] == pytest.approx(figures["teacher_ndcg@10"])
    assert abs(figures["cosine"]) < 0.7
    assert figures["asymmetric_spearman"] != pytest.approx(figures["teacher_spearman"], abs=0.05)


def test_one_kind_of_texts(tmp_path):
    seen: dict[str, set[str]] = {}
    real = LeafObjective.forward

    def spy(self: Any, batch: Batch, *rest: Any):
        seen[self.kind] |= set(batch["text"])
        return real(self, batch, *rest)

    for kind in ("documents", "queries", "both"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LeafObjective, "kind", kind, raising=False)
            patch.setattr(LeafObjective, "forward", spy)
            seen[kind] = set()
            trained(
                tmp_path / kind, teacher=named(Counting()), splits=collection("query: "),
                settings={"texts": kind},
            )  # fmt: skip
    assert all(text.startswith("query: ") for text in seen["queries"])
    assert not any(text.startswith("query: ") for text in seen["documents"])
    assert seen["both"] == seen["queries"] | seen["documents"]
    with pytest.raises(RecipeError, match="which texts are queries"):
        trained(tmp_path / "x", teacher=named(Counting()), settings={"texts": "queries"})


def test_only_the_last_layer_of_a_frozen_backbone_moves(tmp_path):
    before = {k: v.clone() for k, v in Bag().state_dict().items()}
    after = state(trained(tmp_path, teacher=named(Counting()), settings={"backbone": "frozen"}))
    assert torch.equal(before["letters.weight"], after["letters.weight"])
    assert not torch.equal(before["out.weight"], after["out.weight"])


def test_first_coordinates_of_a_wider_teacher(tmp_path):
    result, job = trained(
        tmp_path, teacher=named(Counting(32)), student=Bag(8), splits=collection(),
        settings={"width": 8, "widths": [4, 8]},
    )  # fmt: skip
    figures = Leaf(Leaf.Config(width=8, widths=[4, 8])).judge(job.judging(), result)
    assert {"full_teacher_ndcg@10", "asymmetric_ndcg@10_4"} <= set(figures)


# ---- what is wrong is told before it costs anything ------------------------------------------


def test_another_width_is_told_before_most_is_asked(tmp_path):
    teacher = Counting(9)
    with pytest.raises(ModelError, match=r"have 12 coordinates, those of the teacher 9.*width: 9"):
        trained(tmp_path, teacher=named(teacher), splits=many())
    assert len(teacher.asked) == 64 < len(many()["train"])


def many() -> Splits:
    return Splits({"train": TensorSource({"text": [f"text {i}" for i in range(200)]})}, "many")


def test_unit_vectors_cannot_follow_others(tmp_path):
    with pytest.raises(ModelError, match=r"unit length and the teacher's have lengths.*normalise"):
        trained(tmp_path / "a", teacher=named(Counting(unit=False)))
    plain = Bag(normalise=False)
    trained(tmp_path / "b", teacher=named(Counting(unit=False)), student=plain)
    trained(tmp_path / "c", teacher=named(Counting(unit=False)), settings={"loss": "cos"})


def test_a_function_that_gives_no_vectors_is_told(tmp_path):
    with pytest.raises(TeacherError, match=r"gave \(1,\) for 20 texts|gave \(\d+,\) for"):
        trained(tmp_path / "a", teacher=named(lambda texts: [1.0] * len(texts)))
    with pytest.raises(TeacherError, match="no array of vectors"):
        trained(tmp_path / "b", teacher=named(lambda texts: ["x"] * len(texts)))
    with pytest.raises(TeacherError, match="have no vector in the array, such as"):
        trained(tmp_path / "c", teacher=known_vectors(["a"], np.ones((1, 12))))
    with pytest.raises(TeacherError, match="2 texts need as many vectors"):
        known_vectors(["a", "b"], np.ones((1, 12)))
    with pytest.raises(TeacherError, match="'logits' of the teacher, and letters gives"):
        named(Counting()).bind((Want("logits"),), None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "l3"}, "loss"),
        ({"floor": 1.5}, "floor"),
        ({"cycles": -1}, "cycles"),
        ({"cache": "float8"}, "cache"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(RecipeError, match=words):
        open_method(load_recipe({**Leaf.example(), "settings": settings}))


# ---- resuming, variants, the front door ------------------------------------------------------


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    changes: dict[str, Any] = {
        "budget": {"steps": 60, "batch": 8, "lr": 0.02},
        "output": {"checkpoint_minutes": 0},
    }
    whole = state(trained(tmp_path / "whole", teacher=named(Counting()), **changes))

    def train() -> None:
        trained(tmp_path / "cut", teacher=named(Counting()), **changes)

    assert kill_and_resume(train, tmp_path / "cut") >= 1
    again = state(trained(tmp_path / "cut", teacher=named(Counting()), **changes))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("variant", sorted(Leaf.variants))
def test_every_variant_trains(variant, tmp_path):
    artifact, _ = trained(
        tmp_path, teacher=named(Counting()), splits=collection(), variant=variant,
        budget={"steps": 4, "batch": 4, "lr": 0.02}, settings={},
    )  # fmt: skip
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())


def test_the_published_budget():
    chosen = load_recipe({**Leaf.example(), "variant": "published", "budget": {}})
    budget = chosen.budget
    assert (budget.epochs, budget.batch, budget.lr, budget.clip) == (30, 32, 1e-4, 1.0)
    assert chosen.settings.get("cycles", Leaf.Config().cycles) == 3


def test_a_plain_function_through_the_front_door(tmp_path):
    """Three lines of Python: any function of texts, one's own modules."""
    result = still.distill(
        letters, Bag(), collection().judging()["train"], test=collection().judging()["test"],
        method="leaf", compare=[], folder=tmp_path, steps=4, batch=4, lr=0.02, progress=False,
        settings={"widths": [4]},
    )  # fmt: skip
    assert {"ndcg@10", "asymmetric_ndcg@10", "teacher_ndcg@10"} <= set(
        result.sides["distilled"]["0"]
    )
    assert (
        result.sides["teacher"]["0"]["ndcg@10"] == result.sides["distilled"]["0"]["teacher_ndcg@10"]
    )
    objective = still.objective("leaf", Bag(), teacher=still.teacher(letters), task="embedding")
    assert isinstance(objective, Objective)
    loss = objective.terms(Batch(text=["a", "b"], id=torch.arange(2)), still.teacher(letters))
    assert loss["embed"].requires_grad
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "student for queries, teacher for documents" in page


def letters(texts: list[str]) -> np.ndarray:
    return Counting()(texts)


# ---- sentence-transformers -------------------------------------------------------------------


def sentence_model(encoder: str, width: int | None = None) -> Any:
    package = pytest.importorskip("sentence_transformers")
    parts = package.sentence_transformer.modules
    modules = [parts.Transformer(encoder), parts.Pooling(16, pooling_mode="mean")]
    if width:
        modules.append(parts.Dense(16, width, activation_function=nn.Identity()))
    return package.SentenceTransformer(modules=[*modules, parts.Normalize()], device="cpu")


def test_sentence_transformers_teach_learn_and_are_written(tiny_bert, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    teacher, student = sentence_model(tiny_bert), sentence_model(tiny_bert, 16)
    text = ["the first to describe a comet", "Ada", "an engine"]
    theirs = torch.as_tensor(teacher.encode(text))
    splits = collection()
    artifact, job = trained(tmp_path / "run", teacher=teacher, student=student, splits=splits)
    vectors = torch.stack(artifact.predict(text))
    assert vectors.shape == theirs.shape
    figures = open_method(job.recipe).judge(job.judging(), artifact)
    assert {"asymmetric_ndcg@10", "retention"} <= set(figures)
    # from a folder, by its name in a recipe, and out again
    teacher.save(str(tmp_path / "teacher"))
    recipe = text_recipe(
        tiny_bert,
        {"model": str(tmp_path / "teacher")},
        student={
            "model": "stillhouse:sentence_transformer",
            "options": {"folder": str(tmp_path / "teacher"), "width": 16},
        },
        budget={"steps": 3, "batch": 4, "lr": 0.01},
    )
    run(recipe, folder=tmp_path / "folder", progress=False)
    told = export_artifact(tmp_path / "folder", "sentence-transformers", tmp_path / "out")
    assert told["largest_difference"] < 1e-5
    again = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours = torch.stack(still.load(tmp_path / "folder").predict(text))
    assert (torch.as_tensor(again.encode(text)) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("pooling", "include"),
    [("mean", True), ("mean", False), ("cls", True), ("max", False), ("lasttoken", True)],
)
def test_vectors_are_those_of_encode(pooling, include, tiny_bert, tmp_path):
    """With the model's default prompt, in or out of the pooling, and its width."""
    package = pytest.importorskip("sentence_transformers")
    parts = package.sentence_transformer.modules
    modules = [
        parts.Transformer(tiny_bert, max_seq_length=24),
        parts.Pooling(16, pooling_mode=pooling, include_prompt=include),
        parts.Dense(16, 12),
    ]
    prompts = {"query": "query: ", "document": "passage: "}
    built = package.SentenceTransformer(
        modules=modules, prompts=prompts, default_prompt_name="query", device="cpu"
    )
    built.save(str(tmp_path / "built"))
    texts = ["a wing", "heat", "an engine " * 40]
    for width in (None, 5):
        model = package.SentenceTransformer(
            str(tmp_path / "built"), device="cpu", truncate_dim=width
        )
        with torch.no_grad():
            ours = SentenceTransformerNet(model.eval())(texts)
        assert ours.shape[1] == (width or 12)
        assert (ours - torch.as_tensor(model.encode(texts))).abs().max() < 1e-6
        assert (ours - torch.as_tensor(model.encode(texts, prompt=""))).abs().max() > 1e-5


def test_a_student_is_exported_to_sentence_transformers(tiny_bert, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    (tmp_path / "own.txt").write_text("a wing\nheat\nan engine\na comet\n")
    own = {"documents": str(tmp_path / "own.txt"), "document_prefix": "passage: ", "val": 0}
    recipe = text_recipe(
        tiny_bert, embedder(tiny_bert), budget={"steps": 3, "batch": 4, "lr": 0.01},
        data={"name": "embedding_files", "options": {**own, "query_prefix": "query: "}},
    )  # fmt: skip
    run(recipe, folder=tmp_path / "run", progress=False)
    told = export_artifact(tmp_path / "run", "sentence-transformers", tmp_path / "out")
    assert told["width"] == 16
    model = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = ["Ada was the first", "a", "an engine " * 60]
    ours = torch.stack(still.load(tmp_path / "run").predict(texts))
    assert (torch.as_tensor(model.encode(texts)) - ours).abs().max() < 1e-5
    opened = still.load(tmp_path / "run")
    for kind, encode in (("query", model.encode_query), ("document", model.encode_document)):
        ours = torch.stack(opened.predict(texts, kind=kind))
        assert (torch.as_tensor(encode(texts)) - ours).abs().max() < 1e-5
        assert (torch.as_tensor(model.encode(texts)) - ours).abs().max() > 1e-5
    # the exported folder teaches as the student does
    loaded = still.teacher(model)
    found = loaded.net.module if hasattr(loaded, "net") else None
    assert found is model


@pytest.mark.slow  # the exporter of graphs takes half a minute
def test_a_student_is_exported_to_onnx(tiny_bert, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    recipe = text_recipe(
        tiny_bert, embedder(tiny_bert), budget={"steps": 3, "batch": 4, "lr": 0.01}
    )
    run(recipe, folder=tmp_path / "run", progress=False)
    said = export_artifact(tmp_path / "run", "onnx", tmp_path / "onnx")
    assert set(said["inputs"]) == {"input_ids", "attention_mask"}
    assert said["largest_difference"] < 1e-4


# ---- the real encoder ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_encoder_as_module_store_and_endpoint(data_root, real_models, tmp_path):
    """all-MiniLM-L6-v2 on Cranfield's texts: parameters within 1e-4 after 100 steps."""
    from stillhouse.models.loading import find_folder

    name = "sentence-transformers/all-MiniLM-L6-v2"
    if find_folder(name) is None:
        pytest.skip("the real encoder is not on this machine (make models)")
    live = {"model": "stillhouse:sentence_embedder", "options": {"length": 96}}
    found = {}
    for kind, teacher in {
        "module": live,
        "store": {**live, "store": {"dtype": "float32", "path": str(tmp_path / "store")}},
        "half": {**live, "store": {"dtype": "float16", "path": str(tmp_path / "half")}},
        "endpoint": {"endpoint": {"serve": {"encoder": name}}},
    }.items():
        recipe = load_recipe(
            {
                "method": "leaf",
                "data": {"name": "cranfield", "options": {"sentences": 150, "titles": 50}},
                "teacher": teacher,
                "student": {
                    "model": "stillhouse:sentence_embedder",
                    "options": {
                        "width": 384,
                        "length": 96,
                        "pretrained": False,
                        "config": {
                            "num_hidden_layers": 1,
                            "hidden_size": 64,
                            "num_attention_heads": 2,
                            "intermediate_size": 64,
                            "hidden_dropout_prob": 0.0,
                            "attention_probs_dropout_prob": 0.0,
                        },
                    },
                },
                "budget": {"steps": 100, "batch": 16, "lr": 0.01, "optimizer": "sgd"},
                "compare": [],
            }
        )
        job = open_job(recipe, tmp_path / kind)
        found[kind] = plain_state(open_method(recipe).run(job).module)
        job.log.close()
    assert apart(found["module"], found["store"]) < 1e-4
    assert apart(found["module"], found["endpoint"]) < 1e-4
    assert apart(found["module"], found["half"]) < 1e-3
