from __future__ import annotations

import copy

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model
from stillhouse.models.word_tagger import WordReader, WordTagger

TEXT = "Ada wrote the first program in 1843."


def tiny(**given) -> WordTagger:
    torch.manual_seed(0)
    settings = {"width": 16, "heads": 2, "buckets": 64, "layers": 2, "length": 32, **given}
    return WordTagger(**settings).eval()


def test_one_score_per_word_and_class():
    net = tiny(classes=3)
    codes = net.reader.read(TEXT).codes
    assert codes.shape == (8, 13)
    assert net(codes[None]).shape == (1, 8, 3)


def test_padding_changes_nothing():
    net = tiny()
    short, long = (net.reader.read(t).codes for t in ("One two.", TEXT))
    together = net(net.reader.join([short, long]))
    torch.testing.assert_close(together[0, :3], net(short[None])[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[1], net(long[None])[0], atol=1e-6, rtol=1e-5)
    assert torch.isfinite(net(torch.zeros(1, 4, 13, dtype=torch.int64))).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_right_side_counts_unless_masked(causal):
    net = tiny(causal=causal)
    codes = net.reader.read(TEXT).codes[None]
    other = codes.clone()
    other[0, -1] = net.reader.code("elsewhere")
    changed = (net(codes) - net(other)).abs().amax(-1)[0]
    assert changed[-1] > 1e-4
    assert (changed[:-1] > 1e-6).any() != causal


def test_heads_begin_with_the_words_beside():
    bias = tiny(heads=4).layers[0].bias.weight  # (2 * 32 + 1, heads), distance 0 in the middle
    assert bias.argmax(0).tolist() == [33, 31, 32, 32]
    assert tiny(heads=1).layers[0].bias.weight.argmax(0).tolist() == [32]


def test_position_matters():
    net = tiny()
    codes = net.reader.read("a b a b c").codes[None]
    out = net(codes)[0]
    assert (out[0] - out[2]).abs().max() > 1e-4


def test_the_reader_ignores_case_in_ids_and_keeps_it_in_letters():
    reader = WordReader(1000, 6, 8)
    upper, lower = reader.code("Word"), reader.code("word")
    assert upper[0] == lower[0] > 0
    assert upper[1] != lower[1]
    long = reader.code("internationalisation").tolist()[1:]
    shown = [1 + ord(c) for c in "inteon"]
    assert long == shown
    assert reader.read_word("word").shape == (1, 7)
    assert reader.read_word("").shape == (0, 7)
    assert reader.row(reader.read("a b c d e f g h i j").codes).shape == (8, 7)
    assert reader.join([reader.read("a").codes], 5).shape == (1, 5, 7)
    assert reader.read("").codes.shape == (0, 7)


def test_it_is_found_by_name_copied_and_moved():
    net = load_model("stillhouse:word-tagger", options={"width": 16, "heads": 2, "buckets": 32})
    assert isinstance(net, WordTagger)
    twin = copy.deepcopy(net.eval())
    codes = twin.reader.read(TEXT).codes[None]
    torch.testing.assert_close(twin(codes), net(codes))
    with pytest.raises(ModelError, match="divide"):
        WordTagger(width=10, heads=3)
