from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stillhouse.errors import DataError, ModelError
from stillhouse.parts.text_tokens import (
    TextTokens,
    load_tokenizer,
    refuse_other_tokens,
    tidied,
    vocabulary_hash,
    word_tokenizer,
)

transformers = pytest.importorskip("transformers")
TEXTS = ["name[Blue Spice], area[city]", "Blue Spice is in the city.", "In the city, it's cheap."]


@pytest.fixture(scope="module")
def tokens() -> TextTokens:
    return TextTokens(word_tokenizer(TEXTS))


def test_words_are_numbered_by_frequency(tokens: TextTokens) -> None:
    vocabulary = tokens.tokenizer.get_vocab()
    assert [w for w, i in sorted(vocabulary.items(), key=lambda p: p[1])][:4] == [
        "<pad>",
        "<end>",
        "<break>",
        "<unk>",
    ]
    assert vocabulary["city"] == 4  # three times; all others less often
    assert tokens.size == len(vocabulary)
    again = word_tokenizer(reversed(TEXTS))
    assert vocabulary_hash(again) == vocabulary_hash(tokens.tokenizer)


def test_rare_words_are_unknown() -> None:
    made = TextTokens(word_tokenizer(TEXTS, least=2))
    unknown = made.tokenizer.unk_token_id
    assert made.response("Blue cheap whale")[1:3] == [unknown, unknown]
    with pytest.raises(DataError, match="99 times"):
        word_tokenizer(TEXTS, least=99)


def test_a_row_is_prompt_break_response_end(tokens: TextTokens) -> None:
    prompt, response = tokens.prompt(TEXTS[0]), tokens.response(TEXTS[1])
    assert prompt[-1] == tokens.tokenizer.get_vocab()["<break>"]
    assert response[-1] == tokens.end
    assert tokens.end not in prompt
    assert tokens.text(prompt) == "name [Blue Spice], area [city]"
    assert tokens.text(torch.tensor(response)) == TEXTS[1]
    assert tokens.prompt(TEXTS[0], 3) == prompt[-3:]
    assert tokens.prompts(TEXTS) == [tokens.prompt(text) for text in TEXTS]
    assert tokens.responses(TEXTS) == [tokens.response(text) for text in TEXTS]


def test_a_mask_says_what_is_text(tokens: TextTokens) -> None:
    ids = torch.tensor([tokens.response("the city"), [4, 4, 4]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    assert tokens.texts(ids, mask) == ["the city", "city"]


@pytest.mark.parametrize(
    ("joined", "running"),
    [
        ("It is cheap .", "It is cheap."),
        ("a family - friendly pub , The Mill", "a family-friendly pub, The Mill"),
        ("it ' s near ( very )", "it's near (very)"),
        ("it 's £ 20 - 25 !", "it's £20-25!"),
    ],
)
def test_words_become_running_text(joined: str, running: str) -> None:
    assert tidied(joined) == running


def test_settings_and_files_make_the_same_again(tokens: TextTokens, tmp_path: Path) -> None:
    again = TextTokens.restore(json.loads(json.dumps(tokens.settings())))
    assert again.fingerprint == tokens.fingerprint
    assert (again.end, again.padding, again.size) == (tokens.end, tokens.padding, tokens.size)
    for name, content in tokens.files().items():
        (tmp_path / name).write_bytes(content)
    read = load_tokenizer(str(tmp_path))
    assert read(TEXTS[2]).input_ids == tokens.tokenizer(TEXTS[2]).input_ids
    assert read.eos_token_id == tokens.end
    refuse_other_tokens(tokens.tokenizer, read, TEXTS, size=tokens.size, whose="teacher")


def subwords(**special: str):
    """A byte-level tokenizer as GPT-2's, whose end token is all it has."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def test_a_tokenizer_without_padding_uses_its_end() -> None:
    made = TextTokens(subwords(eos_token="<|end|>"), template="Q: {prompt}\nA:", name="bytes")
    assert made.padding == made.end
    assert made.text(made.prompt("whale {x}")) == "Q: whale {x}\nA:"
    assert made.text(made.response(" Anything at all…")) == "Anything at all…"
    with pytest.raises(ModelError, match="end token"):
        TextTokens(subwords())


def test_other_vocabularies_are_refused(tokens: TextTokens) -> None:
    ours = tokens.tokenizer
    with pytest.raises(ModelError, match="teacher gpt has another tokenizer"):
        refuse_other_tokens(ours, subwords(), TEXTS, size=99, whose="teacher gpt")
    shifted = word_tokenizer([*TEXTS, "the the the the the"])  # the same words, other ids
    with pytest.raises(ModelError, match="is id"):
        refuse_other_tokens(ours, shifted, TEXTS, size=99, whose="student")
    # The same words and ids, but cut elsewhere.
    import tokenizers

    cut = tokenizers.Tokenizer.from_str(ours.backend_tokenizer.to_str())
    cut.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=cut, unk_token="<unk>")
    with pytest.raises(ModelError, match="cuts text otherwise"):
        refuse_other_tokens(ours, theirs, TEXTS, size=99, whose="student")


def test_a_larger_vocabulary_of_one_family_is_accepted(tokens: TextTokens) -> None:
    larger = TextTokens.restore(tokens.settings()).tokenizer
    larger.add_tokens(["<extra>"])
    refuse_other_tokens(tokens.tokenizer, larger, TEXTS, size=tokens.size, whose="teacher")
    refuse_other_tokens(larger, tokens.tokenizer, TEXTS, size=tokens.size, whose="teacher")


def test_no_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))
