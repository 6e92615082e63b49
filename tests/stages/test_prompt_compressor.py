from __future__ import annotations

import json

import pytest
import torch

from stillhouse.errors import DataError, RecipeError
from stillhouse.models.word_tagger import WordTagger
from stillhouse.parts.text_spans import split_words
from stillhouse.stages.prompt_compressor import (
    PromptCompressor,
    compression_of,
    read_prompts,
    reader_of,
)

TEXT = "Ada Lovelace (1815-1852) wrote the first program. It computes Bernoulli numbers.\nReally!"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789().,-!?"


@pytest.fixture(scope="module")
def words() -> PromptCompressor:
    torch.manual_seed(0)
    return PromptCompressor(WordTagger(width=16, heads=2, buckets=64, length=8))


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A tiny model in the layout of microsoft/llmlingua-2-xlm-roberta-large-meetingbank."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in LETTERS]
    vocabulary += [("▁" + word, -1.0) for word in ("Ada", "the", "It", "first", "numbers")]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    torch.manual_seed(1)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=66, num_labels=2, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    )  # fmt: skip
    model = transformers.XLMRobertaForTokenClassification(config)
    folder = tmp_path_factory.mktemp("llmlingua-2-xlm-roberta-large-meetingbank")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(layout) -> PromptCompressor:
    return PromptCompressor.from_pretrained(str(layout))


@pytest.fixture(params=["words", "published"])
def compressor(request) -> PromptCompressor:
    found: PromptCompressor = request.getfixturevalue(request.param)
    return found


def test_what_comes_out_are_words_of_the_input_in_order(compressor):
    for rate in (0.1, 0.3, 0.5, 0.9):
        for select in ("percentile", "exact"):
            answer = compressor.predict([TEXT], rate=rate, select=select, labels=True)[0]
            source = [w.text for w in split_words(TEXT)]
            assert [word for word, _ in answer["labels"]] == source
            kept = [word for word, flag in answer["labels"] if flag]
            assert "".join(answer["compressed_prompt"].split()) == "".join(kept)
            if select == "exact":
                assert answer["compressed_tokens"] <= rate * answer["origin_tokens"] + 1e-9
    assert compressor.predict([TEXT], rate=1.0)[0]["compressed_prompt"] == TEXT


def test_forced_words_and_digits_stay(compressor):
    answer = compressor.predict(
        [TEXT], rate=0.1, force_tokens=[".", "\n", "!"], force_reserve_digit=True, labels=True
    )[0]
    kept = [word for word, flag in answer["labels"] if flag]
    for word in (".", "\n", "!", "1815", "1852"):
        assert word in kept


def test_many_prompts_at_once_equal_one_by_one(compressor):
    prompts = [TEXT, [TEXT, "Another context."], "", "One.", TEXT * 3]
    together = compressor.predict(prompts, rate=0.4)
    assert together == [compressor.predict([prompt], rate=0.4)[0] for prompt in prompts]
    scores = compressor.word_scores([TEXT, "", "One."])
    assert [len(row) for row in scores] == [len(split_words(t)) for t in (TEXT, "", "One.")]
    assert all(0 <= p <= 1 for row in scores for p in row)


def test_long_texts_are_read_in_windows_that_fit(compressor):
    long = " ".join(["Some words, then more words."] * 40)
    assert len(compressor.word_scores([long])[0]) == len(split_words(long))


def test_the_published_layout_is_read_with_its_own_specials(published):
    reader = published.reader
    assert (reader.length, reader.room) == (64, 62)
    codes = reader.row(reader.read("It is").codes)
    assert (codes[0], codes[-1]) == (0, 2)
    scores = published.word_scores(["It is"])[0]
    with torch.no_grad():
        logits = published.net.module(input_ids=codes[None]).logits[0]
    keep = logits.softmax(-1)[:, 1]
    pieces = reader.read("It is").pieces
    assert pieces[0] == "▁It"
    assert scores[0] == pytest.approx(keep[1].item(), abs=1e-6)
    assert scores[1] == pytest.approx(keep[2:-1].mean().item(), abs=1e-6)


def test_the_released_way_wraps_in_unknown_specials(published):
    released = published.predict([TEXT], released=True, rate=0.5, labels=True)[0]
    assert 0 < released["compressed_tokens"] < released["origin_tokens"]
    own = published.predict([TEXT], released=True, released_specials=False, rate=0.5)[0]
    assert own["compressed_tokens"] < own["origin_tokens"]
    seen = []
    score = published._score_ids

    def spy(rows):
        seen.extend(list(row) for row in rows)
        return score(rows)

    published._score_ids = spy  # type: ignore[method-assign]
    try:
        published.predict(["It is"], released=True)
        published.predict(["It is"], released=True, released_specials=False)
    finally:
        del published._score_ids
    assert (seen[0][0], seen[0][-1]) == (3, 3)  # <unk>
    assert (seen[1][0], seen[1][-1]) == (0, 2)
    forced = published.predict(
        [TEXT], released=True, rate=0.2, force_tokens=["\n", "Bernoulli"], drop_consecutive=True
    )[0]
    assert "Bernoulli" in forced["compressed_prompt"]


def test_the_released_way_needs_a_tokenizer(words):
    with pytest.raises(RecipeError, match="leave out released"):
        words.predict([TEXT], released=True)


def test_tokens_are_counted_as_asked(published, words):
    estimate, encoder = (
        published.predict(["It is Ada"], rate=1.0, counter=c)[0]["origin_tokens"]
        for c in ("estimate", "encoder")
    )
    assert estimate == 3
    assert encoder == len(published.reader.read("It is Ada").pieces) > 3
    with pytest.raises(RecipeError, match="tiktoken:MODEL"):
        words.predict(["x"], counter="gpt-4")


def test_options_are_checked():
    assert compression_of({"rate": 0.3, "force_tokens": "."}).force_tokens == ["."]
    with pytest.raises(RecipeError, match="did you mean 'rate'"):
        compression_of({"rat": 0.3})
    with pytest.raises(RecipeError, match="true or false"):
        compression_of({"drop_consecutive": "yes"})
    with pytest.raises(RecipeError, match="is a number"):
        compression_of({"rate": "half"})


def test_files_are_read_compressed_and_written(words, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT)
    lines = [{"text": "One. Two."}, {"contexts": ["Context one.", "Context two."]}]
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out" / "short.jsonl"
    summary = words.infer([tmp_path / "in"], out, {"rate": 0.5})
    assert summary["prompts"] == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[1]["input"].endswith("b.jsonl:1")
    assert len(rows[2]["compressed_prompt_list"]) == 2
    assert summary["compressed_tokens"] == sum(r["compressed_tokens"] for r in rows)
    words.infer([tmp_path / "in" / "a.txt"], tmp_path / "short.txt", {"rate": 0.5})
    assert (tmp_path / "short.txt").read_text() == rows[0]["compressed_prompt"] + "\n"


def test_unreadable_input_is_told(tmp_path):
    with pytest.raises(DataError, match="nothing to read"):
        read_prompts([tmp_path])
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_prompts([tmp_path / "x.jsonl"])


def test_a_tokenizer_that_is_not_there_is_told(tmp_path):
    from stillhouse.errors import ModelError

    with pytest.raises(ModelError, match="needs the tokenizer"):
        reader_of(torch.nn.Linear(1, 1), str(tmp_path), 8)
