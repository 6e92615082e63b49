from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from stillhouse.artifact import plain_state
from stillhouse.bench import runner as bench
from stillhouse.errors import DataError, ModelError, RecipeError
from stillhouse.launch import infer, open_job, run
from stillhouse.losses.sequence import IGNORED, token_cross_entropy
from stillhouse.methods.language.llmlingua2 import (
    LLMLingua2,
    TaggerObjective,
    lemma_rows,
    surface_rows,
)
from stillhouse.models.word_tagger import WordTagger
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.text_reader import PieceReader
from stillhouse.parts.text_spans import count_tokens, split_words
from stillhouse.planning import plan
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.word_labels import Chunk, Labelled, Shortening, label_words

SOURCE, SHORT = "The big cats, running fast, have seen us.", "big cats running seen us."


def labelled(source: str = SOURCE, short: str = SHORT, **how) -> Labelled:
    words, labels, found = label_words(source, short, Shortening(**how))
    rates = {"variation": found.variation_rate, "gap": found.alignment_gap}
    return Labelled(Chunk(0, 0, source), words, labels, short, rates)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny encoder with a WordPiece tokenizer, saved like a real one, without a head."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,()-"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    names += ["the", "was", "##ed", "in", "cat", "##s"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    )
    core.normalizer = tokenizers.normalizers.BertNormalizer()
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=48, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reader_at(bert, length: int) -> PieceReader:
    from transformers import AutoTokenizer

    return PieceReader(AutoTokenizer.from_pretrained(str(bert)), length)


# Rows and loss --------------------------------------------------------------------------


def test_pieces_carry_their_words_label_and_specials_none(bert):
    one, reader = labelled(), reader_at(bert, 64)
    ((codes, labels),) = surface_rows(one, reader)
    pieces = reader.tokenizer.convert_ids_to_tokens(codes.tolist())
    assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
    assert labels[0] == labels[-1] == IGNORED
    offsets = reader.read(SOURCE).offsets
    for (start, stop), label in zip(offsets, labels[1:-1], strict=True):
        word = next(w for w in one.words if w.start <= start < w.stop)
        assert stop <= word.stop
        assert label == one.labels[one.words.index(word)]


def test_long_chunks_become_rows_that_fit_unless_cut(bert):
    text = " ".join(["The cats was in."] * 12)
    one = labelled(text, text)
    for reader in (reader_at(bert, 20), WordTagger(width=16, heads=2, length=20).reader):
        rows = surface_rows(one, reader)
        assert len(rows) > 1
        assert all(len(codes) == len(labels) <= 20 for codes, labels in rows)
        marked = sum(y != IGNORED for _, labels in rows for y in labels)
        assert marked == len(reader.read(text).offsets)
        assert len(surface_rows(one, reader, cut=True)) == 1
        assert len(lemma_rows(one, reader, cut=True)) == 1
        assert len(lemma_rows(one, reader)) > 1


def test_lemma_rows_hold_base_forms_without_unlabelled_words(bert):
    one, reader = labelled(commas="drop"), reader_at(bert, 64)
    ((codes, labels),) = lemma_rows(one, reader)
    text = reader.tokenizer.decode(codes, skip_special_tokens=True)
    text = text.replace(" ", "").replace("##", "")
    assert text == "thebigcatrunfasthaveseenus."
    assert len(codes) == len(labels)


def test_the_released_slip_shifts_the_last_label(bert):
    one, reader = labelled("cat cats", "cats"), reader_at(bert, 64)
    ((_, right),) = surface_rows(one, reader)
    ((_, slipped),) = surface_rows(one, reader, slip=True)
    assert right == [IGNORED, 0, 1, 1, IGNORED]
    assert slipped == [IGNORED, 0, 1, 0, 1]


def test_the_loss_is_over_real_tokens_and_counts_them():
    torch.manual_seed(0)
    net = Net(WordTagger(width=16, heads=2, buckets=32, length=8).eval())
    source = LLMLingua2().rows(
        [labelled(), labelled("One cat.", "cat")],
        WordTagger(width=16, heads=2, buckets=32, length=16).reader,
        "train",
    )
    batch = source.read(torch.arange(2), None)
    batch["draw"] = 0
    objective = TaggerObjective(net).eval()
    loss = objective.terms(batch, None)["task"]
    logits = net(batch["x"])["logits"]
    real = batch["target"] != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[real], batch["target"][real])
    torch.testing.assert_close(loss, expected)
    assert objective.count(batch) == int(real.sum()) == 11 + 3
    official = TaggerObjective(net, official_loss=True).eval()
    torch.testing.assert_close(
        official.terms(batch, None)["task"],
        token_cross_entropy(logits, batch["target"].clamp_min(0)),
    )
    assert official.count(batch) == real.numel()


# Runs -----------------------------------------------------------------------------------


def recipe(**changes):
    given = LLMLingua2.example(0)
    for name, value in changes.items():
        given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) else value
    return load_recipe({**given, "compare": []})


def served(**settings):
    serve = {"rule": "stillhouse.teachers.delete_rules:compress", **settings}
    return {"endpoint": {"model": "rules", "concurrency": 4, "serve": serve}}


def test_a_run_leaves_a_compressor_labels_and_figures(tmp_path):
    spec = recipe(budget={"steps": 60, "batch": 8, "lr": 0.02, "select": "best"})
    result = run(spec, folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    assert figures["auc"] > 0.75
    assert 0 < figures["rate"] < 1
    assert figures["words_per_second"] > 0
    labels = list(open_artifact(tmp_path / "run").attachments["labels"].records)
    assert len(labels) == 36
    for row in labels:
        assert len(row["labels"]) == len(split_words(row["text"]))
    texts = ["Ada was asked to measure the comet in 1850.", "Boole wrote."]
    reopened = open_artifact(tmp_path / "run")
    assert reopened.predict(texts, rate=0.4) == result.artifact.predict(texts, rate=0.4)
    (tmp_path / "in.txt").write_text(texts[0])
    summary = infer(tmp_path / "run", [tmp_path / "in.txt"], tmp_path / "out.jsonl", {"rate": 0.5})
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert summary["compressed_tokens"] == count_tokens(answer["compressed_prompt"])
    assert summary["compressed_tokens"] < summary["origin_tokens"] == count_tokens(texts[0])
    with pytest.raises(RecipeError, match="unknown option 'rat'"):
        infer(tmp_path / "run", [tmp_path / "in.txt"], None, {"rat": 0.5})


def test_a_real_encoder_class_plugs_in(bert, tmp_path):
    student = {
        "model": f"hf:{bert}",
        "weights": "pretrained",
        "options": {"task": "token-classification", "num_labels": 2},
    }
    spec = LLMLingua2.example(0)
    spec |= {"student": student, "settings": {"length": 40}}
    result = run(load_recipe({**spec, "compare": []}), folder=tmp_path / "run", progress=False)
    assert result.artifact.predictor.reader.room == 38
    texts = ["Ada quickly wrote a letter on the magnet in 1850."]
    reopened = open_artifact(tmp_path / "run")
    for options in ({}, {"released": True, "force_tokens": ["."]}):
        assert reopened.predict(texts, **options) == result.artifact.predict(texts, **options)
    masked = load_recipe({**spec, "settings": {"left_to_right": True}, "compare": []})
    with pytest.raises(ModelError, match="cannot be masked"):
        run(masked, folder=tmp_path / "masked", progress=False)


@pytest.mark.parametrize("variant", sorted(LLMLingua2.variants))
def test_variants_run(variant, tmp_path):
    if variant == "official":
        spec = recipe(variant=variant, settings={"drop_ties": False})
    else:
        spec = recipe(variant=variant)
    job = open_job(spec, tmp_path)
    artifact = open_method(spec).run(job)
    used = [row["used"] for row in artifact.attachments["labels"].records]
    assert all(used) == (variant == "no-filter")
    assert artifact.module.module.causal == (variant == "left-to-right")
    job.log.close()


def test_a_filter_that_drops_everything_is_told(tmp_path):
    faithful = served(options={"options": {"violations": 0.0}})
    spec = recipe(teacher=faithful, settings={"drop_ties": True})
    with pytest.raises(DataError, match=r"dropped all 36 chunks.*drop_ties"):
        run(spec, folder=tmp_path / "run", progress=False)


def _whole(spec, folder) -> None:
    torch.set_num_threads(1)
    run(spec, folder=folder, progress=False)


def _some_lines_later(*arguments) -> None:
    """Wait until the run has got on: its log or the server's has grown."""
    *paths, process = arguments

    def size() -> int:
        return sum(path.stat().st_size for path in paths if path.exists())

    before, deadline = size(), time.monotonic() + 60
    while size() == before and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["llmlingua2", "llmlingua2-bench", "llmlingua2-smollm2"])
def test_recipes_are_sound(name):
    spec = load_recipe(name)
    assert spec.method == "llmlingua2"
    assert spec.task == "token-classification"
    open_method(spec)


def test_comparisons_have_a_recipe_of_their_own(tmp_path, data_root):
    seen = []

    def note_side(spec, side, seed, folder):
        seen.append((side, spec.student.model))
        return {"auc": 0.5, "f1": 0.5, "entities": 0.5, "cloze": 0.5, "seconds": 200.0}

    bench.run("llmlingua2", seeds=1, folder=tmp_path / "runs", results_folder=tmp_path,
              run_side=note_side, say=lambda text: None)  # fmt: skip
    assert {model for _, model in seen} == {"stillhouse:word-tagger"}
    assert {side for side, _ in seen} == {
        "llmlingua2", "llmlingua2/left-to-right", "llmlingua2/no-filter",
        "llmlingua2/lemma-inputs", "random-deletion", "tfidf-deletion", "surprisal-deletion",
    }  # fmt: skip


def test_a_dry_run_prices_the_labelling_and_sends_nothing(tmp_path):
    log = str(tmp_path / "log")
    priced = served(options={"log": log})
    priced["endpoint"]["price"] = {"prompt": 1e6, "completion": 1e6}
    told = plan(recipe(teacher=priced, settings={"limit": 5}))["labelling"]
    assert (told["texts"], told["chunks"], told["requests"]) == (36, 36, 5)
    assert told["cost"] == told["prompt_tokens"] + told["expected_completion_tokens"]
    assert told["most"] > told["cost"] > 0
    assert not os.path.exists(log)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_anywhere_against_a_failing_endpoint_it_ends_the_same(tmp_path, kills):
    """kill -9 at random moments; a server that fails 30 % of the time; its own log is read."""

    def spec(name: str):
        options = {"log": str(tmp_path / name), "latency": 0.02, "seed": 8}
        return recipe(
            data={"name": "generated_prose", "options": {"texts": 40, "sentences": 3}},
            teacher=served(fail=0.3, options=options),
            budget={"steps": 30, "batch": 8, "lr": 0.01},
            output={"checkpoint_minutes": 0.0},
        )

    cache = tmp_path / "cache"
    os.environ["STILLHOUSE_CACHE"] = str(cache / "whole")
    whole = run(spec("whole"), folder=tmp_path / "whole-run", progress=False)
    os.environ["STILLHOUSE_CACHE"] = str(cache / "cut")
    fork, draw = multiprocessing.get_context("fork"), random.Random(1)
    killed = 0
    for _ in range(kills):
        process = fork.Process(target=_whole, args=(spec("cut"), tmp_path / "cut-run"))
        process.start()
        _some_lines_later(tmp_path / "cut-run" / "log.jsonl", tmp_path / "cut", process)
        process.join(draw.uniform(0.0, 0.4))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert killed >= 2
    cut = run(spec("cut"), folder=tmp_path / "cut-run", progress=False)
    before, after = (plain_state(r.artifact.predictor.module) for r in (whole, cut))
    assert all(torch.equal(before[k], after[k]) for k in before)
    labels = [list(r.artifact.attachments["labels"].records) for r in (whole, cut)]
    assert labels[0] == labels[1]
    sent = [json.loads(line) for line in (tmp_path / "cut").read_text().splitlines()]
    good = [entry["key"] for entry in sent if entry.get("fault") is None and entry["status"] == 200]
    asked = {row["text"] for row in labels[1]}
    assert len(set(good)) >= len(asked)
    assert len(good) - len(set(good)) <= 4 * killed
    assert len(sent) > 1.2 * len(good)
